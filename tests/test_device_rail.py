"""Rails for tensors on GPUs, with Gloo in the place of NCCL, and tensors on the CPU."""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, _get_default_store

from tests.cases import wait_for
from tests.conftest import PoolOf
from tokenferry.cli.ranks import RankPool
from tokenferry.errors import TokenferryError
from tokenferry.rail import RailError, device_rail, notices
from tokenferry.rail.device_rail import _KEPT, DeviceRail
from tokenferry.rail.nccl import GroupTransport, _errors_left_to_us, nccl_rail
from tokenferry.rail.process_group import ProcessGroupRail
from tokenferry.rail.watch import Watch, Watched
from tokenferry.topology import Topology

CPU = torch.device("cpu")


class Passed:
    """A marker that the stream has always passed."""

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return True


class AsOne:
    """Gloo under a group that takes several operations as one, as NCCL does."""

    supports_coalescing = True

    def __init__(self, group: Any) -> None:
        self._group = group
        self._works: list[Any] | None = None
        self.was_aborted = False

    def _get_backend(self, device: torch.device) -> AsOne:
        return self

    def _start_coalescing(self, device: torch.device) -> None:
        assert self._works is None
        self._works = []

    def send(self, tensors: list[torch.Tensor], node: int, tag: int) -> None:
        assert self._works is not None
        self._works.append(self._group.send(tensors, node, tag))

    def recv(self, tensors: list[torch.Tensor], node: int, tag: int) -> None:
        assert self._works is not None
        self._works.append(self._group.recv(tensors, node, tag))

    def _end_coalescing(self, device: torch.device) -> Any:
        assert self._works is not None
        works, self._works = self._works, None
        return AllOf(works)

    def abort(self) -> None:
        self.was_aborted = True


class AllOf:
    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()

    def is_completed(self) -> bool:
        return True


def rail_of(
    rank: int, num_ranks: int, key: str, as_one: bool, timeout: float = 10.0, kind_of: Any = GroupTransport
) -> tuple[DeviceRail, Any]:
    topology = Topology(rank, tuple(range(num_ranks)))
    store = PrefixStore(f"{key}/device", _get_default_store())
    group: Any = dist.ProcessGroup(store, rank, num_ranks)
    kind = dist.ProcessGroup.BackendType.GLOO
    backend = ProcessGroupGloo(store, rank, num_ranks)
    group._set_default_backend(kind)
    group._register_backend(CPU, kind, backend)
    if as_one:
        group = AsOne(group)
    words = ProcessGroupRail(topology, key, timeout)
    return DeviceRail(words, kind_of(group, CPU), topology, CPU, timeout, Passed), group


def _exchange(rank: int, num_ranks: int, key: str, as_one: bool) -> int:
    rail, _ = rail_of(rank, num_ranks, key, as_one)
    others = [node for node in range(num_ranks) if node != rank]

    def columns(source: int, reader: int, turn: int) -> list[torch.Tensor]:
        rows = (source + 2 * reader + turn) % 4
        first = torch.arange(rows * 8).view(rows, 8) + 1000 * source + 100 * reader + turn
        return [first, first[:, :3].float().contiguous()]

    transfers, received = [], []
    for turn in range(5):
        came = {node: [torch.full_like(t, -7) for t in columns(node, rank, turn)] for node in others}
        transfers.append(rail.post({node: columns(rank, node, turn) for node in others}, came))
        received.append(came)
    for turn, transfer in enumerate(transfers):
        for node in others:
            transfer.wait(node)
            for given, wanted in zip(received[turn][node], columns(node, rank, turn), strict=True):
                assert torch.equal(given, wanted)
        transfer.finish()
    sent = rail.bytes_sent
    rail.close()
    rail.close()
    with pytest.raises(RailError, match="closed"):
        rail.post({node: [torch.zeros(1)] for node in others}, {})
    expected = sum(t.nbytes for turn in range(5) for node in others for t in columns(rank, node, turn))
    assert sent == expected
    return sent


