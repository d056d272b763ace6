"""``tokenferry plan --check``: the model beside what was measured, counted or published.

Every row says what kind of figure it is beside; :data:`KINDS` says what errors are expected of that kind, and why.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenferry.cli.bench_cuda_cases import BARE
from tokenferry.cli.plan_model import (
    CHOICE_BYTES,
    LOW_LATENCY,
    REDUCING_SM_GBPS,
    SM_GBPS,
    Operation,
    high_throughput,
    low_latency,
    predict,
)
from tokenferry.cli.plan_routing import Machine, Shape, route

KINDS: dict[str, tuple[float, float, str]] = {
    "copy": (-5, 10, "copies of 14336-byte rows between two H100, with kernels that do nothing else"),
    "bytes": (-3, 3, "counted in runs of tokenferry bench"),
    "kernel": (-35, 20, "tokenferry's kernels, one rank alone on an H100: no row crosses a link"),
    "nvlink": (-30, 30, "tokenferry between two and four H200, in a row or in CUDA graphs (bench/results)"),
    "published": (-35, 30, "DeepEP's README (H800, 160 GB/s of NVLink, 400 Gb/s adapters, 24 SMs)"),
    "claim": (-45, 15, "by third parties, settings as far as known"),
    "rival": (-85, 10, "other protocols between the same two H100, 64 SMs: what the model hopes to gain"),
    "run": (-100, 1000, "tokenferry bench on GPUs of their own"),
    "nodes": (-20, 5, "tokenferry bench on nodes of one GPU, by the rate that the bare exchange has there"),
}
"""Errors in percent, least and most, and what the figures are."""
_FEWEST_DRAWN = 128
"""Tokens of all ranks whose bytes are held against their mean: of a few the draw differs from it by some percent."""
_H800_NVLINK, _H800_SMS = 160.0, 24
_B200_NVLINK = 646.0
"""Twice that of an H100; not measured."""


class CheckRow(NamedTuple):
    """A figure beside the model's."""

    kind: str
    """A key of :data:`KINDS`."""
    name: str
    figure: float
    model: float
    unit: str

    @property
    def error(self) -> float:
        """Percent of the figure."""
        return 100 * (self.model / self.figure - 1)

    @property
    def is_within(self) -> bool:
        """Whether the error is as expected of the kind."""
        least, most, _ = KINDS[self.kind]
        return least <= self.error <= most

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self._asdict() | {"error_percent": self.error, "is_within": self.is_within}


def built_in_rows() -> list[CheckRow]:
    """All figures that the check knows without a file."""
    own = *_copies(), *_kernels(), *_over_nvlink()
    return [*own, *_published(), *_published_low_latency(), *_claims(), *_rivals()]


def _times(kind: str, what: str, operations: tuple[Operation, ...], figures: tuple[float, ...]) -> list[CheckRow]:
    """Microseconds of dispatch and combine."""
    return [
        CheckRow(kind, f"{what} {operation.name}", figure, operation.seconds * 1e6, "us")
        for operation, figure in zip(operations, figures, strict=True)
    ]


def _together(kind: str, name: str, operations: Iterable[Operation], figure: float) -> CheckRow:
    """Microseconds of operations one after the other."""
    return CheckRow(kind, name, figure, sum(operation.seconds for operation in operations) * 1e6, "us")


def _copies() -> Iterator[CheckRow]:
    link = Machine().nvlink
    for sms, rate in ((2, 98), (4, 195), (8, 322), (16, 323), (64, 322)):
        yield CheckRow("copy", f"pull by index over NVLink, {sms} SMs", rate, min(sms * SM_GBPS, link), "GB/s")
    for sms, rate in ((2, 98), (8, 381), (16, 730)):
        yield CheckRow("copy", f"local copy, {sms} SMs", rate, sms * SM_GBPS, "GB/s")
    yield CheckRow("copy", "4096 rows over NVLink, 8 SMs", 182, 4096 * 14336 / (min(8 * SM_GBPS, link) * 1e3), "us")
    reducing = min(12 * REDUCING_SM_GBPS, link)
    yield CheckRow("copy", "pull and sum over NVLink, 12 SMs", 323, reducing, "GB/s")


def _kernels() -> Iterator[CheckRow]:
    for tokens, figure in ((1, 14.6), (16, 15.4), (128, 24.0)):
        pair = predict(Machine(1, 1), Shape(tokens=tokens, dtype="fp8"), LOW_LATENCY).operations[:2]
        yield _together("kernel", f"low latency, pair in a graph, T = {tokens}", pair, figure)


