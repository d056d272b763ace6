"""What low-latency dispatch and combine share: slots, credit, flags, and who has come.

Rows are pushed. Operation number ``epoch`` uses slot ``epoch % DEPTH`` of every rank's push area. The words of a slot
in a rank's heap, one for every peer, which that peer writes and the rank alone reads::

    pushed[s]     epoch << 20 | tokens of s, when all that s pushes here has arrived
    weights[s]    likewise, when the weights of s have (combine only, ahead of its rows)
    signature[s]  what s calls, before either
    released[r]   epoch of the last operation in this slot that r has received, for r's credit with this rank

A rank pushes into a slot of a peer when the peer has released what it pushed there before (``SENT_TO``). All words
only grow; nothing is reset. Epochs are counted on the device: a captured graph may be replayed any number of times.

Kernels of one Buffer run one after the other. So what a kernel has read is released by the next one, which need not
find out when all its programs are through.

A kernel has senders, programs with the first numbers, and receivers. Senders wait for earlier operations only, or for
the first senders of peers, so receivers of the same launch may spin beside them: those that are waited for have been
placed before. Sender 0 is the mode's, sender 1 releases, the others push rows.

Who waits may be waited for. A sender gives up a rank that owes it credit after one timeout, and after two and a
quarter one whose weights do not come, which may have waited for credit itself. So a live rank whose kernel begins
within a timeout has published after four and a quarter, and receivers wait for four and a half where several ranks
are missing; for the only one, which can wait for nobody, one. No program waits again for whom it has given up. A
sender that has given ranks up goes on for the others: they get all that is theirs, and miss the same ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.flags import INTERPRET, acquire, agreed, now, report, zero
from tokenferry.dataplane.cuda.kernels.words import (
    DETAIL,
    FAILED,
    HAS_FAILED,
    MASKED,
    MISMATCH,
    NEWLY_MASKED,
    NOT_RECEIVED,
    PUSH_BEGUN,
    PUSH_EPOCH,
    PUSH_RELEASED,
    PUSH_SENT,
    PUSH_SIGNATURES,
    PUSHED,
    RANKS,
    RECEIVED,
    SENT_TO,
    TIMED_OUT,
    VERDICTS,
    WAIT_WORDS,
    WAITS,
)

TOKEN_BITS = tl.constexpr(20)
TOKEN_MASK = tl.constexpr((1 << 20) - 1)
NOTHING = tl.constexpr(1 << 16)
"""How a sender failed that has sent nothing, more than a count of senders."""


@triton.jit
def follow():
    """The beginning of a program that may be placed while the last ones of the kernel before end: wait for them."""
    tl.extra.cuda.gdc_wait()


@triton.jit
def either(first, second):
    """For reductions to a set of bits."""
    return first | second


@triton.jit
def longs_at(address):
    """A pointer from an address among the integers of a launch."""
    return (address + zero().to(tl.int64)).to(tl.pointer_type(tl.int64))


@triton.jit
def ints_at(address):
    """Likewise, of int32."""
    return (address + zero().to(tl.int64)).to(tl.pointer_type(tl.int32))


@triton.jit
def words_of(base, kind, slot):
    """The words of one kind and slot in the heap at ``base``, by rank."""
    return (base + kind + slot * (RANKS * 8)).to(tl.pointer_type(tl.int64))


@triton.jit
def signal_ranks(pointers, values, on, RB: tl.constexpr):
    """Let RB peers at a time see a value each, and all stores before the last barrier; one posted store each.

    The first RB threads hold one element each, the others hold them again.
    """
    if INTERPRET:
        tl.atomic_xchg(pointers, values, mask=on, sem="release", scope="sys")
    else:
        tl.inline_asm_elementwise(
            """{ .reg .pred p, q; .reg .u32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, $4; setp.ne.and.u32 q, $3, 0, p;
            @q st.release.sys.global.b64 [$1], $2; mov.u32 $0, 0; }""",
            "=r,l,l,r,r",
            [pointers, values, on.to(tl.int32), tl.full([RB], RB, tl.int32)],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def poll(words, R: tl.constexpr, RB: tl.constexpr, THREADS: tl.constexpr):
    """The words of all ranks, [RB], acquired, the least that any thread sees, and so the same for every thread.

    Threads that load for themselves may see words at different times, and then go different ways past barriers.
    """
    i = tl.arange(0, THREADS) % RB
    seen = acquire(words + tl.where(i < R, i, 0))
    return tl.min(tl.reshape(seen, [THREADS // RB, RB]), 0)


@triton.jit
def first_look(state, number, THREADS: tl.constexpr):
    """A number that may grow meanwhile, and whether all is lost, both the same for every thread."""
    if INTERPRET:
        return tl.load(number), tl.load(state + FAILED)
    else:
        i = tl.arange(0, THREADS) % 2
        seen = tl.load(tl.where(i == 0, number, state + FAILED), volatile=True)
        seen = tl.min(tl.reshape(seen, [THREADS // 2, 2]), 0)
        i = tl.arange(0, 2)
        return tl.sum(tl.where(i == 0, seen, 0)), tl.sum(tl.where(i == 1, seen, 0))


@triton.jit
def count_waits(state, operation, ranks, rank, nanoseconds, wait_stats, RB: tl.constexpr):
    """Count waits that are over, for some ranks (a set of bits); nobody waits until that has arrived."""
    r = tl.arange(0, RB)
    on = ((ranks >> r) & 1) != 0
    if wait_stats != 0:
        stats = longs_at(wait_stats) + r
        tl.store(stats, tl.load(stats, mask=on, other=0) + nanoseconds, mask=on)
    on = on & (r != rank)
    at = state + WAITS + operation * RANKS + r
    many = tl.zeros([RB], tl.int64) + nanoseconds
    tl.atomic_add(at, tl.full([RB], 1, tl.int64), mask=on, sem="relaxed", scope="gpu")
    tl.atomic_add(at + WAIT_WORDS, many, mask=on, sem="relaxed", scope="gpu")
    tl.atomic_max(at + 2 * WAIT_WORDS, many, mask=on, sem="relaxed", scope="gpu")


@triton.jit
def wait_ranks(
    state, words, goals, on, rank, timeout, operation, counts, R: tl.constexpr, RB: tl.constexpr,
    THREADS: tl.constexpr, received=None, wait_stats=0,
):  # fmt: skip
    """Wait until the words of all ranks that are on have reached their goals, or the time is up; return the words.

    Receivers do not wait for those that are given up meanwhile, and longer while several are missing or were given
    up; for this rank's own word as long as it takes, since the waits of its senders end; for nobody once all is lost.
    Senders tell where lies what this rank has ``received``: if that is too old for own credit, no wait helps. A
    program that ``counts`` adds how long each word was missing, from the moment when it found that some was, also to
    ``wait_stats``, int64 [R], where that address is not 0.
    """
    r = tl.arange(0, RB)
    seen = poll(words, R, RB, THREADS)
    behind = on & (seen < goals)
    missing = tl.reduce(tl.where(behind, 1 << r, 0), 0, either)
    own = zero()
    if received is None:
        own = 1 << (rank + zero())
    begun = zero().to(tl.int64)
    if counts & (missing != 0):
        begun = now()
    polls = zero()
    late = polls != 0
    deadline = zero().to(tl.int64)
    while ((missing != 0) & (late == 0)) | ((missing & own) != 0):
        polls += 1
        if polls % 64 == 0:
            time = now()
            deadline = tl.where(polls == 64, time + timeout, deadline)
            if received is None:
                gone = (r < R) & (poll(state + MASKED, R, RB, THREADS) != 0)
                on = on & (gone == 0)
                several = tl.sum((behind | gone).to(tl.int32)) > 1
                late = agreed(time >= deadline + tl.where(several, timeout * 7 // 2, 0))
                if agreed(tl.load(state + FAILED, volatile=True) != 0):
                    late = polls != 0
                    own = zero()
            else:
                late = agreed((time >= deadline) | (tl.load(received) < tl.max(goals)))
            polls = tl.where(polls == 1 << 20, 1 << 19, polls)
        seen = poll(words, R, RB, THREADS)
        behind = on & (seen < goals)
        still = tl.reduce(tl.where(behind, 1 << r, 0), 0, either)
        if counts & (still != missing):
            count_waits(state, operation, missing ^ still, rank, now() - begun, wait_stats, RB)
        missing = still
    if counts & (missing != 0):
        count_waits(state, operation, missing, rank, now() - begun, wait_stats, RB)
    return seen


@triton.jit
def fail(state, status, code, ranks, operation, epoch, RB: tl.constexpr):
    """All is lost: tell later operations, and the host if that is news."""
    if tl.atomic_xchg(state + FAILED, 1, sem="relaxed", scope="gpu") == 0:
        tl.store(status + HAS_FAILED, code)
        tl.store(status + DETAIL + tl.arange(0, RB), tl.full([RB], 1, tl.int64), mask=ranks)
        report(status, code, operation, epoch)


@triton.jit
def give_up(state, status, missing, operation, epoch, SHRINK: tl.constexpr, RB: tl.constexpr):
    """Ranks that did not come: the operation goes on without them, later ones with SHRINK only."""
    r = tl.arange(0, RB)
    if SHRINK:
        news = missing & (tl.load(state + MASKED + r, mask=missing, other=0) == 0)
        tl.store(status + NEWLY_MASKED + r, tl.full([RB], 1, tl.int64), mask=news)
    else:
        fail(state, status, TIMED_OUT, missing, operation, epoch, RB)
    tl.store(state + MASKED + r, tl.full([RB], 1, tl.int64), mask=missing)


@triton.jit
def unmasked(state, R: tl.constexpr, RB: tl.constexpr, SHRINK: tl.constexpr, THREADS: tl.constexpr):
    """The ranks that take part."""
    r = tl.arange(0, RB)
    if SHRINK:
        return (r < R) & (poll(state + MASKED, R, RB, THREADS) == 0)
    else:
        return r < R


@triton.jit
def credit(
    own, state, status, slot, epoch, operation, timeout, counts,
    SHRINK: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Wait until this rank may push into the slot of every rank; the ranks where it may, as a set of bits.

    None, if what this rank has sent itself is still there: a receive was not launched before its slot came round.
    """
    r = tl.arange(0, RB)
    goals = tl.load(state + SENT_TO + slot * RANKS + r, mask=r < R, other=0)
    on = unmasked(state, R, RB, SHRINK, THREADS)
    received = state + RECEIVED + slot
    seen = wait_ranks(
        state, words_of(own, PUSH_RELEASED, slot), goals, on, -1, timeout, operation, counts, R, RB, THREADS,
        received=received,
    )  # fmt: skip
    missing = on & (seen < goals)
    on = on & (seen >= goals)
    if tl.max(missing.to(tl.int32)) != 0:
        if tl.load(received) < tl.max(goals):
            fail(state, status, NOT_RECEIVED, r < 0, operation, epoch, RB)
            on = r < 0
        else:
            give_up(state, status, missing, operation, epoch, SHRINK, RB)
    return tl.reduce(tl.where(on, 1 << r, 0), 0, either)


