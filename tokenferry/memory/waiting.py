"""Waiting for shared memory to change, and knowing when to worry."""

from __future__ import annotations

import os
import time

_SPINS = 32
_FIRST_SLEEP = 20e-6
_LONGEST_SLEEP = 1e-3
_HEALTH_INTERVAL = 0.05


class Waiter:
    """Waits for shared memory to change: yields the core at first, then sleeps, longer each time."""

    def __init__(self) -> None:
        self._pauses = 0
        self._sleep = _FIRST_SLEEP
        self._started = time.monotonic()
        self._next_look = self._started + _HEALTH_INTERVAL

    def pause(self) -> None:
        """Let others run, without the interpreter lock."""
        self._pauses += 1
        if self._pauses <= _SPINS:
            os.sched_yield()
        else:
            time.sleep(self._sleep)
            self._sleep = min(self._sleep * 1.5, _LONGEST_SLEEP)

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
