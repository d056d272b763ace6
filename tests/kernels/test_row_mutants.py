"""What the kernels of dispatch and combine compute and report: no part of it can be wrong unseen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.cases import Case, choices, same
from tests.conftest import but_slow
from tests.kernels.mutants import mutated_modules
from tests.kernels.schedules import Scheduler, stop_at_deadlocks
from tests.kernels.test_mutants import DIRECT
from tests.kernels.world import ALL_MODULES, Rank, World
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import combine, dispatch, layout, notify, rounds, sync, words

Modules = dict[str, ModuleType]

PLAIN = Case(tokens=(5, 3), row_bytes=16, num_topk=3, local_experts=2, combine_bytes=16, routing="sparse", seed=3)
SCALES = replace(PLAIN, tokens=(7, 6), scales=torch.float32, scale_columns=3, bias="two")
FLOATS = replace(PLAIN, combine_dtype=torch.float32, routing="all", bias="one")
ONE_WAY = replace(PLAIN, routing="one_rank")
EXPERTS = Case(tokens=(3, 2), row_bytes=16, num_topk=2, local_experts=300, combine_bytes=16, seed=3)
assert all((choices(EXPERTS, rank, 2) % 300 >= 256).any() for rank in range(2))
STAGE = 512
"""Rounds of few tokens."""


def world_of(
    monkeypatch: Any, modules: Modules | None, direct: str = "direct", num_ranks: int = 2, stage_bytes: int = STAGE
) -> World:
    """Programs take turns only where they may wait, and memory is strong: faults here do not come from the order."""
    world = World(
        monkeypatch, num_ranks, 0, direct=DIRECT[direct], stage_bytes=stage_bytes, modules=modules, max_steps=20_000
    )
    world.simulator.switch = world.simulator.weak = 0.0
    world.simulator.random = Scheduler(0)
    stop_at_deadlocks(monkeypatch)
    monkeypatch.setattr(programs, "_TOKENS_PER_BLOCK", 4)
    return world


def codes(world: World) -> list[int]:
    return [world.code(rank) for rank in range(world.num_ranks)]


def detail(world: World, rank: int) -> list[int]:
    return world.status[rank][words.DETAIL.value :][: world.num_ranks].tolist()


def operations(
    monkeypatch: Any,
    modules: Modules | None,
    case: Case = PLAIN,
    direct: str = "direct",
    *,
    num_ranks: int = 2,
    again: bool = False,
    combines: bool = False,
) -> None:
    """A dispatch, perhaps two along its handle, perhaps a combine.

    If there are two, the dispatch and the first of them zero what they do not use.
    """
    world = world_of(monkeypatch, modules, direct, num_ranks)
    ranks = [Rank(world, case, rank, num_sms=3) for rank in range(num_ranks)]
    worst = max(ranks[0].num_rows) + 5
    outs = []
    for rank in ranks:
        rank.layout()
        rank.notify(worst)
        rank.pull(worst, zeros=again)
        first = rank.out
        seen = [first]
        for zeros in (True, False) if again else ():
            rank.pull(worst, rank.handle(), signature=44, zeros=zeros)
            seen.append(rank.out)
        outs.append(seen)
        rank.out = first
        if combines:
            rank.combine(rank.handle())
    world.run()
    for rank, (rank.out, *others) in zip(ranks, outs, strict=True):
        rank.check_dispatch(zeros=again)
        if combines:
            rank.check_combine()
        for zeros, rank.out in zip((True, False), others, strict=False):
            rank.check_dispatch(cached=True, zeros=zeros)
    assert codes(world) == [0] * num_ranks


def counts(monkeypatch: Any, modules: Modules | None, case: Case = PLAIN) -> None:
    """What a dispatch knows before its rows."""
    world = world_of(monkeypatch, modules)
    ranks = [Rank(world, case, rank) for rank in range(2)]
    for rank in ranks:
        rank.layout()
        rank.notify()
    world.run()
    for rank in ranks:
        rank.check_layout()
        rank.check_counts()
        same(rank.send_head, rank.wanted.send_head, "send_head")
        same(rank.prefix, rank.wanted.rank_prefix_matrix, "rank_prefix_matrix")
        same(rank.channels[0][:, None], rank.wanted.channel_prefix_matrix, "channel_prefix_matrix")
        same(rank.channels[1][:, None], rank.wanted.recv_channel_prefix_matrix, "recv_channel_prefix_matrix")
    assert codes(world) == [0, 0]


def begun(world: World, worst: int = 12, case: Case = PLAIN) -> list[Rank]:
    """A dispatch that is over."""
    ranks = [Rank(world, case, rank) for rank in range(world.num_ranks)]
    for rank in ranks:
        rank.layout()
        rank.notify(worst)
        rank.pull(worst)
    world.run()
    return ranks


def bad_experts(monkeypatch: Any, modules: Modules | None) -> None:
    """Choices that are neither -1 nor an expert, on one rank."""
    for bad in (-2, 4):
        world = world_of(monkeypatch, modules)
        ranks = [Rank(world, PLAIN, rank) for rank in range(2)]
        ranks[1].given = replace(ranks[1].given, topk_idx=ranks[1].given.topk_idx.clone())
        ranks[1].given.topk_idx[2, 1] = bad
        for rank in ranks:
            rank.layout()
            rank.notify()
        world.run()
        assert codes(world) == [words.PEER_PROBLEM.value] * 2
        assert [detail(world, rank) for rank in range(2)] == [[0, 1]] * 2
        assert [int(counts[words.HOST_CODE.value]) for counts in world.counts] == [words.PEER_PROBLEM.value] * 2


def too_few_rows(monkeypatch: Any, modules: Modules | None) -> None:
    """Fewer rows than the dispatch brings, on one rank."""
    world = world_of(monkeypatch, modules)
    ranks = [Rank(world, ONE_WAY, rank) for rank in range(2)]
    assert ranks[0].num_rows == [0, 8]
    for rank in ranks:
        rank.layout()
        rank.notify(7)
    world.run()
    assert codes(world) == [words.CAPACITY.value] * 2
    assert [detail(world, rank) for rank in range(2)] == [[0, 8]] * 2


def just_enough_rows(monkeypatch: Any, modules: Modules | None) -> None:
    """As many as the dispatch brings."""
    world = world_of(monkeypatch, modules)
    for rank in begun(world, 8, ONE_WAY):
        rank.check_dispatch()
    assert codes(world) == [0, 0]


def bad_counts(monkeypatch: Any, modules: Modules | None) -> None:
    """Counts that are not those of the members."""
    world = world_of(monkeypatch, modules)
    ranks = [Rank(world, PLAIN, rank) for rank in range(2)]
    for rank in ranks:
        rank.layout()
    world.run()
    ranks[1].per_rank[0] += 1
    for rank in ranks:
        rank.notify()
    world.run()
    assert codes(world) == [0, words.BAD_COUNTS.value]
    assert detail(world, 1) == [int(ranks[1].per_rank[0]) - 1, 0]


def all_is_lost(monkeypatch: Any, modules: Modules | None) -> None:
    """After a failure no kernel waits for anybody."""
    world = world_of(monkeypatch, modules)
    for state in world.states:
        state[words.FAILED.value] = 1
    for rank in [Rank(world, PLAIN, 1)]:
        rank.layout()
        rank.notify()
        rank.pull(12)
        rank.combine(rank.handle())
    world.run()
    assert world.counts[1][words.HOST_DONE.value] == 1
    assert world.counts[1][words.HOST_CODE.value] == words.TIMED_OUT.value


def lists_of_other_tokens(monkeypatch: Any, modules: Modules | None) -> None:
    """A handle that names a token that its source does not have: the row stays as it is."""
    world = world_of(monkeypatch, modules)
    ranks = begun(world)
    ranks[0].out.recv_src_idx[1] = 9
    for rank in ranks:
        rank.pull(12, rank.handle(), signature=44)
    world.run()
    assert codes(world) == [words.BAD_HANDLE.value, 0]
    assert (ranks[0].out.rows[1] == 0xAB).all()


def prefixes_of_other_rows(monkeypatch: Any, modules: Modules | None) -> None:
    """Handles that say that a rank brought more rows than it has, fewer than none, or begin below 0."""
    for row, change in ((1, lambda ends: 13), (1, lambda ends: ends[0] - 1), (0, lambda ends: -2)):
        world = world_of(monkeypatch, modules)
        ranks = begun(world)
        prefix = ranks[1].prefix.clone()
        prefix[row, 0] = change(prefix[:, 0].tolist())
        for rank in ranks:
            rank.combine(rank.handle()._replace(rank_prefix_matrix=prefix) if rank.rank == 1 else rank.handle())
        world.run()
        assert codes(world) == [0, words.BAD_HANDLE.value]
        assert ranks[1].outs[0].isnan().all()


SCENARIOS: dict[str, Callable[..., None]] = {
    "counts": counts,
    "many experts": lambda *given: counts(*given, EXPERTS),
    "direct": operations,
    "staged": lambda *given: operations(*given, SCALES, "staged"),
    "again": lambda *given: operations(*given, SCALES, "mixed", again=True),
    "again, wide": lambda *given: operations(*given, replace(ONE_WAY, row_bytes=4112), again=True),
    "combine": lambda *given: operations(*given, combines=True),
    "combine staged": lambda *given: operations(*given, SCALES, "staged", combines=True),
    "combine mixed": lambda *given: operations(*given, FLOATS, "mixed", num_ranks=3, combines=True),
    "bad experts": bad_experts,
    "too few rows": too_few_rows,
    "just enough rows": just_enough_rows,
    "bad counts": bad_counts,
    "all is lost": all_is_lost,
    "lists of other tokens": lists_of_other_tokens,
    "prefixes of other rows": prefixes_of_other_rows,
}


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old`` replaced by ``new`` in ``module``, to be found in one of the scenarios."""

    module: ModuleType
    old: str
    new: str
    scenario: str
    count: int = 1

    def modules(self) -> Modules:
        entries = (layout, notify, dispatch, combine)
        copies = mutated_modules(self.module, self.old, self.new, self.count, entries=entries)
        return dict(zip(ALL_MODULES, copies, strict=True))


