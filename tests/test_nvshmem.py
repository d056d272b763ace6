"""NVSHMEM where there is none: what is looked for, who joins with whom, whose memory is used again."""

from __future__ import annotations

import ctypes
import importlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from tests.conftest import PoolOf
from tokenferry import ArgumentError, Buffer, TokenferryError
from tokenferry.memory import nvshmem
from tokenferry.rail import carriers_of, check_carrier, nvshmem_world
from tokenferry.rail.nvshmem_world import Ranks, World, join, pool_bytes

MIB = 1 << 20
POOL = 1 << 40


class Played:
    """The library of a process."""

    def __init__(self, is_initialised: bool = False, has_memory: bool = True) -> None:
        self._is_initialised, self._has_memory = is_initialised, has_memory
        self.joined: list[tuple[int, int, bytes]] = []
        self.ids: list[bytes] = []
        self.allocated: list[int] = []

    def is_initialised(self) -> bool:
        return self._is_initialised

    def unique_id(self) -> bytes:
        self.ids.append(os.urandom(128))
        return self.ids[-1]

    def join(self, rank: int, num_ranks: int, unique_id: bytes) -> None:
        self.joined.append((rank, num_ranks, unique_id))

    def allocate(self, nbytes: int) -> int:
        if not self._has_memory:
            raise TokenferryError("NVSHMEM has no memory")
        self.allocated.append(nbytes)
        return POOL

    def prepare(self, module: int) -> None:
        raise AssertionError


def ranks_of(store: Any, prefix: str, names: list[int], number: int, timeout: float = 5.0) -> Ranks:
    return Ranks(PrefixStore(prefix, store), names, number, timeout)


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has not joined."""
    monkeypatch.setattr(nvshmem_world, "_world", None)
    monkeypatch.setattr(nvshmem_world, "_broken", "")


def _joining(rank: int, num_ranks: int, key: str) -> tuple[Any, ...]:
    store, names = _get_default_store(), list(range(num_ranks))
    environment = {"TOKENFERRY_NVSHMEM_BYTES": str(600 * MIB), "GLOO_SOCKET_IFNAME": "lo"}
    with (
        mock.patch.multiple(nvshmem_world, _world=None, _broken=""),
        mock.patch.dict(os.environ, environment),
    ):
        for name in ("NVSHMEM_SYMMETRIC_SIZE", "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"):
            os.environ.pop(name, None)
        library = Played()
        world, numbers = join(ranks_of(store, f"{key}/a", names, rank), library, 3)
        (joined,) = library.joined
        assert joined[:2] == (rank, num_ranks)
        assert numbers == names
        assert library.allocated == [600 * MIB]
        assert len(library.ids) == (rank == 0)
        assert int(os.environ["NVSHMEM_SYMMETRIC_SIZE"]) > 600 * MIB
        assert os.environ["NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME"] == "lo"
        # Again, by a group in another order.
        back = names[::-1]
        again, numbers = join(ranks_of(store, f"{key}/b", back, back.index(rank)), library, 3)
        assert again is world
        assert numbers == back
        with pytest.raises(TokenferryError, match="joined with GPU 3, not 4"):
            join(ranks_of(store, f"{key}/c", names, rank), library, 4)
        # One of them is another process by now.
        if rank == 1:
            nvshmem_world._world = None
        with pytest.raises(TokenferryError, match=r"rank 1 has joined nothing, a process joins once.*largest group"):
            join(ranks_of(store, f"{key}/d", names, rank), library, 3)
        assert len(library.joined) == 1
    return joined[2], world.key, world.rank


def test_ranks_join_once(pool_of: PoolOf) -> None:
    (first, key, rank), (second, other_key, other) = pool_of(2).run(_joining, "nvshmem")
    assert first == second
    assert len(first) == 128
    assert key == other_key
    assert (rank, other) == (0, 1)


def test_who_has_joined_by_somebody_else(nobody: None) -> None:
    library = Played(is_initialised=True)
    with pytest.raises(TokenferryError, match="rank 0: somebody else in the process has initialised it"):
        join(ranks_of(dist.HashStore(), "a", [0], 0), library, 0)
    assert not library.joined


def test_joining_that_fails_is_not_tried_again(nobody: None) -> None:
    """With other ranks NVSHMEM would be what it is already, and nobody would notice."""
    library, store = Played(has_memory=False), dist.HashStore()
    with pytest.raises(TokenferryError, match="has no memory"):
        join(ranks_of(store, "a", [0], 0), library, 0)
    with pytest.raises(TokenferryError, match="rank 0: NVSHMEM has no memory"):
        join(ranks_of(store, "b", [0], 0), Played(), 0)
    assert len(library.joined) == 1


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(TokenferryError, match="rank 5 has not told joined"):
        Ranks(dist.HashStore(), [3, 5], 0, 0.2).gather("joined", 1)


def test_ranks_tell_each_other() -> None:
    store = dist.HashStore()
    three = [ranks_of(store, "p", [0, 1, 2], number) for number in range(3)]
    for ranks in three[1:]:
        ranks.say("x", ranks.number * 10)
    assert not three[1].have_said("x")
    assert three[0].gather("x", 0) == [0, 10, 20]
    assert three[1].have_said("x")
    three[0].say_aside("over")
    three[1].say("over", True)
    three[2].say_aside("over")
    deadline = time.monotonic() + 5
    while not three[1].have_said("over"):
        assert time.monotonic() < deadline
    assert not three[1].have_said("nothing")


class _Gone:
    """A store whose server is gone."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("Broken pipe")


