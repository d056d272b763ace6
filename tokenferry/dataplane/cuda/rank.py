"""What all operations of one CUDA rank need: its memory and that of its peers, tables on the device, the queue."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

import torch

from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.follow import Follower
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.dataplane.cuda.status import Status
from tokenferry.dataplane.cuda.waits import DeviceWaits
from tokenferry.dataplane.tensors import allocator_of
from tokenferry.errors import ArgumentError
from tokenferry.kept import Kept
from tokenferry.memory.direct import Regions, Seen
from tokenferry.memory.symm import SymmetricHeap

_NANOSECONDS = 1_000_000_000
_PLACE_SHIFT = int(words.PLACE_SHIFT.value)


class Queue(Protocol):
    """Where the work goes: a stream."""

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream."""

    @property
    def handle(self) -> int:
        """Its address for the driver."""

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever calls an operation, or follows what peers expose."""

    def start(self) -> None:
        """Make it wait for what the operation depends on; called before the first launch of every operation."""

    def keep(self, tensor: torch.Tensor) -> None:
        """Hold memory that its work reads until the current stream waits for that work."""


class CudaRank:
    """The host of one CUDA rank, without operations.

    Args:
        heap: attached.
        regions: attached, and with the heap as region 0.
        queue: of all launches.
        timeout: seconds that a kernel waits for a peer.
        most_programs: programs of a kernel that surely run at a time.
        names: what messages call each rank; by default its number in the heap.

    Attributes:
        waits: what the kernels have waited.
        empty_strided: see :meth:`tokenferry.dataplane.DataPlane.empty_strided`; while the device is the current one.
    """

    def __init__(
        self,
        heap: SymmetricHeap,
        regions: Regions,
        queue: Queue,
        timeout: float,
        most_programs: int,
        names: Sequence[int] | None = None,
    ) -> None:
        self.heap = heap
        self.rank = heap.rank
        self.num_ranks = heap.num_ranks
        self.status = Status(heap.rank, heap.num_ranks, timeout, names)
        self._regions = regions
        self._queue = queue
        self._most_programs = most_programs
        self._timeout = min(int(timeout * _NANOSECONDS), 1 << 60)
        device = heap.device
        self._device = device
        self.empty_strided = allocator_of(device)
        with torch.inference_mode(False):
            self._state = torch.zeros(words.STATE_WORDS, dtype=torch.int64, device=device)
            most_counts = self.num_ranks * (1 + words.MAX_LOCAL_EXPERTS)
            self._sums = torch.zeros(most_counts, dtype=torch.int32, device=device)
            self._heap_table = torch.tensor(heap.addresses, dtype=torch.int64, device=device)
        self._follower = Follower(regions, queue, device)
        self.waits = DeviceWaits(self._state, self.rank, self.num_ranks)
        torch.cuda.synchronize(device)
        self._context = tuple(
            tensor.data_ptr()
            for tensor in (
                self._heap_table,
                self._state,
                self._follower.ready,
                self._follower.region_table,
                self.status.words,
            )
        )
        capability = torch.cuda.get_device_capability(device)
        self._target = programs.Target(self.num_ranks, capability >= (9, 0), device.index, capability >= (8, 9))
        self._known_places: Kept[tuple[Sequence[int], Seen]] = Kept()
        """Of tensors by their addresses and bytes, for as long as the allocations that they lie in are there."""
        self._half = heap.stage_bytes // 2 // 128 * 128
        self._stage = heap.stage, self._half

    def check(self) -> None:
        """Raise what was reported since the last check."""
        try:
            self.status.check()
        except ArgumentError:
            self.forgive()
            raise

    def postpone_input_errors(self, postponed: bool) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.postpone_input_errors`."""
        self.status.postpones_input = postponed

    def bad_input(self) -> torch.Tensor | None:
        """See :meth:`tokenferry.dataplane.DataPlane.bad_input`."""
        first = words.BAD_INPUT.value
        return self._state[first : first + 1]

    def forgive(self) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.forgive`."""
        with torch.cuda.stream(self._queue.stream):
            self._state[words.BAD_INPUT.value].zero_()

    def _places(self, *columns: torch.Tensor | None) -> Sequence[int]:
        """Where peers find the tensors of an operation, each in one word; 0 where there is nothing to find."""
        spans = tuple([() if tensor is None else (tensor.data_ptr(), tensor.nbytes) for tensor in columns])
        known = self._known_places.get(spans)
        if known is not None and self._regions.are_there(known[1]):
            return known[0]
        places, goes_on = [0] * len(columns), False
        for index, span in enumerate(spans):
            if span and span[1]:
                places[index] = -1
                if self.num_ranks > 1:
                    region, offset = self._regions.expose(*span, goes_on)
                    goes_on = True
                    if region >= 0:
                        places[index] = region << _PLACE_SHIFT | offset
        if -1 not in places and goes_on:
            self._known_places.keep(spans, (places, self._regions.seen()))
        return places

    def _aligned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, copied if it does not begin on 16 bytes or is not packed."""
        if tensor.data_ptr() % 16 == 0 and tensor.is_contiguous():
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        self._queue.keep(copy)
        return copy.copy_(tensor)

    def _check_stage(self, record_bytes: int) -> None:
        if record_bytes > self._half:
            given = f"a stage of {self.heap.stage_bytes} bytes"
            raise ArgumentError("num_nvl_bytes", given, f"at least {2 * record_bytes} bytes for rows of this size")

    def empty(self, count: int) -> torch.Tensor:
        """int32 [count], unset."""
        return self.empty_strided((count,), (1,), torch.int32)

    def empty_table(self, count: int) -> torch.Tensor:
        """As :meth:`empty`, for work on the queue alone: it may be freed as soon as that is launched."""
        with torch.cuda.stream(self._queue.stream):
            return self.empty(count)

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`tokenferry.dataplane.DataPlane.empty_rows`."""
        return self.empty_strided((num_rows, width), (width, 1), dtype)
