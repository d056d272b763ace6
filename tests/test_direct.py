"""Regions over a driver that is played: several ranks in one process, every order of their steps possible."""

from __future__ import annotations

import ctypes
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tokenferry.errors import BufferStateError, HeapError
from tokenferry.memory import direct
from tokenferry.memory import driver as driver_module
from tokenferry.memory.direct import HEAP_REGION, NO_REGION, NUM_REGIONS, Regions
from tokenferry.memory.driver import Allocation, Driver, DriverCalls
from tokenferry.memory.shm import Segment

MiB = 1 << 20
FIRST = 0x7F0000000000
NOWHERE = 0x1000


class Machine:
    """What the fake drivers of one machine share: which handle stands for which allocation."""

    def __init__(self) -> None:
        self.exported: dict[bytes, tuple[int, Allocation]] = {}
        self.next_handle = 1


class FakeDriver:
    """The driver of one process: its allocations, and its mappings of those of others."""

    def __init__(self, machine: Machine, rank: int) -> None:
        self.machine = machine
        self.rank = rank
        self.allocations: dict[int, Allocation] = {}
        self.unexportable: set[int] = set()
        self.handles: dict[int, bytes] = {}
        self.mapped: dict[int, tuple[int, Allocation]] = {}
        self.refuses_to_open = False
        self.refuses_to_close = False
        self.calls: Counter[str] = Counter()
        self.capture_depth = 0
        self.captured: int | None = None
        self._next_base = FIRST
        self._next_mapping = FIRST + (1 << 40)
        self._next_identity = 1

    def alloc(self, size: int = 2 * MiB, base: int | None = None, *, exportable: bool = True) -> int:
        if base is None:
            base = self._next_base
            self._next_base += size
        assert all(
            base >= other.base + other.size or base + size <= other.base for other in self.allocations.values()
        )
        self.allocations[base] = Allocation(base, size, self._next_identity)
        if not exportable:
            self.unexportable.add(self._next_identity)
        self._next_identity += 1
        return base

    def free(self, base: int) -> None:
        handle = self.handles.pop(self.allocations.pop(base).identity, None)
        if handle is not None:
            del self.machine.exported[handle]

    def _find(self, address: int) -> Allocation | None:
        found = [a for a in self.allocations.values() if a.base <= address < a.base + a.size]
        return found[0] if found else None

    def locate(self, address: int) -> Allocation | None:
        assert self.capture_depth
        self.calls["locate"] += 1
        return self._find(address)

    def identity(self, address: int) -> int | None:
        self.calls["identity"] += 1
        found = self._find(address)
        return found.identity if found else None

    def export(self, base: int) -> bytes | None:
        assert self.capture_depth
        self.calls["export"] += 1
        allocation = self.allocations[base]
        if allocation.identity in self.unexportable:
            return None
        if allocation.identity not in self.handles:
            handle = self.machine.next_handle.to_bytes(8, "little") * 8
            self.machine.next_handle += 1
            self.handles[allocation.identity] = handle
            self.machine.exported[handle] = self.rank, allocation
        return self.handles[allocation.identity]

    def open_peer(self, handle: bytes) -> int:
        assert self.capture_depth
        assert len(handle) == 64
        self.calls["open"] += 1
        if self.refuses_to_open or handle not in self.machine.exported:
            raise HeapError("cuIpcOpenMemHandle: CUDA_ERROR_INVALID_VALUE (1)")
        address = self._next_mapping
        self._next_mapping += 1 << 32
        self.mapped[address] = self.machine.exported[handle]
        return address

    def close_peer(self, address: int) -> None:
        assert self.capture_depth
        self.calls["close"] += 1
        del self.mapped[address]  # fails when it is closed twice
        if self.refuses_to_close:
            raise HeapError("cuIpcCloseMemHandle: CUDA_ERROR_MAP_FAILED (205)")

    def capture(self, stream: int) -> int | None:
        return self.captured

    def copy_aside(self, to: int, source: int, nbytes: int) -> None:
        assert self.capture_depth
        ctypes.memmove(to, source, nbytes)

    def end_aside(self) -> None:
        pass

    @contextmanager
    def relaxed_capture(self) -> Iterator[None]:
        self.capture_depth += 1
        try:
            yield
        finally:
            self.capture_depth -= 1


def driver_of(regions: Regions) -> FakeDriver:
    driver = regions.driver
    assert isinstance(driver, FakeDriver)
    return driver


@contextmanager
def regions_of(num_ranks: int) -> Iterator[list[Regions]]:
    machine = Machine()
    all_regions = [Regions(rank, num_ranks, FakeDriver(machine, rank)) for rank in range(num_ranks)]
    connect(all_regions)
    try:
        yield all_regions
    finally:
        for regions in all_regions:
            regions.close()


def connect(all_regions: list[Regions]) -> None:
    handles = [regions.handle for regions in all_regions]
    for regions in all_regions:
        regions.attach(handles)
    for regions in all_regions:
        regions.unlink()


def visit(*all_regions: Regions) -> list[bool]:
    """Each enters the library once; returns which saw a change."""
    changed = []
    for regions in all_regions:
        changed.append(regions.poll())
        regions.acknowledge()
    return changed


def settle(all_regions: list[Regions]) -> None:
    for _ in range(8):
        if not any(visit(*all_regions)):
            return
    raise AssertionError("the ranks never come to rest")


