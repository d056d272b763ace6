"""The stream that operations run on, and what makes it wait for the caller's and the caller's for it.

Legend: ``cur``, the stream that is current when an operation is called; ``comm``, the stream of the operations.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

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
        takes_all: operations are put on ``comm`` as a whole (between nodes), not only what the data plane launches.
    """

    def __init__(self, device: torch.device, takes_all: bool = False) -> None:
        self.device = device
        self._takes_all = takes_all
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._handle = int(self._stream.cuda_stream)
        self.lock = threading.RLock()
        self._entry = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._exit = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._waiting_for: torch.cuda.Stream | None = None
        self._last: torch.cuda.Stream | None = None
        self._last_handle = -1

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream."""
        return self._stream

    @property
    def handle(self) -> int:
        """Its address for the driver."""
        return self._handle

    def synchronize(self) -> None:
        """Wait for all that is queued on the device."""
        torch.cuda.synchronize(self.device)

    def start(self) -> None:
        """Make ``comm`` wait for what is queued on ``cur``; called before every launch.

        Before every one, since memory that was allocated in between may have been used, or filled, on ``cur``.
        """
        if self._waiting_for is not None:
            self._entry.record(self._waiting_for)
            self._stream.wait_event(self._entry)

    def turn(self, event: EventHandle | None, async_finish: bool, allocate_on_comm_stream: bool) -> Turn:
        """One operation's turn on the stream, a context manager."""
        return Turn(self, event, async_finish, allocate_on_comm_stream)

    def in_order(self) -> InOrder:
        """Run an operation on the current stream itself, behind earlier ones of this kind on whatever stream."""
        return InOrder(self)


class InOrder:
    """See :meth:`CommStream.in_order`."""

    def __init__(self, comm: CommStream) -> None:
        self._comm = comm
        self._device = -1

    def __enter__(self) -> None:
        comm = self._comm
        comm.lock.acquire()
        index = comm.device.index
        self._device = torch._C._cuda_getDevice()
        try:
            if self._device != index:
                torch.cuda.set_device(index)
            handle = torch._C._cuda_getCurrentRawStream(index)
            if handle != comm._last_handle:
                self._follow(torch.cuda.current_stream(index), handle)
        except BaseException:
            self.__exit__()
            raise

    def _follow(self, current: torch.cuda.Stream, handle: int) -> None:
        comm = self._comm
        if comm._last is not None and _is_capturing(comm._last) == _is_capturing(current):
            current.wait_stream(comm._last)
        comm._last, comm._last_handle = current, handle

    def __exit__(self, *_: object) -> None:
        if self._device != self._comm.device.index:
            torch.cuda.set_device(self._device)
        self._comm.lock.release()


def _is_capturing(stream: torch.cuda.Stream) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()


class Turn:
    """See :meth:`CommStream.turn`."""

    def __init__(
        self, comm: CommStream, event: EventHandle | None, async_finish: bool, allocate_on_comm_stream: bool
    ) -> None:
        self._comm = comm
        self._event = event
        self._async = async_finish
        self._on_comm = allocate_on_comm_stream or event is not None or async_finish or comm._takes_all
        self._device = -1
        self._cur: torch.cuda.Stream | None = None

    def __enter__(self) -> Turn:
        self._comm.lock.acquire()
        self._device = torch.cuda.current_device()
        try:
            self._enter()
        except BaseException:
            self._leave()
            raise
        return self

    def _enter(self) -> None:
        comm = self._comm
        if self._device != comm.device.index:
            torch.cuda.set_device(comm.device)
        self._cur = torch.cuda.current_stream(comm.device)
        if comm._takes_all and torch.cuda.is_current_stream_capturing():
            raise TokenferryError("between nodes the host takes part in every operation: no CUDA graph can hold one")
        if self._event is not None:
            self._event.stream_wait(comm.stream)
        elif self._cur != comm.stream:
            comm._waiting_for = self._cur
        if self._on_comm:
            comm.start()
            torch.cuda.set_stream(comm.stream)

    def wait(self, event: EventHandle | None) -> None:
        """Let the operation begin after one more event."""
        if event is not None:
            event.stream_wait(self._comm.stream)

    def _leave(self) -> None:
        comm = self._comm
        comm._waiting_for = None
        if self._on_comm and self._cur is not None:
            torch.cuda.set_stream(self._cur)
        if self._device != comm.device.index:
            torch.cuda.set_device(self._device)
        comm.lock.release()

    def finish(self, tensors: Iterable[torch.Tensor | None], outputs: Iterable[torch.Tensor | None]) -> EventOverlap:
        """End the operation: the event of it, or ``cur`` waits.

        Args:
            tensors: what the operation reads.
            outputs: what it returns.
        """
        comm, cur = self._comm, self._cur
        assert cur is not None
        if self._on_comm and cur != comm.stream:
            for output in outputs:
                if output is not None:
                    output.record_stream(cur)
        if self._async:
            for tensor in (*tensors, *(() if self._on_comm else outputs)):
                if tensor is not None:
                    tensor.record_stream(comm.stream)
            return EventOverlap(EventHandle(comm.stream))
        if cur != comm.stream:
            comm._exit.record(comm.stream)
            cur.wait_event(comm._exit)
        return EventOverlap()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        comm, cur = self._comm, self._cur
        try:
            if kind is not None and cur is not None and cur != comm.stream:
                comm._exit.record(comm.stream)  # what the operation has queued may still use memory that goes now
                cur.wait_event(comm._exit)
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

    def finish(self, tensors: Iterable[torch.Tensor | None], outputs: Iterable[torch.Tensor | None]) -> EventOverlap:
        """End the operation: an event that has passed, or none."""
        return EventOverlap(EventHandle() if self._async else None)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
