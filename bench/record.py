"""Everything that has to be shown on one machine: tests, figures beside NCCL, sanitizer, stress, soak; a table last.

    python bench/record.py --output results                        # all GPUs of this machine, one rank on each
    python bench/record.py --output out --device cpu --repeat 1    # a rehearsal on CPU ranks: no figures

Every step is a process of its own with a share of the time; a step that fails or takes too long ends none of the
others. Where ranks share GPUs, CUDA's MPS is started for the step and ended behind it. After every step all that is
known is in record.json: with --resume, steps that ended well at this commit are not run again. JSON files and plots
are as ``python -m tokenferry bench`` writes them; --table prints the table of record.json files, which count as
further starts, and with --output writes the results in them out again, drawn.

With two GPUs and calls of ten minutes:

    python bench/record.py --output R --phase tests high-throughput further low-latency
    python bench/record.py --output R --resume --phase shared nodes sanitizer
    python bench/record.py --output R --resume --phase stress high-throughput further low-latency
    python bench/record.py --output R --resume --phase soak nodes

Each is given --minutes 9 in all. A first start of every step comes before a second one (--repeat), and leaves the
steps behind it at least half of what they may take. The last two calls end what those before had no time for, too.
record.json is all that is needed to resume on another machine. With four or eight GPUs one call of eight minutes is
enough (not tried there yet), whose tests are those of as many ranks, and whose bars are others:

    python bench/record.py --output R --phase tests high-throughput low-latency --repeat 1 --minutes 8
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import phases
import requirements
import torch
from phases import PHASES, Setting, Step
from requirements import Start

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from tokenferry.cli.bench_machine import describe_commit  # noqa: E402
from tokenferry.cli.mps import MpsError, sharing_gpus  # noqa: E402

FORMAT = 1
KEPT = 200
"""Lines of what a step printed that record.json keeps."""
_SHOWN_OK, _SHOWN_BAD = 12, 40
LEAST = 1 / 3
"""Of what a step may take: with less it is not begun."""


class Outcome(NamedTuple):
    status: str
    """``ok``, or in a few words what went wrong."""
    seconds: float
    output: str
    """The end of what the step printed."""


def run(step: Step, seconds: float, log: Path) -> Outcome:
    """Run a step; what it prints goes to the log, too, beside the directory of its results."""
    print(f"\n=== {step.name}: at most {seconds:.0f} s\n$ {' '.join(step.command)}", flush=True)
    if log.with_suffix("").is_dir():
        shutil.rmtree(log.with_suffix(""))  # what an earlier run has left
    started = time.monotonic()
    try:
        with sharing_gpus(step.shares_gpus):
            status = _run(step, seconds, log)
    except MpsError as error:
        status = str(error)
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    print("\n".join(lines[-(_SHOWN_OK if status == "ok" else _SHOWN_BAD) :]), flush=True)
    return Outcome(status, time.monotonic() - started, "\n".join(lines[-KEPT:]))


def _run(step: Step, seconds: float, log: Path) -> str:
    paths = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **step.environment}
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                phases.argv(step),
                cwd=HERE,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return f"cannot be started: {error.strerror}"
        try:
            code = process.wait(seconds)
            return "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            return "too slow"
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop a step with all its processes: politely, then at once."""
    if process.poll() is None:
        for number, patience in ((signal.SIGINT, 20.0), (signal.SIGTERM, 3.0)):
            try:
                os.killpg(process.pid, number)
                process.wait(patience)
                break
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
    try:
        os.killpg(process.pid, signal.SIGKILL)  # ranks may outlive who started them
    except ProcessLookupError:
        return
    process.wait()


