"""What the tests of the operators share: Buffers seen through operators, and the calls that reach a Buffer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from tokenferry import Buffer, DispatchHandle, EventOverlap, InternodeHandle, ops


class ThroughOperators:
    """Looks like a Buffer to :mod:`tests.cases`, and calls operators wherever there is one.

    Args:
        buffer: below.
        operators: where they are: :mod:`tokenferry.ops`, or torch's own, which its dispatcher calls.
    """

    def __init__(self, buffer: Buffer, operators: Any = ops) -> None:
        self.buffer, self.operators = buffer, operators
        self.name = ops.register(buffer)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.buffer, name)

    def dispatch(self, x: Any, handle: Any = None, **given: Any) -> tuple[Any, ...]:
        data, scales = x if isinstance(x, tuple) else (x, None)
        if handle is not None:
            return (
                _joined(self.operators.cached_dispatch(data, list(handle), self.name, scales)),
                *[None] * 4,
                EventOverlap(),
            )
        if given.get("topk_idx") is None:
            return self.buffer.dispatch(x, **given)
        num_experts = given["num_tokens_per_expert"].numel()
        worst, alignment = given.get("num_worst_tokens", 0), given.get("expert_alignment", 1)
        rows, ids, weights, counts, *others = self.operators.dispatch(
            data, given["topk_idx"], given["topk_weights"], self.name, num_experts, worst, alignment, scales
        )
        kind = InternodeHandle if len(others) >= len(InternodeHandle._fields) else DispatchHandle
        num = len(kind._fields)
        received = _joined([rows, *others[num:]])
        return received, ids, weights, counts.tolist(), kind(*others[:num]), EventOverlap()

    def combine(self, x: Any, handle: Any, topk_weights: Any = None, bias: Any = None) -> tuple[Any, ...]:
        bias_0, bias_1 = Buffer._unpack_bias(bias)
        combined, *weights = self.operators.combine(x, list(handle), self.name, topk_weights, bias_0, bias_1)
        return combined, weights[0] if weights else None, EventOverlap()

    def low_latency_dispatch(self, *args: Any, **given: Any) -> tuple[Any, ...]:
        x, ids, most, num_experts = args
        rows, scales, count, *handle = self.operators.low_latency_dispatch(
            x, ids, self.name, most, num_experts, **given
        )
        received = (rows, scales) if scales.size(2) else rows
        return received, count, (*handle, most, x.size(1), num_experts), EventOverlap(), None

    def low_latency_combine(self, x: Any, ids: Any, weights: Any, handle: Any) -> tuple[Any, ...]:
        *tables, most, _, num_experts = handle
        combined = self.operators.low_latency_combine(x, ids, weights, tables, self.name, most, num_experts)
        return combined, EventOverlap(), None


def _joined(rows: list[torch.Tensor]) -> Any:
    return tuple(rows) if len(rows) > 1 else rows[0]


@contextmanager
def recorded_calls(buffer: Buffer) -> Iterator[list[str]]:
    """What operators call of a Buffer, in order: "dispatch", "cached dispatch" or "combine"."""
    calls: list[str] = []
    methods = {"_dispatch_choices": "dispatch", "dispatch": "cached dispatch", "combine": "combine"}

    def noted(method: str) -> Any:
        call = getattr(buffer, method)

        def note(*args: Any, **given: Any) -> Any:
            calls.append(methods[method])
            return call(*args, **given)

        return note

    with ExitStack() as stack:
        for method in methods:
            stack.enter_context(mock.patch.object(buffer, method, noted(method)))
        yield calls


def draw(rank: int, tokens: int, hidden: int = 8, experts: int = 4, choices: int = 2) -> tuple[torch.Tensor, ...]:
    """Rows float32 [T, H], ids int64 [T, K] and weights float32 [T, K] of a rank."""
    source = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens, hidden, generator=source)
    ids = torch.rand(tokens, experts, generator=source).argsort(1)[:, :choices].contiguous()
    return x, ids, torch.rand(tokens, choices, generator=source)
