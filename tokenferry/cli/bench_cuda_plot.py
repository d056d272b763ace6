"""The picture of a benchmark on GPUs: over token counts, over numbers of SMs, or bars over operations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from tokenferry.cli.bench_cases import ALL_MODES, BASELINE, OURS
from tokenferry.cli.bench_cuda_cases import BARE, DEEPEP
from tokenferry.cli.bench_operators import OPERATORS
from tokenferry.cli.bench_plot import COLORS, HEAD_INCHES, STYLE, empty_figure, show_count, write_head

_COLORS = {
    (OURS, "bf16"): COLORS[OURS],
    (OURS, "fp8"): "#5cb3cc",
    (BASELINE, "bf16"): COLORS[BASELINE],
    (BASELINE, "fp8"): "#efbf8a",
    (DEEPEP, "bf16"): "#7a5195",
    (DEEPEP, "fp8"): "#b79ac8",
    (OPERATORS, "bf16"): "#3f9c7a",
    (OPERATORS, "fp8"): "#8fc7b2",
}
_OTHER = "#666666"
_MARKERS = {OURS: "o", BASELINE: "s", DEEPEP: "^", OPERATORS: "D", BARE: "v"}
_COLUMNS = 3
_LINES = "Solid: chained calls, with the fastest and slowest sample; dotted: one call from an aligned start."
_BARS = "Filled: chained calls, with the fastest and slowest sample; dotted: one call from an aligned start."
_RULER_SMS = 16
_RULER_TOKENS = 4096


class _Point(NamedTuple):
    """A contender in a case."""

    mode: str
    tokens: int
    sms: int
    stage: int
    """Ceiling of it, in MiB; 0: the library's own."""
    name: str
    dtype: str
    kinds: Mapping[str, Mapping[str, float]]

    def us(self, kind: str, field: str = "median_seconds") -> float:
        return self.kinds[kind][field] * 1e6


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Draw results into a PNG file.

    Args:
        results: the JSON file of a run on GPUs.
        path: of the PNG file.
    """
    points = [
        _Point(case["mode"], case["tokens"], case["sms"], case["num_nvl_bytes"] >> 20, name, case["dtype"], kinds)
        for entry in results["cases"]
        for case in (entry["case"],)
        for name, kinds in entry["contenders"].items()
    ]
    tokens = sorted({point.tokens for point in points})
    sms = sorted({point.sms for point in points if point.sms})
    one_sms = _RULER_SMS if _RULER_SMS in sms else sms[-1] if sms else 0
    one_tokens = _RULER_TOKENS if _RULER_TOKENS in tokens else tokens[-1]
    stages = sorted({point.stage for point in points})
    of_stage = [p for p in points if p.stage == stages[-1]]
    sweeps = []
    if len(tokens) > 1:
        at = f" ({one_sms} SMs)" if len(sms) > 1 else ""
        sweeps.append(("tokens", f"tokens of each rank{at}", [p for p in of_stage if p.sms in (0, one_sms)]))
    if len(sms) > 1:
        at = f" ({one_tokens:,} tokens)" if len(tokens) > 1 else ""
        sweeps.append(("sms", f"SMs{at}", [p for p in of_stage if p.sms and p.tokens == one_tokens]))
    if len(stages) > 1:
        at = f" ({one_tokens:,} tokens, {one_sms} SMs)"
        of_both = [p for p in points if p.sms == one_sms and p.tokens == one_tokens]
        sweeps.append(("stage", f"ceiling of the stage, MiB{at}", of_both))
    with mpl.rc_context(STYLE):
        figure = _sweeps(sweeps) if sweeps else _bars(points)
        varied = " and ".join({"tokens": "tokens", "sms": "SMs", "stage": "the stage"}[sweep[0]] for sweep in sweeps)
        title, marks = (f"Time of a call over {varied}", _LINES) if sweeps else ("Time of a call", _BARS)
        write_head(figure, title, _lines(results, marks))
        figure.savefig(path, dpi=150)


def _lines(results: Mapping[str, Any], marks: str) -> list[str]:
    machine, case = results["machine"], results["cases"][0]["case"]
    ranks = f"{machine['ranks']} ranks on {machine['gpus']} x {machine['gpu']}"
    if case.get("nodes", 1) > 1:
        ranks += f" as {case['nodes']} nodes"
    tokens, sms = (sorted({entry["case"][key] for entry in results["cases"]} - {0}) for key in ("tokens", "sms"))
    shape = [ranks, f"hidden {case['hidden']}", f"top-{case['topk']} of {case['experts']} experts"]
    if len(tokens) == 1:
        shape.insert(1, f"{tokens[0]:,} tokens each")
    if len(sms) == 1:
        shape.insert(2, f"{sms[0]} SMs")
    warning = "RANKS SHARE A GPU: these are no NVLink figures." if machine["ranks_share_gpus"] else ""
    return [
        ", ".join(shape),
        f"Slowest rank, median. {marks}",
        warning,
    ]


def _sweeps(sweeps: Sequence[tuple[str, str, list[_Point]]]) -> Figure:
    """A block of panels for each sweep, a panel for each operation, a line for each contender and dtype."""
    modes = [[mode for mode in ALL_MODES if any(p.mode == mode for p in points)] for _, _, points in sweeps]
    columns = min(_COLUMNS, max(map(len, modes)))
    rows = [-(-len(of_sweep) // columns) for of_sweep in modes]
    figure = empty_figure(max(4.2 * columns, 6.4), 2.9 * sum(rows) + HEAD_INCHES)
    grid = figure.subplots(sum(rows), columns, squeeze=False)
    legend: dict[str, Any] = {}
    for number, (field, label, points) in enumerate(sweeps):
        panels = grid[sum(rows[:number]) : sum(rows[: number + 1])].flatten()
        for axes, mode in zip(panels, modes[number], strict=False):
            _panel(axes, [p for p in points if p.mode == mode], field)
            axes.set(title=ALL_MODES[mode], xlabel=label, ylabel="µs")
            legend.update((text, handle) for handle, text in zip(*axes.get_legend_handles_labels(), strict=True))
        for axes in panels[len(modes[number]) :]:
            axes.set_axis_off()
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=min(len(legend), 4))
    return figure


def _panel(axes: Axes, points: Sequence[_Point], field: str) -> None:
    for name, dtype in dict.fromkeys((p.name, p.dtype) for p in points):
        line = sorted((p for p in points if (p.name, p.dtype) == (name, dtype)), key=lambda p: getattr(p, field))
        x = [getattr(p, field) for p in line]
        color = _COLORS.get((name, dtype), _OTHER)
        chained = [p.us("chained") for p in line]
        axes.plot(x, chained, color=color, marker=_MARKERS[name], ms=4.5, lw=1.8, label=f"{name}, {dtype}")
        axes.plot(x, [p.us("call") for p in line], color=color, marker=_MARKERS[name], ms=3, lw=1.2, ls=":")
        low, high = ([p.us("chained", f"{end}_seconds") for p in line] for end in ("fastest", "slowest"))
        axes.fill_between(x, low, high, color=color, alpha=0.15, lw=0)
    ticks = sorted({getattr(p, field) for p in points})
    if field == "tokens":
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, 1.1 * max(p.us(kind) for p in points for kind in ("call", "chained")))
    axes.set_xticks(ticks, [show_count(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _bars(points: Sequence[_Point]) -> Figure:
    """For each operation two bars a contender and dtype: chained, and behind it a call from an aligned start."""
    modes = [mode for mode in ALL_MODES if any(p.mode == mode for p in points)]
    lines = list(dict.fromkeys((p.name, p.dtype) for p in points))
    figure = empty_figure(max(1.9 * len(modes) + 1.5, 9.0), 3.8 + HEAD_INCHES)
    axes = figure.subplots()
    width = 0.84 / len(lines)
    for offset, (name, dtype) in enumerate(lines):
        for p in points:
            if (p.name, p.dtype) != (name, dtype):
                continue
            x = modes.index(p.mode) + (offset - (len(lines) - 1) / 2) * width
            color = _COLORS.get((name, dtype), _OTHER)
            chained, call = p.us("chained"), p.us("call")
            fastest, slowest = p.us("chained", "fastest_seconds"), p.us("chained", "slowest_seconds")
            error = [[chained - fastest], [slowest - chained]]
            axes.bar(x, call, width * 0.94, color="none", edgecolor=color, ls=":", lw=1)
            axes.bar(x, chained, width * 0.94, color=color, yerr=error, error_kw={"elinewidth": 1, "capsize": 2})
            axes.annotate(
                f"{chained:.0f}", (x, max(slowest, call)), xytext=(0, 3), textcoords="offset points", ha="center"
            )
        axes.bar(0, 0, color=_COLORS.get((name, dtype), _OTHER), label=f"{name}, {dtype}")
    axes.set_xticks(range(len(modes)), [ALL_MODES[mode] for mode in modes])
    axes.tick_params(axis="x", length=0)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("µs")
    slowest = max(p.us("chained", "slowest_seconds") for p in points)
    axes.set_ylim(0, 1.25 * max(slowest, *(p.us("call") for p in points)))  # labels and the legend lie above
    axes.legend(loc="upper left", ncols=len(lines))
    return figure
