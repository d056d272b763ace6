"""What moves bytes. One module (or package) per device, the same names in each; no process groups here.

Legend of dims: T tokens of this rank, R ranks, E experts, K choices, M received rows, W bytes of one column.

A *column* is one kind of payload that travels with a token: its hidden row, its scales, its top-k ids, its
weights. Dispatch moves columns as opaque bytes; combine sums them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch


class Layout(NamedTuple):
    """Result of :meth:`DataPlane.layout`."""

    num_tokens_per_rank: torch.Tensor
    """int32 [R]."""
    num_tokens_per_expert: torch.Tensor
    """int32 [E]."""
    is_token_in_rank: torch.Tensor
    """bool [T, R]."""


class OperationKind(IntEnum):
    """What ranks call together; part of the signature by which they find out that they do not."""

    DISPATCH = 1
    CACHED_DISPATCH = 2
    COMBINE = 3
    LOW_LATENCY_DISPATCH = 4
    LOW_LATENCY_COMBINE = 5


class Signature(NamedTuple):
    """What all ranks must agree on before an operation moves a byte."""

    operation: int
    dtype: int
    row_bytes: int
    num_topk: int
    num_experts: int
    scale_bytes: int
    scale_dtype: int
    handle: int
    """Checksum of the handle's rank_prefix_matrix; 0 without a handle."""
    num_max_tokens: int = 0
    """Low latency: most tokens of a rank."""


class SendPlan(NamedTuple):
    """What a rank brings to a dispatch."""

    columns: Sequence[torch.Tensor]
    """uint8 [T, W], contiguous: the rows, then the other payloads."""
    is_token_in_rank: torch.Tensor
    """bool [T, R]."""
    num_tokens_per_expert: torch.Tensor
    """int32 [E]; [0] if the counts are known from a handle."""
    num_worst_tokens: int
    """Rows of the outputs if the caller fixed them, else 0."""


class DispatchExchange(Protocol):
    """A dispatch in progress: all ranks have agreed, rows have not moved yet."""

    rank_prefix_matrix: torch.Tensor
    """int32 [R, R], inclusive down the source axis."""
    num_received_per_expert: list[int]
    """(token, choice) pairs for each local expert; empty if num_tokens_per_expert was."""
    send_head: torch.Tensor
    """int32 [T, R]; position of a token among those for the rank, or -1."""

    def pull(self, columns: Sequence[torch.Tensor], recv_src_idx: torch.Tensor) -> None:
        """Fill the outputs: uint8 [M, W] for every column, and int32 [M]."""


class ReducePlan(NamedTuple):
    """What a rank brings to a combine. Rows of x are ordered by (source rank, source token)."""

    columns: Sequence[torch.Tensor]
    """[at least M, width], contiguous, floating: the rows, then the weights."""
    biases: Sequence[torch.Tensor]
    """[T, width of column 0]; added to column 0 before any row."""
    rank_prefix_matrix: torch.Tensor
    """int32 [R, R]."""
    recv_src_idx: torch.Tensor
    """int32 [at least M]."""
    is_token_in_rank: torch.Tensor
    """bool [T, R]."""


class LowLatencyDispatchPlan(NamedTuple):
    """What a rank brings to a low-latency dispatch, and where the result goes. N rows of a source fit a slab."""

    topk_idx: torch.Tensor
    """int64 [T, K], global expert ids or -1."""
    columns: Sequence[torch.Tensor]
    """[T, width], contiguous: the rows, then their scales if there are any."""
    first_expert: int
    num_local_experts: int
    recv_columns: Sequence[torch.Tensor]
    """[L, R * N, width] for every column, of any strides."""
    recv_src_info: torch.Tensor
    """int32 [L, R * N]."""
    layout_range: torch.Tensor
    """int64 [L, R]: (begin << 32) | count."""
    recv_count: torch.Tensor
    """int32 [L]."""
    recv_stats: torch.Tensor | None
    """int32 [L], added to."""
    wait_stats: torch.Tensor | None
    """int64 [R], added to."""


class LowLatencyCombinePlan(NamedTuple):
    """What a rank brings to a low-latency combine, and where the result goes."""

    x: torch.Tensor
    """[L, R * N, H], contiguous."""
    src_info: torch.Tensor
    """int32 [L, R * N]."""
    layout_range: torch.Tensor
    """int64 [L, R]: (begin << 32) | count."""
    first_expert: int
    num_experts: int
    topk_idx: torch.Tensor
    """int64 [T, K]."""
    topk_weights: torch.Tensor
    """float32 [T, K]."""
    out: torch.Tensor
    """[T, H]."""
    wait_stats: torch.Tensor | None
    """int64 [R], added to."""


class Pending(Protocol):
    """A low-latency operation that has been sent."""

    def finish(self) -> None:
        """Receive: when this returns (or the device gets there) the outputs are written."""


class DataPlane(Protocol):
    """The operations of one device, over the heap it was made with."""

    def layout(self, topk_idx: torch.Tensor, num_experts: int) -> Layout:
        """Counts and membership of int64 [T, K] expert ids (-1: no choice). No communication."""

    def dispatch(self, signature: Signature, plan: SendPlan) -> AbstractContextManager[DispatchExchange]:
        """Publish the rows and agree on the counts; the caller allocates and calls ``pull`` inside."""

    def pull_reduce(self, signature: Signature, plan: ReducePlan, outs: Sequence[torch.Tensor]) -> None:
        """Publish the rows and write, for every column, the sums over ranks, [T, width].

        Accumulation is in float32 (float64 for float64 columns), biases first, then ranks ascending,
        with one rounding at the end.
        """

    def quantise(self, x: torch.Tensor, scale_format: str) -> tuple[torch.Tensor, torch.Tensor]:
        """FP8 rows and scales of [T, H]; ``scale_format`` is "plain", "rounded" or "ue8m0"."""

    def low_latency_dispatch(self, signature: Signature, plan: LowLatencyDispatchPlan) -> Pending:
        """Send each token once to every rank that holds one of its experts; the rest happens in ``finish``.

        Slab rows are ordered by (source rank, source token, choice). Ranks that are masked count as without tokens.
        """

    def low_latency_combine(self, signature: Signature, plan: LowLatencyCombinePlan) -> Pending:
        """Send every row of the slabs home; ``finish`` writes the weighted sums.

        ``out[t] = sum over k, ascending, of topk_weights[t, k] * row of (t, topk_idx[t, k])`` in float32, -1 and
        experts of masked ranks skipped, rounded once.
        """

    def set_masked(self, rank: int, masked: bool) -> None:
        """Go on without a rank in low-latency operations, or with it again."""

    def masked(self) -> frozenset[int]:
        """The ranks that low-latency operations go on without."""

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised output tensor [num_rows, width]."""

    def localise(
        self, topk_idx: torch.Tensor, topk_weights: torch.Tensor, first_expert: int, num_local_experts: int
    ) -> None:
        """Turn global expert ids into local ones in place: -1, with weight 0, where the expert is not local."""
