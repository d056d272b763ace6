"""A start that all ranks of the default group share, for what is timed in microseconds.

Ranks are on one machine, so they share a clock and memory: they agree on a moment, and wait for it, awake. A thread
that sleeps in a barrier wakes with cold caches, maybe on another core, and what it does first takes several times as
long: the time of a call would be that of waking up.
"""

from __future__ import annotations

import functools
import os
import time

import torch.distributed as dist

from tokenferry.memory.shm import Segment, fence

_MARGIN = 200_000
"""Nanoseconds between the exchange of clocks and the common start; all ranks must have returned from the exchange."""
_EAGER = 2_000_000
"""Nanoseconds after which a rank that waits lets others have its core."""
_PATIENCE = 120_000_000_000


class _Board:
    """Where every rank writes its turn and the time of its arrival. One rank is at most a turn ahead of another."""

    def __init__(self, rank: int, num_ranks: int, segment: Segment) -> None:
        self._segment = segment
        self._words = segment.words
        self._rank = rank
        self._num_ranks = num_ranks
        self._turn = 0

    def meet(self) -> int:
        """Wait for all ranks; returns when the last one came, the same on all of them."""
        words, ranks = self._words, range(self._num_ranks)
        self._turn = turn = self._turn + 1
        arrived = time.monotonic_ns()
        words[3 * self._rank + 1 + turn % 2] = arrived
        fence()
        words[3 * self._rank] = turn
        for rank in ranks:
            while words[3 * rank] < turn:
                waited = time.monotonic_ns() - arrived
                if waited > _PATIENCE:
                    raise RuntimeError(f"rank {rank} does not come to the start")
                if waited > _EAGER:
                    os.sched_yield()
        fence()
        return max(words[3 * rank + 1 + turn % 2] for rank in ranks)


@functools.lru_cache(maxsize=1)
def _board(group: dist.ProcessGroup) -> _Board:
    """The board of the ranks of a group. Collective the first time."""
    rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
    size = 3 * 8 * num_ranks
    segment = Segment.create(size) if rank == 0 else None
    names = [segment.name if segment is not None else ""]
    dist.broadcast_object_list(names, 0, group)
    if segment is None:
        segment = Segment(names[0], size, create=False)
    else:
        segment.commit(size)
    dist.barrier(group)
    if rank == 0:
        segment.unlink()
    return _Board(rank, num_ranks, segment)


def start_together() -> None:
    """Return at the same moment on all ranks of the default group, within microseconds."""
    group = dist.group.WORLD
    assert group is not None
    start = _board(group).meet() + _MARGIN
    while time.monotonic_ns() < start:
        pass
