"""Puts of NVSHMEM: bytes to another rank's symmetric memory, and behind them a flag. Whole programs call them.

The address of memory is that of its counterpart in this rank's own symmetric memory, or as far from its beginning.
The interpreter knows the memory of all ranks, and stores there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import core

from tokenferry.dataplane.cuda.kernels.flags import INTERPRET, signal

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
        there = (to + first * 8).to(tl.pointer_type(tl.int64)) + i
        here = (source + first * 8).to(tl.pointer_type(tl.int64)) + i
        there, here = tl.multiple_of(there, 16), tl.multiple_of(here, 16)
        tl.store(there, tl.load(here))
    first = blocks * (2 * WIDTH)
    while first < num_words:
        mask = first + i < num_words
        words = tl.load(source.to(tl.pointer_type(tl.int64)) + first + i, mask=mask, other=0)
        tl.store(to.to(tl.pointer_type(tl.int64)) + first + i, words, mask=mask)
        first += 2 * WIDTH
    first = num_words * 8
    while first < nbytes:
        mask = first + i < nbytes
        single = tl.load(source.to(tl.pointer_type(tl.uint8)) + first + i, mask=mask, other=0)
        tl.store(to.to(tl.pointer_type(tl.uint8)) + first + i, single, mask=mask)
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
        for word in range(nbytes // 8):  # one by one, so that a release covers them without a barrier of our own
            value = tl.load((source + word * 8).to(tl.pointer_type(tl.int64)))
            tl.store((to + apart + word * 8).to(tl.pointer_type(tl.int64)), value)
        for byte in range(nbytes // 8 * 8, nbytes):
            value = tl.load((source + byte).to(tl.pointer_type(tl.uint8)))
            tl.store((to + apart + byte).to(tl.pointer_type(tl.uint8)), value)
        signal((flag + apart).to(tl.pointer_type(tl.int64)), 1)
    else:
        _put_signal(
            to.to(tl.int64),
            source.to(tl.int64),
            nbytes.to(tl.int64),
            flag.to(tl.int64),
            (tl.program_id(0) * 0 + 1).to(tl.uint64),
            tl.program_id(0) * 0 + _SET,
            rank.to(tl.int32),
        )
