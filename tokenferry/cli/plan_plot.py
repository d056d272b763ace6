"""The picture of a prediction: dispatch and combine over ranks or tokens, and what limits them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from tokenferry.cli.bench_plot import HEAD_INCHES, STYLE, empty_figure, show_count, write_head
from tokenferry.cli.plan_model import HIGH_THROUGHPUT, LOW_LATENCY, Operation, Plan, high_throughput, low_latency
from tokenferry.cli.plan_routing import MOST_EXPERTS, MOST_RANKS, Machine, Routing, Shape, route

_TOTAL = "#222222"
_ALL = "all (dots: what limits it)"
_COLORS = {"network": "#d9822b", "NVLink": "#0b6e99", "SMs": "#7a5195", "slabs": "#7a5195", "latency": "#3f9c7a"}
_MOST_TOKENS = {HIGH_THROUGHPUT: 1 << 16, LOW_LATENCY: 512}
_FEWEST_TOKENS = {HIGH_THROUGHPUT: 64, LOW_LATENCY: 1}

_DEPTH = 20.0
"""By which factor the picture goes below the shortest time, at most: parts that are always shorter are left out."""
_NEAR = 1.4
"""Factor between places whose figures would touch."""

Point = tuple[int, tuple[Operation, Operation]]
"""An x, and dispatch and combine there."""
Line = Sequence[tuple[int, Operation]]
"""One of them over x."""


def draw(plan: Plan, over: str, path: Path) -> None:
    """Draw a prediction and its like into a PNG file.

    Args:
        plan: the case that was asked for.
        over: ``ranks`` or ``tokens``: what varies.
        path: of the PNG file.
    """
    points = points_over(plan, over)
    with mpl.rc_context(STYLE):
        figure = empty_figure(11, 4.4 + HEAD_INCHES)
        panels = figure.subplots(1, 2, sharey=True)
        lines = [[(x, pair[number]) for x, pair in points] for number in range(2)]
        least = _least(lines)
        legend: dict[str, Any] = {}
        for axes, line in zip(panels, lines, strict=True):
            _panel(axes, line, _asked(plan, over), least)
            axes.set_xlabel("ranks" if over == "ranks" else "tokens of each rank")
            legend.update((text, handle) for handle, text in zip(*axes.get_legend_handles_labels(), strict=True))
        _scale(panels[0], least, 2.2 * max(operation.seconds for _, pair in points for operation in pair))
        legend[_ALL] = legend.pop(_ALL)  # the last one
        figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend))
        write_head(figure, f"Predicted time of a {plan.mode} operation over {over}", _lines(plan, over, points))
        figure.savefig(path, dpi=150, format="png")


def points_over(plan: Plan, over: str) -> list[Point]:
    """Predictions at powers of two and at the case that was asked for, ascending."""
    machine, shape = plan.machine, plan.shape
    if over == "tokens":
        first, last = _FEWEST_TOKENS[plan.mode], max(_MOST_TOKENS[plan.mode], 2 * shape.tokens)
        tokens = sorted({*_powers(first, last), shape.tokens})
        shapes = [dataclasses.replace(shape, tokens=count) for count in tokens]
        return [(one.tokens, _pair(plan.mode, machine, one, plan.routing)) for one in shapes]
    nodes = sorted({*_powers(1, MOST_RANKS // machine.gpus_per_node), machine.nodes})
    machines = [dataclasses.replace(machine, nodes=count) for count in nodes]
    cases = [(one, with_experts(one, shape)) for one in machines]
    return [(one.ranks, _pair(plan.mode, one, wide)) for one, wide in cases if wide.experts <= MOST_EXPERTS]


def with_experts(machine: Machine, shape: Shape) -> Shape:
    """The shape with as many experts as the ranks need, at least: a multiple of ranks and groups."""
    both = math.lcm(machine.ranks, shape.groups)
    return dataclasses.replace(shape, experts=both * -(-shape.experts // both))


def _pair(mode: str, machine: Machine, shape: Shape, routing: Routing | None = None) -> tuple[Operation, Operation]:
    predict = low_latency if mode == LOW_LATENCY else high_throughput
    return predict(machine, shape, routing or route(machine, shape))


def _powers(first: int, last: int) -> list[int]:
    return [1 << power for power in range(first.bit_length() - 1, last.bit_length())]


def _asked(plan: Plan, over: str) -> int:
    return plan.machine.ranks if over == "ranks" else plan.shape.tokens


def _parts(line: Line) -> dict[str, list[float]]:
    """Seconds of each part, over x."""
    parts = {
        hop.name: [operation.hops[number].seconds for _, operation in line]
        for number, hop in enumerate(line[0][1].hops)
    }
    return parts | {"latency": [operation.latency for _, operation in line]}


def _least(lines: Sequence[Line]) -> float:
    """Seconds at the lower end of the picture: below all times of all parts, but not far below the whole."""
    parts = [seconds for line in lines for times in _parts(line).values() for seconds in times if seconds]
    shortest = min(operation.seconds for line in lines for _, operation in line)
    return max(min(parts) / 1.5, shortest / _DEPTH)


def _panel(axes: Axes, line: Line, asked: int, least: float) -> None:
    """The whole, dots in the colour of what limits it, and the parts that are ever longer than the least."""
    x = [place for place, _ in line]
    for name, times in _parts(line).items():
        if max(times) > least:
            shown = [seconds or math.nan for seconds in times]
            axes.plot(x, shown, color=_COLORS[name], lw=1.3, ls=":" if name == "latency" else "--", label=name)
    total = [operation.seconds for _, operation in line]
    axes.plot(x, total, color=_TOTAL, lw=2, zorder=3, label=_ALL)
    limits = [_COLORS[operation.bottleneck] for _, operation in line]
    axes.scatter(x, total, c=limits, s=34, zorder=4, edgecolors="white", linewidths=0.8)
    at = dict(line)[asked]
    axes.axvline(asked, color="#888888", lw=1, ls=(0, (6, 3)), zorder=1)
    is_left = asked * asked < x[0] * x[-1]
    place: Any = {"xytext": (6 if is_left else -6, -2), "ha": "left" if is_left else "right", "va": "top"}
    place |= {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.annotate(_show(at.seconds), (asked, 1), color=_TOTAL, fontweight="bold", bbox=box, **place)
    axes.set_title(at.name)
    axes.set_xscale("log", base=2)
    axes.set_xlim(x[0] / 1.5, x[-1] * 1.5)
    ticks = [tick for tick in x if tick == asked or not asked / _NEAR < tick < asked * _NEAR]
    axes.set_xticks(ticks, [show_count(tick) for tick in ticks], rotation=0 if len(ticks) < 13 else 45)
    axes.xaxis.set_minor_locator(NullLocator())


def _scale(axes: Axes, least: float, most: float) -> None:
    """Scale the axis that the panels share."""
    axes.set_yscale("log")
    axes.set_ylim(least, most)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda seconds, _: _show(seconds))
    axes.yaxis.set_minor_locator(NullLocator())


def _show(seconds: float) -> str:
    """Three digits at most."""
    for unit, per_second in (("µs", 1e6), ("ms", 1e3)):
        if seconds * per_second < 999.5:
            return f"{seconds * per_second:.3g} {unit}"
    return f"{seconds:.3g} s"


def _lines(plan: Plan, over: str, points: Sequence[Point]) -> list[str]:
    machine, shape = plan.machine, plan.shape
    largest = dataclasses.replace(machine, nodes=points[-1][0] // machine.gpus_per_node)
    most = with_experts(largest, shape).experts if over == "ranks" else shape.experts
    groups = f" in {shape.topk_groups} of {shape.groups} groups" if shape.topk_groups < shape.groups else ""
    up_to = f" (up to {most:,} where ranks need them)" if most > shape.experts else ""
    what = [
        f"{machine.gpus_per_node} GPUs a node"
        if over == "ranks"
        else f"{machine.nodes} x {machine.gpus_per_node} ranks",
        *([f"{shape.tokens:,} token{'s' * (shape.tokens > 1)} each"] if over == "ranks" else []),
        f"hidden {shape.hidden}",
        f"{shape.dtype} dispatch, bf16 combine",
        f"top-{shape.topk} of {shape.experts:,} experts{up_to}{groups}",
        *([f"skew {shape.skew:g}"] if shape.skew else []),
    ]
    rates = f"NVLink {machine.nvlink:g} GB/s, network {machine.network:g} GB/s a GPU"
    sms = f", {machine.sms} SMs" if plan.mode == HIGH_THROUGHPUT else ""
    return [", ".join(what), f"{rates}{sms}. Line: the case that was asked for.", "A prediction, not a measurement."]
