"""What the benchmark on GPUs says: statistics, lines, JSON entries, the comparison with an earlier file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from tokenferry.cli.bench_cases import ALL_MODES, BASELINE, OURS
from tokenferry.cli.bench_cuda_cases import CudaCase, CudaRankResult, Samples
from tokenferry.cli.bench_report import (
    NOT_THERE,
    Statistics,
    case_key,
    contenders_by_case,
    show_stage,
    slowest_rank_statistics,
)

KINDS = Samples._fields
"""The ways of timing."""

BOUNDARY = """\
What is timed: the public call, outputs allocated in it. dispatch does not include get_dispatch_layout, and waits on
the host for the counts; a cached one does not. A pair is dispatch + combine.
call: between CUDA events around one call, from a drained GPU and a start that all ranks share; host time is in it.
chained: between CUDA events around {chain} calls, right behind {ahead} that are not timed, for one of them{fewer}.
host: wall time of the host in one of those. Contenders take turns, caches as the last call left them.
A sample is that of the slowest rank; shown are medians in microseconds, and of `call` the least and most of a sample.
wire: bytes that arrive from other ranks / `chained`. logical: the same with the rows a rank keeps. GB = 10^9 bytes.
{baseline}: gather once for each rank, all_to_all_single (counts, then rows), float32 index_add; same bits."""

FEWER = """; fewer
where so many have over {chained_tokens} tokens, {least_chain} at least"""

SHARED = """\
{ranks} RANKS SHARE {gpus} GPU{s}: rows do not cross NVLink, kernels of different ranks compete for the same SMs and
memory. These figures are NO NVLink figures and say nothing about ranks with a GPU each."""


class Figure(NamedTuple):
    """One way of timing one contender."""

    statistics: Statistics
    """Of the slowest rank's seconds, over samples."""
    rank_spread: float
    """Seconds from the fastest to the slowest rank of a sample: the median."""
    rank_medians: list[float]
    """Seconds of each rank: the median over its samples."""


@dataclasses.dataclass(frozen=True)
class CudaReport:
    """What is known about one case."""

    case: CudaCase
    figures: dict[str, dict[str, Figure]]
    """By contender and by way of timing."""
    wire_bytes: float
    """That arrive at one rank in one call: the mean over ranks."""
    logical_bytes: float
    heap_bytes: int
    """Device memory of one rank's Buffer: the most of all ranks."""
    kernels: dict[str, float]
    """Seconds of each kernel in a chained call: the mean over ranks."""

    def median(self, contender: str, kind: str) -> float:
        """Seconds."""
        return self.figures[contender][kind].statistics.median

    def ratio(self, contender: str, kind: str) -> float:
        """How many times as fast as a contender tokenferry is."""
        return self.median(contender, kind) / self.median(OURS, kind)

    def to_json(self) -> dict[str, Any]:
        """The entry of the JSON file."""
        return {
            "case": dataclasses.asdict(self.case),
            "wire_bytes_per_rank": self.wire_bytes,
            "logical_bytes_per_rank": self.logical_bytes,
            "heap_bytes_per_rank": self.heap_bytes,
            "ratio_to_baseline": {kind: self.ratio(BASELINE, kind) for kind in KINDS if BASELINE in self.figures},
            "kernel_seconds": self.kernels,
            "contenders": {
                name: {kind: self._figure_json(kind, figure) for kind, figure in kinds.items()}
                for name, kinds in self.figures.items()
            },
        }

    def _figure_json(self, kind: str, figure: Figure) -> dict[str, Any]:
        found = figure.statistics
        entry = {
            "samples": found.iterations,
            "median_seconds": found.median,
            "p10_seconds": found.p10,
            "p90_seconds": found.p90,
            "fastest_seconds": found.fastest,
            "slowest_seconds": found.slowest,
            "rank_spread_seconds": figure.rank_spread,
            "rank_median_seconds": figure.rank_medians,
        }
        if kind != "host":
            entry["wire_gigabytes_per_second"] = self.wire_bytes / found.median / 1e9
            entry["logical_gigabytes_per_second"] = self.logical_bytes / found.median / 1e9
        return entry


