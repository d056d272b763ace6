"""POSIX shared memory between the ranks of one machine.

A segment has a name only until every rank has mapped it: unlinked then, it lives exactly as long as the
processes that map it, however they end. The name is unpredictable and the mode 0600: private to the user.

A segment is *sparse*: its size is only an address range, and ``commit`` makes the pages real. So memory runs
out as an exception in ``commit``, not as a fatal signal in the middle of a copy.

Its creator holds an advisory lock on it. The kernel drops the lock when the process ends, for whatever
reason; that is how peers notice a death at once, also across PID namespaces. The lock has a file description of
its own, which a forked child gives up: a child that outlives its parent must not hide its death.
"""

from __future__ import annotations

import _posixshmem
import contextlib
import fcntl
import mmap
import os
import platform
import secrets
import threading
import weakref

import torch

from tokenferry.errors import HeapError

_STRONGLY_ORDERED = platform.machine() in ("x86_64", "AMD64", "i686")
_FENCE_LOCKS = (threading.Lock(), threading.Lock())


def fence() -> None:
    """Order all earlier loads and stores of this thread before all later ones.

    x86 keeps stores in order and loads in order, and every call between here and the machine is opaque to the
    compiler, so nothing is left to do there. Elsewhere two lock/unlock pairs do it: the first unlock is a
    release, which earlier accesses cannot pass; the second lock is an acquire, which later ones cannot pass;
    and an acquire never overtakes an earlier release.
    """
    if not _STRONGLY_ORDERED:
        for lock in _FENCE_LOCKS:
            with lock:
                pass


class Segment:
    """One mapped shared-memory segment.

    Args:
        name: name in the shared-memory namespace.
        size: bytes of address range.
        create: create it (and hold its lock), or open an existing one.

    Raises:
        HeapError: the segment cannot be created or opened.
    """

    def __init__(self, name: str, size: int, *, create: bool) -> None:
        self.name = name
        self.size = size
        self.committed = 0
        self._lock_fd = -1
        self._fd = -1
        self._fd_in_use = threading.RLock()
        self._creator = os.getpid() if create else 0
        self._linked = create
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            self._fd = _posixshmem.shm_open(name, flags, mode=0o600)
        except OSError as error:
            verb = "create" if create else "open"
            raise HeapError(f"cannot {verb} shared memory {name}: {error}") from error
        try:
            if create:
                os.ftruncate(self._fd, size)
                self._lock_for_life()
            elif os.fstat(self._fd).st_size < size:
                raise HeapError(f"shared memory {name} has {os.fstat(self._fd).st_size} bytes, not {size}")
            self.map = mmap.mmap(self._fd, size)
        except (OSError, OverflowError) as error:
            self.close()
            self.retire()
            raise HeapError(f"cannot map {size} bytes of shared memory {name}: {error}") from error
        with torch.inference_mode(False):  # else no later operation outside of inference mode could write to it
            self.bytes = torch.frombuffer(self.map, dtype=torch.uint8)
        self.words = memoryview(self.map).cast("q")

    def __del__(self) -> None:
        """What an exception in the middle of making it has left: a Ctrl-C for example."""
        if "_linked" in vars(self):  # the last attribute that close and retire need
            self.close()
            if self._creator == os.getpid():
                self.retire()

    @staticmethod
    def create(size: int) -> Segment:
        """Create a segment of ``size`` bytes under a fresh private name; no page is real yet."""
        return Segment(f"/tokenferry-{secrets.token_hex(12)}", size, create=True)

    @property
    def locked(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock_fd >= 0

    def _lock_for_life(self) -> None:
        self._lock_fd = _posixshmem.shm_open(self.name, os.O_RDWR, mode=0o600)
        _lock_holders.add(self)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # not every system locks shared memory: deaths then show by deadline
            self.close_lock()

    def close_lock(self) -> None:
        """Close this process's hold on the lock; it is dropped when no process has one."""
        fd, self._lock_fd = self._lock_fd, -1
        if fd >= 0:
            os.close(fd)

    def creator_is_gone(self) -> bool:
        """Whether the process that created this segment, and locked it, has ended. False once this is closed."""
        with self._fd_in_use:  # closed meanwhile by another thread, the descriptor might be that of another file
            if self._fd < 0:
                return False
            try:
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return False
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            return True

    def commit(self, size: int) -> None:
        """Make the first ``size`` bytes real.

        Raises:
            HeapError: the system has no memory for them.
        """
        if size <= self.committed:
            return
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(self._fd, self.committed, size - self.committed)
            except OSError as error:
                raise HeapError(f"no room for {size} bytes of shared memory: {error}") from error
        self.committed = size

    def unlink(self) -> None:
        """Take the name away; mappings stay."""
        if self._linked:
            self._linked = False
            with contextlib.suppress(FileNotFoundError):
                _posixshmem.shm_unlink(self.name)

    def retire(self) -> None:
        """End the creator's part: the name goes, and so does the lock."""
        self.unlink()
        self.close_lock()

    def close(self) -> None:
        """Let go of the segment; it is unmapped once no tensor refers to it.

        Leaves name and lock alone: a forked child closes its copy without ending the segment of its parent.
        """
        with self._fd_in_use:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)


_lock_holders: weakref.WeakSet[Segment] = weakref.WeakSet()


def _leave_locks_to_the_parent() -> None:
    for segment in list(_lock_holders):
        segment.close_lock()


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)
