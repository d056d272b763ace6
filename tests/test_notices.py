"""Who is to blame on a rail of several ranks, where one cannot tell by itself."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from tests.conftest import PoolOf
from tokenferry.rail import RailError, notices
from tokenferry.rail.notices import Notices
from tokenferry.rail.process_group import ProcessGroupRail
from tokenferry.topology import Topology

GRACE = 1.5
"""Seconds."""
PATIENT: dict[str, Any] = {"_GRACE_SHARE": 1.0, "_MOST_GRACE_SECONDS": GRACE, "_GRACE_SECONDS_IF_LOST": GRACE}
"""More than the library has: here machines are busy."""


def _give_up(
    rank: int, num_ranks: int, key: str, waits: dict[int, Sequence[int]], order: Sequence[int], is_lost: bool
) -> tuple[list[int], bool, str, float]:
    """Ranks of ``order`` give up in turn, because of those they waited for; who waited for none lets go."""
    result: tuple[list[int], bool, str, float] = [], False, "", 0.0
    with mock.patch.multiple(notices, **PATIENT):
        told = Notices(PrefixStore(key, _get_default_store()), rank, num_ranks, timedelta(seconds=GRACE))
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
    rail = ProcessGroupRail(Topology(rank, tuple(range(num_ranks))), key, 2.0)
    dist.barrier()
    result: tuple[list[int], bool, str] = [], False, ""
    if rank in (0, 2):
        node = 2 if rank == 0 else waits_for
        time.sleep(0.5 if rank == 0 else 0.0)  # so that it is later, though machines are busy
        with pytest.raises(RailError) as caught:
            rail.post({}, {node: [torch.empty(4)]}).wait(node)
        result = list(caught.value.nodes), caught.value.timed_out, str(caught.value)
        rail.close()
    elif rank == 1 == waits_for:
        time.sleep(0.5)
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
