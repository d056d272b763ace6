"""The allocator of tensors in the heap."""

from __future__ import annotations

import random
import sys
import threading
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import played_gpu
from tokenferry.errors import HeapError
from tokenferry.memory import pool as pool_module
from tokenferry.memory.pool import Pool
from tokenferry.streams import CommStream
from tokenferry.topology import Topology

BASE = 1 << 20


class Passed:
    """A point that operations are past."""

    def has_passed(self) -> bool:
        return True

    def wait(self) -> None:
        raise AssertionError("nothing to wait for")


class Operations:
    """Gives points, and says of each when all before it is done; counts the waits for each."""

    def __init__(self) -> None:
        self.waits: list[int] = []
        self.done = 0
        self.is_capturing = False

    def mark(self) -> Any:
        if self.is_capturing:
            return None
        self.waits.append(0)
        return _Point(self, len(self.waits) - 1)


class _Point:
    def __init__(self, operations: Operations, number: int) -> None:
        self._operations = operations
        self._number = number

    def has_passed(self) -> bool:
        assert not self._operations.is_capturing
        return self._number < self._operations.done

    def wait(self) -> None:
        assert not self._operations.is_capturing
        self._operations.waits[self._number] += 1


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4000)), max_size=80))
def test_blocks_never_overlap_and_come_back_whole(steps: list[tuple[bool, int]]) -> None:
    operations = Operations()
    pool = Pool(BASE, 16384, operations.mark)
    held: dict[int, int] = {}
    for gives, number in steps:
        operations.done += number % 3
        if gives and held:
            address = sorted(held)[number % len(held)]
            pool.give(address, held.pop(address))
            continue
        try:
            address = pool.take(number)
        except HeapError:
            continue
        assert address % 512 == 0
        assert address >= BASE
        assert address + number <= BASE + 16384
        assert all(address + number <= other or other + size <= address for other, size in held.items())
        held[address] = number
    for address, nbytes in held.items():
        pool.give(address, nbytes)
    assert pool.take(16384) == BASE


def test_a_full_pool_says_what_to_raise() -> None:
    pool = Pool(BASE, 1024, Passed)
    pool.take(600)
    with pytest.raises(HeapError, match="raise heap_bytes"):
        pool.take(1)


def test_a_block_is_used_again_behind_the_operations_that_may_read_it() -> None:
    operations = Operations()
    pool = Pool(BASE, 2048, operations.mark)
    pool.give(pool.take(512), 512)
    assert pool.take(512) == BASE + 512, "there is other room"
    assert operations.waits == [0]
    operations.done = 1
    assert pool.take(512) == BASE, "operations are past it"
    pool.give(BASE, 512)
    assert pool.take(1024) == BASE + 1024
    assert pool.take(512) == BASE, "no other room: the stream waits"
    assert sum(operations.waits) == 1
    with pytest.raises(HeapError):
        pool.take(512)


def test_the_point_is_behind_the_block() -> None:
    """Another thread gives a block back, and goes on, while the point is looked for: it may be behind that."""
    operations = Operations()
    pool = Pool(BASE, 1536, operations.mark)
    first, second, _ = (pool.take(512) for _ in range(3))
    mark = operations.mark

    def marking() -> Any:
        point = mark()
        if len(operations.waits) == 1:
            pool.give(second, 512)
        return point

    pool._mark = marking
    pool.give(first, 512)
    operations.done = 1
    assert pool.take(512) == first
    assert pool.take(512) == second
    assert operations.waits == [0, 1]


def test_every_stream_waits_for_itself() -> None:
    """One that has waited for several blocks takes one of them: the next one must wait for the others."""
    operations = Operations()
    pool = Pool(BASE, 1024, operations.mark)
    for address in [pool.take(512), pool.take(512)]:
        pool.give(address, 512)
    assert pool.take(512) == BASE
    assert operations.waits == [1]
    assert pool.take(512) == BASE + 512
    assert sum(operations.waits) == 2
    pool.give(BASE, 512)
    pool.give(BASE + 512, 512)
    operations.done = 100
    assert pool.take(1024) == BASE
    assert sum(operations.waits) == 2


