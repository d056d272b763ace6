"""The low-latency kernels with ranks that end, differ or come late, under a clock: deadlines pass."""

from __future__ import annotations

import dataclasses
import random
import threading
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from tests.conftest import slow
from tests.kernels.low_latency_world import LowLatencyWorld, known_expert_rows
from tests.kernels.test_low_latency import TINY, Calls, Paces, world_of
from tests.low_latency_cases import FORMATS, Case, Scenario
from tokenferry.buffer_low_latency import _hook
from tokenferry.dataplane.cpu.fp8 import pack_ue8m0, quantise
from tokenferry.dataplane.cuda.kernels import flags, words
from tokenferry.dataplane.cuda.kernels import low_latency as shared
from tokenferry.dataplane.cuda.status import Status
from tokenferry.errors import BufferStateError, MismatchError, PeerTimeoutError
from tokenferry.streams import NoStream

THREE = Case(tokens=(2, 1, 2), hidden=8, num_topk=2, seed=22)
TIMEOUT = 1500
"""Steps of the simulator; kernels here take some hundred while nobody is missing."""


def timed_world(monkeypatch: Any, num_ranks: int, seed: int, case: Case, **options: Any) -> LowLatencyWorld:
    """One whose clock runs, and whose programs are all as fast."""
    world = world_of(monkeypatch, num_ranks, seed, case, **{"slots": 4, "timeout": TIMEOUT, **options})
    world.simulator.let_time_pass(monkeypatch, flags, shared)
    world.simulator.random = random.Random(seed)
    return world


def masks(world: LowLatencyWorld, rank: int) -> list[int]:
    return world.states[rank][words.MASKED.value :][: world.num_ranks].tolist()


def details(world: LowLatencyWorld, rank: int) -> list[int]:
    return world.status[rank][words.DETAIL.value :][: world.num_ranks].tolist()


def dispatched(world: LowLatencyWorld, case: Case, exact: bool = False) -> Calls:
    calls = Calls(world, case, exact=exact)
    calls.dispatch()
    world.run()
    calls.check()
    return calls


def combine_without(calls: Calls, dead: int, hook: bool = False) -> dict[int, Any]:
    """The others combine; what they get."""
    answers = {}
    for rank, scenario in calls.scenarios.items():
        if rank != dead:
            answers[rank] = calls.world.buffers[rank].low_latency_combine(
                known_expert_rows(scenario), scenario.ids, scenario.weights, calls.results[rank][2],
                return_recv_hook=hook,
            )  # fmt: skip
    if hook:
        for answer in answers.values():
            answer[2]()
    calls.world.run()
    return answers


@pytest.mark.parametrize(
    ("hook", "shrinks", "exact"),
    [
        (True, True, True),
        *slow((False, True, False), (True, True, False), (False, False, False)),
    ],
)
def test_rank_that_ends_after_the_dispatch_is_the_only_one_missed(
    monkeypatch: Any, hook: bool, shrinks: bool, exact: bool
) -> None:
    world = timed_world(monkeypatch, 3, 2, THREE, shrinks=shrinks, exact=exact, max_steps=60_000)
    calls = dispatched(world, THREE, exact)
    answers = combine_without(calls, 1, hook)
    for rank in (0, 2):
        assert masks(world, rank) == [0, 1, 0]
        if shrinks:
            assert world.code(rank) == words.OK.value
            assert world.status[rank][words.NEWLY_MASKED.value :][:3].tolist() == [0, 1, 0]
            Scenario(THREE, rank, 3, (1,)).check_combine(answers[rank], by_rank=not exact)
        else:
            assert world.code(rank) == words.TIMED_OUT.value
            assert details(world, rank) == [0, 1, 0]


@pytest.mark.parametrize("shrinks", [False, *slow(True)])
def test_rows_of_a_dead_rank_cost_one_wait(monkeypatch: Any, shrinks: bool) -> None:
    """However many one program has."""
    case = Case(tokens=(3,), hidden=8, num_topk=2, seed=3)
    world = timed_world(monkeypatch, 2, 0, case, shrinks=shrinks, most_programs=3, max_steps=40_000)
    calls = dispatched(world, case)
    answers = combine_without(calls, 1)
    assert answers
    assert world.simulator.steps < 3 * TIMEOUT


