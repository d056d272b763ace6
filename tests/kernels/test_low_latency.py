"""The kernels of the low-latency pair, several ranks under the scheduler that reorders stores."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from tests import low_latency_oracle as oracle
from tests.conftest import but_slow, slow
from tests.kernels import simulator
from tests.kernels.low_latency_world import LowLatencyWorld, known_expert_rows
from tests.kernels.schedules import Scheduler, Sleeps, put_to_sleep
from tests.kernels.simulator import Simulator
from tests.low_latency_cases import FORMATS, ROUTINGS, Case, Scenario
from tokenferry.config import align_up
from tokenferry.dataplane.cuda import low_latency_programs as programs
from tokenferry.dataplane.cuda.kernels import low_latency_dispatch, words

TINY = Case(tokens=(2, 1), hidden=8, num_topk=2, seed=22)
CASES = {
    "one rank": (1, Case(tokens=(3,), hidden=136)),
    "two ranks": (2, Case(tokens=(3, 2), hidden=136, spare=2)),
    "three ranks": (3, Case(tokens=(1, 0, 3), hidden=8)),
    "four ranks": (4, Case(tokens=(1, 2), hidden=8, local_experts=1)),
    "no tokens": (2, Case(tokens=(0,), hidden=8)),
    "eight choices": (2, Case(tokens=(2, 3), hidden=16, num_topk=8, local_experts=4)),
    "parts of rows": (2, Case(tokens=(1, 2), hidden=1032, num_topk=2)),
    "plain scales": (3, Case(tokens=(1, 2), hidden=128, num_topk=2, format="plain")),
    "rounded scales": (2, Case(tokens=(3,), hidden=640, num_topk=2, format="rounded")),
    "UE8M0 scales": (2, Case(tokens=(2, 3), hidden=256, format="ue8m0")),
    "parts of FP8 rows": (2, Case(tokens=(2, 1), hidden=1152, num_topk=2, format="ue8m0")),
    "many choices": (1, Case(tokens=(5,), hidden=8, num_topk=32, local_experts=33, routing="distinct")),
    "many experts": (2, Case(tokens=(2,), hidden=8, num_topk=2, local_experts=513)),
}


class Paces(Scheduler):
    """To whom one program of every launch of one rank is slow."""

    def __init__(self, seed: int, num_ranks: int, pace: float) -> None:
        super().__init__(seed)
        self._pace = pace
        self._name = f"rank {self.randrange(num_ranks)} "
        self._slow: dict[Any, int] = {}

    def pace_of(self, program: Any) -> float:
        launch = program.launch
        if not launch.name.startswith(self._name):
            return 1
        if launch not in self._slow:
            self._slow[launch] = self.randrange(launch.grid[0])
        return self._pace if program.index[0] == self._slow[launch] else 1


def disturb(monkeypatch: Any, world: LowLatencyWorld, seed: int, pace: float) -> None:
    """Even seeds: uneven programs, whose stores arrive soon. Odd ones: launches that begin late."""
    monkeypatch.setattr(simulator, "ARRIVAL_WHEN_FINISHED", (0.7, 0.03)[seed % 2])
    monkeypatch.setattr(simulator, "END_OF_LATE_LOADS", (0.3, 0.05)[seed % 2])
    if seed % 2 == 0:
        world.simulator.random = Paces(seed, world.num_ranks, pace)
        return
    world.simulator.random = Scheduler(seed)
    source, launch = random.Random(seed), world.simulator.launch

    def delayed(rank: int, *args: Any, **kwargs: Any) -> None:
        launch(rank, *args, delay=source.choice((0, 0, source.randrange(60))), **kwargs)

    monkeypatch.setattr(world.simulator, "launch", delayed)


def world_of(
    monkeypatch: Any,
    num_ranks: int,
    seed: int,
    case: Case,
    *,
    slots: int = 2,
    exact: bool = False,
    pace: float = 0.2,
    sleeps: Sleeps | None = None,
    **options: Any,
) -> LowLatencyWorld:
    """Ranks whose push areas have so many slots and not a byte more, disturbed."""
    most = max(1, *case.tokens) + case.spare
    layouts = programs.layouts(num_ranks, most, case.hidden, case.num_topk, case.local_experts, 1, exact)
    nbytes = slots * align_up(max(layout[-1] for layout in layouts))
    options = {"most_programs": 4, **options}
    world = LowLatencyWorld(monkeypatch, num_ranks, seed, push_bytes=nbytes, exact=exact, **options)
    if sleeps is None:
        disturb(monkeypatch, world, seed, pace)
    else:
        put_to_sleep(world.simulator, seed, sleeps)
    return world


class Calls:
    """A dispatch by all ranks, and combines. Each is only queued; ``check`` when all have run."""

    def __init__(self, world: LowLatencyWorld, case: Case, masked: tuple[int, ...] = (), *, exact: bool = False):
        self.world, self.exact = world, exact
        ranks = [rank for rank in range(world.num_ranks) if rank not in masked]
        self.scenarios = {rank: Scenario(case, rank, world.num_ranks, masked) for rank in ranks}
        self.results: dict[int, tuple[Any, ...]] = {}
        self.answers: list[tuple[Scenario, torch.Tensor, tuple[Any, ...]]] = []
        self.hooks: list[list[Callable[[], None]]] = []

    def dispatch(self, *, hook: bool = False, **options: Any) -> None:
        for rank, scenario in self.scenarios.items():
            self.results[rank] = scenario.dispatch(self.world.buffers[rank], return_recv_hook=hook, **options)
        if hook:
            self.hooks.append([result[4] for result in self.results.values()])

    def combine(self, *, hook: bool = False, fewer: bool = False, without: int = 0, **options: Any) -> None:
        """``fewer``: with further -1; ``without``: how many of the last tokens."""
        answers = []
        for rank, scenario in self.scenarios.items():
            ids = scenario.fewer_ids() if fewer else scenario.ids
            ids = ids[: max(len(ids) - without, 0)]
            answer = self.world.buffers[rank].low_latency_combine(
                known_expert_rows(scenario), ids, scenario.weights[: len(ids)], self.results[rank][2],
                return_recv_hook=hook, **options,
            )  # fmt: skip
            answers.append((scenario, ids, answer))
        self.answers += answers
        if hook:
            self.hooks.append([answer[2] for _, _, answer in answers])

    def receive(self) -> None:
        """Call the hooks of the first call that has not been received."""
        for hook in self.hooks.pop(0):
            hook()

    def check(self) -> None:
        for rank, scenario in self.scenarios.items():
            scenario.check_dispatch(self.results[rank])
            assert self.world.code(rank) == words.OK.value
            assert self.world.states[rank][words.FAILED.value] == 0
        for scenario, ids, answer in self.answers:
            scenario.check_combine(answer, ids, by_rank=not self.exact)


@pytest.mark.parametrize(
    "name", but_slow(CASES, "one rank", "three ranks", "eight choices", "rounded scales", "many experts")
)
def test_every_rank_gets_what_it_must(monkeypatch: Any, name: str) -> None:
    num_ranks, case = CASES[name]
    seed = list(CASES).index(name)
    world = world_of(monkeypatch, num_ranks, seed, case, exact=seed % 3 == 1, has_fp8=seed % 2 == 0)
    calls = Calls(world, case, exact=seed % 3 == 1)
    calls.dispatch()
    calls.combine()
    world.run()
    calls.check()


def test_ranks_whose_parts_have_other_sizes(monkeypatch: Any) -> None:
    """As those of many tokens and of few."""
    monkeypatch.setattr(programs, "MANY_ARRIVALS", 3)
    case = Case(tokens=(1, 2), hidden=2056, num_topk=2)
    world = world_of(monkeypatch, 2, 0, case)
    calls = Calls(world, case)
    calls.dispatch()
    calls.combine()
    world.run()
    calls.check()


@pytest.mark.parametrize("routing", but_slow(ROUTINGS, "random", "sparse", "one_expert", "own"))
def test_routings(monkeypatch: Any, routing: str) -> None:
    seed = ROUTINGS.index(routing)
    case = Case(tokens=(2, 3), hidden=8, routing=routing, seed=seed)
    world = world_of(monkeypatch, 2 + seed % 4 // 2, seed, case, exact=seed % 2 == 0)
    calls = Calls(world, case, exact=seed % 2 == 0)
    calls.dispatch()
    calls.combine(fewer=True)
    world.run()
    calls.check()


@pytest.mark.parametrize("exact", [False, *slow(True)])
def test_operations_without_a_run_between_them(monkeypatch: Any, exact: bool) -> None:
    """Slots come round, with other contents; combines of a dispatch take fewer choices and fewer tokens."""
    cases = [Case(tokens=((2, 1), (1, 3), (0, 2))[n], spare=3 - (2, 3, 2)[n], hidden=8, seed=n) for n in range(3)]
    world = world_of(monkeypatch, 2, 2 + exact, cases[0], exact=exact)
    pairs = [Calls(world, case, exact=exact) for case in cases]
    for calls in pairs:
        calls.dispatch()
    for calls in pairs:
        calls.combine()
    pairs[0].combine(fewer=True)
    pairs[1].combine(without=1)
    world.run()
    for calls in pairs:
        calls.check()


def test_formats_take_turns_in_slots(monkeypatch: Any) -> None:
    cases = [Case(tokens=(1, 2), hidden=128, num_topk=2, format=name) for name in FORMATS]
    world = world_of(monkeypatch, 2, 4, cases[0], slots=3)
    pairs = [Calls(world, case) for case in cases]
    for calls in pairs:
        calls.dispatch()
    pairs[0].combine()
    world.run()
    for calls in pairs:
        calls.check()


@pytest.mark.parametrize(("slots", "exact"), [(2, False), *slow((3, True))])
def test_hooks_in_another_order_than_sends(monkeypatch: Any, slots: int, exact: bool) -> None:
    world = world_of(monkeypatch, 2, slots, TINY, slots=slots, exact=exact)
    pairs = [Calls(world, TINY, exact=exact) for _ in range(slots)]
    for send in (Calls.dispatch, Calls.combine):
        for calls in pairs:
            send(calls, hook=True)
        for calls in reversed(pairs):
            calls.receive()
    world.run()
    for calls in pairs:
        calls.check()


def test_hook_receives_beside_operations_at_once(monkeypatch: Any) -> None:
    world = world_of(monkeypatch, 2, 1, TINY, slots=3)
    late, soon = Calls(world, TINY), Calls(world, TINY)
    late.dispatch(hook=True)
    soon.dispatch()
    soon.combine()
    late.receive()
    late.combine(hook=True)
    soon.combine(fewer=True)
    late.receive()
    world.run()
    late.check()
    soon.check()


def unlike(monkeypatch: Any, seed: int, modules: dict[str, ModuleType] | None = None, **options: Any) -> None:
    """Rank 0 sends ahead of what it has not received, rank 1 does one after the other."""
    world = world_of(monkeypatch, 2, seed, TINY, modules=modules, max_steps=2500, **options)
    all_calls = [Calls(world, replace(TINY, seed=case_seed)) for case_seed in (22, 39, 10)]
    for number, calls in enumerate(all_calls):
        for rank, scenario in calls.scenarios.items():
            calls.results[rank] = scenario.dispatch(world.buffers[rank], return_recv_hook=rank == 0)
        if number > 0:
            all_calls[number - 1].results[0][4]()
    all_calls[-1].results[0][4]()
    world.run()
    for calls in all_calls:
        calls.check()


def test_hooks_on_one_rank(monkeypatch: Any) -> None:
    unlike(monkeypatch, 0)


def test_more_in_flight_than_slots(monkeypatch: Any) -> None:
    """The host receives before a slot comes round; hooks that are called later do nothing."""
    world = world_of(monkeypatch, 2, 0, TINY, max_steps=4000)
    pairs = [Calls(world, TINY) for _ in range(3)]
    for send in (Calls.dispatch, Calls.combine):
        for calls in pairs:
            send(calls, hook=True)
        for calls in reversed(pairs):
            calls.receive()
    world.run()
    for calls in pairs:
        calls.check()


@pytest.mark.parametrize("hook", [True, *slow(False)])
def test_statistics_grow(monkeypatch: Any, hook: bool) -> None:
    world = world_of(monkeypatch, 2, 6 + hook, TINY)
    stats = [torch.full((2,), 10 * rank, dtype=torch.int32) for rank in range(2)]
    waits = [torch.full((2,), 5) for _ in range(2)]
    calls = Calls(world, TINY)
    for _ in range(2):
        for rank, scenario in calls.scenarios.items():
            result = scenario.dispatch(
                world.buffers[rank], return_recv_hook=hook, stats=stats[rank], wait_stats=waits[rank]
            )
            calls.results[rank] = result
            if hook:
                result[4]()
    calls.combine(wait_stats=waits[0])
    world.run()
    calls.check()
    for rank, scenario in calls.scenarios.items():
        assert stats[rank].tolist() == [10 * rank + 2 * len(rows) for rows in scenario.rows]
    assert [w.tolist() for w in waits] == [[5, 5], [5, 5]]  # the interpreter has no clock


def test_ranks_that_call_different_things_are_told(monkeypatch: Any) -> None:
    """All of them, and what follows is not begun."""
    world = world_of(monkeypatch, 3, 0, TINY)
    world.buffers[1].plane.signature = 1
    first, second = Calls(world, TINY), Calls(world, TINY)
    first.dispatch()
    second.dispatch()
    world.run()
    assert [world.code(rank) for rank in range(3)] == [words.MISMATCH.value] * 3
    for rank in range(3):
        assert world.states[rank][words.FAILED.value] == 1
        slot = words.SENT_TO.value + 2 * words.MAX_RANKS
        assert not world.states[rank][slot : slot + words.MAX_RANKS].any()
        details = world.status[rank][words.DETAIL.value :][:3].tolist()
        assert details == ([1, 0, 1] if rank == 1 else [0, 1, 0])


@pytest.mark.parametrize("exact", [True, *slow(False)])
def test_shrinking_with_everybody_there(monkeypatch: Any, exact: bool) -> None:
    world = world_of(monkeypatch, 2, 1, TINY, exact=exact, shrinks=True)
    pairs = [Calls(world, TINY, exact=exact) for _ in range(2)]
    pairs[0].dispatch(hook=True)
    pairs[1].dispatch()
    pairs[0].receive()
    for calls in pairs:
        calls.combine()
    world.run()
    for calls in pairs:
        calls.check()


@pytest.mark.parametrize(("masked", "exact"), [(0, False), (1, True), *slow((2, False))])
def test_masked_rank_is_done_without(monkeypatch: Any, masked: int, exact: bool) -> None:
    case = Case(tokens=(2, 1, 2), hidden=8)
    world = world_of(monkeypatch, 3, masked, case, exact=exact, shrinks=True)
    for rank in {0, 1, 2} - {masked}:
        world.states[rank][words.MASKED.value + masked] = 1
    heap = world.heaps[masked].clone()
    pairs = [Calls(world, case, (masked,), exact=exact) for _ in range(2)]
    for calls in pairs:
        calls.dispatch()
        calls.combine()
    world.run()
    for calls in pairs:
        calls.check()
    released = slice(words.PUSH_RELEASED.value, words.PUSHED_WEIGHTS.value)
    heap[released] = world.heaps[masked][released]
    assert torch.equal(world.heaps[masked], heap)


def left_alone(monkeypatch: Any, seed: int, modules: dict[str, ModuleType] | None = None) -> None:
    """A rank that ends when it has sent; its peer gets that, and goes on without it when it is masked."""
    world = world_of(monkeypatch, 2, seed, TINY, shrinks=True, modules=modules, max_steps=1000)
    both = Calls(world, TINY)
    both.dispatch(hook=True)
    both.results[0][4]()
    world.run()
    both.scenarios[0].check_dispatch(both.results[0])
    world.states[0][words.MASKED.value + 1] = 1
    alone = Calls(world, TINY, (1,))
    alone.dispatch()
    alone.combine()
    world.run()
    alone.check()


def test_rank_that_ended_is_done_without(monkeypatch: Any) -> None:
    left_alone(monkeypatch, 0)


class Guards:
    """Puts the memory that ranks receive into between bytes that nobody may write."""

    SIZE = 1 << 12

    def __init__(self, world: LowLatencyWorld) -> None:
        self._blocks: list[np.ndarray] = []
        for buffer in world.buffers:
            plane = buffer.plane
            empty_rows, tables = plane.empty_rows, plane.low_latency_tables
            plane.empty_rows = lambda *sizes, allocate=empty_rows: self._guarded([allocate(*sizes)])[0]
            plane.low_latency_tables = lambda *sizes, allocate=tables: self._guarded(allocate(*sizes))

    def _guarded(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Such tensors, of one piece of memory as they are."""
        nbytes = tensors[0].untyped_storage().nbytes()
        block = np.full(nbytes + 2 * self.SIZE, 0xA5, np.uint8)
        self._blocks.append(block)
        inner = torch.from_numpy(block[self.SIZE : self.SIZE + nbytes])
        return [inner.view(t.dtype).as_strided(t.shape, t.stride(), t.storage_offset()) for t in tensors]

    def check(self) -> None:
        for block in self._blocks:
            assert (block[: self.SIZE] == 0xA5).all()
            assert (block[-self.SIZE :] == 0xA5).all()


