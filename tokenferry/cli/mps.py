"""CUDA's MPS, for ranks that share GPUs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress

MPS_CONTROL = "nvidia-cuda-mps-control"
_PIPES = "CUDA_MPS_PIPE_DIRECTORY"
_LOGS = "CUDA_MPS_LOG_DIRECTORY"
_OVERLAP = "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"


class MpsError(RuntimeError):
    """Ranks cannot share GPUs."""


@contextmanager
def sharing_gpus(shared: bool) -> Iterator[None]:
    """Where ranks share GPUs: MPS, which runs them side by side, and leave for symmetric memory of one GPU.

    Entered before any process of the run has started CUDA. An MPS that the environment names is used as it is.

    Raises:
        MpsError: there is no MPS.
    """
    if not shared:
        yield
        return
    before = {name: os.environ.get(name) for name in (_PIPES, _LOGS, _OVERLAP)}
    control = shutil.which(MPS_CONTROL)
    with tempfile.TemporaryDirectory(prefix="tokenferry-mps-") as folder:
        os.environ[_OVERLAP] = "1"
        try:
            if before[_PIPES] is not None:
                yield
                return
            if control is None:
                raise MpsError(f"more ranks than GPUs need CUDA's MPS ({MPS_CONTROL}), which is not there")
            os.environ[_PIPES] = os.environ[_LOGS] = folder
            try:
                subprocess.run([control, "-d"], check=True, capture_output=True, timeout=30)
            except (OSError, subprocess.SubprocessError) as error:
                raise MpsError(f"CUDA's MPS does not start: {error}") from error
            try:
                yield
            finally:
                _end_mps(control)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _end_mps(control: str) -> None:
    """End MPS. It waits for its ranks; where one does not end, its servers are ended at once."""
    with suppress(subprocess.TimeoutExpired):
        _tell_mps(control, "quit", 30.0)
        return
    with suppress(subprocess.TimeoutExpired):
        for server in _tell_mps(control, "get_server_list", 5.0).split():
            _tell_mps(control, f"shutdown_server {server} -f", 5.0)
        _tell_mps(control, "quit", 10.0)


def _tell_mps(control: str, command: str, seconds: float) -> str:
    return subprocess.run(
        [control], input=f"{command}\n", text=True, check=False, capture_output=True, timeout=seconds
    ).stdout
