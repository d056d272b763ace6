"""The low-latency pair on GPUs: against the oracle, in flight, captured, under stress, and without a rank."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case as NormalCase
from tests.cases import Scenario as NormalScenario
from tests.cases import poisoned_memory
from tests.low_latency_cases import FORMATS, ROUTINGS, Case, Scenario, check_case
from tokenferry import Buffer, BufferStateError, MismatchError, PeerTimeoutError
from tokenferry.cli.ranks import RankPool

GpuPoolOf = Callable[[int], RankPool]
PUSH_BYTES = 64 << 20


def make_buffer(**options: Any) -> Buffer:
    options = {"timeout": 20.0, "num_rdma_bytes": PUSH_BYTES, **options}
    return Buffer(dist.group.WORLD, low_latency_mode=True, device="cuda", **options)


def meet() -> None:
    """A barrier that a failure on another rank does not make endless."""
    dist.monitored_barrier(timeout=timedelta(seconds=30))


def warm_up(buffer: Buffer, scenario: Scenario) -> None:
    """So that no rank compiles while others wait, and time out."""
    case = scenario.case
    buffer.low_latency_warmup(
        scenario.most, case.hidden, case.num_topk, scenario.num_experts, **{"use_fp8": False, **FORMATS[case.format]}
    )


def scenario_of(rank: int, num_ranks: int, **fields: Any) -> Scenario:
    masked = fields.pop("masked", ())
    return Scenario(Case(**fields), rank, num_ranks, masked, "cuda")


def check_shapes(rank: int, num_ranks: int, cases: list[Case], options: dict[str, Any]) -> None:
    with make_buffer(**options) as buffer, poisoned_memory():
        for case in cases:
            scenario = Scenario(case, rank, num_ranks, (), "cuda")
            check_case(buffer, scenario, by_rank=not options.get("exact_combine", False))


SMALL = [
    Case(tokens=(7, 0, 20, 5), hidden=1152, num_topk=3, local_experts=2, format=form, routing=routing, seed=seed)
    for seed, (form, routing) in enumerate(itertools.product(FORMATS, ROUTINGS))
]
WIDE = [
    Case(tokens=(9, 17, 1), hidden=7168, num_topk=8, local_experts=4, format=form, routing="distinct", seed=seed)
    for seed, form in enumerate(("bf16", "ue8m0"))
]
ODD = [
    Case(tokens=(3,), hidden=8, num_topk=1, local_experts=1),
    Case(tokens=(12, 2), hidden=1032, num_topk=32, local_experts=5, spare=7),
    Case(tokens=(9,), hidden=128, num_topk=5, local_experts=3, format="ue8m0"),
]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_small_rows(gpu_pool_of: GpuPoolOf, num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_shapes, SMALL[num_ranks % 3 :: 3], {})


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 8])
def test_wide_and_odd_rows(gpu_pool_of: GpuPoolOf, num_ranks: int, exact: bool) -> None:
    gpu_pool_of(num_ranks).run(check_shapes, WIDE + ODD, {"exact_combine": exact})


def check_hooks(rank: int, num_ranks: int, count: int, exact: bool) -> None:
    """Many in flight, received in an order of each rank's own; hooks called twice; a stream of their own."""
    order = list(range(count))
    random.Random(rank).shuffle(order)
    forms = itertools.cycle(FORMATS)
    scenarios = [
        scenario_of(rank, num_ranks, tokens=(4, n % 3, 9), hidden=256, seed=n, format=next(forms))
        for n in range(count)
    ]
    side = torch.cuda.Stream()
    with make_buffer(exact_combine=exact) as buffer:
        results = [scenario.dispatch(buffer, return_recv_hook=True) for scenario in scenarios]
        for at in order * 2:
            results[at][4]()
            scenarios[at].check_dispatch(results[at])
        answers = [s.combine(buffer, r, return_recv_hook=True) for s, r in zip(scenarios, results, strict=True)]
        side.wait_stream(torch.cuda.current_stream())
        for at in order * 2:
            with torch.cuda.stream(side if at % 2 else torch.cuda.current_stream()):
                answers[at][2]()
                scenarios[at].check_combine(answers[at], by_rank=not exact)
        first = scenarios[0]
        x, ids = first.x.cuda(), first.ids.cuda()
        result = buffer.low_latency_dispatch(
            x, ids, first.most, first.num_experts, **FORMATS[first.case.format], async_finish=True
        )
        result[3].current_stream_wait()
        first.check_dispatch(result)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_hooks_in_any_order(gpu_pool_of: GpuPoolOf, num_ranks: int, exact: bool) -> None:
    gpu_pool_of(num_ranks).run(check_hooks, 11, exact)


