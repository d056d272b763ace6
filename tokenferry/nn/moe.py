"""A Mixture-of-Experts layer whose experts are spread over the ranks: the example to read.

Legend of dims: T tokens of this rank, H hidden, I intermediate, K choices a token, E experts, R ranks, L = E / R
experts of this rank, M rows received by this rank, N rows of one expert.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from tokenferry.buffer import Buffer
from tokenferry.nn.functional import combine, dispatch
from tokenferry.ops import register
from tokenferry.validation import check_int, describe, require


class ExpertParallelMoE(nn.Module):
    """Router, dispatch, SwiGLU experts, combine. Expert e lives on rank ``e // (E / R)``.

    Forward and backward are collective: every rank calls both, in the same order, with zero tokens if it has none.

    The parameters are functions of ``seed`` alone: ``router_EH`` is the same on all ranks, and expert e is the same
    on whichever rank it lives. Training keeps it so if the gradient of ``router_EH`` is reduced over the ranks like
    that of any replicated parameter; the gradients of the experts are complete already, for the rows of every rank
    came here, and must not be reduced.

    Args:
        buffer: of this rank; its group are the ranks that share the experts.
        hidden: H, elements of a row; rows must be a multiple of 16 bytes.
        intermediate: I, inner width of an expert.
        num_experts: E, of all ranks together; a multiple of the ranks.
        num_topk: K, experts a token is sent to.
        seed: of the parameters.
        dtype: of the parameters and rows.

    Attributes:
        expert_load: int64 [L], (token, choice) pairs that the last forward brought to each local expert.
        tokens_sent: int64 [R], tokens that the last forward sent to each rank, this one included.

    Raises:
        ArgumentError: a size is not allowed.
    """

    def __init__(
        self,
        buffer: Buffer,
        hidden: int,
        intermediate: int,
        num_experts: int,
        num_topk: int,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.buffer = buffer
        register(buffer)  # here, so that a compiler finds the name at hand
        ranks = buffer.group_size
        self.num_experts = check_int("num_experts", num_experts, minimum=1, multiple_of=ranks)
        self.num_topk = check_int("num_topk", num_topk, minimum=1)
        require(num_topk <= num_experts, "num_topk", num_topk, f"at most the {num_experts} experts")
        self.num_local_experts = num_experts // ranks
        first = buffer.rank * self.num_local_experts
        experts = [
            initial_expert(seed, expert, hidden, intermediate, dtype)
            for expert in range(first, first + self.num_local_experts)
        ]
        gate_LIH, up_LIH, down_LHI = (torch.stack(weights) for weights in zip(*experts, strict=True))
        self.router_EH = nn.Parameter(initial_router(seed, num_experts, hidden, dtype))
        self.gate_LIH = nn.Parameter(gate_LIH)
        self.up_LIH = nn.Parameter(up_LIH)
        self.down_LHI = nn.Parameter(down_LHI)
        self.expert_load = torch.zeros(self.num_local_experts, dtype=torch.int64)
        self.tokens_sent = torch.zeros(ranks, dtype=torch.int64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Send each token through its experts.

        Args:
            x: [..., H] of the layer's dtype; any number of tokens, zero included.

        Returns:
            The same shape and dtype: the experts' outputs, weighted by the router and summed.

        Raises:
            ArgumentError: rows of another width.
        """
        hidden = self.router_EH.size(1)
        require(x.dim() > 0 and x.size(-1) == hidden, "x", describe(x), f"rows of {hidden} elements")
        x_TH = x.reshape(-1, x.size(-1))
        weights_TK, idx_TK = self.route(x_TH)
        recv_x_MH, recv_idx_MK, recv_weights_MK, load_L, handle = dispatch(
            self.buffer, x_TH, idx_TK, weights_TK, self.num_experts
        )
        self.expert_load = load_L
        self.tokens_sent = handle.is_token_in_rank.sum(0)
        out_MH = self.run_experts(recv_x_MH, recv_idx_MK, recv_weights_MK)
        return combine(self.buffer, out_MH, handle).view_as(x)

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose K experts for each token of [T, H]: weights [T, K] that sum to 1, and ids int64 [T, K]."""
        logits_TE = F.linear(x, self.router_EH)
        wide = torch.promote_types(logits_TE.dtype, torch.float32)
        weights_TK, idx_TK = logits_TE.softmax(-1, dtype=wide).topk(self.num_topk)
        return weights_TK / weights_TK.sum(-1, keepdim=True), idx_TK

    def run_experts(self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor) -> torch.Tensor:
        """Sum, for each received row, the weighted outputs of those of its experts that live here.

        Args:
            x: [M, H] as dispatch returned it.
            topk_idx: int64 [M, K], local expert ids or -1.
            topk_weights: [M, K].

        Returns:
            [M, H], zero in a row without a local expert.
        """
        out_MH = torch.zeros_like(x)
        for expert in range(self.num_local_experts):
            # An expert without rows runs too, on none of them: skipping it would cut its parameters out of the
            # graph, and with all of them the combine, whose backward the other ranks wait for.
            row, choice = (topk_idx == expert).nonzero(as_tuple=True)
            x_NH = x[row]
            gated_NI = F.silu(x_NH @ self.gate_LIH[expert].T) * (x_NH @ self.up_LIH[expert].T)
            out_NH = gated_NI @ self.down_LHI[expert].T * topk_weights[row, choice, None]
            out_MH = out_MH.index_add(0, row, out_NH.to(out_MH.dtype))
        return out_MH

    def expert_parameters(self) -> list[nn.Parameter]:
        """The parameters that live on this rank alone: do not average their gradients."""
        return [self.gate_LIH, self.up_LIH, self.down_LHI]

    def extra_repr(self) -> str:
        """What the layer is and which experts this rank has, for ``repr``."""
        _, intermediate, hidden = self.gate_LIH.shape
        first = self.buffer.rank * self.num_local_experts
        return (
            f"hidden={hidden}, intermediate={intermediate}, num_experts={self.num_experts}, "
            f"num_topk={self.num_topk}, rank={self.buffer.rank} of {self.buffer.group_size}, "
            f"local experts {first}..{first + self.num_local_experts - 1}"
        )


def initial_router(seed: int, num_experts: int, hidden: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The initial ``router_EH``: [E, H], a function of the seed."""
    return _draw(_generator(seed, 0), num_experts, hidden).to(dtype)


def initial_expert(
    seed: int, expert: int, hidden: int, intermediate: int, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The initial gate [I, H], up [I, H] and down [H, I] of one expert, a function of (seed, expert)."""
    generator = _generator(seed, 1 + expert)
    gate = _draw(generator, intermediate, hidden)
    up = _draw(generator, intermediate, hidden)
    down = _draw(generator, hidden, intermediate)
    return gate.to(dtype), up.to(dtype), down.to(dtype)


def _generator(seed: int, stream: int) -> torch.Generator:
    # 2^20 streams for every seed: seeds below 2^43 never share one.
    return torch.Generator().manual_seed((check_int("seed", seed, minimum=0) << 20) + stream)


def _draw(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """float32 [rows, columns], normal, of variance 1 / columns: keeps the scale of what it multiplies."""
    return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
