"""Dispatch and combine that autograd can differentiate: each is the other's backward.

Dispatch copies a token to the ranks that hold its experts; combine sums a token's rows over those ranks. As linear
maps they are transposes, so the gradient of a dispatch travels home through a combine, the gradient of a combine
travels out through a dispatch, and the handle of the forward says along which routes.

Backward is communication too: **every rank must run it, in the same order, zero rows included**. Autograd runs the
nodes of a graph in an order that depends on the graph alone, so this holds by itself where all ranks build the same
graph: do not skip an expert that got no rows, do not leave a rank's output out of its loss.

Legend of dims: T tokens of this rank, H elements of a row, K choices, E experts, L = E / R local experts, R ranks,
M received rows.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from tokenferry.buffer import Buffer
from tokenferry.config import Config
from tokenferry.errors import ArgumentError
from tokenferry.handles import Handle, make_handle


def dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    *,
    expert_alignment: int = 1,
    num_worst_tokens: int = 0,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], Handle]:
    """Send every token once to every rank that holds one of its experts. Collective.

    Differentiable once in ``x`` and ``topk_weights``. Whether each of the two requires a gradient must be the same
    on all ranks.

    Args:
        buffer: of this rank.
        x: [T, H] with rows of a multiple of 16 bytes, in a dtype that combine takes.
        topk_idx: int64 [T, K], contiguous: expert ids, or -1 for no choice.
        topk_weights: float32 [T, K]. With ``x`` in float64 also float64, which then travels unrounded.
        num_experts: experts of all ranks, a multiple of the ranks; expert e lives on rank e // (E / R).
        expert_alignment: round each entry of the returned list up to a multiple of this.
        num_worst_tokens: give the outputs exactly this many rows, and return an empty list.
        config: tuning; results never depend on it.

    Returns:
        ``recv_x`` [M, H], rows ordered by (source rank, source token), zeros past the last received one;
        ``recv_topk_idx`` int64 [M, K], local expert ids or -1; ``recv_topk_weights`` [M, K], 0 where the id is -1;
        the list of (token, choice) pairs for each local expert; the handle.

    Raises:
        ArgumentError: an argument is not allowed; no peer was touched.
        PeerError: as in :meth:`tokenferry.Buffer.dispatch`.
    """
    if topk_weights.dtype == torch.float64:
        return _dispatch_float64(
            buffer, x, topk_idx, topk_weights, num_experts, expert_alignment, num_worst_tokens, config
        )
    return _apply_dispatch(buffer, x, topk_idx, topk_weights, num_experts, expert_alignment, num_worst_tokens, config)


def combine(
    buffer: Buffer, x: torch.Tensor, handle: tuple[torch.Tensor, ...], *, config: Config | None = None
) -> torch.Tensor:
    """Send the rows of a dispatch back and sum, for every token, those of the ranks that had it. Collective.

    Differentiable once in ``x``. Apply router weights before. Whether ``x`` requires a gradient must be the same on
    all ranks.

    Args:
        buffer: of this rank.
        x: [M, H] in bfloat16, float16, float32 or float64, rows as dispatch returned them.
        handle: of the dispatch; usable any number of times.
        config: tuning; results never depend on it.

    Returns:
        [T, H] of x's dtype, summed in float32 (float64 for float64) and rounded once.

    Raises:
        ArgumentError: an argument is not allowed; no peer was touched.
        PeerError: as in :meth:`tokenferry.Buffer.combine`.
    """
    return cast(torch.Tensor, _Combine.apply(x, buffer, handle, config))  # type: ignore[no-untyped-call]


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        buffer: Buffer,
        topk_idx: torch.Tensor,
        num_experts: int,
        expert_alignment: int,
        num_worst_tokens: int,
        config: Config | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], Handle]:
        per_rank, per_rdma_rank, per_expert, is_token_in_rank, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        recv_x, recv_topk_idx, recv_topk_weights, per_local_expert, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=is_token_in_rank,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            expert_alignment=expert_alignment,
            num_worst_tokens=num_worst_tokens,
            config=config,
        )
        assert isinstance(recv_x, torch.Tensor)
        assert recv_topk_idx is not None
        assert recv_topk_weights is not None
        assert per_local_expert is not None
        assert handle is not None
        if num_worst_tokens:
            # Unset memory may hold NaN, and a zero gradient times NaN is NaN in the weights that touch these rows.
            _clear_unused(recv_x, handle)
        ctx.buffer = buffer
        ctx.config = config
        ctx.save_for_backward(recv_topk_idx < 0, *handle)
        ctx.mark_non_differentiable(recv_topk_idx)
        return recv_x, recv_topk_idx, recv_topk_weights, per_local_expert, handle

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_x: torch.Tensor, _ids: Any, grad_weights: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        unused, *handle = ctx.saved_tensors
        # Forward wrote a constant 0 where a choice is another rank's, so nothing flows back from there.
        weights = grad_weights.masked_fill(unused, 0.0) if ctx.needs_input_grad[1] else None
        home, home_weights, _ = ctx.buffer.combine(grad_x, tuple(handle), topk_weights=weights)
        return home, home_weights, None, None, None, None, None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, buffer: Buffer, handle: tuple[torch.Tensor, ...], config: Config | None
    ) -> torch.Tensor:
        ctx.buffer = buffer
        ctx.save_for_backward(*handle)
        combined, _, _ = buffer.combine(x, handle, config=config)
        return combined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        handle = make_handle(ctx.saved_tensors)
        out = ctx.buffer.dispatch(grad, handle=handle)[0]
        _clear_unused(out, handle)
        return out, None, None, None


def _apply_dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    expert_alignment: int,
    num_worst_tokens: int,
    config: Config | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], Handle]:
    received = _Dispatch.apply(  # type: ignore[no-untyped-call]
        x, topk_weights, buffer, topk_idx, num_experts, expert_alignment, num_worst_tokens, config
    )
    return cast(tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], Handle], received)


def _dispatch_float64(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    expert_alignment: int,
    num_worst_tokens: int,
    config: Config | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int], Handle]:
    """Dispatch with the weights as further columns of the rows: the Buffer's own weights are float32."""
    if x.dtype != torch.float64:
        raise ArgumentError("topk_weights", f"{topk_weights.dtype} beside x in {x.dtype}", "float32")
    hidden, num_topk = x.size(1), topk_weights.size(1)
    pad = x.new_zeros(x.size(0), num_topk % 2)  # rows are whole multiples of 16 bytes
    recv, recv_topk_idx, _, per_local_expert, handle = _apply_dispatch(
        buffer,
        torch.cat((x, topk_weights, pad), dim=1),
        topk_idx,
        topk_weights.detach().float(),
        num_experts,
        expert_alignment,
        num_worst_tokens,
        config,
    )
    recv_topk_weights = recv[:, hidden : hidden + num_topk].masked_fill(recv_topk_idx < 0, 0.0)
    return recv[:, :hidden], recv_topk_idx, recv_topk_weights, per_local_expert, handle


def _clear_unused(rows: torch.Tensor, handle: Handle) -> None:
    """Zero the rows of a worst-case output that no token arrived in; on a GPU without a look at their number."""
    unused = handle.unused
    if rows.is_cuda or bool(unused.any()):
        rows.masked_fill_(unused.unsqueeze(1), 0.0)
