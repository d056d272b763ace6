"""What moves bytes. One module (or package) per device, the same names in each; no process groups here.

Legend of dims: T tokens of this rank, R ranks, E experts, K choices, M received rows, W bytes of one column.

A *column* is one kind of payload that travels with a token: its hidden row, its scales, its top-k ids, its
weights. Dispatch moves columns as they are, and then makes expert ids local; combine sums columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch

from tokenferry.dtypes import describe_dtype
from tokenferry.handles import DispatchHandle


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
    EXPANDED_DISPATCH = 6
    CACHED_EXPANDED_DISPATCH = 7
    BARRIER = 8


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
    """Checksum of the handle's rank_prefix_matrix; 0 without a handle, or where values are not at hand."""
    num_max_tokens: int = 0
    """Low latency, and dispatches that tell where rows are from: most tokens of a rank."""
    has_weights: int = 0
    """Dispatches that tell where rows are from: whether tokens have weights."""


class ExpertPlan(NamedTuple):
    """What a dispatch that tells where rows are from is to do besides; N = ``num_max_tokens``.

    *Expanded*, a received row has a copy for each of its choices of a local expert. The copies for expert e are the
    rows ``start_e`` to ``end_e`` of the outputs, ordered by (source rank, source token, choice)::

        end_e = start_e + pairs of e,   start_{e + 1} = end_e rounded up to a multiple of the alignment,   start_0 = 0
    """

    num_local: int
    """L, experts of this rank."""
    num_max_tokens: int
    alignment: int
    expand: bool
    num_worst_rows: int = 0
    """Expanded: rows of the outputs if they are fixed (always so with a handle), else 0."""
    zero_padding: bool = False
    """Expanded: whether the rows between ``end_e`` and ``start_{e + 1}`` become zeros."""
    metadata: torch.Tensor | None = None
    """Expanded, with a handle: as in :class:`Outputs`; the copies of row i go where its choices say."""
    expert_ends: torch.Tensor | None = None
    """Expanded, with a handle: int32 [L], ``end_e``."""


def describe_difference(rank: int, signature: Signature, other_rank: int, other: Signature) -> str:
    """Where two signatures differ, or an empty string."""
    for name, mine, theirs in zip(Signature._fields, signature, other, strict=True):
        if mine != theirs:
            shown = f"rank {rank} has {_describe(name, mine)}, rank {other_rank} has {_describe(name, theirs)}"
            return f"ranks disagree on {name}: {shown}"
    return ""


def _describe(name: str, value: int) -> str:
    if name == "operation":
        known = value in OperationKind.__members__.values()
        return OperationKind(value).name.lower() if known else str(value)
    return describe_dtype(value) if name.endswith("dtype") else str(value)


class PartPlan(NamedTuple):
    """A dispatch that is one of several which fill the same outputs. The host waits for no counts."""

    num_rows: int
    """Rows of the outputs, which are there before."""
    starts: torch.Tensor
    """int64 [R]: where the rows of each source rank begin. ``pull`` adds how many came."""
    first_tokens: torch.Tensor
    """int64 [R]: added to the source tokens, for ``recv_src_idx``."""
    expert_ids: range | None
    """Ids of this rank's experts. None: no choices travel."""


class SendPlan(NamedTuple):
    """What a rank brings to a dispatch."""

    rows: torch.Tensor
    """[T, H] of any dtype, contiguous: W bytes each, which nobody looks into."""
    scales: torch.Tensor | None
    """[T, S], likewise."""
    topk_idx: torch.Tensor | None
    """int64 [T, K], contiguous: global expert ids or -1. None: no choices travel."""
    topk_weights: torch.Tensor | None
    """float32 [T, K], contiguous. None exactly where topk_idx is."""
    is_token_in_rank: torch.Tensor
    """bool [T, R]."""
    num_tokens_per_rank: torch.Tensor | None
    """int32 [R]; None with a handle or a part."""
    num_tokens_per_expert: torch.Tensor | None
    """int32 [E]; likewise."""
    num_worst_tokens: int
    """Rows of the outputs if the caller fixed them, else 0."""
    handle: DispatchHandle | None
    """Routes known from an earlier dispatch (cached dispatch), else None."""
    num_sms: int = 0
    """SMs that the operation may use, where there are any; 0: the data plane chooses."""
    experts: ExpertPlan | None = None
    """Not None: the outputs tell where rows are from, and may be expanded. Choices travel then."""
    part: PartPlan | None = None
    """Not None: only the columns and ``recv_src_idx`` of rows that come are written, nothing past them."""
    may_guess: bool = False
    """Whether the outputs may be made before the counts are known, with more rows than come; see ``pull``."""
    zero_unused: bool = False
    """Whether the rows and scales past the last received row become zeros; not of parts, and not expanded."""


