"""Rails over point-to-point operations of ``torch.distributed``: Gloo between CPU ranks, over TCP.

Each rail is a process group of its own. When a node is lost, the rails to it break and the caller's group does not:
a new Buffer can be made on it.

Gloo closes a connection when the last reference to the group and to operations on it is gone, and only then do peers
learn that this rank has given up: whatever fails drops its operations first.
"""

from __future__ import annotations

import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, _get_default_store

from tokenferry.errors import TokenferryError
from tokenferry.rail import Parts, RailError
from tokenferry.rail.notices import Notices
from tokenferry.topology import Topology

_LONGEST = 365 * 86400.0
"""Seconds; Gloo takes no endless deadline."""
_LEAST_PATIENCE = timedelta(seconds=1)
"""With ranks that have come already, where a rail is made."""
MOST_UNFINISHED = 32
"""Exchanges that may be under way; a further one waits for the oldest, which somebody may have forgotten."""
_MEANWHILE_EVERY = 0.002
"""Seconds."""

_rails: weakref.WeakSet[ProcessGroupRail] = weakref.WeakSet()
_inherited: list[object] = []
"""Groups of a parent process: their threads are not here, so that taking them down would wait for ever."""


class ProcessGroupRail:
    """See :class:`tokenferry.rail.Rail`.

    Args:
        topology: who is where.
        key: names the rail; equal on its ranks, and never used before.
        timeout: seconds that a wait lasts.

    Raises:
        TokenferryError: no connection to some rank of the rail.
    """

    carrier = "process_group"

    def __init__(self, topology: Topology, key: str, timeout: float) -> None:
        self.bytes_sent = 0
        self.meanwhile: Callable[[], object] = _nothing
        self._node = topology.node
        self._timeout = timedelta(seconds=min(timeout, _LONGEST))
        self._unfinished: deque[PostedTransfer] = deque()
        self._waiter: _Waiter | None = None
        self._notices: Notices | None = None
        store = _get_default_store()
        if store is None:
            raise TokenferryError("a rail needs the store of torch.distributed, which this default group has not")
        started, self._group = time.monotonic(), cast(Any, None)
        try:
            place = PrefixStore(key, store), topology.node, topology.num_nodes, self._timeout
            self._group = ProcessGroupGloo(*place)
            if topology.num_nodes > 2:
                left = self._timeout - timedelta(seconds=time.monotonic() - started)
                self._notices = Notices(*place, patience=max(left, min(self._timeout, _LEAST_PATIENCE)))
        except RuntimeError as error:
            self._group = None
            raise TokenferryError(f"no rail between ranks {topology.rail}: {error}") from error
        _rails.add(self)

    @property
    def failure(self) -> None:
        """See :class:`tokenferry.rail.Rail`: a host waits for all exchanges."""
        return None

    def post(self, sends: Parts, receives: Parts) -> PostedTransfer:
        """See :meth:`tokenferry.rail.Rail.post`."""
        while len(self._unfinished) >= MOST_UNFINISHED:
            self._unfinished[0].finish()
        transfer = PostedTransfer(self, self._timeout)
        self._unfinished.append(transfer)
        for node, parts in receives.items():
            for part in bytes_of(parts):
                transfer.receive(node, part)
        for node, parts in sends.items():
            for part in bytes_of(parts):
                transfer.send(node, part)
                self.bytes_sent += part.numel()
        return transfer

    def gives_up(self, nodes: Collection[int], timed_out: bool, reason: str, is_lost: bool = False) -> RailError:
        """What to raise; the others are told. See :meth:`tokenferry.rail.notices.Notices.failure`."""
        if self._notices is None:
            return RailError(list(nodes), timed_out, reason)
        return self._notices.failure(nodes, timed_out, reason, is_lost)

    def answer(self, nodes: Collection[int]) -> None:
        """This rank waits for these nodes, here or elsewhere. See :meth:`tokenferry.rail.notices.Notices.answer`."""
        if self._notices is not None:
            self._notices.answer(nodes)

    def close(self, is_stuck: bool = False) -> None:
        """See :meth:`tokenferry.rail.Rail.close`."""
        if self._notices is not None:
            self._notices.close()  # first: who finds the connection closed knows why
        self._group = None
        for transfer in list(self._unfinished):
            transfer.abandon()
        self._unfinished.clear()
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.stop()

    def group(self) -> Any:
        """The process group.

        Raises:
            RailError: the rail is closed.
        """
        if self._group is None:
            raise RailError([self._node], False, "this rank has closed its rail")
        return self._group

    def is_done_with(self, transfer: PostedTransfer) -> None:
        """Forget a transfer."""
        with suppress(ValueError):  # a thread that closes the rail may be quicker
            self._unfinished.remove(transfer)

    def wait(self, work: list[dist.Work], node: int) -> str:
        """Wait for the work in the list, from a node, and take it out of there; returns why it failed, or nothing.

        In another thread, since Gloo's wait does not end for Ctrl-C.
        """
        self.group()
        waiter = self._waiter or _Waiter()
        self._waiter = None  # whose answer is not fetched is of no further use

        def meanwhile() -> None:
            self.meanwhile()
            self.answer([node])

        reason = waiter.wait(work, self._timeout, meanwhile, None if self._notices is None else self._notices.grace)
        if self._group is None or waiter.is_late:
            waiter.stop()
        else:
            self._waiter = waiter
        return reason

    def leave_to_the_parent(self) -> None:
        """In a forked child: this rail is not its own."""
        held = None if self._notices is None else self._notices.held()
        _inherited.append((self._group, [transfer.works() for transfer in self._unfinished], held))
        self._group = self._waiter = None
        self._unfinished.clear()


