"""``tokenferry bench --device cuda``: the ranks on their GPUs, the cases, and what is written.

``bench_cuda_cases`` runs on the ranks, ``bench_cuda_report`` and ``bench_cuda_plot`` say what came out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tokenferry.cli import INTERRUPTED
from tokenferry.cli.bench_cases import BASELINE, BenchError
from tokenferry.cli.bench_cuda_cases import (
    BARE,
    DEEPEP,
    DEEPEP_DTYPES,
    DEEPEP_RANKS,
    NODES_EFFORT,
    STAGED,
    CudaCase,
    CudaRankResult,
    Effort,
    run_cases,
    take_device,
)
from tokenferry.cli.bench_cuda_report import (
    BOUNDARY,
    FEWER,
    HEADER,
    CudaReport,
    case_line,
    comparison_lines,
    kernel_line,
    report_of,
    shared_note,
)
from tokenferry.cli.bench_machine import (
    describe_command,
    describe_commit,
    describe_gpus,
    describe_machine,
    describe_versions,
)
from tokenferry.cli.bench_operators import OPERATORS
from tokenferry.cli.bench_report import origin_of
from tokenferry.cli.mps import MpsError, sharing_gpus
from tokenferry.cli.ranks import RankError, RankPool
from tokenferry.construction import choose_carrier
from tokenferry.rail import PROCESS_GROUP

STAGED_NOTE = f"{STAGED}: peers cannot open such memory, so that all rows pass through the stage"
OTHERS_NOTE = "tokens go to experts of other ranks only: every row crosses"
_ALIKE = ("layout", "combine")
"""Modes in which fp8 is the same as bf16."""


def run(
    args: argparse.Namespace,
    shapes: Sequence[tuple[str, int]],
    target: tuple[Path, str],
    earlier_of: Callable[[dict[str, Any]], dict[str, Any] | None],
    plot: ModuleType | None,
) -> int:
    """Run the benchmark on GPUs.

    Args:
        args: what :func:`tokenferry.cli.bench.add_arguments` declares, with the defaults of GPUs filled in.
        shapes: (dtype, tokens of a rank) of the cases.
        target: directory and name of the files to write; an empty name is made up.
        earlier_of: from the machine to the results to compare with, or None.
        plot: :mod:`tokenferry.cli.bench_cuda_plot`, or None.

    Returns:
        0; 1 if a rank failed or the contenders disagree, 130 after Ctrl-C: then what was found before is written.
    """
    effort = _effort(args)
    num_gpus, commit = torch.cuda.device_count(), describe_commit()
    reports: list[CudaReport] = []
    early, code = "", 0
    try:
        with sharing_gpus(args.ranks > num_gpus), RankPool(args.ranks, num_threads=1) as pool:
            devices = pool.run(take_device, args.nodes, args.staged)
            machine = {**describe_machine("cuda"), **describe_gpus(devices, num_gpus)}
            earlier = earlier_of(machine)
            rivals, notes = choose_rivals({**machine, "nodes": args.nodes}, devices[0]["deep_ep"], args.baseline)
            rivals += [OPERATORS] if "operators" in args.beside else []
            notes += [STAGED_NOTE] if args.staged else []
            notes += [OTHERS_NOTE] if args.routing == "others" else []
            _introduce(args, machine, notes, effort)
            for cases in groups_of(args, shapes):
                usable = [name for name in rivals if name != DEEPEP or cases[0].dtype in DEEPEP_DTYPES]
                for report in _reports(cases, pool.run(run_cases, cases, effort, usable, None)):
                    print(case_line(report))
                    if report.kernels:
                        print(kernel_line(report))
                    reports.append(report)
                sys.stdout.flush()
    except (BenchError, MpsError, RankError, KeyboardInterrupt) as error:
        early, code = tell_end(error)
        if not reports:
            return code
        notes.append(f"ended early: {early.splitlines()[-1]}")
    if machine["ranks_share_gpus"]:
        print(f"\n{shared_note(machine)}")
    if earlier is not None:
        print(f"\nas fast as in {args.against.name} ({earlier.get('date')}), ratio of medians:")
        for line in comparison_lines(earlier, reports):
            print(line)
    versions = {**describe_versions(), **devices[0]["versions"]}
    results = results_of(reports, machine, versions, commit, args.command_line, notes, effort)
    directory, name = target
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / f"{name or file_name(machine, reports)}.json"]
    written[0].write_text(json.dumps(results, indent=1) + "\n")
    if plot is not None and not early:
        written.append(written[0].with_suffix(".png"))
        plot.draw(results, written[-1])
    print(f"\nwritten: {', '.join(str(path) for path in written)}")
    return code


def tell_end(error: BaseException) -> tuple[str, int]:
    """Print why a run ended early, and return it with the exit code."""
    is_interrupt = isinstance(error, KeyboardInterrupt)
    early = "interrupted" if is_interrupt else str(error)
    print(early if is_interrupt else f"tokenferry bench: {early}", file=sys.stderr)
    return early, INTERRUPTED if is_interrupt else 1


def groups_of(args: argparse.Namespace, shapes: Sequence[tuple[str, int]]) -> list[list[CudaCase]]:
    """The cases in the order in which they run; those of a group need one Buffer and one workload."""
    groups = []
    for (dtype, tokens), stage in itertools.product(shapes, args.num_nvl_bytes):
        known = _ALIKE if dtype == "fp8" and ("bf16", tokens) in shapes else ()
        modes = [mode for mode in args.modes if mode not in known]
        chosen = [(mode, sms) for mode in modes for sms in (args.sms if mode != "layout" else [0])]
        group = [
            CudaCase(
                mode=mode,
                device="cuda",
                ranks=args.ranks,
                tokens=tokens,
                hidden=args.hidden,
                dtype=dtype,
                topk=args.topk,
                experts=args.experts,
                num_nvl_bytes=stage,
                seed=args.seed,
                sms=sms,
                nodes=args.nodes,
                routing=args.routing,
            )
            for mode, sms in chosen
        ]
        if group:
            groups.append(group)
    return groups


def choose_rivals(machine: Mapping[str, Any], deep_ep: str, wanted: bool) -> tuple[list[str], list[str]]:
    """The contenders beside tokenferry, and why others are left out.

    Args:
        machine: with the entries of :func:`tokenferry.cli.bench_machine.describe_gpus`, and ``nodes``.
        deep_ep: "yes" if DeepEP can be imported, else why not.
        wanted: whether there are to be any.
    """
    if not wanted:
        return [], ["no other contenders: --no-baseline"]
    nodes, per_node = machine["nodes"], machine["ranks"] // machine["nodes"]
    if nodes > 1 and per_node <= max(machine["gpus"] // nodes, 1):
        notes = ["nodes are groups of ranks of this machine: NCCL goes between them through its network transport"]
        if (carrier := choose_carrier(None, torch.device("cuda"))) != PROCESS_GROUP:
            here = "nodes are groups of ranks of this machine, and rows go between them"
            return [], [
                f"{here} through {carrier}: {BASELINE} left out, whose NCCL goes through its network transport"
            ]
        return [BASELINE, BARE] if per_node == 1 else [BASELINE], notes
    if machine["ranks_share_gpus"]:
        return [], [f"{BASELINE} (NCCL) and {DEEPEP} left out: NCCL refuses ranks that share a GPU"]
    if deep_ep != "yes":
        return [BASELINE], [f"{DEEPEP} left out: deep_ep {deep_ep}"]
    if machine["ranks"] not in DEEPEP_RANKS:
        return [BASELINE], [f"{DEEPEP} left out: it runs {', '.join(map(str, DEEPEP_RANKS))} ranks on a node"]
    return [BASELINE, DEEPEP], [f"{DEEPEP}: the code that calls it here was never run before; check its figures"]


def results_of(
    reports: Sequence[CudaReport],
    machine: Mapping[str, Any],
    versions: Mapping[str, str],
    commit: Mapping[str, Any] | None,
    command: Sequence[str],
    notes: Sequence[str],
    effort: Effort,
) -> dict[str, Any]:
    """The JSON file."""
    shared = [shared_note(machine)] if machine["ranks_share_gpus"] else []
    return {
        **origin_of(machine, versions),
        "git": commit,
        "command": describe_command(command),
        "method": {
            "boundary": _boundary(effort),
            "statistic": "over samples, of the slowest rank of each",
            "calls": effort.calls,
            "stretches": effort.stretches,
            "chain": effort.chain,
            "least_chain": effort.least_chain,
            "chained_tokens": effort.chained_tokens,
            "ahead": effort.ahead,
        },
        "notes": [*shared, *notes],
        "cases": [report.to_json() for report in reports],
    }


def file_name(machine: Mapping[str, Any], reports: Sequence[CudaReport]) -> str:
    """A name for a result: the device, the ranks, and what varies."""
    device = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower().removeprefix("nvidia ")).strip("-")
    parts = [device, f"{machine['ranks']}ranks"]
    if reports[0].case.nodes > 1:
        parts.append(f"{reports[0].case.nodes}nodes")
    if machine["ranks_share_gpus"]:
        parts.append("shared")
    if machine.get("gpu_allocator") == STAGED:
        parts.append("staged")
    if reports[0].case.routing != "uniform":
        parts.append(reports[0].case.routing)
    tokens = {report.case.tokens for report in reports}
    parts.append("tokens" if len(tokens) > 1 else f"{next(iter(tokens))}tokens")
    if len({report.case.sms for report in reports if report.case.sms}) > 1:
        parts.append("sms")
    return "-".join(parts)


def _reports(cases: Sequence[CudaCase], results: Sequence[Sequence[CudaRankResult]]) -> list[CudaReport]:
    return [report_of(case, of_case) for case, of_case in zip(cases, zip(*results, strict=True), strict=True)]


def _introduce(args: argparse.Namespace, machine: Mapping[str, Any], notes: Sequence[str], effort: Effort) -> None:
    """Print what is run on what."""
    print(f"{_boundary(effort)}\n")
    gpus = f"{machine['gpus']} x {machine['gpu']} ({machine['gpu_sms']} SMs)"
    print(f"{args.ranks} ranks on {gpus}, {machine['cpu']}, {machine['cores']} cores, {machine['system']}")
    print(f"hidden {args.hidden}, top-{args.topk} of {args.experts} experts, {args.routing}; times in microseconds")
    for note in notes:
        print(note)
    if machine["ranks_share_gpus"]:
        print(shared_note(machine))
    print(f"\n{HEADER}", flush=True)


def _effort(args: argparse.Namespace) -> Effort:
    effort = (NODES_EFFORT if args.nodes > 1 else Effort())._replace(kernels=args.kernels)
    if not args.iterations:
        return effort
    return effort._replace(calls=args.iterations, stretches=min(effort.stretches, args.iterations))


def _boundary(effort: Effort) -> str:
    given = effort._asdict()
    fewer = FEWER.format(**given) if effort.chain > effort.least_chain else ""
    return BOUNDARY.format(**given, fewer=fewer, baseline=BASELINE)
