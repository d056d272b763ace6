"""What dispatch leaves behind for combine and for cached dispatch."""

from __future__ import annotations

from typing import NamedTuple

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
