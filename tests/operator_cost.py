"""Host time that an eager operator adds to the call of the Buffer below it: ``python -m tests.operator_cost``.

The Buffer does nothing here, so that what remains is the operator. A figure is the mean of 25 calls, the smallest of
many such: what the machine does besides only adds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenferry import Buffer, DispatchHandle, ops
from tokenferry.modes.intranode import Received
from tokenferry.modes.low_latency import LowLatencyHandle
from tokenferry.nn import functional

TOKENS, RECEIVED, HIDDEN, CHOICES, EXPERTS, RANKS, SLOTS = 6, 9, 128, 3, 4, 2, 8


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


class IdleRuntime:
    """Does nothing."""

    def clear_unused(self, outputs: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        pass


class IdleBuffer(Buffer):
    """Returns tensors made beforehand."""

    def __init__(self) -> None:
        self.runtime = IdleRuntime()  # type: ignore[assignment]
        self.rank, self.group_size = 0, RANKS
        member = torch.zeros(TOKENS, RANKS, dtype=torch.bool)
        prefix = torch.full((RANKS, RANKS), RECEIVED, dtype=torch.int32)
        self.handle = DispatchHandle(
            prefix, int32(RANKS, 1), int32(RANKS, 1), int32(RECEIVED), member, int32(TOKENS, RANKS)
        )
        self.rows = torch.zeros(RECEIVED, HIDDEN)
        ids = torch.zeros(RECEIVED, CHOICES, dtype=torch.int64)
        weights, counts = torch.zeros(RECEIVED, CHOICES), [1] * (EXPERTS // RANKS)
        self.received = Received(self.rows, None, ids, weights, counts, self.handle)
        self.combined = torch.zeros(TOKENS, HIDDEN)
        local, slab = EXPERTS // RANKS, RANKS * SLOTS
        ranges = torch.zeros(local, RANKS, dtype=torch.int64)
        self.slabs = torch.zeros(local, slab, HIDDEN, dtype=torch.bfloat16)
        self.low_latency_handle = LowLatencyHandle(int32(local, slab), ranges, SLOTS, HIDDEN, EXPERTS)
        self.low_latency = self.slabs, int32(local), self.low_latency_handle, None, None

    def _dispatch_choices(self, *args: Any, **given: Any) -> Received:
        return self.received

    def dispatch(self, x: Any, handle: Any, *args: Any, **given: Any) -> Any:
        return self.rows, None, None, None, None, None

    def combine(self, *args: Any, **given: Any) -> Any:
        return self.combined, None, None

    def low_latency_dispatch(self, *args: Any, **given: Any) -> Any:
        return self.low_latency

    def low_latency_combine(self, *args: Any, **given: Any) -> Any:
        return self.combined, None, None


class Bare(torch.autograd.Function):
    """What a gradient costs at least: as many tensors saved as a handle has."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*[x] * len(DispatchHandle._fields))
        return x.view_as(x)


def microseconds(call: Callable[[], object], rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        began = time.perf_counter()
        for _ in range(25):
            call()
        best = min(best, time.perf_counter() - began)
    return best / 25 * 1e6


def measure(rounds: int = 1500) -> dict[str, tuple[float, float, float]]:
    """For every call what it adds in inference mode, outside of it, and with a gradient to come (else NaN)."""
    buffer = IdleBuffer()
    name, handle, low_latency = ops.register(buffer), list(buffer.handle), buffer.low_latency_handle
    ids, weights = torch.zeros(TOKENS, CHOICES, dtype=torch.int64), torch.zeros(TOKENS, CHOICES)
    x, rows, slabs = torch.zeros(TOKENS, HIDDEN), buffer.rows.clone(), buffer.slabs.clone()
    calls: dict[str, tuple[Callable[[torch.Tensor], object], torch.Tensor]] = {
        "ops.dispatch": (lambda x: ops.dispatch(x, ids, weights, name, EXPERTS), x),
        "ops.cached_dispatch": (lambda x: ops.cached_dispatch(x, handle, name), x),
        "ops.combine": (lambda x: ops.combine(x, handle, name), rows),
        "torch.ops.tokenferry.combine": (lambda x: torch.ops.tokenferry.combine(x, handle, name), rows),
        "nn.functional.dispatch": (lambda x: functional.dispatch(buffer, x, ids, weights, EXPERTS), x),
        "nn.functional.combine": (lambda x: functional.combine(buffer, x, buffer.handle), rows),
        "ops.low_latency_dispatch": (
            lambda x: ops.low_latency_dispatch(x, ids, name, SLOTS, EXPERTS, False),
            x.bfloat16(),
        ),
        "ops.low_latency_combine": (
            lambda x: ops.low_latency_combine(x, ids, weights, list(low_latency[:2]), name, SLOTS, EXPERTS),
            slabs,
        ),
    }
    calls["torch.autograd.Function, bare"] = (Bare.apply, x)
    result = {}
    for called, (call, given) in calls.items():
        with torch.inference_mode():
            inference = microseconds(lambda call=call, given=given: call(given), rounds)
        plain = microseconds(lambda call=call, given=given: call(given), rounds)
        leaf = given.clone().requires_grad_()
        differentiable = microseconds(lambda call=call, leaf=leaf: call(leaf), rounds)
        result[called] = inference, plain, float("nan") if "low_latency" in called else differentiable
    return result


if __name__ == "__main__":
    print(f"{'us a call':34}{'inference':>12}{'no gradient':>14}{'gradient':>12}")
    for called, figures in measure().items():
        print(f"{called:34}{figures[0]:12.1f}{figures[1]:14.1f}{figures[2]:12.1f}")
