"""Ranks on this machine: processes in one Gloo group, started once and given work any number of times."""

from __future__ import annotations

import gc
import multiprocessing
import multiprocessing.connection
import os
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

_GRACE_SECONDS = 5.0
_COLLECTIVE_TIMEOUT = timedelta(seconds=120)


class RankError(RuntimeError):
    """A function raised on a rank, or the rank ended.

    Attributes:
        failures: what is known of every rank that failed.
        results: what the other ranks returned, by rank.
    """

    def __init__(self, failures: dict[int, str], results: list[Any]) -> None:
        super().__init__("\n".join(f"rank {rank} failed: {failures[rank]}" for rank in sorted(failures)))
        self.failures = failures
        self.results = results


class RankPool:
    """Processes 0 .. ``num_ranks - 1`` of this machine, in one Gloo group (``dist.group.WORLD`` in each).

    A context manager; leaving it, also by Ctrl-C, ends the processes.

    Args:
        num_ranks: number of processes.
        num_threads: torch threads in each; by default the cores are shared out.
        begin: a module-level function that each process calls with its rank first of all, before the group is made.
        preload: modules that the ranks will need, imported once for all of them. The first pool of this process
            decides: its server of forks serves the later ones.
    """

    def __init__(
        self,
        num_ranks: int,
        num_threads: int | None = None,
        begin: Callable[[int], None] | None = None,
        preload: Iterable[str] = (),
    ) -> None:
        self.num_ranks = num_ranks
        threads = num_threads or max(1, (os.cpu_count() or 1) // num_ranks)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "tokenferry", *preload])
        self._directory = tempfile.TemporaryDirectory(prefix="tokenferry-")
        store = str(Path(self._directory.name) / "store")
        self._connections: list[Connection] = []
        self.processes = []
        try:
            with _interrupts_held():
                for rank in range(num_ranks):
                    ours, theirs = context.Pipe()
                    process = context.Process(
                        target=_serve,
                        args=(rank, num_ranks, threads, store, theirs, begin),
                        daemon=True,
                        name=f"rank-{rank}",
                    )
                    process.start()
                    theirs.close()
                    self._connections.append(ours)
                    self.processes.append(process)
        except BaseException:
            self.stop()
            raise

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call ``function(rank, num_ranks, *args)`` on every rank.

        Args:
            function: a module-level function.
            args: picklable values.

        Returns:
            What the ranks returned, by rank.

        Raises:
            RankError: it raised on a rank, or a rank ended.
        """
        for connection in self._connections:
            with suppress(ConnectionError):  # its rank has ended, as is found out below
                connection.send((function, args))
        waiting = {connection: rank for rank, connection in enumerate(self._connections)}
        results: list[Any] = [None] * self.num_ranks
        failures: dict[int, str] = {}
        while waiting:
            for ready in multiprocessing.connection.wait(list(waiting)):
                assert isinstance(ready, Connection)
                rank = waiting.pop(ready)
                try:
                    succeeded, value = ready.recv()
                except (EOFError, ConnectionError):
                    self.processes[rank].join(_GRACE_SECONDS)
                    succeeded, value = False, f"the process ended with code {self.processes[rank].exitcode}"
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
        if failures:
            raise RankError(failures, results)
        return results

    def close(self) -> None:
        """End the processes."""
        for connection in self._connections:
            connection.close()
        deadline = time.monotonic() + _GRACE_SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        self._directory.cleanup()

    def stop(self) -> None:
        """End the processes without waiting for what they do."""
        for process in self.processes:
            process.terminate()
        self.close()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.stop()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let a Ctrl-C wait until the block is done.

    Processes inherit the signal mask: with SIGINT blocked, new ones print no tracebacks of half-done imports. That
    does not protect this process, where a thread of some library may take the signal; hence the handler.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    resource_tracker.ensure_running()  # started later, by the first process, it would unblock SIGINT
    previous = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, previous)
    if held:
        raise KeyboardInterrupt


def _serve(
    rank: int,
    num_ranks: int,
    num_threads: int,
    store: str,
    connection: Connection,
    begin: Callable[[int], None] | None,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops everyone
    gc.freeze()  # what the server of forks has imported is no garbage: a collection need not go through it
    if begin is not None:
        begin(rank)
    _end_with_parent(connection)  # by a thread: only processes without may enter namespaces, for example
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    torch.set_num_threads(num_threads)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=num_ranks, timeout=_COLLECTIVE_TIMEOUT
    )
    signal.signal(signal.SIGTERM, _leave)  # only now: a wait for the other ranks in C++ would not see it
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, ConnectionError):
            break
        try:
            answer = (True, function(rank, num_ranks, *args))
        except SystemExit:
            raise
        except BaseException:  # also what test frameworks raise past everyone
            answer = (False, traceback.format_exc())
        connection.send(answer)
    dist.destroy_process_group()


def _end_with_parent(connection: Connection) -> None:
    """End this process some time after the other end of the connection, however that ends, if it still goes on."""

    def watch() -> None:
        look = select.poll()
        look.register(connection.fileno(), 0)  # only for the end of it
        look.poll()
        time.sleep(_GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
