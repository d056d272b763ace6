"""Combine in plain Triton: every rank pulls the rows of its tokens from the ranks that had them, and sums."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.dispatch import agree, copy_rows, rows_from
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
from tokenferry.dataplane.cuda.kernels.sync import column_address, finish
from tokenferry.dataplane.cuda.kernels.words import (
    BAD_HANDLE,
    EPOCH,
    FIRST_ROW,
    MOST_ROWS,
    NUM_ROWS,
    ROW_COUNT,
    STAGED,
)


@triton.jit
def rounds_of_readers(heap, rank, per_round, R: tl.constexpr):
    """Rounds in which the rows of all peers' tokens pass."""
    rounds = zero().to(tl.int64)
    for reader in range(R):
        if reader != rank:
            rounds = tl.maximum(rounds, rounds_of(tokens_of(heap, rank, reader), per_round))
    return rounds


@triton.jit
def rows_of_reader(
    prefix, src_idx, num_rows, rank, reader, first, per_round, HELD: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """From where to where a reader's rows go in the round from its token ``first`` on; that as ``src_idx`` has it."""
    start, end = rows_from(prefix, num_rows, rank, reader, R, HELD)
    if HELD:
        first += tl.load(prefix + 2 * R + reader)
    low = lower_bound(src_idx, start, end, first)
    return low, lower_bound(src_idx, low, end, first + per_round), first


@triton.jit
def stage_combine(
    heap, state, status, x, weights, prefix, src_idx, num_rows, rank, epoch, operation, timeout, stage, half, worker,
    workers,
    WORDS: tl.constexpr, K: tl.constexpr, HELD: tl.constexpr, R: tl.constexpr, RT: tl.constexpr, BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):  # fmt: skip
    """Copy the rows of every peer's tokens into the stage, round by round; one program's part."""
    RECORD: tl.constexpr = (WORDS * 4 + 15) // 16 * 16 + (K * 4 + 15) // 16 * 16
    WEIGHTS_AT: tl.constexpr = (WORDS * 4 + 15) // 16 * 16
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
                for at in range(low + worker * RT, high, workers * RT):
                    row = at + tl.arange(0, RT)
                    live = row < high
                    slot = tl.load(src_idx + row, mask=live, other=0) - first
                    live = live & (slot >= 0) & (slot < per_round)
                    copy_rows(x.to(tl.int64), WORDS * 4, row, target, RECORD, slot, live, WORDS, 16, BLOCK)
                    if K > 0:
                        copy_rows(
                            weights.to(tl.int64), K * 4, row, target + WEIGHTS_AT, RECORD, slot, live, K, 4, SMALL
                        )
            publish_round(heap, state, rank, this, epoch, workers, R)


@triton.jit
def start_at(heap, prefix, rank, source, HELD: tl.constexpr, R: tl.constexpr):
    """Where a rank's rows for this rank's tokens begin among all of its rows."""
    if HELD:
        start = tl.load(message_word(heap_of(heap, rank), source, FIRST_ROW))
    else:
        start = tl.load(prefix + (rank - 1) * R + source, mask=rank > 0, other=0).to(tl.int64)
    return start


@triton.jit
def count_at(prefix, rank, source, start, HELD: tl.constexpr, R: tl.constexpr):
    """How many rows for this rank's tokens a rank must have."""
    if HELD:
        count = tl.load(prefix + 3 * R + source).to(tl.int64)
    else:
        count = tl.load(prefix + rank * R + source) - start
    return count


@triton.jit
def place_of(
    heap, regions, prefix, own_address, rank, source, this, per_round, stage, half, column,
    RECORD: tl.constexpr, AT: tl.constexpr, ROW_BYTES: tl.constexpr, HELD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Where a rank's rows for this rank's tokens start, the bytes from one to the next, whether by token, and more.

    Direct rows are counted by ``send_head``, staged ones by token. Then: whether they can be read, and how many.
    """
    staged = is_staged(heap, rank, source)
    start = start_at(heap, prefix, rank, source, HELD, R)
    count = count_at(prefix, rank, source, start, HELD, R)
    direct = column_address(heap, regions, rank, source, column, start + count, ROW_BYTES, 16, R)
    direct = tl.where(source == rank, own_address, direct)
    known = staged | ((direct != 0) & (start >= 0))
    first = this * per_round
    half_at = heap_of(heap, source) + stage + (this % 2) * half + AT
    by_token = half_at + (rank * per_round - first) * RECORD
    return (
        tl.where(staged, by_token, direct + start * ROW_BYTES),
        tl.where(staged, RECORD, ROW_BYTES),
        staged,
        known,
        tl.where(known, count, 0),
    )


@triton.jit
def sum_rows(
    heap, regions, send_head, prefix, own_address, out, bias_0, bias_1, t, live, rank, this, per_round, stage, half,
    column,
    RECORD: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr, ITEM: tl.constexpr, ALIGN: tl.constexpr,
    TYPE: tl.constexpr, ACC: tl.constexpr, BIAS_0: tl.constexpr, BIAS_1: tl.constexpr, HELD: tl.constexpr,
    R: tl.constexpr, RT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of some tokens' rows, of elements of TYPE, ranks ascending, from the biases on; rounded once."""
    for start in tl.static_range(0, WIDTH, BLOCK):
        column_ids = start + tl.arange(0, BLOCK)
        wanted = live[:, None] & (column_ids < WIDTH)[None, :]
        place = t.to(tl.int64)[:, None] * WIDTH + column_ids[None, :]
        total = tl.zeros([RT, BLOCK], ACC)
        if BIAS_0:
            total += tl.load(bias_0 + place, mask=wanted, other=0.0).to(ACC)
        if BIAS_1:
            total += tl.load(bias_1 + place, mask=wanted, other=0.0).to(ACC)
        for source in range(R):
            head = tl.load(send_head + t * R + source, mask=live, other=-1)
            base, stride, staged, known, count = place_of(
                heap, regions, prefix, own_address, rank, source, this, per_round, stage, half, column, RECORD, AT,
                WIDTH * ITEM, HELD, R,
            )  # fmt: skip
            row = tl.where(staged, t.to(tl.int64), head.to(tl.int64))
            at = (base + row * stride).to(tl.pointer_type(TYPE))
            at = tl.multiple_of(at, [ALIGN])
            there = wanted & ((head >= 0) & (head < count))[:, None] & known
            total += tl.load(at[:, None] + column_ids[None, :], mask=there, other=0.0).to(ACC)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def rate_source(
    heap, regions, prefix, rank, source, ROW_BYTES: tl.constexpr, K: tl.constexpr, HELD: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Whether the handle's counts do not fit the rows that a rank brought, and whether these cannot be read."""
    start = start_at(heap, prefix, rank, source, HELD, R)
    count = count_at(prefix, rank, source, start, HELD, R)
    end = start + count
    brought = tl.minimum(tl.load(message_word(heap_of(heap, rank), source, NUM_ROWS)), MOST_ROWS)
    misfits = (start < 0) | (count < 0) | (end > brought)
    if HELD:
        misfits = misfits | (count != tl.load(message_word(heap_of(heap, rank), source, ROW_COUNT)))
    hidden = column_address(heap, regions, rank, source, 0, end, ROW_BYTES, 16, R) == 0
    if K > 0:
        hidden = hidden | (column_address(heap, regions, rank, source, 1, end, K * 4, 16, R) == 0)
    return misfits, hidden & (source != rank) & (count > 0) & (is_staged(heap, rank, source) == 0)


@triton.jit
def check_sources(
    heap, regions, status, prefix, rank, operation, epoch, ROW_BYTES: tl.constexpr, K: tl.constexpr,
    HELD: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Whether the handle's counts fit the rows that every rank brought, all of them readable."""
    fits = True
    for source in range(R):
        misfits, hidden = rate_source(heap, regions, prefix, rank, source, ROW_BYTES, K, HELD, R)
        if misfits:
            report(status, BAD_HANDLE, operation, epoch)
            fits = False
        if hidden:
            report_bad_peer(status, source, operation, epoch)
            fits = False
    return fits


@triton.jit(
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
    WIDTH: tl.constexpr,
    ITEM: tl.constexpr,
    ACC: tl.constexpr,
    K: tl.constexpr,
    KB: tl.constexpr,
    BIAS_0: tl.constexpr,
    BIAS_1: tl.constexpr,
    HELD: tl.constexpr,
    R: tl.constexpr,
    RT: tl.constexpr,
    BLOCK: tl.constexpr,
    SMALL: tl.constexpr,
):
    """``out[t]`` = biases + rows of t on all ranks; ``out_weights[t]`` = sums of its weights. ITEM: bytes.

    HELD: only the rows that the table of :mod:`.parts` names, which is in the place of ``prefix``.
    """
    WORDS: tl.constexpr = WIDTH * ITEM // 4
    AT: tl.constexpr = (WORDS * 4 + 15) // 16 * 16
    RECORD: tl.constexpr = AT + (K * 4 + 15) // 16 * 16
    pid = tl.program_id(0)
    epoch = tl.load(state + EPOCH) + 1
    if is_usable(state):
        places = (place_rows, place_weights)
        going = agree(
            heap, state, ready, status, rank, epoch, signature, num_tokens, num_rows, places,
            prefix if HELD else None, operation, timeout, True, 2, R,
        )  # fmt: skip
        fits = False
        staged = zero()
        if going:
            fits = check_sources(
                heap, regions, status, prefix, rank, operation, epoch, WIDTH * ITEM, K, HELD, R
            )  # fmt: skip
            staged = tl.load(message_word(heap_of(heap, rank), rank, STAGED)).to(tl.int32)
        stagers = tl.where(staged != 0, num_stagers, 0)
        if pid < stagers:
            stage_combine(
                heap, state, status, x, weights, prefix, src_idx, num_rows, rank, epoch, operation, timeout, stage,
                half, pid, stagers, WORDS, K, HELD, R, RT, BLOCK * ITEM // 4, SMALL,
            )  # fmt: skip
        elif fits:
            worker = pid - stagers
            workers = tl.num_programs(0) - stagers
            by_rounds = any_staged(heap, rank, R)
            per_round = half // (RECORD * R)
            rounds = tl.where(by_rounds, rounds_of(num_tokens, per_round), 1)
            alive = True
            for this in range(rounds):
                if alive & by_rounds:
                    alive = wait_for_sources(heap, state, status, rank, this, operation, epoch, timeout, R)
                if alive:
                    first = tl.where(by_rounds, this * per_round, 0)
                    end = tl.where(by_rounds, tl.minimum(first + per_round, num_tokens), num_tokens)
                    for at in range(first + worker * RT, end, workers * RT):
                        t = at + tl.arange(0, RT)
                        live = t < end
                        sum_rows(
                            heap, regions, send_head, prefix, x.to(tl.int64), out, bias_0, bias_1, t, live, rank,
                            this, per_round, stage, half, 0, RECORD, 0, WIDTH, ITEM, 16, x.dtype.element_ty, ACC,
                            BIAS_0, BIAS_1, HELD, R, RT, BLOCK,
                        )  # fmt: skip
                        if K > 0:
                            sum_rows(
                                heap, regions, send_head, prefix, weights.to(tl.int64), out_weights, out_weights,
                                out_weights, t, live, rank, this, per_round, stage, half, 1, RECORD, AT, K, 4, 4,
                                tl.float32, tl.float32, False, False, HELD, R, RT, KB,
                            )  # fmt: skip
                    if by_rounds:
                        release_round(heap, state, rank, this, epoch, workers, R)
        elif going & (pid == stagers):
            pass_all_rounds(heap, rank, epoch, R)
        finish(heap, state, status, rank, epoch, staged, operation, timeout, R)
