"""Dispatch by the bulk-copy engine (sm_90 and newer): the same protocol and parameters as in plain Triton.

Every warp moves whole rows through its ring of slots, LAG rows behind those it asks for. Sources take turns row by
row, so that the links are busy from the first row to the last. With a row come its small columns: a window of 16-byte
granules around each, of which the warp's lanes then write what is wanted. Each column is asked for by a lane of its
own. Per-source facts lie in a table in shared memory, made anew for every round: see :mod:`.bulk_sources`.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tokenferry.dataplane.cuda.kernels.bulk import (
    announce,
    fence_before_loads,
    init_barrier,
    keep,
    load_bulk,
    load_shared,
    load_shared_long,
    meet,
    reserve,
    shared_base,
    store_bulk,
    store_shared,
    wait_parity,
    wait_stores,
    wait_stores_read,
)
from tokenferry.dataplane.cuda.kernels.bulk_columns import (
    blame,
    complain,
    copy_out,
    copy_window,
    fill_tail,
    zero_tail,
)
from tokenferry.dataplane.cuda.kernels.bulk_sources import (
    COUNT,
    ENTRY,
    FIRST,
    FIRST_TOKEN,
    IDS_AT,
    LAST,
    LIST_AT,
    ROWS_AT,
    SCALES_AT,
    START,
    STEP,
    WEIGHTS_AT,
    most_rows,
    prepare,
    prepare_own,
)
from tokenferry.dataplane.cuda.kernels.dispatch import agree, lacks_room, rows_from, staged_rounds
from tokenferry.dataplane.cuda.kernels.flags import heap_of, is_usable, message_word, zero
from tokenferry.dataplane.cuda.kernels.rounds import (
    pass_all_rounds,
    publish_round,
    release_round,
    rounds_of,
    wait_for_half,
    wait_for_sources,
)
from tokenferry.dataplane.cuda.kernels.sync import finish
from tokenferry.dataplane.cuda.kernels.words import (
    ALONE,
    BAD_HANDLE,
    EPOCH,
    NO_ROOM,
    STAGED,
)

SLOT_HEADER = gl.constexpr(32)
"""At the end of a slot, int32: whether there is a row, its number in the output, its token, its source where rows are
expanded, and how far its columns lie in their windows: :data:`SKIPS` on. Before that, where rows are expanded,
their copies."""
SKIPS = gl.constexpr(16)


def window(nbytes: int) -> int:
    """Bytes of shared memory for a small column of so many bytes, wherever it begins."""
    return 0 if nbytes == 0 else (nbytes + 15) // 16 * 16 + 16


def slot_bytes(row_bytes: int, scale_bytes: int, num_topk: int, expand: bool = False) -> int:
    """Bytes of a slot."""
    small = window(scale_bytes) + window(8 * num_topk) + window(4 * num_topk)
    copies = (4 * num_topk + 15) // 16 * 16 if expand else 0
    return (int(SLOT_HEADER.value) + copies + row_bytes + small + 127) // 128 * 128


@gluon.jit
def entry_of(table, item, items, rank, STAGE: gl.constexpr, R: gl.constexpr):
    """The table entry of an item, its number among those of the source, and whether there is such a row."""
    source = (rank + 1 + item % R) % R
    index = item // R
    if STAGE:
        source = item * 0
        index = item
    entry = table + source * ENTRY
    live = (index < load_shared_long(entry + COUNT).to(gl.int32)) & (item < items)
    return entry, index, live


@gluon.jit
def token_of(table, item, items, first, rank, STAGE: gl.constexpr, R: gl.constexpr):
    """The token of an item; -1 if there is none, -2 if its owner has no such token."""
    entry, index, live = entry_of(table, item, items, rank, STAGE, R)
    if STAGE:
        return gl.where(live, first + index, -1)
    else:
        lists = (load_shared_long(entry + LIST_AT) + index.to(gl.int64) * 4).to(gl.pointer_type(gl.int32))
        token = gl.load(lists, mask=live, other=-1)
        early = token < load_shared_long(entry + FIRST).to(gl.int32)
        wrong = live & (early | (token >= load_shared_long(entry + LAST).to(gl.int32)))
        return gl.where(wrong, -2, token)


@gluon.jit
def column_of(entry, field, token):
    """Where a token's part of a column lies."""
    return load_shared_long(entry + field) + token.to(gl.int64) * load_shared_long(entry + field + STEP)


