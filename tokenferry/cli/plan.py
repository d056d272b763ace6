"""``tokenferry plan``: predict dispatch and combine on a cluster, from bytes, rates and constants.

``plan_routing`` says where tokens go, ``plan_model`` how long that takes, ``plan_plot`` draws it, and ``plan_check``
sets it beside measured and published figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from tokenferry.cli import plan_check, plan_model
from tokenferry.cli.options import whole
from tokenferry.cli.plan_model import HIGH_THROUGHPUT, MODES, Operation, Plan
from tokenferry.cli.plan_routing import DTYPES, MOST_CHUNKS, Machine, Shape
from tokenferry.config import Config
from tokenferry.errors import ArgumentError

_NOTE = "A prediction, not a measurement. What it leaves out, and how far it was off: docs/planning.md."
_INTERNODE = "Between nodes it was held against two nodes on one machine, never against a real network."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``tokenferry plan``."""
    parser.set_defaults(fail=parser.error)
    machine, shape = Machine(), Shape()
    parser.add_argument("--mode", choices=MODES, help=f"(default {HIGH_THROUGHPUT})")
    cluster = parser.add_argument_group("cluster")
    for name, kind, metavar, what in (
        ("nodes", int, None, "of the cluster"),
        ("gpus_per_node", int, None, "ranks of each"),
        ("nvlink", float, "GB/s", "one direction, pulled over NVLink, as measured on H100"),
        ("network", float, "GB/s", "one direction, of a GPU's network"),
        ("sms", int, None, "of an operation, an even number"),
    ):
        _number(cluster, name, kind, getattr(machine, name), what, metavar)
    cluster.add_argument(
        "--chunks", type=_chunks, help="of an operation between nodes (default: as many as make it shortest)"
    )
    load = parser.add_argument_group("shape")
    for name, kind, what in (
        ("tokens", int, "of each rank"),
        ("hidden", int, "elements of a row"),
        ("topk", int, "distinct experts of a token"),
        ("experts", int, "of all ranks"),
        ("groups", int, "groups of experts, usually one a node"),
        ("skew", float, "experts' popularity is 1 / place ** SKEW; 0: all alike"),
        ("seed", int, "of popularity and of tokens that are sampled"),
    ):
        _number(load, name, kind, getattr(shape, name), what)
    load.add_argument("--topk-groups", type=int, help="groups that a token may choose from (default: all)")
    load.add_argument("--dtype", choices=DTYPES, help="of dispatched rows; combine is bf16 (default bf16)")
    out = parser.add_argument_group("output")
    out.add_argument(
        "--check",
        nargs="*",
        type=Path,
        metavar="FILE.json",
        help="predict nothing; set the model beside measured and published figures, and results of tokenferry bench",
    )
    out.add_argument("--json", action="store_true", help="print JSON instead of tables")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="draw times over ranks or tokens")
    out.add_argument("--over", choices=("ranks", "tokens"), help="x of the picture (default ranks)")


def _number(group: Any, name: str, kind: type, default: float, what: str, metavar: str | None = None) -> None:
    shown = f"{what} (default {default:g})"
    group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=shown)


def _chunks(text: str) -> int:
    return whole(text, 1, MOST_CHUNKS)


def main(args: argparse.Namespace) -> int:
    """Print the prediction, or the check.

    Returns:
        0; 1 if the model is farther from a figure than is expected of its kind.
    """
    if args.check is not None:
        return _check(args)
    if args.topk_groups is None:
        args.topk_groups = args.groups
    machine, shape = Machine(**_fields(args, Machine)), Shape(**_fields(args, Shape))
    mode, over = args.mode or HIGH_THROUGHPUT, args.over or "ranks"
    _refuse_what_changes_nothing(args, machine, shape, mode, over)
    try:
        plan = plan_model.predict(machine, shape, mode)
    except ArgumentError as error:
        name = error.name.replace("_", "-")
        args.fail(f"argument --{name}{str(error).removeprefix(error.name)}")
    if args.plot is not None:
        try:
            from tokenferry.cli import plan_plot
        except ImportError as error:
            args.fail(f"argument --plot: {error}; pip install 'tokenferry[cli]'")
        try:
            plan_plot.draw(plan, over, args.plot)
        except (OSError, ValueError) as error:
            args.fail(f"argument --plot: {error}")
        print(f"wrote {args.plot}", file=sys.stderr)
    print(json.dumps(as_dict(plan), indent=1) if args.json else "\n".join(lines(plan)))
    return 0


def _fields(args: argparse.Namespace, kind: Any) -> dict[str, Any]:
    """What was given of a machine or a shape; the rest has its defaults there."""
    given = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}
    return {name: value for name, value in given.items() if value is not None}


def _refuse_what_changes_nothing(
    args: argparse.Namespace, machine: Machine, shape: Shape, mode: str, over: str
) -> None:
    """End the program if an argument was given that has no meaning beside the others."""
    one_node = machine.nodes == 1 and (args.plot is None or over == "tokens")
    counted = shape.skew == 0 and shape.topk_groups == shape.groups
    for name, idle, allowed in (
        ("over", args.plot is None, "with --plot"),
        ("sms", mode != HIGH_THROUGHPUT, f"with --mode {HIGH_THROUGHPUT}"),
        ("chunks", mode != HIGH_THROUGHPUT, f"with --mode {HIGH_THROUGHPUT}"),
        ("chunks", one_node, "with --nodes above 1"),
        ("network", one_node, "with --nodes above 1"),
        ("nvlink", machine.gpus_per_node == 1, "with --gpus-per-node above 1"),
        ("seed", counted, "with --skew, or --topk-groups below --groups: else nothing is random"),
    ):
        if idle and getattr(args, name) is not None:
            args.fail(f"argument --{name}: got {getattr(args, name)}, which changes nothing; allowed: {allowed}")


