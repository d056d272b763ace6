"""What dispatch leaves behind for combine and for cached dispatch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import torch

from tokenferry.kept import make


class DispatchHandle(NamedTuple):
    """The handle of a dispatch inside a node: six tensors, never mutated, usable any number of times.

    R ranks, T tokens of this rank, M received rows (``num_worst_tokens`` rows in worst-case mode).
    The two channel matrices are those of DeepEP for a single channel: placement does not depend on
    ``num_sms`` here. A plain tuple of the same six tensors is accepted wherever a handle is.
    """

    rank_prefix_matrix: torch.Tensor
    """int32 [R, R]; [i][j] = rows that source ranks 0..i send to rank j. The same on all ranks."""
    channel_prefix_matrix: torch.Tensor
    """int32 [R, 1]; rows that this rank sends to each rank."""
    recv_channel_prefix_matrix: torch.Tensor
    """int32 [R, 1]; zeros: rows from each source before its first channel."""
    recv_src_idx: torch.Tensor
    """int32 [M]; source token index of each received row, -1 in rows past the last."""
    is_token_in_rank: torch.Tensor
    """bool [T, R]; the caller's membership tensor."""
    send_head: torch.Tensor
    """int32 [T, R]; position of the token among those this rank sends to the rank, or -1."""

    @property
    def num_rows(self) -> int:
        """M."""
        return self.recv_src_idx.size(0)

    @property
    def places(self) -> torch.Tensor:
        """int32 [M]; negative in rows past the last received one, and nowhere else."""
        return self.recv_src_idx


class OperatorHandle(DispatchHandle):
    """A handle as operators have it: a dispatch along it zeroes the rows past the last received one."""

    __slots__ = ()


class OperatorRows(int):
    """``num_worst_tokens`` as operators have it: rows that nothing arrives in are zeroed, inside a node."""

    __slots__ = ()


class InternodeHandle(NamedTuple):
    """The handle of a dispatch between nodes: ten tensors, never mutated, usable any number of times.

    R ranks on G nodes, L on each, T tokens of this rank, M received rows (``num_worst_tokens`` rows in worst-case
    mode), B rows that this rank relays to the ranks of its node: those that its rail brings, its own among them.
    They are ordered by (source node, source token). The elements are those of DeepEP for a single channel.
    """

    is_token_in_rank: torch.Tensor
    """bool [T, R]; the caller's membership tensor."""
    rdma_channel_prefix_matrix: torch.Tensor
    """int32 [G, 1]; tokens that this rank sends to each node."""
    gbl_channel_prefix_matrix: torch.Tensor
    """int32 [R, 1]; tokens that this rank sends to each rank."""
    recv_rdma_channel_prefix_matrix: torch.Tensor
    """int32 [G, 1]; rows that this rank relays from each node."""
    recv_rdma_rank_prefix_sum: torch.Tensor
    """int32 [G]; their inclusive sums."""
    recv_gbl_channel_prefix_matrix: torch.Tensor
    """int32 [R, 1]; first received row of each source rank."""
    recv_gbl_rank_prefix_sum: torch.Tensor
    """int32 [R]; inclusive sums of the rows received from the source ranks."""
    recv_src_meta: torch.Tensor
    """uint8 [M, 8]: int32 source node and int32 place of each received row: for the own node its source token, else
    its place among the rows that its relay got from that node. -1 in rows past the last."""
    send_rdma_head: torch.Tensor
    """int32 [T, G]; position of the token among those this rank sends to the node, or -1."""
    send_nvl_head: torch.Tensor
    """int32 [B, L]; position of the row among those of its source node that this rank relays to the rank, or -1."""

    @property
    def num_rows(self) -> int:
        """M."""
        return self.recv_src_meta.size(0)

    @property
    def places(self) -> torch.Tensor:
        """int32 [M], of stride 2; negative in rows past the last received one, and nowhere else."""
        return self.recv_src_meta.view(torch.int32)[:, 1]


Handle: TypeAlias = DispatchHandle | InternodeHandle


def make_handle(tensors: Iterable[torch.Tensor]) -> Handle:
    """The handle that these tensors were."""
    elements = tuple(tensors)
    if len(elements) == len(DispatchHandle._fields):
        return make(DispatchHandle, elements)
    return InternodeHandle._make(elements)


