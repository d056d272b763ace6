"""The picture of a wait report: the matrix, and above it what is waited for each rank."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from tokenferry.cli.bench_plot import HEAD_INCHES, STYLE, empty_figure, write_head
from tokenferry.waits import WaitReport, waited_for

_SLOW, _OTHER = "#c8442b", "#8aa4b5"
_MOST_NUMBERS = 16
"""Ranks: with more, numbers in the cells could not be read."""


def draw(report: WaitReport, path: Path) -> None:
    """Draw a report into a PNG file; creates its folder.

    Args:
        report: of all ranks.
        path: of the file.
    """
    ranks = len(report.waited)
    side = min(9.0, max(4.6, 0.62 * ranks + 1.6))
    with mpl.rc_context(STYLE):
        figure = empty_figure(side + 1.6, side + 1.3 + HEAD_INCHES)
        bars, cells = figure.subplots(2, 1, height_ratios=(1, 3.2), sharex=True)
        _bars(bars, report)
        image = _cells(cells, report)
        figure.colorbar(image, ax=[bars, cells], label="ms", shrink=0.7, anchor=(0.0, 0.0), aspect=30)
        listed = " and ".join(str(rank) for rank in report.slow)
        title = "Who waits for whom"
        if report.slow:
            title = f"Rank {listed} is slow" if len(report.slow) == 1 else f"Ranks {listed} are slow"
        verdict = report.text.splitlines()[0].removeprefix(f"Rank {listed} is slow: ")
        about = "Idle time of each rank (row) while another (column) was missing."
        lines = textwrap.wrap(verdict[:1].upper() + verdict[1:], int(12.5 * (side + 1.6)))
        write_head(figure, title, [*lines[:2], about])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, format="png")


def _bars(axes: Axes, report: WaitReport) -> None:
    totals = [total / 1e6 for total in waited_for(report.waited)]
    colors = [_SLOW if rank in report.slow else _OTHER for rank in range(len(totals))]
    drawn = axes.bar(range(len(totals)), totals, color=colors, width=0.7)
    if len(totals) <= _MOST_NUMBERS:
        axes.bar_label(drawn, [f"{total:,.0f}" for total in totals], fontsize=8, padding=1)
    axes.set_ylabel("ms waited for it,\nall ranks")
    axes.grid(axis="x", visible=False)
    axes.margins(y=0.18)
    axes.tick_params(axis="x", length=0)


def _cells(axes: Axes, report: WaitReport) -> Any:
    ranks = len(report.waited)
    values = [[nanoseconds / 1e6 for nanoseconds in row] for row in report.waited]
    largest = max(max(row) for row in values) or 1.0
    image = axes.imshow(values, cmap="Blues", vmin=0, vmax=largest, aspect="auto")
    axes.grid(visible=False)
    step = 1 if ranks <= _MOST_NUMBERS else 8
    axes.set_xticks(range(0, ranks, step))
    axes.set_yticks(range(0, ranks, step))
    axes.set_xlabel("for rank")
    axes.set_ylabel("rank that waited")
    for rank in range(ranks):
        axes.add_patch(Rectangle((rank - 0.5, rank - 0.5), 1, 1, facecolor="#eeeeee", edgecolor="white", hatch="///"))
    for rank in report.slow:
        outline = Rectangle((rank - 0.5, -0.5), 1, ranks, fill=False, edgecolor=_SLOW, linewidth=2, clip_on=False)
        axes.add_patch(outline)
    if ranks <= _MOST_NUMBERS:
        for row in range(ranks):
            for column in range(ranks):
                if row != column:
                    value = values[row][column]
                    color = "white" if value > 0.6 * largest else "#333333"
                    axes.text(column, row, f"{value:,.0f}", ha="center", va="center", fontsize=8, color=color)
    return image
