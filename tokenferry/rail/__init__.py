"""The exchange between nodes. A rail joins the ranks of one local index, one on each node; carriers move its bytes.

Every rank of a rail posts the same exchanges in the same order: what one sends to a node, its rank there receives,
tensor by tensor, of the sizes that both know. Posting does not wait, so that a carrier works while ranks do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
import torch.distributed as dist

from tokenferry.errors import ArgumentError
from tokenferry.topology import Topology

if TYPE_CHECKING:
    from tokenferry.rail.process_group import ProcessGroupRail

CARRIER_VARIABLE = "TOKENFERRY_CARRIER"
PROCESS_GROUP = "process_group"
DEADLINE_SHARE = 0.8
"""Of a Buffer's deadline: a node that is silent is found on its rails, before ranks that wait for ranks of their own
node, which wait for it, blame those."""

Parts = Mapping[int, Sequence[torch.Tensor]]
"""Contiguous tensors by node."""


class RailError(RuntimeError):
    """An exchange cannot finish.

    Attributes:
        node: because of this node.
        timed_out: it was silent until the deadline; else the connection to it is lost.
    """

    def __init__(self, node: int, timed_out: bool, reason: str) -> None:
        super().__init__(reason)
        self.node = node
        self.timed_out = timed_out


class Transfer(Protocol):
    """An exchange that was posted."""

    def wait(self, node: int) -> None:
        """Wait for what this node sends.

        Raises:
            RailError: it does not come. No exchange of this rail finishes any more.
        """

    def finish(self) -> None:
        """Wait for the rest: until then the tensors that are sent must not change.

        Raises:
            RailError: as for :meth:`wait`.
        """


class Rail(Protocol):
    """A rank's end of its rail."""

    carrier: str
    bytes_sent: int
    """Since the rail was made."""

    def post(self, sends: Parts, receives: Parts) -> Transfer:
        """Begin an exchange with other nodes. Tensors without elements do not travel."""

    def close(self) -> None:
        """Let go. Local: nobody is waited for. Peers that still wait for this rank find out. May be called again."""


def _process_group(group: dist.ProcessGroup, topology: Topology, key: str, timeout: float) -> ProcessGroupRail:
    from tokenferry.rail.process_group import ProcessGroupRail

    return ProcessGroupRail(topology, key, timeout)


CARRIERS: dict[str, Callable[[dist.ProcessGroup, Topology, str, float], Rail]] = {PROCESS_GROUP: _process_group}
"""What makes a rail, by the carrier's name."""


def check_carrier(name: str, carrier: str) -> str:
    """Return the carrier if it is there.

    Raises:
        ArgumentError: it is not; says which are.
    """
    if carrier not in CARRIERS:
        raise ArgumentError(name, repr(carrier), f"one of the carriers that are here: {', '.join(CARRIERS)}")
    return carrier
