"""Nodes as separate hosts: each in a network namespace of its own, Gloo over TCP between them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import network
from tests.cases import Case, wait_for
from tests.conftest import slow
from tests.faults import After, Blames, Claims, Delays, Holdings, Seen, Within, fault
from tests.internode_cases import LAYOUTS, NodeScenario, check_nodes
from tokenferry import Buffer, PeerLostError, PeerTimeoutError
from tokenferry.cli.ranks import RankPool

TIMEOUT = 3.0


@contextmanager
def hosts_of(layout: str) -> Iterator[tuple[network.Network, RankPool]]:
    """A network with a host for each node, and ranks there."""
    nodes = LAYOUTS[layout]
    try:
        made = network.network_of(max(nodes) + 1)
        net = made.__enter__()
    except RuntimeError as error:
        pytest.skip(f"no network namespaces here: {error}")
    try:
        with RankPool(len(nodes), 1, functools.partial(_enter, net.hosts, nodes)) as pool:
            yield net, pool
    finally:
        made.__exit__(None, None, None)


def _enter(hosts: list[str], nodes: tuple[int, ...], rank: int) -> None:
    network.enter(hosts[nodes[rank]])


CASES = [
    Case(tokens=(9, 30, 0, 17), num_topk=4, bias="two", spare_rows=3),
    Case(tokens=(200, 130), row_bytes=2048, routing="one_rank", num_topk=2),
    Case(tokens=(25,), routing="others", num_topk=6),
]


@pytest.mark.parametrize("layout", ["2x2", *slow("3x2", "2x4")])
def test_hosts(layout: str) -> None:
    with hosts_of(layout) as (_, pool):
        for case in CASES:
            pool.run(check_nodes, layout, case, 32)


def _until_it_fails(rank: int, num_ranks: int, layout: str, begun: Path) -> Seen:
    """Dispatch and combine until an exception comes; the first rank says when that has begun."""
    seen = Seen()
    before = Holdings.settled()
    with Buffer(dist.group.WORLD, node=LAYOUTS[layout][rank], timeout=TIMEOUT) as buffer:
        scenario = NodeScenario(Case(tokens=(40,), row_bytes=4096, num_topk=4), rank, layout)

        def turn() -> None:
            result = scenario.dispatch(buffer)
            scenario.check_dispatch(result)
            scenario.check_combine(scenario.combine(buffer, result[4]))

        turn()
        if rank == 0:
            begun.touch()
        while seen.error is None:
            with seen.operation():
                turn()
        seen.available = buffer.is_available()
    seen.left = before.left()
    return seen


def _once(rank: int, num_ranks: int, layout: str) -> None:
    check_nodes(rank, num_ranks, layout, CASES[0])


def check_cut(claims: Claims, layout: str, cut: int, begun: Path) -> None:
    """Cut the link of a node while all work; in the end, with the link as it was, a new Buffer works."""
    with hosts_of(layout) as (net, pool):
        pool.run(_once, layout)
        times: list[float] = []

        def cut_it() -> None:
            wait_for(begun.exists, 60.0)
            time.sleep(0.5)
            net.cut(cut)
            times.append(time.monotonic())

        cutting = threading.Thread(target=cut_it)
        cutting.start()
        with Delays() as delays:
            seen = pool.run(_until_it_fails, layout, begun)
        cutting.join()
        nodes = LAYOUTS[layout]
        claims.check(
            seen, [rank for rank, node in enumerate(nodes) if node == cut], times[0], TIMEOUT, delays.seconds
        )
        for rank, it in enumerate(seen):
            others = {f"node {other} " for other in nodes if other != nodes[rank]}
            assert any(name in str(it.error) for name in others), f"rank {rank}: {it.error}"
        net.restore(cut)
        pool.run(_once, layout)


@fault(
    "the link of a node is cut",
    on=["two nodes on hosts of their own"],
    itself=(PeerTimeoutError, PeerLostError),
    others=(PeerTimeoutError, PeerLostError),
    within=Within.DEADLINE,
    after=After.ANEW,
)
def test_cut_link(claims: Claims, tmp_path: Path) -> None:
    check_cut(claims, "2x2", 1, tmp_path / "begun")


@pytest.mark.slow
@fault(
    "the link of a node is cut",
    on=["three nodes on hosts of their own"],
    itself=(PeerTimeoutError, PeerLostError),
    others=(PeerTimeoutError, PeerLostError),
    within=Within.DEADLINE,
    after=After.ANEW,
    blames=Blames.SOME_IT,
)
def test_cut_link_of_three(claims: Claims, tmp_path: Path) -> None:
    check_cut(claims, "3x2", 0, tmp_path / "begun")
