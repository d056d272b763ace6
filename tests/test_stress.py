"""Long runs of random operations on one Buffer, with ranks that are late at random."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import BIASES, COMBINE_DTYPES, ROUTINGS, TIMEOUT, Case, Scenario, poisoned_memory
from tests.conftest import PoolOf, slow
from tokenferry import Buffer

MOST_ALIVE = 4
"""Handles that are kept for later calls."""


def random_case(chance: random.Random) -> Case:
    scales = chance.choice([None, torch.float32, torch.int32])
    return Case(
        tokens=tuple(chance.choice([0, 1, chance.randrange(30), chance.randrange(80)]) for _ in range(4)),
        row_bytes=16 * chance.choice([1, 3, 64, 200]),
        dtype=torch.float8_e4m3fn
        if scales is not None
        else chance.choice([torch.bfloat16, torch.float32, torch.uint8]),
        num_topk=chance.choice([1, 2, 8]),
        local_experts=chance.choice([1, 3, 8]),
        routing=chance.choice(ROUTINGS),
        scales=scales,
        scale_columns=chance.choice([1, 5]),
        scale_layout=chance.choice(["rows", "columns"]),
        spare_rows=chance.randrange(20),
        combine_dtype=chance.choice(COMBINE_DTYPES),
        combine_bytes=16 * chance.choice([1, 3, 64, 200]),
        bias=chance.choice(BIASES),
        seed=chance.getrandbits(32),
    )


def _iterate(rank: int, num_ranks: int, iterations: int, seed: int, num_nvl_bytes: int, most_delay: float) -> int:
    """Random operations, the same on all ranks, at times of their own; returns how many there were."""
    common, own = random.Random(seed), random.Random(seed * 64 + rank)
    alive: list[tuple[Scenario, Any]] = []
    operations = 0

    def late() -> None:
        nonlocal operations
        operations += 1
        if own.random() < 0.3:
            time.sleep(own.random() * most_delay)

    with Buffer(dist.group.WORLD, num_nvl_bytes, timeout=TIMEOUT) as buffer, poisoned_memory():
        for _ in range(iterations):
            scenario = Scenario(random_case(common), rank, num_ranks)
            mode = common.choice(["topk", "no_topk", "worst"])
            late()
            topk = mode != "no_topk"
            worst = max(1, scenario.num_rows[rank] + scenario.case.spare_rows) if mode == "worst" else 0
            result = scenario.dispatch(buffer, topk=topk, num_worst_tokens=worst)
            scenario.check_dispatch(result, topk=topk, num_worst_tokens=worst)
            alive.append((scenario, result[4]))
            for _ in range(common.randrange(4)):
                older, handle = common.choice(alive)
                late()
                if common.random() < 0.5:
                    older.check_cached(buffer.dispatch(older.x, handle=handle))
                else:
                    weights = common.random() < 0.5
                    older.check_combine(older.combine(buffer, handle, weights=weights), weights=weights)
            while len(alive) > MOST_ALIVE:
                alive.pop(common.randrange(len(alive)))
    return operations


@pytest.mark.parametrize("num_nvl_bytes", [*slow(0), 65536])
def test_random_operations(pool_of: PoolOf, num_nvl_bytes: int) -> None:
    operations = pool_of(4).run(_iterate, 15, num_nvl_bytes, num_nvl_bytes, 0.01)
    assert len(set(operations)) == 1
    assert operations[0] > 15


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("iterations", "num_nvl_bytes", "most_delay"), [(500, 0, 0.01), (500, 65536, 0.01), (200, 4096, 0.2)]
)
def test_many_random_operations(pool_of: PoolOf, iterations: int, num_nvl_bytes: int, most_delay: float) -> None:
    operations = pool_of(4).run(_iterate, iterations, iterations + num_nvl_bytes, num_nvl_bytes, most_delay)
    assert operations[0] > iterations


def _constructing(rank: int, num_ranks: int, times: int) -> None:
    for seed in range(times):
        scenario = Scenario(Case(tokens=(5, 0, 9), seed=seed), rank, num_ranks)
        buffer = Buffer(dist.group.WORLD, timeout=TIMEOUT)
        scenario.check_dispatch(scenario.dispatch(buffer))
        if (seed + rank) % 2:
            buffer.destroy()


@pytest.mark.parametrize("times", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_buffers_come_and_go(pool_of: PoolOf, times: int) -> None:
    pool_of(4).run(_constructing, times)


def _many_small(rank: int, num_ranks: int, times: int) -> None:
    """Operations without a word between them: every flag, slot and stage byte is used many times over."""
    scenarios = [Scenario(Case(tokens=(3, 0, 2, 5), seed=seed), rank, num_ranks) for seed in range(3)]
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        for turn in range(times):
            scenario = scenarios[turn % 3]
            result = scenario.dispatch(buffer)
            scenario.check_dispatch(result)
            scenario.check_combine(scenario.combine(buffer, result[4]))


@pytest.mark.parametrize("times", [60, pytest.param(5000, marks=pytest.mark.slow)])
def test_many_small_operations(pool_of: PoolOf, times: int) -> None:
    pool_of(3).run(_many_small, times)
