"""Groups of ranks that know nothing of each other, on the same GPUs, which each has for slices of time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from tests.gpu.conftest import take_device
from tests.gpu.test_dispatch_combine import FAMILIES, check_cases
from tokenferry.cli.ranks import RankPool

GROUPS = 4


@pytest.mark.slow
def test_groups_at_the_same_time(sharing: bool) -> None:
    """While kernels are compiled, the ranks of a group are seconds apart, too."""
    if sharing:
        pytest.skip("MPS runs the groups side by side")
    with ExitStack() as stack, ThreadPoolExecutor(GROUPS) as threads:
        pools = [stack.enter_context(RankPool(2, 1)) for _ in range(GROUPS)]
        for pool in pools:
            pool.run(take_device)
        names = ["small", "wide", "scaled", "wide"]
        runs = [
            threads.submit(pool.run, check_cases, FAMILIES[name] * 3, True)
            for pool, name in zip(pools, names, strict=True)
        ]
        failures = [error for run in runs if (error := run.exception()) is not None]
        assert not failures, failures
