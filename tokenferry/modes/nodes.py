"""How the ranks of several nodes agree on an operation before a row is handed out.

A rank talks to the ranks of its node through the data plane, and to one rank of every other node through its rail:
the one with its own local index. What every rank must know goes in three steps::

    offers      over the rail      my signature; how many rows I send you, in what chunks
    shares      inside the node    what the rails said; rows that I relay to each rank, and expect from each
    verdicts    over the rail      what is wrong on my node, if anything

After the shares all ranks of a node know the same, and whether any two ranks of the group disagree: each node sees
the signatures of all. What a node alone can know, the verdicts tell the others. So all go on, or all step back.

Legend: G nodes of L ranks, R = G L; rank n of node s is the n-th rank there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import NamedTuple, NoReturn, Protocol

import torch

from tokenferry.dataplane import DataPlane, Outputs, SendPlan, Signature, describe_difference
from tokenferry.errors import (
    ArgumentError,
    BufferStateError,
    CapacityError,
    MismatchError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    StepBackError,
    TokenferryError,
)
from tokenferry.modes.routes import KnownRoutes
from tokenferry.modes.shares import (
    CAPACITY,
    FINE,
    NODE,
    ROUTES,
    SIGNATURES,
    STAGE,
    WORDS,
    Offer,
    Share,
    Verdict,
    padded,
    parse_share,
)
from tokenferry.rail import Parts, Rail, RailError, Transfer
from tokenferry.stats import Recorder
from tokenferry.topology import Topology
from tokenferry.validation import MEMORY_BYTES, expert_out_of_range

_CPU = torch.device("cpu")
_OFFER_WORDS = len(Signature._fields) + 3


class Who(Protocol):
    """The part of a party that agreement needs."""

    @property
    def plane(self) -> DataPlane:
        """Reaches the ranks of the node."""

    @property
    def device(self) -> torch.device:
        """Where tensors live."""


class Nodes:
    """The way to the ranks on other nodes.

    Args:
        topology: who is where.
        rail: to the ranks of the same local index.
        exact: whether partial sums travel in float32.
        recorder: counts the waits for other nodes.
    """

    def __init__(self, topology: Topology, rail: Rail, exact: bool, recorder: Recorder) -> None:
        self.topology = topology
        self.rail = rail
        self.exact = exact
        self.recorder = recorder
        self._lock = threading.RLock()
        self.epoch = 0
        self.compared: set[Signature] = set()
        """Of low-latency operations, where they are compared but once."""
        self.routes = KnownRoutes(topology)

    @cached_property
    def others(self) -> list[int]:
        """The other nodes, the next one first: so that not all ranks begin with the same one."""
        here, count = self.topology.node, self.topology.num_nodes
        return [(here + step) % count for step in range(1, count)]

    @contextmanager
    def operation(self, who: Who, name: str, signature: Signature) -> Iterator[Operation]:
        """Run one operation among all ranks, or its first half. See :meth:`guarded`."""
        with self._lock:
            is_over = self.is_over(who.plane)
            self.epoch += 1
            self.rail.meanwhile = who.plane.advance
            operation = Operation(self, who, name, self.epoch, signature)
            with self.guarded(operation):
                if is_over:
                    raise self.end_of_rail()
                yield operation

    def is_over(self, plane: DataPlane) -> bool:
        """Raise what the data plane reports, unless the rail has ended: the plane may have been given garbage.

        Returns:
            Whether the rail has ended; the caller raises :meth:`end_of_rail`.
        """
        try:
            plane.check()
        except BaseException as error:
            is_told = isinstance(error, TokenferryError) and not isinstance(error, BufferStateError)
            if is_told and self.rail.failure is not None:
                return True
            if not isinstance(error, (ArgumentError, StepBackError)):
                self.rail.close()  # whatever made it unusable, the other nodes shall not wait for this rank
            raise
        return False

    def end_of_rail(self) -> RailError:
        """What has ended the rail."""
        failure = self.rail.failure
        assert failure is not None
        return failure

    @contextmanager
    def guarded(self, operation: Operation) -> Iterator[None]:
        """Run a part of an operation. If that fails after the agreement, no operation runs here any more."""
        plane = operation.who.plane
        with self._lock:
            error: BaseException | None = None
            plane.postpone_input_errors(True)
            try:
                yield
            except BaseException as caught:
                error = self._translated(caught, operation)
                has_stepped_back = operation.has_stepped_back or isinstance(error, StepBackError)
                if not (has_stepped_back and self._goes_on(operation)):
                    plane.give_up(f"{type(error).__name__}: {error}")
                    self.rail.close()
                if error is caught:
                    raise
                raise error from None
            finally:
                plane.postpone_input_errors(False)
                del error  # its traceback holds this frame

    @staticmethod
    def _goes_on(operation: Operation) -> bool:
        """Whether all ranks have stepped back, and nothing else is wrong."""
        if operation.is_agreed:
            return False
        try:
            operation.who.plane.check()
        except TokenferryError:
            return False
        return True

    def _translated(self, error: BaseException, operation: Operation) -> BaseException:
        """In terms of the operation, not of a part of it."""
        if isinstance(error, RailError):
            lost: type[PeerError] = PeerTimeoutError if error.timed_out else PeerLostError
            listed = {node: ", ".join(map(str, self.topology.ranks_of_node(node))) for node in error.nodes}
            named = " or ".join(f"node {node} (ranks {ranks})" for node, ranks in listed.items())
            reason = f"{named}, over the rail: {error}"
            return lost(operation.name, operation.epoch, [self.topology.rail[node] for node in error.nodes], reason)
        if isinstance(error, PeerError) and (error.operation, error.epoch) != (operation.name, operation.epoch):
            has_room = not (isinstance(error, CapacityError) and operation.is_agreed)  # else it is too late
            return (type(error) if has_room else PeerLostError)(
                operation.name, operation.epoch, error.ranks, error.reason
            )
        return error


class Operation:
    """One operation in progress.

    Attributes:
        who: takes part.
        signature: what all ranks must agree on.
        has_stepped_back: so have all others, and nothing is under way.
        is_agreed: others may count on it that this rank goes on: what fails from here on cannot be undone.
    """

    def __init__(self, nodes: Nodes, who: Who, name: str, epoch: int, signature: Signature) -> None:
        self.name = name
        self.epoch = epoch
        self.is_agreed = self.has_stepped_back = False
        self._nodes = nodes
        self.who = who
        self.signature = signature
        self._verdict = Verdict()
        self._offers: tuple[Transfer, dict[int, torch.Tensor]] | None = None
        self._verdicts: tuple[Transfer, dict[int, torch.Tensor]] | None = None
        self._told: list[Transfer] = []
        self._posted: list[Transfer] = []

    def post(self, sends: Parts, receives: Parts) -> Transfer:
        """See :meth:`tokenferry.rail.Rail.post`."""
        self._posted.append(self._counted(sends, receives))
        return self._posted[-1]

    def _counted(self, sends: Parts, receives: Parts) -> Transfer:
        return _Counted(self._nodes.rail.post(sends, receives), self._nodes, self.signature.operation)

    def _tell(self, words: Mapping[int, torch.Tensor], theirs: Mapping[int, torch.Tensor]) -> Transfer:
        """Begin to send words to the ranks of the rail, and to receive theirs."""
        sends, receives = ({node: [part] for node, part in of.items()} for of in (words, theirs))
        self._told.append(self._counted(sends, receives))
        return self._told[-1]

    def finish(self) -> None:
        """Wait until nothing that was posted is under way any more.

        Words first, that are out long since: what takes long goes on meanwhile.
        """
        for transfers in (self._told, self._posted):
            for transfer in transfers:
                transfer.finish()
            transfers.clear()

    def offer(self, num_rows: Sequence[int], chunks: Sequence[int]) -> None:
        """Begin to tell the ranks of the rail how many rows they get.

        Args:
            num_rows: [G].
            chunks: [G]: rows of a chunk.
        """
        words = {
            node: self._words([*self.signature, self.epoch, num_rows[node], chunks[node]])
            for node in self._nodes.others
        }
        theirs = {node: self._empty(_OFFER_WORDS) for node in self._nodes.others}
        self._offers = self._tell(words, theirs), theirs

    def offers(self) -> dict[int, Offer]:
        """What the ranks of the rail say about theirs.

        Returns:
            Their offers, of the nodes whose signature is the same as that of this rank. With the others nothing
            further is exchanged before the verdicts; all ranks step back in :meth:`share`.

        Raises:
            RailError: a rank of the rail is at another operation, or what it says makes no sense.
        """
        assert self._offers is not None
        transfer, theirs = self._offers
        for node in theirs:
            transfer.wait(node)
        offers = {}
        for node in sorted(theirs):
            *signature, epoch, rows, size = theirs[node].tolist()
            offer = Offer(Signature._make(signature), epoch, rows, size)
            is_possible = 0 <= rows < 1 << 31 and rows * self.signature.row_bytes < MEMORY_BYTES and size > 0
            if epoch != self.epoch or not is_possible:
                raise RailError([node], False, f"out of step: {offer}")
            if offer.signature == self.signature:
                offers[node] = offer
            elif self._verdict.kind == FINE:
                self._verdict = self._difference(node, offer.signature)
        return offers

    def compare(self) -> None:
        """Compare signatures along the rail, where nothing else is to be agreed on: what differs cannot be undone.

        Raises:
            MismatchError: a rank of the rail has another one.
        """
        self.is_agreed = True
        count = self._nodes.topology.num_nodes
        self.offer([0] * count, [1] * count)
        self.offers()
        if self._verdict.kind != FINE:
            self._tell_verdict(self._verdict)  # the others may be in an operation that has them
            self._others_verdicts()
        self.finish()
        if self._verdict.kind != FINE:
            self._raise(self._verdict)

    def _difference(self, node: int, theirs: Signature) -> Verdict:
        field = next(i for i, (a, b) in enumerate(zip(self.signature, theirs, strict=True)) if a != b)
        topology = self._nodes.topology
        mine, other = (topology.rank, self.signature[field]), (topology.rail[node], theirs[field])
        (low, given), (high, wanted) = sorted((mine, other))
        return Verdict(SIGNATURES, low, high, field, given, wanted)

    def check_routes(self, offers: Mapping[int, Offer], num_rows: Sequence[int]) -> None:
        """Compare the rows that come with those that this rank's handle has, [G]; :meth:`share` raises."""
        for node, offer in offers.items():
            if offer.num_rows != num_rows[node] and self._verdict.kind == FINE:
                topology = self._nodes.topology
                self._verdict = Verdict(ROUTES, topology.rank, topology.rail[node], 0, offer.num_rows, num_rows[node])

    def share(
        self,
        members: Sequence[torch.Tensor],
        chunks: Sequence[int],
        expected: Sequence[Sequence[int]],
        worst: int,
        extra: torch.Tensor | None,
        row_bytes: int,
    ) -> list[Share]:
        """Tell the ranks of the node what :class:`Share` has, and find out whether they all go on.

        If they do, the other nodes are being told so: what fails here from then on cannot be undone. Until
        :meth:`agree`, operations inside the node may run, and none on the rails may begin.

        Args:
            members: [G]: bool [rows, L], the ranks that each row goes to which this rank relays.
            chunks: as in :class:`Share`, like the rest.
            expected: or empty.
            worst: or 0.
            extra: of the operation, int [any], if there is some.
            row_bytes: of all that moves with a row inside the node.

        Returns:
            The shares of the ranks of the node.

        Raises:
            MismatchError, CapacityError: on every rank of this node; on the others :meth:`agree` raises it.
            ArgumentError: likewise, on a rank whose ids, looked at by the device, are out of range.
        """
        topology = self._nodes.topology
        num_rows = [len(member) for member in members]
        numbers = [member.sum(0) for member in members]
        if extra is not None:
            numbers.append(extra)
        is_alone = len(topology.local_ranks) == 1  # else the ranks of the node find out when they gather
        bad_input = self.who.plane.bad_input() if is_alone else None
        if bad_input is not None:
            numbers.append(bad_input)
        counts = torch.cat(numbers).tolist()  # at once, since a GPU stops for it
        has_bad_input = bad_input is not None and counts.pop() != 0
        counts, added = counts[: len(topology.places)], counts[len(topology.places) :]
        wanted = [count for row in expected for count in row]
        if self._verdict.kind == FINE and not self.who.plane.has_room(row_bytes):
            self._verdict = Verdict(STAGE, topology.rank)
        mine = [*self._verdict, *num_rows, *chunks, *counts, *wanted, worst, *added]
        shares, failure = [], None
        try:
            if has_bad_input:
                self.who.plane.forgive()
                raise expert_out_of_range()
            rows = self._gather(mine)
        except (StepBackError, ArgumentError) as error:
            failure = error
            found = self._verdict
            if found.kind != SIGNATURES:
                kind = STAGE if isinstance(error, CapacityError) else NODE
                found = Verdict(kind, topology.rank if isinstance(error, ArgumentError) else error.ranks[0])
        else:
            shape = topology.num_nodes, len(topology.local_ranks), bool(expected), self.signature.row_bytes
            shares = [parse_share(row, *shape) for row in rows]
            found = self._judge(shares)
        self._tell_verdict(found)
        if found.kind != FINE:
            self._others_verdicts()
            self.finish()
            if failure is not None:
                self.has_stepped_back = True
                raise failure
            self._raise(found)
        self.is_agreed = True
        return shares

    def agree(self) -> None:
        """Find out whether the ranks of all nodes go on.

        Raises:
            MismatchError, CapacityError: they do not. It is raised on every rank, and nothing is under way any more.
        """
        verdicts = self._others_verdicts()
        for node in sorted(verdicts):
            if verdicts[node].kind != FINE:
                self.finish()
                self.is_agreed = False
                self._raise(verdicts[node])

    def _tell_verdict(self, found: Verdict) -> None:
        """Begin to tell the ranks of the rail what is wrong on this node, and to learn the same of theirs."""
        theirs = {node: self._empty(len(found)) for node in self._nodes.others}
        self._verdicts = self._tell(dict.fromkeys(theirs, self._words(found)), theirs), theirs

    def _others_verdicts(self) -> dict[int, Verdict]:
        """What is wrong on the other nodes."""
        assert self._verdicts is not None
        transfer, theirs = self._verdicts
        for node in theirs:
            transfer.wait(node)
        return {node: Verdict._make(part.tolist()) for node, part in theirs.items()}

    def _gather(self, mine: Sequence[int]) -> list[list[int]]:
        """One row to every rank of the node: a dispatch, unless there is no other."""
        if len(self._nodes.topology.local_ranks) == 1:
            return [list(mine)]
        words = [*mine, *[0] * (padded(len(mine)) - len(mine))]
        device = self.who.device
        row = self._words(words).view(1, -1).to(device)
        count = len(self._nodes.topology.local_ranks)
        member = torch.ones((1, count), dtype=torch.bool, device=device)
        once = torch.ones(count, dtype=torch.int32, device=device)
        plan = SendPlan(row.view(torch.uint8), None, None, None, member, once, once, 0, None)
        rows = torch.empty((count, len(words)), dtype=WORDS, device=device)
        with self.who.plane.dispatch(self.signature, plan) as exchange:
            exchange.pull(Outputs(rows.view(torch.uint8), None, None, None, torch.empty_like(once)))
        found: list[list[int]] = rows.tolist()
        return found

    def _judge(self, shares: Sequence[Share]) -> Verdict:
        """The first thing that is wrong on this node."""
        topology = self._nodes.topology
        for share in shares:
            if share.verdict.kind == SIGNATURES:
                return share.verdict
        for share in shares:
            if share.verdict.kind != FINE:
                return share.verdict
        for reader, share in enumerate(shares):
            rank = topology.local_ranks[reader]
            received = sum(relay.counts[node][reader] for relay in shares for node in range(topology.num_nodes))
            if share.worst and share.worst < received:
                return Verdict(CAPACITY, rank, 0, 0, share.worst, received)
            for index, relay in enumerate(shares):
                for node in range(topology.num_nodes):
                    given = relay.counts[node][reader]
                    if share.expected and share.expected[node][index] != given:
                        source = topology.ranks_of_node(node)[index]
                        return Verdict(ROUTES, rank, source, 0, given, share.expected[node][index])
        return Verdict()

    def _raise(self, verdict: Verdict) -> NoReturn:
        kind, rank, other, field, given, wanted = verdict
        if kind == SIGNATURES:
            changed = list(self.signature)
            changed[field] = given
            one = Signature._make(changed)
            changed[field] = wanted
            reason = describe_difference(rank, one, other, Signature._make(changed))
            raise MismatchError(self.name, self.epoch, [other], reason)
        if kind == NODE:
            reason = "gave expert ids out of range, or disagrees with ranks of its node"
            raise MismatchError(self.name, self.epoch, [rank], reason)
        if kind == CAPACITY:
            reason = f"num_worst_tokens: got {given}; allowed: at least the {wanted} rows it receives"
            raise CapacityError(self.name, self.epoch, [rank], reason)
        if kind == STAGE:
            raise CapacityError(self.name, self.epoch, [rank], "no shared memory for the stage")
        reason = f"ranks disagree on handle: rank {other} has {given} rows for it, its own has {wanted}"
        raise MismatchError(self.name, self.epoch, [rank], reason)

    def _words(self, words: Sequence[int]) -> torch.Tensor:
        return torch.tensor(words, dtype=WORDS, device=_CPU)

    def _empty(self, count: int) -> torch.Tensor:
        return torch.empty(count, dtype=WORDS, device=_CPU)


class _Counted(NamedTuple):
    """A transfer whose waits are counted."""

    transfer: Transfer
    nodes: Nodes
    kind: int

    def wait(self, node: int) -> None:
        started = time.monotonic_ns()
        try:
            self.transfer.wait(node)
        finally:
            waited = time.monotonic_ns() - started
            self.nodes.recorder.waited(self.kind, waited, {self.nodes.topology.rail[node]: waited})

    def finish(self) -> None:
        self.transfer.finish()

    def settle(self) -> None:
        self.transfer.settle()
