"""The low-latency pair between nodes of one, two and four ranks: see :mod:`tests.gpu.test_internode`."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case as NormalCase
from tests.conftest import NodesOf
from tests.internode_cases import NodeScenario as NormalScenario
from tests.internode_cases import small_chunks
from tests.internode_low_latency_cases import NodeScenario, check_nodes, make_buffer
from tests.low_latency_cases import FORMATS, Case, check_case
from tokenferry import Buffer, BufferStateError, PeerError

CASES = {name: Case(tokens=(7, 0, 12, 5), spare=1, hidden=1152, num_topk=3, format=name, seed=3) for name in FORMATS}
PUSH_BYTES = 32 << 20


def buffer_of(rank: int, layout: str, **options: Any) -> Buffer:
    return make_buffer(rank, layout, device="cuda", num_rdma_bytes=PUSH_BYTES, **options)


@pytest.mark.parametrize(
    ("layout", "formats"),
    [
        ("2x1", ["bf16", "ue8m0"]),
        ("3x1", ["bf16", "rounded"]),
        ("2x2", ["rounded", "bf16"]),
        ("3x2", ["ue8m0", "bf16"]),
        ("2x4", ["plain"]),
        ("3x4", ["plain"]),
    ],
)
def test_formats(direct: NodesOf, layout: str, formats: list[str]) -> None:
    cases = [CASES[name] for name in formats]
    direct(layout).run(check_nodes, layout, cases, False, "cuda")


@pytest.mark.parametrize("layout", ["2x2", "3x2"])
def test_wide_rows(direct: NodesOf, layout: str) -> None:
    direct(layout).run(check_nodes, layout, [Case(tokens=(40, 9), hidden=7168, num_topk=8, seed=2)], False, "cuda")


def _hooks(rank: int, num_ranks: int, layout: str) -> None:
    """Many in flight, received in an order of each rank's own, some on another stream."""
    order, side = list(range(6)), torch.cuda.Stream()
    random.Random(rank).shuffle(order)
    with buffer_of(rank, layout) as buffer:
        scenarios = [
            NodeScenario(Case(tokens=(4, 9), hidden=256, seed=n), rank, layout, device="cuda") for n in order
        ]
        scenarios = [scenarios[order.index(n)] for n in range(6)]
        results = [scenario.dispatch(buffer, return_recv_hook=True) for scenario in scenarios]
        for at in order:
            results[at][4]()
            scenarios[at].check_dispatch(results[at])
        answers = [s.combine(buffer, r, return_recv_hook=True) for s, r in zip(scenarios, results, strict=True)]
        side.wait_stream(torch.cuda.current_stream())
        for at in order:
            with torch.cuda.stream(side if at % 2 else torch.cuda.current_stream()):
                answers[at][2]()
                scenarios[at].check_combine(answers[at])


@pytest.mark.parametrize("layout", ["2x2", "3x2"])
def test_hooks_in_any_order(direct: NodesOf, layout: str) -> None:
    direct(layout).run(_hooks, layout)


def _graphs(rank: int, num_ranks: int, layout: str, hooks: bool) -> None:
    """A graph of two pairs, replayed with new values, between eager calls and normal dispatches."""
    shape = {"tokens": (16,), "hidden": 1024, "num_topk": 4, "local_experts": 4, "routing": "distinct"}
    scenarios = [NodeScenario(Case(**shape, seed=seed), rank, layout, device="cuda") for seed in range(4)]
    first = scenarios[0]
    x, ids, weights = first.x.cuda(), first.ids.cuda(), first.weights.cuda()
    with buffer_of(rank, layout) as buffer:

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
        torch.cuda.synchronize()
        for turn, scenario in enumerate(scenarios * 2):
            for static, value in ((x, scenario.x), (ids, scenario.ids), (weights, scenario.weights)):
                static.copy_(value)
            if turn % num_ranks == rank:
                torch.cuda._sleep(10_000_000)
            for _ in range(1 + turn % 3):
                graph.replay()
            for result, answer in captured:
                scenario.check_dispatch(result)
                # The experts return the rows as they came.
                total = answer[0].float().cpu()
                factors = (scenario.weights * (scenario.ids >= 0)).sum(1, keepdim=True)
                wanted = scenario.x.float() * factors
                assert (total - wanted).abs().max() <= wanted.abs().max() * 0.02
            if turn % 3 == 0:
                check_case(buffer, scenario)
            if turn % 3 == 1:
                normal = NormalScenario(NormalCase(tokens=(5, 9), seed=turn), rank, layout, device="cuda")
                normal.check_all(buffer, config=small_chunks(8))


@pytest.mark.parametrize(
    ("layout", "hooks"), [("2x1", False), ("3x1", True), ("2x2", True), ("2x2", False), ("3x2", False)]
)
def test_replays_mixed_with_eager_calls(direct: NodesOf, layout: str, hooks: bool) -> None:
    direct(layout).run(_graphs, layout, hooks)


def _warmed(rank: int, num_ranks: int, layout: str) -> None:
    """Captured at once, but for what ranks compare at the first call."""
    case = Case(tokens=(8,), hidden=512, num_topk=3, format="plain", seed=1)
    with buffer_of(rank, layout) as buffer:
        scenario = NodeScenario(case, rank, layout, device="cuda")
        buffer.low_latency_warmup(scenario.most, 512, 3, scenario.num_experts, **FORMATS["plain"])
        x, ids = scenario.x.cuda(), scenario.ids.cuda()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = buffer.low_latency_dispatch(x, ids, scenario.most, scenario.num_experts, **FORMATS["plain"])
        graph.replay()
        scenario.check_dispatch(result)


@pytest.mark.parametrize("layout", ["2x2", "3x2"])
def test_capture_behind_a_warmup(direct: NodesOf, layout: str) -> None:
    direct(layout).run(_warmed, layout)


def _silent(rank: int, num_ranks: int, layout: str) -> tuple[str, float]:
    """A node that does not call: the stream goes on at the deadline, and the next call says why."""
    scenario = NodeScenario(Case(tokens=(5,), hidden=256), rank, layout, device="cuda")
    with buffer_of(rank, layout) as buffer:  # compiles, for which four seconds may be too short
        check_case(buffer, scenario)
    with buffer_of(rank, layout, timeout=4.0) as buffer:
        check_case(buffer, scenario)
        torch.cuda.synchronize()
        dist.barrier()
        text, seconds = "", 0.0
        if rank != 1:
            started = time.monotonic()
            scenario.dispatch(buffer)
            torch.cuda.synchronize()
            with pytest.raises(PeerError) as caught:
                scenario.dispatch(buffer)
            text, seconds = str(caught.value), time.monotonic() - started
            with pytest.raises(BufferStateError):
                scenario.dispatch(buffer)
        dist.barrier()
    with buffer_of(rank, layout) as buffer:
        check_case(buffer, scenario)
    return text, seconds


@pytest.mark.parametrize("layout", ["2x1", "3x1"])
def test_silent_node_is_named(direct: NodesOf, layout: str) -> None:
    for text, seconds in direct(layout).run(_silent, layout)[::2]:
        assert "rank 1: node 1 (ranks 1), over the rail" in text
        assert seconds < 5.0
