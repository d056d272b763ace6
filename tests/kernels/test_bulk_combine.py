"""The bulk-copy combine with its engine played: rows of all ranks pass through the rings of groups, summed in order.

Threads of a program go in step here. So nobody sees whether the one that asks for rows waits for those that sum, only
whether it waits for the right phase.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime.errors import InterpreterError

from tests.cases import Case
from tests.kernels import bulk_emulator
from tests.kernels.schedules import Scheduler, stop_at_deadlocks
from tests.kernels.test_mutants import DIRECT
from tests.kernels.world import Rank, Simulated, World
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import bulk_combine, words
from tokenferry.dataplane.cuda.programs import Target

SLOTS = 9
"""Two rings of four: the items of a group go round."""
PLAIN = Case(tokens=(14, 6), row_bytes=16, num_topk=3, combine_bytes=32, routing="sparse", bias="two", seed=1)
HALF = replace(PLAIN, combine_dtype=torch.float16, bias="one")
WIDE = replace(PLAIN, tokens=(3, 2), combine_bytes=2304, bias="none")


def run(
    monkeypatch: Any,
    case: Case = PLAIN,
    direct: str = "direct",
    module: ModuleType | None = None,
    *,
    seed: int = 0,
    num_ranks: int = 2,
    weights: bool = True,
    stage_bytes: int = 1 << 10,
    too_many: int = 0,
) -> None:
    """``too_many``: rows more than there are that rank 1 has for rank 0, by the handle of rank 0."""
    world = World(monkeypatch, num_ranks, seed, direct=DIRECT[direct], stage_bytes=stage_bytes, max_steps=40_000)
    world.simulator.random = Scheduler(seed)
    stop_at_deadlocks(monkeypatch)
    kernel = (module or bulk_emulator.bulk_module("bulk_combine")).combine
    simulated = {key: Simulated(world.simulator, kernel, value) for key, value in programs._BULK_COMBINE.items()}
    monkeypatch.setattr(programs, "_BULK_COMBINE", simulated)
    width = case.combine_bytes // case.combine_dtype.itemsize
    slot = max(programs._power_of_two(width) * case.combine_dtype.itemsize, 1024)
    monkeypatch.setattr(programs, "SHARED_BYTES", SLOTS * slot + bulk_combine.EXTRA_BYTES)
    ranks = [Rank(world, case, rank, num_sms=2) for rank in range(num_ranks)]
    worst = max(ranks[0].num_rows) + 2
    for rank in ranks:
        rank.layout()
        rank.notify(worst)
        rank.pull(worst)
    if too_many:
        world.run()  # the matrix is there
    world.target = Target(num_ranks, True, 0)
    for rank in ranks:
        handle = rank.handle()
        if too_many and rank.rank == 0:
            prefix = handle.rank_prefix_matrix.clone()
            prefix.view(num_ranks, num_ranks)[0, 1] += too_many
            handle = handle._replace(rank_prefix_matrix=prefix)
        rank.combine(handle, weights=weights)
    assert programs._combine.cache_info().currsize == 1
    world.run()
    for rank in ranks[bool(too_many) :]:
        rank.check_combine()
    codes = [words.BAD_HANDLE.value if too_many else 0, *[0] * (num_ranks - 1)]
    assert [world.code(rank) for rank in range(num_ranks)] == codes


@pytest.mark.parametrize("direct", DIRECT)
def test_sums(monkeypatch: Any, direct: str) -> None:
    run(monkeypatch, PLAIN, direct)


@pytest.mark.parametrize("tokens", [(14, 6), (40, 40), (0, 6)])
@pytest.mark.parametrize("direct", DIRECT)
def test_a_bad_handle_keeps_nobody_waiting(monkeypatch: Any, direct: str, tokens: tuple[int, ...]) -> None:
    """Whoever has it reads nothing of any round, and says so; the others have their sums."""
    run(monkeypatch, replace(PLAIN, tokens=tokens), direct, too_many=1000)


def run_several_warps(monkeypatch: Any, direct: str, module: ModuleType | None = None) -> None:
    """Two groups of four warps each."""
    monkeypatch.setattr(programs, "_MOST_SUMS", 16)
    case = replace(WIDE, tokens=(11, 4))
    run(monkeypatch, case, direct, module, weights=direct == "mixed", stage_bytes=1 << 15)


@pytest.mark.parametrize("direct", DIRECT)
def test_groups_of_several_warps(monkeypatch: Any, direct: str) -> None:
    run_several_warps(monkeypatch, direct)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tid * 0 + W // G, first_thread", "tid * 0 + 1, first_thread"),
        ("tid // (32 * (W // G))", "tid // 32 % G"),
        ("tid % (32 * (W // G))", "tid % 32"),
    ],
)
def test_fault_in_groups_of_several_warps_is_found(old: str, new: str, monkeypatch: Any) -> None:
    module = bulk_emulator.mutated_bulk_module("bulk_combine", bulk_combine, old, new)
    with pytest.raises((AssertionError, InterpreterError)):
        run_several_warps(monkeypatch, "mixed", module)


def test_three_ranks(monkeypatch: Any) -> None:
    run(monkeypatch, HALF, "mixed", seed=1, num_ranks=3)


def test_wide_rows_without_weights(monkeypatch: Any) -> None:
    run(monkeypatch, WIDE, weights=False)


FULL = "wait_parity(extra + BARS + slot * 8, parity + tid * 0)"
BY_TOKEN = "gl.where(load_shared_long(entry + BY_TOKEN) != 0, token, head)"
MUTANTS = {
    # The engine.
    "rows before they are there": (FULL, "pass", "direct"),
    "the phase before": ("parity = tl.where(use_at == SLOTS - 1, parity ^ 1, parity)", "pass", "direct"),
    "the phase before, asked": ("tl.where(is_end, ask_parity ^ 1, ask_parity)", "ask_parity", "direct"),
    "one warp has summed": ("(tid % 32 == 0)", "(tid == 0)", "direct"),
    "rows that are not there are awaited": ("total = live * ROW", "total = (live * 0 + 1) * ROW", "direct"),
    "weights are not awaited": ("total += live * size", "pass", "direct"),
    "short windows": ("(skip + K * 4 + 15) & -16", "(K * 4 + 15 + lane * 0) & -16", "direct"),
    "windows from their start": ("+ (note & (LIVE - 1))", "", "direct"),
    # What is asked for and summed.
    "rows without a head": ("(head >= 0) & (head < count)", "head < count", "direct"),
    "there is always a row": ("notes + use_at * G * 8) >= LIVE", "notes + use_at * G * 8) >= 0", "direct"),
    "there are always weights": ("gl.where(note >= LIVE", "gl.where(note >= 0", "direct"),
    "whether the first group has a row": ("NOTES + groups * 8", "NOTES + groups * 0", "direct"),
    "rows of the first group's token": (
        "source, token + apart, slot_at",
        "source, token + apart * 0, slot_at",
        "staged",
    ),
    "heads of the first group's token": (
        "ahead_token + apart, stop",
        "ahead_token + apart * 0, stop",
        "direct",
    ),
    "sums of the first group's token": ("n * workers + rows_apart", "n * workers + rows_apart * 0", "direct"),
    "one slot for all groups": ("slot = slot_at * G + group", "slot = slot_at * G + group * 0", "direct"),
    "groups are programs": ("rank, this, epoch, programs, R)", "rank, this, epoch, workers, R)", "staged"),
    "direct rows by token": (BY_TOKEN, "token", "direct"),
    "staged rows by head": (BY_TOKEN, "head", "staged"),
    "rows of one source": (
        "store_shared_long(entry + ROWS_AT, base",
        "store_shared_long(table + ROWS_AT, base",
        "direct",
    ),
    "steps of rows": ("entry + ROWS_STEP, step", "entry + ROWS_STEP, 0 * step", "direct"),
    "steps of weights": ("entry + WEIGHTS_STEP, step", "entry + WEIGHTS_STEP, 0 * step", "direct"),
    "the last source is left out": (
        "is_end = source == R - 1\n    token",
        "is_end = source == R - 2\n    token",
        "direct",
    ),
    "the last token is left out": ("(end - first - worker + workers - 1)", "(end - first - worker)", "direct"),
    "rounds begin with the first token": (
        "ahead_token = (first + worker)",
        "ahead_token = (first * 0 + worker)",
        "staged",
    ),
    "rounds are not awaited": ("if alive & fits & (this < rounds):", "if rank < 0:", "staged"),
    "second bias is the first": ("gl.load(bias_1 + place", "gl.load(bias_0 + place", "direct"),
    "weights of one source": ("sums += gl.where(", "sums = gl.where(", "direct"),
    # The stage.
    "one half": ("target = own + (this % 2) * half", "target = own", "staged"),
    "slots are not the round's": (
        "slot = tl.load(src_idx + row) - first",
        "slot = tl.load(src_idx + row) % 2",
        "staged",
    ),
    "weights staged over rows": ("slot * RECORD + AT)", "slot * RECORD)", "staged"),
}


def finds(module: ModuleType, direct: str, seed: int) -> bool:
    try:
        with pytest.MonkeyPatch.context() as monkeypatch:
            run(monkeypatch, PLAIN, direct, module, seed=seed)
    except (AssertionError, InterpreterError):  # the latter from within a helper
        return True
    return False


@functools.cache
def check_right_kernel(direct: str, seed: int) -> None:
    assert not finds(bulk_emulator.bulk_module("bulk_combine"), direct, seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_found(name: str) -> None:
    old, new, direct = MUTANTS[name]
    module = bulk_emulator.mutated_bulk_module("bulk_combine", bulk_combine, old, new)
    seed = next((seed for seed in range(6) if finds(module, direct, seed)), None)
    assert seed is not None
    check_right_kernel(direct, seed)
