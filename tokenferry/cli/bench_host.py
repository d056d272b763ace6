"""Where the host's time in a call goes: by file of the package, and by function of what it calls."""

from __future__ import annotations

import cProfile
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType
from typing import NamedTuple

_PACKAGE = Path(__file__).resolve().parents[1]
_SHOWN = 10


class HostPart(NamedTuple):
    """A part of the host's time in one call."""

    where: str
    """A file below the package, or a function of another library."""
    calls: float
    """Of functions there, in one call."""
    seconds: float
    """Spent there itself, not in what is called from there; what the profiler adds included."""


def host_parts(call: Callable[[], object], count: int) -> list[HostPart]:
    """Profile ``count`` calls; the longest part first.

    The profiler adds a good part of a microsecond to every Python function, so that the sum is above the time without
    it: it says where time goes, not how much.
    """
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(count):
        call()
    profiler.disable()
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for entry in profiler.getstats():
        where = _where(entry.code)
        calls[where] += entry.callcount
        seconds[where] += entry.inlinetime
    parts = [HostPart(where, calls[where] / count, seconds[where] / count) for where in calls]
    return sorted(parts, key=lambda part: -part.seconds)


def host_line(parts: Sequence[HostPart]) -> str:
    """One line about a profile."""
    total = sum(part.seconds for part in parts)
    shown = [f"{part.where} {part.seconds * 1e6:.1f} ({part.calls:.3g}x)" for part in parts[:_SHOWN]]
    rest = sum(part.seconds for part in parts[_SHOWN:])
    return f"host under the profiler {total * 1e6:.1f}: {', '.join(shown)}, other {rest * 1e6:.1f}"


def _where(code: CodeType | str) -> str:
    if isinstance(code, str):
        method = re.fullmatch(r"<method '(.+)' of '(.+)' objects>", code)
        if method:
            return f"{method[2]}.{method[1]}"
        return re.sub(r"^<built-in method (.+)>$", r"\1", re.sub(r" object at 0x\w+", "", code))
    path = Path(code.co_filename)
    if path.is_relative_to(_PACKAGE):
        return str(path.relative_to(_PACKAGE))
    return f"{path.name}:{code.co_name}"
