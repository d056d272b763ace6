"""Low-latency dispatch: push every row once to every rank that holds one of its experts, spread it there.

A slot of the push area holds, of each source: ``rows`` [N, bytes], ``scales`` [N, S] of 4 bytes, ``choices`` int64
[N, K], and ``counts`` int32 [L]: rows for each local expert. A choice is ``position << 32 | local expert`` if the
expert is the receiver's, else -1; position: how many choices of this source, by (token, choice), have that expert and
come before. So row of a choice = rows of earlier sources for the expert + position, whatever arrives when.

Sender 0 counts, the others push choices and parts of rows. Receiver 0 writes tables, the others spread rows.

Between nodes (``G`` > 1) a rank sends the tokens of G sources, N / G of each one after the other, and has counts for
each. ``order`` is then int32: for every source, by rank and number, which one of all it is; behind it the reverse.
Formats of rows: 0, as they are; 1 to 3, FP8 with plain, rounded and UE8M0 scales as in
:mod:`tokenferry.dataplane.cpu.fp8`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.flags import report, zero
from tokenferry.dataplane.cuda.kernels.low_latency import (
    arrivals,
    begin,
    credit,
    either,
    end,
    first_look,
    follow,
    has,
    ints_at,
    lacks,
    longs_at,
    publish,
    release,
    sign,
    source_of,
    split,
)
from tokenferry.dataplane.cuda.kernels.words import BAD_EXPERT, CROWDED, PUSH_EPOCH

GROUP = tl.constexpr(128)
SMALLEST_AMAX = tl.constexpr(1e-4)
MOST = tl.constexpr(448.0)
MOST_INVERSE = tl.constexpr(1 / 448)
MOST_BITS = tl.constexpr(0x43E00000)
"""Those of 448.0."""


@triton.jit
def e4m3(values, HAS_FP8: tl.constexpr):
    """The bytes of the nearest float8_e4m3fn, ties to even, saturated; 0x7F for a NaN of any sign."""
    if HAS_FP8:
        return values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        bits = values.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        least = tl.minimum(size, MOST_BITS)
        normal = ((least + 0x7FFFF + ((least >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 the steps are 2^-9: adding 2^14 rounds to them.
        small = (least.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(least < 0x3C800000, small, normal)
        code = code | ((bits >> 24) & 0x80)
        return tl.where(size > 0x7F800000, 0x7F, code).to(tl.uint8)


@triton.jit
def scales_of(amax, FORMAT: tl.constexpr):
    """Factors for the data of groups, and their scales' bits; of UE8M0 the exponent."""
    amax = tl.maximum(amax, SMALLEST_AMAX)
    bits = (amax * MOST_INVERSE).to(tl.int32, bitcast=True)
    if FORMAT == 1:
        return tl.div_rn(tl.zeros_like(amax) + MOST, amax), bits
    else:
        exponent = tl.minimum((bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32), 254)
        factor = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        if FORMAT == 2:
            return factor, exponent << 23
        else:
            return factor, exponent


