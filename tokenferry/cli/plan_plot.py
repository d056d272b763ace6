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
_COLORS = {"network": "#d9822b", "NVLink": "#0b6e99", "SMs": "#7a5195", "slabs": "#7a5195", "latency": "#3f9c7a"}
_MOST_TOKENS = {HIGH_THROUGHPUT: 1 << 16, LOW_LATENCY: 512}
_FEWEST_TOKENS = {HIGH_THROUGHPUT: 64, LOW_LATENCY: 1}

Point = tuple[int, tuple[Operation, Operation]]
"""An x, and dispatch and combine there."""


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
        for number, axes in enumerate(panels):
            _panel(axes, [(x, pair[number]) for x, pair in points], _asked(plan, over))
            axes.set_xlabel("ranks" if over == "ranks" else "tokens of each rank")
        _scale(panels[0], [operation for _, pair in points for operation in pair])
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
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


def _panel(axes: Axes, line: Sequence[tuple[int, Operation]], asked: int) -> None:
    """The whole, dots in the colour of what limits it, and the parts."""
    x = [place for place, _ in line]
    for number, hop in enumerate(line[-1][1].hops):
        if not any(operation.hops[number].rows for _, operation in line):
            continue
        times = [operation.hops[number].seconds or math.nan for _, operation in line]
        axes.plot(x, times, color=_COLORS[hop.name], lw=1.3, ls="--", label=hop.name)
    latency = [operation.latency for _, operation in line]
    axes.plot(x, latency, color=_COLORS["latency"], lw=1.3, ls=":", label="latency")
    total = [operation.seconds for _, operation in line]
    axes.plot(x, total, color=_TOTAL, lw=2, zorder=3, label="all (dots: what limits it)")
    limits = [_COLORS[operation.bottleneck] for _, operation in line]
    axes.scatter(x, total, c=limits, s=34, zorder=4, edgecolors="white", linewidths=0.8)
    at = dict(line)[asked]
    axes.axvline(asked, color="#888888", lw=1, ls=(0, (6, 3)), zorder=1)
    place: Any = {"xytext": (-7, 7), "textcoords": "offset points", "ha": "right", "fontweight": "bold"}
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.annotate(_show(at.seconds), (asked, at.seconds), color=_TOTAL, zorder=5, bbox=box, **place)
    axes.set_title(at.name)
    axes.set_xscale("log", base=2)
    axes.set_xlim(x[0] / 1.5, x[-1] * 1.5)
    axes.set_xticks(x, [show_count(tick) for tick in x], rotation=0 if len(x) < 13 else 45)
    axes.xaxis.set_minor_locator(NullLocator())


def _scale(axes: Axes, operations: Sequence[Operation]) -> None:
    """Scale the axis that the panels share; parts that matter nowhere may fall below it."""
    least = min(operation.latency for operation in operations)
    axes.set_yscale("log")
    axes.set_ylim(least / 1.5, 2.2 * max(operation.seconds for operation in operations))
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
        *([f"{shape.tokens:,} tokens each"] if over == "ranks" else []),
        f"hidden {shape.hidden}",
        f"{shape.dtype} dispatch, bf16 combine",
        f"top-{shape.topk} of {shape.experts:,} experts{up_to}{groups}",
        *([f"skew {shape.skew:g}"] if shape.skew else []),
    ]
    rates = f"NVLink {machine.nvlink:g} GB/s, network {machine.network:g} GB/s a GPU"
    sms = f", {machine.sms} SMs" if plan.mode == HIGH_THROUGHPUT else ""
    return [", ".join(what), f"{rates}{sms}. Line: the case that was asked for.", "A prediction, not a measurement."]
