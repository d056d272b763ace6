"""The module ``deep_ep.buffers``."""

from . import elastic as elastic
from . import legacy as legacy