def replace_nothing(calls: Calls, replacement: Callable[[Scenario], torch.Tensor]) -> None:
    """Dispatch with other choices in the place of -1; combine without."""
    for rank, scenario in calls.scenarios.items():
        ids = torch.where(scenario.ids < 0, replacement(scenario), scenario.ids)
        calls.results[rank] = calls.world.buffers[rank].low_latency_dispatch(
            scenario.x, ids, scenario.most, scenario.num_experts, use_fp8=False
        )
    calls.combine()


def bad_experts(
    monkeypatch: Any,
    seed: int,
    modules: dict[str, ModuleType] | None = None,
    *,
    bad: tuple[int, ...] = (1 << 32, 1 << 40, -(1 << 32)),
) -> None:
    """Choices of experts that there are not."""
    case = Case(tokens=(2, 3), hidden=8, routing="sparse", seed=2)
    world = world_of(monkeypatch, 2, seed, case, modules=modules)
    guards = Guards(world)
    calls = Calls(world, case)
    replace_nothing(calls, lambda scenario: torch.tensor(bad * 3)[: scenario.ids.numel()].view(scenario.ids.shape))
    world.run()
    guards.check()
    assert [world.code(rank) for rank in range(2)] == [words.BAD_EXPERT.value] * 2
    for status in world.status:
        status.zero_()
    calls.check()