@pytest.mark.parametrize("as_one", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_exchange(pool_of: PoolOf, num_ranks: int, as_one: bool) -> None:
    assert min(pool_of(num_ranks).run(_exchange, f"device/{num_ranks}/{as_one}", as_one)) > 0


class Never(Passed):
    """A marker that the stream never passes."""

    def query(self) -> bool:
        return False


class Broken(Passed):
    """A marker on a device that has failed."""

    def query(self) -> bool:
        raise RuntimeError("an illegal memory access was encountered")


def _silent(rank: int, num_ranks: int, key: str) -> tuple[bool, tuple[int, ...], float]:
    """The exchange never ends on the device: the deadline ends it."""
    rail, group = rail_of(rank, num_ranks, key, True, timeout=0.5)
    rail._marker = Never
    AllOf.is_completed = lambda self: False  # type: ignore[method-assign]
    others = [node for node in range(num_ranks) if node != rank]
    transfer = rail.post({node: [torch.zeros(4)] for node in others}, {node: [torch.zeros(4)] for node in others})
    started = time.monotonic()
    try:
        with pytest.raises(RailError) as caught:
            transfer.finish()
    finally:
        AllOf.is_completed = lambda self: True  # type: ignore[method-assign]
    seconds = time.monotonic() - started
    assert group.was_aborted
    with pytest.raises(RailError, match="closed"):
        rail.post({others[0]: [torch.zeros(4)]}, {})
    rail.close()
    return caught.value.timed_out, tuple(caught.value.nodes), seconds


def test_deadline(pool_of: PoolOf) -> None:
    results = pool_of(3).run(_silent, "device/silent")
    for rank, (timed_out, nodes, seconds) in enumerate(results):
        assert timed_out
        assert nodes == tuple(node for node in range(3) if node != rank)
        assert 0.5 <= seconds < 1.5


def _one_silent(rank: int, num_ranks: int, key: str, settles: bool) -> tuple[int, ...]:
    """Rank 1 does not come. The others cannot see by the exchange that it is this one."""
    with mock.patch.multiple(notices, _GRACE_SHARE=1.0, _MOST_GRACE_SECONDS=2.0):
        rail, _ = rail_of(rank, num_ranks, key, True, timeout=2.0)
    dist.barrier()
    nodes: tuple[int, ...] = ()
    if rank != 1:
        rail._marker = Never
        AllOf.is_completed, AllOf.wait = lambda self: False, lambda self: None  # type: ignore[method-assign, assignment]
        parts = {node: [torch.zeros(4)] for node in range(num_ranks) if node != rank}
        transfer = rail.post(parts, {node: [torch.zeros(4)] for node in parts})
        if settles:
            transfer.settle()
            wait_for(lambda: rail.failure is not None)
        with pytest.raises(RailError) as caught:
            rail.post(parts, {}) if settles else transfer.finish()
        nodes = tuple(caught.value.nodes)
    dist.barrier()
    rail.close()
    return nodes


@pytest.mark.parametrize("settles", [False, True])
def test_the_one_that_is_silent_is_named(settles: bool) -> None:
    with RankPool(3, 1) as pool:
        assert pool.run(_one_silent, "device/one silent", settles) == [(1,), (), (1,)]


def _settled(rank: int, num_ranks: int, key: str) -> None:
    """No host waits; values are there, memory is let go, and the thread ends."""
    rail, _ = rail_of(rank, num_ranks, key, True)
    other = 1 - rank
    for turn in range(20):
        came = torch.zeros(5)
        transfer = rail.post({other: [torch.full((5,), float(10 * turn + rank))]}, {other: [came]})
        transfer.wait(other)
        transfer.settle()
        assert came.tolist() == [10 * turn + other] * 5
    transfer.settle()
    transfer.finish()
    deadline = time.monotonic() + 10
    while rail.watch._thread is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not rail.watch._watched
    rail.close()


def test_exchanges_that_no_host_waits_for(pool_of: PoolOf) -> None:
    pool_of(2).run(_settled, "device/settled")


def _no_setting() -> Any:
    raise RuntimeError("no such setting")


def _missed(rank: int, num_ranks: int, key: str, has_setting: bool) -> tuple[bool, tuple[int, ...], str]:
    """The same, and the stream never gets there: the thread ends the rail, which says so when it is used next."""
    rail, group = rail_of(rank, num_ranks, key, True, timeout=0.5)
    if not has_setting:
        rail.watch._in_thread = _no_setting
    others = [node for node in range(num_ranks) if node != rank]
    rail._marker = Never
    for _ in range(3):
        parts = {node: [torch.zeros(4)] for node in others}
        transfer = rail.post(parts, {node: [torch.zeros(4)] for node in others})
        for node in others:
            transfer.wait(node)
        transfer.settle()
    assert not group.was_aborted
    deadline = time.monotonic() + 10
    while not group.was_aborted:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RailError) as caught:
        rail.post({others[0]: [torch.zeros(4)]}, {})
    rail.close()
    return caught.value.timed_out, tuple(caught.value.nodes), str(caught.value)


