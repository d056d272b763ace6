"""``tokenferry plan``: the check, the command line, the picture."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import slow
from tokenferry.cli import main, plan_check, plan_plot
from tokenferry.cli.plan_model import LOW_LATENCY, MODES, Operation, predict
from tokenferry.cli.plan_routing import Machine, Shape
from tokenferry.errors import ArgumentError

ROOT = Path(__file__).parent.parent
RESULTS = [
    ROOT / "bench" / "results" / f"{name}.json"
    for name in ("cpu-4ranks-64mb", "cpu-4ranks-tokens", "h200-2ranks", "h200-4ranks-low-latency")
]

# The check.


def test_check_is_within_its_bounds() -> None:
    rows = plan_check.built_in_rows()
    assert {row.kind for row in rows} == {"copy", "kernel", "nvlink", "published", "claim", "rival"}
    assert [row for row in rows if not row.is_within] == []
    assert all(row.figure > 0 and row.model > 0 for row in rows)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_bytes_of_runs(path: Path) -> None:
    rows = [row for row in plan_check.rows_of_file(path) if row.kind == "bytes"]
    assert rows
    assert all(abs(row.error) < 2 for row in rows), [row for row in rows if abs(row.error) >= 2]


def bench_file(path: Path, **machine: object) -> Path:
    """A result of two ranks with a GPU each, as ``tokenferry bench`` writes it, in which a pair takes 500 us."""
    case = {"mode": "pair", "ranks": 2, "tokens": 4096, "hidden": 7168, "dtype": "bf16", "topk": 8, "experts": 256}
    entry = {
        "case": case | {"sms": 16},
        "wire_bytes_per_rank": 1.0,
        "contenders": {"tokenferry": {"chained": {"median_seconds": 500e-6}}},
    }
    found = {"machine": {"device": "cuda", "ranks_share_gpus": False} | machine, "cases": [entry]}
    path.write_text(json.dumps(found))
    return path


def test_times_of_runs_only_where_ranks_have_gpus(tmp_path: Path) -> None:
    (row,) = plan_check.rows_of_file(bench_file(tmp_path / "run.json"))
    pair = predict(Machine(1, 2, sms=16), Shape()).operations
    assert (row.kind, row.figure, row.model) == ("run", 500, pytest.approx(sum(one.seconds for one in pair) * 1e6))
    assert plan_check.rows_of_file(bench_file(tmp_path / "shared.json", ranks_share_gpus=True)) == []


def test_runs_between_nodes_go_by_the_rate_of_the_bare_exchange(tmp_path: Path) -> None:
    """58.7 MB in 27 ms; without the bare exchange, or with nodes of several ranks, there is less to say."""
    path = bench_file(tmp_path / "run.json")
    found = json.loads(path.read_text())
    (entry,) = found["cases"]
    entry["case"] |= {"mode": "combine", "nodes": 2}
    entry["wire_bytes_per_rank"] = 58.5e6
    entry["contenders"]["tokenferry"]["chained"]["median_seconds"] = 30e-3
    entry["contenders"]["all_to_all_single"] = {"chained": {"median_seconds": 27e-3}}
    path.write_text(json.dumps(found))
    counted, timed = plan_check.rows_of_file(path)
    machine = Machine(2, 1, sms=16, network=58.5 / 27)
    assert (counted.kind, counted.error) == ("bytes", pytest.approx(0, abs=0.5))
    assert (timed.kind, timed.figure) == ("nodes", 30e3)
    assert timed.model == pytest.approx(predict(machine, Shape()).operations[1].seconds * 1e6)
    assert timed.model > 27e3
    entry["case"] |= {"ranks": 4}
    path.write_text(json.dumps(found))
    assert [row.kind for row in plan_check.rows_of_file(path)] == ["nodes"]
    del entry["contenders"]["all_to_all_single"]
    path.write_text(json.dumps(found))
    assert plan_check.rows_of_file(path) == []


def test_low_latency_runs(tmp_path: Path) -> None:
    times_of = {
        name: {"graph": {"median_seconds": us * 1e-6}}
        for name, us in (("dispatch", 20), ("combine", 25), ("pair", 44))
    }
    case = {"ranks": 2, "tokens": 128, "hidden": 7168, "dtype": "fp8", "topk": 8, "experts": 256, "exact": False}
    wire = {"dispatch": {"bytes_per_token": 7392.0}, "combine": {"bytes_per_token": 14336.0}}
    entry = {"case": case, "wire": wire, "contenders": {"tokenferry": times_of}}
    path = tmp_path / "low.json"
    path.write_text(json.dumps({"machine": {"device": "cuda", "ranks_share_gpus": False}, "cases": [entry]}))
    rows = {row.name.split(": ")[1]: row for row in plan_check.rows_of_file(path)}
    dispatch, combine = predict(Machine(1, 2), Shape(tokens=128, dtype="fp8"), LOW_LATENCY).operations[:2]
    assert rows["pair"].model == pytest.approx((dispatch.seconds + combine.seconds) * 1e6)
    assert rows["dispatch, a token"].error == pytest.approx(0, abs=1)
    assert rows["combine, a token"].error == pytest.approx(0, abs=1)
    case["tokens"] = 63  # whose draw the mean says little of
    path.write_text(json.dumps({"machine": {"device": "cuda", "ranks_share_gpus": False}, "cases": [entry]}))
    assert {row.kind for row in plan_check.rows_of_file(path)} == {"run"}


def test_check_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", "--check", str(bench_file(tmp_path / "run.json"))]) == 0
    assert "2 ranks, 4096 x 7168 bf16, 16 SMs: pair" in capsys.readouterr().out
    assert main(["plan", "--check", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert all(row["error_percent"] == pytest.approx(100 * (row["model"] / row["figure"] - 1)) for row in rows)
    monkeypatch.setattr(plan_check, "SM_GBPS", 20.0)
    assert main(["plan", "--check"]) == 1
    assert "NOT AS EXPECTED" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"cases": 3}', '{"cases": [{}], "machine": {"device": "cpu"}}', None]
)
def test_check_refuses_other_files(content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--check", str(path)])
    assert stopped.value.code == 2
    assert f"argument --check: {path}" in capsys.readouterr().err


def test_the_page_has_the_errors_of_the_check() -> None:
    """docs/planning.md states every figure that is built in with its error, and the range of each kind."""
    page = (ROOT / "docs" / "planning.md").read_text()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    by_name = {row[1]: row for row in cells if len(row) == 6}
    by_kind = {row[0]: row for row in cells if len(row) == 4}
    rows = plan_check.built_in_rows()
    for row in rows:
        assert float(by_name[row.name][5]) == pytest.approx(row.error, abs=0.3), row
    for kind in {row.kind for row in rows}:
        errors = [row.error for row in rows if row.kind == kind]
        stated = [float(number) for number in by_kind[kind][2].split(" to ")]
        assert stated == pytest.approx([min(errors), max(errors)], abs=0.3), kind


# The command line.

SMALL = ["plan", "--nodes", "2", "--gpus-per-node", "4", "--tokens", "64", "--hidden", "512", "--experts", "16"]


def test_prints_what_it_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--nodes", "8", "--groups", "8", "--topk-groups", "4", "--skew", "0.5"]) == 0
    shown = capsys.readouterr().out
    plan = predict(Machine(8, 8), Shape(groups=8, topk_groups=4, skew=0.5))
    dispatch: Operation = plan.operations[0]
    assert "64 ranks (8 x 8)" in shown
    assert f"{plan.routing.ranks:.2f} ranks on {plan.routing.nodes:.2f} nodes" in shown
    assert f"{dispatch.seconds * 1e6:,.1f}  limit: {dispatch.bottleneck} in {dispatch.chunks} chunks" in shown
    for config in plan.configs:
        ring = config.num_max_rdma_chunked_recv_tokens
        assert f"Config(num_sms={config.num_sms}, num_max_rdma_chunked_recv_tokens={ring})" in shown
    assert f"rail {plan.memory['rail'] / 2**20:,.1f}" in shown
    assert "not a measurement" in shown


@pytest.mark.parametrize("mode", MODES)
def test_json_has_seconds_and_bytes(mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--mode", mode, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plan = predict(Machine(2, 4), Shape(64, 512, experts=16), mode)
    assert found["routing"] == plan.routing._asdict()
    assert found["operations"].keys() == {operation.name for operation in plan.operations}
    assert found["memory_bytes"] == plan.memory
    assert len(found["configs"]) == len(plan.configs)
    for operation in plan.operations:
        entry = found["operations"][operation.name]
        assert entry["seconds"] == operation.seconds
        for hop in operation.hops:
            assert entry["hops"][hop.name.lower()]["bytes"] == hop.rows * hop.row_bytes


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--nodes", "0"], "--nodes"),
        (["--nodes", "513", "--experts", "4104"], "--nodes"),
        (["--gpus-per-node", "7"], "--experts"),
        (["--nvlink", "nan"], "--nvlink"),
        (["--nodes", "2", "--network", "0"], "--network"),
        (["--sms", "7"], "--sms"),
        (["--sms", "134"], "--sms"),
        (["--nodes", "2", "--chunks", "-1"], "--chunks"),
        (["--nodes", "2", "--chunks", "0"], "--chunks"),
        (["--nodes", "2", "--chunks", "65"], "--chunks"),
        (["--nodes", "2", "--chunks", "5", "--tokens", "4"], "--chunks"),
        (["--skew", "1", "--seed", "-1"], "--seed"),
        (["--tokens", "0"], "--tokens"),
        (["--hidden", "100"], "--hidden"),
        (["--hidden", "64", "--dtype", "fp8"], "--hidden"),
        (["--topk", "33"], "--topk"),
        (["--experts", "131080"], "--experts"),
        (["--groups", "7"], "--groups"),
        (["--topk-groups", "2"], "--topk-groups"),
        (["--groups", "64", "--topk-groups", "1"], "--topk"),
        (["--skew", "11"], "--skew"),
        (["--plot", "/nowhere/at/all.png"], "--plot"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    assert re.search(rf"argument {named}:", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "given", "allowed"),
    [
        (["--over", "tokens"], "over: got tokens", "with --plot"),
        (["--mode", "low-latency", "--nodes", "2", "--chunks", "4"], "chunks: got 4", "with --mode high-throughput"),
        (["--mode", "low-latency", "--sms", "4"], "sms: got 4", "with --mode high-throughput"),
        (["--chunks", "4"], "chunks: got 4", "with --nodes above 1"),
        (["--network", "25"], "network: got 25", "with --nodes above 1"),
        (["--network", "25", "--plot", "x.png", "--over", "tokens"], "network: got 25", "with --nodes above 1"),
        (["--nodes", "2", "--gpus-per-node", "1", "--nvlink", "9"], "nvlink: got 9", "with --gpus-per-node above 1"),
        (["--seed", "3"], "seed: got 3", "with --skew, or --topk-groups below --groups"),
        (["--groups", "4", "--seed", "3"], "seed: got 3", "with --skew, or --topk-groups below --groups"),
        *((["--check", *words], words[0].strip("-"), "--json") for words in (
            ["--nodes", "2"], ["--mode", "low-latency"], ["--topk-groups", "1"], ["--dtype", "fp8"], ["--seed", "0"],
            ["--plot", "x.png"], ["--over", "ranks"],
        )),
    ],
)  # fmt: skip
def test_what_would_change_nothing_is_refused(
    arguments: list[str], given: str, allowed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 2
    assert re.search(rf"argument --{given}.*; allowed: {allowed}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "others"),
    [
        (["--nodes", "2"], ["--chunks", "3"]),
        (["--nodes", "2"], ["--network", "25"]),
        ([], ["--nvlink", "100"]),
        ([], ["--sms", "2"]),
        (["--skew", "0.5"], ["--seed", "3"]),
        (["--groups", "8", "--topk-groups", "4"], ["--seed", "3"]),
    ],
)
def test_what_is_not_refused_changes_something(
    words: list[str], others: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shown = []
    for more in ([], others):
        assert main(["plan", *words, *more]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1]


def test_wrong_numbers_raise_from_python() -> None:
    with pytest.raises(ArgumentError, match=r"chunks: got 65; allowed: at most 64"):
        predict(Machine(2, 8, chunks=65), Shape())
    with pytest.raises(ArgumentError, match=r"dtype: got fp4; allowed: bf16 or fp8"):
        predict(Machine(), Shape(dtype="fp4"))


# The picture.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("over", ["ranks", *slow("tokens")])
def test_picture(mode: str, over: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    assert main([*SMALL, "--mode", mode, "--over", over, "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {path}" in capsys.readouterr().err


def test_points_of_the_picture() -> None:
    pytest.importorskip("matplotlib")
    plan = predict(Machine(3, 8), Shape(tokens=100, experts=264))
    ranks = plan_plot.points_over(plan, "ranks")
    assert [x for x, _ in ranks] == [8, 16, 24, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    assert dict(ranks)[24] == plan.operations
    last = predict(Machine(512, 8), Shape(tokens=100, experts=4096)).operations
    assert ranks[-1][1] == last
    tokens = plan_plot.points_over(plan, "tokens")
    assert [x for x, _ in tokens] == [64, 100, *(1 << power for power in range(7, 17))]
    assert dict(tokens)[100] == plan.operations
    assert dict(tokens)[64] == predict(Machine(3, 8), Shape(tokens=64, experts=264)).operations


def drawn(figure: Any) -> list[dict[str, Any]]:
    """Lines of each panel by their names."""
    return [{line.get_label(): line for line in axes.get_lines()} for axes in figure.axes]


@pytest.mark.parametrize("words", [["--nodes", "4", "--tokens", "128"], ["--tokens", "1"]])
def test_what_the_legend_names_is_in_the_picture(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib.figure")
    figures: list[Any] = []
    monkeypatch.setattr(matplotlib.Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    assert main(["plan", "--mode", "low-latency", *words, "--plot", str(tmp_path / "plan.png")]) == 0
    (figure,) = figures
    low, _ = figure.axes[0].get_ylim()
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    panels = drawn(figure)
    assert named[-1].startswith("all")
    for name in named:
        assert any(name in lines and np.nanmax(lines[name].get_ydata()) > low for lines in panels), name
    assert all(name in named for lines in panels for name in lines if not name.startswith("_"))
    figure.canvas.draw()
    for axes in figure.axes:
        (text,) = axes.texts
        box, frame = text.get_window_extent(), axes.get_window_extent()
        assert frame.x0 <= box.x0 <= box.x1 <= frame.x1
        highest = max(
            line.get_window_extent().y1 for name, line in drawn(figure)[0].items() if name.startswith("all")
        )
        assert box.y0 > highest
        ticks = [label.get_window_extent() for label in axes.get_xticklabels()]
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(ticks))
