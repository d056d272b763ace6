"""Tensors that lie in the heap: a first-fit allocator over a range of it.

A block is free again when the last tensor over it is gone. As with torch's own allocator, work that is queued on the
stream of the tensor may still be running then: the next owner must queue its own behind it, on the same stream.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from tokenferry.config import align_up
from tokenferry.errors import HeapError

_GRAIN = 512


class _Block:
    """Device memory that torch can wrap, and holds for as long as it uses it.

    Args:
        address: the first byte.
        nbytes: how many.
        memory: what must live as long.
    """

    def __init__(self, address: int, nbytes: int, memory: object) -> None:
        self.memory = memory
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class Pool:
    """Hands out blocks of a range of addresses.

    Args:
        base: the first address, divisible by 512.
        size: bytes.
        memory: the range's owner, kept alive by the tensors in it.
    """

    def __init__(self, base: int, size: int, memory: object = None) -> None:
        self._memory = memory
        self.size = size
        self._free = {base: size}

    def take(self, nbytes: int) -> int:
        """The address of a block of at least ``nbytes``; see :meth:`give`.

        Raises:
            HeapError: no gap is that large.
        """
        wanted = align_up(max(nbytes, 1), _GRAIN)
        for address, room in sorted(self._free.items()):
            if room >= wanted:
                del self._free[address]
                if room > wanted:
                    self._free[address + wanted] = room - wanted
                return address
        free = sum(self._free.values())
        raise HeapError(f"no gap of {wanted} bytes among the {free} free of {self.size}: raise heap_bytes")

    def give(self, address: int, nbytes: int) -> None:
        """Take a block back, and join it with its neighbours."""
        size = align_up(max(nbytes, 1), _GRAIN)
        after = self._free.pop(address + size, 0)
        for other, room in self._free.items():
            if other + room == address:
                self._free[other] = room + size + after
                return
        self._free[address] = size + after

    def tensor(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An unset tensor over a block of its own."""
        nbytes = shape.numel() * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=device)
        address = self.take(nbytes)
        block = _Block(address, nbytes, self._memory)
        weakref.finalize(block, self.give, address, nbytes).atexit = False
        return torch.as_tensor(block, device=device).view(dtype).view(shape)
