"""For whom kernels wait, as they count it themselves: under a clock, with ranks that come late by so many steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.cases import Case
from tests.conftest import but_slow
from tests.kernels.low_latency_world import LowLatencyWorld
from tests.kernels.mutants import mutated_modules
from tests.kernels.parts_world import Load, Parts
from tests.kernels.parts_world import simulate as simulate_parts
from tests.kernels.simulator import Simulator
from tests.kernels.test_low_latency import Calls, world_of
from tests.kernels.world import Rank, World
from tests.low_latency_cases import Case as LowLatencyCase
from tokenferry.dataplane import OperationKind
from tokenferry.dataplane.cuda.kernels import (
    combine,
    dispatch,
    flags,
    layout,
    low_latency,
    low_latency_combine,
    low_latency_dispatch,
    notify,
    words,
)
from tokenferry.dataplane.cuda.kernels.flags import signal, wait_all, wait_at_least
from tokenferry.dataplane.cuda.waits import DeviceWaits
from tokenferry.stats import Recorder, Waits

LATE = 600
"""Steps."""
ENTRIES = (layout, notify, dispatch, combine, flags)
LOW_ENTRIES = (low_latency_dispatch, low_latency_combine, flags, low_latency)
KIND = OperationKind.COMBINE.value
FOR_EVER = tl.constexpr(1 << 40)

Modules = Sequence[ModuleType]


@triton.jit
def wait_twice(state, flag):
    wait_at_least(state, flag, 1, FOR_EVER, 3, 1, KIND=1)
    wait_at_least(state, flag, 2, FOR_EVER, 3, 1, KIND=1)


@triton.jit
def wait_for_three(state, flags):
    wait_all(None, state, state, flags, 7, 0, 3, 1, FOR_EVER, tl.program_id(0) == 1, 3)


@triton.jit
def tell(flag, value):
    signal(flag, value)


def toys(monkeypatch: Any, module: ModuleType) -> Simulator:
    simulator = Simulator(0, max_steps=10**5)
    simulator.random = random.Random(0)
    simulator.let_time_pass(monkeypatch, module)
    for name in ("wait_at_least", "wait_all", "signal"):
        monkeypatch.setitem(globals(), name, getattr(module, name))
    return simulator


def one_counts(monkeypatch: Any, modules: Modules = (flags,)) -> None:
    """Three programs wait for two values of a word, for the first one longer."""
    simulator = toys(monkeypatch, modules[-1])
    state, flag = torch.zeros(words.STATE_WORDS, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    simulator.launch(0, wait_twice, (3,), state, flag)
    simulator.launch(1, tell, (1,), flag, 1, delay=2 * LATE)
    simulator.launch(1, tell, (1,), flag, 2, delay=LATE)
    simulator.run()
    (waits,) = DeviceWaits(state, 0, 2).read()[KIND].values()
    assert waits.count == 2
    assert 1.5 * LATE < waits.longest_ns < 2.5 * LATE < waits.total_ns < 4 * LATE


def all_are_waited_for_at_a_time(monkeypatch: Any, modules: Modules = (flags,)) -> None:
    """Of three programs one counts; rank 1 comes at once, rank 0, itself, comes last."""
    simulator = toys(monkeypatch, modules[-1])
    state = torch.zeros(words.STATE_WORDS, dtype=torch.int64)
    arrivals = torch.zeros(4, words.LINE_BYTES // 8, dtype=torch.int64)
    arrivals[1] = 7
    simulator.launch(9, wait_for_three, (3,), state, arrivals.data_ptr())
    for rank, delay in ((2, LATE), (0, 2 * LATE)):
        simulator.launch(rank, tell, (1,), arrivals[rank], 7, delay=delay)
    simulator.run()
    found = DeviceWaits(state, 3, 4).read()[KIND]
    assert found.keys() == {2}
    waits = found[2]
    assert waits.count == 1
    assert 0.5 * LATE < waits.longest_ns == waits.total_ns < 1.5 * LATE


def late_launches(monkeypatch: Any, simulator: Simulator, late: int, which: str) -> None:
    """The launches of some kernels begin late on one rank."""
    launch = simulator.launch

    def delayed(rank: int, kernel: Any, *args: Any, **kwargs: Any) -> None:
        launch(rank, kernel, *args, **kwargs, delay=2 * LATE * (rank == late and kernel.__name__ in which.split()))

    monkeypatch.setattr(simulator, "launch", delayed)


def waits_of(world: World | LowLatencyWorld, rank: int) -> dict[int, dict[int, Waits]]:
    return DeviceWaits(world.states[rank], rank, world.num_ranks).read()


def high_throughput(monkeypatch: Any, modules: Modules = ENTRIES) -> None:
    """A dispatch, a cached one and a combine, the first and the last with a late rank."""
    world = World(
        monkeypatch, 2, 0, max_steps=10**6,
        modules=dict(zip(("layout", "notify", "dispatch", "combine"), modules, strict=False)),
    )  # fmt: skip
    world.simulator.random = random.Random(0)
    world.simulator.let_time_pass(monkeypatch, modules[-1])
    case = Case(tokens=(3, 2), row_bytes=16, num_topk=1, local_experts=1, combine_bytes=16, seed=1)
    late_launches(monkeypatch, world.simulator, 1, "notify combine")
    ranks = [Rank(world, case, rank) for rank in range(2)]
    worst = max(ranks[0].num_rows)
    for rank in ranks:
        rank.layout()
        rank.notify(worst)
        rank.pull(worst)
        first = rank.out
        rank.pull(worst, rank.handle(), signature=44)
        rank.out = first
        rank.combine(rank.handle(), weights=False)
    world.run()
    for rank in ranks:
        rank.check_combine()
    found = waits_of(world, 0)
    for kind in (OperationKind.DISPATCH, OperationKind.COMBINE):
        waits = found[kind][1]
        assert waits.count <= 2  # for the message, and for the release of rows
        assert LATE < waits.longest_ns <= waits.total_ns < 5 * LATE
    for rank in range(2):
        kinds = waits_of(world, rank)
        assert kinds.keys() <= {1, 2, 3}
        for waits in [
            *kinds.get(OperationKind.CACHED_DISPATCH, {}).values(),
            *waits_of(world, 1).get(1, {}).values(),
        ]:
            assert waits.count <= 2
            assert waits.longest_ns < LATE


def low(monkeypatch: Any, modules: Modules = LOW_ENTRIES, *, hook: bool = False) -> None:
    """A dispatch and a combine that one rank begins late; with hooks it sends late, and then receives late, too."""
    case = LowLatencyCase(tokens=(1, 1), hidden=8, num_topk=3, seed=22)  # of 4 experts: on both ranks
    world = world_of(
        monkeypatch, 2, 0, case, shrinks=hook, max_steps=10**6, timeout=1 << 40,
        modules=dict(zip(("dispatch", "combine"), modules, strict=False)),
    )  # fmt: skip
    world.simulator.random = random.Random(0)
    world.simulator.let_time_pass(monkeypatch, *modules[2:])
    late_launches(monkeypatch, world.simulator, 1, "dispatch combine")
    calls = Calls(world, case)
    for queue in (calls.dispatch, calls.combine):
        queue(hook=hook)
        for receive in calls.hooks.pop() if hook else ():
            receive()
        world.run()
    calls.check()
    found = waits_of(world, 0)
    assert found.keys() == {OperationKind.LOW_LATENCY_DISPATCH, OperationKind.LOW_LATENCY_COMBINE}
    for of in found.values():
        assert of[1].count == 1 or (hook and of[1].count == 2)
        assert LATE < of[1].longest_ns <= of[1].total_ns < 6 * LATE
    claims = world.states[0][words.CLAIMED.value + words.FOR_WEIGHTS.value * words.MAX_RANKS :]
    assert (int(claims[1]) > 0) == hook, "senders count for whose weights they wait if no receiver waits beside them"


def test_first_program_that_is_through_counts(monkeypatch: Any) -> None:
    one_counts(monkeypatch)


def test_ranks_are_waited_for_at_a_time(monkeypatch: Any) -> None:
    all_are_waited_for_at_a_time(monkeypatch)


def test_late_rank_of_a_dispatch_and_a_combine(monkeypatch: Any) -> None:
    high_throughput(monkeypatch)


@pytest.mark.parametrize("hook", but_slow([False, True], False))
def test_late_rank_of_low_latency(monkeypatch: Any, hook: bool) -> None:
    low(monkeypatch, hook=hook)


def test_late_rank_of_a_part(monkeypatch: Any) -> None:
    world = World(monkeypatch, 2, 0, max_steps=10**6)
    simulate_parts(monkeypatch, world)
    world.simulator.random = random.Random(0)
    world.simulator.let_time_pass(monkeypatch, flags)
    late_launches(monkeypatch, world.simulator, 0, "announce_part")
    parts = Parts(world, Load(tokens=((2, 1),), chunks=((2, 2),)), num_sms=2)
    parts.dispatch(0, 0)
    world.run()
    parts.check()
    waits = waits_of(world, 1)[OperationKind.DISPATCH][0]
    assert waits.count <= 2
    assert LATE < waits.longest_ns <= waits.total_ns < 5 * LATE


def test_who_never_comes_is_counted(monkeypatch: Any) -> None:
    simulator = toys(monkeypatch, flags)
    state, status = (
        torch.zeros(words.STATE_WORDS, dtype=torch.int64),
        torch.zeros(words.STATUS_WORDS, dtype=torch.int64),
    )
    arrivals = torch.zeros(2, words.LINE_BYTES // 8, dtype=torch.int64)
    arrivals[0] = 7
    simulator.launch(0, wait_in_vain, (1,), state, status, arrivals.data_ptr(), LATE)
    simulator.run()
    assert status[words.CODE.value] == words.TIMED_OUT.value
    assert status[words.DETAIL.value :][:2].tolist() == [0, 1]
    waits = DeviceWaits(state, 0, 2).read()[KIND][1]
    assert waits.count == 1
    assert waits.total_ns > LATE


@triton.jit
def wait_in_vain(state, status, flags, timeout):
    wait_all(None, state, status, flags, 7, 0, 3, 1, timeout, True, 2)


def test_nothing_is_read_or_written_where_nobody_waits(monkeypatch: Any) -> None:
    """The pull of a dispatch finds what its exchange of counts has waited for; one rank alone waits for nobody."""
    reads: list[int] = []

    def now() -> Any:
        reads.append(1)
        return tl.program_id(0).to(tl.int64) * 0

    monkeypatch.setattr(flags, "now", now)
    monkeypatch.setattr(low_latency, "now", now)
    world = World(monkeypatch, 1, 0)
    rank = Rank(world, Case(tokens=(5,), row_bytes=16, num_topk=2, local_experts=2, combine_bytes=16, seed=1), 0)
    rank.layout()
    rank.notify(5)
    world.run()
    reads.clear()
    rank.pull(5)
    world.run()
    assert not reads
    assert waits_of(world, 0) == {}
    assert not world.states[0][words.WAITS.value :].any()


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old`` replaced by ``new`` in ``module``, to be found in ``scenario``."""

    module: ModuleType
    old: str
    new: str
    scenario: Callable[..., None]


