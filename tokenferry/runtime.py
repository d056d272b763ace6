"""The life cycle under a Buffer on CPU ranks: construct (local), sync (with the peers' handles), destroy (local)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch

from tokenferry.dataplane import DataPlane
from tokenferry.dataplane.cpu import CpuDataPlane
from tokenferry.errors import BufferStateError
from tokenferry.memory.heap import Heap
from tokenferry.modes.inputs import Party
from tokenferry.modes.nodes import Nodes
from tokenferry.rail import Rail
from tokenferry.stats import Waits
from tokenferry.streams import NoStream
from tokenferry.topology import Topology

DEFAULT_STAGE_BYTES = 32 << 20
"""Ceiling of the stage where the caller names none."""


class Runtime:
    """The heap and the data plane of one rank.

    Args:
        topology: who is where.
        stage_limit: ceiling for the stage in bytes; 0 for the default.
        timeout: seconds to wait for a peer that makes no progress.
        may_mask: whether low-latency operations mask ranks that fail, and go on.
        make_rail: what makes this rank's rail; None where all ranks are on one node.
        exact_combine: whether partial sums travel between nodes in float32.
        paranoid: whether memory that is released is poisoned.

    Raises:
        HeapError: shared memory cannot be created.
    """

    def __init__(
        self,
        topology: Topology,
        stage_limit: int,
        timeout: float,
        may_mask: bool = False,
        make_rail: Callable[[], Rail] | None = None,
        exact_combine: bool = False,
        paranoid: bool = False,
    ) -> None:
        self.device = torch.device("cpu")
        self.key = ""
        self.topology = topology
        self.comm = NoStream()
        ranks = topology.local_ranks
        self._heap = Heap(topology.local_index, len(ranks), stage_limit or DEFAULT_STAGE_BYTES, timeout, ranks)
        self._heap.may_mask = may_mask
        self._heap.poisons = paranoid
        self.recorder = self._heap.recorder
        self._make_rail = make_rail
        self._exact = exact_combine
        self._nodes: Nodes | None = None
        self._scratch: torch.Tensor | None = None
        self._combine_rows: dict[tuple[int, ...], torch.Tensor] = {}
        self._plane: DataPlane | None = None

    def get_local_ipc_handle(self) -> bytearray:
        """What the peers need to open this rank's heap."""
        return bytearray(json.dumps(self._heap.handle).encode())

    def sync(self, ipc_handles: Sequence[bytes | bytearray]) -> None:
        """Open the heaps of this node's ranks.

        Args:
            ipc_handles: :meth:`get_local_ipc_handle` of every rank.

        Raises:
            BufferStateError: called before.
            HeapError: a peer's heap cannot be opened.
        """
        if self._plane is not None:
            raise BufferStateError("sync() was called before")
        self._heap.attach([_parse_handle(ipc_handles[rank]) for rank in self.topology.local_ranks])
        self._plane = CpuDataPlane(self._heap)

    def connect(self) -> None:
        """Make the rail, where there are several nodes.

        Raises:
            TokenferryError: there is no connection to another node.
        """
        assert self._make_rail is not None
        self._nodes = Nodes(self.topology, self._make_rail(), self._exact, self.recorder)

    def hide(self) -> None:
        """Take the names of the shared memory away, once every rank has synced."""
        self._heap.unlink()

    def is_available(self) -> bool:
        """Whether the runtime is synced, not destroyed, and no operation has failed on it."""
        return self._plane is not None and self._heap.is_open()

    def party(self, num_sms: int = 0) -> Party:
        """What an operation needs to run.

        Args:
            num_sms: without meaning here.

        Raises:
            BufferStateError: not synced.
        """
        if self._plane is None:
            raise BufferStateError("the Buffer is not synced")
        return Party(
            self._plane, self.topology.rank, self.topology.num_ranks, self.device, num_sms, nodes=self._nodes
        )

    def local_stage(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]: the head of this rank's stage, made real."""
        return self._heap.whole_stage(nbytes)

    def scratch(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]: memory of this rank alone, the same at every call."""
        if self._scratch is None:
            with torch.inference_mode(False):  # later calls may be outside of it
                self._scratch = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self._scratch

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An unset tensor; rows of CPU ranks are always staged, so any memory does."""
        return torch.empty(shape, dtype=dtype, device=self.device)

    def clear_unused(self, outputs: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.clear_unused`."""
        if self._plane is None:
            raise BufferStateError("the Buffer is not synced")
        self._plane.clear_unused(outputs, places)

    def combine_rows(self, shape: tuple[int, int, int]) -> torch.Tensor:
        """bfloat16 of this shape: rows that a low-latency combine may be given.

        The same at every call, since captured graphs read them.
        """
        if shape not in self._combine_rows:
            with torch.inference_mode(False):
                self._combine_rows[shape] = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return self._combine_rows[shape]

    def allocated_bytes(self) -> int:
        """Bytes of shared memory that this rank really takes."""
        return self._heap.allocated_bytes()

    @property
    def epoch(self) -> int:
        """Number of the last operation."""
        return self._heap.epoch if self._nodes is None else self._nodes.epoch

    def kernel_waits(self, *, reset: bool) -> dict[int, dict[int, Waits]]:
        """What kernels have waited: there are none, and all waits are counted by the recorder."""
        return {}

    def rail_bytes(self) -> int:
        """Bytes sent to other nodes."""
        return 0 if self._nodes is None else self._nodes.rail.bytes_sent

    def destroy(self) -> None:
        """Let go of all memory. Local: no peer is waited for. May be called again."""
        self._heap.close()
        if self._nodes is not None:
            self._nodes.rail.close()
        self._scratch = None
        self._combine_rows.clear()


def _parse_handle(handle: bytes | bytearray) -> tuple[str, int]:
    name, size = json.loads(bytes(handle))
    return str(name), int(size)
