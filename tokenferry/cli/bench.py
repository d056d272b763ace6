"""``tokenferry bench``: time dispatch and combine between ranks of this machine, beside ``torch.distributed``.

Arguments and orchestration. ``bench_cases`` runs a case on the ranks, ``bench_baseline`` is the other contender,
``bench_report`` and ``bench_plot`` say what came out, ``bench_machine`` what it ran on. GPUs are timed in other ways:
``bench_cuda`` takes over for them, and ``bench_low_latency`` for the low-latency operations of any device.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tokenferry.cli import bench_cuda, bench_low_latency
from tokenferry.cli.bench_cases import (
    ALL_MODES,
    BASELINE,
    CHAINED_PAIRS,
    CLOCKS,
    CUDA_MODES,
    DTYPES,
    EXTRA_MODES,
    MODES,
    ROUTINGS,
    SCALE_BLOCK,
    BenchError,
    Budget,
    Case,
    run_case,
)
from tokenferry.cli.bench_machine import (
    describe_command,
    describe_commit,
    describe_machine,
    describe_versions,
    results_directory,
    usable_cores,
)
from tokenferry.cli.bench_report import (
    BOUNDARY,
    HEADER,
    CaseReport,
    case_line,
    comparison_lines,
    fit_line,
    fits_of,
    load_results,
    machine_differences,
    report_of,
    results_of,
)
from tokenferry.cli.needs import need_folder, need_gpu
from tokenferry.cli.options import number_of_ranks, positive, positive_number
from tokenferry.cli.ranks import RankError, RankPool
from tokenferry.config import ALIGNMENT
from tokenferry.modes.inputs import MAX_TOPK, ROW_ALIGNMENT

_OUTPUT = Path("bench-out")
_DEFAULT_TOKENS = 4096
_DEFAULT_RANKS = 4
_DEFAULT_SMS = 16
_DEFAULT_SECONDS = 2
BESIDE = ("operators", "wait-statistics")
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``tokenferry bench``."""
    parser.set_defaults(fail=parser.error)
    shape = parser.add_argument_group("shape")
    shape.add_argument(
        "--device", type=_device, default="cpu", help="cpu: ranks are processes that share memory; cuda"
    )
    shape.add_argument(
        "--ranks",
        type=number_of_ranks,
        help=f"processes to start (default {_DEFAULT_RANKS}, with cuda one per GPU; more of them share GPUs)",
    )
    shape.add_argument(
        "--nodes",
        type=positive,
        default=1,
        help="groups of ranks that count as nodes, joined by TCP; with cuda by NCCL's network (default 1)",
    )
    size = shape.add_mutually_exclusive_group()
    size.add_argument("--tokens", type=positive, nargs="+", help=f"of each rank (default {_DEFAULT_TOKENS})")
    size.add_argument("--mb", type=positive, nargs="+", help="rows of each rank in MiB, instead of --tokens")
    shape.add_argument("--hidden", type=positive, default=7168, help="elements of a row (default 7168)")
    shape.add_argument("--topk", type=positive, default=8, help="distinct experts of a token (default 8)")
    shape.add_argument("--experts", type=positive, default=256, help="of all ranks (default 256)")
    shape.add_argument(
        "--dtype",
        choices=list(DTYPES),
        nargs="+",
        help="of dispatched rows, several with cuda only (default bf16, with cuda bf16 fp8); "
        f"fp8 has a float32 scale for {SCALE_BLOCK} elements and combines in bf16",
    )
    shape.add_argument(
        "--routing", choices=ROUTINGS, default=ROUTINGS[0], help="others: only to experts of other ranks"
    )
    shape.add_argument("--seed", type=int, default=0, help="of rows and routing (default 0)")
    run = parser.add_argument_group("what to run")
    bench_low_latency.add_arguments(run)
    run.add_argument(
        "--modes",
        choices=list(ALL_MODES),
        nargs="+",
        help=f"(default: all but {', '.join(EXTRA_MODES)}; cached-pair: cuda only)",
    )
    run.add_argument(
        "--beside",
        choices=BESIDE,
        nargs="+",
        default=[],
        help="further contenders. operators: the same through tokenferry.ops (cuda, or low-latency); "
        "wait-statistics: low-latency: the same with statistics of the waits for each rank",
    )
    run.add_argument("--staged", action="store_true", help="cuda: rows in memory that peers cannot open")
    run.add_argument("--sms", type=_sms, nargs="+", help=f"cuda: SMs of an operation (default {_DEFAULT_SMS})")
    run.add_argument(
        "--kernels", action="store_true", help="cuda: ask torch.profiler for the time of each kernel too"
    )
    run.add_argument(
        "--num-nvl-bytes",
        type=_size,
        nargs="+",
        default=[0],
        metavar="BYTES",
        help="ceilings of the stage; 64M means 64 MiB; 0, the default, is the library's own",
    )
    budget = run.add_mutually_exclusive_group()
    budget.add_argument(
        "--seconds",
        type=positive_number,
        help=f"for each case and contender, not in low latency (default {_DEFAULT_SECONDS})",
    )
    budget.add_argument("--iterations", type=positive, help="timed calls of each case and contender")
    run.add_argument(
        "--baseline", action=argparse.BooleanOptionalAction, default=True, help=f"run {BASELINE} too (default: yes)"
    )
    out = parser.add_argument_group("results")
    out.add_argument("--output", type=Path, help=f"directory for the JSON and the PNG file (default {_OUTPUT})")
    out.add_argument(
        "--save",
        metavar="NAME",
        nargs="?",
        const="",
        help="write bench/results/NAME.json and .png of the checkout instead; with cuda NAME may be left out",
    )
    out.add_argument("--draw", type=Path, metavar="FILE.json", help="run nothing; draw a result (cuda, low-latency)")
    out.add_argument("--against", type=Path, metavar="FILE.json", help="compare with an earlier result")
    out.add_argument("--force", action="store_true", help="compare even if the earlier machine was another one")
    out.add_argument("--no-plot", dest="plot", action="store_false", help="write no PNG")


