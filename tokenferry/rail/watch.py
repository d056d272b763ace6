"""A deadline for exchanges that no host waits for: a thread looks after them, and ends their rail."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple, Protocol

import torch

logger = logging.getLogger("tokenferry")

_LOOK_EVERY = 0.02
"""Seconds."""
_STAY = 1.0
"""Seconds that the thread stays when there is nothing to look after: to start one costs a call a millisecond."""


class Marker(Protocol):
    """A place in a stream."""

    def record(self) -> None:
        """Take the place that the current stream has come to."""

    def query(self) -> bool:
        """Whether the stream has passed it."""


class Watched(NamedTuple):
    """An exchange that a stream waits for."""

    marker: Marker
    """Behind it."""
    nodes: Sequence[int]
    """That it is with."""
    parts: Sequence[torch.Tensor]
    """Its memory, which must live as long."""
    since: float
    """When the wait for it began, by the monotonic clock."""


class Watch:
    """The exchanges of one rail.

    Args:
        seconds: that an exchange may take.
        give_up: called with the nodes of one that takes longer, and what it was.
        in_thread: entered by the thread; it goes without if that fails.
        meanwhile: called now and then with the nodes of the exchange that is waited for.
    """

    def __init__(
        self,
        seconds: float,
        give_up: Callable[[Sequence[int], str], None],
        in_thread: Callable[[], AbstractContextManager[object]],
        meanwhile: Callable[[Sequence[int]], None],
    ) -> None:
        self._seconds = seconds
        self._give_up = give_up
        self._in_thread = in_thread
        self._meanwhile = meanwhile
        self._lock = threading.Lock()
        self._watched: deque[Watched] = deque()
        self._has_failed = False
        """Whether an exchange was late, or its marker could not be asked: it is not over, though it is forgotten."""
        self._thread: threading.Thread | None = None
        """The one that looks; None: it has ended, or sees next that there is nothing to do."""
        self._stays_until = 0.0
        """By the monotonic clock."""

    def add(self, exchange: Watched) -> None:
        """Look after an exchange; they end in the order in which they are added."""
        with self._lock:
            self._watched.append(exchange)
            self._stays_until = time.monotonic() + _STAY
            if self._thread is None:
                thread = self._thread = threading.Thread(target=self._run, name="tokenferry rail", daemon=True)
                try:
                    thread.start()
                except BaseException:  # no more threads, or a Ctrl-C: the next exchange must find one
                    self._thread = thread if thread.is_alive() else None
                    raise

    @property
    def is_idle(self) -> bool:
        """Whether all exchanges are over, those that were forgotten too."""
        with self._lock:
            return all(self._is_done_with(exchange) for exchange in self._watched) and not self._has_failed

    def clear(self) -> None:
        """Look after none any more."""
        with self._lock:
            self._watched.clear()
            self._stays_until = 0.0

    def _run(self) -> None:
        with ExitStack() as stack:
            try:
                stack.enter_context(self._in_thread())
            except Exception as error:  # a deadline matters more
                logger.warning("rail: the thread that looks at deadlines goes without its setting: %s", error)
            while self._look():
                time.sleep(_LOOK_EVERY)

    def _look(self) -> bool:
        """Forget what is over; returns whether there may be more to come."""
        with self._lock:
            while self._watched and self._is_done_with(self._watched[0]):
                self._watched.popleft()
            late, now = None, time.monotonic()
            if self._watched and now - self._watched[0].since > self._seconds:
                late = self._watched.popleft()
                self._watched.clear()
                self._has_failed = True
            nodes = self._watched[0].nodes if self._watched else ()
            goes_on = bool(self._watched) or now < self._stays_until
            if not goes_on:
                self._thread = None
        if late is not None:
            self._give_up(late.nodes, f"no sign of life for {self._seconds:.1f} s")
        elif nodes:
            self._meanwhile(nodes)
        return goes_on

    def _is_done_with(self, exchange: Watched) -> bool:
        """Whether to look after an exchange no more. Under the lock."""
        try:
            return exchange.marker.query()
        except RuntimeError:  # the device has failed, which operations find out by themselves
            self._has_failed = True
            return True