@pytest.mark.parametrize("has_setting", [True, False])
def test_deadline_that_no_host_waits_for(pool_of: PoolOf, has_setting: bool) -> None:
    results = pool_of(3).run(_missed, f"device/missed/{has_setting}", has_setting)
    for rank, (timed_out, nodes, text) in enumerate(results):
        assert timed_out
        assert nodes == tuple(node for node in range(3) if node != rank)
        assert "0.5 s" in text


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_deadlines_are_kept_after_a_thread_that_did_not_start(raised: type[BaseException]) -> None:
    missed: list[tuple[Any, str]] = []
    watch = Watch(0.05, lambda nodes, reason: missed.append((nodes, reason)), contextlib.nullcontext, list)
    with mock.patch.object(threading.Thread, "start", side_effect=raised), pytest.raises(raised):
        watch.add(Watched(Never(), [1], [], time.monotonic()))
    assert watch._thread is None
    watch.add(Watched(Never(), [2], [], time.monotonic()))
    deadline = time.monotonic() + 10
    while not missed or watch._thread is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [nodes for nodes, _ in missed] == [[1]], "the first one that is late ends the rail"


def _failed(rank: int, num_ranks: int, key: str) -> tuple[bool, str]:
    """The backend says that all is over, but the stream has not passed: the exchange has failed."""
    rail, group = rail_of(rank, num_ranks, key, True, timeout=30.0)
    rail._marker = Never
    other = 1 - rank
    transfer = rail.post({other: [torch.zeros(4)]}, {other: [torch.zeros(4)]})
    with pytest.raises(RailError) as caught:
        transfer.finish()
    assert group.was_aborted
    kept = list(_KEPT)  # its end would wait for threads
    assert len(kept) == 1
    rail.close()
    other_rail, other_group = rail_of(rank, num_ranks, f"{key}/closed", True, timeout=30.0)
    other_rail.close()
    assert other_group.was_aborted
    assert kept == _KEPT
    for marker, is_kept in ((Passed, False), (Never, True), (Broken, True)):
        _KEPT.clear()
        settled, _ = rail_of(rank, num_ranks, f"{key}/{marker.__name__}", True, timeout=30.0)
        settled._marker = marker
        settled.post({other: [torch.zeros(4)]}, {other: [torch.zeros(4)]}).settle()
        settled.close()
        assert bool(_KEPT) == is_kept
    _KEPT.clear()
    return caught.value.timed_out, str(caught.value)


def _closed_before_it_is_abandoned(rank: int, num_ranks: int, key: str) -> int:
    """The rail is closed when the thread has seen that an exchange is late, and has not ended the rail yet."""
    rail, group = rail_of(rank, num_ranks, key, True, timeout=0.2)
    rail._marker, other, is_seen, is_closed = Never, 1 - rank, threading.Event(), threading.Event()
    abandon = rail.abandon

    def late() -> None:
        is_seen.set()
        assert is_closed.wait(10)
        abandon()

    _KEPT.clear()
    with mock.patch.object(rail, "abandon", late):
        rail.post({other: [torch.zeros(4)]}, {other: [torch.zeros(4)]}).settle()
        assert is_seen.wait(10)
        with pytest.raises(RailError, match="no sign of life"):
            rail.transport()
        rail.close()
        is_closed.set()
    assert group.was_aborted
    kept = len(_KEPT)
    _KEPT.clear()
    return kept


