"""The allocator of tensors in the heap."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenferry.errors import HeapError
from tokenferry.memory.pool import Pool

BASE = 1 << 20


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4000)), max_size=80))
def test_blocks_never_overlap_and_come_back_whole(steps: list[tuple[bool, int]]) -> None:
    pool = Pool(BASE, 16384)
    held: dict[int, int] = {}
    for gives, number in steps:
        if gives and held:
            address = sorted(held)[number % len(held)]
            pool.give(address, held.pop(address))
            continue
        try:
            address = pool.take(number)
        except HeapError:
            continue
        assert address % 512 == 0
        assert address >= BASE
        assert address + number <= BASE + 16384
        assert all(address + number <= other or other + size <= address for other, size in held.items())
        held[address] = number
    for address, nbytes in held.items():
        pool.give(address, nbytes)
    assert pool.take(16384) == BASE


def test_a_full_pool_says_what_to_raise() -> None:
    pool = Pool(BASE, 1024)
    pool.take(600)
    with pytest.raises(HeapError, match="raise heap_bytes"):
        pool.take(1)
