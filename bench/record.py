"""The figures of record of one machine, in one start: results against the oracle, then both modes beside NCCL.

    python bench/record.py --output results            # all GPUs of this machine, one rank on each
    python bench/record.py --ranks 8 --output results  # ranks share GPUs: what it does, no figures
    python bench/record.py --device cpu --output out   # likewise, in a minute

Every step is a process of its own with a share of the time; a step that fails or takes too long ends none of the
others. A short table comes last. JSON files and plots are as ``python -m tokenferry bench`` writes them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

HERE = Path(__file__).resolve().parent.parent
TARGETS = {
    ("dispatch", 24): 850.0,
    ("combine", 24): 900.0,
    ("low-latency pair", 16): 35.0,
    ("low-latency pair", 128): 80.0,
}
"""Microseconds on 8 x H100: operations of 4096 tokens by SMs, bf16; low-latency pairs by tokens, in a graph."""


class Step(NamedTuple):
    name: str
    command: list[str]
    share: float
    """Of the time."""


class Outcome(NamedTuple):
    name: str
    status: str
    seconds: float


def steps(device: str, ranks: int, output: Path) -> Iterator[Step]:
    """What is run, in order."""
    bench = ["-m", "tokenferry", "bench", "--device", device, "--ranks", str(ranks), "--output"]
    if device == "cpu":
        tests = ["tests/test_dispatch_combine.py", "tests/test_low_latency.py", "-k", "duplicates"]
        small = ["--hidden", "256", "--iterations", "3"]
        yield Step("oracle", ["-m", "pytest", "-q", *tests], 0.4)
        yield Step("high throughput", [*bench, str(output / "ht"), "--tokens", "64", *small], 0.3)
        more = ["--mode", "low-latency", "--tokens", "1", "16"]
        yield Step("low latency", [*bench, str(output / "ll"), *more, *small], 0.3)
        return
    tested = ranks if ranks in (2, 4, 8) else 2
    high, low = (
        "tests/gpu/test_dispatch_combine.py::test_every_call",
        "tests/gpu/test_low_latency.py::test_small_rows",
    )
    tests = [*(f"{high}[{family}-{tested}]" for family in ("wide", "scaled")), f"{low}[{tested}]"]
    yield Step("oracle", ["-m", "pytest", "-q", *tests], 0.25)
    shape = ["--tokens", "4096", "--sms", "8", "16", "24", "32", "64", "--iterations", "12"]
    yield Step("high throughput", [*bench, str(output / "ht"), *shape], 0.35)
    shape = ["--tokens", "8192", "--sms", "24", "--iterations", "12"]
    yield Step("8192 tokens", [*bench, str(output / "ht-8192"), *shape], 0.12)
    shape = ["--mode", "low-latency", "--iterations", "12"]
    yield Step("low latency", [*bench, str(output / "ll"), *shape], 0.28)


def run(step: Step, seconds: float, log: Path) -> Outcome:
    """Run a step; what it prints goes to the log, too."""
    print(f"\n=== {step.name}: at most {seconds:.0f} s\n$ python {' '.join(step.command)}", flush=True)
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *step.command],
            cwd=HERE,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            status = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            status = "too slow"
            _end(process)
    print("\n".join(log.read_text(errors="replace").splitlines()[-40:]), flush=True)
    return Outcome(step.name, status, time.monotonic() - started)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a step with all its ranks: politely, then at once."""
    for number, patience in ((signal.SIGINT, 10.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def figures(output: Path) -> Iterator[tuple[str, str, float, float | None]]:
    """What was measured, what else is to be said of it, microseconds, and the target if there is one."""
    for name in ("ht", "ht-8192"):
        for entry in _cases(output / name):
            case = entry["case"]
            for contender, kinds in entry["contenders"].items():
                sms = case.get("sms", 0)
                is_ours = contender == "tokenferry" and case["tokens"] == 4096 and case["dtype"] == "bf16"
                of_kind = {kind: kinds[kind] for kind in ("call", "chained") if kind in kinds} or {"": kinds}
                for kind, found_so in of_kind.items():
                    parts = [f"{case['tokens']} tokens", case["dtype"], f"{sms} SMs" if sms else "", kind, contender]
                    target = TARGETS.get((case["mode"], sms)) if is_ours and kind == "call" else None
                    yield case["mode"], ", ".join(filter(None, parts)), found_so["median_seconds"] * 1e6, target
    for entry in _cases(output / "ll"):
        case = entry["case"]
        for contender, operations in entry["contenders"].items():
            kind = "graph" if "graph" in operations["pair"] else "chained"
            about = f"{case['tokens']} tokens, {case['dtype']}, {kind}, {contender}"
            target = TARGETS.get(("low-latency pair", case["tokens"])) if contender == "tokenferry" else None
            yield "low-latency pair", about, operations["pair"][kind]["median_seconds"] * 1e6, target


def _cases(folder: Path) -> list[dict[str, Any]]:
    return [case for path in sorted(folder.glob("*.json")) for case in json.loads(path.read_text())["cases"]]


def summary(outcomes: Sequence[Outcome], output: Path, with_targets: bool) -> str:
    """The table."""
    lines = [f"{outcome.name:18} {outcome.status:14} {outcome.seconds:6.0f} s" for outcome in outcomes]
    for name, about, microseconds, target in figures(output):
        verdict = ""
        if target is not None and with_targets:
            verdict = f"   target {target:.0f}: {'reached' if microseconds <= target else 'MISSED'}"
        lines.append(f"{name:18} {microseconds:10.1f} us   {about}{verdict}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps; 1 if one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="default: one for each GPU; 2 with cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    parser.add_argument("--output", type=Path, required=True, help="directory for logs, JSON files and plots")
    args = parser.parse_args(arguments)
    num_gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    if args.device == "cuda" and num_gpus == 0:
        parser.error("torch finds no GPU; --device cpu shows what is run")
    ranks = args.ranks or num_gpus or 2
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    outcomes = []
    deadline = time.monotonic() + args.minutes * 60
    for step in steps(args.device, ranks, output):
        left = deadline - time.monotonic()
        seconds = min(max(step.share * args.minutes * 60, 1.0), left)
        if seconds <= 0:
            outcomes.append(Outcome(step.name, "no time left", 0.0))
            continue
        outcomes.append(run(step, seconds, output / f"{step.name.replace(' ', '-')}.log"))
    text = summary(outcomes, output, with_targets=num_gpus == ranks == 8)
    (output / "summary.txt").write_text(text + "\n")
    print(f"\n{ranks} ranks on {num_gpus or 'no'} GPUs\n{text}")
    return int(any(outcome.status != "ok" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