@pytest.mark.parametrize("bad", [(4, -2, 1000), (1 << 32, 1 << 40, -(1 << 32))])
def test_bad_experts_are_reported_and_not_sent(monkeypatch: Any, bad: tuple[int, ...]) -> None:
    bad_experts(monkeypatch, 0, bad=bad)


def crowded(monkeypatch: Any, seed: int, modules: dict[str, ModuleType] | None = None) -> None:
    """More than N choices of an expert."""
    case = Case(tokens=(3,), hidden=8, num_topk=2, local_experts=1, seed=1)
    world = world_of(monkeypatch, 2, seed, case, modules=modules)
    guards = Guards(world)
    calls = Calls(world, case)
    crowds = [(scenario.ids < 0).any() for scenario in calls.scenarios.values()]
    assert any(crowds)
    replace_nothing(calls, lambda scenario: torch.bincount(scenario.ids[scenario.ids >= 0]).argmax())
    world.run()
    guards.check()
    assert [world.code(rank) for rank in range(2)] == [words.CROWDED.value * bool(crowd) for crowd in crowds]
    for status in world.status:
        status.zero_()
    calls.check()


def test_crowded_experts_are_reported_and_cut_off(monkeypatch: Any) -> None:
    crowded(monkeypatch, 0)


def other_sizes(monkeypatch: Any, seed: int, modules: dict[str, ModuleType] | None = None) -> None:
    """A rank whose peer has more tokens than it has room for."""
    small, large = Case(tokens=(1,), hidden=8, local_experts=1), Case(tokens=(9,), hidden=8, local_experts=1)
    world = world_of(monkeypatch, 2, seed, large, modules=modules)
    guards = Guards(world)
    for rank, case in enumerate((small, large)):
        Scenario(case, rank, 2).dispatch(world.buffers[rank])
    world.run()
    guards.check()
    assert [world.code(rank) for rank in range(2)] == [words.MISMATCH.value] * 2


