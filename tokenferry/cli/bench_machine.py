"""What a benchmark ran on: machine, versions, commit. No host names, no paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tokenferry.version import __version__

IDENTITY = ("device", "cpu", "cores", "memory_bytes")
"""Entries of :func:`describe_machine` that must agree for two results to be comparable."""

GPU_IDENTITY = ("gpu", "gpus", "ranks", "ranks_share_gpus")
"""Entries of :func:`describe_gpus` that must agree too."""

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = "tokenferry"


def describe_machine(device: str) -> dict[str, Any]:
    """The machine as JSON: device, cpu (model), cores, memory_bytes, system (kernel), large_pages."""
    return {
        "device": device,
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {_kernel_version()} {platform.machine()}",
        "large_pages": _large_pages(),
    }


def _kernel_version() -> str:
    """Without what a build appends to it, which may tell whose machine it is."""
    return re.split(r"[^\d.]", platform.release())[0]


def describe_versions() -> dict[str, str]:
    """The versions of python, torch and tokenferry."""
    return {"python": platform.python_version(), "torch": str(torch.__version__), "tokenferry": __version__}


def describe_device(index: int) -> dict[str, Any]:
    """A GPU as JSON and the versions under it; for a rank, because it makes torch start CUDA."""
    properties = torch.cuda.get_device_properties(index)
    versions = {
        "triton": _version("triton"),
        "cuda": str(torch.version.cuda),
        "driver": _driver_version(),
        "nccl": _nccl_version(),
    }
    return {
        "gpu": properties.name,
        "gpu_sms": properties.multi_processor_count,
        "gpu_memory_bytes": properties.total_memory,
        "gpu_capability": f"{properties.major}.{properties.minor}",
        "gpu_allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF") or "",
        "versions": versions,
    }


def describe_gpus(devices: Sequence[Mapping[str, Any]], num_gpus: int) -> dict[str, Any]:
    """The GPUs of a run as JSON: those of :func:`describe_device`, and how the ranks are on them.

    Args:
        devices: :func:`describe_device` of every rank.
        num_gpus: GPUs that torch finds on the machine.
    """
    names = sorted({device["gpu"] for device in devices})
    first = {name: value for name, value in devices[0].items() if name.startswith("gpu")}
    return {
        **first,
        "gpu": " and ".join(names),
        "gpus": min(num_gpus, len(devices)),
        "ranks": len(devices),
        "ranks_share_gpus": len(devices) > num_gpus,
    }


def describe_commit() -> dict[str, Any] | None:
    """The commit of the checkout that the package is in and whether the package differs from it; None elsewhere."""
    if _git("ls-files", "--error-unmatch", f"{_PACKAGE}/__init__.py") is None:
        return None
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", _PACKAGE)
    return None if commit is None else {"commit": commit, "dirty": bool(changes)}


def describe_command(arguments: Sequence[str]) -> str:
    """The command line from the command on; of absolute paths only the last part."""
    shown = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        shown.append(option + equals + (Path(value).name if Path(value).is_absolute() else value))
    return " ".join([f"python -m {_PACKAGE}", *shown])


def results_directory() -> Path | None:
    """``bench/results`` of the checkout that the package is in, or None if it is in none."""
    directory = _ROOT / "bench" / "results"
    return directory if directory.is_dir() else None


def usable_cores() -> int:
    """The cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.processor() or platform.machine()


def _large_pages() -> dict[str, str]:
    """Settings that decide how dear a fresh tensor is: the kernel's, and torch's own."""
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = setting.read_text().partition("[")[2].partition("]")[0] if setting.exists() else "unknown"
    return {"kernel": chosen, "THP_MEM_ALLOC_ENABLE": os.environ.get("THP_MEM_ALLOC_ENABLE", "0")}


def _driver_version() -> str:
    module = Path("/sys/module/nvidia/version")
    if module.exists():
        return module.read_text().strip()
    listed = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return listed.splitlines()[0].strip() if listed else "unknown"


def _nccl_version() -> str:
    if not hasattr(torch._C, "_nccl_version"):
        return "none"
    return ".".join(str(part) for part in torch.cuda.nccl.version())  # type: ignore[no-untyped-call]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(_ROOT), *arguments)


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
