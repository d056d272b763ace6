"""Combine by the bulk-copy engine (sm_90 and newer): the same protocol and parameters as in plain Triton.

A program has G groups of warps, each with tokens and a ring of slots of its own: one sums while another waits. The
rows of a group's tokens pass through its ring, source after source, LAG rows ahead of the sum. All its warps sum
together; the first one asks for rows. A slot without a row (the source does not have the token) announces nothing,
and is left out of the sum. Groups take equally many turns, and meet only where the program does.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tokenferry.dataplane.cuda.kernels.bulk import (
    announce,
    arrive,
    fence_before_loads,
    init_barrier,
    load_bulk,
    load_shared,
    load_shared_long,
    shared_base,
    store_shared,
    store_shared_long,
    wait_parity,
)
from tokenferry.dataplane.cuda.kernels.bulk_columns import blame, complain
from tokenferry.dataplane.cuda.kernels.combine import (
    place_of,
    rate_source,
    rounds_of_readers,
    rows_of_reader,
)
from tokenferry.dataplane.cuda.kernels.dispatch import agree
from tokenferry.dataplane.cuda.kernels.flags import heap_of, is_usable, message_word, zero
from tokenferry.dataplane.cuda.kernels.rounds import (
    any_staged,
    pass_all_rounds,
    publish_round,
    release_round,
    rounds_of,
    wait_for_half,
    wait_for_sources,
)
from tokenferry.dataplane.cuda.kernels.sync import finish
from tokenferry.dataplane.cuda.kernels.words import BAD_HANDLE, EPOCH, STAGED

EXTRA_BYTES = 16384
"""Shared memory behind the rings: the table, the barriers and windows of weights."""
MOST_SLOTS = 32
"""Of all groups: that there are barriers for."""
ENTRY = gl.constexpr(64)
ROWS_AT = gl.constexpr(0)
ROWS_STEP = gl.constexpr(8)
WEIGHTS_AT = gl.constexpr(16)
WEIGHTS_STEP = gl.constexpr(24)
BY_TOKEN = gl.constexpr(32)
COUNT = gl.constexpr(40)
FAULT = gl.constexpr(48)
"""Not 0: nothing can be read of this operation."""
BARS = gl.constexpr(32 * 64)
"""Behind the table's entries for 32 sources."""
FREE = gl.constexpr(32 * 64 + 256)
"""Barriers that all warps of a group arrive at when they have summed a slot."""
NOTES = gl.constexpr(32 * 64 + 512)
"""Of a slot: how far into its window its weights begin, and LIVE if it has a row."""
LIVE = gl.constexpr(256)
WINDOWS = gl.constexpr(32 * 64 + 768)
WINDOW = gl.constexpr(160)
"""Bytes for 32 weights wherever they begin."""


