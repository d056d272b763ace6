"""NVSHMEM where there is none: what is looked for, who joins with whom, whose memory is used again."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from tokenferry import ArgumentError, TokenferryError
from tokenferry.memory import nvshmem
from tokenferry.rail import carriers_of, check_carrier, nvshmem_world
from tokenferry.rail.nvshmem_world import Ranks, World, join, pool_bytes

MIB = 1 << 20


class Played:
    """The library, of which there is one in each of these ranks."""

    def __init__(self) -> None:
        self.joined: list[tuple[int, int, bytes]] = []
        self.allocated: list[int] = []

    def unique_id(self) -> bytes:
        return bytes(range(128))

    def join(self, rank: int, num_ranks: int, unique_id: bytes) -> None:
        self.joined.append((rank, num_ranks, unique_id))

    def allocate(self, nbytes: int) -> int:
        self.allocated.append(nbytes)
        return 1 << 40

    def prepare(self, module: int) -> None:
        raise AssertionError


def in_ranks(count: int, work: Callable[[Ranks], Any], prefix: str, store: Any, timeout: float = 10.0) -> list[Any]:
    """What ranks return, each of them a thread, that is process, of its own."""
    with ThreadPoolExecutor(count) as pool:
        made = [Ranks(dist.PrefixStore(prefix, store), number, count, timeout) for number in range(count)]
        return list(pool.map(work, made))


def test_join_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank, since a process joins once: then again, and with others."""
    monkeypatch.setattr(nvshmem_world, "_world", None)
    monkeypatch.setenv("TOKENFERRY_NVSHMEM_BYTES", str(200 * MIB))
    store, library = dist.HashStore(), Played()
    world, numbers = join(Ranks(dist.PrefixStore("a", store), 0, 1, 5.0), lambda: library)
    assert numbers == [0]
    assert library.joined == [(0, 1, bytes(range(128)))]
    assert library.allocated == [200 * MIB]
    again, numbers = join(Ranks(dist.PrefixStore("b", store), 0, 1, 5.0), lambda: pytest.fail("joined already"))
    assert again is world
    assert numbers == [0]
    # A group in which this process is rank 0, and another one has joined by its side, in another place.
    other = Ranks(dist.PrefixStore("c", store), 1, 2, 5.0)
    other.say("joined/1", [world.key, 7, 200 * MIB])
    assert join(Ranks(dist.PrefixStore("c", store), 0, 2, 5.0), lambda: library)[1] == [0, 7]


@pytest.mark.parametrize(
    ("theirs", "text"),
    [
        (["", 0, 256 * MIB], "NVSHMEM is not the same on all ranks .* rank 1: none.*largest group"),
        (["other", 0, 256 * MIB], "NVSHMEM is not the same on all ranks .* rank 1: other"),
        (["mine", 1, 64 * MIB], f"TOKENFERRY_NVSHMEM_BYTES is not the same .* rank 1: {64 * MIB}"),
    ],
)
def test_others_have_joined_elsewhere(monkeypatch: pytest.MonkeyPatch, theirs: list[Any], text: str) -> None:
    monkeypatch.setattr(nvshmem_world, "_world", World(Played(), "mine", 0, 1 << 40, 256 * MIB))
    store = dist.HashStore()
    Ranks(store, 1, 2, 5.0).say("joined/1", theirs)
    with pytest.raises(TokenferryError, match=text):
        join(Ranks(store, 0, 2, 5.0), lambda: pytest.fail("must not join"))


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(TokenferryError, match=r"rank 1 .* joined"):
        Ranks(dist.HashStore(), 0, 2, 0.2).gather("joined", 1)


def test_ranks_tell_each_other() -> None:
    store = dist.HashStore()
    assert in_ranks(3, lambda ranks: ranks.gather("x", ranks.number * 10), "p", store) == [[0, 10, 20]] * 3
    ranks = Ranks(dist.PrefixStore("p", store), 0, 3, 1.0)
    assert ranks.has_said(["x/0", "x/2"])
    assert not ranks.has_said(["x/0", "y/2"])


def test_memory_is_used_again_when_nobody_writes_there() -> None:
    world = World(Played(), "key", 0, 1 << 40, 130 * MIB)
    assert world.region_bytes == 64 * MIB
    first, second = world.take(), world.take()
    assert [first, second] == [1 << 40, (1 << 40) + 64 * MIB]
    with pytest.raises(TokenferryError, match=r"2 rails have all of the memory.*TOKENFERRY_NVSHMEM_BYTES"):
        world.take()
    is_free = False
    world.give_back(second, lambda: is_free)
    with pytest.raises(TokenferryError, match="2 rails"):
        world.take()
    is_free = True
    assert world.take() == second
    assert World(Played(), "key", 0, 0, 5 * MIB).region_bytes == 5 * MIB


@pytest.mark.parametrize("given", ["-1", "x", "1000", "1e9"])
def test_pool_that_cannot_be(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TOKENFERRY_NVSHMEM_BYTES", given)
    with pytest.raises(ArgumentError, match="TOKENFERRY_NVSHMEM_BYTES"):
        pool_bytes()


def test_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVSHMEM_LIB_DIR", str(tmp_path))
    before = nvshmem.find()
    assert before is None or before.host.parent != tmp_path
    for name in ("libnvshmem_host.so.3", "libnvshmem_device.bc"):
        (tmp_path / name).touch()
    files = nvshmem.find()
    assert files == (tmp_path / "libnvshmem_host.so.3", tmp_path / "libnvshmem_device.bc")
    with pytest.raises(TokenferryError, match="cannot load NVSHMEM"):
        nvshmem.Nvshmem(files)
    importlib.import_module("tokenferry.rail.nvshmem")  # whose name is that of the module asked here
    assert carriers_of("cuda") == ["process_group", "nvshmem"]
    assert carriers_of("cpu") == ["process_group"]
    assert check_carrier("carrier", "nvshmem", "cuda") == "nvshmem"
    with pytest.raises(ArgumentError, match=r"carriers that are here for ranks on cpu: process_group$"):
        check_carrier("carrier", "nvshmem", "cpu")


def test_structures_are_as_large_as_their_versions_say() -> None:
    sizes = [nvshmem._UniqueId, nvshmem._UniqueIdArguments, nvshmem._Arguments, nvshmem._Attributes]
    assert [ctypes.sizeof(structure) for structure in sizes] == [128, 24, 128, 144]
