"""Autograd for dispatch and combine, and a Mixture-of-Experts layer built on them."""

from tokenferry.nn import functional
from tokenferry.nn.moe import ExpertParallelMoE

__all__ = ["ExpertParallelMoE", "functional"]
