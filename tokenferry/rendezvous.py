"""How the ranks of a Buffer find each other: an all-gather of small Python values, used at construction only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

from tokenferry.errors import ArgumentError


class Rendezvous(NamedTuple):
    """A group of ranks that can exchange Python values."""

    rank: int
    num_ranks: int
    all_gather: Callable[[Any], list[Any]]
    """Collective: returns what every rank passed, by rank."""


def meet(group: dist.ProcessGroup | None, comm: Any | None) -> Rendezvous:
    """The rendezvous of a process group of any backend, or of an mpi4py communicator.

    Raises:
        ArgumentError: neither is given, or this process is not in the group.
    """
    if group is not None:
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ArgumentError("group", "a group without this process", "a group that this process is in")

        def all_gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * num_ranks
            dist.all_gather_object(values, value, group=group)
            return values

        return Rendezvous(rank, num_ranks, all_gather)
    if comm is None:
        raise ArgumentError("group", None, "a torch.distributed process group (or comm=, an mpi4py communicator)")
    return Rendezvous(int(comm.Get_rank()), int(comm.Get_size()), lambda value: list(comm.allgather(value)))


_node_groups: dict[tuple[int, ...], dist.ProcessGroup] = {}


def node_group(group: dist.ProcessGroup, ranks: Sequence[int], timeout: float) -> dist.ProcessGroup:
    """A process group of some ranks of a group, over Gloo; made once, and kept. Collective among them.

    Args:
        group: a process group.
        ranks: of the group, this one among them.
        timeout: seconds to wait for the others.
    """
    everywhere = tuple(dist.get_global_rank(group, rank) for rank in ranks)
    known = _node_groups.get(everywhere)
    if known is None or not _is_registered(known):
        deadline = timedelta(seconds=min(timeout, 365 * 86400.0))
        known = dist.new_group(list(everywhere), deadline, "gloo", use_local_synchronization=True)
        assert isinstance(known, dist.ProcessGroup)
        _node_groups[everywhere] = known
    return known


def _is_registered(group: dist.ProcessGroup) -> bool:
    """Whether the process groups have not been destroyed since."""
    try:
        return bool(dist.get_process_group_ranks(group))
    except (KeyError, ValueError, RuntimeError):
        return False
