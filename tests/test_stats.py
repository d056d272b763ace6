"""What a Buffer tells of its operations: statistics, ranges for profilers, lines of TOKENFERRY_DEBUG."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from tests import low_latency_cases
from tests.cases import TIMEOUT, Case, Scenario
from tests.conftest import PoolOf
from tests.internode_cases import NodeScenario, make_buffer
from tokenferry import Buffer, BufferStateError, MismatchError, PeerTimeoutError
from tokenferry.memory import waiting
from tokenferry.stats import BufferStats, Recorder, Waits

LATE = 0.3
# Who waits for it may itself come late: at most this much of it, as busy as the machine may be.
MOSTLY = 0.5 * LATE * 1e9
MS = 1_000_000


def test_waits_are_the_idle_time_until_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(waiting.os, "sched_yield", lambda: None)
    waiter = waiting.Waiter()
    clock[0] += 0.25  # work that made progress
    waiter.restart()
    for missing, late in (((1, 2, 3), 0.01), ((2, 3), 0.02)):
        for _ in range(2):
            monkeypatch.setattr(waiting.os, "sched_yield", lambda late=late: clock.__setitem__(0, clock[0] + late))
            waiter.pause(missing)
        clock[0] += 0.5  # the step that read what had come
        waiter.restart()
    assert waiter.idle_ns == pytest.approx(60 * MS)
    assert waiter.waited_ns == pytest.approx({1: 20 * MS, 2: 60 * MS, 3: 60 * MS})


def test_recorder_adds_up_what_threads_tell_it() -> None:
    recorder = Recorder()

    def tell() -> None:
        for turn in range(1000):
            recorder.called(1, 2)
            recorder.staged(1, 10)
            recorder.read(1, 3, 5)
            recorder.waited(1, turn, {3: turn})

    threads = [threading.Thread(target=tell) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = recorder.snapshot(0, {1: "dispatch"}, 4, 7)
    operation = found.of("dispatch")
    assert (operation.count, operation.call_ns, operation.bytes_staged) == (4000, 8000, 40000)
    waits = Waits(4000, 4 * 499500, 999)
    assert operation.idle == waits
    assert [peer.waits for peer in operation.peers] == [Waits(), Waits(), Waits(), waits]
    assert [peer.bytes_read for peer in operation.peers] == [0, 0, 0, 20000]
    assert found.waited_for() == [0, 0, 0, 4 * 499500]
    assert found.rail_bytes_sent == 7
    recorder.reset()
    assert recorder.snapshot(0, {}, 4, 7).operations == ()


def _counted(rank: int, num_ranks: int) -> None:
    case = Case(tokens=(9, 0, 5), num_topk=3, routing="sparse", combine_bytes=48)
    scenario = Scenario(case, rank, num_ranks)
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        assert buffer.stats().operations == ()
        handle = scenario.dispatch(buffer)[4]
        for _ in range(2):
            scenario.check_cached(buffer.dispatch(scenario.x, handle=handle))
        buffer.dispatch(scenario.x, handle)
        scenario.combine(buffer, handle, weights=False)
        with pytest.raises(MismatchError):
            buffer.dispatch(scenario.x.view(torch.int16) if rank else scenario.x, handle=handle)
        found = buffer.stats(reset=True)
        assert buffer.stats().operations == ()
    assert (found.rank, found.num_ranks, found.rail_bytes_sent) == (rank, num_ranks, 0)
    assert [(of.kind, of.count) for of in found.operations] == [
        ("dispatch", 1),
        ("cached_dispatch", 3),
        ("combine", 1),
    ]
    prefix = scenario.wanted.rank_prefix_matrix
    rows = prefix.diff(dim=0, prepend=torch.zeros_like(prefix[:1]))  # [source, reader]
    dispatch, cached, combine = found.operations
    for peer in range(num_ranks):
        wanted = int(rows[peer, rank]) if peer != rank else 0
        assert dispatch.peers[peer].bytes_read == wanted * (128 + 8 + 3 * 12)
        assert cached.peers[peer].bytes_read == 3 * wanted * (128 + 8)
        assert combine.peers[peer].bytes_read == (int(rows[rank, peer]) if peer != rank else 0) * 48
        assert dispatch.peers[peer].rank == peer
    sent = int(scenario.wanted.is_token_in_rank[:, [r for r in range(num_ranks) if r != rank]].any(1).sum())
    assert sent * (128 + 36) <= dispatch.bytes_staged <= sent * (128 + 36) + 8192
    for operation in found.operations:
        assert operation.idle.total_ns >= operation.idle.longest_ns >= 0
        if operation is not cached:  # where a call that raised waited too
            assert operation.call_ns >= operation.idle.total_ns
        assert operation.peers[rank].waits == Waits()
        for peer_stats in operation.peers:
            waits = peer_stats.waits
            assert operation.idle.total_ns >= waits.total_ns >= waits.longest_ns
            assert (waits.count == 0) == (waits.total_ns == 0)
    with pytest.raises(BufferStateError, match="destroyed"):
        buffer.stats()
    listed = json.loads(json.dumps(found.as_dict()))
    assert BufferStats.from_dict(listed) == BufferStats.from_dict(found.as_dict()) == found
    assert listed["operations"][2]["peers"][rank] == {
        "rank": rank,
        "waits": {"count": 0, "total_ns": 0, "longest_ns": 0},
        "bytes_read": 0,
    }


def test_operations_and_bytes_are_counted(pool_of: PoolOf) -> None:
    pool_of(3).run(_counted)


def _one_late(rank: int, num_ranks: int, late: int, layout: str, times: int) -> list[int]:
    """Combines, to which one rank is late; what each rank waited for each."""
    if layout:
        buffer = make_buffer(rank, layout)
        scenario: Scenario = NodeScenario(Case(), rank, layout)
    else:
        buffer = Buffer(dist.group.WORLD, timeout=TIMEOUT)
        scenario = Scenario(Case(), rank, num_ranks)
    with buffer:
        handle = scenario.dispatch(buffer)[4]
        buffer.stats(reset=True)
        for _ in range(times):
            dist.barrier()
            if rank == late:
                time.sleep(LATE)
            scenario.check_combine(scenario.combine(buffer, handle))
        found = buffer.stats()
    assert found.of("dispatch").idle == Waits(), "parts of a combine count as combine"
    assert found.of("combine").count == times
    assert (found.rail_bytes_sent > 0) == bool(layout)
    return found.waited_for()


@pytest.mark.parametrize("late", [0, 2])
def test_late_rank_is_who_is_waited_for(pool_of: PoolOf, late: int) -> None:
    waited = pool_of(3).run(_one_late, late, "", 3)
    for rank in range(3):
        if rank != late:
            assert waited[rank][late] > 3 * MOSTLY, waited
    assert sum(waited[late]) < min(waited[rank][late] for rank in range(3) if rank != late), waited


def test_late_node_is_who_is_waited_for_on_the_rail(pool_of: PoolOf) -> None:
    waited = pool_of(4).run(_one_late, 3, "2x2", 2)
    for rank in (1, 2):  # on its rail, and on its node
        assert waited[rank][3] > 2 * MOSTLY, waited
        assert waited[rank][3] == max(waited[rank]), waited


def _low_latency(rank: int, num_ranks: int) -> None:
    case = low_latency_cases.Case(tokens=(4, 0, 2), hidden=128, num_topk=2)
    scenario = low_latency_cases.Scenario(case, rank, num_ranks)
    with low_latency_cases.make_buffer() as buffer:
        result = scenario.dispatch(buffer, return_recv_hook=True)
        dist.barrier()
        before = buffer.stats().of("low_latency_dispatch")
        assert before.count == 1
        assert [peer.bytes_read for peer in before.peers] == [0] * num_ranks
        result[4]()
        received = buffer.stats().of("low_latency_dispatch")
        for peer in set(range(num_ranks)) - {rank}:
            rows = sum(source == peer for expert in scenario.rows for source, _ in expert)
            assert received.peers[peer].bytes_read == 16 * len(scenario.all_ids[peer]) + 256 * rows
        dist.barrier()
        if rank == 0:
            time.sleep(LATE)
        scenario.check_combine(scenario.combine(buffer, result))
        combine = buffer.stats().of("low_latency_combine")
        if rank:
            assert combine.peers[0].waits.longest_ns > MOSTLY
        assert combine.count == 1
        for peer in set(range(num_ranks)) - {rank}:
            mine = int(((scenario.ids >= 0) & (scenario.ids // case.local_experts == peer)).sum())
            assert combine.peers[peer].bytes_read == mine * (8 + 256)


def test_low_latency_operations_are_counted(pool_of: PoolOf) -> None:
    pool_of(3).run(_low_latency)


def _absent(rank: int, num_ranks: int) -> None:
    scenario = Scenario(Case(), rank, num_ranks)
    with Buffer(dist.group.WORLD, timeout=0.4) as buffer:
        if rank == 0:
            with pytest.raises(PeerTimeoutError):
                scenario.dispatch(buffer)
            dispatch = buffer.stats().of("dispatch")
            assert dispatch.count == 0
            assert dispatch.peers[1].waits.longest_ns > 0.3e9
        dist.barrier()


def test_wait_that_fails_is_counted(pool_of: PoolOf) -> None:
    pool_of(2).run(_absent)


def _profiled(rank: int, num_ranks: int) -> list[str]:
    scenario = Scenario(Case(), rank, num_ranks)
    low = low_latency_cases.Scenario(low_latency_cases.Case(), rank, num_ranks)
    with low_latency_cases.make_buffer() as buffer:
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            handle = scenario.dispatch(buffer)[4]
            scenario.combine(buffer, handle)
            low.combine(buffer, low.dispatch(buffer))
        names = [event.name for event in seen.events() if event.name.startswith("tokenferry")]
        scenario.combine(buffer, handle)
    return names


def test_profilers_see_a_range_for_each_operation(pool_of: PoolOf) -> None:
    names = ["dispatch", "combine", "low_latency_dispatch", "low_latency_combine"]
    assert pool_of(2).run(_profiled) == [[f"tokenferry::{name}" for name in names]] * 2


def _debugged(rank: int, num_ranks: int, value: str) -> list[str]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("tokenferry")
    handler, level = Keep(), logger.level
    logger.addHandler(handler)
    scenario = Scenario(Case(tokens=(3, 0)), rank, num_ranks)
    try:
        with mock.patch.dict(os.environ, {"TOKENFERRY_DEBUG": value}):
            buffer = Buffer(dist.group.WORLD, timeout=TIMEOUT)
        with buffer:
            handle = scenario.dispatch(buffer)[4]
            buffer.combine(scenario.own_rows, handle)
            with pytest.raises(ValueError, match="handle"):
                buffer.combine(scenario.own_rows, handle[:2])
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    return [line for line in lines if "epoch" in line]


def test_debug_tells_of_each_operation(pool_of: PoolOf) -> None:
    for rank, lines in enumerate(pool_of(2).run(_debugged, "1")):
        assert len(lines) == 3
        tokens = 0 if rank else 3
        assert f"rank {rank} epoch 1 dispatch " in lines[0]
        assert f"bfloat16[{tokens}, 64]" in lines[0].split("->")[0]
        assert " ms: " in lines[0]
        assert f"rank {rank} epoch 2 combine " in lines[1]
        assert lines[1].endswith(f"-> bfloat16[{tokens}, 64]")
        assert "raised ArgumentError: handle" in lines[2]
    assert pool_of(2).run(_debugged, "0") == [[], []]


def _stderr_of_debug(rank: int, num_ranks: int) -> Any:
    from tokenferry.observing import debug_wanted

    logger, root = logging.getLogger("tokenferry"), logging.getLogger()
    before, level, roots = logger.handlers[:], logger.level, root.handlers[:]
    logger.handlers, root.handlers = [], []
    try:
        with mock.patch.dict(os.environ, {"TOKENFERRY_DEBUG": "1"}):
            assert debug_wanted()
            assert debug_wanted()
        return len(logger.handlers), logger.isEnabledFor(logging.INFO)
    finally:
        logger.handlers, root.handlers = before, roots
        logger.setLevel(level)


def test_debug_is_seen_where_nobody_set_up_logging(pool_of: PoolOf) -> None:
    assert pool_of(1).run(_stderr_of_debug) == [(1, True)]
