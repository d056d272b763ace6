"""Who is where: the node of every rank, its place inside the node, and the rails across nodes."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenferry.errors import TokenferryError

NODE_VARIABLE = "TOKENFERRY_NODE"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def node_key(override: str | int | None = None, environ: Mapping[str, str] | None = None) -> str:
    """A string that is equal on all ranks of a node and differs between nodes.

    The first of these that is there: ``override``, the variable ``TOKENFERRY_NODE``, the node number of the
    launcher (torchrun's ``GROUP_RANK``, Slurm's ``SLURM_NODEID``), the host's name and boot id.

    Args:
        override: the caller's own name for the node.
        environ: environment variables; those of the process by default.
    """
    environ = os.environ if environ is None else environ
    if override is not None:
        return f"given:{override}"
    if NODE_VARIABLE in environ:
        return f"given:{environ[NODE_VARIABLE]}"
    if "TORCHELASTIC_RUN_ID" in environ and "GROUP_RANK" in environ:
        return f"torchrun:{environ['GROUP_RANK']}"
    if "SLURM_PROCID" in environ and "SLURM_NODEID" in environ:
        return f"slurm:{environ['SLURM_NODEID']}"
    boot_id = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    return f"host:{socket.gethostname()}:{boot_id}"


@dataclass(frozen=True)
class Topology:
    """The ranks of a group, laid out on nodes.

    Nodes are numbered in the order of their lowest rank. Local indices follow rank order inside a node. A rail is
    the set of ranks with the same local index, one on each node.

    Attributes:
        rank: this rank.
        node_of: node of every rank.
    """

    rank: int
    node_of: tuple[int, ...]

    @staticmethod
    def from_keys(rank: int, keys: Sequence[str]) -> Topology:
        """Build the topology from the :func:`node_key` of every rank.

        Raises:
            TokenferryError: the nodes do not have the same number of ranks.
        """
        order = {key: node for node, key in enumerate(dict.fromkeys(keys))}
        sizes = {key: list(keys).count(key) for key in order}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{key} has {count}" for key, count in sizes.items())
            raise TokenferryError(f"every node must have the same number of ranks, but {listed}")
        return Topology(rank, tuple(order[key] for key in keys))

    @property
    def num_ranks(self) -> int:
        """Ranks of the group."""
        return len(self.node_of)

    @cached_property
    def num_nodes(self) -> int:
        """Nodes of the group."""
        return max(self.node_of) + 1

    @property
    def node(self) -> int:
        """Node of this rank."""
        return self.node_of[self.rank]

    @property
    def local_ranks(self) -> tuple[int, ...]:
        """Ranks of this node, by local index."""
        return self.ranks_of_node(self.node)

    @property
    def local_index(self) -> int:
        """Place of this rank among the ranks of its node."""
        return self.places[self.rank][1]

    @cached_property
    def rail(self) -> tuple[int, ...]:
        """Ranks with this rank's local index, by node."""
        return tuple(ranks[self.local_index] for ranks in self._by_node)

    @cached_property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Node and local index of every rank."""
        index = {rank: place for ranks in self._by_node for place, rank in enumerate(ranks)}
        return tuple((node, index[rank]) for rank, node in enumerate(self.node_of))

    def ranks_of_node(self, node: int) -> tuple[int, ...]:
        """Ranks of a node, by local index."""
        return self._by_node[node]

    @cached_property
    def _by_node(self) -> tuple[tuple[int, ...], ...]:
        ranks: list[list[int]] = [[] for _ in range(self.num_nodes)]
        for rank, node in enumerate(self.node_of):
            ranks[node].append(rank)
        return tuple(tuple(of_node) for of_node in ranks)
