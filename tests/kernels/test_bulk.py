"""The bulk-copy dispatch with its engine played: rows go once into shared memory, and from there to every copy."""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.kernels import bulk_emulator
from tests.kernels.expert_world import ExpandedRank, run_ranks, simulate
from tests.kernels.test_expert_major import CASES, DIRECT
from tests.kernels.world import Rank, Simulated, World
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import bulk_columns

SMALL = Case(tokens=(5, 6), num_topk=3, alignment=2, row_bytes=16, combine_bytes=16)


def world_of(monkeypatch: Any, seed: int, direct: str, stage_bytes: int, module: ModuleType | None = None) -> World:
    world = World(monkeypatch, 2, seed, direct=DIRECT[direct], stage_bytes=stage_bytes, max_steps=400_000)
    kernel = (module or bulk_emulator.bulk_dispatch()).dispatch
    monkeypatch.setattr(programs, "_BULK_DISPATCH", Simulated(world.simulator, kernel, programs._BULK_DISPATCH))
    monkeypatch.setattr(programs, "_BULK_COMBINE", {})
    world.target = programs.Target(2, True, 0)
    programs._dispatch.cache_clear()
    simulate(monkeypatch, world)
    return world


def run(monkeypatch: Any, case: Case, seed: int, direct: str, module: ModuleType | None = None) -> None:
    world = world_of(monkeypatch, seed, direct, 1 << 10, module)
    ranks = [ExpandedRank(world, case, rank, spare_rows=seed % 3) for rank in range(2)]
    run_ranks(world, ranks, max(ranks[0].num_rows) + 1, torch.bfloat16)
    assert [world.code(rank) for rank in range(2)] == [0, 0]


@pytest.mark.parametrize(("name", "direct"), [*zip(CASES, [*DIRECT] * 2, strict=True), ("plain", "staged")])
def test_expanded(monkeypatch: Any, name: str, direct: str) -> None:
    run(monkeypatch, CASES[name], len(name), direct)


@pytest.mark.parametrize("direct", DIRECT)
def test_compact(monkeypatch: Any, direct: str) -> None:
    world = world_of(monkeypatch, 1, direct, 1 << 9)
    ranks = [Rank(world, CASES["fp8"], rank) for rank in range(2)]
    for rank in ranks:
        rank.layout()
        rank.notify(30)
        rank.pull(30)
    world.run()
    for rank in ranks:
        rank.check_dispatch()


MUTANTS = {
    "slot before it is written": ("    meet(lane)\n", "    store_bulk(target, slot, lane * 0 + ROW, lane * 0)\n"),
    "another choice's copy": ("target + there * ROW, slot", "target + there * 0 + ROW * row, slot"),
    "sources before": ("base + (packed >> PACK_SHIFT)", "(packed >> PACK_SHIFT)"),
    "first choice": ("(first < 0) & (other >= 0)", "other >= 0"),
    "only this rank's experts": ("mine & (packed >= 0) & (expert >= 0)", "mine & (packed >= 0)"),
}


def mutant(old: str, new: str) -> ModuleType:
    source = Path(bulk_columns.__file__).read_text()
    assert source.count(old) == 1
    path = Path(tempfile.mkdtemp()) / "bulk_columns.py"
    path.write_text(source.replace(old, new))
    return bulk_emulator.bulk_dispatch(path)


@pytest.mark.parametrize("name", [name for name in MUTANTS if name != "slot before it is written"])
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    with pytest.raises(AssertionError):
        run(monkeypatch, SMALL, 1, "mixed", mutant(*MUTANTS[name]))