@gluon.jit
def columns_of(
    lane, SMALL_SCALES: gl.constexpr, SMALL_IDS: gl.constexpr, SMALL_WEIGHTS: gl.constexpr, SCALES: gl.constexpr,
    K: gl.constexpr, ROW: gl.constexpr,
):  # fmt: skip
    """What a lane asks for: lane 0 the row, then one each for its small columns, scales first.

    Returns:
        Whether it asks at all, the column's field in a table entry, its bytes, and where they go in a slot.
    """
    IDS: gl.constexpr = 1 + (SCALES > 0)
    COLUMNS: gl.constexpr = IDS + 2 * (K > 0)
    is_row = lane == 0
    is_scales = (lane > 0) & (lane < IDS)
    is_ids = lane == IDS
    field = gl.where(is_row, ROWS_AT, gl.where(is_scales, SCALES_AT, gl.where(is_ids, IDS_AT, WEIGHTS_AT)))
    nbytes = gl.where(is_row, ROW, gl.where(is_scales, SCALES, gl.where(is_ids, K * 8, K * 4)))
    place = gl.where(is_row, 0, gl.where(is_scales, SMALL_SCALES, gl.where(is_ids, SMALL_IDS, SMALL_WEIGHTS)))
    return lane < COLUMNS, field, nbytes, place


