"""The low-latency mode: check the arguments, allocate worst-case outputs, send; receive now or in a hook.

Nothing here depends on counts, so nothing waits for the host. Formulas: slab i of the output holds the rows of local
expert i, ordered by (source rank, source token, choice); ``layout_range[i, s] = (begin << 32) | count``;
``y[t] = sum over k, ascending, of topk_weights[t, k] * x[topk_idx[t, k]][row of (me, t)]`` in float32.

Legend of dims: T tokens of this rank, N most tokens of any rank, H elements of a row, K choices, E experts,
L = E / R local experts, R ranks, S scale columns.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch

from tokenferry.dataplane import (
    LowLatencyCombinePlan,
    LowLatencyDispatchPlan,
    OperationKind,
    Pending,
    ScaleFormat,
    Signature,
)
from tokenferry.errors import ArgumentError
from tokenferry.kept import Kept, Known, kind_of, make
from tokenferry.modes import internode_low_latency
from tokenferry.modes.inputs import MAX_TOPK, Party, check_ids, check_num_experts, check_topk_idx
from tokenferry.validation import check_int, check_tensor, describe, require

GROUP = 128


class LowLatencyHandle(NamedTuple):
    """What a low-latency dispatch leaves behind for combine; never mutated, usable any number of times."""

    src_info: torch.Tensor
    """int32 [L, R * N]; source token of each slab row, unset past the last."""
    layout_range: torch.Tensor
    """int64 [L, R]; (begin << 32) | count of the rows of each source in each slab."""
    num_max_dispatch_tokens_per_rank: int
    hidden: int
    num_experts: int


class _OwnHandle(LowLatencyHandle):
    """One that dispatch made: it fits."""

    __slots__ = ()


class Dispatched(NamedTuple):
    """What a low-latency dispatch hands out; see :meth:`tokenferry.Buffer.low_latency_dispatch`."""

    x: torch.Tensor
    scales: torch.Tensor | None
    num_received: torch.Tensor
    handle: LowLatencyHandle
    pending: Pending


_Slabs: TypeAlias = tuple[tuple[int, int, int], tuple[int, int, int], torch.dtype]
"""Shape, strides and dtype."""


class _DispatchKind(NamedTuple):
    """What dispatches with equal keys have in common."""

    scale_format: ScaleFormat
    num_local: int
    num_experts: int
    most: int
    hidden: int
    num_topk: int
    rows: _Slabs
    scales: _Slabs | None
    signature: Signature
    is_plain: bool
    """Whether the rows are contiguous, and need no gradient."""


class _CombineKind(NamedTuple):
    """What combines with equal keys have in common."""

    num_tokens: int
    num_local: int
    signature: Signature
    is_plain: bool
    """Whether rows and weights are contiguous, and need no gradient."""


_dispatches: Known[_DispatchKind] = Known()
_combines: Known[_CombineKind] = Known()
_handles: Kept[bool] = Kept()


def dispatch(
    party: Party,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    num_max_tokens: int,
    num_experts: int,
    recv_stats: torch.Tensor | None,
    wait_stats: torch.Tensor | None,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    receives_now: bool,
) -> Dispatched:
    """Send the tokens; see :meth:`tokenferry.Buffer.low_latency_dispatch`."""
    plane, rank, ranks, device, _, nodes = party
    sizes = (num_max_tokens, num_experts) if type(num_max_tokens) is type(num_experts) is int else None
    key = ranks, device, sizes, not use_fp8, not round_scale, not use_ue8m0
    kind = None if sizes is None else _dispatches.find(key, x, topk_idx)
    if kind is None:
        found = _check_dispatch(party, x, topk_idx, num_max_tokens, num_experts, use_fp8, round_scale, use_ue8m0)
        kind = _dispatches.add(key, found, x, topk_idx)
    scale_format, num_local, num_experts, most, hidden, num_topk, slabs, scales, signature, is_plain = kind
    if plane.values_at_hand:
        _check_values(topk_idx, most, num_experts)
    if recv_stats is not None:
        check_stats(party, "cumulative_local_expert_recv_stats", recv_stats, num_local, torch.int32)
    if wait_stats is not None:
        check_stats(party, "dispatch_wait_recv_cost_stats", wait_stats, ranks, torch.int64)
    rows = x if is_plain else _plain(x)
    recv_x = plane.empty_strided(*slabs)
    recv_scales = None if scales is None else plane.empty_strided(*scales)
    src_info, layout_range, count = plane.low_latency_tables(ranks, num_local, most, num_topk)
    plan = make(
        LowLatencyDispatchPlan,
        (
            topk_idx, rows, scale_format, rank * num_local, num_local, most, recv_x, recv_scales, src_info,
            layout_range, count, recv_stats, wait_stats, receives_now, None,
        ),
    )  # fmt: skip
    if nodes is None:
        pending = plane.low_latency_dispatch(signature, plan)
    else:
        pending = internode_low_latency.dispatch(party, nodes, signature, plan)
    if receives_now:
        pending.finish()
    handle = make(_OwnHandle, (src_info, layout_range, most, hidden, num_experts))
    return make(Dispatched, (recv_x, recv_scales, count, handle, pending))


def _check_dispatch(
    party: Party,
    x: object,
    topk_idx: object,
    num_max_tokens: int,
    num_experts: int,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
) -> _DispatchKind:
    ranks, device = party.num_ranks, party.device
    most = check_int("num_max_dispatch_tokens_per_rank", num_max_tokens, minimum=1)
    num_experts = check_num_experts(party, "num_experts", num_experts)
    rows = check_tensor("x", x, shape=(None, None), dtypes=(torch.bfloat16,), device=device)
    num_tokens, hidden = rows.shape
    if num_tokens > most:
        raise ArgumentError("x", f"{num_tokens} rows", f"at most num_max_dispatch_tokens_per_rank = {most}")
    step = GROUP if use_fp8 else 8
    if hidden == 0 or hidden % step != 0:
        raise ArgumentError("x", f"rows of {hidden} elements", f"a positive multiple of {step} elements")
    scale_format = scale_format_of(use_fp8, round_scale, use_ue8m0)
    num_topk = check_topk_idx(party, topk_idx, num_tokens, num_experts).shape[1]
    require(num_topk > 0, "topk_idx", "no choices", f"1 to {MAX_TOPK} choices a token")
    num_local, slab = num_experts // ranks, ranks * most
    scales: _Slabs | None = None
    if use_fp8:
        groups = hidden // GROUP
        columns, dtype = (-(-groups // 4), torch.int32) if use_ue8m0 else (groups, torch.float32)
        scales = (num_local, slab, columns), (columns * slab, 1, slab), dtype
    dtype = torch.float8_e4m3fn if use_fp8 else torch.bfloat16
    slabs = (num_local, slab, hidden), (slab * hidden, hidden, 1), dtype
    signature = _signature(OperationKind.LOW_LATENCY_DISPATCH, scale_format, hidden, num_topk, num_experts, most)
    return _DispatchKind(
        scale_format, num_local, num_experts, most, hidden, num_topk, slabs, scales, signature, _is_plain(rows)
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and not tensor.requires_grad


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous and without a gradient."""
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous()


