"""The module ``deep_ep.buffers``."""

from . import legacy as legacy