class Record:
    """What is known, in ``record.json`` of a directory.

    Args:
        output: the directory.
        setting: of the run.
        resume: keep what the file has.

    Raises:
        ValueError: what there is to keep is of another device, or other ranks or GPUs.
    """

    def __init__(self, output: Path, setting: Setting, resume: bool) -> None:
        self.output, self._setting, self._commit = output, setting, describe_commit()
        self._path = output / "record.json"
        self.steps: dict[str, dict[str, Any]] = {}
        if resume and self._path.exists():
            known = load(self._path)
            if known["setting"] != {**setting._asdict(), "soak_minutes": known["setting"]["soak_minutes"]}:
                raise ValueError(f"record.json is of another run: {known['setting']}, not {setting._asdict()}")
            self.steps = known["steps"]

    def directory(self, name: str, start: int) -> Path:
        """For the results of a step."""
        return self.output / f"{name.replace(' ', '-')}-{start}"

    def is_done(self, step: Step, start: int) -> bool:
        """Whether an earlier run of the step ended well, in the same way and at the same commit."""
        known = self.steps.get(key_of(step.name, start), {})
        return (known.get("status"), known.get("git")) == ("ok", self._commit) and known.get("command") == _shown(
            step
        )

    def add(self, step: Step, start: int, outcome: Outcome) -> None:
        """Note how a step ended, with the results that it left."""
        found = [json.loads(path.read_text()) for path in sorted(self.directory(step.name, start).glob("*.json"))]
        self.steps[key_of(step.name, start)] = {
            "name": step.name,
            "phase": step.phase,
            "start": start,
            **outcome._asdict(),
            "command": _shown(step),
            "git": self._commit,
            "results": found[0] if found else None,
        }
        self._write()

    def _write(self) -> None:
        starts = starts_of([self.steps], self._setting.scale)
        record = {
            "format": FORMAT,
            "setting": self._setting._asdict(),
            "steps": self.steps,
            "table": [row._asdict() for row in rows(starts, self._setting)],
        }
        fresh = self._path.with_suffix(".new")
        fresh.write_text(json.dumps(record, indent=1) + "\n")
        fresh.replace(self._path)


def _shown(step: Step) -> list[str]:
    """A command without directories, which differ from run to run."""
    parts = list(step.command)
    return [Path(part).name if Path(part).is_absolute() else part for part in parts]


def key_of(name: str, start: int) -> str:
    return f"{name} #{start}"


def load(path: Path) -> dict[str, Any]:
    """Read a ``record.json``.

    Raises:
        ValueError: it is none of this format.
    """
    record = json.loads(path.read_text())
    if not isinstance(record, dict) or record.get("format") != FORMAT or "steps" not in record:
        raise ValueError(f"{path}: not a record of format {FORMAT}")
    return record


def starts_of(records: Sequence[Mapping[str, Mapping[str, Any]]], scale: requirements.Scale) -> list[Start]:
    """The starts in the steps of some records, one after the other."""
    by_start: dict[tuple[int, int], dict[str, Mapping[str, Any]]] = {}
    for number, steps in enumerate(records):
        for entry in steps.values():
            by_start.setdefault((number, entry["start"]), {})[entry["name"]] = entry
    return [Start(by_start[which], scale) for which in sorted(by_start)]


class Line(NamedTuple):
    """How a step ended."""

    key: str
    status: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.key:30} {self.status:16} {self.seconds:6.0f} s"


def run_all(record: Record, setting: Setting, chosen: Sequence[str], repeat: int, seconds: float) -> list[Line]:
    """Run the steps of some phases in the time there is: first all of them, then again those that repeat."""
    deadline = time.monotonic() + seconds
    lines = []
    for start in range(1, repeat + 1):
        known = phases.steps(setting, chosen, functools.partial(_directory, record, start))
        if start > 1:
            known.sort(key=lambda step: step.name not in requirements.TWICE)  # there may be time for a few only
        todo = []
        for step in known:
            if record.is_done(step, start):
                lines.append(Line(key_of(step.name, start), "ok, before", 0.0))
            elif start == 1 or step.repeats:
                todo.append(step)
        for at, step in enumerate(todo):
            left = deadline - time.monotonic()
            allowed = share_of(step, todo[at + 1 :], left)
            outcome = Outcome(phases.missing(step, setting) or "no time left", 0.0, "")
            if outcome.status == "no time left" and allowed >= (step.least or step.seconds * LEAST):
                outcome = run(step, allowed, record.directory(step.name, start).with_suffix(".log"))
            if outcome.status != "no time left":
                record.add(step, start, outcome)
            lines.append(Line(key_of(step.name, start), outcome.status, outcome.seconds))
    return lines


def _directory(record: Record, start: int, name: str) -> str:
    return str(record.directory(name, start))


def share_of(step: Step, later: Sequence[Step], left: float) -> float:
    """Seconds for a step, if so many are left: its share, and more where the later ones keep theirs."""
    return min(step.seconds, left, max(step.share, left - sum(other.share for other in later)))