def test_a_capture_asks_nothing_and_waits_for_nothing() -> None:
    operations = Operations()
    pool = Pool(BASE, 1536, operations.mark)
    addresses = [pool.take(512) for _ in range(2)]
    pool.give(addresses[0], 512)
    assert pool.take(512) == BASE + 1024
    operations.is_capturing = True
    pool.give(addresses[1], 512)
    operations.done = 100
    with pytest.raises(HeapError):
        pool.take(512)
    operations.is_capturing = False
    assert pool.take(1024) == BASE


def test_a_tensor_may_go_at_any_line() -> None:
    """Where the garbage collector comes: in the middle of the pool, in its own thread."""
    stops = 0
    while _goes_at_line(stops):
        stops += 1
    assert stops > 10


def _goes_at_line(at: int) -> bool:
    """Whether there are so many lines."""
    pool = Pool(BASE, 8 * 512, Passed)
    held = [pool.take(512) for _ in range(8)]
    goes = held.pop(3)
    lines = [at]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != pool_module.__file__:
            return None
        if event == "line":
            lines[0] -= 1
            if lines[0] == -1:
                pool.give(goes, 512)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        for index in (0, 4, 2, 1):
            pool.give(held[index], 512)
        held = [address for index, address in enumerate(held) if index not in (0, 1, 2, 4)]
        held += [pool.take(size) for size in (512, 1024)]
    finally:
        sys.settrace(before)
    if lines[0] >= 0:
        return False
    for address, size in zip(held, [512] * (len(held) - 1) + [1024], strict=True):
        pool.give(address, size)
    assert pool.take(8 * 512) == BASE
    return True


def test_threads() -> None:
    """They take, and let go what others took."""
    pool = Pool(BASE, 1 << 16, Passed)
    owners: dict[int, int] = {}
    handed: list[tuple[int, int]] = []
    lock, failures = threading.Lock(), []

    def work(seed: int) -> None:
        source = random.Random(seed)
        try:
            for _ in range(400):
                size = source.randrange(1, 5) * 512
                address = pool.take(size)
                for place in range(address, address + size, 512):
                    assert owners.setdefault(place, seed) == seed
                with lock:
                    handed.append((address, size))
                    goes, its = handed.pop(source.randrange(len(handed)))
                for place in range(goes, goes + its, 512):
                    del owners[place]
                pool.give(goes, its)
        except BaseException as error:
            failures.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failures
    assert pool.take(1 << 16) == BASE


def test_the_point_of_a_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is behind all that is queued on the communication stream, and on the stream of the last hook."""
    with played_gpu.played() as gpu:
        comm = CommStream(torch.device("cuda", 0))
        ours, theirs, here = comm.stream.stream_id, 40, 50
        gpu.log = []
        first = comm.mark()
        assert first is not None
        assert _of(gpu, "record event") == [ours]
        gpu.current = (theirs, 0, played_gpu.CUDA)
        with comm.in_order():
            pass
        gpu.current = (here, 0, played_gpu.CUDA)
        gpu.log = []
        second = comm.mark()
        assert second is not None
        assert sorted(_of(gpu, "record event")) == sorted([ours, theirs])
        assert gpu.current[0] == here
        gpu.log = []
        second.wait()
        assert _of(gpu, "wait for event") == [here, here]
        assert second.has_passed()
        monkeypatch.setattr(torch.cuda.Event, "query", lambda event: event in first._events)
        assert first.has_passed()
        assert not second.has_passed()
        gpu.capturing = True
        assert comm.mark() is None


def _of(gpu: played_gpu.Gpu, name: str) -> list[object]:
    """The streams of one kind of call."""
    return [call[1] for call in gpu.log or () if call[0] == name]


def test_tensors_of_a_buffer_are_used_again_behind_its_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"stage_limit": 1 << 20, "push_bytes": 0, "heap_bytes": 1024, "timeout": 10.0}
    with (
        played_gpu.played([torch.zeros(1 << 16, dtype=torch.uint8)]) as gpu,
        played_gpu.runtime_of_rank_0(gpu, Topology(0, (0, 0)), range(2), options) as (runtime, _),
    ):
        pool, comm = runtime._heap._pool, runtime.comm.stream.stream_id
        address = pool.take(1024)
        monkeypatch.setattr(torch.cuda.Event, "query", lambda event: False)
        gpu.log = []
        pool.give(address, 1024)
        assert not gpu.log, "a finalizer asks the driver for nothing"
        assert pool.take(1024) == address
        assert _of(gpu, "record event") == [comm]
        assert _of(gpu, "wait for event") == [gpu.current[0]]