def _leave_rails_to_the_parent() -> None:
    for rail in list(_rails):
        rail.leave_to_the_parent()


os.register_at_fork(after_in_child=_leave_rails_to_the_parent)


class PostedTransfer:
    """See :class:`tokenferry.rail.Transfer`."""

    def __init__(self, rail: ProcessGroupRail, timeout: timedelta) -> None:
        self._rail = rail
        self._seconds = timeout.total_seconds()
        self._receives: dict[int, list[dist.Work]] = {}
        self._sends: list[tuple[int, list[dist.Work], torch.Tensor]] = []
        self._is_abandoned = False

    def receive(self, node: int, part: torch.Tensor) -> None:
        """Begin to receive bytes from a node.

        Raises:
            RailError: the connection to the node is broken.
        """
        self._receives.setdefault(node, []).append(self._begun(self._rail.group().recv, part, node))

    def send(self, node: int, part: torch.Tensor) -> None:
        """Begin to send bytes to a node.

        Raises:
            RailError: the connection to the node is broken.
        """
        self._sends.append((node, [self._begun(self._rail.group().send, part, node)], part))

    def wait(self, node: int) -> None:
        """See :meth:`tokenferry.rail.Transfer.wait`."""
        self._check()
        works = self._receives.get(node, [])
        while works:
            self._wait(works, node)
        self._receives.pop(node, None)

    def finish(self) -> None:
        """See :meth:`tokenferry.rail.Transfer.finish`."""
        self._check()
        for node in list(self._receives):
            self.wait(node)
        while self._sends:
            node, work, _ = self._sends[0]
            self._wait(work, node)
            self._sends = self._sends[1:]
        self._rail.is_done_with(self)

    def settle(self) -> None:
        """See :meth:`tokenferry.rail.Transfer.settle`: the host waits."""
        self.finish()

    def abandon(self) -> None:
        """Forget what has not come."""
        self._is_abandoned = True
        for works in self._receives.values():
            works.clear()
        self._receives = {}
        for _, work, _ in self._sends:
            work.clear()
        self._sends = []

    def works(self) -> object:
        """All operations."""
        return self._receives, self._sends

    def _check(self) -> None:
        if self._is_abandoned:
            self._rail.group()
            raise RailError([self._rail._node], False, "this exchange was given up")

    def _wait(self, works: list[dist.Work], node: int) -> None:
        started = time.monotonic()
        reason = self._rail.wait(works, node)
        seconds = time.monotonic() - started
        if reason:
            self.abandon()
            if seconds > 0.9 * self._seconds:
                raise self._rail.gives_up([node], True, f"no sign of life for {seconds:.1f} s")
            raise self._rail.gives_up([node], False, reason, is_lost=True)
        self._check()

    def _begun(
        self, operation: Callable[[list[torch.Tensor], int, int], dist.Work], part: torch.Tensor, node: int
    ) -> dist.Work:
        try:
            return operation([part], node, 0)
        except RuntimeError as error:
            reason = first_line(error)
        del operation  # a method of the group: the error's frames would keep its connections
        raise self._rail.gives_up([node], False, reason, is_lost=True)


class _Waiter:
    """Waits for operations in a thread of its own, while the caller can be interrupted.

    The thread ends when it is told to, or when nobody holds this object any more: Ctrl-C may come anywhere.
    """

    is_late = False

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[list[dist.Work], timedelta] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=_serve, args=(self._jobs, self._answers), daemon=True, name="rail").start()

    def wait(
        self, work: list[dist.Work], timeout: timedelta, meanwhile: Callable[[], object], leave: float | None = None
    ) -> str:
        """Wait for the first work of the list, which goes from there; returns why it failed, or nothing.

        Args:
            work: of Gloo.
            timeout: for it.
            meanwhile: called now and then.
            leave: seconds that the connections of this rank stay when the deadline has passed, in which the thread
                waits on: Gloo would close them all, and this waiter serves no further work. None: Gloo does.
        """
        until = float("inf") if leave is None else time.monotonic() + timeout.total_seconds()
        try:
            self._jobs.put((work, timeout + timedelta(seconds=leave or 0.0)))
            while True:
                try:
                    return self._answers.get(timeout=_MEANWHILE_EVERY)
                except queue.Empty:
                    meanwhile()
                if time.monotonic() > until:
                    self.is_late = True
                    return "no sign of life"
        except BaseException:
            self.stop()  # now: the exception may keep this object
            raise

    def stop(self) -> None:
        """End the thread, once it is done with what it waits for."""
        self._jobs.put(None)

    __del__ = stop


def _nothing() -> None:
    pass


def _serve(
    jobs: queue.SimpleQueue[tuple[list[dist.Work], timedelta] | None], answers: queue.SimpleQueue[str]
) -> None:
    while (job := jobs.get()) is not None:
        works, timeout = job
        reason, work = "", works.pop(0)
        try:
            work.wait(timeout)
        except RuntimeError as error:
            reason = first_line(error)
        del job, work, works
        answers.put(reason)


def bytes_of(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The bytes of those that have elements."""
    for tensor in tensors:
        if tensor.numel():
            yield tensor.view(-1).view(torch.uint8)


def first_line(error: RuntimeError) -> str:
    """What it says, without what torch adds."""
    return str(error).splitlines()[0]
