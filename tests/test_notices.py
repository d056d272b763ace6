"""Who is to blame on a rail of several ranks, where one cannot tell by itself."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from tests.cases import Case, wait_for
from tests.conftest import PoolOf
from tests.internode_cases import NodeScenario, make_buffer
from tokenferry.cli.ranks import RankPool
from tokenferry.rail import RailError, notices
from tokenferry.rail.notices import Notices
from tokenferry.rail.process_group import ProcessGroupRail
from tokenferry.topology import Topology

GRACE = 1.5
"""Seconds."""
PATIENT: dict[str, Any] = {"_GRACE_SHARE": 1.0, "_MOST_GRACE_SECONDS": GRACE, "_GRACE_SECONDS_IF_LOST": GRACE}
"""More than the library has: here machines are busy."""


def _notices(rank: int, num_ranks: int, key: str) -> Notices:
    seconds = timedelta(seconds=GRACE)
    return Notices(PrefixStore(key, _get_default_store()), rank, num_ranks, seconds, seconds)


def _give_up(
    rank: int, num_ranks: int, key: str, waits: dict[int, Sequence[int]], order: Sequence[int], is_lost: bool
) -> tuple[list[int], bool, str, float]:
    """Ranks of ``order`` give up in turn, because of those they waited for; who waited for none lets go."""
    result: tuple[list[int], bool, str, float] = [], False, "", 0.0
    with mock.patch.multiple(notices, **PATIENT):
        told = _notices(rank, num_ranks, key)
        dist.barrier()
        time.sleep(0.05 * order.index(rank) if rank in order else 0.0)
        if waits.get(rank):
            began = time.monotonic()
            error = told.failure(waits[rank], not is_lost, "as it was", is_lost)
            result = list(error.nodes), error.timed_out, str(error), time.monotonic() - began
        elif rank in order:
            told.close()
    dist.barrier()
    told.close()
    return result


@pytest.mark.parametrize("is_lost", [False, True])
@pytest.mark.parametrize(
    ("waits", "order", "blamed"),
    [
        ({0: [1, 2], 2: [0, 1]}, (0, 2), {0: [1], 2: [1]}),  # as with a carrier that waits for all at a time
        ({0: [1], 2: [0]}, (0, 2), {0: [1], 2: [1]}),  # one waits for another, which waits for the third
        ({3: [2], 2: [1], 1: [0]}, (1, 2, 3), {1: [0], 2: [0], 3: [0]}),
        ({0: [1], 1: [2], 2: [0]}, (0, 1, 2), {0: [1], 1: [2], 2: [0]}),  # in a circle
        ({0: [1, 2], 1: [0, 2], 2: [0, 1]}, (0, 1, 2), {0: [1, 2], 1: [0, 2], 2: [0, 1]}),
        ({0: [1], 1: [0], 2: [1], 3: [0]}, (0, 1, 2, 3), {0: [1], 1: [0], 2: [0, 1], 3: [0, 1]}),  # who is not in it
        ({0: [1], 2: [0]}, (1, 0, 2), {0: [1], 2: [1]}),  # 1 has let go
    ],
    ids=str,
)
def test_who_is_to_blame(
    pool_of: PoolOf,
    request: pytest.FixtureRequest,
    waits: dict[int, Sequence[int]],
    order: Sequence[int],
    blamed: dict[int, list[int]],
    is_lost: bool,
) -> None:
    results = pool_of(4).run(_give_up, request.node.name, waits, order, is_lost)
    for rank, (nodes, timed_out, reason, seconds) in enumerate(results):
        assert nodes == blamed.get(rank, []), f"rank {rank}"
        if rank in waits:
            assert timed_out != is_lost
            assert (reason == "as it was") == (set(nodes) <= set(waits[rank]))
            assert seconds < GRACE + 1.0


def _waits(rank: int, num_ranks: int, key: str, waits_for: int) -> tuple[list[int], bool, str]:
    """Rank 0 waits for rank 2, which waits for another, and so is silent; or has failed, and closed its rail."""
    with mock.patch.multiple(notices, **PATIENT):
        rail = ProcessGroupRail(Topology(rank, tuple(range(num_ranks))), key, 2.0)
        dist.barrier()
        result: tuple[list[int], bool, str] = [], False, ""
        if rank in (0, 2):
            node = 2 if rank == 0 else waits_for
            time.sleep(0.5 if rank == 2 else 0.0)  # it has not given up when rank 0 does
            with pytest.raises(RailError) as caught:
                rail.post({}, {node: [torch.empty(4)]}).wait(node)
            result = list(caught.value.nodes), caught.value.timed_out, str(caught.value)
            rail.close()
        elif rank == 1 == waits_for:
            time.sleep(1.0)
            rail.close()
        dist.barrier()
        rail.close()
    return result


@pytest.mark.parametrize(("waits_for", "timed_out"), [(3, True), (1, False)])
def test_ranks_that_wait_for_others(
    pool_of: PoolOf, request: pytest.FixtureRequest, waits_for: int, timed_out: bool
) -> None:
    """A rank that is silent as it waits itself is not to blame, nor one that has closed as another did."""
    results = pool_of(4).run(_waits, request.node.name, waits_for)
    assert [nodes for nodes, *_ in results] == [[waits_for], [], [waits_for], []]
    assert [results[rank][1] for rank in (0, 2)] == [timed_out, timed_out]
    assert results[0][2] == "found by node 2, which this rank waited for"


def _answers(rank: int, num_ranks: int, key: str) -> list[bool]:
    """Rank 0 lets go, rank 1 gives up because of rank 3, rank 2 waits for that. When rank 3 hears of it."""
    told, has_told = _notices(rank, num_ranks, key), []
    for heard in ([], [0], [0, 1]):
        dist.barrier()
        if heard == [0] == [rank]:
            told.close()
        if heard == [0, 1] and rank == 1:
            told._tell([3], True)
        if rank == 2:
            assert wait_for(lambda heard=heard: all(map(told._has_heard, heard)))
            told.answer([3])
        dist.barrier()
        if rank == 3:
            has_told.append(wait_for(lambda: told._has_heard(2), 5.0 if 1 in heard else 0.1))
    assert rank != 3 or told._blamed_by(2) == {3}
    dist.barrier()
    told.close()
    return has_told


def test_who_waits_answers_those_that_give_up(pool_of: PoolOf) -> None:
    assert pool_of(4).run(_answers, "answers")[3] == [False, False, True]


def _race(rank: int, num_ranks: int, key: str) -> None:
    """A thread gives up while another closes: it raises nothing else, and all hear one of the two."""
    for turn in range(40):
        told, raised = _notices(rank, num_ranks, f"{key}/{turn}"), []
        dist.barrier()
        if rank == 0:
            both = threading.Barrier(2)

            def give_up(told: Notices = told, both: threading.Barrier = both, raised: list[object] = raised) -> None:
                both.wait()
                raised.append(told.failure([1], True, "late", True))

            thread = threading.Thread(target=give_up)
            thread.start()
            both.wait()
            time.sleep(turn % 12 * 10e-6)
            told.close()
            thread.join()
            assert [type(error) for error in raised] == [RailError], "the thread has raised it"
        else:
            assert wait_for(lambda told=told: told._has_heard(0))
            assert told._notices[0, :-1].nonzero()[0].tolist() in ([0], [1])
        dist.barrier()
        told.close()


def test_giving_up_and_closing_at_a_time(pool_of: PoolOf) -> None:
    pool_of(3).run(_race, "race")


def _lazy(rank: int, num_ranks: int) -> None:
    os.environ["TORCH_GLOO_LAZY_INIT"] = "1"
    for turn in range(10):
        rail = ProcessGroupRail(Topology(rank, tuple(range(num_ranks))), f"lazy {turn}", 5.0)
        rail.close()


def test_connections_that_gloo_makes_late() -> None:
    """They are there when ranks let go at a time: Gloo's end would wait for them."""
    with RankPool(3, 1) as pool:
        pool.run(_lazy)