def test_a_failed_group_is_kept_whoever_ends_it(pool_of: PoolOf) -> None:
    assert pool_of(2).run(_closed_before_it_is_abandoned, "device/closed-between") == [1, 1]


def _captured(rank: int, num_ranks: int, key: str, how: str) -> tuple[float, bool, bool]:
    """The group does not end before a graph is gone that holds an exchange; if nothing is wrong it is left alone."""
    rail, group = rail_of(rank, num_ranks, key, True)
    other, row = 1 - rank, torch.ones(16, dtype=torch.uint8)
    with mock.patch.object(device_rail, "_is_capturing", return_value=True):
        rail.post({other: [row]}, {other: [torch.empty_like(row)]}).wait(other)
    graph, is_told, has_ended = threading.Event(), threading.Event(), threading.Event()

    def abort() -> None:
        is_told.set()
        graph.wait()
        has_ended.set()

    group.abort = abort
    kept, began = len(_KEPT), time.monotonic()
    rail.abandon() if how == "failed" else rail.close(is_stuck=how == "stuck")
    took = time.monotonic() - began
    assert is_told.is_set() == (how != "idle")
    assert not has_ended.is_set()
    is_kept = len(_KEPT) == kept + 1
    del _KEPT[kept:]
    graph.set()
    rail.close()
    return took, is_kept, how == "idle" or has_ended.wait(5.0)


@pytest.mark.parametrize("how", ["idle", "stuck", "failed"])
def test_a_graph_may_outlive_the_rail(pool_of: PoolOf, how: str) -> None:
    for took, is_kept, has_ended in pool_of(2).run(_captured, f"graph {how}", how):
        assert took < 3.0
        assert is_kept
        assert has_ended


def test_a_watch_is_not_idle_behind_a_failure() -> None:
    """Neither once a late exchange is forgotten, nor once a marker could not be asked."""
    for marker, missed in ((Never(), 1), (Broken(), 0)):
        calls: list[bool] = []
        watch = Watch(0.0, lambda *_, calls=calls: calls.append(watch.is_idle), contextlib.nullcontext, list)  # noqa: B023
        assert watch.is_idle
        watch.add(Watched(marker, [1], [], time.monotonic() - 1))
        deadline = time.monotonic() + 10
        while watch._thread is not None or len(calls) < missed:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not watch._watched
        assert calls == [False] * missed
        assert not watch.is_idle


def test_error_of_the_backend(pool_of: PoolOf) -> None:
    for timed_out, text in pool_of(2).run(_failed, "device/failed"):
        assert not timed_out
        assert "error" in text


def test_without_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(TokenferryError, match="NCCL"):
        nccl_rail(Topology(0, (0, 1)), "key", 1.0, torch.device("cuda", 0))


@pytest.mark.parametrize("before", [None, "3"])
def test_environment_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch, before: str | None) -> None:
    names = [
        "TORCH_NCCL_ASYNC_ERROR_HANDLING",
        "TORCH_NCCL_DUMP_ON_TIMEOUT",
        "TORCH_FR_DUMP_ON_TIMEOUT",
        "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC",
        "TORCH_FR_WAIT_TIMEOUT_DUMP_MILSEC",
    ]
    for name in names:
        monkeypatch.delenv(name, raising=False)
        if before is not None:
            monkeypatch.setenv(name, before)
    import os

    with _errors_left_to_us():
        assert [os.environ[name] for name in names] == ["0"] * 5
    assert [os.environ.get(name) for name in names] == [before] * 5


class Later(Passed):
    """A marker that the stream passes after so many looks."""

    looks = 400

    def query(self) -> bool:
        self.looks -= 1
        return self.looks < 0


