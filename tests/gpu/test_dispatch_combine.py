"""Every kind of call on GPUs, bit for bit against the oracle, by both kinds of kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.cases import Case, Scenario
from tokenferry import Buffer
from tokenferry.cli.ranks import RankPool

GpuPoolOf = Callable[[int], RankPool]
TIMEOUT = 20.0

# Cases of one family have the same shapes, and so the same kernels: compiling takes longer than running.
SMALL = Case(tokens=(0, 200, 1, 37), row_bytes=1040, num_topk=3, local_experts=4, combine_bytes=1040, bias="two")
WIDE = Case(tokens=(301, 257), row_bytes=14336, num_topk=8, local_experts=16, combine_bytes=14336, spare_rows=40)
SCALED = Case(
    tokens=(130, 64), dtype=torch.float8_e4m3fn, row_bytes=7168, scales=torch.float32, scale_columns=56,
    scale_layout="columns", num_topk=6, local_experts=8, combine_dtype=torch.float32, combine_bytes=2048,
)  # fmt: skip
ODD = Case(
    tokens=(50, 3), dtype=torch.float8_e4m3fn, row_bytes=48, scales=torch.int32, scale_columns=3, num_topk=32,
    local_experts=3, combine_dtype=torch.float64, combine_bytes=272, spare_rows=7, routing="duplicates",
)  # fmt: skip
FAMILIES = {
    "small": [
        SMALL,
        *(replace(SMALL, tokens=(64, 7), routing=r, spare_rows=n % 2 * 9, seed=n) for n, r in enumerate(
            ("nothing", "own", "others", "one_expert", "all", "sparse", "second_half")
        )),
        replace(SMALL, x_layout="columns"),
        replace(SMALL, x_layout="broadcast", tokens=(65,)),
    ],
    "wide": [WIDE, replace(WIDE, tokens=(0, 700), routing="one_rank"), replace(WIDE, tokens=(1,), seed=3)],
    "scaled": [SCALED, replace(SCALED, scale_layout="every_other", routing="sparse", x_layout="offset")],
    "odd": [ODD, replace(ODD, tokens=(33,), routing="random")],
}  # fmt: skip


def check_cases(
    rank: int, num_ranks: int, cases: list[Case], bulk: bool, num_nvl_bytes: int = 0, timeout: float = TIMEOUT
) -> None:
    """Every call on each case, on one Buffer."""
    with Buffer(dist.group.WORLD, num_nvl_bytes, timeout=timeout, device="cuda") as buffer:
        plane = buffer.runtime.party().plane
        plane._target = plane._target._replace(can_bulk=plane._target.can_bulk and bulk)
        for case in cases:
            try:
                Scenario(case, rank, num_ranks, "cuda").check_all(buffer)
            except Exception as error:
                error.add_note(f"in {case}")
                torch.cuda.synchronize()
                plane.check()  # an operation that failed on the GPU has left rows unset: what it says comes first
                raise


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_call(gpu_pool_of: GpuPoolOf, num_ranks: int, name: str) -> None:
    gpu_pool_of(num_ranks).run(check_cases, FAMILIES[name], True)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_odd_numbers_of_ranks(gpu_pool_of: GpuPoolOf, num_ranks: int) -> None:
    gpu_pool_of(num_ranks).run(check_cases, FAMILIES["small"], True)


@pytest.mark.parametrize("num_ranks", [2, 8])
@pytest.mark.parametrize("name", ["small", "scaled"])
def test_plain_kernels(gpu_pool_of: GpuPoolOf, num_ranks: int, name: str) -> None:
    gpu_pool_of(num_ranks).run(check_cases, FAMILIES[name], False)