class Outputs(NamedTuple):
    """Where received rows go; M' = :attr:`DispatchExchange.num_rows`. All contiguous.

    Expanded, ``rows``, ``scales`` and ``topk_weights`` (then [X, 1]) have X rows, see
    :attr:`DispatchExchange.num_expanded_rows`; only the copies are set (and zeros between them, if so planned). There
    is no ``topk_idx`` then.
    """

    rows: torch.Tensor
    """[M', H] of any dtype, W bytes each; not set past the last received row, unless that is planned."""
    scales: torch.Tensor | None
    """[M', S], likewise."""
    topk_idx: torch.Tensor | None
    """int64 [M', K]: local ids or -1; -1 in rows past the last received."""
    topk_weights: torch.Tensor | None
    """float32 [M', K]: 0 where the id is -1."""
    recv_src_idx: torch.Tensor | None
    """int32 [M']; -1 in rows past the last received. None with a handle, or where a part's are known."""
    metadata: torch.Tensor | None = None
    """int32 [M', K + 2]: ``source rank * N + source token``; ``source rank * K + first choice of a local expert``;
    for each choice the expanded row of its copy, or -1. All -1 in rows past the last received. None with a handle."""


class DispatchExchange(Protocol):
    """A dispatch in progress: all ranks have agreed, rows have not moved yet.

    The tensors are for the new handle, and there once ``pull`` was called. With a handle they are not read, and may
    be its own.
    """

    num_rows: int
    """Rows that the outputs must have: those of the handle, else num_worst_tokens, else as many as are received, or
    a guess of that until ``pull``."""
    num_received_per_expert: list[int]
    """(token, choice) pairs for each local expert; empty with a handle or with num_worst_tokens, or until ``pull``
    where ``num_rows`` is a guess."""
    rank_prefix_matrix: torch.Tensor
    """int32 [R, R], inclusive down the source axis."""
    channel_prefix_matrix: torch.Tensor
    """int32 [R, 1]; rows that this rank sends to each rank."""
    recv_channel_prefix_matrix: torch.Tensor
    """int32 [R, 1]; zeros."""
    send_head: torch.Tensor
    """int32 [T, R]; position of a token among those for the rank, or -1."""
    num_expanded_rows: int
    """Expanded: rows that the outputs must have, a multiple of the alignment where it is no guess. Else 0."""
    rank_ends: torch.Tensor
    """int32 [R]: rows received from ranks 0 to r. Only with ``plan.experts``, and without a handle."""
    num_pairs: torch.Tensor
    """int32 [L]: (token, choice) pairs of each local expert. Likewise."""
    expert_ends: torch.Tensor
    """int32 [L]: expanded, ``end_e``; else the running sum of pairs rounded up to the alignment. Likewise."""

    def pull(self, outputs: Outputs) -> bool:
        """Fill the outputs.

        Returns:
            True. With ``plan.may_guess`` False if more rows come than the outputs have: nothing was filled, and it is
            to be called again, with outputs of ``num_rows`` and ``num_expanded_rows`` rows, no guesses any more.
        """


class HeldRows(NamedTuple):
    """Which rows of the columns are summed, where not all are: rows ``starts[s]`` to ``ends[s] - 1`` of source s."""

    starts: torch.Tensor
    """int64 [R]."""
    ends: torch.Tensor
    """int64 [R]."""
    first_tokens: torch.Tensor
    """int64 [R]."""
    tokens: torch.Tensor
    """int32 [M]: row i of source s belongs to token ``tokens[i] - first_tokens[s]``; ascending from start to end."""


class ReducePlan(NamedTuple):
    """What a rank brings to a combine. Rows of x are ordered by (source rank, source token)."""

    columns: Sequence[torch.Tensor]
    """[at least M, width], contiguous, floating: the rows (expanded: their copies, any number), then the weights."""
    biases: Sequence[torch.Tensor]
    """[T, width of column 0]; added to column 0 before any row."""
    handle: DispatchHandle
    """Of the dispatch that brought the rows."""
    num_sms: int = 0
    """As in :class:`SendPlan`."""
    metadata: torch.Tensor | None = None
    """Expanded: as in :class:`Outputs`. What a row sends is the sum of its copies, choices ascending, in float32
    (float64 for such)."""
    sum_dtype: torch.dtype | None = None
    """Expanded: dtype of these sums on their way: that of the column, or a wider one."""
    held: HeldRows | None = None
    """Not None: only these rows; of the handle only the membership counts."""