def expose_all(regions: Regions, ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """For the tensors of one operation."""
    return [regions.expose(*given, goes_on=number > 0) for number, given in enumerate(ranges)]


def exposed(regions: Regions, address: int, nbytes: int = 1024) -> int:
    return regions.expose(address, nbytes)[0]


def mapping(reader: Regions, owner: Regions, region: int) -> tuple[int, Allocation] | None:
    """The owner's rank and allocation behind a region in a reader's table."""
    return driver_of(reader).mapped.get(int(reader.table[owner.rank, region]))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """Regions of a rank besides the heap."""
    monkeypatch.setattr(direct, "NUM_REGIONS", 4)
    return 3


def test_new_allocation_becomes_ready_once_all_peers_have_it() -> None:
    with regions_of(3) as (owner, fast, slow):
        base = driver_of(owner).alloc()
        region, offset = owner.expose(base + 4096, 1024)
        assert region > HEAP_REGION
        assert offset == 4096
        assert not owner.is_ready(region)
        assert int(owner.table[0, region]) == base
        assert fast.poll()
        assert mapping(fast, owner, region) == (0, driver_of(owner).allocations[base])
        owner.poll()
        assert not owner.is_ready(region)
        fast.acknowledge()
        owner.poll()
        assert not owner.is_ready(region)
        visit(slow)
        assert not owner.is_ready(region)
        assert owner.poll()
        assert owner.is_ready(region)
        assert owner.ready.nonzero().flatten().tolist() == [region]
        assert owner.expose(base + 4096, 1024) == (region, 4096)


def test_nobody_waits_for_a_peer_that_stays_away() -> None:
    with regions_of(3) as (owner, present, _absent):
        region = exposed(owner, driver_of(owner).alloc())
        for _ in range(100):
            visit(owner, present)
            assert not owner.is_ready(region)


def test_allocations_of_an_operation_are_known_while_they_are_there() -> None:
    with regions_of(2) as (owner, _):
        driver = driver_of(owner)
        first, second, third = (driver.alloc() for _ in range(3))
        owner.expose(first, 16)
        assert [allocation.base for allocation in owner.seen().allocations] == [first]
        owner.expose(third, 16)
        owner.expose(second + 4096, 16, goes_on=True)
        seen = owner.seen()
        assert {allocation.base for allocation in seen.allocations} == {second, third}
        assert owner.are_there(seen)
        driver.free(third)
        assert not owner.are_there(seen)
        assert driver.alloc(base=third) == third
        assert not owner.are_there(seen)
        owner.expose(third, 16)
        assert owner.are_there(owner.seen())


def test_regions_that_were_retired_are_not_taken_for_known_ones() -> None:
    """Also where the driver was wrong for a moment: the allocation may have another region since."""
    with regions_of(2) as (owner, _):
        driver = driver_of(owner)
        base = driver.alloc()
        owner.expose(base, 16)
        seen = owner.seen()
        with mock.patch.object(driver, "identity", return_value=None):
            owner.sweep()
        assert not owner.are_there(seen)


def test_offsets_in_one_allocation_and_another() -> None:
    with regions_of(2) as (owner, _):
        first, second = driver_of(owner).alloc(), driver_of(owner).alloc()
        region = exposed(owner, second)
        assert owner.expose(second, 1) == (region, 0)
        assert owner.expose(second + 2 * MiB - 1, 1) == (region, 2 * MiB - 1)
        other = exposed(owner, first + 5)
        assert other != region
        assert owner.expose(first + 2 * MiB - 1, 1) == (other, 2 * MiB - 1)
        assert owner.expose(second, 2 * MiB) == (region, 0)


def test_known_memory_costs_one_identity() -> None:
    with regions_of(2) as (owner, _):
        base = driver_of(owner).alloc()
        owner.expose(base, 16)
        driver_of(owner).calls.clear()
        for offset in range(100):
            owner.expose(base + offset, 16)
        assert driver_of(owner).calls == {"identity": 100}


def test_tensors_of_one_operation_cost_an_identity_for_each_allocation() -> None:
    with regions_of(2) as (owner, _):
        driver = driver_of(owner)
        first, second = driver.alloc(), driver.alloc()
        ranges = [(first, 16), (second, 16), (first + 512, 16), (second + 64, 16), (first + 2 * MiB - 8, 9)]
        wanted = [owner.expose(address, nbytes) for address, nbytes in ranges]
        assert wanted[-1] == (NO_REGION, 0)
        for _ in range(3):
            driver.calls.clear()
            assert expose_all(owner, ranges) == wanted
            assert driver.calls == {"identity": 2}


def test_what_one_operation_knows_does_not_hold_for_the_next() -> None:
    with regions_of(2) as (owner, _):
        driver = driver_of(owner)
        base = driver.alloc()
        (before,) = expose_all(owner, [(base, 16)])
        driver.free(base)
        driver.alloc(base=base)
        ((after, _),) = expose_all(owner, [(base, 16)])
        assert after not in (before[0], NO_REGION)
        driver.free(base)
        driver.alloc(1 * MiB, base=base)
        driver.alloc(1 * MiB, base=base + 1 * MiB)
        found = expose_all(owner, [(base, 16), (base + 1 * MiB, 16), (base + 1 * MiB - 8, 16)])
        assert len({after, *(region for region, _ in found)}) == 4


def test_range_that_leaves_its_allocation_has_no_region() -> None:
    with regions_of(2) as (owner, _):
        base = driver_of(owner).alloc()
        driver_of(owner).alloc()
        for _ in range(2):
            assert owner.expose(base, 2 * MiB + 1) == (NO_REGION, 0)
            assert owner.expose(base + 2 * MiB - 8, 9) == (NO_REGION, 0)
        assert owner.expose(base + 2 * MiB - 8, 8)[1] == 2 * MiB - 8


def test_unknown_memory_has_no_region() -> None:
    with regions_of(2) as (owner, _):
        assert owner.expose(NOWHERE, 16) == (NO_REGION, 0)
        assert owner.expose(0, 0) == (NO_REGION, 0)
        assert not owner.is_ready(NO_REGION)
        assert driver_of(owner).calls["locate"] == 0


def test_heap_is_region_zero_of_everybody() -> None:
    with regions_of(2) as (owner, reader):
        assert not owner.is_ready(HEAP_REGION)
        owner.set_heap([FIRST, 2 * FIRST], MiB)
        reader.set_heap([3 * FIRST, FIRST], MiB)
        assert owner.poll()
        assert not owner.poll()
        assert owner.is_ready(HEAP_REGION)
        assert owner.table[:, HEAP_REGION].tolist() == [FIRST, 2 * FIRST]
        assert owner.sizes[:, HEAP_REGION].tolist() == [MiB, MiB]
        assert owner.expose(FIRST + MiB - 4, 4) == (HEAP_REGION, MiB - 4)
        assert owner.expose(FIRST + MiB - 4, 5) == (NO_REGION, 0)
        assert owner.expose(FIRST + MiB, 4) == (NO_REGION, 0)
        assert driver_of(owner).calls["identity"] == 1


def test_new_allocation_at_the_old_address_is_another_region() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        driver = driver_of(owner)
        base = driver.alloc()
        old = exposed(owner, base)
        settle(ranks)
        assert owner.is_ready(old)
        driver.free(base)
        driver.alloc(base=base)
        new = exposed(owner, base)
        assert new != old
        assert not owner.is_ready(old)
        assert not owner.is_ready(new)
        settle(ranks)
        assert owner.is_ready(new)
        assert mapping(reader, owner, new) == (0, driver.allocations[base])
        assert int(reader.table[0, old]) == 0
        for regions in ranks:
            assert regions.sizes[0, [old, new]].tolist() == [0, driver.allocations[base].size]
            assert torch.equal(regions.tables, torch.stack([regions.table, regions.sizes]))
        assert driver_of(reader).calls["close"] == 1
        assert exposed(owner, base) == new


def test_new_allocation_around_old_ones_retires_them_all() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        driver = driver_of(owner)
        olds = [driver.alloc() for _ in range(4)]
        regions = [exposed(owner, base) for base in olds]
        settle(ranks)
        for base in olds[1:3]:
            driver.free(base)
        driver.alloc(4 * MiB, base=olds[1])
        new = exposed(owner, olds[2] + 7)
        assert new not in regions
        assert owner.expose(olds[2] + 7, 1) == (new, 2 * MiB + 7)
        assert [owner.is_ready(region) for region in regions] == [True, False, False, True]
        assert [exposed(owner, olds[0]), exposed(owner, olds[3])] == [regions[0], regions[3]]
        settle(ranks)
        assert len(driver_of(reader).mapped) == 3


def test_number_is_reused_only_after_all_have_closed(few: int) -> None:
    with regions_of(3) as ranks:
        owner, fast, slow = ranks
        driver = driver_of(owner)
        bases = [driver.alloc() for _ in range(few)]
        regions = [exposed(owner, base) for base in bases]
        assert sorted(regions) == [1, 2, 3]
        settle(ranks)
        driver.free(bases[1])
        extra = driver.alloc()
        assert exposed(owner, extra) == NO_REGION
        visit(owner, fast, owner)
        assert exposed(owner, extra) == NO_REGION
        slow.poll()
        assert int(slow.table[0, regions[1]]) == 0
        owner.poll()
        assert exposed(owner, extra) == NO_REGION
        assert driver_of(slow).calls["close"] == 0
        slow.acknowledge()
        assert driver_of(slow).calls["close"] == 1
        owner.poll()
        assert exposed(owner, extra) == regions[1]
        assert not owner.is_ready(regions[1])
        settle(ranks)
        assert owner.is_ready(regions[1])
        for reader in (fast, slow):
            assert mapping(reader, owner, regions[1]) == (0, driver.allocations[extra])


def test_retired_before_a_peer_looked() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        base = driver_of(owner).alloc()
        exposed(owner, base)
        driver_of(owner).free(base)
        owner.sweep()
        settle(ranks)
        assert driver_of(reader).calls["open"] == 0
        assert len(owner._free) == NUM_REGIONS - 1


def test_retired_and_reused_before_a_peer_looked_again(few: int) -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        driver = driver_of(owner)
        for _ in range(20):
            base = driver.alloc()
            while exposed(owner, base) == NO_REGION:
                visit(reader, owner)
            visit(reader, owner)
            driver.free(base)
        owner.sweep()
        settle(ranks)
        assert driver_of(reader).mapped == {}
        assert len(owner._free) == few


def test_opening_acknowledged_late_is_not_mistaken(few: int) -> None:
    """The old tables are on the device when the owner has retired the region already."""
    with regions_of(2) as ranks:
        owner, reader = ranks
        base = driver_of(owner).alloc()
        region = exposed(owner, base)
        reader.poll()
        version = reader.version
        driver_of(owner).free(base)
        owner.sweep()
        reader.poll()
        reader.acknowledge(version)
        assert driver_of(reader).calls["close"] == 0
        owner.poll()
        assert not owner.is_ready(region)
        assert len(owner._free) == few - 1
        reader.acknowledge()
        owner.poll()
        assert len(owner._free) == few
        assert driver_of(reader).mapped == {}


def test_acknowledges_only_what_the_device_has() -> None:
    with regions_of(2) as (owner, reader):
        first = exposed(owner, driver_of(owner).alloc())
        reader.poll()
        on_device = reader.version
        second = exposed(owner, driver_of(owner).alloc())
        reader.poll()
        reader.acknowledge(on_device)
        owner.poll()
        assert [owner.is_ready(first), owner.is_ready(second)] == [True, False]
        reader.acknowledge()
        owner.poll()
        assert owner.is_ready(second)


def test_poll_says_whether_anything_changed() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        assert visit(*ranks) == [False, False]
        base = driver_of(owner).alloc()
        exposed(owner, base)
        assert visit(owner, reader, owner) == [True, True, True]
        for _ in range(5):
            exposed(owner, base)
            assert visit(*ranks) == [False, False]
        tables = [(regions.table.clone(), regions.ready.clone()) for regions in ranks]
        driver_of(owner).free(base)
        owner.sweep()
        assert visit(owner, reader) == [True, True]
        assert not torch.equal(tables[0][1], owner.ready)
        assert not torch.equal(tables[1][0], reader.table)
        settle(ranks)
        assert visit(*ranks) == [False, False]


def test_sweep_retires_what_is_gone_and_nothing_else() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        driver = driver_of(owner)
        bases = [driver.alloc() for _ in range(6)]
        regions = [exposed(owner, base) for base in bases]
        settle(ranks)
        for base in bases[::2]:
            driver.free(base)
        driver.alloc(base=bases[0])
        owner.sweep()
        settle(ranks)
        assert [owner.is_ready(region) for region in regions] == [False, True] * 3
        assert len(driver_of(reader).mapped) == 3


def test_poll_sweeps_now_and_then() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        base = driver_of(owner).alloc()
        exposed(owner, base)
        settle(ranks)
        driver_of(owner).free(base)
        for _ in range(70):
            visit(*ranks)
        assert driver_of(reader).mapped == {}


def test_exhaustion_passes(few: int) -> None:
    with regions_of(2) as ranks:
        owner, _ = ranks
        driver = driver_of(owner)
        bases = [driver.alloc() for _ in range(few + 2)]
        given = [exposed(owner, base) for base in bases]
        assert given[few:] == [NO_REGION] * 2
        settle(ranks)
        driver.calls.clear()
        for _ in range(10):
            assert exposed(owner, bases[-1]) == NO_REGION
        assert driver.calls["locate"] == 0
        assert driver.calls["identity"] <= 10 + few  # swept once per operation
        driver.free(bases[0])
        visit(owner)
        assert exposed(owner, bases[-1]) == NO_REGION
        settle(ranks)
        assert exposed(owner, bases[-1]) == given[0]
        settle(ranks)
        assert owner.is_ready(given[0])


def test_all_numbers_can_be_used() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        driver = driver_of(owner)
        bases = [driver.alloc(4096) for _ in range(NUM_REGIONS)]
        given = [exposed(owner, base) for base in reversed(bases)]
        assert sorted(given) == [NO_REGION, *range(1, NUM_REGIONS)]
        settle(ranks)
        assert int(owner.ready.sum()) == NUM_REGIONS - 1
        for base, region in zip(reversed(bases), given, strict=True):
            assert exposed(owner, base) == region
            if region != NO_REGION:
                assert mapping(reader, owner, region) == (0, driver.allocations[base])


def test_memory_that_cannot_be_exported_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with regions_of(2) as ranks:
        owner, _ = ranks
        driver = driver_of(owner)
        base = driver.alloc(exportable=False)
        for _ in range(20):
            assert owner.expose(base + 64, 64) == (NO_REGION, 0)
        assert driver.calls["export"] == 1
        assert not owner.poll()
        driver.free(base)
        driver.alloc(base=base)
        assert exposed(owner, base) != NO_REGION
        assert driver.calls["export"] == 2
        monkeypatch.setattr(direct, "_MOST_REFUSALS", 3)  # what is remembered of them has a limit
        for _ in range(10):
            assert exposed(owner, driver.alloc(exportable=False)) == NO_REGION
            assert len(owner._refused) <= 3


def test_memory_that_cannot_be_opened_is_never_acknowledged(caplog: pytest.LogCaptureFixture) -> None:
    with regions_of(3) as ranks, caplog.at_level(logging.DEBUG, logger="tokenferry"):
        owner, good, bad = ranks
        driver_of(bad).refuses_to_open = True
        bases = [driver_of(owner).alloc() for _ in range(2)]
        regions = [exposed(owner, base) for base in bases]
        for _ in range(5):
            visit(*ranks)
        assert not any(owner.is_ready(region) for region in regions)
        assert driver_of(bad).calls["open"] == 2
        assert [record.levelno for record in caplog.records] == [logging.WARNING, logging.DEBUG]
        assert "INVALID_VALUE" in caplog.text
        driver_of(bad).refuses_to_open = False
        driver_of(owner).free(bases[0])
        driver_of(owner).alloc(base=bases[0])
        again = exposed(owner, bases[0])
        settle(ranks)
        assert owner.is_ready(again)
        assert not owner.is_ready(regions[1])
        assert regions[0] in owner._free  # who could not open it has nothing to close
        assert len(driver_of(good).mapped) == 2
        assert len(driver_of(bad).mapped) == 1


def test_close_closes_every_mapping_once() -> None:
    with regions_of(3) as ranks:
        bases = [[driver_of(regions).alloc() for _ in range(3)] for regions in ranks]
        for regions, own in zip(ranks, bases, strict=True):
            for base in own:
                exposed(regions, base)
        settle(ranks)
        driver_of(ranks[0]).free(bases[0][0])
        ranks[0].sweep()
        ranks[1].poll()  # retired, not closed yet
        for regions in ranks:
            driver = driver_of(regions)
            assert driver.calls["open"] == 6
            regions.close()
            regions.close()
            assert driver.calls["close"] == 6
            assert driver.mapped == {}
            for use in (regions.poll, lambda regions=regions: regions.expose(bases[0][1], 1)):
                with pytest.raises(BufferStateError):
                    use()
        with pytest.raises(BufferStateError):
            ranks[1].acknowledge()


def test_forgotten_regions_close_their_mappings() -> None:
    machine = Machine()
    ranks = [Regions(rank, 2, FakeDriver(machine, rank)) for rank in range(2)]
    connect(ranks)
    drivers = [driver_of(regions) for regions in ranks]
    exposed(ranks[0], drivers[0].alloc())
    settle(ranks)
    assert len(drivers[1].mapped) == 1
    ranks.clear()
    assert drivers[1].mapped == {}


def test_fork_closes_nothing() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        exposed(owner, driver_of(owner).alloc())
        settle(ranks)
        child = os.fork()
        if child == 0:
            reader.close()
            os._exit(driver_of(reader).calls["close"])
        assert os.waitpid(child, 0)[1] == 0
        assert len(driver_of(reader).mapped) == 1


def test_mapping_that_cannot_be_closed_holds_up_nobody() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        driver_of(reader).refuses_to_close = True
        base = driver_of(owner).alloc()
        exposed(owner, base)
        settle(ranks)
        driver_of(owner).free(base)
        owner.sweep()
        settle(ranks)
        assert len(owner._free) == NUM_REGIONS - 1
        exposed(owner, driver_of(owner).alloc())
        settle(ranks)


def test_one_rank_alone() -> None:
    with regions_of(1) as (only,):
        base = driver_of(only).alloc()
        region = exposed(only, base)
        assert not only.is_ready(region)
        assert only.poll()
        assert only.is_ready(region)
        driver_of(only).free(base)
        only.sweep()
        assert only.poll()
        assert not only.is_ready(region)
        assert len(only._free) == NUM_REGIONS - 1


def test_own_tables_are_ordinary_cpu_tensors() -> None:
    with torch.inference_mode(), regions_of(2) as (owner, _):
        assert owner.table.shape == (2, NUM_REGIONS)
        assert owner.table.dtype == torch.int64
        assert owner.ready.shape == (NUM_REGIONS,)
        assert owner.ready.dtype == torch.int32
        assert not owner.table.is_inference()
    with torch.device("meta"), regions_of(2) as (owner, _):
        assert owner.table.device.type == "cpu"


def test_mailbox_is_private_and_loses_its_name() -> None:
    regions = Regions(0, 1, FakeDriver(Machine(), 0))
    path = Path("/dev/shm") / regions.handle[0].lstrip("/")
    if path.parent.exists():
        assert path.stat().st_mode & 0o777 == 0o600
        regions.unlink()
        assert not path.exists()
    regions.close()
    with pytest.raises(BufferStateError):
        _ = regions.handle


def test_attach_checks_what_it_opens() -> None:
    machine = Machine()
    ranks = [Regions(rank, 2, FakeDriver(machine, rank)) for rank in range(2)]
    stranger = Segment.create(ranks[0].handle[1])
    name, size = ranks[1].handle
    try:
        for wrong in (stranger.name, size), (name, size + 8), ranks[0].handle, ("/tokenferry-nobody", size):
            with pytest.raises(HeapError):
                ranks[0].attach([ranks[0].handle, wrong])
        ranks[0].attach([ranks[0].handle, ranks[1].handle])
    finally:
        stranger.retire()
        stranger.close()
        for regions in ranks:
            regions.close()


def words_of(regions: Regions) -> memoryview:
    segment = regions._segments[regions.rank]
    assert segment is not None
    return segment.words


def post(regions: Regions, region: int, state: int) -> None:
    words_of(regions)[regions._states + region] = state
    words_of(regions)[direct._POSTED] += 1


@pytest.mark.parametrize(
    ("region", "state"),
    [(5, -2), (5, 1), (5, 4), (5, 5), (HEAP_REGION, 2), (1, 0), (1, 1), (1, 4), (1, 5), (1, 6)],
)
def test_states_that_no_rank_posts(region: int, state: int) -> None:
    """Region 5 was never used; region 1 is open in its first generation."""
    with regions_of(3) as ranks:
        assert exposed(ranks[1], driver_of(ranks[1]).alloc()) == 1
        settle(ranks)
        post(ranks[1], region, state)
        with pytest.raises(HeapError, match="rank 1 "):
            ranks[0].poll()


def test_number_that_is_reused_too_early() -> None:
    with regions_of(2) as ranks:
        owner, reader = ranks
        base = driver_of(owner).alloc()
        region = exposed(owner, base)
        settle(ranks)
        driver_of(owner).free(base)
        owner.sweep()
        reader.poll()  # but does not acknowledge
        post(owner, region, 4)
        with pytest.raises(HeapError, match="rank 0 "):
            reader.poll()


@pytest.mark.parametrize("spoil", ["no size", "negative size", "huge size", "no handle", "counter"])
def test_entries_that_no_rank_posts(spoil: str) -> None:
    with regions_of(3) as ranks:
        owner = ranks[1]
        exposed(owner, driver_of(owner).alloc())
        settle(ranks)
        region = exposed(owner, driver_of(owner).alloc())
        words = words_of(owner)
        entry = owner._entries + region * direct._ENTRY_WORDS
        if spoil == "no handle":
            for word in range(entry + 1, entry + 9):
                words[word] = 0
        elif spoil == "counter":
            words[direct._POSTED] = 0
        else:
            words[entry] = {"no size": 0, "negative size": -1, "huge size": 1 << 50}[spoil]
        with pytest.raises(HeapError, match="rank 1 "):
            ranks[0].poll()
        assert len(driver_of(ranks[0]).mapped) == 1


@pytest.mark.parametrize("ack", [-1, 3, 4, 1 << 60])
def test_acknowledgements_that_no_rank_writes(ack: int) -> None:
    with regions_of(3) as ranks:
        owner = ranks[0]
        region = exposed(owner, driver_of(owner).alloc())
        words_of(owner)[owner._acks + 2 * NUM_REGIONS + region] = ack
        with pytest.raises(HeapError, match="rank 2 "):
            owner.poll()


class Life(RuleBasedStateMachine):
    """Three ranks allocate, free, expose, poll and upload in any order.

    The device of each is played, too: it has the tables of some earlier poll, until a newer copy is finished.
    Its kernels believe the tables of the device, and no others.
    """

    ADDRESSES = st.integers(0, 5)
    RANKS = st.integers(0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(direct, "NUM_REGIONS", 4)
        self.patch.setattr(direct, "_SWEEP_EVERY", 5)
        machine = Machine()
        self.ranks = [Regions(rank, 3, FakeDriver(machine, rank)) for rank in range(3)]
        connect(self.ranks)
        self.device = [(regions.table.clone(), regions.ready.clone()) for regions in self.ranks]
        self.copies: list[list[tuple[int, torch.Tensor, torch.Tensor]]] = [[], [], []]
        self.exposed: list[dict[int, int]] = [{}, {}, {}]

    def teardown(self) -> None:
        for regions in self.ranks:
            regions.close()
        assert all(driver_of(regions).mapped == {} for regions in self.ranks)
        self.patch.undo()

    @initialize(bad=st.sampled_from([None, None, 1]))
    def choose_a_rank_that_opens_nothing(self, bad: int | None) -> None:
        if bad is not None:
            driver_of(self.ranks[bad]).refuses_to_open = True

    @rule(rank=RANKS, place=ADDRESSES, places=st.integers(1, 3), exportable=st.sampled_from([True] * 5 + [False]))
    def alloc(self, rank: int, place: int, places: int, exportable: bool) -> None:
        driver = driver_of(self.ranks[rank])
        base, size = FIRST + place * MiB, places * MiB
        if all(driver._find(base + at) is None for at in range(0, size, MiB)):
            driver.alloc(size, base=base, exportable=exportable)

    @rule(rank=RANKS, place=ADDRESSES)
    def free(self, rank: int, place: int) -> None:
        driver = driver_of(self.ranks[rank])
        if FIRST + place * MiB in driver.allocations:
            driver.free(FIRST + place * MiB)

    @rule(rank=RANKS, place=ADDRESSES, nbytes=st.sampled_from([1, MiB, 2 * MiB]))
    def expose(self, rank: int, place: int, nbytes: int) -> None:
        regions, driver = self.ranks[rank], driver_of(self.ranks[rank])
        address = FIRST + place * MiB
        region, offset = regions.expose(address, nbytes)
        allocation = driver._find(address)
        if region == NO_REGION:
            return
        assert allocation is not None
        assert address + nbytes <= allocation.base + allocation.size
        assert offset == address - allocation.base
        assert int(regions.table[rank, region]) == allocation.base
        assert allocation.identity not in driver.unexportable
        self.exposed[rank][region] = allocation.identity

    @rule(place=ADDRESSES, places=st.integers(1, 2))
    def replace(self, place: int, places: int) -> None:
        """What the allocator of a busy rank does: rank 0 frees what is in the way, allocates and exposes."""
        driver = driver_of(self.ranks[0])
        for base, allocation in list(driver.allocations.items()):
            if base < FIRST + (place + places) * MiB and FIRST + place * MiB < base + allocation.size:
                driver.free(base)
        driver.alloc(places * MiB, base=FIRST + place * MiB)
        self.expose(0, place, 1)

    @rule(but=st.sampled_from([0, 1, 2, None, None]), finish=st.booleans())
    def operation(self, but: int | None, finish: bool) -> None:
        """One operation on all hosts, or on all but one that is behind."""
        for rank in range(3):
            if rank != but:
                self.poll(rank)
                if finish:
                    self.finish_a_copy(rank)

    @rule(rank=RANKS)
    def poll(self, rank: int) -> None:
        regions = self.ranks[rank]
        before = regions.table.clone(), regions.ready.clone()
        copies = self.copies[rank]
        if regions.poll():
            copies.append((regions.version, regions.table.clone(), regions.ready.clone()))
        else:
            assert torch.equal(before[0], regions.table)
            assert torch.equal(before[1], regions.ready)

    @rule(rank=RANKS)
    def finish_a_copy(self, rank: int) -> None:
        if self.copies[rank]:
            version, table, ready = self.copies[rank].pop(0)
            self.device[rank] = table, ready
            self.ranks[rank].acknowledge(version)

    @rule()
    def everybody_comes_to_rest(self) -> None:
        for _ in range(12):
            for rank in range(3):
                self.poll(rank)
                while self.copies[rank]:
                    self.finish_a_copy(rank)
        for regions in self.ranks:
            assert not regions._answers
            gone = [state for state in regions._unsettled.values() if state % 2]
            assert gone == []
            driver = driver_of(regions)
            for known in regions._known:
                assert driver.allocations[known.base].identity == known.identity
            opens_all = not any(driver_of(other).refuses_to_open for other in self.ranks if other is not regions)
            assert not opens_all or all(regions.is_ready(known.region) for known in regions._known)

    @invariant()
    def what_is_ready_can_be_read_everywhere(self) -> None:
        for owner in self.ranks:
            driver = driver_of(owner)
            for region in range(1, direct.NUM_REGIONS):
                current = [known for known in owner._known if known.region == region]
                alive = current and driver.identity(current[0].base) == current[0].identity
                if not owner.is_ready(region) or not alive:
                    continue
                wanted = owner.rank, driver.allocations[current[0].base]
                for reader in self.ranks:
                    if reader is not owner:
                        for table in (reader.table, self.device[reader.rank][0]):
                            assert driver_of(reader).mapped[int(table[owner.rank, region])] == wanted

    @invariant()
    def tables_hold_open_mappings_only(self) -> None:
        for regions in self.ranks:
            driver = driver_of(regions)
            assert set(driver.mapped) == set(regions._mappings.values())
            for table in (regions.table, self.device[regions.rank][0]):
                peers = [row for peer, row in enumerate(table.tolist()) if peer != regions.rank]
                assert {address for row in peers for address in row} - {0} <= set(driver.mapped)


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=100, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_driver_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_module, "_LIBRARY", "libtokenferry-has-no-such-library.so")
    with pytest.raises(HeapError, match="CUDA driver"):
        Driver()


class FakeLibrary:
    """libcuda as ctypes sees it, for the paths that a machine without a GPU can go."""

    ALLOCATION = Allocation(FIRST, 2 * MiB, 42)

    def __init__(self) -> None:
        self.statuses: dict[str, int] = {}
        self.mode = 0
        self.closed: list[int] = []
        self.log: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        """A function, to which argtypes can be assigned."""
        implementation = getattr(type(self), f"_{name}", lambda *_: 0)

        def function(*args: Any) -> int:
            status = self.statuses.get(name, 0)
            return status or implementation(self, *args) or 0

        setattr(self, name, function)
        return function

    def _cuGetErrorName(self, status: int, name: Any) -> None:
        if status != 999999:
            name._obj.value = b"CUDA_ERROR_TEST"

    def _cuPointerGetAttribute(self, out: Any, attribute: int, address: int) -> int:
        assert attribute == 7
        base, size, identity = self.ALLOCATION
        out.contents.value = identity
        return 0 if base <= address < base + size else 1

    def _cuMemGetAddressRange_v2(self, base: Any, size: Any, address: int) -> None:
        base._obj.value, size._obj.value, _ = self.ALLOCATION

    def _cuIpcGetMemHandle(self, handle: Any, base: int) -> None:
        handle._obj.reserved = b"h" * 64

    def _cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: int) -> None:
        assert flags == 1
        assert bytes(handle) == b"\0h" * 32
        address._obj.value = FIRST + 5

    def _cuIpcCloseMemHandle(self, address: int) -> None:
        self.closed.append(address)

    def _cuThreadExchangeStreamCaptureMode(self, mode: Any) -> None:
        self.mode, mode._obj.value = mode._obj.value, self.mode

    def _cuStreamGetCaptureInfo_v2(self, stream: Any, state: Any, number: Any, *nothing: Any) -> None:
        assert [given.value for given in nothing] == [None] * 3
        state._obj.value, number._obj.value = int(stream.value == 7), 99

    def _cuStreamCreate(self, stream: Any, flags: int) -> None:
        assert flags == 1
        self.log.append("create")
        stream._obj.value = 0x5EA

    def _cuMemcpyHtoDAsync_v2(self, *given: Any) -> None:
        *where, stream = given
        self.log.append((*where, stream.value))

    def _cuStreamSynchronize(self, stream: Any) -> None:
        self.log.append(stream.value)

    def _cuStreamDestroy_v2(self, stream: Any) -> None:
        self.log.append(("destroy", stream.value))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    fake = FakeLibrary()
    monkeypatch.setattr(driver_module.ctypes, "CDLL", lambda _: fake)
    return fake


