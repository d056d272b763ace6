"""The stage: rows of an owner pass through it in rounds over token ranges, double-buffered. Scalar code, as in sync.

Round k holds the tokens from k * B to (k + 1) * B, in the half of the stage that k's parity names. B is the same on
all ranks: it follows from the size of the stage and the bytes of a token's record. An owner fills a half when every
reader has released the round before the last; a reader releases a round when all its programs are through. All
waits are for earlier rounds only, so there is no circle of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.flags import heap_of, message_word, others_say, progress, signal_all
from tokenferry.dataplane.cuda.kernels.sync import is_last, release_all, wait_published, wait_released
from tokenferry.dataplane.cuda.kernels.words import (
    ALL,
    FOR_RELEASE,
    LINE,
    MESSAGE_BYTES,
    MESSAGES,
    MOST_TOKENS,
    NUM_TOKENS,
    PUBLISHED,
    ROUND_ARRIVED,
    STAGE_ARRIVED,
    STAGED,
)


@triton.jit
def rounds_of(num_tokens, per_round):
    """Rounds in which so many tokens pass. Both are far below 2^31, where a division is cheap."""
    per_round = per_round.to(tl.int32)
    return ((num_tokens.to(tl.int32) + per_round - 1) // per_round).to(tl.int64)


@triton.jit
def is_staged(heap, rank, source):
    """Whether a peer's rows come through its stage; own rows never do."""
    return (source != rank) & (tl.load(message_word(heap_of(heap, rank), source, STAGED)) != 0)


@triton.jit
def any_staged(heap, rank, R: tl.constexpr):
    """Whether some peer's rows come through its stage."""
    return others_say(heap_of(heap, rank) + MESSAGES + STAGED * 8, 0, rank, R, MESSAGE_BYTES) == 0


@triton.jit
def tokens_of(heap, rank, source):
    """Tokens of a rank, as its message says, if that may be."""
    said = tl.load(message_word(heap_of(heap, rank), source, NUM_TOKENS))
    return tl.minimum(tl.maximum(said, 0), MOST_TOKENS)


@triton.jit
def lower_bound(tokens, start, end, value):
    """The first index from ``start`` to ``end`` of ascending ``tokens`` whose token is not below ``value``."""
    low = start
    high = end
    while low < high:
        middle = (low + high) // 2
        below = tl.load(tokens + middle) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def wait_for_half(
    heap, state, status, rank, this, per_round, operation, epoch, timeout, BY_READER: tl.constexpr,
    R: tl.constexpr,
):  # fmt: skip
    """Before round ``this`` is staged: every reader that takes part in the round before the last has released it."""
    alive = True
    if this >= 2:
        for reader in range(R):
            takes_part = reader != rank
            if BY_READER:
                takes_part = takes_part & (this - 2 < rounds_of(tokens_of(heap, rank, reader), per_round))
            if takes_part:
                there = wait_released(
                    heap, state, status, rank, reader, progress(epoch, this - 1), operation, epoch, timeout, R,
                    KIND=FOR_RELEASE,
                )  # fmt: skip
                alive = alive & there
    return alive


@triton.jit
def publish_round(heap, state, rank, this, epoch, num_stagers, R: tl.constexpr):
    """After a program's part of a round is staged; the last one tells the readers."""
    if is_last(state + STAGE_ARRIVED + this % 2, num_stagers):
        signal_all(heap, PUBLISHED + rank * LINE, progress(epoch, this + 2), R)


@triton.jit
def wait_for_round(heap, state, status, rank, source, this, operation, epoch, timeout, R: tl.constexpr):
    """Wait until round ``this`` of a staged source is there."""
    return wait_published(
        heap, state, status, rank, source, progress(epoch, this + 2), operation, epoch, timeout, R
    )  # fmt: skip


@triton.jit
def wait_for_sources(
    heap, state, status, rank, this, operation, epoch, timeout, R: tl.constexpr, per_round=None, list_capacity=None
):  # fmt: skip
    """Wait for round ``this`` of every source that is staged; whether all came.

    With ``per_round``: of those that have so many rounds, by their own tokens; else all have.
    """
    alive = True
    for source in range(R):
        takes_part = is_staged(heap, rank, source)
        if per_round is not None:
            takes_part = takes_part & (this * per_round < tl.minimum(tokens_of(heap, rank, source), list_capacity))
        if alive & takes_part:
            alive = wait_for_round(heap, state, status, rank, source, this, operation, epoch, timeout, R)
    return alive


@triton.jit
def pass_all_rounds(heap, rank, epoch, R: tl.constexpr):
    """This rank reads nothing of an operation that others go on with: no owner need wait for it before a round."""
    release_all(heap, rank, epoch, ALL - 1, R)


@triton.jit
def release_round(heap, state, rank, this, epoch, num_readers, R: tl.constexpr):
    """After a program has read its part of a round; the last one tells the owners."""
    if is_last(state + ROUND_ARRIVED + this % 2, num_readers):
        release_all(heap, rank, epoch, this + 1, R)