def test_a_store_that_is_gone_does_no_harm() -> None:
    ranks = Ranks(_Gone(), [0, 1], 0, 0.2)
    assert not ranks.have_said("over")
    ranks._try_to_say("over")


def test_memory_is_used_again_when_nobody_writes_there() -> None:
    world = World("key", 0, 0, POOL, 130 * MIB)
    assert world.region_bytes == 64 * MIB
    first, second = world.take(), world.take()
    assert [first, second] == [POOL, POOL + 64 * MIB]
    with pytest.raises(TokenferryError, match=r"memory of 2 rails is taken.*TOKENFERRY_NVSHMEM_BYTES"):
        world.take()
    is_free = False
    world.give_back(second, lambda: is_free)
    with pytest.raises(TokenferryError, match="2 rails"):
        world.take()
    with ThreadPoolExecutor(1) as pool:  # it comes back a little later
        taken = pool.submit(world.take)
        time.sleep(0.05)
        is_free = True
        assert taken.result() == second
    assert World("key", 0, 0, 0, 5 * MIB).region_bytes == 5 * MIB


def test_two_do_not_take_the_same_memory() -> None:
    """Whether it is free may take a while to find out: others find out meanwhile."""
    world = World("key", 0, 0, POOL, 128 * MIB)
    for region in (world.take(), world.take()):
        world.give_back(region, lambda: time.sleep(0.05) is None)
    with ThreadPoolExecutor(2) as pool:
        assert {*pool.map(lambda _: world.take(), range(2))} == {POOL, POOL + 64 * MIB}


@pytest.mark.parametrize("given", ["-1", "x", "1000", "1e9"])
def test_pool_that_cannot_be(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("TOKENFERRY_NVSHMEM_BYTES", given)
    with pytest.raises(ArgumentError, match="TOKENFERRY_NVSHMEM_BYTES"):
        pool_bytes()


def test_pool_that_nobody_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFERRY_NVSHMEM_BYTES", "")
    assert pool_bytes() == 256 * MIB


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


def _carrier_of_one(rank: int, num_ranks: int) -> tuple[str, float]:
    """Rank 1 has no NVSHMEM: both say so at once."""
    files = nvshmem.Files(Path("host"), Path("device")) if rank == 0 else None
    began = time.monotonic()
    with (
        mock.patch("tokenferry.rail.find_nvshmem", return_value=files),
        mock.patch("tokenferry.buffer.choose_device", return_value=mock.Mock(type="cuda", index=0)),
        pytest.raises(TokenferryError) as caught,
    ):
        Buffer(dist.group.WORLD, node=rank, carrier="nvshmem", timeout=20.0)
    return str(caught.value), time.monotonic() - began


def test_a_carrier_that_one_rank_has_not(pool_of: PoolOf) -> None:
    for text, seconds in pool_of(2).run(_carrier_of_one):
        assert "rank 1: no carrier 'nvshmem'" in text
        assert "rank 0" not in text
        assert seconds < 10


def test_structures_are_as_large_as_their_versions_say() -> None:
    sizes = [nvshmem._UniqueId, nvshmem._UniqueIdArguments, nvshmem._Arguments, nvshmem._Attributes]
    assert [ctypes.sizeof(structure) for structure in sizes] == [128, 24, 128, 144]
