"""One collective operation in progress on a heap: its waiting loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tokenferry.errors import PeerError, PeerLostError, PeerTimeoutError
from tokenferry.memory.waiting import Waiter

if TYPE_CHECKING:
    from tokenferry.memory.heap import Heap


class Operation:
    """One collective operation in progress on a heap.

    Attributes:
        name: for messages, e.g. ``"dispatch"``.
        epoch: its number in the life of the heap.
        kind: what statistics count it as.
    """

    kind = 0

    def __init__(self, heap: Heap, name: str, epoch: int) -> None:
        self.heap = heap
        self.name = name
        self.epoch = epoch

    def run(self, step: Callable[[], tuple[bool, Sequence[int]]]) -> None:
        """Call ``step`` until it waits for no rank any more.

        Args:
            step: does what can be done now; returns whether that was anything, and the ranks it waits for.

        Raises:
            PeerLostError: a rank that it waits for is dead, has destroyed its Buffer or has given up.
            PeerTimeoutError: nothing happened for the heap's timeout.
        """
        waiter = Waiter()
        trouble: tuple[list[int], str] | None = None
        try:
            while True:
                progressed, missing = step()
                if not missing:
                    return
                if progressed:
                    trouble = None
                    waiter.restart()
                    continue
                if trouble is not None:
                    raise self._error(PeerLostError, *trouble)
                if waiter.is_time_to_look():
                    # What a rank published before it ended still counts: trouble is final after one more step.
                    trouble = self.heap.trouble(missing)
                    if trouble is None and waiter.seconds() > self.heap.timeout:
                        reason = f"no sign of life for {waiter.seconds():.1f} s"
                        raise self._error(PeerTimeoutError, missing, reason)
                waiter.pause(missing)
        finally:
            waiter.restart()
            if waiter.idle_ns:
                waited = {self.heap.names[rank]: nanoseconds for rank, nanoseconds in waiter.waited_ns.items()}
                self.heap.recorder.waited(self.kind, waiter.idle_ns, waited)

    def _error(self, kind: type[PeerError], ranks: Sequence[int], reason: str) -> PeerError:
        return kind(self.name, self.epoch, [self.heap.names[rank] for rank in ranks], reason)
