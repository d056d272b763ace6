"""The picture of a benchmark: over token counts, over stage ceilings, or bars over operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, NullLocator

from tokenferry.cli.bench_cases import ALL_MODES, BASELINE, OURS
from tokenferry.cli.bench_report import CaseReport, show_stage, show_time
from tokenferry.runtime import DEFAULT_STAGE_BYTES

COLORS = {OURS: "#0b6e99", BASELINE: "#d9822b"}
_MARKERS = {OURS: "o", BASELINE: "s"}
HEAD_INCHES = 1.25
_MOST_SPREAD = 1.3
"""Where spread over bars ends in an arrow, in the longest medians: one disturbed case must not flatten all."""
_MARGIN = 1.15
"""Between what is drawn and the ends of a logarithmic axis, a factor."""
_SPAN = 1.3
_DASHES = ("-", "--", ":", "-.")
STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}


def draw(reports: Sequence[CaseReport], machine: Mapping[str, Any], path: Path) -> None:
    """Draw the results into a PNG file.

    Args:
        reports: all cases of a run.
        machine: :func:`tokenferry.cli.bench_machine.describe_machine`.
        path: of the file.
    """
    with mpl.rc_context(STYLE):
        tokens = {report.case.tokens for report in reports}
        stages = {report.case.num_nvl_bytes for report in reports}
        if len(tokens) > 1:
            figure = _panels(reports, "tokens of each rank", _tokens, show_count)
            title = "Time per token"
        elif len(stages) > 1:
            figure = _panels(reports, "stage ceiling, MiB", _stage, lambda value: f"{value / 2**20:g}")
            title = "Time per token over the stage"
        else:
            figure = _bars(reports)
            title = "Time per call"
        _head(figure, title, reports, machine)
        figure.savefig(path, dpi=150)


def _tokens(report: CaseReport) -> int:
    return report.case.tokens


def _stage(report: CaseReport) -> int:
    return report.case.num_nvl_bytes or DEFAULT_STAGE_BYTES


def show_count(value: float) -> str:
    """A count with the suffix k where it has one."""
    return f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"


def empty_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, with room above for the title."""
    layout = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - HEAD_INCHES / height), w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), layout=layout)


def _head(figure: Figure, title: str, reports: Sequence[CaseReport], machine: Mapping[str, Any]) -> None:
    case = reports[0].case
    counts = {report.case.tokens for report in reports}
    shape = [f"{case.ranks} ranks", f"hidden {case.hidden}", case.dtype, f"top-{case.topk} of {case.experts} experts"]
    if len(counts) == 1:
        shape.insert(1, f"{case.tokens:,} tokens each")
    memory = f"{machine['memory_bytes'] / 2**30:.0f} GiB"
    lines = [
        ", ".join(shape),
        f"{machine['cpu']}, {machine['cores']} cores, {memory}, {machine['system']}",
        "Slowest rank; median over iterations, with the 10th to the 90th percentile.",
    ]
    write_head(figure, title, lines)


def write_head(figure: Figure, title: str, lines: Sequence[str]) -> None:
    """Write a title and three lines above what :func:`empty_figure` left free."""
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.15 / height, title, fontsize=15, fontweight="bold", va="top")
    figure.text(0.02, 1 - 0.50 / height, "\n".join(lines), fontsize=9, color="#555555", va="top", linespacing=1.4)


def _names(reports: Sequence[CaseReport]) -> list[str]:
    return [name for name in (OURS, BASELINE) if any(name in report.statistics for report in reports)]


