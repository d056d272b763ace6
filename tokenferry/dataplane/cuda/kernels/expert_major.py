"""What rows that tell where they are from need besides a dispatch and a combine. No communication in any of these.

``pack``, at the source, before its choices travel: how many earlier choices of this source have the same expert.
``lay_out_experts``, at the receiver, as the end of ``notify``: where the pairs of each source with each expert begin.
So the row of a copy is a sum of two numbers, wherever and whenever its token arrives::

    row of (source, t, k) = bases[source, expert] + earlier pairs of (source, expert),  e = choice k of t

    bases[source, e] = start_e + pairs of e from the sources before
    end_e = start_e + pairs of e,  start_{e + 1} = end_e rounded up to the alignment

``sources`` says where rows are from that are not expanded, ``pad`` fills what lies between experts with zeros, and
``sum_copies`` sums the copies of each row before a combine sends it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.flags import heap_of, message_word, report, zero
from tokenferry.dataplane.cuda.kernels.layout import span_of_program, spans_behind
from tokenferry.dataplane.cuda.kernels.words import BAD_HANDLE, COUNTS, EPOCH, EXPERTS, EXPERTS_BYTES, NO_ROOM

PACK_SHIFT = tl.constexpr(32)
PACK_MASK = tl.constexpr((1 << 32) - 1)


@triton.jit
def choose_copies(
    status, ids_from, ids_stride, from_rows, metadata, bases, rows, tokens, live, source, first_expert, num_local,
    num_max_tokens, num_expanded, operation, epoch,
    CACHED: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """The copies of some rows, int32 [RT, KB], -1 where there is none; not cached, they are noted in the metadata."""
    k = tl.arange(0, KB)
    wanted = live[:, None] & (k < K)[None, :]
    noted = metadata + rows.to(tl.int64) * (K + 2)
    if CACHED:
        copies = tl.load(noted[:, None] + 2 + k[None, :], mask=wanted, other=-1)
    else:
        at = (ids_from + from_rows.to(tl.int64) * ids_stride).to(tl.pointer_type(tl.int64))
        packed = tl.load(at[:, None] + k[None, :], mask=wanted, other=-1)
        expert = (packed & PACK_MASK).to(tl.int32) - first_expert
        here = (packed >= 0) & (expert >= 0) & (expert < num_local)
        base = tl.load(bases + source * num_local + tl.where(here, expert, 0), mask=here, other=0)
        copies = tl.where(here, base + (packed >> PACK_SHIFT).to(tl.int32), -1)
        first = tl.min(tl.where(here, k[None, :], KB), 1)
        tl.store(noted, (source * num_max_tokens + tokens).to(tl.int32), mask=live)
        tl.store(noted + 1, source * K + first, mask=live)
    fits = (copies >= -1) & (copies < num_expanded)
    if tl.max((wanted & (fits == 0)).to(tl.int32)) > 0:
        if CACHED:
            report(status, BAD_HANDLE, operation, epoch)
        else:
            report(status, NO_ROOM, operation, epoch)
    copies = tl.where(fits, copies, -1)
    if not CACHED:
        tl.store(noted[:, None] + 2 + k[None, :], copies, mask=wanted)
    return copies


@triton.jit
def copy_to_copies(
    source, source_stride, from_rows, target, copies, live, K: tl.constexpr, KB: tl.constexpr, WORDS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of 4-byte words to each of their copies, read once; as :func:`.dispatch.copy_rows`."""
    k = tl.arange(0, KB)
    here = (source + from_rows.to(tl.int64) * source_stride).to(tl.pointer_type(tl.int32))
    here = tl.multiple_of(here, [ALIGN])
    for start in tl.static_range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        inside = live[:, None] & (word < WORDS)[None, :]
        values = tl.load(here[:, None] + word[None, :], mask=inside)
        for choice in range(K):
            copy = tl.max(tl.where((k == choice)[None, :], copies, -1), 1)
            there = (target + copy.to(tl.int64) * (WORDS * 4)).to(tl.pointer_type(tl.int32))
            there = tl.multiple_of(there, [ALIGN])
            tl.store(there[:, None] + word[None, :], values, mask=inside & (copy >= 0)[:, None])


