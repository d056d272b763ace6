"""Several threads of a rank: two Buffers, hooks and statistics elsewhere, and a Buffer that is destroyed meanwhile.

Threads change as often as the interpreter lets them, so that what is not guarded meets what it should not.
"""

from __future__ import annotations

import fcntl
import gc
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.cases import TIMEOUT, Case, Scenario, segments, wait_for
from tests.conftest import PoolOf, slow
from tests.internode_cases import LAYOUTS
from tests.low_latency_cases import Case as QuickCase
from tests.low_latency_cases import Scenario as QuickScenario
from tests.low_latency_cases import make_buffer
from tokenferry import Buffer, BufferStateError, PeerLostError
from tokenferry.memory.shm import Segment

PATIENCE = 60.0


@contextmanager
def changing_threads() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def run_all(*calls: Callable[[], None]) -> None:
    """Every call in a thread of its own; raises what one of them raised."""
    raised: list[BaseException] = []

    def guarded(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:  # raised below
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=(call,), daemon=True) for call in calls]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, ends - time.monotonic()))
        if raised:
            raise raised[0]
        assert not thread.is_alive(), "it hangs"


def _at_once(rank: int, num_ranks: int, turns: int) -> tuple[int, int]:
    """Two Buffers in a thread each, hooks called by a third, statistics read by a fourth."""
    hooks: queue.Queue[Callable[[], None] | None] = queue.Queue()
    normal = Scenario(Case((9, 5), num_topk=2), rank, num_ranks)
    quick = QuickScenario(QuickCase((4, 3), format="plain"), rank, num_ranks)
    is_over = threading.Event()
    seen = []

    with make_buffer() as first, make_buffer() as second:

        def operate(buffer: Buffer) -> None:
            try:
                for _ in range(turns):
                    received = normal.dispatch(buffer)
                    normal.check_dispatch(received)
                    normal.check_combine(normal.combine(buffer, received[4]))
                    results = [quick.dispatch(buffer, return_recv_hook=True) for _ in range(3)]
                    done = [threading.Event() for _ in results]
                    for result, event in zip(results, done, strict=True):
                        hooks.put(lambda hook=result[4], event=event: (hook(), event.set()))  # type: ignore[misc]
                    results[1][4]()  # from both threads; takes effect once
                    for result, event in zip(results, done, strict=True):
                        assert event.wait(PATIENCE)
                        quick.check_dispatch(result)
                    quick.check_combine(quick.combine(buffer, results[0]))
            finally:
                hooks.put(None)

        def receive() -> None:
            ended = 0
            while ended < 2:
                hook = hooks.get(timeout=PATIENCE)
                if hook is None:
                    ended += 1
                else:
                    hook()
            is_over.set()

        def look() -> None:
            while not is_over.is_set():
                for buffer in (first, second):
                    counted = buffer.stats()
                    assert all(of.count >= 0 for of in counted.operations)
                    assert buffer.is_available()
                    seen.append(buffer.topology.num_ranks)

        with changing_threads():
            run_all(lambda: operate(first), lambda: operate(second), receive, look)
        counts = {of.kind: of.count for of in first.stats().operations}
        assert set(seen) == {num_ranks}
        return counts["low_latency_dispatch"], counts["dispatch"]


def test_threads_with_two_buffers_and_hooks_of_both(pool_of: PoolOf) -> None:
    assert pool_of(2).run(_at_once, 3) == [(9, 3)] * 2


def held() -> tuple[int, int, int]:
    return threading.active_count(), len(os.listdir("/proc/self/fd")), len(segments())


def _destroyed_in_a_wait(rank: int, num_ranks: int, kind: str, times: int) -> list[str]:
    """Rank 0 waits for rank 1, which does not come, and another thread destroys its Buffer."""
    normal, quick = Scenario(Case(), rank, num_ranks), QuickScenario(QuickCase(), rank, num_ranks)
    told = []
    before, others = None, set(segments())
    for turn in range(times):
        node = LAYOUTS["2x1"][rank] if "nodes" in kind else "one"
        buffer = Buffer(dist.group.WORLD, low_latency_mode=True, timeout=TIMEOUT, node=node)
        if turn == 1:
            before = held()
        outcome: list[BaseException] = []
        began = threading.Event()
        hook: Any = quick.dispatch(buffer, return_recv_hook=True)[4] if kind == "hook" and rank == 0 else None

        def wait(buffer: Buffer = buffer, hook: Any = hook, outcome: Any = outcome, began: Any = began) -> None:
            began.set()
            try:
                if kind == "hook":
                    hook()
                elif "low latency" in kind:
                    quick.dispatch(buffer)
                else:
                    normal.dispatch(buffer)
            except BaseException as error:  # looked at below
                outcome.append(error)

        if rank == 0:
            thread = threading.Thread(target=wait, daemon=True)
            with changing_threads():
                thread.start()
                began.wait()
                time.sleep(0.0007 * turn)
                buffer.destroy()
                thread.join(TIMEOUT / 2)
            assert not thread.is_alive(), "it waits for ever"
            assert isinstance(outcome[0], (BufferStateError, PeerLostError)), repr(outcome)
            told.append(type(outcome[0]).__name__)
            del outcome, thread
        dist.barrier()
        buffer.destroy()
    hook = wait = buffer = None  # type: ignore[assignment]
    assert before is not None
    assert wait_for(lambda: held()[0] <= before[0] and held()[1] <= before[1]), (before, held())
    gc.collect()  # errors that were raised hold frames, and with them rows
    assert wait_for(lambda: not set(segments()) - others), set(segments()) - others
    return told


@pytest.mark.parametrize("kind", ["dispatch", "low latency", "hook", *slow("nodes", "nodes, low latency")])
def test_destroying_a_buffer_that_waits_raises_there(pool_of: PoolOf, kind: str) -> None:
    told, _ = pool_of(2).run(_destroyed_in_a_wait, kind, 6 if "nodes" in kind else 15)
    assert told
    assert "nodes" in kind or set(told) == {"BufferStateError"}, told


def test_a_segment_that_another_thread_has_closed_is_of_nobody_who_is_gone() -> None:
    """Else the descriptor, which is that of another file by then, would lose its lock."""
    mine = Segment.create(4096)
    theirs = Segment(mine.name, 4096, create=False)
    others = Segment.create(4096)  # of a Buffer that is made meanwhile
    looked_at: list[int] = []

    def flock(fd: int, how: int) -> None:
        looked_at.append(fd)
        thread = threading.Thread(target=theirs.close, daemon=True)
        thread.start()
        thread.join(0.05)  # it has to wait
        assert os.fstat(fd).st_ino == os.fstat(mine._fd).st_ino
        fcntl_flock(fd, how)

    fcntl_flock = fcntl.flock
    with mock.patch.object(fcntl, "flock", flock):
        assert not theirs.creator_is_gone()  # this process holds the lock
    assert looked_at
    assert wait_for(lambda: theirs._fd < 0)
    assert not theirs.creator_is_gone()
    for segment in (mine, others):
        assert not Segment(segment.name, 4096, create=False).creator_is_gone()
        segment.retire()
        segment.close()
