"""Rails for tensors on GPUs: a transport moves them, in the order of streams; tensors on the CPU go over Gloo beside.

Exchanges are put into the order of the current stream, and run beside what is put there afterwards: ``wait`` makes
the stream wait, ``finish`` the host, until a deadline; behind ``settle`` a thread looks at the deadline. A
transport that misses it is ended, on this rank alone, so that the stream goes on and the GPU stays usable; then
the peers miss theirs. A captured exchange is the graph's: of its replays nothing is known here, and no host looks at
a deadline.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch

from tokenferry.errors import TokenferryError
from tokenferry.memory.driver import Driver
from tokenferry.rail import PROCESS_GROUP, Parts, RailError, Transfer
from tokenferry.rail.process_group import MOST_UNFINISHED, ProcessGroupRail, bytes_of, first_line
from tokenferry.rail.watch import Marker, Watch, Watched
from tokenferry.topology import Topology

_SHORTEST_SLEEP, _LONGEST_SLEEP = 20e-6, 200e-6
"""Seconds between two looks at a marker. NCCL's own threads need the cores, too: the longer a host has waited, the
longer it sleeps."""
_SLEEP_SHARE = 0.05
"""Of the time that it has waited already."""
_LOOK_FOR_ERRORS_EVERY = 0.01
_GRACE_SECONDS = 1.0
"""Between the moment when an exchange counts as over and that when its marker must have passed, or it has failed."""
_END_SECONDS = 1.0
"""That the end of a transport is waited for where graphs hold exchanges: NCCL's comes when they are gone."""
_KEPT: list[Any] = []
"""Transports that may still be in use when nobody knows of them any more; and the end of a group of NCCL waits for
its watchdog, which may be waiting for the interpreter."""

Messages = Sequence[tuple[int, torch.Tensor]]
"""By node: contiguous bytes on the GPU, at least one."""


class Work(Protocol):
    """An exchange that is under way."""

    def wait(self) -> object:
        """Make the current stream wait for it."""

    def is_completed(self) -> bool:
        """Whether it is over, or has failed."""


class Transport(Protocol):
    """What moves bytes between the GPUs of a rail. Errors are RuntimeErrors."""

    name: str

    def begin(self, coming: Messages, going: Messages) -> Sequence[Work]:
        """Begin an exchange, behind what is queued on the current stream."""

    def missing(self) -> Sequence[int]:
        """The nodes that exchanges have waited for in vain: what came last may be garbage."""

    def end(self, is_idle: bool) -> None:
        """Let go, and end what is under way. Raises nothing.

        Args:
            is_idle: there is nothing under way.
        """

    def leave(self) -> None:
        """Let go as far as that waits for nobody: graphs hold exchanges, and nothing is wrong."""