@triton.jit
def count_choices(
    heap, status, ids, num_tokens, most, rank, epoch, operation, at, off_counts, bits,
    E: tl.constexpr, K: tl.constexpr, L: tl.constexpr, G: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the choices of every expert and write the counts to its rank."""
    each = most // G
    bad = zero()
    for source in range(G):
        begin = source * each * K
        total = tl.minimum(num_tokens * K, begin + each * K)
        for first in range(0, E, BINS):
            counts = tl.zeros([BINS], tl.int32)
            for start in range(begin, total, BLOCK):
                i = start + tl.arange(0, BLOCK)
                e = tl.load(ids + i, mask=i < total, other=-1)
                bad += tl.sum(((e < -1) | (e >= E)).to(tl.int32))
                inside = (e >= first) & (e < first + BINS)
                counts += tl.histogram(tl.where(inside, e - first, 0).to(tl.int32), BINS, mask=inside)
            e = first + tl.arange(0, BINS)
            owner = e // L
            on = (e < E) & (((bits >> owner) & 1) != 0)
            base = tl.load(heap + owner, mask=on, other=0)
            place = (rank * G + source) * L + e % L
            target = (base + at + off_counts + place * 4).to(tl.pointer_type(tl.int32))
            tl.store(target, tl.minimum(counts, each), mask=on)
            if tl.max(tl.where(e < E, counts, 0)) > each:
                report(status, CROWDED, operation, epoch)
    if bad != 0:
        report(status, BAD_EXPERT, operation, epoch)


@triton.jit
def positions_of(ids, first, token, e, E: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, BLOCK: tl.constexpr):
    """[KB]: how many choices from the token ``first`` on, before each choice of a token, have the same expert."""
    k = tl.arange(0, KB)
    mine = token * K + k
    stop = token * K + K
    found = tl.zeros([KB], tl.int32)
    i = first * K + tl.arange(0, BLOCK)
    others = tl.load(ids + i, mask=i < stop, other=-1)
    for _ in range(first * K, stop, BLOCK):
        ahead = tl.load(ids + i + BLOCK, mask=i + BLOCK < stop, other=-1)  # on its way while these are compared
        others = tl.where((others >= 0) & (others < E), others, -2).to(tl.int32)
        found += tl.sum(((others[None, :] == e[:, None]) & (i[None, :] < mine[:, None])).to(tl.int32), 1)
        others = ahead
        i += BLOCK
    return found


@triton.jit
def send_choices(
    heap, own, state, status, ids, most, rank, slot, epoch, at, off_choices, operation, timeout, token,
    SHRINK: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, E: tl.constexpr, L: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, RB: tl.constexpr, BLOCK: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """A token's choices, to all ranks; returns those that may be sent to."""
    k = tl.arange(0, KB)
    e = tl.load(ids + token * K + k, mask=k < K, other=-1)
    e = tl.where((e >= 0) & (e < E), e, -1).to(tl.int32)
    each = most // G
    if G == 1:
        position = positions_of(ids, 0, token, e, E, K, KB, BLOCK)
    else:
        position = positions_of(ids, token // each * each, token, e, E, K, KB, BLOCK)
    choice = (position.to(tl.int64) << 32) | (e % L)
    choice = tl.where((e >= 0) & (position < each), choice, -1)
    bits = credit(own, state, status, slot, epoch, operation, timeout, False, SHRINK, R, RB, THREADS)
    place = (rank * most + token).to(tl.int64) * K
    for step in range(R):
        reader = (rank + step) % R
        if has(bits, reader):
            choices = (tl.load(heap + reader) + at + off_choices).to(tl.pointer_type(tl.int64)) + place
            tl.store(choices + k, tl.where(e // L == reader, choice, -1), mask=k < K)
    return bits


@triton.jit
def send_part(
    heap, own, state, status, ids, x, most, rank, slot, epoch, at, off_scales, operation, timeout, token, part,
    FORMAT: tl.constexpr, HAS_FP8: tl.constexpr, SHRINK: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
    K: tl.constexpr, KB: tl.constexpr, E: tl.constexpr, L: tl.constexpr, GROUPS: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """A part of a token's row, to the ranks of its experts; returns those that may be sent to."""
    k = tl.arange(0, KB)
    row = token.to(tl.int64) * H
    e = tl.load(ids + token * K + k, mask=k < K, other=-1)
    # All loads are under way before the first is waited for.
    if FORMAT == 0:
        WORDS: tl.constexpr = GROUPS * GROUP // 2
        w = part * WORDS + tl.arange(0, WORDS)
        source = tl.multiple_of((x + row).to(tl.pointer_type(tl.int32)), 16)
        data = tl.load(source + w, mask=w < H // 2, other=0)
    else:
        g = part * GROUPS + tl.arange(0, GROUPS)
        c = g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
        inside = (g < H // GROUP)[:, None] & (c >= 0)
        values = tl.load(x + row + c, mask=inside, other=0)
    bits = credit(own, state, status, slot, epoch, operation, timeout, False, SHRINK, R, RB, THREADS)
    e = tl.where((e >= 0) & (e < E), e, -1).to(tl.int32)
    goes = tl.reduce(tl.where(e >= 0, 1 << (e // L), 0), 0, either)
    if FORMAT > 0:
        values = values.to(tl.float32)
        factor, scale = scales_of(tl.max(tl.abs(values), 1), FORMAT)
        data = e4m3(values * factor[:, None], HAS_FP8)
        scale = tl.where(g < H // GROUP, scale, 0)
    place = (rank * most + token).to(tl.int64)
    for step in range(R):
        reader = (rank + step) % R
        if has(bits & goes, reader):
            base = tl.load(heap + reader) + at
            if FORMAT == 0:
                target = tl.multiple_of((base + place * (H * 2)).to(tl.pointer_type(tl.int32)), 16)
                tl.store(target + w, data, mask=w < H // 2)
            else:
                target = tl.multiple_of((base + place * H).to(tl.pointer_type(tl.uint8)), 16)
                tl.store(target + c, data, mask=inside)
                if FORMAT == 3:
                    exponents = (base + off_scales + place * (S * 4)).to(tl.pointer_type(tl.uint8))
                    tl.store(exponents + g, scale.to(tl.uint8), mask=g < S * 4)
                else:
                    scales = (base + off_scales + place * (S * 4)).to(tl.pointer_type(tl.int32))
                    tl.store(scales + g, scale, mask=g < S)
    return bits


@triton.jit
def write_tables(
    counts, tokens, layout_range, num_received, stats, table_tokens, order, each, L: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, RB: tl.constexpr, VB: tl.constexpr, LB: tl.constexpr,
):  # fmt: skip
    """Where the rows of each source lie in each slab, how many there are, and the tokens of each rank or -1.

    A source has at most ``each`` rows of an expert, whatever it says: so what is told lies within the slabs.
    """
    r = tl.arange(0, RB)
    tl.store(table_tokens + r, tokens, mask=r < R)
    if G == 1:
        s, place, there = r, r, tokens > 0
    else:
        s = tl.arange(0, VB)
        place = tl.load(ints_at(order) + R * G + s, mask=s < R * G, other=0)
        there = (s < R * G) & (tl.sum(((tokens <= 0) & (r < R)).to(tl.int32)) == 0)
    for start in range(0, L, LB):
        expert = start + tl.arange(0, LB)
        inside = (s < R * G)[:, None] & (expert < L)[None, :]
        count = tl.load(counts + place[:, None] * L + expert[None, :], mask=inside & there[:, None], other=0)
        count = tl.minimum(tl.maximum(count, 0), each)
        begin = tl.cumsum(count, 0) - count
        both = (begin.to(tl.int64) << 32) | count
        tl.store(layout_range + expert[None, :] * (R * G) + s[:, None], both, mask=inside)
        total = tl.sum(count, 0)
        tl.store(num_received + expert, total, mask=expert < L)
        if stats != 0:
            sums = longs_at(stats).to(tl.pointer_type(tl.int32)) + expert
            tl.store(sums, tl.load(sums, mask=expert < L, other=0) + total, mask=expert < L)


@triton.jit
def spread_part(
    base, out, out_scales, src_info, table, tokens, order, most, off_scales, off_choices, off_counts, source, token,
    part,
    ROW: tl.constexpr, S: tl.constexpr, SB: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, L: tl.constexpr,
    WORDS: tl.constexpr, G: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, VB: tl.constexpr,
):  # fmt: skip
    """A part of a row from the slot to all slabs that it belongs to."""
    k, r = tl.arange(0, KB), tl.arange(0, RB)
    slab = (R * most).to(tl.int64)
    place = (source * most + token).to(tl.int64)
    w = part * WORDS + tl.arange(0, WORDS)
    row = tl.multiple_of((base + place * ROW).to(tl.pointer_type(tl.int32)), 16)
    data = tl.load(row + w, mask=w < ROW // 4, other=0)
    choices = (base + off_choices + place * (K * 8)).to(tl.pointer_type(tl.int64))
    choice = tl.load(choices + k, mask=k < K, other=-1)
    local = (choice & 0xFFFFFFFF).to(tl.int32)
    here = (choice >= 0) & (local >= 0) & (local < L)  # a rank that disagrees may leave anything there
    local = tl.where(here, local, 0)
    counts = (base + off_counts).to(tl.pointer_type(tl.int32))
    if G == 1:
        own_token = token
        earlier = here[:, None] & ((r < source) & (tokens > 0))[None, :]
        before = tl.sum(tl.load(counts + r[None, :] * L + local[:, None], mask=earlier, other=0), 1)
    else:
        each = most // G
        number = token // each
        own_token = token - number * each
        s = tl.arange(0, VB)
        places = tl.load(ints_at(order) + R * G + s, mask=s < R * G, other=0)
        earlier = here[:, None] & (s < tl.load(ints_at(order) + source * G + number))[None, :]
        before = tl.sum(tl.load(counts + places[None, :] * L + local[:, None], mask=earlier, other=0), 1)
    at = before + (choice >> 32)
    here = here & (at >= 0) & (at < slab)
    target = local * slab + at
    lines = tl.multiple_of(out.to(tl.pointer_type(tl.int32)), 16)
    tl.store(
        lines + target[:, None] * (ROW // 4) + w[None, :], data[None, :], mask=here[:, None] & (w < ROW // 4)[None, :]
    )
    if S > 0:
        column = part * SB + tl.arange(0, SB)
        scales = (base + off_scales + place * (S * 4)).to(tl.pointer_type(tl.int32))
        scale = tl.load(scales + column, mask=column < S, other=0)
        line = (local[:, None] * S + column[None, :]) * slab + at[:, None]
        tl.store(out_scales + line, scale[None, :], mask=here[:, None] & (column < S)[None, :])
    if part == 0:
        tl.store(src_info + target, tl.zeros([KB], tl.int32) + own_token, mask=here)
        tl.store(table + place * K + k, tl.where(here, target, -1).to(tl.int32), mask=k < K)


@triton.jit
def send(
    heap, own, state, status, ids, x, num_tokens, most, rank, slot, epoch, signature, at, off_scales, off_choices,
    off_counts, operation, timeout, num_senders,
    COUNTS: tl.constexpr, FORMAT: tl.constexpr, HAS_FP8: tl.constexpr, SHRINK: tl.constexpr, H: tl.constexpr,
    S: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, E: tl.constexpr, L: tl.constexpr, G: tl.constexpr,
    GROUPS: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, DEPTH: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """What a sender does. Choices come first: the last of them take longest.

    It ``COUNTS`` its waits where no receiver runs beside it, who waits for the same ranks.
    """
    pid = tl.program_id(0)
    failed = zero()
    if pid == 0:
        bits = credit(own, state, status, slot, epoch, operation, timeout, COUNTS, SHRINK, R, RB, THREADS)
        failed = lacks(bits, SHRINK, R)
        sign(heap, rank, slot, signature, bits, RB)
        count_choices(
            heap, status, ids, num_tokens, most, rank, epoch, operation, at, off_counts, bits, E, K, L, G, BINS, BLOCK
        )  # fmt: skip
    elif pid == 1:
        release(heap, state, rank, R, RB, DEPTH)
    else:
        for item in range(pid - 2, num_tokens * (PARTS + 1), num_senders - 2):
            once = tl.where(failed != 0, 0, timeout)
            if item < num_tokens:
                bits = send_choices(
                    heap, own, state, status, ids, most, rank, slot, epoch, at, off_choices, operation, once, item,
                    SHRINK, K, KB, E, L, G, R, RB, BLOCK, THREADS,
                )  # fmt: skip
            else:
                token, part = split(item - num_tokens, PARTS)
                bits = send_part(
                    heap, own, state, status, ids, x, most, rank, slot, epoch, at, off_scales, operation, once, token,
                    part, FORMAT, HAS_FP8, SHRINK, H, S, K, KB, E, L, GROUPS, R, RB, THREADS,
                )  # fmt: skip
            failed = failed | lacks(bits, SHRINK, R)
    publish(heap, state, rank, slot, epoch, num_tokens, num_senders, failed, SHRINK, R, RB, THREADS)


@triton.jit
def receive(
    own, state, status, out, out_scales, src_info, layout_range, num_received, stats, wait_stats, order, most, rank,
    slot, epoch, signature, at, off_scales, off_choices, off_counts, operation, timeout, num_senders,
    ROW: tl.constexpr, WORDS: tl.constexpr, SHRINK: tl.constexpr, S: tl.constexpr, SB: tl.constexpr, K: tl.constexpr,
    KB: tl.constexpr, L: tl.constexpr, G: tl.constexpr, PARTS: tl.constexpr, LB: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, VB: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """What a receiver does."""
    index = tl.program_id(0) - num_senders
    num_receivers = tl.num_programs(0) - num_senders
    tokens = arrivals(
        own, state, status, rank, slot, epoch, signature, most, operation, timeout, wait_stats, index,
        SHRINK, R, RB, THREADS,
    )  # fmt: skip
    base = own + at
    table = src_info + most.to(tl.int64) * (L * R)
    if index == 0:
        counts = (base + off_counts).to(tl.pointer_type(tl.int32))
        write_tables(
            counts, tokens, layout_range, num_received, stats, table + most * (R * K), order, most // G, L, G, R, RB,
            VB, LB,
        )  # fmt: skip
    else:
        tokens = tl.maximum(tokens, 0)
        for item in range(index - 1, tl.sum(tokens) * PARTS, num_receivers - 1):
            source, token, part = source_of(tokens, item, PARTS, RB)
            spread_part(
                base, out, out_scales, src_info, table, tokens, order, most, off_scales, off_choices, off_counts,
                source, token, part, ROW, S, SB, K, KB, L, WORDS, G, R, RB, VB,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "own", "stats", "wait_stats", "order", "num_tokens", "most", "rank", "signature", "area", "slot_bytes",
        "off_scales", "off_choices", "off_counts", "operation", "timeout", "num_senders",
    ]
)  # fmt: skip
def dispatch(
    heap,
    state,
    status,
    ticket,
    ids,
    x,
    out,
    out_scales,
    src_info,
    layout_range,
    num_received,
    stats: tl.int64,
    wait_stats: tl.int64,
    order: tl.int64,
    own: tl.int64,
    num_tokens: tl.int32,
    most: tl.int32,
    rank: tl.int32,
    signature: tl.int64,
    area: tl.int64,
    slot_bytes: tl.int64,
    off_scales: tl.int64,
    off_choices: tl.int64,
    off_counts: tl.int64,
    operation: tl.int64,
    timeout: tl.int64,
    num_senders: tl.int32,
    SENDS: tl.constexpr,
    RECEIVES: tl.constexpr,
    FORMAT: tl.constexpr,
    HAS_FP8: tl.constexpr,
    SHRINK: tl.constexpr,
    H: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    E: tl.constexpr,
    L: tl.constexpr,
    G: tl.constexpr,
    GROUPS: tl.constexpr,
    BINS: tl.constexpr,
    LB: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    RB: tl.constexpr,
    VB: tl.constexpr,
    DEPTH: tl.constexpr,
    THREADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """The first ``num_senders`` programs send if any are to, the others receive. ``stats`` are addresses, or 0.

    What is sent here and received by a later launch leaves its number in ``ticket``. ``src_info`` is followed by the
    table for :mod:`.low_latency_combine`: int32 [R, N, K], row of each choice in the slabs or -1, and int32 [R],
    tokens of each source, or -1 of one that did not come.
    """
    PARTS: tl.constexpr = (H + GROUPS * GROUP - 1) // (GROUPS * GROUP)
    ITEM: tl.constexpr = 2 if FORMAT == 0 else 1
    SB: tl.constexpr = GROUPS // 4 if FORMAT == 3 else GROUPS
    if OVERLAPS:
        follow()
    if SENDS:
        epoch, failed = first_look(state, state + PUSH_EPOCH, THREADS)
        epoch += 1
        before = begin(state, epoch)
    else:
        epoch, failed = first_look(state, ticket, THREADS)
    if failed == 0:
        slot = epoch % DEPTH
        at = area + slot * slot_bytes
        if SENDS:
            if tl.program_id(0) < num_senders:
                send(
                    heap, own, state, status, ids, x, num_tokens, most, rank, slot, epoch, signature, at, off_scales,
                    off_choices, off_counts, operation, timeout, num_senders, not RECEIVES, FORMAT, HAS_FP8, SHRINK,
                    H, S, K, KB, E, L, G, GROUPS, PARTS, BINS, BLOCK, R, RB, DEPTH, THREADS,
                )  # fmt: skip
        if RECEIVES:
            if tl.program_id(0) >= num_senders:
                receive(
                    own, state, status, out, out_scales, src_info, layout_range, num_received, stats, wait_stats,
                    order, most, rank, slot, epoch, signature, at, off_scales, off_choices, off_counts, operation,
                    timeout, num_senders, H * ITEM, GROUPS * GROUP * ITEM // 4, SHRINK, S, SB, K, KB, L, G, PARTS,
                    LB, R, RB, VB, THREADS,
                )  # fmt: skip
    if SENDS:
        if not RECEIVES:
            tl.store(ticket, epoch)
        end(state, epoch, before)
