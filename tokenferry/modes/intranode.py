"""Dispatch and combine inside a node: check the arguments, agree on the counts, allocate, pull.

Values of tensors are checked only where the data plane has them at hand; shapes and the like always.

Formulas: row of token t of source s on rank r = ``rank_prefix_matrix[s - 1][r] + #{t' < t going to r}``;
``y[t] = bias_0[t] + bias_1[t] + sum over ranks r that have t, ascending, of x_r[row of (me, t) on r]``.

Legend of dims: T tokens of this rank, H elements of a row, K choices, S scale columns, E experts, L = E / R local
experts, R ranks, M received rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from tokenferry.config import align_all
from tokenferry.dataplane import DispatchExchange, Layout, OperationKind, Outputs, ReducePlan, SendPlan, Signature
from tokenferry.dataplane.tensors import piece_of
from tokenferry.dtypes import dtype_code
from tokenferry.errors import ArgumentError
from tokenferry.handles import DispatchHandle, Handle, OperatorHandle, OperatorRows
from tokenferry.kept import Alike, Kept, Kind, make, row_kind_of
from tokenferry.modes.inputs import (
    COMBINE_DTYPES,
    Inputs,
    Party,
    Rows,
    are_packed,
    check_biases,
    check_columns,
    check_num_experts,
    check_rows,
    check_topk_idx,
    kinds_of_rows,
    packed,
    topk_idx_t,
)
from tokenferry.validation import check_int, check_tensor, describe, require

_HANDLE_NAMES = tuple(f"handle.{name}" for name in DispatchHandle._fields)
_HANDLE_DTYPES = (*[(torch.int32,)] * 4, (torch.bool,), (torch.int32,))


class Received(NamedTuple):
    """What dispatch hands out; see :meth:`tokenferry.Buffer.dispatch`."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_per_expert: list[int] | None
    handle: Handle | None


class _Kind(NamedTuple):
    """What operations on rows of equal kinds have in common."""

    num_rows: int
    """Not looked at by combines, whose kinds are of any number."""
    width: int
    dtype: torch.dtype
    beside: int
    """Scales of a row, or weights; 0: none."""
    signature: Signature
    """Without a handle's checksum."""
    are_packed: bool
    """Whether all strides are known to be those that :func:`packed` wants."""


_cached: Kept[_Kind] = Kept()
_combines: Kept[_Kind] = Kept()
_handles: Alike[bool] = Alike()


def layout(party: Party, topk_idx: torch.Tensor, num_experts: int) -> Layout:
    """Counts and membership; see :meth:`tokenferry.Buffer.get_dispatch_layout`."""
    num_experts = check_num_experts(party, "num_experts", num_experts)
    ids = check_topk_idx(party, topk_idx, None, num_experts)
    return party.plane.layout(ids, num_experts, party.num_ranks)


class _OwnHandle(DispatchHandle):
    """A handle as :func:`own_handle` made it, of which the shapes are known. What is made of it is a plain one."""

    fits: tuple[int, torch.device, torch.Size] | None = None
    """Ranks, device and shape of the caller's membership tensor."""

    def __reduce__(self) -> tuple[type[DispatchHandle], tuple[torch.Tensor, ...]]:
        """Copy and pickle as a plain handle: copies may end on another device."""
        return DispatchHandle, tuple(self)


def own_handle(
    party: Party, exchange: DispatchExchange, recv_src_idx: torch.Tensor, member: torch.Tensor
) -> DispatchHandle:
    """The handle of a dispatch, whose shapes need no look any more."""
    handle = make(
        _OwnHandle,
        (
            exchange.rank_prefix_matrix,
            exchange.channel_prefix_matrix,
            exchange.recv_channel_prefix_matrix,
            recv_src_idx,
            member,
            exchange.send_head,
        ),
    )
    handle.fits = (party.num_ranks, party.device, member.shape)
    return handle


def check_handle(party: Party, handle: object) -> DispatchHandle:
    """Return the handle as a :class:`DispatchHandle` if it fits this group."""
    if type(handle) is _OwnHandle and handle.fits == (party.num_ranks, party.device, handle[4].shape):
        checked: DispatchHandle = handle
    else:
        checked = _check_elements(party, handle)
    if party.plane.values_at_hand:
        _check_routes(checked, party.rank)
    return checked


