"""Going on without dead ranks: the survivors build a new Buffer in the old one, without the process group."""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import Store

from tests.cases import Case, Scenario, named_segments, segments, wait_for
from tests.conftest import PoolOf, slow
from tests.internode_cases import NodeScenario
from tests.low_latency_cases import Case as QuickCase
from tests.low_latency_cases import Scenario as QuickScenario
from tests.low_latency_cases import check_case
from tests.test_groups import Exchanges
from tokenferry import (
    ArgumentError,
    Buffer,
    BufferStateError,
    MismatchError,
    PeerError,
    PeerTimeoutError,
    Survivors,
    TokenferryError,
    runtime_cuda,
)
from tokenferry.cli.ranks import RankError, RankPool
from tokenferry.rendezvous import ExchangeStore
from tokenferry.runtime import Runtime
from tokenferry.topology import Topology
from tokenferry.waits import wait_report

CASE = Case(tokens=(7, 3, 9), num_topk=3)


def _go_on_without(rank: int, num_ranks: int, victims: list[int]) -> tuple[int, float]:
    """The victims are killed in the middle; the others notice, shrink, and work in both modes."""
    with Buffer(dist.group.WORLD, low_latency_mode=True, timeout=10.0) as buffer:
        scenario = Scenario(CASE, rank, num_ranks)
        scenario.check_dispatch(scenario.dispatch(buffer))
        dist.barrier()
        if rank in victims:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(PeerError) as caught:
            scenario.dispatch(buffer)
        started = time.monotonic()
        survivors = buffer.shrink(victims)
        took = time.monotonic() - started
        assert set(caught.value.ranks) <= set(range(num_ranks))
        assert buffer.group_size == num_ranks - len(victims)
        assert survivors.ranks[buffer.rank] == rank
        assert buffer.is_available()
        assert buffer.topology.num_ranks == buffer.group_size
        assert wait_for(lambda: not named_segments())
        assert len(segments()) == buffer.group_size
        Scenario(CASE, buffer.rank, buffer.group_size).check_all(buffer)
        report = wait_report(buffer)
        assert len(report.waited) == buffer.group_size
        assert any(map(any, report.waited)) == (buffer.group_size > 1)
        check_case(buffer, QuickScenario(QuickCase(), buffer.rank, buffer.group_size))
        buffer.low_latency_warmup(8, 128, 2, 2 * buffer.group_size)
        return buffer.rank, took


@pytest.mark.parametrize(("num_ranks", "victims"), [(3, [1]), *slow((4, [0, 2]), (2, [0]))])
def test_survivors_go_on(num_ranks: int, victims: list[int]) -> None:
    with RankPool(num_ranks, 1) as pool, pytest.raises(RankError) as caught:
        pool.run(_go_on_without, victims)
    assert sorted(caught.value.failures) == victims, caught.value
    results = [result for result in caught.value.results if result is not None]
    assert [new for new, _ in results] == list(range(num_ranks - len(victims)))
    assert max(took for _, took in results) < 5.0


class PlayedRuntime(Runtime):
    """As on GPUs, where the heaps are mapped through what ranks exchange in a store, but on the CPU."""

    exchanges = Exchanges()

    def __init__(self, topology: Topology, *, store: Store, device: torch.device, **given: Any) -> None:
        assert device.type == "cuda"
        wanted = ("stage_limit", "timeout", "may_mask", "make_rail", "exact_combine", "paranoid")
        super().__init__(topology, *(given[name] for name in wanted))
        self.store = store

    def sync(self, ipc_handles: Any) -> None:
        """The ranks exchange something first."""
        rank, ranks = self.topology.rank, range(self.topology.num_ranks)
        store = ExchangeStore(self.store, f"{self.key}/heap", ranks, 10.0)
        said = self.exchanges.all_gather(store, rank, len(ranks), str(rank).encode())
        assert said == [str(other).encode() for other in ranks]
        super().sync(ipc_handles)


