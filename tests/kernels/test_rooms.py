"""Outputs that are made before the counts are known: the pull is launched at once, and again if there is no room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, cast
from unittest import mock

import pytest
import torch

from tests.cases import Case, same
from tests.conftest import but_slow
from tests.kernels import mutants
from tests.kernels.simulator import Deadlock
from tests.kernels.test_elastic_plane import CPU, Plane
from tests.kernels.test_exchange import DIRECT
from tests.kernels.world import Rank, World
from tokenferry.dataplane import Signature
from tokenferry.dataplane.cuda.exchange import Rooms
from tokenferry.dataplane.cuda.kernels import dispatch as dispatch_kernels
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.modes import intranode
from tokenferry.modes.inputs import Party, check_inputs

CASE = Case(
    tokens=(5, 9, 3),
    row_bytes=64,
    num_topk=3,
    local_experts=2,
    combine_bytes=64,
    scales=torch.float32,
    dtype=torch.float8_e4m3fn,
)
FEWER = replace(CASE, routing="sparse")
EXACT = 1 << 30
"""A room that stands for none: the counts are waited for."""


def host(rank: Rank, room: int) -> Iterator[None]:
    """What the host of a rank does in a dispatch, with room for so many more rows than come, and in a combine."""
    guess = max(rank.num_rows[rank.rank] + room, 0)
    rank.layout()
    counts = rank.world.counts[rank.rank]
    counts.zero_()
    rank.notify(pulls_meanwhile=room != EXACT)
    if room != EXACT:
        rank.pull(guess)
    while not counts[words.HOST_DONE.value]:
        yield
    num_rows = int(counts[words.HOST_ROWS.value])
    if room == EXACT or num_rows > guess:
        rank.pull(num_rows)
    rank.combine(rank.handle())


def run_rooms(world: World, rooms: list[int]) -> list[Rank]:
    ranks = [Rank(world, CASE, rank) for rank in range(world.num_ranks)]
    world.run([host(rank, room) for rank, room in zip(ranks, rooms, strict=True)])
    for rank in ranks:
        rank.check_counts()
        rank.check_dispatch()
        rank.check_combine()
        assert world.code(rank.rank) == 0
    return ranks


@pytest.mark.parametrize("direct", but_slow(["staged", "mixed"], "staged"))
def test_every_room_ends_in_the_same_rows(monkeypatch: Any, direct: str) -> None:
    world = World(monkeypatch, 3, 1, direct=DIRECT[direct], stage_bytes=2048)
    for rooms in ([0, 2, EXACT], [-1, 0, 3], [-20, EXACT, -1]):
        run_rooms(world, rooms)
    assert {int(state[words.EPOCH.value]) for state in world.states} == {6}


MUTANTS = {
    "all rows fit any room": ("(received > num_rows)", "(received < 0)"),
    "a full room is too small": ("(received > num_rows)", "(received >= num_rows)"),
    "a kernel that lacks room ends the operation": ("if not too_few", "if epoch > 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", but_slow(MUTANTS, *(name for name in MUTANTS if name != "a full room is too small")))
def test_mutants_are_found(monkeypatch: Any, name: str) -> None:
    module = mutants.mutated_module(dispatch_kernels, *MUTANTS[name])
    world = World(monkeypatch, 2, 3, modules={"dispatch": module}, max_steps=9_000)
    with pytest.raises((AssertionError, Deadlock)):
        run_rooms(world, [0, -1])


# The host's own code.


class Ranks:
    """Two ranks whose hosts run as threads, up to where they wait for the device."""

    plane = Plane

    def __init__(self, monkeypatch: Any) -> None:
        self.world = world = World(monkeypatch, 2, 5, stage_bytes=2048, max_steps=10**7)
        world.base = torch.empty(1 << 24).data_ptr() & ~((1 << 43) - 1)
        for table in world.regions:
            table[0, :, 1] = world.base
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        self._barrier = threading.Barrier(2, action=self._run, timeout=100)
        self.planes = [self.plane(world, rank, self._barrier.wait) for rank in range(2)]
        self.pulls: list[list[int]] = [[], []]
        self.copies: list[list[int]] = [[], []]
        self.left = [0, 0]
        for plane in self.planes:
            plane.rooms = Rooms()
            plane.status.leave_counts = lambda rank=plane.rank: self._leave(rank)  # type: ignore[method-assign]

    def _run(self) -> None:
        self.world.run()

    def _leave(self, rank: int) -> None:
        self.left[rank] += 1

    def call(
        self,
        case: Case,
        *,
        other_of_last: Case | None = None,
        spoil: Callable[[int], Any] = lambda rank: nullcontext(),
    ) -> list[Any]:
        """A dispatch of both ranks, of the last one's perhaps another case; what each received, or the exception."""

        def run(rank: int) -> Any:
            mine = self.rank_of(other_of_last if rank and other_of_last is not None else case, rank)
            plane = self.planes[rank]
            party = Party(plane, rank, 2, CPU)  # type: ignore[arg-type]
            pull = plane.pull

            def counted(*arguments: Any) -> None:
                _, _, _, _, outputs, num_rows, _ = arguments
                self.pulls[rank].append(num_rows)
                self.copies[rank].append(len(outputs.rows))
                pull(*arguments)

            plane.pull = counted  # type: ignore[method-assign]
            try:
                with spoil(rank):
                    received = self.dispatch(party, mine)
            except MemoryError:
                self._barrier.wait()
                raise
            finally:
                del plane.pull
                self._barrier.wait()  # for all that is queued
            return mine, received

        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(run, rank) for rank in range(2)]
        return [future.exception() or future.result() for future in futures]

    def rank_of(self, case: Case, rank: int) -> Any:
        return Rank(self.world, case, rank)

    def dispatch(self, party: Party, mine: Any) -> Any:
        per_rank, per_expert, member = intranode_layout(mine)
        given = check_inputs(
            party, (mine.x, mine.scales), per_rank, member, per_expert, mine.given.topk_idx, mine.given.topk_weights,
            1, 0,
        )  # fmt: skip
        return intranode.dispatch(party, given)

    def check(self, results: list[Any]) -> None:
        for result in results:
            if isinstance(result, BaseException):
                raise result
            self.check_received(*result)

    def check_received(self, mine: Any, received: Any) -> None:
        wanted = mine.wanted
        same(received.x, wanted.x, "x")
        same(received.scales, wanted.scales, "scales")
        same(received.topk_idx, wanted.topk_idx, "topk_idx")
        same(received.topk_weights, wanted.topk_weights, "topk_weights")
        same(received.handle.recv_src_idx, wanted.recv_src_idx, "recv_src_idx")
        assert received.num_per_expert == wanted.num_per_expert
        are_whole(received.x, received.topk_idx, received.handle.recv_src_idx)


