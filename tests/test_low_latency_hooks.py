"""Low-latency operations in flight: hooks in any order, small stages, other operations in between, long mixes."""

from __future__ import annotations

import gc
import itertools
import random
import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cases import Case as NormalCase
from tests.cases import Scenario as NormalScenario
from tests.cases import poisoned_memory
from tests.conftest import PoolOf, slow
from tests.low_latency_cases import FORMATS, ROUTINGS, Case, Scenario, make_buffer
from tokenferry import Buffer


def scenarios_of(rank: int, num_ranks: int, count: int, **options: Any) -> list[Scenario]:
    forms = itertools.cycle(FORMATS)
    cases = [Case(**{"seed": n, "tokens": (4, n % 3, 2), "format": next(forms), **options}) for n in range(count)]
    return [Scenario(case, rank, num_ranks) for case in cases]


def hooks_in_any_order(rank: int, num_ranks: int, order: tuple[int, ...], options: dict[str, Any]) -> None:
    """Dispatches in flight, then combines; every hook is called twice, ranks use orders of their own."""
    scenarios = scenarios_of(rank, num_ranks, len(order))
    mine = order if rank != 1 else tuple(reversed(order))
    with make_buffer(**options) as buffer, poisoned_memory():
        results = [scenario.dispatch(buffer, return_recv_hook=True) for scenario in scenarios]
        for at in mine * 2:
            results[at][4]()
            scenarios[at].check_dispatch(results[at])
        outs = [torch.full_like(scenario.x, float("nan")) for scenario in scenarios]
        answers = [
            scenario.combine(buffer, result, return_recv_hook=True, out=out)
            for scenario, result, out in zip(scenarios, results, outs, strict=True)
        ]
        for at in mine * 2:
            answers[at][2]()
            assert answers[at][0] is outs[at]
            scenarios[at].check_combine(answers[at])


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_hooks_in_any_order(pool_of: PoolOf, order: tuple[int, ...]) -> None:
    pool_of(3).run(hooks_in_any_order, order, {})


@pytest.mark.parametrize("num_ranks", [1, 4, *slow(2)])
def test_more_in_flight_than_there_are_slots(pool_of: PoolOf, num_ranks: int) -> None:
    pool_of(num_ranks).run(hooks_in_any_order, tuple(reversed(range(20))), {})


@pytest.mark.parametrize("num_rdma_bytes", [128, *slow(65536)])
def test_small_stage_with_many_in_flight(pool_of: PoolOf, num_rdma_bytes: int) -> None:
    """Messages about as large as the whole stage: room comes only with what the peers have read."""
    pool_of(4).run(fill_the_stage, num_rdma_bytes)


def fill_the_stage(rank: int, num_ranks: int, num_rdma_bytes: int) -> None:
    case = Case(tokens=(12, 9, 0, 12), hidden=2400, num_topk=4, local_experts=2, routing="distinct")
    scenario = Scenario(case, rank, num_ranks)
    with make_buffer(num_rdma_bytes=num_rdma_bytes) as buffer:
        for turn in range(3):
            results = []
            for _ in range(5):
                results.append(scenario.dispatch(buffer, return_recv_hook=True))
                time.sleep(0.003 * ((rank + turn) % 4))
            for result in results if rank % 2 else reversed(results):
                result[4]()
                scenario.check_dispatch(result)
            answers = [scenario.combine(buffer, result, return_recv_hook=True) for result in results]
            for answer in answers:
                answer[2]()
                scenario.check_combine(answer)


def mix_with_and_without_hooks(rank: int, num_ranks: int) -> None:
    """An operation without a hook finishes at once, whatever is in flight before it; rank 0 uses no hooks."""
    scenarios = scenarios_of(rank, num_ranks, 6)
    with make_buffer() as buffer, poisoned_memory():
        flying = []
        for turn, scenario in enumerate(scenarios):
            hooked = turn % 2 == 0 and rank != 0
            result = scenario.dispatch(buffer, return_recv_hook=hooked)
            if hooked:
                flying.append((scenario, result))
            else:
                assert result[4] is None
                scenario.check_dispatch(result)
            if turn % 2:
                scenario.check_combine(scenario.combine(buffer, result))
        for scenario, result in flying:
            result[4]()
            scenario.check_dispatch(result)
        for scenario in scenarios[::2]:
            scenario.check_dispatch(scenario.dispatch(buffer))


def test_operations_with_and_without_hooks(pool_of: PoolOf) -> None:
    pool_of(3).run(mix_with_and_without_hooks)