def main(args: argparse.Namespace) -> int:
    """Run ``tokenferry bench``.

    Args:
        args: what :func:`add_arguments` declares.

    Returns:
        0; 1 if a rank failed or the contenders disagree, 130 after Ctrl-C: then what was found before is written.
    """
    if args.draw is not None:
        for given in args.command_line:
            if given.startswith("--") and not given.startswith("--draw"):
                args.fail(f"argument {given}: changes nothing beside --draw")
        return _draw(args)
    if args.save is not None and args.output is not None:
        args.fail(f"argument --output: got {args.output}, which changes nothing beside --save")
    args.output = args.output or _OUTPUT
    if args.force and args.against is None:
        args.fail("argument --force: changes nothing without --against")
    if bench_low_latency.settle(args):
        return _hand_over(args, bench_low_latency)
    _settle(args)
    if args.device == "cuda":
        return _hand_over(args, bench_cuda)
    target = _target(args)
    cases = _cases(args)
    machine, commit = describe_machine(args.device), describe_commit()
    earlier = _earlier(args, machine)
    reports: list[CaseReport] = []
    notes: list[str] = []
    code = 0
    try:
        progress = _need("tqdm").tqdm
        plot = _need("tokenferry.cli.bench_plot") if args.plot else None
        _run(args, cases, machine, progress, reports)
    except (BenchError, RankError, KeyboardInterrupt) as error:
        early, code = bench_cuda.tell_end(error)
        if not reports:
            return code
        notes, plot = [f"ended early: {early.splitlines()[-1]}"], None
    fits = fits_of(reports)
    if fits:
        print("\ntime of a call, fitted over the token counts:")
        for key, fit in fits.items():
            print(fit_line(key, fit))
    if earlier is not None:
        print(f"\nas fast as in {args.against.name} ({earlier.get('date')}), ratio of medians:")
        for line in comparison_lines(earlier, reports):
            print(line)
    results = results_of(
        reports,
        machine,
        describe_versions(),
        git=commit,
        command=describe_command(args.command_line),
        method={
            "boundary": _boundary(),
            "statistic": "over iterations, of the slowest rank of each",
            "threads_per_rank": _threads(args),
        },
        notes=notes,
    )
    directory, name = target
    directory.mkdir(parents=True, exist_ok=True)
    written = [directory / f"{name}.json"]
    written[0].write_text(json.dumps(results, indent=1) + "\n")
    if plot is not None:
        written.append(directory / f"{name}.png")
        plot.draw(reports, machine, written[-1])
    print(f"\nwritten: {', '.join(str(path) for path in written)}")
    return code


