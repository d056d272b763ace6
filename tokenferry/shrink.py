"""Going on with the ranks that are left: a new Buffer inside the old one, without the process group.

The survivors find each other in the store of ``torch.distributed``, since collectives of a group with dead ranks do
not end. They are numbered anew, in their old order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tokenferry.construction import AnyRuntime, Wishes, construct_runtime
from tokenferry.errors import ArgumentError, BufferStateError, MismatchError
from tokenferry.rendezvous import Meetings, Rendezvous
from tokenferry.validation import check_int, require


class Survivors(NamedTuple):
    """Who is left after :meth:`tokenferry.Buffer.shrink`."""

    ranks: tuple[int, ...]
    """The numbers that they had; each one's new number is its place here."""
    num_old_ranks: int
    """Ranks before."""

    def lost_experts(self, num_experts: int) -> list[int]:
        """The experts of the ranks that are gone.

        Args:
            num_experts: experts of all old ranks.
        """
        return [expert for expert, new in enumerate(self._new_ids(num_experts)) if new < 0]

    def renumber(self, topk_idx: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Choices of experts in their new numbers: of ``num_experts / old ranks * ranks`` that are left.

        Args:
            topk_idx: int64 of any shape: old expert ids, or -1.
            num_experts: experts of all old ranks.

        Returns:
            The same shape; -1 also where an expert is lost.
        """
        table = torch.tensor([*self._new_ids(num_experts), -1], dtype=torch.int64, device=topk_idx.device)
        return table[topk_idx]

    def _new_ids(self, num_experts: int) -> list[int]:
        per_rank, rest = divmod(check_int("num_experts", num_experts, minimum=1), self.num_old_ranks)
        require(rest == 0, "num_experts", num_experts, f"a multiple of the {self.num_old_ranks} ranks")
        first = {old: new * per_rank for new, old in enumerate(self.ranks)}
        return [
            first[rank] + local if rank in first else -1
            for rank in range(self.num_old_ranks)
            for local in range(per_rank)
        ]


class ShrinkMethods:
    """Of Buffer."""

    rank: int
    group_size: int
    runtime: AnyRuntime | None
    _rendezvous: Rendezvous
    _meetings: Meetings
    _wishes: Wishes
    _node: str | int | None

    def shrink(self, dead_ranks: Sequence[int]) -> Survivors:
        """Go on without some ranks, whether an operation has failed because of them or not.

        Collective among the others, who must name the same ranks. ``rank`` and ``group_size`` change; handles,
        hooks and tensors of the Buffer's memory from before are of no use any more. Experts of the dead ranks are
        lost: :class:`Survivors` renumbers choices. Needs the default process group's store, which ends with the
        process that hosts it (with ``tcp://`` and torchrun that of rank 0, or of the agent); on GPUs also Gloo, as
        the survivors' heaps are mapped through a process group of their own.

        Args:
            dead_ranks: ranks, by their present numbers.

        Raises:
            ArgumentError: not ranks, this rank, or all others.
            BufferStateError: the Buffer was destroyed.
            MismatchError: survivors name other ranks.
            PeerTimeoutError: a survivor does not come within the deadline.
            TokenferryError: as for construction; nodes with unequal numbers of survivors, for example.
        """
        runtime = self.runtime
        if runtime is None:
            raise BufferStateError("the Buffer was destroyed")
        if not self._wishes.has_group:
            raise NotImplementedError("shrink() with an mpi4py communicator")
        dead = sorted({check_int("dead_ranks", rank, minimum=0) for rank in dead_ranks})
        require(all(rank < self.group_size for rank in dead), "dead_ranks", dead, f"ranks below {self.group_size}")
        if self.rank in dead:
            raise ArgumentError("dead_ranks", dead, f"other ranks than this one, {self.rank}")
        ranks = tuple(rank for rank in range(self.group_size) if rank not in dead)
        survivors = Survivors(ranks, self.group_size)
        seconds, found = self._wishes.timeout, self._rendezvous
        meetings = Meetings(found, f"{runtime.key}/shrink", seconds)

        def all_gather(value: Any) -> list[Any]:
            return list(meetings.gather("shrink", value, ranks=ranks).values())

        runtime.destroy()
        self.runtime = None
        rendezvous = Rendezvous(ranks.index(self.rank), len(ranks), all_gather, found.store)
        named = rendezvous.all_gather(dead)
        if any(other != dead for other in named):
            raise MismatchError("shrink", 1, ranks, f"ranks disagree on dead_ranks: {named}")
        self.runtime = construct_runtime(rendezvous, self._wishes, self._node)
        self.rank, self.group_size = rendezvous.rank, rendezvous.num_ranks
        self._rendezvous = rendezvous
        self._meetings = Meetings(rendezvous, self.runtime.key, seconds)
        return survivors
