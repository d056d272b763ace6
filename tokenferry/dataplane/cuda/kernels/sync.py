"""Waiting and signalling between GPUs, and the steps that every operation shares. All scalar code: plain Triton
kernels and Gluon kernels call the same functions.

Before a signal the program meets: a release orders only what its own thread has seen, and the compiler puts no
barrier before it. What programs wait for, every thread loads for itself, and all must agree. Every wait ends at a
deadline of the device's clock, in nanoseconds.

Waits are counted in the rank's own memory, by one program each: how long a rank was missing. Where the first look
finds that all is there, no clock is read and nothing is written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.words import (
    ALL,
    ARRIVED,
    AT_EPOCH,
    BAD_PEER,
    CLAIMED,
    CODE,
    COLUMNS,
    DETAIL,
    DIFFERED,
    EPOCH,
    EPOCH_SHIFT,
    FAILED,
    FIRST_ROW,
    FOR_ROWS,
    HAS_FAILED,
    LINE,
    MESSAGE_BYTES,
    MESSAGES,
    MOST_ROWS,
    NUM_ROWS,
    NUM_TOKENS,
    NUM_WORST,
    OPERATION,
    PLACE_MASK,
    PLACE_SHIFT,
    PROBLEM,
    PUBLISHED,
    RANKS,
    REGIONS,
    RELEASED,
    ROW_COUNT,
    SIGNATURE,
    STAGED,
    TIMED_OUT,
    TORN,
    WAIT_WORDS,
    WAITS,
)

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def zero():
    """An int32 that loops and branches can carry on from, made so that Gluon, too, sees a scalar."""
    return tl.program_id(0) * 0


@triton.jit
def now():
    """Nanoseconds of the device's clock; the interpreter has none, and so no deadlines."""
    if INTERPRET:
        return zero().to(tl.int64)
    else:
        return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, is_pure=False, pack=1)


@triton.jit
def word(base, offset):
    """The int64 word at a byte offset from an address."""
    return (base + offset).to(tl.pointer_type(tl.int64))


@triton.jit
def message_word(base, source, index):
    """A word of the message of ``source`` in the heap at ``base``."""
    return word(base, MESSAGES + source * MESSAGE_BYTES + index * 8)


@triton.jit
def progress(epoch, step):
    """The value of a progress word."""
    return (epoch << EPOCH_SHIFT) | step


@triton.jit
def acquire(flag):
    """A progress word that others write, or several. Every thread loads, and acquires, those of its elements."""
    if INTERPRET:
        return tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    else:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [flag], tl.int64, is_pure=False, pack=1
        )


