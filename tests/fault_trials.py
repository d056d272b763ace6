"""Faults on real ranks: starts them, lets one of them go wrong, and compares what they saw with the row of the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import fault_cases
from tests.cases import wait_for
from tests.fault_cases import Act, Spoil, num_ranks_of
from tests.faults import ENDED, PATIENCE, Claims, Delays, Fault, Left, Seen, names, names_left
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

    def suffer(self, kind: str, act: Act, deadline: float = NO_DEADLINE, **options: Any) -> list[Seen | None]:
        """Let the last rank act; see :func:`tests.fault_cases.suffer`."""
        arguments = (kind, act, self.row.after, deadline, self._mark, options)
        return self.run(num_ranks_of(kind), fault_cases.suffer, arguments, deadline)

    def construct(self, kind: str, spoil: Spoil, pool: RankPool | None = None, **options: Any) -> list[Seen | None]:
        """Let the last rank be spoiled while a Buffer is made; see :func:`tests.fault_cases.construct`."""
        arguments = (kind, spoil, self.row.after, self._mark, options)
        deadline = options.get("deadline", NO_DEADLINE)
        return self.run(num_ranks_of(kind), fault_cases.construct, arguments, deadline, pool)

    def run(
        self,
        num_ranks: int,
        function: Callable[..., Seen],
        arguments: tuple[Any, ...],
        deadline: float,
        pool: RankPool | None = None,
    ) -> list[Seen | None]:
        """Call ``function`` on ranks of which the last is at fault, and compare."""
        ends = self.row.itself is ENDED
        before = names()
        if ends and pool is None:
            with RankPool(num_ranks, 1) as fresh:
                seen, delay = self._call(fresh, function, arguments)
            codes = [process.exitcode for process in fresh.processes[:-1]]
            assert codes == [0] * (num_ranks - 1), f"ranks ended with {codes}"
            assert not any(process.is_alive() for process in fresh.processes)
        else:
            seen, delay = self._call(pool or self._pool_of(num_ranks), function, arguments)
        happened, _, note = self._mark.read_text().partition(" ")
        expected = {note} if self.row.left is Left.NAME else set[str]()
        found = names_left(before, expected)
        for name in expected:
            Path("/dev/shm", name).unlink()
        assert found == expected, f"names are left in /dev/shm: {found}"
        self.check(seen, [num_ranks - 1], float(happened), deadline, delay)
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
