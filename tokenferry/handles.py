"""What dispatch leaves behind for combine and for cached dispatch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

import torch


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
    def unused(self) -> torch.Tensor:
        """Bool [M]: rows past the last received one."""
        return self.recv_src_idx < 0


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
    def unused(self) -> torch.Tensor:
        """Bool [M]: rows past the last received one."""
        return self.recv_src_meta.view(torch.int32)[:, 1] < 0


Handle: TypeAlias = DispatchHandle | InternodeHandle


def make_handle(tensors: Iterable[torch.Tensor]) -> Handle:
    """The handle that these tensors were."""
    elements = tuple(tensors)
    kind = DispatchHandle if len(elements) == len(DispatchHandle._fields) else InternodeHandle
    return kind._make(elements)
