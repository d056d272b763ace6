"""Large pages for large outputs.

A fresh output is mapped page by page while it is first written. With 4 KB pages that costs several times the copy
itself (measured in docs/performance.md); asking the kernel for 2 MB pages, where it grants them on request,
removes it. It is a hint: nothing depends on it.
"""

from __future__ import annotations

import ctypes
import sys

import torch

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform == "linux" else None


def advise_huge_pages(tensor: torch.Tensor) -> None:
    """Ask for large pages under a fresh tensor, if it is large."""
    nbytes = tensor.numel() * tensor.element_size()
    if _madvise is None or nbytes < 2 * _HUGE_PAGE:
        return
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    end = (tensor.data_ptr() + nbytes) // _HUGE_PAGE * _HUGE_PAGE
    _madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_HUGEPAGE)
