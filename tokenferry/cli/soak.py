"""``tokenferry soak``: random operations and faults on ranks of this machine, each checked, until the time is over.

Operations of both modes, shapes, dtypes and delays are drawn from a seed; Buffers come and go, on one node and on
several (groups of the ranks). Every result is compared with plain PyTorch. The run ends with a page that says what
was done, and what is left: shared memory, files, processes, memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tokenferry.cli import soak_shrink
from tokenferry.cli.bench_machine import (
    describe_command,
    describe_commit,
    describe_device,
    describe_machine,
    describe_versions,
)
from tokenferry.cli.mps import MpsError, sharing_gpus
from tokenferry.cli.needs import need_folder, need_gpu
from tokenferry.cli.options import number_of_ranks, positive, positive_number
from tokenferry.cli.ranks import RankError, RankPool
from tokenferry.cli.soak_memory import MOST_GROWTH, Look, late_growth
from tokenferry.cli.soak_ranks import Report, Settings, soak

_MOST_NEW_FILES = 4
"""More open files than after the warm-up are a leak."""
_SHARED_MEMORY = Path("/dev/shm")
_MOMENT = 3.0
"""Seconds for which a segment has a name, as a rule: until all ranks have opened it."""
_RESIDENT = "resident memory since the warm-up"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a soak.

    Args:
        parser: to declare them on.
    """
    parser.set_defaults(fail=parser.error)
    parser.add_argument("--minutes", type=positive_number, default=1.0, help="how long (default: %(default)s)")
    parser.add_argument("--ranks", type=number_of_ranks, default=4, help="processes to start (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--tokens", type=positive, default=300, help="most tokens of a rank in an operation (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory and open files over time (a PNG file)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page and what was drawn (a JSON file)")


def main(args: argparse.Namespace) -> int:
    """Run a soak.

    Args:
        args: parsed options, see :func:`add_arguments`.

    Returns:
        0; 1 if a result was wrong, a rank failed, something leaked, or ``--plot`` finds no matplotlib.
    """
    settings = Settings(60 * args.minutes, args.seed, args.device, args.tokens)
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        print("error: --plot needs matplotlib: pip install 'tokenferry[cli]'", file=sys.stderr)
        return 1
    for name, path in (("--plot", args.plot), ("--output", args.output)):
        if path is not None:
            need_folder(args, name, path.parent)
            if path.is_dir():
                args.fail(f"argument {name}: {path}: is a directory")
            path.unlink(missing_ok=True)  # a run that fails leaves none
    need_gpu(args)
    before = named_segments()
    began = time.monotonic()
    shares_gpus = args.device == "cuda" and args.ranks > torch.cuda.device_count()
    try:
        with sharing_gpus(shares_gpus), RankPool(args.ranks, num_threads=1) as pool:
            reports: list[Report] = pool.run(soak, settings)
            killed = soak_shrink.end(pool, settings) if args.device == "cpu" else 0
    except MpsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except RankError as error:
        device = "" if args.device == "cpu" else f" --device {args.device}"
        print(f"error: {error}", file=sys.stderr)
        print(f"again with: tokenferry soak{device} --ranks {args.ranks} --seed {args.seed}", file=sys.stderr)
        return 1
    alive = sum(process.is_alive() for process in pool.processes)
    leaks = find_leaks(reports, left_segments(before), alive, max(torch.cuda.device_count(), 1))
    page = summary(settings, reports, leaks, time.monotonic() - began, killed)
    print(page)
    if args.output is not None:
        args.output.write_text(json.dumps(_result(settings, reports, page), indent=1) + "\n")
        print(f"\nwritten: {args.output}")
    if args.plot is not None:
        from tokenferry.cli.soak_plot import draw

        draw(reports, _headlines(settings, reports), args.plot)
        print(f"\nwritten: {args.plot}")
    return 1 if any(leak.is_leak for leak in leaks) else 0


def _result(settings: Settings, reports: Sequence[Report], page: str) -> dict[str, Any]:
    machine, versions = describe_machine(settings.device), describe_versions()
    if settings.device == "cuda":
        device = describe_device(0)
        versions |= device.pop("versions")
        machine |= device | {"gpus": torch.cuda.device_count()}
    return {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": machine,
        "versions": versions,
        "git": describe_commit(),
        "command": describe_command(sys.argv[1:]),
        "lines": page.splitlines(),
        "looks": {
            "fields": list(Look._fields),
            "of_ranks": [[[round(look.seconds, 2), *look[1:]] for look in report.looks] for report in reports],
        },
    }


def _headlines(settings: Settings, reports: Sequence[Report]) -> list[str]:
    calls, faults = sum(reports[0].calls.values()), sum(reports[0].faults.values())
    return [
        f"{settings.seconds / 60:.3g} minutes, {len(reports)} ranks on {settings.device}, {os.cpu_count()} cores, "
        f"seed {settings.seed}",
        f"{calls} operations on each rank, all right; {reports[0].episodes} Buffers, {faults} faults",
        *(leak.found for leak in find_leaks(reports, set(), 0) if leak.what == _RESIDENT),
    ]