_NVLINK: tuple[tuple[int, int, str, int | None, int | None], ...] = (
    (2, 16, "bf16", 204, 192), (2, 12, "bf16", None, 213), (2, 8, "bf16", None, 311), (2, 16, "fp8", 119, None),
    (4, 16, "bf16", 539, 517),
)  # fmt: skip
"""Ranks, SMs, dtype; microseconds of a dispatch and a combine. By hand: FP8, and combines with 8 and 12 SMs."""
_NVLINK_PAIRS = (
    (2, 16, "fp8", 19.2), (2, 128, "fp8", 33.3), (2, 512, "fp8", 88.3), (2, 16, "bf16", 18.9), (2, 128, "bf16", 36.4),
    (4, 16, "fp8", 30.4), (4, 128, "fp8", 60.6), (4, 512, "fp8", 193.2), (4, 128, "bf16", 68.2),
)  # fmt: skip
"""Ranks, tokens, dtype; microseconds of a low-latency pair."""


def _over_nvlink() -> Iterator[CheckRow]:
    for ranks, sms, dtype, *figures in _NVLINK:
        pair = predict(Machine(1, ranks, sms=sms), Shape(dtype=dtype)).operations
        for operation, figure in zip(pair, figures, strict=True):
            if figure is not None:
                yield from _times("nvlink", f"{ranks} ranks, {sms} SMs, {dtype}", (operation,), (figure,))
    for ranks, tokens, dtype, microseconds in _NVLINK_PAIRS:
        quick = predict(Machine(1, ranks), Shape(tokens=tokens, dtype=dtype), LOW_LATENCY).operations[:2]
        yield _together("nvlink", f"{ranks} ranks, low latency, pair, T = {tokens}, {dtype}", quick, microseconds)


def _published() -> Iterator[CheckRow]:
    """Times from their GB/s: bytes of rows received (one node), or of rows for all nodes, the own one included."""
    for nodes, rates in ((1, (153, 158)), (2, (43, 43)), (4, (58, 57)), (8, (51, 50))):
        shape = Shape(dtype="fp8", groups=nodes, topk_groups=min(nodes, 4))
        plan = predict(Machine(nodes, 8, nvlink=_H800_NVLINK, sms=_H800_SMS), shape)
        copies = plan.routing.ranks if nodes == 1 else plan.routing.nodes
        sizes = zip((shape.row_bytes, shape.combine_row_bytes), rates, strict=True)
        figures = tuple(shape.tokens * copies * row / (rate * 1e3) for row, rate in sizes)
        yield from _times("published", f"EP{8 * nodes}", plan.operations, figures)


def _low_latency(machine: Machine, shape: Shape) -> tuple[Operation, Operation]:
    """As DeepEP sends: a row for each (token, expert)."""
    return low_latency(machine, shape, route(machine, shape), per_expert=True)


def _published_low_latency() -> Iterator[CheckRow]:
    times = {1: (77, 114), 2: (118, 195), 4: (155, 273), 8: (173, 314), 16: (192, 369), 32: (194, 360)}
    for nodes, figures in times.items():
        pair = _low_latency(Machine(nodes, 8, nvlink=_H800_NVLINK), Shape(tokens=128, dtype="fp8"))
        yield from _times("published", f"EP{8 * nodes} low latency,", pair, figures)


def _claims() -> Iterator[CheckRow]:
    yield from _times("claim", "8 x H100, DeepEP V1, 20 SMs,", predict(Machine(), Shape()).operations, (1005, 1155))
    b200 = predict(Machine(nvlink=_B200_NVLINK, sms=64), Shape(tokens=8192)).operations
    for name, figures in (("DeepEP V2", (1048, 990)), ("TileScale", (890, 954))):
        yield from _times("claim", f"8 x B200, {name},", b200, figures)
    pair = _low_latency(Machine(), Shape(tokens=128, dtype="fp8"))
    yield from _times("claim", "8 x H100, DeepEP low latency,", pair, (42.6, 72.0))


def _rivals() -> Iterator[CheckRow]:
    pair = predict(Machine(1, 2, sms=64), Shape()).operations
    for name, figures in (("DeepEP V1", (405, 341)), ("DeepEP V2", (396, 355)), ("NCCL", (912, 1050))):
        yield from _times("rival", f"{name}, call,", pair, figures)
    for dtype, tokens, figure in (("fp8", 16, 35.1), ("bf16", 16, 36.4), ("fp8", 128, 73.5), ("bf16", 128, 86.2)):
        both = _low_latency(Machine(1, 2), Shape(tokens=tokens, dtype=dtype))
        yield _together("rival", f"DeepEP low latency, pair, T = {tokens}, {dtype}", both, figure)


# Files of tokenferry bench.


def rows_of_file(path: Path) -> list[CheckRow]:
    """What a result file of ``tokenferry bench`` has: bytes, and times where every rank had a GPU of its own.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
        ArgumentError: its numbers do not fit the model.
    """
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or "cases" not in results:
        raise ValueError("not a result file of tokenferry bench")
    alone = results["machine"]["device"] == "cuda" and not results["machine"]["ranks_share_gpus"]
    rows = []
    for entry in results["cases"]:
        of_case = _low_latency_case if "wire" in entry else _case
        rows += list(of_case(entry, alone))
    return rows


