"""``tokenferry doctor``: what works on this machine, what does not, and what to do about it.

``--live`` shows the wait statistics at work: ranks of this machine, one of them slow on purpose, and the report that
names it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from tokenferry.cli.doctor_checks import Finding, Level, look_around
from tokenferry.cli.doctor_live import live
from tokenferry.cli.doctor_selftest import self_test
from tokenferry.cli.needs import need_folder, need_gpu
from tokenferry.cli.options import number_of_ranks, positive_number
from tokenferry.cli.ranks import RankError

_WIDTH = 118
_OF_LIVE = {"slow": 1, "delay": 50.0, "device": "cpu", "output": Path("doctor-out")}
"""Arguments that mean something with ``--live`` only, and what they are by default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the doctor.

    Args:
        parser: to declare them on.
    """
    parser.set_defaults(fail=parser.error)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--ranks", type=number_of_ranks, default=4, help="processes to start (default: %(default)s)")
    parser.add_argument(
        "--seconds", type=positive_number, default=5.0, help="of the self-test, or of --live (default: %(default)s)"
    )
    parser.add_argument("--no-self-test", action="store_true", help="only look, start no ranks")
    parser.add_argument("--live", action="store_true", help="show how a slow rank is found, on local ranks")
    live = _OF_LIVE
    parser.add_argument("--slow", type=int, help=f"with --live: the slow rank; -1: none (default: {live['slow']})")
    parser.add_argument(
        "--delay", type=positive_number, help=f"with --live: its delay, in ms (default: {live['delay']})"
    )
    devices = ("cpu", "cuda")
    parser.add_argument("--device", choices=devices, help=f"with --live: of the ranks (default: {live['device']})")
    parser.add_argument(
        "--output", type=Path, help=f"with --live: folder for the picture (default: {live['output']})"
    )


def main(args: argparse.Namespace) -> int:
    """Run the doctor.

    Args:
        args: parsed options, see :func:`add_arguments`.

    Returns:
        0; 1 if something is broken.
    """
    if args.live and args.no_self_test:
        args.fail("argument --no-self-test: changes nothing with --live")
    for name, default in _OF_LIVE.items():
        given = getattr(args, name)
        if given is not None and not args.live:
            args.fail(f"argument --{name}: got {given}, which changes nothing; allowed: with --live")
        setattr(args, name, default if given is None else given)
    return _live(args) if args.live else _examine(args)


def _examine(args: argparse.Namespace) -> int:
    findings = []
    for finding in look_around(args.ranks):
        findings.append(finding)
        _show(finding, args.json)
    if not args.no_self_test:
        tests = [("cpu", args.ranks)]
        if torch.cuda.is_available():
            tests.append(("cuda", max(2, min(torch.cuda.device_count(), args.ranks))))
        for device, ranks in tests:
            findings.append(self_test(device, ranks, args.seconds))
            _show(findings[-1], args.json)
    broken = sum(finding.level == Level.BROKEN for finding in findings)
    if args.json:
        print(json.dumps({"broken": broken, "findings": [asdict(finding) for finding in findings]}, indent=1))
    else:
        print(verdict(findings))
    return 1 if broken else 0


def verdict(findings: Sequence[Finding]) -> str:
    """The last line."""
    counts = {level: sum(finding.level == level for finding in findings) for level in Level}
    if counts[Level.BROKEN]:
        return f"\n{counts[Level.BROKEN]} broken, {counts[Level.WARNING]} warnings: see the remedies (->) above"
    return f"\nNothing is broken; {counts[Level.WARNING]} warnings, {counts[Level.NOTE]} notes"


def _show(finding: Finding, is_quiet: bool) -> None:
    if is_quiet:
        return
    head = f"{finding.level:<8} {finding.area:<17}"
    print(textwrap.fill(finding.what, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head)))
    if finding.remedy:
        indent = " " * len(head)
        print(textwrap.fill(finding.remedy, _WIDTH, initial_indent=indent + "-> ", subsequent_indent=indent + "   "))
    sys.stdout.flush()


def _live(args: argparse.Namespace) -> int:
    if not -1 <= args.slow < args.ranks:
        args.fail(f"argument --slow: got {args.slow}; allowed: a rank below {args.ranks}, or -1")
    need_gpu(args)
    need_folder(args, "--output", args.output)
    picture = args.output / "waits.png"
    if importlib.util.find_spec("matplotlib") is None:
        print("no picture without matplotlib: pip install 'tokenferry[cli]'", file=sys.stderr)
        picture = None
    slow = None if args.slow == -1 else args.slow
    if not args.json:
        delayed = (
            "nobody is slow on purpose" if slow is None else f"rank {slow} is {args.delay:g} ms late for each call"
        )
        print(f"{args.ranks} ranks dispatch and combine; {delayed}", flush=True)
    try:
        report = live(args.ranks, slow, args.delay, args.seconds, picture, device=args.device, is_quiet=args.json)
    except RankError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps({"slow": report.slow, "waited_ns": report.waited}))
    else:
        print(f"\n{report}" + (f"\n\npicture: {picture}" if picture else ""))
    return 0
