"""The kernels' variants, their parameters in order, and how many programs work."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from tokenferry.dataplane import Outputs, SendPlan, Signature
from tokenferry.dataplane.cuda.kernels import bulk_combine as bulk_combine_kernels
from tokenferry.dataplane.cuda.kernels import bulk_dispatch as bulk_dispatch_kernels
from tokenferry.dataplane.cuda.kernels import bulk_sources
from tokenferry.dataplane.cuda.kernels import clear as clear_kernels
from tokenferry.dataplane.cuda.kernels import combine as combine_kernels
from tokenferry.dataplane.cuda.kernels import dispatch as dispatch_kernels
from tokenferry.dataplane.cuda.kernels import layout as layout_kernels
from tokenferry.dataplane.cuda.kernels import notify as notify_kernels
from tokenferry.dataplane.cuda.kernels.bulk import SHARED_BYTES
from tokenferry.dataplane.cuda.launch import Call, Job, Kernel, Placed, Variant
from tokenferry.handles import DispatchHandle

_I8, _I32, _I64, _F32 = torch.uint8, torch.int32, torch.int64, torch.float32
_CONTEXT = (_I64, _I64, _I32, _I64, _I64)
"""Heap table, state, ready words, region table, status."""

_LAYOUT = Kernel(layout_kernels.layout, (_I64, _I32, _I32, _I8, _I64, None, None))
_NOTIFY = Kernel(
    notify_kernels.notify,
    (_I64, _I64, _I32, _I64, _I64, _I8, *(_I32,) * 6, *(None,) * 13),
)
_DISPATCH = Kernel(
    dispatch_kernels.dispatch,
    (*_CONTEXT, _I8, _I8, _I64, _F32, _I8, _I8, _I64, _F32, *(_I32,) * 4, *(None,) * 18),
)
_COMBINE = {
    (dtype, sums): Kernel(
        combine_kernels.combine,
        (*_CONTEXT, dtype, _F32, sums, _F32, dtype, dtype, _I32, _I32, _I32, *(None,) * 11),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for sums in {dtype, torch.promote_types(dtype, torch.float32)}
}
"""By the dtype of the rows and that of their sums, which is a wider one only where sums are summed again."""
_CLEAR = Kernel(clear_kernels.clear, (_I32, _I32, None, None, None))
_BULK_DISPATCH = Kernel(bulk_dispatch_kernels.dispatch, _DISPATCH.types)
_BULK_COMBINE = {
    dtypes: Kernel(bulk_combine_kernels.combine, kernel.types)
    for dtypes, kernel in _COMBINE.items()
    if torch.float64 not in dtypes
}
_TOKENS_PER_BLOCK = 256
_PAIRS_PER_TILE = 256
"""Choices that a program looks at in one step where each program has a span of tokens."""
MOST_SPANS = 128
"""A power of two: about as many programs run at a time, and each reads what those before it have counted."""
_CLEARING_PROGRAMS = 264
"""Two an SM, or a little more."""
_FEWEST_SLOTS = 4
_FEWEST_SHARED = 3
"""Slots of a dispatching warp's ring where several warps share the memory."""
_MOST_SUMS = 64
"""Float32 sums that a thread keeps in registers."""
_SUMMING_WARPS = 8
"""Of a program, in groups that sum a token each."""
_SUMMED = 2
"""Slots of a group's ring that are being summed."""


class Target(NamedTuple):
    """What kernels are compiled for."""

    num_ranks: int
    can_bulk: bool
    """Whether the GPU has the bulk-copy engine."""
    device: int
    """Index of the GPU: a compiled kernel is loaded on one."""
    has_fp8: bool = True
    """Whether the GPU converts to FP8."""


class HeldTables(NamedTuple):
    """The routes of a combine of held rows: what ``note_held`` wrote, and the tokens."""

    table: torch.Tensor
    """int32 [4, R]."""
    tokens: torch.Tensor
    """int32 [M]."""
    send_head: torch.Tensor
    """int32 [T, R]."""


def _power_of_two(number: int) -> int:
    return int(triton.next_power_of_2(max(number, 1)))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


@functools.lru_cache(maxsize=1024)
def number_of(signature: Signature) -> int:
    """A signature in one word, the same in every process: integers hash alike everywhere."""
    return hash(tuple(int(value) for value in signature))


# Between a call and its launches every function and every look at a tensor is paid for by the host: so the shapes are
# read by index, which costs a third of ``size``, and nothing is called in passing.


def row_bytes(tensor: torch.Tensor | None) -> int:
    """Bytes of a row of a tensor [n, width]; 0 if there is none."""
    return 0 if tensor is None else tensor.shape[1] * tensor.itemsize


