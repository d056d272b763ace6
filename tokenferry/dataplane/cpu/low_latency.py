"""The low-latency pair on CPU ranks: one message an operation, sent at once, received when its hook is called.

A dispatch message holds the sender's expert ids [T, K] and its rows, each once, whoever reads it; every receiver
finds the rows of its experts in the ids. A combine message holds, for reader after reader, the rows of that
reader's tokens with (token, expert) beside each.

Receives of one rank finish in the order of their sends, because a ring is read in order: finishing one finishes
those before it, whose outputs then merely are ready early. So any number of operations may be in flight, up to the
room in the stage and the header slots, and hooks may be called in any order.

Legend of dims: T tokens of a source, N most tokens of a rank, K choices, L local experts, R ranks.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from tokenferry.dataplane import (
    LowLatencyCombinePlan,
    LowLatencyDispatchPlan,
    Relays,
    ScaleFormat,
    Signature,
    describe_difference,
)
from tokenferry.dataplane.cpu.exchange import Head, check_range, ints_of, offsets, parse, rows_of
from tokenferry.dataplane.cpu.fp8 import pack_ue8m0, quantise
from tokenferry.errors import HeapError, MismatchError, PeerLostError, PeerTimeoutError
from tokenferry.memory.heap import Heap
from tokenferry.memory.operation import Operation

logger = logging.getLogger("tokenferry")
_CPU = torch.device("cpu")
_MESSAGES_IN_STAGE = 4
_NOWHERE = 1 << 62


class PendingReceives:
    """The receives of one rank that have not run, in the order of their sends."""

    def __init__(self, heap: Heap) -> None:
        self._heap = heap
        self._queue: deque[Receive] = deque()

    def add(self, receive: Receive) -> None:
        """Put the receive of an operation that has just been sent behind the others."""
        self._queue.append(receive)

    def finish(self, until: Receive | None = None) -> None:
        """Run the receives up to ``until``, or all of them."""
        if not self._queue or (until is not None and until.is_finished):
            return
        with self._heap.guarded():
            while self._queue and (until is None or not until.is_finished):
                self._queue[0].run()
                self._queue.popleft()

    def advance(self) -> bool:
        """Run those of the next receives that need no waiting; returns whether there was one."""
        advanced = False
        while self._queue and not self._queue[0].waiting_for():
            self._queue.popleft().run()
            advanced = True
        return advanced

    def discard(self, epoch: int) -> None:
        """Release the messages that no operation up to ``epoch`` asks for: those of ranks masked in between."""
        for peer in self._heap.active_peers():
            wanted = (receive.operation.epoch for receive in self._queue if receive.asks(peer))
            self._heap.next_message(peer, next(wanted, epoch))

    def waiting_for(self) -> list[int]:
        """The peers that the next receive waits for."""
        return self._queue[0].waiting_for() if self._queue else []


class Receive(ABC):
    """One low-latency operation of one rank: sends on construction's heels, receives later."""

    def __init__(self, heap: Heap, operation: Operation, signature: Signature, earlier: PendingReceives) -> None:
        self.heap = heap
        self.operation = operation
        self.operation.kind = signature.operation
        self.signature = signature
        self.is_finished = False
        self._sent_to: dict[int, int] = {}
        """For each peer that it was sent to, how often that had been masked."""
        self._earlier = earlier

    def send(self, num_rows: int, sizes: Sequence[int], ranges: dict[int, tuple[int, int]]) -> torch.Tensor:
        """Wait for room in the stage; returns the payload, to be filled before :meth:`publish`."""
        self._sections = offsets(sizes)
        nbytes = max(self._sections[-1], 1)
        self.heap.ensure_stage(_MESSAGES_IN_STAGE * nbytes, nbytes)
        self._head = (nbytes, num_rows, ranges)
        self._offset: int | None = None

        def step() -> tuple[bool, Sequence[int]]:
            self._offset = self.heap.try_reserve(nbytes)
            if self._offset is not None:
                return True, ()
            # Peers may be waiting for room too, until this rank reads what they sent before. A peer that did not
            # send that is to blame, not those that wait for it like this rank.
            advanced = self._earlier.advance()
            self._earlier.discard(self.operation.epoch)
            to_blame = self._earlier.waiting_for() or self.heap.readers_in_the_way() or self.heap.active_peers()
            return advanced, to_blame

        self._survive(step)
        assert self._offset is not None
        return self.heap.stage_view(self.heap.rank, self._offset, nbytes)

    def publish(self) -> None:
        """Publish what :meth:`send` made room for."""
        nbytes, num_rows, ranges = self._head
        assert self._offset is not None
        fields = {}
        for peer in self.heap.active_peers():
            head = Head(self.operation.epoch, 0, 1, self._offset, nbytes, num_rows, *ranges[peer], 0)
            fields[peer] = (*head, *self.signature)
        self._sent_to = {peer: self.heap.times_masked(peer) for peer in fields}
        self.heap.recorder.staged(self.operation.kind, nbytes)
        self.heap.publish(fields)

    def run(self) -> None:
        """Wait for the messages of all ranks that are not masked, and write the outputs."""
        heads, waited = self._gather()
        self.read(heads, waited)
        for peer in heads:
            self.heap.release(peer)
        self.is_finished = True
        self.forget()

    def waiting_for(self) -> list[int]:
        """The peers whose messages it needs and that are not here."""
        return [peer for peer in self._senders() if self._look_for_message(peer) is None and peer in self._sent_to]

    def asks(self, peer: int) -> bool:
        """Whether it needs a message of this peer."""
        return peer in self._senders()

    def _senders(self) -> list[int]:
        """The peers whose messages it needs. One that was masked in between is not asked again when taken back."""
        return [peer for peer, times in self._sent_to.items() if self.heap.times_masked(peer) == times]

    def _gather(self) -> tuple[dict[int, Head], dict[int, int]]:
        heads: dict[int, Head] = {}
        waited: dict[int, int] = {}
        started = time.monotonic_ns()

        def step() -> tuple[bool, Sequence[int]]:
            arrived = False
            missing = []
            for peer in self._senders():
                if peer in heads:
                    continue
                head = self._look_for_message(peer)
                if head is None:
                    missing += [peer] if peer in self._sent_to else []
                else:
                    heads[peer] = head
                    waited[peer] = max(1, time.monotonic_ns() - started)
                    arrived = True
            return arrived, missing

        self._survive(step)
        return heads, waited

    def _look_for_message(self, peer: int) -> Head | None:
        message = self.heap.next_message(peer, self.operation.epoch)
        if message is None:
            return None
        head, theirs = parse(message)
        names = self.heap.names
        reason = describe_difference(names[self.heap.rank], self.signature, names[peer], theirs)
        if head.epoch != self.operation.epoch:
            if self.heap.may_mask:  # it went on without this rank for a while: nothing of this operation comes
                del self._sent_to[peer]
                return None
            reason = f"it is at operation {head.epoch} already"
        if reason:
            error = MismatchError(self.operation.name, self.operation.epoch, [names[peer]], reason)
            self.heap.fail(str(error))  # nobody has agreed to step back here
            raise error
        return head

    def _survive(self, step: Callable[[], tuple[bool, Sequence[int]]]) -> None:
        """Run ``step`` to its end; where masking is enabled, mask the ranks that fail and go on without them."""
        while True:
            try:
                self.operation.run(step)
            except (PeerLostError, PeerTimeoutError) as error:
                if not self.heap.may_mask:
                    raise
                logger.warning("%s; masking it", error)
                self.heap.set_masked(error.ranks, True)
            else:
                return

    @abstractmethod
    def read(self, heads: dict[int, Head], waited: dict[int, int]) -> None:
        """Write the outputs from the messages at hand."""

    def note_read(self, peer: int, nbytes: int) -> None:
        """Count bytes that were read of a peer's message."""
        self.heap.recorder.read(self.operation.kind, self.heap.names[peer], nbytes)

    @abstractmethod
    def forget(self) -> None:
        """Drop all references to the caller's tensors."""


