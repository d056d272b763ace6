"""The variants of the low-latency kernels, their parameters in order, and where things lie in a slot."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton

from tokenferry.config import align_up
from tokenferry.dataplane import ScaleFormat
from tokenferry.dataplane.cuda.kernels import low_latency_combine as combine_kernels
from tokenferry.dataplane.cuda.kernels import low_latency_dispatch as dispatch_kernels
from tokenferry.dataplane.cuda.launch import Kernel, Variant
from tokenferry.dataplane.cuda.programs import Target

_I8, _I32, _I64, _F32, _BF16 = torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16
_EXACT = {"enable_fp_fusion": False}  # a product is rounded before it is added, as on CPU ranks
_DISPATCH = Kernel(
    dispatch_kernels.dispatch,
    (_I64, _I64, _I64, _I64, _I64, _BF16, _I8, _I32, _I32, _I64, _I32, *(None,) * 14),
    _EXACT,
)
_COMBINE = Kernel(
    combine_kernels.combine,
    (_I64, _I64, _I64, _I64, _I64, _F32, _BF16, _I32, _BF16, *(None,) * 11),
    _EXACT,
)
GROUP = 128
NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
"""Threads of a program; one where programs are simulated, whose polls are of as many words as there are ranks."""
PART = 1024
"""Elements of a row that a program moves at a time: 16 bytes a thread."""


class DispatchShape(NamedTuple):
    """What variants of dispatch are for."""

    scale_format: ScaleFormat
    hidden: int
    num_topk: int
    num_local_experts: int
    shrinks: bool
    depth: int


class CombineShape(NamedTuple):
    """What variants of combine are for."""

    hidden: int
    num_topk: int
    num_local_experts: int
    shrinks: bool
    exact: bool
    depth: int


def _power_of_two(number: int) -> int:
    return int(triton.next_power_of_2(max(number, 1)))


def num_scales(scale_format: ScaleFormat, hidden: int) -> int:
    """Words of 4 bytes that the scales of a row take."""
    if scale_format == ScaleFormat.NONE:
        return 0
    groups = hidden // GROUP
    return -(-groups // 4) if scale_format == ScaleFormat.UE8M0 else groups


def num_parts(hidden: int) -> int:
    """Parts of a row."""
    return -(-hidden // (GROUP * _num_groups(hidden)))


def _num_groups(hidden: int) -> int:
    return min(max(_power_of_two(-(-hidden // GROUP)), 4), PART // GROUP)


@functools.cache
def layouts(
    num_ranks: int, most: int, hidden: int, num_topk: int, num_local: int, exact: bool
) -> tuple[tuple[int, ...], ...]:
    """Offsets in a slot, and the end: of dispatch's scales, choices and counts, in bfloat16 and FP8; of weights."""
    rows = num_ranks * most
    result: list[tuple[int, ...]] = []
    for row_bytes, scales in ((2 * hidden, 0), (hidden, num_scales(ScaleFormat.PLAIN, hidden))):
        off_scales = align_up(rows * row_bytes)
        off_choices = off_scales + align_up(rows * scales * 4)
        off_counts = off_choices + align_up(rows * num_topk * 8)
        result.append((off_scales, off_choices, off_counts, off_counts + num_ranks * num_local * 4))
    off_weights = align_up((most * num_topk if exact else rows) * hidden * 2)
    return (*result, (off_weights, off_weights + rows * num_topk * 4))


def _addresses(tensors: Sequence[torch.Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def dispatch(
    stream: int,
    context: tuple[int, int, int],
    ticket: int,
    tensors: Sequence[torch.Tensor | None],
    numbers: tuple[int, ...],
    senders: int,
    receivers: int,
    shape: DispatchShape,
    target: Target,
) -> None:
    """Launch ``dispatch``: so many programs that send and that receive, or none of one kind."""
    variant = _dispatch(senders > 0, receivers > 0, shape, target)
    variant.launch(senders + receivers, stream, (*context, ticket, *_addresses(tensors), *numbers, senders))


@functools.cache
def _dispatch(sends: bool, receives: bool, shape: DispatchShape, target: Target) -> Variant:
    topk = _power_of_two(shape.num_topk)
    num_experts = shape.num_local_experts * target.num_ranks
    return _DISPATCH.variant(
        NUM_WARPS,
        SENDS=sends,
        RECEIVES=receives,
        FORMAT=int(shape.scale_format),
        HAS_FP8=target.has_fp8,
        SHRINK=shape.shrinks,
        H=shape.hidden,
        S=num_scales(shape.scale_format, shape.hidden),
        K=shape.num_topk,
        KB=topk,
        E=num_experts,
        L=shape.num_local_experts,
        GROUPS=_num_groups(shape.hidden),
        BINS=min(_power_of_two(num_experts), 1024),
        LB=min(_power_of_two(shape.num_local_experts), 128),
        BLOCK=min(4096 // topk, 1024),
        R=target.num_ranks,
        RB=_power_of_two(target.num_ranks),
        DEPTH=shape.depth,
        THREADS=max(THREADS, _power_of_two(target.num_ranks)),
    )


def combine(
    stream: int,
    context: tuple[int, int, int],
    ticket: int,
    tensors: Sequence[torch.Tensor | None],
    numbers: tuple[int, ...],
    senders: int,
    receivers: int,
    shape: CombineShape,
    target: Target,
) -> None:
    """Launch ``combine``: so many programs that send and that receive, or none of one kind."""
    variant = _combine(senders > 0, receivers > 0, shape, target)
    variant.launch(senders + receivers, stream, (*context, ticket, *_addresses(tensors), *numbers, senders))


@functools.cache
def _combine(sends: bool, receives: bool, shape: CombineShape, target: Target) -> Variant:
    return _COMBINE.variant(
        NUM_WARPS,
        SENDS=sends,
        RECEIVES=receives,
        EXACT=shape.exact,
        SHRINK=shape.shrinks,
        H=shape.hidden,
        K=shape.num_topk,
        KB=_power_of_two(shape.num_topk),
        E=shape.num_local_experts * target.num_ranks,
        L=shape.num_local_experts,
        WIDTH=GROUP * _num_groups(shape.hidden),
        BLOCK=1024,
        R=target.num_ranks,
        RB=_power_of_two(target.num_ranks),
        DEPTH=shape.depth,
        THREADS=max(THREADS, _power_of_two(target.num_ranks)),
    )


def warm(dispatches: DispatchShape, combines: CombineShape, target: Target) -> None:
    """Compile what operations of such shapes launch."""
    for sends, receives in ((True, True), (True, False), (False, True)):
        _dispatch(sends, receives, dispatches, target)
        _combine(sends, receives, combines, target)
