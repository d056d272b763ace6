"""Dispatches whose outputs are made before their counts are known, with enough room and with too little."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch.distributed as dist

from tests.cases import Scenario, filled_memory
from tests.elastic_cases import Elastic, elastic_buffer
from tests.gpu.test_dispatch_combine import SMALL, TIMEOUT, GpuPoolOf
from tokenferry import Buffer

STEADY = replace(SMALL, tokens=(64, 70), num_topk=4)
"""With as many choices as ranks, so that all of them get more where everything goes to all."""
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


def _elastic_rooms(rank: int, num_ranks: int, expand: bool, bulk: bool) -> list[bool]:
    """Likewise, of dispatches that tell where rows are from."""
    roomy = []
    with elastic_buffer(dist.group.WORLD, device="cuda") as buffer:
        plane = buffer.runtime.party().plane  # type: ignore[union-attr]
        plane._target = plane._target._replace(can_bulk=plane._target.can_bulk and bulk)
        for routing in ROUTINGS:
            case = replace(STEADY, routing=routing, alignment=16)
            elastic = Elastic(case, rank, num_ranks, expand=expand, device="cuda")
            with filled_memory():
                rows, ids, weights, handle, _ = elastic.dispatch(buffer, do_zero_padding=True)
                roomy.append(rows.untyped_storage().nbytes() > rows.nbytes)
                elastic.check_rows(rows, padded=True)
                elastic.check_weights(weights, ids, padded=True)
                elastic.check_handle(handle)
                elastic.check_combine(buffer, handle, len(rows))
                elastic.check_rows(buffer.dispatch(elastic.x, handle=handle)[0])
        # As many rows, and more that align them, as if the ones before had been aligned so.
        if expand:
            plane.rooms._known = {(kind[0], 128): known for kind, known in plane.rooms._known.items()}
        elastic = Elastic(replace(case, alignment=128), rank, num_ranks, expand=expand, device="cuda")
        for _ in range(2):
            rows = elastic.dispatch(buffer, do_zero_padding=True)[0]
            roomy.append(rows.untyped_storage().nbytes() > rows.nbytes)
            elastic.check_rows(rows, padded=True)
    return roomy


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("expand", [True, False])
def test_rooms_of_elastic_dispatches(gpu_pool_of: GpuPoolOf, num_ranks: int, expand: bool, bulk: bool) -> None:
    for roomy in gpu_pool_of(num_ranks).run(_elastic_rooms, expand, bulk):
        check_roomy(roomy)
        assert roomy[8] is not expand, "more expanded rows than room"
        assert roomy[9]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_rooms(gpu_pool_of: GpuPoolOf, num_ranks: int) -> None:
    for roomy in gpu_pool_of(num_ranks).run(_rooms):
        check_roomy(roomy)


def check_roomy(roomy: list[bool]) -> None:
    """What lies in memory for more, of the dispatches of ROUTINGS."""
    assert not roomy[0]
    assert roomy[1]
    assert not roomy[6], "more rows than room: outputs of the right size"
    assert roomy[7]
