"""ElasticBuffer on GPUs, bit for bit against the oracle, by both kinds of kernels, and inside CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case, filled_memory
from tests.elastic_cases import Elastic, elastic_buffer
from tokenferry import ArgumentError
from tokenferry.cli.ranks import RankPool

GpuPoolOf = Callable[[int], RankPool]

SMALL = Case(tokens=(0, 60, 1, 37), row_bytes=1040, num_topk=3, local_experts=4, combine_bytes=1040, alignment=16)
WIDE = Case(tokens=(101, 57), row_bytes=14336, num_topk=8, local_experts=16, combine_bytes=14336, bias="two")
SCALED = Case(
    tokens=(70, 64), dtype=torch.float8_e4m3fn, row_bytes=7168, scales=torch.float32, scale_columns=56,
    scale_layout="columns", num_topk=6, local_experts=8, combine_bytes=2048, alignment=128,
)  # fmt: skip
FAMILIES = {
    "small": [SMALL, *(replace(SMALL, tokens=(34, 7), routing=r) for r in ("nothing", "others", "sparse", "own"))],
    "wide": [WIDE, replace(WIDE, tokens=(0, 90), routing="one_rank")],
    "scaled": [SCALED],
}


def check_cases(rank: int, num_ranks: int, cases: list[Case], bulk: bool, multiple: bool, **options: Any) -> None:
    """Every call on each case, on one buffer."""
    with elastic_buffer(dist.group.WORLD, device="cuda", allow_multiple_reduction=multiple, **options) as buffer:
        plane = buffer.runtime.party().plane
        plane._target = plane._target._replace(can_bulk=plane._target.can_bulk and bulk)
        for case in cases:
            for expand, cpu_sync in ((True, True), (True, False), (False, True), (False, False)):
                elastic = Elastic(case, rank, num_ranks, expand=expand, cpu_sync=cpu_sync, device="cuda")
                with filled_memory():
                    elastic.check_all(buffer)
        buffer.barrier(with_cpu_sync=True)


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_call(gpu_pool_of: GpuPoolOf, num_ranks: int, name: str) -> None:
    gpu_pool_of(num_ranks).run(check_cases, FAMILIES[name], True, True)


@pytest.mark.parametrize("name", ["small", "scaled"])
def test_plain_kernels_and_one_rounding(gpu_pool_of: GpuPoolOf, name: str) -> None:
    gpu_pool_of(2).run(check_cases, FAMILIES[name], False, False)


def replay(rank: int, num_ranks: int, expand: bool) -> None:
    """A captured dispatch without CPU sync and its combine, replayed with new rows."""
    with elastic_buffer(dist.group.WORLD, device="cuda") as buffer:
        case = Case(tokens=(40, 33), row_bytes=1024, num_topk=4, local_experts=4, combine_bytes=1024)
        elastic = Elastic(case, rank, num_ranks, expand=expand, cpu_sync=False, device="cuda")
        x = elastic.given.x.clone()

        def step() -> Any:
            received = buffer.dispatch(
                x, topk_idx=elastic.given.topk_idx, topk_weights=elastic.given.topk_weights,
                num_experts=elastic.num_experts, num_max_tokens_per_rank=elastic.most, do_expand=expand,
                do_cpu_sync=False,
            )  # fmt: skip
            return received, buffer.combine(received[0], received[3], received[2])

        step()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            received, combined = step()
            with pytest.raises(ArgumentError, match="do_cpu_sync: got True while a CUDA graph is captured"):
                elastic.dispatch(buffer, do_cpu_sync=True)
        for _ in range(3):
            received[0].zero_()
            graph.replay()
            elastic.check_rows(received[0])
            elastic.check_weights(received[2], received[1])
            same_weights = elastic.given.topk_weights.masked_fill(elastic.given.topk_idx < 0, 0.0)
            assert torch.equal(combined[1], same_weights)
            elastic.check_all(buffer)


@pytest.mark.parametrize("expand", [False, True])
def test_graphs(gpu_pool_of: GpuPoolOf, expand: bool) -> None:
    gpu_pool_of(2).run(replay, expand)
