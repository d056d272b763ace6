"""Ranks on GPUs. Several share one where there are more ranks than GPUs: then CUDA's MPS runs them side by side."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator

import pytest
import torch

from tests.conftest import PoolOf, session_pools


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
def gpu_pool_of(sharing: None) -> Iterator[PoolOf]:
    """``gpu_pool_of(n)``: n ranks, one GPU after the other."""
    yield from session_pools(take_device)


def take_device(rank: int, num_ranks: int) -> None:
    """Give this rank its GPU."""
    torch.cuda.set_device(rank % torch.cuda.device_count())


def take_node(rank: int, num_ranks: int, over_network: bool) -> None:
    """Give this rank the GPU of its node, one of two; NCCL is told whether they are hosts."""
    node = rank * 2 // num_ranks
    torch.cuda.set_device(node % torch.cuda.device_count())
    if over_network:
        os.environ["NCCL_HOSTID"] = f"node-{node}"
        os.environ["NCCL_SOCKET_IFNAME"] = "lo"


@pytest.fixture(scope="session")
def direct(sharing: None) -> Iterator[PoolOf]:
    """Rails by whatever NCCL finds between two GPUs, or by its network transport on one."""
    yield from session_pools(functools.partial(take_node, over_network=torch.cuda.device_count() < 2))


@pytest.fixture(scope="session")
def over_network(sharing: None) -> Iterator[PoolOf]:
    """Rails by NCCL's network transport, as between hosts."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU: this is how all other tests run")
    yield from session_pools(functools.partial(take_node, over_network=True))
