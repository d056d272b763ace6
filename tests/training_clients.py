"""The calls of training frameworks on a Buffer: autograd functions around dispatch and combine."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

import pytest
import torch

from tests.clients import MOST, Client, Site, low_latency_hint, sized
from tests.test_elastic_clients import HIDDEN, LOCAL


class Way(NamedTuple):
    """What differs between frameworks."""

    asynchronous: bool
    packs_gradients: bool
    """Whether ``.contiguous()`` is called on gradients, which arrive with stride 0."""
    saves_handle: bool
    """Whether the handle goes through ``save_for_backward``."""


def train(buffer: Any, site: Site, way: Way, EventHandle: Any, EventOverlap: Any) -> None:
    """Forward and backward of a layer whose experts double, and of the router's weights."""
    flags = {"async_finish": way.asynchronous, "allocate_on_comm_stream": way.asynchronous}

    def begin() -> Any:
        return EventOverlap(EventHandle()) if way.asynchronous else None

    def end(event: Any) -> None:
        placeholder = EventOverlap(None)
        placeholder.event = event.event  # xtuner moves events about
        assert (placeholder.event is not None) == way.asynchronous
        if way.asynchronous:
            placeholder.current_stream_wait()

    def packed(grad: Any) -> Any:
        return grad.contiguous() if way.packs_gradients else grad

    def keep(ctx: Any, handle: Any) -> None:
        if way.saves_handle:
            ctx.save_for_backward(*handle)
        else:
            ctx.handle = handle

    def kept(ctx: Any) -> Any:
        return ctx.saved_tensors if way.saves_handle else ctx.handle

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, ids: Any, probs: Any) -> Any:
            per_rank, per_node, per_expert, member, event = buffer.get_dispatch_layout(
                ids, site.num_experts, previous_event=begin(), **flags
            )
            recv_x, recv_ids, recv_probs, counts, handle, event = buffer.dispatch(
                x=x, topk_idx=ids, topk_weights=probs, num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node, is_token_in_rank=member, num_tokens_per_expert=per_expert,
                previous_event=event, **flags,
            )  # fmt: skip
            end(event)
            keep(ctx, handle)
            assert counts == [int((recv_ids == expert).sum()) for expert in range(LOCAL)]
            return recv_x, recv_ids, recv_probs, handle

        @staticmethod
        def backward(ctx: Any, grad: Any, _ids: Any, grad_probs: Any, _handle: Any) -> Any:
            grad_x, grad_probs, event = buffer.combine(
                packed(grad), kept(ctx), topk_weights=grad_probs.float(), previous_event=begin(), **flags
            )
            end(event)
            return grad_x, None, grad_probs

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Any, handle: Any) -> Any:
            combined, _, event = buffer.combine(rows, handle=handle, previous_event=begin(), **flags)
            end(event)
            keep(ctx, handle)
            return combined

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            rows, *nothing, event = buffer.dispatch(packed(grad), handle=kept(ctx), previous_event=begin(), **flags)
            assert nothing == [None] * 4
            end(event)
            return rows, None

    x, probs = site.x.clone().requires_grad_(), site.weights.clone().requires_grad_()
    recv_x, recv_ids, recv_probs, handle = Dispatch.apply(x, site.ids, probs)  # type: ignore[no-untyped-call]
    y = Combine.apply(recv_x * 2, handle)  # type: ignore[no-untyped-call]
    (y.sum() + (recv_probs * (recv_ids >= 0)).sum()).backward()
    assert x.grad is not None
    assert probs.grad is not None
    assert torch.equal(y, (2 * site.copies * x).bfloat16())
    assert torch.equal(x.grad, (2 * site.copies).expand(-1, HIDDEN).bfloat16())
    assert torch.equal(probs.grad, (site.ids >= 0).float())


def megatron(deep_ep: Any, site: Site) -> None:
    """A global Buffer that grows with the rows; the old one goes when the name does. Events, or none."""
    from deep_ep import Buffer  # type: ignore[import-not-found]
    from deep_ep.utils import EventHandle, EventOverlap  # type: ignore[import-not-found]

    Buffer.set_num_sms(20)
    buffer = None
    for hidden_bytes in (HIDDEN, 2 * HIDDEN):
        nvl, rdma = sized(Buffer, site, hidden_bytes)
        if buffer is None or buffer.group != site.group or buffer.num_nvl_bytes < nvl or buffer.num_rdma_bytes < rdma:
            buffer = Buffer(site.group, nvl, rdma)
        for asynchronous in (False, True):
            train(buffer, site, Way(asynchronous, True, False), EventHandle, EventOverlap)


