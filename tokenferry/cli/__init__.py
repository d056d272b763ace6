"""The command line: ``python -m tokenferry`` with ``demo``, ``bench``, ``plan``, ``doctor`` or ``soak``.

A sub-command is a module of this package with ``add_arguments(parser)`` and ``main(args) -> int``; only the one
that runs is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from tokenferry.version import __version__

INTERRUPTED = 130
"""The exit code after Ctrl-C: that of a process that the signal has ended, as shells have it."""
COMMANDS = {
    "demo": "watch tokens travel between ranks on this machine",
    "bench": "time dispatch and combine on this machine, beside torch.distributed",
    "plan": "predict dispatch and combine on a cluster, from bytes and rates",
    "doctor": "look at this machine: what works, what does not, and what to do about it",
    "soak": "random operations and faults on this machine, checked, for as long as you like",
}


def main(argv: list[str] | None = None) -> int:
    """Run a sub-command.

    Args:
        argv: the arguments, without the program's name; by default those of the process.

    Returns:
        The exit code; 130 after Ctrl-C, when all ranks were stopped.

    Raises:
        SystemExit: wrong arguments (code 2), or ``--help`` and ``--version`` (code 0).
    """
    try:
        return _run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(arguments: list[str]) -> int:
    top = argparse.ArgumentParser(
        prog="tokenferry",
        description="Expert-parallel dispatch and combine for Mixture-of-Experts models.",
        epilog="commands:\n" + "\n".join(f"  {name:8}{text}" for name, text in COMMANDS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"tokenferry {__version__}")
    top.add_argument("command", choices=list(COMMANDS), help="what to run; `tokenferry COMMAND --help` says more")
    command = top.parse_args(arguments[:1]).command
    module = importlib.import_module(f"tokenferry.cli.{command}")
    parser = argparse.ArgumentParser(prog=f"tokenferry {command}", description=COMMANDS[command])
    module.add_arguments(parser)
    given = argparse.Namespace(command_line=list(arguments))
    return int(module.main(parser.parse_args(arguments[1:], given)))
