"""What the low-latency benchmark says: statistics, lines, the table, fits, JSON entries, the comparison."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tokenferry.cli.bench_cases import OURS
from tokenferry.cli.bench_cuda_report import Figure, figure_of
from tokenferry.cli.bench_host import HostPart, host_line
from tokenferry.cli.bench_low_latency_cases import OPERATIONS, PHASES, Effort, LowLatencyCase, RankResult
from tokenferry.cli.bench_report import NOT_THERE, Fit, fit_tokens

BOUNDARY = """\
What is timed: low_latency_dispatch and low_latency_combine, outputs allocated in them; fp8 rows are quantised in
dispatch and come back as bfloat16, converted beforehand. A pair is dispatch + combine."""
BOUNDARY_CUDA = """\
graph: a replay of a CUDA graph of {captured} calls, for one of them, behind a delay that hides the host.
call: between CUDA events around one call, from a drained GPU and a start that all ranks share; host time is in it.
chained: between CUDA events around {chain} calls, right behind {ahead} that are not timed, for one of them. host: the
wall time of the host in one of those. send, receive: the launches of a call with a hook, each behind a delay that
hides the host, the receive when all ranks have sent."""
BOUNDARY_CPU = """\
Ranks are processes of one CPU, which stand in for GPUs: these are no claim of speed, and there are no graphs.
call: wall time of one call, from a start that all ranks share. chained, host: of {chain} calls without a pause, for
one of them. send, receive: the two halves of a call with a hook, the second when all ranks have sent."""
BOUNDARY_END = """\
A sample is that of the slowest rank; shown are medians in microseconds, in brackets the 10th and 90th percentile.
Bytes are those of rows and scales that leave a rank for others, for one token, without ids, weights and counts."""


@dataclasses.dataclass(frozen=True)
class LowLatencyReport:
    """What is known about one case."""

    case: LowLatencyCase
    figures: dict[str, dict[str, dict[str, Figure]]]
    """By contender, operation, and way of timing."""
    rows_per_token: float
    """Ranks other than its own that a token has experts on: the mean over all tokens."""
    choices_per_token: float
    """Experts of a token on ranks other than its own: the mean over all tokens."""
    heap_bytes: int
    """Memory of one rank's Buffer: the most of all ranks."""
    host_parts: list[HostPart]
    """The host of rank 0 in a pair, if asked for."""

    @property
    def kind(self) -> str:
        """The way of timing that counts: graphs, where there are any."""
        return kind_of(self.figures[OURS]["pair"])

    def median(self, contender: str, operation: str, kind: str) -> float:
        """Seconds."""
        return self.figures[contender][operation][kind].statistics.median

    def sent_per_token(self, operation: str) -> float:
        """Rows of a token that cross in a dispatch or a combine."""
        return self.choices_per_token if operation == "combine" and self.case.exact else self.rows_per_token

    def wire_json(self, operation: str) -> dict[str, float]:
        """The entry of a dispatch or a combine about bytes."""
        row, rows = self.case.row_bytes(operation), self.sent_per_token(operation)
        return {
            "row_bytes": row,
            "rows_per_token": rows,
            "bytes_per_token": rows * row,
            "rows_per_token_one_for_each_expert": self.choices_per_token,
            "bytes_per_token_one_for_each_expert": self.choices_per_token * row,
        }

    def to_json(self) -> dict[str, Any]:
        """The entry of the JSON file."""
        return {
            "case": dataclasses.asdict(self.case),
            "heap_bytes_per_rank": self.heap_bytes,
            "host_parts": [part._asdict() for part in self.host_parts],
            "wire": {operation: self.wire_json(operation) for operation in ("dispatch", "combine")},
            "contenders": {
                name: {
                    operation: {kind: _figure_json(figure) for kind, figure in kinds.items()}
                    for operation, kinds in operations.items()
                }
                for name, operations in self.figures.items()
            },
        }


def kind_of(kinds: Mapping[str, object]) -> str:
    """Of the ways in which an operation was timed, the one that counts."""
    return "graph" if "graph" in kinds else "chained"


def report_of(case: LowLatencyCase, results: Sequence[RankResult]) -> LowLatencyReport:
    """Put together what the ranks found out."""
    tokens = sum(result.traffic.tokens for result in results)
    return LowLatencyReport(
        case,
        {
            name: {
                operation: {
                    kind: figure_of([result.samples[name][operation][kind] for result in results]) for kind in kinds
                }
                for operation, kinds in samples.items()
            }
            for name, samples in results[0].samples.items()
        },
        sum(result.traffic.rows for result in results) / tokens,
        sum(result.traffic.choices for result in results) / tokens,
        max(result.heap_bytes for result in results),
        results[0].host_parts,
    )


def fits_of(reports: Sequence[LowLatencyReport]) -> dict[tuple[str, str, str], Fit]:
    """Fits of the pair by (contender, dtype, way of timing), where there are at least three token counts."""
    points: dict[tuple[str, str, str], dict[int, float]] = {}
    for report in reports:
        for name in report.figures:
            line = points.setdefault((name, report.case.dtype, report.kind), {})
            line[report.case.tokens] = report.median(name, "pair", report.kind)
    return {key: fit_tokens(list(line), list(line.values())) for key, line in points.items() if len(line) >= 3}


def fits_json(reports: Sequence[LowLatencyReport]) -> list[dict[str, Any]]:
    """The entry of the JSON file about fits."""
    return [
        {
            "contender": name,
            "dtype": dtype,
            "operation": "pair",
            "kind": kind,
            "constant_seconds": fit.constant,
            "seconds_per_token": fit.per_token,
        }
        for (name, dtype, kind), fit in fits_of(reports).items()
    ]


