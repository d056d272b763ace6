"""Ranks on GPUs. Several share one where there are more ranks than GPUs: then CUDA's MPS runs them side by side."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.conftest import SessionPool
from tokenferry.cli.ranks import RankPool


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a GPU there is nothing to test here."""
    if torch.cuda.device_count() == 0:
        for item in items:
            if "gpu" in item.path.parts:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def sharing() -> Iterator[None]:
    """MPS for the session, and the settings that let ranks of one GPU have symmetric memory."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        pytest.skip("no MPS: several ranks cannot run at a time on one GPU")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CUDA_MPS_PIPE_DIRECTORY"] = os.environ["CUDA_MPS_LOG_DIRECTORY"] = folder
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
        subprocess.run([control, "-d"], check=True)
        try:
            yield
        finally:
            subprocess.run([control], input="quit\n", text=True, check=False, timeout=30)
            for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
                os.environ.pop(name, None)


@pytest.fixture(scope="session")
def gpu_pool_of(sharing: None) -> Iterator[Callable[[int], RankPool]]:
    """``gpu_pool_of(n)``: n ranks, one GPU after the other."""
    pools: dict[int, SessionPool] = {}

    def get(num_ranks: int) -> RankPool:
        if num_ranks in pools and not pools[num_ranks].is_whole:
            pools.pop(num_ranks).stop()
        if num_ranks not in pools:
            pools[num_ranks] = SessionPool(num_ranks, num_threads=1)
            pools[num_ranks].run(take_device)
        return pools[num_ranks]

    yield get
    for pool in pools.values():
        pool.close() if pool.is_whole else pool.stop()


def take_device(rank: int, num_ranks: int) -> None:
    """Give this rank its GPU."""
    torch.cuda.set_device(rank % torch.cuda.device_count())
