"""What the device knows of peers' memory: where their regions lie, and which own ones all of them can read.

The host learns both from the mailboxes (:mod:`tokenferry.memory.direct`) and has them copied to the device in front
of an operation. In a CUDA graph that copy is the graph's: every replay begins with what the host has learnt by then.
And as no host may come back after a capture, a thread follows the mailboxes from the first one on, with a stream of
its own.

Where regions lie may change on the device at any time: a kernel looks for those only that their owner counts as open
everywhere, and these stay. Which own regions are open everywhere must not change under an operation, whose programs
would rate their rows differently. So that is copied in the order of the operations alone.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

from tokenferry.errors import TokenferryError
from tokenferry.memory.direct import Regions

if TYPE_CHECKING:
    from tokenferry.dataplane.cuda.rank import Queue

logger = logging.getLogger("tokenferry")

_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.001, 0.1
"""Seconds between two looks of the thread: the longer nothing has been captured, the longer."""


class Follower:
    """The tables of the device.

    Args:
        regions: of this rank.
        queue: of all launches.
        device: of this rank.

    Attributes:
        region_table: int64 [2, R, regions] on the device, as ``regions.tables``.
        ready: int32 [regions] on the device, as ``regions.ready``.
    """

    def __init__(self, regions: Regions, queue: Queue, device: torch.device) -> None:
        self._regions = regions
        self._queue = queue
        self._device = device
        with torch.inference_mode(False):
            self.region_table = regions.tables.to(device, copy=True)  # the heaps are there
            self.ready = regions.ready.to(device, copy=True)
        self._copied = regions.version
        """The version of the regions whose tables are copied in the order of the operations."""
        self._copies: deque[tuple[torch.cuda.Event, int]] = deque()
        self._capture: int | None = None
        self._thread: threading.Thread | None = None
        self._last_capture = 0.0
        self._is_closed = False

    def follow(self) -> None:
        """In front of every operation, under the lock of the queue."""
        if torch.cuda.is_current_stream_capturing():
            self._follow_in_capture()
            return
        regions = self._regions
        regions.poll()
        if regions.version != self._copied:
            self._copied = regions.version
            self._queue.start()
            with torch.cuda.stream(self._queue.stream):
                self.region_table.copy_(regions.tables, non_blocking=True)
                self.ready.copy_(regions.ready, non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
            self._copies.append((copied, regions.version))
        while self._copies and self._copies[0][0].query():  # type: ignore[no-untyped-call]
            regions.acknowledge(self._copies.popleft()[1])

    def _follow_in_capture(self) -> None:
        """Let the graph begin with a copy, and the thread look at the mailboxes."""
        if self._regions.num_ranks == 1:
            return
        capture = self._regions.driver.capture(torch._C._cuda_getCurrentRawStream(self._device.index))
        if capture is None or capture != self._capture:
            self._queue.start()
            with torch.cuda.stream(self._queue.stream):
                self.ready.copy_(self._regions.ready, non_blocking=True)
            self._capture = capture
        self._last_capture = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(
                target=_look, args=(weakref.ref(self), self._device), name="tokenferry regions", daemon=True
            )
            self._thread.start()

    def follow_aside(self) -> bool:
        """As :meth:`follow`, by the thread: not in the order of the operations. Returns whether to go on.

        Under the lock of the queue, so that nobody else follows meanwhile.
        """
        if self._is_closed:
            return False
        if self._regions.poll():
            self._queue.copy_aside(self.region_table, self._regions.tables)
            self._regions.acknowledge()
        return True

    def close(self) -> None:
        """The mailboxes go away."""
        self._is_closed = True

    @property
    def pause(self) -> float:
        """Seconds until the thread looks again."""
        return min(max(time.monotonic() - self._last_capture, _SHORTEST_SLEEP), _LONGEST_SLEEP)

    @property
    def lock(self) -> threading.RLock:
        """Of the queue."""
        return self._queue.lock


def _look(of: weakref.ref[Follower], device: torch.device) -> None:
    """The thread: for as long as the follower is there, and open."""
    pause = 0.0
    try:
        torch.cuda.set_device(device)
        while (follower := of()) is not None:
            with follower._regions.driver.relaxed_capture():  # graphs are captured beside
                if pause == 0.0:
                    torch.cuda.mem_get_info(device)  # the first call of a thread makes the GPU's context its own
                with follower.lock:
                    if not follower.follow_aside():
                        return
            pause = follower.pause
            del follower
            time.sleep(pause)
    except (
        TokenferryError,
        RuntimeError,
    ) as error:  # the next operation finds out by itself; graphs stage their rows
        logger.warning("what peers' memory graphs read is not followed any more: %s", error)