def check_graphs(rank: int, num_ranks: int, hooks: bool) -> None:
    """A graph of two pairs and a dispatch, replayed with new values, between eager calls and normal dispatches."""
    shape = {"tokens": (16,), "hidden": 1024, "num_topk": 4, "local_experts": 4, "routing": "distinct"}
    scenarios = [scenario_of(rank, num_ranks, **shape, seed=seed) for seed in range(6)]
    first = scenarios[0]
    x, ids, weights = first.x.cuda(), first.ids.cuda(), first.weights.cuda()
    with make_buffer() as buffer:

        def pair() -> tuple[Any, ...]:
            result = buffer.low_latency_dispatch(
                x, ids, first.most, first.num_experts, use_fp8=False, return_recv_hook=hooks
            )
            if hooks:
                result[4]()
            answer = buffer.low_latency_combine(result[0], ids, weights, result[2], return_recv_hook=hooks)
            if hooks:
                answer[2]()
            return result, answer

        pair()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = [pair(), pair()]
            alone = buffer.low_latency_dispatch(x, ids, first.most, first.num_experts, use_fp8=False)
        torch.cuda.synchronize()
        for turn, scenario in enumerate(scenarios * 3):
            for static, value in ((x, scenario.x), (ids, scenario.ids), (weights, scenario.weights)):
                static.copy_(value)
            if turn % 4 == rank % 4:
                torch.cuda._sleep(10_000_000)
            for _ in range(1 + turn % 3):
                graph.replay()
            scenario.check_dispatch(alone)
            for result, answer in captured:
                scenario.check_dispatch(result)
                # The experts return the rows as they came.
                total = answer[0].float().cpu()
                factors = (scenario.weights * (scenario.ids >= 0)).sum(1, keepdim=True)
                wanted = scenario.x.float() * factors
                assert (total - wanted).abs().max() <= wanted.abs().max() * 0.02
            if turn % 3 == 0:
                check_case(buffer, scenario, by_rank=True)
            if turn % 3 == 1:
                NormalScenario(NormalCase(tokens=(5, 9), seed=turn), rank, num_ranks, "cuda").check_all(buffer)


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_replays_mixed_with_eager_calls(gpu_pool_of: GpuPoolOf, num_ranks: int, hooks: bool) -> None:
    gpu_pool_of(num_ranks).run(check_graphs, hooks)


def check_capture_between(rank: int, num_ranks: int) -> None:
    """What is sent in a graph must be received in it."""
    scenario = scenario_of(rank, num_ranks, tokens=(5,), hidden=256)
    x, ids = scenario.x.cuda(), scenario.ids.cuda()
    with make_buffer() as buffer:
        scenario.check_dispatch(scenario.dispatch(buffer))
        pending = scenario.dispatch(buffer, return_recv_hook=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), pytest.raises(BufferStateError, match="outside of a CUDA graph"):
            pending[4]()
        pending = scenario.dispatch(buffer, return_recv_hook=True)
        pending[4]()
        scenario.check_dispatch(pending)
        del x, ids


