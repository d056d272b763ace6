"""Numbers for dtypes, so that ranks can compare what they were called with."""

from __future__ import annotations

import torch

_DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)
_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}


def dtype_code(dtype: torch.dtype) -> int:
    """The number of a dtype; equal on ranks that run the same torch."""
    return _CODES[dtype]


def describe_dtype(code: int) -> str:
    """The name of the dtype with this number."""
    return str(_DTYPES[code]) if 0 <= code < len(_DTYPES) else f"dtype {code}"
