"""The steps that every operation shares: messages to readers, where rows lie, the end. Scalar code, like the
:mod:`.flags` it waits for and sets.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.flags import (
    INTERPRET,
    acquire,
    acquire_all,
    agreed,
    heap_of,
    is_usable,
    message_word,
    others_say,
    progress,
    report,
    report_missing,
    report_torn,
    signal,
    signal_all,
    wait_all,
    wait_at_least,
    word,
    zero,
)
from tokenferry.dataplane.cuda.kernels.words import (
    ALL,
    ARRIVED,
    COLUMNS,
    DETAIL,
    DIFFERED,
    EPOCH,
    FAILED,
    FIRST_ROW,
    FOR_ROWS,
    LINE,
    MESSAGE_BYTES,
    MESSAGES,
    MISMATCH,
    MOST_ROWS,
    NUM_ROWS,
    NUM_TOKENS,
    NUM_WORST,
    PLACE_MASK,
    PLACE_SHIFT,
    PROBLEM,
    PUBLISHED,
    REGIONS,
    RELEASED,
    ROW_COUNT,
    SETTLED,
    SIGNATURE,
    STAGED,
    WITHDRAWN,
)


@triton.jit
def wait_released(
    heap, state, status, rank, reader, value, operation, epoch, timeout, R: tl.constexpr, KIND: tl.constexpr = None
):  # fmt: skip
    """Wait until ``reader`` is as far as ``value`` with this rank's rows.

    Not counted before an operation: a reader that is still at the one before has not published this one either, and
    that wait is counted.
    """
    own = heap_of(heap, rank)
    flag = word(own, RELEASED + reader * LINE)
    there = wait_at_least(state, flag, value, timeout, operation, reader, KIND=KIND)
    if not there:
        report_missing(heap, state, status, rank, operation, epoch, reader, R)
    return there


@triton.jit
def wait_published(heap, state, status, rank, source, value, operation, epoch, timeout, R: tl.constexpr):
    """Wait until ``source`` is as far as ``value`` with its rows."""
    own = heap_of(heap, rank)
    flag = word(own, PUBLISHED + source * LINE)
    there = wait_at_least(state, flag, value, timeout, operation, source, KIND=FOR_ROWS)
    if not there:
        report_missing(heap, state, status, rank, operation, epoch, source, R)
    return there


@triton.jit
def write_message(
    heap, rank, reader, signature, num_tokens, num_rows, num_worst, problem, staged, places, NUM_COLUMNS: tl.constexpr
):
    """Write this rank's message to one reader; the caller signals. ``places``: where each column lies."""
    base = heap_of(heap, reader)
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
    base = heap_of(heap, reader)
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
def column_region(heap, regions, rank, source, column, ALIGN: tl.constexpr, R: tl.constexpr):
    """Where a column of a source lies that is not staged, and how many bytes of a region known here begin there.

    -1 bytes if it is in none, or does not begin on ALIGN bytes. ``regions``: where the regions of all ranks begin,
    then their sizes.
    """
    own = heap_of(heap, rank)
    place = tl.load(message_word(own, source, COLUMNS + column))
    region = place >> PLACE_SHIFT
    known = (region >= 0) & (region < REGIONS)
    entry = regions + source * REGIONS + region
    base = tl.load(entry, mask=known, other=0)
    size = tl.load(entry + R * REGIONS, mask=known, other=0)
    offset = place & PLACE_MASK
    return base + offset, tl.where((base != 0) & ((offset & (ALIGN - 1)) == 0), size - offset, -1)


@triton.jit
def inside(address, room, rows, row_bytes):
    """The address of so many rows, 0 if they are not in the ``room`` bytes there.

    So, whatever a peer says, nothing is read but what it has opened.
    """
    fits = (rows >= 0) & (rows <= MOST_ROWS) & (rows * row_bytes <= room)
    return tl.where(fits, address, 0)