def _check_values(ids: torch.Tensor, most: int, num_experts: int) -> None:
    check_ids(ids, num_experts)
    per_expert = torch.bincount(ids[ids >= 0], minlength=num_experts)
    busiest = int(per_expert.max())
    allowed = f"at most num_max_dispatch_tokens_per_rank = {most} choices of one expert"
    require(busiest <= most, "topk_idx", f"{busiest} choices of expert {int(per_expert.argmax())}", allowed)


def combine(
    party: Party,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    known: LowLatencyHandle,
    zero_copy_buffer: torch.Tensor | None,
    out: torch.Tensor | None,
    wait_stats: torch.Tensor | None,
    receives_now: bool,
) -> tuple[torch.Tensor, Pending]:
    """Send the rows home; see :meth:`tokenferry.Buffer.low_latency_combine`."""
    plane, rank, ranks, device, _, nodes = party
    src_info, layout_range, most, hidden, num_experts = known
    key = ranks, device, most, hidden, num_experts
    kind = _combines.find(key, topk_idx, topk_weights, x)
    if kind is None:
        found = _check_combine(party, x, topk_idx, topk_weights, most, hidden, num_experts)
        kind = _combines.add(key, found, topk_idx, topk_weights, x)
    num_tokens, num_local, signature, is_plain = kind
    if plane.values_at_hand:
        check_ids(topk_idx, num_experts)
    if wait_stats is not None:
        check_stats(party, "combine_wait_recv_cost_stats", wait_stats, ranks, torch.int64)
    rows, weights = x if zero_copy_buffer is None else zero_copy_buffer, topk_weights
    if not is_plain or zero_copy_buffer is not None:
        rows, weights = _plain(rows), _plain(weights)
    if out is None:
        result = to = plane.empty_rows(num_tokens, hidden, torch.bfloat16)
    else:
        dtypes = (torch.bfloat16,)
        result = check_tensor("out", out, shape=(num_tokens, hidden), dtypes=dtypes, device=device, contiguous=True)
        to = result.detach() if result.requires_grad else result
    plan = make(
        LowLatencyCombinePlan,
        (
            rows, src_info, layout_range, rank * num_local, num_experts, topk_idx, weights, to, wait_stats,
            receives_now, None,
        ),
    )  # fmt: skip
    if nodes is None:
        pending = plane.low_latency_combine(signature, plan)
    else:
        pending = internode_low_latency.combine(party, nodes, signature, plan, most)
    if receives_now:
        pending.finish()
    return result, pending


