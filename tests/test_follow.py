"""The tables of the device, on a GPU that is played: between graphs, in them, and where no host comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import played_gpu
from tests.test_direct import FakeDriver, Machine, connect, driver_of
from tokenferry.dataplane.cuda import follow
from tokenferry.dataplane.cuda.follow import Follower
from tokenferry.memory import direct
from tokenferry.memory.direct import Regions

CPU = torch.device("cpu")
HEAP, HEAP_BYTES = 1 << 46, 1 << 20
ROWS = 1 << 16


class Queue:
    """Of launches; what a graph is to copy when it is replayed is done at :meth:`replay`."""

    def __init__(self) -> None:
        self.stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.handle = 0
        self.lock = threading.RLock()

    def start(self) -> None:
        pass

    def keep(self, tensor: torch.Tensor) -> None:
        pass


class Graph:
    """Takes the copies to tables that are made while it is captured, and makes them when it is replayed."""

    def __init__(self, gpu: played_gpu.Gpu, number: int, followers: list[Follower]) -> None:
        self._gpu = gpu
        self._number = number
        self._followers = followers
        self.copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    @contextmanager
    def captured(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        main = threading.get_ident()

        def note(to: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
            assert threading.get_ident() == main  # the thread has a stream of its own
            self.copies.append((to, source))
            return to

        for follower in self._followers:
            driver_of(follower._regions).captured = self._number
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "copy_", note)
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: threading.get_ident() == main)
            yield
        for follower in self._followers:
            driver_of(follower._regions).captured = None

    def replay(self) -> None:
        for to, source in self.copies:
            to.copy_(source)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[played_gpu.Gpu, list[Follower]]]:
    """The followers of two ranks; the threads of both need no GPU."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    machine = Machine()
    with played_gpu.played() as gpu:
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        everyone = [Regions(rank, 2, FakeDriver(machine, rank)) for rank in range(2)]
        connect(everyone)
        for regions in everyone:
            regions.set_heap([HEAP, HEAP + (1 << 40)], HEAP_BYTES)
        device: Any = SimpleNamespace(index=0)
        monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, copy: tensor.clone())
        followers = [Follower(regions, Queue(), device) for regions in everyone]
        yield gpu, followers
        for follower in followers:
            follower.close()
            if follower._thread is not None:
                follower._thread.join(5.0)
                assert not follower._thread.is_alive()
            follower._regions.close()


def alloc(follower: Follower) -> int:
    return driver_of(follower._regions).alloc(ROWS)


def start_threads(gpu: played_gpu.Gpu, followers: list[Follower], monkeypatch: pytest.MonkeyPatch) -> None:
    graph = Graph(gpu, 1, followers)
    with graph.captured(monkeypatch):
        for follower in followers:
            follower.follow()


def wait_for(condition: Any) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_heaps_are_known_from_the_start(ranks: tuple[played_gpu.Gpu, list[Follower]]) -> None:
    for follower in ranks[1]:
        assert follower.region_table[0, :, 0].tolist() == [HEAP, HEAP + (1 << 40)]
        assert follower.ready[0] == 1


def test_between_graphs(ranks: tuple[played_gpu.Gpu, list[Follower]]) -> None:
    _, (one, two) = ranks
    region, _ = one._regions.expose(alloc(one), ROWS)
    for _ in range(2):
        for follower in (one, two):
            follower.follow()
    one.follow()
    assert two.region_table[0, 0, region] != 0
    assert one.ready[region] == 1


@pytest.mark.parametrize("num_operations", [1, 3])
def test_a_graph_learns_what_its_memory_is_without_a_call(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch, num_operations: int
) -> None:
    gpu, (one, two) = ranks
    graph = Graph(gpu, 7, [one, two])
    with graph.captured(monkeypatch):
        for _ in range(num_operations):
            for follower in (one, two):
                follower.follow()
            region, _ = one._regions.expose(alloc(one), ROWS)
        assert len(graph.copies) == 2  # one in a graph of each rank
    wait_for(lambda: one._regions.is_ready(region))
    assert two.region_table[0, 0, region] == two._regions.table[0, region] != 0
    assert one.ready[region] == 0  # an operation may be running
    graph.replay()
    assert one.ready[region] == 1
    later = Graph(gpu, 8, [one, two])
    with later.captured(monkeypatch):
        one.follow()
        one.follow()
    assert len(later.copies) == 1


