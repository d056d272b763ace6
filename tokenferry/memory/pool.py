"""Tensors that lie in the heap: a first-fit allocator over a range of it.

A block is given back when the last tensor over it is gone. As with torch's own allocator, work that is queued on the
stream of the tensor may still be running then: the next owner must queue its own behind it, on the same stream. What
operations have queued elsewhere may be running too, and peers be reading: so a block is free when operations are past
the point that they had come to, or the next owner's stream waits for that.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

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


class Point(Protocol):
    """A point in the work that operations have queued."""

    def has_passed(self) -> bool:
        """Whether all of it is done."""

    def wait(self) -> None:
        """Make the current stream wait for it."""


class Pool:
    """Hands out blocks of a range of addresses, to any thread.

    Args:
        base: the first address, divisible by 512.
        size: bytes.
        mark: the point that operations have come to; None: it is not to be had now, nor are earlier ones to be asked.
        memory: the range's owner, kept alive by the tensors in it.
    """

    def __init__(self, base: int, size: int, mark: Callable[[], Point | None], memory: object = None) -> None:
        self._memory = memory
        self._mark = mark
        self.size = size
        self._lock = threading.Lock()
        """Of what :meth:`take` changes."""
        self._free = {base: size}
        self._leaving: deque[tuple[Point, list[tuple[int, int]]]] = deque()
        """Blocks that are free behind a point."""
        self._given: deque[tuple[int, int]] = deque()
        """Blocks that nobody has looked at since they were given back."""

    def take(self, nbytes: int) -> int:
        """The address of a block of at least ``nbytes``; see :meth:`give`. The current stream may be made to wait.

        Raises:
            HeapError: no gap is that large.
        """
        wanted = align_up(max(nbytes, 1), _GRAIN)
        with self._lock:
            count = len(self._given)  # before the point: what comes later may still be in use behind it
            point = self._mark() if count or self._leaving else None
            if point is not None:
                if count:
                    self._leaving.append((point, [self._given.popleft() for _ in range(count)]))
                while self._leaving and self._leaving[0][0].has_passed():
                    self._join(self._leaving.popleft()[1])
            address, behind = self._find(wanted), None
            while address is None and point is not None and self._leaving:
                behind, blocks = self._leaving.popleft()
                behind.wait()
                self._join(blocks)
                address = self._find(wanted)
            free = sum(self._free.values())
            if behind is not None:  # other streams have not waited
                self._leaving.appendleft((behind, list(self._free.items())))
                self._free.clear()
        if address is None:
            raise HeapError(f"no gap of {wanted} bytes among the {free} free of {self.size}: raise heap_bytes")
        return address

    def give(self, address: int, nbytes: int) -> None:
        """Take a block back: in any thread, also in the middle of :meth:`take`, since tensors go when they go."""
        self._given.append((address, align_up(max(nbytes, 1), _GRAIN)))

    def _find(self, wanted: int) -> int | None:
        for address, room in sorted(self._free.items()):
            if room >= wanted:
                del self._free[address]
                if room > wanted:
                    self._free[address + wanted] = room - wanted
                return address
        return None

    def _join(self, blocks: list[tuple[int, int]]) -> None:
        """Blocks are free: join them with their neighbours."""
        for address, size in blocks:
            whole = size + self._free.pop(address + size, 0)
            before = next((other for other, room in self._free.items() if other + room == address), address)
            self._free[before] = self._free.get(before, 0) + whole

    def tensor(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An unset tensor over a block of its own."""
        nbytes = shape.numel() * dtype.itemsize
        if nbytes == 0:
            return torch.empty(shape, dtype=dtype, device=device)
        address = self.take(nbytes)
        block = _Block(address, nbytes, self._memory)
        weakref.finalize(block, self.give, address, nbytes).atexit = False
        return torch.as_tensor(block, device=device).view(dtype).view(shape)