def _slept(rank: int, num_ranks: int, key: str) -> tuple[list[float], int, float]:
    """How long a host sleeps between its looks, how often it asks the backend meanwhile, and seconds in all."""
    rail, _ = rail_of(rank, num_ranks, key, True, timeout=30.0)
    rail._marker = Later
    other, asked, sleeps, sleep = 1 - rank, [0], [], time.sleep

    def is_completed(self: AllOf) -> bool:
        asked[0] += 1
        return False

    def sleeping(seconds: float) -> None:
        sleeps.append(seconds)
        sleep(seconds)

    transfer = rail.post({other: [torch.zeros(4)]}, {other: [torch.zeros(4)]})
    started = time.monotonic()
    with mock.patch.object(AllOf, "is_completed", is_completed), mock.patch.object(time, "sleep", sleeping):
        transfer.finish()
    seconds = time.monotonic() - started
    rail.close()
    return sleeps, asked[0], seconds


def test_host_leaves_the_cores_to_the_backend(pool_of: PoolOf) -> None:
    for sleeps, asked, seconds in pool_of(2).run(_slept, "device/slept"):
        assert len(sleeps) == 400
        assert sleeps == sorted(sleeps)
        assert 20e-6 <= sleeps[0] < sleeps[-1] == 200e-6
        assert 1 <= asked <= 1 + seconds / 0.01


class Telling(GroupTransport):
    """A transport that knows deadlines of its own: it tells of nodes that it has waited for in vain."""

    name = "played"

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group, device)
        self.missed: list[int] = []
        self.ended: list[str] = []
        self.kept: list[bool] = []

    def missing(self) -> list[int]:
        return self.missed

    def end(self, is_idle: bool) -> None:
        self.kept.append(self in _KEPT)
        self.ended.append("idle" if is_idle else "under way")

    def leave(self) -> None:
        self.kept.append(self in _KEPT)
        self.ended.append("left")


def _told(rank: int, num_ranks: int, key: str) -> None:
    """What a transport tells is the rail's failure: at the next call, behind a wait of the host, at the deadline."""
    others = [node for node in range(num_ranks) if node != rank]

    def posted(rail: DeviceRail) -> Any:
        return rail.post({o: [torch.zeros(4)] for o in others}, {o: [torch.zeros(4)] for o in others})

    for how in ("next", "finish", "deadline", "close", "graph"):
        rail, _ = rail_of(rank, num_ranks, f"{key}/{how}", True, 0.3, Telling)
        rail._words._notices = None  # what the others say is not asked
        transport: Any = rail.transport()
        if how == "deadline":
            rail._marker = Never
        with mock.patch.object(device_rail, "_is_capturing", return_value=how == "graph"):
            transfer = posted(rail)
        transfer.wait(others[0])
        if how in ("close", "graph"):
            transfer.settle() if how == "close" else None
            rail.close()
            rail.close()
            assert transport.ended == ["idle" if how == "close" else "left"]
            assert transport.kept == [how == "graph"]
            continue
        transport.missed = [others[-1]]
        if how == "deadline":
            transfer.settle()
            deadline = time.monotonic() + 10
            while not transport.ended:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        with pytest.raises(RailError) as caught:
            transfer.finish() if how == "finish" else posted(rail)
        assert list(caught.value.nodes) == [others[-1]]
        assert caught.value.timed_out
        assert transport.ended == ["under way"]
        assert transport.kept == [True]
        rail.close()
        assert transport.ended == ["under way"]
    _KEPT.clear()


def test_what_a_transport_tells(pool_of: PoolOf) -> None:
    pool_of(3).run(_told, "device/told")


def test_a_watch_stays_for_the_next_exchange() -> None:
    started: list[int] = []
    watch = Watch(10.0, lambda *_: None, lambda: contextlib.nullcontext(started.append(1)), list)
    for _ in range(5):
        watch.add(Watched(Passed(), [1], [], time.monotonic()))
        time.sleep(0.05)
    assert len(started) == 1
    watch.clear()
    deadline = time.monotonic() + 0.5
    while watch._thread is not None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
