"""Memory that is not to be had, is spoiled or goes away: rows of the table in docs/reliability.md."""

from __future__ import annotations

import functools
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.fault_cases import ALL, EXPANDED, NODES, NORMAL, QUICK, Situation, World, num_ranks_of
from tests.fault_trials import Trials
from tests.faults import After, Seen, fault
from tests.shared_memory import enter, small_shared_memory
from tests.test_direct import driver_of, exposed, mapping, regions_of, settle, visit
from tokenferry import BufferStateError, CapacityError, HeapError, PeerLostError, TokenferryError
from tokenferry.cli.ranks import RankPool
from tokenferry.memory import heap as heap_module
from tokenferry.memory.direct import Regions
from tokenferry.memory.heap import Heap

MiB = 1 << 20
GPUS = "GPUs, with a driver that is played"
ROW_BYTES = 256 << 10
"""Of a row that needs more than the smallest stage."""


@contextmanager
def memory_limit(spare: int) -> Iterator[None]:
    """Let this process map no more than so many bytes from now on."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@contextmanager
def limited(mark: Path, spare: int) -> Iterator[None]:
    mark.write_text(f"{time.monotonic()} ")
    with memory_limit(spare):
        yield


@fault(
    "memory limit (`RLIMIT_AS`): no room to map its own segment, or those of others",
    on=ALL,
    itself=TokenferryError,
    others=TokenferryError,
    after=After.LATER,
)
def test_no_memory_at_construction(claims: Trials, kind: str) -> None:
    for spare in (32 * MiB, 100 * MiB):
        for it in claims.construct(kind, functools.partial(limited, spare=spare)):
            assert it is not None
            assert f"rank {num_ranks_of(kind) - 1}: cannot map" in str(it.error)


def no_memory_for_outputs(situation: Situation) -> bool:
    world, buffer = situation.world, situation.buffer
    world.combine(buffer, situation.result)
    with memory_limit(32 * MiB):
        situation.happens()
        world.scenario.dispatch(buffer, num_worst_tokens=1 << 20)
    return False


@fault(
    "memory limit: no room for the output of a dispatch",
    on=[NORMAL, NODES],
    itself=RuntimeError,
    others=PeerLostError,
    after=After.ANEW,
)
def test_no_memory_for_outputs(claims: Trials, kind: str) -> None:
    error = claims.suffer(kind, no_memory_for_outputs)[-1]
    assert error is not None
    assert "allocate memory" in str(error.error)


@pytest.fixture(scope="module")
def small_pools() -> Iterator[Callable[[int], tuple[RankPool, Path]]]:
    """Ranks with little shared memory, and where they have it."""
    pools: dict[int, RankPool] = {}
    try:
        memory = small_shared_memory(2 * MiB)
        process = memory.__enter__()
    except RuntimeError as error:
        pytest.skip(f"no mount namespaces here: {error}")

    def get(num_ranks: int) -> tuple[RankPool, Path]:
        if num_ranks not in pools:
            pools[num_ranks] = RankPool(num_ranks, 1, functools.partial(enter, process))
        return pools[num_ranks], Path(f"/proc/{process}/root/dev/shm")

    yield get
    for pool in pools.values():
        pool.close()
    memory.__exit__(None, None, None)


SmallPools = Callable[[int], tuple[RankPool, Path]]
FILLER = Path("/dev/shm/filler")


def fill() -> None:
    with FILLER.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


@contextmanager
def filled(mark: Path) -> Iterator[None]:
    mark.write_text(f"{time.monotonic()} ")
    fill()
    try:
        yield
    finally:
        FILLER.unlink()


@fault("/dev/shm is full", on=ALL, itself=TokenferryError, others=TokenferryError, after=After.LATER)
def test_shared_memory_full_at_construction(claims: Trials, kind: str, small_pools: SmallPools) -> None:
    claims.pool, claims.shared = small_pools(num_ranks_of(kind))
    for it in claims.construct(kind, filled):
        assert it is not None
        assert "no room for" in str(it.error)


def dispatch_with_a_full_stage(situation: Situation) -> bool:
    """All ranks do this; the last one fills up what there is."""
    world, last = situation.world, situation.world.num_ranks - 1
    if situation.rank == last:
        fill()
        situation.happens()
    dist.barrier()
    try:
        World(world.kind, situation.rank, row_bytes=ROW_BYTES).dispatch(situation.buffer)
    finally:
        dist.barrier()
        if situation.rank == last:
            FILLER.unlink()
    return True


@fault(
    "/dev/shm is full, and an operation needs more",
    on=[NORMAL, EXPANDED, NODES],
    itself=CapacityError,
    others=CapacityError,
    after=After.GOES_ON,
)
def test_shared_memory_full_later(claims: Trials, kind: str, small_pools: SmallPools) -> None:
    claims.pool, claims.shared = small_pools(num_ranks_of(kind))
    claims.suffer(kind, dispatch_with_a_full_stage, everybody=True)


@fault(
    "/dev/shm is full, and an operation needs more",
    on=[QUICK],
    itself=(HeapError, PeerLostError),
    others=(HeapError, PeerLostError),
    after=After.ANEW,
)
def test_shared_memory_full_low_latency(claims: Trials, kind: str, small_pools: SmallPools) -> None:
    claims.pool, claims.shared = small_pools(num_ranks_of(kind))
    claims.suffer(kind, dispatch_with_a_full_stage, everybody=True)


@contextmanager
def with_another_word(mark: Path, word: int) -> Iterator[None]:
    """A control block whose first words are not what they should be."""
    create = Heap.__init__

    def create_and_spoil(heap: Heap, *arguments: Any) -> None:
        create(heap, *arguments)
        heap._own.words[word] += 1
        mark.write_text(f"{time.monotonic()} ")

    with mock.patch.object(Heap, "__init__", create_and_spoil):
        yield


@fault(
    "control block with another magic number, version, rank or size, when a Buffer is made",
    on=[NORMAL, NODES],
    itself=TokenferryError,
    others=TokenferryError,
    after=After.LATER,
)
def test_control_block_of_another_kind(claims: Trials, kind: str) -> None:
    words = (heap_module._MAGIC_WORD, heap_module._VERSION_WORD, heap_module._RANK_WORD, heap_module._SIZE_WORD)
    for word in words:
        for it in claims.construct(kind, functools.partial(with_another_word, word=word)):
            assert it is not None
            assert "not a heap of this group" in str(it.error)


def spoil_control_words(situation: Situation) -> bool:
    heap = situation.buffer.runtime._heap
    time.sleep(0.2)
    situation.happens()
    heap._own.bytes[: heap._stage] = 0x5A
    return True


@fault("control block overwritten, in use", on=ALL, itself=BufferStateError, others=PeerLostError, after=After.ANEW)
def test_control_block_overwritten(claims: Trials, kind: str) -> None:
    seen = claims.suffer(kind, spoil_control_words)[-1]
    assert seen is not None
    assert "written over" in str(seen.error)


def _next_operations(ranks: list[Regions], seen: list[Seen]) -> None:
    """Each rank enters the library, as often as it takes until nothing changes."""
    for _ in range(70):
        for regions, it in zip(ranks, seen, strict=True):
            with it.operation():
                visit(regions)


def _mappings_left(ranks: list[Regions], seen: list[Seen], wanted: int) -> None:
    for regions, it in zip(ranks, seen, strict=True):
        more = len(driver_of(regions).mapped) - (0 if regions is ranks[-1] else wanted)
        it.left = {"mappings": more} if more > 0 else {}


@fault("memory freed by its owner, and allocated anew, while others have it open", on=[GPUS], after=After.GOES_ON)
def test_allocation_freed(claims: Trials) -> None:
    with regions_of(3) as ranks:
        owner, seen = ranks[-1], [Seen() for _ in ranks]
        driver = driver_of(owner)
        base = driver.alloc()
        old = exposed(owner, base)
        settle(ranks)
        assert owner.is_ready(old)
        happened = time.monotonic()
        driver.free(base)
        driver.alloc(base=base)
        new = exposed(owner, base)
        assert not owner.is_ready(new), "until then rows pass through the stage"
        _next_operations(ranks, seen)
        assert owner.is_ready(new)
        for reader in ranks[:-1]:
            assert mapping(reader, owner, new) == (owner.rank, driver.allocations[base])
        _mappings_left(ranks, seen, 1)
        claims.check(seen, [owner.rank], happened, 0.0)


@fault("`empty_cache` between operations", on=[GPUS], after=After.GOES_ON)
def test_empty_cache(claims: Trials) -> None:
    with regions_of(3) as ranks:
        owner, seen = ranks[-1], [Seen() for _ in ranks]
        driver = driver_of(owner)
        bases = [driver.alloc() for _ in range(6)]
        regions = [exposed(owner, base) for base in bases]
        settle(ranks)
        happened = time.monotonic()
        for base in bases[1:]:
            driver.free(base)
        _next_operations(ranks, seen)
        assert [owner.is_ready(region) for region in regions] == [True] + [False] * 5
        again = exposed(owner, driver.alloc())
        _next_operations(ranks, seen)
        assert owner.is_ready(again)
        _mappings_left(ranks, seen, 2)
        claims.check(seen, [owner.rank], happened, 0.0)