def _made_in_inference_mode(rank: int, num_ranks: int, key: str) -> list[int]:
    """What was made there is used outside of it, also by threads."""
    nodes: list[int] = []
    with torch.inference_mode():
        buffer = make_buffer(rank, "3x1", timeout=3.0)
    scenario = NodeScenario(Case(tokens=(5,)), rank, "3x1")
    scenario.check_dispatch(scenario.dispatch(buffer))
    with torch.inference_mode():
        told = _notices(rank, num_ranks, key)
    if rank == 0:
        nodes = list(told.failure([1], True, "late", False).nodes)
    dist.barrier()
    told.close()
    buffer.destroy()
    return nodes


def test_rails_made_in_inference_mode(pool_of: PoolOf) -> None:
    assert pool_of(3).run(_made_in_inference_mode, "inference") == [[1], [], []]


def _endless(rank: int, num_ranks: int) -> None:
    rail = ProcessGroupRail(Topology(rank, tuple(range(num_ranks))), "endless", float("inf"))
    others = [other for other in range(num_ranks) if other != rank]
    parts = {other: [torch.zeros(1)] for other in others}
    rail.post({other: [torch.ones(1)] for other in others}, parts).finish()
    assert all(bool(part == 1) for of_node in parts.values() for part in of_node)
    rail.close()


def test_no_deadline(pool_of: PoolOf) -> None:
    pool_of(3).run(_endless)
