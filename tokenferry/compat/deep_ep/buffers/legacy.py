"""The module ``deep_ep.buffers.legacy``: where newer DeepEP keeps the V1 API."""

from tokenferry.buffer import Buffer

__all__ = ["Buffer"]
