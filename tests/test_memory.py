"""Heap bytes: the formula of docs/protocol.md, and that they follow the rank's own tokens, not R times them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry
from tests.conftest import slow

HIDDEN, TOPK, EXPERTS_PER_RANK = 512, 4, 8
PAGE = 4096


def formula(num_ranks: int, tokens: int, row_bytes: int, ceiling: int) -> int:
    """docs/protocol.md, "Memory", without the padding of sections."""
    control = -(-(128 + 2304 * num_ranks) // PAGE) * PAGE
    counts = 4 * (num_ranks + num_ranks * EXPERTS_PER_RANK + 1)
    return control + min(counts + tokens * (row_bytes + 8 * (num_ranks - 1)), ceiling, 32 << 20)


def heap_bytes(rank: int, num_ranks: int, tokens: int, ceiling: int) -> int:
    generator = torch.Generator().manual_seed(rank)
    num_experts = num_ranks * EXPERTS_PER_RANK
    topk_idx = torch.randint(num_experts, (tokens, TOPK), generator=generator)
    topk_idx[:, 0] = (rank + 1) % num_ranks * EXPERTS_PER_RANK  # every token has a remote reader
    with tokenferry.Buffer(dist.group.WORLD, ceiling, timeout=30) as buffer:
        per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        buffer.dispatch(
            torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16),
            num_tokens_per_rank=per_rank,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=torch.zeros(tokens, TOPK),
        )
        dist.barrier()
        assert buffer.runtime is not None
        return buffer.runtime.allocated_bytes()


@pytest.mark.parametrize("ceiling", [256 << 10, 64 << 20, *slow(8 << 20)])
@pytest.mark.parametrize("tokens", [500, 4000, pytest.param(40000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("num_ranks", [2, 4, *slow(8)])
def test_heap_follows_the_formula(num_ranks: int, tokens: int, ceiling: int, pool_of: Any) -> None:
    row_bytes = 2 * HIDDEN + 12 * TOPK
    expected = formula(num_ranks, tokens, row_bytes, ceiling)
    padding = 16 * 128 + 2 * PAGE
    for taken in pool_of(num_ranks).run(heap_bytes, tokens, ceiling):
        assert expected <= taken <= expected + padding


def test_heap_does_not_grow_with_the_ranks(pool_of: Any) -> None:
    two, eight = (max(pool_of(ranks).run(heap_bytes, 4000, 64 << 20)) for ranks in (2, 8))
    assert eight < 1.1 * two
    assert max(pool_of(2).run(heap_bytes, 8000, 64 << 20)) > 1.9 * two


def idle_bytes(rank: int, num_ranks: int) -> int:
    with tokenferry.Buffer(dist.group.WORLD, 2 << 30, timeout=30) as buffer:
        dist.barrier()
        assert buffer.runtime is not None
        return buffer.runtime.allocated_bytes()


def test_idle_buffer_takes_almost_nothing(pool_of: Any) -> None:
    assert max(pool_of(8).run(idle_bytes)) <= 128 << 10
