"""Dispatch and combine against the oracle, bit for bit, in every mode of :meth:`tests.cases.Scenario.check_all`."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.cases import BIASES, COMBINE_DTYPES, ROUTINGS, SCALE_LAYOUTS, X_LAYOUTS, Case, check_case
from tests.conftest import PoolOf, but_slow, slow

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def run(pool_of: PoolOf, num_ranks: int, case: Case, num_nvl_bytes: int = 0) -> None:
    pool_of(num_ranks).run(check_case, case, num_nvl_bytes)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8, *slow(4, 5)])
def test_any_number_of_ranks(pool_of: PoolOf, num_ranks: int) -> None:
    run(pool_of, num_ranks, Case(tokens=(33, 0, 7, 20), num_topk=4, local_experts=3, spare_rows=5, bias="two"))


@pytest.mark.slow
def test_sixteen_ranks(pool_of: PoolOf) -> None:
    run(pool_of, 16, Case(tokens=(5, 0, 9), num_topk=8, local_experts=2, bias="one"))


@pytest.mark.parametrize("tokens", [(0,), (1,), (0, 9, 4), (9, 0, 0), (1, 0, 0), (127, 1, 64), (600, 311, 5)])
@pytest.mark.parametrize("routing", ["sparse", *slow("random")])
def test_numbers_of_tokens(pool_of: PoolOf, tokens: tuple[int, ...], routing: str) -> None:
    run(pool_of, 3, Case(tokens=tokens, routing=routing, spare_rows=1))


@pytest.mark.parametrize("num_ranks", [4, *slow(1, 3)])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(pool_of: PoolOf, routing: str, num_ranks: int) -> None:
    run(pool_of, num_ranks, Case(tokens=(13, 6, 21), routing=routing, num_topk=5, local_experts=3, bias="one"))


@pytest.mark.parametrize("num_topk", [1, 7, 8, 32, *slow(2, 16, 31)])
def test_numbers_of_choices(pool_of: PoolOf, num_topk: int) -> None:
    run(pool_of, 3, Case(tokens=(11, 3), num_topk=num_topk, local_experts=11))


@pytest.mark.parametrize("local_experts", [1, 7, 300, *slow(3, 37, 129)])
def test_numbers_of_experts(pool_of: PoolOf, local_experts: int) -> None:
    run(pool_of, 2, Case(tokens=(40, 17), num_topk=6, local_experts=local_experts))


@pytest.mark.parametrize("row_bytes", [16, 48, 2000, 14352, *slow(32, 112, 272, 7168)])
def test_row_sizes(pool_of: PoolOf, row_bytes: int) -> None:
    run(pool_of, 2, Case(tokens=(9, 30), row_bytes=row_bytes, combine_bytes=row_bytes))


@pytest.mark.parametrize(
    "dtype",
    [
        torch.uint8,
        torch.int8,
        torch.int32,
        torch.int64,
        E4M3,
        E5M2,
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.float64,
    ],
    ids=str,
)
def test_row_dtypes(pool_of: PoolOf, dtype: torch.dtype) -> None:
    run(pool_of, 3, Case(tokens=(9, 30, 2), dtype=dtype))


@pytest.mark.parametrize("layout", X_LAYOUTS)
@pytest.mark.parametrize("tokens", [(10, 3), (1,), (0, 1)])
def test_strides_of_rows(pool_of: PoolOf, layout: str, tokens: tuple[int, ...]) -> None:
    run(pool_of, 2, Case(tokens=tokens, x_layout=layout, dtype=torch.float32))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.int32], ids=str)
@pytest.mark.parametrize("columns", [1, 56, *slow(2)])
@pytest.mark.parametrize("layout", SCALE_LAYOUTS)
@pytest.mark.parametrize("tokens", [(12, 5), *slow(((1, 0),))])
def test_scales(
    pool_of: PoolOf, scale_dtype: torch.dtype, columns: int, layout: str, tokens: tuple[int, ...]
) -> None:
    case = Case(
        tokens=tokens, dtype=E4M3, scales=scale_dtype, scale_columns=columns, scale_layout=layout, spare_rows=2
    )
    run(pool_of, 2, case)


@pytest.mark.parametrize("dtype", [E5M2, torch.uint8, torch.int8], ids=str)
def test_scales_beside_other_one_byte_data(pool_of: PoolOf, dtype: torch.dtype) -> None:
    run(
        pool_of,
        3,
        Case(tokens=(12, 5, 0), dtype=dtype, scales=torch.float32, scale_columns=3, scale_layout="columns"),
    )


@pytest.mark.parametrize("alignment", [1, 8, 128, 100])
def test_expert_alignment_rounds_the_list_only(pool_of: PoolOf, alignment: int) -> None:
    run(pool_of, 3, Case(tokens=(40, 3, 90), alignment=alignment, local_experts=5))


@pytest.mark.parametrize("spare_rows", [0, 1, 1000])
def test_fixed_number_of_rows(pool_of: PoolOf, spare_rows: int) -> None:
    case = Case(tokens=(8, 20), spare_rows=spare_rows, dtype=E4M3, scales=torch.float32, scale_columns=2, bias="two")
    run(pool_of, 2, case)


@pytest.mark.parametrize(
    ("bias", "combine_dtype"),
    but_slow(
        itertools.product(BIASES, COMBINE_DTYPES),
        *((bias, dtype) for bias in BIASES for dtype in COMBINE_DTYPES if bias != "two" and dtype != torch.bfloat16),
    ),
    ids=str,
)
def test_combine_dtypes_and_biases(pool_of: PoolOf, combine_dtype: torch.dtype, bias: str) -> None:
    case = Case(tokens=(15, 0, 31), combine_dtype=combine_dtype, bias=bias, num_topk=6, local_experts=4)
    run(pool_of, 3, case)


@pytest.mark.parametrize("routing", ["all", "nothing", *slow("one_rank", "sparse")])
@pytest.mark.parametrize("bias", BIASES)
def test_biases_of_tokens_sent_nowhere_or_everywhere(pool_of: PoolOf, routing: str, bias: str) -> None:
    run(pool_of, 4, Case(tokens=(5, 18, 1, 9), routing=routing, bias=bias, num_topk=8))


@pytest.mark.parametrize("num_nvl_bytes", [128, *slow(4096, 65536, 1 << 20)])
@pytest.mark.parametrize("routing", ["random", "all", *slow("one_rank", "second_half", "others")])
def test_small_stages(pool_of: PoolOf, num_nvl_bytes: int, routing: str) -> None:
    """Hundreds of kilobytes through stages of 64 KB and up: many rounds, odd tokens at the end."""
    case = Case(tokens=(301, 77, 150), row_bytes=2064, combine_bytes=1040, routing=routing, bias="one", num_topk=4)
    run(pool_of, 3, case, num_nvl_bytes)


@pytest.mark.parametrize(
    "tokens", [(28, 67, 0, 1), (300, 3, 0, 100), *slow(((0, 200, 1, 0),), ((0, 0, 90, 91),))], ids=str
)
@pytest.mark.parametrize("routing", [*slow("others"), "random"])
def test_small_stages_between_unequal_ranks(pool_of: PoolOf, tokens: tuple[int, ...], routing: str) -> None:
    """Ranks with few tokens, or none, are done long before the others and must stand in nobody's way."""
    case = Case(tokens=tokens, row_bytes=2064, combine_bytes=3200, routing=routing, num_topk=8, local_experts=3)
    run(pool_of, 4, case, 128)


@pytest.mark.parametrize("num_ranks", [2, *slow(5)])
def test_rows_larger_than_the_stage(pool_of: PoolOf, num_ranks: int) -> None:
    case = Case(tokens=(3, 5, 0, 2), row_bytes=400_000, combine_bytes=300_016, combine_dtype=torch.float32)
    run(pool_of, num_ranks, case, 4096)


@pytest.mark.slow
def test_more_rows_than_one_message_holds(pool_of: PoolOf) -> None:
    """About 18 MB a rank, in messages of 8 MB."""
    run(pool_of, 2, Case(tokens=(1300, 1200), row_bytes=14336, combine_bytes=14336, local_experts=4))