def _check_elements(party: Party, handle: object) -> DispatchHandle:
    if not isinstance(handle, (tuple, list)) or len(handle) != len(_HANDLE_NAMES):
        given = f"{len(handle)} elements" if isinstance(handle, (tuple, list)) else type(handle).__name__
        raise ArgumentError("handle", given, f"the {len(_HANDLE_NAMES)} tensors that dispatch returned")
    ranks, device = party.num_ranks, party.device
    key = (ranks, device)
    checked: DispatchHandle
    if _handles.find(key, handle):
        checked = handle if isinstance(handle, DispatchHandle) else make(DispatchHandle, handle)
    else:
        shapes = ((ranks, ranks), (ranks, None), (ranks, None), (None,), (None, ranks), (None, ranks))
        elements = []
        for name, value, shape, dtypes in zip(_HANDLE_NAMES, handle, shapes, _HANDLE_DTYPES, strict=True):
            element = check_tensor(name, value, shape=shape, dtypes=dtypes, device=device)
            elements.append(element if element.is_contiguous() else element.contiguous())
        checked = DispatchHandle(*elements)
        if all(given is element for given, element in zip(handle, checked, strict=True)):  # nothing had to be copied
            _handles.add(key, True, checked, [shape[0] is None for shape in shapes], [False] * len(shapes))
    num_tokens, num_heads = checked.is_token_in_rank.shape[0], checked.send_head.shape[0]
    if num_heads != num_tokens:
        allowed = f"{num_tokens}, as in is_token_in_rank"
        raise ArgumentError("handle.send_head", f"{num_heads} rows", allowed)
    return checked


def _check_routes(handle: DispatchHandle, rank: int) -> None:
    num_received = int(handle.rank_prefix_matrix[-1, rank])
    sources = handle.recv_src_idx[:num_received]
    fits = len(sources) == num_received and not bool((sources < 0).any())
    require(fits, "handle.recv_src_idx", describe(handle.recv_src_idx), f"source tokens of {num_received} rows")
    ascends = sources.diff() > 0
    ends = handle.rank_prefix_matrix[:-1, rank].long()
    ascends[ends[(ends > 0) & (ends < num_received)] - 1] = True  # from one source to the next
    require(bool(ascends.all()), "handle.recv_src_idx", "tokens in disorder", "ascending tokens of each source")
    member = handle.is_token_in_rank
    sent = _rows_sent(handle, rank)
    require(
        member.sum(0).tolist() == sent,
        "handle.is_token_in_rank",
        f"{member.sum(0).tolist()} tokens for the ranks",
        f"{sent}, as in handle.rank_prefix_matrix",
    )


def _rows_sent(handle: DispatchHandle, rank: int) -> list[int]:
    prefix = handle.rank_prefix_matrix
    sent = prefix[rank] - prefix[rank - 1] if rank else prefix[0]
    return [int(count) for count in sent]


def _checksum(party: Party, handle: DispatchHandle) -> int:
    if not party.plane.values_at_hand:
        return 0
    return zlib.crc32(str(handle.rank_prefix_matrix.tolist()).encode())


def dispatch(party: Party, given: Inputs) -> Received:
    """Dispatch with fresh counts; see :meth:`tokenferry.Buffer.dispatch`."""
    plane = party.plane
    rows, ids, weights, member, per_rank, per_expert, num_experts, alignment, given_worst = given
    num_topk = 0 if ids is None else ids.shape[1]
    worst = int(given_worst)  # others than plain ones are slow arguments
    may_guess = worst == 0
    zero_unused = not may_guess and type(given_worst) is OperatorRows
    ways = None, party.num_sms, None, None, may_guess, zero_unused
    plan = make(SendPlan, (*rows, ids, weights, member, per_rank, per_expert, worst, *ways))
    with plane.dispatch(signature_of(OperationKind.DISPATCH, rows, num_topk, num_experts), plan) as exchange:
        while True:
            num_rows = exchange.num_rows
            recv_x, recv_scales = empty_rows_like(party, rows, num_rows)
            recv_ids = recv_weights = None
            if ids is not None:
                recv_ids = plane.empty_rows(num_rows, num_topk, topk_idx_t)
                recv_weights = plane.empty_rows(num_rows, num_topk, torch.float32)
            recv_src_idx = plane.empty_strided((num_rows,), (1,), torch.int32)
            outputs = make(Outputs, (recv_x, recv_scales, recv_ids, recv_weights, recv_src_idx, None))
            if exchange.pull(outputs):
                break
        if exchange.num_rows != num_rows:
            recv_x, recv_scales, recv_ids, recv_weights, recv_src_idx, _ = first_rows(outputs, exchange.num_rows)
    handle = own_handle(party, exchange, recv_src_idx, member)
    counts = align_all(exchange.num_received_per_expert, alignment)
    return make(Received, (recv_x, recv_scales, recv_ids, recv_weights, counts, handle))


