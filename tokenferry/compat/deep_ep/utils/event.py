"""The module ``deep_ep.utils.event``."""

from tokenferry.events import EventHandle, EventOverlap

__all__ = ["EventHandle", "EventOverlap"]