def _case(entry: Mapping[str, Any], alone: bool) -> Iterator[CheckRow]:
    case = entry["case"]
    if case.get("routing", "uniform") != "uniform":
        return  # the model is of uniform routing
    machine, shape = _parts(case)
    bare = entry["contenders"].get(BARE)
    if machine.nodes > 1 and bare is not None:
        rate = entry["wire_bytes_per_rank"] / bare["chained"]["median_seconds"]
        machine = dataclasses.replace(machine, network=rate / 1e9)
    routing = route(machine, shape)
    pair = high_throughput(machine, shape, routing)
    name = f"{machine.ranks} ranks, {shape.tokens} x {shape.hidden} {shape.dtype}"
    if machine.nodes > 1:
        name = f"{machine.nodes} nodes, {name}"
    choices = shape.topk * CHOICE_BYTES
    crosses_once = machine.nodes == 1 or machine.gpus_per_node == 1  # else rails carry less than the ranks exchange
    if case["mode"] in ("dispatch", "combine") and crosses_once:
        dispatched = case["mode"] == "dispatch"
        row = shape.row_bytes + choices if dispatched else shape.combine_row_bytes
        network, nvlink, _ = pair[0].hops
        crossing = (network.rows + nvlink.rows) * row
        yield CheckRow("bytes", f"{name}: {case['mode']}", entry["wire_bytes_per_rank"] / 1e6, crossing / 1e6, "MB")
        if dispatched:
            received = shape.tokens * routing.ranks * row
            logical = entry["logical_bytes_per_rank"]
            yield CheckRow("bytes", f"{name}: with its own", logical / 1e6, received / 1e6, "MB")
    models = {"dispatch": pair[:1], "combine": pair[1:], "pair": pair}
    kind = "run" if machine.nodes == 1 else "nodes"
    if alone and case["mode"] in models and (machine.nodes == 1 or bare is not None):
        measured = entry["contenders"]["tokenferry"]["chained"]["median_seconds"] * 1e6
        yield _together(kind, f"{name}, {machine.sms} SMs: {case['mode']}", models[case["mode"]], measured)


def _low_latency_case(entry: Mapping[str, Any], alone: bool) -> Iterator[CheckRow]:
    case = entry["case"]
    machine, shape = _parts(case)
    routing = route(machine, shape)
    pair = low_latency(machine, shape, routing)
    if case["exact"]:
        pair = pair[0], low_latency(machine, shape, routing, per_expert=True)[1]
    name = f"{machine.ranks} ranks, low latency, {shape.tokens} x {shape.hidden} {shape.dtype}"
    for operation, row in zip(pair, (shape.row_bytes, shape.combine_row_bytes), strict=True):
        if shape.tokens * machine.ranks < _FEWEST_DRAWN:
            break
        counted = entry["wire"][operation.name]["bytes_per_token"] / 1e3
        model = operation.hops[1].rows * row / shape.tokens / 1e3
        yield CheckRow("bytes", f"{name}: {operation.name}, a token", counted, model, "KB")
    if alone:
        for what, operations in (("dispatch", pair[:1]), ("combine", pair[1:]), ("pair", pair)):
            measured = entry["contenders"]["tokenferry"][what]["graph"]["median_seconds"] * 1e6
            yield _together("run", f"{name}: {what}", operations, measured)


def _parts(case: Mapping[str, Any]) -> tuple[Machine, Shape]:
    """Machine and shape of a case."""
    shape = Shape(case["tokens"], case["hidden"], case["dtype"], case["topk"], case["experts"])
    nodes = case.get("nodes", 1)
    return Machine(nodes, case["ranks"] // nodes, sms=case.get("sms") or Machine().sms), shape


def table(rows: list[CheckRow]) -> list[str]:
    """The check as text, and for each kind what errors there are."""
    width = max(len(row.name) for row in rows)
    text = [f"{'':{width}}{'figure':>10}{'model':>10}{'':6}{'error %':>8}  kind"]
    text += [
        f"{row.name:{width}}{_show(row.figure):>10}{_show(row.model):>10} {row.unit:5}{row.error:+8.1f}  {row.kind}"
        f"{'' if row.is_within else '  NOT AS EXPECTED'}"
        for row in rows
    ]
    text.append("")
    for kind, (least, most, what) in KINDS.items():
        errors = [row.error for row in rows if row.kind == kind]
        if errors:
            mean = sum(map(abs, errors)) / len(errors)
            spread = f"{min(errors):+.1f} to {max(errors):+.1f} %, {mean:.1f} % in the mean"
            expected = "" if kind == "run" else f" (expected: {least:+g} to {most:+g} %)"
            text.append(f"{kind:10}{spread}{expected}: {what}")
    return text


def _show(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"
