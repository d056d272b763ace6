"""The picture of a soak: memory and open files of every rank over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from tokenferry.cli.bench_plot import STYLE, empty_figure
from tokenferry.cli.soak_ranks import Report


def draw(reports: Sequence[Report], title: str, path: Path) -> None:
    """Draw what the ranks held into a PNG file.

    Args:
        reports: of all ranks.
        title: over the picture.
        path: of the PNG file.
    """
    with mpl.rc_context(STYLE):
        figure = empty_figure(8.0, 5.6)
        memory, files = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        colors = mpl.colormaps["viridis"]
        for rank, report in enumerate(reports):
            color = colors(rank / max(len(reports) - 1, 1) * 0.85)
            minutes = [look.seconds / 60 for look in report.looks]
            memory.plot(minutes, [look.resident / 2**20 for look in report.looks], color=color, lw=0.8)
            files.plot(minutes, [look.files for look in report.looks], color=color, lw=0.8)
            memory.annotate(
                f" rank {rank}",
                (minutes[-1], report.looks[-1].resident / 2**20),
                color=color,
                fontsize=7,
                va="center",
            )
        warm = reports[0].warm_seconds / 60
        for axes in (memory, files):
            axes.set_ylim(bottom=0)
            axes.axvline(warm, color="#999999", lw=0.8, ls=":")
        memory.text(warm, memory.get_ylim()[1], " end of the warm-up", fontsize=7, color="#777777", va="top")
        memory.set_ylabel("resident, without shared, MiB")
        files.set_ylabel("open files")
        files.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        files.set_xlabel("minutes, a look after every Buffer")
        figure.suptitle(title, x=0.02, ha="left", fontsize=10)
        figure.savefig(path, dpi=150)
