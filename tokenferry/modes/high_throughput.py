"""Dispatch and combine of high throughput, inside a node or between nodes: whichever way the ranks are."""

from __future__ import annotations

import functools

import torch

from tokenferry.config import Config, combine_preset, dispatch_preset
from tokenferry.dataplane import Layout
from tokenferry.modes import internode, intranode
from tokenferry.modes.chunks import Chunking, chunking_of
from tokenferry.modes.inputs import Inputs, Party
from tokenferry.modes.intranode import Received


class HighThroughput:
    """The operations of one rank.

    Args:
        party: who takes part.
        config: of the caller; None: the preset of dispatch.
    """

    __slots__ = ("config", "party")

    def __init__(self, party: Party, config: Config | None) -> None:
        self.party = party
        self.config = config

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> tuple[Layout, torch.Tensor | None]:
        """Counts and membership, and tokens for each node, int32 [G]: None inside a node."""
        found = intranode.layout(self.party, topk_idx, num_experts)
        return found, self.tokens_per_node(found.is_token_in_rank)

    def tokens_per_node(self, is_token_in_rank: torch.Tensor) -> torch.Tensor | None:
        """int32 [G], from bool [T, R]; None inside a node."""
        return None if self.party.nodes is None else internode.tokens_per_node(self.party, is_token_in_rank)

    def dispatch(self, given: Inputs, num_tokens_per_rdma_rank: object) -> Received:
        """Dispatch with fresh counts; see :meth:`tokenferry.Buffer.dispatch`."""
        if self.party.nodes is None:
            return intranode.dispatch(self.party, given)
        return internode.dispatch(self.party, given, num_tokens_per_rdma_rank, self._chunking)

    def cached_dispatch(self, x: object, handle: tuple[torch.Tensor, ...]) -> Received:
        """Dispatch rows along a handle; see :meth:`tokenferry.Buffer.dispatch`."""
        if self.party.nodes is None:
            return intranode.cached_dispatch(self.party, x, handle)
        return internode.cached_dispatch(self.party, x, handle, self._chunking)

    def combine(
        self, x: torch.Tensor, handle: tuple[torch.Tensor, ...], topk_weights: torch.Tensor | None, bias: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Sum the rows of every token; see :meth:`tokenferry.Buffer.combine`."""
        if self.party.nodes is None:
            return intranode.combine(self.party, x, handle, topk_weights, bias)
        return internode.combine(self.party, x, handle, topk_weights, bias, self._chunking)

    def warm(
        self,
        hidden: int,
        num_topk: int,
        num_experts: int,
        dtype: torch.dtype,
        scale_bytes: int,
        combine_dtype: torch.dtype | None,
    ) -> None:
        """Make ready for such operations; see :meth:`tokenferry.Buffer.warmup`."""
        mode = intranode if self.party.nodes is None else internode
        mode.warm(self.party, hidden, num_topk, num_experts, dtype, scale_bytes, combine_dtype)

    @property
    def _chunking(self) -> Chunking:
        """How rows between nodes are cut: as the caller's own ``Config`` says, else so that chunks are worth it."""
        party = self.party
        return _chunking_of(self.config, party.num_ranks, party.num_sms, party.plane.least_part_bytes)


@functools.lru_cache(maxsize=256)
def _chunking_of(config: Config | None, num_ranks: int, num_sms: int, least_bytes: int) -> Chunking:
    presets = [preset(num_ranks, num_sms) for preset in (dispatch_preset, combine_preset)]
    if config is None or config in presets:
        return chunking_of(config or presets[0], least_bytes)
    return chunking_of(config, 0)
