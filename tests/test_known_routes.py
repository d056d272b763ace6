"""The routes of a handle between nodes are found once, and again where somebody may have changed it."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.conftest import PoolOf
from tests.internode_cases import NodeScenario, make_buffer, small_chunks
from tokenferry import ArgumentError, Buffer
from tokenferry.modes.routes import KnownRoutes, Routes, check_handle

CASE = Case(tokens=(33, 0, 7, 12), num_topk=4, local_experts=3, spare_rows=5)
LAYOUT = "2x2 alternating"


def known_of(buffer: Buffer) -> KnownRoutes:
    assert buffer.runtime is not None
    nodes = buffer.runtime.party().nodes
    assert nodes is not None
    return nodes.routes


def found_in(buffer: Buffer, handle: Any) -> Routes | None:
    """What is known of a handle."""
    known = known_of(buffer)._find(handle)
    return None if known is None else known.routes


def assert_equal(routes: Routes, wanted: Routes) -> None:
    for name, one, other in zip(Routes._fields, routes, wanted, strict=True):
        if name in ("starts", "counts", "parts"):
            assert one == other, name
        else:
            of_one, of_other = ([part] if isinstance(part, torch.Tensor) else part for part in (one, other))
            assert len(of_one) == len(of_other), name
            for a, b in zip(of_one, of_other, strict=True):
                assert torch.equal(a, b), name
                assert a.dtype == b.dtype, name
                assert a.is_contiguous(), name


def check_known(rank: int, num_ranks: int, worst: int) -> None:
    with make_buffer(rank, LAYOUT) as buffer:
        topology = buffer.runtime.topology  # type: ignore[union-attr]
        scenario = NodeScenario(CASE, rank, LAYOUT)
        handle = scenario.dispatch(buffer, num_worst_tokens=worst)[4]
        routes = found_in(buffer, handle)
        assert routes is not None
        assert routes.rows is None
        again = known_of(buffer).of(torch.device("cpu"), handle)[1]
        assert_equal(again, check_handle(topology, torch.device("cpu"), handle)[1])
        assert found_in(buffer, handle) is again
        assert found_in(buffer, list(handle)) is again
        copies = tuple(element.clone() for element in handle)
        assert found_in(buffer, copies) is None
        scenario.check_combine(scenario.combine(buffer, copies))
        assert found_in(buffer, copies) is not None
        mixed = (*handle[:-1], copies[-1])
        assert found_in(buffer, mixed) is None
        assert len(known_of(buffer)._known) == 2
        del copies, mixed
        assert len(known_of(buffer)._known) == 1
        for chunk in (3, 11, 3):
            scenario.check_combine(scenario.combine(buffer, handle, config=small_chunks(chunk)))
        handle[9].add_(0)  # might be other values
        assert found_in(buffer, handle) is None
        scenario.check_combine(scenario.combine(buffer, handle))
        assert found_in(buffer, handle) is not None
        handle[4].neg_()
        with pytest.raises(ArgumentError, match="recv_rdma_rank_prefix_sum"):
            buffer.dispatch(scenario.x, handle=handle)
        del handle
        gc.collect()  # the error had it
        assert not known_of(buffer)._known


@pytest.mark.parametrize("worst", [0, 90])
def test_known_until_changed(pool_of: PoolOf, worst: int) -> None:
    pool_of(4).run(check_known, worst)


def check_inference(rank: int, num_ranks: int) -> None:
    with make_buffer(rank, LAYOUT) as buffer:
        with torch.inference_mode():
            scenario = NodeScenario(CASE, rank, LAYOUT)
            handle = scenario.dispatch(buffer)[4]
            assert found_in(buffer, handle) is None
            scenario.check_combine(scenario.combine(buffer, handle))
            assert not known_of(buffer)._known
            kept = tuple(element.clone() for element in handle)
        with torch.inference_mode():
            scenario.check_combine(scenario.combine(buffer, kept))
        assert not known_of(buffer)._known


def test_inference_mode_is_looked_at_every_time(pool_of: PoolOf) -> None:
    pool_of(4).run(check_inference)
