"""Unset tensors on the device, and views of them, made as programs that torch compiles make theirs.

Below torch's dispatcher they take half the time. So modes that look at operators do not see them. Where torch's
algorithms are to be deterministic, unset memory is torch's own again, which fills it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

try:
    from torch._C._dynamo import guards

    _functions: Any = vars(guards)
except ImportError:
    _functions = {}

Allocate: TypeAlias = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], torch.Tensor]
"""Takes shape, strides and dtype."""


def allocator_of(device: torch.device) -> Allocate:
    """What makes unset tensors on a device, while it is the current one."""
    below: Allocate | None = _functions.get(f"_empty_strided_{device.type}")
    is_deterministic = torch._C._get_deterministic_algorithms

    def allocate(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        if below is None or is_deterministic():
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)
        return below(shape, strides, dtype)

    return allocate


def _as_strided(tensor: torch.Tensor, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> torch.Tensor:
    return tensor.as_strided(shape, strides, tensor.storage_offset() + offset)


piece_of: Callable[[torch.Tensor, tuple[int, ...], tuple[int, ...], int], torch.Tensor] = _functions.get(
    "_reinterpret_tensor", _as_strided
)
"""The elements of a tensor from one on, by shape, strides and the number of that one. For autograd it is no view."""