def cached_dispatch(party: Party, x: object, handle: object) -> Received:
    """Dispatch rows along a handle; see :meth:`tokenferry.Buffer.dispatch`."""
    plane, _, _, device, num_sms, _ = party
    kinds = kinds_of_rows(x)
    key = (device, *kinds)
    kind = _cached.get(key)
    if kind is None:
        rows = check_rows(party, x)
        kind = _cached.keep(key, _kind_of_rows(rows, kinds))
    else:
        data, scales = x if type(x) is tuple else (x, None)
        is_packed = kind.are_packed
        rows = make(Rows, (packed(data, is_packed), None if scales is None else packed(scales, is_packed)))
    known = check_handle(party, handle)
    num_given, width, dtype, beside, signature, _ = kind
    member = known.is_token_in_rank
    num_tokens = member.shape[0]
    if num_given != num_tokens:
        raise ArgumentError("x", f"{num_given} rows", f"the {num_tokens} rows of the handle")
    if plane.values_at_hand:
        signature = signature._replace(handle=_checksum(party, known))
    data, scales = rows
    zero_unused = type(handle) is OperatorHandle
    plan = make(
        SendPlan, (data, scales, None, None, member, None, None, 0, known, num_sms, None, None, False, zero_unused)
    )
    num_rows = known.recv_src_idx.shape[0]
    recv_x = plane.empty_rows(num_rows, width, dtype)
    recv_scales = None if scales is None else plane.empty_rows(num_rows, beside, scales.dtype)
    outputs = make(Outputs, (recv_x, recv_scales, None, None, None, None))
    plane.dispatch_along(signature, plan, outputs)
    return make(Received, (recv_x, recv_scales, None, None, None, None))


def _kind_of_rows(rows: Rows, kinds: Iterable[Kind | None]) -> _Kind:
    x, scales = rows
    beside = 0 if scales is None else scales.shape[1]
    signature = signature_of(OperationKind.CACHED_DISPATCH, rows)
    return _Kind(x.shape[0], x.shape[1], x.dtype, beside, signature, are_packed(kinds))


