"""Decode: a few tokens a step with the low-latency pair, receive hooks, and on GPUs one CUDA graph for all steps.

torchrun --nproc-per-node 4 examples/decode.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tokenferry import Buffer


class Decoder:
    """One layer on static tensors: ``x``, ``topk_idx`` and ``topk_weights`` in, ``y`` out."""

    def __init__(self, buffer: Buffer, most: int, weight: torch.Tensor, shared: torch.Tensor, topk: int) -> None:
        """Hold what a step needs.

        Args:
            buffer: of this rank.
            most: tokens of any rank in one step, at most; the same on all ranks.
            weight: bfloat16 [local experts, hidden, hidden].
            shared: bfloat16 [hidden, hidden], an expert that every token visits at home.
            topk: choices of a token.
        """
        local, hidden, _ = weight.shape
        self.buffer, self.most, self.weight, self.shared = buffer, most, weight, shared
        self.num_experts = local * buffer.group_size
        self.x = weight.new_zeros(most, hidden)
        self.topk_idx = torch.full((most, topk), -1, device=weight.device)  # -1: no choice, so no token
        self.topk_weights = torch.zeros(most, topk, device=weight.device)
        self.y = torch.zeros_like(self.x)

    def step(self) -> None:
        """Compute ``y``. Nothing here waits for the host, and no shape depends on the routing."""
        rows, _, handle, _, receive = self.buffer.low_latency_dispatch(
            self.x, self.topk_idx, self.most, self.num_experts, use_fp8=False, return_recv_hook=True
        )
        # The rows are under way, and no SM is busy with them: time for work of one's own.
        y = F.silu(self.x @ self.shared)
        receive()
        # A slab of rows an expert, as many as could come at most. Those past the count are not set; nobody reads
        # what becomes of them. (The count, which was the second result, is for kernels that skip them.)
        rows = F.silu(torch.bmm(rows, self.weight))
        combined, _, receive = self.buffer.low_latency_combine(
            rows, self.topk_idx, self.topk_weights, handle, return_recv_hook=True
        )
        receive()
        torch.add(y, combined, out=self.y)


@torch.inference_mode()
def main(device: str, most: int = 16, hidden: int = 512, local: int = 4, topk: int = 2, steps: int = 20) -> None:
    """Decode some steps of random tokens, compared with all experts computed at home."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_experts = num_ranks * local
    same = torch.Generator().manual_seed(0)
    every = (torch.randn(1 + num_experts, hidden, hidden, generator=same) / hidden**0.5).bfloat16().to(device)
    shared, weight = every[0], every[1:]
    nbytes = Buffer.get_low_latency_rdma_size_hint(most, hidden, num_ranks, num_experts)
    with Buffer(dist.group.WORLD, num_rdma_bytes=nbytes, low_latency_mode=True, device=device) as buffer:
        mine = weight[rank * local : (rank + 1) * local].contiguous()
        decoder = Decoder(buffer, most, mine, shared, topk)
        buffer.low_latency_warmup(most, hidden, topk, num_experts, use_fp8=False)
        run = decoder.step
        if device == "cuda":
            decoder.step()  # what libraries set up the first time must not happen while a graph is captured
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                decoder.step()
            run = graph.replay  # the epochs of the exchange count on the device: replay as often as you like
        draw = torch.Generator().manual_seed(1 + rank)
        for _ in range(steps):
            tokens = int(torch.randint(0, most + 1, (1,), generator=draw))  # ranks need not have equally many
            scores = torch.rand(most, num_experts, generator=draw).softmax(-1)
            best, idx = scores.topk(topk)
            idx[tokens:] = -1
            decoder.x.copy_(torch.randn(most, hidden, generator=draw))
            decoder.topk_idx.copy_(idx)
            decoder.topk_weights.copy_(best)
            run()
            wanted = F.silu(decoder.x @ shared).float()
            out = F.silu(torch.einsum("th,ehj->etj", decoder.x, weight)).float()
            for choice in range(topk):
                picked = out[idx[:tokens, choice].to(device), torch.arange(tokens, device=device)]
                wanted[:tokens] += decoder.topk_weights[:tokens, choice, None] * picked
            torch.testing.assert_close(decoder.y.float(), wanted, rtol=0.03, atol=0.03)
    if rank == 0:
        how = "replays of one CUDA graph" if device == "cuda" else "steps"
        print(f"{num_ranks} ranks, up to {most} tokens each: {steps} {how}, all as computed at home")


if __name__ == "__main__":
    device = os.environ.get("TOKENFERRY_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    main(device)
    dist.destroy_process_group()
