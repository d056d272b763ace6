"""The module ``deep_ep.legacy``: a newer name of the V1 API."""

from tokenferry.buffer import Buffer

__all__ = ["Buffer"]