def test_driver_calls(library: FakeLibrary) -> None:
    driver: DriverCalls = Driver()
    assert driver.locate(FIRST + 9) == library.ALLOCATION
    assert driver.identity(FIRST + 9) == 42
    assert driver.identity(FIRST - 1) is None
    assert driver.locate(FIRST - 1) is None
    assert driver.export(FIRST) == b"h" * 64
    assert driver.open_peer(b"\0h" * 32) == FIRST + 5
    driver.close_peer(FIRST + 5)
    assert library.closed == [FIRST + 5]


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_capture_mode_is_restored(library: FakeLibrary, mode: int) -> None:
    driver = Driver()
    library.mode = mode
    with driver.relaxed_capture():
        assert library.mode == 2
    assert library.mode == mode
    with suppress(KeyError), driver.relaxed_capture():
        raise KeyError
    assert library.mode == mode


def test_captures_have_numbers(library: FakeLibrary) -> None:
    driver = Driver()
    assert driver.capture(7) == 99
    assert driver.capture(8) is None  # in no capture
    library.statuses["cuStreamGetCaptureInfo_v2"] = 1
    assert driver.capture(7) is None


def test_copies_aside_have_a_stream_of_their_own(library: FakeLibrary) -> None:
    driver = Driver()
    driver.end_aside()
    assert not library.log
    for _ in range(2):
        driver.copy_aside(1, 2, 3)
    driver.end_aside()
    driver.end_aside()
    assert library.log == ["create", *[(1, 2, 3, 0x5EA), 0x5EA] * 2, ("destroy", 0x5EA)]
    library.statuses["cuMemcpyHtoDAsync_v2"] = 1
    with pytest.raises(HeapError, match="cuMemcpyHtoDAsync"):
        driver.copy_aside(1, 2, 3)