class DeviceRail:
    """See :class:`tokenferry.rail.Rail`.

    Args:
        words: moves what is on the CPU.
        transport: moves the rest.
        topology: who is where.
        device: where the rest is.
        timeout: seconds that a wait lasts.
        marker: makes markers.
        in_thread: entered by a thread that asks markers; it goes without if that fails.
        carrier: its name.

    Raises:
        TokenferryError: no connection to some rank of the rail.
    """

    def __init__(
        self,
        words: ProcessGroupRail,
        transport: Transport,
        topology: Topology,
        device: torch.device,
        timeout: float,
        marker: Callable[[], Marker],
        in_thread: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
        carrier: str = PROCESS_GROUP,
    ) -> None:
        self.carrier = carrier
        self._words = words
        self._node = topology.node
        self._transport: Transport | None = transport
        self._device = device
        self._timeout = timeout
        self._marker = marker
        self._bytes_sent = 0
        self._unfinished: deque[DeviceTransfer] = deque()
        self._failure: tuple[Sequence[int], str] | None = None
        self._was_captured = False
        self.watch = Watch(timeout, self._miss, in_thread, words.answer)
        others = [node for node in range(topology.num_nodes) if node != topology.node]
        try:  # the first exchange connects all ranks, whoever has rows for whom later
            tokens = torch.zeros((2, topology.num_nodes, 16), dtype=torch.uint8, device=device)
            self.post(
                {node: [tokens[0, node]] for node in others}, {node: [tokens[1, node]] for node in others}
            ).finish()
        except (RailError, RuntimeError) as error:
            self.close()
            raise TokenferryError(f"no rail between the GPUs of ranks {topology.rail}: {error}") from error
        self._bytes_sent = 0

    @property
    def meanwhile(self) -> Callable[[], object]:
        """See :class:`tokenferry.rail.Rail`: while the host waits for what is on the CPU."""
        return self._words.meanwhile

    @meanwhile.setter
    def meanwhile(self, call: Callable[[], object]) -> None:
        self._words.meanwhile = call

    @property
    def bytes_sent(self) -> int:
        """Since the rail was made."""
        return self._bytes_sent + self._words.bytes_sent

    @property
    def failure(self) -> RailError | None:
        """See :class:`tokenferry.rail.Rail`."""
        transport = self._transport
        if self._failure is None and transport is not None and (missing := transport.missing()):
            self._miss(missing, f"no sign of life for {self._timeout:.1f} s")
        return None if self._failure is None else RailError(self._failure[0], True, self._failure[1])

    def post(self, sends: Parts, receives: Parts) -> Transfer:
        """See :meth:`tokenferry.rail.Rail.post`. The tensors are all on the CPU, or all on the GPU."""
        given = next((part for parts in (*sends.values(), *receives.values()) for part in parts), None)
        if given is None or given.device != self._device:
            return self._words.post(sends, receives)
        is_captured = _is_capturing(self._device)
        self._was_captured |= is_captured
        while not is_captured and len(unfinished := list(self._unfinished)) >= MOST_UNFINISHED:
            unfinished[0].finish()
        coming = [(node, part) for node, parts in receives.items() for part in bytes_of(parts)]
        going = [(node, part) for node, parts in sends.items() for part in bytes_of(parts)]
        nodes = sorted({node for node, _ in (*coming, *going)})
        marker = None if is_captured else self._marker()
        transfer = DeviceTransfer(self, nodes, [part for _, part in (*coming, *going)], self._timeout, marker)
        if nodes:
            transfer.begin(self._begin(nodes, coming, going))
            if not is_captured:
                self._unfinished.append(transfer)
            self._bytes_sent += sum(part.numel() for _, part in going)
        return transfer

    def _begin(
        self,
        nodes: Sequence[int],
        coming: Messages,
        going: Messages,
    ) -> Sequence[Work]:
        transport = self.transport()
        try:
            return transport.begin(coming, going)
        except RuntimeError as error:
            reason = first_line(error)
        raise self.gives_up(nodes, False, reason)

    def transport(self) -> Transport:
        """The transport.

        Raises:
            RailError: the rail is closed, or has ended.
        """
        if (failure := self.failure) is not None:
            raise failure
        if self._transport is None:
            raise RailError([self._node], False, "this rank has closed its rail")
        return self._transport

    def is_done_with(self, transfer: DeviceTransfer) -> None:
        """Forget a transfer. Another thread may have forgotten all."""
        with contextlib.suppress(ValueError):
            self._unfinished.remove(transfer)

    def _miss(self, nodes: Sequence[int], reason: str) -> None:
        """An exchange that no host waits for has missed its deadline."""
        transport = self._transport
        known = () if transport is None else transport.missing()
        try:
            found = self._words.gives_up(known or nodes, True, reason)
            self._failure = found.nodes, str(found)  # before the stream goes on
        finally:
            self.abandon()

    def gives_up(self, nodes: Sequence[int], timed_out: bool, reason: str) -> RailError:
        """What to raise, since an exchange with these nodes has failed. The rail is of no use any more."""
        try:
            return self._words.gives_up(nodes, timed_out, reason)
        finally:
            self.abandon()

    def answer(self, nodes: Sequence[int]) -> None:
        """See :meth:`tokenferry.rail.process_group.ProcessGroupRail.answer`."""
        self._words.answer(nodes)

    def abandon(self) -> None:
        """Something has failed: end what is under way, wherever it is. The rail is of no use any more."""
        transport = self._let_go()
        if transport is not None:
            _keep(transport)
            self._end(transport, is_idle=False)

    def close(self, is_stuck: bool = False) -> None:
        """See :meth:`tokenferry.rail.Rail.close`.

        A transport that graphs hold is left if nothing is wrong: what it has goes with the process.
        """
        self._words.close()
        is_idle = not is_stuck and not self._unfinished and self.watch.is_idle
        transport = self._let_go()
        if transport is None:
            return
        if not is_idle or self._was_captured:
            _keep(transport)
        if is_idle and self._was_captured:
            transport.leave()
        else:
            self._end(transport, is_idle)

    def _let_go(self) -> Transport | None:
        """The transport, if it is there yet, of which this rail knows nothing any more."""
        transport, self._transport = self._transport, None
        self._unfinished.clear()
        self.watch.clear()
        return transport

    def _end(self, transport: Transport, is_idle: bool) -> None:
        """End what is under way, by a thread if that may last."""
        if not self._was_captured:
            transport.end(is_idle)
            return
        thread = threading.Thread(target=transport.end, args=(is_idle,), name="tokenferry rail's end", daemon=True)
        thread.start()
        thread.join(_END_SECONDS)


