"""Exchanges over a rail of two and three GPUs, without what uses it."""

from __future__ import annotations

import itertools
import os
import random
import time

import pytest
import torch
import torch.distributed as dist

from tests.conftest import NodesOf
from tokenferry.rail import CARRIER_VARIABLE, CARRIERS, NVSHMEM, RailError, Transfer
from tokenferry.rail.device_rail import DeviceRail
from tokenferry.topology import Topology

SIZES = (1, 15, 16, 100, 4096, 65_537, 1 << 20, (3 << 20) + 5, 40 << 20)
"""Bytes of a tensor: less than a piece, and many times what is on its way."""


def _rail(rank: int, num_ranks: int, key: str, timeout: float = 30.0) -> DeviceRail:
    topology = Topology(rank, tuple(range(num_ranks)))
    make = CARRIERS[os.environ[CARRIER_VARIABLE]]
    rail = make(topology, f"test rail/{key}/0", timeout, torch.device("cuda", torch.cuda.current_device()))
    assert isinstance(rail, DeviceRail)
    return rail


def _others(rank: int, num_ranks: int) -> list[int]:
    return [other for other in range(num_ranks) if other != rank]


def _drawn(turn: int, source: int, target: int, sizes: list[int], unaligned: int) -> list[torch.Tensor]:
    """Tensors of random bytes that a rank sends to another, alike on both."""
    generator = torch.Generator("cuda").manual_seed((turn * 10 + source) * 10 + target)
    return [
        torch.randint(0, 256, (size + 16,), dtype=torch.uint8, device="cuda", generator=generator)[unaligned:][:size]
        for size in sizes
    ]


def exchanges(
    rank: int, num_ranks: int, key: str, turns: int, all_sizes: tuple[int, ...] = SIZES, timeout: float = 30.0
) -> None:
    """Of random sizes, waited for by the host or by the stream, several at a time, each rank late by itself."""
    both, mine, others = random.Random(turns), random.Random(rank), _others(rank, num_ranks)
    rail = _rail(rank, num_ranks, key, timeout)
    under_way: list[tuple[dict[int, list[torch.Tensor]], ...]] = []
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(turns):
        sizes = {
            pair: [both.choice(all_sizes[: both.choice((4, 7, 9))]) for _ in range(both.choice((0, 1, 2, 5)))]
            for pair in itertools.permutations(range(num_ranks), 2)
        }
        place = both.choice((0, 0, 0, 1, 8))
        going = {other: _drawn(turn, rank, other, sizes[rank, other], place) for other in others}
        wanted = {other: _drawn(turn, other, rank, sizes[other, rank], place) for other in others}
        came = {other: [torch.full_like(part, 0xCD) for part in wanted[other]] for other in others}
        if mine.random() < 0.1:
            time.sleep(mine.random() * 0.01)
        elif mine.random() < 0.1:
            torch.cuda._sleep(mine.randrange(1_000_000))
        transfer = rail.post(going, came)
        if both.random() < 0.2:
            for other in mine.sample(others, len(others)):
                transfer.wait(other)
            transfer.finish()
        else:
            transfer.settle()
        under_way.append((going, wanted, came))
        while len(under_way) > both.choice((0, 1, 3)):
            _, first, last = under_way.pop(0)
            for other in others:
                for left, right in zip(first[other], last[other], strict=True):
                    wrong += (left != right).sum()
    assert int(wrong) == 0
    assert rail.failure is None
    rail.close()


@pytest.mark.parametrize("layout", ["2x1", "3x1"])
def test_exchanges(direct: NodesOf, layout: str) -> None:
    direct(layout).run(exchanges, "exchanges", 300)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["2x1", "3x1"])
def test_many_exchanges(direct: NodesOf, layout: str) -> None:
    direct(layout).run(exchanges, "many exchanges", 5000)


def _replayed(rank: int, num_ranks: int) -> None:
    rail, others = _rail(rank, num_ranks, "replayed"), _others(rank, num_ranks)
    going = torch.zeros(3 << 20, dtype=torch.uint8, device="cuda")

    def from_all() -> torch.Tensor:
        return torch.full((num_ranks - 1, len(going)), 0xCD, dtype=torch.uint8, device="cuda")

    def exchange(part: torch.Tensor, parts: torch.Tensor) -> Transfer:
        return rail.post(
            {other: [part] for other in others}, {other: [to] for other, to in zip(others, parts, strict=True)}
        )

    came = from_all()
    exchange(going, came).finish()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        going += 1
        for _ in range(3):
            exchange(going, came).settle()
    for turn in range(1, 100):
        came.fill_(0xCD)
        graph.replay()
        assert bool((came == turn).all())
        if turn % 3 == 0:
            eager = from_all()[:, : turn * 1000]
            exchange(going[: turn * 1000], eager).finish()
            assert bool((eager == turn).all())
        elif os.environ[CARRIER_VARIABLE] == NVSHMEM:  # a replay that is asked for before anybody waits
            eager = from_all()
            transfer = exchange(torch.full_like(going, turn), eager)
            graph.replay()
            transfer.finish()
            assert bool((eager == turn).all())
            going -= 1  # the replay has added one
    del graph
    rail.close()


@pytest.mark.parametrize("layout", ["2x1", "3x1"])
def test_replays_mixed_with_exchanges(direct: NodesOf, layout: str) -> None:
    direct(layout).run(_replayed)


def _late(rank: int, num_ranks: int, settles: bool) -> float:
    """Rank 1 does not come: the others say so, go on, and a further rail works."""
    rail, others = _rail(rank, num_ranks, f"late {settles}", 2.0), _others(rank, num_ranks)
    part = torch.ones(1 << 20, device="cuda")

    def exchange(rail: DeviceRail, parts: dict[int, torch.Tensor]) -> Transfer:
        return rail.post({other: [part * rank] for other in others}, {other: [to] for other, to in parts.items()})

    dist.barrier()
    began = time.monotonic()
    if rank != 1:
        transfer = exchange(rail, {other: torch.empty_like(part) for other in others})
        if settles:
            transfer.settle()
            torch.cuda.synchronize()
            time.sleep(0.1)
        with pytest.raises(RailError) as caught:
            exchange(rail, {other: torch.empty_like(part) for other in others}) if settles else transfer.finish()
        assert list(caught.value.nodes) == [1]
        assert caught.value.timed_out
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    dist.barrier()
    rail.close()
    further = _rail(rank, num_ranks, f"behind {settles}")
    came = {other: torch.empty_like(part) for other in others}
    exchange(further, came).finish()
    assert all(bool((to == other).all()) for other, to in came.items())
    further.close()
    return seconds


@pytest.mark.parametrize("settles", [False, True])
@pytest.mark.parametrize("layout", ["2x1", "3x1"])
def test_deadline(direct: NodesOf, layout: str, settles: bool) -> None:
    assert max(direct(layout).run(_late, settles)) < 4.0


def _made_again(rank: int, num_ranks: int) -> None:
    """More rails one after the other than there is symmetric memory for at a time."""
    for turn in range(20 if os.environ[CARRIER_VARIABLE] == NVSHMEM else 3):
        rail, other = _rail(rank, num_ranks, f"again {turn}"), 1 - rank
        came = torch.zeros(1000, dtype=torch.uint8, device="cuda")
        rail.post({other: [torch.full_like(came, turn)]}, {other: [came]}).finish()
        assert bool((came == turn).all())
        rail.close()
        dist.barrier()


def test_memory_of_rails_is_used_again(direct: NodesOf) -> None:
    direct("2x1").run(_made_again)
