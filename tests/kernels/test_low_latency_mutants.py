"""The protocol of the low-latency kernels: no step of it can be left out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import but_slow, slow
from tests.kernels.mutants import mutated_module, mutated_modules
from tests.kernels.schedules import stop_at_deadlocks
from tests.kernels.test_low_latency import (
    TINY,
    Calls,
    bad_experts,
    crowded,
    left_alone,
    other_sizes,
    unlike,
    world_of,
)
from tests.low_latency_cases import Case
from tokenferry.dataplane.cuda import low_latency as host
from tokenferry.dataplane.cuda.kernels import flags, words
from tokenferry.dataplane.cuda.kernels import low_latency as shared
from tokenferry.dataplane.cuda.kernels import low_latency_combine as combine
from tokenferry.dataplane.cuda.kernels import low_latency_dispatch as dispatch

Modules = dict[str, ModuleType]

SECOND = Case(tokens=(2,), hidden=8, num_topk=2, seed=39)
THIRD = Case(tokens=(2,), hidden=8, num_topk=2, seed=10)


def calls_of(
    monkeypatch: Any,
    seed: int,
    modules: Modules,
    *cases: Case,
    pace: float = 0.02,
    **options: Any,
) -> list[Calls]:
    """Dispatches to be, in one world of two slots."""
    world = world_of(monkeypatch, 2, seed, TINY, pace=pace, modules=modules, max_steps=5000, **options)
    return [Calls(world, case, exact=options.get("exact", False)) for case in cases]


def check(*all_calls: Calls) -> None:
    all_calls[0].world.run()
    for calls in all_calls:
        calls.check()


def once(*given: Any, **options: Any) -> None:
    """A dispatch."""
    (calls,) = calls_of(*given, TINY, **options)
    calls.dispatch()
    check(calls)


def there_and_back(*given: Any) -> None:
    """A dispatch and its combine."""
    (calls,) = calls_of(*given, TINY)
    calls.dispatch()
    calls.combine(fewer=True)
    check(calls)


def at_once(*given: Any, **options: Any) -> None:
    """A dispatch, a combine, a dispatch in the slot of the first."""
    first, second = calls_of(*given, TINY, SECOND, **options)
    first.dispatch()
    first.combine(fewer=True)
    second.dispatch()
    check(first, second)


def dispatches_ahead(*given: Any, **options: Any) -> None:
    """The next dispatch is sent before one is received."""
    first, second, third = calls_of(*given, SECOND, TINY, THIRD, **options)
    first.dispatch(hook=True)
    second.dispatch(hook=True)
    first.receive()
    third.dispatch(hook=True)
    second.receive()
    third.receive()
    check(first, second, third)


def combine_ahead(*given: Any, **options: Any) -> None:
    """A combine is sent, in the slot of a dispatch, before the dispatch before it is received."""
    first, second, third = calls_of(*given, TINY, SECOND, TINY, **options)
    first.dispatch()
    second.dispatch(hook=True)
    third.dispatch(hook=True)
    second.receive()
    first.combine(hook=True)
    third.receive()
    first.receive()
    check(first, second, third)


def in_flight(*given: Any) -> None:
    """More dispatches than slots before one is received."""
    all_calls = calls_of(*given, TINY, SECOND, TINY)
    for calls in all_calls:
        calls.dispatch(hook=True)
    for calls in all_calls:
        calls.receive()
    check(*all_calls)


def refused(*given: Any) -> None:
    """Ranks that call different things."""
    (calls,) = calls_of(*given, TINY)
    world = calls.world
    world.buffers[1].plane.signature = 1
    calls.dispatch()
    world.run()
    assert [world.code(rank) for rank in range(2)] == [words.MISMATCH.value] * 2


BEFORE_SECOND_STEP = {-1: (2, 2)}
"""A receiver sleeps between its first two memory operations."""

PUBLISHED_AND_UNREAD = {1: (9, 16), -1: (4, 12)}
"""Sender 1 sleeps when it is about to publish, or has; a receiver sleeps until after that, before it reads."""

SCENARIOS: dict[str, Callable[..., None]] = {
    "once": once,
    "once, one asleep": lambda *given: once(*given, sleeps=BEFORE_SECOND_STEP),
    "once, shrinking": lambda *given: once(*given, shrinks=True),
    "there and back": there_and_back,
    "at once": at_once,
    "at once, exact": lambda *given: at_once(*given, exact=True),
    "dispatches ahead": dispatches_ahead,
    # Some programs have rows to push, and no choices.
    "dispatches ahead, many programs": lambda *given: dispatches_ahead(*given, most_programs=8),
    "combine ahead": combine_ahead,
    "combine ahead, exact": lambda *given: combine_ahead(*given, exact=True),
    "in flight": in_flight,
    "unlike": lambda *given: unlike(*given, pace=0.02),
    "unlike, two asleep": lambda *given: unlike(*given, sleeps=PUBLISHED_AND_UNREAD),
    "refused": refused,
    "other sizes": other_sizes,
    "bad experts": bad_experts,
    "crowded": crowded,
    "left alone": left_alone,
}


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old`` replaced by ``new`` in ``module``, to be found in one of the scenarios."""

    module: ModuleType
    old: str
    new: str
    scenario: str
    count: int = 1

    def modules(self, monkeypatch: Any) -> Modules:
        if self.module is host:
            mutated = mutated_module(host, self.old, self.new, self.count)
            monkeypatch.setattr(host.LowLatency, "_make_room", mutated.LowLatency._make_room)
            return {}
        copies = mutated_modules(self.module, self.old, self.new, self.count, entries=(dispatch, combine))
        return dict(zip(("dispatch", "combine"), copies, strict=True))


