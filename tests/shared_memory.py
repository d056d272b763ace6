"""Shared memory that can be filled up: a /dev/shm of its own, in a mount namespace, for some processes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CLONE_NEWNS = 0x20000
_MOUNT = "mount -t tmpfs -o size={} tests-of-tokenferry /dev/shm && echo ready && read line"


@contextmanager
def small_shared_memory(nbytes: int) -> Iterator[int]:
    """A process that has a /dev/shm of this size; yields its number.

    Raises:
        RuntimeError: it cannot be made; says why.
    """
    program = shutil.which("unshare")
    if program is None:
        raise RuntimeError("no program unshare (package util-linux)")
    process = subprocess.Popen(
        [program, "--mount", "--propagation", "private", "/bin/sh", "-c", _MOUNT.format(nbytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        if process.stdout.readline() != "ready\n":
            raise RuntimeError(process.communicate()[1].strip())
        yield process.pid
    finally:
        process.kill()
        process.communicate()


def enter(process: int, rank: int) -> None:
    """Let this process, which has a single thread, see what the other one sees."""
    folder = Path.cwd()
    file = os.open(f"/proc/{process}/ns/mnt", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(file, _CLONE_NEWNS) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"rank {rank} cannot enter the namespace of process {process}: {os.strerror(error)}")
    finally:
        os.close(file)
    os.chdir(folder)
