"""What a rank has done and for whom it has waited: counted always, in plain integers.

A rank is *idle* while it can neither stage nor read anything; the ranks that keep it from going on are *waited for*.
On CPU ranks both come from the waiting loop of the heap, between nodes also from waits on the rail. A *wait* is the
idle time of one phase of an operation (the agreement, the rows) for one rank, so several may be waited for at a time,
and their waits may add up to more than the idle time. On GPUs the kernels wait, and count for whom, in memory of the
device that is read when somebody asks; idle is what the host waits for the counts of a dispatch.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Waits:
    """Some waits, in nanoseconds."""

    count: int = 0
    total_ns: int = 0
    longest_ns: int = 0

    def __add__(self, other: Waits) -> Waits:
        """Both, where none is in the other."""
        return Waits(self.count + other.count, self.total_ns + other.total_ns, max(self.longest_ns, other.longest_ns))


@dataclass(frozen=True)
class PeerStats:
    """One kind of operation, as far as it concerns one other rank.

    Attributes:
        rank: the other rank.
        waits: for it; on a GPU those of the kernels.
        bytes_read: rows of it that this rank has read from shared memory, with what travels beside them.
    """

    rank: int
    waits: Waits
    bytes_read: int


@dataclass(frozen=True)
class OperationStats:
    """One kind of operation.

    Attributes:
        kind: a name of :class:`tokenferry.dataplane.OperationKind`, in lower case.
        count: calls that returned.
        call_ns: time in these calls, on the host, in nanoseconds; without hooks.
        idle: time in which the rank (on a GPU: its host) could do nothing but wait, whoever for.
        bytes_staged: rows that this rank has put into shared memory, once for all readers, with what travels beside
            them. 0 on GPUs.
        peers: every rank of the group; of this rank itself all is 0, and on GPUs ``bytes_read``.
    """

    kind: str
    count: int
    call_ns: int
    idle: Waits
    bytes_staged: int
    peers: tuple[PeerStats, ...]


@dataclass(frozen=True)
class BufferStats:
    """What one rank counted since its Buffer was made, or since the counts were reset.

    Attributes:
        rank: that counted.
        num_ranks: of the group.
        operations: the kinds that occurred.
        rail_bytes_sent: bytes sent to other nodes since the Buffer was made.
    """

    rank: int
    num_ranks: int
    operations: tuple[OperationStats, ...]
    rail_bytes_sent: int

    def as_dict(self) -> dict[str, Any]:
        """The same as dicts, lists and integers, for JSON."""
        listed: dict[str, Any] = dataclasses.asdict(self)
        return listed

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> BufferStats:
        """What :meth:`as_dict` returned, also if JSON has made lists of tuples since."""
        return cls(**{**given, "operations": tuple(_operation(**of) for of in given["operations"])})

    def of(self, kind: str) -> OperationStats:
        """One kind of operation; all 0 if it did not occur."""
        for operation in self.operations:
            if operation.kind == kind:
                return operation
        return _snapshot(kind, _Counts(), self.num_ranks, {})

    def waited_for(self) -> list[int]:
        """[R]: nanoseconds that this rank has waited for each rank, over all kinds of operations."""
        return [sum(of.peers[rank].waits.total_ns for of in self.operations) for rank in range(self.num_ranks)]


def _operation(idle: Mapping[str, int], peers: Sequence[Mapping[str, Any]], **rest: Any) -> OperationStats:
    """One kind of operation out of the dict that it has become."""
    of_peers = tuple(PeerStats(**{**peer, "waits": Waits(**peer["waits"])}) for peer in peers)
    return OperationStats(idle=Waits(**idle), peers=of_peers, **rest)


class _Tally:
    """Waits being counted."""

    __slots__ = ("count", "longest_ns", "total_ns")

    def __init__(self) -> None:
        self.count = self.total_ns = self.longest_ns = 0

    def add(self, nanoseconds: int) -> None:
        self.count += 1
        self.total_ns += nanoseconds
        self.longest_ns = max(self.longest_ns, nanoseconds)

    def waits(self) -> Waits:
        return Waits(self.count, self.total_ns, self.longest_ns)


class _Counts:
    """One kind of operation being counted."""

    __slots__ = ("bytes_read", "bytes_staged", "call_ns", "count", "idle", "waits")

    def __init__(self) -> None:
        self.count = self.call_ns = self.bytes_staged = 0
        self.idle = _Tally()
        self.waits: dict[int, _Tally] = {}
        self.bytes_read: dict[int, int] = {}


class Recorder:
    """Counts what one rank does. Calls of several threads may overlap.

    Kinds are numbers of :class:`tokenferry.dataplane.OperationKind`, ranks those of the group.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kinds: dict[int, _Counts] = {}

    def _of(self, kind: int) -> _Counts:
        counts = self._kinds.get(kind)
        if counts is None:
            counts = self._kinds[kind] = _Counts()
        return counts

    def called(self, kind: int, nanoseconds: int) -> None:
        """Count a call that returned after so long."""
        with self._lock:
            counts = self._kinds.get(kind) or self._of(kind)
            counts.count += 1
            counts.call_ns += nanoseconds

    def staged(self, kind: int, nbytes: int) -> None:
        """Count bytes put where peers read them."""
        with self._lock:
            self._of(kind).bytes_staged += nbytes

    def read(self, kind: int, rank: int, nbytes: int) -> None:
        """Count bytes read from a rank."""
        with self._lock:
            read = self._of(kind).bytes_read
            read[rank] = read.get(rank, 0) + nbytes

    def waited(self, kind: int, idle_ns: int, for_ranks: Mapping[int, int]) -> None:
        """Count one wait, and for how much of it each rank was missing, in nanoseconds."""
        with self._lock:
            counts = self._kinds.get(kind) or self._of(kind)
            counts.idle.add(idle_ns)
            for rank, nanoseconds in for_ranks.items():
                counts.waits.setdefault(rank, _Tally()).add(nanoseconds)

    def snapshot(
        self,
        rank: int,
        names: Mapping[int, str],
        num_ranks: int,
        rail_bytes: int,
        on_device: Mapping[int, Mapping[int, Waits]] | None = None,
    ) -> BufferStats:
        """What has been counted; ``names`` are those of the kinds.

        ``on_device``: waits that kernels have counted, by kind and rank; also of operations that no call has begun,
        as those of a graph.
        """
        kernels = on_device or {}
        with self._lock:
            operations = tuple(
                _snapshot(
                    names.get(kind, str(kind)), self._kinds.get(kind, _Counts()), num_ranks, kernels.get(kind, {})
                )
                for kind in sorted({*self._kinds, *kernels})
            )
        return BufferStats(rank, num_ranks, operations, rail_bytes)

    def reset(self) -> None:
        """Begin again at 0."""
        with self._lock:
            self._kinds.clear()


def _snapshot(name: str, counts: _Counts, num_ranks: int, on_device: Mapping[int, Waits]) -> OperationStats:
    none = _Tally()
    peers = tuple(
        PeerStats(
            rank, counts.waits.get(rank, none).waits() + on_device.get(rank, Waits()), counts.bytes_read.get(rank, 0)
        )
        for rank in range(num_ranks)
    )
    return OperationStats(name, counts.count, counts.call_ns, counts.idle.waits(), counts.bytes_staged, peers)