@triton.jit
def acquire_all(flags, R: tl.constexpr):
    """The progress words of all ranks, a line each from ``flags`` on, acquired in one go.

    Each thread gets one of them: only what is :func:`agreed` on is about all.
    """
    if INTERPRET:
        least = acquire(word(flags, 0))
        for peer in range(1, R):
            least = tl.minimum(least, acquire(word(flags, peer * LINE)))
        return least
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .u32 t; .reg .u64 a; mov.u32 t, %tid.x; rem.u32 t, t, $2; mad.wide.u32 a, t, $3, $1;
            ld.acquire.sys.global.b64 $0, [a]; }""",
            "=l,l,r,r",
            [flags, zero() + R, zero() + LINE],
            tl.int64,
            is_pure=False,
            pack=1,
        )


@triton.jit
def agreed(condition):
    """Whether all threads of the program say so. They meet here, and all get the same answer.

    Threads that look for themselves may see a word, or the clock, at different times: without this they would go
    different ways past barriers.
    """
    if INTERPRET:
        return condition
    else:
        answer = tl.inline_asm_elementwise(
            """{ .reg .pred p; setp.ne.u32 p, $1, 0; bar.red.and.pred p, 0, p; selp.u32 $0, 1, 0, p; }""",
            "=r,r",
            [condition.to(tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )
        return answer != 0


@triton.jit
def count_wait(state, operation, peer, nanoseconds):
    """Count a wait that is over, for one rank; nobody waits until that has arrived."""
    at = state + WAITS + operation * RANKS + peer
    tl.atomic_add(at, 1, sem="relaxed", scope="gpu")
    tl.atomic_add(at + WAIT_WORDS, nanoseconds, sem="relaxed", scope="gpu")
    tl.atomic_max(at + 2 * WAIT_WORDS, nanoseconds, sem="relaxed", scope="gpu")


@triton.jit
def count_waits_for(peers, state, operation, rank, nanoseconds, R: tl.constexpr):
    """Likewise for several, bits, but not for this rank itself."""
    for peer in range(R):
        if (((peers >> peer) & 1) != 0) & (peer != rank):
            count_wait(state, operation, peer, nanoseconds)


@triton.jit
def wait_at_least(state, flag, value, timeout, operation, peer, given_up=None, KIND: tl.constexpr = None):
    """Wait until a progress word in own memory has reached ``value``; False if it did not in ``timeout`` ns.

    Nor if the word at ``given_up``, where there is one, is not 0: then who would write has been given up. The clock
    is looked at every 64 polls, about as many microseconds, and the time runs from the first look on. With a KIND of
    word, the first of the programs that are through counts the wait.
    """
    there = agreed(acquire(flag) >= value)
    waited = there == 0
    begun = zero().to(tl.int64)
    if KIND is not None:
        if waited:
            begun = now()
    polls = zero()
    late = polls != 0
    deadline = zero().to(tl.int64)
    while (there == 0) & (late == 0):
        there = agreed(acquire(flag) >= value)
        polls += 1
        if polls % 64 == 0:
            time = now()
            deadline = tl.where(polls == 64, time + timeout, deadline)
            late = agreed(time >= deadline)
            if given_up is not None:
                late = late | agreed(tl.load(given_up, volatile=True) != 0)
            polls = tl.where(polls == 1 << 20, 1 << 19, polls)
    if KIND is not None:
        if waited:
            spent = now() - begun
            claim = state + CLAIMED + KIND * RANKS + peer
            if tl.atomic_max(claim, value, sem="relaxed", scope="gpu") < value:
                count_wait(state, operation, peer, spent)
    return there


@triton.jit
def still_missing(missing, flags, value, R: tl.constexpr):
    """Those of the missing ranks, bits, whose progress words have not reached ``value``."""
    for peer in range(R):
        if ((missing >> peer) & 1) != 0:
            if agreed(acquire(word(flags, peer * LINE)) >= value):
                missing = missing ^ (1 << peer)
    return missing


@triton.jit
def wait_all(state, status, flags, value, rank, operation, epoch, timeout, counts, R: tl.constexpr):
    """Wait until the progress words of all ranks have reached ``value``; who does not come is reported.

    The time to wait begins anew with every rank that comes. A program that ``counts`` adds how long each peer was
    missing, from the moment when it found that some was: if several are at a time, that counts for each.
    ``flags``: where the word of rank 0 lies in own memory; the others follow, a line each.
    """
    there = agreed(acquire_all(flags, R) >= value)
    if there == 0:
        there = wait_for_missing(state, status, flags, value, rank, operation, epoch, timeout, counts, R)
    return there


@triton.jit
def wait_for_missing(state, status, flags, value, rank, operation, epoch, timeout, counts, R: tl.constexpr):
    """As ``wait_all``, after the first look."""
    begun = now()
    missing = zero()
    for peer in range(R):
        missing = missing | (1 << peer)
    if counts:
        missing = still_missing(missing, flags, value, R)
    polls = zero()
    late = polls != 0
    deadline = zero().to(tl.int64)
    while (missing != 0) & (late == 0):
        polls += 1
        still = missing
        if agreed(acquire_all(flags, R) >= value):
            still = zero()
        elif counts | (polls % 64 == 0):  # one by one: who comes when
            still = still_missing(missing, flags, value, R)
        if still != missing:
            polls = zero()
            if counts:
                count_waits_for(missing ^ still, state, operation, rank, now() - begun, R)
            missing = still
        if (polls != 0) & (polls % 64 == 0):
            time = now()
            deadline = tl.where(polls == 64, time + timeout, deadline)
            late = agreed(time >= deadline)
            polls = tl.where(polls == 1 << 20, 1 << 19, polls)
    if missing != 0:
        if counts:
            count_waits_for(missing, state, operation, rank, now() - begun, R)
        for peer in range(R):
            if ((missing >> peer) & 1) != 0:
                report_missing(state, status, operation, epoch, peer)
    return missing == 0


@triton.jit
def signal(flag, value):
    """Let a peer see ``value``, and before it all that this program stored before its last barrier."""
    tl.atomic_xchg(flag, value, sem="release", scope="sys")


@triton.jit
def signal_all(heap, offset, value, R: tl.constexpr):
    """Let all ranks see ``value`` at ``offset`` in their heaps, and before it all that this program stored till now.

    A posted store each, by as many threads: so the program meets first.
    """
    tl.debug_barrier()
    if INTERPRET:
        for peer in range(R):
            signal(word(tl.load(heap + peer), offset), value)
    else:
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .u32 t; .reg .u64 a; mov.u32 t, %tid.x; setp.lt.u32 p, t, $4;
            mad.wide.u32 a, t, 8, $1; @p ld.global.b64 a, [a]; add.u64 a, a, $2;
            @p st.release.sys.global.b64 [a], $3; mov.u32 $0, 0; }""",
            "=r,l,l,l,r",
            [heap, zero().to(tl.int64) + offset, value, zero() + R],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def tell_host(address, value):
    """Let the host see ``value`` in pinned memory, and before it all stores before the last barrier.

    A plain release store of the first thread: not every machine has atomics on host memory.
    """
    if INTERPRET:
        tl.atomic_xchg(address, value, sem="release", scope="sys")
    else:
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
            @p st.release.sys.global.b64 [$1], $2; mov.u32 $0, 0; }""",
            "=r,l,l",
            [address, value],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def report(status, code, operation, epoch):
    """Tell the host what went wrong; details first."""
    tl.store(status + OPERATION, operation)
    tl.store(status + AT_EPOCH, epoch)
    tl.debug_barrier()
    tell_host(status + CODE, zero().to(tl.int64) + code)


@triton.jit
def report_missing(state, status, operation, epoch, missing):
    """Tell the host that a rank did not come, and every later operation that there is nothing to wait for."""
    tl.store(state + FAILED, 1)
    tl.store(status + HAS_FAILED, 1)
    tl.store(status + DETAIL + missing, 1)
    report(status, TIMED_OUT, operation, epoch)


@triton.jit
def report_bad_peer(status, source, operation, epoch):
    """Tell the host that a rank sent what makes no sense: the Buffer is lost. Kernels go on, so that nobody waits."""
    tl.store(status + HAS_FAILED, BAD_PEER)
    tl.store(status + DETAIL + source, 1)
    report(status, BAD_PEER, operation, epoch)


@triton.jit
def report_torn(status, rank, differed, operation, epoch):
    """Tell the host that some programs stepped back where others went on: outputs have holes, the Buffer is lost."""
    tl.store(status + HAS_FAILED, TORN)
    tl.store(status + DETAIL + rank, differed)
    report(status, TORN, operation, epoch)


@triton.jit
def wait_released(
    heap, state, status, rank, reader, value, operation, epoch, timeout, KIND: tl.constexpr = None
):  # fmt: skip
    """Wait until ``reader`` is as far as ``value`` with this rank's rows.

    Not counted before an operation: a reader that is still at the one before has not published this one either, and
    that wait is counted.
    """
    own = tl.load(heap + rank)
    flag = word(own, RELEASED + reader * LINE)
    there = wait_at_least(state, flag, value, timeout, operation, reader, KIND=KIND)
    if not there:
        report_missing(state, status, operation, epoch, reader)
    return there


@triton.jit
def wait_published(heap, state, status, rank, source, value, operation, epoch, timeout):
    """Wait until ``source`` is as far as ``value`` with its rows."""
    own = tl.load(heap + rank)
    flag = word(own, PUBLISHED + source * LINE)
    there = wait_at_least(state, flag, value, timeout, operation, source, KIND=FOR_ROWS)
    if not there:
        report_missing(state, status, operation, epoch, source)
    return there


@triton.jit
def write_message(
    heap, rank, reader, signature, num_tokens, num_rows, num_worst, problem, staged, places, NUM_COLUMNS: tl.constexpr
):
    """Write this rank's message to one reader; the caller signals. ``places``: where each column lies."""
    base = tl.load(heap + reader)
    tl.store(message_word(base, rank, SIGNATURE), signature)
    tl.store(message_word(base, rank, NUM_TOKENS), num_tokens)
    tl.store(message_word(base, rank, NUM_ROWS), num_rows)
    tl.store(message_word(base, rank, NUM_WORST), num_worst)
    tl.store(message_word(base, rank, PROBLEM), problem)
    tl.store(message_word(base, rank, STAGED), staged)
    for column in tl.static_range(NUM_COLUMNS):
        tl.store(message_word(base, rank, COLUMNS + column), places[column])