def are_whole(*outputs: torch.Tensor) -> None:
    for output in outputs:
        assert output.is_contiguous()
        assert not output._is_view()


def intranode_layout(mine: Rank) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    wanted, experts = mine.wanted, mine.num_experts
    per_expert = torch.bincount(mine.given.topk_idx[mine.given.topk_idx >= 0], minlength=experts).to(torch.int32)
    return wanted.channel_prefix_matrix.flatten().contiguous(), per_expert, wanted.is_token_in_rank


def test_the_second_dispatch_does_not_wait_for_counts(monkeypatch: Any) -> None:
    ranks = Ranks(monkeypatch)
    for _ in range(3):
        results = ranks.call(CASE)
        ranks.check(results)
    rows = [len(received.x) for _, received in results]
    for rank in range(2):
        first, *later = ranks.pulls[rank]
        assert first == rows[rank]
        assert later == [-(-rows[rank] * 17 // 16)] * 2


def test_more_rows_than_room(monkeypatch: Any) -> None:
    ranks = Ranks(monkeypatch)
    for case in (FEWER, CASE, CASE):
        ranks.check(ranks.call(case))
    for pulls in ranks.pulls:
        few, room, many, later = pulls
        assert few < room < many < later
    assert ranks.left == [0, 0]


def test_no_memory_for_a_room(monkeypatch: Any) -> None:
    """The rank takes part without rows; the other one, and later operations of both, get theirs."""
    ranks = Ranks(monkeypatch)
    ranks.check(ranks.call(CASE))

    def spoil(rank: int) -> Any:
        if rank == 1:
            return nullcontext()
        return mock.patch.object(ranks.planes[rank], "empty_rows", side_effect=MemoryError)

    failed, received = ranks.call(CASE, spoil=spoil)
    assert isinstance(failed, MemoryError)
    ranks.check([received])
    assert ranks.left == [1, 0]
    assert ranks.pulls[0][-1] == -1
    ranks.check(ranks.call(CASE))


def test_ranks_that_disagree_step_back(monkeypatch: Any) -> None:
    ranks = Ranks(monkeypatch)
    other = replace(CASE, row_bytes=128)
    for case in (CASE, other):
        ranks.check(ranks.call(case))
    codes = []

    def counts(rank: int) -> Any:
        def wait(num_local: int, _: Any) -> Any:
            ranks._barrier.wait()
            codes.append(int(ranks.world.counts[rank][words.HOST_CODE.value]))
            ranks.world.status[rank][words.CODE.value] = 0
            raise LookupError("they disagree")

        return mock.patch.object(ranks.planes[rank].status, "wait_for_counts", wait)

    results = ranks.call(CASE, other_of_last=other, spoil=counts)
    assert [type(result) for result in results] == [LookupError, LookupError]
    assert codes == [words.MISMATCH.value] * 2
    ranks.check(ranks.call(CASE))


def test_guesses() -> None:
    rooms = Rooms()
    kind = cast(Signature, "a signature"), 16

    def note(num_tokens: int, received: int, expanded: int = 0) -> None:
        rooms.of(kind).note(num_tokens, received, expanded)

    assert rooms.of(kind).guess(100) == (0, 0)
    note(100, 160, 320)
    assert rooms.of(kind).guess(100) == (170, 340)
    assert rooms.of(kind).guess(112) == (170, 340)
    assert rooms.of(kind).guess(113) == (0, 0)
    assert rooms.of(kind).guess(87) == (0, 0)
    assert rooms.of((cast(Signature, "another"), 16)).guess(100) == (0, 0)
    assert rooms.of((kind[0], 128)).guess(100) == (0, 0)
    note(100, 100, 640)
    assert rooms.of(kind).guess(100) == (139, 680)  # of 130, and of more than before
    note(0, 1000)
    assert rooms.of(kind).guess(0) == (1063, 340)
    for _ in range(11):
        note(0, 0)
    assert rooms.of(kind).guess(0) == (0, 0)
