"""Combine on CPU ranks.

Rows of x on rank r are ordered by (source rank, source token). In each round r stages, for every source s, its rows
of tokens below a bound that it chooses, s after s. The source sums, over the range of tokens that every rank has
published, ranks ascending, and releases the messages that are used up::

    published by r=1  |---- tokens 0..511 ----|------- 512..1023 -------|
    published by r=2  |-------- 0..767 ---------------|
    summed            |          now          | then  |

The bounds of all ranks lie on one axis, the source token index. A reader waits only for the owner with the lowest
bound, an owner only for readers below its own bound: a circle of waits would need a bound below itself. A reader
whose tokens are all summed waits for nobody: it lets go of every message as it comes.

Legend of dims: T tokens of this rank, R ranks, M rows of x, H elements of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

from tokenferry.dataplane import Part, ReducePlan, Signature
from tokenferry.dataplane.cpu.exchange import Exchange, offsets, rows_of
from tokenferry.dataplane.cpu.expert_major import sum_copies
from tokenferry.errors import HeapError
from tokenferry.memory.heap import Heap
from tokenferry.memory.operation import Operation

_CPU = torch.device("cpu")
_BLOCK_BYTES = 1 << 19
"""Size of the float accumulator: it stays in the core's cache."""
_NO_BOUND = 1 << 62


