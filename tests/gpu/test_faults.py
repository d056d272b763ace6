"""Ranks that are late, absent, or disagree, on GPUs: exceptions that name them, and a context that survives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import low_latency_cases
from tests.cases import Case, Scenario, check_works
from tests.gpu.conftest import take_device
from tokenferry import (
    ArgumentError,
    Buffer,
    BufferStateError,
    CapacityError,
    MismatchError,
    PeerError,
    PeerTimeoutError,
)
from tokenferry.cli.ranks import RankError, RankPool

GpuPoolOf = Callable[[int], RankPool]
CASE = Case(tokens=(20, 33), row_bytes=512, num_topk=4, local_experts=4, combine_bytes=512)


def new_buffer(timeout: float = 20.0) -> Buffer:
    return Buffer(dist.group.WORLD, timeout=timeout, device="cuda")


def check_late(rank: int, num_ranks: int, seconds: float) -> None:
    with new_buffer() as buffer:
        scenario = Scenario(CASE, rank, num_ranks, "cuda")
        handle = scenario.dispatch(buffer)[4]
        for late in range(num_ranks):
            dist.barrier()
            if rank == late:
                time.sleep(seconds)
            scenario.check_combine(scenario.combine(buffer, handle))


def test_a_late_rank_is_waited_for(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(2).run(check_late, 3.0)


def check_absent(rank: int, num_ranks: int) -> None:
    with new_buffer() as buffer:  # compiles, for which two seconds may be too short
        check_works(buffer, CASE, "cuda")
    with new_buffer(2.0) as buffer:
        check_works(buffer, CASE, "cuda")
        dist.barrier()
        if rank != 1:
            scenario = Scenario(CASE, rank, num_ranks, "cuda")
            begin = time.monotonic()
            with pytest.raises(PeerTimeoutError) as caught:
                scenario.dispatch(buffer)
            assert caught.value.ranks == (1,)
            assert caught.value.operation == "dispatch"
            assert time.monotonic() - begin < 10
            assert not buffer.is_available()
            with pytest.raises(BufferStateError):
                scenario.dispatch(buffer)
        dist.barrier()
    with new_buffer() as buffer:
        check_works(buffer, CASE, "cuda")


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_an_absent_rank_is_named(gpu_pool_of: GpuPoolOf, num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_absent)


def check_absent_from_combine(rank: int, num_ranks: int) -> None:
    with new_buffer() as buffer:
        check_works(buffer, CASE, "cuda")
    with new_buffer(2.0) as buffer:
        scenario = Scenario(CASE, rank, num_ranks, "cuda")
        handle = scenario.dispatch(buffer)[4]
        dist.barrier()
        if rank != 0:
            scenario.combine(buffer, handle)
            torch.cuda.synchronize()
            with pytest.raises(PeerTimeoutError, match=r"combine .*rank 0: no sign of life"):
                scenario.combine(buffer, handle)
        dist.barrier()


def test_an_absent_rank_is_named_at_the_next_call(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(2).run(check_absent_from_combine)


def raises_then_works(buffer: Buffer, kind: type[Exception], match: str, call: Callable[[], Any]) -> None:

    def until_the_host_knows() -> None:
        call()
        torch.cuda.synchronize()
        buffer.get_dispatch_layout(torch.zeros(1, 1, dtype=torch.int64, device="cuda"), buffer.group_size)

    with pytest.raises(kind, match=match):
        until_the_host_knows()
    assert buffer.is_available()
    dist.barrier()
    check_works(buffer, CASE, "cuda")


def check_disagreements(rank: int, num_ranks: int) -> None:
    with new_buffer() as buffer:
        scenario = Scenario(CASE, rank, num_ranks, "cuda")
        wider = Scenario(Case(**{**vars(CASE), "row_bytes": 1024}), rank, num_ranks, "cuda")
        chosen = wider if rank == 0 else scenario
        raises_then_works(buffer, MismatchError, "called another operation", lambda: chosen.dispatch(buffer))
        handle = scenario.dispatch(buffer)[4]
        cached = wider.x if rank == 0 else scenario.x
        raises_then_works(buffer, MismatchError, "called another operation", lambda: buffer.dispatch(cached, handle))

        def too_small() -> None:
            scenario.dispatch(buffer, num_worst_tokens=1 if rank == 0 else 200)

        raises_then_works(buffer, CapacityError, "rank 0: num_worst_tokens", too_small)

        def bad_ids() -> None:
            if rank == 1:
                scenario.given.topk_idx[3, 0] = num_ranks * CASE.local_experts
            try:
                scenario.dispatch(buffer)
            finally:
                if rank == 1:
                    scenario.given.topk_idx[3, 0] = 0

        kind, match = (ArgumentError, "topk_idx") if rank == 1 else (MismatchError, "rank 1: gave expert ids")
        raises_then_works(buffer, kind, match, bad_ids)


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_disagreeing_ranks_step_back_and_go_on(gpu_pool_of: GpuPoolOf, num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_disagreements)


def check_streams(rank: int, num_ranks: int) -> None:
    """Side streams, events and the three ways of ending an operation."""
    with new_buffer() as buffer:
        scenario = Scenario(CASE, rank, num_ranks, "cuda")
        side = torch.cuda.Stream()
        for allocate in (False, True):
            with torch.cuda.stream(side):
                torch.cuda._sleep(10_000_000)
                scenario.given.x.copy_(scenario.given.x.clone())
                event = Buffer.capture()
            arguments = scenario.layout_arguments(buffer) | scenario.topk_arguments()
            result = buffer.dispatch(
                scenario.x, **arguments, previous_event=event, async_finish=True, allocate_on_comm_stream=allocate
            )
            result[5].current_stream_wait()
            scenario.check_dispatch((*result[:5], type(result[5])()))
            combined, weights, done = scenario.combine(buffer, result[4], async_finish=True)
            with done:
                torch.cuda._sleep(1000)
            scenario.check_combine((combined, weights, type(done)()))
        assert buffer.get_comm_stream() != torch.cuda.current_stream()
        with torch.cuda.stream(buffer.get_comm_stream()):
            check_works(buffer, CASE, "cuda")


def test_streams_and_events(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(2).run(check_streams)


def check_shrink(rank: int, num_ranks: int, victim: int, is_killed: bool) -> tuple[int, int] | None:
    """One rank stays away, or is killed; the others go on, in both modes."""
    push = Buffer.get_low_latency_rdma_size_hint(16, 512, num_ranks, 4 * num_ranks)
    options = {"timeout": 5.0, "device": "cuda", "low_latency_mode": True, "num_rdma_bytes": push}
    with Buffer(dist.group.WORLD, **options) as buffer:
        check_works(buffer, CASE, "cuda")
        dist.barrier()
        if rank == victim:
            if is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return None
        with pytest.raises(PeerError):
            Scenario(CASE, rank, num_ranks, "cuda").dispatch(buffer)
        assert victim not in buffer.shrink([victim]).ranks
        Scenario(CASE, buffer.rank, buffer.group_size, "cuda").check_all(buffer)
        quick = low_latency_cases.Scenario(
            low_latency_cases.Case(hidden=512), buffer.rank, buffer.group_size, device="cuda"
        )
        low_latency_cases.check_case(buffer, quick, by_rank=True)
        return buffer.rank, buffer.group_size


@pytest.mark.ranks(3)
@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_go_on(gpu_pool_of: GpuPoolOf, victim: int) -> None:
    results = gpu_pool_of(3).run(check_shrink, victim, False)
    assert [result for result in results if result] == [(0, 2), (1, 2)]


@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="under MPS, ranks of one GPU do not outlive a killed one")
def test_survivors_of_a_killed_rank_go_on() -> None:
    with RankPool(3, 1) as pool:
        pool.run(take_device)
        with pytest.raises(RankError) as caught:
            pool.run(check_shrink, 1, True)
    assert sorted(caught.value.failures) == [1], caught.value
    assert [result for result in caught.value.results if result] == [(0, 2), (1, 2)]
