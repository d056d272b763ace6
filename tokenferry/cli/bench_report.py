"""What the benchmark says: statistics, one line a case, the JSON file, the comparison with an earlier file."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenferry.cli.bench_cases import ALL_MODES, BASELINE, OURS, ROUTINGS, Case, RankResult
from tokenferry.cli.bench_machine import GPU_IDENTITY, IDENTITY

FORMAT = 1
"""Version of the JSON file; files of another one are refused."""

NOT_THERE = "not in the earlier file, with all options of these"
"""Said of a case."""

BOUNDARY = """\
What is timed: wall time of the public call alone, from a barrier of all ranks to its return, outputs allocated
inside it and freed outside. dispatch does not include get_dispatch_layout, which has its own line. A chained pair
is one of {pairs} dispatch + combine pairs without a barrier between them. The time of an iteration is that of the
slowest rank; shown are the median over iterations and the 10th and 90th percentile. The contenders take turns,
half of the iterations at a time, each behind calls that are not timed.
wire: bytes from one rank to the others / time. logical: the same with the rows a rank keeps. GB = 10^9 bytes.
{baseline}: gather once for each rank, all_to_all_single (counts, then rows), float32 index_add; same bits."""


class Statistics(NamedTuple):
    """Of the slowest rank's seconds, over iterations."""

    iterations: int
    median: float
    p10: float
    p90: float
    fastest: float
    slowest: float


