"""Buffers on parts of the world, and several Buffers at a time."""

from __future__ import annotations

import time

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store, _get_default_store

from tests.cases import TIMEOUT, Case, Scenario, check_works
from tests.conftest import PoolOf
from tokenferry import ArgumentError, Buffer, PeerTimeoutError, TokenferryError
from tokenferry.rendezvous import ExchangeStore

CASE = Case(tokens=(9, 0, 20), num_topk=4, bias="one")
OTHER = Case(tokens=(2, 14), num_topk=2, routing="sparse", seed=5)


def check_parts(rank: int, num_ranks: int, parts: tuple[tuple[int, ...], ...], device: str = "cpu") -> None:
    """Every part has a Buffer of its own; a rank may be in none."""
    groups = [dist.new_group(list(part)) for part in parts]
    for part, group in zip(parts, groups, strict=True):
        if rank not in part:
            continue
        with Buffer(group, timeout=TIMEOUT, device=device) as buffer:
            assert (buffer.rank, buffer.group_size) == (part.index(rank), len(part))
            assert buffer.group is group
            Scenario(CASE, buffer.rank, buffer.group_size, device).check_all(buffer)
    dist.barrier()


@pytest.mark.parametrize(
    "parts",
    [((0, 1, 2),), ((1, 2), (0, 4)), ((0, 2, 4), (1, 3)), ((3,),), ((4, 1),)],
    ids=str,
)
def test_sub_groups(pool_of: PoolOf, parts: tuple[tuple[int, ...], ...]) -> None:
    parts = tuple(tuple(sorted(part)) for part in parts)  # torch numbers a group's ranks in ascending order
    pool_of(5).run(check_parts, parts)


