"""How the tests on GPUs are chosen and ended, as far as that shows without GPUs."""

from __future__ import annotations

import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest

from tests.gpu import conftest

ROOT = Path(__file__).parents[1]
OTHERS = ("hypothesis", "matplotlib", "tqdm", "xdist", "pytest_timeout")
"""What machines with GPUs may lack."""
PLAYED = """
import importlib.abc, shutil, sys, torch

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {others}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
torch.cuda.device_count = lambda: {gpus}
which = shutil.which
shutil.which = lambda name, *rest, **more: None if name.startswith("nvidia-") else which(name, *rest, **more)
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def played(gpus: int, *arguments: str, path: Path, cwd: Path = ROOT) -> str:
    """What pytest says where there seem to be GPUs, and nothing but torch, triton, numpy and pytest."""
    code = PLAYED.format(others=OTHERS, gpus=gpus)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=120, check=False,
        env={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": f"{ROOT}:{path}", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.slow
def test_ranks_with_a_gpu_each_are_told_from_those_that_share(tmp_path: Path) -> None:
    (tmp_path / "telling.py").write_text(
        "def pytest_collection_finish(session):\n"
        "    for item in session.items:\n"
        "        shared = item.get_closest_marker('shares_gpus') is not None\n"
        "        print('::', 'shared' if shared else 'apart', item.name, item.path.stem)\n"
    )
    text = played(2, "--collect-only", "-m", "slow or not slow", "-p", "telling", "tests/gpu", path=tmp_path)
    told = [tuple(line.split()[1:]) for line in text.splitlines() if line.startswith(":: ")]
    assert len(told) > 100, text
    for test in (
        ("test_every_call[wide-2]", "test_dispatch_combine"),
        ("test_small_rows[1]", "test_low_latency"),
        ("test_every_call[process_group-plain-2x1]", "test_internode"),
        ("test_tensors_in_the_heap", "test_memory"),
        ("test_thousands_of_operations[2]", "test_stress"),
    ):
        assert ("apart", *test) in told
    assert "error" not in text
    paths = ("tests/gpu", "tests/test_rails.py")
    few = played(8, "--collect-only", "--ranks", "4", "-p", "telling", *paths, path=tmp_path)
    names = {tuple(line.split()[2:]) for line in few.splitlines() if line.startswith(":: ")}
    assert {("test_every_call[wide-4]", "test_dispatch_combine"), ("test_small_rows[4]", "test_low_latency")} <= names
    gpu = {name for name, stem in names if stem != "test_rails"}
    assert len(gpu) < len(names)
    assert not any("-8]" in name or "-2]" in name or "[2]" in name or "2x4" in name for name in gpu), gpu
    assert re.search(r"\d+/\d+ tests collected \(\d+ deselected\)", few), few[-300:]
    for test in (
        ("test_every_call[wide-4]", "test_dispatch_combine"),
        ("test_every_call[nvshmem-plain-2x4]", "test_internode"),
        ("test_many_calls[process_group-2x2]", "test_internode"),
        ("test_disagreeing_ranks_step_back_and_go_on[4]", "test_faults"),
        ("test_thousands_of_operations[4]", "test_stress"),
    ):
        assert ("shared", *test) in told


def test_nodes_have_one_gpu_each() -> None:
    def places(fixture: str, **given: str) -> list[int]:
        item = mock.Mock(pytest.Function, fixturenames=["tmp_path", fixture], callspec=mock.Mock(params=given))
        return [conftest._places(item, gpus) for gpus in (1, 2, 4)]

    assert places("direct", layout="2x4") == [1, 2, 2]
    assert places("direct", layout="3x1") == [1, 2, 3]
    assert places("over_network") == [1, 2, 2]
    assert places("gpu_pool_of") == [1, 2, 4]


TESTS = """
import time
import pytest
from tests.gpu import conftest

conftest.MOST_SECONDS = 1
conftest.session_pools = lambda begin: iter([lambda count: count])

def test_hangs():
    time.sleep(60)

def test_two(gpu_pool_of):
    assert gpu_pool_of(2) == 2

@pytest.mark.ranks(4)
def test_four(gpu_pool_of):
    pass
"""


@pytest.mark.slow
def test_one_that_hangs_and_one_that_cannot_run_end_none_of_the_others(tmp_path: Path) -> None:
    """On two GPUs, without MPS."""
    tests = tmp_path / "gpu"
    tests.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  slow: s\n  ranks(most): r\n  shares_gpus: m\n")
    (tests / "conftest.py").write_text("from tests.gpu.conftest import *\n")
    (tests / "test_some.py").write_text(TESTS)
    text = played(2, "-rs", "gpu", path=tmp_path, cwd=tmp_path)
    assert "TimeoutError: not done after 1 s" in text
    assert "1 failed, 1 passed, 1 skipped" in text
    assert "no MPS" in text


def test_ranks_that_would_share_unsaid_fail() -> None:
    for shared in (False, True):
        conftest._checked(2, 2, shared)
        with (
            pytest.raises(pytest.fail.Exception, match=r"4 ranks where 2 have a GPU each")
            if not shared
            else nullcontext()
        ):
            conftest._checked(4, 2, shared)


def test_kernels_under_the_sanitizer_have_names() -> None:
    sanitize = pytest.importorskip("tests.gpu.sanitize", exc_type=ImportError)
    known = sanitize.all_kernels()
    assert {"bulk_dispatch.dispatch", "low_latency_combine.combine", "parts.announce_part", "layout.layout"} <= known
    assert len(known) >= 17
    with sanitize.launched() as names, pytest.raises(Exception):  # noqa: B017 - no GPU, or no such arguments
        next(sanitize.kernels_of(sanitize.programs)).variant(4)
    assert names == {"layout.layout"}
