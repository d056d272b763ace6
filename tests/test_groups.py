"""Buffers on parts of the world, and several Buffers at a time."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, Case, Scenario, check_works
from tests.conftest import PoolOf
from tokenferry import ArgumentError, Buffer
from tokenferry.rendezvous import node_group

CASE = Case(tokens=(9, 0, 20), num_topk=4, bias="one")
OTHER = Case(tokens=(2, 14), num_topk=2, routing="sparse", seed=5)


def _on_parts(rank: int, num_ranks: int, parts: tuple[tuple[int, ...], ...]) -> None:
    """Every part has a Buffer of its own; a rank may be in none."""
    groups = [dist.new_group(list(part)) for part in parts]
    for part, group in zip(parts, groups, strict=True):
        if rank not in part:
            continue
        with Buffer(group, timeout=TIMEOUT) as buffer:
            assert (buffer.rank, buffer.group_size) == (part.index(rank), len(part))
            assert buffer.group is group
            Scenario(CASE, buffer.rank, buffer.group_size).check_all(buffer)
    dist.barrier()


@pytest.mark.parametrize(
    "parts",
    [((0, 1, 2),), ((1, 2), (0, 4)), ((0, 2, 4), (1, 3)), ((3,),), ((4, 1),)],
    ids=str,
)
def test_sub_groups(pool_of: PoolOf, parts: tuple[tuple[int, ...], ...]) -> None:
    parts = tuple(tuple(sorted(part)) for part in parts)  # torch numbers a group's ranks in ascending order
    pool_of(5).run(_on_parts, parts)


def _overlapping(rank: int, num_ranks: int) -> None:
    """Rows and columns of a 2 x 2 mesh, both alive, as expert and tensor parallel groups are."""
    rows = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    columns = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    with (
        Buffer(rows[rank // 2], timeout=TIMEOUT) as across,
        Buffer(columns[rank % 2], 65536, timeout=TIMEOUT) as down,
        Buffer(dist.group.WORLD, timeout=TIMEOUT) as whole,
    ):
        scenarios = [
            (buffer, Scenario(case, buffer.rank, buffer.group_size))
            for buffer, case in ((across, CASE), (down, OTHER), (whole, CASE))
        ]
        results = [scenario.dispatch(buffer) for buffer, scenario in scenarios]
        for (buffer, scenario), result in reversed(list(zip(scenarios, results, strict=True))):
            scenario.check_dispatch(result)
            scenario.check_combine(scenario.combine(buffer, result[4]))


def test_buffers_on_overlapping_groups(pool_of: PoolOf) -> None:
    pool_of(4).run(_overlapping)


def _same_group(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as first, Buffer(dist.group.WORLD, 128, timeout=TIMEOUT) as second:
        one, two = Scenario(CASE, rank, num_ranks), Scenario(OTHER, rank, num_ranks)
        result_one, result_two = one.dispatch(first), two.dispatch(second)
        two.check_dispatch(result_two)
        two.check_combine(two.combine(first, result_two[4]))  # a handle belongs to a group, not to a Buffer
        one.check_combine(one.combine(second, result_one[4]))
        first.destroy()
        check_works(second, OTHER)


def test_two_buffers_on_the_same_group(pool_of: PoolOf) -> None:
    pool_of(3).run(_same_group)


def _interleaved(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as first, Buffer(dist.group.WORLD, timeout=TIMEOUT) as second:
        one, two = Scenario(CASE, rank, num_ranks), Scenario(OTHER, rank, num_ranks)
        for _ in range(5):
            result_one, result_two = one.dispatch(first), two.dispatch(second)
            one.check_combine(one.combine(first, result_one[4]))
            two.check_combine(two.combine(second, result_two[4]))


def test_interleaved_buffers(pool_of: PoolOf) -> None:
    pool_of(2).run(_interleaved)


def _outside(rank: int, num_ranks: int) -> None:
    group = dist.new_group([0])
    if rank == 0:
        with Buffer(group, timeout=TIMEOUT) as buffer:
            check_works(buffer)
    else:
        with pytest.raises(ArgumentError, match="group"):
            Buffer(group, timeout=TIMEOUT)


def test_construction_outside_of_the_group_raises(pool_of: PoolOf) -> None:
    pool_of(2).run(_outside)


def _meet_by_node(rank: int, num_ranks: int) -> list[int]:
    """What the ranks of this one's node say, of nodes whose ranks are not contiguous."""
    ranks = [rank % 2, rank % 2 + 2]
    group = node_group(dist.group.WORLD, ranks, 20.0)
    assert node_group(dist.group.WORLD, ranks, 20.0) is group
    said = [torch.zeros(1, dtype=torch.int64) for _ in ranks]
    dist.all_gather(said, torch.tensor([10 * rank]), group=group)
    return [int(value) for value in said]


def test_group_of_a_node(pool_of: PoolOf) -> None:
    assert pool_of(4).run(_meet_by_node) == [[0, 20], [10, 30], [0, 20], [10, 30]]
