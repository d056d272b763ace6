"""``tokenferry demo``: train a small Mixture-of-Experts language model, its experts spread over ranks.

The ranks are processes of this machine; forward and backward go through :mod:`tokenferry.nn`. A dense twin of the
model, one process and no tokenferry, runs the first steps too, and the demo fails unless the two agree.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch

from tokenferry.cli.demo_model import Corpus, Settings
from tokenferry.cli.demo_train import TOLERANCE, Report, train, train_dense
from tokenferry.cli.needs import need_folder
from tokenferry.cli.options import natural, number_of_ranks, positive
from tokenferry.cli.ranks import RankError, RankPool

_MIN_EXPERTS = 8
_THREADS = 1
"""Of torch, in every process: the matrices are small, and threads that wait for each other on busy cores cost more
than they bring."""
_PRELOAD = ("torch._dynamo",)
"""What torch's optimizers import: two seconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo.

    Args:
        parser: to declare them on.
    """
    parser.set_defaults(fail=parser.error)
    parser.add_argument("--ranks", type=number_of_ranks, default=4, help="processes to start (default: %(default)s)")
    parser.add_argument(
        "--steps", type=positive, default=Settings().steps, help="training steps (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=natural, default=0, help="of parameters, batches and the sample (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("demo-out"), help="folder for the picture (default: %(default)s)"
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no picture: needs tqdm, but no matplotlib")


def main(args: argparse.Namespace) -> int:
    """Run the demo.

    Args:
        args: parsed options, see :func:`add_arguments`.

    Returns:
        0; 1 if the ranks disagree with the dense twin or a rank failed; 2 if a package is missing.
    """
    missing = [
        name
        for name in ("tqdm", *(() if args.no_plot else ("matplotlib",)))
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        print(f"the demo needs {' and '.join(missing)}: pip install 'tokenferry[cli]'", file=sys.stderr)
        return 2
    if not args.no_plot:
        need_folder(args, "--output", args.output)
    # Every rank has as many experts as every other.
    experts = args.ranks * -(-_MIN_EXPERTS // args.ranks)
    settings = Settings(steps=args.steps, seed=args.seed, experts=experts)
    try:
        return _run(settings, args.ranks, None if args.no_plot else args.output)
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(settings: Settings, num_ranks: int, output: Path | None) -> int:
    began = time.perf_counter()
    with RankPool(num_ranks, num_threads=_THREADS, preload=_PRELOAD) as pool:
        corpus = Corpus(settings)
        print(
            f"{num_ranks} ranks train a transformer of {settings.layers} layers on {corpus.train.numel():,} "
            f"characters of Python's help texts.\nEach layer has {settings.experts} experts, "
            f"{settings.experts // num_ranks} on each rank, and sends every token to {settings.topk} of them.",
            flush=True,
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(_THREADS)
        twin = train_dense(settings, corpus, min(settings.steps, settings.checked_steps))
        torch.set_num_threads(threads)
        reports = pool.run(train, settings, twin)
    first: Report = reports[0]
    if not first.agreed:
        print(
            f"error: the ranks and their dense twin differ by more than a relative {TOLERANCE:.0e}; see the table",
            file=sys.stderr,
        )
        return 1
    baselines = {"unigram": corpus.unigram_loss(), "bigram": corpus.bigram_loss()}
    tokens = [report.tokens_sent for report in reports]
    megabytes = traffic(settings, tokens)
    print(_traffic_table(tokens, megabytes))
    print(_learned(first, baselines))
    print(f"\nThe model writes:\n{_indented(first.sample)}\n")
    if output is not None:
        from tokenferry.cli.demo_plot import draw

        path = draw(output, settings, reports, twin, baselines, megabytes)
        print(f"picture: {path}")
    print(f"total: {time.perf_counter() - began:.0f} s")
    return 0


def traffic(settings: Settings, tokens: list[list[int]]) -> list[list[float]]:
    """Megabytes (10^6 bytes) that each rank sent to each rank, from the tokens of all dispatches.

    A token that rank a dispatches to rank b travels four times: a to b in dispatch, with its ids and weights; b to a
    in combine; a to b as the gradient of combine; b to a as the gradient of dispatch, with that of its weights.

    Args:
        settings: of the demo; rows are float32.
        tokens: [R][R], tokens that rank a dispatched to rank b.

    Returns:
        [R][R], from rank a to rank b. The diagonal is what stayed where it was.
    """
    row, ids, weights = 4 * settings.hidden, 8 * settings.topk, 4 * settings.topk
    ranks = range(len(tokens))
    return [
        [(tokens[a][b] * (2 * row + ids + weights) + tokens[b][a] * (2 * row + weights)) / 1e6 for b in ranks]
        for a in ranks
    ]


def _traffic_table(tokens: list[list[int]], megabytes: list[list[float]]) -> str:
    ranks = range(len(tokens))
    lines = [
        "Who sent how much to whom: tokens dispatched / MB of dispatch, combine and both backward passes",
        f"{'':>8}" + "".join(f"{f'to {b}':>20}" for b in ranks) + f"{'to others':>22}",
    ]
    for a in ranks:
        cells = "".join(f"{f'{tokens[a][b]:,} / {megabytes[a][b]:,.1f}':>20}" for b in ranks)
        others = f"{sum(tokens[a]) - tokens[a][a]:,} / {sum(megabytes[a]) - megabytes[a][a]:,.1f}"
        lines.append(f"{f'from {a}':>8}{cells}{others:>22}")
    lines.append("  What a rank sends to itself (the diagonal) stays where it is.")
    return "\n".join(lines)


def _learned(report: Report, baselines: dict[str, float]) -> str:
    (_, before), (steps, after) = report.validation[0], report.validation[-1]
    known = ", ".join(f"{loss:.2f} {name}" for name, loss in baselines.items())
    return (
        f"\nValidation loss, nats a character: {before:.2f} at step 0, {after:.2f} at step {steps}."
        f"\nTo compare, models that count characters or pairs of them: {known}."
    )


def _indented(text: str) -> str:
    return "\n".join("  | " + line for line in text.splitlines())