def test_credit_that_does_not_come_costs_one_wait(monkeypatch: Any) -> None:
    """However many rows one program sends."""
    case = Case(tokens=(6,), hidden=8, num_topk=2, seed=3)
    world = timed_world(monkeypatch, 2, 0, case, most_programs=3, slots=2, max_steps=60_000)
    dispatched(world, case)
    calls = Calls(world, case)
    for _ in range(2):  # rank 0 alone; the slot of the second is that of the first dispatch
        calls.scenarios[0].dispatch(world.buffers[0], return_recv_hook=True)
    world.run()
    assert world.code(0) == words.TIMED_OUT.value
    assert details(world, 0) == [0, 1]
    assert world.simulator.steps < 2 * TIMEOUT


class Late(random.Random):
    """Choices of a scheduler to whom one sender of rank 0's combine comes last of its launch."""

    def choices(self, programs: Any, weights: Any) -> Any:
        def is_held(program: Any) -> bool:
            launch = program.launch
            if launch.name != "rank 0 combine" or program.index[0] != 3:
                return False
            return any(not other.is_finished for other in launch.programs if other is not program)

        return super().choices(
            programs, [0 if is_held(p) else w for p, w in zip(programs, weights, strict=True)]
        )  # fmt: skip


def test_senders_that_see_a_mask_at_different_times_send_all_sums(monkeypatch: Any) -> None:
    case = Case(tokens=(2, 1, 2), hidden=8, num_topk=3, seed=0, local_experts=2)
    world = timed_world(monkeypatch, 3, 0, case, shrinks=True, max_steps=60_000)
    calls = dispatched(world, case)
    world.simulator.random = Late(0)
    answers = combine_without(calls, 1, True)
    for rank in (0, 2):
        assert masks(world, rank) == [0, 1, 0]
        Scenario(case, rank, 3, (1,)).check_combine(answers[rank], by_rank=True)


@pytest.mark.parametrize("shrinks", [True, *slow(False)])
def test_epochs_past_31_bits(monkeypatch: Any, shrinks: bool) -> None:
    world = world_of(monkeypatch, 2, 1, TINY, shrinks=shrinks, max_steps=6000)
    for state in world.states:
        state[words.PUSH_EPOCH.value] = (1 << 31) - 2
    for _ in range(2):
        dispatched(world, TINY)


@pytest.mark.parametrize("shrinks", [True, *slow(False)])
def test_hook_that_replays_have_overtaken_is_reported_at_once(monkeypatch: Any, shrinks: bool) -> None:
    world = timed_world(monkeypatch, 2, 1, TINY, slots=2, shrinks=shrinks, timeout=1 << 40, max_steps=20_000)
    first, second = Calls(world, TINY), Calls(world, TINY)
    first.dispatch(hook=True)
    kept = [buffer.plane._low_latency._pending.copy() for buffer in world.buffers]
    for buffer in world.buffers:
        buffer.plane._low_latency._pending.clear()
    second.dispatch()  # these two stand for a replay, of which the host knows nothing
    second.combine()
    for buffer, pending in zip(world.buffers, kept, strict=True):
        buffer.plane._low_latency._pending.extend(pending)
    first.receive()
    world.run()
    for rank in range(2):
        assert world.code(rank) == words.NOT_RECEIVED.value
        assert masks(world, rank) == [0, 0]


