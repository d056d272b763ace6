"""The operators of :mod:`tokenferry.ops` as a contender: the calls of the Buffer below them, to see what they add."""

from __future__ import annotations

from typing import Any

import torch

from tokenferry import ops
from tokenferry.buffer import Buffer
from tokenferry.cli.bench_cases import SCALE_BLOCK, Call, Case, Result, Workload

OPERATORS = "tokenferry.ops"
MODES = ("cached", "combine", "cached-pair")
"""Operations that the host does not wait in: what an operator adds shows in them."""


def operator_calls(case: Case, work: Workload, buffer: Buffer) -> dict[str, Call]:
    """The modes of :data:`MODES` by operators."""
    name = ops.register(buffer)
    x, scales = (*work.columns, None)[:2]
    assert x is not None
    received = ops.dispatch(x, work.topk_idx, work.topk_weights, name, case.experts, 0, 1, scales)
    behind = len(received) - (scales is not None)
    handle, returned = received[4:behind], received[0].to(case.combine_dtype)

    def cached() -> Result:
        return Result(ops.cached_dispatch(x, handle, name, scales), [])

    def cached_pair() -> Result:
        there = ops.cached_dispatch(x, handle, name, scales)[0]
        return Result(ops.combine(returned if case.dtype == "fp8" else there, handle, name), [])

    return {
        "cached": cached,
        "combine": lambda: Result(ops.combine(returned, handle, name), []),
        "cached-pair": cached_pair,
    }


class OperatorContender:
    """The low-latency operators in a case; see :class:`tokenferry.cli.bench_low_latency_cases.Contender`.

    Args:
        x: bfloat16 [T, H].
        topk_idx: int64 [T, K].
        topk_weights: float32 [T, K].
        max_tokens: N.
        experts: E.
        use_fp8: quantise in dispatch; rows come back as bfloat16, converted beforehand.
        buffer: to run on.
    """

    has_hooks = False

    def __init__(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        max_tokens: int,
        experts: int,
        use_fp8: bool,
        buffer: Buffer,
    ) -> None:
        self._x, self._ids, self._weights = x, topk_idx, topk_weights
        self._most, self._experts, self._fp8 = max_tokens, experts, use_fp8
        self._name = ops.register(buffer)
        self._received = self.dispatch()
        rows, scales, counts = self._received[:3]
        self._rows = expert_rows((rows, scales) if use_fp8 else rows, counts)

    def dispatch(self) -> tuple[Any, ...]:
        """Dispatch."""
        received = ops.low_latency_dispatch(
            self._x, self._ids, self._name, self._most, self._experts, use_fp8=self._fp8
        )
        return tuple(received)

    def combine(self) -> tuple[Any, ...]:
        """Combine what the first dispatch has brought."""
        return self._combine(self._rows, self._received)

    def pair(self) -> tuple[Any, ...]:
        """Dispatch and combine."""
        there = self.dispatch()
        return self._combine(self._rows if self._fp8 else there[0], there)

    def _combine(self, rows: torch.Tensor, received: tuple[Any, ...]) -> tuple[Any, ...]:
        handle = list(received[3:5])
        arguments = (rows, self._ids, self._weights, handle, self._name, self._most, self._experts)
        return (ops.low_latency_combine(*arguments),)


def expert_rows(received: torch.Tensor | tuple[torch.Tensor, torch.Tensor], counts: torch.Tensor) -> torch.Tensor:
    """bfloat16 [L, R * N, H]: received rows as the experts take them, unset past the last of each expert."""
    if isinstance(received, torch.Tensor):
        return received
    data, scales = received
    groups = data.size(2) // SCALE_BLOCK
    rows = torch.empty(data.shape, dtype=torch.bfloat16, device=data.device)
    for expert, count in enumerate(counts.tolist()):
        blocks = data[expert, :count].float().view(count, groups, SCALE_BLOCK)
        rows[expert, :count] = (blocks * scales[expert, :count].unsqueeze(2)).flatten(1).to(torch.bfloat16)
    return rows
