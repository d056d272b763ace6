"""Expanded rows on CPU ranks: where the copies of received rows go, and the sums of copies on their way back.

Two local experts, K = 2, alignment 2; source 0 sends tokens 0 and 3, source 1 sends token 1::

    token      choices    copies            expanded rows
    (0, 0)     e0, e1     0, 4              e0: (0,0) (0,3) (1,1) padding     end 3
    (0, 3)     e0, -      1, -              e1: (0,0) (1,1)                   end 6
    (1, 1)     e1, e0     5, 2

Legend of dims: n rows at hand, K choices, L local experts, R ranks, M received rows, X expanded rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenferry.dataplane import ExpertPlan, Outputs
from tokenferry.errors import HeapError

_CPU = torch.device("cpu")


def ends_of(num_pairs: torch.Tensor, alignment: int, expand: bool) -> torch.Tensor:
    """int32 [L]: see :attr:`tokenferry.dataplane.DispatchExchange.expert_ends`."""
    aligned = num_pairs.add(alignment - 1).div_(alignment, rounding_mode="floor").mul_(alignment)
    ends = aligned.cumsum(0)
    return (ends.sub_(aligned).add_(num_pairs) if expand else ends).to(torch.int32)


def num_expanded(num_pairs: Sequence[int], alignment: int) -> int:
    """Expanded rows of experts with so many pairs."""
    return sum(-(-count // alignment) * alignment for count in num_pairs)


class CopyMap:
    """Where the copies of received rows go.

    Args:
        plan: of the dispatch; expanded.
        experts: the ids of the local experts.
        outputs: of the dispatch.
        expert_ends: int32 [L].
        num_pairs: int64 [R, L], from every source; None where the plan has the metadata of a handle.
    """

    def __init__(
        self,
        plan: ExpertPlan,
        experts: range,
        outputs: Outputs,
        expert_ends: torch.Tensor,
        num_pairs: torch.Tensor | None,
    ) -> None:
        self._plan = plan
        self._experts = experts
        self._outputs = outputs
        self._ends = expert_ends
        if num_pairs is not None:
            starts = expert_ends - num_pairs.sum(0)
            self._next = starts + num_pairs.cumsum(0) - num_pairs  # [R, L]: the row of the next pair
            self._last = self._next + num_pairs

    def deliver(self, source: int, columns: Sequence[torch.Tensor], rows: torch.Tensor, start: int) -> None:
        """Write the copies of a source's next rows.

        Args:
            source: rank; its rows come in order.
            columns: uint8, of the rows, the scales if there are any, the ids, the weights.
            rows: int [n], rows of the columns.
            start: what would be the row of the first of them, were they not expanded.

        Raises:
            HeapError: the source has announced fewer choices of an expert than came.
        """
        *moved, ids, weights = columns
        if self._plan.metadata is None:
            assert self._outputs.metadata is not None
            slots = self._outputs.metadata[start : start + len(rows), 2:]
            copies, pairs = self._choose(source, ids.index_select(0, rows).view(torch.int64), slots)
        else:
            slots = self._plan.metadata[start : start + len(rows), 2:]
            flat = slots.reshape(-1)
            pairs = (flat >= 0).nonzero().flatten()
            copies, order = flat[pairs].long().sort()
            pairs = pairs[order]
        num_topk = slots.size(1)
        sources = rows[pairs // num_topk]
        outputs = (self._outputs.rows, self._outputs.scales)
        for column, output in zip(moved, outputs, strict=False):
            assert output is not None
            _copy_runs(column, sources, copies, output.view(torch.uint8))
        assert self._outputs.topk_weights is not None
        self._outputs.topk_weights[copies, 0] = weights.view(torch.float32)[sources, pairs % num_topk]

    def _choose(self, source: int, ids: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the copies of rows with such ids, int64 [n, K], and note them in int32 [n, K] slots that hold -1.

        Returns:
            int64 [pairs]: the copies, ascending, and for each of them ``row * K + choice``.
        """
        local = ids.reshape(-1) - self._experts.start
        pairs = ((local >= 0) & (local < len(self._experts))).nonzero().flatten()
        chosen, order = local[pairs].sort(stable=True)
        pairs = pairs[order]
        counts = torch.bincount(chosen, minlength=len(self._experts))
        firsts = self._next[source] - (counts.cumsum(0) - counts)
        self._next[source] += counts
        if bool((self._next[source] > self._last[source]).any()):
            raise self._contradiction(source)
        copies = torch.arange(len(pairs), device=_CPU) + firsts[chosen]
        slots[pairs // ids.size(1), pairs % ids.size(1)] = copies.to(torch.int32)
        return copies, pairs

    def _contradiction(self, source: int) -> HeapError:
        missing = (self._last - self._next)[source].tolist()
        return HeapError(f"rank {source} sent rows that contradict its counts: {missing} choices of experts to come")

    def finish(self) -> None:
        """Fill the rows between the experts with zeros, if so planned, when all copies are there.

        Raises:
            HeapError: a source has announced more choices of an expert than came.
        """
        if self._plan.metadata is None and not torch.equal(self._next, self._last):
            raise self._contradiction(int((self._next != self._last).any(1).nonzero()[0]))
        if self._plan.zero_padding:
            for end in self._ends.tolist():
                start_of_next = num_expanded([end], self._plan.alignment)
                for output in (self._outputs.rows, self._outputs.scales, self._outputs.topk_weights):
                    if output is not None:
                        output[end:start_of_next].view(torch.uint8).zero_()


def write_sources(
    metadata: torch.Tensor, source: int, tokens: torch.Tensor, ids: torch.Tensor, experts: range, num_max_tokens: int
) -> None:
    """Write the first two words of the metadata of some rows, and no copies.

    Args:
        metadata: int32 [n, K + 2], of these rows.
        source: rank.
        tokens: int [n], of the source.
        ids: int64 [n, K], global expert ids or -1.
        experts: the ids of the local experts.
        num_max_tokens: N.
    """
    local = (ids >= experts.start) & (ids < experts.stop)
    metadata[:, 0] = tokens + source * num_max_tokens
    if ids.size(1) and len(ids):
        metadata[:, 1] = local.to(torch.int8).argmax(1) + source * ids.size(1)
    metadata[:, 2:] = -1


def _copy_runs(source: torch.Tensor, rows: torch.Tensor, copies: torch.Tensor, out: torch.Tensor) -> None:
    """``out[copies] = source[rows]`` for ascending copies, run by run: one copy, straight into place."""
    if not len(copies):
        return
    breaks = (copies.diff() != 1).nonzero().flatten().add_(1).tolist()
    for start, end in zip([0, *breaks], [*breaks, len(copies)], strict=True):
        first = int(copies[start])
        torch.index_select(source, 0, rows[start:end], out=out[first : first + end - start])


def sum_copies(rows: torch.Tensor, copies: torch.Tensor, out: torch.Tensor, block_bytes: int) -> None:
    """``out[i]`` = the sum of ``rows[copies[i, k]]``, k ascending, copies of -1 left out; rounded once.

    Args:
        rows: [X, H].
        copies: int32 [n, K], below X.
        out: [n, H] of any floating dtype.
        block_bytes: size of the accumulator.
    """
    dtype = torch.promote_types(rows.dtype, torch.float32)
    step = max(1, block_bytes // (dtype.itemsize * rows.size(1)))
    for low in range(0, len(out), step):
        part = copies[low : low + step]
        total = torch.zeros((len(part), rows.size(1)), dtype=dtype, device=_CPU)
        for column in part.unbind(1):
            there = (column >= 0).nonzero().flatten()
            if len(there):
                total.index_add_(0, there, rows.index_select(0, column[there]).to(dtype))
        out[low : low + step].copy_(total)
