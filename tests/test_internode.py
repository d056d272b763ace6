"""Dispatch and combine between nodes against the oracle: nodes are groups of ranks of this machine."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.cases import BIASES, COMBINE_DTYPES, Case
from tests.conftest import PoolOf, but_slow, slow
from tests.internode_cases import CONTIGUOUS, LAYOUTS, NODE_ROUTINGS, check_nodes, check_rail_bytes

E4M3 = torch.float8_e4m3fn


def run(
    pool_of: PoolOf, layout: str, case: Case, chunk: int = 0, num_nvl_bytes: int = 0, exact: bool = False
) -> None:
    pool_of(len(LAYOUTS[layout])).run(check_nodes, layout, case, chunk, num_nvl_bytes, exact)


@pytest.mark.parametrize("layout", but_slow(LAYOUTS, "2x1", "3x1", "2x2", "3x2", "2x4", "3x4", "2x8"))
def test_layouts(pool_of: PoolOf, layout: str) -> None:
    run(pool_of, layout, Case(tokens=(9, 30, 0, 17), num_topk=4, bias="two", spare_rows=3))


@pytest.mark.parametrize(
    ("layout", "routing"),
    [
        *(("2x2", routing) for routing in ("duplicates", "nothing", "others", "silent_node")),
        ("3x2 mixed", "sparse"),
        ("3x1", "grouped"),
        ("3x1", "last_node"),
        *slow(*(("2x2", routing) for routing in ("sparse", "one_rank", "own", "all"))),
        *slow(*itertools.product(CONTIGUOUS, NODE_ROUTINGS)),
        *slow(*(("3x2 mixed", routing) for routing in ("duplicates", "nothing", "others", "one_rank", "own", "all"))),
    ],
)
def test_routings(pool_of: PoolOf, layout: str, routing: str) -> None:
    run(pool_of, layout, Case(tokens=(20, 3, 11), routing=routing, num_topk=5, bias="one"), chunk=4)


@pytest.mark.parametrize(
    ("layout", "chunk"),
    [
        ("2x1", 1000),
        ("2x2 alternating", 2),
        ("3x2", 6),
        *slow(*(("2x1", chunk) for chunk in (2, 6)), *(("2x2 alternating", chunk) for chunk in (6, 1000))),
        *slow(("3x2", 2), ("3x2", 1000)),
    ],
)
def test_chunks(pool_of: PoolOf, layout: str, chunk: int) -> None:
    run(pool_of, layout, Case(tokens=(31, 0, 8, 1), num_topk=3), chunk)


@pytest.mark.parametrize("dtype", [torch.uint8, *slow(torch.float16, torch.float64)], ids=str)
def test_row_dtypes(pool_of: PoolOf, dtype: torch.dtype) -> None:
    run(pool_of, "2x2", Case(tokens=(9, 30), dtype=dtype), chunk=8)


@pytest.mark.parametrize("scales", [torch.float32, *slow(torch.int32)], ids=str)
def test_scales(pool_of: PoolOf, scales: torch.dtype) -> None:
    case = Case(tokens=(12, 5, 0, 3), dtype=E4M3, scales=scales, scale_columns=3, scale_layout="columns", alignment=8)
    run(pool_of, "2x2", case, chunk=4)


@pytest.mark.parametrize(
    ("exact", "combine_dtype"),
    but_slow(
        itertools.product((False, True), COMBINE_DTYPES),
        *((True, dtype) for dtype in COMBINE_DTYPES if dtype != torch.bfloat16),
        (False, torch.float16),
        (False, torch.float32),
    ),
    ids=str,
)
def test_combine_dtypes(pool_of: PoolOf, combine_dtype: torch.dtype, exact: bool) -> None:
    case = Case(tokens=(15, 0, 31), combine_dtype=combine_dtype, bias="two", num_topk=6, local_experts=4)
    run(pool_of, "2x2", case, chunk=10, exact=exact)


@pytest.mark.parametrize("bias", but_slow(BIASES, "none", "one", "second"))
def test_biases_of_tokens_sent_nowhere(pool_of: PoolOf, bias: str) -> None:
    run(pool_of, "2x2", Case(tokens=(5, 18, 1, 9), routing="sparse", bias=bias))


@pytest.mark.parametrize("tokens", [(0,), (0, 0, 12, 5), *slow(((1, 0, 0, 0),))], ids=str)
def test_silent_nodes(pool_of: PoolOf, tokens: tuple[int, ...]) -> None:
    run(pool_of, "2x2", Case(tokens=tokens, num_topk=2), chunk=2)


def test_small_stages(pool_of: PoolOf) -> None:
    case = Case(tokens=(301, 77, 150), row_bytes=2064, combine_bytes=1040, bias="one", num_topk=4)
    run(pool_of, "2x2", case, chunk=100, num_nvl_bytes=4096)


@pytest.mark.parametrize("layout", ["3x2", *slow("2x1", "2x2")])
def test_a_row_crosses_once_for_each_node(pool_of: PoolOf, layout: str) -> None:
    """Bytes are counted where the rail sends them; what is not rows is less than 3 %."""
    case = Case(tokens=(60, 40), row_bytes=14336, num_topk=8, local_experts=4)
    for sent, rows in pool_of(len(LAYOUTS[layout])).run(check_rail_bytes, layout, case):
        assert rows <= sent < 1.03 * rows + 4096
