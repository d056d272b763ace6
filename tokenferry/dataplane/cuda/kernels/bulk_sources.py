"""What a bulk dispatch knows of each source in a round: a table in shared memory, a thread the entry of a source.

All that is looked up for one is looked up for all at a time: before the first row stands the time of a few loads,
whatever the number of ranks.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tokenferry.dataplane.cuda.kernels.bulk import load_shared_long, store_shared_long
from tokenferry.dataplane.cuda.kernels.bulk_columns import blame
from tokenferry.dataplane.cuda.kernels.dispatch import list_of, rows_from
from tokenferry.dataplane.cuda.kernels.flags import heap_of, zero
from tokenferry.dataplane.cuda.kernels.rounds import is_staged, tokens_of
from tokenferry.dataplane.cuda.kernels.sync import column_region, inside
from tokenferry.dataplane.cuda.kernels.words import MAX_TOKENS, PLACE_MASK

ENTRY = gl.constexpr(128)
"""Bytes of a table entry: int64 words as below."""
ROWS_AT = gl.constexpr(0)
"""Where the row of token 0 would lie; the column's step behind it: bytes from token to token. So for all columns."""
SCALES_AT = gl.constexpr(16)
IDS_AT = gl.constexpr(32)
WEIGHTS_AT = gl.constexpr(48)
STEP = gl.constexpr(8)
LIST_AT = gl.constexpr(64)
COUNT = gl.constexpr(72)
START = gl.constexpr(80)
FIRST = gl.constexpr(88)
"""The first token that can be read now, and behind it the one after the last."""
LAST = gl.constexpr(96)
FIRST_TOKEN = gl.constexpr(104)
"""What is added to tokens where they are written down."""
SEARCH_STEPS = gl.constexpr(MAX_TOKENS.bit_length())
"""After which a search among the tokens of a rank is over."""
TABLE_BYTES = 32 * 128
"""Entries for as many sources as ranks can share a node."""


@gluon.jit
def put(table, source, field, value, lane0):
    """Write a word of a table entry."""
    at = table + source * ENTRY + field
    store_shared_long(at, value + lane0.to(gl.int64) * 0, lane0)


@gluon.jit
def put_column(table, source, field, at, step, first, lane0):
    """Write where a column lies."""
    put(table, source, field, at - first * step, lane0)
    put(table, source, field + STEP, step, lane0)


@gluon.jit
def bounds_in(tokens, end, first, last):
    """The first indices, up to ``end``, of each thread's ascending tokens not below ``first``, and ``last``."""
    low = end * 0
    below = end
    high = end * 0
    above = end
    for _ in range(SEARCH_STEPS):
        middle = (low + below) // 2
        is_less = (low < below) & (gl.load(tokens + middle, mask=low < below, other=0) < first)
        low, below = gl.where(is_less, middle + 1, low), gl.where(is_less, below, middle)
        middle = (high + above) // 2
        is_less = (high < above) & (gl.load(tokens + middle, mask=high < above, other=0) < last)
        high, above = gl.where(is_less, middle + 1, high), gl.where(is_less, above, middle)
    return low, high


@gluon.jit
def place_of(heap, regions, rank, source, column, staged, on_stage, own, ALIGN: gl.constexpr, R: gl.constexpr):
    """Where a column of each thread's source lies, and how many bytes of it can be read from there."""
    at, room = column_region(heap, regions, rank, source, column, ALIGN, R)
    at = gl.where(staged, on_stage, gl.where(source == rank, own, at))
    return at, gl.where(staged | (source == rank), PLACE_MASK, room)