@triton.jit
def lacks(bits, SHRINK: tl.constexpr, R: tl.constexpr):
    """NOTHING if a set is empty; 1 if some ranks are not in it, but with SHRINK they are masked: no failure."""
    every: tl.constexpr = (1 << R) - 1
    nothing = tl.where(bits == 0, NOTHING, 0)
    if SHRINK:
        return nothing
    else:
        return nothing | (bits.to(tl.int64) & 0xFFFFFFFF != every).to(tl.int32)


@triton.jit
def has(bits, rank):
    """Whether a rank is in a set of bits."""
    return ((bits >> rank) & 1) != 0


@triton.jit
def begin(state, epoch):
    """Count this program in, which has read the number of the operation; returns how many came before.

    The answer is not waited for here, and only the first thread's counts.
    """
    one = 1 + (epoch >> 62)  # so that the number is read before
    if INTERPRET:
        return tl.atomic_add(state + PUSH_BEGUN, one, sem="relaxed", scope="gpu")
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .u32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0; mov.u64 $0, -1;
            @p atom.relaxed.gpu.global.add.u64 $0, [$1], $2; }""",
            "=l,l,l",
            [state + PUSH_BEGUN, one],
            tl.int64,
            is_pure=False,
            pack=1,
        )


@triton.jit
def end(state, epoch, before):
    """The last program to begin lets the next kernel be the next operation: all have read the number of this one."""
    last = tl.num_programs(0).to(tl.int64) - 1
    if INTERPRET:
        if before == last:
            tl.store(state + PUSH_BEGUN, 0)
            tl.store(state + PUSH_EPOCH, epoch)
    else:
        tl.inline_asm_elementwise(
            """{ .reg .pred p; .reg .b64 z; mov.b64 z, 0; setp.eq.s64 p, $3, $4;
            @p st.global.b64 [$1], z; @p st.global.b64 [$2], $5; mov.u32 $0, 0; }""",
            "=r,l,l,l,l,l",
            [state + PUSH_BEGUN, state + PUSH_EPOCH, before, last, epoch],
            tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def release(heap, state, rank, R: tl.constexpr, RB: tl.constexpr, DEPTH: tl.constexpr):
    """Give the ranks their credit for all that the kernels before this one have received."""
    r = tl.arange(0, RB)
    base = tl.load(heap + r, mask=r < R, other=0)
    for slot in tl.static_range(DEPTH):
        received = tl.zeros([RB], tl.int64) + tl.load(state + RECEIVED + slot)
        signal_ranks(words_of(base, PUSH_RELEASED, slot) + rank, received, r < R, RB)


@triton.jit
def publish(
    heap, state, rank, slot, epoch, num_tokens, num_senders, failed,
    SHRINK: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """The end of sending, called by every sender: the last one tells the ranks that all has arrived.

    ``num_tokens``: of this rank, or [RB] what to tell each. ``failed``: not 0 if the sender did not push all that it
    should have; then those that it has given up are not told, or nobody.
    """
    r = tl.arange(0, RB)
    base = tl.load(heap + r, mask=r < R, other=0)
    tl.debug_barrier()
    one = 1 + (failed.to(tl.int64) << 32)
    before = tl.atomic_add(state + PUSH_SENT, one, sem="acq_rel", scope="gpu")
    if (before & 0xFFFFFFFF) == num_senders - 1:
        failures = (before + one) >> 32
        on = unmasked(state, R, RB, SHRINK, THREADS) & (failures < NOTHING)
        if not SHRINK:
            if failures != 0:
                on = on & (tl.load(state + MASKED + r, mask=r < R, other=0) == 0)
        value = (epoch << TOKEN_BITS) | num_tokens
        signal_ranks(words_of(base, PUSHED, slot) + rank, tl.zeros([RB], tl.int64) + value, on, RB)
        tl.store(state + PUSH_SENT, 0)
        tl.store(state + SENT_TO + slot * RANKS + r, tl.zeros([RB], tl.int64) + epoch, mask=on)


@triton.jit
def sign(heap, rank, slot, signature, bits, RB: tl.constexpr):
    """Tell the ranks what this one calls; they look when its flag has come."""
    r = tl.arange(0, RB)
    on = ((bits >> r) & 1) != 0
    base = tl.load(heap + r, mask=on, other=0)
    tl.store(words_of(base, PUSH_SIGNATURES, slot) + rank, tl.zeros([RB], tl.int64) + signature, mask=on)


@triton.jit
def arrivals(
    own, state, status, rank, slot, epoch, signature, most, operation, timeout, wait_stats, index,
    SHRINK: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Wait for the ranks; return, [RB], the tokens of each, or -1 of one that did not come.

    With SHRINK the first receiver decides who has come, so that all receivers go on with the same ranks; its wait
    ends, whatever happens. The verdict is ``epoch << 32 | ranks``, of which the upper half may go round.
    """
    r = tl.arange(0, RB)
    flags = words_of(own, PUSHED, slot)
    goals = tl.zeros([RB], tl.int64) + (epoch << TOKEN_BITS)
    on = r < R
    first = index == 0
    if SHRINK:
        if index == 0:
            on = unmasked(state, R, RB, SHRINK, THREADS)
            seen = wait_ranks(
                state, flags, goals, on, rank, timeout, operation, True, R, RB, THREADS, wait_stats=wait_stats
            )  # fmt: skip
            missing = on & (seen < goals)
            if tl.max(missing.to(tl.int32)) != 0:
                if tl.atomic_add(state + FAILED, 0, sem="relaxed", scope="gpu") == 0:
                    give_up(state, status, missing, operation, epoch, SHRINK, RB)
                else:
                    first = index < 0
            bits = tl.reduce(tl.where(on & (seen >= goals), tl.full([RB], 1, tl.int64) << r, 0), 0, either)
            tl.debug_barrier()
            tl.atomic_xchg(state + VERDICTS + slot, (epoch << 32) | bits, sem="release", scope="gpu")
        verdict = acquire(state + VERDICTS + slot)
        while agreed(((verdict >> 32) ^ epoch) & 0xFFFFFFFF == 0) == 0:
            verdict = acquire(state + VERDICTS + slot)
        there = (r < R) & (((verdict >> r) & 1) != 0)
        seen = tl.load(flags + r, mask=there, other=0)
    else:
        seen = wait_ranks(
            state, flags, goals, on, rank, timeout, operation, index == 0, R, RB, THREADS, wait_stats=wait_stats
        )  # fmt: skip
        there = on & (seen >= goals)
        missing = on & (seen < goals)
        if tl.max(missing.to(tl.int32)) != 0:
            if tl.atomic_add(state + FAILED, 0, sem="relaxed", scope="gpu") == 0:
                give_up(state, status, missing, operation, epoch, SHRINK, RB)
            else:
                first = index < 0
            there = there & (r < 0)
    if first:
        tl.store(state + RECEIVED + slot, epoch)
        theirs = tl.load(words_of(own, PUSH_SIGNATURES, slot) + r, mask=there, other=0)
        differs = there & (theirs != signature)
        if tl.max(differs.to(tl.int32)) != 0:
            fail(state, status, MISMATCH, differs, operation, epoch, RB)
            there = there & (theirs == signature)
    # A rank that disagrees may have more tokens than there is room for.
    return tl.where(there, tl.minimum(seen & TOKEN_MASK, most), -1).to(tl.int32)


@triton.jit
def split(item, PARTS: tl.constexpr):
    """Token and part of the ``item``-th part of all tokens."""
    number = (zero() + item) // PARTS
    return number, item - number * PARTS


@triton.jit
def source_of(tokens, item, PARTS: tl.constexpr, RB: tl.constexpr):
    """Source, token and part of the ``item``-th part of all tokens of all sources ([RB], how many each has)."""
    r = tl.arange(0, RB)
    number, part = split(item, PARTS)
    source = tl.sum((tl.cumsum(tokens, 0) <= number).to(tl.int32))
    token = number - tl.sum(tl.where(r < source, tokens, 0))
    return source, token, part
