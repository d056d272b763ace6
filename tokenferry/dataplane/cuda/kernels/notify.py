"""The exchange of counts before a dispatch: tell every rank what is coming, learn what comes."""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.expert_major import lay_out_experts
from tokenferry.dataplane.cuda.kernels.flags import (
    heap_of,
    is_usable,
    message_word,
    progress,
    report,
    signal,
    tell_host,
    word,
    zero,
)
from tokenferry.dataplane.cuda.kernels.sync import (
    close_operation,
    must_stage,
    wait_all_published,
    wait_until_free,
    write_message,
)
from tokenferry.dataplane.cuda.kernels.words import (
    ALONE,
    BAD_COUNTS,
    BAD_INPUT,
    BAD_PEER,
    CAPACITY,
    COUNTS,
    DETAIL,
    EPOCH,
    EXPERTS,
    EXPERTS_BYTES,
    HAS_FAILED,
    HOST_CODE,
    HOST_DONE,
    HOST_EXPERTS,
    HOST_ROWS,
    LINE,
    LISTS,
    MISMATCH,
    MOST_CHOICES,
    NUM_TOKENS,
    NUM_WORST,
    PEER_PROBLEM,
    PROBLEM,
    PUBLISHED,
    SIGNATURE,
    SKIPPED,
    TIMED_OUT,
    WITHDRAWN,
)


@triton.jit
def send_list(target, member, send_head, num_tokens, reader, R: tl.constexpr, BLOCK: tl.constexpr):
    """Write the ascending ids of the tokens that go to ``reader``, and the place of each; return how many.

    Either is left out where it is None.
    """
    count = zero()
    for start in range(0, num_tokens, BLOCK):
        t = start + tl.arange(0, BLOCK)
        inside = t < num_tokens
        goes = (tl.load(member + t * R + reader, mask=inside, other=0) != 0).to(tl.int32)
        position = count + tl.cumsum(goes, 0) - goes
        if target is not None:
            tl.store(target + position, t.to(tl.int32), mask=goes != 0)
        if send_head is not None:
            tl.store(send_head + t * R + reader, tl.where(goes != 0, position, -1), mask=inside)
        count += tl.sum(goes)
    return count


@triton.jit
def copy_words(target, source, count, BLOCK: tl.constexpr):
    """int32 words from one array to another."""
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(target + i, tl.load(source + i, mask=i < count, other=0), mask=i < count)


