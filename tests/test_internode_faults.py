"""Between nodes: bad input, disagreement, ranks that do not take part. Nodes are groups of ranks of this machine."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case, Scenario
from tests.conftest import PoolOf
from tests.internode_cases import LAYOUTS, NodeScenario, make_buffer
from tokenferry import (
    ArgumentError,
    Buffer,
    BufferStateError,
    CapacityError,
    Config,
    InternodeHandle,
    MismatchError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    TokenferryError,
)
from tokenferry.memory.heap import Heap
from tokenferry.modes.internode_low_latency import _on_all_nodes
from tokenferry.modes.nodes import Operation
from tokenferry.nn.functional import combine, dispatch

LAYOUT = "2x2"
CASE = Case(tokens=(6, 9, 3, 5), num_topk=3)


def works(buffer: Buffer, rank: int, case: Case = CASE) -> None:
    scenario = NodeScenario(case, rank, LAYOUT)
    result = scenario.dispatch(buffer)
    scenario.check_dispatch(result)
    scenario.check_combine(scenario.combine(buffer, result[4]))


def _disagreements(rank: int, num_ranks: int) -> list[str]:
    """Calls that do not fit together, made by one rank after the other; the Buffer goes on."""
    reasons = []

    def refused(kind: type[TokenferryError], call: Callable[[], Any]) -> None:
        with pytest.raises(kind) as caught:
            call()
        reasons.append(f"{type(caught.value).__name__}: {caught.value}")

    with make_buffer(rank, LAYOUT) as buffer:
        scenario = NodeScenario(CASE, rank, LAYOUT)
        handle = scenario.dispatch(buffer)[4]
        for odd in range(num_ranks):
            other = NodeScenario(Case(tokens=CASE.tokens, num_topk=3, row_bytes=256), rank, LAYOUT)
            refused(MismatchError, partial((other if rank == odd else scenario).dispatch, buffer))
            experts = NodeScenario(Case(tokens=CASE.tokens, num_topk=3, local_experts=5), rank, LAYOUT)
            refused(MismatchError, partial((experts if rank == odd else scenario).dispatch, buffer))
            call = scenario.combine if rank == odd else lambda b, h: b.dispatch(scenario.x, handle=h)
            refused(MismatchError, partial(call, buffer, handle))
            worst = 1 if rank == odd else 1000
            refused(CapacityError, partial(scenario.dispatch, buffer, num_worst_tokens=worst))
            works(buffer, rank)
        elsewhere = NodeScenario(Case(tokens=CASE.tokens, num_topk=3, seed=7), rank, LAYOUT)
        foreign = elsewhere.dispatch(buffer)[4]
        refused(MismatchError, lambda: buffer.dispatch(scenario.x, handle=foreign if rank == 2 else handle))
        works(buffer, rank)
    return reasons


def test_disagreement_raises_on_every_rank_and_the_buffer_goes_on(pool_of: PoolOf) -> None:
    reasons = pool_of(4).run(_disagreements)
    assert len({len(of_rank) for of_rank in reasons}) == 1
    for step in zip(*reasons, strict=True):
        assert len({reason.partition(":")[0] for reason in step}) == 1
        if step[0].startswith("Capacity"):
            assert len(set(step)) == 1
            assert "num_worst_tokens: got 1" in step[0]
        else:
            assert all("disagree on" in reason for reason in step)
    assert all("row_bytes" in of_rank[0] and "handle" in of_rank[-1] for of_rank in reasons)


def _bad_input(rank: int, num_ranks: int) -> None:
    with make_buffer(rank, LAYOUT) as buffer:
        scenario = NodeScenario(CASE, rank, LAYOUT)
        handle = scenario.dispatch(buffer)[4]
        arguments = scenario.layout_arguments(buffer) | scenario.topk_arguments()

        def refused(name: str, call: Callable[[], Any]) -> None:
            with pytest.raises(ArgumentError) as caught:
                call()
            assert caught.value.name == name

        per_node = arguments["num_tokens_per_rdma_rank"]
        for bad in (None, per_node[:1], per_node.long(), per_node + 1):
            wrong = arguments | {"num_tokens_per_rdma_rank": bad}
            refused("num_tokens_per_rdma_rank", lambda wrong=wrong: buffer.dispatch(scenario.x, **wrong))
        refused("handle", lambda: buffer.dispatch(scenario.x, handle=handle[:6]))
        refused("handle", lambda: buffer.combine(scenario.own_rows, handle[:6]))
        refused("x", lambda: buffer.dispatch(scenario.x[1:], handle=handle))
        refused("x", lambda: buffer.combine(scenario.own_rows[1:], handle))
        refused("config", lambda: buffer.internode_dispatch(scenario.x, handle))
        refused("config", lambda: buffer.internode_combine(scenario.own_rows, handle))
        for index, name in enumerate(InternodeHandle._fields):
            value = handle[index]
            for bad in (value.double(), value[:, :1, None] if value.dim() > 1 else value[:-1], None):
                broken = (*handle[:index], bad, *handle[index + 1 :])
                refused(f"handle.{name}", lambda broken=broken: buffer.dispatch(scenario.x, handle=broken))
        disordered = handle._replace(recv_src_meta=handle.recv_src_meta.flip(0))
        refused("handle.recv_src_meta", lambda: buffer.combine(scenario.own_rows, disordered))
        works(buffer, rank)
        config = Config(4)
        result = buffer.internode_dispatch(scenario.x, config=config, **arguments)
        scenario.check_dispatch(result)
        combined = buffer.internode_combine(
            scenario.own_rows, tuple(result[4]), scenario.own_weights, scenario.bias, config=config
        )
        scenario.check_combine(combined)


def test_bad_input_touches_no_peer(pool_of: PoolOf) -> None:
    pool_of(4).run(_bad_input)


def _ids_that_the_device_looks_at(rank: int, num_ranks: int, layout: str) -> list[str]:
    """A rank gives ids out of range, as data planes of GPUs find it out: after the others have begun."""
    raised, gather = [], Operation._gather
    for odd in range(num_ranks):
        with make_buffer(rank, layout) as buffer:
            plane: Any = buffer.runtime.party().plane  # type: ignore[union-attr]
            topology = buffer.runtime.topology  # type: ignore[union-attr]
            scenario = NodeScenario(Case(tokens=CASE.tokens[:num_ranks], num_topk=3), rank, layout)
            flag = torch.zeros(1, dtype=torch.int64)

            def bad_gather(operation: Operation, mine: Any, odd: int = odd, topology: Any = topology) -> Any:
                if rank == odd:
                    raise ArgumentError("topk_idx", "an expert id out of range", "others")
                if odd in topology.local_ranks:
                    raise MismatchError("dispatch", 1, [odd], "gave expert ids out of range")
                return gather(operation, mine)

            if len(topology.local_ranks) == 1:
                flag[0] = rank == odd
                patch = mock.patch.multiple(plane, bad_input=lambda: flag, forgive=flag.zero_)  # noqa: B023
            else:
                patch = mock.patch.object(Operation, "_gather", bad_gather)  # type: ignore[assignment]
            with patch, pytest.raises((ArgumentError, MismatchError)) as caught:
                scenario.dispatch(buffer)
            raised.append(f"{type(caught.value).__name__}: {caught.value}")
            assert not flag.any()
            result = scenario.dispatch(buffer)
            scenario.check_dispatch(result)
            scenario.check_combine(scenario.combine(buffer, result[4]))
    return raised


@pytest.mark.parametrize("layout", ["2x1", "2x2"])
def test_bad_ids_that_the_device_finds_leave_the_buffer_as_it_is(layout: str, pool_of: PoolOf) -> None:
    num_ranks = len(LAYOUTS[layout])
    for rank, reasons in enumerate(pool_of(num_ranks).run(_ids_that_the_device_looks_at, layout)):
        for odd, reason in enumerate(reasons):
            if rank == odd:
                assert reason.startswith("ArgumentError: topk_idx")
            else:
                assert reason.startswith("MismatchError")
                assert f"rank {odd}:" in reason
                assert "expert ids out of range" in reason


def _found_at_the_next_call(rank: int, num_ranks: int, kind: str) -> str:
    """What a kernel of an earlier operation reports, rank 0 finds when it begins the next one."""
    reported = {
        "input": ArgumentError("topk_idx", "an expert id out of range", "others"),
        "timeout": PeerTimeoutError("combine", 3, [1], "no sign of life"),
    }[kind]
    with make_buffer(rank, "2x1", timeout=20.0) as buffer:
        scenario = NodeScenario(Case(tokens=(3, 4), num_topk=3), rank, "2x1")
        plane: Any = buffer.runtime.party().plane  # type: ignore[union-attr]
        caught = ""
        if rank == 0:
            with mock.patch.object(plane, "check", side_effect=reported), pytest.raises(type(reported)):
                scenario.dispatch(buffer)
        try:
            scenario.check_dispatch(scenario.dispatch(buffer))
        except PeerError as error:
            caught = type(error).__name__
        return caught


def test_what_an_earlier_operation_reports_ends_the_rail_if_it_ends_the_buffer(pool_of: PoolOf) -> None:
    assert pool_of(2).run(_found_at_the_next_call, "input") == ["", ""]
    started = time.monotonic()
    assert pool_of(2).run(_found_at_the_next_call, "timeout") == ["PeerLostError"] * 2
    assert time.monotonic() - started < 15  # no other node waits for its deadline


def _filled(rank: int, num_ranks: int) -> list[list[int]]:
    """Ids of all nodes, where rows of the other node never come."""
    with make_buffer(rank, "2x1") as buffer:
        nodes: Any = buffer.runtime.party().nodes  # type: ignore[union-attr]
        lost: Any = SimpleNamespace(wait=lambda node: None, settle=lambda: None)
        operation: Any = SimpleNamespace(post=lambda sends, receives: lost)
        ids = torch.full((2, 3), 5 + rank)
        with mock.patch.object(torch.Tensor, "new_empty", lambda self, shape: self.new_full(shape, 77)):
            (found,) = _on_all_nodes(operation, nodes, 4, [(ids, -1)])
        return found[:, 0].tolist()


def test_a_rank_that_does_not_come_has_chosen_nothing(pool_of: PoolOf) -> None:
    found = pool_of(2).run(_filled)
    assert found == [[5, 5, -1, -1, -1, -1, -1, -1], [-1, -1, -1, -1, 6, 6, -1, -1]]


def _refused_constructions(rank: int, num_ranks: int) -> None:
    node = LAYOUTS[LAYOUT][rank]
    for name, environment, options in (
        ("carrier", {}, {"carrier": "pigeon"}),
        ("TOKENFERRY_CARRIER", {"TOKENFERRY_CARRIER": "pigeon"}, {}),
    ):
        with mock.patch.dict(os.environ, environment), pytest.raises(ArgumentError, match="process_group") as caught:
            Buffer(dist.group.WORLD, node=node, **options)
        assert caught.value.name == name
    with pytest.raises(TokenferryError, match="enable_shrink"):
        Buffer(dist.group.WORLD, node=node, low_latency_mode=True, enable_shrink=True)
    with Buffer(dist.group.WORLD, node=node, carrier="process_group", timeout=20.0) as buffer:
        works(buffer, rank)


def test_constructions_that_are_refused(pool_of: PoolOf) -> None:
    pool_of(4).run(_refused_constructions)


def _absent(rank: int, num_ranks: int, absent: int, seconds: float) -> tuple[str, float]:
    """One rank does not take part; then all build a new Buffer."""
    with Buffer(dist.group.WORLD, node=LAYOUTS[LAYOUT][rank], timeout=seconds) as buffer:
        works(buffer, rank)
        dist.barrier()
        started, text = time.monotonic(), ""
        if rank != absent:
            with pytest.raises(PeerError) as caught:
                works(buffer, rank)
            assert isinstance(caught.value, (PeerTimeoutError, PeerLostError))
            text = str(caught.value)
            assert not buffer.is_available()
            with pytest.raises(BufferStateError):
                works(buffer, rank)
        took = time.monotonic() - started
        dist.barrier()
    with make_buffer(rank, LAYOUT) as buffer:
        works(buffer, rank)
    return text, took


def test_absent_rank_is_named_on_every_other(pool_of: PoolOf) -> None:
    absent = 0  # the last: see test_fault_ranks.py
    for rank, (text, took) in enumerate(pool_of(4).run(_absent, absent, 2.0)):
        assert took < 4.0
        if rank != absent:
            assert f"rank {absent}" in text or f"ranks {absent - absent % 2}, {absent - absent % 2 + 1}" in text, text


def _broken(rank: int, num_ranks: int) -> tuple[str, float]:
    """A rank fails in the middle of an operation, after all have agreed."""
    with Buffer(dist.group.WORLD, node=LAYOUTS[LAYOUT][rank], timeout=20.0) as buffer:
        scenario = NodeScenario(Case(tokens=(40,), num_topk=4), rank, LAYOUT)
        works(buffer, rank)
        calls = []
        publish = Heap.publish

        def failing(heap: Heap, fields: Any) -> None:
            calls.append(1)
            if rank == 1 and len(calls) == 4:
                raise MemoryError("no more")
            publish(heap, fields)

        started = time.monotonic()
        with mock.patch.object(Heap, "publish", failing), pytest.raises((MemoryError, PeerError)) as caught:
            scenario.dispatch(buffer, config=Config(2, 6, 256, 2, 4))
        return f"{type(caught.value).__name__}: {caught.value}", time.monotonic() - started


def test_failure_in_the_middle_of_an_operation(pool_of: PoolOf) -> None:
    """No rank gets partial results, and all learn of it before the deadline, those of the node also why."""
    texts, seconds = zip(*pool_of(4).run(_broken), strict=True)
    assert max(seconds) < 2.0
    assert texts[1] == "MemoryError: no more"
    assert "MemoryError: no more" in texts[0]
    assert all(text.startswith("Peer") for text in (texts[0], texts[2], texts[3]))


def _two_buffers(rank: int, num_ranks: int) -> None:
    """Different layouts on one group at a time, and a sub-group of other nodes."""
    with make_buffer(rank, "2x2") as one, make_buffer(rank, "2x2 alternating") as two:
        first, second = NodeScenario(CASE, rank, "2x2"), NodeScenario(CASE, rank, "2x2 alternating")
        handles = first.dispatch(one)[4], second.dispatch(two)[4]
        second.check_combine(second.combine(two, handles[1]))
        first.check_combine(first.combine(one, handles[0]))
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    with Buffer(groups[rank % 2], node=rank, timeout=20.0) as buffer:
        scenario = NodeScenario(CASE, buffer.rank, "2x1")
        result = scenario.dispatch(buffer)
        scenario.check_dispatch(result)
    with Buffer(dist.group.WORLD, node=0, timeout=20.0) as buffer:
        Scenario(CASE, rank, num_ranks).check_all(buffer)


def test_several_buffers_and_sub_groups(pool_of: PoolOf) -> None:
    pool_of(4).run(_two_buffers)


def _autograd(rank: int, num_ranks: int) -> None:
    """The differentiable functions take handles of either kind."""
    with make_buffer(rank, LAYOUT) as buffer:
        scenario = NodeScenario(Case(tokens=(7, 0, 4, 9), dtype=torch.float64, num_topk=3), rank, LAYOUT)
        ids = scenario.given.topk_idx
        x = torch.randn(len(ids), 16, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(ids.shape)
        rows, _, _, _, handle = dispatch(buffer, x, ids, weights, scenario.num_experts, num_worst_tokens=200)
        combine(buffer, 2 * rows, handle).sum().backward()
        copies = (scenario.wanted_handle["is_token_in_rank"]).sum(1, keepdim=True)
        assert x.grad is not None
        assert torch.equal(x.grad, 2.0 * copies.expand(x.shape))


def test_gradients(pool_of: PoolOf) -> None:
    pool_of(4).run(_autograd)
