"""Low-latency combine: rows go home, one for each token and rank, summed where the experts are.

A slot of the push area holds ``rows``, [R, N] of H elements by the rank that summed them, and ``weights`` [R, N, K]
by source: the bits of a float32, or SKIP where a choice does not count. Weights travel ahead, while the ranks that
have the rows load them. Where a choice's row lies in the slabs stands in the table that dispatch left.

``out[t] = sum over ranks, ascending, of bfloat16(sum over choices k of its experts, ascending, w[t, k] * row)``

With ``EXACT`` every row travels, ``rows`` is [N, K], no weights are sent, and there is one rounding at the end:
``out[t] = sum over choices k, ascending, of w[t, k] * row``. Sums are in float32, each product rounded.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.flags import report, wait_at_least, zero
from tokenferry.dataplane.cuda.kernels.low_latency import (
    TOKEN_BITS,
    TOKEN_MASK,
    arrivals,
    begin,
    credit,
    either,
    end,
    first_look,
    follow,
    give_up,
    has,
    lacks,
    poll,
    publish,
    release,
    sign,
    signal_ranks,
    source_of,
    split,
    words_of,
)
from tokenferry.dataplane.cuda.kernels.words import (
    BAD_EXPERT,
    FOR_WEIGHTS,
    MASKED,
    PUSH_EPOCH,
    PUSHED_WEIGHTS,
)

SKIP = tl.constexpr(0x7FC5AFE0)
"""The bits of a NaN that stands for no weight."""


@triton.jit
def push_weights(
    heap, ids, weights, num_tokens, most, rank, slot, epoch, at, off_weights, bits,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Send this rank's weights to the ranks."""
    first = (rank * most).to(tl.int64) * K
    for start in range(0, num_tokens * K, BLOCK):
        i = start + tl.arange(0, BLOCK)
        inside = i < num_tokens * K
        e = tl.load(ids + i, mask=inside, other=-1)
        weight = tl.load(weights + i, mask=inside, other=0.0).to(tl.int32, bitcast=True)
        weight = tl.where((e >= 0) & (e < E), weight, SKIP)
        for step in range(R):
            reader = (rank + step) % R
            if has(bits, reader):
                target = (tl.load(heap + reader) + at + off_weights).to(tl.pointer_type(tl.int32))
                tl.store(target + first + i, weight, mask=inside)
    r = tl.arange(0, RB)
    on = ((bits >> r) & 1) != 0
    base = tl.load(heap + r, mask=on, other=0)
    tl.debug_barrier()
    value = (epoch << TOKEN_BITS) | num_tokens
    signal_ranks(words_of(base, PUSHED_WEIGHTS, slot) + rank, tl.zeros([RB], tl.int64) + value, on, RB)


@triton.jit
def check_ids(status, ids, num_tokens, operation, epoch, E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):
    """Report choices that are none; they do not count."""
    bad = tl.zeros([BLOCK], tl.int32)
    for start in range(0, num_tokens * K, BLOCK):
        i = start + tl.arange(0, BLOCK)
        e = tl.load(ids + i, mask=i < num_tokens * K, other=-1)
        bad = bad | ((e < -1) | (e >= E)).to(tl.int32)
    if tl.max(bad) != 0:
        report(status, BAD_EXPERT, operation, epoch)


