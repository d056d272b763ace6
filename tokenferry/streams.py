"""The stream that operations run on, and what makes it wait for the caller's and the caller's for it.

Legend: ``cur``, the stream that is current when an operation is called; ``comm``, the stream of the operations.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch

from tokenferry.errors import ArgumentError, TokenferryError
from tokenferry.events import EventHandle, EventOverlap
from tokenferry.validation import require


def check_events(previous_event: object, async_finish: bool, allocate_on_comm_stream: bool) -> EventHandle | None:
    """Return the event to wait for, if there is one, of valid event arguments."""
    if previous_event is not None and not isinstance(previous_event, EventOverlap):
        raise ArgumentError("previous_event", type(previous_event).__name__, "an EventOverlap or None")
    event = None if previous_event is None else previous_event.event
    if allocate_on_comm_stream:
        name = "allocate_on_comm_stream"
        require(event is not None, name, "True without a previous_event", "one that has an event")
        require(async_finish, name, "True without async_finish", "async_finish=True with it")
    return event


class CommStream:
    """The communication stream of a Buffer on a GPU, and the turns that its operations take on it.

    Outputs and temporaries come from ``cur``'s memory where each of the two waits for all of the other, and from
    ``comm``'s own where ``comm`` waits for one event only, or ``cur`` does not wait: memory that work on ``cur``
    still uses is never handed out, and what is freed early is used again only behind the operation.

    Args:
        device: the GPU.
        takes_all: why operations are put on ``comm`` as a whole, if they are: not only what the data plane launches.

    Attributes:
        device: as given.
        index: of the GPU.
        stream: ``comm``.
        handle: its address for the driver.
        lock: held by whoever has a turn, or follows what peers expose.
    """

    def __init__(self, device: torch.device, takes_all: str = "") -> None:
        self.device = device
        self.index = device.index
        self.stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self.handle = int(self.stream.cuda_stream)
        self.lock = threading.RLock()
        self._takes_all = takes_all
        self._key = (self.stream.stream_id, self.stream.device_index, self.stream.device_type)
        self._record_entry, self._wait_for_entry = _new_event()
        self._record_exit, self._wait_for_exit = _new_event()
        self._waiting_for: torch.cuda.Stream | None = None
        self._has_started = False
        """Whether the turn has made ``comm`` wait for anything, before its first launch."""
        self._kept: list[torch.Tensor] = []
        self._current = self.stream
        self._current_key = self._key
        self._last: torch.cuda.Stream | None = None
        self._last_handle = -1
        self._devices: list[int] = []
        """The current devices before the operations that have begun in order. Under the lock."""

    def current(self) -> torch.cuda.Stream:
        """The current stream of the device, one object for as long as it stays the same. Under the lock."""
        key = torch._C._cuda_getCurrentStream(self.index)
        if key != self._current_key:
            self._current = torch.cuda.current_stream(self.index)
            self._current_key = key
        return self._current

    def synchronize(self) -> None:
        """Wait for all that is queued on the device."""
        torch.cuda.synchronize(self.device)

    def mark(self) -> Mark | None:
        """The point that all operations have come to; None while a CUDA graph is captured, there or on ``cur``."""
        last = self._last
        streams = [self.stream] if last is None else [self.stream, last]
        cur = torch.cuda.current_stream(self.index)
        return None if any(_is_capturing(stream) for stream in (cur, *streams)) else Mark(self.index, streams)

    def start(self) -> None:
        """Make ``comm`` wait for what is queued on ``cur``; called before every launch.

        Before every one, since memory that was allocated in between may have been used, or filled, on ``cur``.
        """
        self._has_started = True
        if self._waiting_for is not None:
            self._record_entry(self._waiting_for)
            self._wait_for_entry(self.stream)

    def keep(self, tensor: torch.Tensor) -> None:
        """Hold memory of ``cur`` that work on ``comm`` reads until the turn ends, when ``cur`` waits for that."""
        self._kept.append(tensor)

    def turn(self, event: EventHandle | None, async_finish: bool, allocate_on_comm_stream: bool) -> Turn:
        """One operation's turn on the stream, a context manager."""
        return Turn(self, event, async_finish, allocate_on_comm_stream)

    def in_order(self) -> CommStream:
        """Run an operation on the current stream itself, behind earlier ones of this kind on whatever stream.

        A context manager, the same for all operations: they take turns, and may be nested.
        """
        return self

    def __enter__(self) -> None:
        self.lock.acquire()
        index = self.index
        self._devices.append(torch._C._cuda_getDevice())
        try:
            if self._devices[-1] != index:
                torch.cuda.set_device(index)
            handle = torch._C._cuda_getCurrentRawStream(index)
            if handle != self._last_handle:
                self._follow(self.current(), handle)
        except BaseException:
            self.__exit__()
            raise

    def _follow(self, current: torch.cuda.Stream, handle: int) -> None:
        if self._last is not None and _is_capturing(self._last) == _is_capturing(current):
            current.wait_stream(self._last)
        self._last, self._last_handle = current, handle

    def __exit__(self, *_: object) -> None:
        before = self._devices.pop()
        self._kept.clear()  # work on the current stream itself
        if before != self.index:
            torch.cuda.set_device(before)
        self.lock.release()


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


