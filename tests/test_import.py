"""What ``import tokenferry`` costs, and what it leaves alone; what the command imports."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

PROGRAM = """
import contextlib, ctypes, io, json, runpy, sys, time
import torch
wanted, libraries, load = [], [], ctypes.CDLL
class Watch:
    def find_spec(self, name, path=None, target=None):
        wanted.append(name.partition(".")[0])
sys.meta_path.insert(0, Watch())
ctypes.CDLL = lambda name, *args, **kwargs: libraries.append(str(name)) or load(name, *args, **kwargs)
before = set(sys.modules)
started = time.perf_counter()
import tokenferry
seconds = time.perf_counter() - started
found = {
    "seconds": seconds,
    "wanted": sorted(set(wanted)),
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "cuda": torch.cuda.is_initialized(),
}
import tokenferry.memory.direct, tokenferry.memory.driver
found["libraries"] = libraries
sys.argv = ["tokenferry", "--help"]
with contextlib.redirect_stdout(io.StringIO()) as shown:
    try:
        runpy.run_module("tokenferry", run_name="__main__")
    except SystemExit as end:
        found["exit"] = end.code
print(json.dumps({**found, "shown": shown.getvalue(), "modules": [*sys.modules]}))
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, Any]:
    """What a process of its own has seen; up to three times, as a busy machine takes longer."""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        result: dict[str, Any] = json.loads(done.stdout)
        if result["seconds"] < 0.3:
            break
    return result


@pytest.mark.timed
def test_import_is_light(imported: dict[str, Any]) -> None:
    assert "tokenferry" in imported["new"]
    assert not {"matplotlib", "tqdm", "numpy", "triton", "pandas"} & set(imported["wanted"])
    assert imported["cuda"] is False
    assert imported["seconds"] < 0.3, "beyond torch"


def test_import_loads_no_library(imported: dict[str, Any]) -> None:
    assert not [name for name in imported["libraries"] if "libcuda" in name]


def test_module_runs_and_imports_no_command(imported: dict[str, Any]) -> None:
    assert imported["exit"] == 0
    assert imported["shown"].startswith("usage: tokenferry")
    assert {"torch", "tokenferry", "tokenferry.cli"} <= set(imported["modules"])
    assert not [name for name in imported["modules"] if name.startswith(("tokenferry.cli.", "matplotlib"))]


def test_public_names() -> None:
    import tokenferry

    missing = [name for name in tokenferry.__all__ if not hasattr(tokenferry, name)]
    assert missing == []
    assert {"Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"} <= set(tokenferry.__all__)