def _width(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.shape[1]


def dispatch_record(plan: SendPlan) -> int:
    """Bytes of a token in the stage."""
    record = -(-plan.rows.shape[1] * plan.rows.itemsize // 16) * 16
    if plan.scales is not None:
        record += _aligned(row_bytes(plan.scales))
    if plan.topk_idx is not None:
        num_topk = plan.topk_idx.shape[1]
        record += _aligned(8 * num_topk) + _aligned(4 * num_topk)
    return record


def combine_record(columns: Sequence[torch.Tensor]) -> int:
    """Bytes of a row in the stage."""
    record = 0
    for column in columns:
        record += -(-column.shape[1] * column.itemsize // 16) * 16
    return record


def most_record(row_bytes: int) -> int:
    """Bytes that a row of so many bytes in four columns takes in the stage at most."""
    return _aligned(row_bytes) + 3 * 16


def layout(
    stream: int,
    topk_idx: torch.Tensor,
    sums: torch.Tensor,
    counts: torch.Tensor,
    member: torch.Tensor,
    state: torch.Tensor,
    num_experts: int,
    target: Target,
    num_spans: int = 0,
) -> None:
    """Launch ``layout``; ``num_spans``: those that ``counts`` has room for behind the counts."""
    num_tokens, num_topk = topk_idx.shape
    variant = _layout(num_topk, num_experts, num_spans > 0, target)
    arguments = (
        topk_idx.data_ptr(), sums.data_ptr(), counts.data_ptr(), member.data_ptr(), state.data_ptr(), num_tokens,
        num_experts,
    )  # fmt: skip
    variant.launch(num_spans or _layout_programs(num_tokens), stream, arguments)


@functools.cache
def _layout(num_topk: int, num_experts: int, spans: bool, target: Target) -> Variant:
    return _LAYOUT.variant(
        8,
        R=target.num_ranks,
        K=num_topk,
        KB=_power_of_two(num_topk),
        EB=_power_of_two(num_experts),
        BLOCK=tokens_per_tile(num_topk) if spans else _TOKENS_PER_BLOCK,
        SPANS=spans,
    )


def _layout_programs(num_tokens: int) -> int:
    return min(max(-(-num_tokens // _TOKENS_PER_BLOCK), 1), 16)


def tokens_per_tile(num_topk: int) -> int:
    """Tokens with as many choices as a program looks at in one step."""
    return max(_PAIRS_PER_TILE // _power_of_two(num_topk), 1)


@functools.lru_cache(maxsize=1024)
def spans_of(num_tokens: int, num_topk: int, num_experts: int) -> tuple[int, int]:
    """Spans of tokens that are counted apart, one a program; int32 words of their counts, with some to align them."""
    spans = min(max(-(-num_tokens // tokens_per_tile(num_topk)), 1), MOST_SPANS)
    return spans, spans * _power_of_two(num_experts) + 3


def notify_call(
    plan: SendPlan,
    signature: int,
    num_local: int,
    list_capacity: int,
    rank: int,
    operation: int,
    timeout: int,
    host_waits: bool,
    target: Target,
) -> Call:
    """What a ``notify`` launches for plans of these shapes; its context ends with the words for the host."""
    experts, alignment = plan.experts, 1 if plan.experts is None else plan.experts.alignment
    numbers = (
        signature, plan.rows.shape[0], plan.num_worst_tokens, num_local, alignment, list_capacity, rank, operation,
        timeout,
    )  # fmt: skip
    variant = _notify(host_waits, target, experts is not None, experts is not None and experts.expand)
    return Call(variant.ending(*numbers), target.num_ranks + 1)


def notify_tensors(
    plan: SendPlan,
    send_head: Placed | None,
    prefix: Placed | None,
    channels: Placed | None,
    tables: Placed | None = None,
) -> tuple[Placed | None, ...]:
    """The tensors of a ``notify``, in the order of its parameters; ``tables``: of the plan's experts."""
    given = (plan.is_token_in_rank, plan.num_tokens_per_rank, plan.num_tokens_per_expert)
    return (*given, send_head, prefix, channels, tables)


@functools.cache
def _notify(host_waits: bool, target: Target, tables: bool, expand: bool) -> Variant:
    return _NOTIFY.variant(
        8,
        HOST_WAITS=host_waits,
        TABLES=tables,
        EXPAND=expand,
        NUM_COLUMNS=4,
        R=target.num_ranks,
        RB=_power_of_two(target.num_ranks),
        BLOCK=1024,
    )


def dispatch_call(
    plan: SendPlan,
    signature: int,
    list_capacity: int,
    stage: tuple[int, int],
    rank: int,
    operation: int,
    timeout: int,
    target: Target,
    num_sms: int,
) -> Call:
    """What a ``dispatch`` launches for plans of these shapes.

    In front of its numbers come, behind the places, the rows of the outputs: those received; those expanded, or 0.
    """
    num_local = 0 if plan.num_tokens_per_expert is None else plan.num_tokens_per_expert.shape[0] // target.num_ranks
    first_expert, most, expands = rank * num_local, 0, False
    if plan.part is not None and plan.part.expert_ids is not None:
        first_expert, num_local = plan.part.expert_ids.start, len(plan.part.expert_ids)
    if plan.experts is not None:
        num_local, expands = plan.experts.num_local, plan.experts.expand
        first_expert = rank * num_local
        most = plan.experts.num_max_tokens if expands else 0
    variant = _dispatch(
        plan.handle is not None,
        plan.rows.shape[1] * plan.rows.itemsize,
        0 if plan.scales is None else row_bytes(plan.scales),
        0 if plan.topk_idx is None else plan.topk_idx.shape[1],
        target,
        expands,
        plan.part is not None,
    )
    numbers = (
        signature,
        plan.rows.shape[0],
        first_expert,
        num_local,
        most,
        list_capacity,
        *stage,
        max(num_sms // 2, 1),
        rank,
        operation,
        timeout,
    )
    return Call(variant.ending(*numbers), max(num_sms, 2))


def dispatch_tensors(
    plan: SendPlan,
    outputs: Outputs,
    src_idx: torch.Tensor | None,
    prefix: Placed,
    bases: Placed | None = None,
) -> tuple[Placed | None, ...]:
    """The tensors of a ``dispatch``, in the order of its parameters.

    Expanded, the plan's ids are packed, and ``bases`` are those that ``notify`` wrote. Of a part, ``prefix`` is what
    ``announce_part`` wrote.
    """
    metadata = None
    if plan.experts is not None and plan.experts.expand:
        metadata = outputs.metadata if plan.experts.metadata is None else plan.experts.metadata
    own = (plan.rows, plan.scales, plan.topk_idx, plan.topk_weights)
    out = (outputs.rows, outputs.scales, outputs.topk_idx, outputs.topk_weights)
    return (*own, *out, src_idx, prefix, metadata, bases)


@functools.cache
def _dispatch(
    cached: bool,
    row_bytes: int,
    scale_bytes: int,
    num_topk: int,
    target: Target,
    expand: bool,
    placed: bool,
) -> Variant:
    """The variant by the bulk-copy engine, unless a few rows do not fit shared memory."""
    slot = bulk_dispatch_kernels.slot_bytes(row_bytes, scale_bytes, num_topk, expand)
    room = SHARED_BYTES - bulk_sources.TABLE_BYTES - 1024 if target.can_bulk else 0
    for num_warps in (8, 4, 2, 1):
        slots = min(room // (num_warps * slot), 16)
        if slots >= (_FEWEST_SHARED if num_warps > 1 else _FEWEST_SLOTS):
            return _BULK_DISPATCH.variant(
                num_warps,
                CACHED=cached,
                EXPAND=expand,
                PLACED=placed,
                ROW=row_bytes,
                SCALES=scale_bytes,
                K=num_topk,
                R=target.num_ranks,
                W=num_warps,
                SLOT=slot,
                SLOTS=slots,
                LAG=slots - _behind(slots),
                TABLE=bulk_sources.TABLE_BYTES,
            )
    return _DISPATCH.variant(
        8,
        CACHED=cached,
        EXPAND=expand,
        PLACED=placed,
        WORDS=row_bytes // 4,
        SCALE_WORDS=scale_bytes // 4,
        K=num_topk,
        KB=_power_of_two(num_topk),
        R=target.num_ranks,
        RT=4,
        BLOCK=min(_power_of_two(row_bytes // 4), 1024),
        SMALL=min(_power_of_two(max(scale_bytes // 4, 2 * num_topk)), 256),
    )


def _behind(slots: int) -> int:
    """Slots of a ring that are being written to global memory, or wait for it."""
    return 3 if slots > 5 else 2 if slots > 3 else 1


def combine_call(
    columns: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    num_biases: int,
    stage: tuple[int, int],
    rank: int,
    operation: int,
    timeout: int,
    target: Target,
    num_sms: int,
    held: bool = False,
) -> Call:
    """What a ``combine`` launches, of however many rows of these widths.

    Behind the two places come the signature and how many tokens and rows there are.
    """
    rows, num_topk = columns[0], 0 if len(columns) == 1 else columns[1].shape[1]
    variant = _combine((rows.dtype, outs[0].dtype), rows.shape[1], num_topk, num_biases, target, held)
    numbers = (*stage, max(num_sms // 2, 1), rank, operation, timeout)
    return Call(variant.ending(*numbers), max(num_sms, 2))


def combine_tensors(
    columns: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    handle: DispatchHandle,
    held: HeldTables | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The tensors of a ``combine``, in the order of its parameters."""
    weights, out_weights = (columns[1], outs[1]) if len(columns) > 1 else (None, None)
    first, second = (biases[0] if biases else None, biases[1] if len(biases) > 1 else None)
    prefix, _, _, src_idx, _, send_head = handle
    routes = (prefix, src_idx, send_head) if held is None else held
    return (columns[0], weights, outs[0], out_weights, first, second, *routes)


@functools.cache
def _combine(
    dtypes: tuple[torch.dtype, torch.dtype], width: int, num_topk: int, num_biases: int, target: Target, held: bool
) -> Variant:
    """The variant by the bulk-copy engine, unless rows do not fit registers and shared memory."""
    item = dtypes[0].itemsize
    of_group = max(_power_of_two(width) // (32 * _MOST_SUMS), 1)
    # The ring is the larger of two allocations, and so the first.
    block = max(_power_of_two(width), 1024 * of_group // item)
    slots = min((SHARED_BYTES - bulk_combine_kernels.EXTRA_BYTES) // (block * item), bulk_combine_kernels.MOST_SLOTS)
    groups = 1
    while groups * of_group < _SUMMING_WARPS and slots // (2 * groups) >= _FEWEST_SLOTS:
        groups *= 2
    biases = {"BIAS_0": num_biases > 0, "BIAS_1": num_biases > 1}
    if target.can_bulk and dtypes in _BULK_COMBINE and slots >= _FEWEST_SLOTS and of_group <= _SUMMING_WARPS:
        return _BULK_COMBINE[dtypes].variant(
            groups * of_group,
            WIDTH=width,
            ITEM=item,
            K=num_topk,
            **biases,
            HELD=held,
            R=target.num_ranks,
            W=groups * of_group,
            G=groups,
            BLOCK=block,
            SLOTS=slots // groups,
            LAG=slots // groups - _SUMMED,
        )
    return _COMBINE[dtypes].variant(
        8,
        WIDTH=width,
        ITEM=item,
        ACC=tl.float64 if dtypes[0] == torch.float64 else tl.float32,
        K=num_topk,
        KB=_power_of_two(num_topk),
        **biases,
        HELD=held,
        R=target.num_ranks,
        RT=2,
        BLOCK=min(_power_of_two(width), 4096 // item),
        SMALL=_power_of_two(num_topk),
    )


def clear(stream: int, rows: torch.Tensor, places: torch.Tensor, target: Target) -> None:
    """Launch ``clear``."""
    num_rows, width = rows.shape
    words = width * rows.itemsize // 4
    arguments = (places.data_ptr(), rows.data_ptr(), places.stride(0), num_rows, words)
    _clear(target).launch(min(num_rows, _CLEARING_PROGRAMS), stream, arguments)


@functools.cache
def _clear(target: Target) -> Variant:
    return _CLEAR.variant(4, BLOCK=1024)


def to_warm(
    plans: Sequence[SendPlan],
    reduces: Sequence[Sequence[torch.Tensor]],
    num_experts: int,
    target: Target,
) -> Iterator[Job]:
    """What dispatches of such plans and combines of such columns launch, and what comes before.

    With a part among the plans, the combines are of held rows, and their sums of both dtypes.
    """
    held = any(plan.part is not None for plan in plans)
    for host_waits in (True, False):
        yield functools.partial(_notify, host_waits, target, False, False)
    yield functools.partial(_clear, target)
    for plan in plans:
        if plan.topk_idx is not None:
            ranks = plan.is_token_in_rank.size(1)
            yield functools.partial(
                _layout, plan.topk_idx.size(1), num_experts, False, target._replace(num_ranks=ranks)
            )
        widths = row_bytes(plan.rows), row_bytes(plan.scales), _width(plan.topk_idx)
        yield functools.partial(_dispatch, plan.handle is not None, *widths, target, False, plan.part is not None)
    for columns in reduces:
        dtype, num_topk = columns[0].dtype, columns[1].size(1) if len(columns) > 1 else 0
        for sums in sorted({dtype, torch.promote_types(dtype, torch.float32)} if held else {dtype}, key=str):
            yield functools.partial(_combine, (dtype, sums), columns[0].size(1), num_topk, 0, target, held)
