"""Expanded rows under the simulator: right in every way rows travel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.conftest import slow
from tests.kernels.expert_world import ExpandedRank, run_ranks, simulate
from tests.kernels.world import World
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import words

DIRECT = {"direct": (True,), "staged": (False,), "mixed": (True, False)}
BASE = {"row_bytes": 32, "combine_bytes": 32}
CASES = {
    "plain": Case(tokens=(11, 6), num_topk=3, local_experts=3, alignment=4, **BASE),
    "fp8": Case(
        tokens=(7, 12), num_topk=2, local_experts=2, alignment=3, row_bytes=16, combine_bytes=16,
        dtype=torch.float8_e4m3fn, scales=torch.float32, scale_columns=3,
    ),
    "duplicates": Case(tokens=(8, 5), num_topk=4, routing="duplicates", alignment=2, **BASE),
    "sparse": Case(tokens=(9, 8), num_topk=3, routing="sparse", local_experts=4, **BASE),
    "idle": Case(tokens=(0, 9), num_topk=2, alignment=8, **BASE),
    "one choice": Case(tokens=(9, 4), num_topk=1, local_experts=5, alignment=4, **BASE),
}  # fmt: skip


def run(
    monkeypatch: Any,
    case: Case,
    seed: int,
    direct: str = "direct",
    *,
    expand: bool = True,
    num_ranks: int = 2,
    sum_dtype: torch.dtype = torch.bfloat16,
    stage_bytes: int = 1 << 10,
) -> World:
    world = World(monkeypatch, num_ranks, seed, direct=DIRECT[direct], stage_bytes=stage_bytes, max_steps=200_000)
    simulate(monkeypatch, world)
    ranks = [ExpandedRank(world, case, rank, expand=expand, spare_rows=seed % 3) for rank in range(num_ranks)]
    run_ranks(world, ranks, max(ranks[0].num_rows) + 1 + seed % 2, sum_dtype)
    assert [world.code(rank) for rank in range(num_ranks)] == [0] * num_ranks
    return world


@pytest.mark.parametrize(("name", "direct"), [*zip(CASES, [*DIRECT] * 2, strict=True), *slow(("plain", "staged"))])
def test_expanded(monkeypatch: Any, name: str, direct: str) -> None:
    run(monkeypatch, CASES[name], len(name), direct)


def test_spans() -> None:
    programs.spans_of.cache_clear()
    for num_tokens in (0, 1, 31, 32, 33, 4095, 4096, 4097, 1 << 17):
        for num_topk in (1, 3, 8, 32):
            spans, words_behind = programs.spans_of(num_tokens, num_topk, 96)
            assert 1 <= spans <= 128
            assert spans == 128 or spans * programs.tokens_per_tile(num_topk) >= num_tokens
            assert words_behind == 128 * spans + 3
    assert programs.spans_of(4096, 8, 256)[0] == 128


def test_small_stage_and_three_ranks(monkeypatch: Any) -> None:
    run(monkeypatch, CASES["plain"], 1, "mixed", num_ranks=3, stage_bytes=768)


ORDERED = Case(tokens=(6, 5), num_topk=5, routing="own", combine_dtype=torch.float32, row_bytes=32, combine_bytes=32)
"""Five float32 rows for each token: the order of a sum shows."""


def test_copies_are_summed_in_the_order_of_choices(monkeypatch: Any) -> None:
    run(monkeypatch, ORDERED, 4, sum_dtype=torch.float32)


def test_one_rounding(monkeypatch: Any) -> None:
    run(monkeypatch, CASES["plain"], 2, "mixed", sum_dtype=torch.float32)


@pytest.mark.parametrize("name", ["fp8", *slow("idle")])
def test_compact_rows_say_where_they_are_from(monkeypatch: Any, name: str) -> None:
    run(monkeypatch, CASES[name], 3, "mixed", expand=False)


def test_no_room_is_reported_and_nothing_is_written_there(monkeypatch: Any) -> None:
    case = Case(tokens=(8, 5), num_topk=3, routing="one_expert", **BASE)
    world = World(monkeypatch, 2, 5, max_steps=200_000)
    simulate(monkeypatch, world)
    ranks = [ExpandedRank(world, case, rank, spare_rows=-4 * (rank == 1)) for rank in range(2)]
    guard = []
    for rank in ranks:
        rank.layout()
        rank.pack()
        rank.notify(20)
        rank.num_expanded = max(rank.num_expanded, 0)
        rank.pull(20)
        guard.append(rank.num_expanded)
    world.run()
    assert [world.code(rank) for rank in range(2)] == [0, words.NO_ROOM.value]
    assert ranks[1].metadata[:, 2:].max() == guard[1] - 1


@pytest.mark.parametrize("copy", [1000, *slow(-2)])
def test_copies_that_do_not_exist_are_reported(monkeypatch: Any, copy: int) -> None:
    world = World(monkeypatch, 2, 6, max_steps=200_000)
    simulate(monkeypatch, world)
    ranks = [ExpandedRank(world, CASES["plain"], rank) for rank in range(2)]
    for rank in ranks:
        rank.layout()
        rank.pack()
        rank.notify(30)
        rank.pull(30)
    world.run()
    ranks[0].metadata[1, 2] = copy
    for rank in ranks:
        rank.pull(30, rank.handle(), signature=44)
    world.run()
    assert [world.code(rank) for rank in range(2)] == [words.BAD_HANDLE.value, 0]
    world.status[0].zero_()
    for rank in ranks:
        rank.combine_expanded(torch.bfloat16)
    world.run()
    assert [world.code(rank) for rank in range(2)] == [words.BAD_HANDLE.value, 0]
