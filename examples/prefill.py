"""Prefill: thousands of tokens in FP8 with scales, sorted by expert, back in bfloat16.

torchrun --nproc-per-node 4 examples/prefill.py
"""

import os

import torch
import torch.distributed as dist

from tokenferry import Buffer

GROUP = 128  # channels that share a scale


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[tokens, hidden] to float8_e4m3fn of the same shape and float32 scales [tokens, hidden / 128]."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1).clamp(min=1e-4) / 448
    return (groups / scales[..., None]).flatten(-2).to(torch.float8_e4m3fn), scales


def dequantise(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What :func:`quantise` was given, in bfloat16."""
    return (data.float().unflatten(-1, (-1, GROUP)) * scales[..., None]).flatten(-2).bfloat16()


def experts(
    x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, counts: list[int], weight: torch.Tensor
) -> torch.Tensor:
    """One matrix an expert, over rows sorted by expert; a real server has a grouped kernel for this."""
    # The (row, choice) pairs that are this rank's, in the order of their experts: counts says where each one ends.
    pair = topk_idx.flatten().argsort(stable=True)[(topk_idx < 0).sum() :]
    row = pair // topk_idx.size(1)
    sorted_x = x[row]
    out = torch.cat([part @ matrix for part, matrix in zip(sorted_x.split(counts), weight, strict=True)])
    out = out * topk_weights.flatten()[pair, None]
    return torch.zeros_like(x, dtype=torch.float32).index_add(0, row, out.float()).bfloat16()


@torch.inference_mode()
def main(device: str, tokens: int = 2000, hidden: int = 1024, local: int = 8, topk: int = 4) -> None:
    """One layer of prefill, compared with all experts computed at home."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    num_experts = num_ranks * local
    source = torch.Generator().manual_seed(0)
    weight = (torch.randn(num_experts, hidden, hidden, generator=source) / hidden**0.5).bfloat16().to(device)
    source = torch.Generator().manual_seed(1 + rank)
    x = torch.randn(tokens - 10 * rank, hidden, generator=source).bfloat16().to(device)
    scores = torch.rand(len(x), num_experts, generator=source).to(device)
    topk_weights, topk_idx = scores.softmax(-1).topk(topk)

    with Buffer(dist.group.WORLD, device=device) as buffer:
        # On GPUs: compile before any rank waits for another.
        buffer.warmup(hidden, topk, num_experts, torch.float8_e4m3fn, scale_bytes=hidden // GROUP * 4)
        per_rank, per_rdma_rank, per_expert, member, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
        # Rows and scales travel as they are: any format of one byte, any strides of the scales.
        (data, scales), local_idx, local_weights, counts, handle, _ = buffer.dispatch(
            quantise(x),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_rdma_rank,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=topk_weights,
            # A grouped kernel that wants blocks of 128 rows would ask for expert_alignment=128 here.
        )
        mine = weight[rank * local : (rank + 1) * local]
        out = experts(dequantise(data, scales), local_idx, local_weights, counts, mine)
        y, _, _ = buffer.combine(out, handle)

    seen = dequantise(*quantise(x)).float()
    wanted = torch.zeros_like(seen)
    for expert in range(num_experts):
        row, choice = (topk_idx == expert).nonzero(as_tuple=True)
        wanted[row] += seen[row] @ weight[expert].float() * topk_weights[row, choice, None]
    error = (y.float() - wanted).norm() / wanted.norm()
    assert error < 0.01, error
    if rank == 0:
        print(f"{num_ranks} ranks, {tokens} tokens each, {len(data)} rows on rank 0: relative error {error:.4f}")


if __name__ == "__main__":
    device = os.environ.get("TOKENFERRY_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    main(device)
    dist.destroy_process_group()