class DeviceTransfer:
    """See :class:`tokenferry.rail.Transfer`.

    Args:
        rail: it runs on.
        nodes: that it is with.
        parts: tensors that must live as long.
        seconds: to wait at most.
        marker: not recorded yet; None if the exchange is captured.
    """

    def __init__(
        self,
        rail: DeviceRail,
        nodes: Sequence[int],
        parts: Sequence[torch.Tensor],
        seconds: float,
        marker: Marker | None,
    ) -> None:
        self._rail = rail
        self._nodes = nodes
        self._parts = parts
        self._seconds = seconds
        self._marker = marker
        self._works: Sequence[Work] = []
        self._is_in_order = True

    def begin(self, works: Sequence[Work]) -> None:
        """The exchange is on its way."""
        self._works = works
        self._is_in_order = False

    def wait(self, node: int) -> None:
        """See :meth:`tokenferry.rail.Transfer.wait`: the current stream waits, for all that comes."""
        if self._is_in_order:
            return
        self._rail.transport()
        try:
            for work in self._works:
                work.wait()
            if self._marker is not None:
                self._marker.record()
        except RuntimeError as error:
            reason = first_line(error)
        else:
            self._is_in_order = True
            return
        raise self._rail.gives_up(self._nodes, False, reason)

    def finish(self) -> None:
        """See :meth:`tokenferry.rail.Transfer.finish`."""
        if not self._works:
            return
        self.wait(self._nodes[0])
        name = self._rail.transport().name
        marker, started, ended, looked = self._marker, time.monotonic(), None, 0.0
        assert marker is not None  # no host waits for what is captured
        while not marker.query():
            now = time.monotonic()
            if ended is None and now - looked > _LOOK_FOR_ERRORS_EVERY:
                looked = now
                self._rail.answer(self._nodes)
                ended = now if all(work.is_completed() for work in self._works) else None
            timed_out = now - started > self._seconds
            if timed_out or (ended is not None and now - ended > _GRACE_SECONDS):
                reason = f"no sign of life for {now - started:.1f} s" if timed_out else f"{name} reports an error"
                raise self._rail.gives_up(self._nodes, timed_out, reason)
            time.sleep(min(max(_SHORTEST_SLEEP, _SLEEP_SHARE * (now - started)), _LONGEST_SLEEP))
        self._rail.transport()  # which may have ended by itself
        self._works, self._parts = [], []
        self._rail.is_done_with(self)

    def settle(self) -> None:
        """See :meth:`tokenferry.rail.Transfer.settle`."""
        if not self._works:
            return
        self.wait(self._nodes[0])
        if self._marker is not None:
            self._rail.watch.add(Watched(self._marker, self._nodes, self._parts, time.monotonic()))
        self._works, self._parts = [], []
        self._rail.is_done_with(self)


def rail_of_gpu(
    topology: Topology,
    key: str,
    timeout: float,
    device: torch.device,
    make_transport: Callable[[], Transport],
    carrier: str,
) -> DeviceRail:
    """A rail of this rank's GPU.

    Args:
        topology: who is where.
        key: names the rail; equal on its ranks, and never used before.
        timeout: seconds that a wait lasts.
        device: the GPU.
        make_transport: called when this rank can be reached on the CPU.
        carrier: its name.

    Raises:
        TokenferryError: no connection to some rank of the rail.
    """
    words = ProcessGroupRail(topology, key, timeout)
    try:
        in_thread = functools.partial(looking, device)
        return DeviceRail(words, make_transport(), topology, device, timeout, torch.cuda.Event, in_thread, carrier)
    except (RuntimeError, ValueError) as error:
        words.close()
        if isinstance(error, TokenferryError):
            raise
        raise TokenferryError(f"no rail between the GPUs of ranks {topology.rail}: {error}") from error


def _keep(transport: Transport) -> None:
    _KEPT.append(transport)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(transport))  # the interpreter's end clears the list


@contextlib.contextmanager
def looking(device: torch.device) -> Iterator[None]:
    """A thread that asks events of a GPU, while others may capture graphs there."""
    torch.cuda.set_device(device)
    with Driver().relaxed_capture():
        torch.cuda.mem_get_info(device)  # the first call of a thread makes the GPU's context its own
        yield


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
