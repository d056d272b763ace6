"""One set of rank processes per group size, started once per session."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fault_trials import Trials
from tokenferry.cli.ranks import RankError, RankPool

os.environ.setdefault("TOKENFERRY_DEVICE", "cpu")  # tests of GPUs name theirs


LONGEST = (
    "test_compiled_kernels", "test_soak", "test_models", "test_fault_ranks", "test_demo", "test_dispatch_combine",
    "test_clients", "test_ops_compile", "test_hosts", "test_doctor", "test_bench", "test_internode",
    "test_bench_cuda", "test_compat", "test_examples", "test_memory", "test_elastic", "test_properties", "test_fuzz",
    "test_low_latency",
)  # fmt: skip
"""Files of tests, which workers take one by one in this order, then the others."""
PRELOAD = ("torch._dynamo", "hypothesis", "numpy", "pytest")
"""What ranks of tests import, once for all; not on GPUs: whoever is forked must not find CUDA begun."""


class SessionPool(RankPool):
    """A pool that knows when it is of no more use: a rank has ended, or the wait for the ranks was given up."""

    is_whole = True

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        self.is_whole = False
        try:
            results = super().run(function, *args)
        except RankError:
            self.is_whole = all(process.is_alive() for process in self.processes)
            raise
        self.is_whole = True
        return results


PoolOf = Callable[[int], RankPool]
NodesOf = Callable[[str], RankPool]
"""Ranks of a layout, e.g. ``"3x2"``: two on each of three nodes."""


def slow(*values: Any) -> Iterator[Any]:
    """Further cases of a test, which only ``-m slow`` runs."""
    return (_case(value, True) for value in values)


def _case(value: Any, is_slow: bool) -> Any:
    """A tuple stands for several arguments."""
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=[pytest.mark.slow] * is_slow)


def but_slow(values: Iterable[Any], *others: Any) -> list[Any]:
    """The cases of a test, of which some are slow: those that show little that the rest does not."""
    values = list(values)
    assert set(others) <= set(values), "cases that there are not"
    return [_case(value, value in others) for value in values]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, unless markers are asked for (``-m slow``), and begin with what takes longest."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


def pytest_collection_finish() -> None:
    """What is there by now stays to the end: a collection of garbage need not go through it."""
    gc.collect()
    gc.freeze()


def session_pools(begin: Callable[[int, int], None] | None = None) -> Iterator[PoolOf]:
    """The body of a fixture: yields what gives n ranks in one Gloo group. Each of them calls ``begin`` first."""
    pools: dict[int, SessionPool] = {}

    def get(num_ranks: int) -> RankPool:
        if num_ranks in pools and not pools[num_ranks].is_whole:
            pools.pop(num_ranks).stop()
        if num_ranks not in pools:
            pools[num_ranks] = SessionPool(num_ranks, num_threads=1, preload=PRELOAD if begin is None else ())
            if begin is not None:
                pools[num_ranks].run(begin)
        return pools[num_ranks]

    yield get
    for pool in pools.values():
        pool.close() if pool.is_whole else pool.stop()


@pytest.fixture
def claims(request: pytest.FixtureRequest, pool_of: PoolOf, tmp_path: Path) -> Iterator[Trials]:
    """What follows from the fault that the test is marked with; the test must have compared with it in the end."""
    marker = request.node.get_closest_marker("fault")
    trials = Trials(marker.args[0], pool_of, tmp_path)
    failures = request.session.testsfailed
    yield trials
    has_failed = request.session.testsfailed > failures
    assert trials.checks or has_failed, "the test has compared nothing with its row"
    request.node.user_properties.append(("seconds", round(trials.slowest, 3)))


@pytest.fixture(scope="session")
def pool_of() -> Iterator[PoolOf]:
    """``pool_of(n)``: the session's n ranks."""
    yield from session_pools()