def _as_on_gpus(rank: int, num_ranks: int, victims: list[int]) -> list[int]:
    """Ranks are killed one after the other; the group, which has them still, is of no use for collectives."""
    with (
        mock.patch.object(runtime_cuda, "CudaRuntime", PlayedRuntime),
        Buffer(dist.group.WORLD, timeout=10.0) as buffer,
    ):
        buffer._wishes = buffer._wishes._replace(device=torch.device("cuda", 0))
        left = list(range(num_ranks))
        for victim in victims:
            Scenario(CASE, buffer.rank, len(left)).check_all(buffer)
            if rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            with pytest.raises(PeerError):
                Scenario(CASE, buffer.rank, len(left)).dispatch(buffer)
            assert buffer.shrink([left.index(victim)]) == Survivors(
                tuple(place for place, old in enumerate(left) if old != victim), len(left)
            )
            left.remove(victim)
        Scenario(CASE, buffer.rank, len(left)).check_all(buffer)
        return left


def test_survivors_map_their_memory_anew_on_gpus() -> None:
    victims = [1, 3]
    with RankPool(4, 1) as pool, pytest.raises(RankError) as caught:
        pool.run(_as_on_gpus, victims)
    assert sorted(caught.value.failures) == victims, caught.value
    assert [result for result in caught.value.results if result] == [[0, 2]] * 2


def _one_after_the_other(rank: int, num_ranks: int) -> None:
    """Live ranks may be left out too, a node at a time, and again."""
    with Buffer(dist.group.WORLD, node=rank // 2, timeout=20.0) as buffer:
        handle = NodeScenario(CASE, rank, "2x2").dispatch(buffer)[4]
        dist.barrier()
        if rank < 2:
            return
        first = buffer.shrink([0, 1])
        assert first == Survivors((2, 3), 4)
        assert buffer.topology.num_nodes == 1
        Scenario(CASE, buffer.rank, 2).check_all(buffer)
        with pytest.raises(ArgumentError):
            buffer.combine(torch.zeros(len(handle[7]), 64, dtype=torch.bfloat16), handle)
        if rank == 3:
            assert buffer.shrink([0]) == Survivors((1,), 2)
            Scenario(CASE, 0, 1).check_all(buffer)


def test_again_and_across_nodes(pool_of: PoolOf) -> None:
    pool_of(4).run(_one_after_the_other)


def _without_a_deadline(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=float("inf")) as buffer:
        assert buffer.shrink([]) == Survivors((0, 1), 2)
        Scenario(CASE, rank, num_ranks).check_all(buffer)


def test_endless_deadline(pool_of: PoolOf) -> None:
    pool_of(2).run(_without_a_deadline)


def _refused(rank: int, num_ranks: int) -> None:
    buffer = Buffer(dist.group.WORLD, timeout=2.0)
    bad: list[Any] = [[rank], [num_ranks], [-1], [1.5]]
    for dead in bad:
        with pytest.raises(ArgumentError, match="dead_ranks"):
            buffer.shrink(dead)
    assert buffer.is_available()
    kind = (MismatchError, PeerTimeoutError)
    if rank < 2:
        with pytest.raises(kind):
            buffer.shrink([2] if rank else [3])
    assert buffer.is_available() == (rank >= 2)
    dist.barrier()
    buffer.destroy()
    with pytest.raises(BufferStateError):
        buffer.shrink([])
    dist.barrier()
    with Buffer(dist.group.WORLD, node=rank // 2, timeout=5.0) as uneven:
        if rank < 3:
            with pytest.raises(TokenferryError, match="same number of ranks"):
                uneven.shrink([3])
        dist.barrier()


def test_what_is_refused(pool_of: PoolOf) -> None:
    pool_of(4).run(_refused)


def test_experts_are_renumbered() -> None:
    survivors = Survivors((0, 2), 3)
    assert survivors.lost_experts(6) == [2, 3]
    ids = torch.tensor([[0, 3], [5, -1], [2, 4]])
    assert survivors.renumber(ids, 6).tolist() == [[0, -1], [3, -1], [-1, 2]]
    with pytest.raises(ArgumentError, match="num_experts"):
        survivors.renumber(ids, 7)