def summary(records: Sequence[Mapping[str, Any]], setting: Setting) -> str:
    """Machines, and the table."""
    starts = starts_of([record["steps"] for record in records], setting.scale)
    machines, commits = set(), set()
    for start in starts:
        for entry in start.steps.values():
            commit = entry["git"]
            if commit is not None:
                commits.add(commit["commit"][:10] + (" and changes" if commit["dirty"] else ""))
            if entry.get("results"):
                machine = entry["results"]["machine"]
                where = f"{machine['gpus']} x {machine['gpu']}" if "gpus" in machine else machine["cpu"]
                machines.add(f"{setting.ranks} ranks on {where}")
    lines = [*sorted(machines), f"at {' and '.join(sorted(commits)) or 'no commit'}"]
    if setting.device != "cuda":
        lines.append("REHEARSAL on CPU ranks: nothing is shown by it")
    elif not setting.gpus_of_ranks:
        lines.append("RANKS SHARE GPUS: these are no figures of speed")
    elif any("H100" not in machine for machine in machines):
        lines.append("the bars are those of H100s")
    lines += [*requirements.host_lines(starts), "", requirements.table(rows(starts, setting))]
    return "\n".join(lines)


def rows(starts: Sequence[Start], setting: Setting) -> list[requirements.Row]:
    """The table, judged as far as the machine allows."""
    return requirements.rows_of(starts, setting.gpus_of_ranks, judged=setting.device == "cuda")


def unpack(records: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Write the results in records as files, and draw them."""
    output.mkdir(parents=True, exist_ok=True)
    for number, record in enumerate(records):
        for key, entry in record["steps"].items():
            if entry["results"] is None:
                continue
            path = output / f"{number + 1}-{key.replace(' #', '-').replace(' ', '-')}.json"
            path.write_text(json.dumps(entry["results"], indent=1) + "\n")
            if entry["results"]["machine"].get("device") == "cpu" and entry["name"] != "low latency":
                continue  # bench draws these from what it has measured only
            command = [sys.executable, "-m", "tokenferry", "bench", "--draw", str(path)]
            done = subprocess.run(command, cwd=HERE, check=False, capture_output=True, text=True)
            if done.returncode:
                print(f"not drawn: {path}: {done.stderr.splitlines()[-1:]}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 1 if a step failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phase", nargs="+", choices=[*PHASES, "all"], default=["all"], help="(default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="default: one for each GPU; 2 with cpu")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default 9)")
    parser.add_argument("--repeat", type=int, default=2, help="starts of every step with figures (default 2)")
    parser.add_argument("--soak-minutes", type=float, default=5.0, help="(default 5)")
    parser.add_argument("--resume", action="store_true", help="keep what record.json in --output has")
    parser.add_argument("--output", type=Path, help="directory for record.json, logs, results and plots")
    parser.add_argument("--table", type=Path, nargs="+", metavar="RECORD.json", help="run nothing; print the table")
    args = parser.parse_args(arguments)
    if args.table is not None:
        try:
            records = [load(path) for path in args.table]
        except (OSError, ValueError) as error:
            parser.error(f"argument --table: {error}")
        print(summary(records, Setting(**records[0]["setting"])))
        if args.output is not None:
            unpack(records, args.output.resolve())
        return 0
    if args.output is None:
        parser.error("argument --output: is needed")
    num_gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    if args.device == "cuda" and num_gpus == 0:
        parser.error("torch finds no GPU; --device cpu shows what is run")
    setting = Setting(args.device, args.ranks or num_gpus or 2, num_gpus, args.soak_minutes)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    try:
        record = Record(output, setting, args.resume)
    except (OSError, ValueError) as error:
        parser.error(f"argument --resume: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the step that runs, too
    chosen = PHASES if "all" in args.phase else args.phase
    lines = run_all(record, setting, chosen, args.repeat, args.minutes * 60)
    text = "\n".join([*map(str, lines), "", summary([{"steps": record.steps}], setting)])
    (output / "summary.txt").write_text(text + "\n")
    print(f"\n{text}")
    return int(any(not line.status.startswith("ok") for line in lines))


if __name__ == "__main__":
    sys.exit(main())
