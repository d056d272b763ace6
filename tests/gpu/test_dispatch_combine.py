"""Every kind of call on GPUs, bit for bit against the oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.cases import Case, check_case
from tokenferry.cli.ranks import RankPool

GpuPoolOf = Callable[[int], RankPool]

CASES = {
    "plain": Case(tokens=(33,), row_bytes=512, num_topk=4, local_experts=4, combine_bytes=512),
    "wide": Case(tokens=(301, 257), row_bytes=14336, num_topk=8, local_experts=16, combine_bytes=14336, spare_rows=40),
    "uneven": Case(tokens=(0, 200, 1), row_bytes=1040, num_topk=3, combine_bytes=1040, bias="two"),
    "nothing": Case(tokens=(5,), routing="nothing"),
    "own": Case(tokens=(64,), routing="own", bias="one"),
    "others": Case(tokens=(64,), routing="others", bias="second"),
    "one expert": Case(tokens=(100, 3), routing="one_expert", spare_rows=7),
    "all": Case(tokens=(65,), routing="all", num_topk=8, row_bytes=2048, combine_bytes=4096, combine_dtype=torch.float32),
    "duplicates": Case(tokens=(40,), routing="duplicates", num_topk=32, local_experts=3),
    "scales": Case(
        tokens=(130,), dtype=torch.float8_e4m3fn, row_bytes=7168, scales=torch.float32, scale_columns=56,
        scale_layout="columns", num_topk=8, local_experts=8,
    ),
    "packed scales": Case(
        tokens=(50,), dtype=torch.float8_e4m3fn, row_bytes=384, scales=torch.int32, scale_columns=3,
        scale_layout="every_other", num_topk=2,
    ),
    "strided": Case(tokens=(37,), x_layout="columns", combine_dtype=torch.float16, num_topk=5),
    "broadcast": Case(tokens=(37,), x_layout="broadcast", combine_dtype=torch.float64, combine_bytes=256),
    "offset": Case(tokens=(37,), x_layout="offset", num_topk=1, local_experts=1),
}  # fmt: skip


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_every_call(gpu_pool_of: GpuPoolOf, num_ranks: int, name: str) -> None:
    gpu_pool_of(num_ranks).run(check_case, CASES[name], 0, "cuda")