@triton.jit
def column_address(
    heap, regions, rank, source, column, rows, row_bytes, ALIGN: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """Where so many rows of a column of a source lie that is not staged; 0 if nothing can be read there."""
    address, room = column_region(heap, regions, rank, source, column, ALIGN, R)
    return inside(address, room, rows, row_bytes)


@triton.jit
def is_settled(state, epoch):
    """Whether the operation before ``epoch`` ended when all readers had released: there is nothing to wait for."""
    return tl.load(state + SETTLED) == epoch - 1


@triton.jit
def wait_until_free(heap, state, status, rank, reader, operation, epoch, timeout, R: tl.constexpr):
    """Wait until ``reader`` is through with the operation before: its copy of the message may be written."""
    free = is_settled(state, epoch)
    if free == 0:
        free = wait_released(
            heap, state, status, rank, reader, progress(epoch - 1, ALL), operation, epoch, timeout, R
        )
    return free


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
    at_once = is_settled(state, epoch)
    if at_once == 0:
        at_once = agreed(acquire_all(heap_of(heap, rank) + RELEASED, R) >= before)
    alive = True
    for step in range(R):
        reader = (rank + step) % R
        if alive & (at_once == 0):
            alive = wait_released(heap, state, status, rank, reader, before, operation, epoch, timeout, R)
        if alive:
            if held is not None:
                write_held(heap, rank, reader, held, R)
            write_message(
                heap, rank, reader, signature, num_tokens, num_rows, 0, 0, staged, places, NUM_COLUMNS
            )  # fmt: skip
            if at_once == 0:
                tl.debug_barrier()
                signal(word(heap_of(heap, reader), PUBLISHED + rank * LINE), progress(epoch, 1))
    if at_once:
        signal_all(heap, PUBLISHED + rank * LINE, progress(epoch, 1), R)


@triton.jit
def wait_all_published(heap, state, status, rank, epoch, step, operation, timeout, counts, R: tl.constexpr):
    """Wait for every source; every one that does not come is reported. ``counts``: as in ``wait_all``."""
    flags = heap_of(heap, rank) + PUBLISHED
    return wait_all(
        heap, state, status, flags, progress(epoch, step), rank, operation, epoch, timeout, counts, R
    )  # fmt: skip


@triton.jit
def all_mean(heap, rank, signature, R: tl.constexpr):
    """Whether all ranks have sent this signature."""
    return others_say(heap_of(heap, rank) + MESSAGES + SIGNATURE * 8, signature, rank, R, MESSAGE_BYTES)


@triton.jit
def report_mismatches(heap, status, rank, signature, operation, epoch, R: tl.constexpr):
    """Tell the host whose signatures differ from this rank's: 1, or 2 if the rank has given up."""
    own = heap_of(heap, rank)
    for source in range(R):
        theirs = tl.load(message_word(own, source, SIGNATURE))
        differs = (theirs != signature).to(tl.int64)
        tl.store(status + DETAIL + source, tl.where(theirs == WITHDRAWN, 2, differs))


@triton.jit
def all_stand_by(state, own, R: tl.constexpr):
    """Whether no message in the heap at ``own`` was withdrawn; or this rank has failed, and withdrawn its own."""
    failed = tl.load(state + FAILED, volatile=True) != 0
    if INTERPRET:
        stands = True
        for source in range(R):
            stands = stands & (acquire(message_word(own, source, SIGNATURE)) != WITHDRAWN)
        return failed | stands
    else:
        signatures = acquire_all(own + MESSAGES + SIGNATURE * 8, R, MESSAGE_BYTES)
        return agreed(failed | (signatures != WITHDRAWN))


@triton.jit
def report_withdrawn(own, status, operation, epoch, R: tl.constexpr):
    """Tell the host who has given up: what was read of its rows may have been something else by then."""
    for source in range(R):
        theirs = tl.load(message_word(own, source, SIGNATURE))
        tl.store(status + DETAIL + source, 2, mask=theirs == WITHDRAWN)
    report(status, MISMATCH, operation, epoch)


@triton.jit
def release_all(heap, rank, epoch, step, R: tl.constexpr):
    """Tell every owner how far this rank is with its rows."""
    signal_all(heap, RELEASED + rank * LINE, progress(epoch, step), R)


@triton.jit
def close_operation(heap, state, status, rank, epoch, staged, operation, timeout, R: tl.constexpr):
    """The end of an operation, by its last program: release; wait for readers of direct rows; count."""
    release_all(heap, rank, epoch, ALL, R)
    if (staged == 0) & is_usable(state):
        flags = heap_of(heap, rank) + RELEASED
        if wait_all(heap, state, status, flags, progress(epoch, ALL), rank, operation, epoch, timeout, True, R):
            tl.store(state + SETTLED, epoch)
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
        own = heap_of(heap, rank)
        differed = tl.load(state + DIFFERED)
        # All threads meet here, and have loaded what one of them writes below.
        if all_stand_by(state, own, R) == 0:
            report_withdrawn(own, status, operation, epoch, R)
        if differed != 0:
            tl.store(state + DIFFERED, 0)
            if (differed != programs) & is_usable(state):
                report_torn(status, rank, differed, operation, epoch)
        close_operation(heap, state, status, rank, epoch, staged, operation, timeout, R)
