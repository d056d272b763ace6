"""The calls that serving and training frameworks make on an ElasticBuffer, from the imports on.

An expert e multiplies by e + 1. Inputs and weights are small integers, so that every sum is exact and a client's
result is known in closed form: ``y[t] = x[t] * sum over k of w[t, k] * (e[t, k] + 1)``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.conftest import PoolOf
from tokenferry import compat

TOKENS, HIDDEN, TOPK, LOCAL = 24, 256, 4, 5


class Layer:
    """What the layer around a client has on one rank, on the default device."""

    def __init__(self, rank: int, num_ranks: int, num_tokens: int = TOKENS) -> None:
        self.rank, self.num_ranks, self.num_experts = rank, num_ranks, num_ranks * LOCAL
        source, here = torch.Generator("cpu").manual_seed(rank), torch.get_default_device()
        drawn: dict[str, Any] = {"generator": source, "device": "cpu"}
        self.x = torch.randint(-1, 2, (num_tokens, HIDDEN), **drawn).bfloat16().to(here)
        self.ids = torch.rand(num_tokens, self.num_experts, **drawn).topk(TOPK).indices.to(here)
        self.ids[::5, 0] = -1
        self.weights = torch.randint(1, 3, self.ids.shape, **drawn).float().to(here)
        self.group = dist.group.WORLD

    @property
    def factor(self) -> torch.Tensor:
        """float32 [T, 1]: sum over k of w (e + 1)."""
        return (self.weights * (self.ids + 1)).sum(1, keepdim=True)

    @property
    def y(self) -> torch.Tensor:
        return (self.x.float() * self.factor).bfloat16()

    def compact_experts(self, rows: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the local experts make of rows with local ids."""
        scale = torch.where(ids >= 0, weights * (ids + 1 + self.rank * LOCAL), 0.0).sum(1, keepdim=True)
        return (rows.float() * scale).bfloat16()

    def grouped_experts(self, rows: torch.Tensor, ends: list[int], counts: list[int]) -> torch.Tensor:
        """Likewise of expanded rows, unweighted; what no expert owns becomes NaN."""
        out = torch.full_like(rows, torch.nan)
        for expert, (end, count) in enumerate(zip(ends, counts, strict=True)):
            out[end - count : end] = rows[end - count : end] * (expert + 1 + self.rank * LOCAL)
        return out

    def quantised(self, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows as FP8, with scales that tell the token."""
        scales = torch.arange(len(self.x)).view(-1, 1).expand(-1, columns) + 100 * self.rank
        return self.x.to(torch.float8_e4m3fn), scales.to(dtype)


Client = Callable[[Any, Layer], None]


def vllm(deep_ep: Any, layer: Layer) -> None:
    """Two-batch decode without CPU sync, compact; prefill with it, expanded."""
    assert hasattr(deep_ep, "ElasticBuffer")
    buffer = deep_ep.ElasticBuffer(
        group=layer.group, num_max_tokens_per_rank=32, hidden=HIDDEN, num_topk=TOPK, use_fp8_dispatch=True,
        allow_hybrid_mode=True, prefer_overlap_with_compute=False, allow_multiple_reduction=False,
        explicitly_destroy=True, num_cpu_timeout_secs=1800, num_gpu_timeout_secs=1800,
    )  # fmt: skip
    assert buffer.get_theoretical_num_sms(num_experts=layer.num_experts, num_topk=TOPK) > 0
    for most in (32, None):
        x, scales = layer.quantised(HIDDEN // 128, torch.int32)  # packs of four block scales
        (recv_x, recv_scales), ids, weights, handle, event = buffer.dispatch(
            x=(x, scales), topk_idx=layer.ids, topk_weights=layer.weights, num_experts=layer.num_experts,
            num_max_tokens_per_rank=most, do_expand=False, do_cpu_sync=False, async_with_compute_stream=False,
        )  # fmt: skip
        if event.event is not None:
            event.current_stream_wait()
        assert recv_x.shape == (layer.num_ranks * 32, HIDDEN)
        assert not handle.num_recv_tokens_per_expert_list
        received = handle.psum_num_recv_tokens_per_scaleup_rank[-1]
        ids[int(received) :] = -1  # in place, as its kernel does
        tokens = handle.recv_src_metadata[: int(received), 0]
        assert torch.equal(recv_scales[: int(received), 0], tokens // 32 * 100 + tokens % 32)
        out = layer.compact_experts(recv_x.bfloat16(), ids, weights)
        y, _, event = buffer.combine(
            x=out, handle=handle, topk_weights=None, async_with_compute_stream=True, allocate_on_comm_stream=True
        )
        event.current_stream_wait()
        assert torch.equal(y, layer.y)
    recv_x, ids, weights, handle, _ = buffer.dispatch(
        x=layer.x, topk_idx=layer.ids, topk_weights=layer.weights, num_experts=layer.num_experts,
        num_max_tokens_per_rank=32, do_expand=True, do_cpu_sync=True, async_with_compute_stream=False,
    )  # fmt: skip
    assert ids is None
    counts = torch.tensor(handle.num_recv_tokens_per_expert_list)
    experts = torch.arange(LOCAL).repeat_interleave(counts) + layer.rank * LOCAL
    assert weights.shape == experts.shape == recv_x.shape[:1]
    out = recv_x * (weights * (experts + 1)).unsqueeze(1)
    y = buffer.combine(x=out.bfloat16(), handle=handle, topk_weights=None)[0]
    assert torch.equal(y, layer.y)
    buffer.destroy()


def sglang(deep_ep: Any, layer: Layer) -> None:
    """Alignment 128; rows expanded for prefill, compact for decode and cut to those that came."""
    from deep_ep import ElasticBuffer  # type: ignore[import-not-found]

    buffer = ElasticBuffer(
        layer.group, num_max_tokens_per_rank=64, hidden=HIDDEN, num_topk=TOPK, use_fp8_dispatch=False,
        allow_hybrid_mode=False, sl_idx=0, prefer_overlap_with_compute=False,
    )  # fmt: skip
    assert buffer.num_bytes > 0
    for prefill in (True, False):
        recv_x, ids, weights, handle, _ = buffer.dispatch(
            layer.x, topk_idx=layer.ids, topk_weights=layer.weights, num_experts=layer.num_experts,
            num_max_tokens_per_rank=64, expert_alignment=128, num_sms=0, use_tma_aligned_col_major_sf=False,
            do_cpu_sync=prefill, do_expand=prefill,
        )  # fmt: skip
        if prefill:
            assert weights.shape == (recv_x.shape[0],)
            ends = handle.psum_num_recv_tokens_per_expert.tolist()
            counts = handle.num_unaligned_recv_tokens_per_expert.tolist()
            assert sum(handle.num_recv_tokens_per_expert_list) == len(recv_x)
            out = layer.grouped_experts(recv_x, ends, counts) * weights.unsqueeze(1)
        else:
            received = handle.psum_num_recv_tokens_per_scaleup_rank[-1].item()
            out = layer.compact_experts(recv_x[:received], ids[:received], weights[:received])
        y, _, event = buffer.combine(out.bfloat16(), handle=handle, topk_weights=None)
        assert event.event is None
        assert torch.equal(y, layer.y)
        assert torch.equal(  # weights travel back, each to its choice
            buffer.combine(recv_x, handle=handle, topk_weights=weights)[1],
            layer.weights.masked_fill(layer.ids < 0, 0.0),
        )


def megatron(deep_ep: Any, layer: Layer) -> None:
    """Forward and backward through autograd functions; everything on the communication stream."""
    ElasticBuffer = deep_ep.ElasticBuffer
    sizes = {"num_max_tokens_per_rank": 40, "hidden": HIDDEN, "num_topk": TOPK}
    num_bytes = ElasticBuffer.get_buffer_size_hint(layer.group, **sizes)
    buffer = ElasticBuffer(layer.group, num_bytes=num_bytes, **sizes)
    flags = {"async_with_compute_stream": True, "allocate_on_comm_stream": True}

    class Dispatch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, ids: Any, probs: Any) -> Any:
            recv_x, recv_ids, recv_probs, handle, event = buffer.dispatch(
                x, topk_idx=ids, topk_weights=probs, num_experts=layer.num_experts,
                num_max_tokens_per_rank=x.shape[0], expert_alignment=1, num_sms=20,
                previous_event=ElasticBuffer.capture(), **flags,
            )  # fmt: skip
            event.current_stream_wait()
            assert handle.num_sms == 20
            ctx.handle = handle
            counts = torch.tensor(handle.num_recv_tokens_per_expert_list)
            return recv_x, recv_ids, recv_probs, counts, handle

        @staticmethod
        def backward(ctx: Any, grad: Any, _ids: Any, grad_probs: Any, *_: Any) -> Any:
            grad_x, grad_probs, event = buffer.combine(
                grad, handle=ctx.handle, topk_weights=grad_probs.float(), num_sms=ctx.handle.num_sms, **flags
            )
            event.current_stream_wait()
            return grad_x, None, grad_probs

    class Combine(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: Any, handle: Any) -> Any:
            combined, _, event = buffer.combine(rows, handle=handle, num_sms=handle.num_sms, **flags)
            event.current_stream_wait()
            ctx.handle = handle
            return combined

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            rows, _, _, _, event = buffer.dispatch(grad, handle=ctx.handle, num_sms=ctx.handle.num_sms, **flags)
            event.current_stream_wait()
            return rows, None

    x, probs = layer.x.clone().requires_grad_(), layer.weights.clone().requires_grad_()
    recv_x, recv_ids, recv_probs, counts, handle = Dispatch.apply(x, layer.ids, probs)  # type: ignore[no-untyped-call]
    assert counts.tolist() == [int((recv_ids == expert).sum()) for expert in range(LOCAL)]
    y = Combine.apply(recv_x * 2, handle)  # type: ignore[no-untyped-call]
    (y.sum() + (recv_probs * (recv_ids >= 0)).sum()).backward()  # gradients of stride 0
    owners = torch.where(layer.ids >= 0, layer.ids // LOCAL, -1)
    copies = torch.stack([(owners == peer).any(1) for peer in range(layer.num_ranks)]).sum(0).unsqueeze(1)
    assert torch.equal(y, (2 * copies * x).bfloat16())
    assert torch.equal(x.grad, (2 * copies).expand(-1, HIDDEN).bfloat16())  # type: ignore[arg-type]
    assert torch.equal(probs.grad, (layer.ids >= 0).float())  # type: ignore[arg-type]


def torchtitan(deep_ep: Any, layer: Layer) -> None:
    """Training, compact; inference, expanded without CPU sync; combine's event waited for later."""
    ElasticBuffer = deep_ep.ElasticBuffer
    num_bytes = ElasticBuffer.get_buffer_size_hint(layer.group, 32, HIDDEN, num_topk=TOPK, use_fp8_dispatch=False)
    buffer = ElasticBuffer(
        layer.group, num_bytes=num_bytes, num_max_tokens_per_rank=32, hidden=HIDDEN, num_topk=TOPK,
        use_fp8_dispatch=False, deterministic=torch.are_deterministic_algorithms_enabled(), explicitly_destroy=True,
    )  # fmt: skip
    assert buffer.group == layer.group
    assert buffer.num_bytes >= num_bytes
    assert buffer.num_max_tokens_per_rank == 32
    num_sms = buffer.get_theoretical_num_sms(layer.num_experts, TOPK)

    recv_x, ids, scores, handle, _ = buffer.dispatch(
        layer.x, topk_idx=layer.ids, topk_weights=layer.weights, num_experts=layer.num_experts,
        num_max_tokens_per_rank=32, num_sms=num_sms, do_expand=False, do_cpu_sync=True,
    )  # fmt: skip
    ends = handle.psum_num_recv_tokens_per_expert
    counts = [int((ids == expert).sum()) for expert in range(LOCAL)]
    assert ends.diff(prepend=ends.new_zeros(1)).tolist() == counts
    out = layer.compact_experts(recv_x, ids, scores)
    y, _, event = buffer.combine(out, handle=handle, topk_weights=None, async_with_compute_stream=True)
    event.current_stream_wait()
    assert torch.equal(y, layer.y)
    grad, _, _, _, _ = buffer.dispatch(y, handle=handle, num_sms=handle.num_sms, do_cpu_sync=False)
    grad_x, grad_scores, _ = buffer.combine(grad, handle=handle, topk_weights=scores.float())
    owners = torch.where(layer.ids >= 0, layer.ids // LOCAL, -1)
    copies = torch.stack([(owners == peer).any(1) for peer in range(layer.num_ranks)]).sum(0).unsqueeze(1)
    assert torch.equal(grad_x, (y.float() * copies).bfloat16())
    assert torch.equal(grad_scores, layer.weights.masked_fill(layer.ids < 0, 0.0))

    recv_x, ids, scores, handle, _ = buffer.dispatch(
        layer.x, topk_idx=layer.ids, topk_weights=layer.weights, num_experts=layer.num_experts,
        num_max_tokens_per_rank=32, num_sms=num_sms, do_expand=True, do_cpu_sync=False,
    )  # fmt: skip
    ends = handle.psum_num_recv_tokens_per_expert
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    out = layer.grouped_experts(recv_x, ends.tolist(), counts) * scores.unsqueeze(1)
    assert torch.equal(buffer.combine(out.bfloat16(), handle=handle)[0], layer.y)


def automodel(deep_ep: Any, layer: Layer) -> None:
    """The handle's tensors are saved for backward, and put back."""
    for name in ("deep_ep.legacy", "deep_ep.buffers.legacy", "deep_ep"):
        assert importlib.import_module(name).Buffer is deep_ep.Buffer
    fields = (
        "topk_idx", "psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert", "recv_src_metadata",
        "dst_buffer_slot_idx", "token_metadata_at_forward", "channel_linked_list",
        "num_unaligned_recv_tokens_per_expert",
    )  # fmt: skip
    buffer = deep_ep.ElasticBuffer(
        layer.group, num_max_tokens_per_rank=TOKENS, hidden=HIDDEN, num_topk=TOPK, num_gpu_timeout_secs=300,
        explicitly_destroy=True, num_allocated_qps=17,
    )  # fmt: skip

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            rows, _, _, handle, _ = buffer.dispatch(x, topk_idx=layer.ids, num_experts=layer.num_experts)
            ctx.save_for_backward(*(getattr(handle, name) for name in fields))
            for name in fields:
                setattr(handle, name, None)
            ctx.handle = handle
            return rows

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            for name, value in zip(fields, ctx.saved_tensors, strict=True):
                setattr(ctx.handle, name, value)
            return buffer.combine(grad, handle=ctx.handle)[0]

    x = layer.x.clone().requires_grad_()
    Round.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    owners = torch.where(layer.ids >= 0, layer.ids // LOCAL, -1)
    copies = torch.stack([(owners == peer).any(1) for peer in range(layer.num_ranks)]).sum(0).unsqueeze(1)
    assert torch.equal(x.grad, copies.expand(-1, HIDDEN).bfloat16())  # type: ignore[arg-type]
    buffer.destroy()


def lightllm(deep_ep: Any, layer: Layer) -> None:
    """FP8 rows, expanded; the client sums a token's copies itself and says so in the handle's metadata."""
    buffer = deep_ep.ElasticBuffer(
        layer.group, num_max_tokens_per_rank=32, hidden=HIDDEN, num_topk=TOPK, use_fp8_dispatch=True,
        allow_multiple_reduction=True,
    )  # fmt: skip
    buffer.get_theoretical_num_sms(layer.num_experts, TOPK)

    def options(overlapped: bool) -> dict[str, Any]:
        event = deep_ep.ElasticBuffer.capture() if overlapped else None
        known = {"previous_event": event, "allocate_on_comm_stream": event is not None}
        return known | ({"async_with_compute_stream": True, "num_sms": 8} if overlapped else {})

    for overlapped in (False, True):
        (rows, scales), ids, weights, handle, done = buffer.dispatch(
            layer.quantised(HIDDEN // 128, torch.float32), topk_idx=layer.ids, topk_weights=layer.weights,
            num_experts=layer.num_experts, num_max_tokens_per_rank=32, expert_alignment=128, do_cpu_sync=True,
            do_handle_copy=False, do_expand=True, use_tma_aligned_col_major_sf=True, **options(overlapped),
        )  # fmt: skip
        if overlapped:
            done.current_stream_wait()
        assert ids is None
        assert scales.stride(0) == 1
        counts = handle.num_unaligned_recv_tokens_per_expert.tolist()
        metadata = handle.recv_src_metadata
        assert metadata.shape[1] == TOPK + 2
        start, dense = 0, torch.zeros(len(metadata), HIDDEN, dtype=torch.bfloat16)
        out = torch.full((len(rows), HIDDEN), torch.nan)
        for expert, (count, padded) in enumerate(zip(counts, handle.num_recv_tokens_per_expert_list, strict=True)):
            mine = slice(start, start + count)
            out[mine] = rows[mine].float() * (expert + 1 + layer.rank * LOCAL) * weights[mine].unsqueeze(1)
            start += padded
        assert start == len(rows)
        for row, slots in enumerate(metadata[:, 2:].tolist()):
            for slot in slots:
                if slot >= 0:
                    dense[row] += out[slot].bfloat16()
                    token = int(metadata[row, 0])
                    assert (scales[slot] == token // 32 * 100 + token % 32).all()
        handle.recv_src_metadata[:, 2:] = -1
        handle.recv_src_metadata[:, 2] = torch.arange(len(metadata))
        y, _, done = buffer.combine(dense, handle, topk_weights=None, **options(overlapped))
        if overlapped:
            done.current_stream_wait()
        assert torch.equal(y, layer.y)


def rtp_llm(deep_ep: Any, layer: Layer) -> None:
    """Global ids from the per-expert list, which has all local experts also where nothing came."""
    buffer = deep_ep.ElasticBuffer(layer.group, num_max_tokens_per_rank=32, hidden=HIDDEN, num_topk=TOPK)
    ids = torch.where(layer.ids // LOCAL == 0, layer.ids, -1)  # all of it goes to rank 0
    recv_x, _, _, handle, event = buffer.dispatch(
        layer.x, topk_idx=ids, topk_weights=layer.weights, num_experts=layer.num_experts, do_expand=True,
        do_cpu_sync=True, async_with_compute_stream=True,
    )  # fmt: skip
    event.current_stream_wait()
    assert len(handle.num_recv_tokens_per_expert_list) == LOCAL
    assert sum(handle.num_recv_tokens_per_expert_list) == len(recv_x)
    assert layer.rank == 0 or not len(recv_x)
    combined = buffer.combine(recv_x, handle)[0]
    assert torch.equal(combined, layer.x * (ids >= 0).sum(1, keepdim=True))


CLIENTS = {client.__name__: client for client in (vllm, sglang, megatron, torchtitan, automodel, lightllm, rtp_llm)}


def run(rank: int, num_ranks: int, name: str) -> None:
    compat.install()
    try:
        deep_ep = importlib.import_module("deep_ep")
        with pytest.raises(ImportError):
            from deep_ep import HybridEPBuffer  # noqa: F401
        CLIENTS[name](deep_ep, Layer(rank, num_ranks))
    finally:
        compat.uninstall()


@pytest.mark.parametrize("name", CLIENTS)
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_client(pool_of: PoolOf, num_ranks: int, name: str) -> None:
    pool_of(num_ranks).run(run, name)
