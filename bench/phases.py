"""The steps of each phase: what is run to show what :mod:`requirements` asks for."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from requirements import CHECKS, CPUS, GPUS, OF_RECORD, Scale

STAGED = "expandable_segments:True"
PHASES = ("tests", "high-throughput", "low-latency", "further", "shared", "nodes", "sanitizer", "stress", "soak")
SANITIZER = "compute-sanitizer"
_NO_CALLS = ("--report-api-errors", "no")
"""Torch asks CUDA for what is not there."""
_SANITIZER_OF_CUDA = Path("/usr/local/cuda/bin") / SANITIZER


class Step(NamedTuple):
    """A process of its own."""

    name: str
    phase: str
    command: tuple[str, ...]
    """What it begins with is ``python`` for the interpreter of this process."""
    seconds: float
    """That it may take at most."""
    repeats: bool = False
    """Whether it is run once for each start: its figures are to be compared."""
    shares_gpus: bool = False
    """Whether ranks share GPUs: then MPS runs beside it."""
    environment: Mapping[str, str] = {}
    gpus: int = 0
    """That it needs, with one rank on each."""
    least: float = 0.0
    """Seconds without which it is not begun; by default a third of the most."""

    @property
    def share(self) -> float:
        """Seconds that the steps before it leave for it."""
        return self.least or self.seconds / 2


class Setting(NamedTuple):
    """Of a run."""

    device: str
    ranks: int
    gpus: int
    soak_minutes: float = 5.0

    @property
    def scale(self) -> Scale:
        return GPUS if self.device == "cuda" else CPUS

    @property
    def shares_gpus(self) -> bool:
        return 0 < self.gpus < self.ranks

    @property
    def gpus_of_ranks(self) -> int:
        """The GPUs, if every rank has one of its own; else 0."""
        return self.gpus if self.gpus == self.ranks else 0


def steps(setting: Setting, phases: Sequence[str], output: Callable[[str], str]) -> list[Step]:
    """The steps of some phases, in order.

    Args:
        setting: of the run.
        phases: some of :data:`PHASES`.
        output: from the name of a step to the directory for its results.
    """
    of_device = _on_gpus if setting.device == "cuda" else _on_cpus
    known = list(of_device(setting, output))
    return [step for phase in PHASES if phase in phases for step in known if step.phase == phase]


def _bench(setting: Setting, target: str, *arguments: object) -> tuple[str, ...]:
    plot = [] if importlib.util.find_spec("matplotlib") else ["--no-plot"]
    start = ["python", "-m", "tokenferry", "bench", "--device", setting.device, "--output", target, *plot]
    return (*start, *("--ranks", str(setting.ranks)), *map(str, arguments))


def _pytest(*arguments: str) -> tuple[str, ...]:
    return ("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=10", "--maxfail=20", *arguments)


def _on_gpus(setting: Setting, output: Callable[[str], str]) -> Iterator[Step]:
    scale, shared = setting.scale, setting.shares_gpus

    def bench(name: str, *arguments: object) -> tuple[str, ...]:
        return _bench(setting, output(name), *arguments)

    apart, sharing, many = "not slow and not shares_gpus", "not slow and shares_gpus", setting.ranks in OF_RECORD
    of_as_many = ("--ranks", str(setting.ranks)) if many else ()
    if many and shared:
        command = _pytest("tests/gpu", "-m", sharing, *of_as_many)
        yield Step("shared tests", "tests", command, 140, shares_gpus=True)
    else:
        yield Step("tests", "tests", _pytest("tests/gpu", "-m", apart, *of_as_many), 140 if many else 330)
        yield Step("shared tests", "shared", _pytest("tests/gpu", "-m", sharing), 330, shares_gpus=True)
    modes = ("--modes", "layout", "dispatch", "cached", "combine", "pair", "cached-pair")
    sizes: tuple[object, ...] = ("--tokens", scale.tokens, "--sms", 8, 12, scale.sms, 24, 64)
    if many:
        sizes = ("--tokens", scale.tokens, 2 * scale.tokens, "--sms", 8, scale.sms, 24, 32, 64, "--iterations", 10)
    command = bench("ruler", *sizes, *modes)
    yield Step("ruler", "high-throughput", command, 200 if many else 120, True, shared)
    phase = "further"
    command = bench(
        "extras", "--tokens", scale.tokens, "--sms", scale.sms, 24, "--dtype", "bf16", "--beside", "operators",
        "--modes", "cached", "combine", "expanded", "--iterations", 15,
    )  # fmt: skip
    yield Step("extras", phase, command, 45, True, shared)
    command = bench(
        "wire", "--tokens", scale.tokens, "--routing", "others", "--modes", "cached", "--dtype", "bf16",
        "--sms", 8, 10, 12, scale.sms, "--kernels", "--no-baseline", "--iterations", 10,
    )  # fmt: skip
    yield Step("wire", phase, command, 40, True, shared)
    command = bench(
        "staged", "--tokens", scale.tokens, "--staged", "--num-nvl-bytes", *scale.stages, "--dtype", "bf16",
        "--sms", scale.sms, "--modes", "dispatch", "cached", "combine", "pair", "cached-pair", "--no-baseline",
        "--iterations", 10,
    )  # fmt: skip
    allocator = dict.fromkeys(("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"), STAGED)  # from the start on, too
    yield Step("staged", phase, command, 60, True, shared, allocator)
    command = bench(
        "tokens", "--tokens", *scale.sweep, "--sms", scale.sms, "--dtype", "bf16",
        "--modes", "dispatch", "cached", "combine", "pair", "--iterations", 8,
    )  # fmt: skip
    yield Step("tokens", phase, command, 90, True, shared)
    beside = () if many else ("--beside", "operators", "wait-statistics", "--host-profile")
    command = bench("low latency", "--mode", "low-latency", *beside, "--iterations", 12)
    yield Step("low latency", "low-latency", command, 120, True, shared)
    command = bench(
        "nodes", "--nodes", 2, "--tokens", scale.tokens, "--sms", scale.sms, "--dtype", "bf16",
        "--modes", "dispatch", "cached", "combine", "pair", "--iterations", 20,
    )  # fmt: skip
    yield Step("nodes", "nodes", command, 120, True, shared)
    yield from _sanitized()
    yield Step("stress", "stress", _pytest("tests/gpu", "-m", "slow and not shares_gpus"), 270)
    yield Step("shared stress", "stress", _pytest("tests/gpu", "-m", "slow and shares_gpus"), 330, shares_gpus=True)
    soak = ("python", "-m", "tokenferry", "soak", "--device", "cuda", "--ranks", str(setting.ranks))
    seconds = 60 * setting.soak_minutes
    command = (*soak, "--minutes", f"{setting.soak_minutes:g}")
    yield Step("soak", "soak", command, seconds + 90, shares_gpus=shared, least=seconds + 45)


def _sanitized() -> Iterator[Step]:
    program = sanitizer()
    for tool in ("memcheck", "racecheck"):
        for check in CHECKS:
            together = check in ("stage", "nodes", "rail")
            yield Step(
                f"{tool} {check}",
                "sanitizer",
                (
                    program or SANITIZER, "--target-processes", "all", "--tool", tool, "--error-exitcode", "1",
                    *(_NO_CALLS if tool == "memcheck" else ()),
                    *(_without_nccl(program) if program else ()), "python", "-m", "tests.gpu.sanitize", check,
                ),
                90 if together else 70,
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
                gpus=2 if together else 1,
            )  # fmt: skip


def sanitizer() -> str | None:
    """The program, on the path or where CUDA puts it."""
    return shutil.which(SANITIZER) or (str(_SANITIZER_OF_CUDA) if _SANITIZER_OF_CUDA.exists() else None)


def _without_nccl(program: str) -> tuple[str, ...]:
    """Leave the kernels of NCCL alone, if the program can: they are not ours, and slow to look at."""
    try:
        told = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return ("--kernel-name-exclude", "kernel_substring=nccl") if "--kernel-name-exclude" in told else ()


def missing(step: Step, setting: Setting) -> str | None:
    """What a step needs and is not there."""
    if setting.gpus < step.gpus:
        return f"needs {step.gpus} GPUs"
    if setting.gpus and step.phase == "sanitizer" and sanitizer() is None:
        return f"no {SANITIZER}"
    return None


def _on_cpus(setting: Setting, output: Callable[[str], str]) -> Iterator[Step]:
    """The same steps as far as they go on CPU ranks, small: a rehearsal, no figures."""
    scale, most = setting.scale, 240
    small = ("--hidden", scale.hidden, "--experts", 16, "--topk", 4, "--iterations", 1)

    def bench(name: str, *arguments: object) -> tuple[str, ...]:
        return _bench(setting, output(name), *arguments, *small)

    modes = ("dispatch", "cached", "combine", "pair")
    yield Step("tests", "tests", _pytest("tests/test_dispatch_combine.py", "-k", "duplicates"), most)
    yield Step("shared tests", "shared", _pytest("tests/test_layout.py"), most)
    yield Step("ruler", "high-throughput", bench("ruler", "--tokens", scale.tokens, "--modes", *modes), most, True)
    phase = "further"
    yield Step("extras", phase, bench("extras", "--tokens", scale.tokens, "--modes", "expanded"), most, True)
    routing = ("--routing", "others", "--modes", "cached", "--no-baseline")
    yield Step("wire", phase, bench("wire", "--tokens", scale.tokens, *routing), most, True)
    stages = ("--num-nvl-bytes", *scale.stages, "--modes", "pair", "cached", "--no-baseline")
    yield Step("staged", phase, bench("staged", "--tokens", scale.tokens, *stages), most, True)
    sweep = ("--modes", "dispatch", "combine", "pair")
    yield Step("tokens", phase, bench("tokens", "--tokens", *scale.sweep, *sweep), most, True)
    beside = ("--beside", "operators", "wait-statistics", "--host-profile")
    tokens = ("--tokens", scale.few, 4, scale.many)
    yield Step(
        "low latency", "low-latency", bench("low latency", "--mode", "low-latency", *tokens, *beside), most, True
    )
    nodes = ("--nodes", setting.ranks, "--tokens", scale.tokens, "--modes", "dispatch", "cached", "combine")
    yield Step("nodes", "nodes", bench("nodes", *nodes), most, True)
    yield Step("memcheck high-throughput", "sanitizer", ("python", "-m", "tests.gpu.sanitize", "--help"), most)
    yield Step("stress", "stress", _pytest("tests/test_stress.py", "-m", "not slow", "-k", "random", "-x"), most)
    soak = ("python", "-m", "tokenferry", "soak", "--ranks", str(setting.ranks), "--minutes", "0.05")
    yield Step("soak", "soak", soak, most)


def argv(step: Step) -> list[str]:
    """The command to start."""
    return [sys.executable if part == "python" else part for part in step.command]
