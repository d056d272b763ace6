"""Ranks on GPUs. Several share one where there are more ranks than GPUs: then CUDA's MPS runs them side by side.

How many ranks a test has at a time says its parameter ``num_ranks`` or ``layout``, or ``@pytest.mark.ranks(most)``;
without these it has two. Each node has one GPU, as far as there are. Tests whose ranks share GPUs are marked for
``-m``, and without them there is no MPS:

    python -m pytest tests/gpu -m "not slow and not shares_gpus"
    python -m pytest tests/gpu -m "not slow and shares_gpus"

``--ranks 8``, where ``tests/gpu`` is named, leaves of these those that have eight at a time. Only torch, triton,
numpy and pytest are needed.
"""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import torch

from tests.conftest import NodesOf, PoolOf, session_pools
from tokenferry.cli.mps import MPS_CONTROL, sharing_gpus
from tokenferry.cli.ranks import RankPool
from tokenferry.rail import CARRIER_VARIABLE, NVSHMEM, PROCESS_GROUP, carriers_of
from tokenferry.rail.nvshmem_world import POOL_VARIABLE

MOST_SECONDS, MOST_SECONDS_SLOW = 180, 1800
"""That a test may take: one that hangs fails and tells where its ranks are, and the others go on."""
_DEFAULT_RANKS, _DEFAULT_LAYOUT = 2, "2x1"
_SYMMETRIC_BYTES = 1 << 30
"""A rail that a test has broken keeps its part of them."""
_BY_NODE = {"direct", "over_network"}
"""Fixtures that put ranks on nodes, each of which has one GPU."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """See above."""
    parser.addoption("--ranks", type=int, help="tests on GPUs that have so many ranks at a time, no others")


def most_ranks(item: pytest.Item) -> int:
    """The ranks that a test has at a time."""
    marker = item.get_closest_marker("ranks")
    if marker is not None:
        return int(marker.args[0])
    given = _parameters(item)
    if "layout" in given:
        nodes, each = nodes_and_ranks(given["layout"])
        return nodes * each
    return int(given.get("num_ranks", _DEFAULT_RANKS))


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}


def nodes_and_ranks(layout: str) -> tuple[int, int]:
    """Of ``"3x2"``: three nodes, each of two ranks."""
    nodes, _, each = layout.partition("x")
    return int(nodes), int(each)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU there is nothing to test here; mark what needs MPS."""
    num_gpus = torch.cuda.device_count()
    ranks = config.getoption("--ranks")
    if ranks is not None:
        others = [item for item in items if "gpu" in item.path.parts and most_ranks(item) != ranks]
        items[:] = [item for item in items if item not in others]
        config.hook.pytest_deselected(items=others)
    here = [item for item in items if "gpu" in item.path.parts]
    if len(here) == len(items):
        items.sort(key=most_ranks)  # kernels are compiled for one number of ranks after the other
    for item in here:
        if num_gpus == 0:
            item.add_marker(pytest.mark.skip(reason="no GPU"))
            continue
        if config.pluginmanager.hasplugin("timeout"):
            item.add_marker(pytest.mark.timeout(0))  # ``deadline`` knows the ranks
        if most_ranks(item) > _places(item, num_gpus):
            item.add_marker("shares_gpus")
            if shutil.which(MPS_CONTROL) is None:
                item.add_marker(pytest.mark.skip(reason="no MPS: several ranks cannot run at a time on one GPU"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What failed is told at once: a machine may be gone before all tests are through."""
    if report.failed and "/gpu/" in report.nodeid:
        sections = [f"-- {name} --\n{text}" for name, text in report.sections]
        print(f"\n{report.nodeid}\n{report.longreprtext}", *sections, sep="\n", flush=True)


def _places(item: pytest.Item, num_gpus: int) -> int:
    """Ranks of a test that have a GPU each."""
    if not _BY_NODE & set(getattr(item, "fixturenames", ())):
        return num_gpus
    return min(num_gpus, nodes_and_ranks(_parameters(item).get("layout", _DEFAULT_LAYOUT))[0])


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ends a test that hangs, and has its ranks write down where they are; the next test gets new ones."""
    seconds = MOST_SECONDS_SLOW if request.node.get_closest_marker("slow") else MOST_SECONDS

    def expire(*_: object) -> None:
        for rank in multiprocessing.active_children():
            if rank.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGUSR1)
            time.sleep(0.3)  # one after the other
        raise TimeoutError(f"not done after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="session")
def sharing(request: pytest.FixtureRequest) -> Iterator[bool]:
    """MPS for the session if ranks of any test of it share GPUs, and leave for symmetric memory of one GPU."""
    shared = any(item.get_closest_marker("shares_gpus") for item in request.session.items)
    with sharing_gpus(shared and shutil.which(MPS_CONTROL) is not None):
        yield shared


def _checked(num_ranks: int, places: int, shared: bool) -> None:
    if num_ranks > places and not shared:
        pytest.fail(f"{num_ranks} ranks where {places} have a GPU each: say so with pytest.mark.ranks")


@pytest.fixture(scope="session")
def gpu_pool_of(sharing: bool) -> Iterator[PoolOf]:
    """``gpu_pool_of(n)``: n ranks, one GPU after the other."""
    for pool_of in session_pools(take_device):

        def get(num_ranks: int, pool_of: PoolOf = pool_of) -> RankPool:
            _checked(num_ranks, torch.cuda.device_count(), sharing)
            return pool_of(num_ranks)

        yield get


def take_device(rank: int, num_ranks: int) -> None:
    """Give this rank its GPU."""
    faulthandler.register(signal.SIGUSR1)
    torch.cuda.set_device(rank % torch.cuda.device_count())


def take_node(
    rank: int, num_ranks: int, num_nodes: int, over_network: bool = False, carrier: str = PROCESS_GROUP
) -> None:
    """Give this rank the GPU of its node; NCCL is told whether nodes are hosts: those that share a GPU are."""
    num_gpus, node = torch.cuda.device_count(), rank * num_nodes // num_ranks
    os.environ.update({CARRIER_VARIABLE: carrier, POOL_VARIABLE: str(_SYMMETRIC_BYTES)})
    faulthandler.register(signal.SIGUSR1)
    torch.cuda.set_device(node % num_gpus)
    if over_network or num_gpus < num_nodes:
        os.environ["NCCL_HOSTID"] = f"node-{node}"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"


def _nodes(sharing: bool, over_network: bool = False, carrier: str = PROCESS_GROUP) -> Iterator[NodesOf]:
    """Ranks of one layout at a time, since MPS serves a few dozen processes; they stay for tests of the same."""
    pools: dict[str, PoolOf] = {}
    with ExitStack() as current:

        def get(layout: str) -> RankPool:
            num_nodes, each = nodes_and_ranks(layout)
            _checked(num_nodes * each, min(torch.cuda.device_count(), num_nodes), sharing)
            if layout not in pools:
                pools.clear()
                current.close()
                begin = functools.partial(take_node, num_nodes=num_nodes, over_network=over_network, carrier=carrier)
                pools[layout] = current.enter_context(contextmanager(session_pools)(begin))
            return pools[layout](num_nodes * each)

        yield get


@pytest.fixture(scope="session", params=[PROCESS_GROUP, NVSHMEM])
def direct(request: pytest.FixtureRequest, sharing: bool) -> Iterator[NodesOf]:
    """Rails by whatever NCCL finds between GPUs, or by its network transport on one; or by NVSHMEM."""
    if request.param not in carriers_of("cuda"):
        pytest.skip(f"no {request.param} here")
    yield from _nodes(sharing, carrier=request.param)


@pytest.fixture(scope="session")
def over_network(sharing: bool) -> Iterator[NodesOf]:
    """Rails by NCCL's network transport, as between hosts."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: this is how all other tests run")
    yield from _nodes(sharing, over_network=True)
