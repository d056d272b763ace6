"""Dispatches whose outputs are made before their counts are known, with enough room and with too little."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from tests.cases import Scenario
from tests.gpu.test_dispatch_combine import SMALL, TIMEOUT, GpuPoolOf
from tokenferry import Buffer

STEADY = replace(SMALL, tokens=(64, 70))
ROUTINGS = ("random", "random", "own", "own", "own", "own", "all", "all")


def _rooms(rank: int, num_ranks: int) -> list[bool]:
    """Whether the rows of each dispatch lie in memory for more."""
    roomy = []
    with Buffer(dist.group.WORLD, timeout=TIMEOUT, device="cuda") as buffer:
        for routing in ROUTINGS:
            scenario = Scenario(replace(STEADY, routing=routing), rank, num_ranks, "cuda")
            result = scenario.dispatch(buffer)
            scenario.check_dispatch(result)
            scenario.check_combine(scenario.combine(buffer, result[4]))
            rows = result[0]
            roomy.append(rows.untyped_storage().nbytes() > rows.nbytes)
    return roomy


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rooms(gpu_pool_of: GpuPoolOf, num_ranks: int) -> None:
    for roomy in gpu_pool_of(num_ranks).run(_rooms):
        assert not roomy[0]
        assert roomy[1]
        assert not roomy[6], "more rows than room: outputs of the right size"
        assert roomy[7]
