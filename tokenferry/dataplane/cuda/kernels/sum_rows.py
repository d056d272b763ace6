"""Sums of rows that lie in this rank's memory: parts of a token each from another place. Nobody waits.

``find_rows`` notes for every token and part where the row is, a few parts a launch; ``sum_rows`` adds. So no kernel
depends on how many parts or rows there are, and no table of addresses has to come from the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.rounds import lower_bound


@triton.jit
def pick(index, values):
    """The value of a number of eight."""
    picked = values[0]
    for other in tl.static_range(1, 8):
        picked = tl.where(index == other, values[other], picked)
    return picked


@triton.jit(do_not_specialize=[
    "tokens_0", "tokens_1", "tokens_2", "tokens_3", "tokens_4", "tokens_5", "tokens_6", "tokens_7",
    "rows_0", "rows_1", "rows_2", "rows_3", "rows_4", "rows_5", "rows_6", "rows_7",
    "count_0", "count_1", "count_2", "count_3", "count_4", "count_5", "count_6", "count_7",
    "first_part", "num_here", "num_parts", "num_tokens", "row_bytes",
])  # fmt: skip
def find_rows(
    found,
    tokens_0: tl.int64,
    tokens_1: tl.int64,
    tokens_2: tl.int64,
    tokens_3: tl.int64,
    tokens_4: tl.int64,
    tokens_5: tl.int64,
    tokens_6: tl.int64,
    tokens_7: tl.int64,
    rows_0: tl.int64,
    rows_1: tl.int64,
    rows_2: tl.int64,
    rows_3: tl.int64,
    rows_4: tl.int64,
    rows_5: tl.int64,
    rows_6: tl.int64,
    rows_7: tl.int64,
    count_0: tl.int64,
    count_1: tl.int64,
    count_2: tl.int64,
    count_3: tl.int64,
    count_4: tl.int64,
    count_5: tl.int64,
    count_6: tl.int64,
    count_7: tl.int64,
    first_part: tl.int32,
    num_here: tl.int32,
    num_parts: tl.int32,
    num_tokens: tl.int64,
    row_bytes: tl.int64,
    BLOCK: tl.constexpr,
):
    """``found``: int64 [T, G]: addresses, 0 where a part has no row of a token; here for parts ``first_part`` on.

    ``tokens``: addresses of ascending int64, 0 where row i is that of token i. ``rows``: where the rows begin.
    """
    i = tl.arange(0, BLOCK)
    blocks = (num_tokens + BLOCK - 1) // BLOCK
    for item in range(tl.program_id(0), blocks * num_here, tl.num_programs(0)):
        part = (item % num_here).to(tl.int32)
        first = item // num_here * BLOCK
        at = pick(part, (tokens_0, tokens_1, tokens_2, tokens_3, tokens_4, tokens_5, tokens_6, tokens_7))
        rows = pick(part, (rows_0, rows_1, rows_2, rows_3, rows_4, rows_5, rows_6, rows_7))
        count = pick(part, (count_0, count_1, count_2, count_3, count_4, count_5, count_6, count_7))
        column = found + first_part + part
        t = first + i
        if at == 0:
            tl.store(column + t * num_parts, tl.where(t < count, rows + t * row_bytes, 0), mask=t < num_tokens)
        else:
            tokens = at.to(tl.pointer_type(tl.int64))
            tl.store(column + t * num_parts, tl.zeros([BLOCK], tl.int64), mask=t < num_tokens)
            tl.debug_barrier()  # other threads write the same words now
            row = lower_bound(tokens, zero_of(count), count, first) + i
            token = tl.load(tokens + row, mask=row < count, other=num_tokens)
            here = (token >= first) & (token < tl.minimum(first + BLOCK, num_tokens))
            tl.store(column + token * num_parts, rows + row * row_bytes, mask=here)


@triton.jit
def zero_of(number):
    """0 of the same type."""
    return number * 0


@triton.jit(do_not_specialize=["num_parts", "num_tokens"])
def sum_rows(
    found,
    bias_0,
    bias_1,
    out,
    like,
    num_parts: tl.int32,
    num_tokens: tl.int64,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    BIAS_0: tl.constexpr,
    BIAS_1: tl.constexpr,
    RT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[t]`` = biases + rows of t, parts ascending, rounded once. ``like``: of the rows' type, never read."""
    for first in range(tl.program_id(0) * RT, num_tokens, tl.num_programs(0) * RT):
        t = first + tl.arange(0, RT)
        live = t < num_tokens
        for start in tl.static_range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            wanted = live[:, None] & (column < WIDTH)[None, :]
            place = t.to(tl.int64)[:, None] * WIDTH + column[None, :]
            total = tl.zeros([RT, BLOCK], ACC)
            if BIAS_0:
                total += tl.load(bias_0 + place, mask=wanted, other=0.0).to(ACC)
            if BIAS_1:
                total += tl.load(bias_1 + place, mask=wanted, other=0.0).to(ACC)
            for part in range(num_parts):
                at = tl.load(found + t * num_parts + part, mask=live, other=0)
                rows = tl.multiple_of(at.to(tl.pointer_type(like.dtype.element_ty)), [ALIGN])
                there = wanted & (at != 0)[:, None]
                total += tl.load(rows[:, None] + column[None, :], mask=there, other=0.0).to(ACC)
            tl.store(out + place, total.to(out.dtype.element_ty), mask=wanted)
