"""Exchanges over a rail of two GPUs, without what uses it."""

from __future__ import annotations

import os
import random
import time

import pytest
import torch
import torch.distributed as dist

from tests.conftest import PoolOf
from tokenferry.rail import CARRIER_VARIABLE, CARRIERS, NVSHMEM, RailError
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


def _bytes(turn: int, source: int, number: int, nbytes: int, unaligned: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(turn * 100 + source * 10 + number)
    around = torch.randint(0, 256, (nbytes + 16,), dtype=torch.uint8, device="cuda", generator=generator)
    return around[unaligned : unaligned + nbytes]


def exchanges(
    rank: int, num_ranks: int, key: str, turns: int, all_sizes: tuple[int, ...] = SIZES, timeout: float = 30.0
) -> None:
    """Of random sizes, waited for by the host or by the stream, several at a time, each rank late by itself."""
    both, mine, other = random.Random(turns), random.Random(rank), 1 - rank
    rail = _rail(rank, num_ranks, key, timeout)
    under_way: list[tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]] = []
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for turn in range(turns):
        sizes = [
            [both.choice(all_sizes[: both.choice((4, 7, 9))]) for _ in range(both.choice((0, 1, 2, 5)))] for _ in "ab"
        ]
        place = both.choice((0, 0, 0, 1, 8))
        going = [_bytes(turn, rank, number, nbytes, place) for number, nbytes in enumerate(sizes[rank])]
        wanted = [_bytes(turn, other, number, nbytes, place) for number, nbytes in enumerate(sizes[other])]
        came = [torch.full_like(part, 0xCD) for part in wanted]
        if mine.random() < 0.1:
            time.sleep(mine.random() * 0.01)
        elif mine.random() < 0.1:
            torch.cuda._sleep(mine.randrange(1_000_000))
        transfer = rail.post({other: going}, {other: came})
        if both.random() < 0.2:
            transfer.wait(other)
            transfer.finish()
        else:
            transfer.settle()
        under_way.append((going, wanted, came))
        while len(under_way) > both.choice((0, 1, 3)):
            _, first, last = under_way.pop(0)
            for left, right in zip(first, last, strict=True):
                wrong += (left != right).sum()
    assert int(wrong) == 0
    assert rail.failure is None
    rail.close()


def test_exchanges(direct: PoolOf) -> None:
    direct(2).run(exchanges, "exchanges", 300)


@pytest.mark.slow
def test_many_exchanges(direct: PoolOf) -> None:
    direct(2).run(exchanges, "many exchanges", 5000)


def _replayed(rank: int, num_ranks: int) -> None:
    rail, other = _rail(rank, num_ranks, "replayed"), 1 - rank
    going = torch.zeros(3 << 20, dtype=torch.uint8, device="cuda")
    came = torch.zeros_like(going)
    rail.post({other: [going]}, {other: [came]}).finish()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        going += 1
        for _ in range(3):
            rail.post({other: [going]}, {other: [came]}).settle()
    for turn in range(1, 100):
        came.fill_(0xCD)
        graph.replay()
        assert bool((came == turn).all())
        if turn % 3 == 0:
            eager = torch.full_like(came, 0xCD)
            rail.post({other: [going[: turn * 1000]]}, {other: [eager[: turn * 1000]]}).finish()
            assert bool((eager[: turn * 1000] == turn).all())
        elif os.environ[CARRIER_VARIABLE] == NVSHMEM:  # a replay that is asked for before anybody waits
            parts = [torch.full_like(came, value) for value in (turn, 0xCD)]
            transfer = rail.post({other: [parts[0]]}, {other: [parts[1]]})
            graph.replay()
            transfer.finish()
            assert bool((parts[1] == turn).all())
            going -= 1  # the replay has added one
    del graph
    rail.close()


def test_replays_mixed_with_exchanges(direct: PoolOf) -> None:
    direct(2).run(_replayed)


def _late(rank: int, num_ranks: int, settles: bool) -> float:
    """Rank 1 does not come: rank 0 says so, goes on, and a further rail works."""
    rail, other, part = _rail(rank, num_ranks, f"late {settles}", 2.0), 1 - rank, torch.ones(1 << 20, device="cuda")
    dist.barrier()
    began = time.monotonic()
    if rank == 0:
        transfer = rail.post({other: [part]}, {other: [torch.empty_like(part)]})
        if settles:
            transfer.settle()
            torch.cuda.synchronize()
            time.sleep(0.1)
        with pytest.raises(RailError) as caught:
            rail.post({other: [part]}, {other: [part]}) if settles else transfer.finish()
        assert list(caught.value.nodes) == [1]
        assert caught.value.timed_out
        torch.cuda.synchronize()
    seconds = time.monotonic() - began
    dist.barrier()
    rail.close()
    further = _rail(rank, num_ranks, f"behind {settles}")
    came = torch.empty_like(part)
    further.post({other: [part * rank]}, {other: [came]}).finish()
    assert bool((came == other).all())
    further.close()
    return seconds


@pytest.mark.parametrize("settles", [False, True])
def test_deadline(direct: PoolOf, settles: bool) -> None:
    assert direct(2).run(_late, settles)[0] < 4.0


def _made_again(rank: int, num_ranks: int) -> None:
    """More rails one after the other than there is symmetric memory for at a time."""
    for turn in range(20 if os.environ[CARRIER_VARIABLE] == NVSHMEM else 3):
        rail, other = _rail(rank, num_ranks, f"again {turn}"), 1 - rank
        came = torch.zeros(1000, dtype=torch.uint8, device="cuda")
        rail.post({other: [torch.full_like(came, turn)]}, {other: [came]}).finish()
        assert bool((came == turn).all())
        rail.close()
        dist.barrier()


def test_memory_of_rails_is_used_again(direct: PoolOf) -> None:
    direct(2).run(_made_again)
