"""The symmetric heap of CUDA ranks: control words, lists and a stage in every rank's device memory.

It lies in torch's symmetric memory: every rank allocates the same number of bytes, and a rendezvous of the group
gives each rank the addresses of all of them. What the words mean: :mod:`tokenferry.dataplane.cuda.kernels.words`.

The heap does not grow: a rendezvous is collective. So a heap takes ``LIST_BYTES`` for the lists of tokens and its
stage at once, for the rows that low-latency operations push and for tensors what the caller asks for; the stage is
only needed for memory that peers cannot open.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.distributed_c10d import Store

from tokenferry.config import ALIGNMENT, align_up
from tokenferry.errors import HeapError, TokenferryError
from tokenferry.memory.pool import Point, Pool

LIST_BYTES = 8 << 20
"""For the ids of the tokens that peers send: LIST_BYTES / 4 / R tokens a rank."""
SMALLEST_STAGE = 2 << 20


class SymmetricHeap:
    """The heap of one rank.

    Args:
        rank: this rank in the group.
        num_ranks: ranks of the group.
        control_bytes: bytes in front of the lists.
        stage_bytes: bytes of the stage, equal on all ranks.
        push_bytes: bytes of the area that low-latency operations push to, equal on all ranks.
        tensor_bytes: bytes for :meth:`empty`, equal on all ranks.
        device: the CUDA device of this rank.
        mark: see :class:`tokenferry.memory.pool.Pool`.

    Attributes:
        size: bytes of the whole heap.
        list_capacity: tokens that one rank can send.
        stage: byte offset of the stage.
        stage_bytes: its size.
        push: byte offset of the push area.
        push_bytes: its size.
        addresses: where the heaps of all ranks begin in this process; empty before :meth:`attach`.
        bytes: uint8 [size], the own heap.

    Raises:
        HeapError: the device has no memory for it.
    """

    def __init__(
        self,
        rank: int,
        num_ranks: int,
        control_bytes: int,
        stage_bytes: int,
        push_bytes: int,
        tensor_bytes: int,
        device: torch.device,
        mark: Callable[[], Point | None],
    ) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.rank = rank
        self.num_ranks = num_ranks
        self.device = device
        self.list_capacity = LIST_BYTES // 4 // num_ranks
        self.stage = align_up(control_bytes + LIST_BYTES)
        self.stage_bytes = align_up(max(stage_bytes, SMALLEST_STAGE))
        self.push = align_up(self.stage + self.stage_bytes, 512)
        self.push_bytes = align_up(push_bytes)
        tensors = align_up(self.push + self.push_bytes, 512)
        self.size = tensors + align_up(tensor_bytes, 512)
        self.addresses: tuple[int, ...] = ()
        self._peers: Any = None
        try:
            with torch.inference_mode(False):
                self.bytes = symmetric_memory.empty(self.size, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            raise HeapError(f"no symmetric memory of {self.size} bytes on {device}: {error}") from error
        self._pool = Pool(self.bytes.data_ptr() + tensors, self.size - tensors, mark, self.bytes)
        self.bytes[: self.stage].zero_()
        torch.cuda.synchronize(device)

    def words(self, offset: int, count: int) -> torch.Tensor:
        """int64 [count] over bytes of the own heap."""
        return self.bytes[offset : offset + 8 * count].view(torch.int64)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An unset tensor in the heap, which every peer can read from the start.

        Raises:
            HeapError: ``tensor_bytes`` are used up.
        """
        return self._pool.tensor(shape, dtype, self.device)

    def attach(self, store: Store, name: str) -> None:
        """Learn where the heaps of all ranks are. Collective over the ranks.

        Args:
            store: where they exchange that, and nothing else; it bounds the waits.
            name: of the heap, never used before in this process.

        Raises:
            HeapError: the GPUs cannot reach each other's memory.
            PeerTimeoutError: ranks did not come.
        """
        try:
            self._peers = map_peers(self.bytes, self.rank, self.num_ranks, store, name)
        except TokenferryError:
            raise
        except RuntimeError as error:
            raise HeapError(f"the ranks cannot map each other's memory on {self.device}: {error}") from error
        self.addresses = tuple(int(address) for address in self._peers.buffer_ptrs)
        if any(address % ALIGNMENT for address in self.addresses):
            raise HeapError(f"symmetric memory is not aligned to {ALIGNMENT} bytes: {self.addresses}")

    def close(self) -> None:
        """Let go of all memory; tensors in it live on. Local; may be called again."""
        self._peers = None
        self._pool = Pool(0, 0, lambda: None)
        self.bytes = torch.empty(0, dtype=torch.uint8)


def map_peers(memory: torch.Tensor, rank: int, num_ranks: int, store: Store, name: str) -> Any:
    """What torch knows of symmetric memory once all ranks have exchanged its handles, ``buffer_ptrs`` above all.

    As ``torch.distributed._symmetric_memory.rendezvous``, which takes a process group where here is a store.
    """
    from torch._C._distributed_c10d import (
        ProcessGroup,
        _register_process_group,
        _SymmetricMemory,
        _unregister_process_group,
    )
    from torch.distributed.distributed_c10d import GroupName

    group = ProcessGroup(store, rank, num_ranks)  # without a backend: torch asks it for the store and the rank only
    registered = GroupName(name)
    _register_process_group(registered, group)
    try:
        return _SymmetricMemory.rendezvous(memory, name)
    finally:
        _unregister_process_group(registered)