def named_segments() -> set[str]:
    """Shared memory of tokenferry, of any process, that has a name."""
    if not _SHARED_MEMORY.exists():
        return set()
    return {name for name in os.listdir(_SHARED_MEMORY) if name.startswith("tokenferry-")}


def left_segments(before: set[str]) -> set[str]:
    """Named segments that were not there before, and stay: those that other processes make have names for moments."""
    left, deadline = named_segments() - before, time.monotonic() + _MOMENT
    while left and time.monotonic() < deadline:
        time.sleep(0.05)
        left &= named_segments()
    return left


@dataclass(frozen=True)
class Leak:
    """One kind of thing that may be left."""

    what: str
    found: str
    is_leak: bool


def find_leaks(reports: Sequence[Report], named: set[str], alive: int, num_gpus: int = 1) -> list[Leak]:
    """What is left at the end.

    Args:
        reports: of all ranks.
        named: segments that have a name and were not there before.
        alive: processes that run still.
        num_gpus: that the ranks are on.
    """
    mapped = sum(report.segments for report in reports)
    files = max(report.files[1] - report.files[0] for report in reports)
    grown = max(reports, key=lambda report: report.resident[1] - report.resident[0])
    growth = grown.resident[1] - grown.resident[0]
    peak = max(report.resident_peak for report in reports)
    files_text = f"{files:+d} in the rank with most ({reports[0].files[0]} to {reports[0].files[1]} in rank 0)"
    resident_text = (
        f"{growth / 2**20:+.1f} MiB in the rank with most "
        f"({grown.resident[0] / 2**20:.0f} to {grown.resident[1] / 2**20:.0f}, peak of all {peak / 2**20:.0f})"
    )
    found = [
        Leak("shared memory with a name", str(len(named)), bool(named)),
        Leak("shared memory still mapped", f"{mapped} segments", mapped > 0),
        Leak("open files since the warm-up", files_text, files > _MOST_NEW_FILES),
        Leak("processes", f"{alive} alive", alive > 0),
        Leak(_RESIDENT, resident_text, False),
        _late_leak("of that, late in the run", reports, "resident", MOST_GROWTH),
    ]
    if any(look.device for report in reports for look in report.looks):
        most = MOST_GROWTH * -(-len(reports) // num_gpus)  # ranks of a GPU
        found.append(_late_leak("GPU memory, late in the run", reports, "device", most))
    return found


def _late_leak(what: str, reports: Sequence[Report], field: str, most: int) -> Leak:
    looks = [report.looks for report in reports]
    if field == "device":  # which takes memory for the kernels of all
        counts = [sum(look.kernels for look in now) for now in zip(*looks, strict=False)]
        looks = [[look._replace(kernels=n) for look, n in zip(of, counts, strict=False)] for of in looks]
    known = [growth for growth in (late_growth(of_rank, field) for of_rank in looks) if growth is not None]
    if len(known) < len(reports):
        return Leak(what, "not judged: the run is too short, or has too few Buffers", False)
    is_leak = any(growth.is_own and growth.bytes > most for growth in known)
    worst = max((growth for growth in known if growth.is_own or not is_leak), key=lambda growth: growth.bytes)
    text = f"{worst.bytes / 2**20:+.1f} MiB a quarter of the run, in the rank with most"
    if not is_leak and worst.bytes > most:
        text = f"not judged: {text}, and kernels were compiled meanwhile"
    return Leak(what, text, is_leak)


def summary(settings: Settings, reports: Sequence[Report], leaks: Sequence[Leak], seconds: float, killed: int) -> str:
    """The page at the end of a run in which all results were right."""
    first = reports[0]
    calls = sum(first.calls.values())
    moved = "not counted by kernels"
    if settings.device == "cpu":
        megabytes = sum(report.bytes_moved for report in reports) / 1e6
        moved = f"{megabytes:,.1f} MB read from other ranks or sent to other nodes, all ranks together"
    waited = sum(report.waited_ns for report in reports) / len(reports) / 1e9
    lines = [
        f"soak: {len(reports)} ranks on {settings.device}, seed {settings.seed}, {seconds:.0f} s",
        "",
        f"operations      {calls} on each rank, all results as plain PyTorch has them",
        *_table(first.calls),
        f"bytes           {moved}",
        f"idle            {100 * waited / seconds:.0f} % of the time, on average, waiting for other ranks",
        f"Buffers         {first.episodes} built and destroyed; nodes x ranks:",
        *_table(first.layouts),
        "among all that",
        *_table(first.ways),
        f"faults          {sum(first.faults.values())} injected, all survived",
        *_table(first.faults),
        f"killed          {killed} ranks in the end, one after the other; the others went on",
        "left over",
        *(f"  {leak.what:<34}{leak.found}{'   LEAK' if leak.is_leak else ''}" for leak in leaks),
    ]
    return "\n".join(lines)


def _table(counts: Counter[str]) -> list[str]:
    return [f"  {name:<34}{count}" for name, count in sorted(counts.items())]
