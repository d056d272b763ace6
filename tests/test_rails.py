"""Rails that break: who is blamed, how soon, and what is left. Nodes are groups of ranks of this machine."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case, Scenario, wait_for
from tests.conftest import PoolOf, slow
from tests.internode_cases import NodeScenario, make_buffer, small_chunks
from tests.internode_low_latency_cases import NodeScenario as QuickScenario
from tests.internode_low_latency_cases import make_buffer as make_quick_buffer
from tests.low_latency_cases import Case as QuickCase
from tests.low_latency_cases import check_case
from tokenferry import (
    BufferStateError,
    CapacityError,
    HeapError,
    MismatchError,
    PeerError,
    PeerLostError,
    TokenferryError,
)
from tokenferry.cli.ranks import RankPool
from tokenferry.dataplane.cpu import CpuDataPlane
from tokenferry.memory.heap import Heap
from tokenferry.rail import RailError
from tokenferry.rail.process_group import PostedTransfer, _Waiter
from tokenferry.runtime import Runtime

CASE = Case(tokens=(6, 9, 3, 5), num_topk=3)


def _failure_on_one_of_three(rank: int, num_ranks: int) -> tuple[str, float]:
    """Rank 0 fails after the agreement; the others are streaming chunks to each other."""
    with make_buffer(rank, "3x1") as buffer:
        scenario = NodeScenario(Case(tokens=(400,), row_bytes=2048, num_topk=4), rank, "3x1")
        scenario.check_dispatch(scenario.dispatch(buffer))
        calls: list[int] = []
        empty_rows = type(buffer.runtime.party().plane).empty_rows

        def failing(plane: Any, *arguments: Any) -> Any:
            calls.append(1)
            if rank == 0 and len(calls) == 12:
                raise MemoryError("no more")
            return empty_rows(plane, *arguments)

        started = time.monotonic()
        with (
            mock.patch.object(type(buffer.runtime.party().plane), "empty_rows", failing),
            pytest.raises(MemoryError if rank == 0 else PeerLostError) as caught,
        ):
            scenario.dispatch(buffer, config=small_chunks(8))
        return str(caught.value), time.monotonic() - started


def test_failure_spreads_at_once(pool_of: PoolOf) -> None:
    (_, first), *others = pool_of(3).run(_failure_on_one_of_three)
    assert first < 3.0
    for text, seconds in others:
        assert "rank 0: node 0 (ranks 0), over the rail" in text
        assert "node 1" not in text
        assert "node 2" not in text
        assert seconds < 3.0


def _hook_after_a_failure(rank: int, num_ranks: int, how: str) -> None:
    """A hook that is called when its rail is gone says so, and does not sum what never came."""
    buffer = make_quick_buffer(rank, "2x2", timeout=5.0)
    scenario = QuickScenario(QuickCase(), rank, "2x2")
    result = scenario.dispatch(buffer)
    dist.barrier()
    if rank >= 2:  # this node sends nothing home
        with (
            mock.patch.object(CpuDataPlane, "low_latency_combine", side_effect=MemoryError("no more")),
            pytest.raises(MemoryError),
        ):
            scenario.combine(buffer, result)
    else:
        with pytest.raises((BufferStateError, PeerError)):  # noqa: PT012 - the others may have given up already
            hook = scenario.combine(buffer, result, return_recv_hook=True)[2]
            if how == "destroy":
                buffer.destroy()
            hook()
    dist.barrier()
    buffer.destroy()


@pytest.mark.parametrize("how", ["destroy", "wait"])
def test_hook_after_a_failure_raises(pool_of: PoolOf, how: str) -> None:
    pool_of(4).run(_hook_after_a_failure, how)


def _dropped_hooks(rank: int, num_ranks: int) -> None:
    with make_quick_buffer(rank, "2x2") as buffer:
        scenario = QuickScenario(QuickCase(), rank, "2x2")
        for turn in range(40):
            result = scenario.dispatch(buffer)
            answer = scenario.combine(buffer, result, return_recv_hook=True)
            if (turn + rank) % 2:
                answer[2]()
            del answer
        gc.collect()
        check_case(buffer, scenario)


def test_dropped_hooks_do_no_harm(pool_of: PoolOf) -> None:
    pool_of(4).run(_dropped_hooks)


def _constructions(rank: int, num_ranks: int) -> None:
    """What fails on one rank fails on all, soon, and harms no later construction."""

    def fail(*_: Any) -> None:
        if rank == 3:
            raise ZeroDivisionError("odd")

    for name in ("sync", "connect"):
        started = time.monotonic()
        original = getattr(Runtime, name)

        def failing(self: Runtime, *arguments: Any, original: Any = original) -> None:
            fail()
            original(self, *arguments)

        with mock.patch.object(Runtime, name, failing), pytest.raises(TokenferryError, match="rank 3: odd"):
            make_buffer(rank, "2x2", timeout=4.0)
        if name == "sync":
            assert time.monotonic() - started < 2.0
    with make_buffer(rank, "2x2", timeout=float("inf")) as buffer:
        scenario = NodeScenario(CASE, rank, "2x2")
        scenario.check_dispatch(scenario.dispatch(buffer))


def test_constructions_that_fail(pool_of: PoolOf) -> None:
    pool_of(4).run(_constructions)


def _no_stage(rank: int, num_ranks: int, layout: str) -> None:
    """No shared memory on one rank, and a disagreement inside another node: all step back, and go on."""
    with make_buffer(rank, layout) as buffer:
        scenario = NodeScenario(CASE, rank, layout)
        large = NodeScenario(Case(tokens=CASE.tokens, num_topk=3, row_bytes=512 << 10), rank, layout)
        ensure_stage = Heap.ensure_stage

        def failing(heap: Heap, wanted: int, floor: int) -> int:
            if rank == 1 and floor > 100 << 10:
                raise HeapError("none left")
            return ensure_stage(heap, wanted, floor)

        with mock.patch.object(Heap, "ensure_stage", failing), pytest.raises(CapacityError, match="rank 1"):
            large.dispatch(buffer)
        scenario.check_dispatch(scenario.dispatch(buffer))
        other = NodeScenario(Case(tokens=CASE.tokens, num_topk=3, row_bytes=256), rank, layout)
        for odd in range(num_ranks):
            with pytest.raises(MismatchError):
                (other if rank == odd else scenario).dispatch(buffer)
            with mock.patch.object(Heap, "ensure_stage", failing), pytest.raises((MismatchError, CapacityError)):
                (scenario if rank == odd else large).dispatch(buffer)
        scenario.check_dispatch(scenario.dispatch(buffer))
    with make_buffer(rank, layout) as buffer:
        Scenario.dispatch(scenario, buffer)


@pytest.mark.parametrize("layout", ["2x2", *slow("3x2")])
def test_ranks_step_back_whatever_comes_together(pool_of: PoolOf, layout: str) -> None:
    pool_of(4 if layout == "2x2" else 6).run(_no_stage, layout)


class _LongWork:
    """Work that Gloo does not end for a while."""

    def wait(self, timeout: timedelta) -> None:
        time.sleep(0.3)


def _interrupt(after: float) -> None:
    threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()


def _waiters(rank: int, num_ranks: int) -> int:
    """Ctrl-C in a wait, and in what is done meanwhile: threads that are left when the work has ended."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    before = threading.active_count()
    kept = []
    for meanwhile in (lambda: None, lambda: time.sleep(1.0)):
        _interrupt(0.1)
        with pytest.raises(KeyboardInterrupt) as caught:
            _Waiter().wait([cast(dist.Work, _LongWork())], timedelta(seconds=9), meanwhile)
        kept.append(caught.value)
    _Waiter()  # as if it came before the wait
    wait_for(lambda: threading.active_count() <= before)
    return threading.active_count() - before


