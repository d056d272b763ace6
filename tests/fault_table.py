"""The table of faults in docs/reliability.md; ``python -m tests.fault_table`` writes it, from what the tests say."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.faults import ENDED, Fault, Raised

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
FILES = ("test_fault_ranks", "test_fault_memory", "test_hosts")
BEGIN, END = "<!-- python -m tests.fault_table -->\n", "<!-- end -->\n"
HEAD = ("fault", "on", "the rank itself raises", "the others raise", "within", "the Buffer", "left behind", "test")


def rows() -> list[tuple[Fault, str]]:
    """All rows, with the names of their tests, in the order of the files."""
    found = []
    for file in FILES:
        for name, test in vars(importlib.import_module(f"tests.{file}")).items():
            marks: list[pytest.Mark] = getattr(test, "pytestmark", [])
            found += [(mark.args[0], f"{file}::{name}") for mark in marks if mark.name == "fault"]
    return found


def table() -> str:
    """In Markdown."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for row, test in rows():
        others = _raised(row.others) + row.blames.value
        cells = ("; ".join(row.on), _raised(row.itself), others, row.within.value, row.after.value)
        lines.append((row.what, *cells, row.left.value, f"`{test}`"))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _raised(kinds: Raised) -> str:
    if kinds is ENDED:
        return "(has ended)"
    return " or ".join(f"`{kind.__name__}`" for kind in kinds) or "nothing"


def page() -> str:
    """The page with the table as the tests say it."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page())
