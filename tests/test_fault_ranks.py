"""Ranks that die, stop, stay away, give up or fork: rows of the table in docs/reliability.md."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from tests import fault_table
from tests.fault_cases import (
    ALL,
    EXPANDED,
    LARGE,
    LATE,
    MASKING,
    NODES,
    NORMAL,
    ONE_NODE,
    OPERATIONS,
    QUICK,
    QUICK_NODES,
    Situation,
)
from tests.fault_trials import DEADLINE, Trials
from tests.faults import ENDED, After, Left, Within, fault
from tokenferry import BufferStateError, MismatchError, PeerLostError, PeerTimeoutError
from tokenferry.memory.heap import Heap
from tokenferry.memory.shm import Segment


def kill(situation: Situation) -> bool:
    time.sleep(0.2)  # the others wait by then
    situation.happens()
    os.kill(os.getpid(), signal.SIGKILL)
    return False


@fault(
    "SIGKILL",
    on=(NORMAL, QUICK, NODES, QUICK_NODES),
    itself=ENDED,
    others=PeerLostError,
    after=After.SHRINK,
)
def test_killed(claims: Trials, kind: str) -> None:
    claims.suffer(kind, kill)


@fault("SIGKILL", on=[EXPANDED], itself=ENDED, others=PeerLostError, after=After.SURVIVORS)
def test_killed_expanded(claims: Trials, kind: str) -> None:
    claims.suffer(kind, kill)


@fault("SIGKILL", on=[MASKING], itself=ENDED, after=After.WITHOUT)
def test_killed_masked(claims: Trials, kind: str) -> None:
    claims.suffer(kind, kill)


def kill_in_an_operation(situation: Situation) -> bool:
    """Some rows are there by then."""
    messages: list[int] = []
    publish = Heap.publish

    def publish_and_die(heap: Heap, *arguments: object) -> None:
        publish(heap, *arguments)  # type: ignore[arg-type]
        messages.append(1)
        if len(messages) == 3:
            situation.happens()
            os.kill(os.getpid(), signal.SIGKILL)

    with mock.patch.object(Heap, "publish", publish_and_die):
        situation.world.combine(situation.buffer, situation.result)
    return False


@fault(
    "SIGKILL in the middle of an operation",
    on=[NORMAL, NODES],
    itself=ENDED,
    others=PeerLostError,
    after=After.SHRINK,
)
def test_killed_in_an_operation(claims: Trials, kind: str) -> None:
    claims.suffer(kind, kill_in_an_operation, row_bytes=LARGE)


def kill_but_not_a_child(situation: Situation) -> bool:
    child = os.fork()
    if child == 0:
        time.sleep(2.0)
        os._exit(0)
    return kill(situation)


@fault("SIGKILL, while a forked child lives on", on=[NORMAL], itself=ENDED, others=PeerLostError, after=After.SHRINK)
def test_killed_with_a_child(claims: Trials, kind: str) -> None:
    claims.suffer(kind, kill_but_not_a_child)


def leave(situation: Situation) -> bool:
    time.sleep(0.2)  # the others wait by then
    situation.happens()
    sys.exit(0)


@fault(
    "exit of the interpreter without `destroy()`",
    on=[*ONE_NODE, NODES],
    itself=ENDED,
    others=PeerLostError,
    after=After.SURVIVORS,
)
def test_exit_without_destroy(claims: Trials, kind: str) -> None:
    claims.suffer(kind, leave)


def _stop(situation: Situation, seconds: float) -> bool:
    waker = subprocess.Popen(["/bin/sh", "-c", f"sleep {seconds}; kill -CONT {os.getpid()}"])
    situation.happens()
    os.kill(os.getpid(), signal.SIGSTOP)
    waker.wait()
    return True


def stop_a_while(situation: Situation) -> bool:
    return _stop(situation, DEADLINE / 3)


def stop_too_long(situation: Situation) -> bool:
    return _stop(situation, DEADLINE + 1.0)


@fault("SIGSTOP, shorter than the deadline", on=ALL, within=Within.DEADLINE, after=After.GOES_ON)
def test_stopped_a_while(claims: Trials, kind: str) -> None:
    for it in claims.suffer(kind, stop_a_while, DEADLINE)[:-1]:
        assert it is not None
        assert len(it.operations) == OPERATIONS
        called, ended = it.operations[0]
        assert ended - called > DEADLINE / 6, "they have waited"


@fault(
    "SIGSTOP, longer than the deadline",
    on=ALL,
    itself=PeerLostError,
    others=(PeerTimeoutError, PeerLostError),
    within=Within.DEADLINE,
    after=After.ANEW,
)
def test_stopped_past_the_deadline(claims: Trials, kind: str) -> None:
    seen = claims.suffer(kind, stop_too_long, DEADLINE)
    assert any(it is not None and isinstance(it.error, PeerTimeoutError) for it in seen)


def stay_away(situation: Situation) -> bool:
    return False


def stay_silent(situation: Situation) -> bool:
    """Until the others have given up."""
    time.sleep(DEADLINE + 1.0)
    return False


@fault(
    "stays away from an operation",
    on=ALL,
    others=(PeerTimeoutError, PeerLostError),
    within=Within.DEADLINE,
    after=After.ANEW,
)
def test_absent(claims: Trials, kind: str) -> None:
    seen = claims.suffer(kind, stay_away, DEADLINE)
    assert any(it is not None and isinstance(it.error, PeerTimeoutError) for it in seen)


@fault("stays away from an operation", on=[MASKING], within=Within.DEADLINE, after=After.WITHOUT)
def test_absent_masked(claims: Trials, kind: str) -> None:
    for it in claims.suffer(kind, stay_silent, DEADLINE)[:-1]:
        assert it is not None
        called, ended = it.operations[0]
        assert ended - called >= DEADLINE


def skip(situation: Situation) -> bool:
    situation.world.dispatch(situation.buffer)
    return True


@fault(
    "skips an operation, and calls the next one",
    on=[NORMAL, EXPANDED, NODES],
    itself=MismatchError,
    others=MismatchError,
    after=After.GOES_ON,
)
def test_skipped(claims: Trials, kind: str) -> None:
    claims.suffer(kind, skip)


@fault(
    "skips an operation, and calls the next one",
    on=[QUICK, QUICK_NODES],
    itself=MismatchError,
    others=(MismatchError, PeerLostError),
    after=After.ANEW,
)
def test_skipped_low_latency(claims: Trials, kind: str) -> None:
    claims.suffer(kind, skip)


def raise_inside_with(situation: Situation) -> bool:
    time.sleep(0.2)  # the others wait by then
    situation.happens()
    with situation.buffer:
        raise LookupError


@fault(
    "raises `LookupError` between dispatch and combine, inside of `with`",
    on=ALL,
    itself=LookupError,
    others=PeerLostError,
    after=After.ANEW,
)
def test_exception_inside_with(claims: Trials, kind: str) -> None:
    claims.suffer(kind, raise_inside_with)


def raise_in_the_middle(situation: Situation) -> bool:
    messages: list[int] = []
    publish = Heap.publish

    def publish_and_raise(heap: Heap, *arguments: object) -> None:
        publish(heap, *arguments)  # type: ignore[arg-type]
        messages.append(1)
        if len(messages) == 3:
            situation.happens()
            raise LookupError

    with mock.patch.object(Heap, "publish", publish_and_raise):
        situation.world.combine(situation.buffer, situation.result)
    return False


@fault(
    "raises `LookupError` in the middle of an operation",
    on=[NORMAL, NODES],
    itself=LookupError,
    others=PeerLostError,
    after=After.ANEW,
)
def test_exception_in_an_operation(claims: Trials, kind: str) -> None:
    claims.suffer(kind, raise_in_the_middle, row_bytes=LARGE)


def interrupt(situation: Situation) -> bool:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # as inherited

    def press() -> None:
        time.sleep(LATE / 2)
        situation.happens()
        os.kill(os.getpid(), signal.SIGINT)

    pressing = threading.Thread(target=press)
    pressing.start()
    try:
        situation.world.combine(situation.buffer, situation.result)
    finally:
        signal.signal(signal.SIGINT, previous)
        pressing.join()
    return False


@fault(
    "Ctrl-C, while it waits for the others", on=ALL, itself=KeyboardInterrupt, others=PeerLostError, after=After.ANEW
)
def test_interrupted(claims: Trials, kind: str) -> None:
    claims.suffer(kind, interrupt, late=True)


def destroy_while_others_read(situation: Situation) -> bool:
    situation.world.combine(situation.buffer, situation.result)
    situation.happens()
    situation.buffer.destroy()
    return False


@fault(
    "`destroy()`, while the others still read its memory",
    on=ONE_NODE,
    others=PeerLostError,
    after=After.ANEW,
)
def test_memory_freed_while_others_read(claims: Trials, kind: str) -> None:
    for it in claims.suffer(kind, destroy_while_others_read, read_late=True)[:-1]:
        assert it is not None
        assert it.read_late
        assert len(it.operations) == 2, "the first with what it read"


def fork(situation: Situation) -> bool:
    """The child can neither use the Buffer nor take it from its parent."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            with pytest.raises(BufferStateError):
                situation.world.dispatch(situation.buffer)
            situation.buffer.destroy()
            del situation
            gc.collect()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    return True


