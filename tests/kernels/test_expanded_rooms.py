"""Expanded outputs that are made before the counts are known; see :mod:`.test_rooms`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import Case, same
from tests.conftest import but_slow, slow
from tests.kernels import bulk_emulator, mutants
from tests.kernels.expert_world import ExpandedRank, simulate
from tests.kernels.simulator import Deadlock
from tests.kernels.test_bulk import world_of as bulk_world
from tests.kernels.test_elastic_plane import Plane
from tests.kernels.test_expert_major import BASE, DIRECT
from tests.kernels.test_expert_major_mutants import world_of as quick_world
from tests.kernels.test_rooms import Ranks, are_whole
from tests.kernels.world import World
from tokenferry.dataplane.cuda import CudaDataPlane
from tokenferry.dataplane.cuda.kernels import bulk_dispatch, dispatch, expert_major, notify, words
from tokenferry.modes import expert_major as mode
from tokenferry.modes.inputs import Party

CASE = Case(tokens=(5, 7), num_topk=3, local_experts=3, alignment=4, **BASE)
CROWDED = Case(tokens=(7, 5), num_topk=3, routing="duplicates", alignment=3, **BASE)
AMPLE = 100


def host(rank: ExpandedRank, room: int, copies: int) -> Iterator[None]:
    """What the host of a rank does in a dispatch, with room for so many more rows and copies than come."""
    needed = len(rank.expectation.rows)
    rows = max(rank.num_rows[rank.rank] + room, 0)
    rank.layout()
    rank.pack()
    counts = rank.world.counts[rank.rank]
    counts.zero_()
    rank.notify(pulls_meanwhile=True)
    rank.num_expanded = max(needed + copies, 0)
    rank.pull(rows)
    while not counts[words.HOST_DONE.value]:
        yield
    num_rows = int(counts[words.HOST_ROWS.value])
    if num_rows > rows or (rank.expand and needed > rank.num_expanded):
        rank.num_expanded = needed
        rank.pull(num_rows)


def run_rooms(world: World, case: Case, rooms: list[tuple[int, int]], *, expand: bool = True) -> None:
    ranks = [ExpandedRank(world, case, rank, expand=expand) for rank in range(world.num_ranks)]
    world.run([host(rank, *room) for rank, room in zip(ranks, rooms, strict=True)])
    for rank in ranks:
        if expand:
            rank.combine_expanded(torch.bfloat16)
    world.run()
    for rank in ranks:
        rank.check_expanded()
        if expand:
            rank.check_combined()
        assert world.code(rank.rank) == 0


ROOMS = {
    "exact": [(0, 0), (0, 0)],
    "generous": [(3, 7), (AMPLE, AMPLE)],
    "too few rows": [(-1, 9), (2, 0)],
    "too few copies": [(2, -1), (0, 0)],
    "none": [(0, 1), (-AMPLE, -AMPLE)],
    "too few of either": [(-1, 0), (0, -1)],
}


@pytest.mark.parametrize(
    ("name", "direct"),
    [
        pytest.param(name, direct, marks=[pytest.mark.slow] * (name in ("generous", "exact", "too few rows")))
        for name, direct in zip(ROOMS, [*DIRECT] * 2, strict=True)
    ],
)
def test_every_room_ends_in_the_same_rows(monkeypatch: Any, name: str, direct: str) -> None:
    world = World(monkeypatch, 2, len(name), direct=DIRECT[direct], stage_bytes=1 << 10, max_steps=200_000)
    simulate(monkeypatch, world)
    for case in (CASE, CROWDED):
        run_rooms(world, case, ROOMS[name])
    assert {int(state[words.EPOCH.value]) for state in world.states} == {4}


@pytest.mark.parametrize(
    ("name", "direct"), [("generous", "mixed"), ("too few of either", "direct"), *slow(("none", "staged"))]
)
def test_bulk_copies(monkeypatch: Any, name: str, direct: str) -> None:
    world = bulk_world(monkeypatch, len(name), direct, 1 << 10)
    run_rooms(world, CASE, ROOMS[name])


@pytest.mark.parametrize("name", [*slow("generous"), "too few rows"])
def test_compact_rows(monkeypatch: Any, name: str) -> None:
    world = World(monkeypatch, 2, 1, direct=DIRECT["mixed"], stage_bytes=1 << 10, max_steps=200_000)
    simulate(monkeypatch, world)
    run_rooms(world, CASE, ROOMS[name], expand=False)


TOTAL = "expanded = tl.load(bases + R * num_local).to(tl.int64)"
MUTANTS: dict[str, tuple[Any, str, str]] = {
    "all copies fit any room": (dispatch, " | (expanded > num_expanded)", ""),
    "a full room of copies is too small": (dispatch, "expanded > num_expanded", "expanded >= num_expanded"),
    "rows are not looked at": (dispatch, "(received > num_rows) | ", ""),
    "copies of all but the last source": (dispatch, TOTAL, TOTAL.replace("R * num_local", "R * num_local - 1")),
    "no total": (expert_major, "tl.where(num_worst > 0, 0, running)", "0"),
    "no total without a worst case": (expert_major, "num_worst > 0, 0, running", "num_worst > 0, running, 0"),
    "rows of the sources before": (expert_major, "tl.cumsum(received, 0)", "received"),
}


@pytest.mark.parametrize(
    "name",
    but_slow(
        MUTANTS,
        "a full room of copies is too small",
        "no total",
        "no total without a worst case",
        "copies of all but the last source",
        "rows of the sources before",
        "rows are not looked at",
    ),
)
def test_mutants_are_found(monkeypatch: Any, name: str) -> None:
    entries = {"dispatch": dispatch, "notify": notify, "expert_major": expert_major}
    modules = dict(zip(entries, mutants.mutated_modules(*MUTANTS[name], entries=entries.values()), strict=True))
    world = quick_world(monkeypatch, modules)
    world.simulator.max_steps = 4_000
    with pytest.raises((AssertionError, Deadlock)):
        run_rooms(world, CASE, [(1, -1), (-1, 0)])


@pytest.mark.parametrize(("old", "new"), slow((TOTAL, "pass"), ("if not too_few:\n", "if epoch > 0:\n")))
def test_mutants_of_bulk_copies_are_found(monkeypatch: Any, old: str, new: str) -> None:
    module = bulk_emulator.mutated_bulk_module("bulk_dispatch", bulk_dispatch, old, new)
    world = bulk_world(monkeypatch, 3, "direct", 1 << 10, module)
    world.simulator.max_steps = 9_000
    with pytest.raises((AssertionError, Deadlock)):
        run_rooms(world, CASE, [(1, -1), (0, 0)])


# The host's own code.


class _Plane(Plane):
    """Waits for the device only where the host does."""

    def after_pull(self, *args: Any) -> None:
        CudaDataPlane.after_pull(self, *args)


class ExpertRanks(Ranks):
    """Whose dispatches tell where rows are from."""

    def __init__(self, monkeypatch: Any, *, expand: bool, host_waits: bool = True) -> None:
        self.plane = _Plane if host_waits else Plane
        super().__init__(monkeypatch)
        simulate(monkeypatch, self.world)
        self.expand, self.host_waits = expand, host_waits

    def rank_of(self, case: Case, rank: int) -> ExpandedRank:
        return ExpandedRank(self.world, case, rank, expand=self.expand)

    def dispatch(self, party: Party, mine: ExpandedRank) -> Any:
        sizes = mode.Sizes(mine.num_experts, mine.most, mine.case.alignment, self.expand, self.host_waits, True, 4)
        return mode.dispatch(party, mine.x, mine.given.topk_idx, mine.given.topk_weights, sizes, copy_topk=True)

    def check_received(self, mine: ExpandedRank, received: Any) -> None:
        want, handle = mine.expectation, received.handle
        rows = [(source, token) for source, token in want.sources]
        if self.expand:
            rows = [(-1, -1) if row is None else row[:2] for row in want.rows]
        zero = torch.zeros_like(mine.inputs[0].x[:1])[0]
        wanted = [zero if source < 0 else mine.inputs[source].x[token] for source, token in rows]
        same(received.x, torch.stack(wanted), "x")
        assert len(received.topk_weights) == len(rows)
        metadata = torch.tensor(want.metadata, dtype=torch.int32).view(want.num_tokens, -1)
        if not self.expand:
            metadata[:, 2:] = -1
            same(received.topk_idx, want.ids, "ids")
        same(handle.recv_src_metadata, metadata, "metadata")
        assert handle.num_recv_tokens == want.num_tokens
        assert handle.num_expanded_tokens == (len(rows) if self.expand else 0)
        assert handle.num_recv_tokens_per_expert_list == want.aligned
        assert handle.psum_num_recv_tokens_per_scaleup_rank.tolist() == want.psum_rank
        are_whole(received.x, received.topk_weights, handle.recv_src_metadata, handle.routes.recv_src_idx)


@pytest.mark.parametrize("expand", [True, *slow(False)])
def test_the_second_dispatch_does_not_wait_for_counts(monkeypatch: Any, expand: bool) -> None:
    ranks = ExpertRanks(monkeypatch, expand=expand)
    for _ in range(2):
        results = ranks.call(CASE)
        ranks.check(results)
    for rank, (mine, received) in enumerate(results):
        for made, came in ((ranks.pulls, mine.num_rows[rank]), (ranks.copies, len(received.x))):
            assert made[rank] == [came, -(-came * 17 // 16)]


def test_more_rows_and_copies_than_room(monkeypatch: Any) -> None:
    ranks = ExpertRanks(monkeypatch, expand=True)
    for case in (replace(CASE, routing="sparse"), CASE, CASE):
        ranks.check(ranks.call(case))
    for made in (*ranks.pulls, *ranks.copies):
        few, room, many, later = made
        assert few < room < many < later


def test_more_copies_than_room_for_as_many_rows(monkeypatch: Any) -> None:
    ranks = ExpertRanks(monkeypatch, expand=True)
    ranks.check(ranks.call(replace(CASE, alignment=1)))
    for plane in ranks.planes:  # as if these rows had been aligned
        plane.rooms._known = {(kind[0], 16): known for kind, known in plane.rooms._known.items()}
    ranks.check(ranks.call(replace(CASE, alignment=16)))
    for rows, copies in zip(ranks.pulls, ranks.copies, strict=True):
        assert rows == [rows[0], -(-rows[0] * 17 // 16), rows[0]]
        assert copies[0] < copies[1] < copies[2]


def test_a_worst_case_is_no_guess(monkeypatch: Any) -> None:
    ranks = ExpertRanks(monkeypatch, expand=True, host_waits=False)
    for _ in range(2):
        results = ranks.call(CASE)
        assert not any(isinstance(result, BaseException) for result in results)
    mine, received = results[0]
    assert ranks.pulls[0] == [2 * mine.most] * 2
    assert ranks.copies[0] == [len(received.x)] * 2
    assert len(received.x) > ranks.pulls[0][0]
