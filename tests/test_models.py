"""The protocol's models, searched by spin: all that can happen is right, and what would be wrong is found."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

from tests.spin import DEADLOCK, MODELS, Statement, labels, missing_programs, search

ROOT = Path(__file__).parent.parent
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()
needs_spin = pytest.mark.skipif(bool(missing_programs()), reason=f"not installed: {missing_programs()}")
FILES = {"ring": ["ring.pml", "rank.pml"], "gpu": ["gpu.pml", "pull.pml", "push.pml", "rank.pml"]}
FILES["regions"] = ["regions.pml"]


class Search(NamedTuple):
    """A model and its macros."""

    model: str
    options: Mapping[str, int] = MappingProxyType({})

    def __str__(self) -> str:
        return " ".join([self.model, *(f"{name}={value}" for name, value in self.options.items())])


LOW_LATENCY = 24
RIGHT = [
    Search("ring", {"ROUNDS": 2}),
    Search("ring", {"QUITS": 1, "KINDS": 1}),
    Search("ring", {"DISAGREE": 1, "KINDS": 1, "ROUNDS": 2}),
    Search("ring", {"KINDS": 8, "R": 3, "LENGTH": 3}),
    Search("gpu"),
    Search("gpu", {"DISAGREE": 1, "KINDS": 1}),
    Search("gpu", {"QUITS": 1}),
    Search("gpu", {"KINDS": LOW_LATENCY}),
    Search("gpu", {"KINDS": LOW_LATENCY, "QUITS": 1, "LENGTH": 2}),
    Search("gpu", {"KINDS": LOW_LATENCY, "R": 3, "HOOKS": 1}),
    Search("gpu", {"KINDS": 31, "FEWEST": 1, "MOST": 1, "LENGTH": 2}),
    Search("gpu", {"KINDS": 4, "R": 3, "MOST": 1, "LENGTH": 1}),
    Search("regions"),
]
LARGE = [
    Search("ring"),
    Search("ring", {"KINDS": 8, "R": 3}),
    Search("ring", {"KINDS": 4, "R": 3, "LENGTH": 1, "ROUNDS": 2}),
    Search("ring", {"QUITS": 1}),
    Search("ring", {"DISAGREE": 1}),
    Search("ring", {"KINDS": 29, "LENGTH": 3}),
    Search("gpu", {"DISAGREE": 1}),
    Search("gpu", {"KINDS": LOW_LATENCY, "QUITS": 1}),
    Search("gpu", {"R": 3, "MOST": 1, "KINDS": 4}),
    Search("gpu", {"R": 3, "MOST": 1, "KINDS": 1}),
    Search("gpu", {"R": 3, "KINDS": 8, "HOOKS": 2}),
    Search("gpu", {"KINDS": 31, "FEWEST": 1, "MOST": 1, "LENGTH": 3}),
    Search("regions", {"TENSORS": 2}),
    Search("regions", {"R": 3, "QUEUE": 1}),
    Search("regions", {"NUMBERS": 2}),
]
"""Minutes in all."""


@needs_spin
@pytest.mark.parametrize("case", RIGHT, ids=str)
def test_all_that_can_happen_is_right(tmp_path: Path, case: Search) -> None:
    verdict = search(case.model, case.options, tmp_path)
    assert verdict.fault == ""
    assert verdict.is_complete, verdict.output
    assert verdict.states > 1000
    _unreached.setdefault(case.model, []).append(verdict.unreached)


@needs_spin
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_more_that_can_happen_is_right(tmp_path: Path, case: Search) -> None:
    verdict = search(case.model, case.options, tmp_path, optimise=2, timeout=800)
    assert verdict.fault == ""
    assert verdict.is_complete, verdict.output


_unreached: dict[str, list[frozenset[Statement]]] = {}
"""Of the searches above."""


@needs_spin
@pytest.mark.parametrize("model", FILES)
def test_every_assertion_is_reached(model: str) -> None:
    """By one of the searches above, which must have run before."""
    ran = _unreached.get(model, [])
    if len(ran) < sum(case.model == model for case in RIGHT):
        pytest.skip("runs behind the searches of the whole file")
    left = frozenset.intersection(*ran)
    unreached = [(one.file, one.line) for one in left if "assert" in one.text]
    assert unreached == []


@cache
def _mutants(model: str) -> dict[str, int]:
    """What can be wrong in a model, by name."""
    text = (MODELS / f"{model}.pml").read_text()
    part = text[text.index("#define NONE 0") : text.index("#ifndef MUTANT")]
    return {name: int(number) for name, number in re.findall(r"#define ([A-Z_]+) (\d+)", part) if name != "NONE"}


PUSH = {"KINDS": LOW_LATENCY}
MUTANTS: dict[str, dict[str, tuple[str, dict[str, int]]]] = {
    "ring": {
        "NO_SLOT_WAIT": (DEADLOCK, {"STAGE": 3}),
        "NO_STAGE_WAIT": ("message_before_flag", {"LARGEST": 2}),
        "FLAG_BEFORE_HEADER": ("message_before_flag", {}),
        "FLAG_BEFORE_PAYLOAD": ("message_before_flag", {}),
        "ANY_FLAG": ("message_before_flag", {}),
        "RELEASE_BEFORE_READING": ("message_until_release", {}),
        "KEPT_AFTER_STEP_BACK": ("message_before_flag", {"DISAGREE": 1}),
        "PENDING_LATER": ("message_before_flag", {}),
        "NO_ADVANCE": (DEADLOCK, {}),
        "ROUNDS_BY_READER": (DEADLOCK, {"R": 3, "KINDS": 4, "LENGTH": 1, "STAGE": 1}),
        "ONE_LOOK": ("nobody_is_lost", {}),
        "NO_LOOK": (DEADLOCK, {"QUITS": 1}),
    },
    "gpu": {
        "NO_RELEASE_WAIT": ("message_before_stage", {}),
        "FLAG_BEFORE_MESSAGE": ("message_before_stage", {}),
        "FLAG_BEFORE_TENSOR": ("rows_before_flag", {}),
        "FLAG_BEFORE_ROUND": ("round_before_flag", {}),
        "ANY_EPOCH": ("message_before_stage", {}),
        "ANY_ROUND": ("round_before_flag", {}),
        "REUSED_EPOCH": ("message_before_stage", {}),
        "NO_HALF_WAIT": ("round_before_flag", {}),
        "ONE_HALF": ("round_before_flag", {}),
        "ALL_TAKE_PART": (DEADLOCK, {"R": 3, "KINDS": 4, "LENGTH": 1}),
        "ROUND_RELEASED_EARLY": ("round_until_release", {}),
        "RELEASE_BEFORE_READING": ("rows_until_release", {}),
        "OWNER_LEAVES": ("rows_before_flag", {}),
        "NO_COMPARING": ("agreed_before_reading", {"DISAGREE": 1}),
        "NO_DEADLINE": (DEADLOCK, {"QUITS": 1}),
        "NO_CREDIT": ("row_before_flag", PUSH),
        "CREDIT_BEFORE_READING": ("row_until_credit", PUSH),
        "CREDIT_AFTER_PUSH": (DEADLOCK, PUSH),
        "OWN_FLAG_IGNORED": ("row_until_credit", PUSH),
        "FLAG_BEFORE_ROWS": ("row_before_flag", PUSH),
        "FLAG_BEFORE_WEIGHTS": ("weights_before_flag", PUSH),
        "ANY_NUMBER": ("row_before_flag", PUSH),
        "NO_RECEIVE_BEFORE_REUSE": (DEADLOCK, PUSH),
    },
    "regions": {
        "NO_IDENTITY": ("region_is_known", {}),
        "REUSE_BEFORE_CLOSED": ("states_follow", {}),
        "STATE_BEFORE_ENTRY": ("opens_what_was_posted", {}),
        "POSTED_BEFORE_STATE": ("all_is_answered", {}),
        "ANSWERED_BEFORE_ACK": ("all_is_answered", {}),
        "ANSWER_AT_POLL": ("region_is_known", {}),
        "ANSWER_AT_LAUNCH": ("region_is_known", {}),
        "FIRST_READER_DECIDES": ("region_is_known", {"R": 3, "QUEUE": 1}),
        "READY_STAYS": ("region_is_known", {}),
        "RETIRED_UNNOTICED": ("region_is_known", {}),
    },
}
"""For each model what can be wrong: the label at which it is found, and macros."""
WORST = {
    "FLAG_BEFORE_PAYLOAD", "NO_RELEASE_WAIT", "FLAG_BEFORE_MESSAGE", "REUSED_EPOCH", "NO_CREDIT", "FLAG_BEFORE_ROWS",
    "ANSWERED_BEFORE_ACK",
}  # fmt: skip
"""What every run of the tests looks for; the rest is slow."""


@needs_spin
@pytest.mark.parametrize(
    ("model", "name"),
    [
        pytest.param(model, name, marks=() if name in WORST else pytest.mark.slow)
        for model, found in MUTANTS.items()
        for name in found
    ],
)
def test_mutant_is_found(tmp_path: Path, model: str, name: str) -> None:
    fault, options = MUTANTS[model][name]
    assert search(model, {**options, "MUTANT": _mutants(model)[name]}, tmp_path).fault == fault


@pytest.mark.parametrize("model", FILES)
def test_every_mutant_is_tried(model: str) -> None:
    assert MUTANTS[model].keys() == _mutants(model).keys()


def _invariants() -> list[tuple[str, str, str]]:
    """Of the page's table: model file, label, and what in the code."""
    part = PROTOCOL[PROTOCOL.index("## Model-checked") :]
    rows = re.findall(r"^\| [^|]+ \| `(\w+\.pml)`: ([^|]+) \| ([^|]+) \|$", part, re.MULTILINE)
    return [(file, label, code) for file, named, code in rows for label in re.findall(r"`(\w+)`", named)]


def test_table_names_what_is_there() -> None:
    """Labels of the models, and functions of the code, which the page says keep the invariants."""
    listed = _invariants()
    assert len(listed) > 15
    for file, label, code in listed:
        assert label in labels(file), (file, label)
        names = re.findall(r"`([\w.]+)`", code)
        assert names, code
        for name in names:
            module, _, function = name.rpartition(".")
            owner, path = importlib.import_module("tokenferry"), module.split(".")
            package = f"tokenferry.{module}"
            try:
                owner = importlib.import_module(package)
            except ModuleNotFoundError:
                owner = getattr(importlib.import_module(f"tokenferry.{'.'.join(path[:-1])}"), path[-1])
            assert hasattr(owner, function), name


def test_table_has_every_label_with_an_assertion() -> None:
    listed = {(file, label) for file, label, _ in _invariants()}
    for file in sorted({name for names in FILES.values() for name in names}):
        text = (MODELS / file).read_text().splitlines()
        for label, line in labels(file).items():
            following = next((row for row in text[line:] if row.strip()), "")
            if following.strip().startswith("assert("):
                assert (file, label) in listed, (file, label)
