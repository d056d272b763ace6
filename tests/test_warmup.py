"""What a warm-up makes ready is all that the operations need then."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case, Scenario
from tests.conftest import PoolOf, slow
from tests.host_path import EXPERTS, HIDDEN, MOST, TOPK, rank_on_a_gpu
from tests.internode_cases import LAYOUTS, NodeScenario
from tokenferry import Buffer
from tokenferry.dataplane.cuda import low_latency_programs, programs
from tokenferry.dataplane.cuda.launch import Kernel, compile_together

CASE = Case(
    tokens=(9, 0, 30),
    dtype=torch.float8_e4m3fn,
    row_bytes=512,
    combine_bytes=1024,
    scales=torch.float32,
    num_topk=3,
    local_experts=64,
)


def _width(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.size(1)


def _bytes(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.size(1) * tensor.element_size()


def _of_dispatch(plan: Any) -> tuple[Any, ...]:
    widths = _bytes(plan.rows), _bytes(plan.scales), _width(plan.topk_idx)
    return plan.handle is not None, plan.part is not None, *widths


def _of_columns(columns: Any) -> tuple[Any, ...]:
    return tuple((column.dtype, column.size(1)) for column in columns)


def _operations(rank: int, num_ranks: int, layout: str) -> tuple[int, int]:
    """How many different dispatches and combines there were, all of them made ready before."""
    node = LAYOUTS[layout][rank] if layout else 0
    with Buffer(dist.group.WORLD, node=node, timeout=20.0) as buffer:
        runtime = buffer.runtime
        assert runtime is not None
        plane: Any = runtime.party().plane
        ready: tuple[set[Any], set[Any]] = set(), set()
        used: tuple[set[Any], set[Any]] = set(), set()
        originals = plane.dispatch, plane.pull_reduce

        def warm(plans: Any, reduces: Any, num_experts: int) -> None:
            ready[0].update(map(_of_dispatch, plans))
            ready[1].update(map(_of_columns, reduces))

        def dispatch(signature: Any, plan: Any) -> Any:
            used[0].add(_of_dispatch(plan))
            return originals[0](signature, plan)

        def pull_reduce(signature: Any, plan: Any, outs: Any) -> None:
            used[1].add(_of_columns(plan.columns))
            originals[1](signature, plan, outs)

        plane.warm, plane.dispatch, plane.pull_reduce = warm, dispatch, pull_reduce
        scenario: Scenario = NodeScenario(CASE, rank, layout) if layout else Scenario(CASE, rank, num_ranks)
        buffer.warmup(
            512, CASE.num_topk, scenario.num_experts, CASE.dtype, _width(scenario.x[1]) * 4, CASE.combine_dtype
        )
        result = scenario.dispatch(buffer)
        scenario.check_dispatch(result)
        scenario.check_rows(buffer.dispatch(scenario.x, handle=result[4])[0])
        for weights in (True, False):
            scenario.combine(buffer, result[4], weights=weights)
    assert used[0] <= ready[0]
    assert used[1] <= ready[1]
    return len(used[0]), len(used[1])


@pytest.mark.parametrize("layout", ["", "2x2", *slow("3x1")])
def test_what_is_used_was_made_ready(pool_of: PoolOf, layout: str) -> None:
    ranks = len(LAYOUTS[layout]) if layout else 2
    # Between nodes ranks of a node tell each other what they know in dispatches of their own.
    assert set(pool_of(ranks).run(_operations, layout)) == {(4 if layout == "2x2" else 2, 2)}


def test_kernels_made_ready_are_those_that_are_launched() -> None:
    """On a GPU, which is played: nothing is compiled, or found in a cache of files, later."""
    kernels = programs._layout, programs._notify, programs._dispatch, programs._combine
    with rank_on_a_gpu() as rank:
        for kernel in kernels:
            kernel.cache_clear()
        plane: Any = rank.buffer.runtime.party().plane  # type: ignore[union-attr]
        plane._calls.clear()
        plane._kinds.clear()
        rank.buffer._meetings = Mock()
        rank.buffer.warmup(HIDDEN, TOPK, EXPERTS)
        ready = [kernel.cache_info().misses for kernel in kernels]
        assert min(ready) > 0
        rank.buffer.get_dispatch_layout(rank.ids, EXPERTS)
        handle = rank.dispatch()[4]
        rank.buffer.dispatch(rank.x, handle)
        rank.buffer.combine(rank.y, handle)
        rank.buffer.combine(rank.y, handle, rank.recv_weights)
        assert [kernel.cache_info().misses for kernel in kernels] == ready
        assert all(kernel.cache_info().hits > 0 for kernel in kernels)


@pytest.mark.parametrize(("num_jobs", "num_ranks"), [(9, 4), (3, 8), (0, 2), (5, 1)])
def test_ranks_begin_elsewhere_and_do_everything(num_jobs: int, num_ranks: int) -> None:
    firsts = []
    for rank in range(num_ranks):
        done: list[int] = []
        compile_together([partial(done.append, job) for job in range(num_jobs)], rank, num_ranks)
        assert sorted(done) == list(range(num_jobs))
        firsts += done[:1]
    assert len(set(firsts)) == min(num_jobs, num_ranks)


def test_low_latency_kernels_made_ready_are_those_that_are_launched() -> None:
    with rank_on_a_gpu() as rank:
        low_latency_programs.dispatch.cache_clear()
        low_latency_programs.combine.cache_clear()
        rank.buffer._meetings = Mock()
        before = Kernel.variants
        rank.buffer.low_latency_warmup(MOST, HIDDEN, TOPK, EXPERTS)
        ready = Kernel.variants
        assert ready == before + 6  # each receives at once, or in a kernel of its own
        rank.low_latency_dispatch()
        rank.low_latency_combine()
        rank.low_latency_dispatch_with_hook()
        rank.low_latency_combine_with_hook()
        assert Kernel.variants == ready