CLAIM = 'if tl.atomic_max(claim, value, sem="relaxed", scope="gpu") < value:'
LAST = "counts = tl.program_id(0) == tl.num_programs(0) - 1"
LONGEST = "tl.atomic_max(at + 2 * WAIT_WORDS"
MUTANTS = {
    "claims are ignored": Mutant(flags, CLAIM, "if True:", one_counts),
    "claims are not made": Mutant(flags, CLAIM, "if tl.load(claim) < value:", one_counts),
    "sum for longest": Mutant(flags, LONGEST, LONGEST.replace("max", "add"), one_counts),
    "time begins with the last to come": Mutant(
        flags,
        "polls = zero()\n            if counts",
        "begun = now()\n            if counts",
        all_are_waited_for_at_a_time,
    ),
    "another rank is blamed": Mutant(
        flags, "operation * RANKS + peer", "operation * RANKS + peer * 0", all_are_waited_for_at_a_time
    ),
    "it waits for itself": Mutant(
        flags, "if (((peers >> peer) & 1) != 0) & (peer != rank):", "if ((peers >> peer) & 1) != 0:",
        all_are_waited_for_at_a_time,
    ),
    "every program counts": Mutant(dispatch, LAST, "counts = tl.program_id(0) >= 0", high_throughput),
    "every receiver counts": Mutant(low_latency, "operation, index == 0, R", "operation, True, R", low),
    "senders count beside receivers": Mutant(low_latency_combine, "not RECEIVES,", "True,", low),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", but_slow(MUTANTS, "senders count beside receivers", "every program counts", "every receiver counts")
)
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    mutant = MUTANTS[name]
    entries = {high_throughput: ENTRIES, low: LOW_ENTRIES}.get(mutant.scenario, (flags,))
    modules = mutated_modules(mutant.module, mutant.old, mutant.new, entries=entries)
    with pytest.raises((AssertionError, KeyError)):
        mutant.scenario(monkeypatch, modules)