@pytest.mark.parametrize("exact", [False, True])
def test_rank_taken_back_between_dispatch_and_combine_counts_nothing(monkeypatch: Any, exact: bool) -> None:
    """Ranks 0 and 1 dispatch without 2, which does without them; then all take all back, and combine."""
    case = Case(tokens=(2, 1, 2), hidden=8)
    world = timed_world(monkeypatch, 3, 1, case, exact=exact, shrinks=True, timeout=1 << 40)
    for rank in range(3):
        for other in range(3):
            world.states[rank][words.MASKED.value + other] = int((rank == 2) != (other == 2))
    calls = Calls(world, case, (2,), exact=exact)
    calls.scenarios[2] = Scenario(case, 2, 3, (0, 1))
    calls.dispatch()
    world.run()
    for state in world.states:
        state[words.MASKED.value :][:3] = 0
    calls.combine()
    world.run()
    assert [scenario.rank for scenario, _, _ in calls.answers] == [0, 1, 2]
    calls.check()


def delay(monkeypatch: Any, world: LowLatencyWorld, late: int, steps: int) -> None:
    launch = world.simulator.launch
    monkeypatch.setattr(
        world.simulator, "launch", lambda rank, *a, **k: launch(rank, *a, **{**k, "delay": steps * (rank == late)})
    )


def test_wait_statistics_tell_who_is_late(monkeypatch: Any) -> None:
    case = Case(tokens=(1,), hidden=8, num_topk=2, seed=3)
    world = timed_world(monkeypatch, 3, 0, case, timeout=1 << 40, max_steps=30_000)
    delay(monkeypatch, world, 0, 2500)
    waits = [torch.zeros(3, dtype=torch.int64) for _ in range(3)]
    for rank in range(3):
        Scenario(case, rank, 3).dispatch(world.buffers[rank], wait_stats=waits[rank])
    world.run()
    assert waits[2][0] > 2000
    assert max(waits[2][1:]) < 1000
    assert max(waits[0]) < 1000


def test_wait_statistics_cost_no_further_timeout(monkeypatch: Any) -> None:
    case = Case(tokens=(1,), hidden=8, num_topk=2, seed=3)
    world = timed_world(monkeypatch, 3, 0, case, shrinks=True, max_steps=30_000)
    waits = torch.zeros(3, dtype=torch.int64)
    for rank in (0, 1):
        Scenario(case, rank, 3).dispatch(world.buffers[rank], wait_stats=waits if rank == 0 else None)
    world.run()
    assert [masks(world, rank) for rank in (0, 1)] == [[0, 0, 1]] * 2
    assert world.simulator.steps < 2 * TIMEOUT
    assert max(waits[:2]) < TIMEOUT / 2 < waits[2]


@pytest.mark.parametrize("seed", [2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 4))])
def test_mismatch_is_no_timeout(monkeypatch: Any, seed: int) -> None:
    """To a receiver that was about to give up waiting when another one found the mismatch."""
    case = Case(tokens=(4,), hidden=8, num_topk=2, seed=22)
    world = timed_world(monkeypatch, 2, seed, case, timeout=1 << 40, most_programs=8, max_steps=60_000)
    delay(monkeypatch, world, 1, 2000 + 250 * seed)
    world.simulator.random = Paces(seed, 2, 0.05)
    world.buffers[1].plane.signature = 1
    Calls(world, case).dispatch()
    world.run()
    assert [world.code(rank) for rank in range(2)] == [words.MISMATCH.value] * 2
    assert [int(status[words.HAS_FAILED.value]) for status in world.status] == [words.MISMATCH.value] * 2
    assert [details(world, rank) for rank in range(2)] == [[0, 1], [1, 0]]


def test_slots_that_differ_are_a_mismatch(monkeypatch: Any) -> None:
    """Since one rank prepared for other shapes first."""
    large = Case(tokens=(8,), hidden=8, num_topk=2)
    world = world_of(monkeypatch, 2, 1, large, slots=2, max_steps=30_000)
    first = world.buffers[0].plane._low_latency
    first.num_slots(first._layouts(8, 8, 2, 2, 1))
    Calls(world, TINY).dispatch()
    world.run()
    assert [world.code(rank) for rank in range(2)] == [words.MISMATCH.value] * 2


