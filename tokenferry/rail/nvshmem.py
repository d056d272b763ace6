"""Between GPUs by puts and flags that kernels issue through NVSHMEM: InfiniBand, RoCE, EFA, or NVLink and PCIe.

Exchanges of a rail follow each other on a stream of its own. A kernel's waits end at the rail's deadline, in replays
of CUDA graphs, too: then the rail has ended. What cannot be ended is a put that a network card does not come to an
end with. Memory: see :mod:`.nvshmem_world`.
"""

from __future__ import annotations

import functools
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress

import torch
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from tokenferry.dataplane.cuda import rail_programs
from tokenferry.dataplane.cuda.kernels import rail as words
from tokenferry.dataplane.cuda.launch import Variant
from tokenferry.errors import TokenferryError
from tokenferry.memory import nvshmem
from tokenferry.memory.driver import Driver
from tokenferry.rail import NVSHMEM
from tokenferry.rail.device_rail import DeviceRail, Messages, Work, looking, rail_of_gpu
from tokenferry.rail.nvshmem_world import Ranks, World, join
from tokenferry.rendezvous import COMPILING_SECONDS
from tokenferry.topology import Topology

_PRIORITY = -1
_LEAST_ROWS = 16
"""Of a table, so that it serves for others."""
_END_SECONDS = 1.0
"""That kernels have to see that they are given up."""


