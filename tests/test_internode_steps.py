"""Between nodes: how many messages an operation sends, in what order, and what is under way meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.cases import Case
from tests.conftest import PoolOf, slow
from tests.internode_cases import LAYOUTS, NodeScenario, make_buffer, small_chunks
from tests.test_device_rail import CPU, rail_of
from tokenferry import Buffer, Config, MismatchError
from tokenferry.dataplane.cpu import CpuDataPlane
from tokenferry.modes import internode
from tokenferry.modes.chunks import ChunkedRows, Chunking, chunking_of
from tokenferry.modes.nodes import Operation
from tokenferry.modes.shares import Offer
from tokenferry.rail import CARRIERS, PROCESS_GROUP
from tokenferry.rail.device_rail import DeviceRail
from tokenferry.rail.process_group import PostedTransfer

CASE = Case(tokens=(40, 23, 31, 8), num_topk=3, local_experts=4, row_bytes=64, combine_bytes=48)


@contextmanager
def watched(buffer: Buffer) -> Iterator[list[str]]:
    """What an operation does on the rail and inside the node, in order."""
    assert buffer.runtime is not None
    rail, log = buffer.runtime.party().nodes.rail, []  # type: ignore[union-attr]

    def logging(owner: Any, name: str, as_what: str) -> Any:
        original = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            log.append(as_what)
            return original(*arguments, **named)

        return mock.patch.object(owner, name, call)

    post = rail.post

    def posting(sends: Any, receives: Any) -> Any:
        messages = max(
            [0, *(sum(part.numel() > 0 for part in parts) for parts in (*sends.values(), *receives.values()))]
        )
        log.append(f"exchange of {messages}")
        return post(sends, receives)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(rail, "post", posting))
        stack.enter_context(logging(Operation, "share", "shares"))
        stack.enter_context(logging(Operation, "agree", "agree"))
        stack.enter_context(logging(internode._Delivery, "_pull", "pull"))
        stack.enter_context(logging(internode._Homecoming, "_sum", "sum"))
        stack.enter_context(logging(CpuDataPlane, "sum_rows", "sum of nodes"))
        yield log


def _steps(rank: int, num_ranks: int, layout: str, rows: int) -> tuple[list[str], list[str], list[str], int]:
    """Of a dispatch, a cached dispatch and a combine; and the chunks in which rows cross the rail."""
    options: dict[str, Any] = {} if not rows else {"config": small_chunks(rows)}
    with make_buffer(rank, layout) as buffer:
        scenario = NodeScenario(CASE, rank, layout)
        with watched(buffer) as fresh:
            result = scenario.dispatch(buffer, **options)
        scenario.check_dispatch(result)
        with watched(buffer) as cached:
            again = buffer.dispatch(scenario.x, handle=result[4], **options)
        scenario.check_cached(again)
        with watched(buffer) as combine:
            combined = scenario.combine(buffer, result[4], weights=False, **options)
        assert combined[0].numel()
        node = scenario.node_of[rank]
        sent = scenario.wanted_handle["rdma_channel_prefix_matrix"].view(-1).tolist()
        came = scenario.wanted_handle["recv_rdma_channel_prefix_matrix"].view(-1).tolist()
        crossing = [count for counts in (sent, came) for other, count in enumerate(counts) if other != node]
    return fresh, cached, combine, max(-(-count // (rows or 1 << 20)) for count in crossing)


def test_few_rows_are_one_message_that_leaves_before_ranks_agree(pool_of: PoolOf) -> None:
    one = "exchange of 1"
    for fresh, cached, combine, chunks in pool_of(2).run(_steps, "2x1", 0):
        assert chunks == 1
        # offers, choices, rows; the rows of the own node are pulled while the others' answers come
        assert fresh == [one, one, one, "shares", one, "pull", "agree", "pull"]
        assert cached == [one, one, "shares", one, "pull", "agree", "pull"]
        assert combine == [one, "shares", one, "sum", "agree", one, "sum", "sum of nodes"]


@pytest.mark.parametrize("layout", ["2x1", "2x2"])
def test_the_next_chunk_is_on_its_way_when_one_is_pulled(pool_of: PoolOf, layout: str) -> None:
    for fresh, cached, combine, chunks in pool_of(len(LAYOUTS[layout])).run(_steps, layout, 4):
        assert chunks > 3
        for steps in (fresh, cached):
            after = steps[steps.index("agree") + 1 :]
            before = steps[: steps.index("shares")]
            assert before[-1].startswith("exchange")
            posted, pulled = 1, 0
            for step in after:
                posted += step == "exchange of 1"
                if step == "pull":
                    assert posted >= min(pulled + 2, chunks)
                    pulled += 1
            assert posted == chunks
            assert after[:2] == ["exchange of 1", "pull"]
        last = combine[combine.index("agree") + 1 :]
        sums = last.index("sum of nodes")
        assert last.count("exchange of 1") == chunks
        assert last[sums - 1] == "sum"
        assert set(last[sums:]) == {"sum of nodes"}
        assert 1 < len(last[sums:]) <= 8, "while further rows come"


def _stepped_back(rank: int, num_ranks: int) -> int:
    """Rows were on their way when ranks disagreed: nothing stays behind, and what comes next is right."""
    with make_buffer(rank, "2x2") as buffer:
        scenario = NodeScenario(CASE, rank, "2x2")
        handle = scenario.dispatch(buffer)[4]
        other = NodeScenario(Case(**{**vars(CASE), "seed": 9}), rank, "2x2")
        foreign = other.dispatch(buffer)[4]
        rail = buffer.runtime.party().nodes.rail  # type: ignore[union-attr]
        before = rail.bytes_sent
        for odd in range(num_ranks):
            with pytest.raises(MismatchError):
                buffer.dispatch(scenario.x, handle=foreign if rank == odd else handle, config=small_chunks(4))
            assert not rail._unfinished
        moved = rail.bytes_sent - before
        scenario.check_cached(buffer.dispatch(scenario.x, handle=handle, config=small_chunks(4)))
        scenario.check_combine(scenario.combine(buffer, handle))
    return moved


def test_rows_that_left_too_early_are_dropped(pool_of: PoolOf) -> None:
    offers_and_verdicts = 4 * 8 * (12 + 6)
    assert min(pool_of(4).run(_stepped_back)) > offers_and_verdicts


def _over_device_rail(rank: int, num_ranks: int, layout: str, key: str) -> None:
    """The modes on the rail of GPUs, with Gloo in NCCL's place."""
    made = []

    def make(topology: Any, name: str, timeout: float, device: torch.device) -> DeviceRail:
        rail, _ = rail_of(topology.node, topology.num_nodes, f"{name}/{key}", True, timeout)
        made.append(rail)
        return rail

    with mock.patch.dict(CARRIERS, {PROCESS_GROUP: make}), make_buffer(rank, layout) as buffer:
        scenario = NodeScenario(CASE, rank, layout)
        scenario.check_all(buffer, config=small_chunks(6))
        scenario.check_all(buffer)
        assert not made[0]._unfinished
        assert made[0]._device == CPU