@gluon.jit
def prepare(
    heap, regions, status, x, scales, ids, weights, src_idx, prefix, num_rows, list_capacity, rank, epoch, operation,
    stage, half, this, by_rounds, table, tid,
    CACHED: gl.constexpr, PLACED: gl.constexpr, ROW: gl.constexpr, SCALES: gl.constexpr, K: gl.constexpr,
    R: gl.constexpr, RECORD: gl.constexpr, SCALES_OFF: gl.constexpr, IDS_OFF: gl.constexpr,
    WEIGHTS_OFF: gl.constexpr,
):  # fmt: skip
    """Write the table of a round, a thread the entry of a source: all that is looked up is under way at a time."""
    source = gl.minimum(tid % 32, R - 1)
    mine = (tid < R).to(gl.int32)
    staged = is_staged(heap, rank, source)
    base = heap_of(heap, source) + stage + (this % 2) * half
    rows_at, rows_room = place_of(heap, regions, rank, source, 0, staged, base, x.to(tl.int64), 16, R)
    scales_at, scales_room = rows_at, rows_room
    ids_at, ids_room = rows_at, rows_room
    weights_at, weights_room = rows_at, rows_room
    if SCALES > 0:
        scales_at, scales_room = place_of(
            heap, regions, rank, source, 1, staged, base + SCALES_OFF, scales.to(tl.int64), 4, R
        )
    if K > 0:
        ids_at, ids_room = place_of(heap, regions, rank, source, 2, staged, base + IDS_OFF, ids.to(tl.int64), 8, R)
        weights_at, weights_room = place_of(
            heap, regions, rank, source, 3, staged, base + WEIGHTS_OFF, weights.to(tl.int64), 4, R
        )
    start, end = rows_from(prefix, num_rows, rank, source, R, PLACED)
    tokens = list_of(heap, src_idx, rank, source, start, list_capacity, CACHED)
    last = tl.minimum(tokens_of(heap, rank, source), list_capacity)
    count = tl.minimum(end - start, last)
    low = count * 0
    first = low
    high = gl.where(this == 0, count, low)
    if by_rounds > 0:
        per_round = half // RECORD
        first = gl.where(staged, this * per_round, first)
        last = gl.where(staged, tl.minimum(first + per_round, last), last)
        begin, stop = bounds_in(tokens, count, first, first + per_round)
        low = gl.where(staged, begin, low)
        high = gl.where(staged, stop, high)
    rows_at = inside(rows_at, rows_room, last, ROW)
    unknown = rows_at == 0
    put_column(table, source, ROWS_AT, rows_at, gl.where(staged, RECORD, ROW), first, mine)
    if SCALES > 0:
        scales_at = inside(scales_at, scales_room, last, SCALES)
        unknown = unknown | (scales_at == 0)
        put_column(table, source, SCALES_AT, scales_at, gl.where(staged, RECORD, SCALES), first, mine)
    if K > 0:
        ids_at = inside(ids_at, ids_room, last, K * 8)
        weights_at = inside(weights_at, weights_room, last, K * 4)
        unknown = unknown | (ids_at == 0) | (weights_at == 0)
        put_column(table, source, IDS_AT, ids_at, gl.where(staged, RECORD, K * 8), first, mine)
        put_column(table, source, WEIGHTS_AT, weights_at, gl.where(staged, RECORD, K * 4), first, mine)
    unknown = unknown & (low < high)
    blame(status, operation, epoch, gl.where(unknown & (tid < R), source, -1), tid)
    put(table, source, LIST_AT, tokens.to(tl.int64) + low * 4, mine)
    put(table, source, COUNT, gl.where(unknown, 0, high - low), mine)
    put(table, source, START, start + low, mine)
    put(table, source, FIRST, first, mine)
    put(table, source, LAST, last, mine)
    if PLACED:
        put(table, source, FIRST_TOKEN, tl.load(prefix + 2 * R + source).to(gl.int64), mine)


@gluon.jit
def prepare_own(
    x, scales, ids, weights, count, table, lane0, ROW: gl.constexpr, SCALES: gl.constexpr, K: gl.constexpr
):  # fmt: skip
    """Write the table of a program that stages: one entry, ``count`` of this rank's own tokens."""
    none = zero().to(tl.int64)
    put_column(table, 0, ROWS_AT, x.to(tl.int64), none + ROW, none, lane0)
    put_column(table, 0, SCALES_AT, scales.to(tl.int64), none + SCALES, none, lane0)
    put_column(table, 0, IDS_AT, ids.to(tl.int64), none + K * 8, none, lane0)
    put_column(table, 0, WEIGHTS_AT, weights.to(tl.int64), none + K * 4, none, lane0)
    put(table, 0, COUNT, count, lane0)
    put(table, 0, START, none, lane0)


@gluon.jit
def most_rows(table, R: gl.constexpr):
    """The most rows of a source, by the table at a scalar address."""
    most = zero().to(gl.int64)
    for source in range(R):
        most = tl.maximum(most, load_shared_long(table + source * ENTRY + COUNT))
    return most
