"""Groups of ranks that know nothing of each other, on the same GPUs, which each has for slices of time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

from tests.gpu.conftest import take_device
from tests.gpu.test_dispatch_combine import FAMILIES, check_cases
from tokenferry.cli.ranks import RankPool

GROUPS = 4


@pytest.mark.slow
@pytest.mark.ranks(1)  # more on a GPU, and on purpose without MPS
def test_groups_at_the_same_time(sharing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """While kernels are compiled, the ranks of a group are seconds apart, too."""
    if sharing:
        pytest.skip("MPS runs the groups side by side")
    if torch.cuda.device_count() < 2:
        monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
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
