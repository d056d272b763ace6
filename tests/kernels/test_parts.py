"""Dispatches and combines in several parts: bit for bit what they must write, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.conftest import but_slow, slow
from tests.kernels.mutants import mutated_module
from tests.kernels.parts_world import Load, Parts, PartsPlane, run_all, simulate
from tests.kernels.test_low_latency_faults import status_of
from tests.kernels.test_mutants import disturb
from tests.kernels.world import World
from tokenferry.dataplane import HeldRows, Outputs, SendPlan
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import combine, dispatch, parts, sync, words
from tokenferry.errors import BufferStateError

DIRECT = {"direct": (True,), "staged": (False,), "mixed": (True, False, False)}
LOADS = {
    "plain": (2, Load(((7, 4), (5, 6)), ((3, 4), (4, 2)), num_topk=3, num_weights=3)),
    "scales": (3, Load(((4, 0, 5), (0, 0, 0)), ((2, 4, 3), (1, 1, 1)), 48, 12, 2, seed=1)),
    "no choices": (2, Load(((8, 3),), ((3, 3),), 16, 4, dtype=torch.float16, sums=torch.float32, seed=2)),
    "wide sums": (2, Load(((6, 5), (4, 7)), ((4, 4), (2, 3)), sums=torch.float32, num_weights=5, seed=3)),
    "one rank": (1, Load(((9,), (4,)), ((4,), (5,)), num_topk=2, width=8, dtype=torch.float64, sums=torch.float64)),
}
SMALL = Load(((5, 4),), ((3, 2),), num_topk=2, num_weights=2, seed=6)
Modules = dict[str, ModuleType]
AHEAD = Load(((12, 12),), ((4, 4),), 16, seed=1)
SEEDS = (0, 4, 7, *range(24))
"""The first ones find all faults, as it happens."""
ENTRIES = {"dispatch": dispatch, "combine": combine, "parts": parts}


def world_of(
    monkeypatch: Any, num_ranks: int, seed: int, direct: str, stage_bytes: int = 512, modules: Any = None
) -> World:
    kernels = {name: module for name, module in (modules or {}).items() if name != "parts"}
    world = World(
        monkeypatch, num_ranks, seed, direct=DIRECT[direct], stage_bytes=stage_bytes, modules=kernels,
        max_steps=200_000,
    )  # fmt: skip
    simulate(monkeypatch, world, (modules or {}).get("parts"))
    return world


def untouched(outputs: Outputs, first: int = 0) -> None:
    for name, rows in zip(Outputs._fields, outputs, strict=True):
        if rows is not None:
            Parts.check_untouched(name, rows[first:])


@pytest.mark.parametrize(
    ("name", "direct", "stage_bytes"),
    [
        *slow(("plain", "direct", 512), ("plain", "staged", 512)),
        ("scales", "mixed", 512),
        ("no choices", "mixed", 256),
        *slow(("wide sums", "staged", 256), ("wide sums", "direct", 512)),
        ("one rank", "staged", 512),
    ],
)
def test_all_parts(monkeypatch: Any, name: str, direct: str, stage_bytes: int) -> None:
    num_ranks, load = LOADS[name]
    world = world_of(monkeypatch, num_ranks, len(name), direct, stage_bytes)
    run_all(Parts(world, load), tells=name != "no choices")


def test_rows_that_do_not_fit_are_not_received(monkeypatch: Any) -> None:
    """The others receive theirs, and the next operation runs."""
    several = Parts(world_of(monkeypatch, 2, 0, "mixed"), SMALL)
    several.room[0] = several.num_rows[0] - 1
    for part in several.each_part():
        several.dispatch(*part)
    several.world.run()
    assert several.codes() == [words.BAD_HANDLE.value, words.OK.value]
    several.check([1])
    untouched(several.outputs[0], several.room[0])
    outs = several.combine(0, 1)
    several.world.run()
    several.check_sums(0, 1, outs)


def test_other_counts_of_held_rows_are_found(monkeypatch: Any) -> None:
    """By the ranks whose tokens they are; these write nothing."""
    several = Parts(world_of(monkeypatch, 2, 1, "mixed"), SMALL)

    def change(rank: int, held: HeldRows) -> HeldRows:
        return held._replace(ends=held.ends - torch.tensor([0, rank]))

    bad, good = several.combine(0, 0, change), several.combine(0, 1)
    several.world.run()
    assert several.codes() == [words.OK.value, words.BAD_HANDLE.value]
    assert all(out.isnan().all() for out in bad[1])
    several.check_sums(0, 1, good)


def test_ranks_that_disagree_step_back(monkeypatch: Any) -> None:
    several = Parts(world_of(monkeypatch, 2, 2, "staged"), SMALL)
    before = [[start.tolist() for start in starts] for starts in several.starts]
    several.dispatch(0, 0, (7, 8))
    several.world.run()
    assert several.codes() == [words.MISMATCH.value] * 2
    assert [[start.tolist() for start in starts] for starts in several.starts] == before
    for outputs in several.outputs:
        untouched(outputs)
    for status in several.world.status:
        status.zero_()
    run_all(several)


def test_rank_that_fails_before_its_rows(monkeypatch: Any) -> None:
    """Its peers receive theirs all the same."""
    several = Parts(world_of(monkeypatch, 2, 3, "mixed"), replace(SMALL, chunks=((9, 9),)))
    several.dispatch(0, 0, fails=0)
    several.world.run()
    several.check([1])
    untouched(several.outputs[0])


def received(monkeypatch: Any, seed: int, modules: Modules | None = None) -> None:
    several = Parts(world_of(monkeypatch, 2, seed, "mixed", 256, modules), SMALL)
    run_all(several, combines=False)


def ahead(monkeypatch: Any, seed: int, modules: Modules | None = None) -> None:
    """Owners whose rows are staged, and so are through before their readers are."""
    world = world_of(monkeypatch, 2, seed, "staged", 4096, modules)
    disturb(monkeypatch, world, seed)
    run_all(Parts(world, AHEAD, num_sms=2), combines=False)


def too_many(monkeypatch: Any, seed: int, modules: Modules | None = None) -> None:
    several = Parts(world_of(monkeypatch, 2, seed, "direct", 256, modules), SMALL)
    several.room[0] = several.num_rows[0] - 1
    for part in several.each_part():
        several.dispatch(*part)
    several.world.run()
    assert several.codes() == [words.BAD_HANDLE.value, words.OK.value]


def summed(monkeypatch: Any, seed: int, modules: Modules | None = None, direct: str = "direct") -> None:
    several = Parts(world_of(monkeypatch, 2, seed, direct, 256, modules), SMALL)
    outs = [(part, several.combine(*part)) for part in several.each_part()]
    several.world.run()
    for part, sums in outs:
        several.check_sums(*part, sums)
    assert several.codes() == [words.OK.value] * 2


def summed_staged(monkeypatch: Any, seed: int, modules: Modules | None = None) -> None:
    summed(monkeypatch, seed, modules, "staged")


def test_room_in_the_stage(monkeypatch: Any) -> None:
    """What is said to fit is never refused by an operation, whatever the columns."""
    plane = PartsPlane(world_of(monkeypatch, 2, 0, "staged", 1 << 10), 0)
    fitting = [16 * n for n in range(1, 40) if plane.has_room(16 * n)]
    assert fitting == list(range(16, 224, 16))
    for scales, choices in ((0, 0), (4, 0), (12, 1), (20, 3)):
        rows = fitting[-1] - 16 * -(-(scales + 12 * choices) // 16)
        plan = SendPlan(
            *(torch.empty(0, n, dtype=torch.uint8) for n in (rows, scales, choices, choices)),
            torch.empty(0, 2),
            None,
            None,
            0,
            None,
        )
        columns = [torch.empty(0, rows // 4), torch.empty(0, choices)]
        plane._check_stage(programs.dispatch_record(plan))
        plane._check_stage(programs.combine_record(columns) * 2)


def test_nothing_runs_after_giving_up(monkeypatch: Any) -> None:
    several = Parts(world_of(monkeypatch, 2, 0, "direct"), SMALL)
    for rank, plane in enumerate(several.planes):
        plane.status = status_of(2)
        plane.give_up(f"reason {rank}")
        with pytest.raises(BufferStateError, match=f"reason {rank}"):
            plane.check()
        with pytest.raises(BufferStateError):
            plane.sum_rows([], [], torch.empty(1, 8))
        plane.status.failed = False  # what is queued already, or replayed
    several.dispatch(0, 0)
    outs = several.combine(0, 0)
    several.world.run()
    for outputs in several.outputs:
        untouched(outputs)
    assert all(out.isnan().all() for mine in outs for out in mine)


def test_layout_of_more_ranks_than_those_of_the_node(monkeypatch: Any) -> None:
    world = world_of(monkeypatch, 2, 0, "direct")
    ids = torch.tensor([[0, 11], [5, 4], [-1, 7]])
    layout = PartsPlane(world, 0).layout(ids, 12, 6)
    world.run()
    assert layout.num_tokens_per_rank.tolist() == [1, 0, 1, 1, 0, 1]


COUNT = "        tl.store(message_word(base, rank, ROW_COUNT), sent.to(tl.int64))\n"
SIGNAL = "        tl.debug_barrier()\n        signal(word(base, PUBLISHED + rank * LINE), progress(epoch, 1))\n"
TAIL = "if not CACHED and not PLACED:\n                fill_tail"
MUTANTS = {
    "starts stay": (parts, "tl.store(starts + source, end)", "pass", received),
    "all begin at one start": (parts, "tl.load(starts + source)", "tl.load(starts)", received),
    "tokens of the part": (dispatch, "t + tl.load(prefix + 2 * R + source)", "t", received),
    "first token of another": (parts, "tl.load(first_tokens + source)", "tl.load(first_tokens)", received),
    "the tail is filled": (dispatch, TAIL, TAIL.replace(" and not PLACED", ""), received),
    "count after its flag": (parts, COUNT + SIGNAL, SIGNAL + COUNT, received),
    "message over an unread one": (sync, "rank, reader, progress(epoch - 1, ALL)", "rank, reader, 0", ahead),
    "messages of the part before": (parts, "rank, epoch, 1, operation", "rank, epoch - 1, 1, operation", received),
    "any number fits": (parts, "(start + count <= num_rows)", "(num_rows > 0)", too_many),
    "held rows of another": (parts, "tl.load(starts + peer)", "tl.load(starts)", summed),
    "held rows for another": (combine, "source, FIRST_ROW)", "rank, FIRST_ROW)", summed),
    "held tokens from the first part on": (
        combine,
        "first += tl.load(prefix + 2 * R + reader)",
        "pass",
        summed_staged,
    ),
    "counts of another": (parts, "table + 3 * R + peer", "table + 3 * R", summed),
}


def finds(monkeypatch: Any, name: str, seed: int) -> bool:
    module, old, new, scenario = MUTANTS[name]
    modules = {key: mutated_module(module, old, new, entry=entry) for key, entry in ENTRIES.items()}
    try:
        scenario(monkeypatch, seed, modules)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize(
    "name",
    but_slow(
        MUTANTS,
        "message over an unread one",
        "first token of another",
        "the tail is filled",
        "any number fits",
        "held rows of another",
        "starts stay",
    ),
)
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    assert any(finds(monkeypatch, name, seed) for seed in SEEDS)


@pytest.mark.parametrize("scenario", [received, ahead, too_many, summed, summed_staged])
def test_right_protocol_passes(monkeypatch: Any, scenario: Any) -> None:
    scenario(monkeypatch, 0)