def test_ranks_of_other_sizes_write_nothing_out_of_bounds(monkeypatch: Any) -> None:
    other_sizes(monkeypatch, 0)


@triton.jit
def convert(values, codes, SIZE: tl.constexpr, HAS_FP8: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(codes + i, low_latency_dispatch.e4m3(tl.load(values + i), HAS_FP8))


@pytest.mark.parametrize("has_fp8", [False, True])
def test_conversion_to_fp8(has_fp8: bool) -> None:
    """Numbers of all sizes, and all that E4M3 has, what lies halfway between them, and their neighbours."""
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 15,), generator=torch.Generator().manual_seed(0))
    random = bits.to(torch.int32).view(torch.float32)
    known = torch.tensor(oracle.e4m3_values()[:127])
    special = torch.cat([known, (known[1:] + known[:-1]) / 2, torch.tensor([464.0, 480.0, 1e30, 3.4e38])])
    infinity = torch.tensor(torch.inf)
    special = torch.cat([special, torch.nextafter(special, infinity), torch.nextafter(special, -infinity)])
    values = torch.cat([random[random.isfinite()], special, -special])
    size = triton.next_power_of_2(len(values))
    values = torch.nn.functional.pad(values, (0, size - len(values)))
    codes = torch.zeros(size, dtype=torch.uint8)
    simulator = Simulator(0)
    simulator.launch(0, convert, (1,), values, codes, SIZE=size, HAS_FP8=has_fp8)
    simulator.run()
    assert codes.tolist() == [oracle.e4m3_code(value) for value in values.tolist()]


@pytest.mark.parametrize("name", ["plain", "rounded", "ue8m0"])
def test_special_rows_in_fp8(monkeypatch: Any, name: str) -> None:
    """Groups of zeros, of tiny and of huge numbers, of what lies halfway between the numbers of E4M3."""
    known = torch.tensor([*oracle.e4m3_values()[:127], 448.0, 448.0])
    halfway = (known[1:] + known[:-1]) / 2
    zeros = torch.zeros(128)
    halfway[-1] = 448.0  # the largest, so that no factor moves the others
    groups = [zeros, -zeros, zeros + 1e-5, halfway, -halfway, halfway * 2.0**-40, halfway * 2.0**100, zeros - 3.3e38]
    case = Case(tokens=(1,), hidden=1024, num_topk=1, local_experts=1, format=name)
    world = world_of(monkeypatch, 1, 0, case, has_fp8=False)
    calls = Calls(world, case)
    scenario = calls.scenarios[0]
    scenario.all_x[0] = scenario.x = torch.cat(groups).to(torch.bfloat16)[None]
    scenario.codes[0], scenario.scales[0] = oracle.quantised(scenario.x, name != "plain")
    calls.dispatch()
    world.run()
    calls.check()
