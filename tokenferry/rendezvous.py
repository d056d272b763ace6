"""How the ranks of a Buffer find each other, and meet again: gathers of small values, never of rows.

Construction gathers through the process group. Afterwards ranks meet in the store of ``torch.distributed``, each for
itself and up to a deadline: a collective of a group with dead ranks would not end.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from tokenferry.errors import ArgumentError, PeerLostError, PeerTimeoutError, TokenferryError

COMPILING_SECONDS = 300.0
"""What ranks that compile are given beyond the deadline."""
_FAREWELL_SECONDS = 2.0
_SHORTEST_SLEEP, _LONGEST_SLEEP = 0.0002, 0.005
_ENTRY = re.compile(r"([^/]+)/(\d+)/(.*)")


class Rendezvous(NamedTuple):
    """A group of ranks that can exchange Python values."""

    rank: int
    num_ranks: int
    all_gather: Callable[[Any], list[Any]]
    """Collective: returns what every rank passed, by rank."""
    store: Store | None
    """That all ranks reach; None with mpi4py."""

    def without_group(self) -> Rendezvous:
        """For :class:`Meetings`, which gather in the store where there is one: nothing of it holds the group."""
        return self if self.store is None else self._replace(all_gather=_only_in_the_store)


def _only_in_the_store(value: object) -> list[Any]:
    raise AssertionError("ranks that have met gather in the store")


def meet(group: dist.ProcessGroup | None, comm: Any | None, device: torch.device) -> Rendezvous:
    """The rendezvous of a process group of any backend, or of an mpi4py communicator.

    Args:
        group: or None.
        comm: or None; used where there is no group.
        device: of this rank, which need not be the current one: NCCL takes every rank for one GPU.

    Raises:
        ArgumentError: neither is given, or both, or something else, or this process is not in the group.
    """
    if group is not None and comm is not None:
        raise ArgumentError("comm", type(comm).__name__, "None with a group")
    if group is not None:
        if not isinstance(group, dist.ProcessGroup) and group is not dist.GroupMember.NON_GROUP_MEMBER:
            raise ArgumentError("group", type(group).__name__, "a torch.distributed process group")
        rank, num_ranks = dist.get_rank(group), dist.get_world_size(group)
        if rank < 0:
            raise ArgumentError("group", "a group without this process", "a group that this process is in")

        def all_gather(value: Any) -> list[Any]:
            values: list[Any] = [None] * num_ranks
            is_on_gpu = device.type == "cuda" and torch.cuda.is_available()
            with torch.cuda.device(device) if is_on_gpu else contextlib.nullcontext():
                dist.all_gather_object(values, value, group=group)
            return values

        return Rendezvous(rank, num_ranks, all_gather, _get_default_store())  # of all groups
    if comm is None:
        raise ArgumentError("group", None, "a torch.distributed process group (or comm=, an mpi4py communicator)")
    if not all(hasattr(comm, name) for name in ("Get_rank", "Get_size", "allgather")):
        raise ArgumentError("comm", type(comm).__name__, "an mpi4py communicator")
    return Rendezvous(int(comm.Get_rank()), int(comm.Get_size()), lambda value: list(comm.allgather(value)), None)


class Meetings:
    """Where the ranks of a Buffer meet after its construction: one meeting after the other, the same on all ranks.

    Args:
        found: the rendezvous of its construction; with mpi4py there is no deadline.
        key: never used before in the store.
        seconds: to wait for another rank.
    """

    def __init__(self, found: Rendezvous, key: str, seconds: float) -> None:
        self._found = found
        self._key = key
        self._seconds = seconds
        self._number = 0

    def gather(
        self, operation: str, value: object = None, *, ranks: Iterable[int] | None = None, more_seconds: float = 0.0
    ) -> dict[int, Any]:
        """What ranks pass, by rank. Collective among them.

        Args:
            operation: what for.
            value: of this rank; JSON holds it.
            ranks: who meets, this rank among them; by default all.
            more_seconds: to wait, beyond the deadline.

        Raises:
            PeerTimeoutError: ranks did not come.
            PeerLostError: the store is gone, which lives in the process of some rank or of a launcher.
        """
        store, rank = self._found.store, self._found.rank
        if store is None:
            return dict(enumerate(self._found.all_gather(value)))
        self._number += 1
        names = {
            other: self._name(self._number, other)
            for other in (range(self._found.num_ranks) if ranks is None else ranks)
        }
        seconds = self._seconds + more_seconds
        try:
            store.set(names[rank], json.dumps(value))
            if missing := wait_for(store, names, seconds):
                reason = f"did not come within {seconds:g} s"
                raise PeerTimeoutError(operation, self._number, missing, reason)
            found = {other: json.loads(store.get(name)) for other, name in names.items()}
        except dist.DistError as error:
            others = [other for other in names if other != rank]
            raise PeerLostError(operation, self._number, others, f"the store of the ranks is gone: {error}") from None
        # The process that has the store may end once it has left here: not before all have what they came for.
        with contextlib.suppress(dist.DistError, NotImplementedError):  # gone already, or it keeps all
            store.set(f"{names[rank]}/left", "")
            wait_for(store, {other: f"{name}/left" for other, name in names.items()}, min(seconds, _FAREWELL_SECONDS))
            for key in (before := self._name(self._number - 1, rank)), f"{before}/left":
                store.delete_key(key)  # all have been to the next one
        return found

    def _name(self, number: int, rank: int) -> str:
        return f"{self._key}/meeting {number}/{rank}"


def wait_for(store: Store, names: dict[int, str], seconds: float) -> list[int]:
    """Wait until the store has these names, so many seconds at most; returns the ranks whose name it has not."""
    end, pause = time.monotonic() + seconds, _SHORTEST_SLEEP
    while not store.check(list(names.values())):
        if time.monotonic() > end:
            return [rank for rank, name in names.items() if not store.check([name])]
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_SLEEP)
    return []


class ExchangeStore(Store):
    """Where the ranks of one Buffer exchange what maps their memory, for torch, which names an entry by a number.

    The number counts the exchanges of a process, whomever they are with. So ranks of which one had been in another
    group would wait for entries that never come. In here it counts the exchanges of this store.

    Args:
        store: that the ranks reach.
        key: never used before in it.
        ranks: whose entries they are, as errors name them.
        seconds: to wait for the others in an exchange.
    """

    def __init__(self, store: Store, key: str, ranks: Sequence[int], seconds: float) -> None:
        super().__init__()
        self._store = store
        self._key = key
        self._ranks = ranks
        self._seconds = seconds
        self._numbers: dict[str, int] = {}
        self._ends: dict[int, float] = {}

    def _entry(self, name: str) -> tuple[str, int, str]:
        """What an entry is called here, the number of its exchange, and what it is of that: a rank, mostly."""
        found = _ENTRY.fullmatch(name)
        if found is None:
            raise TokenferryError(f"torch exchanges {name!r}, where '<what>/<number>/<rank>' is expected")
        what, number, of = found.groups()
        mine = self._numbers.setdefault(number, len(self._numbers))
        self._ends.setdefault(mine, time.monotonic() + self._seconds)
        return f"{self._key}/{what}/{mine}/{of}", mine, of

    def set(self, key: str, value: Any) -> None:
        """See torch."""
        self._store.set(self._entry(key)[0], value)

    def add(self, key: str, value: int) -> int:
        """See torch, whose barriers count by it."""
        return self._store.add(self._entry(key)[0], value)

    def get(self, key: str) -> bytes:
        """See torch."""
        return self._store.get(self._entry(key)[0])

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """See torch; waits as :meth:`wait` does."""
        self.wait(keys)
        return [self.get(key) for key in keys]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """See torch; until the deadline of the exchange.

        Raises:
            PeerTimeoutError: ranks did not come.
        """
        entries = [self._entry(key) for key in keys]
        seconds = self._ends[entries[0][1]] - time.monotonic() if entries else 0.0
        missing = wait_for(self._store, {place: name for place, (name, _, _) in enumerate(entries)}, seconds)
        if missing:
            named = {of for _, _, of in (entries[place] for place in missing)}
            are_ranks = all(of.isdecimal() for of in named)
            ranks = sorted(self._ranks[int(of)] for of in named) if are_ranks else list(self._ranks)
            reason = f"did not map their memory within {self._seconds:g} s"
            raise PeerTimeoutError("sync", len(self._numbers), ranks, reason)
