"""The operators ``tokenferry::dispatch``, ``cached_dispatch`` and ``combine``: kernels, shapes, gradients.

Dispatch copies a token to the ranks that hold its experts, combine sums a token's rows over those ranks. As linear
maps they are transposes of each other, so each one's backward is the other, along the handle of the forward.

Legend of dims: T tokens of this rank, H elements of a row, K choices, S scale columns, E experts, L = E / R local
experts, R ranks, M received rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from tokenferry.buffer import Buffer
from tokenferry.config import Config, combine_preset, dispatch_preset
from tokenferry.errors import ArgumentError
from tokenferry.handles import DispatchHandle, Handle, InternodeHandle, OperatorHandle, OperatorRows
from tokenferry.kept import make
from tokenferry.modes.inputs import COMBINE_DTYPES, ROW_ALIGNMENT
from tokenferry.ops.library import (
    apart,
    apply,
    define,
    function_of,
    is_differentiated,
    is_forward_mode,
    is_plain,
    opaque,
    run,
    run_below,
)
from tokenferry.ops.registry import buffer_of
from tokenferry.topology import Topology
from tokenferry.validation import check_int

_Tensors = Sequence[torch.Tensor]

_LENGTHS = tuple(len(kind._fields) for kind in (DispatchHandle, InternodeHandle))
_FLOATS_OF_ROW = ROW_ALIGNMENT // 4


# Kernels.


def _dispatch(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    buffer: str,
    num_experts: int,
    num_worst_tokens: int = 0,
    expert_alignment: int = 1,
    x_scales: torch.Tensor | None = None,
    num_sms: int = 0,
    chunked_recv_tokens: int = 0,
) -> list[torch.Tensor]:
    owner = buffer_of(buffer)
    if type(num_worst_tokens) is not int:
        num_worst_tokens = check_int("num_worst_tokens", num_worst_tokens, minimum=0)
    # Unset memory may hold NaN, and a zero gradient times NaN is NaN in the weights that touch unused rows.
    worst = OperatorRows(num_worst_tokens)
    config = _config(owner, dispatch_preset, num_sms, chunked_recv_tokens) if num_sms or chunked_recv_tokens else None
    given = x if x_scales is None else (x, x_scales)
    rows, scales, ids, weights, counts, handle = owner._dispatch_choices(
        given, topk_idx, topk_weights, num_experts, expert_alignment, worst, config
    )
    assert ids is not None
    assert weights is not None
    assert handle is not None
    beside = [] if scales is None else [scales]
    if num_worst_tokens:
        if type(handle) is InternodeHandle:
            _clear_unused(owner, (rows, *beside), handle)
        # On the device: CUDA graphs take nothing on the host. (This method takes half of what ``new_empty`` does.)
        per_local_expert = x.new_empty_strided((0,), (1,), dtype=torch.int64)
    else:
        per_local_expert = torch.tensor(counts, dtype=torch.int64, device="cpu")
    return [rows, ids, weights, per_local_expert, *handle, *beside]


def _cached_dispatch(
    x: torch.Tensor,
    handle: _Tensors,
    buffer: str,
    x_scales: torch.Tensor | None = None,
    num_sms: int = 0,
    chunked_recv_tokens: int = 0,
) -> list[torch.Tensor]:
    owner, known = buffer_of(buffer), _known(handle)
    config = _config(owner, dispatch_preset, num_sms, chunked_recv_tokens) if num_sms or chunked_recv_tokens else None
    received = owner.dispatch(x if x_scales is None else (x, x_scales), known, config=config)[0]
    rows = received if isinstance(received, tuple) else (received,)
    if type(known) is not OperatorHandle:
        _clear_unused(owner, rows, known)
    return list(rows)


def _combine(
    x: torch.Tensor,
    handle: _Tensors,
    buffer: str,
    topk_weights: torch.Tensor | None = None,
    bias_0: torch.Tensor | None = None,
    bias_1: torch.Tensor | None = None,
    num_sms: int = 0,
    chunked_recv_tokens: int = 0,
) -> list[torch.Tensor]:
    bias = None if bias_0 is None and bias_1 is None else (bias_0, bias_1)
    owner = buffer_of(buffer)
    config = _config(owner, combine_preset, num_sms, chunked_recv_tokens) if num_sms or chunked_recv_tokens else None
    combined, weights, _ = owner.combine(x, _known(handle), topk_weights, bias, config)
    return [combined] if weights is None else [combined, weights]


def _config(owner: Buffer, preset: Callable[[int, int], Config], num_sms: int, chunked_recv_tokens: int) -> Config:
    """The preset, with what the caller wants otherwise."""
    config = preset(owner.group_size, num_sms or Buffer.num_sms)
    if not chunked_recv_tokens:
        return config
    check_int("chunked_recv_tokens", chunked_recv_tokens, minimum=2)
    return dataclasses.replace(
        config, num_max_rdma_chunked_send_tokens=1, num_max_rdma_chunked_recv_tokens=chunked_recv_tokens
    )


def _known(handle: _Tensors) -> OperatorHandle | InternodeHandle:
    if isinstance(handle, (list, tuple)):
        if len(handle) == _LENGTHS[0]:
            return make(OperatorHandle, handle)
        if len(handle) == _LENGTHS[1]:
            return make(InternodeHandle, handle)
    allowed = f"the {_LENGTHS[0]} tensors (between nodes {_LENGTHS[1]}) that dispatch returned"
    given = f"{len(handle)} tensors" if isinstance(handle, (list, tuple)) else type(handle).__name__
    raise ArgumentError("handle", given, allowed)


def _clear_unused(owner: Buffer, outputs: tuple[torch.Tensor, ...], handle: Handle) -> None:
    """Zero the rows of worst-case outputs that no token arrived in."""
    owner._live_runtime().clear_unused(outputs, handle.places)


# Shapes.


def _dispatch_shapes(
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    buffer: str,
    num_experts: int,
    num_worst_tokens: int = 0,
    expert_alignment: int = 1,
    x_scales: torch.Tensor | None = None,
    num_sms: int = 0,
    chunked_recv_tokens: int = 0,
) -> list[torch.Tensor]:
    ranks, (tokens, choices) = buffer_of(buffer).group_size, topk_idx.shape
    num_counts = 0 if num_worst_tokens else num_experts // ranks
    rows = num_worst_tokens or torch.library.get_ctx().new_dynamic_size()
    handle = _handle_shapes(x, buffer_of(buffer).topology, tokens, rows)
    return [
        x.new_empty((rows, x.size(1))),
        x.new_empty((rows, choices), dtype=torch.int64),
        x.new_empty((rows, choices), dtype=torch.float32),
        x.new_empty(num_counts, dtype=torch.int64, device=x.device if num_worst_tokens else "cpu"),
        *handle,
        *([] if x_scales is None else [x_scales.new_empty((rows, x_scales.size(1)))]),
    ]


def _handle_shapes(x: torch.Tensor, topology: Topology, tokens: int, rows: Any) -> Handle:
    ranks, nodes, local = topology.num_ranks, topology.num_nodes, len(topology.local_ranks)
    member = x.new_empty((tokens, ranks), dtype=torch.bool)

    def int32(*shape: int) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.int32)

    if nodes == 1:
        return DispatchHandle(
            rank_prefix_matrix=int32(ranks, ranks),
            channel_prefix_matrix=int32(ranks, 1),
            recv_channel_prefix_matrix=int32(ranks, 1),
            recv_src_idx=int32(rows),
            is_token_in_rank=member,
            send_head=int32(tokens, ranks),
        )
    return InternodeHandle(
        is_token_in_rank=member,
        rdma_channel_prefix_matrix=int32(nodes, 1),
        gbl_channel_prefix_matrix=int32(ranks, 1),
        recv_rdma_channel_prefix_matrix=int32(nodes, 1),
        recv_rdma_rank_prefix_sum=int32(nodes),
        recv_gbl_channel_prefix_matrix=int32(ranks, 1),
        recv_gbl_rank_prefix_sum=int32(ranks),
        recv_src_meta=x.new_empty((rows, 8), dtype=torch.uint8),
        send_rdma_head=int32(tokens, nodes),
        send_nvl_head=int32(torch.library.get_ctx().new_dynamic_size(), local),  # type: ignore[arg-type]
    )


def _cached_dispatch_shapes(
    x: torch.Tensor,
    handle: _Tensors,
    buffer: str,
    x_scales: torch.Tensor | None = None,
    num_sms: int = 0,
    chunked_recv_tokens: int = 0,
) -> list[torch.Tensor]:
    rows = _known(handle).num_rows
    return [given.new_empty((rows, given.size(1))) for given in (x, x_scales) if given is not None]


def _combine_shapes(
    x: torch.Tensor,
    handle: _Tensors,
    buffer: str,
    topk_weights: torch.Tensor | None = None,
    bias_0: torch.Tensor | None = None,
    bias_1: torch.Tensor | None = None,
    num_sms: int = 0,
    chunked_recv_tokens: int = 0,
) -> list[torch.Tensor]:
    tokens = _known(handle).is_token_in_rank.size(0)
    return [given.new_empty((tokens, given.size(1))) for given in (x, topk_weights) if given is not None]


# Gradients. They are made of the operators again, and can be differentiated, compiled and checkpointed likewise.
# Handles pass as lists, which autograd does not look into.


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_idx: torch.Tensor,
        rest: tuple[Any, ...],
        kernel: Callable[..., Any] | None,
    ) -> Any:
        rows, ids, weights, counts, *others = run_below(DISPATCH, kernel, x, topk_idx, topk_weights, *rest)
        return rows, weights, (ids, counts, *others)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        rows, weights, (ids, _, *others) = output
        with_scales = inputs[3][4] is not None
        handle = others[:-1] if with_scales else others
        ctx.buffer, ctx.tuning = inputs[3][0], inputs[3][-2:]
        constant = [out for out, needed in zip((rows, weights), ctx.needs_input_grad) if not needed]  # noqa: B905
        if constant and not is_forward_mode():
            ctx.mark_non_differentiable(*constant)
        ctx.save_for_backward(ids, *handle)
        ctx.save_for_forward(ids, *handle)

    @staticmethod
    @opaque
    def backward(ctx: Any, grad_x: torch.Tensor, grad_weights: torch.Tensor, *_: None) -> tuple[Any, ...]:
        ids, *handle = ctx.saved_tensors
        needs_x, needs_weights, *_ = ctx.needs_input_grad
        if not needs_weights:
            (home,) = combine(grad_x, handle, ctx.buffer, None, None, None, *ctx.tuning)
            return home, None, None, None, None
        # Forward wrote a constant 0 where a choice is another rank's, so nothing flows back from there.
        weights = grad_weights.masked_fill(ids < 0, 0.0)
        if needs_x:
            return *combine(grad_x, handle, ctx.buffer, weights, None, None, *ctx.tuning), None, None, None
        (rows,) = combine(_as_rows(weights), handle, ctx.buffer, None, None, None, *ctx.tuning)
        return None, rows[:, : weights.size(1)], None, None, None

    @staticmethod
    @opaque
    def jvp(ctx: Any, x: torch.Tensor, weights: torch.Tensor, *_: None) -> tuple[Any, ...]:
        ids, *handle = ctx.saved_tensors
        (rows,) = cached_dispatch(x, handle, ctx.buffer, None, *ctx.tuning)
        return rows, _dispatch_weights(ctx, weights, handle).masked_fill(ids < 0, 0.0), None


class _CachedDispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor,
        handle: _Tensors,
        buffer: str,
        tuning: tuple[int, int],
        kernel: Callable[..., Any] | None,
    ) -> Any:
        (rows,) = run_below(CACHED_DISPATCH, kernel, x, handle, buffer, None, *tuning)
        return rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        _, handle, ctx.buffer, ctx.tuning, _ = inputs
        ctx.save_for_backward(*handle)
        ctx.save_for_forward(*handle)

    @staticmethod
    @opaque
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (home,) = combine(grad, list(ctx.saved_tensors), ctx.buffer, None, None, None, *ctx.tuning)
        return home, None, None, None, None

    @staticmethod
    @opaque
    def jvp(ctx: Any, x: torch.Tensor, *_: None) -> Any:
        return cached_dispatch(x, list(ctx.saved_tensors), ctx.buffer, None, *ctx.tuning)[0]


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor,
        topk_weights: torch.Tensor | None,
        bias_0: torch.Tensor | None,
        bias_1: torch.Tensor | None,
        handle: _Tensors,
        buffer: str,
        tuning: tuple[int, int],
        kernel: Callable[..., Any] | None,
    ) -> tuple[torch.Tensor, ...]:
        return tuple(run_below(COMBINE, kernel, x, handle, buffer, topk_weights, bias_0, bias_1, *tuning))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        *_, handle, ctx.buffer, ctx.tuning, _ = inputs
        ctx.save_for_backward(*handle)
        ctx.save_for_forward(*handle)

    @staticmethod
    @opaque
    def backward(ctx: Any, grad: torch.Tensor, grad_weights: torch.Tensor | None = None) -> tuple[Any, ...]:
        handle = list(ctx.saved_tensors)
        needs_x, needs_weights, *needs_bias = ctx.needs_input_grad[:4]
        out = out_weights = None
        if needs_x:
            (out,) = cached_dispatch(grad, handle, ctx.buffer, None, *ctx.tuning)
        if needs_weights:
            assert grad_weights is not None
            out_weights = _dispatch_weights(ctx, grad_weights, handle)
        return out, out_weights, *(grad if needed else None for needed in needs_bias), None, None, None, None

    @staticmethod
    @opaque
    def jvp(
        ctx: Any,
        x: torch.Tensor,
        weights: torch.Tensor | None,
        bias_0: torch.Tensor | None,
        bias_1: torch.Tensor | None,
        *_: None,
    ) -> tuple[Any, ...]:
        handle = list(ctx.saved_tensors)
        return tuple(combine(x, handle, ctx.buffer, weights, bias_0, bias_1, *ctx.tuning))


def _dispatch_weights(ctx: Any, weights: torch.Tensor, handle: list[torch.Tensor]) -> torch.Tensor:
    """Router weights [T, K] along a handle, all K of them to every rank."""
    rows: torch.Tensor = cached_dispatch(_as_rows(weights), handle, ctx.buffer, None, *ctx.tuning)[0]
    return rows[:, : weights.size(1)]


def _as_rows(weights: torch.Tensor) -> torch.Tensor:
    """float32 [n, K] with as many further columns as rows of whole 16 bytes need."""
    return F.pad(weights, (0, -weights.size(1) % _FLOATS_OF_ROW))


def _check_differentiable(x: torch.Tensor) -> None:
    if x.requires_grad and x.dtype not in COMBINE_DTYPES and not torch.is_inference_mode_enabled():
        given = f"{x.dtype} rows that require a gradient"
        raise ArgumentError("x", given, "a dtype that combine takes, or x.detach()")


def _dispatch_differentiable(
    keys: torch.DispatchKeySet | None,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    buffer: str,
    num_experts: int,
    num_worst_tokens: int = 0,
    expert_alignment: int = 1,
    x_scales: torch.Tensor | None = None,
    num_sms: int = 0,
    chunked_recv_tokens: int = 0,
) -> Any:
    rest = (buffer, num_experts, num_worst_tokens, expert_alignment, x_scales, num_sms, chunked_recv_tokens)
    _check_differentiable(x)
    if not is_differentiated(x, topk_weights):
        return run(keys, DISPATCH, _dispatch, x, topk_idx, topk_weights, *rest)
    kernel = _dispatch if is_plain(keys) else None
    rows, weights, (ids, *others) = apply(_Dispatch, x, topk_weights, topk_idx, rest, kernel)
    return [rows, ids, weights, *(others if keys is None else apart(others))]


def _cached_dispatch_differentiable(
    keys: torch.DispatchKeySet | None,
    x: torch.Tensor,
    handle: _Tensors,
    buffer: str,
    x_scales: torch.Tensor | None = None,
    num_sms: int = 0,
    chunked_recv_tokens: int = 0,
) -> Any:
    _check_differentiable(x)
    tuning = num_sms, chunked_recv_tokens
    if x_scales is not None or not is_differentiated(x):
        return run(keys, CACHED_DISPATCH, _cached_dispatch, x, handle, buffer, x_scales, *tuning)
    return [apply(_CachedDispatch, x, handle, buffer, tuning, _cached_dispatch if is_plain(keys) else None)]


def _combine_differentiable(
    keys: torch.DispatchKeySet | None,
    x: torch.Tensor,
    handle: _Tensors,
    buffer: str,
    topk_weights: torch.Tensor | None = None,
    bias_0: torch.Tensor | None = None,
    bias_1: torch.Tensor | None = None,
    num_sms: int = 0,
    chunked_recv_tokens: int = 0,
) -> Any:
    tuning = num_sms, chunked_recv_tokens
    if not is_differentiated(x, topk_weights, bias_0, bias_1):
        return run(keys, COMBINE, _combine, x, handle, buffer, topk_weights, bias_0, bias_1, *tuning)
    kernel = _combine if is_plain(keys) else None
    return list(apply(_Combine, x, topk_weights, bias_0, bias_1, handle, buffer, tuning, kernel))


DISPATCH = define(
    "dispatch",
    "(Tensor x, Tensor topk_idx, Tensor topk_weights, str buffer, int num_experts, int num_worst_tokens=0, "
    "int expert_alignment=1, Tensor? x_scales=None, int num_sms=0, int chunked_recv_tokens=0) -> Tensor[]",
    _dispatch,
    _dispatch_shapes,
    _dispatch_differentiable,
)
CACHED_DISPATCH = define(
    "cached_dispatch",
    "(Tensor x, Tensor[] handle, str buffer, Tensor? x_scales=None, int num_sms=0, int chunked_recv_tokens=0) "
    "-> Tensor[]",
    _cached_dispatch,
    _cached_dispatch_shapes,
    _cached_dispatch_differentiable,
)
COMBINE = define(
    "combine",
    "(Tensor x, Tensor[] handle, str buffer, Tensor? topk_weights=None, Tensor? bias_0=None, Tensor? bias_1=None, "
    "int num_sms=0, int chunked_recv_tokens=0) -> Tensor[]",
    _combine,
    _combine_shapes,
    _combine_differentiable,
)

dispatch = function_of(DISPATCH, _dispatch_differentiable, _dispatch)
cached_dispatch = function_of(CACHED_DISPATCH, _cached_dispatch_differentiable, _cached_dispatch)
combine = function_of(COMBINE, _combine_differentiable, _combine)
