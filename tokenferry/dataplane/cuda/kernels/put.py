"""Puts of NVSHMEM: bytes to another rank's symmetric memory, and behind them a flag. Whole programs call them.

The address of memory is that of its counterpart in this rank's own symmetric memory, or as far from its beginning.
The interpreter knows the memory of all ranks, and stores there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import core

from tokenferry.dataplane.cuda.kernels.flags import INTERPRET, signal, word, zero

_SET = tl.constexpr(0)
"""NVSHMEM_SIGNAL_SET."""


@core.extern
def _put_signal(to, source, nbytes, flag, value, operation, rank, _semantic=None):
    """``nvshmemx_putmem_signal_nbi_block``, which returns before the bytes have left."""
    types = ("int64", "int64", "int64", "int64", "uint64", "int32", "int32")
    return core.extern_elementwise(
        "",
        "",
        [to, source, nbytes, flag, value, operation, rank],
        {tuple(core.dtype(name) for name in types): ("nvshmemx_putmem_signal_nbi_block", core.dtype("int32"))},
        is_pure=False,
        _semantic=_semantic,
    )


@triton.jit
def store_bytes(to, source, nbytes, WIDTH: tl.constexpr):
    """Copy any bytes between any two places of own memory, WIDTH 16-byte words at a time where possible."""
    is_aligned = ((to | source) & 15) == 0
    num_words = tl.where(is_aligned, nbytes // 8, 0)
    blocks = num_words // (2 * WIDTH)
    i = tl.arange(0, 2 * WIDTH)
    for block in range(blocks):
        first = block * (2 * WIDTH)
        there, here = tl.multiple_of(word(to, first * 8) + i, 16), tl.multiple_of(word(source, first * 8) + i, 16)
        tl.store(there, tl.load(here))
    _store_rest(to, source, blocks * (2 * WIDTH), num_words, WIDTH, tl.int64, 8)
    _store_rest(to, source, num_words * 8, nbytes, WIDTH, tl.uint8, 1)


@triton.jit
def _store_rest(to, source, first, end, WIDTH: tl.constexpr, TYPE: tl.constexpr, SIZE: tl.constexpr):
    """Copy elements from the first on, some at a time of which the last may not be there."""
    i = tl.arange(0, 2 * WIDTH)
    while first < end:
        mask = first + i < end
        values = tl.load((source + first * SIZE).to(tl.pointer_type(TYPE)) + i, mask=mask, other=0)
        tl.store((to + first * SIZE).to(tl.pointer_type(TYPE)) + i, values, mask=mask)
        first += 2 * WIDTH


@triton.jit
def fence():
    """What this thread has stored is there for whoever reads this memory, a network card too; then all meet."""
    if not INTERPRET:
        tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def put(to, source, nbytes, flag, heaps, own, rank):
    """Bytes to a rank, and 1 to its flag behind them. ``heaps``: for the interpreter, where all ranks' memory begins.

    ``own``: this rank's number there.
    """
    if INTERPRET:
        apart = tl.load(heaps + rank) - tl.load(heaps + own)
        for at in range(
            0, nbytes // 8 * 8, 8
        ):  # one by one, so that a release covers them without a barrier of our own
            tl.store(word(to + apart, at), tl.load(word(source, at)))
        for at in range(nbytes // 8 * 8, nbytes):
            value = tl.load((source + at).to(tl.pointer_type(tl.uint8)))
            tl.store((to + apart + at).to(tl.pointer_type(tl.uint8)), value)
        signal(word(flag, apart), 1)
    else:
        _put_signal(to, source, nbytes, flag, (zero() + 1).to(tl.uint64), zero() + _SET, rank.to(tl.int32))