@triton.jit
def send_sum(
    heap, own, state, status, x, table, most, rank, slot, epoch, at, off_weights, operation, timeout, patience,
    source, token, part, COUNTS: tl.constexpr, SHRINK: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    L: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """A part of the sum of a token's rows on this rank, sent home; returns whether that failed."""
    r = tl.arange(0, RB)
    h = part * WIDTH + tl.arange(0, WIDTH)
    place = (source * most + token).to(tl.int64)
    size = most.to(tl.int64) * (L * R)
    failed = zero()
    rows = ()
    any_row = zero()
    for k in tl.static_range(K):
        row = tl.load(table + place * K + k).to(tl.int64)
        here = (row >= 0) & (row < size)
        any_row = any_row | here.to(tl.int32)
        values = tl.load(x + row * H + h, mask=here & (h < H), other=0.0)
        rows = rows + (values,)  # type: ignore[assignment]
    if any_row != 0:
        # The rows are under way while the weights are waited for.
        bits = credit(own, state, status, slot, epoch, operation, timeout, False, SHRINK, R, RB, THREADS)
        flag = words_of(own, PUSHED_WEIGHTS, slot) + source
        there = has(bits, source)
        if there:
            for_ever = zero().to(tl.int64) + (1 << 61)  # this rank's own come from sender 0, whose waits end
            patience = tl.where(source == rank, for_ever, patience * 9 // 4)
            there = wait_at_least(
                state, flag, epoch << TOKEN_BITS, patience, operation, source, state + MASKED + source,
                FOR_WEIGHTS if COUNTS else None,
            )  # fmt: skip
            if not there:
                if tl.atomic_add(state + MASKED + source, 0, sem="relaxed", scope="gpu") == 0:
                    seen = poll(words_of(own, PUSHED_WEIGHTS, slot), R, RB, THREADS)
                    missing = (r < R) & (r != rank) & (seen < epoch << TOKEN_BITS)
                    give_up(state, status, missing | (r == source), operation, epoch, SHRINK, RB)
        failed = lacks(bits, SHRINK, R)
        if not SHRINK:
            failed = failed | (there == 0).to(tl.int32)
        there = there & (token < (tl.load(flag) & TOKEN_MASK))
        weights = (own + at + off_weights).to(tl.pointer_type(tl.int32)) + place * K
        total = tl.zeros([WIDTH], tl.float32)
        any_weight = zero()
        for k in tl.static_range(K):
            row = tl.load(table + place * K + k).to(tl.int64)
            weight = tl.load(weights + k)
            counts = (row >= 0) & (row < size) & (weight != SKIP)
            product = rows[k].to(tl.float32) * weight.to(tl.float32, bitcast=True)
            total = tl.where(counts, total + product, total)
            any_weight = any_weight | counts.to(tl.int32)
        if there & (any_weight != 0) & has(bits, source):
            home = tl.load(heap + source) + at + (rank * most + token).to(tl.int64) * (H * 2)
            home = tl.multiple_of(home.to(tl.pointer_type(tl.bfloat16)), 16)
            tl.store(home + h, total.to(tl.bfloat16), mask=h < H)
    return failed


@triton.jit
def send_rows(
    heap, own, state, status, x, table, most, slot, epoch, at, operation, timeout, source, token, part,
    SHRINK: tl.constexpr, H: tl.constexpr, K: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """A part of each of a token's rows on this rank, sent home; returns whether that failed."""
    h = part * WIDTH + tl.arange(0, WIDTH)
    place = (source * most + token).to(tl.int64)
    size = most.to(tl.int64) * (L * R)
    bits = credit(own, state, status, slot, epoch, operation, timeout, False, SHRINK, R, RB, THREADS)
    if has(bits, source):
        home = tl.load(heap + source) + at + token.to(tl.int64) * (K * H * 2)
        home = tl.multiple_of(home.to(tl.pointer_type(tl.bfloat16)), 16)
        for k in tl.static_range(K):
            row = tl.load(table + place * K + k).to(tl.int64)
            here = (row >= 0) & (row < size)
            values = tl.load(x + row * H + h, mask=here & (h < H), other=0.0)
            tl.store(home + k * H + h, values, mask=here & (h < H))
    return lacks(bits, SHRINK, R)


@triton.jit
def send(
    heap, own, state, status, ids, weights, x, table, num_tokens, most, rank, slot, epoch, signature, at, off_weights,
    operation, timeout, num_senders,
    COUNTS: tl.constexpr, EXACT: tl.constexpr, SHRINK: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    E: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, DEPTH: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """What a sender does. It ``COUNTS`` its waits where no receiver runs beside it, who waits for the same ranks."""
    pid = tl.program_id(0)
    failed = zero()
    if pid == 0:
        bits = credit(own, state, status, slot, epoch, operation, timeout, COUNTS, SHRINK, R, RB, THREADS)
        failed = lacks(bits, SHRINK, R)
        sign(heap, rank, slot, signature, bits, RB)
        if not EXACT:
            push_weights(
                heap, ids, weights, num_tokens, most, rank, slot, epoch, at, off_weights, bits, E, K, R, RB, BLOCK
            )  # fmt: skip
        check_ids(status, ids, num_tokens, operation, epoch, E, K, BLOCK)
    elif pid == 1:
        release(heap, state, rank, R, RB, DEPTH)
    else:
        r = tl.arange(0, RB)
        tokens = tl.load(table + most * (R * K) + r, mask=r < R, other=0)
        tokens = tl.minimum(tl.maximum(tokens, 0), most)
        for item in range(pid - 2, tl.sum(tokens) * PARTS, num_senders - 2):
            source, token, part = source_of(tokens, item, PARTS, RB)
            once = tl.where(failed != 0, 0, timeout)
            if EXACT:
                failed = failed | send_rows(
                    heap, own, state, status, x, table, most, slot, epoch, at, operation, once, source, token, part,
                    SHRINK, H, K, L, WIDTH, R, RB, THREADS,
                )  # fmt: skip
            else:
                failed = failed | send_sum(
                    heap, own, state, status, x, table, most, rank, slot, epoch, at, off_weights, operation, once,
                    timeout, source, token, part, COUNTS, SHRINK, H, K, L, WIDTH, R, RB, THREADS,
                )  # fmt: skip
    if SHRINK:  # a rank whose tokens dispatch did not bring here, but which has been taken back since, gets no sums
        r = tl.arange(0, RB)
        num_tokens = (tl.load(table + most * (R * K) + r, mask=r < R, other=-1) >= 0).to(tl.int32)
    publish(heap, state, rank, slot, epoch, num_tokens, num_senders, failed, SHRINK, R, RB, THREADS)


@triton.jit
def add_sums(
    base, ids, out, there, most, token, part,
    H: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, E: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """A part of a token's result from the sums of the ranks."""
    k, h = tl.arange(0, KB), part * WIDTH + tl.arange(0, WIDTH)
    e = tl.load(ids + token * K + k, mask=k < K, other=-1)
    e = tl.where((e >= 0) & (e < E), e, -1).to(tl.int32)
    bits = tl.reduce(tl.where(e >= 0, 1 << (e // L), 0), 0, either) & there
    total = tl.zeros([WIDTH], tl.float32)
    for r in tl.static_range(R):
        on = has(bits, r)
        row = (base + (r * most + token).to(tl.int64) * (H * 2)).to(tl.pointer_type(tl.bfloat16))
        part_of_sum = tl.load(tl.multiple_of(row, 16) + h, mask=on & (h < H), other=0.0)
        total = tl.where(on, total + part_of_sum.to(tl.float32), total)
    tl.store(out + token.to(tl.int64) * H + h, total.to(tl.bfloat16), mask=h < H)


@triton.jit
def add_rows(
    base, ids, weights, out, there, token, part,
    H: tl.constexpr, K: tl.constexpr, E: tl.constexpr, L: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A part of a token's result from the rows of its experts."""
    h = part * WIDTH + tl.arange(0, WIDTH)
    rows = (base + token.to(tl.int64) * (K * H * 2)).to(tl.pointer_type(tl.bfloat16))
    rows = tl.multiple_of(rows, 16)
    total = tl.zeros([WIDTH], tl.float32)
    for k in tl.static_range(K):
        e = tl.load(ids + token * K + k)
        on = (e >= 0) & (e < E)
        on = on & has(there, tl.where(on, e // L, 0).to(tl.int32))
        weight = tl.load(weights + token * K + k)
        row = tl.load(rows + k * H + h, mask=on & (h < H), other=0.0)
        total = tl.where(on, total + row.to(tl.float32) * weight, total)
    tl.store(out + token.to(tl.int64) * H + h, total.to(tl.bfloat16), mask=h < H)


@triton.jit
def receive(
    own, state, status, ids, weights, out, wait_stats, num_tokens, most, rank, slot, epoch, signature, at, operation,
    timeout, num_senders,
    EXACT: tl.constexpr, SHRINK: tl.constexpr, H: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, E: tl.constexpr,
    L: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
    THREADS: tl.constexpr,
):  # fmt: skip
    """What a receiver does."""
    index = tl.program_id(0) - num_senders
    num_receivers = tl.num_programs(0) - num_senders
    tokens = arrivals(
        own, state, status, rank, slot, epoch, signature, most, operation, timeout, wait_stats, index,
        SHRINK, R, RB, THREADS,
    )  # fmt: skip
    there = tokens >= 0
    if SHRINK:
        there = tokens > 0
    there = tl.reduce(tl.where(there, 1 << tl.arange(0, RB), 0), 0, either)
    for item in range(index, num_tokens * PARTS, num_receivers):
        token, part = split(item, PARTS)
        if EXACT:
            add_rows(own + at, ids, weights, out, there, token, part, H, K, E, L, WIDTH)
        else:
            add_sums(own + at, ids, out, there, most, token, part, H, K, KB, E, L, WIDTH, R)


@triton.jit(
    do_not_specialize=[
        "wait_stats", "own", "num_tokens", "most", "rank", "signature", "area", "slot_bytes", "off_weights",
        "operation", "timeout", "num_senders",
    ]
)  # fmt: skip
def combine(
    heap,
    state,
    status,
    ticket,
    ids,
    weights,
    x,
    src_info,
    out,
    wait_stats: tl.int64,
    own: tl.int64,
    num_tokens: tl.int32,
    most: tl.int32,
    rank: tl.int32,
    signature: tl.int64,
    area: tl.int64,
    slot_bytes: tl.int64,
    off_weights: tl.int64,
    operation: tl.int64,
    timeout: tl.int64,
    num_senders: tl.int32,
    SENDS: tl.constexpr,
    RECEIVES: tl.constexpr,
    EXACT: tl.constexpr,
    SHRINK: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    E: tl.constexpr,
    L: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    RB: tl.constexpr,
    DEPTH: tl.constexpr,
    THREADS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """As :func:`.low_latency_dispatch.dispatch`; the table lies behind ``src_info``."""
    PARTS: tl.constexpr = (H + WIDTH - 1) // WIDTH
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
                    heap, own, state, status, ids, weights, x, src_info + most.to(tl.int64) * (L * R), num_tokens,
                    most, rank, slot, epoch, signature, at, off_weights, operation, timeout, num_senders,
                    not RECEIVES, EXACT, SHRINK, H, K, E, L, WIDTH, PARTS, BLOCK, R, RB, DEPTH, THREADS,
                )  # fmt: skip
        if RECEIVES:
            if tl.program_id(0) >= num_senders:
                receive(
                    own, state, status, ids, weights, out, wait_stats, num_tokens, most, rank, slot, epoch, signature,
                    at, operation, timeout, num_senders, EXACT, SHRINK, H, K, KB, E, L, WIDTH, PARTS, R, RB,
                    THREADS,
                )  # fmt: skip
    if SENDS:
        if not RECEIVES:
            tl.store(ticket, epoch)
        end(state, epoch, before)
