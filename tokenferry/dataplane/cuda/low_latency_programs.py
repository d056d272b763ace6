"""The variants of the low-latency kernels, their parameters in order, and where things lie in a slot."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton

from tokenferry.config import align_up
from tokenferry.dataplane import ScaleFormat
from tokenferry.dataplane.cuda.kernels import low_latency_combine as combine_kernels
from tokenferry.dataplane.cuda.kernels import low_latency_dispatch as dispatch_kernels
from tokenferry.dataplane.cuda.launch import Job, Kernel, Variant
from tokenferry.dataplane.cuda.programs import Target

_I8, _I32, _I64, _F32, _BF16 = torch.uint8, torch.int32, torch.int64, torch.float32, torch.bfloat16
_EXACT = {"enable_fp_fusion": False}
"""A product is rounded before it is added, as on CPU ranks."""
_REGISTERS = {4: 128, 2: 255}
"""That a thread may take, by the programs that then run on an SM."""
_DISPATCH = {
    (an_sm, overlaps): Kernel(
        dispatch_kernels.dispatch,
        (_I64, _I64, _I64, _I64, _I64, _BF16, _I8, _I32, _I32, _I64, _I32, *(None,) * 16),
        {**_EXACT, "maxnreg": registers, "launch_pdl": overlaps},
    )
    for an_sm, registers in _REGISTERS.items()
    for overlaps in (False, True)
}
_COMBINE = {
    (an_sm, overlaps): Kernel(
        combine_kernels.combine,
        (_I64, _I64, _I64, _I64, _I64, _F32, _BF16, _I32, _BF16, *(None,) * 12),
        {**_EXACT, "maxnreg": registers, "launch_pdl": overlaps},
    )
    for an_sm, registers in _REGISTERS.items()
    for overlaps in (False, True)
}
GROUP = 128
NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
"""Threads of a program; one where programs are simulated, whose polls are of as many words as there are ranks."""
PART, LARGE_PART = 1024, 4096
"""Elements of a row that a program moves at a time: the most where tokens are many."""
MANY_ARRIVALS = 48
"""Tokens of all ranks together with which small parts would be more programs than run at a time."""
MOST_HELD = 1 << 15
"""Elements that a program holds while it waits for weights: a part of every row of a token."""


class DispatchShape(NamedTuple):
    """What variants of dispatch are for."""

    scale_format: ScaleFormat
    hidden: int
    num_topk: int
    num_local_experts: int
    num_sources: int
    """Whose tokens a rank sends: 1, or the nodes."""
    part: int
    shrinks: bool
    depth: int
    overlaps: bool = False
    """Whether programs are placed while the kernel before ends."""


class CombineShape(NamedTuple):
    """What variants of combine are for."""

    hidden: int
    num_topk: int
    num_local_experts: int
    part: int
    shrinks: bool
    exact: bool
    depth: int
    overlaps: bool = False


def _power_of_two(number: int) -> int:
    return int(triton.next_power_of_2(max(number, 1)))


def num_scales(scale_format: ScaleFormat, hidden: int) -> int:
    """Words of 4 bytes that the scales of a row take."""
    if scale_format == ScaleFormat.NONE:
        return 0
    groups = hidden // GROUP
    return -(-groups // 4) if scale_format == ScaleFormat.UE8M0 else groups


def part_of(hidden: int, num_arrivals: int, rows_held: int = 1) -> int:
    """Elements of a part: at least four groups, at most what holds the row."""
    part = LARGE_PART if num_arrivals > MANY_ARRIVALS else PART
    while part > PART and part * rows_held > MOST_HELD:
        part //= 2
    return min(max(GROUP * _power_of_two(-(-hidden // GROUP)), 4 * GROUP), part)


def programs_of_dispatch(num_topk: int, target: Target) -> int:
    """How many programs of a dispatch run on an SM at a time; fewer where choices, or FP8 by hand, take more."""
    return 4 if target.has_fp8 and num_topk <= 16 else 2


def programs_of_combine(part: int, num_topk: int, exact: bool) -> int:
    """How many programs of a combine run on an SM at a time; fewer where a part of each of a token's rows is held."""
    return 4 if exact or part * num_topk <= 8192 else 2


