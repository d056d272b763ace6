"""Faults and what follows from them: the rows of the table in docs/reliability.md, which tests compare with.

A test says what follows in one place, its ``@fault`` line, and hands what it saw to the fixture ``claims``, which
compares. The table is made of the same lines (``python -m tests.fault_table``).
"""

from __future__ import annotations

import inspect
import os
import re
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.cases import segments, wait_for
from tokenferry import PeerError, TokenferryError

SHARED = Path("/dev/shm")
PATIENCE = 5.0
"""Seconds in which what is let go of must be gone."""
_SETTLED = 0.05
"""Seconds without a change, after which none is expected."""

Raised = tuple[type[BaseException], ...]
"""One of these; empty: nothing."""
ENDED: Raised = (SystemExit,)
"""The process has ended."""


class Within(Enum):
    """The longest time from the fault, or from a call if that comes later, to the exception or the result."""

    AT_ONCE = "1 s"
    DEADLINE = "deadline + 1 s"
    GROUP = "timeout of the process group + 1 s"

    def seconds(self, deadline: float) -> float:
        return 1.0 if self is Within.AT_ONCE else deadline + 1.0


class Blames(Enum):
    """Whom the others name."""

    IT = ""
    SOME_IT = "; some may name a node that waited for it"


class After(Enum):
    """What ranks can do then."""

    GOES_ON = "the Buffer goes on"
    WITHOUT = "the Buffer goes on without it"
    SHRINK = "lost; `shrink()` goes on without it"
    NONE = "is not made"
    LATER = "is not made; a later one works"
    ANEW = "lost; a new Buffer works"
    SURVIVORS = "lost; a new Buffer of the others works"


class Left(Enum):
    """What is there in the end that was not there before."""

    NOTHING = "nothing"
    NAME = "the name of its segment"


class Fault(NamedTuple):
    """A row of the table."""

    what: str
    on: tuple[str, ...]
    itself: Raised
    others: Raised
    within: Within
    after: After
    left: Left
    blames: Blames


Test = Callable[..., None]


def fault(
    what: str,
    *,
    on: Sequence[str],
    itself: Raised | type[BaseException] = (),
    others: Raised | type[BaseException] = (),
    within: Within = Within.AT_ONCE,
    after: After,
    left: Left = Left.NOTHING,
    blames: Blames = Blames.IT,
) -> Callable[[Test], Test]:
    """Mark a test as the one that shows what follows from a fault. It must use the fixture ``claims``.

    Args:
        what: happens.
        on: which kinds of Buffers; a test with an argument ``kind`` runs on each.
        itself: what the rank at fault raises.
        others: what the other ranks raise. A PeerError must name the rank at fault.
        within: what time.
        after: what ranks can do then.
        left: what is there in the end that was not there before: names, mappings, files, threads, processes, locked
            memory.
        blames: whom the others name.
    """
    itself, others = (kinds if isinstance(kinds, tuple) else (kinds,) for kinds in (itself, others))
    row = Fault(what, tuple(on), itself, others, within, after, left, blames)

    def mark(test: Test) -> Test:
        names = list(inspect.signature(test).parameters)
        assert "claims" in names, f"{test.__name__} must compare with its row"
        if "kind" in names:
            # Between nodes low latency fails as it does inside one, and as the rail does; where no rank is gone or
            # absent, all fails as it does inside one; who waits for expanding ranks waits as for others: slow.
            later = ["two nodes, " if what == "SIGKILL" or what.startswith("stays away") else "two nodes"]
            later += ["`ElasticBuffer`"] * what.startswith(("SIGSTOP", "stays away", "Ctrl-C", "exit"))
            kinds = [pytest.param(on, marks=[pytest.mark.slow] * on.startswith(tuple(later))) for on in row.on]
            test = pytest.mark.parametrize("kind", kinds if len(kinds) > 1 else row.on)(test)
        return pytest.mark.fault(row)(test)

    return mark


class Holdings(NamedTuple):
    """What a process has that it can forget to give back."""

    mappings: int
    """Of shared memory."""
    files: int
    threads: int
    children: int
    locked: int
    """KiB of memory that is locked."""

    @staticmethod
    def now() -> Holdings:
        """Of this process."""
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return Holdings(
            len(segments()),
            len(os.listdir("/proc/self/fd")),
            len(os.listdir("/proc/self/task")),
            len(children()),
            int(status.get("VmLck", "0").split()[0]),
        )

    @staticmethod
    def settled() -> Holdings:
        """Of this process, once what is on its way has gone: threads that still end would hide others later."""
        last, since = Holdings.now(), time.monotonic()
        while time.monotonic() < since + _SETTLED:
            time.sleep(_SETTLED / 10)
            now = Holdings.now()
            if now != last:
                last, since = now, time.monotonic()
        return last

    def left(self) -> dict[str, int]:
        """How much more than this there is, when what is on its way has gone."""
        wait_for(lambda: not self._more(), PATIENCE)
        return self._more()

    def _more(self) -> dict[str, int]:
        pairs = zip(self._fields, self, Holdings.now(), strict=True)
        return {name: now - before for name, before, now in pairs if now > before}