def _run(
    args: argparse.Namespace, cases: list[Case], machine: dict[str, Any], progress: Any, reports: list[CaseReport]
) -> None:
    """Run the cases one after the other, print a line for each and add it to the reports."""
    print(f"{_boundary()}\n")
    system = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB"
    where = f" on {args.nodes} nodes, joined by TCP" if args.nodes > 1 else ""
    print(f"{args.ranks} ranks{where} ({_threads(args)} threads each) on {system}, {machine['system']}")
    print(f"top-{args.topk} of {args.experts} experts, {args.routing}\n")
    print(HEADER)
    budget = Budget(args.seconds or _DEFAULT_SECONDS, args.iterations)
    with (
        RankPool(args.ranks, num_threads=_threads(args)) as pool,
        progress(cases, desc="bench", unit="case", file=sys.stderr, leave=False) as bar,
    ):
        for case in bar:
            bar.set_postfix_str(f"{ALL_MODES[case.mode]}, {case.tokens} tokens")
            reports.append(report_of(case, pool.run(run_case, case, budget, args.baseline)))
            bar.write(case_line(reports[-1]), file=sys.stdout)
            sys.stdout.flush()


def _hand_over(args: argparse.Namespace, runner: ModuleType) -> int:
    """Run a benchmark of another module."""
    shapes, target = _shapes(args), _target(args)
    try:
        plot = _need(f"{runner.__name__}_plot") if args.plot else None
    except BenchError as error:
        print(f"tokenferry bench: {error}", file=sys.stderr)
        return 1
    return int(runner.run(args, shapes, target, functools.partial(_earlier, args), plot))


def _draw(args: argparse.Namespace) -> int:
    """Draw an earlier result of GPUs, or of the low-latency mode."""
    path = args.draw.with_suffix(".png")
    try:
        results = load_results(args.draw)
        runner = bench_low_latency if results.get("mode") == bench_low_latency.LOW_LATENCY else bench_cuda
        if runner is bench_cuda and results["machine"]["device"] != "cuda":
            raise ValueError("not a result of --device cuda or --mode low-latency")
        _need(f"{runner.__name__}_plot").draw(results, path)
    except (OSError, ValueError) as error:
        args.fail(f"argument --draw: {args.draw}: {error}")
    except BenchError as error:
        print(f"tokenferry bench: {error}", file=sys.stderr)
        return 1
    print(f"written: {path}")
    return 0


def _settle(args: argparse.Namespace) -> None:
    """Fill in the defaults of the device; ends the program if an argument has no meaning there."""
    if args.device == "cuda":
        if args.seconds is not None:
            args.fail("argument --seconds: with --device cuda; allowed: --iterations")
        if "wait-statistics" in args.beside:
            args.fail("argument --beside: wait-statistics; allowed: with --mode low-latency")
        need_gpu(args)
        num_gpus = torch.cuda.device_count()
        args.ranks = args.ranks or max(num_gpus, args.nodes)
        _check_nodes(args)
        args.dtype = args.dtype or ["bf16", "fp8"]
        args.modes = args.modes or list(CUDA_MODES)
        args.sms = args.sms or [_DEFAULT_SMS]
        return
    args.ranks = args.ranks or _DEFAULT_RANKS
    _check_nodes(args)
    args.dtype = args.dtype or ["bf16"]
    args.modes = args.modes or list(MODES)
    if len(args.dtype) > 1:
        args.fail("argument --dtype: several; allowed: one, or --device cuda")
    for name, given in (
        ("--sms", args.sms is not None),
        ("--kernels", args.kernels),
        ("--save", args.save == ""),
        ("--modes", not {*MODES, *EXTRA_MODES} >= set(args.modes)),
        ("--beside", bool(args.beside)),
        ("--staged", args.staged),
    ):
        if given:
            args.fail(f"argument {name}: needs {'a NAME' if name == '--save' else '--device cuda'}")


def _check_nodes(args: argparse.Namespace) -> None:
    if args.ranks % args.nodes:
        args.fail(f"argument --nodes: {args.nodes}; allowed: a divisor of the {args.ranks} ranks")
    extra = sorted(EXTRA_MODES.keys() & set(args.modes or ()))
    if args.nodes > 1 and extra:
        args.fail(f"argument --modes: {', '.join(extra)}; allowed: on one node")


