"""What ``tokenferry doctor`` looks at without moving a row. What is not fine comes with what to do about it."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.cli.bench_machine import describe_machine
from tokenferry.config import align_up
from tokenferry.construction import (
    DEVICE_VARIABLE,
    TIMEOUT_VARIABLE,
    choose_carrier,
    choose_device,
    choose_paranoid,
    timeout_seconds,
)
from tokenferry.errors import TokenferryError
from tokenferry.memory.shm import Segment
from tokenferry.modes.paranoid import PARANOID_VARIABLE
from tokenferry.observing import DEBUG_VARIABLE
from tokenferry.rail import CARRIER_VARIABLE, carriers_of, missing_carrier
from tokenferry.rail.nvshmem_world import POOL_VARIABLE, pool_bytes
from tokenferry.runtime import DEFAULT_STAGE_BYTES
from tokenferry.topology import NODE_VARIABLE, node_key
from tokenferry.version import __version__

VARIABLES = (
    CARRIER_VARIABLE,
    DEBUG_VARIABLE,
    DEVICE_VARIABLE,
    NODE_VARIABLE,
    PARANOID_VARIABLE,
    POOL_VARIABLE,
    TIMEOUT_VARIABLE,
)
"""All that tokenferry reads."""
SHARED_MEMORY = Path("/dev/shm")
_OLDEST_PYTHON, _NEWEST_PYTHON = (3, 11), (3, 12)
_OLDEST_TORCH = (2, 11)
_LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LEAST_FILES = 256
_OTHERS = ("NCCL_", "NVSHMEM_", "GLOO_", "TORCH_SYMM")
"""Variables of others that change what happens between ranks."""


class Level(StrEnum):
    """How bad a finding is."""

    FINE = "ok"
    NOTE = "note"
    WARNING = "warning"
    BROKEN = "broken"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        area: what it is about.
        level: how bad it is; something BROKEN makes the doctor's exit code 1.
        what: was found.
        remedy: what to do about it; empty where nothing is to be done.
    """

    area: str
    level: Level
    what: str
    remedy: str = ""

    def __post_init__(self) -> None:
        if self.level in (Level.WARNING, Level.BROKEN) and not self.remedy:
            raise ValueError(f"no remedy: {self.what}")


def look_around(num_ranks: int) -> Iterator[Finding]:
    """All findings about this machine and this installation.

    Args:
        num_ranks: ranks that shared memory should have room for.
    """
    for check in (_versions, _machine, lambda: shared_memory(num_ranks), _limits, _carriers, _environment, _gpus):
        try:
            yield from check()
        except Exception as error:  # a doctor that stops at the first surprise is of no use
            name = getattr(check, "__name__", "check").strip("_")
            what = f"{name} could not be looked at: {type(error).__name__}: {error}"
            yield Finding("doctor", Level.WARNING, what, "report this to the authors of tokenferry")


def _versions() -> Iterator[Finding]:
    python, torch_version = sys.version_info[:2], _numbers(torch.__version__)
    tested = " and ".join(f"{major}.{minor}" for major, minor in (_OLDEST_PYTHON, _NEWEST_PYTHON))
    known = _OLDEST_PYTHON <= python <= _NEWEST_PYTHON
    yield Finding(
        "versions",
        Level.FINE if known else Level.WARNING,
        f"tokenferry {__version__}, Python {platform.python_version()}",
        "" if known else f"use Python {tested}: others are not tested",
    )
    oldest = ".".join(map(str, _OLDEST_TORCH))
    yield Finding(
        "versions",
        Level.FINE if torch_version >= _OLDEST_TORCH else Level.BROKEN,
        f"torch {torch.__version__}",
        "" if torch_version >= _OLDEST_TORCH else f"pip install 'torch>={oldest}'",
    )
    triton = _version("triton")
    if triton is None and torch.version.cuda:
        yield Finding("versions", Level.BROKEN, "no triton, which writes the kernels", "pip install triton")
    else:
        yield Finding("versions", Level.FINE, f"triton {triton}" if triton else "no triton; only GPUs need it")
    if importlib.util.find_spec("numpy") is None:
        yield Finding("versions", Level.BROKEN, "no numpy: ranks cannot meet", "pip install numpy")
    drawing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if drawing:
        what = f"no {' and no '.join(drawing)}: demo and bench draw with them"
        yield Finding("versions", Level.NOTE, what, "pip install 'tokenferry[cli]'")


