"""The examples on CPU ranks, with small sizes; each compares its results itself."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import tokenferry.compat
from tests.conftest import PoolOf, slow

EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES: dict[str, dict[str, int]] = {
    "launch": {},
    "layer": {"tokens": 40, "hidden": 32, "inner": 16, "local": 2, "topk": 3},
    "train": {"tokens": 60, "hidden": 32, "steps": 12},
    "prefill": {"tokens": 60, "hidden": 256, "local": 3},
    "decode": {"most": 5, "hidden": 128, "local": 2, "steps": 4},
    "overlap": {"tokens": 30, "hidden": 64},
    "megatron_style": {"tokens": 30, "hidden": 32},
}


def start_of(name: str) -> str:
    """What a program does when it is started, from the line that asks whether it is."""
    return (EXAMPLES / f"{name}.py").read_text().partition('if __name__ == "__main__":')[2]


def run(rank: int, num_ranks: int, name: str, sizes: dict[str, Any], num_nodes: int = 1) -> str:
    printed = io.StringIO()
    node = {"TOKENFERRY_NODE": str(rank * num_nodes // num_ranks)} if num_nodes > 1 else {}
    try:
        with contextlib.redirect_stdout(printed), mock.patch.dict("os.environ", node):
            runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]("cpu", **sizes)
    finally:
        tokenferry.compat.uninstall()
    return printed.getvalue()


@pytest.mark.parametrize(
    ("name", "num_ranks"), [*((name, 2) for name in SIZES), *slow(("decode", 1), ("overlap", 3))]
)
def test_runs(pool_of: PoolOf, name: str, num_ranks: int) -> None:
    first, *others = pool_of(num_ranks).run(run, name, SIZES[name])
    assert first.splitlines()[-1].startswith(f"{num_ranks} ranks"), first
    if name != "launch":
        assert others == [""] * (num_ranks - 1)


@pytest.mark.parametrize("name", ["launch", *slow(*(name for name in SIZES if name != "launch"))])
def test_runs_on_two_nodes(pool_of: PoolOf, name: str) -> None:
    first, *_ = pool_of(2).run(run, name, SIZES[name], 2)
    assert first.splitlines()[-1].startswith("2 ranks"), first
    if name == "launch":
        assert "node 0 of 2" in first


def test_wrong_results_are_noticed(pool_of: PoolOf) -> None:
    """The comparison in an example is one: with an exchange that is off by a little it fails."""
    for name in ("layer", "prefill", "decode", "overlap", "megatron_style"):
        failures = pool_of(2).run(run_wrongly, name, SIZES[name])
        # A rank that compares no row of its own in a step meets the other only when that one has left.
        assert "AssertionError" in failures, name
        assert set(failures) <= {"AssertionError", "PeerLostError"}, (name, failures)


def run_wrongly(rank: int, num_ranks: int, name: str, sizes: dict[str, Any]) -> str:
    from tokenferry import Buffer, PeerLostError

    originals = Buffer.combine, Buffer.low_latency_combine
    try:
        Buffer.combine, Buffer.low_latency_combine = (_scaled(original) for original in originals)  # type: ignore
        run(rank, num_ranks, name, sizes)
    except (AssertionError, PeerLostError) as error:
        return type(error).__name__
    finally:
        Buffer.combine, Buffer.low_latency_combine = originals  # type: ignore[method-assign]
    return "none"


def _scaled(method: Any) -> Any:
    def scaled(*args: Any, **given: Any) -> Any:
        combined, *others = method(*args, **given)
        return combined * 1.1, *others

    return scaled


@pytest.mark.slow
def test_started_by_torchrun() -> None:
    """As the README says; all programs start alike."""
    assert {start_of(name) for name in SIZES} == {start_of("launch")}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(EXAMPLES / "launch.py")],
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for line in ("rank 0 of 2: node 0 of 1, cpu", "rank 1 of 2: node 0 of 1, cpu", "2 ranks exchanged 2 rows each"):
        assert done.stdout.count(line) == 1, done.stdout


def test_readme_names_every_example() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == set(SIZES)
    for name in names:
        assert f"[{name}.py]({name}.py)" in listed
        assert f"torchrun --nproc-per-node 4 examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text()


def test_forty_lines() -> None:
    """The layer is as short as its title."""
    lines = (EXAMPLES / "layer.py").read_text().split("\n\n\ndef dense")[0].partition("class Layer")[2].splitlines()
    assert 20 < len(lines) <= 40
