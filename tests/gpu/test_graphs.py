"""Dispatch and combine inside CUDA graphs: replayed any number of times, between eager calls, with new routing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import oracle
from tests.cases import same
from tokenferry import ArgumentError, Buffer, BufferStateError
from tokenferry.cli.ranks import RankPool

TOKENS, HIDDEN, TOPK, LOCAL = 48, 1024, 4, 4
LATE = 0.1
"""Seconds."""


def inputs_of(num_ranks: int, seed: int) -> list[oracle.Inputs]:
    """What all ranks bring; finite rows, so that sums compare bit for bit."""
    result = []
    for rank in range(num_ranks):
        source = torch.Generator().manual_seed(1000 * seed + rank)
        x = torch.randn(TOKENS, HIDDEN, generator=source).bfloat16()
        scores = torch.rand(TOKENS, num_ranks * LOCAL, generator=source)
        result.append(oracle.Inputs(x, None, scores.argsort(1)[:, :TOPK].contiguous(), scores[:, :TOPK].contiguous()))
    return result


class Step:
    """Layout, dispatch and combine on static tensors."""

    def __init__(self, buffer: Buffer, rank: int, num_ranks: int) -> None:
        self.buffer, self.rank, self.num_ranks = buffer, rank, num_ranks
        self.x = torch.zeros(TOKENS, HIDDEN, dtype=torch.bfloat16, device="cuda")
        self.ids = torch.zeros(TOKENS, TOPK, dtype=torch.int64, device="cuda")
        self.weights = torch.zeros(TOKENS, TOPK, device="cuda")
        self.result: tuple[Any, ...] = ()

    def load(self, inputs: list[oracle.Inputs]) -> None:
        given = inputs[self.rank]
        self.x.copy_(given.x)
        self.ids.copy_(given.topk_idx)
        self.weights.copy_(given.topk_weights)

    def run(self, num_worst_tokens: int) -> tuple[Any, ...]:
        per_rank, _, per_expert, member, _ = self.buffer.get_dispatch_layout(self.ids, self.num_ranks * LOCAL)
        received = self.buffer.dispatch(
            self.x, None, per_rank, None, member, per_expert, self.ids, self.weights,
            num_worst_tokens=num_worst_tokens,
        )  # fmt: skip
        again = self.buffer.dispatch(self.x, received[4])[0]
        return received, again, self.buffer.combine(received[0], received[4], received[2])

    def check(self, result: tuple[Any, ...], inputs: list[oracle.Inputs]) -> None:
        received, again, combined = result
        experts = self.num_ranks * LOCAL
        all_wanted = [oracle.dispatch(inputs, experts, peer) for peer in range(self.num_ranks)]
        wanted = all_wanted[self.rank]
        count = wanted.x.size(0)
        same(received[0][:count], wanted.x, "recv_x")
        same(again[:count], wanted.x, "recv_x of the cached dispatch")
        same(received[1][:count], wanted.topk_idx, "recv_topk_idx")
        same(received[2][:count], wanted.topk_weights, "recv_topk_weights")
        assert (received[1][count:] == -1).all()
        same(combined[0], oracle.combine(inputs, experts, self.rank, [w.x for w in all_wanted]), "combined")
        rows = [w.topk_weights for w in all_wanted]
        same(combined[1], oracle.combine(inputs, experts, self.rank, rows), "combined weights")


def check_replays(rank: int, num_ranks: int) -> None:
    worst = TOKENS * num_ranks
    with Buffer(dist.group.WORLD, timeout=20.0, device="cuda") as buffer:
        buffer.warmup(HIDDEN, TOPK, num_ranks * LOCAL)
        step = Step(buffer, rank, num_ranks)
        step.load(inputs_of(num_ranks, 99))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step.run(worst)
        for seed in range(12):
            inputs = inputs_of(num_ranks, seed)
            step.load(inputs)
            if seed % 3 == 1:
                step.check(step.run(0), inputs)
            graph.replay()
            if seed % 4 == rank % 4:
                torch.cuda._sleep(20_000_000)
            graph.replay()
            step.check(captured, inputs)
            if seed % 3 == 2:
                step.check(step.run(worst), inputs)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_replays_mixed_with_eager_calls(gpu_pool_of: Callable[[int], RankPool], num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_replays)


def check_memory_of_the_graph(rank: int, num_ranks: int) -> None:
    """Rows that a graph makes in its own memory are read there, once that is open: no call but replays is needed."""
    with Buffer(dist.group.WORLD, timeout=20.0, device="cuda") as buffer:
        step = Step(buffer, rank, num_ranks)
        first = inputs_of(num_ranks, 4)
        step.load(first)
        step.check(step.run(TOKENS * num_ranks), first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step.run(TOKENS * num_ranks)
        rows, runtime = captured[0][0], buffer.runtime
        plane = runtime.party().plane  # type: ignore[union-attr]
        with runtime.comm.lock:  # type: ignore[union-attr]
            region, _ = runtime._regions.expose(rows.data_ptr(), rows.nbytes)  # type: ignore[union-attr]
        assert region > 0
        end = time.monotonic() + 10
        while not runtime._regions.is_ready(region):  # type: ignore[union-attr]
            assert time.monotonic() < end
            time.sleep(0.01)
        dist.barrier()
        for seed in range(3):
            inputs = inputs_of(num_ranks, seed)
            step.load(inputs)
            graph.replay()
            step.check(captured, inputs)
        assert int(plane._follower.ready[region]) == 1  # type: ignore[attr-defined]
        step.check(step.run(0), inputs)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_memory_of_a_graph_is_read_where_it_lies(gpu_pool_of: Callable[[int], RankPool], num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_memory_of_the_graph)


def check_waits_of_replays(rank: int, num_ranks: int) -> None:
    """Kernels count for whom they wait, also where no host calls anything."""
    with Buffer(dist.group.WORLD, timeout=20.0, device="cuda") as buffer:
        step = Step(buffer, rank, num_ranks)
        step.load(inputs_of(num_ranks, 3))
        step.run(TOKENS * num_ranks)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run(TOKENS * num_ranks)
            with pytest.raises(BufferStateError, match="captured"):
                buffer.stats()
        torch.cuda.synchronize()
        dist.barrier()
        buffer.stats(reset=True)
        for _ in range(3):
            if rank == 1:
                torch.cuda.synchronize()
                time.sleep(LATE)
            graph.replay()
        torch.cuda.synchronize()
        waited = buffer.stats()
    if rank == 0:
        assert waited.waited_for()[1] > 0.8 * 3 * LATE * 1e9, waited
        assert waited.of("dispatch").peers[1].waits.longest_ns > 0.8 * LATE * 1e9, waited
    else:
        assert sum(waited.waited_for()) < LATE * 1e9, waited


def test_waits_of_replays_are_counted(gpu_pool_of: Callable[[int], RankPool]) -> None:
    gpu_pool_of(2).run(check_waits_of_replays)


def check_capture_that_would_wait(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=20.0, device="cuda") as buffer:
        step = Step(buffer, rank, num_ranks)
        inputs = inputs_of(num_ranks, 1)
        step.load(inputs)
        step.check(step.run(0), inputs)
        graph = torch.cuda.CUDAGraph()
        refused = pytest.raises(ArgumentError, match="num_worst_tokens: got 0 while a CUDA graph is captured")
        with refused, torch.cuda.graph(graph):
            step.run(0)
        step.check(step.run(0), inputs)


def test_a_capture_that_would_wait_for_the_host_is_refused(gpu_pool_of: Callable[[int], RankPool]) -> None:
    gpu_pool_of(2).run(check_capture_that_would_wait)
