"""Writes docs/compatibility.md from what the checks returned."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from tests.compatibility.rows import ABSENT, IGNORED, LOGGED, NOT_ON_CPU, REFUSED, ROWS, STATUSES, UNKNOWN, WORKS, Key

PAGE = Path(__file__).parent.parent.parent / "docs" / "compatibility.md"

HEAD = """# Compatibility, argument by argument

Every argument of every public method, given a value that is not its default, on two CPU ranks. This page is written
by `python -m tests.compatibility` from what the checks in `tests/compatibility/` see; `tests/test_compatibility.py`
makes them again, compares, and finds arguments without a line. It shows **CPU ranks only**: what has run on GPUs, and
what was only compiled, is in [performance.md](performance.md#what-is-missing) and [elastic.md](elastic.md). Whole
frameworks' sequences of calls: [clients.md](clients.md).

| status | arguments | |
|---|---|---|
"""
MEANING = {
    WORKS: "its effect was seen",
    NOT_ON_CPU: "results are the same; GPUs, or speed, may depend on it",
    IGNORED: "results are the same, whatever it is",
    LOGGED: "likewise; a line at level INFO says so once in a process",
    REFUSED: "known, not built: the message names the argument",
    UNKNOWN: "not known here; of forks of DeepEP, unless said otherwise",
    ABSENT: "`hasattr` is False",
}
TITLES = {
    "Buffer": "Buffer",
    "Config": "Config",
    "EventHandle": "EventHandle",
    "EventOverlap": "EventOverlap",
    "Buffer.runtime": "Buffer.runtime",
    "ElasticBuffer": "ElasticBuffer",
    "EPHandle": "EPHandle",
}


def render(seen: dict[Key, str]) -> str:
    """The page, from the status of every row."""
    counts = Counter(seen.values())
    text = HEAD + "".join(f"| {status} | {counts[status]} | {MEANING[status]} |\n" for status in STATUSES)
    for owner, title in TITLES.items():
        text += f"\n## {title}\n\n| method | argument | tried | status | |\n|---|---|---|---|---|\n"
        of_method: dict[str, list[Key]] = {}
        for key in ROWS:
            if key[0] == owner:
                of_method.setdefault(key[1], []).append(key)
        for method, keys in of_method.items():
            shown = "constructor" if method == "__init__" else f"`{method}`"
            for key in keys:
                row = ROWS[key]
                argument = f"`{row.argument}`" if row.argument else ""
                text += f"| {shown} | {argument} | {row.tried} | {seen[key]} | {row.effect} |\n"
                shown = ""
    return text
