"""docs/compatibility.md: what it says is seen again, and no public argument is missing from it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest

from tests.compatibility import ROWS, run
from tests.compatibility.page import PAGE, render
from tests.compatibility.rows import ABSENT, NUM_RANKS, UNKNOWN, Key
from tests.conftest import PoolOf
from tokenferry import Buffer, Config, ElasticBuffer, EventHandle, EventOverlap

PUBLIC = {
    "Buffer": Buffer,
    "Config": Config,
    "EventHandle": EventHandle,
    "EventOverlap": EventOverlap,
    "ElasticBuffer": ElasticBuffer,
}
SPECIAL = ("__init__", "__call__", "__enter__")


@pytest.fixture(scope="module")
def seen(pool_of: PoolOf) -> list[dict[Key, str]]:
    """What each rank saw."""
    return pool_of(NUM_RANKS).run(run, list(ROWS))


@pytest.mark.parametrize("key", ROWS, ids=lambda key: "-".join(filter(None, key)))
def test_argument(seen: list[dict[Key, str]], key: Key) -> None:
    assert not [status[key] for status in seen if status[key].startswith("failed")]
    assert seen[0][key] == seen[1][key]


def test_page_says_what_was_seen(seen: list[dict[Key, str]]) -> None:
    assert PAGE.read_text() == render(seen[0]), "write it anew: python -m tests.compatibility"


def parameters(owner: str, kind: Any) -> Iterator[Key]:
    """Every public argument of a class; a method or property without any is a key of its own."""
    for name in dir(kind):
        member = inspect.getattr_static(kind, name)
        if name.startswith("_") and (name not in SPECIAL or member is getattr(object, name, None)):
            continue
        if isinstance(member, property):
            yield owner, f".{name}", ""
        elif callable(getattr(kind, name)):
            names = [argument for argument in inspect.signature(getattr(kind, name)).parameters if argument != "self"]
            for argument in names or [""]:
                yield owner, name, argument


@pytest.mark.parametrize("owner", PUBLIC)
def test_every_argument_has_a_row(seen: list[dict[Key, str]], owner: str) -> None:
    there = set(parameters(owner, PUBLIC[owner]))
    assert len(there) > 2
    assert there - set(ROWS) == set()
    rows = {key for key in ROWS if key[0] == owner and not (key[1].startswith(".") and not key[2])}
    assert {key for key in rows - there if seen[0][key] not in (UNKNOWN, ABSENT)} == set()
    assert {key for key in rows & there if seen[0][key] in (UNKNOWN, ABSENT)} == set()