@triton.jit
def write_held(heap, rank, reader, table, R: tl.constexpr):
    """Write into the message to one reader which rows are for it; ``table``: see :mod:`.parts`."""
    base = tl.load(heap + reader)
    first = tl.load(table + reader).to(tl.int64)
    tl.store(message_word(base, rank, FIRST_ROW), first)
    tl.store(message_word(base, rank, ROW_COUNT), tl.load(table + R + reader).to(tl.int64) - first)


@triton.jit
def must_stage(ready, places, NUM_COLUMNS: tl.constexpr, R: tl.constexpr):
    """Whether some column lies where a peer cannot see it yet."""
    staged = zero()
    if R > 1:
        for column in tl.static_range(NUM_COLUMNS):
            place = places[column]
            seen = tl.load(ready + (place >> PLACE_SHIFT), mask=place >= 0, other=0)
            staged = staged | (seen == 0).to(tl.int32)
    return staged


@triton.jit
def column_address(
    heap, regions, rank, source, column, rows, row_bytes, ALIGN: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Where a column of a source lies that is not staged; 0 if so many rows are not inside a region known here.

    Then, too, if it does not begin on ALIGN bytes. So, whatever a peer says, nothing is read but what it has opened.
    ``regions``: where the regions of all ranks begin, then their sizes.
    """
    own = tl.load(heap + rank)
    place = tl.load(message_word(own, source, COLUMNS + column))
    region = place >> PLACE_SHIFT
    known = (region >= 0) & (region < REGIONS)
    entry = regions + source * REGIONS + region
    base = tl.load(entry, mask=known, other=0)
    size = tl.load(entry + R * REGIONS, mask=known, other=0)
    offset = place & PLACE_MASK
    inside = (rows >= 0) & (rows <= MOST_ROWS) & (offset + rows * row_bytes <= size) & ((offset & (ALIGN - 1)) == 0)
    return tl.where((base != 0) & inside, base + offset, 0)


@triton.jit
def publish_all(
    heap, state, ready, status, rank, epoch, signature, num_tokens, num_rows, places, held, operation, timeout,
    NUM_COLUMNS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The message and its flag for every rank: the first step of an operation whose counts are known.

    ``held``: None, or the table of what is told besides. While a reader is still at the operation before, those that
    are not are told one by one: they shall not take this rank for the one that is missing.
    """
    staged = must_stage(ready, places, NUM_COLUMNS, R)
    before = progress(epoch - 1, ALL)
    at_once = agreed(acquire_all(tl.load(heap + rank) + RELEASED, R) >= before)
    alive = True
    for step in range(R):
        reader = (rank + step) % R
        if alive & (at_once == 0):
            alive = wait_released(heap, state, status, rank, reader, before, operation, epoch, timeout)
        if alive:
            if held is not None:
                write_held(heap, rank, reader, held, R)
            write_message(
                heap, rank, reader, signature, num_tokens, num_rows, 0, 0, staged, places, NUM_COLUMNS
            )  # fmt: skip
            if at_once == 0:
                tl.debug_barrier()
                signal(word(tl.load(heap + reader), PUBLISHED + rank * LINE), progress(epoch, 1))
    if at_once:
        signal_all(heap, PUBLISHED + rank * LINE, progress(epoch, 1), R)


@triton.jit
def wait_all_published(heap, state, status, rank, epoch, step, operation, timeout, counts, R: tl.constexpr):
    """Wait for every source; every one that does not come is reported. ``counts``: as in ``wait_all``."""
    flags = tl.load(heap + rank) + PUBLISHED
    return wait_all(
        state, status, flags, progress(epoch, step), rank, operation, epoch, timeout, counts, R
    )  # fmt: skip


@triton.jit
def first_mismatch(heap, rank, signature, R: tl.constexpr):
    """The first source whose signature differs from this rank's, or -1."""
    own = tl.load(heap + rank)
    found = zero() - 1
    for source in range(R):
        theirs = tl.load(message_word(own, source, SIGNATURE))
        found = tl.where((found < 0) & (theirs != signature), source, found)
    return found


@triton.jit
def report_mismatches(heap, status, rank, signature, operation, epoch, R: tl.constexpr):
    """Tell the host whose signatures differ from this rank's."""
    own = tl.load(heap + rank)
    for source in range(R):
        theirs = tl.load(message_word(own, source, SIGNATURE))
        tl.store(status + DETAIL + source, (theirs != signature).to(tl.int64))


@triton.jit
def release_all(heap, rank, epoch, step, R: tl.constexpr):
    """Tell every owner how far this rank is with its rows."""
    signal_all(heap, RELEASED + rank * LINE, progress(epoch, step), R)


@triton.jit
def close_operation(heap, state, status, rank, epoch, staged, operation, timeout, R: tl.constexpr):
    """The end of an operation, by its last program: release; wait for readers of direct rows; count."""
    release_all(heap, rank, epoch, ALL, R)
    if (staged == 0) & (tl.load(state + FAILED) == 0):
        flags = tl.load(heap + rank) + RELEASED
        wait_all(state, status, flags, progress(epoch, ALL), rank, operation, epoch, timeout, True, R)
    tl.store(state + EPOCH, epoch)


@triton.jit
def is_last(counter, total):
    """Count this program in; True for the last of ``total``, which leaves the counter at 0."""
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit
def finish(heap, state, status, rank, epoch, staged, operation, timeout, R: tl.constexpr):
    """The end of an operation, called by every program when its reads and stores are done."""
    programs = tl.num_programs(0).to(tl.int64)
    if is_last(state + ARRIVED, programs):
        differed = tl.load(state + DIFFERED)
        if differed != 0:
            tl.store(state + DIFFERED, 0)
            if (differed != programs) & (tl.load(state + FAILED) == 0):
                report_torn(status, rank, differed, operation, epoch)
        close_operation(heap, state, status, rank, epoch, staged, operation, timeout, R)
