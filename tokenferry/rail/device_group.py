"""Rails for tensors on GPUs: NCCL moves them, over any network that it knows; tensors on the CPU go over Gloo beside.

Exchanges are put into the order of the current stream, and run beside what is put there afterwards: ``wait`` makes
the stream wait, ``finish`` the host, until a deadline; behind ``settle`` a thread looks at the deadline. A
communicator that misses it is aborted, on this rank alone, so that the stream goes on and the GPU stays usable; then
the peers miss theirs. A captured exchange is the graph's: of its replays nothing is known here, and nobody looks at a
deadline. NCCL ends a communicator only when all graphs that hold its exchanges are gone: nobody waits for that long.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from tokenferry.errors import TokenferryError
from tokenferry.memory.driver import Driver
from tokenferry.rail import Parts, RailError, Transfer
from tokenferry.rail.process_group import MOST_UNFINISHED, ProcessGroupRail, bytes_of, first_line
from tokenferry.rail.watch import Marker, Watch, Watched
from tokenferry.topology import Topology

_NEVER = timedelta(days=365)
_SHORTEST_SLEEP, _LONGEST_SLEEP = 20e-6, 200e-6
"""Seconds between two looks at a marker. NCCL's own threads need the cores, too: the longer a host has waited, the
longer it sleeps."""
_SLEEP_SHARE = 0.05
"""Of the time that it has waited already."""
_LOOK_FOR_ERRORS_EVERY = 0.01
_GRACE_SECONDS = 1.0
"""Between the moment when an exchange counts as over and that when its marker must have passed, or it has failed."""
_ABORT_SECONDS = 1.0
"""That the end of a group is waited for where graphs hold exchanges: these end at once, it when they are gone."""
_ERRORS_LEFT_TO_US = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_FR_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    "TORCH_FR_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
"""What torch is told when a group of NCCL is made. Else its watchdog would end the process when an operation fails,
and sleep for a minute before, another of its threads for eight; the end of a group waits for both."""
_ENVIRONMENT = threading.Lock()
_FAILED_GROUPS: list[Any] = []
"""Kept for ever, since the end of a group waits for its watchdog, which may be waiting for the interpreter."""


class DeviceRail:
    """See :class:`tokenferry.rail.Rail`.

    Args:
        words: moves what is on the CPU.
        group: of the rail's ranks, by node; moves the rest.
        topology: who is where.
        device: where the rest is.
        timeout: seconds that a wait lasts.
        marker: makes markers.
        in_thread: entered by a thread that asks markers; it goes without if that fails.

    Raises:
        TokenferryError: no connection to some rank of the rail.
    """

    carrier = "process_group"

    def __init__(
        self,
        words: ProcessGroupRail,
        group: Any,
        topology: Topology,
        device: torch.device,
        timeout: float,
        marker: Callable[[], Marker],
        in_thread: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        self._words = words
        self._node = topology.node
        self._group: Any = group
        self._device = device
        self._timeout = timeout
        self._marker = marker
        self._bytes_sent = 0
        self._unfinished: deque[DeviceTransfer] = deque()
        self._failure: tuple[Sequence[int], str] | None = None
        self._was_captured = False
        self.watch = Watch(timeout, self._miss, in_thread)
        others = [node for node in range(topology.num_nodes) if node != topology.node]
        tokens = torch.zeros((2, topology.num_nodes, 16), dtype=torch.uint8, device=device)
        try:  # the first exchange connects all ranks, whoever has rows for whom later
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
        coming: Sequence[tuple[int, torch.Tensor]],
        going: Sequence[tuple[int, torch.Tensor]],
    ) -> list[dist.Work]:
        """As one operation where the backend can: NCCL would wait for the peers one after the other."""
        group = self.group()
        as_one = group._get_backend(self._device).supports_coalescing
        try:
            if as_one:
                group._start_coalescing(self._device)
            works = [group.recv([part], node, 0) for node, part in coming]
            works += [group.send([part], node, 0) for node, part in going]
            return [group._end_coalescing(self._device)] if as_one else works
        except RuntimeError as error:
            reason = first_line(error)
        self.abandon()
        raise RailError(nodes, False, reason)

    def group(self) -> Any:
        """The process group.

        Raises:
            RailError: the rail is closed, or has ended.
        """
        if (failure := self.failure) is not None:
            raise failure
        if self._group is None:
            raise RailError([self._node], False, "this rank has closed its rail")
        return self._group

    def is_done_with(self, transfer: DeviceTransfer) -> None:
        """Forget a transfer. Another thread may have forgotten all."""
        with contextlib.suppress(ValueError):
            self._unfinished.remove(transfer)

    def _miss(self, nodes: Sequence[int], reason: str) -> None:
        """An exchange that no host waits for has missed its deadline."""
        self._failure = nodes, reason
        self.abandon()

    def abandon(self) -> None:
        """Something has failed: end what is under way, wherever it is. The rail is of no use any more."""
        group = self._let_go()
        if group is not None:
            self._abort(group)
            _keep(group)

    def close(self, is_stuck: bool = False) -> None:
        """See :meth:`tokenferry.rail.Rail.close`.

        A communicator that graphs hold is left alone if nothing is wrong: what it has goes with the process.
        """
        self._words.close()
        is_idle = not is_stuck and not self._unfinished and self.watch.is_idle
        group = self._let_go()
        if group is None:
            return
        if not (is_idle and self._was_captured):
            self._abort(group)
        if not is_idle or self._was_captured:
            _keep(group)

    def _let_go(self) -> Any:
        """The process group, if it is there yet, of which this rail knows nothing any more."""
        group, self._group = self._group, None
        self._unfinished.clear()
        self.watch.clear()
        return group

    def _abort(self, group: Any) -> None:
        """End what is under way, by a thread if that may last."""
        if not self._was_captured:
            _abort(group)
            return
        thread = threading.Thread(target=_abort, args=(group,), name="tokenferry rail's end", daemon=True)
        thread.start()
        thread.join(_ABORT_SECONDS)


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
        self._works: list[dist.Work] = []
        self._is_in_order = True

    def begin(self, works: list[dist.Work]) -> None:
        """The exchange is on its way."""
        self._works = works
        self._is_in_order = False

    def wait(self, node: int) -> None:
        """See :meth:`tokenferry.rail.Transfer.wait`: the current stream waits, for all that comes."""
        if self._is_in_order:
            return
        self._rail.group()
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
        self._rail.abandon()
        raise RailError(self._nodes, False, reason)

    def finish(self) -> None:
        """See :meth:`tokenferry.rail.Transfer.finish`."""
        if not self._works:
            return
        self.wait(self._nodes[0])
        self._rail.group()
        marker, started, ended, looked = self._marker, time.monotonic(), None, 0.0
        assert marker is not None  # no host waits for what is captured
        while not marker.query():
            now = time.monotonic()
            if ended is None and now - looked > _LOOK_FOR_ERRORS_EVERY:
                looked = now
                ended = now if all(work.is_completed() for work in self._works) else None
            timed_out = now - started > self._seconds
            if timed_out or (ended is not None and now - ended > _GRACE_SECONDS):
                self._rail.abandon()
                reason = f"no sign of life for {now - started:.1f} s" if timed_out else "NCCL reports an error"
                raise RailError(self._nodes, timed_out, reason)
            time.sleep(min(max(_SHORTEST_SLEEP, _SLEEP_SHARE * (now - started)), _LONGEST_SLEEP))
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


def _abort(group: Any) -> None:
    with contextlib.suppress(RuntimeError):  # Gloo has nothing to abort
        group.abort()


def _keep(group: Any) -> None:
    if group is not None:
        _FAILED_GROUPS.append(group)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))  # the interpreter's end clears the list


@contextlib.contextmanager
def _looking(device: torch.device) -> Iterator[None]:
    """A thread that asks events of a GPU, while others may capture graphs there."""
    torch.cuda.set_device(device)
    with Driver().relaxed_capture():
        torch.cuda.mem_get_info(device)  # the first call of a thread makes the GPU's context its own
        yield


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def nccl_rail(topology: Topology, key: str, timeout: float, device: torch.device) -> DeviceRail:
    """A rail of this rank's GPU.

    Args:
        topology: who is where.
        key: names the rail; equal on its ranks, and never used before.
        timeout: seconds that a wait lasts.
        device: the GPU.

    Raises:
        TokenferryError: no connection to some rank of the rail.
    """
    if not dist.is_nccl_available():
        raise TokenferryError("rails between GPUs need NCCL, which this torch has not")
    words = ProcessGroupRail(topology, key, timeout)
    store = _get_default_store()
    try:
        group = _nccl_group(PrefixStore(f"{key}/nccl", store), topology.node, topology.num_nodes, device)
        return DeviceRail(
            words, group, topology, device, timeout, torch.cuda.Event, functools.partial(_looking, device)
        )
    except RuntimeError as error:
        words.close()
        if isinstance(error, TokenferryError):
            raise
        raise TokenferryError(f"no rail between the GPUs of ranks {topology.rail}: {error}") from error


def _nccl_group(store: PrefixStore, node: int, num_nodes: int, device: torch.device) -> Any:
    """A process group of its own, so that what breaks is only that."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options._timeout = _NEVER  # the deadline is this rail's business
    with _errors_left_to_us():
        backend = ProcessGroupNCCL(store, node, num_nodes, options)
    group = dist.ProcessGroup(store, node, num_nodes)
    kind = dist.ProcessGroup.BackendType.NCCL
    group._set_default_backend(kind)
    group._register_backend(device, kind, backend)
    return group


@contextlib.contextmanager
def _errors_left_to_us() -> Iterator[None]:
    """While a group is made: what it reads from the environment."""
    with _ENVIRONMENT:
        before = {name: os.environ.get(name) for name in _ERRORS_LEFT_TO_US}
        os.environ.update(_ERRORS_LEFT_TO_US)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
