"""Nodes as separate hosts: each in a network namespace of its own, Gloo over TCP between them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from tests import network
from tests.cases import Case
from tests.internode_cases import LAYOUTS, NodeScenario, check_nodes
from tokenferry import Buffer, PeerError
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


@pytest.mark.parametrize("layout", ["2x2", "3x2", "2x4"])
def test_hosts(layout: str) -> None:
    with hosts_of(layout) as (_, pool):
        for case in CASES:
            pool.run(check_nodes, layout, case, 32)


def _until_it_fails(rank: int, num_ranks: int, layout: str) -> tuple[str, float]:
    """Dispatch and combine until an exception comes: its text, and the seconds that the last operation took."""
    with Buffer(dist.group.WORLD, node=LAYOUTS[layout][rank], timeout=TIMEOUT) as buffer:
        scenario = NodeScenario(Case(tokens=(40,), row_bytes=4096, num_topk=4), rank, layout)
        while True:
            started = time.monotonic()
            try:
                result = scenario.dispatch(buffer)
                scenario.check_dispatch(result)
                scenario.check_combine(scenario.combine(buffer, result[4]))
            except PeerError as error:
                return str(error), time.monotonic() - started


def _once(rank: int, num_ranks: int, layout: str) -> None:
    check_nodes(rank, num_ranks, layout, CASES[0])


@pytest.mark.parametrize(("layout", "cut"), [("2x2", 1), ("3x2", 0)])
def test_cut_link_is_named_by_every_rank_and_a_new_buffer_works(layout: str, cut: int) -> None:
    with hosts_of(layout) as (net, pool):
        pool.run(_once, layout)
        timer = threading.Timer(1.0, net.cut, [cut])
        timer.start()
        found = pool.run(_until_it_fails, layout)
        timer.join()
        for rank, (text, seconds) in enumerate(found):
            node = LAYOUTS[layout][rank]
            others = {f"node {other} " for other in LAYOUTS[layout] if other != node}
            named = any(name in text for name in others) if node == cut else f"node {cut} " in text
            assert named, f"rank {rank}: {text}"
            assert seconds < TIMEOUT + 1.0
        net.restore(cut)
        pool.run(_once, layout)
