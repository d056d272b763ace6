"""What dispatch and combine share on CPU ranks: messages, the agreement, and the loop that drives both sides.

An exchange sends its rows in rounds, one message a round, every message to every peer. Round 0 goes out at once;
when the first message of every peer is here, all ranks know the same and either go on or all raise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

import torch

from tokenferry.config import ALIGNMENT, align_up
from tokenferry.dataplane import Signature, describe_difference
from tokenferry.errors import CapacityError, HeapError, MismatchError, StepBackError
from tokenferry.memory.heap import Heap, Message
from tokenferry.memory.operation import Operation

MESSAGE_BYTES = 8 << 20
"""Most bytes of one message; with fewer, hand-overs cost more than the cache saves (docs/performance.md)."""
STAGE_BYTES = 32 << 20
"""Most stage an operation asks for."""


class Status(IntEnum):
    """Whether a rank can take part in an operation."""

    READY = 0
    NO_STAGE = 1


class Head(NamedTuple):
    """What the header of a message says to one reader."""

    epoch: int
    status: int
    last: int
    """1 if the owner's operation has no further message."""
    offset: int
    """Of the payload in the owner's stage."""
    nbytes: int
    num_rows: int
    start: int
    """First entry (dispatch) or row (combine) for this reader."""
    length: int
    """Entries or rows for this reader."""
    bound: int
    """Dispatch: entries for all readers. Combine: the message covers source tokens below this one."""


def parse(message: Message) -> tuple[Head, Signature]:
    """The head of a message and its sender's signature.

    Raises:
        HeapError: the head cannot be one of a message.
    """
    middle = len(Head._fields)
    end = middle + len(Signature._fields)
    head = Head._make(message.fields[:middle])
    if min(head) < 0 or head.offset % ALIGNMENT:
        raise HeapError(f"a rank ({message.source} of its node) sent a malformed message: {head}")
    return head, Signature._make(message.fields[middle:end])


