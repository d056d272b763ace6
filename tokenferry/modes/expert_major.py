"""Dispatch and combine that tell where rows are from, compact or expanded: check, agree, allocate, pull.

Compact, a token arrives once on a rank, as in :mod:`tokenferry.modes.intranode`. Expanded, it has a row for each of
its choices of a local expert, and rows lie expert by expert, ordered by (source rank, source token, choice)::

    end_e = start_e + pairs of e,   start_{e + 1} = end_e rounded up to the alignment,   start_0 = 0

On its way back a token's copies on a rank are summed first, choices ascending, in float32; the sum is rounded, unless
``one_rounding``; then sums of the ranks are added as everywhere, ranks ascending.

Legend of dims: T tokens of this rank, N most tokens of any rank, H elements of a row, K choices, S scale columns,
E experts, L = E / R local experts, R ranks, M received rows, X expanded rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tokenferry.config import align_all, align_up
from tokenferry.dataplane import ExpertPlan, OperationKind, Outputs, ReducePlan, SendPlan, Signature
from tokenferry.errors import ArgumentError
from tokenferry.handles import DispatchHandle, EPHandle
from tokenferry.kept import Alike, is_packed, make
from tokenferry.modes.inputs import (
    COMBINE_DTYPES,
    MAX_TOPK,
    Party,
    Rows,
    check_biases,
    check_ids,
    check_num_experts,
    check_row_bytes,
    check_rows,
    check_topk_idx,
    have_as_many_rows,
    packed,
    topk_idx_t,
)
from tokenferry.modes.intranode import _checksum, check_handle, empty_rows_like, first_rows, own_handle, signature_of
from tokenferry.validation import check_int, check_tensor, describe, require

_INT32 = (torch.int32,)
_FLOAT32 = (torch.float32,)
_MOST = 1 << 31
_SCALE_BYTES = 16
"""The alignment of columns of column-major scales."""


class Sizes(NamedTuple):
    """What a dispatch is called with, besides tensors."""

    num_experts: int
    num_max_tokens: int
    """N."""
    alignment: int
    expand: bool
    host_waits: bool
    """Whether outputs have exactly as many rows as come, for which the host waits; else as many as could."""
    zero_padding: bool
    num_sms: int
    """What the handle remembers."""


class Received(NamedTuple):
    """What dispatch hands out; see :meth:`tokenferry.ElasticBuffer.dispatch`."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    handle: EPHandle


def worst_rows(num_ranks: int, num_topk: int, sizes: Sizes) -> tuple[int, int]:
    """Rows that a rank receives at most, and expanded rows, if no token chooses an expert twice."""
    num_local = sizes.num_experts // num_ranks
    rows = num_ranks * sizes.num_max_tokens
    pairs = rows * min(num_topk, num_local)
    padded = pairs + min(num_local, pairs) * (sizes.alignment - 1)
    return rows, padded // sizes.alignment * sizes.alignment


def check_sizes(party: Party, num_tokens: int, num_topk: int, sizes: Sizes) -> Sizes:
    """Return the sizes if they are allowed and nothing that they lead to overflows."""
    checked = sizes._replace(
        num_experts=check_num_experts(party, "num_experts", sizes.num_experts),
        num_max_tokens=check_int("num_max_tokens_per_rank", sizes.num_max_tokens, minimum=int(not sizes.host_waits)),
        alignment=check_int("expert_alignment", sizes.alignment, minimum=1),
    )
    most = checked.num_max_tokens
    require(num_tokens <= most, "x", f"{num_tokens} rows", f"at most num_max_tokens_per_rank = {most}")
    largest = max(*worst_rows(party.num_ranks, num_topk, checked), party.num_ranks * num_topk)
    require(largest < _MOST, "num_max_tokens_per_rank", most, f"less than 2^31 rows in the worst case, not {largest}")
    return checked