def interleave(rank: int, num_ranks: int) -> None:
    """Normal operations while low-latency ones are in flight, without cleaning."""
    normal = NormalScenario(NormalCase(tokens=(6, 2), seed=5), rank, num_ranks)
    scenarios = scenarios_of(rank, num_ranks, 3)
    with make_buffer(num_nvl_bytes=65536) as buffer, poisoned_memory():
        for scenario in scenarios:
            result = scenario.dispatch(buffer, return_recv_hook=True)
            received = normal.dispatch(buffer)
            normal.check_dispatch(received)
            result[4]()
            scenario.check_dispatch(result)
            answer = scenario.combine(buffer, result, return_recv_hook=True)
            later = scenario.dispatch(buffer, return_recv_hook=True)
            normal.check_combine(normal.combine(buffer, received[4]))
            later[4]()
            answer[2]()
            scenario.check_combine(answer)
            scenario.check_dispatch(later)


def test_normal_operations_in_between(pool_of: PoolOf) -> None:
    pool_of(3).run(interleave)


def use_events(rank: int, num_ranks: int) -> None:
    scenario = Scenario(Case(), rank, num_ranks)
    with make_buffer() as buffer:
        result = scenario.dispatch(buffer, async_finish=True)
        assert result[4] is None
        result[3].current_stream_wait()
        scenario.check_dispatch(result)
        answer = scenario.combine(buffer, result, async_finish=True)
        assert answer[2] is None
        answer[1].current_stream_wait()
        scenario.check_combine(answer)
        hooked = scenario.dispatch(buffer, return_recv_hook=True)
        assert hooked[3].event is None
        hooked[4]()


def test_events(pool_of: PoolOf) -> None:
    pool_of(2).run(use_events)


def drop_outputs(rank: int, num_ranks: int, form: str, how: str) -> None:
    """The Buffer keeps no reference to what it has handed out, once it is received; hooks may live on."""
    hooked = how != "no hook"

    def receive(hook: Callable[[], None] | None) -> None:
        if how == "received by a later operation":
            scenario.dispatch(buffer)
        elif hook is not None:
            hook()

    scenario = Scenario(Case(format=form), rank, num_ranks)
    with make_buffer() as buffer:
        gc.disable()
        received, count, handle, _, hook = scenario.dispatch(buffer, return_recv_hook=hooked)
        receive(hook)
        tensors = [count, *(received if isinstance(received, tuple) else [received])]
        combined, _, combine_hook = scenario.combine(
            buffer, (received, count, handle), return_recv_hook=hooked, zero_copy=False
        )
        receive(combine_hook)
        tensors += [combined, *handle[:2]]
        del received, count, handle, combined
        for at in range(len(tensors)):
            assert sys.getrefcount(tensors[at]) == 2  # the list and the call
        seen = [weakref.ref(tensor) for tensor in tensors]
        storages = [tensor.untyped_storage()._weak_ref() for tensor in tensors]
        tensors.clear()
        assert [ref() for ref in seen] == [None] * len(seen)
        assert all(torch.UntypedStorage._expired(ref) for ref in storages)
        gc.enable()


@pytest.mark.parametrize("how", ["no hook", "hook called", "received by a later operation"])
@pytest.mark.parametrize("form", ["bf16", "ue8m0"])
def test_no_references_to_outputs_are_kept(pool_of: PoolOf, form: str, how: str) -> None:
    pool_of(2).run(drop_outputs, form, how)


def spoil_memory(rank: int, num_ranks: int) -> None:
    """Clients zero the buffer between operations, or write anything to it."""
    scenarios = scenarios_of(rank, num_ranks, 4)
    with make_buffer(num_rdma_bytes=1 << 17) as buffer:
        for turn, scenario in enumerate(scenarios):
            result = scenario.dispatch(buffer, return_recv_hook=True)
            memory = buffer.get_local_buffer_tensor(torch.int8, use_rdma_buffer=True)
            assert memory.numel() == 1 << 17
            memory.zero_() if turn % 2 else memory.random_(-128, 127)
            result[4]()
            scenario.check_dispatch(result)
            buffer.clean_low_latency_buffer(scenario.most, scenario.case.hidden, scenario.num_experts)
            memory.fill_(-1)
            scenario.check_combine(scenario.combine(buffer, result))


def test_spoilt_buffer_memory_harms_nothing(pool_of: PoolOf) -> None:
    pool_of(3).run(spoil_memory)


class Flying:
    """An operation in flight, and how to check it."""

    def __init__(self, hook: Callable[[], None] | None, check: Callable[[], None]) -> None:
        self.hook, self.check = hook, check

    def land(self) -> None:
        if self.hook is not None:
            self.hook()
        self.check()


