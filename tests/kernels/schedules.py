"""Orders of programs that bring faults to light sooner, and in fewer steps, than chance alone."""

from __future__ import annotations

import math
import random
import sys
from collections import Counter
from typing import Any

import numpy as np

from tests.kernels import interpreter
from tests.kernels.simulator import Deadlock, Simulator

IN_VAIN = 1e-6
"""Pace of a program whose poll would find nothing new."""

_patience = math.inf
"""Turns in a row, in which all programs wait and nothing is under way, after which they wait for ever."""

Sleeps = dict[int, tuple[int, int]]
"""Which programs sleep, those with negative numbers counted from the last: before which of their memory operations,
the first and the last that it can be. Those named first wake up first."""


def stop_at_deadlocks(monkeypatch: Any) -> None:
    """Let a run end as soon as all programs wait for ever, not after all its steps.

    Only for runs in which neither time nor a failure ends waits: for these the kernels look every 64 polls.
    """
    monkeypatch.setattr(sys.modules[__name__], "_patience", 40)


class Scheduler(random.Random):
    """Choices of a simulator, whose own weights do not count: programs that wait for what has not come are passed by
    while others get on, but no longer than until it comes.
    """

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._in_vain = 0

    def choices(self, programs: Any, weights: Any) -> Any:
        waiting = [waits(program) for program in programs]
        self._in_vain = self._in_vain + 1 if all(waiting) and is_quiet(programs[0].simulator) else 0
        if self._in_vain > _patience:
            raise Deadlock(f"these wait for ever: {', '.join(map(str, programs))}")
        paces = [self.pace_of(p) * (IN_VAIN if w else 1) for p, w in zip(programs, waiting, strict=True)]
        return super().choices(programs, paces)

    def pace_of(self, program: Any) -> float:
        return 1


def waits(program: Any) -> bool:
    """Whether the last two polls of a program saw what memory still holds."""
    if program.polls == 0 or program.last_poll is None:
        return False
    addresses, seen = program.last_poll  # of words of 8 bytes, as addresses are, where it is a wait
    return (
        len(addresses) == len(seen)
        and interpreter.read_words(np.frombuffer(addresses, np.uint64), 8).tobytes() == seen
    )


def is_quiet(simulator: Simulator) -> bool:
    """Whether no store or load is under way, and no launch to come."""
    under_way = any(program.buffer or program.late_loads for program in simulator._programs())
    return not under_way and all(launch.programs for launch in simulator._current())


class Naps(Scheduler):
    """To whom some programs of rank 1's dispatches fall asleep once, until all others wait."""

    def __init__(self, seed: int, sleeps: Sleeps) -> None:
        super().__init__(seed)
        self._sleeps = sleeps
        self._asleep_before: dict[Any, int] = {}
        self._turns: Counter[Any] = Counter()

    def choices(self, programs: Any, weights: Any) -> Any:
        chosen = super().choices(programs, weights)
        self._turns.update(chosen)
        return chosen

    def pace_of(self, program: Any) -> float:
        launch = program.launch
        if launch.name != "rank 1 dispatch":
            return 1
        for number, (index, limits) in enumerate(self._sleeps.items()):
            if index % launch.grid[0] == program.index[0]:
                if program not in self._asleep_before:
                    self._asleep_before[program] = self.randint(*limits)
                if self._turns[program] == self._asleep_before[program]:
                    return 1e-3 / 10**number
        return 1


def put_to_sleep(simulator: Simulator, seed: int, sleeps: Sleeps) -> None:
    """Let programs take turns at every memory operation, some of them asleep. Memory is as strong as can be."""
    simulator.random = Naps(seed, sleeps)
    simulator.switch, simulator.weak = 1.0, 0.0
