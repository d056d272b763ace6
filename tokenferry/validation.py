"""Argument checks that name the argument, what came and what is allowed."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from tokenferry.errors import ArgumentError

_STRIDED = torch.strided

MEMORY_BYTES = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
"""Of this machine: rows that need more are a mistake, of this rank or of a peer."""


def require(condition: bool, name: str, given: object, allowed: str) -> None:
    """Raise :class:`ArgumentError` unless ``condition`` holds."""
    if not condition:
        raise ArgumentError(name, given, allowed)


def describe(tensor: torch.Tensor) -> str:
    """Shape, dtype and device of a tensor in a few words."""
    return f"a {tensor.dtype} tensor of shape {list(tensor.shape)} on {tensor.device}"


def check_tensor(
    name: str,
    value: object,
    *,
    shape: Sequence[int | None],
    dtypes: Sequence[torch.dtype] | None = None,
    device: torch.device,
    contiguous: bool = False,
) -> torch.Tensor:
    """Return ``value`` as a tensor of the wanted kind, or raise.

    Args:
        name: the argument's name, for the message.
        value: what the caller passed.
        shape: one entry a dimension; ``None`` allows any size.
        dtypes: allowed dtypes; ``None`` allows any.
        device: the device of the Buffer, on GPUs with its index.
        contiguous: whether strides must be those of a contiguous tensor.

    Raises:
        ArgumentError: naming ``name``, the given value and what is allowed.
    """
    if (
        isinstance(value, torch.Tensor)
        and value.layout is _STRIDED
        and not value.is_nested
        and value.device == device
        and (not value.is_quantized if dtypes is None else value.dtype in dtypes)
        and (not contiguous or value.is_contiguous())
    ):
        have = value.shape
        if len(have) == len(shape):
            for size, wanted_size in zip(have, shape):  # noqa: B905 (their lengths are equal)
                if wanted_size is not None and size != wanted_size:
                    break
            else:
                return value
    # Slow: find out what is wrong.
    if not isinstance(value, torch.Tensor):
        raise ArgumentError(name, type(value).__name__, "a torch.Tensor")
    if value.layout != torch.strided or value.is_nested or value.is_quantized:
        raise ArgumentError(name, f"a tensor of layout {value.layout} and {value.dtype}", "a plain dense tensor")
    wanted = ""
    if value.device != device:
        wanted = f"a tensor on {device}"
    elif not _fits(value.shape, shape):
        wanted = "shape [" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
    elif dtypes is not None and value.dtype not in dtypes:
        wanted = " or ".join(str(dtype) for dtype in dtypes)
    elif contiguous and not value.is_contiguous():
        raise ArgumentError(name, f"strides {value.stride()}", "a contiguous tensor")
    if wanted:
        raise ArgumentError(name, describe(value), wanted)
    return value


def _fits(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    if len(shape) != len(wanted):
        return False
    return all(want is None or have == want for have, want in zip(shape, wanted, strict=True))


def check_int(name: str, value: object, *, minimum: int, multiple_of: int = 1) -> int:
    """Return ``value`` as an int of at least ``minimum`` and divisible by ``multiple_of``, or raise."""
    if type(value) is int and value >= minimum and value % multiple_of == 0:
        return value
    allowed = f"an int >= {minimum}" + (f", a multiple of {multiple_of}" if multiple_of > 1 else "")
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentError(name, repr(value), allowed)
    try:
        number = int(value.__index__())
    except TypeError as error:  # a tensor that is not one integer
        raise ArgumentError(name, repr(value), allowed) from error
    require(number >= minimum and number % multiple_of == 0, name, number, allowed)
    return number


def expert_out_of_range() -> ArgumentError:
    """What to raise where a device has looked at expert ids, and does not say which one it was."""
    return ArgumentError("topk_idx", "an expert id out of range", "-1, or ids below the number of experts")
