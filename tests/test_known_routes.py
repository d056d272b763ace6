"""The routes of a handle between nodes are found once, and again where somebody may have changed it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.cases import Case
from tests.conftest import PoolOf
from tests.internode_cases import NodeScenario, make_buffer, small_chunks
from tokenferry import ArgumentError, Buffer
from tokenferry.modes import routes
from tokenferry.modes.routes import KnownRoutes, Routes, check_handle
from tokenferry.topology import Topology

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


def assert_equal(found: Routes, wanted: Routes) -> None:
    for name, one, other in zip(Routes._fields, found, wanted, strict=True):
        if name in ("starts", "counts", "parts"):
            assert one == other, name
        else:
            of_one, of_other = ([part] if isinstance(part, torch.Tensor) else part for part in (one, other))
            assert len(of_one) == len(of_other), name
            for a, b in zip(of_one, of_other, strict=True):
                assert torch.equal(a, b), name
                assert a.dtype == b.dtype, name
                assert a.is_contiguous(), name


@contextmanager
def looked_at() -> Iterator[list[object]]:
    """The handles that were looked at."""
    handles: list[object] = []
    look = routes.check_handle

    def noting(topology: Topology, device: torch.device, handle: object) -> Any:
        handles.append(handle)
        return look(topology, device, handle)

    with mock.patch.object(routes, "check_handle", noting):
        yield handles


def check_known(rank: int, num_ranks: int, worst: int) -> None:
    with make_buffer(rank, LAYOUT) as buffer, looked_at() as looked:
        topology = buffer.runtime.topology  # type: ignore[union-attr]
        scenario = NodeScenario(CASE, rank, LAYOUT)
        handle = scenario.dispatch(buffer, num_worst_tokens=worst)[4]
        first = found_in(buffer, handle)
        assert first is not None
        assert first.rows is None
        again = known_of(buffer).of(torch.device("cpu"), handle)[1]
        assert_equal(again, check_handle(topology, torch.device("cpu"), handle)[1])
        assert found_in(buffer, list(handle)) is again
        for chunk in (3, 11, 3):
            scenario.check_combine(scenario.combine(buffer, handle, config=small_chunks(chunk)))
            assert again.parts is not None
            assert len(again.parts) == 1
        buffer.dispatch(scenario.x, handle=handle)
        assert not looked

        copies = tuple(element.clone() for element in handle)
        scenario.check_combine(scenario.combine(buffer, copies))
        scenario.check_combine(scenario.combine(buffer, (*handle[:-1], copies[-1])))
        assert len(looked) == 2
        looked.clear()
        assert len(known_of(buffer)._known) == 1

        handle[9].add_(0)  # might be other values
        scenario.check_combine(scenario.combine(buffer, handle))
        assert len(looked) == 1
        looked.clear()
        handle[4].neg_()
        with pytest.raises(ArgumentError, match="recv_rdma_rank_prefix_sum"):
            buffer.dispatch(scenario.x, handle=handle)


@pytest.mark.parametrize("worst", [0, 90])
def test_known_until_changed(pool_of: PoolOf, worst: int) -> None:
    pool_of(4).run(check_known, worst)


def check_other_memory(rank: int, num_ranks: int) -> None:
    """A tensor that has got other memory, which torch does not count."""
    with make_buffer(rank, LAYOUT) as buffer:
        scenario = NodeScenario(CASE, rank, LAYOUT)
        handle = scenario.dispatch(buffer)[4]
        assert found_in(buffer, handle) is not None
        handle[4].data = -handle[4]
        assert found_in(buffer, handle) is None
        with pytest.raises(ArgumentError, match="recv_rdma_rank_prefix_sum"):
            buffer.dispatch(scenario.x, handle=handle)


def test_other_memory_is_looked_at(pool_of: PoolOf) -> None:
    pool_of(4).run(check_other_memory)


def check_forgotten(rank: int, num_ranks: int) -> None:
    with make_buffer(rank, LAYOUT) as buffer:
        scenario = NodeScenario(CASE, rank, LAYOUT)
        for kept in range(10):
            handle = scenario.dispatch(buffer)[4]
            assert len(known_of(buffer)._known) == 1
            element = handle[kept]
            del handle
            assert not known_of(buffer)._known, kept
            del element


def test_forgotten_with_the_first_tensor_that_goes(pool_of: PoolOf) -> None:
    pool_of(4).run(check_forgotten)


def check_inference(rank: int, num_ranks: int) -> None:
    with make_buffer(rank, LAYOUT) as buffer:
        with torch.inference_mode():
            scenario = NodeScenario(CASE, rank, LAYOUT)
            handle = scenario.dispatch(buffer)[4]
            scenario.check_combine(scenario.combine(buffer, handle))
        scenario.check_combine(scenario.combine(buffer, handle))
        assert not known_of(buffer)._known


def test_inference_mode_is_looked_at_every_time(pool_of: PoolOf) -> None:
    pool_of(4).run(check_inference)
