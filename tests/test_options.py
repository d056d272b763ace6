"""What values the options of commands may have."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import pytest

from tokenferry.__main__ import main
from tokenferry.cli.options import natural, number_of_ranks, positive, positive_number


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [(natural, "0", 0), (positive, "1", 1), (number_of_ranks, "64", 64), (positive_number, "2.5e-3", 0.0025)],
)
def test_values(kind: Callable[[str], float], text: str, value: float) -> None:
    assert kind(text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((natural, text) for text in ("-1", "1.0", "x", "")),
        *((positive, text) for text in ("0", "-3", "two", "1e3")),
        *((number_of_ranks, text) for text in ("0", "many", str(64 + 4 * (os.cpu_count() or 1)))),
        *((positive_number, text) for text in ("0", "-1", "inf", "nan", "1e6", "soon", "")),
    ],
)
def test_what_is_not_allowed_is_named(kind: Callable[[str], float], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=rf"^got {text}; allowed: "):
        kind(text)


@pytest.mark.parametrize("command", ["demo", "soak", "bench", "doctor"])
def test_no_command_starts_thousands_of_ranks(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--ranks", "100000"])
    assert stopped.value.code == 2
    assert "argument --ranks: got 100000; allowed: 1 to" in capsys.readouterr().err
