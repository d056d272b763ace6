"""The calls that training and serving frameworks make on a Buffer, from the imports on, written as they write them.

An expert e multiplies by e + 1; inputs and weights are small integers, so that every result is known in closed form
(see :class:`tests.test_elastic_clients.Layer`). High-throughput clients apply the weights themselves.
"""

from __future__ import annotations

import gc
import inspect
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.test_elastic_clients import HIDDEN, LOCAL, TOKENS, TOPK, Layer

MOST = 2 * TOKENS


class Site(Layer):
    """What the layer around a client has on one rank of a group."""

    def __init__(self, group: Any, num_tokens: int) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), num_tokens)
        self.group = group

    @property
    def copies(self) -> torch.Tensor:
        """int64 [T, 1]: ranks that a token goes to."""
        owners = torch.where(self.ids >= 0, self.ids // LOCAL, -1)
        return torch.stack([(owners == peer).any(1) for peer in range(self.num_ranks)]).sum(0).unsqueeze(1)

    def slab_experts(self, slabs: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """What the local experts make of low-latency slabs; NaN past the rows that came."""
        out = torch.full(slabs.shape, torch.nan, dtype=torch.bfloat16)
        for expert, count in enumerate(counts.tolist()):
            out[expert, :count] = (slabs[expert, :count].float() * (expert + 1 + self.rank * LOCAL)).bfloat16()
        return out

    def dequantised(self, packed: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Slabs from FP8 and scales for 128 elements, as a masked GEMM reads them."""
        data, scales = packed
        assert data.is_contiguous()
        assert scales.stride(-2) == 1
        assert scales.shape == (*data.shape[:2], HIDDEN // 128)
        return data.float() * scales.contiguous().repeat_interleave(128, 2)

    def check(self, y: torch.Tensor) -> None:
        assert torch.equal(y, self.y)


def sized(Buffer: Any, site: Site, hidden_bytes: int) -> tuple[int, int]:
    """Bytes as training frameworks ask for them: the most that the two presets want."""
    nvl = rdma = 0
    for config in (Buffer.get_dispatch_config(site.num_ranks), Buffer.get_combine_config(site.num_ranks)):
        nvl = max(nvl, config.get_nvl_buffer_size_hint(hidden_bytes, site.num_ranks))
        rdma = max(rdma, config.get_rdma_buffer_size_hint(hidden_bytes, site.num_ranks))
    return nvl, rdma


def low_latency_hint(Buffer: Any, site: Site) -> int:
    hint: int = Buffer.get_low_latency_rdma_size_hint(MOST, HIDDEN, site.num_ranks, site.num_experts)
    return hint


def vllm_high_throughput(deep_ep: Any, site: Site) -> None:
    """Buffers cached by their arguments, two micro-batches with live handles, global ids made of local ones."""
    cache: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
    wanted = {
        "group": site.group, "num_nvl_bytes": 1 << 30, "num_rdma_bytes": 0, "low_latency_mode": False,
        "num_qps_per_rank": 1, "explicitly_destroy": True,
    }  # fmt: skip
    key = tuple(sorted((name, hash(value)) for name, value in wanted.items()))
    buffer = cache.setdefault(key, deep_ep.Buffer(**wanted))
    assert cache[key] is buffer
    deep_ep.Buffer.set_num_sms(min(buffer.num_sms, 20))
    ranks = [2, 4, 8, 16, 24, 32, 64, 128, 144, 160]
    presets = {
        name: getattr(deep_ep.Buffer, name)(site.num_ranks) if site.num_ranks in ranks else None
        for name in ("get_dispatch_config", "get_combine_config")
    }
    sent = []
    for quantised in (False, True):
        x = site.quantised(HIDDEN // 128, torch.float32) if quantised else site.x
        previous = buffer.capture()
        per_rank, per_node, per_expert, member, event = buffer.get_dispatch_layout(
            topk_idx=site.ids, num_experts=site.num_experts, previous_event=previous, async_finish=False,
            allocate_on_comm_stream=False,
        )  # fmt: skip
        recv_x, ids, weights, counts, handle, event = buffer.dispatch(
            x=x, handle=None, num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=member, num_tokens_per_expert=per_expert, topk_idx=site.ids, topk_weights=site.weights,
            expert_alignment=1, config=presets["get_dispatch_config"], previous_event=previous,
            async_finish=not quantised, allocate_on_comm_stream=False,
        )  # fmt: skip
        assert (event.event is None) == quantised
        if event.event is not None:
            event.current_stream_wait()
        sent.append((recv_x, ids, weights, counts, handle))
    for recv_x, ids, weights, counts, handle in reversed(sent):
        assert torch.equal(torch.tensor(counts), torch.bincount(ids[ids >= 0], minlength=LOCAL))
        everywhere = torch.where(ids == -1, site.num_experts - 1, ids + site.rank * LOCAL)
        rows = recv_x[0].float() if isinstance(recv_x, tuple) else recv_x
        out = site.compact_experts(rows, torch.where(ids == -1, -1, everywhere - site.rank * LOCAL), weights)
        y, nothing, event = buffer.combine(
            x=out, handle=handle, topk_weights=None, config=presets["get_combine_config"], previous_event=None,
            async_finish=False, allocate_on_comm_stream=False,
        )  # fmt: skip
        assert nothing is None
        site.check(y)
    with threading.Lock():
        for handle in list(cache.values()):
            handle.destroy()
    del buffer, handle
    assert not cache


def vllm_low_latency(deep_ep: Any, site: Site) -> None:
    """Hooks, ``out=``; then what fault tolerance does between steps."""
    hint = deep_ep.Buffer.get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank=MOST, hidden=HIDDEN, num_ranks=site.num_ranks, num_experts=site.num_experts
    )
    buffer = deep_ep.Buffer(
        group=site.group, num_nvl_bytes=1 << 30, num_rdma_bytes=hint, low_latency_mode=True, num_qps_per_rank=LOCAL,
        allow_nvlink_for_low_latency_mode=True, allow_mnnvl=False, explicitly_destroy=True, enable_shrink=True,
    )  # fmt: skip
    for step, use_fp8 in enumerate((True, False, True)):
        packed, counts, handle, _, hook = buffer.low_latency_dispatch(
            site.x, site.ids, MOST, site.num_experts, use_fp8=use_fp8, round_scale=step == 2, use_ue8m0=False,
            async_finish=False, return_recv_hook=True,
        )  # fmt: skip
        hook()
        assert (counts.dtype, counts.shape) == (torch.int32, (LOCAL,))
        slabs = site.dequantised(packed) if use_fp8 else packed
        assert slabs.view(-1, HIDDEN).shape == (LOCAL * site.num_ranks * MOST, HIDDEN)
        out = torch.empty_like(site.x)
        _, _, hook = buffer.low_latency_combine(
            site.slab_experts(slabs, counts), site.ids, site.weights, handle, async_finish=False, zero_copy=False,
            return_recv_hook=step == 1, out=out,
        )  # fmt: skip
        assert (hook is None) == (step != 1)
        if hook is not None:
            hook()
        site.check(out)
        status = torch.ones(site.num_ranks, dtype=torch.int32)
        buffer.low_latency_query_mask_buffer(status)
        assert not status.any()
        dist.barrier(site.group)  # nobody is in an operation
        buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
        if out.is_cuda:  # nobody sends before that is done
            torch.cuda.synchronize()
            dist.barrier(site.group)
        buffer.low_latency_clean_mask_buffer()
    buffer.destroy()


def sglang(deep_ep: Any, site: Site) -> None:
    """One Buffer: prefill with Configs of a JSON file, decode by the low-latency pair, to and fro."""
    from deep_ep import Buffer, Config  # type: ignore[import-not-found]

    names = ("nvl_chunked_send", "nvl_chunked_recv", "rdma_chunked_send", "rdma_chunked_recv")
    json = {"num_sms": 24, **dict(zip((f"num_max_{name}_tokens" for name in names), (8, 288, 6, 128), strict=True))}
    config = Config(**json)
    nvl = config.get_nvl_buffer_size_hint(HIDDEN, site.num_ranks)
    rdma = max(config.get_rdma_buffer_size_hint(HIDDEN, site.num_ranks), low_latency_hint(Buffer, site))
    buffer = Buffer(
        site.group, nvl, rdma, low_latency_mode=True, num_qps_per_rank=Buffer.num_sms // 2, allow_mnnvl=True
    )
    assert {"x", "topk_idx", "config"} <= set(inspect.signature(buffer.dispatch).parameters)
    assert "use_fp8" in inspect.signature(buffer.low_latency_dispatch).parameters

    def prefill(asynchronous: bool) -> None:
        columns = site.quantised(HIDDEN // 128, torch.int32)[1]
        scales = columns.t().contiguous().t()  # column-major packs
        previous = Buffer.capture() if asynchronous else None
        per_rank, per_node, per_expert, member, previous = buffer.get_dispatch_layout(
            site.ids, site.num_experts, previous_event=previous, async_finish=asynchronous,
            allocate_on_comm_stream=previous is not None,
        )  # fmt: skip
        (rows, recv_scales), ids, weights, counts, handle, event = buffer.dispatch(
            (site.x.to(torch.float8_e4m3fn), scales), topk_idx=site.ids, topk_weights=site.weights,
            num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=member,
            num_tokens_per_expert=per_expert, previous_event=previous, async_finish=asynchronous,
            allocate_on_comm_stream=(previous is not None) and asynchronous, expert_alignment=128, config=config,
        )  # fmt: skip
        if asynchronous:
            event.current_stream_wait()
        assert counts == [-(-int((ids == expert).sum()) // 128) * 128 for expert in range(LOCAL)]
        assert torch.empty(sum(counts), HIDDEN).shape[0] % 128 == 0
        assert (recv_scales[:, 0] == recv_scales[:, -1]).all()
        out = site.compact_experts(rows.float(), ids, weights)
        previous = Buffer.capture() if asynchronous else None
        y, _, event = buffer.combine(
            out, handle, async_finish=asynchronous, previous_event=previous,
            allocate_on_comm_stream=previous is not None, config=config,
        )  # fmt: skip
        if asynchronous:
            event.current_stream_wait()
        site.check(y)

    def decode(hooked: bool) -> None:
        packed, masked_m, handle, event, hook = buffer.low_latency_dispatch(
            site.x, site.ids, MOST, site.num_experts, use_fp8=True, async_finish=not hooked, return_recv_hook=hooked,
            round_scale=False, use_ue8m0=False,
        )  # fmt: skip
        hook() if hooked else event.current_stream_wait()
        assert (len(site.x) * buffer.group_size * TOPK + site.num_experts) // site.num_experts > 0
        y, event, hook = buffer.low_latency_combine(
            x=site.slab_experts(site.dequantised(packed), masked_m), topk_idx=site.ids, topk_weights=site.weights,
            handle=handle, async_finish=not hooked, return_recv_hook=hooked,
        )  # fmt: skip
        hook() if hooked else event.current_stream_wait()
        site.check(y)

    for turn in (False, True):
        prefill(turn)
        buffer.clean_low_latency_buffer(MOST, HIDDEN, site.num_experts)
        decode(turn)
        decode(not turn)


def lmdeploy(deep_ep: Any, site: Site) -> None:
    """A Buffer by arguments that may be unknown, the event of a synchronous layout passed on, tensors disposed of."""
    from deep_ep import Buffer

    Buffer.set_num_sms(20)
    nvl, rdma = sized(Buffer, site, 2 * HIDDEN)
    sizes = {"num_nvl_bytes": nvl, "num_rdma_bytes": max(rdma, low_latency_hint(Buffer, site))}
    rest = {"low_latency_mode": True, "num_qps_per_rank": max(LOCAL, 20)}
    with pytest.raises(TypeError):
        Buffer(site.group, **sizes, **rest, an_argument_of_another_release=True)
    buffer = Buffer(site.group, **sizes, **rest, allow_mnnvl=False, explicitly_destroy=True)
    assert isinstance(buffer, Buffer)
    buffer.set_num_sms(20)
    for _ in range(2):
        per_rank, per_node, per_expert, member, event = buffer.get_dispatch_layout(site.ids, site.num_experts)
        assert event.event is None
        recv_x, ids, weights, counts, handle, event = buffer.dispatch(
            site.x, topk_idx=site.ids.to(torch.int64), topk_weights=site.weights.to(torch.float32),
            num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=per_node, is_token_in_rank=member,
            num_tokens_per_expert=per_expert, previous_event=event, async_finish=False,
            allocate_on_comm_stream=False, expert_alignment=128,
        )  # fmt: skip
        assert len(counts) == LOCAL
        out = site.compact_experts(recv_x, ids, weights)
        site.check(buffer.combine(out, handle, previous_event=event, async_finish=False)[0])
        buffer.clean_low_latency_buffer(MOST, HIDDEN, site.num_experts)
        packed, counts, handle, event, hook = buffer.low_latency_dispatch(
            site.x, site.ids, MOST, site.num_experts, use_fp8=True, async_finish=False, return_recv_hook=True
        )
        hook()
        out = site.slab_experts(site.dequantised(packed), counts)
        disposable, packed = list(packed), None
        for tensor in range(len(disposable)):
            assert sys.getrefcount(disposable[tensor]) == 2  # the list, and this call: it may be freed
        y, _, hook = buffer.low_latency_combine(out, site.ids, site.weights, handle, return_recv_hook=True)
        hook()
        site.check(y)
    buffer.destroy()
    dist.barrier(site.group)


def lightllm(deep_ep: Any, site: Site) -> None:
    """An ElasticBuffer and a Buffer; the memory of the latter is a workspace between decodes."""
    elastic = deep_ep.ElasticBuffer(
        site.group, num_max_tokens_per_rank=MOST, hidden=HIDDEN, num_topk=TOPK, use_fp8_dispatch=True,
        allow_multiple_reduction=True,
    )  # fmt: skip
    hint = low_latency_hint(deep_ep.Buffer, site)
    buffer = deep_ep.Buffer(site.group, num_rdma_bytes=hint, low_latency_mode=True, num_qps_per_rank=LOCAL)
    deep_ep.Buffer.set_num_sms(20)
    workspace = buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
    assert workspace.is_contiguous()
    assert workspace.numel() == hint
    for hooked in (False, True):
        dist.barrier(site.group)  # prefill: nobody decodes
        workspace[: len(workspace) // 2].fill_(255)
        workspace[-4096:].view(torch.float32).fill_(torch.nan)
        recv_x, _, weights, handle, _ = elastic.dispatch(
            site.x, topk_idx=site.ids, topk_weights=site.weights, num_experts=site.num_experts,
            num_max_tokens_per_rank=MOST, expert_alignment=128, do_cpu_sync=True, do_expand=True,
        )  # fmt: skip
        ends = handle.psum_num_recv_tokens_per_expert.tolist()
        counts = handle.num_unaligned_recv_tokens_per_expert.tolist()
        out = site.grouped_experts(recv_x, ends, counts) * weights.unsqueeze(1)
        site.check(elastic.combine(out.bfloat16(), handle)[0])
        buffer.clean_low_latency_buffer(MOST, HIDDEN, site.num_experts)
        packed, masked, decoded, _, hook = buffer.low_latency_dispatch(
            site.x, site.ids, MOST, site.num_experts, use_fp8=True, async_finish=False, return_recv_hook=hooked
        )
        if hooked:
            hook()
        y, _, hook = buffer.low_latency_combine(
            site.slab_experts(site.dequantised(packed), masked), site.ids, site.weights, decoded, async_finish=False,
            return_recv_hook=hooked,
        )  # fmt: skip
        if hooked:
            hook()
        site.check(y)


def rtp_llm(deep_ep: Any, site: Site) -> None:
    """A Buffer for each mode, queue pairs by division, and no more goodbye than ``del``."""
    assert not hasattr(deep_ep.Buffer, "get_low_latency_rdma_size_hint_m2n")
    normal = deep_ep.Buffer(site.group, int(2e9) // 128 * 128, 0, explicitly_destroy=True)
    quick = deep_ep.Buffer(
        site.group, num_nvl_bytes=0, num_rdma_bytes=low_latency_hint(deep_ep.Buffer, site), low_latency_mode=True,
        num_qps_per_rank=site.num_experts / site.num_ranks, explicitly_destroy=True, use_fabric=True,
    )  # fmt: skip
    packed, counts, handle, event, hook = quick.low_latency_dispatch(site.x, site.ids, MOST, site.num_experts)
    per_rank, per_node, per_expert, member, _ = normal.get_dispatch_layout(site.ids, site.num_experts)
    recv_x, ids, weights, _, sent, _ = normal.dispatch(
        site.x, None, per_rank, per_node, member, per_expert, site.ids, site.weights
    )
    out = site.slab_experts(site.dequantised(packed), counts)
    site.check(quick.low_latency_combine(out, site.ids, site.weights, handle)[0])
    site.check(normal.combine(site.compact_experts(recv_x, ids, weights), sent)[0])
    assert (event.event, hook) == (None, None)
    watched = [weakref.ref(normal), weakref.ref(quick)]
    del normal, quick
    gc.collect()
    assert [watch() for watch in watched] == [None, None]


def chitu(deep_ep: Any, site: Site) -> None:
    """Counting while decoding; ranks that are not the first of their tensor-parallel group send nothing."""
    if site.rank % 2:
        site.ids = torch.full_like(site.ids, -1)
        site.weights = torch.zeros_like(site.weights)
    buffer = deep_ep.Buffer(
        site.group, 0, low_latency_hint(deep_ep.Buffer, site), low_latency_mode=True, num_qps_per_rank=LOCAL
    )
    stats, total = torch.zeros(LOCAL, dtype=torch.int32), torch.zeros(LOCAL, dtype=torch.int32)
    for _ in range(3):
        packed, counts, handle, _, hook = buffer.low_latency_dispatch(
            site.x, site.ids.to(deep_ep.topk_idx_t), MOST, site.num_experts, use_fp8=False, async_finish=False,
            return_recv_hook=True, cumulative_local_expert_recv_stats=stats,
        )  # fmt: skip
        hook()
        assert packed.shape[1] == site.num_ranks * MOST
        total += counts
        out = site.slab_experts(packed, counts)
        y, _, hook = buffer.low_latency_combine(out, site.ids, site.weights, handle, return_recv_hook=True)
        hook()
        site.check(y)
    assert torch.equal(stats, total)


Client = Callable[[Any, Site], None]
SERVING: dict[str, Client] = {
    client.__name__: client
    for client in (vllm_high_throughput, vllm_low_latency, sglang, lmdeploy, lightllm, rtp_llm, chitu)
}