def test_other_maxima_reach_nothing_outside(monkeypatch: Any) -> None:
    """What ranks that disagree leave where this one looks may be anything: here a choice of expert -2^31."""
    world = world_of(monkeypatch, 2, 1, Case(tokens=(8,), hidden=8, num_topk=2), slots=4, max_steps=30_000)
    for heap in world.heaps:
        heap[words.CONTROL_BYTES :].view(torch.int64).fill_(1 << 31)
    for rank in range(2):
        case = dataclasses.replace(TINY, spare=4 * rank)
        Scenario(case, rank, 2).dispatch(world.buffers[rank])
    world.run()
    assert [world.code(rank) for rank in range(2)] == [words.MISMATCH.value] * 2


def test_weights_of_other_strides(monkeypatch: Any) -> None:
    world = world_of(monkeypatch, 2, 0, TINY)
    calls, plans = dispatched(world, TINY), []
    for rank, scenario in calls.scenarios.items():
        plane = world.buffers[rank].plane
        combine = plane.low_latency_combine
        # Launches are only queued: nothing that they read may go.
        plane.low_latency_combine = lambda *given, combine=combine: plans.append(given) or combine(*given)
        wide = torch.full((len(scenario.ids), 4), 99.0)
        wide[:, :2] = scenario.weights
        answer = world.buffers[rank].low_latency_combine(
            known_expert_rows(scenario), scenario.ids, wide[:, :2], calls.results[rank][2]
        )
        calls.answers.append((scenario, scenario.ids, answer))
        assert wide[:, :2].is_contiguous() == (len(wide) == 1)
    world.run()
    calls.check()


@pytest.mark.parametrize("exact", [False, True])
def test_bad_experts_in_a_combine_are_reported(monkeypatch: Any, exact: bool) -> None:
    world = world_of(monkeypatch, 2, 0, TINY, exact=exact)
    calls = dispatched(world, TINY, exact)
    for rank, scenario in calls.scenarios.items():
        ids = scenario.ids.clone()
        ids[0, 0] = (-2, 1 << 33)[rank]
        answer = world.buffers[rank].low_latency_combine(
            known_expert_rows(scenario), ids, scenario.weights, calls.results[rank][2]
        )
        calls.answers.append((scenario, ids.clamp(-1, scenario.num_experts - 1), answer))
        calls.answers[-1][1][0, 0] = -1
    world.run()
    assert [world.code(rank) for rank in range(2)] == [words.BAD_EXPERT.value] * 2
    for status in world.status:
        status.zero_()
    calls.check()


@pytest.mark.parametrize("name", ["plain", "rounded", "ue8m0"])
@pytest.mark.parametrize("special", [float("inf"), -float("inf"), float("nan"), -float("nan")])
def test_no_number_vanishes_in_fp8(monkeypatch: Any, special: float, name: str) -> None:
    """A group with one that is not finite, and one without: as on CPU ranks, bit for bit."""
    x = torch.linspace(-2, 2, 256).to(torch.bfloat16)
    x[5] = special
    world = world_of(monkeypatch, 1, 0, Case(tokens=(1,), hidden=256, format=name), has_fp8=False)
    result = world.buffers[0].low_latency_dispatch(
        x[None], torch.zeros(1, 1, dtype=torch.int64), 1, 1, **FORMATS[name]
    )
    world.run()
    data, scales = quantise(x[None], name != "plain")
    assert data[0].view(torch.uint8)[5] == 0x7F
    assert data[0].float().isnan().sum() == 1
    assert torch.equal(result[0][0][0, 0].view(torch.uint8), data[0].view(torch.uint8))
    scales = pack_ue8m0(scales) if name == "ue8m0" else scales
    assert torch.equal(result[0][1][0, 0].view(torch.int32), scales[0].view(torch.int32))
    if name != "plain":
        assert scales.view(torch.int32).max() <= 254 << 23


# The host.


def one_rank(monkeypatch: Any) -> tuple[Any, Scenario, Any]:
    world = world_of(monkeypatch, 1, 0, TINY)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    return world.buffers[0], Scenario(TINY, 0, 1), world.buffers[0].plane._low_latency