def dispatch(
    party: Party, x: object, topk_idx: object, topk_weights: object, sizes: Sizes, *, copy_topk: bool
) -> Received:
    """Dispatch with fresh counts; see :meth:`tokenferry.ElasticBuffer.dispatch`."""
    plane = party.plane
    kind, rows, ids, weights = _given(party, x, topk_idx, topk_weights, sizes)
    sizes, num_topk, worst, experts, signature, are_packed = kind
    # The copy is made while the device works, in memory that no earlier part of the operation may still use.
    kept = plane.empty_rows(ids.shape[0], ids.shape[1], ids.dtype) if copy_topk else ids
    counts = plane.layout(ids, sizes.num_experts, party.num_ranks, expands=sizes.expand)
    per_rank, per_expert, member = counts
    plan = make(
        SendPlan,
        (
            *rows, packed(ids, are_packed), weights, member, per_rank, per_expert, worst, None, party.num_sms,
            experts, None, sizes.host_waits, False,
        ),
    )  # fmt: skip
    with plane.dispatch(signature, plan) as exchange:
        while True:
            num_rows, num_copies = exchange.num_rows, exchange.num_expanded_rows
            metadata = plane.empty_rows(num_rows, num_topk + 2, torch.int32)
            sources = plane.empty_strided((num_rows,), (1,), torch.int32)
            received = _outputs(party, rows, num_topk, num_rows, num_copies, sizes.expand)
            if exchange.pull(_for_plane(received, sources, metadata)):
                break
        if (exchange.num_rows, exchange.num_expanded_rows) != (num_rows, num_copies):
            metadata, sources = first_rows((metadata, sources), exchange.num_rows)
            num_copies = exchange.num_expanded_rows if sizes.expand else exchange.num_rows
            received = make(_Outputs, first_rows(received, num_copies))
    alignment = sizes.alignment
    handle = EPHandle(
        do_expand=sizes.expand,
        num_experts=sizes.num_experts,
        expert_alignment=alignment,
        num_max_tokens_per_rank=sizes.num_max_tokens,
        num_sms=sizes.num_sms,
        topk_idx=kept.copy_(ids) if copy_topk else ids,
        num_recv_tokens=exchange.num_rows,
        num_expanded_tokens=exchange.num_expanded_rows,
        num_recv_tokens_per_expert_list=align_all(exchange.num_received_per_expert, alignment),
        psum_num_recv_tokens_per_scaleup_rank=exchange.rank_ends,
        psum_num_recv_tokens_per_expert=exchange.expert_ends,
        num_unaligned_recv_tokens_per_expert=exchange.num_pairs,
        recv_src_metadata=metadata,
        routes=own_handle(party, exchange, sources, member),
    )
    return _received(received, topk_weights is not None, handle)


class _Kind(NamedTuple):
    """What dispatches have in common that are given tensors of equal kinds, and equal sizes."""

    sizes: Sizes
    num_topk: int
    num_worst_rows: int
    """0 if the host waits."""
    experts: ExpertPlan
    signature: Signature
    are_packed: bool
    """Whether all strides are known to be those that :func:`tokenferry.modes.inputs.packed` wants."""


_kinds: Alike[_Kind] = Alike()
_PLAIN = {int, bool}


def _given(
    party: Party, x: Any, topk_idx: Any, topk_weights: Any, sizes: Sizes
) -> tuple[_Kind, Rows, torch.Tensor, torch.Tensor]:
    """What a dispatch is given, checked: its kind, rows, ids, and the weights that travel."""
    data, scales = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    tensors = (data, topk_idx) if topk_weights is None else (data, topk_idx, topk_weights)
    if scales is not None:
        tensors = *tensors, scales
    types = tuple(map(type, sizes))
    of_sizes = sizes if _PLAIN.issuperset(types) else None
    key = (party.num_ranks, party.device, of_sizes, types, isinstance(x, tuple), len(tensors))
    kind = _kinds.find(key, tensors)
    if kind is None or not have_as_many_rows(tensors) or data.shape[0] > kind.sizes.num_max_tokens:
        kind = _check(party, x, topk_idx, topk_weights, sizes)
        known_again = kind._replace(are_packed=all(map(is_packed, tensors)))
        any_strides = [tensor is not topk_idx for tensor in tensors]
        _kinds.add(key, known_again, tensors, [True] * len(tensors), any_strides)
    elif party.plane.values_at_hand:
        check_ids(topk_idx, kind.sizes.num_experts)
    are_packed = kind.are_packed
    rows = make(Rows, (packed(data, are_packed), None if scales is None else packed(scales, are_packed)))
    return kind, rows, topk_idx, _travelling(party, topk_weights, topk_idx.shape, are_packed)


