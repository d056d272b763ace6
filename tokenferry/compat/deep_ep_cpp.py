"""The module ``deep_ep_cpp``: what programs import from DeepEP's compiled module."""

from tokenferry.config import Config
from tokenferry.events import EventHandle
from tokenferry.modes.inputs import topk_idx_t

__all__ = ["Config", "EventHandle", "topk_idx_t"]