def test_without_numbers_of_captures_every_operation_copies(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, (one, _) = ranks
    graph = Graph(gpu, 7, [])
    with graph.captured(monkeypatch):
        one.follow()
        one.follow()
    assert len(graph.copies) == 2


def test_calls_between_find_what_the_thread_has_left(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread polls, which tells of a change once; the next call copies what is ready all the same."""
    gpu, (one, two) = ranks
    graph = Graph(gpu, 7, [one, two])
    with graph.captured(monkeypatch):
        one.follow()
        two.follow()
        region, _ = one._regions.expose(alloc(one), ROWS)
    wait_for(lambda: one._regions.is_ready(region))
    one.follow()
    assert one.ready[region] == 1


def test_what_a_call_left_under_way_is_acknowledged_without_another(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, (one, two) = ranks
    start_threads(gpu, [one, two], monkeypatch)
    is_over = threading.Event()
    monkeypatch.setattr(torch.cuda.Event, "query", lambda event: is_over.is_set())
    with one.lock, two.lock:
        region, _ = one._regions.expose(alloc(one), ROWS)
        two.follow()
    time.sleep(0.3)
    assert not one._regions.is_ready(region)  # the device of the other may not know it yet
    is_over.set()
    wait_for(lambda: one._regions.is_ready(region))


def test_the_thread_closes_nothing(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel may be running that reads there, if its owner has given up."""
    gpu, (one, two) = ranks
    start_threads(gpu, [one, two], monkeypatch)
    with one.lock:
        base = alloc(one)
        region, _ = one._regions.expose(base, ROWS)
    wait_for(lambda: one._regions.is_ready(region))
    mapped = driver_of(two._regions).mapped
    assert len(mapped) == 1
    with one.lock:
        driver_of(one._regions).free(base)
        one._regions.sweep()
        other, _ = one._regions.expose(alloc(one), ROWS)
    wait_for(lambda: one._regions.is_ready(other))
    assert len(mapped) == 2
    with two.lock:
        two.follow()
        two.follow()
    assert len(mapped) == 1


def test_a_thread_that_ended_is_followed_by_another(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, (one, two) = ranks
    with monkeypatch.context() as patch:
        patch.setattr(Regions, "poll", lambda regions: 1 // 0)
        start_threads(gpu, [one], monkeypatch)
        first = one._thread
        assert first is not None
        first.join(5.0)
    start_threads(gpu, [one, two], monkeypatch)
    assert one._thread is not first
    with one.lock:
        region, _ = one._regions.expose(alloc(one), ROWS)
    wait_for(lambda: one._regions.is_ready(region))


def test_a_capture_wakes_the_thread(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which looks seldom where nothing has been captured for long."""
    gpu, (one, two) = ranks
    with monkeypatch.context() as patch:
        patch.setattr(follow, "_SHORTEST_SLEEP", 60.0)
        patch.setattr(follow, "_LONGEST_SLEEP", 60.0)
        start_threads(gpu, [one, two], monkeypatch)
        time.sleep(0.1)  # both sleep by then
        patch.setattr(follow, "_LONGEST_SLEEP", 0.01)
        with one.lock:
            region, _ = one._regions.expose(alloc(one), ROWS)
        time.sleep(0.1)
        assert not one._regions.is_ready(region)
        start_threads(gpu, [one, two], monkeypatch)
        wait_for(lambda: one._regions.is_ready(region))


def test_threads_end_before_the_interpreter_does(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, followers = ranks
    start_threads(gpu, followers, monkeypatch)
    follow._end_threads()
    assert not any(follower._thread.is_alive() for follower in followers if follower._thread is not None)


def test_the_thread_ends_with_its_buffer(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, followers = ranks
    start_threads(gpu, followers[:1], monkeypatch)
    thread = followers[0]._thread
    assert thread is not None
    followers[0].close()
    thread.join(5.0)
    assert not thread.is_alive()


def test_a_mailbox_that_is_garbage_ends_the_thread_alone(
    ranks: tuple[played_gpu.Gpu, list[Follower]], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gpu, followers = ranks
    start_threads(gpu, followers[:1], monkeypatch)
    thread = followers[0]._thread
    assert thread is not None
    peer = followers[1]._regions
    words = peer._words(1)
    words[peer._states + 3] = 9
    words[direct._POSTED] += 1
    thread.join(5.0)
    assert not thread.is_alive()
    assert "not followed any more" in caplog.text
