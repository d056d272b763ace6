"""The symmetric heap: control words and a stage in every rank's shared memory, and the message ring on top.

Every rank owns one segment that all ranks of the node map. Owner ``o``'s segment holds::

    line 0              magic, version, rank, ranks, state, whether deaths show by lock
    line 1, 2           why an operation failed here, in words; written before the state that says so
    inbox[s][slot]      headers of messages from s to o, written by s; word 0 is the flag
    released[r]         how many of o's messages r has finished reading, written by r
    first[s]            the first message of s that o may expect, written by s when it unmasks o
    stage               payload of o's messages, written by o, read by all

An owner's messages are numbered 0, 1, 2, ... for life. Publishing message k means: payload into the own stage,
a header into slot ``k % SLOTS`` of every reader's inbox, a fence, and then the flag ``k + 1``. A reader that
waits for message k waits for exactly that flag, in its own memory. When it has read what it needs, it writes
``k + 1`` into ``released[reader]`` at the owner. The owner reuses stage bytes and header slots of message k only
when every reader has released it. All words only ever grow; nothing is reset, and there is no barrier.

A header has one writer and one reader; the hazard of each word:
    flag        written after payload and header (fence between): a reader never sees either too early
    released    written after the last read of the payload (fence between): the owner never overwrites too early
"""

from __future__ import annotations

import os
import threading
import weakref
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import NamedTuple

import torch

from tokenferry.config import ALIGNMENT, align_up
from tokenferry.errors import (
    BufferStateError,
    HeapError,
    StepBackError,
)
from tokenferry.memory.operation import Operation
from tokenferry.memory.shm import Segment, fence
from tokenferry.stats import Recorder

MAGIC = 0x746F6B656E666572
VERSION = 2
SLOTS = 8
"""Messages of one owner that may be unread at a time."""
HEADER_WORDS = 32
_LINE_WORDS = ALIGNMENT // 8
_REASON_BYTES = 2 * ALIGNMENT
_PAGE = 4096
_SMALLEST_STAGE = 16 * _PAGE
_SMALLEST_RESERVE = 64 << 20
POISON = 0xFB
"""What released bytes of the stage become in paranoid mode: huge and negative in every dtype of more than a byte."""


class State(IntEnum):
    """What a rank says of its own heap."""

    OPEN = 1
    CLOSED = 2
    FAILED = 3


_STATES = frozenset(State)
_MAGIC_WORD, _VERSION_WORD, _RANK_WORD, _SIZE_WORD, _STATE_WORD, _LOCKED_WORD = range(6)


class Message(NamedTuple):
    """One message as its reader sees it."""

    source: int
    fields: tuple[int, ...]
    """The header's words after the flag."""


class _InFlight(NamedTuple):
    message: int
    offset: int
    nbytes: int
    readers: tuple[int, ...]


