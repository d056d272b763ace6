"""Counts and membership of a rank's tokens. No communication."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.sync import is_last
from tokenferry.dataplane.cuda.kernels.words import BAD_INPUT, LAYOUT_ARRIVED


@triton.jit
def span_of_program(num_tokens):
    """The tokens of this program where each has some that follow each other: from, to."""
    span = tl.cdiv(num_tokens, tl.num_programs(0))
    first = tl.program_id(0) * span
    return first, tl.minimum(first + span, num_tokens)


@triton.jit
def spans_behind(counts):
    """Where counts of spans lie, int32 [programs, EB]: on the next 16 bytes from ``counts``."""
    return tl.multiple_of(((counts.to(tl.int64) + 15) // 16 * 16).to(tl.pointer_type(tl.int32)), 16)


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def layout(
    topk_idx,
    sums,
    counts,
    member,
    state,
    num_tokens: tl.int64,
    num_experts: tl.int32,
    R: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    EB: tl.constexpr,
    BLOCK: tl.constexpr,
    SPANS: tl.constexpr,
):
    """``counts``: int32 [R + E]: tokens by rank, then choices by expert. ``member``: bool [T, R] as uint8.

    ``sums``: int32 [R + E], zeros before and after: where the programs add up.

    SPANS: behind ``counts`` each program leaves the choices by expert of a span of tokens; see :func:`spans_behind`.
    """
    per_rank = num_experts // R
    k = tl.arange(0, KB)
    bins = tl.arange(0, EB)
    begin, end, step = tl.program_id(0) * BLOCK, num_tokens, tl.num_programs(0) * BLOCK
    if SPANS:
        begin, end = span_of_program(num_tokens)
        step = BLOCK
        of_span = tl.zeros([EB], tl.int32)
    for start in range(begin, end, step):
        t = start + tl.arange(0, BLOCK)
        live = (t < end)[:, None] & (k < K)[None, :]
        ids = tl.load(topk_idx + t[:, None] * K + k[None, :], mask=live, other=-1)
        wrong = (ids < -1) | (ids >= num_experts)
        if tl.max(wrong.to(tl.int32)) > 0:
            tl.store(state + BAD_INPUT, 1)
        chosen = (ids >= 0) & (ids < num_experts)
        expert = tl.where(chosen, ids, 0).to(tl.int32)
        flat = tl.reshape(expert, (BLOCK * KB,))
        picked = tl.histogram(flat, EB, mask=tl.reshape(chosen, (BLOCK * KB,)))
        tl.atomic_add(sums + R + bins, picked, mask=(bins < num_experts) & (picked > 0), sem="relaxed", scope="gpu")
        if SPANS:
            of_span += picked
        rank_of = tl.where(chosen, expert // per_rank, -1)
        for rank in range(R):
            hit = tl.max((rank_of == rank).to(tl.int32), axis=1)
            tl.store(member + t * R + rank, hit.to(tl.uint8), mask=t < end)
            tl.atomic_add(sums + rank, tl.sum(hit), sem="relaxed", scope="gpu")
    if SPANS:
        tl.store(spans_behind(counts + R + num_experts) + tl.program_id(0) * EB + bins, of_span)
    if is_last(state + LAYOUT_ARRIVED, tl.num_programs(0).to(tl.int64)):
        for first in range(0, R + num_experts, EB):
            i = first + bins
            inside = i < R + num_experts
            tl.store(counts + i, tl.load(sums + i, mask=inside, other=0), mask=inside)
            tl.store(sums + i, tl.zeros([EB], tl.int32), mask=inside)
