"""The module ``deep_ep.buffers.elastic``."""

from tokenferry.elastic import ElasticBuffer
from tokenferry.handles import EPHandle

__all__ = ["EPHandle", "ElasticBuffer"]
