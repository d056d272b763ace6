"""The script of the figures of record: what it runs, how steps end, and the table, from files made up here."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cases import wait_for
from tokenferry.cli import bench, soak
from tokenferry.cli.bench_cuda_cases import STAGED

BENCH = Path(__file__).parents[1] / "bench"
sys.path.insert(0, str(BENCH))

import phases  # noqa: E402
import record  # noqa: E402
import requirements  # noqa: E402
from phases import PHASES, Setting, Step  # noqa: E402
from requirements import BASELINE, CHECKS, OURS, Start  # noqa: E402

TWO = Setting("cuda", 2, 2)
CPU = Setting("cpu", 2, 0)
SLEEPS = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(987)'])"


def python(code: str, name: str = "one", **fields: Any) -> Step:
    return Step(name, "tests", ("python", "-c", code), **{"seconds": 60.0, **fields})


# What is run.


@pytest.mark.parametrize("setting", [TWO, Setting("cuda", 8, 8), Setting("cuda", 8, 2), Setting("cuda", 2, 1), CPU])
def test_every_command_parses(setting: Setting) -> None:
    known = phases.steps(setting, PHASES, lambda name: f"/out/{name}")
    assert {step.phase for step in known} >= set(PHASES) - {"shared"}
    assert len({step.name for step in known}) == len(known)
    for step in known:
        words = step.command[step.command.index("python") :]
        assert words[1] == "-m"
        if words[2] == "tokenferry":
            parser = argparse.ArgumentParser()
            {"bench": bench, "soak": soak}[words[3]].add_arguments(parser)
            args = parser.parse_args(words[4:])
            assert (args.device, args.ranks) == (setting.device, setting.ranks)
            if words[3] == "bench":
                assert str(args.output) == f"/out/{step.name}"
                assert step.repeats
        else:
            assert words[2] in ("pytest", "tests.gpu.sanitize")
            assert all(Path(BENCH.parent / part).exists() for part in words if part.startswith("tests/"))
    for step in known:
        if "--staged" in step.command:
            assert set(step.environment.values()) == {STAGED}
    shared = {step.name for step in known if step.shares_gpus}
    assert shared >= ({"shared tests", "shared stress"} if setting.device == "cuda" else set())
    assert ("ruler" in shared) == (0 < setting.gpus < setting.ranks)


def test_a_call_of_ten_minutes_is_enough_for_tests_and_both_modes() -> None:
    chosen = phases.steps(TWO, ("tests", "high-throughput", "further", "low-latency"), str)
    assert sum(step.seconds for step in chosen) / 2 < 9 * 60
    left = 9 * 60.0
    for at, step in enumerate(chosen):  # even if each takes all that it is given
        given = record.share_of(step, chosen[at + 1 :], left)
        assert given >= step.seconds / 2
        left -= given
    (stress, *others, soak) = phases.steps(TWO, ("stress", "soak"), str)
    assert record.share_of(stress, (*others, soak), 540.0) == 135
    assert record.share_of(soak, (), 350.0) == 350 > soak.least > 300
    assert record.share_of(chosen[0], chosen[1:], 1e6) == chosen[0].seconds
    assert record.share_of(chosen[0], (), 3.0) == 3.0


@pytest.mark.parametrize("setting", [Setting("cuda", 4, 4), Setting("cuda", 8, 8), Setting("cuda", 8, 2)], ids=str)
def test_a_call_of_eight_minutes_is_enough_for_figures_of_record(setting: Setting) -> None:
    (line,) = (line for line in str(record.__doc__).splitlines() if "--minutes 8" in line)
    assert "--repeat 1" in line
    chosen = phases.steps(setting, line.partition("--phase ")[2].partition(" --")[0].split(), str)
    left = 8 * 60.0
    for at, step in enumerate(chosen):
        assert record.share_of(step, chosen[at + 1 :], left) == step.seconds >= 120
        left -= step.seconds
    shares = setting.gpus < setting.ranks
    assert [step.name for step in chosen] == ["shared tests" if shares else "tests", "ruler", "low latency"]
    assert all(step.shares_gpus == shares for step in chosen)
    tests, ruler, low_latency = (step.command for step in chosen)
    assert tests[-2:] == ("--ranks", str(setting.ranks))
    assert ("not slow and shares_gpus" if shares else "not slow and not shares_gpus") in tests
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    args = parser.parse_args(ruler[ruler.index("bench") + 1 :])
    assert args.tokens == [4096, 8192]
    assert {8, 16, 24, 64} <= set(args.sms)
    assert {"dispatch", "cached", "combine", "pair"} <= set(args.modes)
    assert "--beside" not in low_latency


def test_one_start_will_do_for_figures_of_record_only() -> None:
    for gpus in (0, 2, 3, 6):
        assert requirements.rows_of([Start({}, requirements.GPUS)], gpus)[-1].verdict == "not run", gpus
    for gpus in (4, 8):
        assert requirements.rows_of([Start({}, requirements.GPUS)], gpus)[-1].verdict == "", gpus


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_other_ranks_run_all_tests(ranks: int) -> None:
    (tests, shared) = phases.steps(Setting("cuda", ranks, ranks), ("tests", "shared"), str)
    assert "--ranks" not in (*tests.command, *shared.command)
    (low_latency,) = phases.steps(Setting("cuda", ranks, ranks), ("low-latency",), str)
    assert "--beside" in low_latency.command


def test_phases_are_run_in_order_and_alone() -> None:
    names = [step.name for step in phases.steps(TWO, ("soak", "low-latency"), str)]
    assert names == ["low latency", "soak"]


def test_without_matplotlib_there_are_figures_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases.importlib.util, "find_spec", lambda name: None)
    (step,) = phases.steps(TWO, ("low-latency",), str)
    assert "--no-plot" in step.command


def test_the_sanitizer_leaves_nccl_alone_if_it_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / phases.SANITIZER
    monkeypatch.setattr(phases, "sanitizer", lambda: str(program))
    for told, wanted in (("--kernel-name-exclude", True), ("", False)):
        program.write_text(f"#!/bin/sh\necho {told}\n")
        program.chmod(0o755)
        known = phases.steps(TWO, ("sanitizer",), str)
        assert [step.command[0] for step in known] == [str(program)] * 2 * len(CHECKS)
        assert all(("kernel_substring=nccl" in step.command) == wanted for step in known)
        assert all(step.environment for step in known)
    assert phases.missing(known[-1], TWO) is None
    assert phases.missing(known[-1], Setting("cuda", 2, 1)) == "needs 2 GPUs"
    monkeypatch.setattr(phases, "sanitizer", lambda: None)
    assert phases.missing(known[0], TWO) == "no compute-sanitizer"


# How steps end.


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    started = time.monotonic()
    outcome = record.run(python(f"{SLEEPS}; time.sleep(987)"), 2.0, tmp_path / "log")
    assert outcome.status == "too slow"
    assert time.monotonic() - started < 30
    assert wait_for(lambda: not sleepers())


def test_children_do_not_outlive_a_step(tmp_path: Path) -> None:
    assert record.run(python(SLEEPS), 30.0, tmp_path / "log").status == "ok"
    assert wait_for(lambda: not sleepers())


def sleepers() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if b"time.sleep(987)" in path.read_bytes():
                found.append(path.parent.name)
    return found


def test_failures_are_told(tmp_path: Path) -> None:
    outcome = record.run(python("print('why'); raise SystemExit(3)"), 30.0, tmp_path / "log")
    assert (outcome.status, outcome.output) == ("exit code 3", "why")
    absent = Step("absent", "tests", ("/no/such/program",), 5.0)
    assert record.run(absent, 5.0, tmp_path / "log").status == "cannot be started: No such file or directory"


def test_mps_runs_beside_ranks_that_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def sharing(shared: bool) -> Iterator[None]:
        told.append(f"begin {shared}")
        yield
        told.append("end")

    told: list[str] = []
    monkeypatch.setattr(record, "sharing_gpus", sharing)
    record.run(python("raise SystemExit(1)", shares_gpus=True), 30.0, tmp_path / "log")
    assert told == ["begin True", "end"]
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    assert "MPS" in record.run(python("pass", shares_gpus=True), 30.0, tmp_path / "other").status


WRITES = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
(folder / "bench.json").write_text(json.dumps({{"cases": [], "machine": {{"cpu": "none"}}, "mark": {mark}}}))
sys.exit({code})
"""


