"""Dispatch in plain Triton: every rank pulls its rows, from the tensors where they lie or from the owners' stages."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.expert_major import choose_copies, copy_to_copies, weigh_copies
from tokenferry.dataplane.cuda.kernels.flags import heap_of, is_usable, message_word, report, report_bad_peer, zero
from tokenferry.dataplane.cuda.kernels.rounds import (
    any_staged,
    is_staged,
    lower_bound,
    pass_all_rounds,
    publish_round,
    release_round,
    rounds_of,
    tokens_of,
    wait_for_half,
    wait_for_sources,
)
from tokenferry.dataplane.cuda.kernels.sync import (
    all_mean,
    column_address,
    finish,
    publish_all,
    report_mismatches,
    wait_all_published,
)
from tokenferry.dataplane.cuda.kernels.words import (
    ALONE,
    BAD_HANDLE,
    DIFFERED,
    EPOCH,
    LISTS,
    MISMATCH,
    SKIPPED,
    STAGED,
)


@triton.jit
def copy_rows(
    source, source_stride, from_rows, target, target_stride, to_rows, live, WORDS: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of 4-byte words between two addresses; strides in bytes, all divisible by ALIGN."""
    here = (source + from_rows.to(tl.int64) * source_stride).to(tl.pointer_type(tl.int32))
    there = (target + to_rows.to(tl.int64) * target_stride).to(tl.pointer_type(tl.int32))
    here = tl.multiple_of(here, [ALIGN])
    there = tl.multiple_of(there, [ALIGN])
    for start in tl.static_range(0, WORDS, BLOCK):
        word = start + tl.arange(0, BLOCK)
        wanted = live[:, None] & (word < WORDS)[None, :]
        tl.store(there[:, None] + word[None, :], tl.load(here[:, None] + word[None, :], mask=wanted), mask=wanted)


