"""The ten lines of the README, run as it says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def ten_lines(tmp_path: Path) -> str:
    """A file with them."""
    script = tmp_path / "ten_lines.py"
    script.write_text((ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0])
    return str(script)


def start(*command: str, **environment: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=pipe, stderr=pipe, text=True)


def output_of(processes: list[subprocess.Popen[str]]) -> str:
    """What all have printed; none is left behind."""
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return "".join(out for out, _ in outputs)


def test_ten_lines_run(tmp_path: Path) -> None:
    """With the variables that torchrun sets."""
    script = ten_lines(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shown = output_of([start(script, RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(2)])
    assert shown.count("torch.Size") == 2
    assert shown.count("True") == 2


@pytest.mark.slow
def test_torchrun_runs_ten_lines(tmp_path: Path) -> None:
    shown = output_of([start("-m", "torch.distributed.run", "--nproc-per-node", "4", ten_lines(tmp_path))])
    assert shown.count("torch.Size") == 4
    assert shown.count("True") == 4