def _machine() -> Iterator[Finding]:
    found = describe_machine("cpu")
    is_linux = platform.system() == "Linux"
    what = f"{found['cpu']}, {found['cores']} cores, {found['memory_bytes'] / 2**30:.0f} GiB, {found['system']}"
    remedy = "" if is_linux else "use Linux: shared memory, locks and page sizes of others are not tested"
    yield Finding("machine", Level.FINE if is_linux else Level.WARNING, what, remedy)
    if _LARGE_PAGES.exists() and "[never]" in _LARGE_PAGES.read_text():
        remedy = f"echo madvise > {_LARGE_PAGES} (as root): large outputs then cost less page faults"
        yield Finding("machine", Level.NOTE, "2 MB pages are switched off", remedy)
    yield Finding("machine", Level.FINE, f"this process is on node {node_key()!r}")


def shared_memory(num_ranks: int, directory: Path = SHARED_MEMORY) -> Iterator[Finding]:
    """Whether the ranks of this machine can share memory, and enough of it."""
    wanted = num_ranks * align_up(DEFAULT_STAGE_BYTES + (1 << 20))
    if directory.exists():
        total, _, free = shutil.disk_usage(directory)
        what = f"{directory}: {_megabytes(free)} free of {_megabytes(total)}"
        enough = f"{_megabytes(wanted)} for {num_ranks} ranks with a full stage"
        if free >= wanted:
            yield Finding("shared memory", Level.FINE, f"{what}; enough: {enough}")
        else:
            level = Level.WARNING if free > num_ranks << 18 else Level.BROKEN
            remedy = (
                f"in a container: --shm-size={max(1, -(-wanted >> 30))}g; else: mount -o remount,size=2g {directory}"
            )
            yield Finding("shared memory", level, f"{what}; a full stage takes {enough}", remedy)
        left = [entry.name for entry in directory.iterdir() if entry.name.startswith("tokenferry-")]
        if left:
            remedy = f"if no process constructs a Buffer now: rm {directory}/tokenferry-*"
            what = f"{len(left)} segments have a name: a process was killed while it constructed a Buffer"
            yield Finding("shared memory", Level.NOTE, what, remedy)
    try:
        segment = Segment.create(4096)
    except TokenferryError as error:
        remedy = f"make {directory} writable for this user"
        yield Finding("shared memory", Level.BROKEN, f"none can be had: {error}", remedy)
        return
    locked = segment.locked
    segment.retire()
    segment.close()
    if not locked:
        what = "no advisory locks: a rank that dies is noticed at the deadline only"
        yield Finding("shared memory", Level.WARNING, what, f"lower {TIMEOUT_VARIABLE}, or use a Linux tmpfs")


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _LEAST_FILES and soft != resource.RLIM_INFINITY:
        what = f"at most {soft} open files a process; a rank needs a few for every other"
        yield Finding("limits", Level.WARNING, what, f"ulimit -n {min(hard, 4096) if hard > 0 else 4096}")
    else:
        yield Finding("limits", Level.FINE, f"{soft} open files a process")


def _carriers() -> Iterator[Finding]:
    if not dist.is_available() or not dist.is_gloo_available():
        what = "this torch has no Gloo: CPU ranks cannot meet, nor reach other nodes"
        yield Finding("carriers", Level.BROKEN, what, "install torch from pytorch.org or PyPI")
        return
    nccl = "with NCCL" if dist.is_nccl_available() else "no NCCL"
    here = carriers_of("cuda" if torch.cuda.is_available() else "cpu")
    what = f"between nodes: {', '.join(here)} (the first is Gloo for CPU ranks, NCCL for GPUs); {nccl} in torch"
    yield Finding("carriers", Level.FINE, what)
    given = os.environ.get("GLOO_SOCKET_IFNAME")
    interfaces = [name for _, name in socket.if_nameindex()]
    if given:
        missing = sorted(set(given.split(",")) - set(interfaces))
        if missing:
            what = f"GLOO_SOCKET_IFNAME names {', '.join(missing)}: there is no such interface"
            yield Finding("carriers", Level.BROKEN, what, f"set it to one of {', '.join(interfaces)}, or unset it")
        return
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        what = "the name of this host has no address: Gloo finds no interface by itself"
        yield Finding("carriers", Level.WARNING, what, f"set GLOO_SOCKET_IFNAME to one of {', '.join(interfaces)}")
        return
    if address.startswith("127.") and len(interfaces) > 1:
        what = f"the name of this host is {address}: ranks on other nodes cannot reach Gloo there"
        remedy = f"between nodes, set GLOO_SOCKET_IFNAME to the right one of {', '.join(interfaces)}"
        yield Finding("carriers", Level.NOTE, what, remedy)