@pytest.mark.parametrize("layout", ["2x2", *slow("2x1", "3x1")])
def test_modes_over_the_rail_of_gpus(pool_of: PoolOf, layout: str) -> None:
    pool_of(len(LAYOUTS[layout])).run(_over_device_rail, layout, "steps")


def _late_rows(rank: int, num_ranks: int) -> tuple[list[int], int]:
    """The tokens that a combine has summed when it waits for each of its transfers."""
    case = Case(tokens=(400,), num_topk=2, local_experts=4, bias="two")
    with make_buffer(rank, "2x1") as buffer:
        scenario = NodeScenario(case, rank, "2x1")
        handle = scenario.dispatch(buffer)[4]
        summed, seen, waits = [0], [], PostedTransfer.wait
        sum_rows = CpuDataPlane.sum_rows

        def counting(plane: Any, parts: Any, biases: Any, out: torch.Tensor, *more: Any) -> None:
            summed[0] += len(out)
            sum_rows(plane, parts, biases, out, *more)

        def waiting(transfer: PostedTransfer, node: int) -> None:
            seen.append(summed[0])
            waits(transfer, node)

        with (
            mock.patch.object(CpuDataPlane, "sum_rows", counting),
            mock.patch.object(PostedTransfer, "wait", waiting),
        ):
            combined = scenario.combine(buffer, handle, weights=False, config=small_chunks(20))
        assert torch.equal(combined[0], scenario.wanted_combined)
        return seen, summed[0]


def test_tokens_are_summed_while_further_rows_come(pool_of: PoolOf) -> None:
    for seen, total in pool_of(2).run(_late_rows):
        assert total == 400
        assert seen == sorted(seen)
        assert 0 < 400 - seen[-1] <= 400 / 8 + 60, "the last sum is short"


def test_chunks_are_equal_and_worth_it() -> None:
    presets = Buffer.get_dispatch_config(16)
    assert chunking_of(presets, 0) == Chunking(10 * presets.num_max_rdma_chunked_recv_tokens, 0)
    assert chunking_of(Config(2, 6, 256, 3, 6), 0) == Chunking(6, 0)
    few = Chunking(1280, 32 << 20)
    assert few.rows(2048, 14336) == 2048, "29 MB that one rank pulls: one message"
    assert few.rows(4096, 14336) == 2048
    assert few.rows(2048, 8 * 14336) == 1024, "eight ranks pull more of it"
    assert few.rows(0, 14336) >= 1280
    assert few.rows(1281, 1 << 20) == 641
    for count in range(1, 300):
        for most in (1, 2, 7, 64):
            rows = Chunking(most, 0).rows(count, 100)
            assert rows <= most
            assert -(-count // rows) == -(-count // most)


def test_config_of_the_caller_is_followed() -> None:
    with mock.patch.object(CpuDataPlane, "least_part_bytes", 1 << 30):
        plane = CpuDataPlane(mock.MagicMock())
        party = internode.intranode.Party(plane, 0, 2, CPU, 20)
        from tokenferry.modes.high_throughput import HighThroughput

        for config in (None, Buffer.get_dispatch_config(2), Buffer.get_combine_config(2)):
            assert HighThroughput(party, config)._chunking.least_bytes == 1 << 30
        assert HighThroughput(party, small_chunks(8))._chunking == Chunking(8, 0)


def test_nothing_to_send_is_no_chunk() -> None:
    operation, nothing = mock.MagicMock(), torch.zeros(0, dtype=torch.int64)
    rows = [torch.zeros((0, 16), dtype=torch.uint8)]
    chunks = ChunkedRows(operation, mock.MagicMock(), [1], rows, [nothing, nothing], [1, 1])
    chunks.begin({1: Offer(mock.MagicMock(), 1, 0, 1)})
    chunks.finish(0)
    assert chunks.count == 0
    assert not operation.post.called
