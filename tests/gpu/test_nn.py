"""Gradients through dispatch and combine on GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from tokenferry import Buffer
from tokenferry.cli.ranks import RankPool
from tokenferry.nn import functional

TOKENS, HIDDEN, TOPK, LOCAL = 40, 256, 3, 4


def check_gradients(rank: int, num_ranks: int) -> None:
    experts = num_ranks * LOCAL
    source = torch.Generator().manual_seed(rank)
    x = torch.randn(TOKENS, HIDDEN, generator=source).cuda().requires_grad_()
    ids = torch.rand(TOKENS, experts, generator=source).argsort(1)[:, :TOPK].contiguous().cuda()
    weights = torch.rand(TOKENS, TOPK, generator=source).cuda().requires_grad_()
    grad = torch.randn(TOKENS, HIDDEN, generator=source).cuda()
    with Buffer(dist.group.WORLD, timeout=20.0, device="cuda") as buffer:
        for num_worst_tokens in (0, TOKENS * num_ranks):
            rows, local_ids, local_weights, _, handle = functional.dispatch(
                buffer, x, ids, weights, experts, num_worst_tokens=num_worst_tokens
            )
            scale = (local_weights * (local_ids + 1 + 10 * rank).where(local_ids >= 0, 0)).sum(1, keepdim=True)
            functional.combine(buffer, rows * scale, handle).backward(grad)
            factor = ids % LOCAL + 1 + 10 * (ids // LOCAL)
            torch.testing.assert_close(x.grad, grad * (weights * factor).sum(1, keepdim=True).detach())
            torch.testing.assert_close(weights.grad, factor * (x * grad).sum(1, keepdim=True).detach())
            x.grad = weights.grad = None


def test_gradients(gpu_pool_of: Callable[[int], RankPool]) -> None:
    gpu_pool_of(2).run(check_gradients)