def _check_combine(
    party: Party, x: object, topk_idx: object, topk_weights: object, most: int, hidden: int, num_experts: int
) -> _CombineKind:
    ranks, device = party.num_ranks, party.device
    num_local = num_experts // ranks
    shape = (num_local, ranks * most, hidden)
    rows = check_tensor("x", x, shape=shape, dtypes=(torch.bfloat16,), device=device)
    ids = check_topk_idx(party, topk_idx, None, num_experts)
    num_tokens, num_topk = ids.shape
    if num_tokens > most:
        raise ArgumentError("topk_idx", f"{num_tokens} rows", f"at most num_max_dispatch_tokens_per_rank = {most}")
    weights = check_tensor("topk_weights", topk_weights, shape=ids.shape, dtypes=(torch.float32,), device=device)
    signature = _signature(OperationKind.LOW_LATENCY_COMBINE, ScaleFormat.NONE, hidden, num_topk, num_experts, most)
    return _CombineKind(num_tokens, num_local, signature, _is_plain(rows) and _is_plain(weights))


def warm(
    party: Party, num_max_tokens: object, hidden: int, num_topk: int, num_experts: int, scale_format: ScaleFormat
) -> None:
    """See :meth:`tokenferry.Buffer.low_latency_warmup`."""
    most = check_int("num_max_dispatch_tokens_per_rank", num_max_tokens, minimum=1)
    hidden = check_int("hidden", hidden, minimum=1, multiple_of=8 if scale_format == ScaleFormat.NONE else GROUP)
    num_topk = check_int("num_topk", num_topk, minimum=1)
    num_local = check_num_experts(party, "num_experts", num_experts) // party.num_ranks
    relays = None
    if party.nodes is not None:
        relays = internode_low_latency.relays_of(party.nodes, most)
        most *= party.nodes.topology.num_nodes
    party.plane.warm_low_latency(scale_format, most, hidden, num_topk, num_local, relays)


def scale_format_of(use_fp8: bool, round_scale: bool, use_ue8m0: bool) -> ScaleFormat:
    """The format that three flags name; without FP8 the others mean nothing.

    Raises:
        ArgumentError: ``use_ue8m0`` without ``round_scale``.
    """
    if use_ue8m0 and not round_scale:
        raise ArgumentError("use_ue8m0", "True without round_scale", "round_scale=True with it")
    if not use_fp8:
        return ScaleFormat.NONE
    return ScaleFormat.UE8M0 if use_ue8m0 else ScaleFormat.ROUNDED if round_scale else ScaleFormat.PLAIN


def check_handle(party: Party, handle: object) -> LowLatencyHandle:
    """Return the handle as a :class:`LowLatencyHandle` if it fits this group."""
    if isinstance(handle, _OwnHandle) and handle.src_info.shape[1] == party.num_ranks * handle[2]:
        return handle
    names = LowLatencyHandle._fields
    key = None
    if type(handle) is tuple and len(handle) == len(names):
        src_info, ranges, most, hidden, num_experts = handle
        if type(most) is type(hidden) is type(num_experts) is int:
            key = party.num_ranks, party.device, kind_of(src_info), kind_of(ranges), most, hidden, num_experts
            if key in _handles:
                return make(LowLatencyHandle, handle)
    if not isinstance(handle, (tuple, list)) or len(handle) != len(names):
        given = f"{len(handle)} elements" if isinstance(handle, (tuple, list)) else type(handle).__name__
        raise ArgumentError("handle", given, f"the {len(names)} elements that low_latency_dispatch returned")
    most = check_int("handle.num_max_dispatch_tokens_per_rank", handle[2], minimum=1)
    hidden = check_int("handle.hidden", handle[3], minimum=1)
    num_experts = check_num_experts(party, "handle.num_experts", handle[4])
    num_local, slab = num_experts // party.num_ranks, party.num_ranks * most
    src_info = check_tensor(
        "handle.src_info", handle[0], shape=(num_local, slab), dtypes=(torch.int32,), device=party.device
    )
    ranges = check_tensor(
        "handle.layout_range",
        handle[1],
        shape=(num_local, party.num_ranks),
        dtypes=(torch.int64,),
        device=party.device,
    )
    if key is not None:
        _handles.keep(key, True)
    return LowLatencyHandle(src_info, ranges, most, hidden, num_experts)


def _signature(
    operation: OperationKind, scale_format: ScaleFormat, hidden: int, num_topk: int, num_experts: int, most: int
) -> Signature:
    return Signature(operation, int(scale_format), hidden, num_topk, num_experts, 0, 0, 0, most)


def combine_buffer_shape(party: Party, known: LowLatencyHandle) -> tuple[int, int, int]:
    """[L, R * N, H] of the rows that combine takes along a handle."""
    return known.num_experts // party.num_ranks, party.num_ranks * known[2], known.hidden


def check_stats(party: Party, name: str, stats: object, length: int, dtype: torch.dtype) -> torch.Tensor | None:
    """Return statistics [length] that are added to, checked; None stays None."""
    if stats is None:
        return None
    checked = check_tensor(name, stats, shape=(length,), dtypes=(dtype,), device=party.device, contiguous=True)
    require(not checked.requires_grad, name, describe(checked), "a tensor that does not require a gradient")
    return checked