def _shapes(args: argparse.Namespace) -> list[tuple[str, int]]:
    """The dtypes and token counts; ends the program if the arguments do not fit together."""
    shapes = []
    for dtype in dict.fromkeys(args.dtype):
        row_bytes = args.hidden * DTYPES[dtype].itemsize
        if row_bytes % ROW_ALIGNMENT:
            args.fail(f"argument --hidden: rows of {row_bytes} bytes; allowed: a multiple of {ROW_ALIGNMENT} bytes")
        if dtype == "fp8" and args.hidden % SCALE_BLOCK:
            args.fail(f"argument --hidden: {args.hidden} with fp8; allowed: a multiple of {SCALE_BLOCK}")
        tokens = args.tokens or [_DEFAULT_TOKENS]
        if args.mb:
            tokens = [(size << 20) // row_bytes for size in args.mb]
            if 0 in tokens:
                args.fail(f"argument --mb: less than one row of {row_bytes} bytes")
        shapes += [(dtype, count) for count in tokens]
    if args.experts % args.ranks:
        args.fail(f"argument --experts: {args.experts}; allowed: a multiple of the {args.ranks} ranks")
    if args.topk > min(args.experts, MAX_TOPK):
        args.fail(f"argument --topk: {args.topk}; allowed: at most {min(args.experts, MAX_TOPK)}")
    elsewhere = args.experts - args.experts // args.ranks
    if args.routing == "others" and args.topk > elsewhere:
        args.fail(
            f"argument --routing: others, of whom there are {elsewhere}; allowed: at least the {args.topk} of --topk"
        )
    return shapes


def _cases(args: argparse.Namespace) -> list[Case]:
    """The cases in the order in which they run; ends the program if the arguments do not fit together."""
    return [
        Case(
            mode=mode,
            device=args.device,
            ranks=args.ranks,
            tokens=count,
            hidden=args.hidden,
            dtype=dtype,
            topk=args.topk,
            experts=args.experts,
            num_nvl_bytes=stage,
            seed=args.seed,
            nodes=args.nodes,
            routing=args.routing,
        )
        for (dtype, count), stage, mode in itertools.product(_shapes(args), args.num_nvl_bytes, args.modes)
    ]


def _target(args: argparse.Namespace) -> tuple[Path, str]:
    """Directory and name of the files to write."""
    if args.save is None:
        need_folder(args, "--output", args.output)
        if args.against is not None and args.against.resolve() == (args.output / "bench.json").resolve():
            args.fail(f"argument --against: {args.against}: this run would write over it; allowed: another --output")
        return args.output, "bench"
    directory = results_directory()
    if directory is None:
        args.fail("argument --save: tokenferry is not running from a checkout with bench/results; use --output")
    if Path(args.save).name != args.save or args.save.startswith("."):
        args.fail(f"argument --save: {args.save!r}; allowed: a file name without directory and suffix")
    assert directory is not None
    return directory, args.save


def _earlier(args: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any] | None:
    """The earlier result to compare with; looked at before the run, so that no time is lost on a wrong one."""
    if args.against is None:
        return None
    try:
        earlier = load_results(args.against)
    except (OSError, ValueError) as error:
        args.fail(f"argument --against: {args.against}: {error}")
        raise
    differences = machine_differences(earlier, machine)
    if differences and not args.force:
        args.fail(f"argument --against: another machine ({'; '.join(differences)}); --force compares all the same")
    return earlier


def _threads(args: argparse.Namespace) -> int:
    return max(1, usable_cores() // int(args.ranks))


def _boundary() -> str:
    return BOUNDARY.format(pairs=CHAINED_PAIRS, baseline=BASELINE)


def _need(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        hint = "pip install 'tokenferry[cli]'"
        raise BenchError(f"{error.name} is not installed: {hint} (or --no-plot for matplotlib)") from error


# Types of arguments.


def _size(text: str) -> int:
    digits, factor = (text[:-1], _SUFFIXES[text[-1]]) if text[-1:] in _SUFFIXES else (text, 1)
    if not digits.isdecimal() or int(digits) * factor % ALIGNMENT:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: bytes, a multiple of {ALIGNMENT}, or as 512K, 64M, 1G")
    return int(digits) * factor


def _sms(text: str) -> int:
    if not text.isdecimal() or int(text) == 0 or int(text) % 2:
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: a positive even number")
    return int(text)


def _device(text: str) -> str:
    if text not in (*CLOCKS, "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}; allowed: {', '.join(CLOCKS)} (ranks are CPU processes), cuda")
    return text
