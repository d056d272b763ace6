"""Whether the memory of a soak's ranks grows without end: their looks, late in the run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

_LONG = 270.0
"""Seconds of a run from which on the growth of memory is judged."""
MOST_GROWTH = 8 << 20
"""Bytes of memory that is not shared, in a quarter of the run."""
_FEWEST_LOOKS = 10
"""In what is judged."""
_MOST_LEFT_OUT = 2
"""Intervals in the second half of a run in which kernels were made ready: each adds the noise of two looks."""
_MOST_COMPARED = 300
"""Looks, of which every one is compared with every other."""


class Look(NamedTuple):
    """What a rank holds at a moment."""

    seconds: float
    """Since the start."""
    resident: int
    """Bytes of memory that is not shared."""
    files: int
    """Open ones."""
    device: int = 0
    """Bytes of its GPU that are taken, by whomever; 0 on CPU ranks."""
    kernels: int = 0
    """Variants of kernels that it has made ready so far: compilers and drivers keep memory of each."""


class Growth(NamedTuple):
    """Of the memory of a rank, late in a run; see :func:`late_growth`."""

    bytes: int
    """In a quarter of the run."""
    is_own: bool = True
    """Whether none of it can be memory that is kept of kernels."""


def late_growth(looks: Sequence[Look], field: str) -> Growth | None:
    """By how much the memory of a rank grows late in a run: when everything there is has been used.

    That is the median slope between any two looks, since single ones jump, as allocators keep what they have, and
    what else goes away at some time counts little. The looks are those of the second half of the run, without what
    comes between two of them between which kernels were made ready: compilers keep memory. If there are more than a
    few of these intervals, the looks are those of the last quarter, and everything counts: memory that does not grow
    with kernels does not grow without them.

    Args:
        looks: of the rank.
        field: of a look.

    Returns:
        None if the run was too short to say, or has too few looks.
    """
    end = looks[-1].seconds if looks else 0.0
    late = [look for look in looks if look.seconds >= end / 2]
    values, num_left_out = _without_kernels(late, field)
    is_own = num_left_out <= _MOST_LEFT_OUT
    if not is_own:
        late = [look for look in late if look.seconds >= 0.75 * end]
        values = [float(getattr(look, field)) for look in late]
        is_own = _without_kernels(late, field)[1] == 0
    if end < _LONG or len(late) < _FEWEST_LOOKS:
        return None
    return Growth(int(_slope([look.seconds for look in late], values) * end / 4), is_own)


def _without_kernels(looks: Sequence[Look], field: str) -> tuple[list[float], int]:
    """What the looks found, less what came in intervals in which kernels were made ready; how many of these."""
    cleared, of_kernels, count = [float(getattr(look, field)) for look in looks[:1]], 0, 0
    for before, look in itertools.pairwise(looks):
        if look.kernels > before.kernels:
            of_kernels += getattr(look, field) - getattr(before, field)
            count += 1
        cleared.append(float(getattr(look, field) - of_kernels))
    return cleared, count


def _slope(times: Sequence[float], values: Sequence[float]) -> float:
    """The median of the slopes between any two points (Theil and Sen)."""
    step = -(-len(times) // _MOST_COMPARED)
    points = zip(times[::step], values[::step], strict=True)
    return statistics.median(
        (value - before) / (at - earlier)
        for (earlier, before), (at, value) in itertools.combinations(points, 2)
        if at > earlier
    )
