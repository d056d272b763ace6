"""The low-latency pair between nodes against the oracle: nodes are groups of ranks of this machine."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.conftest import PoolOf, but_slow, slow
from tests.internode_cases import LAYOUTS
from tests.internode_low_latency_cases import NodeScenario, check_nodes, make_buffer
from tests.low_latency_cases import FORMATS, ROUTINGS, Case, check_case
from tokenferry import ArgumentError, BufferStateError, MismatchError, PeerError, PeerTimeoutError
from tokenferry.rail import RailError
from tokenferry.rail.process_group import ProcessGroupRail


@pytest.mark.parametrize("layout", but_slow(LAYOUTS, "2x2", "3x2", "3x1", "2x4", "3x4", "2x8"))
def test_layouts(pool_of: PoolOf, layout: str) -> None:
    cases = [Case(tokens=(4, 0, 7, 1), spare=2, format=name, num_topk=4) for name in FORMATS]
    pool_of(len(LAYOUTS[layout])).run(check_nodes, layout, cases)


def test_routings(pool_of: PoolOf) -> None:
    pool_of(4).run(check_nodes, "2x2", [Case(tokens=(6, 3), routing=routing) for routing in ROUTINGS])


@pytest.mark.parametrize("hidden", [136, *slow(8, 2048)])
def test_shapes(pool_of: PoolOf, hidden: int) -> None:
    cases = [Case(tokens=(5, 9), hidden=hidden, num_topk=num_topk, local_experts=3) for num_topk in (1, 9, 32)]
    pool_of(6).run(check_nodes, "3x2 mixed", cases)


def test_partial_sums_in_float32(pool_of: PoolOf) -> None:
    pool_of(4).run(check_nodes, "2x2", [Case(tokens=(8, 5), num_topk=8)], True)


def _in_flight(rank: int, num_ranks: int) -> None:
    """Several operations at a time; each rank calls its hooks in an order of its own, some behind a barrier."""
    order = random.Random(rank)
    with make_buffer(rank, "2x2") as buffer:
        scenarios = [NodeScenario(Case(tokens=(5, 2), seed=seed), rank, "2x2") for seed in range(4)]
        sent = [scenario.dispatch(buffer, return_recv_hook=True) for scenario in scenarios]
        dist.barrier()
        for index in order.sample(range(4), 4):
            sent[index][4]()
        for scenario, result in zip(scenarios, sent, strict=True):
            scenario.check_dispatch(result)
        answers = [
            scenario.combine(buffer, result, return_recv_hook=True)
            for scenario, result in zip(scenarios, sent, strict=True)
        ]
        dist.barrier()
        for index in order.sample(range(4), 4):
            answers[index][2]()
        for scenario, answer in zip(scenarios, answers, strict=True):
            scenario.check_combine(answer)


def test_hooks_in_any_order(pool_of: PoolOf) -> None:
    pool_of(4).run(_in_flight)


def _room(rank: int, num_ranks: int) -> None:
    """A rank gets room in its stage when its neighbour reads, which has gone on to the next call, and waits there.

    Ranks 1 and 2 come late to the second operation inside their nodes: their neighbours have made room for them, so
    that they do not read. Then each of the four waits for another.
    """
    with make_buffer(rank, "2x2", timeout=8.0, num_nvl_bytes=4096) as buffer:
        scenarios = [NodeScenario(Case(tokens=(16,), hidden=512, seed=seed), rank, "2x2") for seed in range(4)]
        runtime = buffer.runtime
        assert runtime is not None
        plane: Any = runtime.party().plane
        send, number = plane.low_latency_dispatch, itertools.count()

        def late(*given: Any) -> Any:
            if next(number) == 1 and rank in (1, 2):
                time.sleep(0.5)
            return send(*given)

        plane.low_latency_dispatch = late
        sent = [scenario.dispatch(buffer, return_recv_hook=True) for scenario in scenarios]
        for scenario, result in zip(scenarios, sent, strict=True):
            result[4]()
            scenario.check_dispatch(result)


def test_stage_with_room_for_one(pool_of: PoolOf) -> None:
    pool_of(4).run(_room)


def _mixed_modes(rank: int, num_ranks: int) -> None:
    from tests.internode_cases import Case as NormalCase
    from tests.internode_cases import NodeScenario as NormalScenario

    with make_buffer(rank, "2x2") as buffer:
        normal = NormalScenario(NormalCase(tokens=(9, 4)), rank, "2x2")
        quick = NodeScenario(Case(tokens=(3, 6)), rank, "2x2")
        for _ in range(3):
            sent = quick.dispatch(buffer, return_recv_hook=True)
            result = normal.dispatch(buffer)
            normal.check_dispatch(result)
            sent[4]()
            quick.check_dispatch(sent)
            answer = quick.combine(buffer, sent, return_recv_hook=True)
            normal.check_combine(normal.combine(buffer, result[4]))
            answer[2]()
            quick.check_combine(answer)


def test_interleaved_with_the_normal_mode(pool_of: PoolOf) -> None:
    pool_of(4).run(_mixed_modes)


def _statistics(rank: int, num_ranks: int) -> None:
    with make_buffer(rank, "2x2") as buffer:
        scenario = NodeScenario(Case(), rank, "2x2")
        received = torch.zeros(scenario.case.local_experts, dtype=torch.int32)
        waits, home = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
        result = scenario.dispatch(
            buffer, cumulative_local_expert_recv_stats=received, dispatch_wait_recv_cost_stats=waits
        )
        assert torch.equal(received, result[1])
        scenario.check_combine(scenario.combine(buffer, result, combine_wait_recv_cost_stats=home))
        for stats in (waits, home):
            peer = rank ^ 1
            assert stats[peer] > 0
            assert int((stats > 0).sum()) == 1


def test_statistics(pool_of: PoolOf) -> None:
    """Of waits those for ranks of the node."""
    pool_of(4).run(_statistics)


def _trouble(rank: int, num_ranks: int, kind: str) -> tuple[str, float]:
    with make_buffer(rank, "2x2", timeout=2.0) as buffer:
        scenario = NodeScenario(Case(), rank, "2x2")
        check_case(buffer, scenario)
        dist.barrier()
        started, text = time.monotonic(), ""
        if kind == "mismatch":
            wrong = NodeScenario(Case(hidden=256), rank, "2x2") if rank == 3 else scenario
            with pytest.raises((MismatchError, PeerError)) as caught:
                wrong.dispatch(buffer)
            text = f"{type(caught.value).__name__}: {caught.value}"
        elif rank != 3:
            with pytest.raises(PeerError) as caught_absent:
                scenario.dispatch(buffer, return_recv_hook=kind == "hook")[4]()  # type: ignore[misc]
            text = str(caught_absent.value)
        took = time.monotonic() - started
        if text:
            assert not buffer.is_available()
            with pytest.raises(BufferStateError):
                scenario.dispatch(buffer)
        dist.barrier()
    with make_buffer(rank, "2x2") as buffer:
        check_case(buffer, scenario)
    return text, took


@pytest.mark.parametrize("kind", ["absent", "hook", "mismatch"])
def test_trouble_is_named(pool_of: PoolOf, kind: str) -> None:
    found: list[Any] = pool_of(4).run(_trouble, kind)
    assert max(took for _, took in found) < 3.5
    if kind == "mismatch":
        assert sum(text.startswith("MismatchError") for text, _ in found) >= 2
    else:
        assert all("rank 3" in text or "ranks 2, 3" in text for text, _ in found[:3]), found


def _garbage(rank: int, num_ranks: int, at_home: bool) -> str:
    """A rail that ended while nobody waited, and a data plane that reports what came last: the rail is to blame."""
    failure = RailError([1 - rank], True, "no sign of life for 4.0 s")
    scenario = NodeScenario(Case(tokens=(5,), hidden=256), rank, "2x1")
    with make_buffer(rank, "2x1") as buffer:
        result = scenario.dispatch(buffer)
        scenario.check_dispatch(result)
        answer = scenario.combine(buffer, result, return_recv_hook=True)
        plane: Any = buffer.runtime.party().plane  # type: ignore[union-attr]
        reported = mock.patch.object(plane, "check", side_effect=ArgumentError("topk_idx", "1 << 40", "less"))
        ended = mock.patch.object(ProcessGroupRail, "failure", failure)
        with reported, ended, pytest.raises(PeerTimeoutError) as caught:
            answer[2]() if at_home else scenario.dispatch(buffer)
        with pytest.raises(BufferStateError):
            scenario.dispatch(buffer)
        dist.barrier()
    return str(caught.value)


@pytest.mark.parametrize("at_home", [False, True])
def test_garbage_of_a_rail_that_ended_is_not_blamed(pool_of: PoolOf, at_home: bool) -> None:
    for rank, text in enumerate(pool_of(2).run(_garbage, at_home)):
        assert f"node {1 - rank}" in text
        assert "4.0 s" in text