def figure_of(seconds: Sequence[Sequence[float]]) -> Figure:
    """Reduce the seconds of every rank (outer) in every sample (inner)."""
    times = torch.tensor(seconds, dtype=torch.float64)
    spread = (times.amax(0) - times.amin(0)).quantile(0.5)
    return Figure(slowest_rank_statistics(seconds), float(spread), times.quantile(0.5, dim=1).tolist())


def report_of(case: CudaCase, results: Sequence[CudaRankResult]) -> CudaReport:
    """Put together what the ranks found out."""
    names = {name for result in results for name in result.kernels}
    return CudaReport(
        case,
        {
            name: {kind: figure_of([getattr(result.samples[name], kind) for result in results]) for kind in KINDS}
            for name in results[0].samples
        },
        sum(result.wire_bytes for result in results) / len(results),
        sum(result.logical_bytes for result in results) / len(results),
        max(result.heap_bytes for result in results),
        {name: sum(result.kernels.get(name, 0.0) for result in results) / len(results) for name in sorted(names)},
    )


# Lines.


def shared_note(machine: Mapping[str, Any]) -> str:
    """What to know about figures of ranks that share GPUs."""
    gpus = machine["gpus"]
    return SHARED.format(ranks=machine["ranks"], gpus=gpus, s="" if gpus == 1 else "S")


HEADER = (
    f"{'operation':20} {'tokens':>6} {'dtype':5} {'SMs':>3}   {'call':>8}  {'least .. most':>20}  "
    f"{'chained':>8}  {'host':>8}  {'wire':>6} {'logical':>7}   others: call / chained (tokenferry is so much faster)"
)


def case_line(report: CudaReport) -> str:
    """One line about a case, in the columns of :data:`HEADER`."""
    ours = report.figures[OURS]
    call, chained = ours["call"].statistics, ours["chained"].statistics
    rates = [
        f"{moved / chained.median / 1e9:.1f}" if moved else "" for moved in (report.wire_bytes, report.logical_bytes)
    ]
    spread = f"{_us(call.fastest)} .. {_us(call.slowest)}"
    line = (
        f"{_shape(report.case)}   {_us(call.median):>8}  {spread:>20}  {_us(chained.median):>8}  "
        f"{_us(ours['host'].statistics.median):>8}  {rates[0]:>6} {rates[1]:>7}"
    )
    if report.case.num_nvl_bytes:
        line += f"   stage up to {show_stage(report.case.num_nvl_bytes)}"
    for name in report.figures:
        if name != OURS:
            both = " / ".join(_us(report.median(name, kind)) for kind in ("call", "chained"))
            ratios = " / ".join(f"{report.ratio(name, kind):.2f}x" for kind in ("call", "chained"))
            line += f"   {name} {both} ({ratios})"
    return line.rstrip()


def kernel_line(report: CudaReport) -> str:
    """The kernels of a case, the longest first."""
    longest = sorted(report.kernels.items(), key=lambda item: -item[1])
    return "    kernels: " + ", ".join(f"{name} {_us(seconds)}" for name, seconds in longest)


def comparison_lines(earlier: Mapping[str, Any], reports: Sequence[CudaReport]) -> list[str]:
    """One line a case: how many times as fast as in the earlier file, by way of timing."""
    before = contenders_by_case(earlier)
    lines = []
    for report in reports:
        contenders = before.get(case_key(dataclasses.asdict(report.case)))
        if contenders is None:
            lines.append(f"{_shape(report.case)}   {NOT_THERE}")
            continue
        parts = []
        for name, kinds in report.figures.items():
            then = {kind: contenders[name][kind]["median_seconds"] for kind in kinds if name in contenders}
            changes = [
                f"{kind} {seconds / report.median(name, kind):.2f}x"
                f" ({_us(seconds)} -> {_us(report.median(name, kind))})"
                for kind, seconds in then.items()
            ]
            if changes:
                parts.append(f"{name} {', '.join(changes)}")
        lines.append(f"{_shape(report.case)}   {'; '.join(parts)}")
    return lines


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _shape(case: CudaCase) -> str:
    return f"{ALL_MODES[case.mode]:20} {case.tokens:6} {case.dtype:5} {case.sms or '':>3}"
