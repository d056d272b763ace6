"""The kernels of dispatch and combine, several ranks under the scheduler that reorders stores."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.conftest import slow
from tests.kernels.world import Rank, World

SMALL = Case(tokens=(5, 9, 3), row_bytes=64, num_topk=3, local_experts=2, combine_bytes=64, bias="one")
CASES = {
    "small": SMALL,
    "scales": Case(tokens=(6, 0), row_bytes=48, scales=torch.float32, scale_columns=3, num_topk=5, combine_bytes=32),
    "sparse": Case(tokens=(7,), routing="sparse", row_bytes=32, combine_dtype=torch.float32, combine_bytes=48),
    "one expert": Case(tokens=(8, 1), routing="one_expert", row_bytes=16, combine_bytes=16),
}
DIRECT = {"direct": (True,), "staged": (False,), "mixed": (True, False, False)}


def run_pair(world: World, case: Case, num_worst_tokens: int = 0, num_sms: int = 4) -> list[Rank]:
    """Layout, dispatch, cached dispatch and combine on all ranks; with worst tokens nothing waits for the host."""
    ranks = [Rank(world, case, rank, num_sms) for rank in range(world.num_ranks)]
    for rank in ranks:
        rank.layout()
        rank.notify(num_worst_tokens)
    if not num_worst_tokens:
        world.run()
        for rank in ranks:
            rank.check_layout()
            rank.check_counts()
    for rank in ranks:
        rank.pull(num_worst_tokens or rank.num_rows[rank.rank])
        rank.combine(rank.handle())
    world.run()
    for rank in ranks:
        rank.check_dispatch()
        rank.check_combine()
        assert world.code(rank.rank) == 0
    return ranks


QUICK = {
    ("small", "direct", 2), ("small", "staged", 3), ("scales", "mixed", 3), ("sparse", "mixed", 2),
    ("one expert", "mixed", 2),
}  # fmt: skip
"""The rest is slow."""


@pytest.mark.parametrize(
    ("name", "direct", "num_ranks"),
    [
        pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
        for case in itertools.product(CASES, DIRECT, (2, 3))
    ],
)
def test_every_rank_gets_what_it_must(monkeypatch: Any, name: str, direct: str, num_ranks: int) -> None:
    world = World(monkeypatch, num_ranks, num_ranks - 2, direct=DIRECT[direct])
    run_pair(world, CASES[name])


@pytest.mark.parametrize("seed", [1, *slow(0, 2, 3)])
def test_rounds_through_a_small_stage(monkeypatch: Any, seed: int) -> None:
    world = World(monkeypatch, 3, seed, direct=(False, True, False), stage_bytes=1024)
    run_pair(world, SMALL, num_worst_tokens=40 if seed % 2 else 0)


def test_one_rank(monkeypatch: Any) -> None:
    run_pair(World(monkeypatch, 1, 0), SMALL)
