"""The kernels' variants, their parameters in order, and how many programs work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from tokenferry.dataplane import Outputs, SendPlan
from tokenferry.dataplane.cuda.kernels import combine as combine_kernels
from tokenferry.dataplane.cuda.kernels import dispatch as dispatch_kernels
from tokenferry.dataplane.cuda.kernels import layout as layout_kernels
from tokenferry.dataplane.cuda.kernels import notify as notify_kernels
from tokenferry.dataplane.cuda.launch import Kernel
from tokenferry.handles import DispatchHandle

_I8, _I32, _I64, _F32 = torch.uint8, torch.int32, torch.int64, torch.float32
_CONTEXT = (_I64, _I64, _I32, _I64, _I64)
"""Heap table, state, ready words, region table, status."""

_LAYOUT = Kernel(layout_kernels.layout, (_I64, _I32, _I32, _I8, _I64, None, None))
_NOTIFY = Kernel(
    notify_kernels.notify,
    (_I64, _I64, _I32, _I64, _I64, _I8, _I32, _I32, _I32, _I32, _I32, *(None,) * 12),
)
_DISPATCH = Kernel(
    dispatch_kernels.dispatch,
    (*_CONTEXT, _I8, _I8, _I64, _F32, _I8, _I8, _I64, _F32, _I32, _I32, *(None,) * 16),
)
_COMBINE = {
    dtype: Kernel(
        combine_kernels.combine,
        (*_CONTEXT, dtype, _F32, dtype, _F32, dtype, dtype, _I32, _I32, _I32, *(None,) * 11),
    )
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
}
_TOKENS_PER_BLOCK = 256


def _power_of_two(number: int) -> int:
    return int(triton.next_power_of_2(max(number, 1)))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // 16) * 16


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _width(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.size(1)


def dispatch_record(plan: SendPlan) -> int:
    """Bytes of a token in the stage."""
    num_topk = _width(plan.topk_idx)
    return (
        _aligned(plan.rows.size(1)) + _aligned(_width(plan.scales)) + _aligned(8 * num_topk) + _aligned(4 * num_topk)
    )


def combine_record(columns: Sequence[torch.Tensor]) -> int:
    """Bytes of a row in the stage."""
    return sum(_aligned(column.size(1) * column.element_size()) for column in columns)


def layout(
    stream: int,
    topk_idx: torch.Tensor,
    sums: torch.Tensor,
    counts: torch.Tensor,
    member: torch.Tensor,
    state: torch.Tensor,
    num_experts: int,
    num_ranks: int,
) -> None:
    """Launch ``layout``."""
    num_tokens, num_topk = topk_idx.shape
    variant = _LAYOUT.variant(
        8,
        R=num_ranks,
        K=num_topk,
        KB=_power_of_two(num_topk),
        EB=_power_of_two(num_experts),
        BLOCK=_TOKENS_PER_BLOCK,
    )
    addresses = [tensor.data_ptr() for tensor in (topk_idx, sums, counts, member, state)]
    variant.launch(_layout_programs(num_tokens), stream, (*addresses, num_tokens, num_experts))


def _layout_programs(num_tokens: int) -> int:
    return min(max(-(-num_tokens // _TOKENS_PER_BLOCK), 1), 16)


def notify(
    stream: int,
    context: tuple[int, ...],
    host: int,
    plan: SendPlan,
    results: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    places: tuple[int, ...],
    signature: int,
    num_local: int,
    list_capacity: int,
    rank: int,
    operation: int,
    timeout: int,
    host_waits: bool,
    num_ranks: int,
) -> None:
    """Launch ``notify``."""
    heap, state, ready, _, status = context
    send_head, prefix, channels = results
    num_tokens = plan.rows.size(0)
    block = min(max(_power_of_two(num_tokens), 128), 4096)
    variant = _NOTIFY.variant(
        min(block // 128, 16),
        HOST_WAITS=host_waits,
        NUM_COLUMNS=4,
        R=num_ranks,
        RB=_power_of_two(num_ranks),
        BLOCK=block,
    )
    addresses = [
        _address(tensor)
        for tensor in (
            plan.is_token_in_rank,
            plan.num_tokens_per_rank,
            plan.num_tokens_per_expert,
            send_head,
            prefix,
            channels,
        )
    ]
    numbers = (signature, num_tokens, plan.num_worst_tokens, num_local, list_capacity, rank, operation, timeout)
    variant.launch(num_ranks + 1, stream, (heap, state, ready, status, host, *addresses, *places, *numbers))


def dispatch(
    stream: int,
    context: tuple[int, ...],
    plan: SendPlan,
    outputs: Outputs,
    src_idx: torch.Tensor,
    prefix: torch.Tensor,
    places: tuple[int, ...],
    signature: int,
    num_rows: int,
    list_capacity: int,
    stage: tuple[int, int],
    rank: int,
    operation: int,
    timeout: int,
    num_ranks: int,
    num_sms: int,
    can_bulk: bool,
) -> None:
    """Launch ``dispatch``."""
    num_topk, scale_words = _width(plan.topk_idx), _width(plan.scales) // 4
    row_words = plan.rows.size(1) // 4
    num_local = 0 if plan.num_tokens_per_expert is None else plan.num_tokens_per_expert.numel() // num_ranks
    variant = _DISPATCH.variant(
        8,
        CACHED=plan.handle is not None,
        WORDS=row_words,
        SCALE_WORDS=scale_words,
        K=num_topk,
        KB=_power_of_two(num_topk),
        R=num_ranks,
        RT=4,
        BLOCK=min(_power_of_two(row_words), 1024),
        SMALL=min(_power_of_two(max(scale_words, 2 * num_topk)), 256),
    )
    own = (plan.rows, plan.scales, plan.topk_idx, plan.topk_weights)
    out = (outputs.rows, outputs.scales, outputs.topk_idx, outputs.topk_weights, src_idx, prefix)
    numbers = (
        signature,
        plan.rows.size(0),
        num_rows,
        rank * num_local,
        num_local,
        list_capacity,
        *stage,
        max(num_sms // 2, 1),
        rank,
        operation,
        timeout,
    )
    addresses = [_address(tensor) for tensor in (*own, *out)]
    variant.launch(max(num_sms, 2), stream, (*context, *addresses, *places, *numbers))


def combine(
    stream: int,
    context: tuple[int, ...],
    columns: Sequence[torch.Tensor],
    outs: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    handle: DispatchHandle,
    places: tuple[int, int],
    signature: int,
    stage: tuple[int, int],
    rank: int,
    operation: int,
    timeout: int,
    num_ranks: int,
    num_sms: int,
    can_bulk: bool,
) -> None:
    """Launch ``combine``."""
    rows = columns[0]
    weights = columns[1] if len(columns) > 1 else None
    num_topk = _width(weights)
    item = rows.element_size()
    variant = _COMBINE[rows.dtype].variant(
        8,
        WIDTH=rows.size(1),
        ITEM=item,
        ACC=tl.float64 if rows.dtype == torch.float64 else tl.float32,
        K=num_topk,
        KB=_power_of_two(num_topk),
        BIAS_0=len(biases) > 0,
        BIAS_1=len(biases) > 1,
        R=num_ranks,
        RT=2,
        BLOCK=min(_power_of_two(rows.size(1)), 4096 // item),
        SMALL=_power_of_two(num_topk),
    )
    tensors = (
        rows,
        weights,
        outs[0],
        outs[1] if len(outs) > 1 else None,
        biases[0] if biases else None,
        biases[1] if len(biases) > 1 else None,
        handle.rank_prefix_matrix,
        handle.recv_src_idx,
        handle.send_head,
    )
    numbers = (signature, outs[0].size(0), rows.size(0), *stage, max(num_sms // 2, 1), rank, operation, timeout)
    variant.launch(max(num_sms, 2), stream, (*context, *(_address(tensor) for tensor in tensors), *places, *numbers))
