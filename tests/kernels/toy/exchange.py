"""Every rank sends rows to the next one, which copies them out.

The inboxes have two halves for even and odd epochs: a rank that writes to a half for epoch n + 2 has seen the
reader's signal of epoch n + 1, given after the reader's kernel of epoch n had ended. ``exchange_released`` needs but
one half.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tests.kernels.toy.sync import own_word, signal, wait


@triton.jit
def inbox_row(inboxes, rank, epoch, row, N: tl.constexpr, H: tl.constexpr):
    base = tl.load(inboxes + rank).to(tl.pointer_type(tl.float32))
    return base + ((epoch % 2) * N + row) * H + tl.arange(0, H)


@triton.jit
def exchange(rows, out, inboxes, flags, rank, epoch, N: tl.constexpr, H: tl.constexpr, R: tl.constexpr):
    """Program i sends row i under flag i, and waits for row i."""
    row = tl.program_id(0)
    reader = (rank + 1) % R
    columns = tl.arange(0, H)
    tl.store(inbox_row(inboxes, reader, epoch, row, N, H), tl.load(rows + row * H + columns))
    tl.debug_barrier()
    signal(own_word(flags, reader) + row, epoch)
    wait(own_word(flags, rank) + row, epoch)
    tl.store(out + row * H + columns, tl.load(inbox_row(inboxes, rank, epoch, row, N, H)))


@triton.jit
def exchange_counted(
    rows, out, inboxes, flags, counter, rank, epoch, N: tl.constexpr, H: tl.constexpr, R: tl.constexpr
):
    """The last program to arrive signals for all."""
    row = tl.program_id(0)
    reader = (rank + 1) % R
    columns = tl.arange(0, H)
    tl.store(inbox_row(inboxes, reader, epoch, row, N, H), tl.load(rows + row * H + columns))
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if arrived == epoch * tl.num_programs(0) - 1:
        signal(own_word(flags, reader), epoch)
    wait(own_word(flags, rank), epoch)
    tl.store(out + row * H + columns, tl.load(inbox_row(inboxes, rank, epoch, row, N, H)))


@triton.jit
def exchange_released(
    rows, out, inboxes, flags, released, rank, epoch, N: tl.constexpr, H: tl.constexpr, R: tl.constexpr
):
    """Every reader says when it has read, and the sender waits for that before it sends anew."""
    row = tl.program_id(0)
    reader, sender = (rank + 1) % R, (rank + R - 1) % R
    columns = tl.arange(0, H)
    wait(own_word(released, rank) + row, epoch - 1)
    tl.store(inbox_row(inboxes, reader, 0, row, N, H), tl.load(rows + row * H + columns))
    tl.debug_barrier()
    filled = own_word(flags, reader) + row
    signal(filled, epoch)
    wait(own_word(flags, rank) + row, epoch)
    tl.store(out + row * H + columns, tl.load(inbox_row(inboxes, rank, 0, row, N, H)))
    tl.debug_barrier()
    signal(own_word(released, sender) + row, epoch)


@triton.jit
def store_twice(target, H: tl.constexpr):
    """Stores of one program to one location keep their order, and it sees them."""
    columns = tl.arange(0, H)
    for value in range(8):
        tl.store(target + columns, columns + value)
        tl.store(target + columns, tl.load(target + columns) + 100)


@triton.jit
def increment(counter, times, BY: tl.constexpr):
    for _ in range(times):
        tl.atomic_add(counter, BY, sem="relaxed", scope="gpu")


@triton.jit
def numbers(a, b, total, narrowed, H: tl.constexpr):
    columns = tl.arange(0, H)
    left = tl.load(a + columns)
    tl.store(total + columns, left + tl.load(b + columns))
    tl.store(narrowed + columns, left.to(tl.float32).to(tl.float8e4nv))
