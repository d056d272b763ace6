"""The bulk-copy dispatch with its engine played: rows go once into shared memory, and from there to every copy."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime.errors import InterpreterError

from tests.cases import Case
from tests.conftest import but_slow, slow
from tests.kernels import bulk_emulator
from tests.kernels.expert_world import ExpandedRank, run_ranks, simulate
from tests.kernels.test_expert_major import CASES, DIRECT
from tests.kernels.world import Rank, Simulated, World
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import bulk_columns, bulk_dispatch, bulk_sources

WIDE = Case(tokens=(3, 2), num_topk=2, row_bytes=2080, combine_bytes=16, scales=torch.float32, scale_columns=3)
"""Rows of more words than threads that zero them."""
SMALL = Case(tokens=(5, 6), num_topk=3, alignment=2, row_bytes=16, combine_bytes=16)


def world_of(monkeypatch: Any, seed: int, direct: str, stage_bytes: int, module: ModuleType | None = None) -> World:
    world = World(monkeypatch, 2, seed, direct=DIRECT[direct], stage_bytes=stage_bytes, max_steps=400_000)
    kernel = (module or bulk_emulator.bulk_module("bulk_dispatch")).dispatch
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


def compact(world: World, case: Case, num_rows: int, **options: Any) -> None:
    """A dispatch of both ranks to ``num_rows`` rows each at most, and what it brought."""
    ranks = [Rank(world, case, rank, **options) for rank in range(2)]
    for rank in ranks:
        rank.layout()
        rank.notify(num_rows)
        rank.pull(num_rows)
    world.run()
    for rank in ranks:
        rank.check_dispatch()


@pytest.mark.parametrize(
    ("name", "direct"),
    [("fp8", "staged"), *slow(("plain", "direct"), ("sparse", "mixed"))],
)
def test_expanded(monkeypatch: Any, name: str, direct: str) -> None:
    run(monkeypatch, CASES[name], len(name), direct)


def test_compact(monkeypatch: Any) -> None:
    compact(world_of(monkeypatch, 1, "mixed", 1 << 9), CASES["fp8"], 30)


def test_the_smallest_rings(monkeypatch: Any) -> None:
    """As with rows of which few fit: four warps, of three slots each."""
    case = CASES["fp8"]
    slot = bulk_dispatch.slot_bytes(case.row_bytes, 4 * case.scale_columns, case.num_topk)
    monkeypatch.setattr(programs, "SHARED_BYTES", bulk_sources.TABLE_BYTES + 1024 + 15 * slot)
    world = world_of(monkeypatch, 3, "mixed", 1 << 9)
    made: list[dict[str, Any]] = []
    make = programs._BULK_DISPATCH.variant
    monkeypatch.setattr(
        programs._BULK_DISPATCH, "variant", lambda *warps, **given: made.append(given) or make(*warps, **given)
    )
    compact(world, case, 30)
    assert {(given["W"], given["SLOTS"], given["LAG"]) for given in made} == {(4, 3, 2)}


def along_a_handle(monkeypatch: Any, module: ModuleType | None = None) -> None:
    """Twice, behind the dispatch it is of; the rows past the last one are zeroed there, and once here."""
    world = world_of(monkeypatch, 1, "mixed", 1 << 13, module)
    ranks = [Rank(world, WIDE, rank, num_sms=3) for rank in range(2)]
    for rank in ranks:
        rank.layout()
        rank.notify(30)
        rank.pull(30, zeros=True)
    world.run()
    for rank in ranks:
        rank.check_dispatch(zeros=True)
    outs = [rank.out for rank in ranks]
    for zeros in (True, False):
        for rank, rank.out in zip(ranks, outs, strict=True):
            rank.pull(30, rank.handle(), signature=44, zeros=zeros)
        world.run()
        for rank in ranks:
            rank.check_dispatch(cached=True, zeros=zeros)


def test_along_a_handle(monkeypatch: Any) -> None:
    along_a_handle(monkeypatch)


def many_rows(monkeypatch: Any, seed: int, module: ModuleType | None = None) -> None:
    """More rows for each warp than its ring has slots."""
    slots = 4 * 128 * 5
    monkeypatch.setattr(programs, "SHARED_BYTES", slots + bulk_sources.TABLE_BYTES + 1024)
    world = world_of(monkeypatch, seed, "direct", 1 << 10, module)
    case = Case(tokens=(30, 40), num_topk=2, row_bytes=32, routing="all", seed=seed)
    compact(world, case, 80, num_sms=2)


def test_rings_go_round(monkeypatch: Any) -> None:
    many_rows(monkeypatch, 1)


COPIES = {
    "another row": ("target + there * ROW, slot", "target + row * ROW, slot"),
    "sources before": ("base + (packed >> PACK_SHIFT)", "(packed >> PACK_SHIFT)"),
    "first choice": ("(first < 0) & (other >= 0)", "other >= 0"),
    "experts of other ranks": ("(expert >= 0) & (expert < num_local)", "(expert >= -9)"),
}
ENGINE = {
    "rows before they are there": ("            wait_parity(bars + use_at * 8, parity + tid * 0)\n", ""),
    "slots before they are read": ("            wait_stores_read(tid, SLOTS - LAG - 1)\n", ""),
    "the phase before": ("parity ^ 1, parity)\n            use_at", "parity, parity)\n            use_at"),
    "the end before all is written": (
        "                wait_stores(tid)\n            elif is_alone",
        "            elif is_alone",
    ),
}


WINDOWS = {
    "without the last granule": ("(skip + nbytes + 15)", "(nbytes + 15)"),
    "an arrival too few": ("bars + slot * 8, tid * 0 + 1 + ", "bars + slot * 8, tid * 0 + 2 + "),
    "of the column before": ("is_ids = lane == IDS", "is_ids = lane == IDS + 1"),
    "of another place in them": ("lane * 4, skip, asks", "lane * 4, skip * 0, asks"),
    "on others": ("gl.where(is_ids, SMALL_IDS, SMALL_WEIGHTS)", "gl.where(is_ids, SMALL_IDS, SMALL_IDS)"),
}


TAILS = {
    "the first of them stays": ("zero_tail(out_x.to(tl.int64), last, ", "zero_tail(out_x.to(tl.int64), last + 1, "),
    "those of scales stay": ("out_scales.to(tl.int64), last, num", "out_scales.to(tl.int64), num_rows, num"),
    "one word a thread": ("range(0, BYTES // SIZE, 32 * W)", "range(0, 1, 32 * W)"),
    "always": ("if num_expanded != 0:", "if num_expanded >= 0:"),
    "never": ("if num_expanded != 0:", "if num_expanded < 0:"),
    "along handles only": (
        "if not EXPAND and not PLACED:\n                    if num",
        "if CACHED:\n                    if num",
    ),
    "of the first program": ("last, num_rows, worker, workers, tid, ROW", "last, num_rows, 0, workers, tid, ROW"),
    "by the last of another rank": (
        "rows_from(prefix, num_rows, rank, R - 1",
        "rows_from(prefix, num_rows, 1 - rank, R - 1",
    ),
}


@pytest.mark.parametrize("name", but_slow(TAILS, *(name for name in TAILS if name != "never")))
def test_fault_in_the_zeros_past_the_last_row_is_found(monkeypatch: Any, name: str) -> None:
    source = bulk_columns if name == "one word a thread" else bulk_dispatch
    module = bulk_emulator.mutated_bulk_module("bulk_dispatch", source, *TAILS[name])
    with pytest.raises((AssertionError, InterpreterError)):
        along_a_handle(monkeypatch, module)


@pytest.mark.parametrize("name", but_slow(COPIES, "another row", "sources before", "experts of other ranks"))
def test_fault_in_copies_is_found(monkeypatch: Any, name: str) -> None:
    module = bulk_emulator.mutated_bulk_module("bulk_dispatch", bulk_columns, *COPIES[name])
    with pytest.raises((AssertionError, InterpreterError)):
        run(monkeypatch, SMALL, 1, "mixed", module)


@pytest.mark.parametrize("name", but_slow(WINDOWS, "without the last granule"))
def test_fault_in_the_windows_of_small_columns_is_found(monkeypatch: Any, name: str) -> None:
    module = bulk_emulator.mutated_bulk_module("bulk_dispatch", bulk_dispatch, *WINDOWS[name])
    with pytest.raises((AssertionError, InterpreterError)):
        run(monkeypatch, SMALL, 1, "mixed", module)


@pytest.mark.parametrize("name", ENGINE)
def test_fault_in_the_use_of_the_engine_is_found(monkeypatch: Any, name: str) -> None:
    module = bulk_emulator.mutated_bulk_module("bulk_dispatch", bulk_dispatch, *ENGINE[name])
    with pytest.raises((AssertionError, InterpreterError)):  # the latter from within a helper
        many_rows(monkeypatch, 1, module)
