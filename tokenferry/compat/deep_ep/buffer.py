"""The module ``deep_ep.buffer``."""

from tokenferry.buffer import Buffer
from tokenferry.config import Config
from tokenferry.events import EventHandle, EventOverlap

from .utils import check_nvlink_connections

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "check_nvlink_connections"]
