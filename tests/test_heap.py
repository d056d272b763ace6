"""The heap and its message ring, several ranks in one process: no data race to hide behind, every order possible."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.faults import names, names_left
from tokenferry.errors import BufferStateError, HeapError, PeerTimeoutError
from tokenferry.memory import heap as heap_module
from tokenferry.memory import waiting
from tokenferry.memory.heap import SLOTS, Heap
from tokenferry.memory.shm import Segment, fence

STAGE = 64 << 10


@contextmanager
def heaps_of(num_ranks: int, stage_limit: int = STAGE, timeout: float = 0.2) -> Iterator[list[Heap]]:
    heaps = [Heap(rank, num_ranks, stage_limit, timeout) for rank in range(num_ranks)]
    handles = [heap.handle for heap in heaps]
    for heap in heaps:
        heap.attach(handles)
    for heap in heaps:
        heap.unlink()
    try:
        yield heaps
    finally:
        for heap in heaps:
            heap.close()


def send(heap: Heap, nbytes: int, mark: int) -> int | None:
    """Stage ``nbytes`` bytes of ``mark`` and publish them; None if there is no room."""
    offset = heap.try_reserve(nbytes)
    if offset is None:
        return None
    heap.stage_view(heap.rank, offset, nbytes).fill_(mark)
    peers = [rank for rank in range(heap.num_ranks) if rank != heap.rank]
    heap.publish(dict.fromkeys(peers, (mark, offset, nbytes)))
    return offset


def receive(heap: Heap, source: int) -> tuple[int, bool] | None:
    """The mark of the next message of ``source`` and whether its payload is intact; None if there is none."""
    message = heap.next_message(source)
    if message is None:
        return None
    mark, offset, nbytes = message.fields[:3]
    payload = heap.stage_view(source, offset, nbytes)
    intact = bool((payload == mark).all())
    heap.release(source)
    return mark, intact


def test_message_arrives_with_its_payload() -> None:
    with heaps_of(2) as (owner, reader):
        assert reader.next_message(0) is None
        send(owner, 1000, 7)
        assert receive(reader, 0) == (7, True)
        assert reader.next_message(0) is None
        assert owner.next_message(1) is None


def test_header_slots_are_reused_only_after_release() -> None:
    with heaps_of(3) as (owner, fast, slow):
        for mark in range(SLOTS):
            assert send(owner, 128, mark) is not None
        assert send(owner, 128, 99) is None
        for _ in range(SLOTS):
            receive(fast, 0)
        assert send(owner, 128, 99) is None, "one reader still has the first message"
        assert owner.readers_in_the_way() == [2]
        assert receive(slow, 0) == (0, True)
        assert send(owner, 128, 99) is not None


def test_stage_bytes_are_reused_only_after_release() -> None:
    with heaps_of(2) as (owner, reader):
        assert send(owner, 40 << 10, 1) == 0
        assert send(owner, 40 << 10, 2) is None
        assert receive(reader, 0) == (1, True)
        assert send(owner, 40 << 10, 2) == 0
        assert send(owner, 20 << 10, 3) == 40 << 10
        assert receive(reader, 0) == (2, True)
        assert send(owner, 30 << 10, 4) == 0, "wraps around"
        assert send(owner, 20 << 10, 5) is None, "would run into message 3"
        assert receive(reader, 0) == (3, True)
        assert receive(reader, 0) == (4, True)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_order_of_sends_and_reads_keeps_every_payload(data: st.DataObject) -> None:
    """Against a model: messages arrive in order, once, intact, whoever is slow."""
    with heaps_of(3) as heaps:
        expected = {(s, r): deque[int]() for s in range(3) for r in range(3) if s != r}
        mark = 0
        for _ in range(data.draw(st.integers(1, 60))):
            rank = data.draw(st.integers(0, 2))
            if data.draw(st.booleans()):
                mark = (mark + 1) % 251
                if send(heaps[rank], data.draw(st.integers(0, 30 << 10)), mark) is not None:
                    for reader in range(3):
                        if reader != rank:
                            expected[rank, reader].append(mark)
            else:
                source = (rank + data.draw(st.integers(1, 2))) % 3
                got = receive(heaps[rank], source)
                queue = expected[source, rank]
                assert got == ((queue.popleft(), True) if queue else None)
        for (source, reader), queue in expected.items():
            while queue:
                assert receive(heaps[reader], source) == (queue.popleft(), True)
            assert receive(heaps[reader], source) is None


def test_released_room_is_never_lost() -> None:
    """However sizes fall, an idle ring always has room for the largest message."""
    with heaps_of(2) as (owner, reader):
        for size in (1, 127, 128, 129, 5000, 64 << 10, 60 << 10, 3, 64 << 10) * 20:
            assert send(owner, size, 1) is not None
            assert receive(reader, 0) == (1, True)


def test_message_larger_than_the_stage_is_an_error() -> None:
    with heaps_of(2) as (owner, _), pytest.raises(HeapError, match="does not fit"):
        owner.try_reserve(STAGE + 1)


def test_stage_grows_up_to_its_limit_or_to_the_floor() -> None:
    with heaps_of(2, stage_limit=1 << 20) as (owner, _):
        before = owner.allocated_bytes()
        assert owner.ensure_stage(200_000, 1000) == 49 * 4096
        assert owner.allocated_bytes() == before - STAGE + 49 * 4096
        assert owner.ensure_stage(100, 100) == 49 * 4096, "never shrinks"
        assert owner.ensure_stage(1 << 30, 1000) == 1 << 20
        assert owner.ensure_stage(1 << 30, 3 << 20) == 3 << 20, "what an operation cannot do without, it gets"
        with pytest.raises(HeapError, match="raise num_nvl_bytes"):
            owner.ensure_stage(1 << 40, 1 << 40)


def test_views_stay_inside_the_stage() -> None:
    with heaps_of(2) as (owner, reader):
        size = heap_module._SMALLEST_RESERVE
        assert reader.stage_view(0, size - 1, 1).numel() == 1
        for offset, nbytes in ((-1, 1), (0, -1), (size, 1), (0, size + 1)):
            with pytest.raises(HeapError, match="outside"):
                owner.stage_view(1, offset, nbytes)


def test_foreign_segment_is_refused() -> None:
    one, two = Heap(0, 2, STAGE, 1.0), Heap(0, 2, STAGE, 1.0)
    try:
        with pytest.raises(HeapError, match="not a heap of this group"):
            one.attach([one.handle, two.handle])  # rank 0 twice
        with pytest.raises(HeapError, match="cannot open"):
            two.attach([two.handle, ("/tokenferry-not-there", 4096)])
        with pytest.raises(HeapError, match="not"):
            two.attach([two.handle, (one.handle[0], one.handle[1] * 2)])
    finally:
        one.close()
        two.close()


def test_wait_times_out_and_names_the_missing() -> None:
    with heaps_of(3) as heaps:
        with (
            pytest.raises(PeerTimeoutError, match=r"made up \(epoch 1\): rank 1, 2") as caught,
            heaps[0].operation("made up") as operation,
        ):
            operation.run(lambda: (False, [1, 2]))
        assert caught.value.ranks == (1, 2)
        with pytest.raises(BufferStateError, match="earlier operation failed"), heaps[0].operation("made up"):
            pass
        assert not heaps[0].is_open()


def test_progress_restarts_the_deadline() -> None:
    with heaps_of(2) as (heap, _):
        steps = iter([(i % 20 == 0, [1]) for i in range(800)] + [(True, [])])
        with heap.operation("made up") as operation:
            operation.run(lambda: next(steps))


def test_closed_heap_refuses_operations_and_close_may_be_repeated() -> None:
    with heaps_of(2) as (heap, _):
        heap.close()
        heap.close()
        assert not heap.is_open()
        with pytest.raises(BufferStateError, match="destroyed"), heap.operation("made up"):
            pass


def test_segment_is_private_to_the_user() -> None:
    segment = Segment.create(4096)
    try:
        assert len(segment.name) > 24
        path = Path("/dev/shm") / segment.name.lstrip("/")
        if path.exists():
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert path.stat().st_uid == os.getuid()
            segment.unlink()
            assert not path.exists()
        segment.unlink()
    finally:
        segment.retire()
        segment.close()


def test_creator_holds_the_lock_until_it_closes() -> None:
    creator = Segment.create(4096)
    peer = Segment(creator.name, 4096, create=False)
    assert creator.locked
    assert not peer.creator_is_gone()
    assert not peer.creator_is_gone(), "asking does not take the lock"
    creator.retire()
    assert peer.creator_is_gone()
    creator.close()
    peer.close()


def test_segment_takes_memory_only_when_committed() -> None:
    segment = Segment.create(1 << 30)
    try:
        blocks = os.fstat(segment._fd).st_blocks
        segment.commit(1 << 20)
        assert os.fstat(segment._fd).st_blocks * 512 >= 1 << 20
        assert os.fstat(segment._fd).st_blocks * 512 < 2 << 20
        assert blocks == 0
        with pytest.raises(HeapError, match="no room"):
            segment.commit(1 << 50)
        assert segment.committed == 1 << 20
    finally:
        segment.retire()
        segment.close()


def test_tensors_over_a_closed_heap_stay_readable() -> None:
    with heaps_of(2) as (owner, _):
        view = owner.stage_view(0, 0, 128)
        view.fill_(5)
    assert int(view.sum()) == 5 * 128, "the mapping lives as long as its tensors"


def test_fence_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    from tokenferry.memory import shm

    monkeypatch.setattr(shm, "_STRONGLY_ORDERED", False)
    fence()
    fence()
    assert not any(lock.locked() for lock in shm._FENCE_LOCKS)


def test_rank_taken_back_does_not_hold_what_it_missed() -> None:
    with heaps_of(3) as (owner, missing, other):
        send(owner, 20 << 10, 1)
        owner.set_masked([1], True)
        send(owner, 20 << 10, 2)
        owner.set_masked([1], False)
        assert [receive(other, 0), receive(other, 0)] == [(1, True), (2, True)]
        assert missing.next_message(0) is None, "what it was sent before may be overwritten by now"
        assert send(owner, 60 << 10, 3) == 0
        assert receive(missing, 0) == (3, True)


def retire_with_a_child(rank: int, num_ranks: int) -> list[bool]:
    creator = Segment.create(4096)
    peer = Segment(creator.name, 4096, create=False)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"x")
        time.sleep(30)
        os._exit(0)
    try:
        os.read(reading, 1)  # the child runs
        before = peer.creator_is_gone()
        creator.retire()
        return [before, peer.creator_is_gone()]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for file in (reading, writing):
            os.close(file)
        creator.close()
        peer.close()


def test_child_that_outlives_its_parent_does_not_hide_its_death(pool_of: Any) -> None:
    assert pool_of(1).run(retire_with_a_child) == [[False, True]]


def test_segment_that_is_too_large_leaves_nothing_behind() -> None:
    before = names()
    for size in (1 << 60, 1 << 63, 1 << 70):
        with pytest.raises(HeapError, match="cannot map"):
            Segment.create(size)
    assert not names_left(before)


def test_time_while_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(waiting.time, "monotonic", lambda: clock[0])
    waiter = waiting.Waiter()
    for _ in range(20):
        clock[0] += 0.05
        assert waiter.is_time_to_look()
    assert waiter.seconds() == pytest.approx(1.0)
    clock[0] += 1000  # SIGSTOP, a debugger, a suspended machine
    assert waiter.is_time_to_look()
    assert waiter.seconds() == pytest.approx(1.05)
