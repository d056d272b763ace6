"""What the device knows of peers' memory: where their regions lie, and which own ones all of them can read.

The host learns both from the mailboxes (:mod:`tokenferry.memory.direct`) and has them copied to the device in front
of an operation. In a CUDA graph that copy is the graph's: every replay begins with what the host has learnt by then.
And as no host may come back after a capture, a thread follows the mailboxes from the first one on, with a stream of
its own.

Where regions lie may change on the device at any time: a kernel looks for those only that their owner counts as open
everywhere, and these stay while it runs. So the thread acknowledges what it has opened, but closes nothing: only what
is in the order of the operations knows that none is running. Which own regions are open everywhere must not change
under an operation, whose programs would rate their rows differently: that, too, is copied in order alone.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING

import torch

from tokenferry.memory.direct import Regions

if TYPE_CHECKING:
    from tokenferry.dataplane.cuda.rank import Queue

logger = logging.getLogger("tokenferry")

THREAD = "tokenferry regions"
"""What the threads are called."""
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.001, 0.1
"""Seconds between two looks of the thread: the longer nothing has been captured, the longer."""
_LAST_SECONDS = 5.0
"""That a thread is waited for when the interpreter ends."""


class Follower:
    """The tables of the device.

    Args:
        regions: of this rank.
        queue: of all launches.
        device: of this rank.

    Attributes:
        region_table: int64 [2, R, regions] on the device, as ``regions.tables``.
        ready: int32 [regions] on the device, as ``regions.ready``.
        ended: set when there is nothing to follow any more.
    """

    def __init__(self, regions: Regions, queue: Queue, device: torch.device) -> None:
        self._regions = regions
        self._queue = queue
        self._device = device
        with torch.inference_mode(False):
            self.region_table = regions.tables.to(device, copy=True)  # the heaps are there
            self.ready = regions.ready.to(device, copy=True)
        self._in_order = self._known = regions.version
        """The versions of the regions of which both tables were copied in order, and where they lie in any way."""
        self._copies: deque[tuple[torch.cuda.Event, int]] = deque()
        self._capture: int | None = None
        self._last_capture = 0.0
        self._thread: threading.Thread | None = None
        self._woken = threading.Event()
        self.ended = threading.Event()

    def follow(self) -> None:
        """In front of every operation, under the lock of the queue."""
        if torch.cuda.is_current_stream_capturing():
            self._follow_in_capture()
            return
        regions = self._regions
        regions.poll()
        if regions.version != self._in_order:
            self._in_order = self._known = regions.version
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
        self._woken.set()
        if self._thread is None or not self._thread.is_alive():
            arguments = weakref.ref(self), self._device, self.ended, self._woken
            thread = threading.Thread(target=_look, args=arguments, name=THREAD, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no more threads: the graph passes its rows through the stage
                logger.warning("what peers' memory graphs read is not followed: %s", error)
                return
            self._thread = thread
            _followers.add(self)

    def follow_aside(self) -> None:
        """As :meth:`follow`, by the thread: not in the order of the operations. Under the lock of the queue."""
        if self.ended.is_set():
            return
        regions = self._regions
        regions.poll()
        while self._copies and self._copies[0][0].query():  # type: ignore[no-untyped-call]
            regions.acknowledge(self._copies.popleft()[1], openings_only=True)
        if regions.version != self._known and not self._copies:  # none may land behind this one
            self._known = regions.version
            regions.driver.copy_aside(self.region_table.data_ptr(), regions.tables.data_ptr(), regions.tables.nbytes)
            regions.acknowledge(openings_only=True)

    def close(self) -> None:
        """The mailboxes go away. Under the lock of the queue."""
        self._stop()
        self._regions.driver.end_aside()

    def end(self) -> None:
        """Follow no more, and wait for the thread."""
        self._stop()
        if self._thread is not None:
            self._thread.join(_LAST_SECONDS)

    def _stop(self) -> None:
        self.ended.set()
        self._woken.set()

    @property
    def pause(self) -> float:
        """Seconds until the thread looks again, if no capture wakes it."""
        return min(max(time.monotonic() - self._last_capture, _SHORTEST_SLEEP), _LONGEST_SLEEP)

    @property
    def lock(self) -> threading.RLock:
        """Of the queue."""
        return self._queue.lock


def _look(of: weakref.ref[Follower], device: torch.device, ended: threading.Event, woken: threading.Event) -> None:
    """The thread: for as long as the follower is there, and open."""
    is_first = True
    try:
        while not ended.is_set() and (follower := of()) is not None:
            with follower._regions.driver.relaxed_capture():  # graphs are captured beside
                if is_first:
                    torch.cuda.set_device(device)
                    torch.cuda.mem_get_info(device)  # the first call of a thread makes the GPU's context its own
                    is_first = False
                with follower.lock:
                    follower.follow_aside()
            pause = follower.pause
            del follower
            woken.wait(pause)
            woken.clear()
    except Exception as error:  # the next operation finds out by itself; graphs pass their rows through the stage
        if not ended.is_set():
            logger.warning("what peers' memory graphs read is not followed any more: %s", error)


_followers: weakref.WeakSet[Follower] = weakref.WeakSet()
"""Those with a thread."""


@atexit.register
def _end_threads() -> None:
    """While the interpreter is whole: a thread that comes back from CUDA when it is not ends the process."""
    for follower in list(_followers):
        follower.end()
