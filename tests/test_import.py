"""What ``import tokenferry`` costs, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

PROGRAM = """
import json, sys, time
import torch
wanted = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        wanted.append(name.partition(".")[0])
sys.meta_path.insert(0, Watch())
before = set(sys.modules)
started = time.perf_counter()
import tokenferry
seconds = time.perf_counter() - started
print(json.dumps({
    "seconds": seconds,
    "wanted": sorted(set(wanted)),
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "cuda": torch.cuda.is_initialized(),
}))
"""


def imported() -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=120)
    assert done.stderr == ""
    result: dict[str, object] = json.loads(done.stdout)
    return result


def test_import_is_light() -> None:
    times = []
    for _ in range(3):
        result = imported()
        assert "tokenferry" in result["new"]  # type: ignore[operator]
        for heavy in ("matplotlib", "tqdm", "numpy", "triton", "pandas"):
            assert heavy not in result["wanted"]  # type: ignore[operator]
        assert result["cuda"] is False
        times.append(result["seconds"])
        if times[-1] < 0.3:  # type: ignore[operator]
            return
    pytest.fail(f"import tokenferry took {times} s beyond torch")


def test_public_names() -> None:
    import tokenferry

    missing = [name for name in tokenferry.__all__ if not hasattr(tokenferry, name)]
    assert missing == []
    assert {"Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"} <= set(tokenferry.__all__)