CREDIT = "bits = credit(own, state, status, slot, epoch, operation, timeout, False, SHRINK, R, RB, THREADS)\n"
FIRST_CREDIT = CREDIT.replace("False", "COUNTS")
ALL = "bits = (1 << R) - 1\n"
SIGN = "        sign(heap, rank, slot, signature, bits, RB)\n"
LACKS = "        failed = lacks(bits, SHRINK, R)\n"
SENT_TO = "goals = tl.load(state + SENT_TO + slot * RANKS + r, mask=r < R, other=0)"
RECEIVED = "tl.load(state + RECEIVED + slot)"
GOALS = "goals = tl.zeros([RB], tl.int64) + (epoch << TOKEN_BITS)"
LAST_SENDER = "if (before & 0xFFFFFFFF) == num_senders - 1:"
FIRST_LOOK = "epoch, failed = first_look(state, state + PUSH_EPOCH, THREADS)\n"
BEGIN = "        before = begin(state, epoch)\n"
PUBLISH = "    publish(heap, state, rank, slot, epoch, num_tokens, num_senders, failed, SHRINK, R, RB, THREADS)\n"
RELEASE = "release(heap, state, rank, R, RB, DEPTH)\n"
WAIT_FOR_WEIGHTS = """there = wait_at_least(
                state, flag, epoch << TOKEN_BITS, patience, operation, source, state + MASKED + source,
                FOR_WEIGHTS if COUNTS else None,
            )  # fmt: skip
"""
NEW_VERDICT = "agreed(((verdict >> 32) ^ epoch) & 0xFFFFFFFF == 0) == 0"
FIRST_DECIDES = "    if SHRINK:\n        if index == 0:\n"
UNMASKED = "            on = unmasked(state, R, RB, SHRINK, THREADS)\n"
VERDICT_WAITS = """            seen = wait_ranks(
                state, flags, goals, on, rank, timeout, operation, True, R, RB, THREADS, wait_stats=wait_stats
            )  # fmt: skip
"""