def test_interrupted_waits_leave_no_threads() -> None:
    with RankPool(1, 1) as pool:
        assert pool.run(_waiters) == [0]


def _files(rank: int, num_ranks: int) -> tuple[int, int]:
    """Descriptors and threads after failures, while their exceptions are kept."""
    kept, counts = [], []
    for _ in range(3):
        with make_buffer(rank, "2x1", timeout=1.0) as buffer:
            scenario = NodeScenario(CASE, rank, "2x1")
            scenario.check_dispatch(scenario.dispatch(buffer))
            dist.barrier()
            if rank == 0:
                with pytest.raises(PeerError) as caught:
                    scenario.dispatch(buffer)
                kept.append(caught.value)
            dist.barrier()
        time.sleep(0.1)
        counts.append((len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))))
    return counts[2][0] - counts[0][0], counts[2][1] - counts[0][1]


class _BrokenGroup:
    """Raises where some versions of torch do: when a transfer begins, not when it is waited for."""

    def recv(self, *_: Any) -> dist.Work:
        raise RuntimeError("connection closed by peer")


def test_an_error_at_the_beginning_of_a_transfer_keeps_no_group() -> None:
    group = _BrokenGroup()
    known = weakref.ref(group)
    rail = mock.Mock(
        group=lambda: known(), gives_up=lambda nodes, timed_out, reason, is_lost: RailError(nodes, timed_out, reason)
    )
    with pytest.raises(RailError, match="closed by peer") as caught:
        PostedTransfer(rail, timedelta(seconds=1)).receive(1, torch.empty(1))
    del group
    assert known() is None
    assert caught.value.__traceback__ is not None


def test_failures_leave_no_connections(pool_of: PoolOf) -> None:
    for files, threads in pool_of(2).run(_files):
        assert files <= 0
        assert threads <= 0