@dataclasses.dataclass(frozen=True)
class CaseReport:
    """What is known about one case."""

    case: Case
    statistics: dict[str, Statistics]
    """By contender."""
    wire_bytes: float
    """Of one rank in one call: the mean over ranks."""
    logical_bytes: float
    heap_bytes: int
    """Shared memory of one rank's Buffer: the most of all ranks."""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as the baseline tokenferry is."""
        if BASELINE not in self.statistics:
            return None
        return self.statistics[BASELINE].median / self.statistics[OURS].median

    def per_token(self, contender: str) -> float:
        """Microseconds per token of a rank."""
        return self.statistics[contender].median * 1e6 / self.case.tokens

    def to_json(self) -> dict[str, Any]:
        """The entry of the JSON file."""
        return {
            "case": dataclasses.asdict(self.case),
            "calls_per_iteration": self.case.calls_per_iteration,
            "wire_bytes_per_rank": self.wire_bytes,
            "logical_bytes_per_rank": self.logical_bytes,
            "heap_bytes_per_rank": self.heap_bytes,
            "ratio_to_baseline": self.ratio,
            "contenders": {
                name: {
                    "iterations": found.iterations,
                    "median_seconds": found.median,
                    "p10_seconds": found.p10,
                    "p90_seconds": found.p90,
                    "fastest_seconds": found.fastest,
                    "slowest_seconds": found.slowest,
                    "microseconds_per_token": self.per_token(name),
                    "wire_gigabytes_per_second": self.wire_bytes / found.median / 1e9,
                    "logical_gigabytes_per_second": self.logical_bytes / found.median / 1e9,
                }
                for name, found in self.statistics.items()
            },
        }


class Fit(NamedTuple):
    """Seconds of a call as ``constant + per_token * tokens``."""

    constant: float
    per_token: float


def slowest_rank_statistics(times: Sequence[Sequence[float]]) -> Statistics:
    """Reduce the seconds of every rank (outer) in every iteration (inner)."""
    slowest = torch.tensor(times, dtype=torch.float64).amax(0)
    p10, median, p90 = torch.quantile(slowest, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
    return Statistics(slowest.numel(), median, p10, p90, float(slowest.min()), float(slowest.max()))


def report_of(case: Case, results: Sequence[RankResult]) -> CaseReport:
    """Put together what the ranks found out."""
    return CaseReport(
        case,
        {name: slowest_rank_statistics([result.times[name] for result in results]) for name in results[0].times},
        sum(result.wire_bytes for result in results) / len(results),
        sum(result.logical_bytes for result in results) / len(results),
        max(result.heap_bytes for result in results),
    )


def fit_tokens(tokens: Sequence[int], seconds: Sequence[float]) -> Fit:
    """Fit ``a + b * tokens`` so that the relative errors are least in the mean square."""
    count, time = torch.tensor(tokens, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    columns = torch.stack([1 / time, count / time], dim=1)
    constant, per_token = torch.linalg.lstsq(columns, torch.ones(len(tokens), 1, dtype=torch.float64)).solution
    return Fit(float(constant), float(per_token))


def fits_of(reports: Sequence[CaseReport]) -> dict[tuple[str, int, str], Fit]:
    """Fits by (mode, stage ceiling, contender), where there are at least three token counts."""
    points: dict[tuple[str, int, str], tuple[list[int], list[float]]] = {}
    for report in reports:
        for name, found in report.statistics.items():
            key = (report.case.mode, report.case.num_nvl_bytes, name)
            tokens, seconds = points.setdefault(key, ([], []))
            tokens.append(report.case.tokens)
            seconds.append(found.median)
    return {key: fit_tokens(*given) for key, given in points.items() if len(set(given[0])) >= 3}


# Lines.


def show_stage(num_nvl_bytes: int) -> str:
    """A stage ceiling in words."""
    return f"{num_nvl_bytes / 2**20:g} MiB" if num_nvl_bytes else "default"


def show_time(seconds: float) -> str:
    """Seconds with the unit that suits them."""
    unit, scale = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    return f"{seconds * scale:.4g} {unit}"


def _shape(case: Case) -> str:
    stage = show_stage(case.num_nvl_bytes)
    return f"{ALL_MODES[case.mode]:20} {case.tokens:6} {case.hidden:6} {case.dtype:5} {stage:>8}"


HEADER = (
    f"{'operation':20} {'tokens':>6} {'hidden':>6} {'dtype':5} {'stage':>8}   "
    f"{'median':>8}  {'10 % .. 90 %':>19}  {'us/token':>8}  {'wire':>6} {'logical':>7}   ratio to {BASELINE}"
)


def case_line(report: CaseReport) -> str:
    """One line about a case, in the columns of :data:`HEADER`."""
    case, ours = report.case, report.statistics[OURS]
    spread = f"{show_time(ours.p10)} .. {show_time(ours.p90)}"
    rates = "" if not report.wire_bytes else f"{report.wire_bytes / ours.median / 1e9:.2f}"
    logical = "" if not report.logical_bytes else f"{report.logical_bytes / ours.median / 1e9:.2f}"
    line = (
        f"{_shape(case)}   "
        f"{show_time(ours.median):>8}  {spread:>19}  {report.per_token(OURS):8.3f}  {rates:>6} {logical:>7}"
    )
    if report.ratio is not None:
        line += f"   {report.ratio:.2f}x ({show_time(report.statistics[BASELINE].median)})"
    return line.rstrip()


def fit_line(key: tuple[str, int, str], fit: Fit) -> str:
    """One line about a fit."""
    mode, stage, name = key
    formula = f"{fit.constant * 1e3:8.3f} ms + {fit.per_token * 1e6:6.3f} us a token"
    return f"{ALL_MODES[mode]:20} {name:18} {show_stage(stage):>8}   {formula}"


# Files.


def results_of(
    reports: Sequence[CaseReport], machine: Mapping[str, Any], versions: Mapping[str, str], **extra: Any
) -> dict[str, Any]:
    """The JSON file.

    Args:
        reports: all cases.
        machine: :func:`tokenferry.cli.bench_machine.describe_machine`.
        versions: :func:`tokenferry.cli.bench_machine.describe_versions`.
        extra: further entries: git, command, method, notes.
    """
    return {
        **origin_of(machine, versions),
        **extra,
        "cases": [report.to_json() for report in reports],
        "fits": [
            {
                "mode": mode,
                "num_nvl_bytes": stage,
                "contender": name,
                "constant_seconds": fit.constant,
                "seconds_per_token": fit.per_token,
            }
            for (mode, stage, name), fit in fits_of(reports).items()
        ],
    }


def origin_of(machine: Mapping[str, Any], versions: Mapping[str, str]) -> dict[str, Any]:
    """What every JSON file begins with."""
    return {
        "format": FORMAT,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": dict(machine),
        "versions": dict(versions),
    }


def load_results(path: Path) -> dict[str, Any]:
    """Read an earlier JSON file.

    Raises:
        ValueError: it is no result file of this format.
        OSError: it cannot be read.
    """
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or results.get("format") != FORMAT or "cases" not in results:
        raise ValueError(f"not a result file of format {FORMAT}")
    return results


def machine_differences(earlier: Mapping[str, Any], machine: Mapping[str, Any]) -> list[str]:
    """In what this machine is not the one of an earlier file; empty if it is the same."""
    then = earlier["machine"]
    keys = [*IDENTITY, *(key for key in GPU_IDENTITY if key in machine)]
    return [f"{key}: {then.get(key)} then, {machine[key]} now" for key in keys if then.get(key) != machine[key]]


def case_key(case: Mapping[str, Any]) -> str:
    """Equal for the same case in files of any age: fields that a file does not have were at their default."""
    return json.dumps({"nodes": 1, "routing": ROUTINGS[0], **case}, sort_keys=True)


def contenders_by_case(earlier: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What an earlier file says of the contenders, by :func:`case_key`."""
    return {case_key(entry["case"]): entry["contenders"] for entry in earlier["cases"]}


def comparison_lines(earlier: Mapping[str, Any], reports: Sequence[CaseReport]) -> list[str]:
    """One line a case: how many times as fast as in the earlier file."""
    before = contenders_by_case(earlier)
    lines = []
    for report in reports:
        what = _shape(report.case)
        contenders = before.get(case_key(dataclasses.asdict(report.case)))
        if contenders is None:
            lines.append(f"{what}   {NOT_THERE}")
            continue
        parts = [
            f"{name} {contenders[name]['median_seconds'] / found.median:.2f}x"
            f" ({show_time(contenders[name]['median_seconds'])} -> {show_time(found.median)})"
            for name, found in report.statistics.items()
            if name in contenders
        ]
        lines.append(f"{what}   {', '.join(parts)}")
    return lines
