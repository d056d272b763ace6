"""EventHandle and EventOverlap: how an operation says when it is done."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType

import torch

from tokenferry.errors import ArgumentError


class EventHandle:
    """A point in the current stream, recorded at construction.

    Args:
        stream: another stream to record instead of the current one.

    Where CUDA is not in use by this process there are no streams: work is done when a call returns, and
    so the handle stands for a point that has already passed.
    """

    def __init__(self, stream: torch.cuda.Stream | None = None) -> None:
        self._event: torch.cuda.Event | None = None
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(stream if stream is not None else torch.cuda.current_stream())

    def current_stream_wait(self) -> None:
        """Make the current stream wait for the recorded point."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def stream_wait(self, stream: torch.cuda.Stream) -> None:
        """Make a stream wait for the recorded point."""
        if self._event is not None:
            stream.wait_event(self._event)


class EventOverlap:
    """What operations return as their event, and accept as ``previous_event``.

    Args:
        event: the event to wait for; ``None`` stands for "nothing to wait for".
        extra_tensors: tensors kept alive until this object goes.

    As a context manager it waits on leaving the block, so that the block overlaps with the operation.
    """

    def __init__(
        self, event: EventHandle | None = None, extra_tensors: tuple[torch.Tensor, ...] | None = None
    ) -> None:
        self.event = event
        self.extra_tensors = extra_tensors
        self.hook_after_wait: Callable[[], object] | None = None
        self._releases = False

    def register_hook_after_wait(self, hook: Callable[[], object]) -> None:
        """Call ``hook`` once, after the next wait."""
        self.hook_after_wait = hook

    def current_stream_wait(self, release_handle: bool = False) -> None:
        """Make the current stream wait for the event.

        Args:
            release_handle: drop the event and the extra tensors afterwards.

        Raises:
            ArgumentError: there is no event.
        """
        if self.event is None:
            raise ArgumentError("event", None, "an EventOverlap with an event (from async_finish=True)")
        self.event.current_stream_wait()
        if self.hook_after_wait is not None:
            hook, self.hook_after_wait = self.hook_after_wait, None
            hook()
        if release_handle:
            self.event = None
            self.extra_tensors = None

    def __call__(self, release_handle: bool = False) -> EventOverlap:
        """Return self, so that ``with event():`` works; see :meth:`current_stream_wait`."""
        self._releases = self._releases or release_handle
        return self

    def __enter__(self) -> EventOverlap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.event is not None:
            releases, self._releases = self._releases, False
            self.current_stream_wait(releases)
