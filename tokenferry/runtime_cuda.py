"""The life cycle under a Buffer on a GPU; see :mod:`tokenferry.runtime`."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence

import torch
from torch.distributed.distributed_c10d import Store

from tokenferry.dataplane.cuda import CudaDataPlane
from tokenferry.dataplane.cuda.follow import THREAD
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.errors import BufferStateError, HeapError, TokenferryError
from tokenferry.memory.direct import Regions
from tokenferry.memory.driver import Driver
from tokenferry.memory.symm import SymmetricHeap
from tokenferry.modes.inputs import Party
from tokenferry.modes.nodes import Nodes
from tokenferry.modes.paranoid import PARANOID_VARIABLE
from tokenferry.rail import Rail
from tokenferry.rendezvous import ExchangeStore
from tokenferry.runtime import DEFAULT_STAGE_BYTES
from tokenferry.stats import Recorder, Waits
from tokenferry.streams import CommStream
from tokenferry.topology import Topology


class CudaRuntime:
    """The heap, the regions and the data plane of one rank on a GPU.

    Args:
        topology: who is where.
        store: that all ranks of the Buffer reach.
        device: the GPU of this rank.
        stage_limit: ceiling for the stage in bytes; 0 for the default.
        push_bytes: bytes for low-latency operations.
        heap_bytes: bytes for tensors in the heap.
        timeout: seconds to wait for a peer that makes no progress.
        may_mask: whether low-latency operations mask ranks that fail, and go on.
        make_rail: what makes this rank's rail; None where all ranks are on one node.
        exact_combine: whether low-latency combines send every row; between nodes, whether partial sums travel in
            float32.
        paranoid: whether the host looks at what operations return.

    Raises:
        HeapError: the GPU or the host has no memory for the heap.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        store: Store,
        device: torch.device,
        stage_limit: int,
        push_bytes: int,
        heap_bytes: int,
        timeout: float,
        may_mask: bool,
        make_rail: Callable[[], Rail] | None,
        exact_combine: bool,
        paranoid: bool = False,
    ) -> None:
        _destroy_dropped()
        rank, num_ranks = topology.local_index, len(topology.local_ranks)
        if num_ranks > words.MAX_RANKS:
            raise TokenferryError(f"{num_ranks} ranks share this node: at most {words.MAX_RANKS} can on GPUs")
        self.device = device
        self.key = ""
        self.topology = topology
        reason = "between nodes the host takes part in dispatch and combine" if topology.num_nodes > 1 else ""
        if paranoid:
            reason = f"with {PARANOID_VARIABLE} the host looks at all results"
        self.comm = CommStream(device, takes_all=reason)
        self._store = store
        self._timeout = timeout
        self._plane: CudaDataPlane | None = None
        self._options = may_mask, exact_combine
        self._make_rail = make_rail
        self._nodes: Nodes | None = None
        self._parties: dict[int, Party] = {}
        self._combine_rows: dict[tuple[int, ...], torch.Tensor] = {}
        self.recorder = Recorder()
        stage = min(stage_limit or DEFAULT_STAGE_BYTES, DEFAULT_STAGE_BYTES) if _can_share() else stage_limit
        self._regions = Regions(rank, num_ranks, Driver())
        try:
            stage = stage or DEFAULT_STAGE_BYTES
            self._heap = SymmetricHeap(
                rank, num_ranks, words.CONTROL_BYTES, stage, push_bytes, heap_bytes, device, self.comm.mark
            )
        except BaseException:
            self._regions.close()
            raise
        released = self._heap.words(words.RELEASED.value, words.MAX_RANKS * words.LINE_BYTES // 8)
        released.fill_(words.RELEASED_AT_START)
        torch.cuda.synchronize(device)
        self._process = os.getpid()
        self._destroyed = False

    def get_local_ipc_handle(self) -> bytearray:
        """What the peers need to know of this rank's memory."""
        gpu = str(torch.cuda.get_device_properties(self.device).uuid)
        return bytearray(json.dumps([*self._regions.handle, self._heap.size, gpu]).encode())

    def sync(self, ipc_handles: Sequence[bytes | bytearray]) -> None:
        """Map the peers' heaps and mailboxes. Collective.

        Args:
            ipc_handles: :meth:`get_local_ipc_handle` of every rank.

        Raises:
            BufferStateError: called before.
            HeapError: a peer's memory cannot be mapped.
        """
        if self._plane is not None:
            raise BufferStateError("sync() was called before")
        everyone = [json.loads(bytes(handle)) for handle in ipc_handles]
        offers = [everyone[rank] for rank in self.topology.local_ranks]
        sizes = sorted({int(size) for _, _, size, _ in offers})
        if len(sizes) > 1:
            raise HeapError(f"the ranks want heaps of {sizes} bytes: num_nvl_bytes and heap_bytes must be equal")
        name = f"{self.key}/heap {self.topology.node}"
        store = ExchangeStore(self._store, name, self.topology.local_ranks, self._timeout)
        self._heap.attach(store, name)  # first: all ranks come to this, whatever fails on one of them afterwards
        self._regions.attach([(str(name), int(size)) for name, size, _, _ in offers])
        self._regions.set_heap(self._heap.addresses, self._heap.size)
        gpus = [gpu for _, _, _, gpu in everyone]  # a test of nodes may have several on one GPU
        sharing = gpus.count(offers[self.topology.local_index][-1])
        most = _resident_programs(self.device, sharing, self.topology.num_nodes > 1)
        self._plane = CudaDataPlane(
            self._heap, self._regions, self.comm, self._timeout, most, *self._options, self.topology.local_ranks
        )
        self._plane.status.recorder = self.recorder

    def connect(self) -> None:
        """Make the rail, where there are several nodes.

        Raises:
            TokenferryError: there is no connection to another node.
        """
        assert self._make_rail is not None
        with torch.cuda.device(self.device), torch.cuda.stream(self.comm.stream):
            self._nodes = Nodes(self.topology, self._make_rail(), self._options[1], self.recorder)
        self._parties.clear()

    def hide(self) -> None:
        """Take the name of the mailbox away, once every rank has synced."""
        self._regions.unlink()

    def is_available(self) -> bool:
        """Whether the runtime is synced, not destroyed, and no operation has failed on it."""
        return self._plane is not None and not self._destroyed and not self._plane.status.failed

    def party(self, num_sms: int = 0) -> Party:
        """What an operation needs to run.

        Raises:
            BufferStateError: not synced.
        """
        party = self._parties.get(num_sms)
        if party is None:
            if self._plane is None:
                raise BufferStateError("the Buffer is not synced")
            topology = self.topology
            party = Party(self._plane, topology.rank, topology.num_ranks, self.device, num_sms, nodes=self._nodes)
            self._parties[num_sms] = party
        return party

    def local_stage(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]: the head of this rank's stage.

        Raises:
            HeapError: the stage is smaller.
        """
        if nbytes > self._heap.stage_bytes:
            raise HeapError(f"the stage has {self._heap.stage_bytes} bytes, not {nbytes}")
        return self._heap.bytes[self._heap.stage : self._heap.stage + nbytes]

    def scratch(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]: the rows of low-latency operations, without their flags."""
        return self._heap.bytes[self._heap.push : self._heap.push + nbytes]

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """An unset tensor that the peers can read from the start."""
        return self._heap.empty(shape, dtype)

    def clear_unused(self, outputs: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.clear_unused`."""
        if self._plane is None:
            raise BufferStateError("the Buffer is not synced")
        if torch._C._cuda_getDevice() == self.comm.index:
            self._plane.clear_unused(outputs, places)
        else:
            with torch.cuda.device(self.comm.index):
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
        """Bytes of device memory that the heap takes."""
        return self._heap.size

    @property
    def epoch(self) -> int:
        """Number of the last operation; 0 inside a node, where operations are counted on the device."""
        return 0 if self._nodes is None else self._nodes.epoch

    def rail_bytes(self) -> int:
        """Bytes sent to other nodes."""
        return 0 if self._nodes is None else self._nodes.rail.bytes_sent

    def kernel_waits(self, *, reset: bool) -> dict[int, dict[int, Waits]]:
        """What kernels have waited, by kind of operation and rank of the group.

        Raises:
            BufferStateError: a CUDA graph is being captured.
        """
        if self._plane is None:
            return {}
        ranks = self.topology.local_ranks
        with torch.cuda.device(self.device):
            found = self._plane.waits.read(reset=reset)
        return {kind: {ranks[peer]: waits for peer, waits in of.items()} for kind, of in found.items()}

    def destroy(self) -> None:
        """Let go of all memory. Local: no peer is waited for. May be called again."""
        if self._destroyed:
            return
        self._destroyed = True
        if os.getpid() != self._process:  # a child: the GPU, and whoever held the lock, stay with its parent
            self._regions.close()
            return
        with self.comm.lock, torch.cuda.device(self.device):
            if self._nodes is None:
                self._synchronize()
            else:
                self._wait_for_nodes(self._nodes.rail)
                self._nodes.rail.close()
            if self._plane is not None:
                self._plane.close()
            self._plane = None
            self._parties.clear()
            self._regions.close()
            self._heap.close()
            self._combine_rows.clear()

    def _synchronize(self) -> None:
        with contextlib.suppress(RuntimeError):  # the device may have failed
            torch.cuda.synchronize(self.device)  # graphs run on streams of their own

    def _wait_for_nodes(self, rail: Rail) -> None:
        """Wait for the device, no longer than for a peer: exchanges that no host waits for would never end."""
        waiting = threading.Thread(target=self._synchronize, name="tokenferry destroy", daemon=True)
        waiting.start()
        waiting.join(self._timeout)
        if waiting.is_alive():
            rail.close(is_stuck=True)
            waiting.join(self._timeout)

    def __del__(self) -> None:
        """As :meth:`destroy`, but neither in a child, nor in a capture, nor when the interpreter goes."""
        if getattr(self, "_destroyed", True) or sys.is_finalizing() or os.getpid() != self._process:
            return
        with contextlib.suppress(Exception):
            if threading.current_thread().name == THREAD:  # the collector came there, in the middle of something
                _dropped.append(self)
            elif not torch.cuda.is_current_stream_capturing():
                self.destroy()


_dropped: list[CudaRuntime] = []
"""To be destroyed when the next one is made."""


def _destroy_dropped() -> None:
    while _dropped:
        with contextlib.suppress(Exception):
            _dropped.pop().destroy()


def _resident_programs(device: torch.device, num_sharing: int, has_rails: bool) -> int:
    """Programs of one operation that surely run at a time, with ``num_sharing`` ranks of all nodes on the GPU.

    Kernels wait for each other: one that is not resident would be waited for in vain. Those of a rail need SMs that
    nobody else has a program on, while the senders and the receivers of every rank may be waiting.
    """
    num_sms = int(torch.cuda.get_device_properties(device).multi_processor_count)
    if num_sharing == 1:
        return num_sms
    return max(num_sms // (num_sharing + 1) // (2 if has_rails else 1), 2)


def _can_share() -> bool:
    """Whether ordinary tensors can be opened by other processes, as far as the allocator's settings tell."""
    settings = " ".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if hasattr(torch._C, "_accelerator_getAllocatorSettings"):
        settings += str(torch._C._accelerator_getAllocatorSettings())
    return "expandable_segments:True" not in settings.replace(" ", "")
