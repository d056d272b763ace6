"""Training: which gradients are complete already, which are reduced, and what checkpointing saves.

torchrun --nproc-per-node 4 examples/train.py
"""

import functools
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tokenferry import Buffer, ops
from tokenferry.nn import ExpertParallelMoE


def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Compute activations again in backward, but do not send tokens again."""
    return CheckpointPolicy.MUST_SAVE if operator in ops.OPERATORS else CheckpointPolicy.PREFER_RECOMPUTE


class Block(nn.Module):
    """Norm, experts, residual."""

    def __init__(self, buffer: Buffer, hidden: int, num_experts: int, num_topk: int, seed: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(hidden)
        self.moe = ExpertParallelMoE(buffer, hidden, 2 * hidden, num_experts, num_topk, seed=seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, hidden] to the same."""
        return x + self.moe(self.norm(x))


def main(device: str, tokens: int = 400, hidden: int = 64, local: int = 2, topk: int = 2, steps: int = 30) -> None:
    """Learn to turn vectors; the loss must fall."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    turn = torch.randn(hidden, hidden, generator=torch.Generator().manual_seed(0)) / hidden**0.5
    draw = torch.Generator().manual_seed(1 + rank)  # every rank has data of its own
    losses = []
    with Buffer(dist.group.WORLD, device=device) as buffer:
        model = nn.ModuleList(Block(buffer, hidden, num_ranks * local, topk, seed) for seed in range(2)).to(device)
        # The rows of all ranks came to an expert, so its gradient is complete. All other parameters are on every
        # rank, and their gradients are summed. DDP and FSDP do that too, told to leave the experts alone.
        experts = {id(parameter) for block in model for parameter in block.moe.expert_parameters()}
        shared = [parameter for parameter in model.parameters() if id(parameter) not in experts]
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(steps):
            x = torch.randn(tokens, hidden, generator=draw)
            target = (x @ turn).to(device)
            y = x.to(device)
            for block in model:
                contexts = functools.partial(create_selective_checkpoint_contexts, policy)
                y = checkpoint(block, y, use_reentrant=False, context_fn=contexts)
            # Divided by the tokens of all ranks, every gradient is a plain sum over the ranks.
            loss = (y - target).square().mean() / num_ranks
            optimiser.zero_grad()
            loss.backward()  # collective: the gradients of rows travel, in the same order on every rank
            for parameter in shared:
                dist.all_reduce(parameter.grad)
            optimiser.step()
            total = loss.detach()
            dist.all_reduce(total)
            losses.append(total.item())
    assert losses[-1] < 0.9 * losses[0], losses
    if rank == 0:
        print(f"{num_ranks} ranks, {steps} steps: the loss fell from {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    device = os.environ.get("TOKENFERRY_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    main(device)
    dist.destroy_process_group()
