"""The module ``deep_ep.buffer``."""

from tokenferry.buffer import Buffer
from tokenferry.config import Config
from tokenferry.events import EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap"]
