"""What has to be shown, and where it stands in the results of :mod:`phases`.

One table, :data:`BARS`. A figure is looked up in the JSON files that the steps left; one that is missing was not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

OURS, BASELINE, BARE, DEEPEP = "tokenferry", "torch.distributed", "all_to_all_single", "DeepEP V1"
MODES = {"cached": "cached dispatch", "combine": "combine"}
OPERATORS, WAIT_STATISTICS = "tokenferry.ops", "with wait statistics"


SWEEP = tuple(128 << power for power in range(10))


class Scale(NamedTuple):
    """The sizes of a run; smaller ones where ranks are processes of one CPU."""

    tokens: int = 4096
    hidden: int = 7168
    sms: int = 16
    sweep: tuple[int, ...] = SWEEP
    """Of token counts."""
    few: int = 16
    many: int = 128
    """Tokens in decoding."""
    fewest_sms: int = 8

    @property
    def stages(self) -> list[int]:
        """Ceilings of the stage; the third is 2.2 times the rows of a rank."""
        rows = self.tokens * self.hidden * 2
        return [32 << 20, 64 << 20, self.enough, *(-(-part * rows // 128) * 128 for part in (4, 8))]

    @property
    def enough(self) -> int:
        return -(-22 * self.tokens * self.hidden * 2 // 10 // 128) * 128


OF_RECORD = (4, 8)
"""Ranks whose figures are of record: tests are those of as many, there are more tokens, one start will do."""
GPUS = Scale()
CPUS = Scale(64, 256, 0, (16, 32, 64), 1, 16, 0)


class Measured(NamedTuple):
    """A figure of one start; no value: the step ran, but left none."""

    value: float | None
    text: str = ""
    """To show instead of the value."""


class Start:
    """What one start of the steps left.

    Args:
        steps: by name, entries of ``record.json``.
        scale: of the run.
    """

    def __init__(self, steps: Mapping[str, Mapping[str, Any]], scale: Scale) -> None:
        self.steps, self.scale = steps, scale

    def cases(self, step: str, **where: Any) -> Iterator[Mapping[str, Any]]:
        """Entries of the step's JSON file for cases with these fields."""
        results = self.steps.get(step, {}).get("results") or {"cases": []}
        for entry in results["cases"]:
            if all(entry["case"].get(name) in (value, None) for name, value in where.items()):
                yield entry

    def high(self, kind: str, contender: str = OURS, *, step: str = "ruler", **where: Any) -> float | None:
        """Seconds of an operation of high throughput."""
        scale = self.scale
        wanted = {"tokens": scale.tokens, "sms": scale.sms, "dtype": "bf16", **where}
        if not scale.sms:
            wanted.pop("sms")
        for entry in self.cases(step, **wanted):
            return _seconds(entry["contenders"].get(contender), kind)
        return None

    def low(self, operation: str, kind: str, tokens: int, dtype: str, contender: str = OURS) -> float | None:
        """Seconds of an operation of low latency; without GPUs chained calls stand for a graph."""
        for entry in self.cases("low latency", tokens=tokens, dtype=dtype):
            kinds = entry["contenders"].get(contender, {}).get(operation, {})
            found = kinds.get(kind) or (kinds.get("chained") if kind == "graph" else None)
            return None if found is None else float(found["median_seconds"])
        return None

    def fit(self, dtype: str) -> tuple[float, float] | None:
        """Constant and seconds a token of the low-latency pair."""
        results = self.steps.get("low latency", {}).get("results") or {}
        for fit in results.get("fits", ()):
            if (fit["contender"], fit["dtype"]) == (OURS, dtype):
                return fit["constant_seconds"], fit["seconds_per_token"]
        return None

    def status(self, step: str) -> str | None:
        return self.steps[step]["status"] if step in self.steps else None

    def output(self, step: str) -> str:
        """The end of what the step printed."""
        return str(self.steps.get(step, {}).get("output", ""))


def _seconds(kinds: Mapping[str, Any] | None, kind: str) -> float | None:
    if kinds is None:
        return None
    if "median_seconds" in kinds:  # CPU ranks have one way of timing
        return float(kinds["median_seconds"]) if kind != "host" else None
    return float(kinds[kind]["median_seconds"]) if kind in kinds else None


Find = Callable[[Start], "float | Measured | None"]


class Bar(NamedTuple):
    """A line of the table."""

    group: str
    name: str
    unit: str
    limit: float | None
    """None: shown, not judged."""
    find: Find
    at_least: bool = False
    gpus: int = 2
    """GPUs, one for each rank, that the limit is for; 0: it holds everywhere."""


