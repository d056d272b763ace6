"""The module ``deep_ep.utils``."""

from tokenferry.config import Config
from tokenferry.events import EventHandle, EventOverlap

from . import event as event

__all__ = ["Config", "EventHandle", "EventOverlap", "check_nvlink_connections"]


def check_nvlink_connections(group: object) -> None:
    """Nothing: a Buffer finds out when it is made whether the GPUs of a node reach each other, and raises if not."""