class Exchange(ABC):
    """One collective operation of one rank, sender and reader in one."""

    def __init__(self, heap: Heap, operation: Operation, signature: Signature) -> None:
        self.heap = heap
        self.operation = operation
        self.operation.kind = signature.operation
        self.signature = signature
        self.row_bytes = 0
        """Read with each row; set by the operation."""
        self.rank = heap.rank
        self.num_ranks = heap.num_ranks
        self.peers = [peer for peer in range(heap.num_ranks) if peer != heap.rank]
        self.status = Status.READY
        self.num_rounds = 0
        self.rounds_sent = 0
        self.heads: dict[int, Head] = {}
        self._signatures: dict[int, Signature] = {}
        self._more_to_come = set(self.peers)

    # Sending.

    def message_room(self, total_bytes: int, least_bytes: int) -> int:
        """Bytes that one message may have, after asking the heap for a stage for ``total_bytes``.

        ``least_bytes`` is the smallest message the operation can work with. If even that cannot be had, the rank
        takes part only to say so.
        """
        least = align_up(least_bytes)
        try:
            stage = self.heap.ensure_stage(min(total_bytes, STAGE_BYTES), least)
        except HeapError:
            self.status = Status.NO_STAGE
            return least
        whole = total_bytes <= min(stage, MESSAGE_BYTES)
        return max(least, total_bytes if whole else min(MESSAGE_BYTES, stage // 2))

    @abstractmethod
    def stage_round(self, this: int) -> bool:
        """Stage round ``this`` and publish it, if the heap has room; returns whether it was done."""

    def _send(self) -> bool:
        if self.rounds_sent == self.num_rounds or not self.peers:
            return False
        if self.status == Status.NO_STAGE:
            offset = self.heap.try_reserve(0)
            if offset is None:
                return False
            nothing = dict.fromkeys(self.peers, (0, 0))
            self.publish(offset, 0, num_rows=0, ranges=nothing, bound=0)
        elif not self.stage_round(self.rounds_sent):
            return False
        self.rounds_sent += 1
        return True

    def publish(
        self, offset: int, nbytes: int, *, num_rows: int, ranges: Mapping[int, tuple[int, int]], bound: int
    ) -> None:
        """Publish the message at ``offset`` of the stage; ``ranges`` has start and count for every peer."""
        last = int(self.rounds_sent + 1 == self.num_rounds)
        self.heap.recorder.staged(self.operation.kind, nbytes)
        self.heap.publish(
            {
                peer: Head(self.operation.epoch, self.status, last, offset, nbytes, num_rows, *ranges[peer], bound)
                + self.signature
                for peer in self.peers
            }
        )

    # Reading.

    def _receive(self) -> bool:
        arrived = False
        for peer in self._more_to_come - self.heads.keys():
            message = self.heap.next_message(peer, self.operation.epoch)
            if message is not None:
                head, self._signatures[peer] = parse(message)
                if head.epoch != self.operation.epoch:
                    raise HeapError(f"rank {self.heap.names[peer]} is at operation {head.epoch} already")
                self.heads[peer] = head
                if head.last:
                    self._more_to_come.remove(peer)
                arrived = True
        return arrived

    def release(self, peer: int) -> None:
        """Finish reading the peer's current message."""
        read = self.heads.pop(peer).length * self.row_bytes
        self.heap.release(peer)
        self.heap.recorder.read(self.operation.kind, self.heap.names[peer], read)

    def payload(self, peer: int) -> torch.Tensor:
        """uint8: the payload of the peer's current message."""
        return self.heap.stage_view(peer, self.heads[peer].offset, self.heads[peer].nbytes)

    def waiting_for(self) -> list[int]:
        """The ranks without which this rank cannot go on: silent ones, and those that hold its stage."""
        missing = self._more_to_come - self.heads.keys()
        if self.rounds_sent < self.num_rounds and self.peers:
            missing |= set(self.heap.readers_in_the_way() or self.peers)
        return sorted(missing)

    def is_waiting_for_peers(self) -> bool:
        """Whether a peer has more to say in this operation and its next message is not here."""
        return not self._more_to_come <= self.heads.keys()

    # Both.

    def agree(self) -> None:
        """Send the first message, await those of all peers, and compare.

        Raises:
            StepBackError: on every rank, if the ranks do not fit together.
        """

        def step() -> tuple[bool, Sequence[int]]:
            sent = self.rounds_sent == 0 and self._send()
            arrived = self._receive()
            missing = {peer for peer in self.peers if peer not in self.heads}
            if self.rounds_sent == 0 and self.peers:
                missing |= set(self.heap.readers_in_the_way() or self.peers)
            return sent or arrived, sorted(missing)

        self.operation.run(step)
        try:
            self.check_agreement()
        except StepBackError:
            for peer in self.peers:
                self.release(peer)
            raise

    def check_agreement(self) -> None:
        """Compare what all ranks said in their first messages."""
        signatures = {**self._signatures, self.rank: self.signature}
        statuses = {self.rank: int(self.status), **{peer: head.status for peer, head in self.heads.items()}}
        names = self.heap.names
        differences = {
            rank: describe_difference(names[0], signatures[0], names[rank], signatures[rank])
            for rank in range(self.num_ranks)
        }
        odd = [rank for rank, difference in differences.items() if difference]
        if odd:
            raise self.step_back(MismatchError, odd, differences[odd[0]])
        full = [rank for rank, status in sorted(statuses.items()) if status == Status.NO_STAGE]
        if full:
            raise self.step_back(CapacityError, full, "no shared memory for the stage")

    def step_back(self, kind: type[StepBackError], ranks: Sequence[int], reason: str) -> StepBackError:
        """The exception that every rank raises."""
        names = [self.heap.names[rank] for rank in ranks]
        return kind(self.operation.name, self.operation.epoch, names, reason)

    def drive(self) -> None:
        """Send the remaining rounds and read everything, each as soon as it can be done."""

        def step() -> tuple[bool, Sequence[int]]:
            progressed = self._send()
            progressed |= self._receive()
            progressed |= self.read()
            return progressed, self.waiting_for()

        self.operation.run(step)

    @abstractmethod
    def read(self) -> bool:
        """Read what can be read of the current messages and release them; returns whether that was anything."""


def least_room(row_bytes: int, num_ranks: int) -> int:
    """Bytes of stage with which rows of so many bytes can move between the ranks of a node, whatever the operation.

    A message has at most eight sections, and a row for each rank in combine, with its numbers for each rank in
    dispatch; counts of experts are left out, which a part of an operation between nodes has not.
    """
    return align_up(8 * 128 + num_ranks * (row_bytes + 16))


def offsets(sizes: Sequence[int]) -> list[int]:
    """Aligned start of each section of a message, and the end of the last."""
    starts = [0]
    for size in sizes:
        starts.append(align_up(starts[-1] + size))
    return starts


def rows_of(payload: torch.Tensor, start: int, num_rows: int, width: int) -> torch.Tensor:
    """uint8 [num_rows, width] at byte ``start`` of a payload."""
    return _part(payload, start, num_rows * width).view(num_rows, width)


def ints_of(payload: torch.Tensor, start: int, count: int) -> torch.Tensor:
    """int32 [count] at byte ``start`` of a payload."""
    return _part(payload, start, 4 * count).view(torch.int32)


def _part(payload: torch.Tensor, start: int, nbytes: int) -> torch.Tensor:
    if start + nbytes > len(payload):
        raise HeapError(f"a message of {len(payload)} bytes lacks bytes {start} to {start + nbytes}")
    return payload[start : start + nbytes]


def check_range(what: str, values: torch.Tensor, first: int, end: int) -> None:
    """Raise unless all integers that a peer sent are in [first, end).

    Raises:
        HeapError: names what they are.
    """
    if len(values):
        low, high = (int(bound) for bound in values.aminmax())
        if low < first or high >= end:
            raise HeapError(f"a peer sent {what} from {low} to {high}: not in [{first}, {end})")
