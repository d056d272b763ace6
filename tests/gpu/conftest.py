"""Ranks on GPUs. Several share one where there are more ranks than GPUs: then CUDA's MPS runs them side by side.

How many ranks a test has at a time says its parameter ``num_ranks`` or ``layout``, or ``@pytest.mark.ranks(most)``;
without these it has two. Tests whose ranks share GPUs are marked for ``-m``, and without them there is no MPS:

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
from contextlib import suppress

import pytest
import torch

from tests.conftest import PoolOf, session_pools
from tokenferry.cli.mps import MPS_CONTROL, sharing_gpus
from tokenferry.cli.ranks import RankPool
from tokenferry.rail import CARRIER_VARIABLE, NVSHMEM, PROCESS_GROUP, carriers_of
from tokenferry.rail.nvshmem_world import POOL_VARIABLE

MOST_SECONDS, MOST_SECONDS_SLOW = 180, 1800
"""That a test may take: one that hangs fails and tells where its ranks are, and the others go on."""
_DEFAULT_RANKS = 2
_SYMMETRIC_BYTES = 1 << 30
"""A rail that a test has broken keeps its part of them."""
_BY_NODE = {"direct", "over_network"}
"""Fixtures that put ranks on two nodes, each of which has one GPU."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """See above."""
    parser.addoption("--ranks", type=int, help="tests on GPUs that have so many ranks at a time, no others")


def most_ranks(item: pytest.Item) -> int:
    """The ranks that a test has at a time."""
    marker = item.get_closest_marker("ranks")
    if marker is not None:
        return int(marker.args[0])
    given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    if "layout" in given:
        nodes, _, each = given["layout"].partition("x")
        return int(nodes) * int(each)
    return int(given.get("num_ranks", _DEFAULT_RANKS))


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
        if most_ranks(item) > _places(num_gpus, getattr(item, "fixturenames", ())):
            item.add_marker("shares_gpus")
            if shutil.which(MPS_CONTROL) is None:
                item.add_marker(pytest.mark.skip(reason="no MPS: several ranks cannot run at a time on one GPU"))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """What failed is told at once: a machine may be gone before all tests are through."""
    if report.failed and "/gpu/" in report.nodeid:
        sections = [f"-- {name} --\n{text}" for name, text in report.sections]
        print(f"\n{report.nodeid}\n{report.longreprtext}", *sections, sep="\n", flush=True)


def _places(num_gpus: int, fixtures: object) -> int:
    """Ranks that have a GPU each."""
    return min(num_gpus, 2) if _BY_NODE & set(fixtures) else num_gpus  # type: ignore[call-overload]


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


def _checked(pools: Iterator[PoolOf], shared: bool, places: int) -> Iterator[PoolOf]:
    for pool_of in pools:

        def get(num_ranks: int, pool_of: PoolOf = pool_of) -> RankPool:
            if num_ranks > places and not shared:
                pytest.fail(f"{num_ranks} ranks where {places} have a GPU each: say so with pytest.mark.ranks")
            return pool_of(num_ranks)

        yield get


@pytest.fixture(scope="session")
def gpu_pool_of(sharing: bool) -> Iterator[PoolOf]:
    """``gpu_pool_of(n)``: n ranks, one GPU after the other."""
    yield from _checked(session_pools(take_device), sharing, torch.cuda.device_count())


def take_device(rank: int, num_ranks: int) -> None:
    """Give this rank its GPU."""
    faulthandler.register(signal.SIGUSR1)
    torch.cuda.set_device(rank % torch.cuda.device_count())


def take_node(rank: int, num_ranks: int, over_network: bool, carrier: str = PROCESS_GROUP) -> None:
    """Give this rank the GPU of its node, one of two; NCCL is told whether they are hosts."""
    node = rank * 2 // num_ranks
    os.environ.update({CARRIER_VARIABLE: carrier, POOL_VARIABLE: str(_SYMMETRIC_BYTES)})
    faulthandler.register(signal.SIGUSR1)
    torch.cuda.set_device(node % torch.cuda.device_count())
    if over_network:
        os.environ["NCCL_HOSTID"] = f"node-{node}"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"


@pytest.fixture(scope="session", params=[PROCESS_GROUP, NVSHMEM])
def direct(request: pytest.FixtureRequest, sharing: bool) -> Iterator[PoolOf]:
    """Rails by whatever NCCL finds between two GPUs, or by its network transport on one; or by NVSHMEM."""
    if request.param not in carriers_of("cuda"):
        pytest.skip(f"no {request.param} here")
    num_gpus = torch.cuda.device_count()
    pools = session_pools(functools.partial(take_node, over_network=num_gpus < 2, carrier=request.param))
    yield from _checked(pools, sharing, _places(num_gpus, _BY_NODE))


@pytest.fixture(scope="session")
def over_network(sharing: bool) -> Iterator[PoolOf]:
    """Rails by NCCL's network transport, as between hosts."""
    num_gpus = torch.cuda.device_count()
    if num_gpus < 2:
        pytest.skip("one GPU: this is how all other tests run")
    pools = session_pools(functools.partial(take_node, over_network=True))
    yield from _checked(pools, sharing, _places(num_gpus, _BY_NODE))
