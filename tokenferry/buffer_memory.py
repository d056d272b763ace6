"""The stream and the memory of a Buffer, as its users see them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tokenferry.streams import CommStream
from tokenferry.validation import check_int, require

if TYPE_CHECKING:
    from tokenferry.construction import AnyRuntime


class MemoryMethods:
    """Of Buffer."""

    low_latency_mode: bool
    num_nvl_bytes: int
    num_rdma_bytes: int

    def _live_runtime(self) -> AnyRuntime:
        raise NotImplementedError

    def get_comm_stream(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """The stream that operations run on; CPU ranks have a single one."""
        comm = self._live_runtime().comm
        return comm.stream if isinstance(comm, CommStream) else torch.cpu.current_stream()

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: torch.Size | None = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """A tensor over this rank's own stage.

        Args:
            dtype: of the tensor.
            size: shape; by default all that is left behind ``offset``, in one dimension.
            offset: in bytes, a multiple of the element size.
            use_rdma_buffer: the ``num_rdma_bytes`` that low-latency operations push rows to on GPUs (on CPU ranks no
                operation touches them) instead of ``num_nvl_bytes`` of the stage.

        Returns:
            The tensor. Operations of this rank and of peers write there: use it only while none runs on any rank,
            and meet afterwards, in :meth:`clean_low_latency_buffer` for example.

        Raises:
            ArgumentError: the tensor does not fit.
        """
        runtime = self._live_runtime()
        allowed = "False: without low_latency_mode there is no such memory"
        require(self.low_latency_mode or not use_rdma_buffer, "use_rdma_buffer", use_rdma_buffer, allowed)
        whole = self.num_rdma_bytes if use_rdma_buffer else self.num_nvl_bytes
        offset = check_int("offset", offset, minimum=0, multiple_of=dtype.itemsize)
        require(size is None or min(size, default=0) >= 0, "size", size, "no negative sizes")
        count = max(0, whole - offset) // dtype.itemsize if size is None else torch.Size(size).numel()
        end = offset + count * dtype.itemsize
        require(end <= whole, "size", f"{count} elements at byte {offset}", f"what fits {whole} bytes")
        memory = runtime.scratch(whole) if use_rdma_buffer else runtime.local_stage(end)
        flat = memory[offset:end].view(dtype)
        return flat if size is None else flat.view(size)

    def empty(self, *size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """An unset tensor that the other ranks can read where it lies, from its first use on.

        Ordinary GPU tensors become readable after a few operations on their memory, unless the allocator does not
        let it be shared (``expandable_segments:True``): rows in these never pass through the stage.

        Args:
            size: its shape.
            dtype: of the tensor.

        Raises:
            ArgumentError: a size is no number of elements.
            HeapError: ``heap_bytes`` are used up.
        """
        shape = torch.Size([check_int("size", each, minimum=0) for each in size])
        return self._live_runtime().empty(shape, dtype)
