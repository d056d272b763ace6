"""Ctrl-C at any point of an operation, or of the making of a heap: nothing is left, and nobody waits for ever.

An exception is raised at the n-th place of this package where the interpreter looks for signals, for many n.
"""

from __future__ import annotations

import dis
import functools
import gc
import itertools
import linecache
import os
import random
import secrets
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tokenferry
from tests.cases import TIMEOUT, Case, segments, wait_for
from tests.conftest import PoolOf
from tests.internode_cases import LAYOUTS, NodeScenario
from tests.test_fuzz import FIRST, OPERATIONS, PATIENCE, Pair
from tokenferry import Buffer, BufferStateError, PeerError, TokenferryError
from tokenferry.memory.direct import Regions
from tokenferry.memory.heap import Heap
from tokenferry.modes import intranode

PACKAGE = os.path.dirname(tokenferry.__file__)
DEADLINE = 0.3
POINTS = 6
"""Of each kind of operation."""


NOWHERE = "nowhere", 0


LOOKS_FOR_SIGNALS = {"RESUME", "CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD"}
"""Instructions behind which the interpreter looks whether there was a Ctrl-C."""


class Interrupter:
    """Raises KeyboardInterrupt where one may come in this package, in the thread that enters it.

    Args:
        at: number of the place; -1: count them only.
    """

    def __init__(self, at: int) -> None:
        self.at = at
        self.count = 0
        self.where: tuple[str, int] = NOWHERE

    def __enter__(self) -> Interrupter:
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE) or frame.f_code.co_name in ("__del__", "_let_go"):
            return None
        frame.f_trace_opcodes = True
        code, looks = frame.f_code.co_code, False

        def trace(frame: FrameType, event: str, argument: object) -> Any:
            nonlocal looks
            if event == "opcode":
                looked, looks = looks, dis.opname[code[frame.f_lasti]] in LOOKS_FOR_SIGNALS
                self.count += looked
                if looked and self.count == self.at + 1:
                    self.where = frame.f_code.co_filename, frame.f_lineno or 0
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        return trace


def interrupted(call: Callable[[], Any], at: int) -> tuple[Any, Interrupter]:
    """What a call returns or raises."""
    with Interrupter(at) as interrupter:
        try:
            outcome = call()
        except KeyboardInterrupt as error:
            outcome = error.with_traceback(None)
            error.__context__ = error.__cause__ = None
        finally:
            sys.settrace(None)
    return outcome, interrupter


def reports_opcodes() -> bool:
    """Whether a frame's own tracer sees its instructions. Python 3.12.1 does not show those of its first call."""
    seen: list[str] = []

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        frame.f_trace_opcodes = True
        seen.append(event)
        return trace

    def function() -> int:
        return len(seen)

    sys.settrace(trace)
    function()
    sys.settrace(None)
    return "opcode" in seen


def points(count: int) -> Iterator[int]:
    """Some of so many instructions, the first before all. How many there are differs: ranks wait for each other."""
    chance = random.Random(count)
    return itertools.chain([0], (chance.randrange(1, count) for _ in range(6 * POINTS)))


def held() -> tuple[int, int, int]:
    """Threads, open files, mapped segments."""
    return threading.active_count(), len(os.listdir("/proc/self/fd")), len(segments())


def check_nothing_is_left(before: tuple[int, int, int], where: tuple[str, int]) -> None:
    def is_quiet() -> bool:
        return all(now <= was for now, was in zip(held(), before, strict=True))

    if not is_quiet():
        gc.collect()
    assert wait_for(is_quiet), (where, before, held())


def _run(name: str, at: int) -> Interrupter:
    """An operation of two ranks, of which rank 1 is interrupted; then another one, if both can."""
    pair, operation = Pair(PATIENCE), OPERATIONS[name]
    try:
        before = None
        if name in FIRST:
            before = pair.run(lambda rank, party: FIRST[name]("several messages", rank, party))
        for runtime in pair.runtimes:
            runtime._heap.timeout = DEADLINE
        given = () if before is None else (before,)
        interrupters: list[Interrupter] = []

        def call(rank: int, party: intranode.Party) -> Any:
            def run() -> Any:
                return operation("several messages", rank, party, *given)

            if rank == 0:
                return run()
            outcome, interrupter = interrupted(run, at)
            interrupters.append(interrupter)
            return outcome

        first, second = pair.run(call)
        where = interrupters[0].where
        assert isinstance(second, KeyboardInterrupt) == (where != NOWHERE), (where, second)
        assert not isinstance(first, BaseException) or isinstance(first, PeerError), (where, first)
        if all(runtime.is_available() for runtime in pair.runtimes):
            for runtime in pair.runtimes:
                runtime._heap.timeout = PATIENCE
            for outcome in pair.run(lambda rank, party: OPERATIONS["dispatch"]("one message", rank, party)):
                assert isinstance(outcome, intranode.Received), (where, outcome)
        else:
            heap = pair.runtimes[1]._heap
            assert heap.lock.acquire(timeout=1.0), where
            heap.lock.release()
        return interrupters[0]
    finally:
        pair.close()