class NvshmemTransport:
    """See :class:`tokenferry.rail.device_rail.Transport`.

    Args:
        region: of this rank.
        shape: of the regions.
        peers: on all other nodes, ascending.
        rank: this one, in NVSHMEM.
        node: of this rank.
        device: the GPU.
        timeout: seconds that a wait lasts.
        launch: the kernel.
        let_go: called when this rank writes to no other any more, and nothing is under way.
    """

    name = NVSHMEM

    def __init__(
        self,
        region: int,
        shape: rail_programs.Shape,
        peers: Sequence[rail_programs.Peer],
        rank: int,
        node: int,
        device: torch.device,
        timeout: float,
        launch: Variant,
        let_go: Callable[[], None],
    ) -> None:
        self._nodes = [peer.node for peer in peers]
        self._device = device
        self._launch = launch
        self._let_go = let_go
        self._driver = Driver()
        self._stream = _take_stream(self._driver, device)
        homes = rail_programs.homes_of(shape, node, peers)
        with torch.inference_mode(False):  # all of this may be written to outside of it
            self._peers = torch.tensor(homes, dtype=torch.int64, device=device)
            self._state = torch.zeros(words.STATE_WORDS, dtype=torch.int64, device=device)
            self._one = torch.ones(1, dtype=torch.int64, device="cpu", pin_memory=True)
            self._told = torch.zeros(1 + len(peers), dtype=torch.int64, device="cpu", pin_memory=True)
        self._look = self._told.numpy()
        places = self._peers.data_ptr(), self._state.data_ptr(), self._told.data_ptr()
        self._own = rail_programs.End(shape, region, rank, *places, int(timeout * 1e9))
        self._under_way: deque[tuple[torch.Tensor, torch.cuda.Event]] = deque()
        """Exchanges, and the table in pinned memory that each reads."""
        self._captured: list[torch.Tensor] = []
        """Tables of exchanges in graphs, which may be replayed at any time."""

    def begin(self, coming: Messages, going: Messages) -> Sequence[Work]:
        """See :meth:`tokenferry.rail.device_rail.Transport.begin`.

        Replays run where the caller has them run. So that none runs beside an exchange that nobody has waited for,
        the current stream waits for all of them from the first capture on.
        """
        stream, current = self._stream, torch.cuda.current_stream(self._device)
        is_captured = torch.cuda.is_current_stream_capturing()
        if is_captured:
            self._wait_for_all()
        stream.wait_stream(current)
        rows = [*self._messages(going), *self._messages(coming)]
        table = self._table(len(rows), is_captured)
        table.numpy()[: len(rows)] = rows
        self._own.launch(self._launch, int(stream.cuda_stream), table.data_ptr(), len(going), len(rows))
        event = stream.record_event()
        if is_captured:
            self._captured.append(table)
        else:
            self._under_way.append((table, event))
            if self._captured:
                current.wait_event(event)
        return [_Exchange(event, self._device)]

    def _wait_for_all(self) -> None:
        """Wait, by the host: a captured stream cannot wait for what is not captured."""
        with self._driver.relaxed_capture():
            while self._under_way:
                self._under_way.popleft()[1].synchronize()

    def _messages(self, parts: Messages) -> list[tuple[int, int, int, int, int]]:
        given = [(self._nodes.index(node), part.data_ptr(), part.numel()) for node, part in parts]
        return rail_programs.messages_of(self._own.shape, given)

    def _table(self, num_rows: int, is_captured: bool) -> torch.Tensor:
        """int64 [num_rows or more, 5] in pinned memory that no exchange reads any more."""
        if self._under_way and self._under_way[0][1].query():  # type: ignore[no-untyped-call]
            table, _ = self._under_way.popleft()
            if len(table) >= num_rows:
                return table
        shape = (max(num_rows, _LEAST_ROWS), words.MESSAGE_WORDS.value)
        with self._driver.relaxed_capture() if is_captured else nullcontext(), torch.inference_mode(False):
            return torch.empty(shape, dtype=torch.int64, device="cpu", pin_memory=True)

    def missing(self) -> Sequence[int]:
        """See :meth:`tokenferry.rail.device_rail.Transport.missing`."""
        if self._look[words.TOLD.value] == 0:
            return ()
        return [node for peer, node in enumerate(self._nodes) if self._look[words.TOLD_PEERS.value + peer]]

    def end(self, is_idle: bool) -> None:
        """See :meth:`tokenferry.rail.device_rail.Transport.end`."""
        is_idle = is_idle and not self._look[words.TOLD.value]
        if self._captured or not is_idle:
            try:
                self._give_up()
            except RuntimeError:  # the device has failed: nothing runs there any more
                return
        if is_idle:
            _free_streams[self._device].append(self._stream)
            self._let_go()

    def leave(self) -> None:
        """See :meth:`tokenferry.rail.device_rail.Transport.leave`: a replay would do nothing any more."""
        self.end(is_idle=True)

    def _give_up(self) -> None:
        """Have kernels do nothing, those that wait too, and give these some time to see that."""
        with torch.cuda.device(self._device), looking(self._device):
            self._driver.copy_aside(self._state.data_ptr() + 8 * words.GIVEN_UP.value, self._one.data_ptr(), 8)
            self._driver.end_aside()
            deadline = time.monotonic() + _END_SECONDS
            while not self._stream.query() and time.monotonic() < deadline:
                time.sleep(1e-3)


_free_streams: defaultdict[torch.device, list[torch.cuda.ExternalStream]] = defaultdict(list)
"""Of rails that are closed."""


def _take_stream(driver: Driver, device: torch.device) -> torch.cuda.ExternalStream:
    """A stream that no other rail has, nor anybody else: one of torch's may be another Buffer's too."""
    with suppress(IndexError):
        return _free_streams[device].pop()
    return torch.cuda.ExternalStream(driver.make_stream(_PRIORITY), device)  # type: ignore[no-untyped-call]