class EPHandle:
    """What :meth:`tokenferry.ElasticBuffer.dispatch` leaves behind: plain attributes, which callers may change.

    Combine reads ``do_expand``, ``num_sms``, ``routes`` and, of an expanded dispatch, the copies in
    ``recv_src_metadata``; a cached dispatch also the sizes, ``topk_idx`` and ``psum_num_recv_tokens_per_expert``. The
    rest is for callers.

    T tokens of this rank, K choices, R ranks, L local experts, M rows of a dispatch that is not expanded
    (``num_recv_tokens``), X expanded rows (``num_expanded_tokens``), N ``num_max_tokens_per_rank``.

    Attributes:
        do_expand: whether rows are expanded: one for each (token, choice), expert by expert.
        num_experts: experts of all ranks.
        expert_alignment: see ``psum_num_recv_tokens_per_expert``.
        num_max_tokens_per_rank: N.
        num_sms: SMs that the dispatch could use.
        topk_idx: int64 [T, K], what was dispatched; a copy, unless ``do_handle_copy`` was False.
        num_recv_tokens: M: the tokens received or, of a dispatch without CPU sync, R N.
        num_expanded_tokens: X; 0 if not expanded.
        num_recv_tokens_per_expert_list: for each local expert the number of its (token, choice) pairs, rounded up to
            the alignment; empty after a dispatch without CPU sync.
        psum_num_recv_tokens_per_scaleup_rank: int32 [R]: tokens received from ranks 0 to r. The last is the number
            of all.
        psum_num_recv_tokens_per_expert: int32 [L]: pairs of experts 0 to e, each rounded up to the alignment;
            expanded, the row after the last of expert e: its rows begin where the last of e - 1, rounded up, ends.
        num_unaligned_recv_tokens_per_expert: int32 [L]: pairs of each expert.
        recv_src_metadata: int32 [M, K + 2]: ``source rank * N + source token``; ``source rank * K + first choice of
            a local expert``; then for each choice the expanded row of its copy, or -1. All -1 past the last token.
        token_metadata_at_forward: None.
        channel_linked_list: None.
        routes: who had what: the tensors of an intranode dispatch.
    """

    def __init__(
        self,
        *,
        do_expand: bool,
        num_experts: int,
        expert_alignment: int,
        num_max_tokens_per_rank: int,
        num_sms: int,
        topk_idx: torch.Tensor,
        num_recv_tokens: int,
        num_expanded_tokens: int,
        num_recv_tokens_per_expert_list: list[int],
        psum_num_recv_tokens_per_scaleup_rank: torch.Tensor,
        psum_num_recv_tokens_per_expert: torch.Tensor,
        num_unaligned_recv_tokens_per_expert: torch.Tensor,
        recv_src_metadata: torch.Tensor,
        routes: DispatchHandle,
    ) -> None:
        self.do_expand = do_expand
        self.num_experts = num_experts
        self.expert_alignment = expert_alignment
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.num_sms = num_sms
        self.topk_idx = topk_idx
        self.num_recv_tokens = num_recv_tokens
        self.num_expanded_tokens = num_expanded_tokens
        self.num_recv_tokens_per_expert_list = num_recv_tokens_per_expert_list
        self.psum_num_recv_tokens_per_scaleup_rank = psum_num_recv_tokens_per_scaleup_rank
        self.psum_num_recv_tokens_per_expert = psum_num_recv_tokens_per_expert
        self.num_unaligned_recv_tokens_per_expert = num_unaligned_recv_tokens_per_expert
        self.recv_src_metadata = recv_src_metadata
        self.token_metadata_at_forward: torch.Tensor | None = None
        self.channel_linked_list: torch.Tensor | None = None
        self.routes = routes
        self._dst_buffer_slot_idx: torch.Tensor | None = None

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """What an operation reads of it, or has made."""
        return (
            self.topk_idx,
            self.psum_num_recv_tokens_per_scaleup_rank,
            self.psum_num_recv_tokens_per_expert,
            self.num_unaligned_recv_tokens_per_expert,
            self.recv_src_metadata,
            *self.routes,
        )

    @property
    def dst_buffer_slot_idx(self) -> torch.Tensor | None:
        """int32 [T, K]: rank of the choice * N + position among the tokens that go there, or -1. Made when read."""
        if self._dst_buffer_slot_idx is None:
            per_rank = self.num_experts // self.routes.is_token_in_rank.size(1)
            owner = self.topk_idx.div(per_rank, rounding_mode="floor")
            position = self.routes.send_head.gather(1, owner.clamp(min=0))
            slots = position + owner * self.num_max_tokens_per_rank
            self._dst_buffer_slot_idx = slots.masked_fill(self.topk_idx < 0, -1).to(torch.int32)
        return self._dst_buffer_slot_idx

    @dst_buffer_slot_idx.setter
    def dst_buffer_slot_idx(self, value: torch.Tensor | None) -> None:
        self._dst_buffer_slot_idx = value