class DispatchReceive(Receive):
    """A low-latency dispatch."""

    def __init__(
        self,
        heap: Heap,
        operation: Operation,
        signature: Signature,
        plan: LowLatencyDispatchPlan,
        earlier: PendingReceives,
    ) -> None:
        super().__init__(heap, operation, signature, earlier)
        self._plan: LowLatencyDispatchPlan | None = plan
        num_tokens = plan.topk_idx.size(0)
        staged = [plan.topk_idx, *_columns_of(plan)]
        self._widths = [column.size(1) * column.element_size() for column in staged]
        self._dtypes = [column.dtype for column in staged]
        sizes = [num_tokens * width for width in self._widths]
        payload = self.send(num_tokens, sizes, dict.fromkeys(range(heap.num_ranks), (0, num_tokens)))
        for column, width, section in zip(staged, self._widths, offsets(sizes)[:-1], strict=True):
            rows_of(payload, section, num_tokens, width).view(column.dtype).copy_(column)
        # The caller may overwrite its tensors as soon as they are sent.
        self._own = self._rows_for_me(plan, staged)
        self.publish()

    def read(self, heads: dict[int, Head], waited: dict[int, int]) -> None:
        """See :meth:`Receive.read`."""
        plan = self._plan
        assert plan is not None
        begin = torch.zeros(plan.num_local_experts, dtype=torch.int64, device=_CPU)
        here = {self.heap.rank: self._own}
        for peer, head in heads.items():
            here[peer] = self._rows_for_me(plan, self._message_of(peer, head))
            self.note_read(peer, head.num_rows * self._widths[0] + sum(column.nbytes for column in here[peer][2]))
        for source, (relay, first, end) in enumerate(sources_of(plan.relays, self.heap.num_ranks)):
            if relay not in here:
                plan.layout_range[:, source] = begin << 32
                continue
            experts, tokens, columns = here[relay]
            if plan.relays is not None:
                its = ((tokens >= first) & (tokens < end)).nonzero().flatten()
                experts, tokens, columns = experts[its], tokens[its] - first, [column[its] for column in columns]
            counts = torch.bincount(experts, minlength=plan.num_local_experts)
            most = plan.num_max_tokens if plan.relays is None else plan.relays.num_max_tokens
            check_range("choices of one expert", counts, 0, most + 1)
            before = counts.cumsum(0) - counts
            slots = begin[experts] + torch.arange(len(experts), device=_CPU) - before[experts]
            plan.recv_src_info[experts, slots] = tokens.to(torch.int32)
            outs = [plan.recv_x] if plan.recv_scales is None else [plan.recv_x, plan.recv_scales]
            for column, out in zip(columns, outs, strict=True):
                indexable(out)[experts, slots] = column
            plan.layout_range[:, source] = (begin << 32) | counts
            begin += counts
        plan.recv_count.copy_(begin)
        if plan.recv_stats is not None:
            plan.recv_stats.add_(begin)
        add_waits(plan.wait_stats, waited)

    @staticmethod
    def _rows_for_me(
        plan: LowLatencyDispatchPlan, staged: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """The rows of a source for the local experts, expert by expert: expert and token of each, and copies."""
        ids, *columns = staged
        local = ids - plan.first_expert
        chosen = ((local >= 0) & (local < plan.num_local_experts)).nonzero()
        experts = local[chosen[:, 0], chosen[:, 1]]
        order = experts.argsort(stable=True)
        experts, tokens = experts[order], chosen[order, 0]
        return experts, tokens, [indexable(column)[tokens] for column in columns]

    def _message_of(self, source: int, head: Head) -> list[torch.Tensor]:
        num_rows = head.num_rows
        assert self._plan is not None
        sections = offsets([num_rows * width for width in self._widths])
        if max(sections[-1], 1) != head.nbytes or num_rows > self._plan.num_max_tokens:
            raise HeapError(f"rank {self.heap.names[source]} sent a message that contradicts itself: {head}")
        payload = self.heap.stage_view(source, head.offset, head.nbytes)
        return [
            rows_of(payload, section, num_rows, width).view(dtype)
            for dtype, width, section in zip(self._dtypes, self._widths, sections[:-1], strict=True)
        ]

    def forget(self) -> None:
        """See :meth:`Receive.forget`."""
        self._plan = None
        del self._own


class CombineReceive(Receive):
    """A low-latency combine."""

    def __init__(
        self,
        heap: Heap,
        operation: Operation,
        signature: Signature,
        plan: LowLatencyCombinePlan,
        earlier: PendingReceives,
    ) -> None:
        super().__init__(heap, operation, signature, earlier)
        self._plan: LowLatencyCombinePlan | None = plan
        self._row_bytes = plan.x.size(2) * plan.x.element_size()
        lists = [self._lists_for(reader) for reader in range(heap.num_ranks)]
        slots = [of_reader[2] for of_reader in lists]
        self._own = lists[heap.rank][:2]
        self._own_rows = plan.x.view(-1, plan.x.size(2))[slots[heap.rank]]
        peers = heap.active_peers()
        ranges = {}
        num_rows = 0
        for peer in peers:
            ranges[peer] = (num_rows, len(slots[peer]))
            num_rows += len(slots[peer])
        payload = self.send(num_rows, self._sizes(num_rows), ranges)
        tokens, experts, rows = self._parts(payload, num_rows)
        flat = plan.x.view(torch.uint8).view(-1, self._row_bytes)
        for peer in heap.active_peers():
            start, length = ranges[peer]
            if not length:
                continue
            part = slice(start, start + length)
            tokens[part], experts[part] = lists[peer][:2]
            torch.index_select(flat, 0, slots[peer], out=rows[part])
        self.publish()

    def _sizes(self, num_rows: int) -> list[int]:
        return [4 * num_rows, 4 * num_rows, num_rows * self._row_bytes]

    def _parts(self, payload: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sections = offsets(self._sizes(num_rows))
        return (
            ints_of(payload, sections[0], num_rows),
            ints_of(payload, sections[1], num_rows),
            rows_of(payload, sections[2], num_rows, self._row_bytes),
        )

    def _lists_for(self, reader: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Token, expert and place in the [L * slab] slabs of each row for a rank of the node, expert by expert."""
        plan = self._plan
        assert plan is not None
        slab = plan.src_info.size(1)
        tokens, experts, slots = [], [], []
        for source, (relay, first, _) in enumerate(sources_of(plan.relays, self.heap.num_ranks)):
            if relay != reader:
                continue
            its = self._slots_of(source, slab)
            tokens.append(plan.src_info.view(-1)[its] + first)
            experts.append((its.div(slab, rounding_mode="floor") + plan.first_expert).to(torch.int32))
            slots.append(its)
        return torch.cat(tokens), torch.cat(experts), torch.cat(slots)

    def _slots_of(self, source: int, slab: int) -> torch.Tensor:
        """int64: the rows of the [L * slab] slabs that came from a source rank, expert by expert."""
        assert self._plan is not None
        ranges = self._plan.layout_range[:, source]
        counts = ranges & 0xFFFFFFFF
        starts = torch.arange(len(ranges), device=_CPU) * slab + (ranges >> 32)
        before = counts.cumsum(0) - counts
        return torch.repeat_interleave(starts - before, counts) + torch.arange(int(counts.sum()), device=_CPU)

    def read(self, heads: dict[int, Head], waited: dict[int, int]) -> None:
        """See :meth:`Receive.read`."""
        plan = self._plan
        assert plan is not None
        num_tokens, num_topk = plan.topk_idx.shape
        most = plan.src_info.size(1) // self.heap.num_ranks  # of the dispatch, whose T may have been larger
        rows: list[torch.Tensor] = []
        where = torch.full((plan.num_experts * most,), _NOWHERE, dtype=torch.int64, device=_CPU)
        num_rows = 0
        for rank in range(self.heap.num_ranks):
            if rank == self.heap.rank:
                (tokens, experts), part = self._own, self._own_rows
            elif rank in heads:
                tokens, experts, part = self._message_of(rank, heads[rank])
                self.note_read(rank, len(part) * (8 + self._row_bytes))
            else:
                continue
            # Equal choices of a token have a row each: the first one stands for all.
            at = experts.long() * most + tokens.long()
            where.scatter_reduce_(0, at, num_rows + torch.arange(len(at), device=_CPU), "amin")
            rows.append(part)
            num_rows += len(at)
        total = torch.zeros((num_tokens, plan.out.size(1)), dtype=torch.float32, device=_CPU)
        all_rows = torch.cat(rows) if rows else plan.out[:0]
        token = torch.arange(num_tokens, device=_CPU)
        for choice in range(num_topk):
            ids = plan.topk_idx[:, choice]
            row = where[ids.clamp(min=0) * most + token]
            have = ((ids >= 0) & (row < _NOWHERE)).nonzero().flatten()
            total[have] += plan.topk_weights[have, choice, None] * all_rows[row[have]].float()
        plan.out.copy_(total)
        add_waits(plan.wait_stats, waited)

    def _message_of(self, rank: int, head: Head) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        assert self._plan is not None
        is_outside = head.start + head.length > head.num_rows
        if max(offsets(self._sizes(head.num_rows))[-1], 1) != head.nbytes or is_outside:
            raise HeapError(f"rank {self.heap.names[rank]} sent a message that contradicts itself: {head}")
        payload = self.heap.stage_view(rank, head.offset, head.nbytes)
        tokens, experts, rows = self._parts(payload, head.num_rows)
        part = slice(head.start, head.start + head.length)
        check_range("tokens", tokens[part], 0, self._plan.src_info.size(1) // self.heap.num_ranks)
        share = len(self._plan.layout_range)
        first = self.heap.names[rank] * share
        check_range("experts", experts[part], first, first + share)
        return tokens[part], experts[part], rows[part].view(self._plan.x.dtype)

    def forget(self) -> None:
        """See :meth:`Receive.forget`."""
        self._plan = None
        del self._own_rows


def sources_of(relays: Relays | None, num_ranks: int) -> Iterator[tuple[int, int, int]]:
    """For every source rank: the rank of the node that sends its tokens, and which of that one's these are."""
    if relays is None:
        yield from ((rank, 0, _NOWHERE) for rank in range(num_ranks))
    else:
        for relay, place in relays.order:
            yield relay, place * relays.num_max_tokens, (place + 1) * relays.num_max_tokens


def _columns_of(plan: LowLatencyDispatchPlan) -> list[torch.Tensor]:
    """What travels with a token: [T, width] each."""
    if plan.scale_format == ScaleFormat.NONE:
        return [plan.x]
    data, scales = quantise(plan.x, round_scale=plan.scale_format != ScaleFormat.PLAIN)
    return [data, pack_ue8m0(scales) if plan.scale_format == ScaleFormat.UE8M0 else scales]


def indexable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, FP8 as bytes: torch does not index FP8 on the CPU in every version."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def add_waits(stats: torch.Tensor | None, waited: dict[int, int]) -> None:
    """Add the nanoseconds waited for each rank to int64 [R] statistics, if there are any."""
    if stats is not None:
        for rank, nanoseconds in waited.items():
            stats[rank] += nanoseconds
