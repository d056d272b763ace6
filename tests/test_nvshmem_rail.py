"""What the host does for exchanges through NVSHMEM, on a GPU that is played."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tokenferry import TokenferryError
from tokenferry.dataplane.cuda import rail_programs
from tokenferry.errors import HeapError
from tokenferry.rail import device_rail
from tokenferry.rail import nvshmem as rail
from tokenferry.rail.nvshmem_world import Ranks, World
from tokenferry.topology import Topology

CPU = torch.device("cpu")
SHAPE = rail_programs.Shape(num_peers=2, lanes=1, slots=2, slot_bytes=64)
PEERS = [rail_programs.Peer(0, 4, 1000), rail_programs.Peer(2, 5, 2000)]


class Event:
    def __init__(self) -> None:
        self.is_over = self.was_synchronized = False

    def query(self) -> bool:
        return self.is_over

    def synchronize(self) -> None:
        self.was_synchronized = True


class Stream:
    def __init__(self, cuda_stream: int = 7, device: Any = None) -> None:
        self.cuda_stream = cuda_stream
        self.events: list[Event] = []
        self.waited: list[Any] = []

    def record_event(self) -> Event:
        self.events.append(Event())
        return self.events[-1]

    def wait_stream(self, other: Stream) -> None:
        self.waited.append(other)

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)

    def query(self) -> bool:
        return True


class PlayedDriver:
    """The driver."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def make_stream(self, priority: int) -> int:
        return 7

    @contextmanager
    def relaxed_capture(self) -> Iterator[None]:
        yield

    def copy_aside(self, to: int, source: int, nbytes: int) -> None:
        if self._gpu.has_failed:
            raise HeapError("cuMemcpyHtoDAsync: CUDA_ERROR_ILLEGAL_ADDRESS (700)")
        ctypes.memmove(to, source, nbytes)

    def end_aside(self) -> None:
        pass


class Gpu:
    def __init__(self) -> None:
        self.has_failed = self.is_capturing = False
        self.current = Stream(1)
        self.launched: list[tuple[int, int, list[list[int]], int]] = []
        """Programs, stream, messages, how many of them are sent."""

    def launch(self, grid: int, stream: int, arguments: Any) -> None:
        table, num_sends, num_messages = arguments[0], arguments[8], arguments[9]
        words = (ctypes.c_int64 * (5 * num_messages)).from_address(table)
        rows = [list(words[5 * row : 5 * row + 5]) for row in range(num_messages)]
        self.launched.append((grid, stream, rows, num_sends))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    played = Gpu()
    for module in (rail, device_rail):
        monkeypatch.setattr(module, "Driver", lambda: PlayedDriver(played))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(rail, "_free_streams", {CPU: [Stream() for _ in range(9)]})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: played.current)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: played.is_capturing)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: PlayedDriver(played).relaxed_capture())
    for name in ("empty", "zeros", "ones"):
        monkeypatch.setattr(torch, name, functools.partial(_unpinned, getattr(torch, name)))
    return played


class _Properties:
    multi_processor_count = 132


def _unpinned(make: Any, *args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
    made: torch.Tensor = make(*args, **kwargs)
    assert not pin_memory or made.device == CPU
    return made


def transport_of(gpu: Gpu) -> tuple[rail.NvshmemTransport, list[str]]:
    gone: list[str] = []
    made = rail.NvshmemTransport(500, SHAPE, PEERS, 9, 1, CPU, 3.0, gpu, lambda: gone.append("over"))  # type: ignore[arg-type]
    return made, gone


def part(nbytes: int) -> torch.Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device="cpu")


def test_messages_and_tables(gpu: Gpu) -> None:
    transport, _ = transport_of(gpu)
    parts = [part(100), part(64), part(10)]
    (work,) = transport.begin([(0, parts[2])], [(2, parts[0]), (2, parts[1])])
    stream = transport._stream
    assert stream.waited == [gpu.current]
    first, second, third = (p.data_ptr() for p in parts)
    assert gpu.launched == [(4, 7, [[first, 100, 1, 0, 64], [second, 64, 1, 2, 64], [third, 10, 0, 0, 64]], 2)]
    assert not work.is_completed()
    work.wait()
    assert gpu.current.waited == [stream.events[0]]
    tables = {id(transport._under_way[0][0])}
    transport.begin([], [(0, parts[0])])
    tables.add(id(transport._under_way[1][0]))
    assert len(tables) == 2  # the first is still being read
    stream.events[0].is_over = True
    transport.begin([(0, parts[0])] * 3, [(0, parts[0])] * 17)  # more than it has room for
    assert len(gpu.launched[-1][2]) == 20
    stream.events[1].is_over = True
    transport.begin([], [(0, parts[0])])
    assert {id(table) for table, _ in transport._under_way} & tables
    # What a peer keeps for this rank, its second node: of node 0 the first of two homes, of node 2 the second.
    homes = [[4, 1000 + 0 * SHAPE.home_bytes], [5, 2000 + 1 * SHAPE.home_bytes]]
    assert transport._peers.tolist() == homes


def test_defaults_of_torch_do_not_matter(gpu: Gpu) -> None:
    """A table that inference has made serves others; another default device is not where it lies."""
    with torch.inference_mode(), torch.device("meta"):
        transport, _ = transport_of(gpu)
        transport.begin([], [(0, part(5))])
    transport._stream.events[0].is_over = True
    transport.begin([], [(0, part(6))])
    assert gpu.launched[-1][2][0][1] == 6
    transport._told[0] = 0
    transport._state[0] = 0