class Mark:
    """What is queued on some streams of a device; see :meth:`CommStream.mark`."""

    def __init__(self, index: int, streams: Iterable[torch.cuda.Stream]) -> None:
        self._index = index
        self._events = [stream.record_event() for stream in streams]

    def has_passed(self) -> bool:
        """Whether all of it is done."""
        return all(event.query() for event in self._events)

    def wait(self) -> None:
        """Make the current stream of the device wait for it."""
        for event in self._events:
            torch.cuda.current_stream(self._index).wait_event(event)


_StreamCall = Callable[[torch.cuda.Stream], None]


def _new_event() -> tuple[_StreamCall, _StreamCall]:
    """What records a new event on a stream, and what makes a stream wait for it.

    These are the methods below torch's Python wrappers, which cost the host more than the calls themselves.
    """
    event: Any = super(torch.cuda.Event, torch.cuda.Event())  # type: ignore[no-untyped-call]
    return event.record, event.wait


class Turn:
    """See :meth:`CommStream.turn`.

    Attributes:
        is_plain: whether :meth:`finish` looks at no tensor: ``cur`` and ``comm`` wait for all of each other.
    """

    __slots__ = ("_async", "_comm", "_cur", "_device", "_event", "_is_own", "_on_comm", "is_plain")

    def __init__(
        self, comm: CommStream, event: EventHandle | None, async_finish: bool, allocate_on_comm_stream: bool
    ) -> None:
        self._comm = comm
        self._event = event
        self._async = async_finish
        self._on_comm = allocate_on_comm_stream or event is not None or async_finish or comm._takes_all != ""
        self.is_plain = not self._on_comm
        self._device = -1
        self._cur: torch.cuda.Stream | None = None
        self._is_own = False

    def __enter__(self) -> Turn:
        comm = self._comm
        comm.lock.acquire()
        self._device = torch._C._cuda_getDevice()
        try:
            if self._device != comm.index:
                torch.cuda.set_device(comm.index)
            key = torch._C._cuda_getCurrentStream(comm.index)
            self._cur = cur = comm._current if key == comm._current_key else comm.current()
            self._is_own = key == comm._key
            comm._has_started = False
            if comm._takes_all and torch.cuda.is_current_stream_capturing():
                raise TokenferryError(f"{comm._takes_all}: no CUDA graph can hold an operation")
            if self._event is not None:
                self._event.stream_wait(comm.stream)
                comm._has_started = True
            elif not self._is_own:
                comm._waiting_for = cur
            if self._on_comm:
                comm.start()
                torch.cuda.set_stream(comm.stream)
        except BaseException:
            self._leave()
            raise
        return self

    def wait(self, event: EventHandle | None) -> None:
        """Let the operation begin after one more event."""
        if event is not None:
            event.stream_wait(self._comm.stream)

    def _leave(self) -> None:
        comm = self._comm
        comm._waiting_for = None
        comm._kept.clear()
        if self._on_comm and self._cur is not None:
            torch.cuda.set_stream(self._cur)
        if self._device != comm.index:
            torch.cuda.set_device(self._device)
        comm.lock.release()

    def finish(
        self, tensors: Iterable[torch.Tensor | None] = (), outputs: Iterable[torch.Tensor | None] = ()
    ) -> EventOverlap:
        """End the operation: the event of it, or ``cur`` waits.

        Args:
            tensors: what the operation reads.
            outputs: what it returns.
        """
        comm, cur = self._comm, self._cur
        assert cur is not None
        if self._on_comm and not self._is_own:
            for output in outputs:
                if output is not None:
                    output.record_stream(cur)
        if self._async:
            for tensor in (*tensors, *(() if self._on_comm else outputs)):
                if tensor is not None:
                    tensor.record_stream(comm.stream)
            return EventOverlap(EventHandle(comm.stream))
        if not self._is_own:
            comm._record_exit(comm.stream)
            comm._wait_for_exit(cur)
        return EventOverlap()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        comm, cur = self._comm, self._cur
        try:
            if kind is not None and cur is not None and comm._has_started and not self._is_own:
                comm._record_exit(comm.stream)  # what the operation has queued may still use memory that goes now
                comm._wait_for_exit(cur)
        finally:
            self._leave()


class NoStream:
    """Stands for :class:`CommStream` on CPU ranks: work is done when a call returns."""

    def synchronize(self) -> None:
        """Nothing to wait for."""

    def in_order(self) -> AbstractContextManager[None]:
        """Nothing to wait for."""
        return nullcontext()

    def turn(self, event: EventHandle | None, async_finish: bool, allocate_on_comm_stream: bool) -> NoTurn:
        """One operation's turn, a context manager."""
        return NoTurn(event, async_finish)


class NoTurn:
    """See :meth:`NoStream.turn`."""

    is_plain = True

    def __init__(self, event: EventHandle | None, async_finish: bool) -> None:
        self._event = event
        self._async = async_finish

    def __enter__(self) -> NoTurn:
        if self._event is not None:
            self._event.current_stream_wait()
        return self

    def wait(self, event: EventHandle | None) -> None:
        """Let the operation begin after one more event."""
        if event is not None:
            event.current_stream_wait()

    def finish(
        self, tensors: Iterable[torch.Tensor | None] = (), outputs: Iterable[torch.Tensor | None] = ()
    ) -> EventOverlap:
        """End the operation: an event that has passed, or none."""
        return EventOverlap(EventHandle() if self._async else None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
