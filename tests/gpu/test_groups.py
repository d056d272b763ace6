"""Buffers on parts of the world, whose ranks have made other Buffers before, or not as many."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.test_groups import check_overlapping, check_parts
from tokenferry.cli.ranks import RankPool

GpuPoolOf = Callable[[int], RankPool]


@pytest.mark.ranks(3)
@pytest.mark.parametrize("parts", [((0, 1), (0, 1, 2)), ((0, 2), (1, 2), (0, 1, 2))], ids=str)
def test_sub_groups(gpu_pool_of: GpuPoolOf, parts: tuple[tuple[int, ...], ...]) -> None:
    gpu_pool_of(3).run(check_parts, parts, "cuda")


@pytest.mark.ranks(4)
def test_buffers_on_overlapping_groups(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(4).run(check_overlapping, "cuda")
