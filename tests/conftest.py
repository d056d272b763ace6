"""One set of rank processes per group size, started once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tokenferry.cli.ranks import RankPool

PoolOf = Callable[[int], RankPool]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is slow, unless markers are asked for (``-m slow``)."""
    if not config.getoption("markexpr"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in slow]
        config.hook.pytest_deselected(items=slow)


@pytest.fixture(scope="session")
def pool_of() -> Iterator[PoolOf]:
    """``pool_of(n)``: the session's n ranks in one Gloo group."""
    pools: dict[int, RankPool] = {}

    def get(num_ranks: int) -> RankPool:
        if num_ranks not in pools:
            pools[num_ranks] = RankPool(num_ranks, num_threads=1)
        return pools[num_ranks]

    yield get
    for pool in pools.values():
        pool.close()