def _figure_json(figure: Figure) -> dict[str, Any]:
    found = figure.statistics
    return {
        "samples": found.iterations,
        "median_seconds": found.median,
        "p10_seconds": found.p10,
        "p90_seconds": found.p90,
        "fastest_seconds": found.fastest,
        "slowest_seconds": found.slowest,
        "rank_spread_seconds": figure.rank_spread,
        "rank_median_seconds": figure.rank_medians,
    }


# Lines.


def boundary(device: str, effort: Effort) -> str:
    """What is timed, in words."""
    of_device = (BOUNDARY_CUDA if device == "cuda" else BOUNDARY_CPU).format(**effort._asdict())
    return f"{BOUNDARY}\n{of_device}\n{BOUNDARY_END}"


HEADER = (
    f"{'tokens':>6} {'dtype':5} {'operation':9}  {'graph':>26}  {'chained':>8} {'call':>8} {'host':>8}  "
    f"{'send':>7} {'receive':>7}   others: graph / chained (tokenferry is so much faster)"
)


def case_lines(report: LowLatencyReport) -> list[str]:
    """A line for each operation of a case, in the columns of :data:`HEADER`."""
    lines = [_operation_line(report, operation) for operation in OPERATIONS]
    return [*lines, *([f"    {host_line(report.host_parts)}"] if report.host_parts else [])]


def _operation_line(report: LowLatencyReport, operation: str) -> str:
    ours = report.figures[OURS][operation]
    spread = _spread(ours["graph"]) if "graph" in ours else ""
    chained, call, host, *phases = (
        _us(ours[kind].statistics.median) if kind in ours else "" for kind in ("chained", "call", "host", *PHASES)
    )
    line = (
        f"{_shape(report.case)} {operation:9}  {spread:>26}  {chained:>8} {call:>8} {host:>8}  "
        f"{phases[0]:>7} {phases[1]:>7}"
    )
    for name in report.figures:
        if name != OURS:
            kinds = [kind for kind in ("graph", "chained") if kind in ours]
            both = " / ".join(_us(report.median(name, operation, kind)) for kind in kinds)
            ratios = " / ".join(
                f"{report.median(name, operation, kind) / report.median(OURS, operation, kind):.2f}x"
                for kind in kinds
            )
            line += f"   {name} {both} ({ratios})"
    return line.rstrip()


def fit_line(key: tuple[str, str, str], fit: Fit) -> str:
    """One line about a fit."""
    name, dtype, kind = key
    return f"{name:11} {dtype:5} pair, {kind}: {fit.constant * 1e6:8.2f} us + {fit.per_token * 1e6:7.4f} us a token"


def comparison_lines(earlier: Mapping[str, Any], reports: Sequence[LowLatencyReport]) -> list[str]:
    """One line a case: how many times as fast as in the earlier file, by contender and operation."""
    before = {json.dumps(entry["case"], sort_keys=True): entry["contenders"] for entry in earlier["cases"]}
    lines = []
    for report in reports:
        contenders = before.get(json.dumps(dataclasses.asdict(report.case), sort_keys=True))
        if contenders is None:
            lines.append(f"{_shape(report.case)}   {NOT_THERE}")
            continue
        parts = []
        for name in report.figures:
            if name in contenders:
                changes = [
                    f"{operation} {then / now:.2f}x ({_us(then)} -> {_us(now)})"
                    for operation in OPERATIONS
                    for then in (contenders[name][operation][report.kind]["median_seconds"],)
                    for now in (report.median(name, operation, report.kind),)
                ]
                parts.append(f"{name} {report.kind}: {', '.join(changes)}")
        lines.append(f"{_shape(report.case)}   {'; '.join(parts)}")
    return lines


def table(reports: Sequence[LowLatencyReport]) -> list[str]:
    """A head, and a line for each case."""
    kind = reports[0].kind
    names = list(dict.fromkeys(name for report in reports for name in report.figures if name != OURS))
    others = "".join(f"  {name:>10}" for name in names)
    lines = [
        f"{'':12}  {'pair, ' + kind:>26}  {'dispatch':>8} {'combine':>8}{others}   "
        f"{'send + receive':^33}   {'bytes of a token (one row for each expert)':^45}".rstrip(),
        f"{'tokens':>6} {'dtype':5}  {'us (10 .. 90 %)':>26}  {'us':>8} {'us':>8}{'':{len(others)}}   "
        f"{'dispatch':^16} {'combine':^16}   {'dispatch':^22} {'combine':^22}".rstrip(),
    ]
    for report in reports:
        ours = report.figures[OURS]
        alone = [_us(report.median(OURS, operation, kind)) for operation in ("dispatch", "combine")]
        rivals = "".join(
            f"  {_us(report.median(name, 'pair', kind)) if name in report.figures else '':>10}" for name in names
        )
        halves, sizes = [], []
        for operation in ("dispatch", "combine"):
            both = " + ".join(_us(ours[operation][phase].statistics.median) for phase in PHASES)
            wire = report.wire_json(operation)
            halves.append(f"{both:^16}")
            sizes.append(
                f"{wire['bytes_per_token']:,.0f} ({wire['bytes_per_token_one_for_each_expert']:,.0f})".center(22)
            )
        lines.append(
            f"{_shape(report.case)}  {_spread(ours['pair'][kind]):>26}  {alone[0]:>8} {alone[1]:>8}{rivals}   "
            f"{halves[0]} {halves[1]}   {sizes[0]} {sizes[1]}".rstrip()
        )
    return lines


def _spread(figure: Figure) -> str:
    found = figure.statistics
    return f"{_us(found.median)} ({_us(found.p10)} .. {_us(found.p90)})"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _shape(case: LowLatencyCase) -> str:
    return f"{case.tokens:6} {case.dtype:5}"
