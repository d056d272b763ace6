"""A GPU that is played: the host code of a CUDA rank runs as it is, and what it asks the driver for is counted.

The tensors lie in host memory. Streams, events, launches and the calls of the driver are stand-ins for what torch,
Triton and CUDA do in C; the Python wrappers around these are the real ones of the installed torch and Triton. All
kernels are done at once and write nothing, unless somebody says what they do.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed._symmetric_memory as symmetric_memory
from torch.distributed import HashStore

from tokenferry import Buffer, runtime_cuda
from tokenferry.config import ALIGNMENT
from tokenferry.construction import Wishes
from tokenferry.dataplane.cuda import expert_major_programs, low_latency_programs, programs
from tokenferry.dataplane.cuda.launch import Kernel
from tokenferry.memory import symm
from tokenferry.memory.direct import Regions
from tokenferry.memory.driver import Allocation, Driver
from tokenferry.streams import CommStream
from tokenferry.topology import Topology

CPU = torch.device("cpu")
CUDA = 1
"""What torch says is the type of the device of a stream."""


class Gpu:
    """What is played, and the counts of it.

    Attributes:
        counts: how often the host asked for what, by name.
        log: the same in order, with what was asked: only while it is a list.
        done: what kernels of a name do, if anything: called when one is launched.
    """

    def __init__(self) -> None:
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.log: list[tuple[object, ...]] | None = None
        self.done: dict[str, Callable[[], None]] = {}
        self.device = 0
        self.current = (0, 0, CUDA)
        self.capturing = False
        self.num_streams = 0

    def note(self, name: str, *what: object) -> None:
        self.counts[name] += 1
        if self.log is not None:
            self.log.append((name, *what))

    def launch(self, kernel: str, *arguments: object) -> None:
        self.counts["launch"] += 1
        if self.log is not None:
            self.log.append(("launch", kernel, *arguments))
        if kernel in self.done:
            self.done[kernel]()

    # What torch._C has in a build for CUDA.

    def get_device(self) -> int:
        return self.device

    def set_device(self, index: int) -> None:
        self.note("set device", index)
        self.device = index

    def exchange_device(self, index: int) -> int:
        before, self.device = self.device, index if index >= 0 else self.device
        return before

    def get_stream(self, index: int) -> tuple[int, int, int]:
        return self.current

    def get_raw_stream(self, index: int) -> int:
        return raw(self.current[0])

    def set_stream(self, *, stream_id: int, device_index: int, device_type: int) -> None:
        self.note("set stream", stream_id)
        self.current = (stream_id, device_index, device_type)

    def is_capturing(self) -> bool:
        self.counts["look at the capture"] += 1
        return self.capturing


def raw(stream_id: int) -> int:
    """The address of a stream; 0 is the default stream."""
    return stream_id << 8


def _streams(gpu: Gpu) -> ModuleType:
    """torch's module of streams and events, over bases that are played."""

    class StreamBase:
        __slots__ = ("cuda_stream", "device_index", "device_type", "priority", "stream_id")

        def __new__(
            cls, priority: int = 0, stream_id: int = -1, device_index: int = 0, device_type: int = CUDA
        ) -> StreamBase:
            self = object.__new__(cls)
            if stream_id < 0:
                gpu.num_streams += 1
                stream_id = gpu.num_streams
            self.stream_id, self.device_index, self.device_type = stream_id, device_index, device_type
            self.priority, self.cuda_stream = priority, raw(stream_id)
            return self

        @property
        def device(self) -> torch.device:
            return torch.device("cuda", self.device_index)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, StreamBase) and self.stream_id == other.stream_id

        __hash__ = None  # type: ignore[assignment]

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            gpu.note("synchronize stream")

    class EventBase:
        __slots__ = ("number", "point")

        def __new__(cls, **_: bool) -> EventBase:
            self = object.__new__(cls)
            gpu.counts["make event"] += 1
            self.number = self.point = -1
            return self

        def record(self, stream: StreamBase) -> None:
            gpu.note("record event", stream.stream_id, id(self))

        def wait(self, stream: StreamBase) -> None:
            gpu.note("wait for event", stream.stream_id, id(self))

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            gpu.note("synchronize event")

    known = torch._C._CudaStreamBase, torch._C._CudaEventBase
    torch._C._CudaStreamBase, torch._C._CudaEventBase = StreamBase, EventBase  # type: ignore[misc, assignment]
    try:
        found = importlib.util.find_spec("torch.cuda.streams")
        assert found is not None
        assert found.origin is not None
        spec = importlib.util.spec_from_file_location("played_cuda_streams", found.origin)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        torch._C._CudaStreamBase, torch._C._CudaEventBase = known  # type: ignore[misc]
    return module


