"""One set of rank processes per group size, started once per session."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tokenferry.cli.ranks import RankPool

PoolOf = Callable[[int], RankPool]


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