class Part(NamedTuple):
    """Rows to be summed: row i belongs to token ``tokens[i]``, ascending; None: to token i."""

    tokens: torch.Tensor | None
    rows: torch.Tensor


class ScaleFormat(IntEnum):
    """How rows travel in a low-latency dispatch; formulas: :mod:`tokenferry.dataplane.cpu.fp8`."""

    NONE = 0
    """As they are."""
    PLAIN = 1
    """FP8, float32 scales."""
    ROUNDED = 2
    """FP8, float32 scales that are powers of two."""
    UE8M0 = 3
    """FP8, the exponents of such scales, four in an int32."""


class Relays(NamedTuple):
    """Between nodes: what a rank sends inside its node are the tokens of all ranks of its rail, N of each.

    The tables of a plan are those of all R ranks then, and source tokens are theirs.
    """

    order: Sequence[tuple[int, int]]
    """[R]: which rank of the node relays a source rank, as which of its G sources."""
    num_max_tokens: int
    """N, of a source rank. That of the plan is G * N."""
    node: int
    """The node of this rank."""


class LowLatencyDispatchPlan(NamedTuple):
    """What a rank brings to a low-latency dispatch, and where the result goes. N rows of a source fit a slab."""

    topk_idx: torch.Tensor
    """int64 [T, K], global expert ids or -1."""
    x: torch.Tensor
    """bfloat16 [T, H], contiguous."""
    scale_format: ScaleFormat
    first_expert: int
    num_local_experts: int
    num_max_tokens: int
    """N."""
    recv_x: torch.Tensor
    """[L, R * N, H], contiguous."""
    recv_scales: torch.Tensor | None
    """[L, R * N, S], the transpose of contiguous [L, S, R * N]."""
    recv_src_info: torch.Tensor
    """int32 [L, R * N], from :meth:`DataPlane.low_latency_tables`."""
    layout_range: torch.Tensor
    """int64 [L, R]: (begin << 32) | count."""
    recv_count: torch.Tensor
    """int32 [L]."""
    recv_stats: torch.Tensor | None
    """int32 [L], added to."""
    wait_stats: torch.Tensor | None
    """int64 [R], added to: nanoseconds; on CPU ranks at least 1 for each other rank that took part."""
    receives_now: bool
    """Whether ``finish`` is called at once."""
    relays: Relays | None = None


class LowLatencyCombinePlan(NamedTuple):
    """What a rank brings to a low-latency combine, and where the result goes."""

    x: torch.Tensor
    """bfloat16 [L, R * N, H], contiguous."""
    src_info: torch.Tensor
    """int32 [L, R * N], of the dispatch."""
    layout_range: torch.Tensor
    """int64 [L, R]: (begin << 32) | count."""
    first_expert: int
    num_experts: int
    topk_idx: torch.Tensor
    """int64 [T, K]."""
    topk_weights: torch.Tensor
    """float32 [T, K]."""
    out: torch.Tensor
    """bfloat16 [T, H], contiguous."""
    wait_stats: torch.Tensor | None
    """int64 [R], added to: nanoseconds; on CPU ranks at least 1 for each other rank that took part."""
    receives_now: bool
    """As in :class:`LowLatencyDispatchPlan`."""
    relays: Relays | None = None


class Pending(Protocol):
    """A low-latency operation that has been sent."""

    def written(self) -> Sequence[torch.Tensor | None]:
        """What a receive on the device is still to write."""

    def finish(self) -> None:
        """Receive: when this returns (or the device gets there) the outputs are written."""


