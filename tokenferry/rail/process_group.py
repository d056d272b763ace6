"""Rails over point-to-point operations of ``torch.distributed``: Gloo between CPU ranks, over TCP.

Each rail is a process group of its own. When a node is lost, the rails to it break and the caller's group does not:
a new Buffer can be made on it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo, _get_default_store

from tokenferry.errors import TokenferryError
from tokenferry.rail import Parts, RailError
from tokenferry.topology import Topology


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
        self._posted: weakref.WeakSet[PostedTransfer] = weakref.WeakSet()
        self._node = topology.node
        self._timeout = timedelta(seconds=timeout)
        store = PrefixStore(key, _get_default_store())
        try:
            self._group: Any = ProcessGroupGloo(store, topology.node, topology.num_nodes, self._timeout)
        except RuntimeError as error:
            raise TokenferryError(f"no rail between ranks {topology.rail}: {error}") from error

    def post(self, sends: Parts, receives: Parts) -> PostedTransfer:
        """See :meth:`tokenferry.rail.Rail.post`."""
        group = self._group
        if group is None:
            raise RailError(self._node, False, "the rail is closed")
        try:
            works: dict[int, list[dist.Work]] = {
                node: [group.recv([part], node, 0) for part in _parts(parts)] for node, parts in receives.items()
            }
            sent = [(node, part) for node, parts in sends.items() for part in _parts(parts)]
            self.bytes_sent += sum(part.numel() for _, part in sent)
            sending = [(node, group.send([part], node, 0), part) for node, part in sent]
        except RuntimeError as error:
            raise RailError(self._node, False, _first_line(error)) from error
        transfer = PostedTransfer(works, sending, self._timeout)
        self._posted.add(transfer)
        return transfer

    def close(self) -> None:
        """See :meth:`tokenferry.rail.Rail.close`."""
        self._group = None
        for transfer in self._posted:
            transfer.abandon()  # connections stay open for as long as there are operations on them


class PostedTransfer:
    """See :class:`tokenferry.rail.Transfer`."""

    def __init__(
        self,
        receives: dict[int, list[dist.Work]],
        sends: list[tuple[int, dist.Work, torch.Tensor]],
        timeout: timedelta,
    ) -> None:
        self._receives = receives
        self._sends = sends
        self._timeout = timeout

    def wait(self, node: int) -> None:
        """See :meth:`tokenferry.rail.Transfer.wait`."""
        for work in self._receives.pop(node, ()):
            self._wait(work, node)

    def finish(self) -> None:
        """See :meth:`tokenferry.rail.Transfer.finish`."""
        for node in list(self._receives):
            self.wait(node)
        while self._sends:
            node, work, _ = self._sends.pop()
            self._wait(work, node)

    def abandon(self) -> None:
        """Forget what has not come."""
        self._receives.clear()
        self._sends.clear()

    def _wait(self, work: dist.Work, node: int) -> None:
        try:
            work.wait(self._timeout)
        except RuntimeError as error:
            timed_out = "timed out" in str(error).lower()
            reason = f"no sign of life for {self._timeout.total_seconds():.1f} s" if timed_out else _first_line(error)
            raise RailError(node, timed_out, reason) from error


def _parts(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The bytes of those that have elements."""
    for tensor in tensors:
        if tensor.numel():
            yield tensor.view(-1).view(torch.uint8)


def _first_line(error: RuntimeError) -> str:
    return str(error).splitlines()[0]
