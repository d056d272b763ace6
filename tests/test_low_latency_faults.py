"""Low-latency operations with ranks that die, stop, are masked and come back, and with wrong arguments."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry
from tests.cases import Case as NormalCase
from tests.cases import Scenario as NormalScenario
from tests.conftest import PoolOf, slow
from tests.low_latency_cases import Case, Scenario, make_buffer
from tests.test_faults import outcome
from tokenferry import Buffer, PeerTimeoutError
from tokenferry.cli.ranks import RankError, RankPool

TIMEOUT = 2.0
CASE = Case(tokens=(5, 3, 4), num_topk=4, routing="distinct")


def masked_ranks(buffer: Buffer) -> list[int]:
    status = torch.full((buffer.group_size,), 7, dtype=torch.int32)
    buffer.low_latency_query_mask_buffer(status)
    return [rank for rank, word in enumerate(status.tolist()) if word]


def serve(buffer: Buffer, scenario: Scenario, hooked: bool = False) -> None:
    """A dispatch and a combine, checked."""
    result = scenario.dispatch(buffer, return_recv_hook=hooked)
    if hooked:
        result[4]()
    scenario.check_dispatch(result)
    answer = scenario.combine(buffer, result, return_recv_hook=hooked)
    if hooked:
        answer[2]()
    scenario.check_combine(answer)


def mask_needs_shrink(rank: int, num_ranks: int) -> list[str]:
    with make_buffer() as buffer:
        calls: list[Callable[[], object]] = [
            lambda: buffer.low_latency_update_mask_buffer(0, True),
            lambda: buffer.low_latency_query_mask_buffer(torch.zeros(num_ranks, dtype=torch.int32)),
            buffer.low_latency_clean_mask_buffer,
        ]
        results = [outcome(call) for call in calls]
        serve(buffer, Scenario(CASE, rank, num_ranks))
    return [result["kind"] + result["text"] for result in results]


def test_mask_calls_need_enable_shrink(pool_of: PoolOf) -> None:
    for texts in pool_of(2).run(mask_needs_shrink):
        assert all(text.startswith("BufferStateError") and "enable_shrink" in text for text in texts)


def mask_arguments(rank: int, num_ranks: int) -> list[dict[str, Any]]:
    with make_buffer(enable_shrink=True) as buffer:
        results = [
            outcome(lambda: buffer.low_latency_update_mask_buffer(num_ranks, True)),
            outcome(lambda: buffer.low_latency_update_mask_buffer(-1, True)),
            outcome(lambda: buffer.low_latency_update_mask_buffer(rank, True)),
            outcome(lambda: buffer.low_latency_query_mask_buffer(torch.zeros(num_ranks + 1, dtype=torch.int32))),
            outcome(lambda: buffer.low_latency_query_mask_buffer(torch.zeros(num_ranks, dtype=torch.int64))),
        ]
        other = (rank + 1) % num_ranks
        assert masked_ranks(buffer) == []
        buffer.low_latency_update_mask_buffer(other, True)
        buffer.low_latency_update_mask_buffer(other, True)
        assert masked_ranks(buffer) == [other]
        buffer.low_latency_update_mask_buffer(other)
        assert masked_ranks(buffer) == []
        buffer.low_latency_update_mask_buffer(other)
        buffer.low_latency_update_mask_buffer(other, True)
        buffer.low_latency_clean_mask_buffer()
        assert masked_ranks(buffer) == []
        serve(buffer, Scenario(CASE, rank, num_ranks))
    return results


def test_mask_arguments_and_status(pool_of: PoolOf) -> None:
    for results in pool_of(3).run(mask_arguments):
        assert [result["kind"] for result in results] == ["ArgumentError"] * 5
        assert ["rank_to_mask" in result["text"] for result in results] == [True, True, True, False, False]
        assert ["mask_status" in result["text"] for result in results] == [False, False, False, True, True]


def mask_and_take_back(rank: int, num_ranks: int, hooked: bool, stage: int, skips: bool) -> None:
    """Rank 1 is masked by all, and masks all; later everyone takes everyone back. Several times over."""
    others = [r for r in range(num_ranks) if r != 1]
    hidden = 3000 if stage else 128  # with a small stage: about as large as it
    everyone = Scenario(Case(tokens=(5, 3, 4), num_topk=4, hidden=hidden), rank, num_ranks)
    absent = others if rank == 1 else [1]
    partly = Scenario(everyone.case, rank, num_ranks, masked=tuple(absent))
    with make_buffer(enable_shrink=True, num_rdma_bytes=stage, timeout=6.0) as buffer:
        for turn in range(4):
            serve(buffer, everyone, hooked)
            if not skips:
                dist.barrier()  # what is sent to a rank that is masked then may be lost
            for peer in absent:
                buffer.low_latency_update_mask_buffer(peer, True)
            if not skips:
                for _ in range(turn * 5):  # more than there are header slots, in the end
                    serve(buffer, partly, hooked)
            assert masked_ranks(buffer) == absent
            buffer.low_latency_clean_mask_buffer()
            if not skips:
                dist.barrier()
        serve(buffer, everyone, hooked)


@pytest.mark.parametrize("hooked", [*slow(False), True])
@pytest.mark.parametrize(("stage", "skips"), [(128, False), (0, True), *slow((0, False), (128, True))])
def test_masked_ranks_are_left_out_and_taken_back(pool_of: PoolOf, hooked: bool, stage: int, skips: bool) -> None:
    pool_of(3).run(mask_and_take_back, hooked, stage, skips)


def mask_in_flight(rank: int, num_ranks: int, dispatches: int, hidden: int) -> None:
    """Ranks 0 and 1 mask each other while operations are in flight, and take each other back before the hooks."""
    case = Case(tokens=(5, 3, 4), num_topk=4, hidden=hidden)
    everyone = Scenario(case, rank, num_ranks)
    partly = Scenario(case, rank, num_ranks, masked=() if rank == 2 else (1 - rank,))
    with make_buffer(enable_shrink=True, num_rdma_bytes=128, timeout=6.0) as buffer:
        for _ in range(3):
            flying = [everyone.dispatch(buffer, return_recv_hook=True)]
            dist.barrier()
            if rank < 2:
                buffer.low_latency_update_mask_buffer(1 - rank, True)
            flying += [partly.dispatch(buffer, return_recv_hook=True) for _ in range(dispatches)]
            dist.barrier()
            buffer.low_latency_clean_mask_buffer()
            dist.barrier()
            for result in flying:
                result[4]()
                partly.check_dispatch(result)
            serve(buffer, everyone)
            assert masked_ranks(buffer) == []


@pytest.mark.parametrize(("dispatches", "hidden"), [(0, 128), (2, 128), (0, 6000)])
def test_ranks_masked_while_operations_are_in_flight(pool_of: PoolOf, dispatches: int, hidden: int) -> None:
    pool_of(3).run(mask_in_flight, dispatches, hidden)


def die(rank: int, num_ranks: int, victim: int, when: str) -> dict[str, Any]:
    scenario = Scenario(CASE, rank, num_ranks)
    buffer = make_buffer(enable_shrink=True, timeout=30.0)
    serve(buffer, scenario)
    result = scenario.dispatch(buffer, return_recv_hook=True)
    result[4]()
    dist.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    partly = Scenario(CASE, rank, num_ranks, masked=(victim,))
    if when == "combine":
        partly.check_combine(scenario.combine(buffer, result))
    for hooked in (True, False):
        serve(buffer, partly, hooked) if when == "combine" else None
    if when == "dispatch":
        several = [partly.dispatch(buffer, return_recv_hook=True) for _ in range(12)]
        for received in reversed(several):
            received[4]()
            partly.check_dispatch(received)
    masked = masked_ranks(buffer)
    buffer.low_latency_clean_mask_buffer()  # it is found dead again
    serve(buffer, partly)
    assert masked_ranks(buffer) == masked
    buffer.destroy()
    return {"masked": masked}


@pytest.mark.parametrize(
    ("num_ranks", "victim", "when"), [(3, 1, "combine"), *slow((2, 0, "combine")), (3, 2, "dispatch")]
)
def test_dead_rank_is_masked(num_ranks: int, victim: int, when: str) -> None:
    with RankPool(num_ranks, 1) as pool:
        with pytest.raises(RankError) as caught:
            pool.run(die, victim, when)
        assert set(caught.value.failures) == {victim}, caught.value
        for rank in set(range(num_ranks)) - {victim}:
            assert caught.value.results[rank] == {"masked": [victim]}


def stay_away(rank: int, num_ranks: int, in_flight: int) -> dict[str, Any]:
    """Rank 1 does not come; the others wait for room, not for messages."""
    case = Case(tokens=(6, 6, 6, 6), hidden=6000)
    scenario = Scenario(case, rank, num_ranks)
    partly = Scenario(case, rank, num_ranks, masked=(1,))
    # Ranks that are slower to notice must not be taken for silent ones.
    buffer = make_buffer(enable_shrink=True, timeout=TIMEOUT + 0.2 * rank, num_rdma_bytes=128)
    serve(buffer, scenario)
    dist.barrier()
    result: dict[str, Any] = {}
    if rank != 1:
        started = time.monotonic()
        flying = [partly.dispatch(buffer, return_recv_hook=True) for _ in range(in_flight)]
        for received in flying:
            received[4]()
            partly.check_dispatch(received)
        for _ in range(3):
            serve(buffer, partly)
        result = {"masked": masked_ranks(buffer), "seconds": time.monotonic() - started}
    dist.barrier()
    buffer.destroy()
    return result


def test_silent_rank_is_masked_after_the_deadline(pool_of: PoolOf) -> None:
    results = pool_of(4).run(stay_away, 6)
    for rank in (0, 2, 3):
        assert results[rank]["masked"] == [1]
        assert TIMEOUT <= results[rank]["seconds"] < 3 * TIMEOUT


def clean_without(rank: int, num_ranks: int, shrinks: bool) -> tuple[str, list[int], float]:
    """The last rank does not come to clean the buffer, which is no operation: nothing of it is in any heap."""
    scenario = Scenario(CASE, rank, num_ranks)
    partly = Scenario(CASE, rank, num_ranks, masked=(num_ranks - 1,))
    text, masked, started = "", [], time.monotonic()
    with make_buffer(enable_shrink=shrinks, timeout=TIMEOUT) as buffer:
        serve(buffer, scenario)
        buffer.clean_low_latency_buffer(8, 128, 8)
        if rank < num_ranks - 1:
            started = time.monotonic()
            try:
                for _ in range(3):  # masked ranks are not waited for
                    buffer.clean_low_latency_buffer(8, 128, 8)
            except PeerTimeoutError as error:
                text = str(error)
            if shrinks:
                masked = masked_ranks(buffer)
                serve(buffer, partly)
        seconds = time.monotonic() - started
        dist.barrier()
    return text, masked, seconds


@pytest.mark.parametrize("shrinks", [True, False])
def test_cleaning_waits_up_to_the_deadline(pool_of: PoolOf, shrinks: bool) -> None:
    for text, masked, seconds in pool_of(3).run(clean_without, shrinks)[:2]:
        assert masked == ([2] if shrinks else [])
        if shrinks:
            assert text == ""
        else:
            assert text.startswith("clean_low_latency_buffer (epoch 2): rank 2: ")
        assert TIMEOUT <= seconds < TIMEOUT + 1.5


def clean_with_the_dead(rank: int, num_ranks: int) -> list[int]:
    buffer = make_buffer(enable_shrink=True, timeout=TIMEOUT)
    serve(buffer, Scenario(CASE, rank, num_ranks))
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    buffer.clean_low_latency_buffer(8, 128, 8)
    serve(buffer, Scenario(CASE, rank, num_ranks, masked=(1,)))
    return masked_ranks(buffer)


def test_cleaning_masks_the_dead() -> None:
    with RankPool(3, 1) as pool, pytest.raises(RankError) as caught:
        pool.run(clean_with_the_dead)
    assert sorted(caught.value.failures) == [1]
    assert [caught.value.results[rank] for rank in (0, 2)] == [[1], [1]]


def disagree(rank: int, num_ranks: int, how: str, hooked: bool) -> dict[str, Any]:
    scenario = Scenario(CASE, rank, num_ranks)
    normal = NormalScenario(NormalCase(), rank, num_ranks)
    buffer = make_buffer(timeout=TIMEOUT)
    result = scenario.dispatch(buffer)
    odd = rank == num_ranks - 1

    def act() -> None:
        if odd and how == "normal":
            normal.dispatch(buffer)
        elif odd and how == "combine":
            scenario.combine(buffer, result)
        else:
            x, ids = torch.zeros(3, 256 if odd and how == "hidden" else 128, dtype=torch.bfloat16), scenario.ids[:3]
            ids = ids[:, : 3 if odd and how == "choices" else 4].contiguous()
            experts = scenario.num_experts * (2 if odd and how == "experts" else 1)
            most = scenario.most + (odd and how == "most")
            hook = buffer.low_latency_dispatch(
                x,
                ids,
                most,
                experts,
                use_fp8=(odd and how == "fp8") or how == "scales",
                round_scale=odd and how == "scales",
                use_ue8m0=odd and how == "scales",
                return_recv_hook=hooked,
            )[4]
            if hook is not None:
                hook()

    failure = outcome(act)
    failure["available"] = buffer.is_available()
    dist.barrier()
    buffer.destroy()
    return failure


@pytest.mark.parametrize("hooked", [*slow(False), True])
@pytest.mark.parametrize("how", ["hidden", "most", "fp8", "scales", "experts", "choices", "combine", "normal"])
def test_ranks_that_disagree_all_raise(pool_of: PoolOf, how: str, hooked: bool) -> None:
    for rank, result in enumerate(pool_of(3).run(disagree, how, hooked)):
        assert result["kind"] == "MismatchError", (rank, result)
        assert result["seconds"] < TIMEOUT
        assert "disagree on" in result["text"]
        assert result["ranks"] == (2,) if rank < 2 else result["ranks"]
        assert not result["available"] or (how == "normal" and rank == 2)


def without_low_latency_mode(rank: int, num_ranks: int) -> list[dict[str, Any]]:
    x, ids = torch.zeros(2, 128, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.int64)
    with tokenferry.Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        calls: list[Callable[[], object]] = [
            lambda: buffer.low_latency_dispatch(x, ids, 2, num_ranks),
            lambda: buffer.low_latency_combine(x, ids, torch.zeros(2, 1), ()),
            lambda: buffer.get_next_low_latency_combine_buffer(()),
            lambda: buffer.clean_low_latency_buffer(2, 128, num_ranks),
        ]
        results = [outcome(call) for call in calls]
        assert buffer.is_available()
    results.append(outcome(lambda: buffer.low_latency_dispatch(x, ids, 2, num_ranks)))
    return results


def test_low_latency_mode_is_asked_for(pool_of: PoolOf) -> None:
    for results in pool_of(2).run(without_low_latency_mode):
        assert [result["kind"] for result in results] == ["BufferStateError"] * 5
        assert all("low_latency_mode" in result["text"] for result in results[:4])