def test_replays_run_beside_nothing(gpu: Gpu) -> None:
    transport, _ = transport_of(gpu)
    transport.begin([], [(0, part(5))])
    assert gpu.current.waited == []
    gpu.is_capturing = True
    transport.begin([], [(0, part(5))])
    assert transport._stream.events[0].was_synchronized
    assert not transport._under_way
    gpu.is_capturing = False
    transport.begin([], [(0, part(5))])
    assert gpu.current.waited == [transport._stream.events[2]]
    assert len(transport._captured) == 1


def test_missing_nodes(gpu: Gpu) -> None:
    transport, gone = transport_of(gpu)
    assert not transport.missing()
    transport._told[2] = 1
    assert not transport.missing()  # not told to the end
    transport._told[0] = 1
    assert list(transport.missing()) == [2]
    transport.end(is_idle=True)
    assert transport._state.tolist() == [1, 0]
    assert not gone


@pytest.mark.parametrize(
    ("is_idle", "captured", "fails", "given_up", "is_over"),
    [
        (True, False, False, 0, True),
        (True, False, True, 0, True),
        (False, False, False, 1, False),
        (False, False, True, 0, False),
        (True, True, False, 1, True),
        (True, True, True, 0, False),
        (False, True, False, 1, False),
    ],
)
def test_end(gpu: Gpu, is_idle: bool, captured: bool, fails: bool, given_up: int, is_over: bool) -> None:
    transport, gone = transport_of(gpu)
    stream = transport._stream
    gpu.is_capturing = captured
    transport.begin([], [(0, part(5))])
    gpu.is_capturing, gpu.has_failed = False, fails
    transport.leave() if captured and is_idle else transport.end(is_idle)
    assert transport._state.tolist() == [given_up, 0]
    assert gone == ["over"] * is_over
    assert (stream in rail._free_streams[CPU]) == is_over


def _made(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, store: Any, key: str, world: World, memory: torch.Tensor) -> Any:
    def see(address: int, nbytes: int) -> torch.Tensor:
        return memory[address - world.pool : address - world.pool + nbytes]

    monkeypatch.setattr(rail, "_Memory", see)
    topology = Topology(0, (0, 1))
    ranks = [Ranks(dist.PrefixStore(key, store), topology.rail, number, 0.3) for number in range(2)]
    ranks[1].say("region", ["", 64])
    kernel: Any = mock.Mock(load=lambda: gpu)
    return ranks[1], lambda: rail._transport(world, [6, 8], ranks[0], topology, CPU, 1.0, kernel)


def _is_free(world: World) -> bool:
    region = world._try_to_take()
    if region is None:
        return False
    world.give_back(region, lambda: True)
    return True


def _becomes_free(world: World) -> bool:
    """A thread says that this rank is over."""
    deadline = time.monotonic() + 5
    while not _is_free(world) and time.monotonic() < deadline:
        time.sleep(0.001)
    return _is_free(world)


def test_memory_is_given_back_when_all_are_over_and_all_has_arrived(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = torch.full((1 << 20,), 0xCD, dtype=torch.uint8)
    world = World("key", 6, 0, 1 << 40, 1 << 20)
    other, make = _made(gpu, monkeypatch, dist.HashStore(), "a", world, memory)
    transport = make()
    shape = transport._own.shape
    flags = memory[: shape.home_bytes][: shape.flags[1]].view(torch.int64)
    places = shape.lanes * shape.slots
    assert flags.tolist() == [0] * places + [1] * places
    assert bool((memory[shape.num_peers * shape.home_bytes :] == 0xCD).all())
    assert transport._peers.tolist() == [[8, world.pool + 64]]
    assert not _is_free(world)
    transport.end(is_idle=True)
    assert not _is_free(world)  # the other rank is not
    other.say("over", True)
    flags[places] = 0  # a put is under way
    while not other.have_said("over"):  # a thread says it
        time.sleep(0.001)
    assert not _is_free(world)
    flags[places] = 1
    assert _becomes_free(world)


@pytest.mark.parametrize("what", ["silent", "theirs", "flags", "transport"])
def test_constructions_that_fail_keep_no_memory(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    memory, store = torch.zeros(1 << 20, dtype=torch.uint8), dist.HashStore()
    world = World("key", 6, 0, 1 << 40, 1 << 20)
    for turn in range(3):
        other, make = _made(gpu, monkeypatch, store, f"{what}/{turn}", world, memory)
        with monkeypatch.context() as patch:
            if what == "silent":
                store.delete_key(f"{what}/{turn}/region/1")
            elif what == "theirs":
                other.say("region", ["no memory", 0])
            elif what == "flags":
                patch.setattr(rail, "_Memory", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
            else:
                patch.setattr(rail, "NvshmemTransport", lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
            named = {"silent": "rank 1 has not told", "theirs": "rank 1: no memory", "flags": "rank 0: out of memory"}
            with pytest.raises(RuntimeError, match=named.get(what, "no")):
                make()
        if what == "flags":
            assert other.gather("region", 0)[0][0] == "out of memory"
        assert not _is_free(world)  # the other may have heard of it
        other.say("over", True)
        assert _becomes_free(world)


def test_gpus_of_few_sms_are_refused(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Properties, "multi_processor_count", 15)
    world = World("key", 6, 0, 1 << 40, 1 << 20)
    _, make = _made(gpu, monkeypatch, dist.HashStore(), "a", world, part(1 << 20))
    with pytest.raises(TokenferryError, match="rank 0: 1 other nodes need 16 SMs, of which the GPU has 15"):
        make()
    assert _is_free(world)


def test_no_more_threads_at_the_end(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World("key", 6, 0, 1 << 40, 1 << 20)
    other, make = _made(gpu, monkeypatch, dist.HashStore(), "a", world, part(1 << 20))
    transport = make()
    other.say("over", True)
    with mock.patch("threading.Thread.start", side_effect=RuntimeError("can't start new thread")):
        transport.end(is_idle=True)
    assert _is_free(world)
