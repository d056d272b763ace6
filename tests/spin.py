"""Checks a Promela model with spin: every state that can be reached, or until an error is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

MODELS = Path(__file__).parent.parent / "models"
DEADLOCK = "deadlock"
_DEADLOCKED = "pan:1: invalid end state"
_MOST_MEGABYTES = 3500
_LABEL = re.compile(r"^(?!end:)([a-z]\w*):", re.MULTILINE)


class Statement(NamedTuple):
    """Of a model, in one of its processes."""

    process: str
    file: str
    line: int
    text: str


class Verdict(NamedTuple):
    """What a search found out."""

    fault: str
    """What went wrong: the label above the assertion that failed, or DEADLOCK; empty if nothing did."""
    is_complete: bool
    """Whether no state was left out: neither depth nor memory ran out, and there was no error."""
    states: int
    seconds: float
    """Of the search, without what comes before."""
    unreached: frozenset[Statement]
    output: str


def missing_programs() -> str:
    """What would have to be installed; empty if nothing."""
    found = {"spin": shutil.which("spin"), "a C compiler": _compiler(), "cpp": shutil.which("cpp")}
    return ", ".join(name for name, program in found.items() if program is None)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")


def search(
    model: str,
    options: Mapping[str, int],
    work: Path,
    *,
    depth: int = 1_000_000,
    optimise: int = 0,
    timeout: float = 60,
) -> Verdict:
    """Search a model to the end, or to the first error.

    Args:
        model: name of a file in MODELS, without suffix.
        options: macros that it is compiled with.
        work: a folder to work in.
        depth: most steps of a path.
        optimise: level of the C compiler; 0 pays off for searches of a few seconds.
        timeout: of each program, in seconds.

    Raises:
        AssertionError: a program failed.
        subprocess.TimeoutExpired: one took too long.
    """
    compiler = _compiler()
    assert compiler is not None
    macros = [f"-D{name}={value}" for name, value in options.items()]
    source = f"{model}.pml"
    for file in MODELS.glob("*.pml"):
        shutil.copy(file, work)

    def call(*command: str) -> str:
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, f"{command} failed: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    call("spin", "-a", *macros, source)
    kind = ["-DSAFETY", "-DNOCLAIM", "-DCOLLAPSE", f"-DMEMLIM={_MOST_MEGABYTES}"]
    call(compiler, "-w", f"-O{optimise}", *kind, "-o", "pan", "pan.c")
    start = time.monotonic()
    output = call("./pan", f"-m{depth}", "-w22")
    seconds = time.monotonic() - start
    errors = re.search(r"errors: (\d+)", output)
    states = re.search(r"(\d+) states, stored", output)
    assert errors is not None, output
    assert states is not None, output
    fault = ""
    if errors[1] != "0":
        fault = _fault_of(output, "" if _DEADLOCKED in output else call("spin", "-t", *macros, source))
    cut_short = re.search(r"not completed|too small|memory|MEMLIM", output.split("State-vector")[0])
    is_complete = not fault and cut_short is None
    return Verdict(fault, is_complete, int(states[1]), seconds, _unreached(output), output)


def _fault_of(output: str, trail: str) -> str:
    if _DEADLOCKED in output:
        return DEADLOCK
    failed = re.search(r"spin: (\S+):(\d+), Error: assertion violated", trail)
    assert failed is not None, output + trail
    above = [name for name, line in labels(Path(failed[1]).name).items() if line <= int(failed[2])]
    return above[-1]


def labels(file: str) -> dict[str, int]:
    """The labels of a file of MODELS, in their order, and the lines on which they stand."""
    text = (MODELS / file).read_text()
    return {label[1]: text.count("\n", 0, label.start()) + 1 for label in _LABEL.finditer(text)}


def _unreached(output: str) -> frozenset[Statement]:
    found = set()
    process = ""
    for line in output.splitlines():
        if line.startswith("unreached in "):
            process = line.removeprefix("unreached in ").removeprefix("proctype ")
        statement = re.match(r'\s+(\S+):(\d+), state \d+, "(.*)"', line)
        if statement is not None:
            found.add(Statement(process, Path(statement[1]).name, int(statement[2]), statement[3]))
    return frozenset(found)