class PlayedDriver(Driver):
    """The driver of one process: the code around its calls is the real one, they themselves answer at once.

    Args:
        gpu: counts them.
        allocations: (first byte, bytes) of each piece of memory that is an allocation of its own.
    """

    def __init__(self, gpu: Gpu, allocations: Sequence[tuple[int, int]]) -> None:
        self._gpu = gpu
        self._allocations = allocations
        self._identity = ctypes.c_uint64(1)
        self._identity_out = ctypes.pointer(self._identity)
        self._next = 1 << 44
        # A call of C that returns 0, like a driver that answers.
        answers = ctypes.CDLL("libm.so.6").fegetround

        def pointer_attribute(*arguments: Any) -> int:
            gpu.note("identity", arguments[2])
            return int(answers())

        self._pointer_attribute = cast(Any, pointer_attribute)

    def locate(self, address: int) -> Allocation | None:
        for base, size in self._allocations:
            if base <= address < base + size:
                return Allocation(base, size, 1)
        return None

    def export(self, base: int) -> bytes | None:
        return base.to_bytes(8, "little") * 8

    def open_peer(self, handle: bytes) -> int:
        self._next += 1 << 32
        return self._next

    def close_peer(self, address: int) -> None:
        pass

    def capture(self, stream: int) -> int | None:
        return 1 if self._gpu.capturing else None

    def copy_aside(self, to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, source, nbytes)

    def end_aside(self) -> None:
        pass

    @contextmanager
    def relaxed_capture(self) -> Iterator[None]:
        yield


def _launcher(gpu: Gpu, name: str) -> Any:
    """Triton's own launcher around a launch that is played."""
    from triton.backends.nvidia.driver import CudaLauncher

    class Launcher(CudaLauncher):
        """Whatever it looks at besides, such as sizes of scratch memory, is nothing."""

        def __init__(self) -> None:
            self.launch = lambda *arguments: gpu.launch(name, *arguments)

        def __getattr__(self, name: str) -> int:
            if name.startswith("__"):
                raise AttributeError(name)
            setattr(self, name, 0)  # an attribute like the others from now on, as those of the real one
            return 0

    return Launcher()


@contextmanager
def played(allocations: Sequence[torch.Tensor] = ()) -> Iterator[Gpu]:
    """Play a GPU in this process.

    Args:
        allocations: pieces of memory that peers can open.
    """
    gpu = Gpu()
    zeros = torch.zeros
    compiled: Any = (
        programs._layout, programs._notify, programs._dispatch, programs._combine, programs._clear,
        low_latency_programs.dispatch, low_latency_programs.combine,
        expert_major_programs._pack, expert_major_programs._sources,
        expert_major_programs._pad, expert_major_programs._sum_copies,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        c_calls = {
            "_cuda_getDevice": gpu.get_device,
            "_cuda_setDevice": gpu.set_device,
            "_cuda_exchangeDevice": gpu.exchange_device,
            "_cuda_maybeExchangeDevice": gpu.exchange_device,
            "_cuda_getCurrentStream": gpu.get_stream,
            "_cuda_getCurrentRawStream": gpu.get_raw_stream,
            "_cuda_setStream": gpu.set_stream,
            "_cuda_isCurrentStreamCapturing": gpu.is_capturing,
            "_cuda_synchronize": lambda: None,
        }
        for name, call in c_calls.items():
            patch.setattr(torch._C, name, call, raising=False)
        patch.setattr(torch.cuda.graphs, "_cuda_isCurrentStreamCapturing", gpu.is_capturing)
        for name in ("_exchange_device", "_maybe_exchange_device"):
            patch.setattr(torch.cuda, name, gpu.exchange_device)
        patch.setattr(torch.cuda, "_initialized", True)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.backends.cuda, "is_built", lambda: True)
        streams = _streams(gpu)
        patch.setattr(torch.cuda, "Stream", streams.Stream)
        patch.setattr(torch.cuda, "Event", streams.Event)
        properties = SimpleNamespace(multi_processor_count=132, uuid="played")
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.Tensor, "record_stream", lambda tensor, s: gpu.note("record stream", s.stream_id))
        patch.setattr(torch, "zeros", lambda *size, pin_memory=False, **options: zeros(*size, **options))
        patch.setattr(Kernel, "compile", lambda kernel, warps, number, **_: _compiled(gpu, kernel))
        for cached in compiled:
            cached.cache_clear()
        pieces = [(piece.data_ptr(), piece.nbytes) for piece in allocations]
        patch.setattr(runtime_cuda, "Driver", lambda: PlayedDriver(gpu, pieces))
        patch.setattr(runtime_cuda, "CommStream", lambda _, **options: CommStream(torch.device("cuda", 0), **options))
        patch.setattr(torch.cuda, "synchronize", lambda device=None: None)
        patch.setattr(symmetric_memory, "empty", _symmetric)
        patch.setattr(symm, "map_peers", _map_peers)
        yield gpu
        for cached in compiled:
            cached.cache_clear()


