"""The exchange between nodes. A rail joins the ranks of one local index, one on each node; carriers move its bytes.

Every rank of a rail posts the same exchanges in the same order: what one sends to a node, its rank there receives,
tensor by tensor, of the sizes that both know. Posting does not wait, so that a carrier works while ranks do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from tokenferry.errors import ArgumentError
from tokenferry.memory.nvshmem import find as find_nvshmem
from tokenferry.topology import Topology

CARRIER_VARIABLE = "TOKENFERRY_CARRIER"
PROCESS_GROUP, NVSHMEM = "process_group", "nvshmem"
DEADLINE_SHARE = 0.8
"""Of a Buffer's deadline: a node that is silent is found on its rails, before ranks that wait for ranks of their own
node, which wait for it, blame those."""

Parts = Mapping[int, Sequence[torch.Tensor]]
"""Contiguous tensors by node."""


class RailError(RuntimeError):
    """An exchange cannot finish.

    Attributes:
        nodes: because of one of these nodes.
        timed_out: it was silent until the deadline; else the connection to it is lost.
    """

    def __init__(self, nodes: Sequence[int], timed_out: bool, reason: str) -> None:
        super().__init__(reason)
        self.nodes = nodes
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

    def settle(self) -> None:
        """As :meth:`finish`, behind :meth:`wait` for all nodes; but where a stream waits, the host does not.

        Then the rail ends itself if the exchange is not over by the deadline, and says so when it is used next.

        Raises:
            RailError: as for :meth:`wait`.
        """


class Rail(Protocol):
    """A rank's end of its rail."""

    carrier: str
    meanwhile: Callable[[], object]
    """Called now and then while the host waits; set by who uses the rail."""

    @property
    def bytes_sent(self) -> int:
        """Since the rail was made."""

    @property
    def failure(self) -> RailError | None:
        """What ended this rail while no host waited for it: then what came over it last may be garbage."""

    def post(self, sends: Parts, receives: Parts) -> Transfer:
        """Begin an exchange with other nodes. Tensors without elements do not travel."""

    def close(self, is_stuck: bool = False) -> None:
        """Let go. Local: nobody is waited for. Peers that still wait for this rank find out. May be called again.

        Args:
            is_stuck: the device does not come to an end, whatever this rail knows of its exchanges.
        """


def _process_group(topology: Topology, key: str, timeout: float, device: torch.device) -> Rail:
    if device.type == "cuda":
        from tokenferry.rail.nccl import nccl_rail

        return nccl_rail(topology, key, timeout, device)
    from tokenferry.rail.process_group import ProcessGroupRail

    return ProcessGroupRail(topology, key, timeout)


def _nvshmem(topology: Topology, key: str, timeout: float, device: torch.device) -> Rail:
    from tokenferry.rail.nvshmem import nvshmem_rail

    return nvshmem_rail(topology, key, timeout, device)


CARRIERS: dict[str, Callable[[Topology, str, float, torch.device], Rail]] = {
    PROCESS_GROUP: _process_group,
    NVSHMEM: _nvshmem,
}
"""What makes a rail, by the carrier's name: from who is where, the name of the rail, seconds to wait, the device."""


def carriers_of(device_type: str) -> list[str]:
    """The carriers that are on this host, for ranks on such a device."""
    return [name for name in CARRIERS if name != NVSHMEM or (device_type == "cuda" and find_nvshmem() is not None)]


def check_carrier(name: str, carrier: str, device_type: str) -> str:
    """Return the carrier if there is such a one, on some host at least.

    Raises:
        ArgumentError: there is not; says which are here.
    """
    if carrier not in CARRIERS or (carrier == NVSHMEM and device_type != "cuda"):
        raise ArgumentError(name, repr(carrier), _allowed(device_type))
    return carrier


def missing_carrier(carrier: str, device_type: str) -> str:
    """Why a carrier that there is cannot be had on this host; or nothing."""
    return "" if carrier in carriers_of(device_type) else f"no carrier {carrier!r}, but {_allowed(device_type)}"


def _allowed(device_type: str) -> str:
    return f"one of the carriers that are here for ranks on {device_type}: {', '.join(carriers_of(device_type))}"