def test_hook_that_raised_can_be_called_again(monkeypatch: Any) -> None:
    buffer, scenario, low_latency = one_rank(monkeypatch)
    scenario.dispatch(buffer, return_recv_hook=True)
    (pending,) = low_latency._pending
    hook = _hook(SimpleNamespace(comm=NoStream()), pending)
    assert hook is not None
    low_latency.is_capturing = lambda: True
    with pytest.raises(BufferStateError, match="outside of a CUDA graph"):
        hook()
    low_latency.is_capturing = lambda: False
    hook()
    assert not low_latency._pending
    hook()


def test_threads_may_share_a_hook() -> None:
    class Slow:
        count = 0

        def finish(self) -> None:
            threading.Event().wait(0.05)
            self.count += 1

    slow = Slow()
    hook = _hook(SimpleNamespace(comm=NoStream()), slow)
    threads = [threading.Thread(target=hook) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.count == 1


def test_capture_that_was_given_up_leaves_nothing_behind(monkeypatch: Any) -> None:
    buffer, scenario, low_latency = one_rank(monkeypatch)
    low_latency.is_capturing = lambda: True
    hook = scenario.dispatch(buffer, return_recv_hook=True)[4]
    low_latency.is_capturing = lambda: False
    for _ in range(5):
        scenario.dispatch(buffer)
    with pytest.raises(BufferStateError, match="in a CUDA graph"):
        hook()


def test_receives_record_their_stream_if_they_were_sent_on_another(monkeypatch: Any) -> None:
    """Those of hooks, and those before a slot comes round."""
    buffer, scenario, low_latency = one_rank(monkeypatch)
    recorded: list[tuple[int, Any]] = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, s: recorded.append((tensor.data_ptr(), s)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"stream of {device}")
    scenario.dispatch(buffer, return_recv_hook=True)
    (pending,) = low_latency._pending
    tensors = {tensor.data_ptr() for tensor in pending.written() if tensor is not None}
    with mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=7):
        pending.finish()
    assert {pointer for pointer, _ in recorded} == tensors
    assert {stream for _, stream in recorded} == {f"stream of {low_latency.device}"}
    recorded.clear()
    scenario.dispatch(buffer, return_recv_hook=True)[4]()
    assert not recorded
    scenario.dispatch(buffer, return_recv_hook=True)
    buffer.plane._rank = 7  # its stream, from now on
    for _ in range(3):
        scenario.dispatch(buffer)
    assert recorded


def status_of(num_ranks: int) -> Status:
    zeros = torch.zeros

    def unpinned(*sizes: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return zeros(*sizes, **options)

    with mock.patch.object(torch, "zeros", unpinned):
        return Status(0, num_ranks, 1.0)


def test_failure_that_arrives_while_the_host_reads_is_not_lost() -> None:
    status = status_of(2)
    status.words[words.CODE.value] = words.BAD_EXPERT.value
    take = status._error

    def interrupted(*found: Any) -> Any:
        status.words[words.HAS_FAILED.value] = words.TIMED_OUT.value
        status.words[words.DETAIL.value + 1] = 1
        status.words[words.CODE.value] = words.TIMED_OUT.value
        return take(*found)

    with mock.patch.object(status, "_error", interrupted), pytest.raises(Exception, match="topk_idx"):
        status.check()
    with pytest.raises(PeerTimeoutError):
        status.check()
    with pytest.raises(BufferStateError):
        status.check()


def test_all_masked_ranks_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Several programs find them, each some."""
    status = status_of(4)
    status.words[words.NEWLY_MASKED.value + 1] = 1
    status.words[words.NEWLY_MASKED.value + 3] = 1
    status.check()
    assert "[1, 3]" in caplog.text
    caplog.clear()
    status.check()
    assert not caplog.text


def test_what_is_fatal_is_named() -> None:
    for code, error in ((words.MISMATCH, MismatchError), (words.NOT_RECEIVED, BufferStateError)):
        status = status_of(2)
        status.words[words.HAS_FAILED.value] = status.words[words.CODE.value] = code.value
        with pytest.raises(error, match=None if error is MismatchError else "hook was not called"):
            status.check()
        with pytest.raises(BufferStateError, match="an earlier operation"):
            status.check()
