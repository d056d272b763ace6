"""The operators ``tokenferry::low_latency_dispatch`` and ``low_latency_combine``: worst-case shapes, no gradients.

Legend of dims: T tokens of this rank, N most tokens of any rank, H elements of a row, K choices, E experts,
L = E / R local experts, R ranks, S scale columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tokenferry.modes.low_latency import GROUP
from tokenferry.ops.library import apply, define, function_of, is_differentiated, run, run_below
from tokenferry.ops.registry import buffer_of


def _dispatch(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    buffer: str,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
) -> list[torch.Tensor]:
    received, count, handle, _, _ = buffer_of(buffer).low_latency_dispatch(
        x, topk_idx, num_max_dispatch_tokens_per_rank, num_experts, None, None, use_fp8, round_scale, use_ue8m0
    )
    rows, scales = received if isinstance(received, tuple) else (received, _no_scales(received))
    return [rows, scales, count, handle[0], handle[1]]


def _dispatch_shapes(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    buffer: str,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
) -> list[torch.Tensor]:
    ranks, hidden = buffer_of(buffer).group_size, x.size(1)
    local, slab = num_experts // ranks, ranks * num_max_dispatch_tokens_per_rank
    rows = x.new_empty((local, slab, hidden), dtype=torch.float8_e4m3fn if use_fp8 else torch.bfloat16)
    if use_fp8:
        groups = hidden // GROUP
        columns, dtype = (-(-groups // 4), torch.int32) if use_ue8m0 else (groups, torch.float32)
        scales = x.new_empty((local, columns, slab), dtype=dtype).transpose(1, 2)
    else:
        scales = _no_scales(rows)
    return [
        rows,
        scales,
        x.new_empty((local,), dtype=torch.int32),
        x.new_empty((local, slab), dtype=torch.int32),
        x.new_empty((local, ranks), dtype=torch.int64),
    ]


def _no_scales(rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty((*rows.shape[:2], 0), dtype=torch.float32)


def _combine(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    handle: Sequence[torch.Tensor],
    buffer: str,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
) -> torch.Tensor:
    whole = (*handle, num_max_dispatch_tokens_per_rank, x.size(-1), num_experts)
    return buffer_of(buffer).low_latency_combine(x, topk_idx, topk_weights, whole)[0]


def _combine_shapes(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    handle: Sequence[torch.Tensor],
    buffer: str,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
) -> torch.Tensor:
    return x.new_empty((topk_idx.size(0), x.size(2)))


class _NoGradient(torch.autograd.Function):
    """Lets inputs that require a gradient pass, and says in backward that there is none."""

    @staticmethod
    def forward(operator: torch._ops.OpOverload, *args: Any) -> Any:
        result = run_below(operator, None, *args)
        return tuple(result) if isinstance(result, list) else result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        raise RuntimeError(f"{ctx.operator} has no gradient: train with tokenferry::dispatch and tokenferry::combine")

    jvp = backward


def _dispatch_differentiable(
    keys: torch.DispatchKeySet | None,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    buffer: str,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
) -> Any:
    rest = (topk_idx, buffer, num_max_dispatch_tokens_per_rank, num_experts, use_fp8, round_scale, use_ue8m0)
    if not is_differentiated(x):
        return run(keys, DISPATCH, _dispatch, x, *rest)
    return list(apply(_NoGradient, DISPATCH, x, *rest))


def _combine_differentiable(
    keys: torch.DispatchKeySet | None,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    handle: Sequence[torch.Tensor],
    buffer: str,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
) -> Any:
    rest = (topk_idx, topk_weights, handle, buffer, num_max_dispatch_tokens_per_rank, num_experts)
    if not is_differentiated(x, topk_weights):
        return run(keys, COMBINE, _combine, x, *rest)
    return apply(_NoGradient, COMBINE, x, *rest)


DISPATCH = define(
    "low_latency_dispatch",
    "(Tensor x, Tensor topk_idx, str buffer, int num_max_dispatch_tokens_per_rank, int num_experts, "
    "bool use_fp8=True, bool round_scale=False, bool use_ue8m0=False) -> Tensor[]",
    _dispatch,
    _dispatch_shapes,
    _dispatch_differentiable,
)
COMBINE = define(
    "low_latency_combine",
    "(Tensor x, Tensor topk_idx, Tensor topk_weights, Tensor[] handle, str buffer, "
    "int num_max_dispatch_tokens_per_rank, int num_experts) -> Tensor",
    _combine,
    _combine_shapes,
    _combine_differentiable,
)
low_latency_dispatch = function_of(DISPATCH, _dispatch_differentiable, _dispatch)
low_latency_combine = function_of(COMBINE, _combine_differentiable, _combine)