def automodel(deep_ep: Any, site: Site) -> None:
    """Destroyed by hand; asks for the size between nodes where FP8 is compiled."""
    for name in ("deep_ep.legacy", "deep_ep.buffers.legacy", "deep_ep"):
        Buffer = importlib.import_module(name).Buffer
    from deep_ep.utils import EventHandle, EventOverlap

    assert Buffer.is_sm90_compiled()
    buffer = Buffer(site.group, *sized(Buffer, site, 2 * HIDDEN), explicitly_destroy=True)
    train(buffer, site, Way(True, True, False), EventHandle, EventOverlap)
    buffer.destroy()
    assert buffer.runtime is None


def torchtitan(deep_ep: Any, site: Site) -> None:
    """Its functions for V1: gradients go on as autograd delivers them."""
    from deep_ep import Buffer, EventHandle, EventOverlap

    buffer = Buffer(site.group, *sized(Buffer, site, 2 * HIDDEN))
    train(buffer, site, Way(True, False, False), EventHandle, EventOverlap)


def xtuner(deep_ep: Any, site: Site) -> None:
    """A low-latency Buffer for normal operations, handles in ``save_for_backward``, gradients of outputs."""
    from deep_ep import Buffer, EventOverlap
    from deep_ep_cpp import Config, EventHandle  # type: ignore[import-not-found]

    Buffer.set_num_sms(20)
    assert Buffer.get_low_latency_rdma_size_hint(128, 128, site.num_ranks, site.num_experts) > 0
    nvl, rdma = sized(Buffer, site, 2 * HIDDEN)
    assert isinstance(Buffer.get_dispatch_config(site.num_ranks), Config)
    buffer = Buffer(
        site.group, nvl, max(rdma, low_latency_hint(Buffer, site)), low_latency_mode=True,
        num_qps_per_rank=max(site.num_experts / site.num_ranks, Buffer.num_sms // 2),
    )  # fmt: skip
    assert buffer.num_nvl_bytes >= nvl
    train(buffer, site, Way(True, False, True), EventHandle, EventOverlap)
    per_rank, per_node, per_expert, member, _ = buffer.get_dispatch_layout(site.ids, site.num_experts)
    recv_x, ids, weights, _, handle, _ = buffer.dispatch(
        site.x, None, per_rank, per_node, member, per_expert, site.ids, site.weights
    )
    recv_x.requires_grad_()
    assert recv_x.is_leaf
    assert len(handle) == 6
    assert all(type(element) is torch.Tensor for element in handle)
    scale = torch.where(ids >= 0, weights * (ids + 1 + site.rank * LOCAL), 0.0).sum(1, keepdim=True)
    out = recv_x.float() * scale
    site.check(buffer.combine(out.bfloat16(), handle)[0])  # rows that want a gradient
    out.sum().backward()
    assert recv_x.grad is not None
    assert torch.equal(recv_x.grad, scale.expand(-1, HIDDEN).bfloat16())


def readme(deep_ep: Any, site: Site) -> None:
    """The functions of DeepEP's README, which several clients copied."""
    Buffer = deep_ep.Buffer
    buffer = Buffer(site.group, *sized(Buffer, site, 2 * HIDDEN))

    def dispatch_forward(previous: Any) -> tuple[Any, ...]:
        per_rank, per_node, per_expert, member, previous = buffer.get_dispatch_layout(
            site.ids, site.num_experts, previous_event=previous, async_finish=True,
            allocate_on_comm_stream=previous is not None,
        )  # fmt: skip
        found: tuple[Any, ...] = buffer.dispatch(
            site.x, topk_idx=site.ids, topk_weights=site.weights, num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node, is_token_in_rank=member, num_tokens_per_expert=per_expert,
            previous_event=previous, async_finish=True, allocate_on_comm_stream=True,
        )  # fmt: skip
        return found

    for previous in (None, Buffer.capture()):
        recv_x, ids, weights, _, handle, event = dispatch_forward(previous)
        event.current_stream_wait()
        grad_x, grad_weights, event = buffer.combine(recv_x, handle, topk_weights=weights, async_finish=True)
        event.current_stream_wait()
        assert torch.equal(grad_x, (site.x * site.copies).bfloat16())
        assert torch.equal(grad_weights, site.weights.masked_fill(site.ids < 0, 0.0))
        out = site.compact_experts(recv_x, ids, weights)
        y, _, event = buffer.combine(
            out, handle, async_finish=True, previous_event=Buffer.capture(), allocate_on_comm_stream=True
        )
        with event:
            assert len(y) == len(site.x)
        site.check(y)
    with pytest.raises(RuntimeError, match="low_latency_mode"):
        buffer.low_latency_dispatch(site.x, site.ids, MOST, site.num_experts)


TRAINING: dict[str, Client] = {
    client.__name__: client for client in (megatron, automodel, torchtitan, xtuner, readme)
}
