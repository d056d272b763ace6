"""The other contender of the low-latency benchmark: collectives of a fixed size, which a CUDA graph can hold.

Dispatch gathers the tokens of all ranks, in bfloat16, with their choices. Every rank weights the rows of the tokens
that have experts there (the others become zeros); combine sends them home, and sums them in float32, ranks ascending.

Legend of dims: T tokens of every rank, H elements of a row, K choices, R ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""Renamed in torch 2.13."""


class FixedCollectives:
    """Dispatch and combine of one rank's tokens over a process group.

    Args:
        group: of any backend; None: the default one.
        x: bfloat16 [T, H].
        topk_idx: int64 [T, K].
        topk_weights: float32 [T, K].
        num_experts: of all ranks.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        num_experts: int,
    ) -> None:
        self._group = group
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self._x, self._ids, self._weights = x, topk_idx, topk_weights
        self._num_local = num_experts // self._num_ranks

    def dispatch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows of all ranks [R * T, H], and what each row's experts here weigh together, float32 [R * T, 1]."""
        rows = self._x.new_empty(self._num_ranks * self._x.size(0), self._x.size(1))
        mine = torch.cat([self._ids.to(torch.int32), self._weights.view(torch.int32)], 1)
        choices = mine.new_empty(self._num_ranks * mine.size(0), mine.size(1))
        _all_gather(rows.view(torch.uint8), self._x.view(torch.uint8), group=self._group)
        _all_gather(choices, mine, group=self._group)
        ids, weights = choices.chunk(2, 1)
        here = (ids // self._num_local) == self._rank
        return rows, (weights.contiguous().view(torch.float32) * here).sum(1, keepdim=True)

    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor]:
        """The sums of this rank's rows, bfloat16 [T, H]."""
        weighted = (rows * weights).to(rows.dtype)
        home = torch.empty_like(weighted)
        dist.all_to_all_single(home.view(torch.uint8), weighted.view(torch.uint8), group=self._group)
        return (home.view(self._num_ranks, *self._x.shape).sum(0, dtype=torch.float32).to(rows.dtype),)