def test_driver_errors(library: FakeLibrary) -> None:
    driver = Driver()
    library.statuses = dict.fromkeys(
        ["cuIpcGetMemHandle", "cuMemGetAddressRange_v2", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle"], 1
    )
    assert driver.export(FIRST) is None
    assert driver.locate(FIRST) is None
    with pytest.raises(HeapError, match=r"cuIpcOpenMemHandle: CUDA_ERROR_TEST \(1\)"):
        driver.open_peer(b"\0h" * 32)
    with pytest.raises(HeapError, match=r"cuIpcCloseMemHandle: CUDA_ERROR_TEST \(1\)"):
        driver.close_peer(FIRST)
    library.statuses["cuPointerGetAttribute"] = 999999  # a driver that cannot answer says nothing about the memory
    for ask in (driver.identity, driver.locate):
        with pytest.raises(HeapError, match="unknown error"):
            ask(FIRST)
    library.statuses = {"cuMemGetAddressRange_v2": 201}
    with pytest.raises(HeapError, match="cuMemGetAddressRange"):
        driver.locate(FIRST)
    library.statuses = {"cuInit": 100}
    with pytest.raises(HeapError, match="cuInit"):
        Driver()


def share_real_memory() -> list[tuple[bool, list[int]]]:
    """Two ranks on the first GPU: each reads the other's tensor where it lies; it is freed, and another one made."""
    group = torch.distributed.group.WORLD
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.cuda.set_device(0)
    regions = Regions(rank, num_ranks, Driver())
    handles: list[Any] = [None] * num_ranks
    torch.distributed.all_gather_object(handles, regions.handle, group)
    regions.attach(handles)
    torch.distributed.barrier(group)
    regions.unlink()
    found = []
    for generation in range(3):
        tensor = torch.full((8 * MiB,), 10 * generation + rank, dtype=torch.int32, device="cuda")[1000:]
        torch.cuda.synchronize()
        region, offset = regions.expose(tensor.data_ptr(), tensor.nbytes)
        for _ in range(2):
            torch.distributed.barrier(group)
            visit(regions)
        torch.distributed.barrier(group)
        regions.poll()
        places: list[Any] = [None] * num_ranks
        torch.distributed.all_gather_object(places, (region, offset), group)
        values = [
            int(copy_of_memory(int(regions.table[peer, places[peer][0]]) + places[peer][1]))
            for peer in range(num_ranks)
        ]
        found.append((regions.is_ready(region), values))
        torch.distributed.barrier(group)
        del tensor
        torch.cuda.empty_cache()
        regions.sweep()
    regions.close()
    return found


def copy_of_memory(address: int) -> torch.Tensor:
    """int32 []: the word at a device address of this process."""
    word = torch.empty((), dtype=torch.int32)
    status = driver_module.ctypes.CDLL("libcuda.so.1").cuMemcpyDtoH_v2(
        driver_module.ctypes.c_void_p(word.data_ptr()),
        driver_module.ctypes.c_uint64(address),
        driver_module.ctypes.c_size_t(4),
    )
    assert status == 0
    return word


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_real_memory_between_processes(pool_of: Any) -> None:
    for found in pool_of(2).run(share_real_memory):
        assert found == [(True, [10 * generation, 10 * generation + 1]) for generation in range(3)]
