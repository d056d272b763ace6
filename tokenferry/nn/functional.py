"""Dispatch and combine as functions of tensors: differentiable, compilable, and each the other's backward.

They call the operators of :mod:`tokenferry.ops`; what compiles, checkpoints or shards a model sees these. Dispatch
copies a token to the ranks that hold its experts; combine sums a token's rows over those ranks. As linear maps they
are transposes, so the gradient of a dispatch travels home through a combine, the gradient of a combine travels out
through a dispatch, and the handle of the forward says along which routes.

Backward is communication too: **every rank must run it, in the same order, zero rows included**. Autograd runs the
nodes of a graph in an order that depends on the graph alone, so this holds by itself where all ranks build the same
graph: do not skip an expert that got no rows, do not leave a rank's output out of its loss.

Legend of dims: T tokens of this rank, H elements of a row, K choices, E experts, L = E / R local experts, R ranks,
M received rows, N most tokens of any rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tokenferry import ops
from tokenferry.buffer import Buffer
from tokenferry.config import Config, check_config, combine_preset, dispatch_preset
from tokenferry.errors import ArgumentError
from tokenferry.handles import Handle, make_handle
from tokenferry.modes.inputs import unpack_bias
from tokenferry.modes.low_latency import LowLatencyHandle


class Dispatched(NamedTuple):
    """What :func:`dispatch` returns."""

    x: torch.Tensor
    """[M, H], rows ordered by (source rank, source token), zeros past the last received one."""
    topk_idx: torch.Tensor
    """int64 [M, K], local expert ids or -1."""
    topk_weights: torch.Tensor
    """[M, K], 0 where the id is -1."""
    num_per_expert: torch.Tensor
    """int64 [L] on the CPU: (token, choice) pairs for each local expert; empty with ``num_worst_tokens``."""
    handle: Handle


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
) -> Dispatched:
    """Send every token once to every rank that holds one of its experts. Collective.

    Differentiable in ``x`` and ``topk_weights``. Whether each of the two requires a gradient must be the same on all
    ranks.

    Args:
        buffer: of this rank.
        x: [T, H] with rows of a multiple of 16 bytes; to be differentiated, in a dtype that combine takes.
        topk_idx: int64 [T, K], contiguous: expert ids, or -1 for no choice.
        topk_weights: float32 [T, K]. With ``x`` in float64 also float64, which then travels unrounded.
        num_experts: experts of all ranks, a multiple of the ranks; expert e lives on rank e // (E / R).
        expert_alignment: round each entry of ``num_per_expert`` up to a multiple of this.
        num_worst_tokens: give the outputs exactly this many rows.
        config: tuning; results never depend on it.

    Raises:
        ArgumentError: an argument is not allowed; no peer was touched.
        PeerError: as in :meth:`tokenferry.Buffer.dispatch`.
    """
    if topk_weights.dtype == torch.float64:
        return _dispatch_float64(
            buffer, x, topk_idx, topk_weights, num_experts, expert_alignment, num_worst_tokens, config
        )
    return _dispatch(buffer, x, topk_idx, topk_weights, num_experts, expert_alignment, num_worst_tokens, config)


def combine(
    buffer: Buffer,
    x: torch.Tensor,
    handle: tuple[torch.Tensor, ...],
    *,
    bias: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """Send the rows of a dispatch back and sum, for every token, those of the ranks that had it. Collective.

    Differentiable in ``x`` and ``bias``. Apply router weights before. Whether ``x`` requires a gradient must be the
    same on all ranks.

    Args:
        buffer: of this rank.
        x: [M, H] in bfloat16, float16, float32 or float64, rows as dispatch returned them.
        handle: of the dispatch; usable any number of times.
        bias: None, one tensor or a tuple of two, each [T, H] of x's dtype, added first.
        config: tuning; results never depend on it.

    Returns:
        [T, H] of x's dtype, summed in float32 (float64 for float64) and rounded once.

    Raises:
        ArgumentError: an argument is not allowed; no peer was touched.
        PeerError: as in :meth:`tokenferry.Buffer.combine`.
    """
    bias_0, bias_1 = unpack_bias(bias)
    combined: torch.Tensor
    (combined,) = ops.combine(x, list(handle), ops.name_of(buffer), None, bias_0, bias_1, *_tuning(buffer, config))
    return combined


class LowLatencyDispatched(NamedTuple):
    """What :func:`low_latency_dispatch` returns."""

    x: torch.Tensor
    """bfloat16, or with FP8 float8_e4m3fn, [L, R * N, H]; rows past the count are not set."""
    scales: torch.Tensor
    """float32 [L, R * N, H / 128] or int32 [L, R * N, ceil(H / 512)], column-major; without FP8 [L, R * N, 0]."""
    num_received: torch.Tensor
    """int32 [L], the rows of each expert."""
    handle: LowLatencyHandle


def low_latency_dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    num_max_dispatch_tokens_per_rank: int,
    num_experts: int,
    *,
    use_fp8: bool = True,
    round_scale: bool = False,
    use_ue8m0: bool = False,
) -> LowLatencyDispatched:
    """Send every token to its experts, one row per (token, choice). Collective; for inference, without a gradient.

    Args and errors are those of :meth:`tokenferry.Buffer.low_latency_dispatch`.
    """
    received, scales, count, src_info, layout_range = ops.low_latency_dispatch(
        x,
        topk_idx,
        ops.name_of(buffer),
        num_max_dispatch_tokens_per_rank,
        num_experts,
        use_fp8,
        round_scale,
        use_ue8m0,
    )
    handle = LowLatencyHandle(src_info, layout_range, num_max_dispatch_tokens_per_rank, x.size(1), num_experts)
    return LowLatencyDispatched(received, scales, count, handle)


def low_latency_combine(
    buffer: Buffer, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: LowLatencyHandle
) -> torch.Tensor:
    """Send the experts' rows home and sum them, weighted. Collective; for inference, without a gradient.

    Args, result and errors are those of :meth:`tokenferry.Buffer.low_latency_combine`.
    """
    tables, (most, _, num_experts) = list(handle[:2]), handle[2:]
    name = ops.name_of(buffer)
    combined: torch.Tensor = ops.low_latency_combine(x, topk_idx, topk_weights, tables, name, most, num_experts)
    return combined


def _dispatch(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    expert_alignment: int,
    num_worst_tokens: int,
    config: Config | None,
) -> Dispatched:
    rows, ids, weights, counts, *handle = ops.dispatch(
        x,
        topk_idx,
        topk_weights,
        ops.name_of(buffer),
        num_experts,
        num_worst_tokens,
        expert_alignment,
        None,
        *_tuning(buffer, config),
    )
    return Dispatched(rows, ids, weights, counts, make_handle(handle))


def _dispatch_float64(
    buffer: Buffer,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    num_experts: int,
    expert_alignment: int,
    num_worst_tokens: int,
    config: Config | None,
) -> Dispatched:
    """Dispatch with the weights as further columns of the rows: the Buffer's own weights are float32."""
    if x.dtype != torch.float64:
        raise ArgumentError("topk_weights", f"{topk_weights.dtype} beside x in {x.dtype}", "float32")
    hidden, num_topk = x.size(1), topk_weights.size(1)
    pad = x.new_zeros(x.size(0), num_topk % 2)  # rows are whole multiples of 16 bytes
    received = _dispatch(
        buffer,
        torch.cat((x, topk_weights, pad), dim=1),
        topk_idx,
        topk_weights.detach().float(),
        num_experts,
        expert_alignment,
        num_worst_tokens,
        config,
    )
    weights = received.x[:, hidden : hidden + num_topk].masked_fill(received.topk_idx < 0, 0.0)
    return received._replace(x=received.x[:, :hidden], topk_weights=weights)


def _tuning(buffer: Buffer, config: Config | None) -> tuple[int, int]:
    """What of a ``Config`` means something here: SMs and, unless it is a preset's, the ring between nodes."""
    if config is None:
        return 0, 0
    num_sms, tokens = check_config(config).num_sms, config.num_max_rdma_chunked_recv_tokens
    presets = [preset(buffer.group_size, num_sms) for preset in (dispatch_preset, combine_preset)]
    return num_sms, 0 if tokens in [preset.num_max_rdma_chunked_recv_tokens for preset in presets] else tokens
