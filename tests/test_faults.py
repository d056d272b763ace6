"""What happens when ranks die, stop, give up, run out of memory or call the wrong thing."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tokenferry
from tests.cases import named_segments
from tests.conftest import slow
from tests.faults import names, names_left
from tokenferry.cli.ranks import RankError, RankPool
from tokenferry.memory import shm
from tokenferry.memory.heap import Heap

TIMEOUT = 3.0
NUM_EXPERTS = 12


def make_buffer(**options: Any) -> tokenferry.Buffer:
    return tokenferry.Buffer(dist.group.WORLD, **{"timeout": TIMEOUT, **options})


def dispatch_once(
    buffer: tokenferry.Buffer, hidden: int = 64, num_experts: int = NUM_EXPERTS, **options: Any
) -> tuple[Any, ...]:
    topk_idx = torch.arange(8 * 3, dtype=torch.int64).remainder(num_experts).view(8, 3)
    per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(topk_idx, num_experts)
    return buffer.dispatch(
        torch.full((8, hidden), float(buffer.rank)),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=member,
        num_tokens_per_expert=per_expert,
        **options,
    )


def outcome(action: Any) -> dict[str, Any]:
    """What ``action`` raised, and when."""
    started = time.monotonic()
    try:
        action()
    except tokenferry.TokenferryError as error:
        return {
            "kind": type(error).__name__,
            "text": str(error),
            "ranks": getattr(error, "ranks", None),
            "operation": getattr(error, "operation", None),
            "seconds": time.monotonic() - started,
        }
    return {"kind": None, "seconds": time.monotonic() - started}


def die_between(rank: int, num_ranks: int, victim: int, after: str) -> dict[str, Any]:
    buffer = make_buffer()
    received = dispatch_once(buffer)
    if after == "combine":
        buffer.combine(received[0], received[4])
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    if after == "combine":
        result = outcome(lambda: dispatch_once(buffer))
    else:
        result = outcome(lambda: buffer.combine(received[0], received[4]))
    result["available"] = buffer.is_available()
    result["again"] = outcome(lambda: dispatch_once(buffer))["kind"]
    buffer.destroy()
    return result


@pytest.mark.parametrize(("num_ranks", "victim", "after"), [(4, 2, "combine"), *slow((2, 0, "dispatch"))])
def test_killed_rank_is_named(num_ranks: int, victim: int, after: str) -> None:
    with RankPool(num_ranks, 1) as pool:
        with pytest.raises(RankError) as caught:
            pool.run(die_between, victim, after)
        results = caught.value.results
        assert set(caught.value.failures) == {victim}
    for rank in set(range(num_ranks)) - {victim}:
        result = results[rank]
        assert result["kind"] == "PeerLostError", result
        assert result["ranks"] == (victim,)
        assert result["operation"] == ("combine" if after == "dispatch" else "dispatch")
        assert str(victim) in result["text"]
        assert "process has ended" in result["text"]
        assert result["seconds"] < TIMEOUT
        assert not result["available"]
        assert result["again"] == "BufferStateError"


def call_differently(rank: int, num_ranks: int, how: str) -> list[dict[str, Any]]:
    buffer = make_buffer(num_nvl_bytes=1 << 20)
    received = dispatch_once(buffer)
    odd = rank == num_ranks - 1

    def bad() -> object:
        if how == "operation":
            return buffer.combine(received[0], received[4]) if odd else dispatch_once(buffer)
        if how == "hidden":
            return dispatch_once(buffer, hidden=128 if odd else 64)
        if how == "experts":
            return dispatch_once(buffer, num_experts=24 if odd else NUM_EXPERTS)
        if how == "cached":
            x = torch.zeros(8, 64)
            return buffer.dispatch(x, handle=received[4]) if odd else dispatch_once(buffer)
        if how == "dtype":
            x = torch.zeros(8, 64, dtype=torch.int32 if odd else torch.float32)
            return buffer.dispatch(x, handle=received[4])
        if how == "scales":
            x = torch.zeros(8, 64, dtype=torch.uint8)
            return buffer.dispatch((x, torch.zeros(8, 2 if odd else 1)), handle=received[4])
        if how == "topk_weights":
            rows = received[0]
            weights = torch.zeros(rows.size(0), 3) if odd else None
            return buffer.combine(rows, received[4], topk_weights=weights)
        assert how == "handle"
        other = dispatch_once_to_self(buffer)
        return buffer.combine(*other) if odd else buffer.combine(received[0], received[4])

    results = [outcome(bad)]
    again = dispatch_once(buffer)  # everyone has stepped back: the Buffer works on
    results.append({"equal": torch.equal(again[0], received[0]), "available": buffer.is_available()})
    buffer.destroy()
    return results


def dispatch_once_to_self(buffer: tokenferry.Buffer) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    local = NUM_EXPERTS // buffer.group_size
    topk_idx = torch.full((8, 1), buffer.rank * local, dtype=torch.int64)
    per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)
    received = buffer.dispatch(
        torch.zeros(8, 64),
        num_tokens_per_rank=per_rank,
        is_token_in_rank=member,
        num_tokens_per_expert=per_expert,
    )
    assert received[4] is not None
    return received[0], received[4]


@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("operation", "operation"),
        ("hidden", "row_bytes"),
        ("experts", "num_experts"),
        ("cached", "operation"),
        ("dtype", "dtype"),
        ("scales", "scale_bytes"),
        ("topk_weights", "num_topk"),
        ("handle", "handle"),
    ],
)
def test_ranks_that_disagree_all_raise_and_go_on(how: str, word: str, pool_of: Any) -> None:
    for results, recovered in pool_of(3).run(call_differently, how):
        assert results["kind"] == "MismatchError", results
        assert results["ranks"] == (2,)
        assert word in results["text"]
        assert recovered == {"equal": True, "available": True}


def overflow_worst(rank: int, num_ranks: int) -> list[Any]:
    buffer = make_buffer()
    topk_idx = torch.zeros(8, 1, dtype=torch.int64)  # everything to rank 0: 8 * num_ranks rows
    weights = torch.ones(8, 1)
    per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(topk_idx, NUM_EXPERTS)

    def run(worst: int) -> tuple[Any, ...]:
        return buffer.dispatch(
            torch.ones(8, 16),
            num_tokens_per_rank=per_rank,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            topk_idx=topk_idx,
            topk_weights=weights,
            num_worst_tokens=worst,
        )

    result = outcome(lambda: run(8 * num_ranks - 1))
    rows = run(8 * num_ranks)[0]
    buffer.destroy()
    return [result, list(rows.shape)]


def test_too_few_worst_tokens_raise_everywhere(pool_of: Any) -> None:
    for result, shape in pool_of(3).run(overflow_worst):
        assert result["kind"] == "CapacityError", result
        assert result["ranks"] == (0,)
        assert "num_worst_tokens" in result["text"]
        assert "23" in result["text"]
        assert "24" in result["text"]
        assert shape == [24, 16]


def run_out_of_shared_memory(rank: int, num_ranks: int) -> list[Any]:
    buffer = make_buffer()
    dispatch_once(buffer)
    original = shm.Segment.commit

    def refuse(self: shm.Segment, size: int) -> None:
        if size > self.committed:
            raise tokenferry.HeapError("no room (made up)")
        original(self, size)

    if rank == 1:
        shm.Segment.commit = refuse  # type: ignore[method-assign]
    try:
        result = outcome(lambda: dispatch_once(buffer, hidden=1 << 16))
    finally:
        shm.Segment.commit = original  # type: ignore[method-assign]
    again = outcome(lambda: dispatch_once(buffer, hidden=1 << 16))
    buffer.destroy()
    return [result, again]


def test_stage_that_cannot_grow_raises_everywhere(pool_of: Any) -> None:
    for result, again in pool_of(3).run(run_out_of_shared_memory):
        assert result["kind"] == "CapacityError", result
        assert result["ranks"] == (1,)
        assert "shared memory" in result["text"]
        assert again["kind"] is None


def run_in_a_small_stage(rank: int, num_ranks: int) -> bool:
    """The system gives less than asked for: the operation works in what there is."""
    buffer = make_buffer()
    original = shm.Segment.commit

    def grudge(self: shm.Segment, size: int) -> None:
        if size > 1 << 20:
            raise tokenferry.HeapError("no room (made up)")
        original(self, size)

    shm.Segment.commit = grudge  # type: ignore[method-assign]
    try:
        received = dispatch_once(buffer, hidden=1 << 15)
        combined, _, _ = buffer.combine(received[0], received[4])
    finally:
        shm.Segment.commit = original  # type: ignore[method-assign]
    member = received[4].is_token_in_rank
    buffer.destroy()
    expected = torch.full((8, 1 << 15), float(rank)) * member.sum(1, keepdim=True)
    return torch.equal(combined, expected)


def test_less_memory_than_wanted_means_more_rounds(pool_of: Any) -> None:
    assert all(pool_of(3).run(run_in_a_small_stage))


def construct_where_one_cannot(rank: int, num_ranks: int) -> dict[str, Any]:
    original = Heap.attach
    if rank == 1:

        def refuse(self: Heap, handles: Any) -> None:
            raise tokenferry.HeapError("cannot open (made up)")

        Heap.attach = refuse  # type: ignore[method-assign]
    try:
        result = outcome(make_buffer)
    finally:
        Heap.attach = original  # type: ignore[method-assign]
    with make_buffer() as buffer:
        dispatch_once(buffer)
    return result


def test_construction_that_fails_on_one_rank_fails_on_all(pool_of: Any) -> None:
    before = names()
    for result in pool_of(3).run(construct_where_one_cannot):
        assert result["kind"] == "TokenferryError"
        assert "rank 1: cannot open (made up)" in result["text"]
    assert names_left(before) == set()


def hold_a_buffer(rank: int, num_ranks: int) -> list[str]:
    global _kept
    _kept = make_buffer()
    dispatch_once(_kept)
    dist.barrier()
    return named_segments()


def test_segments_have_no_name_while_in_use_and_die_with_killed_ranks() -> None:
    before = names()
    pool = RankPool(3, 1)
    try:
        assert pool.run(hold_a_buffer) == [[], [], []]
        for process in pool.processes:
            process.kill()
    finally:
        pool.close()
    assert names_left(before) == set()


def leave_without_destroy(rank: int, num_ranks: int) -> None:
    hold_a_buffer(rank, num_ranks)


def test_exit_without_destroy_is_clean() -> None:
    started, before = time.monotonic(), names()
    pool = RankPool(2, 1)
    pool.run(leave_without_destroy)
    pool.close()
    assert [process.exitcode for process in pool.processes] == [0, 0]
    assert time.monotonic() - started < 20
    assert names_left(before) == set()


def run_from_two_threads(rank: int, num_ranks: int) -> list[bool]:
    """Waiting lets other threads run, and two Buffers in two threads do not disturb each other."""
    buffers = [make_buffer(timeout=30.0), make_buffer(timeout=30.0)]
    results: list[bool] = []

    def work(buffer: tokenferry.Buffer, late: bool) -> None:
        for _ in range(20):
            if late and rank == 1:
                time.sleep(0.002)
            received = dispatch_once(buffer)
            combined, _, _ = buffer.combine(received[0], received[4])
            sums = received[4].is_token_in_rank.sum(1, keepdim=True) * float(rank)
            results.append(torch.equal(combined, sums.expand(-1, 64).to(combined.dtype)))

    threads = [threading.Thread(target=work, args=(buffer, i == 0)) for i, buffer in enumerate(buffers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for buffer in buffers:
        buffer.destroy()
    return results


def test_two_threads_with_a_buffer_each(pool_of: Any) -> None:
    for results in pool_of(2).run(run_from_two_threads):
        assert results == [True] * 40


def construct_in_inference_mode(rank: int, num_ranks: int) -> bool:
    with torch.inference_mode():
        buffer = make_buffer(num_rdma_bytes=128, low_latency_mode=True)
        inside = dispatch_once(buffer)
        buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True)
    outside = dispatch_once(buffer)
    buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True).fill_(1)
    buffer.combine(outside[0], outside[4])
    buffer.destroy()
    return torch.equal(inside[0], outside[0])


def test_buffer_made_in_inference_mode_works_outside_of_it(pool_of: Any) -> None:
    assert all(pool_of(2).run(construct_in_inference_mode))


def give_an_impossible_size(rank: int, num_ranks: int) -> list[str]:
    made = outcome(lambda: make_buffer(num_nvl_bytes=1 << 63 if rank == 1 else 0))
    return [made["kind"], made["text"]]


def test_impossible_size_on_one_rank_fails_on_all(pool_of: Any) -> None:
    before = names()
    for kind, text in pool_of(2).run(give_an_impossible_size):
        assert kind == "TokenferryError"
        assert "rank 1: cannot map" in text
    assert names_left(before) == set()


def give_unusable_counts(rank: int, num_ranks: int) -> list[Any]:
    buffer = make_buffer()
    topk_idx = torch.zeros(8, 1, dtype=torch.int64)
    too_many = outcome(
        lambda: dispatch_once(buffer, topk_idx=topk_idx, topk_weights=torch.ones(8, 1), num_worst_tokens=1 << 31)
    )
    received = dispatch_once(buffer)
    disorder = received[4]._replace(recv_src_idx=received[4].recv_src_idx.clone().fill_(1))
    disordered = outcome(lambda: buffer.combine(received[0], disorder))
    again = outcome(lambda: buffer.combine(received[0], received[4]))
    buffer.destroy()
    return [too_many, disordered, again]


def test_unusable_counts_are_refused_before_a_peer_is_touched(pool_of: Any) -> None:
    for too_many, disordered, again in pool_of(2).run(give_unusable_counts):
        assert too_many["kind"] == "ArgumentError"
        assert "num_worst_tokens" in too_many["text"]
        assert disordered["kind"] == "ArgumentError"
        assert "recv_src_idx" in disordered["text"]
        assert again["kind"] is None


def dispatch_with_a_masked_rank(rank: int, num_ranks: int) -> list[Any]:
    buffer = make_buffer(low_latency_mode=True, enable_shrink=True)
    buffer.low_latency_update_mask_buffer((rank + 1) % num_ranks, True)
    received = outcome(lambda: dispatch_once(buffer))
    buffer.low_latency_clean_mask_buffer()
    again = outcome(lambda: dispatch_once(buffer))
    buffer.destroy()
    return [received["kind"], received["text"], again["kind"]]


def test_operations_of_all_ranks_refuse_to_go_on_without_one(pool_of: Any) -> None:
    for rank, (kind, text, again) in enumerate(pool_of(3).run(dispatch_with_a_masked_rank)):
        assert kind == "BufferStateError"
        assert f"rank {(rank + 1) % 3} masked" in text
        assert again is None


@pytest.mark.parametrize(
    "error",
    [
        tokenferry.ArgumentError("x", 1, "2"),
        tokenferry.PeerTimeoutError("dispatch", 3, [1, 2], "silent"),
        tokenferry.CapacityError("combine", 4, [0], "full"),
        tokenferry.HeapError("no room"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_can_be_pickled(error: tokenferry.TokenferryError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert str(copy) == str(error)
    assert copy.__dict__ == error.__dict__


def do_nothing(rank: int, num_ranks: int) -> int:
    return rank


def test_pool_names_a_rank_that_ended_before_the_call() -> None:
    with RankPool(2, 1) as pool:
        assert pool.run(do_nothing) == [0, 1]
        pool.processes[1].kill()
        pool.processes[1].join()
        with pytest.raises(RankError) as caught:
            pool.run(do_nothing)
    assert caught.value.results[0] == 0
    assert set(caught.value.failures) == {1}