def writing(folder: str, mark: int = 1, code: int = 0) -> Step:
    return python(WRITES.format(mark=mark, code=code), "figures", repeats=True)._replace(
        command=("python", "-c", WRITES.format(mark=mark, code=code), folder)
    )


Steps = Callable[[Callable[[str], str]], list[Step]]


@pytest.fixture
def play(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[Any], dict[str, Any]]]:
    """Runs steps of the test's own; returns how they ended, and record.json."""

    def run(steps: Steps, resume: bool = False, repeat: int = 2, seconds: float = 60.0) -> Any:
        monkeypatch.setattr(phases, "steps", lambda setting, chosen, output: steps(output))
        lines = record.run_all(record.Record(tmp_path, CPU, resume), CPU, PHASES, repeat, seconds)
        path = tmp_path / "record.json"
        return [line[:2] for line in lines], json.loads(path.read_text()) if path.exists() else {}

    return run


def test_failing_steps_end_no_others_and_leave_what_they_found(play: Any) -> None:
    def steps(output: Callable[[str], str]) -> list[Step]:
        return [
            python("raise SystemExit(1)", "bad"),
            writing(output("figures"), 7, 1),
            python("print('fine')", "good"),
        ]

    lines, found = play(steps)
    assert lines == [
        ("bad #1", "exit code 1"),
        ("figures #1", "exit code 1"),
        ("good #1", "ok"),
        ("figures #2", "exit code 1"),
    ]
    assert found["steps"]["figures #1"]["results"]["mark"] == 7
    assert found["steps"]["good #1"]["output"] == "fine"
    assert {row["verdict"] for row in found["table"]} <= {"", "not run"}


def test_resume_runs_what_did_not_end_well(play: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def steps(output: Callable[[str], str]) -> list[Step]:
        return [python("print('new')", "kept"), writing(output("figures"), 1, code)]

    code = 1
    assert play(steps)[0] == [("kept #1", "ok"), ("figures #1", "exit code 1"), ("figures #2", "exit code 1")]
    code = 0
    lines, found = play(steps, resume=True)
    assert lines == [("kept #1", "ok, before"), ("figures #1", "ok"), ("figures #2", "ok")]
    assert play(steps, resume=True)[0][1] == ("figures #1", "ok, before")
    monkeypatch.setattr(record, "describe_commit", lambda: {"commit": "another", "dirty": False})
    lines, found = play(steps, resume=True, repeat=1)
    assert lines == [("kept #1", "ok"), ("figures #1", "ok")]
    assert found["steps"]["figures #1"]["git"]["commit"] == "another"
    assert set(play(steps, repeat=1)[1]["steps"]) == {"kept #1", "figures #1"}, "without resume nothing is kept"


def test_no_time_left_is_told_and_run_by_a_later_call(play: Any) -> None:
    def steps(output: Callable[[str], str]) -> list[Step]:
        return [python("pass", "one"), python("pass", "two")]

    lines, found = play(steps, seconds=4.0)
    assert lines == [("one #1", "no time left"), ("two #1", "no time left")]
    assert found == {}
    assert play(steps, resume=True)[0] == [("one #1", "ok"), ("two #1", "ok")]


def test_what_needs_its_time_is_not_begun_with_less(play: Any) -> None:
    def steps(output: Callable[[str], str]) -> list[Step]:
        return [python("pass", "long", seconds=60.0, least=50.0), python("pass", "short", seconds=60.0)]

    assert play(steps, seconds=45.0)[0] == [("long #1", "no time left"), ("short #1", "ok")]


def test_a_second_start_begins_with_what_needs_one(play: Any) -> None:
    def steps(output: Callable[[str], str]) -> list[Step]:
        return [writing(output(name))._replace(name=name) for name in ("wire", "low latency", "ruler")]

    assert [key for key, _ in play(steps)[0]][3:] == ["low latency #2", "ruler #2", "wire #2"]


def test_resume_refuses_other_ranks(tmp_path: Path) -> None:
    made = record.Record(tmp_path, TWO, False)
    made.add(python("pass"), 1, record.Outcome("ok", 1.0, ""))
    assert set(record.Record(tmp_path, TWO._replace(soak_minutes=1.0), True).steps) == {"one #1"}
    with pytest.raises(ValueError, match="of another run"):
        record.Record(tmp_path, TWO._replace(ranks=4), True)


def test_main_needs_a_gpu_or_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    for arguments, named in (
        (["--output", str(tmp_path)], "no GPU"),
        ([], "--output"),
        (["--table", str(tmp_path / "absent")], "--table"),
    ):
        with pytest.raises(SystemExit):
            record.main(arguments)
        assert named in capsys.readouterr().err


@pytest.mark.slow
def test_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One phase for real, on CPU ranks."""
    arguments = ["--device", "cpu", "--phase", "low-latency", "--repeat", "1", "--output", str(tmp_path)]
    assert record.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "REHEARSAL" in shown
    assert "host of a pair, fp8" in shown
    assert shown == shown[: shown.rindex("not run") + len("not run\n")], "the table comes last"
    rows = {row["name"]: row for row in json.loads((tmp_path / "record.json").read_text())["table"]}
    for name in ("eager chained pair, fp8, 16 tokens", "low-latency operator adds to the host, dispatch"):
        assert rows[name]["measured"].endswith("us")
        assert rows[name]["verdict"] == ""
    assert rows["dispatch call, bf16, 16 SMs"]["verdict"] == "not run"


# The table, from made-up results.


def us(**kinds: float) -> dict[str, Any]:
    return {kind: {"median_seconds": value * 1e-6} for kind, value in kinds.items()}


def a_case(mode: str, contenders: dict[str, Any], **fields: Any) -> dict[str, Any]:
    case = {"mode": mode, "tokens": 4096, "dtype": "bf16", "sms": 16, "num_nvl_bytes": 0, **fields}
    return {"case": case, "contenders": contenders, "heap_bytes_per_rank": 42_000_000, "wire_bytes_per_rank": 58.5e6}


def a_step(name: str, cases: list[dict[str, Any]], status: str = "ok", output: str = "", **more: Any) -> Any:
    results = {"cases": cases, "machine": {"gpus": 2, "gpu": "MADE UP"}, **more}
    return {"name": name, "start": 1, "status": status, "output": output, "git": None, "results": results}


def of_steps(*steps: Any) -> Start:
    return Start({step["name"]: step for step in steps}, requirements.GPUS)


def ruler(pair: float, **others: float) -> Any:
    cases = [
        a_case("pair", {OURS: us(chained=pair, call=999, host=1), BASELINE: us(chained=1684)}),
        *(a_case(mode, {OURS: us(chained=1, call=call, host=36)}) for mode, call in others.items()),
        a_case("dispatch", {OURS: us(chained=1, call=165, host=1)}, dtype="fp8"),
    ]
    return a_step("ruler", cases)


def rows_of(*starts: Start, gpus: int = 2, **more: Any) -> dict[str, requirements.Row]:
    return {row.name: row for row in requirements.rows_of(starts, gpus, **more)}


def test_names_are_unique_and_fit() -> None:
    names = [bar.name for bar in requirements.BARS]
    assert len(set(names)) == len(names)
    assert max(map(len, names)) <= 54


def test_bars_are_judged_by_the_worst_start() -> None:
    rows = rows_of(of_steps(ruler(396.0, combine=230)), of_steps(ruler(420.0, combine=210)))
    pair, goal = rows["chained pair, bf16, 16 SMs"], rows["the same, the further goal"]
    assert pair == ("high throughput", pair.name, "<= 430 us", "420 us", "6.1 %", "met")
    assert (goal.bar, goal.measured, goal.verdict) == ("<= 400 us", "420 us", "MISSED")
    assert rows["combine call, bf16, 16 SMs"][3:] == ("230 us", "9.5 %", "MISSED")
    assert rows["dispatch call, fp8, 16 SMs"].verdict == "met"
    assert rows["dispatch call, bf16, 16 SMs"][2:] == ("<= 260 us", "", "", "not run")
    assert rows["host of a combine"].verdict == "met"
    assert rows["own GPU memory at any number of tokens"][3:] == ("42 MB", "0.0 %", "met")
    assert rows["chained pair so much faster than it"].measured == "4.01 x"
    assert rows["of ruler and low latency"].verdict == "not run"


def test_bars_of_other_machines_are_not_judged() -> None:
    start = of_steps(ruler(396.0), a_step("tests", [], output="3 passed in 1s"))
    for gpus, more in ((0, {}), (4, {}), (8, {}), (2, {"judged": False})):
        rows = rows_of(start, gpus=gpus, **more)
        assert rows["chained pair, bf16, 16 SMs"][2:] == ("", "396 us", "", "")
        assert rows["tests that fail, a GPU for each rank"].verdict == ("met" if not more else "")
    assert "dispatch call, bf16, 24 SMs" not in rows
    eight = of_steps(a_step("ruler", [a_case("dispatch", {OURS: us(call=840)}, sms=24)]))
    row = rows_of(eight, gpus=8)["dispatch call, bf16, 24 SMs"]
    assert row[2:] == ("<= 850 us", "840 us", "", "met")


def test_figures_that_take_several_cases() -> None:
    kernels = [
        a_case("cached", {}, sms=sms) | {"kernel_seconds": {"dispatch": seconds, "notify": 1e-5}}
        for sms, seconds in ((8, 200e-6), (10, 185e-6), (16, 100e-6))
    ]
    enough = requirements.GPUS.enough
    assert enough % 128 == 0
    assert 2.2 <= enough / (4096 * 7168 * 2) < 2.2001
    stages = ((32 << 20, 600), (enough, 520), (512 << 20, 500))
    staged = [a_case("pair", {OURS: us(chained=time)}, num_nvl_bytes=stage) for stage, time in stages]
    tokens = [
        a_case(mode, {OURS: us(chained=(20 + count * (0.1 if count < 65536 else 0.11)))}, tokens=count)
        for mode in ("dispatch", "combine", "pair")
        for count in requirements.GPUS.sweep
    ]
    parts = {"cached": (30, 38), "combine": (30, 45)}
    extras = [
        a_case(mode, {OURS: us(host=host), requirements.OPERATORS: us(host=more)})
        for mode, (host, more) in parts.items()
    ]
    bare = {"dispatch": (100, 93), "cached": (100, 91), "combine": (100, 88)}
    nodes = [
        a_case(mode, {OURS: us(chained=ours), requirements.BARE: us(chained=alone)})
        for mode, (ours, alone) in bare.items()
    ]
    steps = {"wire": kernels, "staged": staged, "tokens": tokens, "extras": extras, "nodes": nodes}
    rows = rows_of(of_steps(*(a_step(name, cases) for name, cases in steps.items())))
    assert rows["wire rate of the pull kernel, 8 to 12 SMs"][2:] == (">= 310 GB/s", "316.2 GB/s", "", "met")
    assert rows["staged: that stage beside the best"][3:] == ("1.04 x", "", "met")
    assert rows["staged: pair, stage of 2.2 T rows"].measured == "520 us"
    rise = rows["rise of the time of a token, 128 to 65536 (2 % noise)"]
    assert (rise.measured, rise.verdict) == ("1.096 (dispatch at 65536)", "MISSED")
    assert rows["operator adds to the host, cached dispatch"][3:] == ("8 us", "", "met")
    assert rows["operator adds to the host, combine"].verdict == "MISSED"
    assert rows["rail, of the rate of a bare all_to_all_single"][2:] == (">= 90 %", "88.0 % (combine)", "", "MISSED")
    assert rows["dispatch beside the slower hop"].verdict == "met"
    partial = of_steps(a_step("tokens", tokens[:-1]))
    assert rows_of(partial)["rise of the time of a token, 128 to 65536 (2 % noise)"].verdict == "not run"


def low_latency(constant: float, kink: float = 0.0) -> Any:
    cases = []
    for dtype in ("fp8", "bf16"):
        for tokens in (1, 16, 128):
            time = constant + tokens / 10 + (kink if tokens == 16 else 0.0)
            ours = {
                "dispatch": us(graph=8, chained=20, host=19, send=4, receive=3),
                "combine": us(graph=9, chained=21, host=20, send=5, receive=2),
                "pair": us(graph=time, chained=44, host=43),
            }
            waits = ours | {"pair": us(graph=time + 0.75)}
            wire = {"dispatch": {"bytes_per_token": 7392.0}, "combine": {"bytes_per_token": 14336.0}}
            parts = [{"where": "buffer.py", "calls": 2, "seconds": 12e-6}]
            cases.append(
                {
                    "case": {"tokens": tokens, "dtype": dtype},
                    "contenders": {OURS: ours, requirements.WAIT_STATISTICS: waits},
                    "wire": wire,
                    "host_parts": parts,
                }
            )
    fits = [
        {"contender": OURS, "dtype": dtype, "constant_seconds": constant * 1e-6, "seconds_per_token": 1e-7}
        for dtype in ("fp8", "bf16")
    ]
    return a_step("low latency", cases, fits=fits)


def test_low_latency_rows() -> None:
    start = of_steps(low_latency(19.0, 0.6))
    rows = rows_of(start)
    assert rows["pair in a graph, fp8 dispatch, 16 tokens"][2:] == ("<= 20 us", "21.2 us", "", "MISSED")
    assert rows["pair in a graph, bf16 dispatch, 128 tokens"][3:] == ("31.8 us", "", "met")
    assert rows["eager chained pair, fp8, 16 tokens"].verdict == "met"
    assert rows["  host of its dispatch"].measured == "19 us"
    assert rows["line over 1 to 512 tokens, fp8: constant"].measured == "19 us"
    assert rows["line over 1 to 512 tokens, bf16: a token"].measured == "0.1 us"
    assert rows["largest deviation from the line"].measured == "2.83 %"
    assert rows["bytes of a token that leave a rank, dispatch fp8"].measured == "7392 B"
    assert rows["combine receive, fp8, 128 tokens"].measured == "2 us"
    assert rows["wait statistics add to a pair in a graph, 16 tokens"][3:] == ("0.75 us", "", "MISSED")
    assert rows["NCCL: pair in a graph, 16 tokens"].verdict == "not run"
    assert requirements.host_lines([start]) == [
        "host of a pair, fp8, 16 tokens, 12.0 us under cProfile: buffer.py 12.0 (2x)"
    ]


def test_rows_about_tests_and_the_sanitizer() -> None:
    good = "kernels, of 3: a.b c.d\n"
    steps = [
        a_step("tests", [], output="...\n57 passed, 2 skipped in 80.2s"),
        a_step("shared tests", [], "exit code 1", "1 passed in 1s\n1 failed, 40 passed, 2 errors in 99s\nmore"),
        a_step("stress", [], "too slow", "1 passed in 200.00s"),
        a_step("shared stress", [], "exit code 2", "no tests"),
        a_step("memcheck high-throughput", [], "ok", good),
        a_step("memcheck nodes", [], "ok", "kernels, of 3: c.d e.f\n"),
        a_step("racecheck high-throughput", [], "ok", good),
        a_step("racecheck nodes", [], "exit code 1", "kernels, of 3: e.f\n"),
        a_step("soak", [], "ok", "operations      1234 on each rank, all results as plain PyTorch has them"),
    ]
    rows = rows_of(of_steps(*steps), gpus=0)
    assert rows["tests that fail, a GPU for each rank"][3:] == ("0 of 57, 2 skipped", "", "met")
    assert rows["tests that fail, ranks share GPUs"][3:] == ("3 of 43, 0 skipped", "", "MISSED")
    assert rows["stress tests that fail, a GPU for each rank"][3:] == ("too slow, 0 of 1", "", "MISSED")
    assert rows["stress tests that fail, ranks share GPUs"][3:] == ("exit code 2", "", "MISSED")
    assert rows["memcheck: checks that are not clean"][3:] == ("0 of 2", "", "met")
    assert rows["memcheck: kernels that it has not seen"][3:] == ("3 of 3 run", "", "met")
    assert rows["racecheck: checks that are not clean"][3:] == ("nodes: exit code 1", "", "MISSED")
    assert rows["racecheck: kernels that it has not seen"][3:] == ("2 of 3 run", "", "MISSED")
    assert rows["soak"][3:] == ("1234 on each rank", "", "met")


def test_table_of_two_records(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = []
    for number, pair in enumerate((396.0, 425.0)):
        steps = [ruler(pair), low_latency(15.0)]
        made = {record.key_of(step["name"], 1): step for step in steps}
        paths.append(tmp_path / f"{number}.json")
        paths[-1].write_text(json.dumps({"format": 1, "setting": TWO._asdict(), "steps": made}))
    assert record.main(["--table", *map(str, paths)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 ranks on 2 x MADE UP"
    assert "the bars are those of H100s" in lines
    (pair,) = [line.split() for line in lines if line.startswith("chained pair, bf16")]
    assert pair[-8:] == ["<=", "430", "us", "425", "us", "7.3", "%", "met"]
    (starts,) = [line.split() for line in lines if line.startswith("of ruler")]
    assert starts[-4:] == [">=", "2", "2", "met"]
    assert lines[-1].endswith("not run")
    drawn: list[str] = []

    def draw(command: list[str], **_: Any) -> SimpleNamespace:
        drawn.append(command[-1])
        return SimpleNamespace(returncode=len(drawn) % 2, stderr="first\nwhy\n")

    monkeypatch.setattr(record.subprocess, "run", draw)
    capsys.readouterr()
    assert record.main(["--table", *map(str, paths), "--output", str(tmp_path / "again")]) == 0
    assert drawn == [
        str(tmp_path / "again" / f"{n}-{name}-1.json") for n in (1, 2) for name in ("ruler", "low-latency")
    ]
    assert capsys.readouterr().err.count("['why']") == 2
    assert json.loads(Path(drawn[0]).read_text()) == ruler(396.0)["results"]
    paths[0].write_text("{}")
    with pytest.raises(SystemExit):
        record.main(["--table", str(paths[0])])


def test_help_says_how_to_split_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        record.main(["--help"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.lstrip().startswith("python")]
    calls = [line.partition("--phase ")[2].partition(" --")[0].split() for line in lines]
    assert {phase for call in calls for phase in call} == set(PHASES)
