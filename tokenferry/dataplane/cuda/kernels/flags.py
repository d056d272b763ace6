"""Progress words between GPUs: waiting for them, setting them, and telling the host who did not come. All scalar
code: plain Triton kernels and Gluon kernels call the same functions.

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
    AT_EPOCH,
    BAD_PEER,
    CLAIMED,
    CODE,
    DETAIL,
    EPOCH_SHIFT,
    FAILED,
    HAS_FAILED,
    LINE,
    MESSAGE_BYTES,
    MESSAGES,
    OPERATION,
    RANKS,
    SIGNATURE,
    TIMED_OUT,
    TORN,
    WAIT_WORDS,
    WAITS,
    WITHDRAWN,
)

INTERPRET = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def zero():
    """An int32 that loops and branches can carry on from, made so that Gluon, too, sees a scalar."""
    return tl.program_id(0) * 0


@triton.jit
def heap_of(heap, rank):
    """Where the heap of a rank begins. The table never changes: the compiler may keep what was read once."""
    if INTERPRET:
        return tl.load(heap + rank)
    else:
        return tl.inline_asm_elementwise(
            "ld.global.nc.b64 $0, [$1];", "=l,l", [heap + rank], tl.int64, is_pure=True, pack=1
        )


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
def acquire_all(flags, R: tl.constexpr, STEP: tl.constexpr = LINE):
    """The progress words of all ranks, a line (or STEP bytes) each from ``flags`` on, acquired in one go.

    Each thread gets one of them: only what is :func:`agreed` on is about all.
    """
    if INTERPRET:
        least = acquire(word(flags, 0))
        for peer in range(1, R):
            least = tl.minimum(least, acquire(word(flags, peer * STEP)))
        return least
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .u32 t; .reg .u64 a; mov.u32 t, %tid.x; rem.u32 t, t, $2; mad.wide.u32 a, t, $3, $1;
            ld.acquire.sys.global.b64 $0, [a]; }""",
            "=l,l,r,r",
            [flags, zero() + R, zero() + STEP],
            tl.int64,
            is_pure=False,
            pack=1,
        )


@triton.jit
def others_say(words, value, rank, R: tl.constexpr, STEP: tl.constexpr):
    """Whether the words of all other ranks, STEP bytes each from ``words`` on, are ``value``: looked at in one go."""
    if INTERPRET:
        same = True
        for peer in range(R):
            same = same & ((peer == rank) | (tl.load(word(words, peer * STEP)) == value))
        return same
    else:
        theirs = tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .u32 t; .reg .u64 a; mov.u32 t, %tid.x; rem.u32 t, t, $2;
            mad.wide.u32 a, t, $3, $1; setp.ne.u32 p, t, $4; mov.b64 $0, $5; @p ld.global.b64 $0, [a]; }""",
            "=&l,l,r,r,r,l",
            [words, zero() + R, zero() + STEP, rank, zero().to(tl.int64) + value],
            tl.int64,
            is_pure=False,
            pack=1,
        )
        return agreed(theirs == value)


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
def is_usable(state):
    """Whether no operation has failed, as all threads of the program see it: another program may fail meanwhile."""
    return agreed(tl.load(state + FAILED, volatile=True) == 0)


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
def wait_all(heap, state, status, flags, value, rank, operation, epoch, timeout, counts, R: tl.constexpr):
    """Wait until the progress words of all ranks have reached ``value``; who does not come is reported.

    The time to wait begins anew with every rank that comes. A program that ``counts`` adds how long each peer was
    missing, from the moment when it found that some was: if several are at a time, that counts for each.
    ``flags``: where the word of rank 0 lies in own memory; the others follow, a line each.
    """
    there = agreed(acquire_all(flags, R) >= value)
    if there == 0:
        there = wait_for_missing(
            heap, state, status, flags, value, rank, operation, epoch, timeout, counts, R
        )  # fmt: skip
    return there


@triton.jit
def wait_for_missing(
    heap, state, status, flags, value, rank, operation, epoch, timeout, counts, R: tl.constexpr
):  # fmt: skip
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
                report_missing(heap, state, status, rank, operation, epoch, peer, R)
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
def withdraw(heap, rank, R: tl.constexpr):
    """Give up: the rows that messages speak of are this rank's own again.

    Readers see it where they begin, or else where they end.
    """
    offset = MESSAGES + rank * MESSAGE_BYTES + SIGNATURE * 8
    signal_all(heap, offset, zero().to(tl.int64) + WITHDRAWN, R)


@triton.jit
def report_missing(heap, state, status, rank, operation, epoch, missing, R: tl.constexpr):
    """Tell the host that a rank did not come, and every later operation that there is nothing to wait for.

    First the peers, who may read rows of this rank that belong to the caller again once the host knows. ``heap``:
    None where there are no messages.
    """
    tl.store(state + FAILED, 1)
    if heap is not None:
        withdraw(heap, rank, R)
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
