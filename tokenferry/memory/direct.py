"""Regions: ordinary CUDA allocations that the other ranks of the node can read directly.

An owner numbers the allocations that its tensors lie in: a *region* is one allocation, under one of
``NUM_REGIONS`` numbers. Region 0 is the symmetric heap, which everybody knows. The handle of any other one
travels through the owner's mailbox, a segment of shared memory that all hosts of the node map. Every reader opens
it when it next enters the library, and acknowledges; nobody ever waits for a registration. Owner ``o``'s mailbox::

    line 0              magic, version, rank, ranks
    posted              how often o changed any state, written by o
    answered[r]         how often r acknowledged anything of o, written by r
    state[k]            of region k: 2 * generation while it is open, 2 * generation + 1 once it is closing
    entry[k]            of region k: size and handle of the generation, written by o
    ack[r][k]           the state of region k that r has followed, written by r

A number is given to another allocation, the next generation, only when all readers have acknowledged the closing
of the last one: ``2 * generation + 1``. So a state names one allocation for good, and a reader that follows a
state never finds it overwritten. All words only ever grow; nothing is reset, and there is no barrier.

Every word has one writer; the hazard of each:
    entry       written before its state (fence between): who sees the state sees the entry
    state       written before ``posted`` (fence between): who sees ``posted`` sees the state
    ack         written after the last read of the entry and after the mapping is open, or closed (fence between):
                the owner overwrites no entry that is still read, and frees no number that is still mapped
    answered    written after ``ack`` (fence between): who sees ``answered`` sees the acknowledgements

Memory is recognized by the driver's identity of the allocation, never by its address alone. An allocation that is
gone is noticed when its address is used again, or by a sweep. Operations that read it have all ended by then: its
owner could not free it before. Until its readers have closed their mappings, its memory stays taken.
"""

from __future__ import annotations

import logging
import os
import weakref
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch

from tokenferry.config import ALIGNMENT
from tokenferry.errors import BufferStateError, HeapError
from tokenferry.memory.driver import HANDLE_BYTES, DriverCalls
from tokenferry.memory.shm import Segment, fence

logger = logging.getLogger("tokenferry")

NUM_REGIONS = 256
"""Regions of one owner, the heap among them."""
HEAP_REGION = 0
NO_REGION = -1
"""Stands for memory that peers cannot read."""

_MAGIC = 0x7265676976657273
_VERSION = 1
_SWEEP_EVERY = 64
_LARGEST_ALLOCATION = 1 << 48
_MOST_REFUSALS = 1024
_LINE_WORDS = ALIGNMENT // 8
_HEADER_WORDS = 4
_POSTED = _LINE_WORDS
_ANSWERED = 2 * _LINE_WORDS
_HANDLE_WORDS = HANDLE_BYTES // 8
_ENTRY_WORDS = 16


class Exposed(NamedTuple):
    """An own allocation that has a region."""

    base: int
    end: int
    identity: int
    region: int


class Seen(NamedTuple):
    """Own allocations that the tensors of an operation lay in."""

    num_retired: int
    """Regions that had ever been retired by then: with one more, a number may stand for another allocation."""
    allocations: tuple[Exposed, ...]


class _Answer(NamedTuple):
    """An acknowledgement that waits for :meth:`Regions.acknowledge`."""

    version: int
    owner: int
    region: int
    state: int


def _is_open(state: int) -> bool:
    return state != 0 and state % 2 == 0


