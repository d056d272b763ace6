"""Between GPUs by a process group of NCCL, over any network that it knows.

NCCL ends a communicator only when all graphs that hold its exchanges are gone.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from tokenferry.errors import TokenferryError
from tokenferry.rail import PROCESS_GROUP
from tokenferry.rail.device_rail import DeviceRail, Messages, Work, rail_of_gpu
from tokenferry.topology import Topology

_NEVER = timedelta(days=365)
_ERRORS_LEFT_TO_US = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_FR_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    "TORCH_FR_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
"""What torch is told when a group of NCCL is made. Else its watchdog would end the process when an operation fails,
and sleep for a minute before, another of its threads for eight; the end of a group waits for both."""
_ENVIRONMENT = threading.Lock()


class GroupTransport:
    """See :class:`tokenferry.rail.device_rail.Transport`.

    Args:
        group: of the rail's ranks, by node.
        device: where the tensors are.
    """

    name = "NCCL"

    def __init__(self, group: Any, device: torch.device) -> None:
        self._group = group
        self._device = device

    def begin(self, coming: Messages, going: Messages) -> Sequence[Work]:
        """As one operation where the backend can: NCCL would wait for the peers one after the other."""
        group = self._group
        as_one = group._get_backend(self._device).supports_coalescing
        if as_one:
            group._start_coalescing(self._device)
        works = [group.recv([part], node, 0) for node, part in coming]
        works += [group.send([part], node, 0) for node, part in going]
        return [group._end_coalescing(self._device)] if as_one else works

    def missing(self) -> Sequence[int]:
        """See :meth:`tokenferry.rail.device_rail.Transport.missing`: NCCL knows no deadline."""
        return ()

    def end(self, is_idle: bool) -> None:
        """See :meth:`tokenferry.rail.device_rail.Transport.end`."""
        with contextlib.suppress(RuntimeError):  # Gloo has nothing to abort
            self._group.abort()

    def leave(self) -> None:
        """See :meth:`tokenferry.rail.device_rail.Transport.leave`: the end of a group waits for graphs."""


def nccl_rail(topology: Topology, key: str, timeout: float, device: torch.device) -> DeviceRail:
    """A rail of this rank's GPU.

    Args:
        topology: who is where.
        key: names the rail; equal on its ranks, and never used before.
        timeout: seconds that a wait lasts.
        device: the GPU.

    Raises:
        TokenferryError: no connection to some rank of the rail.
    """
    if not dist.is_nccl_available():
        raise TokenferryError("rails between GPUs need NCCL, which this torch has not")

    def make_transport() -> GroupTransport:
        store = PrefixStore(f"{key}/nccl", _get_default_store())
        return GroupTransport(_nccl_group(store, topology.node, topology.num_nodes, device), device)

    return rail_of_gpu(topology, key, timeout, device, make_transport, PROCESS_GROUP)


def _nccl_group(store: PrefixStore, node: int, num_nodes: int, device: torch.device) -> Any:
    """A process group of its own, so that what breaks is only that."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options._timeout = _NEVER  # the deadline is this rail's business
    with _errors_left_to_us():
        backend = ProcessGroupNCCL(store, node, num_nodes, options)
    group = dist.ProcessGroup(store, node, num_nodes)
    kind = dist.ProcessGroup.BackendType.NCCL
    group._set_default_backend(kind)
    group._register_backend(device, kind, backend)
    return group


@contextlib.contextmanager
def _errors_left_to_us() -> Iterator[None]:
    """While a group is made: what it reads from the environment."""
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in _ERRORS_LEFT_TO_US}
        os.environ.update(_ERRORS_LEFT_TO_US)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