@gluon.jit
def move_rows(
    table, bars, ring, tid, lane, warp, rank, items, first, slot_at, use_at, parity, worker, workers, target,
    out_scales, out_ids, out_weights, src_idx, metadata, bases, first_expert, num_local, num_max_tokens, num_expanded,
    STAGE: gl.constexpr, CACHED: gl.constexpr, EXPAND: gl.constexpr, PLACED: gl.constexpr, ROW: gl.constexpr,
    SCALES: gl.constexpr, K: gl.constexpr, R: gl.constexpr, RECORD: gl.constexpr, SCALES_OFF: gl.constexpr,
    IDS_OFF: gl.constexpr, WEIGHTS_OFF: gl.constexpr, W: gl.constexpr, SLOT: gl.constexpr, SLOTS: gl.constexpr,
    LAG: gl.constexpr,
):  # fmt: skip
    """One program's part of ``items`` rows, the sources by turns.

    STAGE: the only source is this rank from token ``first`` on, and rows go in order into records at ``target``.

    Returns:
        The next slot to load into, the next to use, and the parity of its phase; the source of some token that was
        wrong, or -1, and whether a copy had no room.
    """
    SMALL_SCALES: gl.constexpr = ROW  # rows begin on 128 bytes: else the engine takes twice as long
    IDS: gl.constexpr = 1 + (SCALES > 0)
    HEADER: gl.constexpr = SLOT - SLOT_HEADER
    SMALL_IDS: gl.constexpr = SMALL_SCALES + ((SCALES + 15) // 16 * 16 + 16 if SCALES > 0 else 0)
    SMALL_WEIGHTS: gl.constexpr = SMALL_IDS + (K * 8 + 15) // 16 * 16 + 16
    COPIES: gl.constexpr = HEADER - (4 * K + 15) // 16 * 16
    STRIDE: gl.constexpr = RECORD if STAGE else ROW
    lane0 = (lane == 0).to(gl.int32)
    asks, field, nbytes, place = columns_of(lane, SMALL_SCALES, SMALL_IDS, SMALL_WEIGHTS, SCALES, K, ROW)
    asks = asks.to(gl.int32)
    step = workers * W
    iterations = gl.maximum((items - worker * W + step - 1) // step, 0)
    item = worker * W + warp
    token = token_of(table, item, items, first, rank, STAGE, R)
    wrong = tid * 0 - 1
    crowded = tid < 0
    for i in range(iterations + LAG):
        if i < iterations:
            entry, index, live = entry_of(table, item, items, rank, STAGE, R)
            wrong = gl.where(token == -2, (rank + 1 + item % R) % R, wrong)
            live = live & (token >= 0)
            on = live.to(gl.int32)
            slot = ring + slot_at * SLOT
            bar = bars + slot_at * 8
            wait_stores_read(tid, SLOTS - LAG - 1)
            row = load_shared_long(entry + START).to(gl.int32) + index
            at = column_of(entry, field, token)
            skip = (at & 15).to(gl.int32)
            size = (skip + nbytes + 15) & -16
            if SLOTS - LAG == 1:
                meet(tid)  # all lanes have read what the row before left there
            store_shared(slot + HEADER, on, lane0)
            store_shared(slot + HEADER + 4, row, lane0)
            if PLACED and not STAGE:
                store_shared(slot + HEADER + 8, token + load_shared_long(entry + FIRST_TOKEN).to(gl.int32), lane0)
            else:
                store_shared(slot + HEADER + 8, token, lane0)
            if EXPAND:
                store_shared(slot + HEADER + 12, (rank + 1 + item % R) % R, lane0)
            store_shared(slot + HEADER + SKIPS + lane * 4, skip, asks)
            announce(bar, on * size, asks)
            load_bulk(slot + place, at & -16, size, bar, on * asks)
            slot_at = tl.where(slot_at == SLOTS - 1, 0, slot_at + 1)
            item += step
            token = token_of(table, item, items, first, rank, STAGE, R)
        if i >= LAG:
            slot = ring + use_at * SLOT
            wait_parity(bars + use_at * 8, parity + tid * 0)
            live = load_shared(slot + HEADER) != 0
            row = load_shared(slot + HEADER + 4).to(gl.int64)
            scales_slot = slot + SMALL_SCALES
            if SCALES > 0:
                scales_slot += load_shared(slot + HEADER + SKIPS + 4)
            ids_slot = slot + SMALL_IDS
            weights_slot = slot + SMALL_WEIGHTS
            if K > 0:
                ids_slot += load_shared(slot + HEADER + SKIPS + 4 * IDS)
                weights_slot += load_shared(slot + HEADER + SKIPS + 4 * IDS + 4)
            if EXPAND and not STAGE:
                full = copy_out(
                    slot, ids_slot, weights_slot, scales_slot, row, load_shared(slot + HEADER + 8),
                    load_shared(slot + HEADER + 12), live, lane, target, out_scales, out_weights, metadata, bases,
                    first_expert, num_local, num_max_tokens, num_expanded, CACHED, ROW, SCALES, K, COPIES,
                )  # fmt: skip
                crowded = crowded | full
            else:
                store_bulk(target + row * STRIDE, slot, tid * 0 + ROW, lane0 * live.to(gl.int32))
            if SCALES > 0 and (STAGE or not EXPAND):
                there = out_scales + row * SCALES
                if STAGE:
                    there = target + row * RECORD + SCALES_OFF
                copy_window(there, scales_slot, lane, live, SCALES // 4)
            if K > 0 and (STAGE or not EXPAND):
                if STAGE:
                    copy_window(target + row * RECORD + IDS_OFF, ids_slot, lane, live, 2 * K)
                    copy_window(target + row * RECORD + WEIGHTS_OFF, weights_slot, lane, live, K)
                else:
                    mine = live & (lane < K)
                    expert = load_shared_long(ids_slot + gl.where(lane < K, lane, 0) * 8) - first_expert
                    weight = load_shared(weights_slot + gl.where(lane < K, lane, 0) * 4)
                    here = (expert >= 0) & (expert < num_local)
                    spot = row * K + lane
                    gl.store(out_ids + spot, gl.where(here, expert, -1), mask=mine)
                    weights_there = (out_weights.to(gl.int64) + spot * 4).to(gl.pointer_type(gl.int32))
                    gl.store(weights_there, gl.where(here, weight, 0), mask=mine)
            if not STAGE:
                if PLACED:
                    noted = live & (lane == 0) & (src_idx.to(gl.int64) != 0)
                    gl.store(src_idx + row, load_shared(slot + HEADER + 8), mask=noted)
                elif not CACHED:
                    gl.store(src_idx + row, load_shared(slot + HEADER + 8), mask=live & (lane == 0))
            parity = tl.where(use_at == SLOTS - 1, parity ^ 1, parity)
            use_at = tl.where(use_at == SLOTS - 1, 0, use_at + 1)
    return slot_at, use_at, parity, wrong, crowded


@gluon.jit(
    do_not_specialize=[
        "place_rows", "place_scales", "place_ids", "place_weights", "num_rows", "num_expanded", "signature",
        "num_tokens", "first_expert", "num_local", "num_max_tokens", "list_capacity", "stage", "half",
        "num_stagers", "rank", "operation", "timeout",
    ]
)  # fmt: skip
def dispatch(
    heap,
    state,
    ready,
    regions,
    status,
    x,
    scales,
    ids,
    weights,
    out_x,
    out_scales,
    out_ids,
    out_weights,
    src_idx,
    prefix,
    metadata,
    bases,
    place_rows: tl.int64,
    place_scales: tl.int64,
    place_ids: tl.int64,
    place_weights: tl.int64,
    num_rows: tl.int64,
    num_expanded: tl.int64,
    signature: tl.int64,
    num_tokens: tl.int64,
    first_expert: tl.int32,
    num_local: tl.int32,
    num_max_tokens: tl.int64,
    list_capacity: tl.int64,
    stage: tl.int64,
    half: tl.int64,
    num_stagers: tl.int32,
    rank: tl.int32,
    operation: tl.int64,
    timeout: tl.int64,
    CACHED: gl.constexpr,
    EXPAND: gl.constexpr,
    PLACED: gl.constexpr,
    ROW: gl.constexpr,
    SCALES: gl.constexpr,
    K: gl.constexpr,
    R: gl.constexpr,
    W: gl.constexpr,
    SLOT: gl.constexpr,
    SLOTS: gl.constexpr,
    LAG: gl.constexpr,
    TABLE: gl.constexpr,
):
    """As :func:`tokenferry.dataplane.cuda.kernels.dispatch.dispatch`. ROW, SCALES, SLOT: bytes; W warps."""
    SCALES_OFF: gl.constexpr = (ROW + 15) // 16 * 16
    IDS_OFF: gl.constexpr = SCALES_OFF + (SCALES + 15) // 16 * 16
    WEIGHTS_OFF: gl.constexpr = IDS_OFF + (K * 8 + 15) // 16 * 16
    RECORD: gl.constexpr = WEIGHTS_OFF + (K * 4 + 15) // 16 * 16
    LAY: gl.constexpr = gl.BlockedLayout([1], [32], [W], [0])
    memory = reserve()
    tid = gl.arange(0, 32 * W, LAY)
    warp = tid // 32
    lane = tid % 32
    table = shared_base(tid)
    bars = table + TABLE + warp * (SLOTS * 8)
    ring = table + TABLE + ((W * SLOTS * 8 + 127) // 128) * 128 + warp * (SLOTS * SLOT)
    lane0 = (lane == 0).to(gl.int32)
    for slot in gl.static_range(SLOTS):
        init_barrier(bars + slot * 8, tid * 0 + 1 + (SCALES > 0) + 2 * (K > 0), lane0)
    tl.debug_barrier()
    pid = gl.program_id(0)
    programs = gl.num_programs(0)
    epoch = gl.load(state + EPOCH) + 1
    if is_usable(state):
        places = (place_rows, place_scales, place_ids, place_weights)
        going = agree(
            heap, state, ready, status, rank, epoch, signature, num_tokens, num_tokens, places, None, operation,
            timeout, CACHED, 4, R,
        )  # fmt: skip
        staged = zero()
        is_alone = False
        received = zero().to(tl.int64)
        expanded = zero().to(tl.int64)
        if going:
            staged = tl.load(message_word(heap_of(heap, rank), rank, STAGED)).to(tl.int32)
            if not CACHED and not PLACED:
                received = tl.load(prefix + (R - 1) * R + rank).to(tl.int64)
                if EXPAND:
                    expanded = tl.load(bases + R * num_local).to(tl.int64)
        elif tl.load(state + ALONE) == epoch:
            is_alone = True
            staged = tl.load(message_word(heap_of(heap, rank), rank, STAGED)).to(tl.int32)
        too_few = lacks_room(received, num_rows, expanded, num_expanded)
        num_rows = tl.maximum(num_rows, 0)
        received = tl.minimum(tl.maximum(received, 0), num_rows)
        if too_few:
            going = False
            staged = zero()
        stagers = tl.where(staged != 0, num_stagers, 0)
        slot_at = zero()
        use_at = zero()
        parity = zero()
        if pid < stagers:
            per_round = half // RECORD
            own = heap_of(heap, rank) + stage
            alive = True
            for this in range(rounds_of(num_tokens, per_round)):
                if alive:
                    alive = wait_for_half(
                        heap, state, status, rank, this, per_round, operation, epoch, timeout, False, R
                    )
                if alive:
                    first = this * per_round
                    count = tl.minimum(per_round, num_tokens - first)
                    tl.debug_barrier()
                    prepare_own(x, scales, ids, weights, count, table, lane0, ROW, SCALES, K)
                    tl.debug_barrier()
                    fence_before_loads(tid)
                    slot_at, use_at, parity, _, _ = move_rows(
                        table, bars, ring, tid, lane, warp, rank, count.to(tl.int32), first.to(tl.int32), slot_at,
                        use_at, parity, pid, stagers, own + (this % 2) * half, out_scales.to(tl.int64), out_ids,
                        out_weights, src_idx, metadata, bases, first_expert, num_local, num_max_tokens, num_expanded,
                        True, CACHED, EXPAND, PLACED, ROW, SCALES, K, R, RECORD, SCALES_OFF, IDS_OFF, WEIGHTS_OFF, W,
                        SLOT, SLOTS, LAG,
                    )  # fmt: skip
                    wait_stores(tid)
                    tl.debug_barrier()
                    publish_round(heap, state, rank, this, epoch, stagers, R)
        else:
            worker = pid - stagers
            workers = programs - stagers
            if not CACHED and not PLACED:
                fill_tail(
                    out_ids, out_weights, src_idx, metadata, received, num_rows, worker, workers, tid, EXPAND, K, W
                )
            if going:
                by_rounds = staged_rounds(heap, rank, half // RECORD, list_capacity, R)
                alive = True
                for this in range(tl.maximum(by_rounds, 1)):
                    if alive & (by_rounds > 0):
                        alive = wait_for_sources(
                            heap, state, status, rank, this, operation, epoch, timeout, R, half // RECORD,
                            list_capacity,
                        )  # fmt: skip
                    if alive:
                        prepare(
                            heap, regions, status, x, scales, ids, weights, src_idx, prefix, num_rows, list_capacity,
                            rank, epoch, operation, stage, half, this, by_rounds, table, tid, CACHED, PLACED, ROW,
                            SCALES, K, R, RECORD, SCALES_OFF, IDS_OFF, WEIGHTS_OFF,
                        )  # fmt: skip
                        tl.debug_barrier()
                        fence_before_loads(tid)
                        most = most_rows(shared_base(zero()), R)
                        slot_at, use_at, parity, wrong, crowded = move_rows(
                            table, bars, ring, tid, lane, warp, rank, (most * R).to(tl.int32), zero(), slot_at,
                            use_at, parity, worker, workers, out_x.to(tl.int64), out_scales.to(tl.int64), out_ids,
                            out_weights, src_idx, metadata, bases, first_expert, num_local, num_max_tokens,
                            num_expanded, False, CACHED, EXPAND, PLACED, ROW, SCALES, K, R, RECORD, SCALES_OFF,
                            IDS_OFF, WEIGHTS_OFF, W, SLOT, SLOTS, LAG,
                        )  # fmt: skip
                        if CACHED:
                            complain(status, operation, epoch, wrong >= 0, tid, BAD_HANDLE)
                        else:
                            blame(status, operation, epoch, wrong, tid)
                        if EXPAND:
                            complain(status, operation, epoch, crowded, tid, BAD_HANDLE if CACHED else NO_ROOM)
                        if this < by_rounds:
                            release_round(heap, state, rank, this, epoch, workers, R)
                if not EXPAND and not PLACED:
                    if num_expanded != 0:
                        _, last = rows_from(prefix, num_rows, rank, R - 1, R, False)
                        zero_tail(out_x.to(tl.int64), last, num_rows, worker, workers, tid, ROW, W, gl.int64)
                        if SCALES > 0:
                            zero_tail(
                                out_scales.to(tl.int64), last, num_rows, worker, workers, tid, SCALES, W, gl.int32
                            )
                wait_stores(tid)
            elif is_alone & (worker == 0) & (too_few == 0):
                pass_all_rounds(heap, rank, epoch, R)
        if not too_few:
            finish(heap, state, status, rank, epoch, staged, operation, timeout, R)
    keep(memory)
