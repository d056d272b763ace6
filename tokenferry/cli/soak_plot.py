"""The picture of a soak: memory and open files of every rank, and memory of its GPU, over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.ticker import MaxNLocator

from tokenferry.cli.bench_plot import HEAD_INCHES, STYLE, empty_figure, write_head
from tokenferry.cli.soak_ranks import Report


def draw(reports: Sequence[Report], lines: Sequence[str], path: Path) -> None:
    """Draw what the ranks held into a PNG file.

    Args:
        reports: of all ranks.
        lines: three, under the title.
        path: of the PNG file.
    """
    with mpl.rc_context(STYLE):
        has_device = any(look.device for report in reports for look in report.looks)
        figure = empty_figure(8.0, 4.4 + 1.6 * has_device + HEAD_INCHES)
        ratios = [3, 2, 1] if has_device else [3, 1]
        memory, *others, files = figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios)
        colors = mpl.colormaps["viridis"]
        for rank, report in enumerate(reports):
            color = colors(rank / max(len(reports) - 1, 1) * 0.85)
            minutes = [look.seconds / 60 for look in report.looks]
            memory.plot(minutes, [look.resident / 2**20 for look in report.looks], color=color, lw=0.8)
            for device in others:
                device.plot(minutes, [look.device / 2**20 for look in report.looks], color=color, lw=0.8)
            files.plot(minutes, [look.files for look in report.looks], color=color, lw=0.8)
        warm = reports[0].warm_seconds / 60
        for axes in (memory, *others, files):
            axes.set_ylim(0, 1.2 * axes.get_ylim()[1])
            axes.axvline(warm, color="#999999", lw=0.8, ls=":")
        memory.text(warm, memory.get_ylim()[1], " end of the warm-up", fontsize=7, color="#777777", va="top")
        memory.set_ylabel("MiB, without shared")
        for device in others:
            device.set_ylabel("MiB of the GPU")
        files.set_ylabel("open files")
        files.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        files.set_xlabel("minutes; a look after every Buffer, a line for every rank")
        write_head(figure, "Memory and open files in a soak", lines)
        figure.savefig(path, dpi=130)