class Regions:
    """The regions of all ranks of a node, as one of them sees them.

    Args:
        rank: this rank in the group.
        num_ranks: ranks of the group, each a process of its own on the same machine.
        driver: the CUDA driver.

    Construction creates the own mailbox; :meth:`attach` opens those of the peers; both are local. Not thread safe:
    the caller holds the lock of its Buffer.

    Every operation calls, in this order: :meth:`poll`; if ``version`` is new, it has ``tables`` and ``ready``
    copied to the device, on the stream of the operations; :meth:`acknowledge` for copies that are finished;
    :meth:`expose`. The tables may change while a copy of them runs: to the kernels before the next copy, any mix
    of old and new words means the same.

    Attributes:
        table: int64 [num_ranks, NUM_REGIONS], where the regions of all ranks begin in this process; 0 = not known.
        sizes: likewise, their bytes, as their owners said when they were opened.
        tables: int64 [2, num_ranks, NUM_REGIONS], both.
        ready: int32 [NUM_REGIONS], 1 = every peer can read this region of this rank.
        version: grows whenever the tables or the outstanding acknowledgements change.
        driver: as given.

    Raises:
        HeapError: shared memory cannot be created.
    """

    def __init__(self, rank: int, num_ranks: int, driver: DriverCalls) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.version = 0
        self.driver = driver
        self._peers = tuple(peer for peer in range(num_ranks) if peer != rank)
        self._states = _ANSWERED + num_ranks * _LINE_WORDS
        self._entries = self._states + NUM_REGIONS
        self._acks = self._entries + NUM_REGIONS * _ENTRY_WORDS
        own = Segment.create((self._acks + num_ranks * NUM_REGIONS) * 8)
        try:
            own.commit(own.size)
        except BaseException:
            own.retire()
            own.close()
            raise
        own.words[:_HEADER_WORDS] = array("q", [_MAGIC, _VERSION, rank, num_ranks])
        pinned = torch.cuda.is_available()
        with torch.inference_mode(False):
            shape = (2, num_ranks, NUM_REGIONS)
            self.tables = torch.zeros(shape, dtype=torch.int64, device="cpu", pin_memory=pinned)
            self.table, self.sizes = self.tables.unbind()
            self.ready = torch.zeros(NUM_REGIONS, dtype=torch.int32, device="cpu", pin_memory=pinned)
        self._table, self._sizes = self.tables.numpy()
        self._ready = self.ready.numpy()
        self._reported = 0
        self._polls = 0
        # As an owner.
        self._heap_base = 0
        self._heap_size = 0
        self._bases: list[int] = []
        self._known: list[Exposed] = []
        self._refused: set[int] = set()
        self._free = deque(range(HEAP_REGION + 1, NUM_REGIONS))
        self._state = [0] * NUM_REGIONS
        self._unsettled: dict[int, int] = {}
        self._answered = [0] * num_ranks
        self._may_settle = False
        self._may_sweep = True
        self._verified: dict[int, Exposed] = {}
        self._num_retired = 0
        # As a reader.
        self._posted = [0] * num_ranks
        self._followed = [[0] * NUM_REGIONS for _ in range(num_ranks)]
        self._answers: deque[_Answer] = deque()
        self._mappings: dict[tuple[int, int], int] = {}
        self._warned = False
        self._mail: list[tuple[int, memoryview[int]]] = []
        self._is_closed = False

        self._segments: list[Segment | None] = [None] * num_ranks
        self._segments[rank] = own
        self._finalizer = weakref.finalize(self, _let_go, self._segments, self._mappings, driver, rank, os.getpid())

    @property
    def handle(self) -> tuple[str, int]:
        """What a peer needs to open this rank's mailbox."""
        own = self._segment(self.rank)
        return own.name, own.size

    def _segment(self, rank: int) -> Segment:
        segment = self._segments[rank]
        if segment is None:
            raise BufferStateError("the regions are closed or were never attached")
        return segment

    def _words(self, rank: int) -> memoryview[int]:
        return self._segment(rank).words

    def attach(self, handles: Sequence[tuple[str, int]]) -> None:
        """Open the peers' mailboxes.

        Args:
            handles: :attr:`handle` of every rank.

        Raises:
            HeapError: a mailbox cannot be opened or is not what it should be.
        """
        size = self._segment(self.rank).size
        for peer in self._peers:
            name, given = handles[peer]
            if given != size:
                raise HeapError(f"the mailbox of rank {peer} has {given} bytes, not {size}")
            self._segments[peer] = segment = Segment(name, size, create=False)
            found = list(segment.words[:_HEADER_WORDS])
            if found != [_MAGIC, _VERSION, peer, self.num_ranks]:
                raise HeapError(f"the mailbox of rank {peer} starts with {found}: not one of this group")
            self._mail.append((peer, segment.words))

    def unlink(self) -> None:
        """Take the own mailbox's name away, once every rank has it open."""
        self._segment(self.rank).unlink()

    def close(self) -> None:
        """Close all mappings of peers' memory. Local, and may be called again.

        No kernel that reads them may be running.
        """
        self._heap_size = 0
        self._bases.clear()
        self._known.clear()
        self._mail.clear()
        self._is_closed = True
        self._finalizer()

    def set_heap(self, addresses: Sequence[int], size: int) -> None:
        """Make the symmetric heap region 0 of every rank.

        Args:
            addresses: where the heap of each rank begins in this process.
            size: bytes of each.
        """
        self._heap_base = addresses[self.rank]
        self._heap_size = size
        self._table[:, HEAP_REGION] = addresses
        self._sizes[:, HEAP_REGION] = size
        self._ready[HEAP_REGION] = 1
        self.version += 1

    # The owner's side.

    def expose(self, address: int, nbytes: int, goes_on: bool = False) -> tuple[int, int]:
        """Find the region of own memory, and make one of it if it has none. Never waits.

        Args:
            address: the first byte.
            nbytes: how many; they lie in one allocation, or have no region.
            goes_on: whether this is for the same operation as the call before. The tensors of one keep their
                allocations: so the driver, which takes a microsecond, is asked once for each of these.

        Returns:
            The region, which peers may not be able to read yet (:meth:`is_ready`), and the offset in it.
            Region -1 if peers will not be able to: the driver does not share this memory, or all numbers are taken.

        Raises:
            HeapError: the driver cannot answer.
        """
        if not goes_on:
            self._verified.clear()
        offset = address - self._heap_base
        if 0 <= offset < self._heap_size:
            return (HEAP_REGION, offset) if offset + nbytes <= self._heap_size else (NO_REGION, 0)
        index = bisect_right(self._bases, address) - 1
        if index >= 0:
            known = self._known[index]
            base, end, identity, region = known
            if address < end:
                if base in self._verified or self.driver.identity(address) == identity:
                    self._verified[base] = known
                    return (region, address - base) if address + nbytes <= end else (NO_REGION, 0)
                self._retire(known)
        found = self._register(address)
        if found is None or address + nbytes > found.end:
            return NO_REGION, 0
        return found.region, address - found.base

    def seen(self) -> Seen:
        """What was exposed for the last operation lies in these allocations, but for what lies in the heap."""
        return Seen(self._num_retired, tuple(self._verified.values()))

    def are_there(self, seen: Seen) -> bool:
        """Whether the allocations are there yet, and have the same regions."""
        num_retired, allocations = seen
        if num_retired != self._num_retired:
            return False
        identity_of = self.driver.identity
        for base, _, identity, _ in allocations:  # noqa: SIM110 (half a microsecond)
            if identity_of(base) != identity:
                return False
        return True

    def is_ready(self, region: int) -> bool:
        """Whether every peer could read a region of this rank at the last poll."""
        return region != NO_REGION and bool(self._ready[region])

    def sweep(self) -> None:
        """Retire the regions whose allocation is gone."""
        for known in list(self._known):
            if self.driver.identity(known.base) != known.identity:
                self._retire(known)

    def _register(self, address: int) -> Exposed | None:
        """Give a region to the allocation of an address that no current region has."""
        self._check_usable()
        identity = self.driver.identity(address)
        if identity is None or identity in self._refused:
            return None
        if not self._free:
            if self._may_sweep:  # once per operation: an identity costs the driver a microsecond
                self._may_sweep = False
                self.sweep()
            return None
        with self.driver.relaxed_capture():
            allocation = self.driver.locate(address)
            handle = self.driver.export(allocation.base) if allocation is not None else None
        if allocation is None or handle is None:
            if len(self._refused) >= _MOST_REFUSALS:
                self._refused.clear()
            self._refused.add(identity)
            return None
        end = allocation.base + allocation.size
        for gone in [known for known in self._known if known.base < end and allocation.base < known.end]:
            self._retire(gone)
        known = Exposed(allocation.base, end, identity, self._free.popleft())
        index = bisect_right(self._bases, known.base)
        self._bases.insert(index, known.base)
        self._known.insert(index, known)
        self._verified[known.base] = known
        self._post(known, handle)
        return known

    def _post(self, known: Exposed, handle: bytes) -> None:
        region = known.region
        words = self._words(self.rank)
        start = self._entries + region * _ENTRY_WORDS
        words[start] = known.end - known.base
        words[start + 1 : start + 1 + _HANDLE_WORDS] = array("q", handle)
        self._table[self.rank, region] = known.base
        self._sizes[self.rank, region] = known.end - known.base
        self._set_state(region, (self._state[region] | 1) + 1)

    def _retire(self, known: Exposed) -> None:
        index = bisect_right(self._bases, known.base) - 1
        del self._bases[index], self._known[index]
        self._verified.pop(known.base, None)
        self._num_retired += 1
        self._table[self.rank, known.region] = self._sizes[self.rank, known.region] = 0
        self._ready[known.region] = 0
        self._set_state(known.region, self._state[known.region] + 1)

    def _set_state(self, region: int, state: int) -> None:
        words = self._words(self.rank)
        self._state[region] = self._unsettled[region] = state
        self._may_settle = True
        self.version += 1
        fence()
        words[self._states + region] = state
        fence()
        words[_POSTED] += 1

    def _settle(self) -> None:
        """Look which own regions all peers have opened, or closed."""
        words = self._words(self.rank)
        answered = [words[_ANSWERED + rank * _LINE_WORDS] for rank in range(self.num_ranks)]
        if answered == self._answered and not self._may_settle:
            return
        self._answered = answered
        self._may_settle = False
        fence()
        for region, state in list(self._unsettled.items()):
            acks = [words[self._acks + peer * NUM_REGIONS + region] for peer in self._peers]
            for peer, ack in zip(self._peers, acks, strict=True):
                if not 0 <= ack <= state:
                    raise HeapError(f"rank {peer} acknowledges state {ack} of region {region}, which is in {state}")
            if all(ack == state for ack in acks):
                del self._unsettled[region]
                if _is_open(state):
                    self._ready[region] = 1
                    self.version += 1
                else:
                    self._free.append(region)

    # The reader's side, and the beginning of every operation.

    def poll(self) -> bool:
        """Follow what peers posted and acknowledged since the last time.

        What is opened here is acknowledged by :meth:`acknowledge`; what is retired leaves the table here, and is
        closed there. Memory that cannot be opened is never acknowledged: its owner goes on staging it.

        Returns:
            Whether ``table``, ``ready`` or what there is to acknowledge changed since the last time.

        Raises:
            HeapError: the mailbox of a peer has words that no rank of this group writes, or the driver cannot answer.
        """
        if self._is_closed:
            raise BufferStateError("the regions are closed")
        self._may_sweep = True
        self._polls += 1
        if self._polls % _SWEEP_EVERY == 0:
            self.sweep()
        for peer, words in self._mail:
            posted = words[_POSTED]
            if posted != self._posted[peer]:
                self._follow(peer, words, posted)
        if self._unsettled:
            self._settle()
        changed = self.version != self._reported
        self._reported = self.version
        return changed

    def acknowledge(self, version: int | None = None, openings_only: bool = False) -> None:
        """Tell the owners which of their regions are open here, and close and tell those that they retired.

        An owner that knows this lets its kernels point at the region at once. So it is said only when the device
        *has* the tables: when the copy of them that was started after :meth:`poll` is finished, not only started.
        This host may be some operations ahead of the owner's; their kernels are on the stream before that copy, if
        it is in the order of the operations. If it is not, some may still run.

        Args:
            version: ``self.version`` right after the poll whose tables the device has; None = the last poll.
            openings_only: close nothing: the copy was not in the order of the operations.
        """
        if not self._answers:
            return
        self._check_usable()
        limit = self._reported if version is None else version
        answers: list[_Answer] = []
        later: deque[_Answer] = deque()
        for answer in self._answers:
            is_due = answer.version <= limit and (_is_open(answer.state) or not openings_only)
            (answers if is_due else later).append(answer)
        self._answers = later
        for answer in answers:
            if not _is_open(answer.state):
                self._close_mapping(answer.owner, answer.region)
        fence()
        for _, owner, region, state in answers:
            self._words(owner)[self._acks + self.rank * NUM_REGIONS + region] = state
        fence()
        for owner in {answer.owner for answer in answers}:
            self._words(owner)[_ANSWERED + self.rank * _LINE_WORDS] += 1

    def _follow(self, peer: int, words: memoryview[int], posted: int) -> None:
        """Compare all states of a peer with those that this rank has followed."""
        if posted < self._posted[peer]:
            raise HeapError(f"the mailbox of rank {peer} went back from {self._posted[peer]} changes to {posted}")
        fence()
        states = words[self._states : self._states + NUM_REGIONS].tolist()
        fence()
        followed = self._followed[peer]
        if states != followed:
            for region, state in enumerate(states):
                if state != followed[region]:
                    self._follow_region(peer, words, region, state)
        self._posted[peer] = posted

    def _follow_region(self, peer: int, words: memoryview[int], region: int, state: int) -> None:
        before = self._followed[peer][region]
        closed = before | 1
        if _is_open(before):
            is_next = state == closed
        else:
            may_reuse = words[self._acks + self.rank * NUM_REGIONS + region] == before
            is_next = may_reuse and state in (closed + 1, closed + 2)
        if region == HEAP_REGION or not is_next:
            raise HeapError(f"rank {peer} posted state {state} of region {region} after {before}")
        self._followed[peer][region] = state
        if _is_open(state):
            mapped = self._open(peer, words, region)
            if mapped is None:
                return
            address, size = mapped
            self._mappings[peer, region] = address
            self._sizes[peer, region] = size
            self._table[peer, region] = address
        else:
            self._table[peer, region] = self._sizes[peer, region] = 0
        self.version += 1
        self._answers.append(_Answer(self.version, peer, region, state))

    def _open(self, peer: int, words: memoryview[int], region: int) -> tuple[int, int] | None:
        """Address and bytes of a region of a peer, or None where the driver does not open it."""
        start = self._entries + region * _ENTRY_WORDS
        size = words[start]
        handle = words[start + 1 : start + 1 + _HANDLE_WORDS].tobytes()
        if not 0 < size <= _LARGEST_ALLOCATION or not any(handle):
            raise HeapError(f"rank {peer} posted region {region} with {size} bytes and the handle {handle.hex()}")
        try:
            with self.driver.relaxed_capture():
                return self.driver.open_peer(handle), size
        except HeapError as error:
            level = logging.DEBUG if self._warned else logging.WARNING
            self._warned = True
            text = "rank %d cannot open memory of rank %d, which has to be staged: %s"
            logger.log(level, text, self.rank, peer, error)
            return None

    def _close_mapping(self, peer: int, region: int) -> None:
        mapped = self._mappings.pop((peer, region), None)
        if mapped is not None:
            try:
                with self.driver.relaxed_capture():
                    self.driver.close_peer(mapped)
            except HeapError as error:  # nothing reads it any more, so that is a leak at worst
                logger.debug("rank %d cannot close memory of rank %d: %s", self.rank, peer, error)

    def _check_usable(self) -> None:
        if self._is_closed:
            raise BufferStateError("the regions are closed")


def _let_go(
    segments: list[Segment | None],
    mappings: dict[tuple[int, int], int],
    driver: DriverCalls,
    rank: int,
    creator: int,
) -> None:
    own = segments[rank]
    if os.getpid() == creator:
        if own is not None:
            own.retire()
        while mappings:
            _, mapped = mappings.popitem()
            with suppress(HeapError), driver.relaxed_capture():
                driver.close_peer(mapped)
    for index, segment in enumerate(segments):
        if segment is not None:
            segment.close()
            segments[index] = None