def _panels(
    reports: Sequence[CaseReport], label: str, x_of: Callable[[CaseReport], int], show: Callable[[float], str]
) -> Figure:
    """One panel for each operation, a line for each contender (and stage ceiling, where both vary)."""
    modes = list(dict.fromkeys(report.case.mode for report in reports))
    columns = 1 if len(modes) == 1 else 2 if len(modes) in (2, 4) else 3
    rows = -(-len(modes) // columns)
    figure = empty_figure(max(4.2 * columns, 6.4), 2.9 * rows + HEAD_INCHES)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, mode in zip(grid, modes, strict=False):
        of_mode = [report for report in reports if report.case.mode == mode]
        _panel(axes, of_mode, x_of)
        ticks = sorted({x_of(report) for report in of_mode})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [show(tick) for tick in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(title=ALL_MODES[mode], xlabel=label, ylabel="µs per token")
        found = [(r.case.tokens, statistics) for r in of_mode for statistics in r.statistics.values()]
        scale_log(axes, [seconds * 1e6 / count for count, of in found for seconds in (of.p10, of.p90)])
    for axes in grid[len(modes) :]:
        axes.set_axis_off()
    handles, labels = max(
        (axes.get_legend_handles_labels() for axes in grid[: len(modes)]), key=lambda pair: len(pair[1])
    )
    if len(modes) < len(grid):
        grid[-1].legend(handles, labels, loc="center", fontsize=11)
    else:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def scale_log(axes: Axes, drawn: Sequence[float], headroom: float = 1.0) -> None:
    """Scale an axis so that all that is drawn is inside: one disturbed case hardly flattens the rest."""
    low, high = min(drawn) / _MARGIN, max(drawn) * _MARGIN
    if high < 2 * low:  # some figures are to stand on the axis
        low, high = low / _SPAN, high * _SPAN
    axes.set_yscale("log")
    axes.set_ylim(low, high * headroom)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _panel(axes: Axes, reports: Sequence[CaseReport], x_of: Callable[[CaseReport], int]) -> None:
    stages = sorted({report.case.num_nvl_bytes for report in reports}) if x_of is _tokens else [None]
    for name in _names(reports):
        # The baseline knows no stage: one line of it is enough.
        for index, stage in enumerate(stages if name == OURS else stages[:1]):
            line = [r for r in reports if name in r.statistics and stage in (None, r.case.num_nvl_bytes)]
            line.sort(key=x_of)
            x = [x_of(report) for report in line]
            low, middle, high = (
                [getattr(r.statistics[name], field) * 1e6 / r.case.tokens for r in line]
                for field in ("p10", "median", "p90")
            )
            label = name if len(stages) == 1 or name == BASELINE else f"{name}, stage {show_stage(stage or 0)}"
            axes.plot(
                x,
                middle,
                color=COLORS[name],
                marker=_MARKERS[name],
                ms=4.5,
                lw=1.8,
                ls=_DASHES[index % 4],
                label=label,
            )
            axes.fill_between(x, low, high, color=COLORS[name], alpha=0.15, lw=0)


def _bars(reports: Sequence[CaseReport]) -> Figure:
    """A group of bars for each operation, a bar for each contender, ratios above."""
    figure = empty_figure(max(1.75 * len(reports) + 1.5, 7.0), 3.6 + HEAD_INCHES)
    axes = figure.subplots()
    longest = max(found.median for report in reports for found in report.statistics.values())
    unit, scale = ("s", 1.0) if longest >= 1 else ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)
    names = _names(reports)
    width = 0.8 / len(names)
    ceiling = _MOST_SPREAD * longest
    cut = []
    for offset, name in enumerate(names):
        present = [(x, report.statistics[name]) for x, report in enumerate(reports) if name in report.statistics]
        places = [x + (offset - (len(names) - 1) / 2) * width for x, _ in present]
        cut += [place for place, (_, found) in zip(places, present, strict=True) if found.p90 > ceiling]
        axes.bar(
            places,
            [found.median * scale for _, found in present],
            width * 0.94,
            yerr=[
                [(found.median - found.p10) * scale for _, found in present],
                [(min(found.p90, ceiling) - found.median) * scale for _, found in present],
            ],
            error_kw={"ecolor": "#444444", "elinewidth": 1, "capsize": 3},
            color=COLORS[name],
            label=name,
        )
    if cut:
        axes.plot(
            cut,
            [ceiling * scale] * len(cut),
            ls="none",
            marker="^",
            color="#444444",
            label="90th percentile is higher",
        )
    for x, report in enumerate(reports):
        top = min(max(found.p90 for found in report.statistics.values()), ceiling) * scale
        text = show_time(report.statistics[OURS].median).replace("us", "µs")
        if report.ratio is not None:
            text = f"{report.ratio:.2f}x as fast"
        axes.annotate(
            text,
            (x, top),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontweight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    axes.set_xticks(range(len(reports)), [ALL_MODES[report.case.mode] for report in reports])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(f"time of a call, {unit}")
    axes.set_ylim(0, (_MOST_SPREAD + 0.12) * longest * scale)
    handles, labels = axes.get_legend_handles_labels()
    last = int(bool(cut))  # lines come first there
    handles, labels = handles[last:] + handles[:last], labels[last:] + labels[:last]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure
