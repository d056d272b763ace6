"""The script of the figures of record, as far as a machine without GPUs goes."""

from __future__ import annotations

import contextlib
import json
import runpy
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "record.py"
record = SimpleNamespace(**runpy.run_path(str(SCRIPT)))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_steps_on_gpus_name_tests_and_arguments_that_there_are(ranks: int, tmp_path: Path) -> None:
    oracle, *benches = record.steps("cuda", ranks, tmp_path)
    assert sum(step.share for step in (oracle, *benches)) == pytest.approx(1)
    tests = oracle.command[3:]
    assert all(f"{ranks}]" in test for test in tests)
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *tests],
        cwd=SCRIPT.parent.parent, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert [line for line in collected.stdout.splitlines() if "::" in line] == tests, collected.stdout
    from tokenferry.cli import bench

    parser = record.argparse.ArgumentParser()
    bench.add_arguments(parser)
    for step in benches:
        assert step.command[:3] == ["-m", "tokenferry", "bench"]
        parsed = parser.parse_args(step.command[3:])
        assert (parsed.device, parsed.ranks) == ("cuda", ranks)


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    code = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(987)'])"
    started = time.monotonic()
    hanging = record.Step("hangs", ["-c", f"{code}; time.sleep(987)"], 1.0)
    outcome = record.run(hanging, 2.0, tmp_path / "log")
    assert outcome.status == "too slow"
    assert time.monotonic() - started < 30
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            assert b"time.sleep(987)" not in path.read_bytes()


def test_failures_are_told(tmp_path: Path) -> None:
    outcome = record.run(
        record.Step("fails", ["-c", "print('why'); raise SystemExit(3)"], 1.0), 30.0, tmp_path / "log"
    )
    assert outcome.status == "exit code 3"
    assert (tmp_path / "log").read_text() == "why\n"


def test_table(tmp_path: Path) -> None:
    def found(microseconds: float) -> dict[str, float]:
        return {"median_seconds": microseconds * 1e-6}

    high = [
        {
            "case": {"mode": mode, "tokens": 4096, "dtype": "bf16", "sms": 24},
            "contenders": {"tokenferry": {"call": found(time), "chained": found(700)}, "nccl": {"call": found(1300)}},
        }
        for mode, time in (("dispatch", 840), ("combine", 950))
    ]
    low = [
        {
            "case": {"tokens": 16, "dtype": "fp8"},
            "contenders": {"tokenferry": {"pair": {"graph": found(34), "chained": found(50)}}},
        }
    ]
    for name, cases in (("ht", high), ("ll", low)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "one.json").write_text(json.dumps({"cases": cases}))
    lines = record.summary([record.Outcome("oracle", "ok", 5.0)], tmp_path, True).splitlines()
    assert lines[0].split() == ["oracle", "ok", "5", "s"]
    assert [line.rpartition("   target ")[2] for line in lines if "target" in line] == [
        "850: reached",
        "900: MISSED",
        "35: reached",
    ]
    assert "1300.0 us   4096 tokens, bf16, 24 SMs, call, nccl" in "\n".join(lines)
    assert "target" not in record.summary([], tmp_path, False)


def test_needs_a_gpu_or_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if record.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        record.main(["--output", str(tmp_path)])
    assert "no GPU" in capsys.readouterr().err