def _carrier_here(_: None) -> None:
    """Raise if the carrier that the environment names is none, or not on this host."""
    device = choose_device(None)
    if missing := missing_carrier(choose_carrier(None, device), device.type):
        raise TokenferryError(missing)


def _environment() -> Iterator[Finding]:
    yield from environment(os.environ)


def environment(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Variables that tokenferry reads, or that change what it does."""
    readers: dict[str, Callable[[None], Any]] = {
        TIMEOUT_VARIABLE: timeout_seconds,
        DEVICE_VARIABLE: choose_device,
        CARRIER_VARIABLE: _carrier_here,
        PARANOID_VARIABLE: choose_paranoid,
        POOL_VARIABLE: pool_bytes,
    }
    for name in sorted(name for name in environ if name.startswith("TOKENFERRY_")):
        shown = f"{name}={environ[name]}"
        if name not in VARIABLES:
            close = difflib.get_close_matches(name, VARIABLES, 1)
            remedy = f"did you mean {close[0]}?" if close else f"there are {', '.join(VARIABLES)}"
            yield Finding("environment", Level.WARNING, f"{shown} is not read by anybody", remedy)
            continue
        try:
            if name in readers:
                readers[name](None)
        except TokenferryError as error:
            yield Finding("environment", Level.BROKEN, str(error), f"correct or unset {name}")
        else:
            yield Finding("environment", Level.FINE, shown)
    for name in sorted(name for name in environ if name.startswith(_OTHERS)):
        yield Finding("environment", Level.FINE, f"{name}={environ[name]}")
    if environ.get("NCCL_P2P_DISABLE") == "1":
        what = "NCCL_P2P_DISABLE=1 keeps NCCL off NVLink; tokenferry does not look at it"
        yield Finding("environment", Level.NOTE, what, "unset it, unless peer access is broken here")


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        if Path("/dev/nvidiactl").exists():
            built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build for CPUs"
            remedy = "install a CUDA build of torch that this driver supports (nvidia-smi tells which)"
            yield Finding("GPUs", Level.WARNING, f"there is a driver, but torch ({built}) sees no GPU", remedy)
        else:
            yield Finding("GPUs", Level.FINE, "none: Buffers are on CPU ranks")
        return
    yield from gpus()


def gpus() -> Iterator[Finding]:
    """The GPUs that torch sees, and whether they reach each other. Starts CUDA in this process."""
    count = torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        what = f"GPU {index}: {properties.name}, compute capability {properties.major}.{properties.minor}"
        what += f", {_megabytes(free)} free of {_megabytes(total)}"
        is_known = (properties.major, properties.minor) >= (8, 0)
        remedy = "" if is_known else "use GPUs of compute capability 8.0 or later: others are not tested"
        yield Finding("GPUs", Level.FINE if is_known else Level.WARNING, what, remedy)
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    apart = [(a, b) for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    if apart:
        listed = ", ".join(f"{a} to {b}" for a, b in apart[:8])
        remedy = "use GPUs joined by NVLink or one PCIe switch; check IOMMU and ACS settings (nvidia-smi topo -p2p r)"
        yield Finding("peer access", Level.BROKEN, f"none from {listed}", remedy)
    elif pairs:
        yield Finding("peer access", Level.FINE, f"each of {count} GPUs reaches all others")
    if importlib.util.find_spec("torch.distributed._symmetric_memory") is None:
        what = "torch has no symmetric memory"
        yield Finding(
            "symmetric memory", Level.BROKEN, what, f"pip install 'torch>={'.'.join(map(str, _OLDEST_TORCH))}'"
        )
    else:
        yield Finding("symmetric memory", Level.FINE, "torch.distributed._symmetric_memory is there")
    settings = " ".join(os.environ.get(name, "") for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"))
    if "expandable_segments:True" in settings:
        what = (
            "expandable_segments:True: peers cannot open ordinary tensors, every row takes a detour through a stage"
        )
        yield Finding("symmetric memory", Level.NOTE, what, "switch it off, or allocate with Buffer.empty()")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _megabytes(count: float) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"