def _check(party: Party, x: object, topk_idx: Any, topk_weights: Any, sizes: Sizes) -> _Kind:
    rows = check_rows(party, x)
    num_tokens = rows.x.size(0)
    num_experts = check_num_experts(party, "num_experts", sizes.num_experts)
    num_topk = check_topk_idx(party, topk_idx, num_tokens, num_experts).size(1)
    require(num_topk > 0, "topk_idx", "no choices", f"1 to {MAX_TOPK} choices a token")
    sizes = check_sizes(party, num_tokens, num_topk, sizes)
    _check_weights(party, topk_weights, num_tokens, num_topk)
    worst, worst_expanded = (0, 0) if sizes.host_waits else worst_rows(party.num_ranks, num_topk, sizes)
    experts = ExpertPlan(
        num_local=num_experts // party.num_ranks,
        num_max_tokens=sizes.num_max_tokens,
        alignment=sizes.alignment,
        expand=sizes.expand,
        num_worst_rows=worst_expanded if sizes.expand else 0,
        zero_padding=sizes.zero_padding,
    )
    operation = OperationKind.EXPANDED_DISPATCH if sizes.expand else OperationKind.DISPATCH
    has_weights = topk_weights is not None
    signature = signature_of(
        operation, rows, num_topk, num_experts, num_max_tokens=sizes.num_max_tokens, has_weights=has_weights
    )
    return _Kind(sizes, num_topk, worst, experts, signature, False)


def cached_dispatch(
    party: Party, x: object, handle: EPHandle, topk_weights: object, *, zero_padding: bool
) -> Received:
    """Dispatch rows along a handle; see :meth:`tokenferry.ElasticBuffer.dispatch`."""
    rows = check_rows(party, x)
    routes = check_handle(party, handle.routes)
    num_tokens, num_rows = routes.is_token_in_rank.size(0), routes.recv_src_idx.numel()
    require(rows.x.size(0) == num_tokens, "x", f"{rows.x.size(0)} rows", f"the {num_tokens} rows of the handle")
    device = party.device
    num_experts = check_num_experts(party, "handle.num_experts", handle.num_experts)
    num_local = num_experts // party.num_ranks
    ids = check_tensor(
        "handle.topk_idx", handle.topk_idx, shape=(num_tokens, None), dtypes=(topk_idx_t,), device=device
    )
    num_topk = ids.size(1)
    _check_weights(party, topk_weights, num_tokens, num_topk)
    weights = _travelling(party, topk_weights, ids.shape, False)
    metadata, ends, expanded = None, None, 0
    if handle.do_expand:
        expanded = check_int("handle.num_expanded_tokens", handle.num_expanded_tokens, minimum=0)
        metadata = _metadata(party, handle, num_rows, num_topk, expanded)
        ends = handle.psum_num_recv_tokens_per_expert
        name = "handle.psum_num_recv_tokens_per_expert"
        ends = check_tensor(name, ends, shape=(num_local,), dtypes=_INT32, device=device).contiguous()
    plan = SendPlan(
        *rows,
        topk_idx=packed(ids),
        topk_weights=weights,
        is_token_in_rank=routes.is_token_in_rank,
        num_tokens_per_rank=None,
        num_tokens_per_expert=None,
        num_worst_tokens=0,
        handle=routes,
        num_sms=party.num_sms,
        experts=ExpertPlan(
            num_local=num_local,
            num_max_tokens=handle.num_max_tokens_per_rank,
            alignment=check_int("handle.expert_alignment", handle.expert_alignment, minimum=1),
            expand=handle.do_expand,
            num_worst_rows=expanded,
            zero_padding=zero_padding,
            metadata=metadata,
            expert_ends=ends,
        ),
    )
    kind = OperationKind.CACHED_EXPANDED_DISPATCH if handle.do_expand else OperationKind.CACHED_DISPATCH
    checksum, has_weights = _checksum(party, routes), topk_weights is not None
    signature = signature_of(kind, rows, num_topk, num_experts, handle=checksum, has_weights=has_weights)
    with party.plane.dispatch(signature, plan) as exchange:
        received = _outputs(party, rows, num_topk, num_rows, expanded, handle.do_expand)
        exchange.pull(_for_plane(received, None, None))
    return _received(received, topk_weights is not None, handle)