@triton.jit
def weigh_copies(
    weights_from, weights_stride, from_rows, out_weights, copies, live, K: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """The weights of choices to their copies, one each."""
    k = tl.arange(0, KB)
    wanted = live[:, None] & (k < K)[None, :] & (copies >= 0)
    at = (weights_from + from_rows.to(tl.int64) * weights_stride).to(tl.pointer_type(tl.float32))
    tl.store(out_weights + copies, tl.load(at[:, None] + k[None, :], mask=wanted), mask=wanted)


@triton.jit(do_not_specialize=["num_tokens", "num_experts"])
def pack(
    topk_idx,
    packed,
    per_expert,
    num_tokens: tl.int64,
    num_experts: tl.int32,
    K: tl.constexpr,
    KB: tl.constexpr,
    EB: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """``packed[t, k]`` = earlier pairs of the same expert << 32 | expert, or -1; pairs are ordered by (t, k).

    ``per_expert``: of a ``layout`` by as many programs, which has left the pairs of each one's span behind it.
    """
    i, bins = tl.arange(0, TILE * KB), tl.arange(0, EB)
    spans = spans_behind(per_expert + num_experts)
    seen = tl.zeros([EB], tl.int32)
    for start in range(0, tl.program_id(0), ROWS):
        row = start + tl.arange(0, ROWS)
        before = tl.broadcast_to((row < tl.program_id(0))[:, None], (ROWS, EB))
        seen += tl.sum(tl.load(spans + row[:, None] * EB + bins[None, :], mask=before, other=0), 0)
    first, end = span_of_program(num_tokens)
    for start in range(first, end, TILE):
        t = start + i // KB
        live = (t < end) & (i % KB < K)
        at = t * K + i % KB
        ids = tl.load(topk_idx + at, mask=live, other=-1)
        chosen = (ids >= 0) & (ids < num_experts)
        expert = tl.where(chosen, ids, 0).to(tl.int32)
        counted = tl.where(chosen, expert, -1)
        same = (counted[:, None] == expert[None, :]) & (i[:, None] < i[None, :])
        earlier = tl.gather(seen, expert, 0) + tl.sum(same.to(tl.int32), 0)
        value = (earlier.to(tl.int64) << PACK_SHIFT) | expert.to(tl.int64)
        tl.store(packed + at, tl.where(chosen, value, -1), mask=live)
        if start + TILE < end:
            seen += tl.histogram(expert, EB, mask=chosen)


@triton.jit
def lay_out_experts(
    heap, tables, num_local, alignment, num_worst, rank, EXPAND: tl.constexpr, R: tl.constexpr, RB: tl.constexpr
):  # fmt: skip
    """Write where the rows of sources and experts begin and end, once the counts are there; one program.

    ``tables``, int32, each of them beginning on 16 bytes: [R] rows from the sources up to each; [L] pairs of the
    local experts; [L] where their rows end. If expanded, then: [R, L] ``bases``, and behind these how many rows there
    are in all, those that align experts among them; 0 where the outputs have as many as could be (``num_worst``).
    """
    own = heap_of(heap, rank)
    source = tl.arange(0, RB)
    told = source < R
    received = tl.load(message_word(own, source, COUNTS + rank), mask=told, other=0)
    tl.store(tables + source, tl.cumsum(received, 0).to(tl.int32), mask=told)
    step = (num_local + 3) // 4 * 4
    num_pairs = tables + (R + 3) // 4 * 4
    ends = num_pairs + step
    bases = ends + step
    counts = (own + EXPERTS + source * EXPERTS_BYTES).to(tl.pointer_type(tl.int32))
    running = zero()
    for first in range(0, num_local, 256):
        e = first + tl.arange(0, 256)
        inside = e < num_local
        pairs = tl.load(counts[:, None] + e[None, :], mask=told[:, None] & inside[None, :], other=0)
        total = tl.sum(pairs, 0)
        aligned = (total + alignment - 1) // alignment * alignment
        start = running + tl.cumsum(aligned, 0) - aligned
        running += tl.sum(aligned)
        tl.store(num_pairs + e, total, mask=inside)
        tl.store(ends + e, start + (total if EXPAND else aligned), mask=inside)
        if EXPAND:
            base = start[None, :] + tl.cumsum(pairs, 0) - pairs
            tl.store(bases + source[:, None] * num_local + e[None, :], base, mask=told[:, None] & inside[None, :])
    if EXPAND:
        tl.store(bases + R * num_local, tl.where(num_worst > 0, 0, running))


@triton.jit(do_not_specialize=["num_rows", "num_max_tokens", "rank"])
def sources(
    metadata,
    prefix,
    src_idx,
    ids,
    num_rows: tl.int64,
    num_max_tokens: tl.int64,
    rank: tl.int32,
    R: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    RT: tl.constexpr,
):
    """``metadata``: int32 [M, K + 2] of rows with local ``ids``; no copies."""
    k = tl.arange(0, KB)
    for at in range(tl.program_id(0) * RT, num_rows, tl.num_programs(0) * RT):
        i = at + tl.arange(0, RT)
        live = i < num_rows
        token = tl.load(src_idx + i, mask=live, other=-1)
        source = tl.zeros([RT], tl.int32)
        for before in range(R - 1):
            source += (i >= tl.load(prefix + before * R + rank)).to(tl.int32)
        wanted = live[:, None] & (k < K)[None, :]
        local = tl.load(ids + i[:, None] * K + k[None, :], mask=wanted, other=-1) >= 0
        first = tl.min(tl.where(local, k[None, :], KB), 1)
        there = token >= 0
        row = metadata + i * (K + 2)
        tl.store(row, tl.where(there, (source * num_max_tokens + token).to(tl.int32), -1), mask=live)
        tl.store(row + 1, tl.where(there, source * K + first, -1), mask=live)
        tl.store(row[:, None] + 2 + k[None, :], tl.full([RT, KB], -1, tl.int32), mask=wanted)


@triton.jit(do_not_specialize=["alignment", "num_rows"])
def pad(
    rows,
    scales,
    weights,
    ends,
    alignment: tl.int32,
    num_rows: tl.int64,
    WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Zeros from the end of each expert's rows to the start of the next one's; a program for each expert."""
    end = tl.load(ends + tl.program_id(0)).to(tl.int64)
    stop = tl.minimum((end + alignment - 1) // alignment * alignment, num_rows)
    for row in range(tl.maximum(end, 0), stop):
        for start in tl.static_range(0, WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)
            tl.store(rows + row * WORDS + word, tl.zeros([BLOCK], tl.int32), mask=word < WORDS)
        for start in tl.static_range(0, SCALE_WORDS, BLOCK):
            word = start + tl.arange(0, BLOCK)
            tl.store(scales + row * SCALE_WORDS + word, tl.zeros([BLOCK], tl.int32), mask=word < SCALE_WORDS)
        tl.store(weights + row, 0.0)


@triton.jit(do_not_specialize=["num_given", "num_rows", "rank", "operation"])
def sum_copies(
    x,
    metadata,
    out,
    prefix,
    state,
    status,
    num_given: tl.int64,
    num_rows: tl.int64,
    rank: tl.int32,
    operation: tl.int64,
    WIDTH: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out[i]`` = the sum of ``x[copy]`` over the copies of row i, choices ascending, rounded once."""
    received = tl.load(prefix + (R - 1) * R + rank).to(tl.int64)
    for i in range(tl.program_id(0), tl.minimum(received, num_rows), tl.num_programs(0)):
        row = zero().to(tl.int64) + i
        for start in tl.static_range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            total = tl.zeros([BLOCK], ACC)
            for k in range(K):
                copy = tl.load(metadata + row * (K + 2) + 2 + k).to(tl.int64)
                there = (copy >= 0) & (copy < num_given)
                if (copy < -1) | (copy >= num_given):
                    report(status, BAD_HANDLE, operation, tl.load(state + EPOCH) + 1)
                total += tl.load(x + copy * WIDTH + column, mask=there & (column < WIDTH), other=0.0).to(ACC)
            tl.store(out + row * WIDTH + column, total.to(out.dtype.element_ty), mask=column < WIDTH)
