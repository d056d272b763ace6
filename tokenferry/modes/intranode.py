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
from typing import NamedTuple

import torch

from tokenferry.config import align_up
from tokenferry.dataplane import DataPlane, Layout, OperationKind, Outputs, ReducePlan, SendPlan, Signature
from tokenferry.dtypes import dtype_code
from tokenferry.errors import ArgumentError
from tokenferry.handles import DispatchHandle, Handle
from tokenferry.kept import Kept, Kind, kind_of, make
from tokenferry.modes.nodes import Nodes
from tokenferry.validation import check_int, check_tensor, describe, require

topk_idx_t = torch.int64
"""Dtype of expert ids."""

MAX_TOPK = 32
ROW_ALIGNMENT = 16
COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SCALE_DTYPES = (torch.float32, torch.int32)
_HANDLE_NAMES = tuple(f"handle.{name}" for name in DispatchHandle._fields)
_HANDLE_DTYPES = (*[(torch.int32,)] * 4, (torch.bool,), (torch.int32,))


class Party(NamedTuple):
    """Who takes part, and with what."""

    plane: DataPlane
    rank: int
    num_ranks: int
    device: torch.device
    num_sms: int = 0
    """SMs that an operation may use; 0: the data plane chooses."""
    nodes: Nodes | None = None
    """The way to the ranks on other nodes, if there are any. The plane reaches the ranks of the own node."""


class Received(NamedTuple):
    """What dispatch hands out; see :meth:`tokenferry.Buffer.dispatch`."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor | None
    topk_weights: torch.Tensor | None
    num_per_expert: list[int] | None
    handle: Handle | None


class Inputs(NamedTuple):
    """What a dispatch with fresh counts is given, checked."""

    rows: Rows
    topk_idx: torch.Tensor | None
    """int64 [T, K], contiguous."""
    topk_weights: torch.Tensor | None
    """float32 [T, K], contiguous."""
    is_token_in_rank: torch.Tensor
    """bool [T, R]."""
    num_tokens_per_rank: torch.Tensor
    """int32 [R]."""
    num_tokens_per_expert: torch.Tensor
    """int32 [E]."""
    num_experts: int
    expert_alignment: int
    num_worst_tokens: int


class Rows(NamedTuple):
    """The rows that a dispatch moves."""

    x: torch.Tensor
    """[T, H], contiguous."""
    scales: torch.Tensor | None
    """[T, S], contiguous."""


class _Kind(NamedTuple):
    """What operations on rows of equal kinds have in common."""

    num_rows: int
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
_handles: Kept[bool] = Kept()


def check_topk_idx(party: Party, topk_idx: object, num_tokens: int | None, num_experts: int) -> torch.Tensor:
    """Return expert ids [T, K], checked to be -1 or in [0, E) where values are at hand."""
    ids = check_tensor(
        "topk_idx",
        topk_idx,
        shape=(num_tokens, None),
        dtypes=(topk_idx_t,),
        device=party.device,
        contiguous=True,
    )
    if ids.shape[1] > MAX_TOPK:
        raise ArgumentError("topk_idx", f"{ids.shape[1]} choices a token", f"at most {MAX_TOPK}")
    if party.plane.values_at_hand:
        check_ids(ids, num_experts)
    return ids


def check_ids(ids: torch.Tensor, num_experts: int) -> None:
    """Raise unless all expert ids are -1 or in [0, E)."""
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        allowed = f"expert ids from 0 to {num_experts - 1}, or -1 for no choice"
        require(low >= -1, "topk_idx", f"the value {low}", allowed)
        require(high < num_experts, "topk_idx", f"the value {high}", allowed)


def check_num_experts(party: Party, name: str, num_experts: int) -> int:
    """Return the number of experts if the ranks can share them evenly."""
    count = check_int(name, num_experts, minimum=1)
    if count % party.num_ranks != 0:
        raise ArgumentError(name, f"{count} experts", f"a multiple of the {party.num_ranks} ranks")
    return count


def layout(party: Party, topk_idx: torch.Tensor, num_experts: int) -> Layout:
    """Counts and membership; see :meth:`tokenferry.Buffer.get_dispatch_layout`."""
    num_experts = check_num_experts(party, "num_experts", num_experts)
    ids = check_topk_idx(party, topk_idx, None, num_experts)
    return party.plane.layout(ids, num_experts, party.num_ranks)


def check_rows(party: Party, x: object) -> Rows:
    """Return the checked input of a dispatch: a tensor, or a tuple of one-byte data and scales."""
    scales: torch.Tensor | None = None
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ArgumentError("x", f"a tuple of {len(x)}", "a tensor, or a tuple (data, scales)")
        x, given_scales = x
        data = check_tensor("x[0]", x, shape=(None, None), device=party.device)
        if data.itemsize != 1:
            raise ArgumentError("x[0]", describe(data), "one-byte elements beside scales")
        scales = check_tensor(
            "x[1]", given_scales, shape=(data.shape[0], None), dtypes=_SCALE_DTYPES, device=party.device
        )
    else:
        data = check_tensor("x", x, shape=(None, None), device=party.device)
    if data.dtype.is_complex:
        raise ArgumentError("x", describe(data), "a real dtype")
    check_row_bytes(data)
    return Rows(packed(data), None if scales is None else packed(scales))


def check_row_bytes(rows: torch.Tensor) -> None:
    """Raise unless rows are a positive multiple of 16 bytes."""
    row_bytes = rows.shape[1] * rows.itemsize
    if row_bytes == 0 or row_bytes % ROW_ALIGNMENT != 0:
        allowed = f"rows of a positive multiple of {ROW_ALIGNMENT} bytes"
        raise ArgumentError("x", f"rows of {row_bytes} bytes", allowed)


class _OwnHandle(DispatchHandle):
    """A handle as :func:`dispatch` made it, of which the shapes are known. What is made of it is a plain one."""

    fits: tuple[int, torch.device, torch.Size] | None = None
    """Ranks, device and shape of the caller's membership tensor."""

    def __reduce__(self) -> tuple[type[DispatchHandle], tuple[torch.Tensor, ...]]:
        """Copy and pickle as a plain handle: copies may end on another device."""
        return DispatchHandle, tuple(self)


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
    key = (ranks, device, *map(kind_of, handle))
    if key in _handles:
        return DispatchHandle._make(handle)
    shapes = ((ranks, ranks), (ranks, None), (ranks, None), (None,), (None, ranks), (None, ranks))
    elements = []
    for name, value, shape, dtypes in zip(_HANDLE_NAMES, handle, shapes, _HANDLE_DTYPES, strict=True):
        element = check_tensor(name, value, shape=shape, dtypes=dtypes, device=device)
        elements.append(element if element.is_contiguous() else element.contiguous())
    checked = DispatchHandle(*elements)
    num_tokens, num_heads = checked.is_token_in_rank.shape[0], checked.send_head.shape[0]
    if num_heads != num_tokens:
        allowed = f"{num_tokens}, as in is_token_in_rank"
        raise ArgumentError("handle.send_head", f"{num_heads} rows", allowed)
    if all(given is element for given, element in zip(handle, checked, strict=True)):  # nothing had to be copied
        _handles.keep(key, True)
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


