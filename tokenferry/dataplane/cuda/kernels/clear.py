"""Zeros where a worst case was not reached. No communication."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride", "num_rows", "width"])
def clear(places, rows, stride: tl.int64, num_rows: tl.int64, width: tl.int64, BLOCK: tl.constexpr):
    """Zero the last ``rows``, [M, width] int32, as far as their place is negative; from the last one backwards.

    ``places``: int32 [M], ``stride`` elements apart.
    """
    row = num_rows - 1 - tl.program_id(0)
    while tl.load(places + row * stride, mask=row >= 0, other=0) < 0:
        for first in range(0, width, BLOCK):
            i = first + tl.arange(0, BLOCK)
            tl.store(rows + row * width + i, tl.zeros([BLOCK], tl.int32), mask=i < width)
        row -= tl.num_programs(0)
