"""NVSHMEM as this process has joined it, and its memory.

All ranks of the first Buffer that asks for it join NVSHMEM, which is initialised once in a process: ranks of later
Buffers must be among them. Whoever joined stays a member until the process ends. Memory for all rails is allocated
then, and regions of it are given to one after the other: to a further rail only when no rank of the rail before can
write there any more. The memory of a rail that has failed is not used again.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from tokenferry.errors import TokenferryError
from tokenferry.memory import nvshmem
from tokenferry.validation import require

POOL_VARIABLE = "TOKENFERRY_NVSHMEM_BYTES"
"""Symmetric memory of a rank, for all of its rails."""
_POOL_BYTES = 256 << 20
_LEAST_POOL_BYTES = 1 << 20
_REGION_BYTES = 64 << 20
"""Of a rail, at most; a pool of less is one region."""
_LONGEST_WAIT = 365 * 86400.0
"""Seconds."""
_INTERFACE_VARIABLE = "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"
_SIZE_VARIABLE = "NVSHMEM_SYMMETRIC_SIZE"
_SIZE = 1 << 30
"""That NVSHMEM has if nobody says otherwise."""


class Ranks:
    """What ranks tell each other through the store of ``torch.distributed``.

    Args:
        store: with a prefix that nobody else uses.
        number: of this rank.
        count: how many there are.
        timeout: seconds to wait for them.
    """

    def __init__(self, store: Any, number: int, count: int, timeout: float) -> None:
        self._store = store
        self.number = number
        self.count = count
        self._timeout = timedelta(seconds=min(timeout, _LONGEST_WAIT))

    def gather(self, name: str, value: object) -> list[Any]:
        """What all of them say, by number."""
        self.say(f"{name}/{self.number}", value)
        return [self.hear(f"{name}/{number}", f"rank {number} of these") for number in range(self.count)]

    def say(self, name: str, value: object) -> None:
        """Let all know."""
        self._store.set(name, json.dumps(value))

    def hear(self, name: str, who: str) -> Any:
        """What somebody says."""
        try:
            self._store.wait([name], self._timeout)
            return json.loads(self._store.get(name))
        except RuntimeError as error:
            raise TokenferryError(f"NVSHMEM: {who} has not told {name}: {error}") from error

    def has_said(self, names: Sequence[str]) -> bool:
        """Whether all of this is known; not if the store is gone."""
        try:
            return bool(self._store.check(list(names)))
        except RuntimeError:
            return False


class World:
    """NVSHMEM as this process has joined it.

    Args:
        library: that has been joined.
        key: names this joining.
        rank: of this process.
        pool: the address of symmetric memory.
        pool_bytes: of it.
    """

    def __init__(self, library: nvshmem.Library, key: str, rank: int, pool: int, pool_bytes: int) -> None:
        self.library = library
        self.key = key
        self.rank = rank
        self.pool = pool
        self.region_bytes = min(_REGION_BYTES, pool_bytes)
        self._is_free: list[Callable[[], bool]] = [_always] * (pool_bytes // self.region_bytes)
        self._lock = threading.Lock()

    def take(self) -> int:
        """The address of a region for a rail.

        Raises:
            TokenferryError: all are in use.
        """
        with self._lock:
            for number, is_free in enumerate(self._is_free):
                if is_free():
                    self._is_free[number] = _never
                    return self.pool + number * self.region_bytes
        count = len(self._is_free)
        raise TokenferryError(
            f"NVSHMEM: {count} rails have all of the memory: destroy a Buffer on all ranks, or set {POOL_VARIABLE} "
            f"to more than {count * self.region_bytes}"
        )

    def give_back(self, region: int, is_free: Callable[[], bool]) -> None:
        """Nothing here writes to a region any more; ``is_free``: nor does any other rank."""
        with self._lock:
            self._is_free[(region - self.pool) // self.region_bytes] = is_free


def _always() -> bool:
    return True


def _never() -> bool:
    return False


_joining = threading.Lock()
_world: World | None = None


def pool_bytes(_: None = None) -> int:
    """Symmetric memory that a rank is to have."""
    given = os.environ.get(POOL_VARIABLE, str(_POOL_BYTES))
    nbytes = int(given) if given.isdecimal() else 0
    require(nbytes >= _LEAST_POOL_BYTES, POOL_VARIABLE, repr(given), f"bytes, {_LEAST_POOL_BYTES} or more")
    return nbytes


def join(ranks: Ranks, library: Callable[[], nvshmem.Library]) -> tuple[World, list[int]]:
    """Join NVSHMEM with these ranks, or find that this process and they have.

    Returns:
        What this process has joined, and the numbers there of these ranks.

    Raises:
        TokenferryError: some have joined with others.
    """
    global _world
    with _joining:
        nbytes = pool_bytes()
        mine = ["", 0] if _world is None else [_world.key, _world.rank]
        told = ranks.gather("joined", [*mine, nbytes])
        for name, column in ((POOL_VARIABLE, 2), ("NVSHMEM", 0)):
            if any(of_rank[column] != told[0][column] for of_rank in told):
                listed = ", ".join(f"rank {rank}: {of_rank[column] or 'none'}" for rank, of_rank in enumerate(told))
                raise TokenferryError(
                    f"{name} is not the same on all ranks ({listed}): a process joins NVSHMEM once, with all ranks "
                    "of the first Buffer that has this carrier; make that one of the largest group"
                )
        if _world is None:
            _world = _joined(ranks, library(), nbytes)
            return _world, list(range(ranks.count))
        return _world, [of_rank[1] for of_rank in told]


def _joined(ranks: Ranks, library: nvshmem.Library, nbytes: int) -> World:
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        os.environ.setdefault(_INTERFACE_VARIABLE, interface)
    if nbytes > _SIZE // 2:
        os.environ.setdefault(_SIZE_VARIABLE, str(nbytes + _SIZE))
    if ranks.number == 0:
        ranks.say("id", library.unique_id().hex())
    key = ranks.hear("id", "rank 0")
    library.join(ranks.number, ranks.count, bytes.fromhex(key))
    return World(library, key, ranks.number, library.allocate(nbytes), nbytes)
