"""What the bulk-copy dispatch does beside moving rows: small columns, copies of expanded rows, tails, complaints."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tokenferry.dataplane.cuda.kernels.bulk import (
    load_shared,
    load_shared_long,
    meet,
    store_bulk,
    store_shared,
    tell,
)
from tokenferry.dataplane.cuda.kernels.expert_major import PACK_MASK, PACK_SHIFT
from tokenferry.dataplane.cuda.kernels.words import (
    AT_EPOCH,
    BAD_PEER,
    CODE,
    DETAIL,
    HAS_FAILED,
    OPERATION,
)


@gluon.jit
def copy_window(target, source, lane, on, WORDS: gl.constexpr):
    """Words from shared to global memory, a few a lane; none behind them is looked at."""
    for first in gl.static_range(0, WORDS, 32):
        word = first + lane
        mine = on
        if first + 32 > WORDS:
            mine = on & (word < WORDS)
            word = gl.where(word < WORDS, word, first)
        value = load_shared(source + word * 4)
        gl.store((target + word.to(gl.int64) * 4).to(gl.pointer_type(gl.int32)), value, mask=mine)


@gluon.jit
def copy_out(
    slot, ids_slot, weights_slot, scales_slot, row, token, source, live, lane, target, out_scales, out_weights,
    metadata, bases, first_expert, num_local, num_max_tokens, num_expanded,
    CACHED: gl.constexpr, ROW: gl.constexpr, SCALES: gl.constexpr, K: gl.constexpr, COPIES: gl.constexpr,
):  # fmt: skip
    """Write a row in shared memory to each of its copies, lane k to that of choice k; tell if one has no room.

    All threads of the warp come here; every one of them adds one group to its bulk stores.
    """
    mine = live & (lane < K)
    choice = gl.where(lane < K, lane, 0)
    noted = metadata + row * (K + 2)
    if CACHED:
        copy = gl.load(noted + 2 + choice, mask=mine, other=-1)
    else:
        packed = load_shared_long(ids_slot + choice * 8)
        expert = (packed & PACK_MASK).to(gl.int32) - first_expert
        here = mine & (packed >= 0) & (expert >= 0) & (expert < num_local)
        base = gl.load(bases + source * num_local + gl.where(here, expert, 0), mask=here, other=0)
        copy = gl.where(here, base + (packed >> PACK_SHIFT).to(gl.int32), -1)
    fits = (copy >= -1) & (copy < num_expanded)
    copy = gl.where(mine & fits, copy, -1)
    there = copy.to(gl.int64)
    store_bulk(target + there * ROW, slot, lane * 0 + ROW, (copy >= 0).to(gl.int32))
    weight = load_shared(weights_slot + choice * 4)
    gl.store((out_weights.to(gl.int64) + there * 4).to(gl.pointer_type(gl.int32)), weight, mask=copy >= 0)
    store_shared(slot + COPIES + choice * 4, copy, (lane < K).to(gl.int32))
    meet(lane)
    first = lane * 0 - 1
    for k in range(K):
        other = load_shared(slot + COPIES + k * 4 + lane * 0)
        first = gl.where((first < 0) & (other >= 0), k, first)
        if SCALES > 0:
            at = out_scales + other.to(gl.int64) * SCALES
            copy_window(at, scales_slot, lane, live & (other >= 0), SCALES // 4)
    if not CACHED:
        gl.store(noted + 2 + choice, copy, mask=mine)
        gl.store(noted, (source * num_max_tokens + token).to(gl.int32), mask=live & (lane == 0))
        gl.store(noted + 1, source * K + first, mask=live & (lane == 0))
    return mine & (fits == 0)


@gluon.jit
def complain(status, operation, epoch, wrong, tid, PROBLEM: gl.constexpr):
    """Tell the host of tokens that their owner does not have, or of copies that have no room."""
    here = tid * 0
    gl.store(status + OPERATION + here, here + operation, mask=wrong)
    gl.store(status + AT_EPOCH + here, here + epoch, mask=wrong)
    tell(status + CODE + here, here.to(gl.int64) + PROBLEM, wrong.to(gl.int32))


@gluon.jit
def blame(status, operation, epoch, source, tid):
    """As ``report_bad_peer``, of each thread that has a source, not -1."""
    here = tid * 0
    wrong = source >= 0
    gl.store(status + HAS_FAILED + here, here.to(gl.int64) + BAD_PEER, mask=wrong)
    gl.store(status + DETAIL + source, here.to(gl.int64) + 1, mask=wrong)
    complain(status, operation, epoch, wrong, tid, BAD_PEER)


@gluon.jit
def zero_tail(rows, start, end, worker, workers, tid, BYTES: gl.constexpr, W: gl.constexpr, WORD: gl.constexpr):
    """Zero the rows past the last received one, of BYTES each, by words of a type that divides these."""
    SIZE: gl.constexpr = WORD.primitive_bitwidth // 8
    for row in range(start + worker, end, workers):
        for first in range(0, BYTES // SIZE, 32 * W):
            word = first + tid
            there = rows + row * BYTES + word.to(gl.int64) * SIZE
            gl.store(there.to(gl.pointer_type(WORD)), (tid * 0).to(WORD), mask=word < BYTES // SIZE)


@gluon.jit
def fill_tail(
    out_ids, out_weights, src_idx, metadata, start, end, worker, workers, tid, EXPAND: gl.constexpr, K: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """Mark the rows past the last received one."""
    for row in range(start + worker, end, workers):
        gl.store(src_idx + row + tid, tid * 0 - 1, mask=tid == 0)
        if EXPAND:
            gl.store(metadata + row * (K + 2) + tid, tid * 0 - 1, mask=tid < K)
            gl.store(metadata + row * (K + 2) + K + tid, tid * 0 - 1, mask=tid < 2)
        elif K > 0:
            gl.store(out_ids + row * K + tid, (tid * 0 - 1).to(gl.int64), mask=tid < K)
            gl.store(out_weights + row * K + tid, tid.to(gl.float32) * 0, mask=tid < K)
