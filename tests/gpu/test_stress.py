"""Many operations with random sizes and delays, every row checked."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from tokenferry import Buffer, Config
from tokenferry.cli.ranks import RankPool

HIDDEN, TOPK, LOCAL = 512, 4, 4


def routing(seed: int, rank: int, num_ranks: int, tokens: int) -> torch.Tensor:
    scores = torch.rand(tokens, num_ranks * LOCAL, generator=torch.Generator().manual_seed(97 * seed + rank))
    return scores.argsort(1)[:, :TOPK].contiguous()


def check_stress(rank: int, num_ranks: int, iterations: int) -> None:
    common, own = random.Random(5), random.Random(rank)
    with Buffer(dist.group.WORLD, timeout=30.0, device="cuda") as buffer:
        buffer.warmup(HIDDEN, TOPK, num_ranks * LOCAL, torch.float32)
        for iteration in range(iterations):
            sizes = [common.choice((0, 1, 5, 64, 300)) for _ in range(num_ranks)]
            ids = [routing(iteration, peer, num_ranks, sizes[peer]).cuda() for peer in range(num_ranks)]
            rows = [
                (torch.arange(sizes[peer], device="cuda", dtype=torch.float32)[:, None] + 1000 * peer + iteration)
                .expand(-1, HIDDEN).contiguous()
                for peer in range(num_ranks)
            ]  # fmt: skip
            here = [(i // LOCAL == rank).any(1) for i in ids]
            wanted = torch.cat([r[h] for r, h in zip(rows, here, strict=True)])
            copies = torch.stack([(ids[rank] // LOCAL == peer).any(1) for peer in range(num_ranks)]).sum(0)
            if own.random() < 0.3:
                torch.cuda._sleep(own.randrange(3_000_000))
            x, config = rows[rank], Config(common.choice((2, 4, 8)), 6, 256)
            per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(ids[rank], num_ranks * LOCAL)
            weights = torch.ones(sizes[rank], TOPK, device="cuda")
            worst = common.choice((0, sum(sizes) or 1))
            received = buffer.dispatch(
                x, None, per_rank, None, member, per_expert, ids[rank], weights, num_worst_tokens=worst, config=config
            )
            if own.random() < 0.3:
                torch.cuda._sleep(own.randrange(3_000_000))
            combined = buffer.combine(received[0], received[4], received[2], config=config)
            received[0][: len(wanted)].sub_(wanted)  # the peers have read these rows, or a copy
            wrong = received[0][: len(wanted)].abs().amax() if len(wanted) else 0.0
            assert float(wrong) == 0.0, iteration
            assert torch.equal(combined[0], x * copies[:, None]), iteration
            assert torch.equal(combined[1].sum(1), torch.full((sizes[rank],), float(TOPK), device="cuda")), iteration


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_random_sizes_and_delays(gpu_pool_of: Callable[[int], RankPool], num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_stress, 300)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_thousands_of_operations(gpu_pool_of: Callable[[int], RankPool], num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_stress, 5000)