class Heap:
    """The symmetric heap of one Buffer on CPU ranks.

    Args:
        rank: this rank in the group.
        num_ranks: ranks of the group.
        stage_limit: bytes the stage may grow to.
        timeout: seconds to wait for a peer that makes no progress.
        names: what messages call each rank; by default its number here.

    Construction creates the own segment; :meth:`attach` opens those of the peers; both are local.

    Raises:
        HeapError: shared memory cannot be created.
    """

    def __init__(
        self, rank: int, num_ranks: int, stage_limit: int, timeout: float, names: Sequence[int] | None = None
    ) -> None:
        self.names = tuple(range(num_ranks) if names is None else names)
        self.rank = rank
        self.num_ranks = num_ranks
        self.timeout = timeout
        self.epoch = 0
        self.lock = threading.Lock()
        self.recorder = Recorder()
        self.may_mask = False
        self.poisons = False
        self._peers = tuple(peer for peer in range(num_ranks) if peer != rank)
        self._masked: set[int] = set()
        self._times_masked = [0] * num_ranks
        self._masked_at = [0] * num_ranks
        self._inbox = _LINE_WORDS + _REASON_BYTES // 8
        self._released = self._inbox + num_ranks * SLOTS * HEADER_WORDS
        self._first = self._released + num_ranks * _LINE_WORDS
        self._stage = align_up((self._first + num_ranks * _LINE_WORDS) * 8, _PAGE)
        self.stage_limit = align_up(stage_limit, _PAGE)
        self.stage_bytes = _SMALLEST_STAGE
        self._next_message = 0
        self._in_flight: deque[_InFlight] = deque()
        self._read = [0] * num_ranks
        own = Segment.create(self._stage + max(self.stage_limit, _SMALLEST_RESERVE))
        try:
            own.commit(self._stage + self.stage_bytes)
        except BaseException:
            own.retire()
            own.close()
            raise
        header = [MAGIC, VERSION, rank, num_ranks, State.OPEN, int(own.locked)]
        own.words[: len(header)] = array("q", header)
        self._segments: list[Segment | None] = [None] * num_ranks
        self._segments[rank] = own
        self._creator = os.getpid()
        self._finalizer = weakref.finalize(self, _let_go, self._segments, rank, self._creator)

    @property
    def handle(self) -> tuple[str, int]:
        """What a peer needs to open this rank's segment."""
        return self._own.name, self._own.size

    @property
    def _own(self) -> Segment:
        return self._segment(self.rank)

    def _segment(self, rank: int) -> Segment:
        segment = self._segments[rank]
        if segment is None:
            raise BufferStateError("the heap is closed or was never attached")
        return segment

    def attach(self, handles: Sequence[tuple[str, int]]) -> None:
        """Open the peers' segments.

        Args:
            handles: :attr:`handle` of every rank.

        Raises:
            HeapError: a segment cannot be opened or is not what it should be.
        """
        for peer in self._peers:
            segment = Segment(*handles[peer], create=False)
            self._segments[peer] = segment
            if not self._is_sound(peer):
                name, found = self.names[peer], list(segment.words[:_LOCKED_WORD])
                raise HeapError(f"the segment of rank {name} starts with {found}: not a heap of this group")

    def unlink(self) -> None:
        """Take the own segment's name away, once every rank has it open."""
        self._own.unlink()

    def close(self) -> None:
        """Say goodbye in the control words and unmap everything. Local, and may be called again."""
        self._finalizer()

    def is_open(self) -> bool:
        """Whether the heap is attached to all ranks and usable."""
        return all(self._segments) and self._own.words[_STATE_WORD] == State.OPEN

    def allocated_bytes(self) -> int:
        """Bytes of shared memory that this rank's segment really takes."""
        return self._own.committed

    def whole_stage(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]: the head of the own stage, made real."""
        with self.lock:
            self.check_usable()
            self.ensure_stage(nbytes, nbytes)
            return self.stage_view(self.rank, 0, nbytes)

    # The owner's side.

    def ensure_stage(self, wanted: int, floor: int) -> int:
        """Grow the stage towards ``wanted`` bytes, as far as its limit and the system's memory allow.

        Args:
            wanted: bytes that would suit the operation.
            floor: bytes without which it cannot run.

        Returns:
            The bytes of the stage now, at least ``floor``.

        Raises:
            HeapError: less than ``floor`` bytes can be had.
        """
        goal = align_up(max(min(wanted, self.stage_limit), floor), _PAGE)
        reserved = self._own.size - self._stage
        if goal > reserved:
            raise HeapError(f"a stage of {goal} bytes is needed, {reserved} are reserved: raise num_nvl_bytes")
        if goal > self.stage_bytes:
            try:
                self._own.commit(self._stage + goal)
                self.stage_bytes = goal
            except HeapError:
                if align_up(floor, _PAGE) > self.stage_bytes:
                    self._own.commit(self._stage + align_up(floor, _PAGE))
                    self.stage_bytes = align_up(floor, _PAGE)
        return self.stage_bytes

    def can_stage(self, nbytes: int) -> bool:
        """Whether the stage has so many bytes, now that they are asked for."""
        with self.lock:
            try:
                return self.ensure_stage(nbytes, nbytes) >= nbytes
            except HeapError:
                return False

    def try_reserve(self, nbytes: int) -> int | None:
        """Find stage room for the next message.

        Returns:
            The payload's offset in the stage, or None while readers still hold the room or the headers.
        """
        self._retire()
        nbytes = align_up(max(nbytes, 1))
        if len(self._in_flight) == SLOTS:
            return None
        offset = 0
        if self._in_flight:
            first = self._in_flight[0].offset
            last = self._in_flight[-1].offset
            offset = last + self._in_flight[-1].nbytes
            if last >= first and offset + nbytes > self.stage_bytes:
                offset = 0
            limit = first if offset <= first else self.stage_bytes
            if offset + nbytes > limit:
                return None
        elif nbytes > self.stage_bytes:
            raise HeapError(f"a message of {nbytes} bytes does not fit the stage of {self.stage_bytes}")
        self._in_flight.append(_InFlight(self._next_message, offset, nbytes, self.active_peers()))
        return offset

    def _retire(self) -> None:
        while self._in_flight and not self.readers_in_the_way():
            released = self._in_flight.popleft()
            if self.poisons:
                self.stage_view(self.rank, released.offset, released.nbytes).fill_(POISON)

    def readers_in_the_way(self) -> list[int]:
        """The peers that hold the oldest message of this rank."""
        if not self._in_flight:
            return []
        oldest = self._in_flight[0]
        words = self._own.words
        return [
            peer
            for peer in oldest.readers
            if peer not in self._masked and words[self._released + peer * _LINE_WORDS] <= oldest.message
        ]

    def publish(self, fields_of: Mapping[int, Sequence[int]]) -> None:
        """Publish the message whose room was reserved last.

        Args:
            fields_of: the header words for every peer that is not masked.
        """
        message = self._next_message
        slot = self._inbox + (self.rank * SLOTS + message % SLOTS) * HEADER_WORDS
        readers = [peer for peer in self._in_flight[-1].readers if peer not in self._masked]
        fence()
        for peer in readers:
            fields = array("q", fields_of[peer])
            self._segment(peer).words[slot + 1 : slot + 1 + len(fields)] = fields
        fence()
        for peer in readers:
            self._segment(peer).words[slot] = message + 1
        self._next_message = message + 1

    # The reader's side.

    def next_message(self, source: int, epoch: int = 0) -> Message | None:
        """The oldest unreleased message of ``source``, or None while there is none.

        Messages of operations before ``epoch`` (their first field) are released unread: they date from a time when
        this rank went on without their sender.
        """
        words = self._own.words
        while True:
            first = words[self._first + source * _LINE_WORDS]
            message = self._read[source] = max(self._read[source], first)
            slot = self._inbox + (source * SLOTS + message % SLOTS) * HEADER_WORDS
            if words[slot] != message + 1:
                return None
            fence()
            fields = tuple(words[slot + 1 : slot + HEADER_WORDS])
            if fields[0] >= epoch:
                return Message(source, fields)
            self.release(source)

    def release(self, source: int) -> None:
        """Finish reading the oldest unreleased message of ``source``."""
        self._read[source] += 1
        fence()
        self._segment(source).words[self._released + self.rank * _LINE_WORDS] = self._read[source]

    def stage_view(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] over bytes of a rank's stage.

        Raises:
            HeapError: the range lies outside of the stage.
        """
        segment = self._segment(rank)
        start = self._stage + offset
        if offset < 0 or nbytes < 0 or start + nbytes > segment.size:
            name = self.names[rank]
            raise HeapError(f"bytes {offset} to {offset + nbytes} lie outside of the stage of rank {name}")
        return segment.bytes[start : start + nbytes]

    # Masking: going on without a rank.

    def active_peers(self) -> tuple[int, ...]:
        """The peers that this rank sends to and waits for."""
        if not self._masked:
            return self._peers
        return tuple(peer for peer in self._peers if peer not in self._masked)

    def masked(self) -> frozenset[int]:
        """The ranks that this rank goes on without."""
        return frozenset(self._masked)

    def times_masked(self, rank: int) -> int:
        """How often the rank has been masked."""
        return self._times_masked[rank]

    def set_masked(self, ranks: Iterable[int], masked: bool) -> None:
        """Go on without some ranks, or with them again. Every rank has a view of its own.

        A rank that was masked got no messages in the meantime: it is told the next one that it will get.
        """
        for rank in ranks:
            if masked and rank != self.rank:
                self._times_masked[rank] += 1
                if rank not in self._masked:
                    self._masked.add(rank)
                    self._masked_at[rank] = self._next_message
            elif not masked and rank in self._masked:
                self._masked.remove(rank)
                if self._masked_at[rank] == self._next_message:
                    continue  # it got all there was
                # What it was sent before may be overwritten by now: it shall not read that, and nothing waits for it.
                self._in_flight = deque(
                    flight._replace(readers=tuple(reader for reader in flight.readers if reader != rank))
                    for flight in self._in_flight
                )
                fence()
                self._segment(rank).words[self._first + self.rank * _LINE_WORDS] = self._next_message

    # Waiting.

    @contextmanager
    def operation(self, name: str) -> Iterator[Operation]:
        """Run one collective operation, or its first half: numbers it and guards it."""
        with self.guarded():
            self.epoch += 1
            yield Operation(self, name, self.epoch)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep other threads of this process out, and remember failure."""
        with self.lock:
            self.check_usable()
            try:
                yield
            except StepBackError:
                raise
            except BaseException as error:
                self.fail(f"{type(error).__name__}: {error}")
                raise

    def fail(self, reason: str) -> None:
        """Tell everyone that an operation failed here, and why: no rank waits for this one any more."""
        own = self._segments[self.rank]  # None: closed, perhaps just now and by another thread
        if own is not None and own.words[_STATE_WORD] == State.OPEN:
            text = reason.encode()[:_REASON_BYTES].ljust(_REASON_BYTES, b"\0")
            own.words[_LINE_WORDS : _LINE_WORDS + _REASON_BYTES // 8] = array("q", text)
            fence()  # whoever sees this sees the reason, and all that was published before
            own.words[_STATE_WORD] = State.FAILED

    def _reason_of(self, rank: int) -> str:
        words = self._segment(rank).words[_LINE_WORDS : _LINE_WORDS + _REASON_BYTES // 8]
        text = words.tobytes().rstrip(b"\0").decode(errors="ignore")
        return "".join(character for character in text if character.isprintable())

    def check_usable(self) -> None:
        """Raise if operations cannot run here.

        Raises:
            BufferStateError: closed, failed, or inherited by a fork.
        """
        if os.getpid() != self._creator:
            raise BufferStateError("the Buffer belongs to the process that constructed it, not to a fork of it")
        if not self._finalizer.alive:
            raise BufferStateError("the Buffer was destroyed")
        if self._own.words[_STATE_WORD] != State.OPEN:
            if not self._is_sound(self.rank):
                raise BufferStateError("something has written over the control words of this Buffer: build a new one")
            raise BufferStateError("an earlier operation failed on this Buffer: destroy it and build a new one")

    def trouble(self, missing: Sequence[int]) -> tuple[list[int], str] | None:
        """Ranks because of which some of ``missing`` will never answer, and why."""
        states = {rank: self._segment(rank).words[_STATE_WORD] for rank in missing}
        fence()  # the caller looks once more for what they published before
        dead = [rank for rank in missing if self._is_dead(rank)]
        gave_up = [rank for rank, state in states.items() if state == State.FAILED]
        closed = [rank for rank, state in states.items() if state == State.CLOSED]
        spoiled = [rank for rank in missing if not self._is_sound(rank)]
        if gave_up and not dead:  # name the cause, not the next in the chain
            dead = [rank for rank in self.active_peers() if self._is_dead(rank)]
        if dead:
            return dead, "its process has ended"
        if spoiled:
            return spoiled, "something has written over its control words"
        if closed:
            return closed, "has destroyed its Buffer"
        if gave_up:
            return gave_up, f"gave up on an operation ({self._reason_of(gave_up[0])})"
        return None

    def _is_sound(self, rank: int) -> bool:
        words = self._segment(rank).words
        identity = list(words[:_STATE_WORD])
        return identity == [MAGIC, VERSION, rank, self.num_ranks] and words[_STATE_WORD] in _STATES

    def _is_dead(self, rank: int) -> bool:
        segment = self._segment(rank)
        said_nothing = segment.words[_STATE_WORD] == State.OPEN
        return said_nothing and bool(segment.words[_LOCKED_WORD]) and segment.creator_is_gone()


def _let_go(segments: list[Segment | None], rank: int, creator: int) -> None:
    own = segments[rank]
    if own is not None and os.getpid() == creator:
        fence()
        if own.words[_STATE_WORD] == State.OPEN:
            own.words[_STATE_WORD] = State.CLOSED
        own.retire()
    for index, segment in enumerate(segments):
        if segment is not None:
            segment.close()
            segments[index] = None
