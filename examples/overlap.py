"""Two micro-batches: while the rows of one travel, the experts work on the other.

torchrun --nproc-per-node 4 examples/overlap.py

On a GPU the exchange runs on a stream of its own, and events say what waits for what:

    communication   dispatch A | dispatch B | combine A  |  combine B
    computation                | experts A  | experts B  |

On CPU ranks the same program runs, one step after the other.
"""

import os
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tokenferry import Buffer, DispatchHandle, EventOverlap


class Sent(NamedTuple):
    """A dispatch under way; nothing in it may be read before ``event``."""

    rows: torch.Tensor
    handle: DispatchHandle
    event: EventOverlap


class Layer:
    """A matrix on every rank, whatever expert was chosen there: all that overlap needs."""

    def __init__(self, buffer: Buffer, weight: torch.Tensor, num_experts: int) -> None:
        self.buffer, self.weight, self.num_experts = buffer, weight, num_experts

    def send(self, x: torch.Tensor, topk_idx: torch.Tensor, ready: EventOverlap) -> Sent:
        """Start a dispatch. It waits for ``ready``, not for everything that was queued since."""
        # Memory that the communication stream fills must be its own: allocate_on_comm_stream goes with an event to
        # wait for. async_finish returns an event instead of making the current stream wait.
        flags = {"async_finish": True, "allocate_on_comm_stream": True}
        per_rank, per_rdma_rank, per_expert, member, laid_out = self.buffer.get_dispatch_layout(
            topk_idx, self.num_experts, previous_event=ready, **flags
        )
        rows, _, _, _, handle, event = self.buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            previous_event=laid_out,
            **flags,
        )
        return Sent(rows, handle, event)

    def experts(self, sent: Sent) -> torch.Tensor:
        """What the experts make of the rows, once they are there."""
        sent.event.current_stream_wait()
        return F.silu(sent.rows @ self.weight)

    def bring_home(self, out: torch.Tensor, sent: Sent) -> tuple[torch.Tensor, EventOverlap]:
        """Start a combine, behind what is queued now."""
        y, _, event = self.buffer.combine(
            out, sent.handle, previous_event=Buffer.capture(), async_finish=True, allocate_on_comm_stream=True
        )
        return y, event

    def forward(self, halves: list[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
        """Both micro-batches, each as rows and expert ids."""
        ready = Buffer.capture()
        first = self.send(*halves[0], ready)
        first_out = self.experts(first)
        # The host waits in here for the counts of the second dispatch, while the GPU runs the first's experts.
        second = self.send(*halves[1], ready)
        first_y, first_home = self.bring_home(first_out, first)
        second_out = self.experts(second)  # while the first travels home
        second_y, second_home = self.bring_home(second_out, second)
        for event in (first_home, second_home):
            event.current_stream_wait()
        return [first_y, second_y]


@torch.inference_mode()
def main(device: str, tokens: int = 1000, hidden: int = 1024, local: int = 4, topk: int = 4) -> None:
    """Compare with the same matrices applied at home."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_experts = num_ranks * local
    same = torch.Generator().manual_seed(0)
    weight = (torch.randn(num_ranks, hidden, hidden, generator=same) / hidden**0.5).bfloat16().to(device)
    draw = torch.Generator().manual_seed(1 + rank)
    halves = []
    for half in range(2):
        x = torch.randn(tokens + half, hidden, generator=draw).bfloat16().to(device)
        topk_idx = torch.rand(len(x), num_experts, generator=draw).topk(topk).indices.to(device)
        halves.append((x, topk_idx))
    with Buffer(dist.group.WORLD, device=device) as buffer:
        buffer.warmup(hidden, 0, num_experts)
        results = Layer(buffer, weight[rank], num_experts).forward(halves)
    for (x, topk_idx), y in zip(halves, results, strict=True):
        wanted = torch.zeros_like(x, dtype=torch.float32)
        for peer in range(num_ranks):
            goes = (topk_idx // local == peer).any(1)
            wanted[goes] += F.silu(x[goes] @ weight[peer]).float()
        torch.testing.assert_close(y.float(), wanted, rtol=0.02, atol=0.02)
    if rank == 0:
        print(f"{num_ranks} ranks, two micro-batches of {tokens} tokens: as computed at home")


if __name__ == "__main__":
    device = os.environ.get("TOKENFERRY_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    main(device)
    dist.destroy_process_group()