@fault("fork, and the child uses and destroys the Buffer", on=ALL, after=After.GOES_ON)
def test_forked(claims: Trials, kind: str) -> None:
    claims.suffer(kind, fork)


def destroy_the_group(situation: Situation) -> bool:
    dist.destroy_process_group(situation.buffer.group)
    return True


@fault("process group destroyed before the Buffer, on all ranks", on=ALL, after=After.GOES_ON)
def test_group_destroyed_first(claims: Trials, kind: str) -> None:
    claims.suffer(kind, destroy_the_group, everybody=True, own_group=True)


@contextmanager
def killed_at_construction(mark: Path) -> Iterator[None]:
    """As soon as the segment is there."""
    create = Segment.create

    def create_and_die(size: int) -> Segment:
        segment = create(size)
        mark.write_text(f"{time.monotonic()} {segment.name.lstrip('/')}")
        os.kill(os.getpid(), signal.SIGKILL)
        return segment

    with mock.patch.object(Segment, "create", create_and_die):
        yield


@fault(
    "SIGKILL while a Buffer is made",
    on=[NORMAL, NODES],
    itself=ENDED,
    others=RuntimeError,
    within=Within.GROUP,
    after=After.NONE,
    left=Left.NAME,
)
def test_killed_at_construction(claims: Trials, kind: str) -> None:
    claims.construct(kind, killed_at_construction, deadline=DEADLINE)


def test_table_is_the_one_of_the_tests() -> None:
    files = {file.stem for file in Path(__file__).parent.glob("test_*.py") if "\n@fault(" in file.read_text()}
    assert files == set(fault_table.FILES)
    assert fault_table.PAGE.read_text() == fault_table.page(), "python -m tests.fault_table writes it"
