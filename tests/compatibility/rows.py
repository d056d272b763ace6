"""Rows of the compatibility page: an argument, a value that is not its default, and the check that tries it.

A check runs on each of two CPU ranks, alike and at the same time, asserts what its row says, and returns the status.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, Case, Scenario
from tests.elastic_cases import Elastic, elastic_buffer
from tests.low_latency_cases import Case as QuickCase
from tests.low_latency_cases import Scenario as QuickScenario
from tests.low_latency_cases import make_buffer
from tokenferry import Buffer, ElasticBuffer, construction

WORKS = "works"
NOT_ON_CPU = "accepted, without effect on CPU ranks"
IGNORED = "accepted, no meaning here"
LOGGED = "accepted, no meaning here (logged once)"
REFUSED = "`NotImplementedError`"
UNKNOWN = "`TypeError`"
ABSENT = "does not exist"
STATUSES = (WORKS, NOT_ON_CPU, IGNORED, LOGGED, REFUSED, UNKNOWN, ABSENT)

NUM_RANKS = 2
CASE = Case(tokens=(9, 6), num_topk=4, local_experts=3, combine_dtype=torch.float32, bias="two")
QUICK_CASE = QuickCase(tokens=(5, 3), hidden=128)
ELASTIC_CASE = Case(tokens=(5, 7), num_topk=3, local_experts=4, alignment=4)


class At:
    """One rank, with Buffers to try things on, and inputs whose results are known."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.group: Any = dist.group.WORLD

    @cached_property
    def buffer(self) -> Buffer:
        return Buffer(self.group, timeout=TIMEOUT)

    @cached_property
    def nodes(self) -> Buffer:
        """Of ranks that are a node each."""
        return Buffer(self.group, node=self.rank, timeout=TIMEOUT)

    @cached_property
    def quick(self) -> Buffer:
        """In low-latency mode."""
        return make_buffer(num_rdma_bytes=1 << 20, enable_shrink=True)

    @cached_property
    def elastic(self) -> ElasticBuffer:
        return elastic_buffer(self.group, num_max_tokens_per_rank=32, hidden=64, num_topk=3)

    @cached_property
    def scenario(self) -> Scenario:
        return Scenario(CASE, self.rank, self.num_ranks)

    @cached_property
    def quick_scenario(self) -> QuickScenario:
        return QuickScenario(QUICK_CASE, self.rank, self.num_ranks)

    def elastic_scenario(self, **options: Any) -> Elastic:
        return Elastic(ELASTIC_CASE, self.rank, self.num_ranks, **options)

    @cached_property
    def dispatched(self) -> tuple[Any, ...]:
        """What a dispatch of ``scenario`` returns."""
        return self.scenario.dispatch(self.buffer)

    @cached_property
    def quick_dispatched(self) -> tuple[Any, ...]:
        return self.quick_scenario.dispatch(self.quick)

    def close(self) -> None:
        for name in ("buffer", "nodes", "quick", "elastic"):
            if name in self.__dict__:
                self.__dict__[name].destroy()


Check = Callable[[At], str]


class Row(NamedTuple):
    """One line of the page."""

    owner: str
    """``Buffer``, for example."""
    method: str
    """``__init__`` for the constructor."""
    argument: str
    """Empty for a method that has none."""
    tried: str
    """The value, or what was done."""
    effect: str
    """What the check asserts, in words."""
    check: Check


Key = tuple[str, str, str]
ROWS: dict[Key, Row] = {}


def add(owner: str, method: str, argument: str, tried: str, effect: str, check: Check) -> None:
    """Add a row; no argument has two."""
    key = (owner, method, argument)
    assert key not in ROWS, key
    ROWS[key] = Row(*key, tried, effect, check)


def tries(owner: str, method: str, argument: str, tried: str, effect: str) -> Callable[[Check], Check]:
    """Make the decorated check the one of an argument."""

    def decorate(check: Check) -> Check:
        add(owner, method, argument, tried, effect, check)
        return check

    return decorate


def forks(owner: str, method: str, arguments: list[str], call: Callable[[At, dict[str, Any]], object]) -> None:
    """Add rows of arguments that only forks of DeepEP have."""
    for name in arguments:

        def check(at: At, name: str = name) -> str:
            with pytest.raises(TypeError, match=f"unexpected keyword argument '{name}'"):
                call(at, {name: 1})
            return UNKNOWN

        add(owner, method, name, "1", "known to forks only", check)


def absent(owner: str, names: list[str], where: Callable[[At], object], effect: str) -> None:
    """Add rows of methods that DeepEP has and that do not exist here."""
    for name in names:

        def check(at: At, name: str = name) -> str:
            assert not hasattr(where(at), name)
            return ABSENT

        add(owner, name, "", "`hasattr`", effect, check)


def refused(name: str, call: Callable[[], object]) -> str:
    """See that a call says of an argument that it is not built."""
    with pytest.raises(NotImplementedError, match=f"^{name}: got .*allowed: "):
        call()
    return REFUSED


@contextmanager
def messages() -> Iterator[list[str]]:
    """What tokenferry logs in the block."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("tokenferry")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def ignored(name: str, construct: Callable[[], None]) -> str:
    """Construct twice, with a check that nothing is different; see whether a message says so once."""
    construction._noted.discard(name)
    with messages() as found:
        construct()
        construct()
    said = sum(f"{name} has no meaning" in message for message in found)
    assert said < 2
    return LOGGED if said else IGNORED


def run(rank: int, num_ranks: int, keys: list[Key]) -> dict[Key, str]:
    """The statuses that checks return on this rank, or what went wrong. Buffers are made anew after a failure."""
    at, seen = At(rank, num_ranks), {}
    for key in keys:
        try:
            status = ROWS[key].check(at)
            assert status in STATUSES, status
        except Exception as error:
            status = f"failed: {type(error).__name__}: {error}"
        statuses: list[Any] = [None] * num_ranks
        dist.all_gather_object(statuses, status)
        if any(other.startswith("failed") for other in statuses):
            at.close()
            at = At(rank, num_ranks)
        seen[key] = status
    at.close()
    return seen