def test_a_hook_is_called_where_its_operation_was_sent(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(2).run(check_capture_between)


HIDDEN, TOPK, LOCAL = 512, 4, 4


def check_stress(rank: int, num_ranks: int, iterations: int, exact: bool) -> None:
    """Random sizes, delays and hooks. Rows hold small integers, weights are 1: all sums are exact."""
    common, own = random.Random(7), random.Random(rank)
    most, experts = 24, num_ranks * LOCAL
    with make_buffer(exact_combine=exact) as buffer:
        for iteration in range(iterations):
            sizes = [common.choice((0, 1, 5, most)) for _ in range(num_ranks)]
            source = torch.Generator().manual_seed(iteration)
            all_ids = torch.rand(num_ranks, most, experts, generator=source).argsort(2)[:, :, :TOPK]
            all_ids[torch.rand(all_ids.shape, generator=source) < 0.1] = -1
            for peer, size in enumerate(sizes):
                all_ids[peer, size:] = -1
            values = torch.randint(1, 32, (num_ranks, most), generator=source).float()
            ids = all_ids[rank, : sizes[rank]].contiguous().cuda()
            x = values[rank, : sizes[rank], None].expand(-1, HIDDEN).bfloat16().contiguous().cuda()
            if own.random() < 0.2:
                torch.cuda._sleep(own.randrange(1_000_000))
            hooks = common.random() < 0.5
            result = buffer.low_latency_dispatch(x, ids, most, experts, use_fp8=False, return_recv_hook=hooks)
            if hooks:
                if own.random() < 0.2:
                    torch.cuda._sleep(own.randrange(1_000_000))
                result[4]()
            weights = torch.ones(ids.shape, device="cuda")
            answer = buffer.low_latency_combine(result[0], ids, weights, result[2], return_recv_hook=hooks)
            if hooks:
                answer[2]()
            counts = result[1].tolist()
            for expert in range(LOCAL):
                chosen = (all_ids == rank * LOCAL + expert).nonzero()
                wanted = values[chosen[:, 0], chosen[:, 1]].cuda()[:, None]
                assert counts[expert] == len(chosen), iteration
                wrong = result[0][expert, : len(chosen)] != wanted
                assert not wrong.any(), (iteration, expert)
            copies = (ids >= 0).sum(1, keepdim=True)
            assert torch.equal(answer[0], x * copies), iteration


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_random_sizes_and_delays(gpu_pool_of: GpuPoolOf, num_ranks: int, exact: bool) -> None:
    gpu_pool_of(num_ranks).run(check_stress, 200, exact)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_thousands_of_operations(gpu_pool_of: GpuPoolOf, num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_stress, 10_000, False)


def check_two_threads(rank: int, num_ranks: int) -> None:
    """Two batches in turn, each with a thread and a stream of its own."""
    scenarios = [scenario_of(rank, num_ranks, tokens=(8, 3), hidden=512, seed=n) for n in range(2)]
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    failures: list[BaseException] = []
    device = torch.cuda.current_device()
    with make_buffer() as buffer:

        def serve(at: int) -> None:
            torch.cuda.set_device(device)
            stream = torch.cuda.Stream()
            try:
                with torch.cuda.stream(stream):
                    for _ in range(30):
                        assert turns[at].acquire(timeout=60)
                        result = scenarios[at].dispatch(buffer, return_recv_hook=True)
                        turns[1 - at].release()
                        result[4]()
                        scenarios[at].check_dispatch(result)
                        assert turns[at].acquire(timeout=60)
                        answer = scenarios[at].combine(buffer, result, return_recv_hook=True)
                        turns[1 - at].release()
                        answer[2]()
                        scenarios[at].check_combine(answer, by_rank=True)
            except BaseException as error:
                failures.append(error)
                turns[1 - at].release()

        threads = [threading.Thread(target=serve, args=(at,)) for at in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_two_threads_with_streams_of_their_own(gpu_pool_of: GpuPoolOf, num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_two_threads)


def check_absent(rank: int, num_ranks: int) -> None:
    scenario = scenario_of(rank, num_ranks, tokens=(5,), hidden=256)
    with make_buffer(timeout=1.0) as buffer:
        warm_up(buffer, scenario)
        scenario.check_dispatch(scenario.dispatch(buffer))
        meet()
        if rank != num_ranks - 1:
            scenario.dispatch(buffer)
            torch.cuda.synchronize()
            with pytest.raises(PeerTimeoutError, match=r"low_latency_dispatch") as caught:
                scenario.dispatch(buffer)
            assert caught.value.ranks == (num_ranks - 1,)
            with pytest.raises(BufferStateError):
                scenario.dispatch(buffer)
        meet()
    check_shapes(rank, num_ranks, SMALL[:2], {})


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_an_absent_rank_is_named(gpu_pool_of: GpuPoolOf, num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_absent)


def check_disagreement(rank: int, num_ranks: int) -> None:
    with make_buffer(timeout=2.0) as buffer:
        scenario = scenario_of(rank, num_ranks, tokens=(5,), hidden=256, spare=rank)
        warm_up(buffer, scenario)
        scenario.dispatch(buffer)
        torch.cuda.synchronize()
        meet()
        with pytest.raises(MismatchError, match="low_latency_dispatch"):
            scenario.dispatch(buffer)
        assert not buffer.is_available()
        meet()


def test_ranks_that_disagree_are_told(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(2).run(check_disagreement)


def check_shrink(rank: int, num_ranks: int, exact: bool) -> None:
    """The last rank stays away: the others mask it, go on, and take it back."""
    last = num_ranks - 1
    with make_buffer(timeout=1.0, enable_shrink=True, exact_combine=exact) as buffer:
        mask = torch.full((num_ranks,), 7, dtype=torch.int32, device="cuda")
        whole = [scenario_of(rank, num_ranks, tokens=(6, 4), hidden=256, seed=n) for n in range(3)]
        without = [scenario_of(rank, num_ranks, tokens=(6, 4), hidden=256, seed=n, masked=(last,)) for n in range(3)]
        warm_up(buffer, whole[0])
        check_case(buffer, whole[0], by_rank=not exact)
        buffer.low_latency_query_mask_buffer(mask)
        assert mask.tolist() == [0] * num_ranks
        meet()
        if rank == last:
            meet()
        else:
            for scenario in without:
                result = scenario.dispatch(buffer)
                scenario.check_dispatch(result)
                scenario.check_combine(scenario.combine(buffer, result), by_rank=not exact)
            buffer.low_latency_query_mask_buffer(mask)
            assert mask.tolist() == [int(peer == last) for peer in range(num_ranks)]
            meet()
            buffer.low_latency_clean_mask_buffer()
            buffer.low_latency_query_mask_buffer(mask)
            assert mask.tolist() == [0] * num_ranks
            buffer.low_latency_update_mask_buffer(last, True)
            scenario = without[1]
            scenario.check_dispatch(scenario.dispatch(buffer))
        meet()


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ranks_go_on_without_one(gpu_pool_of: GpuPoolOf, num_ranks: int, exact: bool) -> None:
    gpu_pool_of(num_ranks).run(check_shrink, exact)


def check_foreign_use(rank: int, num_ranks: int) -> None:
    scenario = scenario_of(rank, num_ranks, tokens=(6, 4), hidden=256)
    stats = torch.zeros(2, dtype=torch.int32, device="cuda")
    waits = torch.zeros(num_ranks, dtype=torch.int64, device="cuda")
    names = ("cumulative_local_expert_recv_stats", "dispatch_wait_recv_cost_stats")
    with make_buffer() as buffer:
        for _ in range(3):
            result = scenario.dispatch(buffer, **dict(zip(names, (stats, waits), strict=True)))
            scenario.check_dispatch(result)
            meet()
            buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True).zero_()
            buffer.clean_low_latency_buffer(scenario.most, 256, scenario.num_experts)
            torch.cuda.synchronize()
            meet()
        assert stats.tolist() == [3 * len(rows) for rows in scenario.rows]
        assert (waits >= 0).all()
        assert int(waits.sum()) > 0


def test_foreign_use_of_the_memory_and_statistics(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(2).run(check_foreign_use)
