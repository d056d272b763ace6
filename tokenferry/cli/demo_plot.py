"""The picture of a demo run: what it learned, which experts worked, what travelled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenferry.cli.demo_model import Settings
from tokenferry.cli.demo_train import Report, Trace

_INK, _MUTED, _GRID = "#1b2733", "#6b7885", "#e4e8ec"
_TRAIN, _VALIDATION, _TWIN = "#8fb8de", "#0b5394", "#d9480f"
_STYLE: Any = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "figure.facecolor": "white",
}
_MAX_COLUMNS = 125
"""Columns of a load map: more would be thinner than a pixel or two."""


def draw(
    folder: Path,
    settings: Settings,
    reports: list[Report],
    twin: Trace,
    baselines: dict[str, float],
    megabytes: list[list[float]],
) -> Path:
    """Draw the run into ``folder``/demo.png; creates the folder.

    Args:
        folder: where to.
        settings: of the run.
        reports: of all ranks.
        twin: losses of the dense twin.
        baselines: validation losses to compare with, by name.
        megabytes: [R][R], from rank to rank.

    Returns:
        The path of the picture.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context(_STYLE):
        spacing = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12, wspace=0.03, hspace=0.03)
        figure: Any = Figure(figsize=(13, 8.6), dpi=130, layout=spacing)
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"A language model with {settings.layers} × {settings.experts} experts, trained on {len(reports)} ranks "
            "through tokenferry",
            fontsize=15,
            fontweight="bold",
            x=0.012,
            ha="left",
        )
        top, bottom = figure.subfigures(2, 1, height_ratios=(1.12, 1))
        loss_axes, traffic_axes = top.subplots(1, 2, width_ratios=(1.75, 1))
        _draw_loss(loss_axes, reports[0], twin, baselines)
        _draw_traffic(traffic_axes, megabytes)
        _draw_load(bottom, settings, reports)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "demo.png"
        figure.savefig(path)
    return path


def _draw_loss(axes: Any, report: Report, twin: Trace, baselines: dict[str, float]) -> None:
    losses = report.trace.losses
    steps, validation = zip(*report.validation, strict=True)
    axes.plot(range(1, len(losses) + 1), losses, color=_TRAIN, linewidth=1.3, label="training, global batch")
    axes.plot(steps, validation, color=_VALIDATION, linewidth=2, marker="o", markersize=4, label="validation")
    axes.plot(
        range(1, len(twin.losses) + 1),
        twin.losses,
        linestyle="none",
        marker="x",
        markersize=6,
        markeredgewidth=1.6,
        color=_TWIN,
        label=f"dense twin in one process, first {len(twin.losses)} steps",
        zorder=3,
    )
    right = max(len(losses), 1)
    for name, value in baselines.items():
        axes.axhline(value, color=_MUTED, linestyle=(0, (4, 3)), linewidth=1)
        axes.text(right, value, f"{name} model {value:.2f}", color=_MUTED, ha="right", va="bottom", fontsize=9)
    axes.annotate(
        f"{validation[-1]:.2f}",
        (steps[-1], validation[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        color=_VALIDATION,
        fontweight="bold",
        va="center",
    )
    axes.set_title("Loss")
    axes.set_xlabel("training step")
    axes.set_ylabel("cross entropy, nats per character")
    axes.set_xlim(0, right * 1.06)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(bottom=max(0.0, min(*losses, *validation, *baselines.values()) - 0.3))
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(
        loc="lower right", frameon=False, bbox_to_anchor=(1.01, 0.995), ncols=3, fontsize=9, columnspacing=1.2
    )


def _draw_traffic(axes: Any, megabytes: list[list[float]]) -> None:
    ranks = range(len(megabytes))
    away = [[float("nan") if a == b else megabytes[a][b] for b in ranks] for a in ranks]
    values = [megabytes[a][b] for a in ranks for b in ranks if a != b]
    high = max(values, default=1.0)
    digits = 0 if high >= 10 else 1
    axes.imshow(away, cmap="Blues", vmin=0, vmax=high * 1.4, aspect="auto")
    axes.set_facecolor("#f3f4f6")
    if len(megabytes) <= 10:
        for a in ranks:
            for b in ranks:
                shade = _MUTED if a == b else "white" if megabytes[a][b] > 0.7 * high else _INK
                axes.text(b, a, f"{megabytes[a][b]:,.{digits}f}", ha="center", va="center", color=shade, fontsize=10)
    axes.set_title("Sent from rank to rank, MB")
    axes.set_xlabel("to rank (grey: stays on its rank)")
    axes.set_ylabel("from rank")
    axes.set_xticks(ranks)
    axes.set_yticks(ranks)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_load(figure: Any, settings: Settings, reports: list[Report]) -> None:
    layers = figure.subplots(1, settings.layers, sharey=True, squeeze=False)[0]
    num_local = settings.experts // len(reports)
    image = None
    shares_of = [_load_shares(layer, num_local, reports) for layer in range(settings.layers)]
    high = max(share for shares in shares_of for row in shares for share in row)
    for layer, (axes, shares) in enumerate(zip(layers, shares_of, strict=True)):
        image = axes.imshow(
            shares,
            aspect="auto",
            cmap="YlGnBu",
            vmin=0,
            vmax=high,
            extent=(0, len(reports[0].expert_load), settings.experts - 0.5, -0.5),
            interpolation="nearest",
        )
        for rank in range(1, len(reports)):
            axes.axhline(rank * num_local - 0.5, color="white", linewidth=2.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_title(f"Expert load, layer {layer + 1}")
        axes.set_xlabel("training step")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    layers[0].set_yticks(
        range(settings.experts), [f"rank {e // num_local}, expert {e}" for e in range(settings.experts)]
    )
    assert image is not None
    bar = figure.colorbar(image, ax=list(layers), pad=0.015, aspect=26)
    bar.set_label(f"share of choices, % (even: {100 / settings.experts:.3g})")
    bar.outline.set_visible(False)


def _load_shares(layer: int, num_local: int, reports: list[Report]) -> list[list[float]]:
    """[E][columns]: percent of a layer's (token, choice) pairs that each expert got, averaged over a few steps."""
    steps = len(reports[0].expert_load)
    columns = min(steps, _MAX_COLUMNS)
    counts = [[0] * columns for _ in range(num_local * len(reports))]
    for rank, report in enumerate(reports):
        for step, load in enumerate(report.expert_load):
            for expert in range(num_local):
                counts[rank * num_local + expert][step * columns // steps] += load[layer * num_local + expert]
    totals = [sum(column) for column in zip(*counts, strict=True)]
    return [[100 * count / max(total, 1) for count, total in zip(row, totals, strict=True)] for row in counts]
