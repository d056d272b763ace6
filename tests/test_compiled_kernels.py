"""The kernels as the compiler makes them for each architecture, without a GPU: see :mod:`tests.compile_kernels`."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CAPABILITIES = (80, 90, 100)
"""Compute capabilities, times ten."""
LAUNCHES = pytest.importorskip("tests.compile_kernels").LAUNCHES
RAIL = "rail"
"""Is there where NVSHMEM is, with which the kernel is linked."""
NAMES = tuple(name for name in LAUNCHES if name != RAIL)
REMOTE = tuple(name for name in NAMES if not name.startswith("local"))
ALIKE = {
    "dispatch 2 ranks", "dispatch 8 ranks", "dispatch 16 bytes", "dispatch without choices", "dispatch cached",
    "dispatch expanded", "dispatch expanded cached", "dispatch expanded 32", "dispatch part without choices",
    "notify, compact",
    "combine bf16 2 ranks", "combine bf16", "combine fp16", "combine fp32", "combine fp64", "combine 16 bytes",
    "combine held wide",
    "low latency dispatch bf16", "low latency dispatch fp8", "low latency dispatch many tokens",
    "low latency dispatch 32", "low latency combine", "low latency combine many tokens", "low latency combine 32",
    "bulk dispatch", "bulk dispatch expanded", "bulk dispatch expanded cached", "bulk dispatch part",
    "bulk combine fp32",
}  # fmt: skip
"""Launches of kernels that others launch too, most with more in them: slow."""
OLDER = {
    *(name for name in NAMES if name.startswith("local")),
    "layout", "notify", "announce part",
    "low latency dispatch send",  # which converts to FP8 by other instructions there
}  # fmt: skip
"""What is not slow on sm_80: the others are not slow on sm_90."""
pytestmark = pytest.mark.timeout(1500)  # the first tests wait for all compilers, which share two cores with others
MOST_SPILLED = 128
"""Bytes: divisions of 64-bit integers are calls, around which a few registers are saved."""

ACCESS = re.compile(r"(@%p\d+ )?(st\.global|ld\.global\.v\d)\.\S+")
RELEASE = re.compile(r"(@%?\w+ )?(atom\.\S*(release|acq_rel)|st\.release)")
ACQUIRE = re.compile(r"(@%?\w+ )?ld\.acquire")
MEETING = re.compile(r"bar(rier)?\.")
BARRIER = re.compile(r"bar(rier)?\.(cta\.)?sync")


class Compiled:
    """The kernels of one architecture, once their process has made them."""

    def __init__(self, capability: int, names: set[str], folder: Path) -> None:
        self.capability = capability
        self.folder = folder
        self._output = folder / "output"
        command = [sys.executable, "-m", "tests.compile_kernels", str(capability), str(folder), *names]
        with self._output.open("w") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)

    def wait(self) -> None:
        assert self._process.wait() == 0, self._output.read_text()

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def ptx(self, name: str) -> str:
        return (self.folder / f"{name}.ptx").read_text()

    def figures(self, name: str) -> dict[str, int]:
        assert self.ptx(name)
        return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One process for each architecture that tests ask for, all at work."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted: dict[int, set[str]] = {}
    for call in calls:
        if call is not None and call.params["name"] in LAUNCHES:
            wanted.setdefault(call.params["compiled"], set()).add(call.params["name"])
    compiled = {
        capability: Compiled(capability, wanted[capability], tmp_path_factory.mktemp("ptx"))
        for capability in sorted(wanted)
    }
    yield compiled
    for process in compiled.values():
        process.end()


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest, processes: dict[int, Compiled]) -> Compiled:
    processes[request.param].wait()
    return processes[request.param]


def is_slow(capability: int, name: str) -> bool:
    return name in ALIKE or not {80: name in OLDER, 90: name not in OLDER, 100: False}[capability]


def each(names: Iterable[str]) -> pytest.MarkDecorator:
    """Parametrises with an architecture and one of these launches."""
    names = tuple(names)
    cases = [
        pytest.param(
            capability, name, id=f"sm_{capability}-{name}", marks=[pytest.mark.slow] * is_slow(capability, name)
        )
        for capability in CAPABILITIES
        for name in names
        if capability >= 90 or not name.startswith("bulk")
    ]
    return pytest.mark.parametrize(("compiled", "name"), cases, indirect=["compiled"])


def test_launches_that_are_told_apart_are_there() -> None:
    assert set(NAMES) >= ALIKE | OLDER
    assert not ALIKE & OLDER


def instructions(ptx: str) -> list[str]:
    """In the order of the text, without comments, labels and directives; those of inline assembly share lines."""
    lines = (re.sub(r"//.*", "", line) for line in ptx.splitlines())
    parts = (part.strip("{} \t") for line in lines if ";" in line for part in line.split(";"))
    return [f"{part};" for part in parts if part and not part.startswith(".")]


def accesses(ptx: str) -> set[str]:
    """Plain loads from global memory and stores to it, such as ``ld.v4.b32``."""
    return {f"{name}{width}" for name, width in re.findall(r"\b(ld|st)\.global((?:\.v\d)?\.b\d+)\b", ptx)}


@each(NAMES)
def test_one_variant_serves_all_values(compiled: Compiled, name: str) -> None:
    assert compiled.figures(name)["variants"] == 1


@each(NAMES)
def test_registers_suffice(compiled: Compiled, name: str) -> None:
    figures = compiled.figures(name)
    assert figures["spills"] <= MOST_SPILLED
    assert figures["stack"] <= MOST_SPILLED // 2
    assert ".local" not in compiled.ptx(name)


@each(name for name in NAMES if name.startswith(("dispatch", "combine", "local sum")))
def test_rows_move_by_16_bytes(compiled: Compiled, name: str) -> None:
    found = accesses(compiled.ptx(name))
    if "16 bytes" in name:  # fewer words than threads
        assert "st.v4.b32" not in found
        return
    assert {"ld.v4.b32", "st.v4.b32"} <= found or {"ld.v2.b64", "st.v2.b64"} <= found
    assert not found & {"ld.b8", "st.b8", "ld.b16", "st.b16", "ld.v2.b16", "st.v2.b16"}


@each(name for name in NAMES if name.startswith("bulk"))
def test_rows_move_by_the_bulk_copy_engine(compiled: Compiled, name: str) -> None:
    assert "cp.async.bulk" in compiled.ptx(name)
    assert "fence.proxy.async" in compiled.ptx(name)


@each(name for name in REMOTE if name != "layout")
def test_peers_are_waited_for_and_signalled_at_system_scope(compiled: Compiled, name: str) -> None:
    ptx = compiled.ptx(name)
    assert re.search(r"ld\.(global\.sys\.acquire|acquire\.sys\.global)\.b64", ptx)
    assert re.search(r"atom\.global\.sys\.release\.exch\.b64|st\.release\.sys", ptx)


@each(name for name in REMOTE if not name.startswith("low latency") and name != "layout")
def test_threads_agree_on_what_each_has_seen(compiled: Compiled, name: str) -> None:
    """Every thread loads a flag for itself; the next barrier is the one at which all ask whether all saw it."""
    met = [line for line in instructions(compiled.ptx(name)) if ACQUIRE.match(line) or MEETING.match(line)]
    after = [there for here, there in itertools.pairwise(met) if ACQUIRE.match(here)]
    assert after
    assert all(".red.and.pred" in there for there in after)


@each(REMOTE)
def test_no_other_thread_is_between_a_barrier_and_a_release(compiled: Compiled, name: str) -> None:
    """From a release back to the last barrier in the text, nobody but the releasing thread (by its predicate) stores.

    Nor does anybody load several words, as those who read rows do.
    """
    since: set[str | None] = set()
    num_releases = 0
    for instruction in instructions(compiled.ptx(name)):
        if BARRIER.match(instruction):
            since.clear()
        elif access := ACCESS.match(instruction):
            since.add(access[1])
        elif release := RELEASE.match(instruction):
            num_releases += 1
            assert since <= {release[1]}, instruction
    assert num_releases


@pytest.mark.skipif(RAIL not in LAUNCHES, reason="no NVSHMEM to link with")
@each([RAIL])
def test_rail(compiled: Compiled, name: str) -> None:
    """Its own part: what is linked has a stack, and stores as it likes."""
    ptx, figures = compiled.ptx(name), compiled.figures(name)
    own = ptx[ptx.index(".entry exchange") :]
    assert figures["variants"] == 1
    assert figures["spills"] <= MOST_SPILLED
    assert {"ld.v2.b64", "st.v2.b64"} <= accesses(own)
    met = [line for line in instructions(own) if re.match(r"ld\.acquire\.sys|fence\.acq_rel\.sys|bar(rier)?\.", line)]
    after = [(here.split(".")[0], there) for here, there in itertools.pairwise(met)]
    assert {"ld", "fence"} <= {here for here, _ in after}
    assert all(".red.and.pred" in there for here, there in after if here == "ld")
    assert all(BARRIER.match(there) for here, there in after if here == "fence")
    assert "nvshmemi_transfer_put_signal" in ptx


@each(name for name in NAMES if name.startswith("low latency"))
def test_polls_are_not_cloned_into_loops_over_rows(compiled: Compiled, name: str) -> None:
    """The compiler copies inline assembly to wherever its result is used."""
    assert compiled.ptx(name).count("ld.acquire.sys.global.b64") <= 16


@each(name for name in NAMES if name.startswith("low latency"))
def test_the_kernel_before_is_waited_for_first(compiled: Compiled, name: str) -> None:
    """Programs that may be placed while it ends touch no memory before; older GPUs place them later."""
    found = instructions(compiled.ptx(name))
    waits = [place for place, line in enumerate(found) if line.startswith("griddepcontrol.wait")]
    if compiled.capability < 90:
        assert not waits
        return
    (wait,) = waits
    touching = re.compile(r"(@%?\w+ )?(ld|st|atom|red|cp)\.")
    assert all(line.startswith("ld.param") for line in found[:wait] if touching.match(line))
    assert any(touching.match(line) and "global" in line for line in found[wait:])
