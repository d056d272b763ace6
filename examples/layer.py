"""An expert-parallel Mixture-of-Experts layer in forty lines, forward and backward.

torchrun --nproc-per-node 4 examples/layer.py
"""

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tokenferry import Buffer
from tokenferry.nn.functional import combine, dispatch


class Layer(nn.Module):
    """Sends each token to K of E experts and sums what they make of it; E / R experts live on each of R ranks."""

    def __init__(self, buffer: Buffer, hidden: int, inner: int, num_experts: int, num_topk: int) -> None:
        super().__init__()
        self.buffer, self.num_experts, self.num_topk = buffer, num_experts, num_topk
        local = num_experts // buffer.group_size  # experts rank * local to (rank + 1) * local - 1 are here
        self.router = nn.Linear(hidden, num_experts, bias=False)
        self.up = nn.Parameter(torch.randn(local, hidden, inner) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(local, inner, hidden) / inner**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take [tokens, hidden], any number of tokens, and return the same shape."""
        # Router weights are float32 whatever the dtype of the rows. They get gradients through the exchange.
        weights, ids = self.router(x).softmax(-1, dtype=torch.float32).topk(self.num_topk)
        # A token travels once to each rank that holds one of its experts. There, topk_idx counts local experts, and
        # is -1 where a choice is another rank's.
        got = dispatch(self.buffer, x, ids, weights, self.num_experts)
        y = torch.zeros_like(got.x)
        for expert, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            # An expert without rows runs all the same: backward is communication, and must be it on every rank.
            row, choice = (got.topk_idx == expert).nonzero(as_tuple=True)
            out = F.silu(got.x[row] @ up) @ down * got.topk_weights[row, choice, None]
            y = y.index_add(0, row, out.to(y.dtype))
        # Rows go home along the handle; a token's rows are summed in the order of the ranks.
        return combine(self.buffer, y, got.handle)


def dense(layer: Layer, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The same layer with all experts at hand, to compare with."""
    weights, ids = layer.router(x).softmax(-1, dtype=torch.float32).topk(layer.num_topk)
    share = torch.zeros(len(x), layer.num_experts, device=x.device).scatter(1, ids, weights)
    return torch.einsum("te,eth->th", share, F.silu(x @ up) @ down)


def main(device: str, tokens: int = 500, hidden: int = 256, inner: int = 512, local: int = 4, topk: int = 4) -> None:
    """Compare outputs and gradients with the dense layer's."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    with Buffer(dist.group.WORLD, device=device) as buffer:
        layer = Layer(buffer, hidden, inner, num_ranks * local, topk).to(device)
        dist.broadcast(layer.router.weight.data, 0)  # the router is the same everywhere, experts are not
        x = torch.randn(tokens + rank, hidden, device=device, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()

        everyone = [[torch.empty_like(part) for _ in range(num_ranks)] for part in (layer.up, layer.down)]
        for parts, mine in zip(everyone, (layer.up, layer.down), strict=True):
            dist.all_gather(parts, mine.detach())
        twin = x.detach().requires_grad_()
        wanted = dense(layer, twin, *(torch.cat(parts) for parts in everyone))
        wanted.square().sum().backward()
    torch.testing.assert_close(y, wanted, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(x.grad, twin.grad, rtol=1e-3, atol=1e-3)
    if rank == 0:
        print(f"{num_ranks} ranks, {num_ranks * local} experts: output and gradient are those of the dense layer")


if __name__ == "__main__":
    device = os.environ.get("TOKENFERRY_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    main(device)
    dist.destroy_process_group()
