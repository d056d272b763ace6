"""Every framework's calls on GPUs, where they create their tensors."""

from __future__ import annotations

import pytest

from tests.conftest import PoolOf
from tests.test_clients import SETS, run_clients


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_sequences_of_calls(gpu_pool_of: PoolOf, num_ranks: int, kind: str) -> None:
    gpu_pool_of(num_ranks).run(run_clients, num_ranks, kind, "cuda")