@pytest.mark.skipif(not reports_opcodes(), reason="this Python does not trace instructions")
@pytest.mark.parametrize("name", ["dispatch", "combine", "expanded", "low-latency dispatch", "low-latency combine"])
def test_operations_are_done_or_the_buffer_is_lost(name: str) -> None:
    count = _run(name, -1).count
    assert count > 200
    gc.collect()
    before = held()
    reached = 0
    for at in points(count):
        where = _run(name, at).where
        reached += where != NOWHERE
        check_nothing_is_left(before, where)
        if reached == POINTS:
            break
    assert reached > POINTS // 2


def test_a_heap_that_is_not_finished_is_given_back() -> None:
    made: list[Heap] = []

    def make() -> None:
        made.append(Heap(0, 2, 1 << 16, DEADLINE))

    _, interrupter = interrupted(make, -1)
    made.pop().close()
    gc.collect()
    before, opened_by_nobody = held(), 0
    with mock.patch.object(
        secrets, "token_hex", lambda nbytes: f"{os.getpid():0{2 * nbytes}x}"
    ):  # names that we know
        for at in range(interrupter.count):
            outcome, found = interrupted(make, at)
            if made:
                made.pop().close()
            assert isinstance(outcome, KeyboardInterrupt) == (found.where != NOWHERE), found.where
            del outcome
            if "shm_open(" in linecache.getline(*found.where):
                threads, files, mapped = before  # an exception right behind the call: nobody has the file yet
                opened_by_nobody += held()[1] - files
                before = threads, max(files, held()[1]), mapped
            check_nothing_is_left(before, found.where)
            assert not list(Path("/dev/shm").glob(f"tokenferry-*{os.getpid():x}")), found.where
    assert opened_by_nobody <= 4


def test_a_mailbox_that_is_not_finished_is_given_back() -> None:
    before = held()
    with (
        mock.patch.object(secrets, "token_hex", lambda nbytes: f"{os.getpid():0{2 * nbytes}x}"),
        mock.patch.object(torch, "zeros", side_effect=RuntimeError("no memory that is pinned")),
        pytest.raises(RuntimeError, match="pinned"),
    ):
        Regions(0, 2, mock.Mock())
    check_nothing_is_left(before, NOWHERE)
    assert not list(Path("/dev/shm").glob(f"tokenferry-*{os.getpid():x}"))


def _between_nodes(rank: int, num_ranks: int, how_many: int) -> int:
    """Rank 1 is interrupted in a dispatch, or in a combine; returns how often."""
    scenario = NodeScenario(Case((4,), num_topk=2), rank, "2x1")
    reached = 0
    before = None
    counts = [0, 0]
    for turn in range(2 + how_many):
        buffer = Buffer(dist.group.WORLD, timeout=TIMEOUT, node=LAYOUTS["2x1"][rank])
        handle = scenario.dispatch(buffer)[4]
        which = turn % 2
        calls = [functools.partial(scenario.dispatch, buffer), functools.partial(scenario.combine, buffer, handle)]
        at = -1 if turn < 2 else turn * 7919 % counts[which]
        where = NOWHERE
        if rank == 1:
            outcome, interrupter = interrupted(calls[which], at)
            where = interrupter.where
            counts[which] = max(interrupter.count, 1) if turn < 2 else counts[which]
            if isinstance(outcome, KeyboardInterrupt):
                reached += 1
                buffer.destroy()
            del outcome, interrupter
        else:
            error = raised_by(calls[which])
            assert error is None or isinstance(error, (PeerError, BufferStateError)), repr(error)
        dist.barrier()
        buffer.destroy()
        del buffer, calls, handle
        if turn == 1:
            before = held()
        if before is not None:
            check_nothing_is_left(before, where)
        dist.broadcast_object_list(counts, 1)
    return reached


def raised_by(call: Callable[[], Any]) -> TokenferryError | None:
    try:
        call()
    except TokenferryError as error:
        error.__context__ = error.__cause__ = None
        return error.with_traceback(None)
    return None


def test_between_nodes(pool_of: PoolOf) -> None:
    reached = pool_of(2).run(_between_nodes, 2 * POINTS)[1]
    assert reached > POINTS