class Combine(Exchange):
    """One combine of one rank."""

    def __init__(
        self,
        heap: Heap,
        operation: Operation,
        signature: Signature,
        plan: ReducePlan,
        outs: Sequence[torch.Tensor],
    ) -> None:
        super().__init__(heap, operation, signature)
        self._plan = plan
        self._outs = outs
        self._dtypes = [column.dtype for column in plan.columns]
        if plan.metadata is not None and plan.sum_dtype is not None:
            self._dtypes[0] = plan.sum_dtype
        widths = [column.size(1) for column in plan.columns]
        self._widths = [width * dtype.itemsize for width, dtype in zip(widths, self._dtypes, strict=True)]
        self._starts, self._sources = _held_rows(plan, self.rank)
        member = plan.handle.is_token_in_rank
        self._num_tokens = member.size(0)
        self._tokens = [member[:, rank].nonzero().flatten() for rank in range(self.num_ranks)]
        start = self._starts[self.rank]
        end = start + len(self._sources[self.rank])
        self._own = [self._taken(column, start, end) for column in range(len(widths))]
        self._done_tokens = 0
        self._rows_before = [0] * self.num_ranks
        self._plan_rounds()

    def _plan_rounds(self) -> None:
        sources = self._sources
        num_remote = sum(len(sources[peer]) for peer in self.peers)
        row_bytes = sum(self._widths)
        fixed_bytes = 128 * len(self._widths)
        room = self.message_room(fixed_bytes + num_remote * row_bytes, fixed_bytes + row_bytes * len(self.peers))
        most_rows = max(1, (room - fixed_bytes) // row_bytes)
        self._bounds = [_NO_BOUND]
        if num_remote > most_rows:
            tokens = torch.cat([sources[peer] for peer in self.peers])
            rows_up_to = torch.bincount(tokens).cumsum(0)
            self._bounds = []
            done = 0
            while done + most_rows < num_remote:
                bound = int(torch.searchsorted(rows_up_to, done + most_rows, right=True))
                self._bounds.append(bound)
                done = int(rows_up_to[bound - 1])
            self._bounds.append(_NO_BOUND)
        self.num_rounds = len(self._bounds)
        edges = torch.tensor(self._bounds, dtype=torch.int64, device=_CPU)
        self._cuts = [[0, *torch.searchsorted(source.long(), edges).tolist()] for source in sources]

    def stage_round(self, this: int) -> bool:
        """See :meth:`Exchange.stage_round`."""
        counts = {peer: self._cuts[peer][this + 1] - self._cuts[peer][this] for peer in self.peers}
        num_rows = sum(counts.values())
        sections = offsets([num_rows * width for width in self._widths])
        offset = self.heap.try_reserve(sections[-1])
        if offset is None:
            return False
        payload = self.heap.stage_view(self.rank, offset, sections[-1])
        ranges: dict[int, tuple[int, int]] = {}
        row = 0
        for peer, count in counts.items():
            first = self._starts[peer] + self._cuts[peer][this]
            for column, (section, width) in enumerate(zip(sections[:-1], self._widths, strict=True)):
                staged = rows_of(payload, section, num_rows, width).view(self._dtypes[column])
                self._take(column, first, staged[row : row + count])
            ranges[peer] = (row, count)
            row += count
        self.publish(offset, sections[-1], num_rows=num_rows, ranges=ranges, bound=self._bounds[this])
        return True

    def _take(self, column: int, first: int, out: torch.Tensor) -> None:
        """Write the rows of a column from ``first`` on: as they are, or the sums of their copies."""
        rows, metadata = self._plan.columns[column], self._plan.metadata
        if column == 0 and metadata is not None:
            sum_copies(rows, metadata[first : first + len(out), 2:], out, _BLOCK_BYTES)
        else:
            out.copy_(rows[first : first + len(out)])

    def _taken(self, column: int, first: int, end: int) -> torch.Tensor:
        """Some rows of a column: those of the tensor itself, or the sums of their copies."""
        rows = self._plan.columns[column]
        if column > 0 or self._plan.metadata is None:
            return rows[first:end]
        sums = torch.empty((end - first, rows.size(1)), dtype=self._dtypes[column], device=_CPU)
        self._take(column, first, sums)
        return sums

    def pull_reduce(self) -> None:
        """Send what remains and write the outputs."""
        self.row_bytes = sum(self._widths)
        self.drive()
        self._reduce_up_to(self._num_tokens)

    def read(self) -> bool:
        """See :meth:`Exchange.read`."""
        has_tokens_left = self._done_tokens < self._num_tokens
        if not self.heads or (has_tokens_left and self.is_waiting_for_peers()):
            return False
        for peer in self.heads if has_tokens_left else ():
            self._check_length(peer)
        end = min([self._num_tokens, *(head.bound for head in self.heads.values())])
        self._reduce_up_to(end)
        for peer in sorted(self.heads):
            head = self.heads[peer]
            if min(head.bound, self._num_tokens) <= end:
                self._rows_before[peer] += head.length
                self.release(peer)
        return True

    def _check_length(self, peer: int) -> None:
        """Raise unless the message at hand has the rows of the tokens below its bound."""
        head = self.heads[peer]
        wanted = int(torch.searchsorted(self._tokens[peer], head.bound)) - self._rows_before[peer]
        if head.length != wanted:
            name = self.heap.names[peer]
            raise HeapError(f"rank {name} sent {head.length} rows, not {wanted}, of tokens below {head.bound}")

    def _reduce_up_to(self, end: int) -> None:
        """Sum the rows of the tokens from where the last call ended up to ``end``."""
        start, self._done_tokens = self._done_tokens, end
        if start == end:
            return
        for index, out in enumerate(self._outs):
            biases = self._plan.biases if index == 0 else ()
            parts = [Part(tokens, self._rows(rank, index)) for rank, tokens in enumerate(self._tokens)]
            short = add_up(parts, biases, out, start, end, self._rows_before)
            if short is not None:
                raise HeapError(f"rank {self.heap.names[short]} sent fewer rows than are needed")

    def _rows(self, rank: int, index: int) -> torch.Tensor:
        """The rows at hand of one column: those of the rank's current message, or of the own tensor."""
        if rank == self.rank:
            return self._own[index]
        if rank not in self.heads:
            return self._own[index][:0]
        head = self.heads[rank]
        sections = offsets([head.num_rows * width for width in self._widths])
        if sections[-1] != head.nbytes or head.start + head.length > head.num_rows:
            raise HeapError(f"rank {self.heap.names[rank]} sent a message that contradicts itself: {head}")
        part = rows_of(self.payload(rank), sections[index], head.num_rows, self._widths[index])
        return part[head.start : head.start + head.length].view(self._dtypes[index])


def _held_rows(plan: ReducePlan, rank: int) -> tuple[list[int], list[torch.Tensor]]:
    """The first row of each source, and the tokens of its rows."""
    held = plan.held
    if held is None:
        ends = plan.handle.rank_prefix_matrix[:, rank].tolist()
        starts, tokens, firsts = [0, *ends[:-1]], plan.handle.recv_src_idx, [0] * len(ends)
    else:
        starts, ends, tokens, firsts = (
            held.starts.tolist(),
            held.ends.tolist(),
            held.tokens,
            held.first_tokens.tolist(),
        )
    parts = [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
    return starts, [part if first == 0 else part - first for part, first in zip(parts, firsts, strict=True)]


def sum_rows(parts: Sequence[Part], biases: Sequence[torch.Tensor], out: torch.Tensor) -> None:
    """See :meth:`tokenferry.dataplane.DataPlane.sum_rows`."""
    add_up(parts, biases, out, 0, len(out), [0] * len(parts))


def add_up(
    parts: Sequence[Part],
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    start: int,
    end: int,
    rows_before: Sequence[int],
) -> int | None:
    """Write the sums of tokens ``start`` to ``end``, block by block.

    Args:
        parts: what is summed, in this order.
        biases: [T, width], added first.
        out: [T, width].
        start: the first token.
        end: the token past the last.
        rows_before: of each part, how many of its tokens have their rows in front of those given.

    Returns:
        The first part that has too few rows, if there is one; nothing is written then.
    """
    dtype = torch.promote_types(out.dtype, torch.float32)
    width = out.size(1)
    step = max(1, _BLOCK_BYTES // (dtype.itemsize * max(1, width)))
    edges = [*range(start, end, step), end]
    edge_tensor = torch.tensor(edges, dtype=torch.int64, device=_CPU)
    cuts = []
    for index, (part, before) in enumerate(zip(parts, rows_before, strict=True)):
        where = edge_tensor if part.tokens is None else torch.searchsorted(part.tokens, edge_tensor)
        cuts.append([int(cut) - before for cut in where])
        if cuts[-1][-1] > len(part.rows):
            return index
    accumulator = torch.empty((min(step, end - start), width), dtype=dtype, device=_CPU)
    for block, (low, high) in enumerate(pairwise(edges)):
        total = accumulator[: high - low]
        total.zero_()
        for bias in biases:
            total.add_(bias[low:high])
        for part, before, cut in zip(parts, rows_before, cuts, strict=True):
            first, last = cut[block], cut[block + 1]
            if last - first == high - low:
                total.add_(part.rows[first:last])
            elif last > first:
                assert part.tokens is not None
                tokens = part.tokens[first + before : last + before]
                total.index_add_(0, tokens - low, part.rows[first:last].to(dtype))
        out[low:high].copy_(total)
    return None
