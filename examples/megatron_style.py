"""Fused dispatch and combine as training frameworks have them: autograd functions around DeepEP's names and events.

torchrun --nproc-per-node 4 examples/megatron_style.py

For programs that are written so already. New ones call tokenferry.nn.functional, which is this and more.
"""

import os
from typing import Any

import torch
import torch.distributed as dist

import tokenferry.compat

tokenferry.compat.install()  # from here on, deep_ep is tokenferry; installing compat-dist does it for every process

from deep_ep import Buffer  # noqa: E402
from deep_ep.utils import EventHandle, EventOverlap  # noqa: E402

_buffer: Buffer | None = None


def get_buffer(group: dist.ProcessGroup, hidden_bytes: int) -> Buffer:
    """The Buffer of the group, made when it is first needed, and again if rows have grown. Collective then."""
    global _buffer
    configs = Buffer.get_dispatch_config(group.size()), Buffer.get_combine_config(group.size())
    num_nvl_bytes = max(config.get_nvl_buffer_size_hint(hidden_bytes, group.size()) for config in configs)
    num_rdma_bytes = max(config.get_rdma_buffer_size_hint(hidden_bytes, group.size()) for config in configs)
    if _buffer is None or _buffer.group != group or _buffer.num_nvl_bytes < num_nvl_bytes:
        _buffer = Buffer(group, num_nvl_bytes, num_rdma_bytes)
    return _buffer


class FusedDispatch(torch.autograd.Function):
    """Rows and probabilities to the ranks of their experts; backward brings both gradients home."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, topk_idx: torch.Tensor, probs: torch.Tensor, num_experts: int, group: Any
    ) -> tuple[Any, ...]:
        """Return rows, local expert ids, probabilities, tokens of each local expert, and the handle."""
        buffer = get_buffer(group, x.size(1) * max(x.element_size(), 2))
        flags = {"async_finish": True, "allocate_on_comm_stream": True}
        per_rank, per_rdma_rank, per_expert, member, event = buffer.get_dispatch_layout(
            topk_idx, num_experts, previous_event=EventOverlap(EventHandle()), **flags
        )
        recv_x, recv_idx, recv_probs, counts, handle, event = buffer.dispatch(
            x,
            topk_idx=topk_idx,
            topk_weights=probs,  # float32
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            previous_event=event,
            **flags,
        )
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        return recv_x, recv_idx, recv_probs, torch.tensor(counts), handle

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, _ids: Any, grad_probs: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        """A combine is the gradient of a dispatch, of the probabilities as well."""
        grad_x, grad_probs, event = ctx.buffer.combine(
            grad.contiguous(),
            ctx.handle,
            topk_weights=grad_probs.float(),
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return grad_x, None, grad_probs, None, None


class FusedCombine(torch.autograd.Function):
    """Rows home, summed for each token; backward sends the gradient along the same handle."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, handle: Any, group: Any) -> torch.Tensor:
        """Return the sums."""
        buffer = get_buffer(group, x.size(1) * max(x.element_size(), 2))
        y, _, event = buffer.combine(
            x,
            handle,
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        ctx.buffer, ctx.handle = buffer, handle
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        """A dispatch along a known handle is the gradient of a combine."""
        grad_x, *_, event = ctx.buffer.dispatch(
            grad.contiguous(),
            handle=ctx.handle,
            previous_event=EventOverlap(EventHandle()),
            async_finish=True,
            allocate_on_comm_stream=True,
        )
        event.current_stream_wait()
        return grad_x, None, None


def main(device: str, tokens: int = 500, hidden: int = 256, local: int = 4, topk: int = 4) -> None:
    """Experts that multiply by their number, whose output and gradients are known."""
    global _buffer
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_experts, group = num_ranks * local, dist.group.WORLD
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(tokens + rank, hidden, generator=draw).to(device).requires_grad_()
    probs, topk_idx = torch.rand(len(x), num_experts, generator=draw).to(device).topk(topk)
    probs.requires_grad_()
    topk_idx[::7, 0] = -1  # dropped for want of capacity

    recv_x, recv_idx, recv_probs, counts, handle = FusedDispatch.apply(x, topk_idx, probs, num_experts, group)
    assert int(counts.sum()) == int((recv_idx >= 0).sum())
    # Where a choice is another rank's, the id is -1 and the probability 0: neither may get a gradient there.
    number = (recv_idx + rank * local + 1).where(recv_idx >= 0, 0)
    y = FusedCombine.apply(recv_x * (number * recv_probs).sum(1, keepdim=True), handle, group)
    y.square().sum().backward()

    number = (topk_idx + 1).float()  # 0 where there is no choice
    factor = (number * probs.detach()).sum(1, keepdim=True)
    torch.testing.assert_close(y, x * factor)
    torch.testing.assert_close(x.grad, 2 * x.detach() * factor.square())
    wanted = 2 * factor * x.detach().square().sum(1, keepdim=True) * number
    torch.testing.assert_close(probs.grad, wanted, rtol=1e-4, atol=1e-3)
    assert _buffer is not None
    _buffer.destroy()
    _buffer = None
    if rank == 0:
        print(f"{num_ranks} ranks, {num_experts} experts: output and both gradients as they must be")


if __name__ == "__main__":
    device = os.environ.get("TOKENFERRY_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    main(device)
    dist.destroy_process_group()
