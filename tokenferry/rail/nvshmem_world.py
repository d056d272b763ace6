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
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from tokenferry.errors import TokenferryError
from tokenferry.memory import nvshmem
from tokenferry.rendezvous import wait_for
from tokenferry.validation import require

POOL_VARIABLE = "TOKENFERRY_NVSHMEM_BYTES"
"""Symmetric memory of a rank, for all of its rails."""
_POOL_BYTES = 256 << 20
_LEAST_POOL_BYTES = 1 << 20
_REGION_BYTES = 64 << 20
"""Of a rail, at most; a pool of less is one region."""
_RETURN_SECONDS = 1.0
"""That the other ranks' word, and their last puts, take to arrive."""
_INTERFACE_VARIABLE = "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"
_SIZE_VARIABLE = "NVSHMEM_SYMMETRIC_SIZE"
_SIZE = 1 << 30
"""That NVSHMEM has if nobody says otherwise."""


class Ranks:
    """What ranks tell each other through the store of ``torch.distributed``.

    Args:
        store: with a prefix that nobody else uses.
        names: of the ranks, as the caller's group counts them.
        number: of this rank among these.
        timeout: seconds to wait for them.
    """

    def __init__(self, store: Any, names: Sequence[int], number: int, timeout: float) -> None:
        self._store = store
        self._names = names
        self.number = number
        self._timeout = timeout

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._names)

    def gather(self, what: str, value: object) -> list[Any]:
        """What all of them say, by number."""
        self.say(what, value)
        return [self.hear(what, number) for number in range(self.count)]

    def agree(self, what: str, problem: str, value: object) -> list[Any]:
        """As :meth:`gather`, if no rank has a problem.

        Raises:
            TokenferryError: on every rank, the problems of all.
        """
        told = self.gather(what, [problem, value])
        if problems := [f"rank {rank}: {of}" for rank, (of, _) in zip(self._names, told, strict=True) if of]:
            raise TokenferryError(f"NVSHMEM: {', '.join(problems)}")
        return [of_rank for _, of_rank in told]

    def say(self, what: str, value: object) -> None:
        """Let all know."""
        self._store.set(f"{what}/{self.number}", json.dumps(value))

    def hear(self, what: str, number: int) -> Any:
        """What one of them says."""
        key, who = f"{what}/{number}", f"NVSHMEM: rank {self._names[number]} has not told {what}"
        try:
            if wait_for(self._store, {number: key}, self._timeout):
                raise TokenferryError(f"{who} within {self._timeout:g} s")
            return json.loads(self._store.get(key))
        except dist.DistError as error:
            raise TokenferryError(f"{who}: {error}") from error

    def say_aside(self, what: str) -> None:
        """Let all know, some time soon: the store may be waiting for something else. Not if it is gone."""
        thread = threading.Thread(target=self._try_to_say, args=(what,), name="tokenferry rail's end", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # no more threads, or the interpreter is going
            self._try_to_say(what)

    def _try_to_say(self, what: str) -> None:
        try:
            self.say(what, True)
        except RuntimeError:  # then the others will not use their memory again
            return

    def have_said(self, what: str) -> bool:
        """Whether all have; not if the store is gone."""
        try:
            return bool(self._store.check([f"{what}/{number}" for number in range(self.count)]))
        except RuntimeError:
            return False


class World:
    """NVSHMEM as this process has joined it.

    Args:
        key: names this joining.
        rank: of this process.
        device: index of the GPU that it has joined with.
        pool: the address of symmetric memory.
        pool_bytes: of it.
    """

    def __init__(self, key: str, rank: int, device: int, pool: int, pool_bytes: int) -> None:
        self.key = key
        self.rank = rank
        self.device = device
        self.pool = pool
        self.region_bytes = min(_REGION_BYTES, pool_bytes)
        self._is_free: list[Callable[[], bool]] = [_always] * (pool_bytes // self.region_bytes)
        self._lock = threading.Lock()

    def take(self) -> int:
        """The address of a region for a rail. Those of rails that have just been closed everywhere are waited for.

        Raises:
            TokenferryError: all are in use.
        """
        deadline = time.monotonic() + _RETURN_SECONDS
        while (region := self._try_to_take()) is None:
            if time.monotonic() > deadline or all(is_free is _never for is_free in self._is_free):
                break
            time.sleep(1e-3)
        if region is not None:
            return region
        count = len(self._is_free)
        raise TokenferryError(
            f"NVSHMEM: the memory of {count} rails is taken, by Buffers that are not destroyed on all ranks, or have "
            f"failed; {POOL_VARIABLE} gives more than {count * self.region_bytes} bytes from the start"
        )

    def _try_to_take(self) -> int | None:
        for number in range(len(self._is_free)):
            is_free = self._is_free[number]
            if not is_free():  # which may wait for the GPU
                continue
            with self._lock:
                if self._is_free[number] is is_free:
                    self._is_free[number] = _never
                    return self.pool + number * self.region_bytes
        return None

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
_broken = ""
"""Why this process can never join any more."""


def pool_bytes(_: None = None) -> int:
    """Symmetric memory that a rank is to have.

    Raises:
        ArgumentError: the environment names none that can be.
    """
    given = os.environ.get(POOL_VARIABLE) or str(_POOL_BYTES)
    nbytes = int(given) if given.isdecimal() else 0
    require(nbytes >= _LEAST_POOL_BYTES, POOL_VARIABLE, repr(given), f"bytes, {_LEAST_POOL_BYTES} or more")
    return nbytes


def join(ranks: Ranks, library: nvshmem.Library, device: int) -> tuple[World, list[int]]:
    """Join NVSHMEM with these ranks, or find that this process and they have.

    Args:
        ranks: all of a Buffer.
        library: of this process.
        device: index of the GPU, the current one.

    Returns:
        What this process has joined, and the numbers there of these ranks.

    Raises:
        TokenferryError: some have joined with others, with another GPU or by themselves, or joining has failed.
    """
    world = _world
    problem = _broken
    if world is None and not problem and library.is_initialised():
        problem = "somebody else in the process has initialised it"
    if world is not None and world.device != device:
        problem = f"the process has joined with GPU {world.device}, not {device}"
    told = ranks.agree("joined", problem, ["", 0] if world is None else [world.key, world.rank])
    if any(key != told[0][0] for key, _ in told):
        listed = ", ".join(f"rank {rank} has joined {key[:16] or 'nothing'}" for rank, (key, _) in enumerate(told))
        raise TokenferryError(
            f"NVSHMEM: {listed}, a process joins once, with all ranks of the first Buffer that has this carrier: "
            "make that one of the largest group"
        )
    if world is None:
        return _join(ranks, library, device), list(range(ranks.count))
    return world, [rank for _, rank in told]


def _join(ranks: Ranks, library: nvshmem.Library, device: int) -> World:
    global _world, _broken
    nbytes = pool_bytes()
    if interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        os.environ.setdefault(_INTERFACE_VARIABLE, interface)
    if nbytes > _SIZE // 2:
        os.environ.setdefault(_SIZE_VARIABLE, str(nbytes + _SIZE))
    if ranks.number == 0:
        ranks.say("id", library.unique_id().hex())
    key = ranks.hear("id", 0)
    with _joining:
        if _world is not None or _broken:
            raise TokenferryError("NVSHMEM: two Buffers of one process have joined at a time")
        try:
            library.join(ranks.number, ranks.count, bytes.fromhex(key))
            pool = library.allocate(nbytes)
        except TokenferryError as error:
            _broken = str(error)
            raise
        _world = World(key, ranks.number, device, pool, nbytes)
        return _world
