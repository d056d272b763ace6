"""Ranks, devices and a Buffer: what every program that torchrun starts begins with.

torchrun --nproc-per-node 4 examples/launch.py
"""

import os

import torch
import torch.distributed as dist

from tokenferry import Buffer


def main(device: str) -> None:
    """Say who is where, and let every rank send one token to every other."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    # Collective: every rank constructs. Leaving the block frees its memory; no rank waits for another.
    with Buffer(dist.group.WORLD, device=device) as buffer:
        where = buffer.topology
        print(f"rank {rank} of {num_ranks}: node {where.node} of {where.num_nodes}, {device}", flush=True)
        # One expert a rank, and every token chooses all of them: row r of what arrives comes from rank r.
        x = torch.full((1, 8), float(rank), device=device)
        topk_idx = torch.arange(num_ranks, device=device).view(1, -1)
        per_rank, per_node, per_expert, member, _ = buffer.get_dispatch_layout(topk_idx, num_experts=num_ranks)
        received, _, _, _, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,  # None on one node
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
        )
        assert received[:, 0].tolist() == list(range(num_ranks))
        # Every rank answers with the row that came; what comes home is their sum.
        answer, _, _ = buffer.combine(received, handle)
        assert torch.equal(answer, x * num_ranks)
    if rank == 0:
        print(f"{num_ranks} ranks exchanged {num_ranks} rows each")


if __name__ == "__main__":
    device = os.environ.get("TOKENFERRY_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    main(device)
    dist.destroy_process_group()
