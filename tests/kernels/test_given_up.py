"""Ranks that give up, or read nothing, where others go on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.cases import Case
from tests.kernels.schedules import Scheduler, stop_at_deadlocks
from tests.kernels.world import Rank, World
from tokenferry.dataplane.cuda.kernels import flags, words

CASE = Case(tokens=(9,), row_bytes=16, num_topk=3, local_experts=2, combine_bytes=16, routing="all", seed=3)
ROWS = 40


def world_of(monkeypatch: Any, num_ranks: int, direct: bool, seed: int = 0) -> tuple[World, list[Rank]]:
    world = World(monkeypatch, num_ranks, 0, direct=(direct,), stage_bytes=1 << 14, max_steps=400_000)
    world.simulator.switch = world.simulator.weak = 0.0
    world.simulator.random = Scheduler(seed)
    stop_at_deadlocks(monkeypatch)
    return world, [Rank(world, CASE, rank) for rank in range(num_ranks)]


def dispatched(world: World, ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.layout()
        rank.notify(ROWS)
        rank.pull(ROWS)
    world.run()
    assert not any(world.code(rank.rank) for rank in ranks)


def combined_late(late: int, monkeypatch: Any) -> tuple[int, int]:
    """What the hosts of two ranks are told of a combine that rank 1 comes late to.

    Rank 0's caller, told that it has failed, uses the memory of its rows for something else.
    """
    world, ranks = world_of(monkeypatch, 2, direct=True)
    dispatched(world, ranks)
    world.simulator.let_time_pass(monkeypatch, flags)
    world.timeout = 1500
    ranks[0].combine(ranks[0].handle())
    given = world.kept[-1][0]
    launch = world.simulator.launch
    monkeypatch.setattr(world.simulator, "launch", lambda *args, **how: launch(*args, **how, delay=late))
    ranks[1].combine(ranks[1].handle())

    def caller() -> Iterator[None]:
        while not world.code(0) and int(world.states[0][words.EPOCH.value]) < 2:
            yield
        if world.code(0):
            for column in given:
                column.zero_()
        yield

    world.run([caller()])
    if not world.code(1):
        ranks[1].check_combine()
    elif world.code(1) == words.MISMATCH.value:
        assert world.status[1][words.DETAIL.value :][:2].tolist() == [2, 0]
    fatal = int(world.status[0][words.HAS_FAILED.value])  # which the host goes by
    return fatal or world.code(0), world.code(1)


def test_a_late_rank_does_not_take_for_rows_what_is_somebody_elses_by_then(monkeypatch: Any) -> None:
    told = []
    for late in (300, *range(1000, 4000, 150), 30_000):
        with monkeypatch.context() as patch:
            told.append(combined_late(late, patch))
    lost = words.TIMED_OUT.value, words.MISMATCH.value
    assert told[0] == (0, 0)
    assert told[-1] == lost
    assert set(told) <= {(0, 0), lost, (words.TIMED_OUT.value, 0)}


@pytest.mark.parametrize(("num_ranks", "bad"), [(2, (0, 1)), (3, (1,))])
def test_nobody_waits_for_a_rank_whose_handle_does_not_fit(
    num_ranks: int, bad: tuple[int, ...], monkeypatch: Any
) -> None:
    """Its own rows pass through its stage all the same, two tokens a round."""
    world, ranks = world_of(monkeypatch, num_ranks, direct=False)
    dispatched(world, ranks)
    world.half = (16 + 16) * num_ranks * 2
    for rank in ranks:
        handle = rank.handle()
        if rank.rank in bad:
            prefix = rank.prefix.clone()
            prefix[rank.rank :, 0] += 1000
            handle = handle._replace(rank_prefix_matrix=prefix)
        rank.combine(handle)
    world.run()
    for rank in ranks:
        assert world.code(rank.rank) == (words.BAD_HANDLE.value if rank.rank in bad else 0)
        if rank.rank not in bad:
            rank.check_combine()


@pytest.mark.parametrize(("num_ranks", "worst"), [(2, ROWS), (3, ROWS), (2, 0), (3, 0)])
@pytest.mark.parametrize("direct", [False, True])
def test_nobody_waits_for_a_rank_that_goes_on_alone(
    num_ranks: int, worst: int, direct: bool, monkeypatch: Any
) -> None:
    """Rank 0 is sent counts that cannot be. Its host waits for them where there is no worst case."""
    world, ranks = world_of(monkeypatch, num_ranks, direct)
    world.half = 128
    begin = world.heaps[0].data_ptr() + words.MESSAGES.value + words.MESSAGE_BYTES.value + 8 * words.COUNTS.value

    def spoil(program: Any, addresses: Any, values: Any) -> Any:
        inside = (addresses >= begin) & (addresses < begin + 8 * num_ranks)
        if program.launch.name.startswith("rank 1 ") and inside.any():
            values = values.copy()
            values[inside] = 512
        return values

    world.simulator.spoil = spoil
    for rank in ranks:
        rank.layout()
        rank.notify(worst)
        rank.pull(worst or (-1 if rank.rank == 0 else ROWS))
    world.run()
    assert [world.code(rank.rank) for rank in ranks] == [words.BAD_PEER.value] + [0] * (num_ranks - 1)
    assert [int(state[words.EPOCH.value]) for state in world.states] == [1] * num_ranks
