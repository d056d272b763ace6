"""Dispatch on CPU ranks.

Rank s to rank r, tokens 0, 2 and 3 of s going to r (token 1 stays at s, so it is never staged)::

    stage of s   tokens for r   [0, 2, 3]      positions for r [0, 1, 2]     staged rows [x0, x2, x3]
    output of r  rows base_s .. base_s + 3 = staged rows[positions],  recv_src_idx = tokens

A message holds, 128-aligned: the counts of s (first message only: rows for each rank, choices of each expert, rows
of a fixed-size output, and where rows are expanded such rows of a fixed-size output and the alignment), the token ids
and the positions for all readers, reader after reader, then each column.
A later round holds the next range of staged rows; positions count from its first row.

Legend of dims: T tokens of this rank, R ranks, E experts, M received rows, W bytes of one column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenferry.dataplane import ExpertPlan, Outputs, SendPlan, Signature
from tokenferry.dataplane.cpu.exchange import Exchange, check_range, ints_of, offsets, rows_of
from tokenferry.dataplane.cpu.expert_major import CopyMap, ends_of, num_expanded, write_sources
from tokenferry.errors import CapacityError, HeapError
from tokenferry.memory.heap import Heap
from tokenferry.memory.operation import Operation
from tokenferry.validation import MEMORY_BYTES

_CPU = torch.device("cpu")


class Dispatch(Exchange):
    """One dispatch of one rank; see :class:`tokenferry.dataplane.DispatchExchange`."""

    num_rows: int
    num_received_per_expert: list[int]
    rank_prefix_matrix: torch.Tensor
    num_expanded_rows = 0
    num_pairs: torch.Tensor
    expert_ends: torch.Tensor

    def __init__(self, heap: Heap, operation: Operation, signature: Signature, plan: SendPlan) -> None:
        super().__init__(heap, operation, signature)
        self._plan = plan
        self._columns = columns_of(plan)
        member = plan.is_token_in_rank
        num_tokens = member.size(0)
        self.send_head = member.cumsum(0, dtype=torch.int32).sub_(1).masked_fill_(~member, -1)
        self._tokens = [member[:, rank].nonzero().flatten() for rank in range(self.num_ranks)]
        remote = member.clone()
        remote[:, self.rank] = False
        self._staged = remote.any(1).nonzero().flatten()
        position = torch.empty(num_tokens, dtype=torch.int32, device=_CPU)
        position[self._staged] = torch.arange(len(self._staged), dtype=torch.int32, device=_CPU)
        self._positions = [position[tokens] for tokens in self._tokens]
        sent = torch.tensor([len(tokens) for tokens in self._tokens], dtype=torch.int32, device=_CPU)
        self.channel_prefix_matrix = sent.view(-1, 1)
        self.recv_channel_prefix_matrix = torch.zeros_like(self.channel_prefix_matrix)
        per_expert = sent[:0] if plan.num_tokens_per_expert is None else plan.num_tokens_per_expert
        self._num_experts = len(per_expert)
        limits = [plan.num_worst_tokens]
        if plan.experts is not None and plan.experts.expand:
            limits += [plan.experts.num_worst_rows, plan.experts.alignment]
        self._counts = torch.cat([sent, per_expert, torch.tensor(limits, dtype=torch.int32, device=_CPU)])
        self._plan_rounds()

    def _plan_rounds(self) -> None:
        num_staged = len(self._staged)
        row_bytes = sum(column.size(1) for column in self._columns) + 8 * len(self.peers)
        fixed_bytes = self._sections(len(self._counts), 0, 0)[-1] + 128 * (len(self._columns) + 2)
        room = self.message_room(fixed_bytes + num_staged * row_bytes, fixed_bytes + row_bytes)
        step = (room - fixed_bytes) // row_bytes
        self._bounds = [*range(0, max(num_staged, 1), step), num_staged]
        self.num_rounds = len(self._bounds) - 1
        edges = torch.tensor(self._bounds, dtype=torch.int32, device=_CPU)
        self._cuts = [
            torch.searchsorted(self._positions[rank], edges).tolist() if rank != self.rank else []
            for rank in range(self.num_ranks)
        ]

    def _sections(self, num_counts: int, num_entries: int, num_rows: int) -> list[int]:
        sizes = [4 * num_counts, 4 * num_entries, 4 * num_entries]
        return offsets(sizes + [num_rows * column.size(1) for column in self._columns])

    def stage_round(self, this: int) -> bool:
        """See :meth:`Exchange.stage_round`."""
        low, high = self._bounds[this], self._bounds[this + 1]
        counts = self._counts if this == 0 else self._counts[:0]
        lists = [(rank, self._cuts[rank][this], self._cuts[rank][this + 1]) for rank in self.peers]
        num_entries = sum(end - start for _, start, end in lists)
        sections = self._sections(len(counts), num_entries, high - low)
        offset = self.heap.try_reserve(sections[-1])
        if offset is None:
            return False
        payload = self.heap.stage_view(self.rank, offset, sections[-1])
        ints_of(payload, sections[0], len(counts)).copy_(counts)
        ranges: dict[int, tuple[int, int]] = {}
        entry = 0
        for rank, start, end in lists:
            count = end - start
            ints_of(payload, sections[1] + 4 * entry, count).copy_(self._tokens[rank][start:end])
            torch.sub(self._positions[rank][start:end], low, out=ints_of(payload, sections[2] + 4 * entry, count))
            ranges[rank] = (entry, count)
            entry += count
        tokens = self._staged[low:high]
        for column, section in zip(self._columns, sections[3:-1], strict=True):
            take_rows(column, tokens, rows_of(payload, section, high - low, column.size(1)))
        self.publish(offset, sections[-1], num_rows=high - low, ranges=ranges, bound=num_entries)
        return True

    def check_agreement(self) -> None:
        """Compare signatures, derive the counts of all ranks from them, and check fixed-size outputs."""
        super().check_agreement()
        counts = torch.stack([self._counts_of(rank) for rank in range(self.num_ranks)])
        check_range("counts", counts.flatten(), 0, 1 << 31)
        rows = counts[:, : self.num_ranks].sum(0)
        check_range("so many rows", rows * max(1, self._columns[0].size(1)), 0, MEMORY_BYTES)
        self.rank_prefix_matrix = counts[:, : self.num_ranks].cumsum(0, dtype=torch.int32)
        per_source, limits = counts[:, self.num_ranks :].tensor_split([self._num_experts], 1)
        worst, handle = self._plan.num_worst_tokens, self._plan.handle
        per_expert = per_source.sum(0).tolist()
        num_local = len(per_expert) // self.num_ranks
        if self._plan.experts is not None:
            num_local = self._plan.experts.num_local
        share = range(self.rank * num_local, (self.rank + 1) * num_local)
        part = self._plan.part
        self._experts = share if part is None or part.expert_ids is None else part.expert_ids
        self.num_received_per_expert = [] if worst else per_expert[share.start : share.stop]
        needed = self.rank_prefix_matrix[-1].tolist()
        self.num_rows = (worst or needed[self.rank]) if handle is None else len(handle.recv_src_idx)
        if handle is not None and needed[self.rank] > self.num_rows:
            raise HeapError(f"peers send {needed[self.rank]} rows, the handle has {self.num_rows}")
        self._check_room("num_worst_tokens", limits[:, 0].tolist(), needed)
        if self._plan.experts is not None:
            self._lay_out_experts(self._plan.experts, per_source, limits)

    def _lay_out_experts(self, plan: ExpertPlan, per_source: torch.Tensor, limits: torch.Tensor) -> None:
        """What the outputs need to know of the experts."""
        if self._plan.handle is not None:
            self.num_expanded_rows = plan.num_worst_rows
            return
        self._pairs = per_source[:, self._experts.start : self._experts.stop].long()
        self.rank_ends = self.rank_prefix_matrix[:, self.rank].contiguous()
        self.num_pairs = self._pairs.sum(0, dtype=torch.int32)
        self.expert_ends = ends_of(self.num_pairs, plan.alignment, plan.expand)
        if plan.expand:
            pairs = per_source.sum(0).view(self.num_ranks, -1).tolist()
            needed = [num_expanded(mine, a) for mine, a in zip(pairs, limits[:, 2].tolist(), strict=True)]
            self.num_expanded_rows = plan.num_worst_rows or needed[self.rank]
            self._check_room("expanded rows", limits[:, 1].tolist(), needed)

    def _check_room(self, what: str, given: list[int], needed: list[int]) -> None:
        """Step back where the outputs of some rank have a fixed size that is too small."""
        full = [rank for rank in range(self.num_ranks) if 0 < given[rank] < needed[rank]]
        if full and self._plan.handle is None:
            rank = full[0]
            reason = f"{what}: got {given[rank]}; allowed: at least the {needed[rank]} rows it receives"
            raise self.step_back(CapacityError, full, reason)

    def _counts_of(self, rank: int) -> torch.Tensor:
        return self._counts if rank == self.rank else ints_of(self.payload(rank), 0, len(self._counts))

    def pull(self, outputs: Outputs) -> bool:
        """See :meth:`tokenferry.dataplane.DispatchExchange.pull`."""
        self._out = outputs
        self._outputs = columns_of(outputs)
        self.row_bytes = sum(column.size(1) for column in self._columns) + 8
        ends = self.rank_prefix_matrix[:, self.rank].tolist()
        self._filled = [0, *ends[:-1]]
        self._ends = ends
        self._first_tokens = [0] * self.num_ranks
        part = self._plan.part
        if part is None:
            _mark_unused(outputs, ends[-1], self._plan.zero_unused)
        else:
            counts = [end - start for start, end in zip(self._filled, ends, strict=True)]
            self._filled = part.starts.tolist()
            self._ends = [start + count for start, count in zip(self._filled, counts, strict=True)]
            self._first_tokens = part.first_tokens.tolist()
        self._first_round = set(self.peers)
        own = self._tokens[self.rank]
        self._copies = self._copy_map(outputs)
        if self._copies is None and max(self._ends) > len(outputs.rows):
            raise HeapError(f"peers send rows up to {max(self._ends)}, the outputs have {len(outputs.rows)}")
        self._deliver(self.rank, self._columns, own, own)
        self.drive()
        if self._copies is not None:
            self._copies.finish()
        if part is not None:
            part.starts.copy_(torch.tensor(self._filled, device=_CPU))
        return True

    def _copy_map(self, outputs: Outputs) -> CopyMap | None:
        plan = self._plan.experts
        if plan is None or not plan.expand:
            return None
        if self._plan.handle is None:
            return CopyMap(plan, self._experts, outputs, self.expert_ends, self._pairs)
        assert plan.expert_ends is not None
        return CopyMap(plan, self._experts, outputs, plan.expert_ends, None)

    def _deliver(
        self, source: int, columns: Sequence[torch.Tensor], rows: torch.Tensor, tokens: torch.Tensor
    ) -> None:
        """Write a source's next rows to their place: ``rows`` of the columns, which are those of its ``tokens``."""
        start = self._filled[source]
        end = self._filled[source] = start + len(rows)
        if self._out.recv_src_idx is not None:
            torch.add(tokens, self._first_tokens[source], out=self._out.recv_src_idx[start:end])
        if self._out.metadata is not None and self._plan.experts is not None:
            ids = columns[-2].index_select(0, rows).view(torch.int64)
            most = self._plan.experts.num_max_tokens
            write_sources(self._out.metadata[start:end], source, tokens, ids, self._experts, most)
        if self._copies is not None:
            self._copies.deliver(source, columns, rows, start)
            return
        for column, output in zip(columns, self._outputs, strict=True):
            take_rows(column, rows, output[start:end])
        if self._out.topk_idx is not None and self._out.topk_weights is not None:
            localise(self._out.topk_idx[start:end], self._out.topk_weights[start:end], self._experts)

    def read(self) -> bool:
        """See :meth:`Exchange.read`."""
        ready = sorted(self.heads)
        for peer in ready:
            self._read_message(peer)
            self.release(peer)
        return bool(ready)

    def _read_message(self, peer: int) -> None:
        head = self.heads[peer]
        num_counts = len(self._counts) if peer in self._first_round else 0
        self._first_round.discard(peer)
        sections = self._sections(num_counts, head.bound, head.num_rows)
        end = self._filled[peer] + head.length
        if sections[-1] != head.nbytes or head.start + head.length > head.bound or end > self._ends[peer]:
            raise HeapError(f"rank {self.heap.names[peer]} sent a message that contradicts its counts: {head}")
        payload = self.payload(peer)
        tokens = ints_of(payload, sections[1] + 4 * head.start, head.length)
        positions = ints_of(payload, sections[2] + 4 * head.start, head.length)
        check_range("positions", positions, 0, head.num_rows)
        columns = [
            rows_of(payload, section, head.num_rows, column.size(1))
            for column, section in zip(self._columns, sections[3:-1], strict=True)
        ]
        self._deliver(peer, columns, positions, tokens)