# Ways to find a figure.


def microseconds(find: Callable[[Start], float | None]) -> Find:
    def found(start: Start) -> float | None:
        seconds = find(start)
        return None if seconds is None else seconds * 1e6

    return found


def high(kind: str, mode: str, contender: str = OURS, **where: Any) -> Find:
    return microseconds(lambda start: start.high(kind, contender, mode=mode, **where))


def low(operation: str, kind: str, tokens: str, dtype: str, contender: str = OURS) -> Find:
    return microseconds(lambda start: start.low(operation, kind, getattr(start.scale, tokens), dtype, contender))


def difference(one: Find, other: Find) -> Find:
    def found(start: Start) -> float | None:
        first, second = one(start), other(start)
        return None if first is None or second is None else first - second  # type: ignore[operator]

    return found


def quotient(one: Find, other: Find) -> Find:
    def found(start: Start) -> float | None:
        first, second = one(start), other(start)
        return None if first is None or not second else first / second  # type: ignore[operator]

    return found


def largest(found: Sequence[float | None]) -> float | None:
    return None if None in found or not found else max(found)  # type: ignore[type-var]


def pull_rate(start: Start) -> float | None:
    """GB/s of the kernel that moves the rows, every one of which crosses: the best with 8 to 12 SMs."""
    rates = []
    for entry in start.cases("wire", mode="cached"):
        longest = max(entry.get("kernel_seconds", {}).values(), default=None)
        if longest is not None and entry["case"]["sms"] <= 12:
            rates.append(entry["wire_bytes_per_rank"] / longest / 1e9)
    return max(rates, default=None)


def own_memory(start: Start) -> float | None:
    taken = [entry["heap_bytes_per_rank"] for step in ("ruler", "tokens") for entry in start.cases(step)]
    return max(taken, default=None) and max(taken) / 1e6


def rise_per_token(start: Start) -> Measured | None:
    """By how much the time of a token rises at most from a token count to the next: 1 is not at all."""
    worst, where = None, ""
    for mode in ("dispatch", "combine", "pair"):
        times = [start.high("chained", step="tokens", mode=mode, tokens=count) for count in start.scale.sweep]
        if None in times:
            return None
        each = [time / count for time, count in zip(times, start.scale.sweep, strict=True)]  # type: ignore[operator]
        for before, after, count in zip(each, each[1:], start.scale.sweep[1:], strict=False):
            if worst is None or after / before > worst:
                worst, where = after / before, f"{mode} at {count}"
    return None if worst is None else Measured(worst, f"{worst:.3f} ({where})")


def small_stage(start: Start) -> float | None:
    """Staged: the pair with a stage of 2.2 times the rows, over the best with any."""
    times = {
        entry["case"]["num_nvl_bytes"]: _seconds(entry["contenders"].get(OURS), "chained")
        for entry in start.cases("staged", mode="pair", **({"sms": start.scale.sms} if start.scale.sms else {}))
    }
    with_it = times.get(start.scale.enough)
    return None if with_it is None else with_it / min(time for time in times.values() if time is not None)


def staged(mode: str) -> Find:
    return lambda start: high("chained", mode, step="staged", num_nvl_bytes=start.scale.enough)(start)


def off_the_line(start: Start) -> float | None:
    """The largest deviation of a low-latency pair from its line, in % of the time."""
    worst = None
    for dtype in ("fp8", "bf16"):
        fit = start.fit(dtype)
        for entry in start.cases("low latency", dtype=dtype) if fit else ():
            tokens = entry["case"]["tokens"]
            time = start.low("pair", "graph", tokens, dtype)
            if time:
                worst = max(worst or 0.0, abs(fit[0] + fit[1] * tokens - time) / time * 100)  # type: ignore[index]
    return worst


def fitted(dtype: str, part: int) -> Find:
    return microseconds(lambda start: fit[part] if (fit := start.fit(dtype)) else None)


def bytes_of_a_token(operation: str, dtype: str) -> Find:
    def found(start: Start) -> float | None:
        for entry in start.cases("low latency", tokens=start.scale.many, dtype=dtype):
            return float(entry["wire"][operation]["bytes_per_token"])
        return None

    return found


def rail_share(start: Start) -> Measured | None:
    """The rate of the bytes alone that a call reaches, in %: the least of the calls that move rows one way."""
    shares = {}
    for mode in ("dispatch", "cached", "combine"):
        ours, bare = (start.high("chained", name, step="nodes", mode=mode) for name in (OURS, BARE))
        if ours is None or bare is None:
            return None
        shares[mode] = bare / ours * 100
    least = min(shares, key=lambda mode: shares[mode])
    return Measured(shares[least], f"{shares[least]:.1f} % ({least})")


