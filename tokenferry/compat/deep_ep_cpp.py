"""The module ``deep_ep_cpp``: what programs import from DeepEP's compiled module."""

from tokenferry.buffer import Buffer
from tokenferry.config import Config
from tokenferry.config import low_latency_size_hint as get_low_latency_rdma_size_hint
from tokenferry.events import EventHandle
from tokenferry.modes.inputs import topk_idx_t

__all__ = ["Config", "EventHandle", "get_low_latency_rdma_size_hint", "is_sm90_compiled", "topk_idx_t"]

is_sm90_compiled = Buffer.is_sm90_compiled