LOCAL = "here = (expert >= 0) & (expert < num_local)\n    place"
START = "tl.load(prefix + (source - 1) * R + rank, mask=source > 0, other=0)"
END = "end = tl.load(prefix + source * R + rank)"
MINE = "start = tl.load(prefix + (rank - 1) * R + source, mask=rank > 0, other=0).to(tl.int64)"
ADD = "total += tl.load(at[:, None] + column_ids[None, :], mask=there, other=0.0).to(ACC)"

TOTAL = ":\n        e = start + tl.arange(0, 256)\n        total"
MUTANTS = {
    # Layout.
    "expert past the last": Mutant(layout, " | (ids >= num_experts)", "", "bad experts"),
    "expert below -1": Mutant(layout, "(ids < -1) | ", "", "bad experts"),
    "bad experts are not noted": Mutant(layout, "tl.store(state + BAD_INPUT, 1)", "pass", "bad experts"),
    "choices of a rank count each": Mutant(layout, "tl.max((rank_of == rank)", "tl.sum((rank_of == rank)", "counts"),
    "nothing counts": Mutant(layout, "tl.where(chosen, expert // per_rank, -1)", "expert // per_rank", "counts"),
    "counts before all have counted": Mutant(
        layout, "tl.num_programs(0).to(tl.int64)", "tl.num_programs(0).to(tl.int64) - 1", "counts"
    ),
    "one program's tokens": Mutant(layout, "sums + rank, tl.sum(hit)", "sums + rank, tl.max(hit)", "counts"),
    # Notify.
    "position counts itself": Mutant(notify, "tl.cumsum(goes, 0) - goes", "tl.cumsum(goes, 0)", "counts"),
    "heads where nothing goes": Mutant(notify, "tl.where(goes != 0, position, -1)", "position", "counts"),
    "experts of the first rank": Mutant(notify, "per_expert + reader * num_local", "per_expert", "counts"),
    "experts past the first block": Mutant(
        notify, "range(0, count, BLOCK)", "range(0, tl.minimum(count, BLOCK), BLOCK)", "many experts"
    ),
    "experts past the first block, received": Mutant(
        notify,
        f"range(0, num_local, 256){TOTAL}",
        f"range(0, tl.minimum(num_local, 256), 256){TOTAL}",
        "many experts",
    ),
    "experts of one source": Mutant(
        notify,
        "for source in range(R):\n            counts",
        "for source in range(R - 1):\n            counts",
        "counts",
    ),
    "ends of one source": Mutant(notify, "ends += counts", "ends = counts", "counts"),
    "rows of another rank": Mutant(notify, "tl.where(r == rank, ends, 0)", "tl.where(r == 0, ends, 0)", "counts"),
    "room is not looked at": Mutant(notify, "(worst > 0) & (worst < ends)", "worst < 0", "too few rows"),
    "room for one row more": Mutant(notify, "worst < ends", "worst <= ends", "just enough rows"),
    "room on the first rank": Mutant(
        notify, "(worst < ends)", "(worst < tl.sum(tl.where(r == 0, ends, 0)))", "too few rows"
    ),
    "peers' problems are not told": Mutant(
        notify, "problem = tl.load(state + BAD_INPUT)", "problem = 0", "bad experts"
    ),
    "peers' problems are not seen": Mutant(notify, "code = PEER_PROBLEM", "pass", "bad experts"),
    "code is not told": Mutant(notify, "tl.store(host + HOST_CODE, code)", "pass", "bad experts"),
    "sent counts are not looked at": Mutant(notify, "if sent != ", "if 0 * sent != 0 * ", "bad counts"),
    "host is not told of a loss": Mutant(notify, "elif pid == R:", "elif pid > R:", "all is lost"),
    "waits after a loss": Mutant(notify, "if is_usable(state):", "if True:", "all is lost"),
    "own counts of the handle": Mutant(
        notify,
        "tl.store(channels + r, tl.load(per_rank + r",
        "tl.store(channels + r, tl.load(per_rank + 0 * r",
        "counts",
    ),
    "second row of the handle": Mutant(notify, "channels + R + r, tl.zeros", "channels + r, tl.zeros", "counts"),
    # Dispatch.
    "experts of lower ranks": Mutant(dispatch, LOCAL, LOCAL.replace("expert >= 0", "expert >= -9"), "direct"),
    "experts of higher ranks": Mutant(dispatch, LOCAL, LOCAL.replace("expert < num_local", "expert < 99"), "staged"),
    "weights of other ranks": Mutant(dispatch, "tl.where(here, weight, 0.0)", "weight", "direct"),
    "tail begins late": Mutant(
        dispatch, "range(start + worker * RT, end", "range(start + 1 + worker * RT, end", "direct"
    ),
    "tail of one program": Mutant(
        dispatch, "range(start + worker * RT, end, workers", "range(start + RT, end, workers", "direct"
    ),
    "ids of the tail": Mutant(
        dispatch, "tl.store(out_ids + place, tl.full(", "tl.store(out_ids + place, 0 * tl.full(", "direct"
    ),
    "sources of the tail": Mutant(
        dispatch, "tl.store(src_idx + i, tl.full([RT], -1, ", "tl.store(src_idx + i, tl.full([RT], 0, ", "direct"
    ),
    "rows of all sources": Mutant(dispatch, START, "tl.load(prefix + rank, mask=source > 99, other=0)", "direct"),
    "rows of a source for another": Mutant(dispatch, END, END.replace("rank", "0"), "direct"),
    "list of another source": Mutant(
        dispatch, "LISTS + source * list_capacity", "LISTS + rank * list_capacity", "direct"
    ),
    "the first unused row stays": Mutant(dispatch, "zero_tail(out_x, last,", "zero_tail(out_x, last + 1,", "again"),
    "unused scales stay": Mutant(dispatch, "zero_tail(out_scales, last,", "zero_tail(out_scales, num_rows,", "again"),
    "unused rows are zeroed unasked": Mutant(dispatch, "if num_expanded != 0:", "if num_expanded >= 0:", "again"),
    "unused rows are not zeroed": Mutant(dispatch, "if num_expanded != 0:", "if num_expanded < 0:", "again"),
    "unused rows of one program": Mutant(
        dispatch,
        "range(start + worker, end, workers):\n        there",
        "range(start, end, 99):\n        there",
        "again",
    ),
    "unused rows of another rank": Mutant(
        dispatch, "rows_from(prefix, num_rows, rank, R - 1", "rows_from(prefix, num_rows, 1 - rank, R - 1", "again"
    ),
    "unused rows as far as a block": Mutant(
        dispatch,
        "tl.static_range(0, WORDS, BLOCK):\n            word = first",
        "range(1):\n            word = first",
        "again, wide",
    ),
    "handle's list from the start": Mutant(dispatch, "return src_idx + start", "return src_idx", "again"),
    "round ends late": Mutant(dispatch, "lower_bound(tokens, low, count, first + per_round)", "count", "staged"),
    "round begins at 0": Mutant(
        dispatch, "low = lower_bound(tokens, zero().to(tl.int64), count, first)", "low = low", "staged"
    ),
    "round has no wait": Mutant(rounds, "(this * per_round < tl.minimum", "(0 > tl.minimum", "staged"),
    "rounds of one source": Mutant(
        dispatch, "rounds = tl.maximum(rounds, rounds_of(", "rounds = tl.minimum(1, rounds_of(", "staged"
    ),
    "own rows from the stage": Mutant(dispatch, "own = source == rank", "own = source < 0", "staged"),
    "slot is not the round's": Mutant(dispatch, "slot = t - first", "slot = (t - first) % 2", "staged"),
    "rows' steps": Mutant(dispatch, "tl.where(staged, RECORD, WORDS * 4)", "WORDS * 4", "staged"),
    "scales' steps": Mutant(dispatch, "tl.where(staged, RECORD, SCALE_WORDS * 4)", "SCALE_WORDS * 4", "staged"),
    "ids' steps": Mutant(dispatch, "tl.where(staged, RECORD, K * 8)", "K * 8", "staged"),
    "weights' steps": Mutant(dispatch, "tl.where(staged, RECORD, K * 4)", "K * 4", "staged"),
    "scales staged over ids": Mutant(dispatch, "t, target + SCALES_AT", "t, target + IDS_AT", "staged"),
    "weights staged over ids": Mutant(dispatch, "t, target + WEIGHTS_AT", "t, target + IDS_AT", "staged"),
    "columns of other regions": Mutant(
        dispatch,
        "column_address(heap, regions, rank, source, 3, last",
        "column_address(heap, regions, rank, source, 2, last",
        "direct",
    ),
    "tokens that are not there": Mutant(dispatch, "live = live & fits", "live = live", "lists of other tokens"),
    "such tokens are not told": Mutant(
        dispatch, "report(status, BAD_HANDLE, operation, epoch)", "pass", "lists of other tokens"
    ),
    "sources are not noted": Mutant(dispatch, "tl.store(src_idx + row, t, mask=live)", "pass", "direct"),
    "dispatch after a loss": Mutant(dispatch, "if is_usable(state):", "if True:", "all is lost"),
    # Rounds and addresses.
    "search goes too far": Mutant(
        rounds, "tl.load(tokens + middle) < value", "tl.load(tokens + middle) <= value", "staged"
    ),
    "one round too few": Mutant(
        rounds, "(num_tokens.to(tl.int32) + per_round - 1)", "num_tokens.to(tl.int32)", "staged"
    ),
    "own rows are staged": Mutant(rounds, "(source != rank) & ", "", "staged"),
    "tokens of this rank": Mutant(
        rounds, "heap_of(heap, rank), source, NUM_TOKENS", "heap_of(heap, rank), rank, NUM_TOKENS", "staged"
    ),
    "regions of another source": Mutant(sync, "regions + source * REGIONS", "regions + 9 * source", "direct"),
    # Combine.
    "rows from the first": Mutant(combine, MINE, "start = zero().to(tl.int64)", "combine"),
    "staged rows of the first reader": Mutant(combine, "(rank * per_round - first)", "(0 - first)", "combine staged"),
    "staged rows by head": Mutant(
        combine, "tl.where(staged, t.to(tl.int64), head", "tl.where(rank < 0, t.to(tl.int64), head", "combine staged"
    ),
    "rows by token": Mutant(
        combine, "tl.where(staged, t.to(tl.int64), head", "tl.where(rank >= 0, t.to(tl.int64), head", "combine"
    ),
    "half of another parity": Mutant(
        combine, "stage + (this % 2) * half + AT", "stage + (1 - this % 2) * half + AT", "combine staged"
    ),
    "weights of rows": Mutant(combine, "half, 1, RECORD, AT, K", "half, 1, RECORD, 0, K", "combine staged"),
    "staged for another reader": Mutant(combine, "+ reader.to(tl.int64) * per_round * RECORD", "", "combine mixed"),
    "last reader is not staged for": Mutant(
        combine, "for step in range(R - 1):", "for step in range(R - 2):", "combine staged"
    ),
    "readers' rounds": Mutant(
        combine, "rounds = tl.maximum(rounds, rounds_of(", "rounds = tl.minimum(1, rounds_of(", "combine staged"
    ),
    "rows without a head": Mutant(combine, "(head >= 0) & (head < count)", "head < count", "combine"),
    "second bias is the first": Mutant(combine, "tl.load(bias_1 + place", "tl.load(bias_0 + place", "combine staged"),
    "first bias is left out": Mutant(combine, "total += tl.load(bias_0", "total = tl.load(bias_1", "combine staged"),
    "sums are rounded": Mutant(
        combine, ADD, ADD + "\n            total = total.to(out.dtype.element_ty).to(ACC)", "combine staged"
    ),
    "sources from the last": Mutant(
        combine,
        "head = tl.load(send_head",
        "source = R - 1 - source\n            head = tl.load(send_head",
        "combine mixed",
    ),
    "nobody is staged": Mutant(rounds, "STAGED * 8, 0, rank", "STAGED * 8, 1, rank", "combine staged"),
    "too many rows": Mutant(combine, " | (end > brought)", "", "prefixes of other rows"),
    "fewer rows than none": Mutant(combine, " | (count < 0)", "", "prefixes of other rows"),
    "rows below 0": Mutant(combine, "(start < 0) | ", "", "prefixes of other rows"),
    "sums of a bad handle": Mutant(
        combine,
        "BAD_HANDLE, operation, epoch)\n            fits = False",
        "BAD_HANDLE, operation, epoch)",
        "prefixes of other rows",
    ),
    "combine after a loss": Mutant(combine, "if is_usable(state):", "if True:", "all is lost"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    mutant = MUTANTS[name]
    with pytest.raises(AssertionError):
        SCENARIOS[mutant.scenario](monkeypatch, mutant.modules())


@pytest.mark.parametrize(
    "scenario", but_slow(SCENARIOS, "staged", "again", "again, wide", "combine staged", "combine mixed")
)
def test_right_kernels_pass(monkeypatch: Any, scenario: str) -> None:
    SCENARIOS[scenario](monkeypatch, None)