def check_inputs(
    party: Party,
    x: object,
    num_tokens_per_rank: object,
    is_token_in_rank: object,
    num_tokens_per_expert: object,
    topk_idx: object,
    topk_weights: object,
    expert_alignment: int,
    num_worst_tokens: int,
) -> Inputs:
    """Check what a dispatch with fresh counts is given."""
    rows = check_rows(party, x)
    num_tokens, ranks, device = rows.x.shape[0], party.num_ranks, party.device
    int32 = (torch.int32,)
    per_rank = check_tensor(
        "num_tokens_per_rank", num_tokens_per_rank, shape=(ranks,), dtypes=int32, device=device, contiguous=True
    )
    member = check_tensor(
        "is_token_in_rank",
        is_token_in_rank,
        shape=(num_tokens, ranks),
        dtypes=(torch.bool,),
        device=device,
        contiguous=True,
    )
    per_expert = check_tensor(
        "num_tokens_per_expert", num_tokens_per_expert, shape=(None,), dtypes=int32, device=device, contiguous=True
    )
    num_experts = check_num_experts(party, "num_tokens_per_expert", per_expert.shape[0])
    if party.plane.values_at_hand:
        given, sent = per_rank.tolist(), member.sum(0).tolist()
        require(given == sent, "num_tokens_per_rank", given, f"{sent}, as in is_token_in_rank")
    expert_alignment = check_int("expert_alignment", expert_alignment, minimum=1)
    num_worst_tokens = check_int("num_worst_tokens", num_worst_tokens, minimum=0)
    if num_worst_tokens >= 1 << 31:
        raise ArgumentError("num_worst_tokens", num_worst_tokens, "less than 2^31")
    if (topk_idx is None) != (topk_weights is None):
        raise ArgumentError("topk_weights", "only one of topk_idx and topk_weights", "both or none")
    if num_worst_tokens and topk_idx is None:
        allowed = "0, or top-k tensors with it (they mark the unused rows)"
        raise ArgumentError("num_worst_tokens", f"{num_worst_tokens} without topk_idx", allowed)
    ids = weights = None
    if topk_idx is not None:
        ids = packed(check_topk_idx(party, topk_idx, num_tokens, num_experts))
        weights = check_tensor("topk_weights", topk_weights, shape=ids.shape, dtypes=(torch.float32,), device=device)
        weights = packed(weights)
    return Inputs(rows, ids, weights, member, per_rank, per_expert, num_experts, expert_alignment, num_worst_tokens)