MUTANTS = {
    # Credit.
    "nobody waits for credit": Mutant(shared, SENT_TO, "goals = tl.zeros([RB], tl.int64)", "dispatches ahead"),
    "what was sent is forgotten": Mutant(
        shared, "tl.store(state + SENT_TO + slot", "tl.store(state + SENT_TO + 2 * RANKS + slot", "dispatches ahead"
    ),
    "credit for the operation before": Mutant(shared, SENT_TO, SENT_TO + " - 2", "dispatches ahead"),
    "counts without credit": Mutant(dispatch, FIRST_CREDIT + LACKS, ALL + LACKS, "dispatches ahead"),
    "choices without credit": Mutant(dispatch, CREDIT + "    place", ALL + "    place", "dispatches ahead"),
    "rows without credit": Mutant(dispatch, CREDIT + "    e =", ALL + "    e =", "dispatches ahead, many programs"),
    "weights without credit": Mutant(combine, FIRST_CREDIT + LACKS + SIGN, ALL + LACKS + SIGN, "combine ahead"),
    "exact rows without credit": Mutant(combine, CREDIT + "    if has", ALL + "    if has", "combine ahead, exact"),
    "credit of a masked rank": Mutant(
        shared, "on = unmasked(state, R, RB, SHRINK, THREADS)\n    received", "on = r < R\n    received", "left alone"
    ),
    "released before it is received": Mutant(shared, RECEIVED, RECEIVED + " + 2", "dispatches ahead"),
    "released behind the flag": Mutant(
        dispatch, PUBLISH, PUBLISH + "    if pid == 1:\n        " + RELEASE, "unlike, two asleep"
    ),
    "released of other slots": Mutant(shared, RECEIVED, "tl.load(state + RECEIVED + 1 - slot)", "dispatches ahead"),
    # Flags.
    "published by the first": Mutant(shared, LAST_SENDER, "if True:", "once"),
    "published by the last but one": Mutant(shared, LAST_SENDER, LAST_SENDER.replace("- 1", "- 2"), "once"),
    "published relaxed": Mutant(
        shared, 'values, mask=on, sem="release"', 'values, mask=on, sem="relaxed"', "there and back"
    ),
    "counting relaxed": Mutant(shared, '"acq_rel"', '"relaxed"', "once"),
    "counting does not release": Mutant(shared, '"acq_rel"', '"acquire"', "once"),
    "no barrier before counting": Mutant(shared, "    tl.debug_barrier()\n    one", "    one", "once"),
    "no wait for flags": Mutant(shared, GOALS, GOALS.replace("epoch", "epoch * 0"), "once"),
    "flags of the epoch before": Mutant(shared, GOALS, GOALS.replace("epoch", "(epoch - 1)"), "once"),
    "flags of the slot's operation before": Mutant(shared, GOALS, GOALS.replace("epoch", "(epoch - 2)"), "at once"),
    "own flag is not waited for": Mutant(
        shared, "    on = r < R\n    first", "    on = (r < R) & (r != rank)\n    first", "once"
    ),
    "one flag is not waited for": Mutant(
        shared, "    on = r < R\n    first", "    on = r < R - 1\n    first", "once"
    ),
    "polls relaxed": Mutant(flags, 'flag, 0, sem="acquire"', 'flag, 0, sem="relaxed"', "once"),
    "signature is not looked at": Mutant(shared, "theirs != signature", "theirs != theirs", "refused"),
    "signature is not sent": Mutant(dispatch, SIGN, "", "once"),
    # Weights.
    "no wait for weights": Mutant(combine, WAIT_FOR_WEIGHTS, "there = True\n", "there and back"),
    "weights of the operation before": Mutant(
        combine, WAIT_FOR_WEIGHTS, WAIT_FOR_WEIGHTS.replace("epoch", "(epoch - 2)"), "there and back"
    ),
    "weights have no barrier": Mutant(combine, "    tl.debug_barrier()\n    value", "    value", "there and back"),
    "weights seen relaxed": Mutant(flags, 'flag, 0, sem="acquire"', 'flag, 0, sem="relaxed"', "there and back"),
    "choices without weight count": Mutant(combine, " & (weight != SKIP)", "", "there and back"),
    # Slots and epochs.
    "one slot": Mutant(dispatch, "slot = epoch % DEPTH", "slot = epoch * 0", "in flight"),
    "rows of all slots in one place": Mutant(dispatch, "at = area + slot *", "at = area + 0 *", "dispatches ahead"),
    "words of all slots in one place": Mutant(shared, "kind + slot *", "kind + 0 *", "dispatches ahead"),
    "epoch stays": Mutant(shared, "tl.store(state + PUSH_EPOCH, epoch)", "pass", "there and back"),
    "epoch is counted by the first to begin": Mutant(
        shared, "if before == last:", "if before == 0:", "there and back"
    ),
    "counter of beginners stays": Mutant(shared, "tl.store(state + PUSH_BEGUN, 0)", "pass", "at once"),
    "begun before the first look": Mutant(
        dispatch,
        FIRST_LOOK + "        epoch += 1\n" + BEGIN,
        BEGIN.replace("epoch", "0").strip() + "\n        " + FIRST_LOOK + "        epoch += 1\n",
        "once, one asleep",
    ),
    "ticket is not looked at": Mutant(
        dispatch, "first_look(state, ticket", "first_look(state, state + PUSH_EPOCH", "in flight"
    ),
    "host does not receive in time": Mutant(host, "while self._pending and", "while False and", "in flight"),
    # Tables.
    "position counts itself": Mutant(dispatch, "i[None, :] < mine[:, None]", "i[None, :] <= mine[:, None]", "once"),
    "earlier sources are not counted": Mutant(dispatch, "at = before + (choice >> 32)", "at = choice >> 32", "once"),
    "sources count themselves": Mutant(
        dispatch, "(r < source) & (tokens > 0)", "(r <= source) & (tokens > 0)", "once"
    ),
    "begin counts itself": Mutant(dispatch, "tl.cumsum(count, 0) - count", "tl.cumsum(count, 0)", "once"),
    "choices of all ranks": Mutant(dispatch, "tl.where(e // L == reader, choice, -1)", "choice", "once"),
    "choices only where the row goes": Mutant(
        dispatch,
        "if has(bits, reader):",
        "if has(bits, reader) & (tl.max((e // L == reader).to(tl.int32)) == 1):",
        "at once",
    ),
    "crowd is sent": Mutant(dispatch, " & (position < each)", "", "crowded"),
    "crowd is counted": Mutant(dispatch, "tl.minimum(counts, each)", "counts", "crowded"),
    "bad experts are good modulo 2**32": Mutant(
        dispatch, "tl.where((others >= 0) & (others < E), others, -2)", "others", "bad experts"
    ),
    "more tokens than fit": Mutant(shared, "tl.minimum(seen & TOKEN_MASK, most)", "seen & TOKEN_MASK", "other sizes"),
    # Who is there.
    "verdict is ignored": Mutant(
        shared, "there = (r < R) & (((verdict >> r) & 1) != 0)", "there = r < R", "left alone"
    ),
    "verdict is not waited for": Mutant(shared, NEW_VERDICT, "epoch < 0", "left alone"),
    "verdict of before": Mutant(shared, NEW_VERDICT, "(verdict >> 32) + 2 < epoch", "once, shrinking"),
    "verdict without a wait": Mutant(shared, VERDICT_WAITS, "            seen = goals\n", "once, shrinking"),
    "masked rank is waited for": Mutant(shared, FIRST_DECIDES + UNMASKED, FIRST_DECIDES, "left alone"),
    "sums of ranks that are not there": Mutant(combine, ", either) & there\n", ", either)\n", "left alone"),
}


