"""FP8 quantisation of the low-latency dispatch, bit for bit against a reference in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import low_latency_oracle as oracle
from tokenferry.dataplane.cpu.fp8 import pack_ue8m0, quantise

HIDDENS = (128, 384, 512, 7168)


def check(x: torch.Tensor) -> None:
    """Both kinds of scales and the packed form of ``x`` equal the reference in every bit."""
    for round_scale in (False, True):
        data, scales = quantise(x, round_scale)
        codes, expected = oracle.quantised(x, round_scale)
        assert data.dtype == torch.float8_e4m3fn
        assert data.shape == x.shape
        assert scales.dtype == torch.float32
        assert scales.shape == (x.size(0), x.size(1) // 128)
        torch.testing.assert_close(scales.view(torch.int32), expected.view(torch.int32), rtol=0, atol=0)
        wrong = (data.view(torch.uint8) != codes).nonzero()
        assert not len(wrong), (round_scale, wrong[:4], x[tuple(wrong[0])], scales)
        if round_scale:
            packed = pack_ue8m0(scales)
            assert packed.dtype == torch.int32
            assert torch.equal(packed, oracle.packed_ue8m0(expected))


def normal(rows: int, hidden: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, hidden, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


@pytest.mark.parametrize("hidden", HIDDENS)
def test_random_rows(hidden: int) -> None:
    rows = 3 if hidden == 7168 else 20
    check(normal(rows, hidden, hidden))
    spread = torch.linspace(-20, 20, hidden // 128).exp2().repeat_interleave(128)
    check((normal(2, hidden, 1) * spread).to(torch.bfloat16))


@pytest.mark.parametrize("hidden", HIDDENS)
def test_no_rows(hidden: int) -> None:
    data, scales = quantise(torch.empty(0, hidden, dtype=torch.bfloat16), True)
    assert data.shape == (0, hidden)
    assert scales.shape == (0, hidden // 128)
    assert pack_ue8m0(scales).shape == (0, math.ceil(hidden / 512))


def test_zeros_have_the_scale_of_the_smallest_amax() -> None:
    x = torch.zeros(2, 256, dtype=torch.bfloat16)
    x[1] = -0.0
    check(x)
    data, scales = quantise(x, False)
    assert set(data.view(torch.uint8).flatten().tolist()) == {0, 0x80}
    assert scales.unique().tolist() == [oracle.as_float32(oracle.as_float32(1e-4) * oracle.as_float32(1 / 448))]


@pytest.mark.parametrize("amax", [1e-38, 1e-7, 9.9e-5, 1e-4, 1.01e-4, 2e-4])
def test_values_about_the_smallest_amax(amax: float) -> None:
    check((torch.linspace(-1, 1, 256) * amax).view(2, 128).to(torch.bfloat16))


@pytest.mark.parametrize("exponent", [-13, -8, -1, 0, 1, 9, 60, 118])
def test_exact_powers_of_two_keep_their_exponent(exponent: int) -> None:
    """An amax of 448 * 2^e: every kind of scale is 2^e; with one bit more the rounded one is 2^(e + 1)."""
    x = torch.zeros(3, 128, dtype=torch.bfloat16)
    x[0, 5] = 448 * 2.0**exponent
    x[1, 5] = -450 * 2.0**exponent
    x[2, 5] = 446 * 2.0**exponent
    check(x)
    assert quantise(x[:1], False)[1].item() == 2.0**exponent
    assert quantise(x, True)[1].flatten().tolist() == [2.0**exponent, 2.0 ** (exponent + 1), 2.0**exponent]


def test_largest_values_saturate_and_stay_finite() -> None:
    most = torch.finfo(torch.bfloat16).max
    x = torch.tensor([most, -most, most / 2, 1.0] * 32, dtype=torch.bfloat16).view(1, 128)
    check(x)
    for round_scale in (False, True):
        data, _ = quantise(x, round_scale)
        assert not data.float().isnan().any()
        assert data.float().abs().max() <= 448
    plain = quantise(x, False)[0].float().view(-1, 4)[0]
    assert plain.tolist() == [448.0, -448.0, 224.0, 0.0]


def test_every_amax_is_reached_by_448_and_never_exceeded() -> None:
    """All bfloat16 values of two binades as the amax of a group."""
    amax = (torch.arange(256) + 0x3F80).to(torch.int16).view(torch.bfloat16)
    x = torch.zeros(256, 128, dtype=torch.bfloat16)
    x[:, 0], x[:, 1], x[:, 2] = amax, -amax, amax / 2
    check(x)
    data, _ = quantise(x, False)
    assert set(data[:, :2].float().unique().tolist()) == {-448.0, 448.0}


def test_ties_go_to_even_in_normal_and_denormal_range() -> None:
    """With an amax of 448 the factor is 1: the data is the number itself, rounded."""
    values = [448.0, 17.0, 19.0, 1.0625, 1.1875, 2**-9, 2**-10, 3 * 2**-10, 5 * 2**-10, 2**-6 - 2**-10, -(2**-10)]
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, : len(values)] = torch.tensor(values, dtype=torch.bfloat16)
    check(x)
    data = quantise(x, False)[0].float()[0, : len(values)].tolist()
    assert data == [448.0, 16.0, 20.0, 1.0, 1.25, 2**-9, 0.0, 2**-8, 2**-8, 2**-6, 0.0]


@pytest.mark.parametrize("hidden", [128, 384, 512, 640, 1024])
def test_ue8m0_bytes_are_the_groups_in_order(hidden: int) -> None:
    """Group g has an amax of 448 * 2^(g - 3): its exponent byte is 124 + g."""
    groups = hidden // 128
    x = torch.zeros(2, hidden, dtype=torch.bfloat16)
    x[:, ::128] = 448 * torch.arange(-3, groups - 3).exp2()
    packed = pack_ue8m0(quantise(x, True)[1])
    columns = math.ceil(groups / 4)
    assert packed.shape == (2, columns)
    for row in packed.tolist():
        found = [row[group // 4] >> 8 * (group % 4) & 0xFF for group in range(4 * columns)]
        assert found == [124 + group if group < groups else 0 for group in range(4 * columns)]


def test_data_times_scale_is_near_the_input() -> None:
    x = normal(8, 512)
    for round_scale in (False, True):
        data, scales = quantise(x, round_scale)
        back = oracle.dequantised(data.view(torch.uint8), scales)
        assert ((back - x.float()).abs() <= x.float().abs() / 16 + scales.repeat_interleave(128, 1) * 2**-9).all()


def test_reference_codes_agree_with_torch() -> None:
    values = oracle.e4m3_values()
    table = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(table.nan_to_num(-1.0), torch.tensor(values).nan_to_num(-1.0))
    assert [oracle.e4m3_code(v) for v in values if not math.isnan(v)] == [
        code for code in range(256) if code & 0x7F != 0x7F
    ]


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.lists(st.integers(0, 0xFFFF).filter(lambda bits: bits & 0x7F80 != 0x7F80), min_size=1, max_size=128))
def test_any_finite_bits(words: list[int]) -> None:
    signed = [word - 0x10000 if word >= 0x8000 else word for word in words + [0] * (128 - len(words))]
    check(torch.tensor([signed], dtype=torch.int16).view(torch.bfloat16))