def combine(
    party: Party, x: torch.Tensor, handle: object, topk_weights: torch.Tensor | None, bias: object
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum the rows of every token over the ranks that had it; see :meth:`tokenferry.Buffer.combine`."""
    plane, _, _, device, num_sms, _ = party
    known = check_handle(party, handle)
    num_rows, num_tokens = known.recv_src_idx.shape[0], known.is_token_in_rank.shape[0]
    kinds = (row_kind_of(x),) if topk_weights is None else (row_kind_of(x), row_kind_of(topk_weights))
    key = (device, *kinds)
    kind = _combines.get(key)
    if kind is None or x.shape[0] != num_rows or (topk_weights is not None and topk_weights.shape[0] != num_rows):
        columns = check_columns(party, x, topk_weights, num_rows)
        kind = _combines.keep(key, _kind_of_columns(columns, kinds))
    else:
        is_packed = kind.are_packed and num_rows > 1
        columns = [packed(x, is_packed)]
        if topk_weights is not None:
            columns.append(packed(topk_weights, is_packed))
    _, width, dtype, num_topk, signature, _ = kind
    biases = check_biases(party, bias, (num_tokens, width), dtype) if bias is not None else []
    if plane.values_at_hand:
        signature = signature._replace(handle=_checksum(party, known))
    outs = [plane.empty_rows(num_tokens, width, dtype)]
    if topk_weights is not None:
        outs.append(plane.empty_rows(num_tokens, num_topk, torch.float32))
    plan = make(ReducePlan, (columns, biases, known, num_sms, None, None, None))
    plane.pull_reduce(signature, plan, outs)
    return outs[0], outs[1] if topk_weights is not None else None


def _kind_of_columns(columns: list[torch.Tensor], kinds: Iterable[Kind | None]) -> _Kind:
    rows, num_topk = columns[0], columns[1].shape[1] if len(columns) > 1 else 0
    signature = signature_of(OperationKind.COMBINE, Rows(rows, None), num_topk)
    return _Kind(0, rows.shape[1], rows.dtype, num_topk, signature, are_packed(kinds))


def signature_of(
    operation: OperationKind,
    rows: Rows,
    num_topk: int = 0,
    num_experts: int = 0,
    *,
    handle: int = 0,
    num_max_tokens: int = 0,
    has_weights: bool = False,
) -> Signature:
    """What all ranks must agree on when they call ``operation`` with such rows."""
    x, scales = rows
    of_scales = (0, 0) if scales is None else (scales.shape[1] * scales.itemsize, dtype_code(scales.dtype))
    of_rows = dtype_code(x.dtype), x.shape[1] * x.itemsize
    return make(
        Signature,
        (operation, *of_rows, num_topk, num_experts, *of_scales, handle, num_max_tokens, int(has_weights)),
    )


def empty_rows_like(party: Party, rows: Rows, num_rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Unset outputs of ``num_rows`` rows for such rows."""
    x, scales = rows
    recv_x = party.plane.empty_rows(num_rows, x.shape[1], x.dtype)
    return recv_x, None if scales is None else party.plane.empty_rows(num_rows, scales.shape[1], scales.dtype)


def first_rows(outputs: Iterable[torch.Tensor | None], num_rows: int) -> list[Any]:
    """Outputs of exactly so many rows, in the memory of these, which have no fewer and are packed."""
    cut: list[torch.Tensor | None] = []
    for output in outputs:
        if output is not None:
            shape = output.shape
            if len(shape) == 1:
                output = piece_of(output, (num_rows,), (1,), 0)
            else:
                width = shape[1]
                output = piece_of(output, (num_rows, width), (width, 1), 0)
        cut.append(output)
    return cut


def warm(
    party: Party,
    hidden: int,
    num_topk: int,
    num_experts: int,
    dtype: torch.dtype,
    scale_bytes: int,
    combine_dtype: torch.dtype | None,
) -> None:
    """Make ready for such operations; see :meth:`tokenferry.Buffer.warmup`."""
    fresh, reduces = plans_to_warm(party, hidden, num_topk, num_experts, dtype, scale_bytes, combine_dtype)
    empty = torch.empty(0, dtype=torch.int32, device=party.device)
    handle = DispatchHandle(empty, empty, empty, empty, fresh.is_token_in_rank, empty)
    cached = fresh._replace(topk_idx=None, topk_weights=None, handle=handle)
    party.plane.warm([fresh, cached], reduces, num_experts)


def plans_to_warm(
    party: Party,
    hidden: int,
    num_topk: int,
    num_experts: int,
    dtype: torch.dtype,
    scale_bytes: int,
    combine_dtype: torch.dtype | None,
) -> tuple[SendPlan, list[list[torch.Tensor]]]:
    """A dispatch of no rows, and the columns of combines; checks the arguments of :func:`warm`."""
    hidden = check_int("hidden", hidden, minimum=1)
    num_topk = check_int("num_topk", num_topk, minimum=0)
    scale_bytes = check_int("scale_bytes", scale_bytes, minimum=0, multiple_of=4)
    check_num_experts(party, "num_experts", num_experts)
    wide = combine_dtype or (dtype if dtype.itemsize > 1 else torch.bfloat16)
    require(wide in COMBINE_DTYPES, "combine_dtype", wide, "one of " + ", ".join(map(str, COMBINE_DTYPES)))

    def none(width: int, of: torch.dtype) -> torch.Tensor:
        return torch.empty((0, width), dtype=of, device=party.device)

    fresh = SendPlan(
        rows=none(hidden * dtype.itemsize, torch.uint8),
        scales=none(scale_bytes, torch.uint8) if scale_bytes else None,
        topk_idx=none(num_topk, topk_idx_t) if num_topk else None,
        topk_weights=none(num_topk, torch.float32) if num_topk else None,
        is_token_in_rank=none(party.num_ranks, torch.bool),
        num_tokens_per_rank=None,
        num_tokens_per_expert=None,
        num_worst_tokens=0,
        handle=None,
    )
    rows = none(hidden, wide)
    return fresh, [[rows], [rows, none(num_topk, torch.float32)]] if num_topk else [[rows]]
