"""Values of options, as argparse calls for them. Each raises ``argparse.ArgumentTypeError`` with what is allowed."""

from __future__ import annotations

import argparse
import os

_MOST_NUMBER = 1e6
_MOST_RANKS = 64
"""That a command starts, where there are not more than a quarter as many cores."""


def number_of_ranks(text: str) -> int:
    """Processes of this machine, so many as it may start without being lost in them."""
    return whole(text, 1, max(_MOST_RANKS, 4 * (os.cpu_count() or 1)), " processes on this machine")


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    return whole(text, 1)


def natural(text: str) -> int:
    """A whole number, 0 or more."""
    return whole(text, 0)


def positive_number(text: str) -> float:
    """A number above 0, of minutes, seconds or milliseconds."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < _MOST_NUMBER:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: a number above 0 and below {_MOST_NUMBER:g}")
    return value


def whole(text: str, least: int, most: int | None = None, what: str = "") -> int:
    """A whole number from ``least`` on, up to ``most``, of what it is."""
    value = int(text) if text.isdecimal() else least - 1
    if value < least or (most is not None and value > most):
        allowed = f"whole numbers from {least} on" if most is None else f"{least} to {most}"
        raise argparse.ArgumentTypeError(f"got {text}; allowed: {allowed}{what}")
    return value