def _check_weights(party: Party, given: object, num_tokens: int, num_topk: int) -> None:
    if given is not None:
        check_tensor("topk_weights", given, shape=(num_tokens, num_topk), dtypes=_FLOAT32, device=party.device)


def _travelling(party: Party, weights: Any, shape: torch.Size, are_packed: bool) -> torch.Tensor:
    """The weights that travel, which are checked; unset where the caller has none."""
    if weights is None:
        return party.plane.empty_rows(shape[0], shape[1], torch.float32)
    return packed(weights, are_packed)


class _Outputs(NamedTuple):
    """What the caller gets of :class:`tokenferry.dataplane.Outputs`."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    """None if expanded."""
    topk_weights: torch.Tensor
    """Expanded, of one dimension."""


def _outputs(
    party: Party, rows: Rows, num_topk: int, num_rows: int, num_expanded_rows: int, expand: bool
) -> _Outputs:
    """Unset tensors for the rows that come."""
    x, scales = empty_rows_like(party, rows, num_expanded_rows if expand else num_rows)
    if expand:
        return _Outputs(x, scales, None, party.plane.empty_strided((num_expanded_rows,), (1,), torch.float32))
    ids = party.plane.empty_rows(num_rows, num_topk, topk_idx_t)
    return _Outputs(x, scales, ids, party.plane.empty_rows(num_rows, num_topk, torch.float32))


def _for_plane(received: _Outputs, sources: torch.Tensor | None, metadata: torch.Tensor | None) -> Outputs:
    x, scales, ids, weights = received
    return make(Outputs, (x, scales, ids, weights.view(-1, 1) if ids is None else weights, sources, metadata))


def _received(outputs: _Outputs, has_weights: bool, handle: EPHandle) -> Received:
    return Received(*outputs[:3], outputs.topk_weights if has_weights else None, handle)


def check_stats(party: Party, stats: object, num_local: int) -> None:
    """Check the tensor that the pairs of each local expert are added to."""
    if stats is not None:
        name = "cumulative_local_expert_recv_stats"
        check_tensor(name, stats, shape=(num_local,), dtypes=_INT32, device=party.device)


def check_ep_handle(handle: object) -> EPHandle:
    """Return the handle if it is one."""
    if not isinstance(handle, EPHandle):
        raise ArgumentError("handle", type(handle).__name__, "the EPHandle that ElasticBuffer.dispatch returned")
    return handle


def check_beside_handle(
    handle: EPHandle,
    topk_idx: object,
    num_experts: int | None,
    num_max_tokens_per_rank: int | None,
    expert_alignment: int | None,
    do_cpu_sync: bool | None,
    do_expand: bool,
) -> None:
    """Check the arguments of a dispatch that its handle already answers."""
    require(topk_idx is None, "topk_idx", "a tensor beside handle", "None: the handle has the routes already")
    for name, given in (
        ("num_experts", num_experts),
        ("num_max_tokens_per_rank", num_max_tokens_per_rank),
        ("expert_alignment", expert_alignment),
    ):
        known = getattr(handle, name)
        if given is not None and given != known:
            raise ArgumentError(name, given, f"None beside handle, or its {known}")
    require(not do_cpu_sync, "do_cpu_sync", do_cpu_sync, "False or None beside handle: there is nothing to wait for")
    require(
        not do_expand or handle.do_expand, "do_expand", do_expand, "False: the rows of the handle are not expanded"
    )


def _metadata(party: Party, handle: EPHandle, num_rows: int, num_topk: int | None, num_expanded: int) -> torch.Tensor:
    """The metadata of a handle, its copies checked to be rows that there are, where values are at hand."""
    name = "handle.recv_src_metadata"
    width = None if num_topk is None else num_topk + 2
    given = check_tensor(name, handle.recv_src_metadata, shape=(num_rows, width), dtypes=_INT32, device=party.device)
    if given.shape[1] < 2:
        raise ArgumentError(name, describe(given), "columns for two numbers and the copies")
    metadata = given.contiguous()
    if party.plane.values_at_hand and metadata[:, 2:].numel():
        low, high = (int(bound) for bound in metadata[:, 2:].aminmax())
        require(low >= -1, name, f"the copy {low}", f"rows from 0 to {num_expanded - 1}, or -1")
        require(high < num_expanded, name, f"the copy {high}", f"rows from 0 to {num_expanded - 1}, or -1")
    return metadata


def column_major(scales: torch.Tensor) -> torch.Tensor:
    """The same scales [rows, S], column by column, each column beginning on 16 bytes."""
    num_rows, width = scales.shape
    step = align_up(max(num_rows, 1), _SCALE_BYTES // scales.element_size())
    out = torch.empty_strided((num_rows, width), (1, step), dtype=scales.dtype, device=scales.device)
    return out.copy_(scales)


def combine(
    party: Party, x: object, handle: EPHandle, topk_weights: object, bias: object, *, one_rounding: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum the rows of every token; see :meth:`tokenferry.ElasticBuffer.combine`."""
    routes = check_handle(party, handle.routes)
    num_rows, num_tokens = routes.recv_src_idx.shape[0], routes.is_token_in_rank.shape[0]
    rows = check_tensor("x", x, shape=(None, None), dtypes=COMBINE_DTYPES, device=party.device)
    check_row_bytes(rows)
    given, hidden = rows.shape
    columns = [packed(rows)]
    metadata = sum_dtype = None
    if handle.do_expand:
        metadata = _metadata(party, handle, num_rows, None, given)
        if one_rounding:
            sum_dtype = torch.promote_types(rows.dtype, torch.float32)
    else:
        fewest = int(routes.rank_prefix_matrix[-1, party.rank]) if party.plane.values_at_hand else 0
        allowed = f"the {num_rows} rows that dispatch returned, or at least those of them that came"
        require(fewest <= given <= num_rows, "x", f"{given} rows", allowed)
    if topk_weights is not None:
        columns.append(_combine_weights(party, topk_weights, given, metadata))
    biases = [] if bias is None else check_biases(party, bias, (num_tokens, hidden), rows.dtype)
    plan = ReducePlan(columns, biases, routes, party.num_sms, metadata, sum_dtype)
    outs = [party.plane.empty_rows(num_tokens, column.size(1), column.dtype) for column in columns]
    num_topk = columns[1].size(1) if len(columns) > 1 else 0
    signature = signature_of(
        OperationKind.COMBINE, Rows(columns[0], None), num_topk, handle=_checksum(party, routes)
    )._replace(scale_dtype=int(sum_dtype is not None))
    party.plane.pull_reduce(signature, plan, outs)
    return outs[0], outs[1] if len(outs) > 1 else None


