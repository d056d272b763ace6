"""Low-latency dispatch and combine on CPU ranks: every output against the oracle, bit for bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.cases import poisoned_memory
from tests.conftest import PoolOf, but_slow, slow
from tests.low_latency_cases import FORMATS, ROUTINGS, Case, Scenario, check_cases, make_buffer

RANKS = (1, 2, 3, 4, 8)


@pytest.mark.parametrize("num_ranks", but_slow(RANKS, 3, 8))
def test_every_routing_equals_the_oracle(pool_of: PoolOf, num_ranks: int) -> None:
    cases = [Case(routing=routing, tokens=(6, 3), seed=seed) for seed, routing in enumerate(ROUTINGS)]
    pool_of(num_ranks).run(check_cases, cases, {})


@pytest.mark.parametrize(
    ("form", "num_ranks"),
    but_slow(
        itertools.product(FORMATS, RANKS),
        *((form, num_ranks) for form in FORMATS for num_ranks in (2, 3)),
        *((form, 1) for form in FORMATS if form != "ue8m0"),
        ("ue8m0", 4),
        *((form, 8) for form in FORMATS if form != "ue8m0"),
    ),
)
def test_every_format_equals_the_oracle(pool_of: PoolOf, num_ranks: int, form: str) -> None:
    cases = [
        Case(format=form, hidden=hidden, routing=routing, tokens=(4, 0, 2), spare=1, seed=hidden)
        for hidden, routing in ((128, "random"), (384, "duplicates"), (640, "sparse"))
    ]
    pool_of(num_ranks).run(check_cases, cases, {})


@pytest.mark.parametrize(
    ("tokens", "spare"),
    [((0,), 0), ((0,), 3), ((0, 4), 0), ((4, 0, 0), 2), ((1,), 0), ((17, 3), 0), ((17, 16, 1), 40)],
)
def test_token_counts(pool_of: PoolOf, tokens: tuple[int, ...], spare: int) -> None:
    cases = [Case(tokens=tokens, spare=spare, format=form) for form in ("bf16", "ue8m0")]
    pool_of(3).run(check_cases, cases, {})


@pytest.mark.parametrize("num_topk", [1, 7, 9, 32, *slow(2, 8, 16, 31)])
def test_choices(pool_of: PoolOf, num_topk: int) -> None:
    cases = [
        Case(tokens=(3, 9), spare=30, num_topk=num_topk, routing=routing, local_experts=4)
        for routing in ("random", "duplicates", "distinct")
    ]
    pool_of(2).run(check_cases, cases, {})


@pytest.mark.parametrize("hidden", [8, 16, 24, 72, 1000, 2048])
def test_any_multiple_of_eight_in_bf16(pool_of: PoolOf, hidden: int) -> None:
    pool_of(3).run(check_cases, [Case(hidden=hidden, tokens=(4, 1))], {})


@pytest.mark.parametrize("form", FORMATS)
def test_hidden_7168(pool_of: PoolOf, form: str) -> None:
    pool_of(2).run(check_cases, [Case(hidden=7168, tokens=(2, 1), format=form)], {})


def test_many_experts(pool_of: PoolOf) -> None:
    pool_of(4).run(check_cases, [Case(local_experts=n, num_topk=8, tokens=(5, 2)) for n in (1, 3, 64)], {})


def every_bit_pattern(rank: int, num_ranks: int) -> None:
    """NaN, infinities and denormals travel as they are."""
    source = torch.Generator().manual_seed(3)
    all_x = torch.randint(-(2**15), 2**15, (num_ranks, 40, 256), dtype=torch.int16, generator=source)
    ids = torch.arange(40).remainder(num_ranks).view(40, 1)
    with make_buffer() as buffer:
        rows, count, handle, _, _ = buffer.low_latency_dispatch(
            all_x[rank].view(torch.bfloat16), ids, 40, num_ranks, use_fp8=False
        )
    used = int(count[0])
    tokens = handle[0][0, :used].long()
    sources = torch.arange(num_ranks).repeat_interleave(handle[1][0] & 0xFFFFFFFF)
    assert used == sum(1 for token in range(40) if token % num_ranks == rank) * num_ranks
    assert torch.equal(rows[0, :used].view(torch.int16), all_x[sources, tokens])


def test_every_bit_pattern(pool_of: PoolOf) -> None:
    pool_of(3).run(every_bit_pattern)


def accumulate(rank: int, num_ranks: int) -> list[list[list[int]]]:
    scenario = Scenario(Case(tokens=(5, 2)), rank, num_ranks)
    per_expert = torch.tensor([len(rows) for rows in scenario.rows], dtype=torch.int32)
    received = torch.full((2,), 100, dtype=torch.int32)
    waits = [torch.zeros(num_ranks, dtype=torch.int64) for _ in range(2)]
    history = []
    with make_buffer() as buffer:
        for turn in range(3):
            result = scenario.dispatch(
                buffer, cumulative_local_expert_recv_stats=received, dispatch_wait_recv_cost_stats=waits[0]
            )
            assert torch.equal(received, 100 + (turn + 1) * per_expert)
            scenario.check_combine(scenario.combine(buffer, result, combine_wait_recv_cost_stats=waits[1]))
            history.append([wait.tolist() for wait in waits])
    return history


def test_statistics_are_added_up(pool_of: PoolOf) -> None:
    for rank, history in enumerate(pool_of(3).run(accumulate)):
        for kind in range(2):
            for peer in {0, 1, 2} - {rank}:
                waits = [turn[kind][peer] for turn in history]
                assert 0 < waits[0] < waits[1] < waits[2] < 30 * 10**9


def dispatch_twice(rank: int, num_ranks: int) -> None:
    """Two dispatches before either is combined, each combined twice, the later one first."""
    scenarios = [
        Scenario(Case(seed=seed, tokens=(4, 1, 3), hidden=64 + 8 * seed), rank, num_ranks) for seed in (1, 2)
    ]
    with make_buffer() as buffer, poisoned_memory():
        results = [scenario.dispatch(buffer) for scenario in scenarios]
        for _ in range(2):
            for scenario, result in reversed(list(zip(scenarios, results, strict=True))):
                scenario.check_dispatch(result)
                scenario.check_combine(scenario.combine(buffer, result))


def test_two_dispatches_without_a_combine(pool_of: PoolOf) -> None:
    pool_of(4).run(dispatch_twice)


def weigh_in_order(rank: int, num_ranks: int) -> list[float]:
    """Sums that depend on the order of addition and on rounding only once."""
    ids = torch.tensor([[2, 0, 1], [0, 1, 2], [1, 1, -1]])
    weights = torch.tensor([[1.0, 2.0**24, -(2.0**24)], [2.0**24, 1.0, -(2.0**24)], [0.25, 0.5, 99.0]])
    with make_buffer() as buffer:
        x = torch.ones(3, 8, dtype=torch.bfloat16)
        rows, _, handle, _, _ = buffer.low_latency_dispatch(x, ids, 4, 3, use_fp8=False)
        combined, _, _ = buffer.low_latency_combine(rows, ids, weights, handle)
    return combined[:, 0].tolist()


def test_sums_run_over_choices_in_order_in_float32(pool_of: PoolOf) -> None:
    for sums in pool_of(3).run(weigh_in_order):
        assert sums == [0.0, 0.0, 0.75]  # 2^24 + 1 is not a float32: the one is lost either way


def combine_other_tokens(rank: int, num_ranks: int) -> None:
    """Fewer tokens than were dispatched, and choices that never were."""
    scenario = Scenario(Case(tokens=(6, 4, 5), routing="sparse", local_experts=2), rank, num_ranks)
    ids, weights = scenario.ids, scenario.weights
    with make_buffer() as buffer:
        result = scenario.dispatch(buffer)
        rows = scenario.expert_rows(result)
        few, _, _ = buffer.low_latency_combine(rows, ids[:2].contiguous(), weights[:2], result[2])
        assert torch.equal(few, scenario.expected()[:2])
        none, _, _ = buffer.low_latency_combine(rows, ids[:0], weights[:0], result[2])
        assert none.shape == (0, scenario.case.hidden)
        everything = ids.masked_fill(ids < 0, 0)
        anyway, _, _ = buffer.low_latency_combine(rows, everything, weights, result[2])
        dispatched = [i for i, row in enumerate(ids.tolist()) if 0 in row or -1 not in row]
        others = [i for i, row in enumerate(ids.tolist()) if 0 not in row]
        assert torch.equal(anyway[others], scenario.expected()[others])
        assert len(dispatched) + len(others) >= len(ids)


def test_combine_of_fewer_tokens_and_of_choices_that_were_not_sent(pool_of: PoolOf) -> None:
    pool_of(3).run(combine_other_tokens)


def strided_inputs(rank: int, num_ranks: int) -> None:
    """Rows of any strides; views of larger tensors; tensors that want a gradient."""
    scenario = Scenario(Case(tokens=(5,), hidden=64), rank, num_ranks)
    with make_buffer() as buffer:
        wide = torch.zeros(5, 128, dtype=torch.bfloat16)
        wide[:, ::2] = scenario.x
        x = wide[:, ::2].requires_grad_()
        result = buffer.low_latency_dispatch(x, scenario.ids, scenario.most, scenario.num_experts, use_fp8=False)
        scenario.check_dispatch(result)
        rows = scenario.expert_rows(result)
        padded = torch.full((*rows.shape[:2], 72), 9.0, dtype=torch.bfloat16)
        padded[:, :, :64] = rows
        weights = torch.stack([scenario.weights] * 2, 2)[:, :, 0]
        assert not weights.is_contiguous()
        answer = buffer.low_latency_combine(padded[:, :, :64], scenario.ids, weights, list(result[2]))
        scenario.check_combine(answer)


def test_inputs_of_any_strides(pool_of: PoolOf) -> None:
    pool_of(2).run(strided_inputs)


def keep_handle(rank: int, num_ranks: int) -> None:
    """A combine changes neither the handle nor the other arguments."""
    scenario = Scenario(Case(tokens=(5, 2)), rank, num_ranks)
    with make_buffer() as buffer:
        result = scenario.dispatch(buffer)
        rows = scenario.expert_rows(result)
        given = [rows, scenario.ids, scenario.weights, *result[2][:2]]
        kept = [tensor.clone() for tensor in given]
        buffer.low_latency_combine(rows, scenario.ids, scenario.weights, result[2])
        for before, after in zip(kept, given, strict=True):
            assert torch.equal(before.flatten().view(torch.uint8), after.flatten().view(torch.uint8))


def test_combine_changes_none_of_its_arguments(pool_of: PoolOf) -> None:
    pool_of(2).run(keep_handle)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    form = draw(st.sampled_from(list(FORMATS)))
    return Case(
        tokens=tuple(draw(st.lists(st.integers(0, 8), min_size=1, max_size=3))),
        spare=draw(st.integers(0, 6)),
        hidden=128 * draw(st.integers(1, 5)) if form != "bf16" else 8 * draw(st.integers(1, 80)),
        num_topk=draw(st.integers(1, 9) | st.integers(10, 32)),
        local_experts=draw(st.integers(1, 6)),
        routing=draw(st.sampled_from(ROUTINGS)),
        format=form,
        seed=draw(st.integers(0, 2**32)),
    )


@settings(
    phases=(Phase.generate, Phase.shrink),
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(several=st.lists(cases(), min_size=1, max_size=2), num_rdma_bytes=st.sampled_from([0, 128, 65536]))
def test_any_case_equals_the_oracle(pool_of: PoolOf, several: list[Case], num_rdma_bytes: int) -> None:
    options: dict[str, Any] = {"num_rdma_bytes": num_rdma_bytes}
    pool_of(3).run(check_cases, several, options)