def tests(step: str) -> Find:
    """How many tests went wrong."""

    def found(start: Start) -> Measured | None:
        status = start.status(step)
        if status is None:
            return None
        told = re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", _last(start.output(step)))
        counts = {what.rstrip("s"): int(number) for number, what in told}
        wrong = counts.get("failed", 0) + counts.get("error", 0)
        ran = counts.get("passed", 0) + wrong
        if status != "ok" and not wrong:
            return Measured(None, f"{status}, {wrong} of {ran}" if ran else status)
        return Measured(float(wrong) if ran else None, f"{wrong} of {ran}, {counts.get('skipped', 0)} skipped")

    return found


def _last(output: str) -> str:
    lines = [line for line in output.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    return lines[-1] if lines else ""


CHECKS = ("high-throughput", "low-latency", "expert-major", "operators", "stage", "nodes", "rail")
"""Of tests/gpu/sanitize.py."""


def sanitized(tool: str) -> Find:
    """How many of the checks that ran were not clean."""

    def found(start: Start) -> Measured | None:
        statuses = [start.status(f"{tool} {check}") for check in CHECKS]
        ran = [status for status in statuses if status is not None]
        bad = [f"{check}: {told}" for check, told in zip(CHECKS, statuses, strict=True) if told not in ("ok", None)]
        if not ran:
            return None
        return Measured(float(len(bad)), ", ".join(bad) or f"0 of {len(ran)}")

    return found


def kernels_missed(tool: str) -> Find:
    """How many kernels no clean check has run."""

    def found(start: Start) -> Measured | None:
        names: set[str] = set()
        total = 0
        for check in CHECKS:
            line = re.search(r"^kernels, of (\d+): (.*)$", start.output(f"{tool} {check}"), re.MULTILINE)
            if line and start.status(f"{tool} {check}") == "ok":
                total = int(line[1])
                names.update(line[2].split())
        return Measured(total - len(names), f"{len(names)} of {total} run") if total else None

    return found


def passed(step: str, about: str = "") -> Find:
    """0 if the step ended well, else 1."""

    def found(start: Start) -> Measured | None:
        status = start.status(step)
        if status is None:
            return None
        told = re.search(about, start.output(step)) if about else None
        return Measured(float(status != "ok"), told[0] if told and status == "ok" else status)

    return found


# The table.

_HT, _LL, _NODES, _TESTS, _EIGHT = "high throughput", "low latency", "between nodes", "correctness", "8 GPUs"

BARS: tuple[Bar, ...] = (
    Bar(_HT, "chained pair, bf16, 16 SMs", "us", 430, high("chained", "pair")),
    Bar(_HT, "the same, the further goal", "us", 400, high("chained", "pair")),
    Bar(_HT, "chained cached pair, bf16, 16 SMs", "us", 385, high("chained", "cached-pair")),
    Bar(_HT, "dispatch call, bf16, 16 SMs", "us", 260, high("call", "dispatch")),
    Bar(_HT, "dispatch call, fp8, 16 SMs", "us", 170, high("call", "dispatch", dtype="fp8")),
    Bar(_HT, "cached dispatch call, bf16, 16 SMs", "us", 215, high("call", "cached")),
    Bar(_HT, "combine call, bf16, 16 SMs", "us", 220, high("call", "combine")),
    Bar(_HT, "wire rate of the pull kernel, 8 to 12 SMs", "GB/s", 310, pull_rate, True),
    Bar(_HT, "own GPU memory at any number of tokens", "MB", 64, own_memory),
    Bar(_HT, "rise of the time of a token, 128 to 65536 (2 % noise)", "x", 1.02, rise_per_token),
    Bar(_HT, "host of a cached dispatch", "us", 40, high("host", "cached")),
    Bar(_HT, "host of a combine", "us", 40, high("host", "combine")),
    Bar(_HT, "staged: pair, stage of 2.2 T rows", "us", None, staged("pair")),
    Bar(_HT, "staged: cached pair, stage of 2.2 T rows", "us", None, staged("cached-pair")),
    Bar(_HT, "staged: that stage beside the best", "x", 1.05, small_stage),
    Bar(_HT, "expert-major dispatch call, bf16, 24 SMs", "us", 330, high("call", "expanded", step="extras", sms=24)),
    *(Bar(_HT, f"operator adds to the host, {MODES[mode]}", "us", 10,
          difference(high("host", mode, OPERATORS, step="extras"), high("host", mode, step="extras")))
      for mode in MODES),
    Bar(_HT, "torch.distributed (NCCL): chained pair", "us", None, high("chained", "pair", BASELINE)),
    Bar(_HT, "chained pair so much faster than it", "x", None,
        quotient(high("chained", "pair", BASELINE), high("chained", "pair")), True),
    Bar(_HT, "DeepEP V1: chained pair, 24 SMs", "us", None, high("chained", "pair", DEEPEP, sms=24)),
    Bar(_LL, "pair in a graph, fp8 dispatch, 16 tokens", "us", 20, low("pair", "graph", "few", "fp8")),
    Bar(_LL, "pair in a graph, fp8 dispatch, 128 tokens", "us", 35, low("pair", "graph", "many", "fp8")),
    Bar(_LL, "pair in a graph, bf16 dispatch, 16 tokens", "us", 22, low("pair", "graph", "few", "bf16")),
    Bar(_LL, "pair in a graph, bf16 dispatch, 128 tokens", "us", 40, low("pair", "graph", "many", "bf16")),
    Bar(_LL, "eager chained pair, fp8, 16 tokens", "us", 45, low("pair", "chained", "few", "fp8")),
    Bar(_LL, "  host of it", "us", None, low("pair", "host", "few", "fp8")),
    Bar(_LL, "  host of its dispatch", "us", None, low("dispatch", "host", "few", "fp8")),
    Bar(_LL, "  host of its combine", "us", None, low("combine", "host", "few", "fp8")),
    *(Bar(_LL, f"line over 1 to 512 tokens, {dtype}: {what}", "us", None, fitted(dtype, part))
      for dtype in ("fp8", "bf16") for part, what in enumerate(("constant", "a token"))),
    Bar(_LL, "largest deviation from the line", "%", None, off_the_line),
    *(Bar(_LL, f"bytes of a token that leave a rank, {operation} {dtype}", "B", None,
          bytes_of_a_token(operation, dtype))
      for operation, dtype in (("dispatch", "fp8"), ("dispatch", "bf16"), ("combine", "bf16"))),
    *(Bar(_LL, f"{operation} {phase}, fp8, {count} tokens", "us", None, low(operation, phase, name, "fp8"))
      for name, count in (("few", 16), ("many", 128))
      for operation in ("dispatch", "combine") for phase in ("send", "receive")),
    *(Bar(_LL, f"low-latency operator adds to the host, {operation}", "us", 10,
          difference(low(operation, "host", "few", "fp8", OPERATORS), low(operation, "host", "few", "fp8")))
      for operation in ("dispatch", "combine")),
    Bar(_LL, "wait statistics add to a pair in a graph, 16 tokens", "us", 0.5,
        difference(low("pair", "graph", "few", "fp8", WAIT_STATISTICS), low("pair", "graph", "few", "fp8"))),
    Bar(_LL, "NCCL: pair in a graph, 16 tokens", "us", None, low("pair", "graph", "few", "bf16", BASELINE)),
    Bar(_LL, "DeepEP V1: pair in a graph, fp8, 16 tokens", "us", None, low("pair", "graph", "few", "fp8", DEEPEP)),
    Bar(_NODES, "rail, of the rate of a bare all_to_all_single", "%", 90, rail_share, True),
    Bar(_NODES, "dispatch beside the slower hop", "x", 1.15,
        quotient(high("chained", "dispatch", step="nodes"), high("chained", "dispatch", BARE, step="nodes"))),
    Bar(_NODES, "dispatch", "us", None, high("chained", "dispatch", step="nodes")),
    Bar(_NODES, "torch.distributed (NCCL): dispatch", "us", None,
        high("chained", "dispatch", BASELINE, step="nodes")),
    Bar(_TESTS, "tests that fail, a GPU for each rank", "", 0, tests("tests"), gpus=0),
    Bar(_TESTS, "tests that fail, ranks share GPUs", "", 0, tests("shared tests"), gpus=0),
    Bar(_TESTS, "stress tests that fail, a GPU for each rank", "", 0, tests("stress"), gpus=0),
    Bar(_TESTS, "stress tests that fail, ranks share GPUs", "", 0, tests("shared stress"), gpus=0),
    *(bar for tool in ("memcheck", "racecheck") for bar in (
        Bar(_TESTS, f"{tool}: checks that are not clean", "", 0, sanitized(tool), gpus=0),
        Bar(_TESTS, f"{tool}: kernels that it has not seen", "", 0, kernels_missed(tool), gpus=0))),
    Bar(_TESTS, "soak", "", 0, passed("soak", r"\d+ on each rank"), gpus=0),
    Bar(_EIGHT, "dispatch call, bf16, 24 SMs", "us", 850, high("call", "dispatch", sms=24), gpus=8),
    Bar(_EIGHT, "combine call, bf16, 24 SMs", "us", 900, high("call", "combine", sms=24), gpus=8),
    Bar(_EIGHT, "low-latency pair in a graph, fp8, 16", "us", 35, low("pair", "graph", "few", "fp8"), gpus=8),
    Bar(_EIGHT, "low-latency pair in a graph, fp8, 128", "us", 80, low("pair", "graph", "many", "fp8"), gpus=8),
)  # fmt: skip
"""Everything that has to be shown."""


TWICE = ("ruler", "low latency")
"""Steps whose figures need two starts to be believed."""


class Row(NamedTuple):
    """A bar, and what was found."""

    group: str
    name: str
    bar: str
    measured: str
    spread: str
    verdict: str
    """``met``, ``MISSED``, ``not run``; empty: nothing to judge."""


def rows_of(starts: Sequence[Start], gpus: int, judged: bool = True) -> list[Row]:
    """The table.

    Args:
        starts: separate starts of the same steps; the worst of them counts.
        gpus: GPUs with one rank each; 0: ranks share them.
        judged: whether anything is; not on CPU ranks.
    """
    rows = [_row(bar, starts, gpus, judged) for bar in BARS if bar.gpus != 8 or gpus == 8]
    count = min(sum(bool(start.steps.get(step, {}).get("results")) for start in starts) for step in TWICE)
    judged = judged and gpus not in OF_RECORD
    verdict = "" if not judged else "met" if count > 1 else "MISSED" if count else "not run"
    return [*rows, Row("starts", f"of {' and '.join(TWICE)}", ">= 2" if judged else "", str(count), "", verdict)]


def _row(bar: Bar, starts: Sequence[Start], gpus: int, judged: bool) -> Row:
    counts = judged and bar.limit is not None and bar.gpus in (0, gpus)
    text = f"{'>=' if bar.at_least else '<='} {bar.limit:g} {bar.unit}".rstrip() if counts else ""
    answers = [answer for start in starts if (answer := bar.find(start)) is not None]
    found = [answer if isinstance(answer, Measured) else Measured(answer) for answer in answers]
    if not found:
        return Row(bar.group, bar.name, text, "", "", "not run")
    without = [one for one in found if one.value is None]
    values = [one.value for one in found if one.value is not None]
    if without:
        return Row(bar.group, bar.name, text, without[0].text, "", "MISSED" if counts else "")
    worst = (min if bar.at_least else max)(found, key=lambda one: one.value)  # type: ignore[arg-type, return-value]
    shown = worst.text or f"{worst.value:.4g} {bar.unit}".rstrip()
    spread = ""
    if len(values) > 1 and min(values) > 0 and bar.unit:
        spread = f"{(max(values) / min(values) - 1) * 100:.1f} %"
    verdict = ""
    if counts:
        reached = worst.value >= bar.limit if bar.at_least else worst.value <= bar.limit  # type: ignore[operator]
        verdict = "met" if reached else "MISSED"
    return Row(bar.group, bar.name, text, shown, spread, verdict)


def host_lines(starts: Sequence[Start]) -> list[str]:
    """Where the host's time in an eager low-latency pair goes, in the first start that knows."""
    for start in starts:
        for entry in start.cases("low latency", tokens=start.scale.few, dtype="fp8"):
            parts = entry.get("host_parts", [])
            shown = [f"{part['where']} {part['seconds'] * 1e6:.1f} ({part['calls']:.3g}x)" for part in parts[:12]]
            if parts:
                total = sum(part["seconds"] for part in parts) * 1e6
                about = f"host of a pair, fp8, {start.scale.few} tokens, {total:.1f} us under cProfile"
                return [f"{about}: {', '.join(shown)}"]
    return []


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'requirement':54} {'bar':>12}  {'measured':24} {'spread':>8}  "]
    group = ""
    for row in rows:
        if row.group != group:
            group = row.group
            lines.append(f"-- {group}")
        lines.append(f"{row.name:54} {row.bar:>12}  {row.measured:24} {row.spread:>8}  {row.verdict}".rstrip())
    counted = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("met", "MISSED", "not run")}
    lines.append("measured: the worst start; spread: by how much the largest of the starts is above the least")
    lines.append(", ".join(f"{count} {verdict}" for verdict, count in counted.items()))
    return "\n".join(lines)
