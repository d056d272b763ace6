"""tokenferry: expert-parallel dispatch and combine for Mixture-of-Experts models, in Python."""

from tokenferry.buffer import Buffer
from tokenferry.config import Config
from tokenferry.elastic import ElasticBuffer
from tokenferry.errors import (
    ArgumentError,
    BufferStateError,
    CapacityError,
    CorruptionError,
    HeapError,
    MismatchError,
    PeerError,
    PeerLostError,
    PeerTimeoutError,
    StepBackError,
    TokenferryError,
)
from tokenferry.events import EventHandle, EventOverlap
from tokenferry.handles import DispatchHandle, EPHandle, InternodeHandle
from tokenferry.modes.inputs import topk_idx_t
from tokenferry.shrink import Survivors
from tokenferry.topology import Topology
from tokenferry.version import __version__

__all__ = [
    "ArgumentError",
    "Buffer",
    "BufferStateError",
    "CapacityError",
    "Config",
    "CorruptionError",
    "DispatchHandle",
    "EPHandle",
    "ElasticBuffer",
    "EventHandle",
    "EventOverlap",
    "HeapError",
    "InternodeHandle",
    "MismatchError",
    "PeerError",
    "PeerLostError",
    "PeerTimeoutError",
    "StepBackError",
    "Survivors",
    "TokenferryError",
    "Topology",
    "__version__",
    "topk_idx_t",
]
