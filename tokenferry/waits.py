"""Who keeps the others waiting: the statistics of all ranks as one matrix, in words and as a picture.

Legend: ``waited[r][p]`` is what rank r has waited for rank p, in nanoseconds; R ranks.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenferry.stats import BufferStats

if TYPE_CHECKING:
    from tokenferry.buffer import Buffer

_LIKE_THE_SLOWEST = 0.5
"""Ranks that are waited for at least this much of what the slowest is are slow too."""
_ABOVE_THE_OTHERS = 2.0
"""How far a slow rank is above the median of those that are not."""
_LEAST_SHARE = 0.1
"""Of the time that the others spent in operations: less above that median is not worth a word."""
_MOST_IN_TABLE = 16


@dataclass(frozen=True)
class WaitReport:
    """Who waited for whom, and who is slow. ``str()`` of it is the text.

    Attributes:
        waited: [R][R] nanoseconds: what rank r waited for rank p.
        slow: the ranks that the others wait for, slowest first; none if no rank stands out.
        text: a verdict, and the matrix.
    """

    waited: tuple[tuple[int, ...], ...]
    slow: tuple[int, ...]
    text: str

    def __str__(self) -> str:
        return self.text


def wait_report(buffer: Buffer, picture: Path | str | None = None, *, reset: bool = False) -> WaitReport:
    """Gather the statistics of all ranks, and name those that the others wait for.

    Collective, like construction: every rank must call, and gets the same report. On GPUs the waits are those of the
    kernels, also under CUDA graphs.

    Args:
        buffer: of this rank.
        picture: rank 0 draws the matrix into this PNG file; needs matplotlib.
        reset: let the statistics of all ranks begin again at 0.

    Raises:
        BufferStateError: the Buffer was destroyed.
        PeerTimeoutError, PeerLostError: ranks did not come.
    """
    given = buffer._meetings.gather("wait_report", buffer.stats(reset=reset).as_dict())
    gathered = [BufferStats.from_dict(given[rank]) for rank in range(buffer.group_size)]
    report = analyse(gathered)
    if picture is not None and buffer.rank == 0:
        from tokenferry.cli.waits_plot import draw

        draw(report, Path(picture))
    return report


def analyse(gathered: Sequence[BufferStats]) -> WaitReport:
    """The report of the statistics of all ranks, by rank."""
    waited = tuple(tuple(stats.waited_for()) for stats in gathered)
    # On GPUs calls return before kernels have waited: the time of a rank is at least what it waited for one other.
    spent = [
        max(sum(of.call_ns for of in stats.operations), *row) for stats, row in zip(gathered, waited, strict=True)
    ]
    slow = find_slow(waited, spent)
    return WaitReport(waited, slow, "\n".join([_verdict(gathered, waited, slow), "", *_table(waited, slow)]))


def waited_for(waited: Sequence[Sequence[int]]) -> list[int]:
    """[R]: what the others have waited for each rank, all together."""
    return [sum(row[rank] for row in waited) for rank in range(len(waited))]


def find_slow(waited: Sequence[Sequence[int]], spent: Sequence[int]) -> tuple[int, ...]:
    """The ranks that stand out, slowest first.

    Args:
        waited: the matrix.
        spent: nanoseconds that each rank spent in operations.
    """
    totals = waited_for(waited)
    worst = max(totals)
    slow = sorted(
        (rank for rank, total in enumerate(totals) if total >= _LIKE_THE_SLOWEST * worst), key=lambda r: -totals[r]
    )
    others = [total for rank, total in enumerate(totals) if rank not in slow]
    if not others:
        return ()
    usual, time_of_others = statistics.median(others), sum(spent) - spent[slow[0]]
    stands_out = worst > _ABOVE_THE_OTHERS * usual and worst - usual > _LEAST_SHARE * time_of_others
    return tuple(slow) if stands_out else ()


def _verdict(gathered: Sequence[BufferStats], waited: Sequence[Sequence[int]], slow: tuple[int, ...]) -> str:
    if len(gathered) == 1:
        return "One rank waits for nobody."
    totals = waited_for(waited)
    if not slow:
        return f"No rank stands out: {_seconds(sum(totals))} waited, {_seconds(max(totals))} of it for one rank."
    lines = []
    for rank in slow:
        share = 100 * totals[rank] / sum(totals)
        own = sum(waited[rank])
        lines.append(
            f"Rank {rank} is slow: the others waited {_seconds(totals[rank])} for it, {share:.0f} % of all waits; "
            f"it waited {_seconds(own)} itself."
        )
        for kind in dict.fromkeys(of.kind for stats in gathered for of in stats.operations):
            waits = [stats.of(kind).peers[rank].waits for stats in gathered]
            if total := sum(one.total_ns for one in waits):
                longest = max(one.longest_ns for one in waits)
                count = sum(one.count for one in waits)
                lines.append(f"  {kind}: {_seconds(total)} in {count} waits, the longest {_seconds(longest)}")
    return "\n".join(lines)


def _table(waited: Sequence[Sequence[int]], slow: tuple[int, ...]) -> list[str]:
    totals = waited_for(waited)
    shown = sorted(sorted(range(len(waited)), key=lambda rank: -totals[rank])[:_MOST_IN_TABLE])
    lines = [f"{'ms waited for':<14}" + "".join(f"{f'rank {rank}':>11}" for rank in shown)]
    for rank, row in enumerate(waited):
        cells = ["." if peer == rank else f"{row[peer] / 1e6:,.1f}" for peer in shown]
        lines.append(f"{f'by rank {rank}':<14}" + "".join(f"{cell:>11}" for cell in cells))
    lines.append(f"{'by all':<14}" + "".join(f"{totals[peer] / 1e6:>11,.1f}" for peer in shown))
    if slow:
        lines.append(f"{'':<14}" + "".join(f"{'^ slow' if peer in slow else '':>11}" for peer in shown).rstrip())
    if len(shown) < len(waited):
        lines.append(f"(the {len(shown)} ranks that are waited for most, of {len(waited)})")
    return lines


def _seconds(nanoseconds: float) -> str:
    return f"{nanoseconds / 1e9:.2f} s" if nanoseconds >= 1e9 else f"{nanoseconds / 1e6:.1f} ms"
