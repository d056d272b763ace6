"""``get_dispatch_layout`` against the oracle: local, exact, int32."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from tests import oracle
from tests.cases import ROUTINGS, TIMEOUT, Case, choices, same
from tests.conftest import PoolOf, slow
from tokenferry import Buffer


def _check_layout(buffer: Buffer, topk_idx: torch.Tensor, num_experts: int) -> None:
    before = topk_idx.clone()
    per_rank, per_node, per_expert, member, event = buffer.get_dispatch_layout(topk_idx, num_experts)
    num_ranks = buffer.group_size
    wanted = oracle.tokens_per_rank(topk_idx, num_ranks, num_experts)
    same(per_rank, torch.tensor(wanted, dtype=torch.int32), "num_tokens_per_rank")
    wanted = oracle.choices_of_experts(topk_idx, num_experts)
    same(per_expert, torch.tensor(wanted, dtype=torch.int32), "num_tokens_per_expert")
    same(member, oracle.membership(topk_idx, num_ranks, num_experts), "is_token_in_rank")
    assert per_node is None
    assert event.event is None
    assert torch.equal(topk_idx, before)


def _layouts(rank: int, num_ranks: int, cases: list[Case]) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        for case in cases:
            _check_layout(buffer, choices(case, rank, num_ranks), num_ranks * case.local_experts)


@pytest.mark.parametrize("num_ranks", [3, *slow(1, 8)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_layout(pool_of: PoolOf, num_ranks: int, routing: str) -> None:
    cases = [
        Case(tokens=tokens, routing=routing, num_topk=num_topk, local_experts=local_experts, seed=local_experts)
        for tokens in ((0,), (1,), (33, 7))
        for num_topk in (1, 8, 32)
        for local_experts in (1, 5, 64)
    ]
    pool_of(num_ranks).run(_layouts, cases)


def _alone(rank: int, num_ranks: int) -> float:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        dist.barrier()
        started = time.monotonic()
        if rank == 1:
            for seed in range(20):
                _check_layout(buffer, choices(Case(tokens=(50,), seed=seed), rank, num_ranks), num_ranks * 2)
            seconds = time.monotonic() - started
        else:
            time.sleep(2.0)
            seconds = 0.0
        dist.barrier()
        return seconds


def test_layout_needs_no_peer(pool_of: PoolOf) -> None:
    assert pool_of(3).run(_alone)[1] < 1.5


def _no_choices(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(torch.empty(0, 8, dtype=torch.int64), 6)
        same(per_rank, torch.zeros(num_ranks, dtype=torch.int32), "num_tokens_per_rank")
        same(per_expert, torch.zeros(6, dtype=torch.int32), "num_tokens_per_expert")
        assert (member.shape, member.dtype) == ((0, num_ranks), torch.bool)


def test_no_tokens(pool_of: PoolOf) -> None:
    pool_of(3).run(_no_choices)