def dispatch(party: Party, given: Inputs) -> Received:
    """Dispatch with fresh counts; see :meth:`tokenferry.Buffer.dispatch`."""
    rows, ids, weights, member = given.rows, given.topk_idx, given.topk_weights, given.is_token_in_rank
    ranks, device = party.num_ranks, party.device
    num_topk = 0 if ids is None else ids.shape[1]
    plan = SendPlan(
        *rows,
        topk_idx=ids,
        topk_weights=weights,
        is_token_in_rank=member,
        num_tokens_per_rank=given.num_tokens_per_rank,
        num_tokens_per_expert=given.num_tokens_per_expert,
        num_worst_tokens=given.num_worst_tokens,
        handle=None,
        num_sms=party.num_sms,
        may_guess=given.num_worst_tokens == 0,
    )
    signature = signature_of(OperationKind.DISPATCH, rows, num_topk, given.num_experts)
    with party.plane.dispatch(signature, plan) as exchange:
        while True:
            num_rows = exchange.num_rows
            recv_x, recv_scales = empty_rows_like(party, rows, num_rows)
            recv_ids = recv_weights = None
            if ids is not None:
                recv_ids = party.plane.empty_rows(num_rows, num_topk, topk_idx_t)
                recv_weights = party.plane.empty_rows(num_rows, num_topk, torch.float32)
            recv_src_idx = torch.empty(num_rows, dtype=torch.int32, device=device)
            if exchange.pull(Outputs(recv_x, recv_scales, recv_ids, recv_weights, recv_src_idx)):
                break
        if exchange.num_rows != num_rows:
            for output in (recv_x, recv_scales, recv_ids, recv_weights, recv_src_idx):
                if output is not None:
                    output.resize_(exchange.num_rows, *output.shape[1:])
    handle = _OwnHandle(
        rank_prefix_matrix=exchange.rank_prefix_matrix,
        channel_prefix_matrix=exchange.channel_prefix_matrix,
        recv_channel_prefix_matrix=exchange.recv_channel_prefix_matrix,
        recv_src_idx=recv_src_idx,
        is_token_in_rank=member,
        send_head=exchange.send_head,
    )
    handle.fits = (ranks, device, member.shape)
    aligned = [align_up(count, given.expert_alignment) for count in exchange.num_received_per_expert]
    return Received(recv_x, recv_scales, recv_ids, recv_weights, aligned, handle)


def cached_dispatch(party: Party, x: object, handle: object) -> Received:
    """Dispatch rows along a handle; see :meth:`tokenferry.Buffer.dispatch`."""
    plane, _, _, device, num_sms, _ = party
    kinds = tuple(map(kind_of, x)) if type(x) is tuple else (kind_of(x),)
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
    plan = make(SendPlan, (data, scales, None, None, member, None, None, 0, known, num_sms, None, None, False))
    num_rows = known.recv_src_idx.shape[0]
    recv_x = plane.empty_rows(num_rows, width, dtype)
    recv_scales = None if scales is None else plane.empty_rows(num_rows, beside, scales.dtype)
    plane.dispatch_along(signature, plan, make(Outputs, (recv_x, recv_scales, None, None, None, None)))
    return make(Received, (recv_x, recv_scales, None, None, None, None))


def _kind_of_rows(rows: Rows, kinds: Iterable[Kind | None]) -> _Kind:
    x, scales = rows
    beside = 0 if scales is None else scales.shape[1]
    signature = signature_of(OperationKind.CACHED_DISPATCH, rows)
    return _Kind(x.shape[0], x.shape[1], x.dtype, beside, signature, _are_packed(kinds))


