"""The operators on GPUs compute what the oracle says, and leave zeros past the received rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.test_ops import check_cases
from tokenferry.cli.ranks import RankPool


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_high_throughput_as_the_oracle_says(gpu_pool_of: Callable[[int], RankPool], num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_cases, "cuda")
