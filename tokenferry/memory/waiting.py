"""Waiting for shared memory to change, and knowing when to worry."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

_SPINS = 32
_FIRST_SLEEP = 20e-6
_LONGEST_SLEEP = 1e-3
_HEALTH_INTERVAL = 0.05


class Waiter:
    """Waits for shared memory to change: yields the core at first, then sleeps, longer each time.

    Attributes:
        idle_ns: time spent waiting before the last :meth:`restart`, in nanoseconds.
        waited_ns: for each rank, how much of that it was missing.
    """

    def __init__(self) -> None:
        self.idle_ns = 0
        self.waited_ns: dict[int, int] = {}
        self._missing: Sequence[int] = ()
        self._begin()

    def _begin(self) -> None:
        self._pauses = 0
        self._sleep = _FIRST_SLEEP
        self._started = self._woke = time.monotonic()
        self._next_look = self._started + _HEALTH_INTERVAL

    def restart(self) -> None:
        """Count the wait that has ended, if there was one, and begin another."""
        if self._pauses:
            nanoseconds = max(0, int((self._woke - self._started) * 1e9))
            self.idle_ns += nanoseconds
            for rank in self._missing:
                self.waited_ns[rank] = self.waited_ns.get(rank, 0) + nanoseconds
        self._begin()

    def pause(self, missing: Sequence[int] = ()) -> None:
        """Let others run, without the interpreter lock; ``missing`` are the ranks that are waited for."""
        self._missing = missing
        self._pauses += 1
        if self._pauses <= _SPINS:
            os.sched_yield()
        else:
            time.sleep(self._sleep)
            self._sleep = min(self._sleep * 1.5, _LONGEST_SLEEP)
        self._woke = time.monotonic()

    def seconds(self) -> float:
        """Spent waiting since the last progress."""
        return time.monotonic() - self._started

    def is_time_to_look(self) -> bool:
        """Whether the peers' health should be looked at now."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._started += now - self._next_look  # being late, this process was stopped, and its peers perhaps too
        self._next_look = now + _HEALTH_INTERVAL
        return True