def test_reset_begins_again() -> None:
    state = torch.zeros(words.STATE_WORDS, dtype=torch.int64)
    counters = state[words.WAITS.value :].view(3, words.MAX_KINDS, words.MAX_RANKS)
    waits = DeviceWaits(state, 1, 3)
    counters[:, 3, 2] = torch.tensor([2, 70, 50])
    counters[:, 3, 1] = 9  # for itself
    assert waits.read(reset=True) == {3: {2: Waits(2, 70, 50)}}
    assert waits.read() == {}
    counters[:2, 3, 2] += torch.tensor([1, 8])
    counters[2, 3, 2] = 8
    counters[:, 5, 0] = torch.tensor([1, 4, 4])
    assert waits.read() == {3: {2: Waits(1, 8, 8)}, 5: {0: Waits(1, 4, 4)}}


def test_kernels_waits_are_among_the_statistics() -> None:
    recorder = Recorder()
    recorder.called(1, 100)
    recorder.waited(1, 30, {2: 30})
    found = recorder.snapshot(
        0, {1: "dispatch", 3: "combine"}, 3, 0, {1: {2: Waits(2, 50, 40)}, 3: {1: Waits(1, 6, 6)}}
    )
    assert [of.kind for of in found.operations] == ["dispatch", "combine"]
    assert found.of("dispatch").peers[2].waits == Waits(3, 80, 40)
    assert found.of("combine").count == 0
    assert found.waited_for() == [0, 6, 80]
