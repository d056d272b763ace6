"""Faults on real ranks: one of them goes wrong, and what they saw is compared with the row of the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import fault_cases
from tests.cases import wait_for
from tests.fault_cases import Act, Spoil, num_ranks_of
from tests.faults import ENDED, PATIENCE, SHARED, Claims, Delays, Fault, LateError, Left, Seen, names, names_left
from tokenferry.cli.ranks import RankError, RankPool

DEADLINE = 1.2
"""Seconds, where the fault shows by the deadline."""
NO_DEADLINE = 60.0
"""Seconds, where it must show without."""


class Trials(Claims):
    """The row of a test, and the ways to compare with it.

    Args:
        row: of the table.
        pool_of: gives ranks that others use too.
        folder: for what ranks write down.
    """

    def __init__(self, row: Fault, pool_of: Callable[[int], RankPool], folder: Path) -> None:
        super().__init__(row)
        self._pool_of = pool_of
        self._mark = folder / "mark"

        self.pool: RankPool | None = None
        """The ranks; by default those that others use too, or new ones if one is to end."""
        self.shared = SHARED
        """Where their shared memory has its names."""

    def suffer(self, kind: str, act: Act, deadline: float = NO_DEADLINE, **options: Any) -> list[Seen | None]:
        """Let the last rank act; see :func:`tests.fault_cases.suffer`."""
        return self._run(num_ranks_of(kind), fault_cases.suffer, (kind, act), (deadline,), options, deadline)

    def construct(self, kind: str, spoil: Spoil, **options: Any) -> list[Seen | None]:
        """Let something be wrong on the last rank while a Buffer is made; see :func:`tests.fault_cases.construct`."""
        deadline = options.get("deadline", NO_DEADLINE)
        return self._run(num_ranks_of(kind), fault_cases.construct, (kind, spoil), (), options, deadline)

    def _run(self, *trial: Any) -> list[Seen | None]:
        try:
            return self._try(*trial)
        except LateError:  # the machine may have had too much to do
            return self._try(*trial)

    def _try(
        self,
        num_ranks: int,
        function: Callable[..., Seen],
        what: tuple[str, Act | Spoil],
        more: tuple[Any, ...],
        options: dict[str, Any],
        deadline: float,
    ) -> list[Seen | None]:
        arguments = (*what, self.row.after, *more, self._mark, options)
        before = names(self.shared)
        if self.row.itself is ENDED:
            with RankPool(num_ranks, 1) as fresh:
                seen, delay = self._call(fresh, function, arguments)
            codes = [process.exitcode for process in fresh.processes[:-1]]
            assert codes == [0] * (num_ranks - 1), f"ranks ended with {codes}"
            assert not any(process.is_alive() for process in fresh.processes)
        else:
            seen, delay = self._call(self.pool or self._pool_of(num_ranks), function, arguments)
        happened, _, note = self._mark.read_text().partition(" ")
        expected = {note} if self.row.left is Left.NAME else set[str]()
        assert expected <= names(self.shared), f"{expected} are not left in /dev/shm"
        for name in expected:
            (self.shared / name).unlink()
        found = names_left(before, self.shared)
        assert not found, f"names are left in /dev/shm: {found}"
        guilty = range(num_ranks) if options.get("everybody") else [num_ranks - 1]
        self.check(seen, guilty, float(happened), deadline, delay)
        return seen

    def _call(
        self, pool: RankPool, function: Callable[..., Seen], arguments: tuple[Any, ...]
    ) -> tuple[list[Seen | None], float]:
        last = pool.num_ranks - 1
        with Delays() as delays:
            try:
                seen = pool.run(function, *arguments)
            except RankError as error:
                if self.row.itself is not ENDED or set(error.failures) != {last}:
                    raise
                seen = error.results
        if self.row.itself is ENDED:
            assert wait_for(lambda: not pool.processes[last].is_alive(), PATIENCE)
        return seen, delays.seconds
