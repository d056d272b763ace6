"""The picture of a low-latency benchmark: times over token counts, a panel for each dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import NullLocator

from tokenferry.cli.bench_cases import BASELINE, OURS
from tokenferry.cli.bench_cuda_cases import DEEPEP
from tokenferry.cli.bench_low_latency_cases import WAIT_STATISTICS
from tokenferry.cli.bench_low_latency_report import kind_of
from tokenferry.cli.bench_operators import OPERATORS
from tokenferry.cli.bench_plot import COLORS, HEAD_INCHES, STYLE, empty_figure, scale_log, show_count, write_head

_PAIR = {
    OURS: COLORS[OURS],
    BASELINE: COLORS[BASELINE],
    DEEPEP: "#7a5195",
    OPERATORS: "#5cb3cc",
    WAIT_STATISTICS: "#666666",
}
_ALONE = {"dispatch": "#3f9c7a", "combine": "#c2477f"}
_MARKERS = {
    OURS: "o",
    BASELINE: "v",
    DEEPEP: "^",
    OPERATORS: "x",
    WAIT_STATISTICS: "+",
    "dispatch": "s",
    "combine": "D",
}
_FIT = "#222222"
_HEADROOM = 1.7
"""Above the highest time, for the text about the fit."""


class _Point(NamedTuple):
    """A contender in a case."""

    tokens: int
    name: str
    dtype: str
    operations: Mapping[str, Mapping[str, Mapping[str, float]]]

    def seconds(self, operation: str, field: str = "median") -> float:
        kinds = self.operations[operation]
        return kinds[kind_of(kinds)][f"{field}_seconds"]


class _Unit(NamedTuple):
    """Of the times of a picture."""

    name: str
    per_second: float

    def of(self, points: Sequence[_Point], operation: str, field: str = "median") -> list[float]:
        return [point.seconds(operation, field) * self.per_second for point in points]

    def show(self, time: float) -> str:
        return f"{time:.1f}" if time < 99.95 else f"{time:.0f}"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw results into a PNG file.

    Args:
        results: the JSON file of a low-latency run.
        path: of the PNG file.
    """
    points = [
        _Point(entry["case"]["tokens"], name, entry["case"]["dtype"], operations)
        for entry in results["cases"]
        for name, operations in entry["contenders"].items()
    ]
    dtypes = list(dict.fromkeys(point.dtype for point in points))
    unit = _Unit("µs", 1e6) if min(point.seconds("pair") for point in points) < 1e-3 else _Unit("ms", 1e3)
    with mpl.rc_context(STYLE):
        figure = empty_figure(max(5.4 * len(dtypes), 7.2), 4.4 + HEAD_INCHES)
        panels = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
        legend: dict[str, Any] = {}
        for axes, dtype in zip(panels, dtypes, strict=True):
            of_dtype = sorted((point for point in points if point.dtype == dtype), key=lambda point: point.tokens)
            fits = [fit for fit in results["fits"] if fit["dtype"] == dtype and fit["contender"] == OURS]
            _panel(axes, of_dtype, fits, unit)
            axes.set_title(f"dispatch {dtype}, combine bf16")
            legend.update((text, handle) for handle, text in zip(*axes.get_legend_handles_labels(), strict=True))
        panels[0].set_ylabel(unit.name)
        _scale(panels[0], points, unit)
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), 4))
        of = "in a CUDA graph" if _is_graph(points) else "of CPU ranks"
        write_head(figure, f"Low-latency dispatch and combine {of}", _lines(results, _is_graph(points)))
        figure.savefig(path, dpi=150)


def _is_graph(points: Sequence[_Point]) -> bool:
    return kind_of(points[0].operations["pair"]) == "graph"


def _lines(results: Mapping[str, Any], is_graph: bool) -> list[str]:
    machine, case, method = results["machine"], results["cases"][0]["case"], results["method"]
    device = f"{machine['gpus']} x {machine['gpu']}" if "gpus" in machine else machine["cpu"]
    shape = [f"{case['ranks']} ranks on {device}", f"hidden {case['hidden']}"]
    shape += [f"top-{case['topk']} of {case['experts']} experts", *(["exact combine"] if case["exact"] else [])]
    how = (
        f"one of {method['captured']} calls in a graph, replayed" if is_graph else f"{method['chain']} calls in a row"
    )
    warning = "RANKS SHARE A GPU: these are no NVLink figures." if machine.get("ranks_share_gpus") else ""
    warning = warning if is_graph else "Processes of one CPU stand in for GPUs: no claim of speed."
    return [", ".join(shape), f"Slowest rank, median with the 10th to the 90th percentile; {how}.", warning]


def _panel(axes: Axes, points: Sequence[_Point], fits: Sequence[Mapping[str, Any]], unit: _Unit) -> None:
    for name in dict.fromkeys(point.name for point in points):
        line = [point for point in points if point.name == name]
        x = [point.tokens for point in line]
        color = _PAIR[name]
        pair = unit.of(line, "pair")
        axes.plot(x, pair, color=color, marker=_MARKERS[name], ms=5, lw=2.2, zorder=3, label=f"{name}: pair")
        axes.fill_between(x, *_percentiles(line, "pair", unit), color=color, alpha=0.15, lw=0)
        if name != OURS:
            continue
        for tokens, time in zip(x, pair, strict=True):
            place: Any = {"xytext": (-5, 7), "textcoords": "offset points", "ha": "center", "zorder": 5}
            behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5}
            axes.annotate(unit.show(time), (tokens, time), fontsize=8, color=color, bbox=behind, **place)
        for operation, thin in _ALONE.items():
            alone = unit.of(line, operation)
            label = f"{operation} alone"
            axes.plot(x, alone, color=thin, marker=_MARKERS[operation], ms=3, lw=1, label=label)
            axes.fill_between(x, *_percentiles(line, operation, unit), color=thin, alpha=0.12, lw=0)
    for fit in fits:
        constant, slope = (fit[key] * unit.per_second for key in ("constant_seconds", "seconds_per_token"))
        first, last = points[0].tokens, points[-1].tokens
        x = [first * (last / first) ** (step / 99) for step in range(100)]
        fitted = [constant + slope * tokens for tokens in x]
        axes.plot(x, fitted, color=_FIT, lw=1, ls=(0, (4, 3)), zorder=4, label="fit of the pair")
        text = f"pair ≈ {unit.show(constant)} {unit.name} + {slope:.3g} {unit.name} a token"
        box = {"facecolor": "white", "edgecolor": "none", "pad": 2}
        place = {"transform": axes.transAxes, "va": "top", "fontweight": "bold", "bbox": box}
        axes.text(0.03, 0.97, text, color=_PAIR[OURS], **place)
    ticks = sorted({point.tokens for point in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [show_count(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens of each rank")


def _percentiles(line: Sequence[_Point], operation: str, unit: _Unit) -> tuple[list[float], list[float]]:
    return unit.of(line, operation, "p10"), unit.of(line, operation, "p90")


def _scale(axes: Axes, points: Sequence[_Point], unit: _Unit) -> None:
    """Scale the axis that the panels share."""
    ours = [point for point in points if point.name == OURS]
    lines = [(points, "pair"), *((ours, operation) for operation in _ALONE)]
    drawn = [time for line, operation in lines for ends in _percentiles(line, operation, unit) for time in ends]
    scale_log(axes, drawn, _HEADROOM)