class _Exchange:
    """See :class:`tokenferry.rail.device_rail.Work`."""

    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event = event
        self._device = device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def is_completed(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


class _Memory:
    """Lets torch see bytes that are not its own."""

    def __init__(self, address: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2,
        }  # fmt: skip


def nvshmem_rail(topology: Topology, key: str, timeout: float, device: torch.device) -> DeviceRail:
    """A rail of this rank's GPU. All ranks of the group make theirs together.

    Args:
        topology: who is where.
        key: names the rail, behind what names the group; equal on its ranks, and never used before.
        timeout: seconds that a wait lasts.
        device: the GPU.

    Raises:
        TokenferryError: no connection to some rank of the rail.
    """
    files = nvshmem.find()
    if files is None:
        raise TokenferryError(
            f"NVSHMEM is not installed ({nvshmem.PACKAGE}), nor is it where {nvshmem.LIBRARY_VARIABLE} says"
        )
    store = _get_default_store()
    group = Ranks(
        PrefixStore(f"{key.rpartition('/')[0]}/nvshmem", store),
        range(topology.num_ranks),
        topology.rank,
        timeout + COMPILING_SECONDS,
    )
    rail = Ranks(PrefixStore(f"{key}/nvshmem", store), topology.rail, topology.node, timeout + COMPILING_SECONDS)
    library, kernel = _kernel(files)

    def make_transport() -> NvshmemTransport:
        kernel.compile()
        world, numbers = join(group, library, torch.cuda.current_device())
        return _transport(world, numbers, rail, topology, device, timeout, kernel)

    with torch.cuda.device(device):
        return rail_of_gpu(topology, key, timeout, device, make_transport, NVSHMEM)


@functools.cache
def _kernel(files: nvshmem.Files) -> tuple[nvshmem.Library, rail_programs.RailKernel]:
    library = nvshmem.Nvshmem(files)
    return library, rail_programs.RailKernel(files.device, library.prepare)


def _transport(
    world: World,
    numbers: Sequence[int],
    rail: Ranks,
    topology: Topology,
    device: torch.device,
    timeout: float,
    kernel: rail_programs.RailKernel,
) -> NvshmemTransport:
    region, problem = _Region(world, rail), ""
    try:
        try:
            launch = kernel.load()
            region.take(topology.num_nodes - 1, device)
        except (RuntimeError, ValueError) as error:  # the others must not wait
            problem = str(error) or type(error).__name__
        offsets = rail.agree("region", problem, region.address - world.pool)
        others = [node for node in range(topology.num_nodes) if node != topology.node]
        peers = [
            rail_programs.Peer(node, numbers[topology.rail[node]], world.pool + offsets[node]) for node in others
        ]
        assert region.shape is not None
        place = region.address, region.shape, peers, world.rank, topology.node
        return NvshmemTransport(*place, device, timeout, launch, region.let_go)
    except BaseException:
        region.let_go()
        raise


class _Region:
    """Memory of this rank for a rail.

    Args:
        world: whose memory it is.
        rail: the ranks that may write there.
    """

    def __init__(self, world: World, rail: Ranks) -> None:
        self._world = world
        self._rail = rail
        self.address = world.pool
        self.shape: rail_programs.Shape | None = None
        """None: there is no memory yet."""
        self._flags: tuple[torch.Tensor, torch.Tensor] | None = None
        """As they are, and as they are at rest."""

    def take(self, num_peers: int, device: torch.device) -> None:
        """Take the memory, and make it ready."""
        shape = rail_programs.shape_of(num_peers, self._world.region_bytes)
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        if shape.grid > num_sms:
            raise TokenferryError(f"{num_peers} other nodes need {shape.grid} SMs, of which the GPU has {num_sms}")
        self.address = self._world.take()
        self.shape = shape
        with torch.inference_mode(False):
            memory = torch.as_tensor(_Memory(self.address, num_peers * shape.home_bytes), device=device)
            begin, end = shape.flags
            flags = memory.view(num_peers, shape.home_bytes)[:, :end].view(torch.int64)
            at_rest = torch.zeros_like(flags)
            at_rest[:, begin // 8 :] = 1
            flags.copy_(at_rest)
        torch.cuda.synchronize(device)
        self._flags = flags, at_rest

    def let_go(self) -> None:
        """This rank writes to no other any more. Raises nothing."""
        if self.shape is not None:
            self._world.give_back(self.address, self._is_free)
        self._rail.say_aside("over")

    def _is_free(self) -> bool:
        return self._rail.have_said("over") and (self._flags is None or torch.equal(*self._flags))
