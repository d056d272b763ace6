"""Dispatch and combine against the oracle on cases that hypothesis draws."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.cases import (
    BIASES,
    COMBINE_DTYPES,
    ROUTINGS,
    SCALE_LAYOUTS,
    X_LAYOUTS,
    Case,
    check_case,
    check_small_stage,
)
from tests.conftest import PoolOf

ONE_BYTE = (torch.uint8, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
WIDER = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any case: a few tokens on each rank, rows of a few to a few hundred 16-byte units."""
    scales = draw(st.sampled_from([None, torch.float32, torch.int32]))
    dtypes = ONE_BYTE if scales is not None else ONE_BYTE + WIDER
    return Case(
        tokens=tuple(draw(st.lists(st.integers(0, 40) | st.sampled_from([0, 1, 129]), min_size=1, max_size=4))),
        row_bytes=16 * draw(st.integers(1, 40) | st.integers(1, 400)),
        dtype=draw(st.sampled_from(dtypes)),
        num_topk=draw(st.integers(1, 9) | st.integers(10, 32)),
        local_experts=draw(st.integers(1, 9) | st.integers(10, 100)),
        routing=draw(st.sampled_from(ROUTINGS)),
        x_layout=draw(st.sampled_from(X_LAYOUTS)),
        scales=scales,
        scale_columns=draw(st.integers(1, 60)) if scales is not None else 1,
        scale_layout=draw(st.sampled_from(SCALE_LAYOUTS)) if scales is not None else "rows",
        alignment=draw(st.sampled_from([1, 3, 8, 128])),
        spare_rows=draw(st.integers(0, 50)),
        combine_dtype=draw(st.sampled_from(COMBINE_DTYPES)),
        combine_bytes=16 * draw(st.integers(1, 40) | st.integers(1, 400)),
        bias=draw(st.sampled_from(BIASES)),
        seed=draw(st.integers(0, 2**32)),
    )


def examples(count: int, *phases: Phase) -> settings:
    """The same examples in every run, however long they take."""
    return settings(
        phases=phases,
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )


@examples(18, Phase.generate, Phase.shrink)
@given(
    num_ranks=st.integers(2, 4),
    case=cases(),
    num_nvl_bytes=st.sampled_from([0, 128, 4096, 65536, 128 * 1000, 1 << 20]),
)
def test_any_case_equals_the_oracle(pool_of: PoolOf, num_ranks: int, case: Case, num_nvl_bytes: int) -> None:
    pool_of(num_ranks).run(check_case, case, num_nvl_bytes)


@examples(10, Phase.generate)  # what hangs takes its deadline every time: too long to shrink
@given(
    num_ranks=st.integers(2, 5),
    tokens=st.lists(st.sampled_from([0, 0, 1, 30]) | st.integers(0, 200), min_size=1, max_size=5),
    units=st.integers(20, 300),
    num_topk=st.sampled_from([1, 4, 16]),
    routing=st.sampled_from(ROUTINGS),
    num_nvl_bytes=st.sampled_from([128, 128, 1 << 17]),
    seed=st.integers(0, 2**32),
)
def test_any_case_of_many_rounds_ends(
    pool_of: PoolOf,
    num_ranks: int,
    tokens: list[int],
    units: int,
    num_topk: int,
    routing: str,
    num_nvl_bytes: int,
    seed: int,
) -> None:
    """Rows of up to 4800 bytes through the smallest stages, from ranks of very different sizes."""
    case = Case(
        tokens=tuple(tokens),
        row_bytes=16 * units,
        combine_bytes=16 * units,
        num_topk=num_topk,
        routing=routing,
        seed=seed,
    )
    pool_of(num_ranks).run(check_small_stage, case, num_nvl_bytes)