@gluon.jit
def prepare(
    heap, regions, status, prefix, x, weights, rank, operation, epoch, this, per_round, stage, half, table, tid,
    RECORD: gl.constexpr, AT: gl.constexpr, ROW: gl.constexpr, K: gl.constexpr, HELD: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """Write the table of a round, a thread the entry of a source: all that is looked up is under way at a time."""
    source = gl.minimum(tid % 32, R - 1)
    on = tid < R
    mine = on.to(gl.int32)
    entry = table + source * ENTRY
    base, step, staged, _, count = place_of(
        heap, regions, prefix, x, rank, source, this, per_round, stage, half, 0, RECORD, 0, ROW, HELD, R
    )
    store_shared_long(entry + ROWS_AT, base, mine)
    store_shared_long(entry + ROWS_STEP, step.to(gl.int64), mine)
    store_shared_long(entry + BY_TOKEN, staged.to(gl.int64), mine)
    store_shared_long(entry + COUNT, count.to(gl.int64), mine)
    if K > 0:
        base, step, _, _, _ = place_of(
            heap, regions, prefix, weights, rank, source, this, per_round, stage, half, 1, RECORD, AT, K * 4, HELD, R
        )
        store_shared_long(entry + WEIGHTS_AT, base, mine)
        store_shared_long(entry + WEIGHTS_STEP, step.to(gl.int64), mine)
    misfits, hidden = rate_source(heap, regions, prefix, rank, source, ROW, K, HELD, R)
    store_shared_long(entry + FAULT, (misfits | hidden).to(gl.int64), mine)
    complain(status, operation, epoch, on & misfits, tid, BAD_HANDLE)
    blame(status, operation, epoch, gl.where(on & hidden, source, -1), tid)


@gluon.jit
def has_no_fault(table, R: gl.constexpr):
    """Whether nothing is wrong with any source, by the table at a scalar address."""
    fault = zero().to(gl.int64)
    for source in range(R):
        fault = fault | load_shared_long(table + source * ENTRY + FAULT)
    return fault == 0


@gluon.jit
def ask(
    live, head, source, token, slot_at, ask_parity, extra, ring, group, lane,
    ROW: gl.constexpr, K: gl.constexpr, SLOT: gl.constexpr, SLOTS: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """Start the copies of one item of each group, a token's row of one source, if there is one: it is ``live``.

    Returns:
        The next slot to ask into, and the parity of its turn.
    """
    entry = extra + source * ENTRY
    index = gl.where(load_shared_long(entry + BY_TOKEN) != 0, token, head).to(gl.int64)
    rows_at = load_shared_long(entry + ROWS_AT) + index * load_shared_long(entry + ROWS_STEP)
    total = live * ROW
    note = live * LIVE
    slot = slot_at * G + group
    bar = extra + BARS + slot * 8
    if K > 0:
        at = load_shared_long(entry + WEIGHTS_AT) + index * load_shared_long(entry + WEIGHTS_STEP)
        skip = (at & 15).to(gl.int32)
        size = (skip + K * 4 + 15) & -16
        total += live * size
        note += skip
    wait_parity(extra + FREE + slot * 8, (ask_parity ^ 1) + lane * 0)
    store_shared(extra + NOTES + slot * 8, note, (lane == 0).to(gl.int32))
    announce(bar, total, (lane == 0).to(gl.int32))
    load_bulk(ring + slot * SLOT, rows_at, lane * 0 + ROW, bar, live * (lane == 0).to(gl.int32))
    if K > 0:
        load_bulk(extra + WINDOWS + slot * WINDOW, at & -16, size, bar, live * (lane == 1).to(gl.int32))
    is_end = slot_at == SLOTS - 1
    return tl.where(is_end, 0, slot_at + 1), tl.where(is_end, ask_parity ^ 1, ask_parity)


@gluon.jit
def head_of(send_head, source, token, end, R: gl.constexpr):
    """The number of a token's row among those of its source, or -1; of the token of each thread's group."""
    return gl.load(send_head + token.to(gl.int64) * R + source, mask=token < end, other=-1)


@gluon.jit
def ask_ahead(
    send_head, head, source, token, apart, stop, workers, slot_at, ask_parity, extra, ring, group, lane,
    ROW: gl.constexpr, K: gl.constexpr, R: gl.constexpr, SLOT: gl.constexpr, SLOTS: gl.constexpr, G: gl.constexpr,
):  # fmt: skip
    """Ask for an item of each group if the first one has any more, and go on to the one behind it.

    ``token`` is the first group's, and a group's own ``apart`` from it.

    Returns:
        Heads, source and first group's token of the item behind; the next slot to ask into, the parity of its turn.
    """
    if token < stop:
        count = load_shared_long(extra + source * ENTRY + COUNT).to(gl.int32)
        live = ((head >= 0) & (head < count)).to(gl.int32)
        slot_at, ask_parity = ask(
            live, head, source, token + apart, slot_at, ask_parity, extra, ring, group, lane, ROW, K, SLOT, SLOTS, G
        )
    is_end = source == R - 1
    token = tl.where(is_end, token + workers, token)
    source = tl.where(is_end, 0, source + 1)
    return head_of(send_head, source, token + apart, stop, R), source, token, slot_at, ask_parity


@gluon.jit
def stage_rows(
    heap, state, status, x, weights, prefix, src_idx, num_rows, rank, epoch, operation, timeout, stage, half, worker,
    workers, tid, cols,
    WIDTH: gl.constexpr, ITEM: gl.constexpr, K: gl.constexpr, HELD: gl.constexpr, R: gl.constexpr,
):  # fmt: skip
    """Copy the rows of every peer's tokens into the stage, round by round; one program's part."""
    AT: gl.constexpr = (WIDTH * ITEM + 15) // 16 * 16
    RECORD: gl.constexpr = AT + (K * 4 + 15) // 16 * 16
    per_round = half // (RECORD * R)
    own = heap_of(heap, rank) + stage
    alive = True
    for this in range(rounds_of_readers(heap, rank, per_round, R)):
        if alive:
            alive = wait_for_half(heap, state, status, rank, this, per_round, operation, epoch, timeout, True, R)
        if alive:
            for step in range(R - 1):
                reader = (rank + 1 + step) % R
                low, high, first = rows_of_reader(
                    prefix, src_idx, num_rows, rank, reader, this * per_round, per_round, HELD, R
                )
                target = own + (this % 2) * half + reader.to(tl.int64) * per_round * RECORD
                for row in range(low + worker, high, workers):
                    slot = tl.load(src_idx + row) - first
                    fits = (slot >= 0) & (slot < per_round)
                    there = (target + slot * RECORD).to(gl.pointer_type(x.dtype.element_ty))
                    there = gl.multiple_of(there, 16)
                    wanted = (cols < WIDTH) & fits
                    gl.store(there + cols, gl.load(x + row * WIDTH + cols, mask=wanted), mask=wanted)
                    if K > 0:
                        there = (target + slot * RECORD + AT).to(gl.pointer_type(gl.float32))
                        wanted = (tid < K) & fits
                        gl.store(there + tid, gl.load(weights + row * K + tid, mask=wanted), mask=wanted)
            tl.debug_barrier()
            publish_round(heap, state, rank, this, epoch, workers, R)


@gluon.jit(
    do_not_specialize=[
        "place_rows", "place_weights", "signature", "num_tokens", "num_rows", "stage", "half", "num_stagers", "rank",
        "operation", "timeout",
    ]
)  # fmt: skip
def combine(
    heap,
    state,
    ready,
    regions,
    status,
    x,
    weights,
    out,
    out_weights,
    bias_0,
    bias_1,
    prefix,
    src_idx,
    send_head,
    place_rows: tl.int64,
    place_weights: tl.int64,
    signature: tl.int64,
    num_tokens: tl.int64,
    num_rows: tl.int64,
    stage: tl.int64,
    half: tl.int64,
    num_stagers: tl.int32,
    rank: tl.int32,
    operation: tl.int64,
    timeout: tl.int64,
    WIDTH: gl.constexpr,
    ITEM: gl.constexpr,
    K: gl.constexpr,
    BIAS_0: gl.constexpr,
    BIAS_1: gl.constexpr,
    HELD: gl.constexpr,
    R: gl.constexpr,
    W: gl.constexpr,
    G: gl.constexpr,
    BLOCK: gl.constexpr,
    SLOTS: gl.constexpr,
    LAG: gl.constexpr,
):
    """As :func:`tokenferry.dataplane.cuda.kernels.combine.combine`, for rows that are added in float32.

    Of the W warps, W / G sum a token; each group has SLOTS slots.
    """
    ROW: gl.constexpr = WIDTH * ITEM
    SLOT: gl.constexpr = BLOCK * ITEM
    AT: gl.constexpr = (ROW + 15) // 16 * 16
    RECORD: gl.constexpr = AT + (K * 4 + 15) // 16 * 16
    LINE: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    LINES: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[1, 0])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 16 // ITEM], [1, 32], [G, W // G], [1, 0])
    memory = gl.allocate_shared_memory(x.dtype.element_ty, [SLOTS, G, BLOCK], LINES)
    rest = gl.allocate_shared_memory(gl.int32, [4096], LINE)
    anchor = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(anchor.index(0), count=1)
    tid = gl.arange(0, 32 * W, ONE)
    group = tid // (32 * (W // G))
    lane = tid % (32 * (W // G))
    # The same for the elements of a row: the groups, one a row, and their columns.
    groups = gl.arange(0, G, gl.SliceLayout(1, ROWS))
    cols = gl.arange(0, BLOCK, gl.SliceLayout(0, ROWS))
    staged_cols = gl.arange(0, BLOCK, gl.BlockedLayout([16 // ITEM], [32], [W], [0]))
    inside = (cols < WIDTH)[None, :]
    ring = shared_base(tid)
    extra = ring + SLOTS * G * SLOT
    notes = shared_base(groups) + SLOTS * G * SLOT + NOTES + groups * 8
    first_thread = (tid == 0).to(gl.int32)
    for index in gl.static_range(SLOTS * G):
        init_barrier(extra + BARS + index * 8, tid * 0 + 1, first_thread)
        init_barrier(extra + FREE + index * 8, tid * 0 + W // G, first_thread)
    tl.debug_barrier()
    pid = gl.program_id(0)
    epoch = tl.load(state + EPOCH) + 1
    if is_usable(state):
        places = (place_rows, place_weights)
        going = agree(
            heap, state, ready, status, rank, epoch, signature, num_tokens, num_rows, places,
            prefix if HELD else None, operation, timeout, True, 2, R,
        )  # fmt: skip
        staged = zero()
        if going:
            staged = tl.load(message_word(heap_of(heap, rank), rank, STAGED)).to(tl.int32)
        stagers = tl.where(staged != 0, num_stagers, 0)
        if pid < stagers:
            stage_rows(
                heap, state, status, x, weights, prefix, src_idx, num_rows, rank, epoch, operation, timeout, stage,
                half, pid, stagers, tid, staged_cols, WIDTH, ITEM, K, HELD, R,
            )  # fmt: skip
        elif going:
            # Group g of program p has the tokens p + g * programs + n * workers; the variables are of its group 0.
            worker = pid - stagers
            programs = gl.num_programs(0) - stagers
            workers = programs * G
            apart = group * programs
            rows_apart = groups * programs
            by_rounds = any_staged(heap, rank, R)
            per_round = half // (RECORD * R)
            rounds = tl.where(by_rounds, rounds_of(num_tokens, per_round), 0)
            alive = True
            fits = True
            slot_at = zero()
            use_at = zero()
            parity = zero()
            ask_parity = zero()
            for this in range(tl.maximum(rounds, 1)):
                if alive & fits & (this < rounds):
                    alive = wait_for_sources(heap, state, status, rank, this, operation, epoch, timeout, R)
                if alive & fits:
                    prepare(
                        heap, regions, status, prefix, x.to(tl.int64), weights.to(tl.int64), rank, operation, epoch,
                        this, per_round, stage, half, extra, tid, RECORD, AT, ROW, K, HELD, R,
                    )  # fmt: skip
                    tl.debug_barrier()
                    fence_before_loads(tid)
                    fits = has_no_fault(shared_base(zero()) + SLOTS * G * SLOT, R)
                if alive & fits:
                    first = tl.where(by_rounds, this * per_round, 0)
                    end = tl.where(by_rounds, tl.minimum(first + per_round, num_tokens), num_tokens)
                    mine = tl.maximum((end - first - worker + workers - 1) // workers, 0)
                    # ``ahead_*``: the item that is asked for next, LAG items before it is summed.
                    ahead_source = zero()
                    ahead_token = (first + worker).to(tl.int32)
                    stop = end.to(tl.int32)
                    head = head_of(send_head, ahead_source, ahead_token + apart, stop, R)
                    for _ in range(LAG):
                        head, ahead_source, ahead_token, slot_at, ask_parity = ask_ahead(
                            send_head, head, ahead_source, ahead_token, apart, stop, workers, slot_at, ask_parity,
                            extra, ring, group, lane, ROW, K, R, SLOT, SLOTS, G,
                        )  # fmt: skip
                    for n in range(mine):
                        t = first + worker + n * workers + rows_apart
                        place = t[:, None] * WIDTH + cols[None, :]
                        wanted = inside & (t < end)[:, None]
                        total = gl.zeros([G, BLOCK], gl.float32, ROWS)
                        sums = gl.zeros([32 * W], gl.float32, ONE)
                        if BIAS_0:
                            total += gl.load(bias_0 + place, mask=wanted, other=0.0).to(gl.float32)
                        if BIAS_1:
                            total += gl.load(bias_1 + place, mask=wanted, other=0.0).to(gl.float32)
                        for _ in range(R):
                            head, ahead_source, ahead_token, slot_at, ask_parity = ask_ahead(
                                send_head, head, ahead_source, ahead_token, apart, stop, workers, slot_at,
                                ask_parity, extra, ring, group, lane, ROW, K, R, SLOT, SLOTS, G,
                            )  # fmt: skip
                            slot = use_at * G + group
                            wait_parity(extra + BARS + slot * 8, parity + tid * 0)
                            live = load_shared(notes + use_at * G * 8) >= LIVE
                            row = memory.index(use_at).load(ROWS).to(gl.float32)
                            total += gl.where(live[:, None], row, 0.0)
                            if K > 0:
                                note = load_shared(extra + NOTES + slot * 8)
                                at = extra + WINDOWS + slot * WINDOW + (note & (LIVE - 1))
                                value = load_shared(at + gl.where(lane < K, lane, 0) * 4)
                                sums += gl.where(note >= LIVE, value.to(gl.float32, bitcast=True), 0.0)
                            arrive(extra + FREE + slot * 8, (tid % 32 == 0).to(gl.int32))
                            parity = tl.where(use_at == SLOTS - 1, parity ^ 1, parity)
                            use_at = tl.where(use_at == SLOTS - 1, 0, use_at + 1)
                        gl.store(out + place, total.to(out.dtype.element_ty), mask=wanted)
                        if K > 0:
                            t = first + worker + n * workers + apart
                            gl.store(out_weights + t * K + lane, sums, mask=(lane < K) & (t < end))
                    if this < rounds:
                        release_round(heap, state, rank, this, epoch, programs, R)
            if (fits == 0) & (pid == stagers):
                pass_all_rounds(heap, rank, epoch, R)
        finish(heap, state, status, rank, epoch, staged, operation, timeout, R)
    memory._keep_alive()
    rest._keep_alive()