@triton.jit
def tell(
    heap, state, ready, status, member, per_rank, per_expert, send_head, places, signature, num_tokens, num_worst,
    num_local, list_capacity, rank, reader, epoch, operation, timeout,
    NUM_COLUMNS: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One rank's message, counts and list for one reader."""
    if wait_until_free(heap, state, status, rank, reader, operation, epoch, timeout, R):
        base = heap_of(heap, reader)
        staged = must_stage(ready, places, NUM_COLUMNS, R)
        problem = tl.load(state + BAD_INPUT)
        write_message(
            heap, rank, reader, signature, num_tokens, num_tokens, num_worst, problem, staged, places, NUM_COLUMNS
        )
        r = tl.arange(0, RB)
        counts = tl.load(per_rank + r, mask=r < R, other=0)
        tl.store(message_word(base, rank, COUNTS) + r, counts.to(tl.int64), mask=r < R)
        experts = (base + EXPERTS + rank * EXPERTS_BYTES).to(tl.pointer_type(tl.int32))
        copy_words(experts, per_expert + reader * num_local, num_local, 256)
        ids = (base + LISTS + rank * list_capacity * 4).to(tl.pointer_type(tl.int32))
        sent = send_list(ids, member, send_head, num_tokens, reader, R, BLOCK)
        if sent != tl.sum(tl.where(r == reader, counts, 0)):
            tl.store(status + DETAIL + reader, sent.to(tl.int64))
            report(status, BAD_COUNTS, operation, epoch)
        tl.debug_barrier()
        signal(word(base, PUBLISHED + rank * LINE), progress(epoch, 1))


@triton.jit
def compare(own, status, signature, list_capacity, code, R: tl.constexpr, RB: tl.constexpr):
    """The code of what is wrong with the messages in the heap at ``own``, if anything is, else ``code``.

    One look at all of them: a branch for each word would wait for each word.
    """
    source = tl.arange(0, RB)
    inside = source < R
    problem = tl.load(message_word(own, source, PROBLEM), mask=inside, other=0) != 0
    theirs = tl.load(message_word(own, source, SIGNATURE), mask=inside, other=signature)
    differs = theirs != signature
    tokens = tl.load(message_word(own, source, NUM_TOKENS), mask=inside, other=0)
    cannot_be = (tokens < 0) | (tokens > list_capacity)
    kinds = tl.sum(problem.to(tl.int32) + 256 * differs.to(tl.int32) + 65536 * cannot_be.to(tl.int32))
    if kinds != 0:
        details = 1 + (theirs == WITHDRAWN).to(tl.int64)
        tl.store(status + DETAIL + source, details, mask=problem | differs | cannot_be)
        if kinds % 256 != 0:
            code = PEER_PROBLEM
        if kinds // 256 % 256 != 0:
            code = MISMATCH
        if kinds // 65536 != 0:
            code = BAD_PEER
    return code


@triton.jit
def bad_choices(own, source, tokens, num_local):
    """Whether a source says of some local expert what cannot be, as int32."""
    counts = (own + EXPERTS + source * EXPERTS_BYTES).to(tl.pointer_type(tl.int32))
    bad = zero()
    for start in range(0, num_local, 256):
        e = start + tl.arange(0, 256)
        count = tl.load(counts + e, mask=e < num_local, other=0)
        bad = bad | tl.max(((count < 0) | (count > tokens * MOST_CHOICES)).to(tl.int32))
    return bad


@triton.jit
def judge(
    heap, status, host, prefix, rank, signature, list_capacity, num_local, R: tl.constexpr, RB: tl.constexpr
):  # fmt: skip
    """Compare what all ranks said and write the prefix matrix; return a code, 0 if the ranks agree.

    Whether a rank sends more rows than it has tokens, or more choices of an expert than these have, is looked at only
    where all call the same: others send no counts.
    """
    own = heap_of(heap, rank)
    r = tl.arange(0, RB)
    inside = r < R
    ends = tl.zeros([RB], tl.int64)
    wrong = tl.zeros([RB], tl.int32)
    for source in range(R):
        counts = tl.load(message_word(own, source, COUNTS) + r, mask=inside, other=0)
        tokens = tl.load(message_word(own, source, NUM_TOKENS))
        bad = tl.max(((counts < 0) | (counts > tokens)).to(tl.int32))
        bad = bad | bad_choices(own, source, tokens, num_local)
        wrong = wrong | tl.where(r == source, bad, 0)
        ends += counts
        tl.store(prefix + source * R + r, ends.to(tl.int32), mask=inside)
    received = tl.sum(tl.where(r == rank, ends, 0))
    tl.store(host + HOST_ROWS, received)
    worst = tl.load(message_word(own, r, NUM_WORST), mask=inside, other=0)
    crowded = (worst > 0) & (worst < ends)
    code = zero()
    if tl.max(crowded.to(tl.int32)) != 0:
        tl.store(status + DETAIL + r, ends, mask=crowded)
        code = CAPACITY
    code = compare(own, status, signature, list_capacity, code, R, RB)
    if (tl.max(wrong) != 0) & (code != MISMATCH):
        tl.store(status + DETAIL + r, wrong.to(tl.int64), mask=inside)
        code = BAD_PEER
    return code


@triton.jit
def add_experts(heap, host, rank, num_local, R: tl.constexpr):
    """Sum the sources' counts of each local expert, for the host."""
    own = heap_of(heap, rank)
    for start in range(0, num_local, 256):
        e = start + tl.arange(0, 256)
        total = tl.zeros([256], tl.int32)
        for source in range(R):
            counts = (own + EXPERTS + source * EXPERTS_BYTES).to(tl.pointer_type(tl.int32))
            total += tl.load(counts + e, mask=e < num_local, other=0)
        tl.store(host + HOST_EXPERTS + e, total.to(tl.int64), mask=e < num_local)


@triton.jit
def step_back(state, status, code, operation, epoch):
    """Tell the host, and the kernel that pulls, that nothing comes of the operation."""
    tl.store(state + SKIPPED, epoch)
    if code == BAD_PEER:
        tl.store(state + ALONE, epoch)
        tl.store(status + HAS_FAILED, BAD_PEER)
    report(status, code, operation, epoch)


@triton.jit
def listen(
    heap, state, status, host, prefix, tables, signature, num_worst, num_local, alignment, list_capacity, rank, epoch,
    operation, timeout,
    HOST_WAITS: tl.constexpr, TABLES: tl.constexpr, EXPAND: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
):  # fmt: skip
    """Wait for the messages of all ranks, and tell the host what they amount to."""
    code = zero() + TIMED_OUT
    alive = wait_all_published(heap, state, status, rank, epoch, 1, operation, timeout, True, R)
    tl.store(host + HOST_CODE, TIMED_OUT)
    if alive:
        code = judge(heap, status, host, prefix, rank, signature, list_capacity, num_local, R, RB)
        tl.store(host + HOST_CODE, code)
        if code == 0:
            add_experts(heap, host, rank, num_local, R)
        else:
            step_back(state, status, code, operation, epoch)
            if HOST_WAITS & (code != BAD_PEER):  # no second kernel will come; then one does, which serves the stage
                close_operation(heap, state, status, rank, epoch, 0, operation, timeout, R)
    tl.debug_barrier()
    tell_host(host + HOST_DONE, epoch)
    if TABLES:
        if code == 0:
            lay_out_experts(heap, tables, num_local, alignment, num_worst, rank, EXPAND, R, RB)


@triton.jit(
    do_not_specialize=[
        "place_rows", "place_scales", "place_ids", "place_weights", "signature", "num_tokens", "num_worst",
        "num_local", "alignment", "list_capacity", "rank", "operation", "timeout",
    ]
)  # fmt: skip
def notify(
    heap,
    state,
    ready,
    status,
    host,
    member,
    per_rank,
    per_expert,
    send_head,
    prefix,
    channels,
    tables,
    place_rows: tl.int64,
    place_scales: tl.int64,
    place_ids: tl.int64,
    place_weights: tl.int64,
    signature: tl.int64,
    num_tokens: tl.int64,
    num_worst: tl.int64,
    num_local: tl.int32,
    alignment: tl.int32,
    list_capacity: tl.int64,
    rank: tl.int32,
    operation: tl.int64,
    timeout: tl.int64,
    HOST_WAITS: tl.constexpr,
    TABLES: tl.constexpr,
    EXPAND: tl.constexpr,
    NUM_COLUMNS: tl.constexpr,
    R: tl.constexpr,
    RB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Programs 0 to R - 1 each tell one rank; program R listens, and writes the matrices of the handle.

    ``channels``: int32 [2, R]: rows that this rank sends to each rank, then zeros. With TABLES, ``tables`` are those
    of :func:`.expert_major.lay_out_experts`; they are unset where the ranks step back.
    """
    pid = tl.program_id(0)
    epoch = tl.load(state + EPOCH) + 1
    if is_usable(state):
        if pid < R:
            places = (place_rows, place_scales, place_ids, place_weights)
            tell(
                heap, state, ready, status, member, per_rank, per_expert, send_head, places, signature, num_tokens,
                num_worst, num_local, list_capacity, rank, (rank + pid) % R, epoch, operation, timeout,
                NUM_COLUMNS, R, RB, BLOCK,
            )  # fmt: skip
        else:
            r = tl.arange(0, RB)
            tl.store(channels + r, tl.load(per_rank + r, mask=r < R, other=0), mask=r < R)
            tl.store(channels + R + r, tl.zeros([RB], tl.int32), mask=r < R)
            listen(
                heap, state, status, host, prefix, tables, signature, num_worst, num_local, alignment, list_capacity,
                rank, epoch, operation, timeout, HOST_WAITS, TABLES, EXPAND, R, RB,
            )  # fmt: skip
    elif pid == R:
        tl.store(host + HOST_CODE, TIMED_OUT)
        tl.debug_barrier()
        tell_host(host + HOST_DONE, epoch)
