"""Counts and membership of a rank's tokens. No communication."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.sync import is_last
from tokenferry.dataplane.cuda.kernels.words import BAD_INPUT, LAYOUT_ARRIVED


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
):
    """``counts``: int32 [R + E]: tokens by rank, then choices by expert. ``member``: bool [T, R] as uint8.

    ``sums``: int32 [R + E], zeros before and after: where the programs add up.
    """
    per_rank = num_experts // R
    k = tl.arange(0, KB)
    bins = tl.arange(0, EB)
    for start in range(tl.program_id(0) * BLOCK, num_tokens, tl.num_programs(0) * BLOCK):
        t = start + tl.arange(0, BLOCK)
        live = (t < num_tokens)[:, None] & (k < K)[None, :]
        ids = tl.load(topk_idx + t[:, None] * K + k[None, :], mask=live, other=-1)
        wrong = (ids < -1) | (ids >= num_experts)
        if tl.max(wrong.to(tl.int32)) > 0:
            tl.store(state + BAD_INPUT, 1)
        chosen = (ids >= 0) & (ids < num_experts)
        expert = tl.where(chosen, ids, 0).to(tl.int32)
        flat = tl.reshape(expert, (BLOCK * KB,))
        picked = tl.histogram(flat, EB, mask=tl.reshape(chosen, (BLOCK * KB,)))
        tl.atomic_add(sums + R + bins, picked, mask=(bins < num_experts) & (picked > 0), sem="relaxed", scope="gpu")
        rank_of = tl.where(chosen, expert // per_rank, -1)
        for rank in range(R):
            hit = tl.max((rank_of == rank).to(tl.int32), axis=1)
            tl.store(member + t * R + rank, hit.to(tl.uint8), mask=t < num_tokens)
            tl.atomic_add(sums + rank, tl.sum(hit), sem="relaxed", scope="gpu")
    if is_last(state + LAYOUT_ARRIVED, tl.num_programs(0).to(tl.int64)):
        for first in range(0, R + num_experts, EB):
            i = first + bins
            inside = i < R + num_experts
            tl.store(counts + i, tl.load(sums + i, mask=inside, other=0), mask=inside)
            tl.store(sums + i, tl.zeros([EB], tl.int32), mask=inside)