def columns_of(payloads: SendPlan | Outputs) -> list[torch.Tensor]:
    """uint8 [n, W]: the rows, then the other payloads that travel, in the order of both messages and outputs."""
    tensors = (payloads.rows, payloads.scales, payloads.topk_idx, payloads.topk_weights)
    return [tensor.view(torch.uint8) for tensor in tensors if tensor is not None]


def _mark_unused(outputs: Outputs, start: int, zero_rows: bool) -> None:
    """Set the rows from ``start`` on to what rows past the last received one have."""
    for tensor in (outputs.recv_src_idx, outputs.metadata, outputs.topk_idx):
        if tensor is not None:
            tensor[start:].fill_(-1)
    if outputs.topk_idx is not None and outputs.topk_weights is not None:
        outputs.topk_weights[start:].fill_(0)
    if zero_rows:
        for rows in (outputs.rows, outputs.scales):
            if rows is not None:
                rows[start:].view(torch.uint8).zero_()


def localise(topk_idx: torch.Tensor, topk_weights: torch.Tensor, experts: range) -> None:
    """Turn global expert ids into local ones in place: -1, with weight 0, where the expert is not in ``experts``."""
    topk_idx.sub_(experts.start)
    elsewhere = (topk_idx < 0) | (topk_idx >= len(experts))
    topk_idx.masked_fill_(elsewhere, -1)
    topk_weights.masked_fill_(elsewhere, 0.0)


def take_rows(source: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """``out = source[rows]`` for ascending ``rows``; one plain copy where they are a run."""
    if not len(rows):
        return
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        out.copy_(source[first : last + 1])
    else:
        torch.index_select(source, 0, rows, out=out)