@triton.jit
def stage_dispatch(
    heap, state, status, x, scales, ids, weights, num_tokens, rank, epoch, operation, timeout, stage, half, worker,
    workers,
    WORDS: tl.constexpr, SCALE_WORDS: tl.constexpr, K: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    BLOCK: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """Copy all tokens into the stage, round by round; one program's part."""
    SCALES_AT: tl.constexpr = (WORDS * 4 + 15) // 16 * 16
    IDS_AT: tl.constexpr = SCALES_AT + (SCALE_WORDS * 4 + 15) // 16 * 16
    WEIGHTS_AT: tl.constexpr = IDS_AT + (K * 8 + 15) // 16 * 16
    RECORD: tl.constexpr = WEIGHTS_AT + (K * 4 + 15) // 16 * 16
    per_round = half // RECORD
    own = heap_of(heap, rank) + stage
    alive = True
    for this in range(rounds_of(num_tokens, per_round)):
        if alive:
            alive = wait_for_half(heap, state, status, rank, this, per_round, operation, epoch, timeout, False, R)
        if alive:
            target = own + (this % 2) * half
            first = this * per_round
            end = tl.minimum(first + per_round, num_tokens)
            for start in range(first + worker * RT, end, workers * RT):
                t = start + tl.arange(0, RT)
                live = t < end
                copy_rows(x.to(tl.int64), WORDS * 4, t, target, RECORD, t - first, live, WORDS, 16, BLOCK)
                if SCALE_WORDS > 0:
                    copy_rows(
                        scales.to(tl.int64), SCALE_WORDS * 4, t, target + SCALES_AT, RECORD, t - first, live,
                        SCALE_WORDS, 4, SMALL,
                    )  # fmt: skip
                if K > 0:
                    copy_rows(ids.to(tl.int64), K * 8, t, target + IDS_AT, RECORD, t - first, live, 2 * K, 4, SMALL)
                    copy_rows(
                        weights.to(tl.int64), K * 4, t, target + WEIGHTS_AT, RECORD, t - first, live, K, 4, SMALL
                    )
            publish_round(heap, state, rank, this, epoch, workers, R)


@triton.jit
def localise(
    ids_from, weights_from, ids_stride, weights_stride, from_rows, out_ids, out_weights, to_rows, live, first_expert,
    num_local,
    K: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """Rows of choices: global ids become local ones, -1 with weight 0 where the expert is not local."""
    k = tl.arange(0, KB)
    wanted = live[:, None] & (k < K)[None, :]
    at = (ids_from + from_rows.to(tl.int64) * ids_stride).to(tl.pointer_type(tl.int64))
    weights_at = (weights_from + from_rows.to(tl.int64) * weights_stride).to(tl.pointer_type(tl.float32))
    expert = tl.load(at[:, None] + k[None, :], mask=wanted, other=-1) - first_expert
    weight = tl.load(weights_at[:, None] + k[None, :], mask=wanted, other=0.0)
    here = (expert >= 0) & (expert < num_local)
    place = to_rows.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(out_ids + place, tl.where(here, expert, -1), mask=wanted)
    tl.store(out_weights + place, tl.where(here, weight, 0.0), mask=wanted)


@triton.jit
def fill_tail(
    out_ids, out_weights, src_idx, metadata, start, end, worker, workers, EXPAND: tl.constexpr, K: tl.constexpr,
    KB: tl.constexpr, RT: tl.constexpr,
):  # fmt: skip
    """Mark the rows past the last received one."""
    k = tl.arange(0, KB)
    for row in range(start + worker * RT, end, workers * RT):
        i = row + tl.arange(0, RT)
        live = i < end
        tl.store(src_idx + i, tl.full([RT], -1, tl.int32), mask=live)
        if EXPAND:
            noted = metadata + i.to(tl.int64) * (K + 2)
            tl.store(noted, tl.full([RT], -1, tl.int32), mask=live)
            tl.store(noted + 1, tl.full([RT], -1, tl.int32), mask=live)
            wanted = live[:, None] & (k < K)[None, :]
            tl.store(noted[:, None] + 2 + k[None, :], tl.full([RT, KB], -1, tl.int32), mask=wanted)
        elif K > 0:
            wanted = live[:, None] & (k < K)[None, :]
            place = i.to(tl.int64)[:, None] * K + k[None, :]
            tl.store(out_ids + place, tl.full([RT, KB], -1, tl.int64), mask=wanted)
            tl.store(out_weights + place, tl.zeros([RT, KB], tl.float32), mask=wanted)


@triton.jit
def zero_tail(rows, start, end, worker, workers, WORDS: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the rows past the last received one, of 4-byte words; their address is divisible by ALIGN."""
    for row in range(start + worker, end, workers):
        there = (rows.to(tl.int64) + row * (WORDS * 4)).to(tl.pointer_type(tl.int32))
        there = tl.multiple_of(there, ALIGN)
        for first in tl.static_range(0, WORDS, BLOCK):
            word = first + tl.arange(0, BLOCK)
            tl.store(there + word, tl.zeros([BLOCK], tl.int32), mask=word < WORDS)


@triton.jit
def rows_from(prefix, num_rows, rank, source, R: tl.constexpr, PLACED: tl.constexpr):
    """Where a rank's rows from a source start and end, within the rows that there are, whatever the handle says."""
    if PLACED:
        start = tl.load(prefix + source).to(tl.int64)
        end = tl.load(prefix + R + source).to(tl.int64)
    else:
        start = tl.load(prefix + (source - 1) * R + rank, mask=source > 0, other=0).to(tl.int64)
        end = tl.load(prefix + source * R + rank).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), num_rows)
    return start, tl.minimum(tl.maximum(end, start), num_rows)


@triton.jit
def lacks_room(received, num_rows, expanded, num_expanded):
    """Whether outputs of ``num_rows`` rows, made before the counts were known, cannot take those that come.

    Nor outputs of ``num_expanded`` rows those that these are expanded to. All programs of the kernel leave then, as
    if it had not been launched: the host, which knows by now, launches it again. A negative number of rows: none are
    wanted, whatever comes.
    """
    return (num_rows >= 0) & ((received > num_rows) | (expanded > num_expanded))


@triton.jit
def list_of(heap, src_idx, rank, source, start, list_capacity, CACHED: tl.constexpr):
    """The ids of the tokens that come from a source."""
    if CACHED:
        return src_idx + start
    else:
        own = heap_of(heap, rank)
        return (own + LISTS + source * list_capacity * 4).to(tl.pointer_type(tl.int32))


@triton.jit
def staged_rounds(heap, rank, per_round, list_capacity, R: tl.constexpr):
    """Rounds in which all staged sources pass; 0 if there is none."""
    rounds = zero().to(tl.int64)
    if any_staged(heap, rank, R):
        for source in range(R):
            if is_staged(heap, rank, source):
                num_tokens = tl.minimum(tokens_of(heap, rank, source), list_capacity)
                rounds = tl.maximum(rounds, rounds_of(num_tokens, per_round))
    return rounds


@triton.jit
def range_of_source(
    heap, rank, source, src_idx, prefix, num_rows, list_capacity, this, per_round,
    CACHED: tl.constexpr, PLACED: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Which rows of a source come in a round.

    Returns:
        The list of the source's tokens and the row of its first one; from where to where the round goes in it; the
        first token that can be read now, and the one after the last; whether the rows are staged.
    """
    start, end = rows_from(prefix, num_rows, rank, source, R, PLACED)
    tokens = list_of(heap, src_idx, rank, source, start, list_capacity, CACHED)
    num_tokens = tl.minimum(tokens_of(heap, rank, source), list_capacity)
    count = tl.minimum(end - start, num_tokens)
    staged = is_staged(heap, rank, source)
    low = zero().to(tl.int64)
    high = tl.where(this == 0, count, 0)
    first = zero().to(tl.int64)
    last = num_tokens
    if staged:
        first = this * per_round
        last = tl.minimum(first + per_round, num_tokens)
        low = lower_bound(tokens, zero().to(tl.int64), count, first)
        high = lower_bound(tokens, low, count, first + per_round)
    return tokens, start, low, high, first, last, staged


@triton.jit
def pull_source(
    heap, regions, status, x, scales, ids, weights, out_x, out_scales, out_ids, out_weights, src_idx, prefix,
    metadata, bases, num_rows, first_expert, num_local, num_max_tokens, num_expanded, list_capacity, rank, source,
    epoch, operation, stage, half, this, worker, workers,
    CACHED: tl.constexpr, EXPAND: tl.constexpr, PLACED: tl.constexpr, WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr, K: tl.constexpr, KB: tl.constexpr, R: tl.constexpr, RT: tl.constexpr,
    BLOCK: tl.constexpr, SMALL: tl.constexpr,
):  # fmt: skip
    """One program's part of the rows that come from one source in one round."""
    SCALES_AT: tl.constexpr = (WORDS * 4 + 15) // 16 * 16
    IDS_AT: tl.constexpr = SCALES_AT + (SCALE_WORDS * 4 + 15) // 16 * 16
    WEIGHTS_AT: tl.constexpr = IDS_AT + (K * 8 + 15) // 16 * 16
    RECORD: tl.constexpr = WEIGHTS_AT + (K * 4 + 15) // 16 * 16
    tokens, start, low, high, first, last, staged = range_of_source(
        heap, rank, source, src_idx, prefix, num_rows, list_capacity, this, half // RECORD, CACHED, PLACED, R
    )
    if low < high:
        base = heap_of(heap, source) + stage + (this % 2) * half
        own = source == rank
        rows_at = tl.where(staged, base, column_address(heap, regions, rank, source, 0, last, WORDS * 4, 16, R))
        rows_at = tl.where(own, x.to(tl.int64), rows_at)
        unknown = rows_at == 0
        if SCALE_WORDS > 0:
            there = column_address(heap, regions, rank, source, 1, last, SCALE_WORDS * 4, 4, R)
            scales_at = tl.where(staged, base + SCALES_AT, there)
            scales_at = tl.where(own, scales.to(tl.int64), scales_at)
            unknown = unknown | (scales_at == 0)
        if K > 0:
            there = column_address(heap, regions, rank, source, 2, last, K * 8, 8, R)
            ids_at = tl.where(staged, base + IDS_AT, there)
            ids_at = tl.where(own, ids.to(tl.int64), ids_at)
            there = column_address(heap, regions, rank, source, 3, last, K * 4, 4, R)
            weights_at = tl.where(staged, base + WEIGHTS_AT, there)
            weights_at = tl.where(own, weights.to(tl.int64), weights_at)
            unknown = unknown | (ids_at == 0) | (weights_at == 0)
        if unknown:
            report_bad_peer(status, source, operation, epoch)
            high = low
        for at in range(low + worker * RT, high, workers * RT):
            i = at + tl.arange(0, RT)
            live = i < high
            t = tl.load(tokens + i, mask=live, other=0)
            fits = (t >= first) & (t < last)
            if tl.max((live & (fits == 0)).to(tl.int32)) > 0:
                if CACHED:
                    report(status, BAD_HANDLE, operation, epoch)
                else:
                    report_bad_peer(status, source, operation, epoch)
            live = live & fits
            row = start + i
            slot = t - first
            row_step = tl.where(staged, RECORD, WORDS * 4)
            scale_step = tl.where(staged, RECORD, SCALE_WORDS * 4)
            ids_step = tl.where(staged, RECORD, K * 8)
            weights_step = tl.where(staged, RECORD, K * 4)
            if EXPAND:
                copies = choose_copies(
                    status, ids_at, ids_step, slot, metadata, bases, row, t, live, source, first_expert, num_local,
                    num_max_tokens, num_expanded, operation, epoch, CACHED, K, KB, RT,
                )  # fmt: skip
                copy_to_copies(rows_at, row_step, slot, out_x.to(tl.int64), copies, live, K, KB, WORDS, 16, BLOCK)
                if SCALE_WORDS > 0:
                    copy_to_copies(
                        scales_at, scale_step, slot, out_scales.to(tl.int64), copies, live, K, KB, SCALE_WORDS, 4,
                        SMALL,
                    )  # fmt: skip
                weigh_copies(weights_at, weights_step, slot, out_weights, copies, live, K, KB)
            else:
                copy_rows(rows_at, row_step, slot, out_x.to(tl.int64), WORDS * 4, row, live, WORDS, 16, BLOCK)
                if SCALE_WORDS > 0:
                    copy_rows(
                        scales_at, scale_step, slot, out_scales.to(tl.int64), SCALE_WORDS * 4, row, live,
                        SCALE_WORDS, 4, SMALL,
                    )  # fmt: skip
                if K > 0:
                    localise(
                        ids_at, weights_at, ids_step, weights_step, slot, out_ids, out_weights, row, live,
                        first_expert, num_local, K, KB,
                    )  # fmt: skip
            if PLACED:
                noted = live & (src_idx.to(tl.int64) != 0)
                tl.store(src_idx + row, t + tl.load(prefix + 2 * R + source), mask=noted)
            elif not CACHED:
                tl.store(src_idx + row, t, mask=live)


@triton.jit
def agree(
    heap, state, ready, status, rank, epoch, signature, num_tokens, num_rows, places, held, operation, timeout,
    CACHED: tl.constexpr, NUM_COLUMNS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Whether this operation goes on: everyone is there and means the same. ``held``: as in ``publish_all``."""
    if CACHED:
        if tl.program_id(0) == 0:
            publish_all(
                heap, state, ready, status, rank, epoch, signature, num_tokens, num_rows, places, held, operation,
                timeout, NUM_COLUMNS, R,
            )  # fmt: skip
    if CACHED:
        counts = tl.program_id(0) == tl.num_programs(0) - 1  # not the one that publishes
    else:
        counts = False  # the kernel before this one has waited
    going = wait_all_published(heap, state, status, rank, epoch, 1, operation, timeout, counts, R)
    if going:
        if CACHED:
            if all_mean(heap, rank, signature, R) == 0:
                going = False
                tl.atomic_add(state + DIFFERED, 1, sem="relaxed", scope="gpu")
                if tl.program_id(0) == 0:
                    report_mismatches(heap, status, rank, signature, operation, epoch, R)
                    report(status, MISMATCH, operation, epoch)
        elif tl.load(state + SKIPPED) == epoch:
            going = False
    return going


@triton.jit(
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
    CACHED: tl.constexpr,
    EXPAND: tl.constexpr,
    PLACED: tl.constexpr,
    WORDS: tl.constexpr,
    SCALE_WORDS: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    R: tl.constexpr,
    RT: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):
    """Rows, scales and choices into their final places. Not cached, the message went out with ``notify``.

    ``num_rows``: of the outputs; ``num_expanded``: of those that are expanded. If more come the kernel does nothing,
    and is launched again; -1: none are wanted. Not EXPAND, there is nothing to expand: if ``num_expanded`` is not 0,
    the rows past the last one that comes are zeroed.

    EXPAND: the ids are packed (see :mod:`.expert_major`), and rows, scales and weights go to their copies.
    PLACED: only what comes is written, where the table of :mod:`.parts` says, which is in the place of ``prefix``;
    source tokens are not written where ``src_idx`` is 0.
    """
    RECORD: tl.constexpr = (
        (WORDS * 4 + 15) // 16 + (SCALE_WORDS * 4 + 15) // 16 + (K * 8 + 15) // 16 + (K * 4 + 15) // 16
    ) * 16
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    epoch = tl.load(state + EPOCH) + 1
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
        if pid < stagers:
            stage_dispatch(
                heap, state, status, x, scales, ids, weights, num_tokens, rank, epoch, operation, timeout, stage,
                half, pid, stagers, WORDS, SCALE_WORDS, K, R, RT, BLOCK, SMALL,
            )  # fmt: skip
        else:
            worker = pid - stagers
            workers = programs - stagers
            if not CACHED and not PLACED:
                fill_tail(
                    out_ids, out_weights, src_idx, metadata, received, num_rows, worker, workers, EXPAND, K, KB, RT
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
                        for step in range(R):
                            pull_source(
                                heap, regions, status, x, scales, ids, weights, out_x, out_scales, out_ids,
                                out_weights, src_idx, prefix, metadata, bases, num_rows, first_expert, num_local,
                                num_max_tokens, num_expanded, list_capacity, rank, (rank + 1 + step) % R, epoch,
                                operation, stage, half, this, worker, workers, CACHED, EXPAND, PLACED, WORDS,
                                SCALE_WORDS, K, KB, R, RT, BLOCK, SMALL,
                            )  # fmt: skip
                    if alive & (this < by_rounds):
                        release_round(heap, state, rank, this, epoch, workers, R)
                if not EXPAND and not PLACED:
                    if num_expanded != 0:
                        _, last = rows_from(prefix, num_rows, rank, R - 1, R, False)
                        zero_tail(out_x, last, num_rows, worker, workers, WORDS, 16, BLOCK)
                        if SCALE_WORDS > 0:
                            zero_tail(out_scales, last, num_rows, worker, workers, SCALE_WORDS, 4, SMALL)
            elif is_alone & (worker == 0) & (too_few == 0):
                pass_all_rounds(heap, rank, epoch, R)
        if not too_few:
            finish(heap, state, status, rank, epoch, staged, operation, timeout, R)
