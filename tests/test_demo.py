"""The demo from outside: it runs, its check can fail, Ctrl-C leaves nothing behind."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

from tests.conftest import PoolOf
from tokenferry.cli import demo, demo_plot, demo_train
from tokenferry.cli.demo_model import Corpus, DenseMoE, Settings
from tokenferry.cli.demo_train import Report, Trace, train, train_dense

COMMAND = [sys.executable, "-m", "tokenferry", "demo"]
SMALL = Settings(
    steps=4, batch=3, length=16, hidden=16, intermediate=8, heads=2, warmup=1, checked_steps=4, sample_length=5
)


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


SHORT = """
from functools import partial
from tokenferry.cli import demo, main
demo.Settings = partial(demo.Settings, sample_length=20)
raise SystemExit(main(["demo", "--ranks", "2", "--steps", "3", "--output", "drawn"]))
"""


def test_runs_from_end_to_end(tmp_path: Path) -> None:
    """In a process of its own: the ranks write, too, and those of a pool inherit where another test has written."""
    done = subprocess.run([sys.executable, "-c", SHORT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert "They agree within a relative 1e-04" in out
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("from ")]
    assert [row[:2] for row in rows] == [["from", "0"], ["from", "1"]]
    # 3 steps, 2 layers, 8 sequences of 128 characters a rank: at most this many tokens reach a rank, and each reaches
    # at least one.
    brought = 3 * 2 * 8 * 128
    for row in rows:
        sent = [int(row[column].replace(",", "")) for column in (2, 5)]
        assert max(sent) <= brought <= sum(sent)
    picture = (tmp_path / "drawn" / "demo.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 30_000  # an empty figure of this size has about 10 000 bytes


@pytest.mark.parametrize("steps", [1, 3, 60])
def test_the_legend_covers_nothing(steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_: figures.append(figure))
    losses = [4.7 - 0.03 * step for step in range(steps)]
    settings = Settings(steps=steps)
    load = [[1] * (settings.layers * settings.experts)] * steps
    report = Report(Trace(losses, losses), True, [(0, 4.7), (steps, losses[-1])], load)
    twin = Trace(losses[: settings.checked_steps], [])
    demo_plot.draw(tmp_path, settings, [report], twin, {"unigram": 3.4}, [[1.0]])
    figures[0].canvas.draw()
    axes = figures[0].subfigs[0].axes[0]
    legend, frame = axes.get_legend().get_window_extent(), axes.get_window_extent()
    title = axes._left_title.get_window_extent()
    assert legend.y0 >= frame.y1 - 1
    assert title.x1 < legend.x0 < legend.x1 < figures[0].subfigs[0].axes[1].get_window_extent().x0


def test_traffic_counts_both_directions() -> None:
    settings = Settings(hidden=4, topk=2)
    row, ids, weights = 16, 16, 8
    expected = (10 * (row + ids + weights) + 10 * row + 3 * row + 3 * (row + weights)) / 1e6
    assert demo.traffic(settings, [[0, 10], [3, 0]])[0][1] == pytest.approx(expected)
    assert demo.traffic(settings, [[5, 0], [0, 0]]) == [
        [pytest.approx(5 * (4 * row + ids + 2 * weights) / 1e6), 0.0],
        [0.0, 0.0],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_any_number_of_ranks_trains_the_same_model(pool_of: PoolOf, num_ranks: int) -> None:
    """Three sequences on four ranks: one rank has no tokens."""
    corpus = Corpus(SMALL)
    reports: list[Report] = pool_of(num_ranks).run(train, SMALL, train_dense(SMALL, corpus, SMALL.steps))
    assert all(report.agreed for report in reports)
    assert all(report.trace == reports[0].trace for report in reports)
    assert len(reports[0].trace.losses) == SMALL.steps
    assert reports[0].validation[0][0] == 0
    assert reports[0].validation[-1][0] == SMALL.steps
    assert len(reports[0].sample) == len("The ") + SMALL.sample_length
    for step in range(SMALL.steps):
        pairs = sum(sum(report.expert_load[step]) for report in reports)
        assert pairs == SMALL.layers * SMALL.batch * SMALL.length * SMALL.topk


def with_gradients_of_experts_doubled(rank: int, num_ranks: int, settings: Settings, twin: Trace) -> Report:
    make_layer = demo_train.make_layer

    def wrong(*args: Any) -> Any:
        layer = make_layer(*args)
        for parameter in layer.expert_parameters():
            parameter.register_hook(lambda gradient: 2 * gradient)
        return layer

    demo_train.make_layer = wrong
    try:
        return train(rank, num_ranks, settings, twin)
    finally:
        demo_train.make_layer = make_layer


@pytest.mark.slow
def test_a_wrong_scale_of_gradients_is_found(pool_of: PoolOf) -> None:
    twin = train_dense(SMALL, Corpus(SMALL), 1)
    (report, _) = pool_of(2).run(with_gradients_of_experts_doubled, SMALL, twin)
    assert report.trace.losses == pytest.approx(twin.losses, rel=1e-5)
    assert not report.agreed
    assert len(report.trace.losses) == 1  # training ended there


def test_the_demo_fails_when_the_twin_differs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Perturbed(DenseMoE):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            with torch.no_grad():
                self.down[3] *= 1.1

    monkeypatch.setattr(demo_train, "DenseMoE", Perturbed)
    monkeypatch.setattr(demo, "Settings", partial(Settings, batch=4, length=32))
    assert demo.main(arguments("--ranks", "2", "--steps", "1", "--no-plot")) == 1
    err = capfd.readouterr().err
    assert "the ranks and their dense twin differ by more than a relative 1e-04" in err
    assert "Traceback" not in err


def test_traces_agree_only_within_the_tolerance() -> None:
    trace = Trace([2.0, 1.0], [0.5, 0.5])
    assert trace.agrees(Trace([2.0001], [0.50001]))
    assert not trace.agrees(Trace([2.001], [0.5]))
    assert not trace.agrees(Trace([2.0], [0.501]))
    assert not trace.agrees(Trace([2.0, float("nan")], [0.5, 0.5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ranks", "0"], "got 0; allowed: 1 to"),
        (["--ranks", "100000"], "got 100000; allowed: 1 to"),
        (["--steps", "x"], "got x; allowed: whole numbers from 1 on"),
        (["--seed", "-1"], "got -1; allowed: whole numbers from 0 on"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        arguments(*options)
    assert message in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert demo.main(arguments()) == 2
    assert "tqdm and matplotlib: pip install 'tokenferry[cli]'" in capsys.readouterr().err
    assert demo.main(arguments("--no-plot")) == 2
    assert "the demo needs tqdm: pip" in capsys.readouterr().err


def processes_of_group(group: int) -> list[str]:
    """The command lines of living processes of a process group."""
    command = ["ps", "-ww", "-eo", "pgid=,stat=,args="]  # -ww: lines of any length, whatever COLUMNS says
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [row[2] for row in rows if int(row[0]) == group and not row[1].startswith("Z")]


def shared_memory() -> set[str]:
    """Names of the shared memory files of this library."""
    return {path.name for path in Path("/dev/shm").glob("tokenferry-*")}


def wait_for(process: subprocess.Popen[str], moment: str) -> None:
    """Until the process that forks the ranks has been started, or until a line with ``moment`` was printed."""
    if moment == "forkserver":
        while not any("forkserver" in command for command in processes_of_group(process.pid)):
            assert process.poll() is None
            time.sleep(0.02)
        return
    assert process.stdout is not None
    for line in process.stdout:
        if moment in line:
            return
    pytest.fail(f"the demo ended early: {process.communicate()[1]}")


def heed_ctrl_c() -> None:
    """Also where the tests were started in the background, which a shell makes deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    "moment",
    ["ranks train", *(pytest.param(moment, marks=pytest.mark.slow) for moment in ("forkserver", "They agree"))],
)
def test_ctrl_c_stops_everything(tmp_path: Path, moment: str) -> None:
    before = shared_memory()
    process = subprocess.Popen(
        [*COMMAND, "--ranks", "2", "--no-plot"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a terminal gives
        preexec_fn=heed_ctrl_c,
    )
    try:
        wait_for(process, moment)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        deadline = time.monotonic() + 20
        while (left := processes_of_group(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.1)
        # Other programs on this machine may be in the middle of opening theirs: those names are gone soon.
        while (files := shared_memory() - before) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, errors
    assert left == []
    assert files == set()
    lines = [
        line
        for line in errors.replace("\r", "\n").splitlines()
        if line.strip() and "step/s" not in line and "s/step" not in line
    ]
    assert lines == ["interrupted"]