def _combine_weights(party: Party, given: object, num_rows: int, metadata: torch.Tensor | None) -> torch.Tensor:
    """float32 [M, K]: weights of received rows; of expanded ones, those of their copies, 0 where there is none."""
    shape = (num_rows, None) if metadata is None else (num_rows,)
    weights = check_tensor("topk_weights", given, shape=shape, dtypes=_FLOAT32, device=party.device)
    if metadata is None:
        require(0 < weights.size(1) <= MAX_TOPK, "topk_weights", describe(weights), f"1 to {MAX_TOPK} columns")
        return packed(weights)
    copies = metadata[:, 2:]
    require(copies.size(1) > 0, "handle.recv_src_metadata", "no choices", f"1 to {MAX_TOPK} choices")
    if not num_rows:
        return weights.new_zeros(copies.shape)
    there = (copies >= 0) & (copies < num_rows)
    return packed(torch.where(there, weights.detach()[copies.where(there, 0).long()], 0.0))


def barrier(party: Party) -> None:
    """Wait for all ranks, as a combine without tokens does."""
    ranks = party.num_ranks

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=party.device)

    nothing = zeros(0, 4, dtype=torch.float32)
    member = zeros(0, ranks, dtype=torch.bool)
    routes = DispatchHandle(zeros(ranks, ranks), zeros(ranks, 1), zeros(ranks, 1), zeros(0), member, zeros(0, ranks))
    signature = signature_of(OperationKind.BARRIER, Rows(nothing, None))
    party.plane.pull_reduce(signature, ReducePlan([nothing], [], routes), [torch.empty_like(nothing)])