def _check(args: argparse.Namespace) -> int:
    names = [field.name for kind in (Machine, Shape) for field in dataclasses.fields(kind)]
    for name in ("mode", *names, "plot", "over"):
        if getattr(args, name) is not None:
            given = f"--{name.replace('_', '-')}: got {getattr(args, name)}"
            args.fail(f"argument {given}, which changes nothing beside --check; allowed: --json")
    rows = plan_check.built_in_rows()
    for path in args.check:
        try:
            rows += plan_check.rows_of_file(path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            args.fail(f"argument --check: {path}: {error!r}")
    print(json.dumps([row.as_dict() for row in rows], indent=1) if args.json else "\n".join(plan_check.table(rows)))
    return 0 if all(row.is_within for row in rows) else 1


def describe(machine: Machine, shape: Shape) -> str:
    """The case in a line."""
    groups = f" in {shape.topk_groups} of {shape.groups} groups" if shape.topk_groups < shape.groups else ""
    skew = f", skew {shape.skew:g}" if shape.skew else ""
    return (
        f"{machine.ranks} ranks ({machine.nodes} x {machine.gpus_per_node}), {shape.tokens:,} "
        f"token{'s' * (shape.tokens > 1)} each, hidden {shape.hidden}, {shape.dtype}, "
        f"top-{shape.topk} of {shape.experts} experts{groups}{skew}"
    )


def lines(plan: Plan) -> list[str]:
    """What is printed of a prediction."""
    machine, routing = plan.machine, plan.routing
    how = f"{routing.samples} sampled tokens, standard errors {routing.ranks_error:.2g} and {routing.nodes_error:.2g}"
    how = how if routing.samples else "exact"
    result = [
        describe(machine, plan.shape),
        f"a token goes to {routing.ranks:.2f} ranks on {routing.nodes:.2f} nodes ({how})",
    ]
    if plan.shape.skew:
        mean = routing.ranks / machine.ranks
        times, error = routing.busiest_rank / mean, routing.busiest_error / mean
        result.append(f"the busiest rank gets {times:.2f} times the mean (standard error {error:.2g})")
    result += ["", f"{'':24}{'rows a rank':>12}{'busiest':>12}{'MB, busiest':>13}{'GB/s':>8}{'us':>11}"]
    for operation in plan.operations:
        result += _operation_lines(operation)
    total = sum(plan.memory.values()) / 2**20
    result.append(f"memory of a rank, MiB: {' + '.join(_mebibytes(plan))} = {total:,.1f}")
    if plan.configs:
        sms = [dataclasses.replace(machine, sms=config.num_sms) for config in plan.configs]
        pairs = [plan_model.high_throughput(one, plan.shape, routing) for one in sms]
        for number, (config, pair) in enumerate(zip(plan.configs, pairs, strict=True)):
            time = pair[number].seconds * 1e6
            result.append(f"recommended for {pair[number].name}: {_show_config(config, machine)}, {time:,.1f} us")
    return [*result, "", _NOTE, *([_INTERNODE] if machine.nodes > 1 else [])]


def _operation_lines(operation: Operation) -> list[str]:
    name = operation.name
    text = [
        f"{name:14}{hop.name:10}{hop.rows:12,.0f}{hop.busiest_rows:12,.0f}"
        f"{hop.busiest_rows * hop.row_bytes / 1e6:13,.1f}{hop.rate:8,.0f}{hop.seconds * 1e6:11,.1f}"
        for hop in operation.hops
    ]
    chunks = f" in {operation.chunks} chunks" if operation.chunks > 1 else ""
    return [
        *text,
        f"{name:14}{'latency':10}{'':45}{operation.latency * 1e6:11,.1f}",
        f"{name:14}{'TOTAL':10}{'':45}{operation.seconds * 1e6:11,.1f}  limit: {operation.bottleneck}{chunks}",
        "",
    ]


def _show_config(config: Config, machine: Machine) -> str:
    ring = config.num_max_rdma_chunked_recv_tokens
    return (
        f"Config(num_sms={config.num_sms}{f', num_max_rdma_chunked_recv_tokens={ring}' if machine.nodes > 1 else ''})"
    )


def _mebibytes(plan: Plan) -> list[str]:
    return [f"{name} {nbytes / 2**20:,.1f}" for name, nbytes in plan.memory.items()]


def as_dict(plan: Plan) -> dict[str, Any]:
    """The prediction as JSON, in seconds and bytes."""
    operations = {
        one.name: {
            "seconds": one.seconds,
            "latency_seconds": one.latency,
            "bottleneck": one.bottleneck,
            "chunks": one.chunks,
            "hops": {
                hop.name.lower(): hop._asdict() | {"bytes": hop.rows * hop.row_bytes, "seconds": hop.seconds}
                for hop in one.hops
            },
        }
        for one in plan.operations
    }
    configs = zip(("dispatch", "combine"), plan.configs, strict=False)
    return {
        "note": f"{_NOTE} {_INTERNODE}" if plan.machine.nodes > 1 else _NOTE,
        "mode": plan.mode,
        "machine": dataclasses.asdict(plan.machine),
        "shape": dataclasses.asdict(plan.shape),
        "routing": plan.routing._asdict(),
        "operations": operations,
        "configs": {name: dataclasses.asdict(config) for name, config in configs},
        "memory_bytes": plan.memory,
    }
