"""What a relay must know of the rows that it gets, beside the rows: one block of bytes from each source.

    ids [rows, K] | weights [rows, K] | choices for each expert of the node [E / G] | members [rows, L]

Each section begins on 16 bytes. Without choices the first two are not there. So one message goes to each node, not
one for each of them.

Legend of dims: T tokens of this rank, K choices, E experts, R ranks on G nodes, L on each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch

from tokenferry.config import align_up
from tokenferry.modes.inputs import Inputs
from tokenferry.modes.nodes import Operation
from tokenferry.modes.routes import index_of
from tokenferry.modes.shares import Offer
from tokenferry.rail import Transfer
from tokenferry.topology import Topology

_ALIGNMENT = 16
"""Bytes: what kernels read."""


class Relayed(NamedTuple):
    """What a relay knows of the rows of one source."""

    topk_idx: torch.Tensor | None
    """int64 [rows, K]."""
    topk_weights: torch.Tensor | None
    """float32 [rows, K]."""
    num_per_expert: torch.Tensor
    """int32 [E / G]: choices of the experts of this node, rank by rank."""
    members: torch.Tensor
    """bool [rows, L]; on their way uint8."""


class Choices:
    """The choices of a dispatch, told to the relays; and what this rank learns as a relay.

    Args:
        topology: who is where.
        given: what this rank dispatches.
        tokens: [G]: int64, the tokens that go to each node.
    """

    def __init__(self, topology: Topology, given: Inputs, tokens: Sequence[torch.Tensor]) -> None:
        self._topology = topology
        self._given = given
        self._packed = {node: self._pack(node, of) for node, of in enumerate(tokens) if node != topology.node}
        self._received: dict[int, tuple[torch.Tensor, Relayed]] = {}
        self._transfer: Transfer | None = None

    def post(self, operation: Operation, offers: Mapping[int, Offer]) -> None:
        """Begin to tell the nodes that take part, by their offers, and to learn theirs."""
        self._received = {node: self._block(offer.num_rows) for node, offer in offers.items()}
        sends = {node: [self._packed[node]] for node in offers}
        self._transfer = operation.post(sends, {node: [block] for node, (block, _) in self._received.items()})

    def wait(self) -> list[Relayed]:
        """What this rank relays, [G]; of its own node: what its own tokens have. The host waits."""
        assert self._transfer is not None
        for node in self._received:
            self._transfer.wait(node)
        self._transfer.finish()
        return [self._relayed(node) for node in range(self._topology.num_nodes)]

    def _relayed(self, node: int) -> Relayed:
        given = self._given
        if node == self._topology.node:
            members = given.is_token_in_rank[:, index_of(self._topology.local_ranks)].contiguous()
            return Relayed(given.topk_idx, given.topk_weights, self._per_expert(node), members)
        _, found = self._received[node] if node in self._received else self._block(0)
        return found._replace(members=found.members != 0)  # whatever bytes came

    def _per_expert(self, node: int) -> torch.Tensor:
        per_rank = self._given.num_tokens_per_expert.view(self._topology.num_ranks, -1)
        return per_rank[index_of(self._topology.ranks_of_node(node))].reshape(-1)

    def _pack(self, node: int, tokens: torch.Tensor) -> torch.Tensor:
        given, (block, to) = self._given, self._block(len(tokens))
        for source, section in ((given.topk_idx, to.topk_idx), (given.topk_weights, to.topk_weights)):
            if source is not None and section is not None:
                torch.index_select(source, 0, tokens, out=section)
        to.num_per_expert.copy_(self._per_expert(node))
        ranks = index_of(self._topology.ranks_of_node(node))
        to.members.copy_(given.is_token_in_rank.index_select(0, tokens)[:, ranks])
        return block

    def _block(self, num_rows: int) -> tuple[torch.Tensor, Relayed]:
        """The block of so many rows, and its sections; unset, of no rows what a source has that sends none."""
        given, topology = self._given, self._topology
        topk = 0 if given.topk_idx is None else given.topk_idx.size(1)
        shapes = (
            (torch.int64, num_rows, topk),
            (torch.float32, num_rows, topk),
            (torch.int32, 1, given.num_experts // topology.num_nodes),
            (torch.uint8, num_rows, len(topology.local_ranks)),
        )
        sizes = [dtype.itemsize * rows * columns for dtype, rows, columns in shapes]
        ends = list(accumulate(align_up(size, _ALIGNMENT) for size in sizes))
        make = torch.empty if num_rows else torch.zeros
        block = make(ends[-1], dtype=torch.uint8, device=given.is_token_in_rank.device)
        ids, weights, per_expert, members = (
            block[start : start + size].view(dtype).view(rows, columns)
            for start, size, (dtype, rows, columns) in zip([0, *ends], sizes, shapes, strict=False)
        )
        has_choices = given.topk_idx is not None
        sections = ids if has_choices else None, weights if has_choices else None, per_expert[0], members
        return block, Relayed(*sections)