def _are_packed(kinds: Iterable[Kind | None]) -> bool:
    """Whether tensors of such kinds have one possible stride each: not so with a dimension of one or none."""
    return all(kind is None or (kind[3] and min(kind[0]) > 1) for kind in kinds)


def combine(
    party: Party, x: torch.Tensor, handle: object, topk_weights: torch.Tensor | None, bias: object
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum the rows of every token over the ranks that had it; see :meth:`tokenferry.Buffer.combine`."""
    plane, _, _, device, num_sms, _ = party
    known = check_handle(party, handle)
    num_rows, num_tokens = known.recv_src_idx.shape[0], known.is_token_in_rank.shape[0]
    kinds = (kind_of(x),) if topk_weights is None else (kind_of(x), kind_of(topk_weights))
    key = (device, num_rows, *kinds)
    kind = _combines.get(key)
    if kind is None:
        columns = check_columns(party, x, topk_weights, num_rows)
        kind = _combines.keep(key, _kind_of_columns(columns, kinds))
    else:
        is_packed = kind.are_packed
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
    return _Kind(rows.shape[0], rows.shape[1], rows.dtype, num_topk, signature, _are_packed(kinds))


def check_columns(party: Party, x: object, topk_weights: object, num_rows: int) -> list[torch.Tensor]:
    """The rows that a combine sums, and the weights if there are any, checked: packed [num_rows, width]."""
    rows = check_tensor("x", x, shape=(num_rows, None), dtypes=COMBINE_DTYPES, device=party.device)
    check_row_bytes(rows)
    columns = [packed(rows)]
    if topk_weights is not None:
        weights = check_tensor(
            "topk_weights", topk_weights, shape=(num_rows, None), dtypes=(torch.float32,), device=party.device
        )
        if not 0 < weights.shape[1] <= MAX_TOPK:
            raise ArgumentError("topk_weights", describe(weights), f"1 to {MAX_TOPK} columns")
        columns.append(packed(weights))
    return columns


def check_biases(party: Party, bias: object, shape: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """The biases that are not None, checked, outside of autograd."""
    return [
        _resolved(check_tensor(name, given, shape=shape, dtypes=(dtype,), device=party.device))
        for name, given in zip(("bias[0]", "bias[1]"), unpack_bias(bias), strict=True)
        if given is not None
    ]


def unpack_bias(bias: object) -> tuple[object, object]:
    """The two biases of combine from its ``bias`` argument: None, one tensor, or a tuple of two."""
    if bias is None:
        return None, None
    if isinstance(bias, torch.Tensor):
        return bias, None
    if isinstance(bias, tuple) and len(bias) == 2:
        return bias[0], bias[1]
    raise ArgumentError("bias", type(bias).__name__, "None, one tensor, or a tuple of two")


def signature_of(
    operation: OperationKind,
    rows: Rows,
    num_topk: int = 0,
    num_experts: int = 0,
    *,
    handle: int = 0,
) -> Signature:
    """What all ranks must agree on when they call ``operation`` with such rows."""
    x, scales = rows
    return Signature(
        operation,
        dtype_code(x.dtype),
        x.shape[1] * x.itemsize,
        num_topk,
        num_experts,
        0 if scales is None else scales.shape[1] * scales.itemsize,
        0 if scales is None else dtype_code(scales.dtype),
        handle,
    )


def empty_rows_like(party: Party, rows: Rows, num_rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Unset outputs of ``num_rows`` rows for such rows."""
    x, scales = rows
    recv_x = party.plane.empty_rows(num_rows, x.shape[1], x.dtype)
    return recv_x, None if scales is None else party.plane.empty_rows(num_rows, scales.shape[1], scales.dtype)


def _resolved(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor outside of autograd, its values as they are in memory; itself if it is so already."""
    return tensor.detach().resolve_neg() if tensor.requires_grad or tensor.is_neg() else tensor


def packed(tensor: torch.Tensor, is_packed: bool = False) -> torch.Tensor:
    """The tensor [n, width], resolved, with strides (width, 1) also where it has one column or no rows.

    ``is_packed``: its strides are known to be these.
    """
    if tensor.requires_grad or tensor.is_neg():
        tensor = _resolved(tensor)
    if is_packed or tensor.stride() == (tensor.shape[1], 1):
        return tensor
    packed = tensor.contiguous()
    return packed.as_strided(packed.shape, (packed.size(1), 1))


def as_bytes(x: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same memory as uint8 [n, bytes of a row]; for packed rows."""
    return x.view(torch.uint8), None if scales is None else scales.view(torch.uint8)


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