def play(scenario: str, seed: int, modules: Modules) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        stop_at_deadlocks(monkeypatch)
        SCENARIOS[scenario](monkeypatch, seed, modules)


def finds(scenario: str, seed: int, modules: Modules) -> bool:
    """Whether a seed shows the fault: wrong results or status, a deadlock or a late load."""
    try:
        play(scenario, seed, modules)
    except AssertionError:
        return True
    return False


@functools.cache
def check_right_protocol(scenario: str, seed: int) -> None:
    play(scenario, seed, {})


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    """By a seed that finds nothing in the right kernels."""
    mutant = MUTANTS[name]
    with monkeypatch.context() as patch:
        modules = mutant.modules(patch)
        seed = next((seed for seed in range(8) if finds(mutant.scenario, seed, modules)), None)
    assert seed is not None
    check_right_protocol(mutant.scenario, seed)


@pytest.mark.parametrize(
    "scenario",
    but_slow(
        SCENARIOS,
        "once",
        "once, shrinking",
        "at once",
        "at once, exact",
        "dispatches ahead",
        "dispatches ahead, many programs",
        "combine ahead",
        "bad experts",
        "unlike",
        "crowded",
        "other sizes",
    ),
)
@pytest.mark.parametrize("seed", [0, *slow(1)])
def test_right_protocol_passes(scenario: str, seed: int) -> None:
    check_right_protocol(scenario, seed)
