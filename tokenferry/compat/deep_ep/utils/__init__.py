"""The module ``deep_ep.utils``."""

from tokenferry.events import EventHandle, EventOverlap

from . import event as event

__all__ = ["EventHandle", "EventOverlap"]