class DataPlane(Protocol):
    """The operations of one device, over the heap it was made with."""

    values_at_hand: bool
    """Whether reading a tensor's values costs the host nothing. Modes check values only then; elsewhere the data
    plane finds bad values itself, and raises at the next point where the host waits."""

    least_part_bytes: int
    """Bytes that the ranks of a node should pull in a part of an operation: a further part costs as much time."""

    @property
    def epoch(self) -> int:
        """Number of the last operation; 0 where the host does not count them."""

    def layout(self, topk_idx: torch.Tensor, num_experts: int, num_ranks: int, *, expands: bool = False) -> Layout:
        """Counts and membership of int64 [T, K] expert ids (-1: no choice) among R ranks. No communication.

        ``expands``: for a dispatch to expanded rows, whose plan has ``num_tokens_per_expert`` itself, not a copy.
        """

    def dispatch(self, signature: Signature, plan: SendPlan) -> AbstractContextManager[DispatchExchange]:
        """Publish the rows and agree on the counts; the caller allocates and calls ``pull`` inside."""

    def dispatch_along(self, signature: Signature, plan: SendPlan, outputs: Outputs) -> None:
        """Fill the outputs by a dispatch of nothing but rows along ``plan.handle``, which says how many come."""

    def pull_reduce(self, signature: Signature, plan: ReducePlan, outs: Sequence[torch.Tensor]) -> None:
        """Publish the rows and write, for every column, the sums over ranks, [T, width].

        Accumulation is in float32 (float64 for float64 columns), biases first, then ranks ascending,
        with one rounding at the end.
        """

    def sum_rows(
        self, parts: Sequence[Part], biases: Sequence[torch.Tensor], out: torch.Tensor, num_sms: int = 0
    ) -> None:
        """Write sums of local rows, [T, width]: biases first, then parts in their order, rounded once.

        Accumulation is as in :meth:`pull_reduce`. No communication.
        """

    def clear_unused(self, outputs: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        """Zero the rows of a worst case past the last one. No communication.

        Args:
            outputs: [M, width] each, contiguous, rows of a multiple of 4 bytes.
            places: int32 [M], of any stride; negative past the last row, and nowhere else.
        """

    def check(self) -> None:
        """Raise if operations cannot run: the Buffer is destroyed, or an operation failed."""

    def postpone_input_errors(self, postponed: bool) -> None:
        """Whether what is reported later than it happened, and is a caller's fault, waits for a later check.

        Between nodes, where an operation that has begun cannot be left any more.
        """

    def bad_input(self) -> torch.Tensor | None:
        """int64 [1] on the device, not 0 if ids that it counted are out of range; None where ids are looked at."""

    def forgive(self) -> None:
        """Forget bad input, which is being raised."""

    def has_room(self, row_bytes: int) -> bool:
        """Whether rows of so many bytes can be staged, one at a time at least."""

    def give_up(self, reason: str) -> None:
        """No operation runs here any more; ranks that wait for this one are told why."""

    def warm(self, plans: Sequence[SendPlan], reduces: Sequence[Sequence[torch.Tensor]], num_experts: int) -> None:
        """Make ready for dispatches of such plans, and combines of such columns: what takes long the first time.

        Only dtypes and widths count, not the number of rows.
        """

    def low_latency_tables(
        self, num_ranks: int, num_local_experts: int, num_max_tokens: int, num_topk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unset tensors for a low-latency dispatch of K choices a token, and its combines.

        Returns:
            int32 [L, R * N] for the source tokens, int64 [L, R] for the ranges, int32 [L] for the counts.
        """

    def warm_low_latency(
        self, scale_format: ScaleFormat, num_max_tokens: int, hidden: int, num_topk: int, num_local_experts: int,
        relays: Relays | None,
    ) -> None:  # fmt: skip
        """Make ready for low-latency operations of such plans: what takes long the first time."""

    def advance(self) -> None:
        """Finish those low-latency operations that wait for nothing: ranks may wait for what this one still reads."""

    def low_latency_dispatch(self, signature: Signature, plan: LowLatencyDispatchPlan) -> Pending:
        """Send each token once to every rank that holds one of its experts; the rest happens in ``finish``.

        Slab rows are ordered by (source rank, source token, choice). Ranks that are masked count as without tokens.
        """

    def low_latency_combine(self, signature: Signature, plan: LowLatencyCombinePlan) -> Pending:
        """Send the rows of the slabs home; ``finish`` writes the weighted sums.

        ``out[t] = sum over k, ascending, of topk_weights[t, k] * row of (t, topk_idx[t, k])`` in float32, -1 and
        experts of masked ranks skipped, rounded once. A data plane may sum the choices of each rank first, round
        these sums, and add them by rank, ascending.
        """

    def set_masked(self, rank: int, masked: bool) -> None:
        """Go on without a rank in low-latency operations, or with it again."""

    def write_mask(self, status: torch.Tensor) -> None:
        """Write 1 for the ranks that low-latency operations go on without, 0 for the others, into int32 [R]."""

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised output tensor [num_rows, width]."""

    @property
    def empty_strided(self) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]:
        """What makes an uninitialised output tensor of a shape, strides and a dtype."""
