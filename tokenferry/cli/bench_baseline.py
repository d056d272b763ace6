"""The other contender: dispatch and combine with ``torch.distributed`` alone, as one writes them by hand.

Dispatch gathers each token once for every rank that holds one of its experts, exchanges the counts, then the rows
and what travels with them. Combine sends the rows back and sums them in float32, ranks ascending. The results are
bit for bit those of tokenferry.

Legend of dims: T tokens of this rank, H elements of a row, K choices, E experts, L = E / R local experts, R ranks,
M received rows, N rows sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist


class Routes(NamedTuple):
    """Which rows go where; what a later call along the same routes keeps."""

    tokens: list[torch.Tensor]
    """int64, the own tokens for each rank, ascending."""
    sent: list[int]
    """Rows for each rank."""
    received: list[int]
    """Rows from each rank."""


class TorchDistributed:
    """Dispatch and combine over a process group, by default the default one.

    Args:
        group: of any backend.
        ranks_per_node: combine sums the rows of so many neighbouring ranks first, and rounds; None: of all.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, ranks_per_node: int | None = None) -> None:
        self.rank = dist.get_rank(group)
        self.num_ranks = dist.get_world_size(group)
        self._group = group
        self._ranks_per_node = ranks_per_node or self.num_ranks

    def dispatch(
        self,
        columns: Sequence[torch.Tensor],
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        num_tokens_per_rank: torch.Tensor,
        num_tokens_per_expert: torch.Tensor,
        is_token_in_rank: torch.Tensor,
    ) -> tuple[list[torch.Tensor], list[int], Routes]:
        """Send every token once to every rank that has one of its experts.

        Args:
            columns: the rows [T, H], and for fp8 their scales.
            topk_idx: int64 [T, K], global expert ids.
            topk_weights: float32 [T, K].
            num_tokens_per_rank: int32 [R].
            num_tokens_per_expert: int32 [E].
            is_token_in_rank: bool [T, R].

        Returns:
            The received columns, local expert ids (-1: elsewhere) and weights, each [M, width] and ordered by
            (source rank, source token); the (token, choice) pairs of each local expert; the routes.
        """
        num_local = num_tokens_per_expert.numel() // self.num_ranks
        # One collective tells every rank both its rows and its experts' choices.
        counts = torch.cat([num_tokens_per_rank.unsqueeze(1), num_tokens_per_expert.view(-1, num_local)], dim=1)
        incoming = torch.empty_like(counts)
        dist.all_to_all_single(incoming, counts, group=self._group)
        routes = Routes(
            tokens=[member.nonzero().flatten() for member in is_token_in_rank.unbind(1)],
            sent=num_tokens_per_rank.tolist(),
            received=incoming[:, 0].tolist(),
        )
        received = self.cached_dispatch([*columns, topk_idx, topk_weights], routes)
        ids, weights = received[-2:]
        ids.sub_(self.rank * num_local)
        elsewhere = (ids < 0) | (ids >= num_local)
        ids.masked_fill_(elsewhere, -1)
        weights.masked_fill_(elsewhere, 0.0)
        return received, incoming[:, 1:].sum(0).tolist(), routes

    def cached_dispatch(self, columns: Sequence[torch.Tensor], routes: Routes) -> list[torch.Tensor]:
        """Send columns [T, width] along known routes; returns them as [M, width]."""
        tokens = torch.cat(routes.tokens)
        # As bytes: Gloo does not know every dtype, and gathering bytes is never slower.
        gathered = [column.view(torch.uint8).index_select(0, tokens) for column in columns]
        received = self._exchange(gathered, routes.received, routes.sent)
        return [part.view(column.dtype) for part, column in zip(received, columns, strict=True)]

    def combine(self, x: torch.Tensor, routes: Routes, num_tokens: int) -> torch.Tensor:
        """Send rows [M, H] back and sum them for every token; returns [T, H]."""
        back = self._exchange([x.view(torch.uint8)], routes.sent, routes.received)[0].view(x.dtype)
        parts = list(zip(routes.tokens, torch.split(back, routes.sent), strict=True))
        total: torch.Tensor | None = None
        for first in range(0, self.num_ranks, self._ranks_per_node):
            partial = torch.zeros(num_tokens, x.size(1), dtype=torch.float32, device=x.device)
            # Rank by rank: the float32 copy of the rows stays small.
            for tokens, rows in parts[first : first + self._ranks_per_node]:
                partial.index_add_(0, tokens, rows.float())
            total = _plus(total, partial if self._ranks_per_node == self.num_ranks else partial.to(x.dtype))
        assert total is not None
        return total.to(x.dtype)

    def _exchange(
        self, parts: Sequence[torch.Tensor], incoming: list[int], outgoing: list[int]
    ) -> list[torch.Tensor]:
        outputs = [part.new_empty(sum(incoming), part.size(1)) for part in parts]
        works = [
            dist.all_to_all_single(output, part, incoming, outgoing, group=self._group, async_op=True)
            for output, part in zip(outputs, parts, strict=True)
        ]
        for work in works:
            work.wait()
        return outputs


def expert_major(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A copy of each received row for each of its local experts, expert by expert.

    Args:
        tensors: columns [M, width], local expert ids [M, K] and weights [M, K], as a dispatch returns them.

    Returns:
        The columns [X, width] and weights [X]: X pairs of a row and an expert here, ordered by (expert, row).
    """
    *columns, ids, weights = tensors
    chosen = (ids.flatten() >= 0).nonzero().flatten()
    chosen = chosen[ids.flatten()[chosen].argsort(stable=True)]
    rows = chosen // ids.size(1)
    copies = [column.view(torch.uint8).index_select(0, rows).view(column.dtype) for column in columns]
    return [*copies, weights.flatten()[chosen]]


def _plus(total: torch.Tensor | None, part: torch.Tensor) -> torch.Tensor:
    return part.float() if total is None else total.add_(part)
