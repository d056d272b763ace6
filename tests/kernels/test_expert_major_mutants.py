"""What expanded operations compute and report: no part of it can be wrong unseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.cases import Case, choices
from tests.conftest import but_slow
from tests.kernels import expert_world
from tests.kernels.expert_world import ExpandedRank, simulate
from tests.kernels.mutants import mutated_modules
from tests.kernels.schedules import Scheduler, stop_at_deadlocks
from tests.kernels.world import World
from tokenferry.dataplane import Outputs
from tokenferry.dataplane.cuda.kernels import dispatch, expert_major, layout, notify, words

Modules = dict[str, ModuleType]
MODULES: Modules = {"layout": layout, "notify": notify, "dispatch": dispatch, "expert_major": expert_major}

PLAIN = Case(tokens=(5, 6), num_topk=3, alignment=4, row_bytes=16, combine_bytes=16, routing="sparse", seed=2)
SCALES = replace(PLAIN, scales=torch.float32, scale_columns=3)
ORDERED = replace(PLAIN, routing="own", num_topk=5, combine_dtype=torch.float32)
ROUNDED = replace(PLAIN, routing="own", num_topk=5)
MANY = replace(PLAIN, tokens=(3, 2), num_topk=2, local_experts=300, routing="random", seed=3)
PACKED = (
    Case(tokens=(3, 12), num_topk=3, local_experts=3, routing="duplicates"),
    Case(tokens=(7, 13), num_topk=2, local_experts=5, routing="sparse"),
    Case(tokens=(19, 37), num_topk=1, local_experts=2, routing="random"),
    Case(tokens=(2, 9), num_topk=5, local_experts=40, routing="sparse"),
    Case(tokens=(1, 0), num_topk=4, routing="one_expert"),
    Case(tokens=(6, 9), num_topk=2, routing="nothing"),
)
CROWD = Case(tokens=(8, 5), num_topk=3, routing="one_expert", alignment=4, row_bytes=16, combine_bytes=16)
WORST = 14
"""Rows at most."""
GUARD = 8
"""Rows before and behind what a dispatch may write."""

assert any((choices(MANY, rank, 2) % 300 >= 256).any() for rank in range(2))


class Guards:
    """Lets dispatches write into the middle of larger tensors."""

    def __init__(self, monkeypatch: Any) -> None:
        self._blocks: list[tuple[torch.Tensor, torch.Tensor]] = []
        monkeypatch.setattr(expert_world, "Outputs", self._outputs)

    def _outputs(self, *columns: torch.Tensor | None) -> Outputs:
        rows = [column if column is None else self._guarded(column) for column in columns[:4]]
        return Outputs(*rows, *columns[4:])

    def _guarded(self, column: torch.Tensor) -> torch.Tensor:
        edge = column.new_full((GUARD, *column.shape[1:]), 77)
        block = torch.cat([edge, column, edge])
        self._blocks.append((block, edge))
        return block[GUARD:-GUARD]

    def check(self) -> None:
        for block, edge in self._blocks:
            assert torch.equal(block[:GUARD], edge)
            assert torch.equal(block[-GUARD:], edge)


def world_of(monkeypatch: Any, modules: Modules | None, direct: tuple[bool, ...] = (True,)) -> World:
    """Programs take turns only where they may wait, and memory is strong: faults here do not come from the order."""
    modules = modules or MODULES
    world = World(monkeypatch, 2, 0, direct=direct, stage_bytes=512, modules=modules, max_steps=20_000)
    world.simulator.switch = world.simulator.weak = 0.0
    world.simulator.random = Scheduler(0)
    stop_at_deadlocks(monkeypatch)
    simulate(monkeypatch, world, modules["expert_major"])
    return world


def codes(world: World) -> list[int]:
    return [world.code(rank) for rank in range(2)]


def begin(rank: ExpandedRank) -> None:
    """Queue a dispatch."""
    rank.layout()
    rank.pack()
    rank.notify(WORST)
    rank.pull(WORST)


def packs(monkeypatch: Any, modules: Modules | None) -> None:
    """What comes before a dispatch, of spans of several tiles and of one."""
    for case in PACKED:
        world = world_of(monkeypatch, modules)
        ranks = [ExpandedRank(world, case, rank) for rank in range(2)]
        for rank in ranks:
            rank.layout()
            rank.pack()
        world.run()
        for rank in ranks:
            rank.check_layout()
            rank.check_packed()
        assert codes(world) == [0, 0]


def operations(
    monkeypatch: Any,
    modules: Modules | None,
    case: Case = PLAIN,
    *,
    expand: bool = True,
    again: bool = False,
    sum_dtype: torch.dtype | None = None,
) -> None:
    """A dispatch, perhaps one along its handle, perhaps a combine."""
    world = world_of(monkeypatch, modules, (True, False))
    guards = Guards(monkeypatch)
    ranks = [ExpandedRank(world, case, rank, num_sms=3, expand=expand, spare_rows=2) for rank in range(2)]
    assert max(ranks[0].num_rows) < WORST
    outs = []
    for rank in ranks:
        begin(rank)
        first = rank.out
        if again:
            rank.pull(WORST, rank.handle(), signature=44)
        outs.append((first, rank.out))
        rank.out = first
        if sum_dtype is not None:
            rank.combine_expanded(sum_dtype)
    world.run()
    guards.check()
    for rank, (first, second) in zip(ranks, outs, strict=True):
        rank.out = first
        if expand:
            rank.check_packed()
        rank.check_expanded()
        if again:
            rank.out = second
            rank.check_expanded(cached=True)
        if sum_dtype is not None:
            rank.check_combined()
    assert codes(world) == [0, 0]


def no_room(monkeypatch: Any, modules: Modules | None) -> None:
    """Fewer rows than copies, and than their padding."""
    world = world_of(monkeypatch, modules)
    guards = Guards(monkeypatch)
    ranks = [ExpandedRank(world, CROWD, rank, spare_rows=-6 * (rank == 1)) for rank in range(2)]
    assert len(ranks[1].expectation.rows) - sum(row is None for row in ranks[1].expectation.rows) == 39
    for rank in ranks:
        begin(rank)
    world.run()
    guards.check()
    assert codes(world) == [0, words.NO_ROOM.value]
    assert ranks[1].metadata[:, 2:].max() == ranks[1].num_expanded - 1


def room_for_copies(monkeypatch: Any, modules: Modules | None) -> None:
    """As many rows as copies, and none for the padding behind them."""
    world = world_of(monkeypatch, modules)
    guards = Guards(monkeypatch)
    ranks = [ExpandedRank(world, CROWD, rank, spare_rows=-(rank == 1)) for rank in range(2)]
    assert ranks[1].num_expanded == 39
    for rank in ranks:
        begin(rank)
    world.run()
    guards.check()
    assert codes(world) == [0, 0]


def copies_that_do_not_exist(monkeypatch: Any, modules: Modules | None, *, combines: bool) -> None:
    """Handles that name no row."""
    for copy in (-2, 1 << 20):
        world = world_of(monkeypatch, modules)
        guards = Guards(monkeypatch)
        ranks = [ExpandedRank(world, PLAIN, rank) for rank in range(2)]
        for rank in ranks:
            begin(rank)
        world.run()
        ranks[0].metadata[1, 2] = copy if combines or copy < 0 else ranks[0].num_expanded
        for rank in ranks:
            if combines:
                rank.combine_expanded(torch.bfloat16)
            else:
                rank.pull(WORST, rank.handle(), signature=44)
        world.run()
        guards.check()
        assert codes(world) == [words.BAD_HANDLE.value, 0]


SCENARIOS: dict[str, Callable[..., None]] = {
    "packed": packs,
    "expanded": lambda *given: operations(*given, SCALES),
    "again": lambda *given: operations(*given, SCALES, again=True),
    "compact": lambda *given: operations(*given, expand=False),
    "many experts": lambda *given: operations(*given, MANY),
    "ordered sums": lambda *given: operations(*given, ORDERED, sum_dtype=torch.float32),
    "rounded sums": lambda *given: operations(*given, ROUNDED, sum_dtype=torch.bfloat16),
    "wide sums": lambda *given: operations(*given, sum_dtype=torch.float32),
    "no room": no_room,
    "room for copies": room_for_copies,
    "bad copies": lambda *given: copies_that_do_not_exist(*given, combines=False),
    "bad copies in a combine": lambda *given: copies_that_do_not_exist(*given, combines=True),
}

EARLIER = "earlier = tl.gather(seen, expert, 0) + tl"
HERE = "here = (packed >= 0) & (expert >= 0) & (expert < num_local)"
OWNER = "(source * num_max_tokens + token).to(tl.int32)"
ADD = "mask=there & (column < WIDTH), other=0.0).to(ACC)"
SCALE_ZEROS = "tl.zeros([BLOCK], tl.int32), mask=word < SCALE_WORDS"

MUTANTS = {
    # What goes before a dispatch.
    "choices of other spans": ("seen += tl.sum(tl.load(spans", "seen += 0 * tl.sum(tl.load(spans", "packed"),
    "choices of some spans": ("seen += tl.sum(tl.load(spans", "seen = tl.sum(tl.load(spans", "packed"),
    "choices of the own span": ("(row < tl.program_id(0))", "(row <= tl.program_id(0))", "packed"),
    "choices of the tile": (EARLIER, EARLIER + ".full([1], 0, tl.int32) * tl", "packed"),
    "choices before themselves": ("(i[:, None] < i[None, :])", "(i[:, None] <= i[None, :])", "packed"),
    "earlier choices of the span": (
        "            seen += tl.histogram(expert, EB, mask=chosen)\n",
        "            pass\n",
        "packed",
    ),
    "choices that are none count": ("counted = tl.where(chosen, expert, -1)", "counted = expert", "packed"),
    "choices that are none are sent": ("tl.where(chosen, value, -1)", "value", "packed"),
    "sources before": ("start[None, :] + tl.cumsum(pairs, 0) - pairs", "start[None, :] + 0 * pairs", "expanded"),
    "sources up to": (
        "start[None, :] + tl.cumsum(pairs, 0) - pairs",
        "start[None, :] + tl.cumsum(pairs, 0)",
        "expanded",
    ),
    "pairs of one source": ("total = tl.sum(pairs, 0)", "total = tl.max(pairs, 0)", "expanded"),
    "pairs with padding": ("tl.store(num_pairs + e, total", "tl.store(num_pairs + e, aligned", "expanded"),
    "alignment": (
        "(total + alignment - 1) // alignment * alignment\n        start",
        "total\n        start",
        "expanded",
    ),
    "experts before": ("running + tl.cumsum(aligned, 0) - aligned", "running + tl.cumsum(aligned, 0)", "expanded"),
    "experts before the block": ("running += tl.sum(aligned)", "pass", "many experts"),
    "ends with padding": ("(total if EXPAND else aligned)", "aligned", "expanded"),
    "ends without padding": ("(total if EXPAND else aligned)", "total", "compact"),
    # Copies.
    "experts of lower ranks": (HERE, HERE.replace("(expert >= 0)", "(expert >= -9)"), "expanded"),
    "experts of higher ranks": (HERE, HERE.replace("num_local", "9"), "expanded"),
    "bases of another source": ("bases + source * num_local + tl", "bases + tl", "expanded"),
    "no base": ("base + (packed >> PACK_SHIFT)", "(packed >> PACK_SHIFT)", "expanded"),
    "first choice": (
        "tl.min(tl.where(here, k[None, :], KB), 1)\n        tl.store(noted,",
        "tl.max(tl.where(here, k[None, :], -1), 1)\n        tl.store(noted,",
        "expanded",
    ),
    "tokens of the first rank": ("(source * num_max_tokens + tokens)", "tokens", "expanded"),
    "choices of the first rank": ("source * K + first, mask=live)", "first, mask=live)", "expanded"),
    "no room is not told": ("report(status, NO_ROOM, operation, epoch)", "pass", "no room"),
    "copies past the room": ("(copies < num_expanded)", "(copies <= num_expanded)", "no room"),
    "copies that do not fit are written": ("copies = tl.where(fits, copies, -1)", "pass", "no room"),
    "room for one copy less": ("(copies < num_expanded)", "(copies < num_expanded - 1)", "room for copies"),
    "bad copies are not told": ("report(status, BAD_HANDLE, operation, epoch)", "pass", "bad copies"),
    "copies below none": ("(copies >= -1) & ", "", "bad copies"),
    "copies are not noted": (
        "tl.store(noted[:, None] + 2 + k[None, :], copies, mask=wanted)",
        "pass",
        "again",
    ),
    "the last copy": ("for choice in range(K):", "for choice in range(K - 1):", "expanded"),
    "rows without a copy": ("mask=inside & (copy >= 0)[:, None]", "mask=inside", "expanded"),
    "weights without a copy": ("(k < K)[None, :] & (copies >= 0)", "(k < K)[None, :]", "expanded"),
    # What goes behind a dispatch.
    "sources are one too high": ("(i >= tl.load(prefix", "(i + 1 >= tl.load(prefix", "compact"),
    "sources by another rank's rows": ("prefix + before * R + rank", "prefix + before * R", "compact"),
    "compact tokens of the first rank": ("tl.where(there, " + OWNER, "tl.where(there, token.to(tl.int32)", "compact"),
    "compact rows past the last": (f"tl.where(there, {OWNER}, -1)", OWNER, "compact"),
    "compact choices of the first rank": ("tl.where(there, source * K + first, -1)", "first", "compact"),
    "compact rows have copies": ("tl.full([RT, KB], -1", "tl.full([RT, KB], 0", "compact"),
    "no zeros": ("for row in range(tl.maximum(end, 0), stop):", "for row in range(stop, stop):", "expanded"),
    "zeros in rows": ("tl.maximum(end, 0), stop", "tl.maximum(end - 1, 0), stop", "expanded"),
    "zeros in a whole block": ("(end + alignment - 1) //", "(end + alignment) //", "expanded"),
    "zeros past the room": (
        "tl.minimum((end + alignment - 1) // alignment * alignment, num_rows)",
        "(end + alignment - 1) // alignment * alignment",
        "room for copies",
    ),
    "zeros in rows only": (SCALE_ZEROS, SCALE_ZEROS.replace("zeros([BLOCK]", "full([BLOCK], 1"), "expanded"),
    "weights in padding": ("tl.store(weights + row, 0.0)", "pass", "expanded"),
    # What goes before a combine.
    "another order": ("row * (K + 2) + 2 + k)", "row * (K + 2) + 1 + K - k)", "ordered sums"),
    "the last copy is not summed": ("for k in range(K):", "for k in range(K - 1):", "ordered sums"),
    "copies of no row": (
        "x + copy * WIDTH + column, mask=there & (column < WIDTH)",
        "x + tl.maximum(copy, 0) * WIDTH + column, mask=column < WIDTH",
        "wide sums",
    ),
    "every sum is rounded": (
        ADD,
        ADD + "\n                total = total.to(x.dtype.element_ty).to(ACC)",
        "rounded sums",
    ),
    "rounded to the rows' type": ("total.to(out.dtype", "total.to(x.dtype.element_ty).to(out.dtype", "wide sums"),
    "rows of another rank": (
        "prefix + (R - 1) * R + rank).to(tl.int64)\n    for i",
        "prefix).to(tl.int64)\n    for i",
        "wide sums",
    ),
    "bad copies are summed": (
        "report(status, BAD_HANDLE, operation, tl.load(state + EPOCH) + 1)",
        "pass",
        "bad copies in a combine",
    ),
    "copies below 0": ("(copy < -1) | ", "", "bad copies in a combine"),
    "copies past the rows": (" | (copy >= num_given):", ":", "bad copies in a combine"),
}

SPAN_MUTANTS = {
    "choices of one tile of a span": ("of_span += picked", "of_span = picked", "packed"),
    "spans of whole tiles": ("live = (t < end)[:, None]", "live = (t < num_tokens)[:, None]", "packed"),
    "spans end early": ("tl.cdiv(num_tokens, tl.num_programs(0))", "num_tokens // tl.num_programs(0)", "packed"),
    "spans anywhere": ("(counts.to(tl.int64) + 15)", "(counts.to(tl.int64) + 31)", "packed"),
    "spans over the counts": ("spans_behind(counts + R + num_experts)", "spans_behind(counts + R)", "packed"),
}
"""Of ``layout``, which counts the choices of spans."""


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old`` replaced by ``new``, to be found in one of the scenarios."""

    module: ModuleType
    old: str
    new: str
    scenario: str

    def modules(self) -> Modules:
        copies = mutated_modules(self.module, self.old, self.new, entries=MODULES.values())
        return dict(zip(MODULES, copies, strict=True))


FAULTS = {name: Mutant(expert_major, *fault) for name, fault in MUTANTS.items()} | {
    name: Mutant(layout, *fault) for name, fault in SPAN_MUTANTS.items()
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    mutant = FAULTS[name]
    with pytest.raises(AssertionError):
        SCENARIOS[mutant.scenario](monkeypatch, mutant.modules())


@pytest.mark.parametrize(
    "scenario", but_slow(SCENARIOS, *(name for name in SCENARIOS if name not in ("packed", "expanded", "no room")))
)
def test_right_kernels_pass(monkeypatch: Any, scenario: str) -> None:
    SCENARIOS[scenario](monkeypatch, None)