def _compiled(gpu: Gpu, kernel: Kernel) -> Any:
    name = kernel._kernel.__name__
    return SimpleNamespace(run=_launcher(gpu, name), function=0, packed_metadata=(4, 1, 0))


def _symmetric(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    memory = torch.empty(size + ALIGNMENT, dtype=dtype, device=device)
    return memory[-memory.data_ptr() % ALIGNMENT :][:size]


def _map_peers(memory: torch.Tensor, rank: int, num_ranks: int, store: object, name: str) -> Any:
    return SimpleNamespace(buffer_ptrs=[memory.data_ptr() + (peer << 42) for peer in range(num_ranks)])


def runtime_of(
    gpu: Gpu, topology: Topology, gpus: Sequence[object], options: dict[str, Any]
) -> tuple[runtime_cuda.CudaRuntime, list[Regions]]:
    """As :func:`runtime_of_rank_0`; not destroyed at the end."""
    each = len(topology.local_ranks)
    runtime = runtime_cuda.CudaRuntime(
        topology, store=HashStore(), device=CPU, may_mask=False, make_rail=None, exact_combine=False, **options
    )
    peers = [Regions(rank, each, PlayedDriver(gpu, ())) for rank in range(1, each)]
    name, size, heap, _ = json.loads(runtime.get_local_ipc_handle())
    handles = [(name, size), *(peer.handle for peer in peers)]
    everyone = zip([handles[index] for _, index in topology.places], gpus, strict=True)
    runtime.sync([json.dumps([*handle, heap, str(of)]).encode() for handle, of in everyone])
    for peer in peers:
        peer.attach(handles)
    runtime.hide()
    for peer in peers:
        peer.unlink()
    return runtime, peers


@contextmanager
def runtime_of_rank_0(
    gpu: Gpu, topology: Topology, gpus: Sequence[object], options: dict[str, Any]
) -> Iterator[tuple[runtime_cuda.CudaRuntime, list[Regions]]]:
    """The runtime of rank 0 of a node, and what its peers follow its memory by.

    Every rank is on the GPU of ``gpus``. Ranks of other nodes have no memory of their own.
    """
    runtime, peers = runtime_of(gpu, topology, gpus, options)
    try:
        yield runtime, peers
    finally:
        runtime.device = runtime.comm.device
        runtime.destroy()
        for peer in peers:
            peer.close()


@contextmanager
def buffer_of_rank_0(gpu: Gpu, num_ranks: int, push_bytes: int) -> Iterator[Buffer]:
    """A Buffer as rank 0 of a node of ranks has it; the others only follow what memory it exposes."""
    options: dict[str, Any] = {"stage_limit": 1 << 20, "push_bytes": push_bytes, "heap_bytes": 0, "timeout": 100.0}
    topology = Topology(0, (0,) * num_ranks)
    with runtime_of_rank_0(gpu, topology, range(num_ranks), options) as (runtime, peers):
        buffer = object.__new__(Buffer)
        buffer.runtime, buffer.rank, buffer.group_size = runtime, 0, num_ranks
        buffer.low_latency_mode, buffer.enable_shrink = True, False
        buffer._proves_low_latency = False
        buffer._wishes = Wishes(CPU, False, may_mask=False, exact_combine=False, **options)
        buffer.follow = lambda: [(peer.poll(), peer.acknowledge()) for peer in peers]  # type: ignore[attr-defined]
        try:
            yield buffer
        finally:
            runtime.device = runtime.comm.device
            buffer.destroy()