def _stress(rank: int, num_ranks: int, operations: int, seed: int, num_rdma_bytes: int, delay: float) -> int:
    """Random operations, the same on all ranks; delays, hooks and their order are each rank's own."""
    common, own = random.Random(seed), random.Random(seed * 64 + rank)
    flying: list[Flying] = []
    done: list[tuple[Scenario, Any]] = []
    with make_buffer(num_rdma_bytes=num_rdma_bytes) as buffer, poisoned_memory():
        for _ in range(operations):
            if own.random() < 0.3:
                time.sleep(own.random() * delay)
            kind = common.choice(["dispatch", "dispatch", "combine", "combine", "normal"])
            hooked = own.random() < 0.7
            if kind == "normal":
                normal = NormalScenario(NormalCase(tokens=(3, 0, 5), seed=common.getrandbits(32)), rank, num_ranks)
                received = normal.dispatch(buffer)
                normal.check_dispatch(received)
                normal.check_combine(normal.combine(buffer, received[4]))
            elif kind == "dispatch" or not done:
                _fly_dispatch(buffer, Scenario(_random_case(common), rank, num_ranks), hooked, flying, done)
            else:
                at = common.randrange(len(done))
                scenario, result = done[at]
                if result[4] is not None:
                    result[4]()
                answer = scenario.combine(buffer, result, return_recv_hook=hooked)
                flying.append(Flying(answer[2], lambda s=scenario, a=answer: s.check_combine(a)))
            while len(flying) > own.randrange(7):
                flying.pop(own.randrange(len(flying))).land()
            while len(done) > 4:
                done.pop(common.randrange(len(done)))
        for left in flying:
            left.land()
    return operations


def _fly_dispatch(
    buffer: Buffer, scenario: Scenario, hooked: bool, flying: list[Flying], done: list[tuple[Scenario, Any]]
) -> None:
    result = scenario.dispatch(buffer, return_recv_hook=hooked)
    flying.append(Flying(result[4], lambda: scenario.check_dispatch(result)))
    done.append((scenario, result))


def _random_case(chance: random.Random) -> Case:
    return Case(
        tokens=tuple(chance.choice([0, 1, 3, 6]) for _ in range(4)),
        spare=chance.choice([0, 3]),
        hidden=chance.choice([128, 256]),
        num_topk=chance.choice([1, 2, 6]),
        local_experts=chance.choice([1, 2, 4]),
        routing=chance.choice(ROUTINGS),
        format=chance.choice(list(FORMATS)),
        seed=chance.getrandbits(32),
    )


@pytest.mark.parametrize("num_rdma_bytes", [0, 128])
def test_random_operations_in_flight(pool_of: PoolOf, num_rdma_bytes: int) -> None:
    assert set(pool_of(4).run(_stress, 30, num_rdma_bytes, num_rdma_bytes, 0.01)) == {30}


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("num_ranks", "num_rdma_bytes"), [(4, 0), (4, 128), (3, 65536)])
def test_many_random_operations_in_flight(pool_of: PoolOf, num_ranks: int, num_rdma_bytes: int) -> None:
    assert set(pool_of(num_ranks).run(_stress, 1000, 7 + num_rdma_bytes, num_rdma_bytes, 0.01)) == {1000}


def clean_late(rank: int, num_ranks: int) -> tuple[float, float]:
    with make_buffer() as buffer:
        if rank == 1:
            time.sleep(0.3)
        began = time.monotonic()
        buffer.clean_low_latency_buffer(4, 128, num_ranks)
        return began, time.monotonic()


def test_cleaning_is_a_barrier(pool_of: PoolOf) -> None:
    times = pool_of(3).run(clean_late)
    assert max(began for began, _ in times) <= min(ended for _, ended in times)


def keep_combine_buffers(rank: int, num_ranks: int) -> None:
    scenarios = [Scenario(Case(tokens=(3,), hidden=hidden), rank, num_ranks) for hidden in (128, 256)]
    with make_buffer() as buffer:
        handles = [scenario.dispatch(buffer)[2] for scenario in scenarios]
        first = [buffer.get_next_low_latency_combine_buffer(handle).data_ptr() for handle in handles]
        assert first[0] != first[1]
        assert [buffer.get_next_low_latency_combine_buffer(handle).data_ptr() for handle in handles] == first


def test_combine_buffers_stay_where_they_are(pool_of: PoolOf) -> None:
    """Captured graphs read them."""
    pool_of(2).run(keep_combine_buffers)
