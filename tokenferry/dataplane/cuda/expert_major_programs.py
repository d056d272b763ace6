"""The kernels for expanded rows: their variants, their parameters in order, and how many programs work."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from tokenferry.dataplane import Outputs
from tokenferry.dataplane.cuda.kernels import expert_major as kernels
from tokenferry.dataplane.cuda.launch import Kernel, Variant
from tokenferry.dataplane.cuda.programs import MOST_SPANS, Target, row_bytes, spans_of, tokens_per_tile

_I8, _I32, _I64, _F32 = torch.uint8, torch.int32, torch.int64, torch.float32

_PACK = Kernel(kernels.pack, (_I64, _I64, _I32, None, None))
_SOURCES = Kernel(kernels.sources, (_I32, _I32, _I32, _I64, None, None, None))
_PAD = Kernel(kernels.pad, (_I32, _I32, _F32, _I32, None, None))
_SUM_COPIES = {
    (dtype, wide): Kernel(kernels.sum_copies, (dtype, _I32, wide, _I32, _I64, _I64, None, None, None, None))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for wide in {dtype, torch.promote_types(dtype, torch.float32)}
}
_COUNTS = 32768
"""Counts of the spans before its own that a program of ``pack`` has under way at a time."""
_PROGRAMS = 512
"""Programs of kernels that wait for nobody."""


def _power_of_two(number: int) -> int:
    return int(triton.next_power_of_2(max(number, 1)))


def pack(
    stream: int,
    topk_idx: torch.Tensor,
    packed: torch.Tensor,
    per_expert: torch.Tensor,
    num_experts: int,
    target: Target,
) -> None:
    """Launch ``pack``; ``per_expert``: of the ``layout`` of these choices, with the counts of spans behind."""
    num_tokens, num_topk = topk_idx.shape
    arguments = topk_idx.data_ptr(), packed.data_ptr(), per_expert.data_ptr(), num_tokens, num_experts
    _pack(num_topk, num_experts, target).launch(spans_of(num_tokens, num_topk, num_experts)[0], stream, arguments)


@functools.cache
def _pack(num_topk: int, num_experts: int, target: Target) -> Variant:
    bins = _power_of_two(num_experts)
    return _PACK.variant(
        8,
        K=num_topk,
        KB=_power_of_two(num_topk),
        EB=bins,
        TILE=tokens_per_tile(num_topk),
        ROWS=min(max(_COUNTS // bins, 1), MOST_SPANS),
    )


def sources(
    stream: int, outputs: Outputs, prefix: torch.Tensor, num_max_tokens: int, rank: int, target: Target
) -> None:
    """Launch ``sources``."""
    assert outputs.metadata is not None
    assert outputs.recv_src_idx is not None
    assert outputs.topk_idx is not None
    num_rows, num_topk = outputs.topk_idx.shape
    tensors = (outputs.metadata, prefix, outputs.recv_src_idx, outputs.topk_idx)
    addresses = [tensor.data_ptr() for tensor in tensors]
    programs = min(max(-(-num_rows // _SOURCE_ROWS), 1), _PROGRAMS)
    _sources(num_topk, target).launch(programs, stream, (*addresses, num_rows, num_max_tokens, rank))


_SOURCE_ROWS = 32


@functools.cache
def _sources(num_topk: int, target: Target) -> Variant:
    return _SOURCES.variant(4, R=target.num_ranks, K=num_topk, KB=_power_of_two(num_topk), RT=_SOURCE_ROWS)


def pad(stream: int, outputs: Outputs, ends: torch.Tensor, alignment: int, target: Target) -> None:
    """Launch ``pad``."""
    assert outputs.topk_weights is not None
    scales = outputs.scales
    variant = _pad(row_bytes(outputs.rows), row_bytes(scales), target)
    addresses = (
        outputs.rows.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        outputs.topk_weights.data_ptr(),
        ends.data_ptr(),
    )
    variant.launch(ends.numel(), stream, (*addresses, alignment, outputs.rows.size(0)))


@functools.cache
def _pad(row_bytes: int, scale_bytes: int, target: Target) -> Variant:
    block = min(_power_of_two(row_bytes // 4), 1024)
    return _PAD.variant(4, WORDS=row_bytes // 4, SCALE_WORDS=scale_bytes // 4, BLOCK=block)


def sum_copies(
    stream: int,
    x: torch.Tensor,
    metadata: torch.Tensor,
    out: torch.Tensor,
    prefix: torch.Tensor,
    context: tuple[int, int],
    rank: int,
    operation: int,
    target: Target,
) -> None:
    """Launch ``sum_copies``; ``context``: state, status."""
    num_rows, width = out.shape
    variant = _sum_copies(x.dtype, out.dtype, width, metadata.size(1) - 2, target)
    addresses = (x.data_ptr(), metadata.data_ptr(), out.data_ptr(), prefix.data_ptr(), *context)
    variant.launch(max(min(num_rows, _PROGRAMS), 1), stream, (*addresses, x.size(0), num_rows, rank, operation))


@functools.cache
def _sum_copies(dtype: torch.dtype, wide: torch.dtype, width: int, num_topk: int, target: Target) -> Variant:
    return _SUM_COPIES[dtype, wide].variant(
        8,
        WIDTH=width,
        K=num_topk,
        ACC=tl.float64 if dtype == torch.float64 else tl.float32,
        R=target.num_ranks,
        BLOCK=min(_power_of_two(width), 8192 // dtype.itemsize),
    )
