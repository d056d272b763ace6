"""One of several dispatches that fill the same outputs, or combines of the same rows: which rows it means.

No host knows how many rows a part moves. Here the device works it out, and leaves a table for the kernel that moves
them, int32, in the place of a handle's prefix matrix. Of a dispatch, [3, R], written by ``announce_part``::

    begins[s], ends[s]   rows of the outputs that those from source s fill
    first_tokens[s]      what is added to the tokens of s where they are written down

Of a combine, [4, R], written by ``note_held``, which tells no peer anything::

    begins[r], ends[r]   rows of x that belong to tokens of reader r
    first_tokens[r]      what is subtracted from their tokens
    counts[o]            rows that owner o has of this rank's tokens

Only the owner of rows knows where those of a reader begin, so its message says it: ``FIRST_ROW``, ``ROW_COUNT``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.flags import (
    heap_of,
    is_usable,
    message_word,
    progress,
    report,
    signal,
    word,
    zero,
)
from tokenferry.dataplane.cuda.kernels.notify import compare, send_list, step_back
from tokenferry.dataplane.cuda.kernels.rounds import tokens_of
from tokenferry.dataplane.cuda.kernels.sync import (
    must_stage,
    wait_all_published,
    wait_until_free,
    write_message,
)
from tokenferry.dataplane.cuda.kernels.words import (
    BAD_HANDLE,
    BAD_INPUT,
    EPOCH,
    LINE,
    LISTS,
    PUBLISHED,
    ROW_COUNT,
)


@triton.jit
def tell_part(
    heap, state, ready, status, member, places, signature, num_tokens, list_capacity, rank, reader, epoch, operation,
    timeout,
    NUM_COLUMNS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """This rank's message and list for one reader."""
    if wait_until_free(heap, state, status, rank, reader, operation, epoch, timeout, R):
        base = heap_of(heap, reader)
        staged = must_stage(ready, places, NUM_COLUMNS, R)
        problem = tl.load(state + BAD_INPUT)
        write_message(heap, rank, reader, signature, num_tokens, num_tokens, 0, problem, staged, places, NUM_COLUMNS)
        ids = (base + LISTS + rank * list_capacity * 4).to(tl.pointer_type(tl.int32))
        sent = send_list(ids, member, None, num_tokens, reader, R, BLOCK)
        tl.store(message_word(base, rank, ROW_COUNT), sent.to(tl.int64))
        tl.debug_barrier()
        signal(word(base, PUBLISHED + rank * LINE), progress(epoch, 1))


@triton.jit
def write_places(heap, status, table, starts, first_tokens, num_rows, rank, operation, epoch, R: tl.constexpr):
    """Write the table, and let the next part begin behind this one. What does not fit is not received."""
    for source in range(R):
        start = tl.load(starts + source)
        count = tl.load(message_word(heap_of(heap, rank), source, ROW_COUNT))
        fits = (start >= 0) & (count >= 0) & (count <= tokens_of(heap, rank, source)) & (start + count <= num_rows)
        if fits == 0:
            report(status, BAD_HANDLE, operation, epoch)
        end = start + tl.where(fits, count, 0)
        tl.debug_barrier()  # all threads have loaded what one of them writes now
        tl.store(table + source, start.to(tl.int32))
        tl.store(table + R + source, end.to(tl.int32))
        tl.store(table + 2 * R + source, tl.load(first_tokens + source).to(tl.int32))
        tl.store(starts + source, end)


@triton.jit(do_not_specialize=[
    "place_rows", "place_scales", "place_ids", "place_weights", "signature", "num_tokens", "num_rows",
    "list_capacity", "rank", "operation", "timeout",
])  # fmt: skip
def announce_part(
    heap,
    state,
    ready,
    status,
    member,
    table,
    starts,
    first_tokens,
    place_rows: tl.int64,
    place_scales: tl.int64,
    place_ids: tl.int64,
    place_weights: tl.int64,
    signature: tl.int64,
    num_tokens: tl.int64,
    num_rows: tl.int64,
    list_capacity: tl.int64,
    rank: tl.int32,
    operation: tl.int64,
    timeout: tl.int64,
    NUM_COLUMNS: tl.constexpr,
    R: tl.constexpr,
    RB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """In the place of ``notify``: programs 0 to R - 1 each tell one rank, program R listens and writes the table."""
    pid = tl.program_id(0)
    epoch = tl.load(state + EPOCH) + 1
    if is_usable(state):
        if pid < R:
            places = (place_rows, place_scales, place_ids, place_weights)
            tell_part(
                heap, state, ready, status, member, places, signature, num_tokens, list_capacity, rank,
                (rank + pid) % R, epoch, operation, timeout, NUM_COLUMNS, R, BLOCK,
            )  # fmt: skip
        elif wait_all_published(heap, state, status, rank, epoch, 1, operation, timeout, True, R):
            code = compare(heap_of(heap, rank), status, signature, list_capacity, zero(), R, RB)
            if code == 0:
                write_places(heap, status, table, starts, first_tokens, num_rows, rank, operation, epoch, R)
            else:
                step_back(state, status, code, operation, epoch)


@triton.jit(do_not_specialize=["num_tokens"])
def note_held(
    member,
    starts,
    ends,
    first_tokens,
    table,
    send_head,
    num_tokens: tl.int64,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program r writes what concerns rank r: of the table, and which of its rows is that of each token.

    ``member``: bool [T, R] as uint8. ``send_head``: int32 [T, R]; -1 where the rank has none.
    """
    peer = tl.program_id(0)
    tl.store(table + peer, tl.load(starts + peer).to(tl.int32))
    tl.store(table + R + peer, tl.load(ends + peer).to(tl.int32))
    tl.store(table + 2 * R + peer, tl.load(first_tokens + peer).to(tl.int32))
    tl.store(table + 3 * R + peer, send_list(None, member, send_head, num_tokens, peer, R, BLOCK))
