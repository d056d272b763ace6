"""The ten lines of the README, run as it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import slow

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("num_ranks", [2, *slow(4)])
def test_ten_lines_run(tmp_path: Path, num_ranks: int) -> None:
    code = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    script = tmp_path / "ten_lines.py"
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("torch.Size") == num_ranks
    assert done.stdout.count("True") == num_ranks