def children() -> list[int]:
    """The processes that this one started and that nobody has waited for."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat = (folder / "stat").read_text()
        except OSError:
            continue  # it has ended
        if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
            found.append(int(folder.name))
    return found


def names(shared: Path = SHARED) -> set[str]:
    """Of segments that anybody can open."""
    return {path.name for path in shared.glob("tokenferry-*")}


def names_left(before: set[str], shared: Path = SHARED) -> set[str]:
    """Names that are new and stay. Those that other programs make meanwhile are gone soon."""
    new = names(shared) - before
    wait_for(lambda: not new & names(shared), PATIENCE)
    return new & names(shared)


@dataclass
class Seen:
    """What a rank saw of a fault. Times are of the machine's monotonic clock."""

    error: BaseException | None = None
    operations: list[tuple[float, float]] = field(default_factory=list)
    """When each began and ended."""
    read_late: bool = False
    """Memory of a rank that had let go of it."""
    available: bool = True
    left: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def operation(self) -> Iterator[None]:
        """One operation: notes when it began, when it ended and what it raised, and lets nothing out."""
        called = time.monotonic()
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:
            self.error = error.with_traceback(None)
            error.__context__ = error.__cause__ = None  # whose frames would keep Buffers
        self.operations.append((called, time.monotonic()))


class Delays:
    """How much later than it asked a process wakes up, on a machine with too much to do, added up over a block."""

    _STEP = 0.05

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> Delays:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            started = time.monotonic()
            if self._done.wait(self._STEP):
                return
            self.seconds += time.monotonic() - started - self._STEP


class LateError(AssertionError):
    """A rank noticed later than claimed."""


class Claims:
    """The row of a test, compared with what ranks saw."""

    def __init__(self, row: Fault) -> None:
        self.row = row
        self.checks = 0
        self.slowest = 0.0

    def check(
        self,
        seen: Sequence[Seen | None],
        guilty: Collection[int],
        happened: float,
        deadline: float,
        delay: float = 0.0,
    ) -> None:
        """Compare.

        Args:
            seen: by the ranks; None where the process has ended.
            guilty: the ranks at fault.
            happened: when.
            deadline: of the Buffer.
            delay: of the machine: time in which a rank may not have run does not count.
        """
        row, names_it = self.row, []
        for rank, it in enumerate(seen):
            claimed = row.itself if rank in guilty else row.others
            if claimed is ENDED:
                assert it is None, f"rank {rank} has not ended: {it}"
                continue
            assert it is not None, f"rank {rank} has ended"
            raised = () if it.error is None else (type(it.error),)
            assert raised == claimed or (raised and raised[0] in claimed), f"rank {rank}: {it.error!r}, not {claimed}"
            operations = it.operations[-1:] if rank in guilty else it.operations
            seconds = max((ended - max(called, happened) for called, ended in operations), default=0.0)
            limit = row.within.seconds(deadline) + delay
            if seconds > limit:
                raise LateError(f"rank {rank}: after {seconds:.2f} s, not {limit:.2f} s: {it.error!r}")
            self.slowest = max(self.slowest, seconds)
            assert it.left == {}, f"rank {rank} is left with {it.left}"
            if row.after in (After.GOES_ON, After.WITHOUT):
                assert it.available, f"rank {rank} cannot go on: {it.error!r}"
            else:
                assert it.error is None or not it.available, f"rank {rank} goes on after {it.error!r}"
            blames = isinstance(it.error, PeerError) or type(it.error) is TokenferryError
            if blames and (rank not in guilty or len(guilty) == len(seen)):
                names_it.append(any(_names(it.error, culprit) for culprit in guilty))
                assert names_it[-1] or row.blames is not Blames.IT, f"rank {rank}: {it.error}"
        assert any(names_it) or not names_it
        self.checks += 1


def _names(error: BaseException | None, culprit: int) -> bool:
    """Whether the error blames a rank: by its number, or those of all ranks of its node, and nobody else."""
    at_fault = getattr(error, "ranks", (culprit,))
    words = re.search(rf"\branks? (\d+, )*{culprit}\b", str(error)) is not None
    nodes = re.findall(r"\(ranks ([\d, ]+)\)", str(error))
    return (
        words
        and all(str(culprit) in ranks.split(", ") for ranks in nodes)
        and (culprit in at_fault or "gave up" in str(error) or "(ranks" in str(error))
    )
