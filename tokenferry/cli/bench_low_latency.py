"""``tokenferry bench --mode low-latency``: the arguments, the ranks, the cases, and what is written.

``bench_low_latency_cases`` runs on the ranks, ``bench_low_latency_report`` and ``bench_low_latency_plot`` say what
came out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tokenferry.cli.bench_cases import BASELINE, BenchError
from tokenferry.cli.bench_cuda import tell_end
from tokenferry.cli.bench_cuda_cases import DEEPEP, take_device
from tokenferry.cli.bench_cuda_report import shared_note
from tokenferry.cli.bench_low_latency_cases import (
    CPU_EFFORT,
    DTYPES,
    WAIT_STATISTICS,
    Effort,
    LowLatencyCase,
    run_cases,
)
from tokenferry.cli.bench_low_latency_report import (
    HEADER,
    LowLatencyReport,
    boundary,
    case_lines,
    comparison_lines,
    fit_line,
    fits_json,
    fits_of,
    report_of,
    table,
)
from tokenferry.cli.bench_machine import (
    describe_command,
    describe_commit,
    describe_gpus,
    describe_machine,
    describe_versions,
    usable_cores,
)
from tokenferry.cli.bench_operators import OPERATORS
from tokenferry.cli.bench_report import origin_of
from tokenferry.cli.mps import MpsError, sharing_gpus
from tokenferry.cli.needs import need_gpu
from tokenferry.cli.options import positive
from tokenferry.cli.ranks import RankError, RankPool

HIGH_THROUGHPUT = "high-throughput"
LOW_LATENCY = "low-latency"
TOKENS = tuple(1 << power for power in range(10))
"""Of a rank, where no others are asked for: 1, 2, 4 to 512."""
FEWEST_MAX_TOKENS = 128
CONTENDERS = {"operators": OPERATORS, "wait-statistics": WAIT_STATISTICS}
"""By their names in ``--beside``."""
_FEWEST_RANKS = 2


def add_arguments(group: Any) -> None:
    """Declare the choice of the mode, and the arguments of this one.

    Args:
        group: of arguments.
    """
    group.add_argument(
        "--mode",
        choices=[HIGH_THROUGHPUT, LOW_LATENCY],
        default=HIGH_THROUGHPUT,
        help=f"default {HIGH_THROUGHPUT}; {LOW_LATENCY}: operations of decoding, by default with {' '.join(DTYPES)}, "
        f"{TOKENS[0]} to {TOKENS[-1]} tokens, and one rank per GPU or {_FEWEST_RANKS}",
    )
    group.add_argument(
        "--max-tokens",
        type=positive,
        help=f"{LOW_LATENCY}: num_max_dispatch_tokens_per_rank (default: the tokens, at least {FEWEST_MAX_TOKENS})",
    )
    group.add_argument("--exact", action="store_true", help=f"{LOW_LATENCY}: combine sends every row (exact_combine)")
    group.add_argument(
        "--host-profile",
        action="store_true",
        help=f"{LOW_LATENCY}: where the host's time in a pair goes, by cProfile",
    )


def settle(args: argparse.Namespace) -> bool:
    """Fill in the defaults of this mode; ends the program if an argument has no meaning in the mode that is chosen.

    Returns:
        Whether this mode is chosen.
    """
    chosen = bool(args.mode == LOW_LATENCY)
    with_it = (
        ("--max-tokens", args.max_tokens is not None),
        ("--exact", args.exact),
        ("--host-profile", args.host_profile),
    )
    without_it = (
        ("--modes", args.modes is not None),
        ("--mb", args.mb is not None),
        ("--sms", args.sms is not None),
        ("--kernels", args.kernels),
        ("--nodes", args.nodes > 1),
        ("--num-nvl-bytes", args.num_nvl_bytes != [0]),
        ("--seconds", args.seconds is not None),
        ("--routing", args.routing != "uniform"),
        ("--staged", args.staged),
    )
    for name, given in without_it if chosen else with_it:
        if given:
            args.fail(f"argument {name}: has no meaning with --mode {args.mode}")
    if chosen:
        _settle(args)
    return chosen


def _settle(args: argparse.Namespace) -> None:
    for dtype in args.dtype or ():
        if dtype not in DTYPES:
            args.fail(f"argument --dtype: {dtype} with --mode {LOW_LATENCY}; allowed: {', '.join(DTYPES)}")
    need_gpu(args)
    num_gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    args.ranks = args.ranks or max(_FEWEST_RANKS, num_gpus)
    args.tokens = sorted(set(args.tokens or TOKENS))
    args.dtype = args.dtype or list(DTYPES)
    if args.max_tokens is not None and args.max_tokens < args.tokens[-1]:
        args.fail(f"argument --max-tokens: {args.max_tokens}; allowed: at least the {args.tokens[-1]} of --tokens")


def run(
    args: argparse.Namespace,
    shapes: Sequence[tuple[str, int]],
    target: tuple[Path, str],
    earlier_of: Callable[[dict[str, Any]], dict[str, Any] | None],
    plot: ModuleType | None,
) -> int:
    """Run the low-latency benchmark.

    Args:
        args: what :func:`tokenferry.cli.bench.add_arguments` declares, settled.
        shapes: (dtype, tokens of a rank) of the cases.
        target: directory and name of the files to write; an empty name is made up.
        earlier_of: from the machine to the results to compare with, or None.
        plot: :mod:`tokenferry.cli.bench_low_latency_plot`, or None.

    Returns:
        0; 1 if a rank failed or a result is wrong, 130 after Ctrl-C: then what was found before is written.
    """
    effort, commit = (Effort() if args.device == "cuda" else CPU_EFFORT).limited(args.iterations), describe_commit()
    effort = effort._replace(host_profile=args.host_profile)
    groups = groups_of(args, shapes)
    num_gpus = torch.cuda.device_count() if args.device == "cuda" else 0
    threads = 1 if num_gpus else max(1, usable_cores() // args.ranks)
    versions = describe_versions()
    reports: list[LowLatencyReport] = []
    early, code = "", 0
    try:
        with sharing_gpus(0 < num_gpus < args.ranks), RankPool(args.ranks, num_threads=threads) as pool:
            machine, deep_ep = describe_machine(args.device), ""
            if num_gpus:
                devices = pool.run(take_device)
                machine.update(describe_gpus(devices, num_gpus))
                versions.update(devices[0]["versions"])
                deep_ep = devices[0]["deep_ep"]
            earlier = earlier_of(machine)
            rivals, notes = choose_rivals(machine, deep_ep, args.baseline)
            rivals += [CONTENDERS[name] for name in args.beside]
            _introduce(args, machine, notes, effort)
            for cases in groups:
                found = pool.run(run_cases, cases, groups[-1][-1], effort, rivals, None)
                for name, why in found[0][-1].left_out.items():
                    rivals.remove(name)
                    notes.append(f"{name} left out: it failed on {why}")
                    print(notes[-1])
                for case, *of_case in zip(cases, *found, strict=True):
                    reports.append(report_of(case, of_case))
                    print("\n".join(case_lines(reports[-1])), flush=True)
    except (BenchError, MpsError, RankError, KeyboardInterrupt) as error:
        early, code = tell_end(error)
        if not reports:
            return code
        notes.append(f"ended early: {early.splitlines()[-1]}")
    results = {
        **origin_of(machine, versions),
        "mode": LOW_LATENCY,
        "git": commit,
        "command": describe_command(args.command_line),
        "method": {
            "boundary": boundary(args.device, effort),
            "statistic": "over samples, of the slowest rank of each",
            "fit": "constant + a token's time, the relative errors least in the mean square",
            **effort._asdict(),
            "threads_per_rank": threads,
        },
        "notes": notes,
        "cases": [report.to_json() for report in reports],
        "fits": fits_json(reports),
    }
    written = _write(results, file_of(target, args, machine), None if early else plot)
    print(f"\nwritten: {', '.join(str(path) for path in written)}")
    if earlier is not None:
        print(f"\nas fast as in {args.against.name} ({earlier.get('date')}), ratio of medians:")
        print("\n".join(comparison_lines(earlier, reports)))
    _conclude(reports, machine)
    return code


def groups_of(args: argparse.Namespace, shapes: Sequence[tuple[str, int]]) -> list[list[LowLatencyCase]]:
    """The cases in the order in which they run; those of a group need one Buffer, those of the last the largest."""
    cases = [
        LowLatencyCase(
            device=args.device,
            ranks=args.ranks,
            tokens=tokens,
            max_tokens=args.max_tokens or max(tokens, FEWEST_MAX_TOKENS),
            hidden=args.hidden,
            dtype=dtype,
            topk=args.topk,
            experts=args.experts,
            exact=args.exact or args.device != "cuda",
            seed=args.seed,
        )
        for dtype, tokens in sorted(shapes, key=lambda shape: shape[1])
    ]
    return [list(group) for _, group in itertools.groupby(cases, key=lambda case: case.max_tokens)]


def choose_rivals(machine: Mapping[str, Any], deep_ep: str, wanted: bool) -> tuple[list[str], list[str]]:
    """The contenders beside tokenferry, and what is to be said about the run.

    Args:
        machine: with the entries of :func:`tokenferry.cli.bench_machine.describe_gpus`, if ranks are on GPUs.
        deep_ep: "yes" if DeepEP can be imported, else why not.
        wanted: whether there are to be any.
    """
    if machine["device"] != "cuda":
        return [], ["ranks are processes of one CPU: no claim of speed"]
    notes = [shared_note(machine)] if machine["ranks_share_gpus"] else []
    if not wanted:
        return [], [*notes, "no other contenders: --no-baseline"]
    if machine["ranks_share_gpus"]:
        return [], [*notes, f"{BASELINE} (NCCL) and {DEEPEP} left out: they need a GPU for each rank"]
    notes.append(f"{BASELINE}: all_gather, all_to_all_single (NCCL) of a fixed size, rows in bf16")
    if deep_ep != "yes":
        return [BASELINE], [*notes, f"{DEEPEP} left out: deep_ep {deep_ep}"]
    notes.append(f"{DEEPEP}: the code that calls it here was never run before; check its figures")
    return [BASELINE, DEEPEP], notes


def file_of(target: tuple[Path, str], args: argparse.Namespace, machine: Mapping[str, Any]) -> Path:
    """The JSON file to write: where none is named, after the device, the ranks and the mode."""
    directory, name = target
    if args.save is None:
        return directory / f"{name}-{LOW_LATENCY}.json"
    if name:
        return directory / f"{name}.json"
    device = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", "cpu").lower().removeprefix("nvidia ")).strip("-")
    parts = [re.sub(r"-\d+gb.*", "", device), f"{args.ranks}ranks"]
    parts += ["shared"] if machine.get("ranks_share_gpus") else []
    parts += [LOW_LATENCY, *(["exact"] if args.exact else [])]
    return directory / f"{'-'.join(parts)}.json"


def _write(results: Mapping[str, Any], path: Path, plot: ModuleType | None) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    if plot is None:
        return [path]
    plot.draw(results, path.with_suffix(".png"))
    return [path, path.with_suffix(".png")]


def _introduce(args: argparse.Namespace, machine: Mapping[str, Any], notes: Sequence[str], effort: Effort) -> None:
    """Print what is run on what."""
    print(f"{boundary(args.device, effort)}\n")
    gpus = f"{machine['gpus']} x {machine['gpu']} ({machine['gpu_sms']} SMs), " if "gpus" in machine else ""
    print(f"{args.ranks} ranks on {gpus}{machine['cpu']}, {machine['cores']} cores, {machine['system']}")
    print(f"hidden {args.hidden}, top-{args.topk} of {args.experts} experts, uniform")
    most = args.max_tokens or f"that of the tokens, at least {FEWEST_MAX_TOKENS}"
    sent = "every row" if args.exact or args.device != "cuda" else "a sum for each rank"
    print(f"num_max_dispatch_tokens_per_rank: {most}; combine sends {sent}")
    print("\n".join(notes))
    print(f"\n{HEADER}", flush=True)


def _conclude(reports: Sequence[LowLatencyReport], machine: Mapping[str, Any]) -> None:
    """Print what came out."""
    fits = fits_of(reports)
    if fits:
        print("\ntime of a pair, fitted over the token counts, relative errors least in the mean square:")
        for key, fit in fits.items():
            print(fit_line(key, fit))
    if machine.get("ranks_share_gpus"):
        print(f"\n{shared_note(machine)}")
    print("", *table(reports), sep="\n")