@functools.cache
def layouts(
    num_ranks: int, most: int, hidden: int, num_topk: int, num_local: int, num_sources: int, exact: bool
) -> tuple[tuple[int, ...], ...]:
    """Offsets in a slot, and the end: of dispatch's scales, choices and counts, in bfloat16 and FP8; of weights.

    ``most``: tokens that a rank sends, those of ``num_sources`` together.
    """
    rows = num_ranks * most
    result: list[tuple[int, ...]] = []
    for row_bytes, scales in ((2 * hidden, 0), (hidden, num_scales(ScaleFormat.PLAIN, hidden))):
        off_scales = align_up(rows * row_bytes)
        off_choices = off_scales + align_up(rows * scales * 4)
        off_counts = off_choices + align_up(rows * num_topk * 8)
        result.append((off_scales, off_choices, off_counts, off_counts + num_ranks * num_sources * num_local * 4))
    off_weights = align_up((most * num_topk if exact else rows) * hidden * 2)
    return (*result, (off_weights, off_weights + rows * num_topk * 4))


class Variants:
    """The kernel of an operation that receives at once, and the two of one that does not; compiled when needed."""

    def __init__(self, compile_one: Callable[[bool, bool], Variant]) -> None:
        self._compile = compile_one

    @functools.cached_property
    def both(self) -> Variant:
        """Sends and receives."""
        return self._compile(True, True)

    @functools.cached_property
    def send(self) -> Variant:
        """Sends."""
        return self._compile(True, False)

    @functools.cached_property
    def receive(self) -> Variant:
        """Receives."""
        return self._compile(False, True)

    def to_warm(self) -> Iterator[Job]:
        """All three."""
        for name in ("both", "send", "receive"):
            yield functools.partial(getattr, self, name)


@functools.cache
def dispatch(shape: DispatchShape, target: Target) -> Variants:
    """Those of dispatch."""
    return Variants(lambda sends, receives: _dispatch(sends, receives, shape, target))


@functools.cache
def combine(shape: CombineShape, target: Target) -> Variants:
    """Those of combine."""
    return Variants(lambda sends, receives: _combine(sends, receives, shape, target))


def _dispatch(sends: bool, receives: bool, shape: DispatchShape, target: Target) -> Variant:
    topk = _power_of_two(shape.num_topk)
    num_experts = shape.num_local_experts * target.num_ranks
    return _DISPATCH[programs_of_dispatch(shape.num_topk, target), shape.overlaps].variant(
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
        G=shape.num_sources,
        GROUPS=shape.part // GROUP,
        BINS=min(_power_of_two(num_experts), 1024),
        LB=min(_power_of_two(shape.num_local_experts), 128),
        BLOCK=min(4096 // topk, 1024),
        R=target.num_ranks,
        RB=_power_of_two(target.num_ranks),
        VB=_power_of_two(target.num_ranks * shape.num_sources),
        DEPTH=shape.depth,
        THREADS=max(THREADS, _power_of_two(target.num_ranks)),
        OVERLAPS=shape.overlaps,
    )


def _combine(sends: bool, receives: bool, shape: CombineShape, target: Target) -> Variant:
    return _COMBINE[programs_of_combine(shape.part, shape.num_topk, shape.exact), shape.overlaps].variant(
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
        WIDTH=shape.part,
        BLOCK=1024,
        R=target.num_ranks,
        RB=_power_of_two(target.num_ranks),
        DEPTH=shape.depth,
        THREADS=max(THREADS, _power_of_two(target.num_ranks)),
        OVERLAPS=shape.overlaps,
    )