def check_overlapping(rank: int, num_ranks: int, device: str = "cpu") -> None:
    """Rows and columns of a 2 x 2 mesh, both alive, as expert and tensor parallel groups are."""
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    with (
        Buffer(rows[rank // 2], timeout=TIMEOUT, device=device) as across,
        Buffer(columns[rank % 2], 65536, timeout=TIMEOUT, device=device) as down,
        Buffer(dist.group.WORLD, timeout=TIMEOUT, device=device) as whole,
    ):
        scenarios = [
            (buffer, Scenario(case, buffer.rank, buffer.group_size, device))
            for buffer, case in ((across, CASE), (down, OTHER), (whole, CASE))
        ]
        results = [scenario.dispatch(buffer) for buffer, scenario in scenarios]
        for (buffer, scenario), result in reversed(list(zip(scenarios, results, strict=True))):
            scenario.check_dispatch(result)
            scenario.check_combine(scenario.combine(buffer, result[4]))


def test_buffers_on_overlapping_groups(pool_of: PoolOf) -> None:
    pool_of(4).run(check_overlapping)


def _same_group(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as first, Buffer(dist.group.WORLD, 128, timeout=TIMEOUT) as second:
        one, two = Scenario(CASE, rank, num_ranks), Scenario(OTHER, rank, num_ranks)
        result_one, result_two = one.dispatch(first), two.dispatch(second)
        two.check_dispatch(result_two)
        two.check_combine(two.combine(first, result_two[4]))  # a handle belongs to a group, not to a Buffer
        one.check_combine(one.combine(second, result_one[4]))
        first.destroy()
        check_works(second, OTHER)


def test_two_buffers_on_the_same_group(pool_of: PoolOf) -> None:
    pool_of(3).run(_same_group)


def _interleaved(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as first, Buffer(dist.group.WORLD, timeout=TIMEOUT) as second:
        one, two = Scenario(CASE, rank, num_ranks), Scenario(OTHER, rank, num_ranks)
        for _ in range(5):
            result_one, result_two = one.dispatch(first), two.dispatch(second)
            one.check_combine(one.combine(first, result_one[4]))
            two.check_combine(two.combine(second, result_two[4]))


def test_interleaved_buffers(pool_of: PoolOf) -> None:
    pool_of(2).run(_interleaved)


def _outside(rank: int, num_ranks: int) -> None:
    group = dist.new_group([0])
    if rank == 0:
        with Buffer(group, timeout=TIMEOUT) as buffer:
            check_works(buffer)
    else:
        with pytest.raises(ArgumentError, match="group"):
            Buffer(group, timeout=TIMEOUT)


def test_construction_outside_of_the_group_raises(pool_of: PoolOf) -> None:
    pool_of(2).run(_outside)


class Exchanges:
    """How torch's symmetric memory exchanges values: a process numbers all its exchanges, whomever they are with."""

    def __init__(self) -> None:
        self.number = 0

    def all_gather(self, store: Store, rank: int, num_ranks: int, value: bytes) -> list[bytes]:
        """Through a store of C++, as torch calls it."""
        there = dist.PrefixStore(f"Played/{self.number}", store)
        self.number += 1
        there.set(str(rank), value)
        values = []
        for other in range(num_ranks):
            there.wait([str(other)])
            values.append(there.get(str(other)))
        return values


def _exchange_with_different_pasts(rank: int, num_ranks: int, parts: list[list[int]]) -> list[list[bytes]]:
    """What the ranks of each part say, twice; some ranks have been in more of them than others."""
    exchanges, found, default = Exchanges(), [], _get_default_store()
    for number, part in enumerate(parts):
        if rank in part:
            store = ExchangeStore(default, f"pasts/{number}", part, 20.0)
            for turn in range(2):
                said = f"{number} {turn} {rank}".encode()
                found.append(exchanges.all_gather(store, part.index(rank), len(part), said))
    return found


def test_ranks_exchange_whatever_their_pasts_are(pool_of: PoolOf) -> None:
    parts = [[0, 1], [1, 2], [1, 2], [0, 1, 2]]
    for rank, found in enumerate(pool_of(3).run(_exchange_with_different_pasts, parts)):
        mine = [(number, part) for number, part in enumerate(parts) if rank in part]
        assert found == [
            [f"{number} {turn} {other}".encode() for other in part] for number, part in mine for turn in range(2)
        ]


def test_a_rank_that_exchanges_nothing_is_named() -> None:
    store = ExchangeStore(dist.HashStore(), "alone", [3, 7], 0.05)
    with pytest.raises(PeerTimeoutError, match=r"map their memory within 0\.05 s") as caught:
        Exchanges().all_gather(store, 0, 2, b"here")
    assert caught.value.ranks == (7,)


def _as_newer_versions_do(rank: int, num_ranks: int) -> list[bytes]:
    """They ask for all entries at once, and have barriers of the store's where it has them."""
    store = ExchangeStore(_get_default_store(), "newer", range(num_ranks), 20.0)
    number = 3 + rank
    there = dist.PrefixStore(f"Played/{number}", store)
    there.set(str(rank), f"from {rank}".encode())
    found = there.multi_get([str(other) for other in range(num_ranks)])
    if hasattr(dist.Store, "barrier"):
        dist.Store.barrier(store, f"Played/{number + 1}", num_ranks)
    return list(found)


def test_ranks_exchange_as_newer_versions_do(pool_of: PoolOf) -> None:
    assert pool_of(3).run(_as_newer_versions_do) == [[b"from 0", b"from 1", b"from 2"]] * 3


@pytest.mark.parametrize("newer", [False, True])
def test_one_deadline_for_an_exchange(newer: bool) -> None:
    """Not one for each rank that does not come; all are named that are known not to have."""
    store = ExchangeStore(dist.HashStore(), "deadline", [3, 5, 7, 9], 0.3)
    there = dist.PrefixStore("Played/1", store)
    there.set("0", b"here")
    began = time.monotonic()
    for other in ("1", "2", "3"):
        with pytest.raises(PeerTimeoutError) as caught:
            there.multi_get(["0", "1", "2", "3"]) if newer else there.wait([other])
        assert caught.value.ranks == ((5, 7, 9) if newer else ([5, 7, 9][int(other) - 1],))
    assert time.monotonic() - began < 0.6


@pytest.mark.skipif(not hasattr(dist.Store, "barrier"), reason="a barrier is an exchange in this version")
def test_a_barrier_ends_at_the_deadline() -> None:
    store = ExchangeStore(dist.HashStore(), "barrier", [3, 7], 0.1)
    with pytest.raises(PeerTimeoutError) as caught:
        dist.Store.barrier(store, "Played/2", 2)
    assert caught.value.ranks == (3, 7)


def test_entries_of_another_kind_are_refused() -> None:
    store = ExchangeStore(dist.HashStore(), "other", [0], 1.0)
    with pytest.raises(TokenferryError, match="what"):
        dist.PrefixStore("Played", store).set("all", b"")
