"""The module ``deep_ep``: DeepEP's ``Buffer`` and ``ElasticBuffer``, by tokenferry.

What this version does not have does not exist here either (``HybridEPBuffer``): programs find out what there is by
importing it, or by ``hasattr``.
"""

from tokenferry.buffer import Buffer
from tokenferry.config import Config
from tokenferry.elastic import ElasticBuffer
from tokenferry.events import EventHandle, EventOverlap
from tokenferry.handles import EPHandle
from tokenferry.modes.inputs import topk_idx_t
from tokenferry.version import __version__ as _tokenferry_version

from . import buffer as buffer  # relative: this package goes by two names
from . import buffers as buffers
from . import legacy as legacy
from . import utils as utils

__version__ = f"1.2.1+tokenferry.{_tokenferry_version}"
"""The release of DeepEP whose ``Buffer`` this is, and who made it."""

__all__ = ["Buffer", "Config", "EPHandle", "ElasticBuffer", "EventHandle", "EventOverlap", "topk_idx_t"]
