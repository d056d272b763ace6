"""Config, presets and size hints, by the formulas."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenferry import ArgumentError, Buffer, Config

FIELDS = (
    "num_sms",
    "num_max_nvl_chunked_send_tokens",
    "num_max_nvl_chunked_recv_tokens",
    "num_max_rdma_chunked_send_tokens",
    "num_max_rdma_chunked_recv_tokens",
)
DISPATCH = {
    2: (24, 256, 6, 128),
    4: (6, 256, 6, 128),
    8: (6, 256, 6, 128),
    16: (36, 288, 20, 128),
    24: (32, 288, 8, 128),
    32: (32, 288, 8, 128),
    48: (32, 288, 8, 128),
    64: (32, 288, 8, 128),
    96: (20, 480, 12, 128),
    128: (20, 560, 12, 128),
    144: (32, 720, 12, 128),
    160: (28, 720, 12, 128),
}
COMBINE = {
    2: (10, 256, 6, 128),
    4: (9, 256, 6, 128),
    8: (4, 256, 6, 128),
    16: (4, 288, 12, 128),
    24: (1, 288, 8, 128),
    32: (1, 288, 8, 128),
    48: (1, 288, 8, 128),
    64: (1, 288, 8, 128),
    96: (1, 480, 8, 128),
    128: (1, 560, 8, 128),
    144: (2, 720, 8, 128),
    160: (2, 720, 8, 128),
}


@pytest.fixture
def default_num_sms() -> Iterator[int]:
    before = Buffer.num_sms
    yield before
    Buffer.set_num_sms(before)


def fields_of(config: Config) -> tuple[int, ...]:
    return tuple(getattr(config, name) for name in FIELDS)


def test_defaults_and_names() -> None:
    assert fields_of(Config()) == (20, 6, 256, 6, 258)
    assert tuple(inspect.signature(Config).parameters) == FIELDS


def test_positional_and_keyword_agree() -> None:
    values = (24, 8, 300, 16, 64)
    assert fields_of(Config(*values)) == values
    assert fields_of(Config(**dict(zip(FIELDS, values, strict=True)))) == values
    assert Config(24, 8, 256) == Config(num_sms=24, num_max_nvl_chunked_send_tokens=8)


@pytest.mark.parametrize(
    ("passed", "kept"), [((20, 128), 140), ((12, 128), 132), ((6, 128), 132), ((8, 128), 128), ((1, 2), 2)]
)
def test_rdma_ring_is_rounded_up_to_its_chunk(passed: tuple[int, int], kept: int) -> None:
    config = Config(20, 6, 256, *passed)
    assert config.num_max_rdma_chunked_recv_tokens == kept


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"num_sms": -1}, "num_sms"),
        ({"num_sms": 2.0}, "num_sms"),
        ({"num_sms": True}, "num_sms"),
        ({"num_sms": None}, "num_sms"),
        *[({name: value}, name) for name in FIELDS[1:] for value in (0, -3, 6.5, "6", True)],
        ({"num_max_nvl_chunked_send_tokens": 256}, "num_max_nvl_chunked_send_tokens"),
        ({"num_max_nvl_chunked_send_tokens": 300}, "num_max_nvl_chunked_send_tokens"),
        ({"num_max_nvl_chunked_recv_tokens": 6}, "num_max_nvl_chunked"),
        ({"num_max_rdma_chunked_send_tokens": 129}, "num_max_rdma_chunked_send_tokens"),
        ({"num_max_rdma_chunked_send_tokens": 1, "num_max_rdma_chunked_recv_tokens": 1}, "num_max_rdma_chunked"),
        ({"num_max_rdma_chunked_send_tokens": 5, "num_max_rdma_chunked_recv_tokens": 9}, "num_max_rdma_chunked"),
    ],
    ids=str,
)
def test_bad_values_raise_and_are_named(values: dict[str, Any], name: str) -> None:
    with pytest.raises(ArgumentError, match=name):
        Config(**values)


def test_limits_are_allowed() -> None:
    Config(0, 1, 2, 1, 2)
    Config(21, 255, 256, 128, 256)


def test_presets_for_any_number_of_ranks() -> None:
    for num_ranks in range(1, 201):
        by_distance = {abs(ranks - num_ranks): ranks for ranks in sorted(DISPATCH, reverse=True)}
        nearest = by_distance[min(by_distance)]
        assert Buffer.get_dispatch_config(num_ranks) == Config(Buffer.num_sms, *DISPATCH[nearest])
        assert Buffer.get_combine_config(num_ranks) == Config(Buffer.num_sms, *COMBINE[nearest])


@pytest.mark.parametrize("num_ranks", [0, -1, 2.0, "8", None, True])
def test_presets_want_a_number_of_ranks(num_ranks: Any) -> None:
    with pytest.raises(ArgumentError, match="num_ranks"):
        Buffer.get_dispatch_config(num_ranks)
    with pytest.raises(ArgumentError, match="num_ranks"):
        Buffer.get_combine_config(num_ranks)


def test_set_num_sms(default_num_sms: int) -> None:
    assert default_num_sms == 20
    Buffer.set_num_sms(24)
    assert Buffer.num_sms == 24
    assert Buffer.get_dispatch_config(8).num_sms == 24
    assert Buffer.get_combine_config(3).num_sms == 24


@pytest.mark.parametrize("num_sms", [21, -2, 20.0, None])
def test_set_num_sms_wants_an_even_number(default_num_sms: int, num_sms: Any) -> None:
    with pytest.raises(AssertionError, match="num_sms"):
        Buffer.set_num_sms(num_sms)
    assert Buffer.num_sms == default_num_sms


def up128(value: int) -> int:
    return (value + 127) // 128 * 128


def nvl_hint(config: Config, hidden_bytes: int, num_ranks: int) -> int:
    channels, nodes, local = config.num_sms // 2, max(1, num_ranks // 8), min(num_ranks, 8)
    row = hidden_bytes + 8 + 128 * 8 + 128 * 4 + 128 * 4
    return up128(
        channels * local * (2 * nodes + 3) * 4 + channels * local * config.num_max_nvl_chunked_recv_tokens * row
    )


def rdma_hint(config: Config, hidden_bytes: int, num_ranks: int) -> int:
    if num_ranks <= 8:
        return 0
    channels, nodes = config.num_sms // 2, num_ranks // 8
    row = hidden_bytes + 8 + 128 * 8 + 128 * 4 + 128 * 4 + 16
    ring = config.num_max_rdma_chunked_recv_tokens
    return up128(channels * nodes * (8 * 2 + 2) * 2 * 4 + 2 * channels * nodes * ring * row)


@pytest.mark.parametrize(
    ("num_ranks", "hint"),
    [(2, 83_927_552), (4, 167_854_976), (8, 335_709_824), (16, 377_673_984), (32, 377_675_264), (64, 377_677_824)],
)
def test_nvl_hint_worked_values(num_ranks: int, hint: int) -> None:
    for config in (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
        assert config.get_nvl_buffer_size_hint(14336, num_ranks) == hint


@pytest.mark.parametrize(
    ("config", "num_ranks", "hint"),
    [
        (Config(20, 36, 288, 20, 128), 16, 91_887_744),
        (Config(20, 4, 288, 12, 128), 16, 86_637_184),
        (Config(20, 32, 288, 32, 128), 32, 168_023_680),
        (Config(20, 1, 288, 8, 128), 32, 168_023_680),
        (Config(20, 20, 288, 28, 128), 64, 367_550_720),
        (Config(20, 1, 288, 20, 128), 64, 367_550_720),
    ],
)
def test_rdma_hint_worked_values(config: Config, num_ranks: int, hint: int) -> None:
    assert config.get_rdma_buffer_size_hint(14336, num_ranks) == hint


@pytest.mark.parametrize("num_ranks", sorted(DISPATCH))
@pytest.mark.parametrize("hidden_bytes", [0, 16, 4096, 14336, 32768])
def test_hints_of_presets_by_the_formulas(num_ranks: int, hidden_bytes: int) -> None:
    for config in (Buffer.get_dispatch_config(num_ranks), Buffer.get_combine_config(num_ranks)):
        assert config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) == nvl_hint(config, hidden_bytes, num_ranks)
        assert config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) == rdma_hint(config, hidden_bytes, num_ranks)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    sms=st.integers(1, 40),
    send=st.integers(1, 40),
    extra=st.integers(1, 600),
    rdma_send=st.integers(1, 40),
    hidden_bytes=st.integers(0, 70_000),
    num_ranks=st.integers(1, 200),
    more=st.integers(0, 100),
)
def test_hints_are_aligned_and_monotone(
    sms: int, send: int, extra: int, rdma_send: int, hidden_bytes: int, num_ranks: int, more: int
) -> None:
    config = Config(2 * sms, send, send + extra, rdma_send, 2 * rdma_send + extra)
    for hint in (config.get_nvl_buffer_size_hint, config.get_rdma_buffer_size_hint):
        value = hint(hidden_bytes, num_ranks)
        assert value % 128 == 0
        assert value <= hint(hidden_bytes + more, num_ranks) <= hint(hidden_bytes + more, num_ranks + more)
    assert config.get_nvl_buffer_size_hint(hidden_bytes, num_ranks) > 0
    assert (config.get_rdma_buffer_size_hint(hidden_bytes, num_ranks) == 0) == (num_ranks <= 8)


def test_hints_want_even_sms_across_nodes() -> None:
    config = Config(21)
    assert config.get_nvl_buffer_size_hint(1024, 8) > 0
    with pytest.raises(RuntimeError, match="num_sms"):
        config.get_nvl_buffer_size_hint(1024, 16)
    with pytest.raises(RuntimeError, match="num_sms"):
        config.get_rdma_buffer_size_hint(1024, 16)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ((128, 7168, 8, 288), 2_146_961_792),
        ((128, 7168, 8, 256), 1_908_410_496),
        ((16, 5120, 8, 256), 170_395_776),
        ((128, 4096, 2, 8), 34_079_104),
    ],
)
def test_low_latency_hint_worked_values(arguments: tuple[int, int, int, int], hint: int) -> None:
    assert Buffer.get_low_latency_rdma_size_hint(*arguments) == hint
    names = ("num_max_dispatch_tokens_per_rank", "hidden", "num_ranks", "num_experts")
    assert Buffer.get_low_latency_rdma_size_hint(**dict(zip(names, arguments, strict=True))) == hint


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    tokens=st.integers(1, 1024),
    blocks=st.integers(1, 64),
    num_ranks=st.integers(1, 64),
    experts=st.integers(1, 512),
    more=st.integers(0, 64),
)
def test_low_latency_hint_by_the_formula(tokens: int, blocks: int, num_ranks: int, experts: int, more: int) -> None:
    hint, hidden = Buffer.get_low_latency_rdma_size_hint, 128 * blocks
    value = hint(tokens, hidden, num_ranks, experts)
    dispatch_message = 16 + max(2 * hidden, hidden + 4 * blocks)
    combine_message = 2 * hidden + 4 * blocks
    send = max(tokens * dispatch_message, experts * tokens * combine_message)
    receive = max(experts * tokens * dispatch_message, experts * tokens * combine_message)
    assert value == (2 * (up128(4 * experts) + send + receive) + 128) // 128 * 128
    assert value <= hint(tokens + more, hidden + 128 * more, num_ranks + more, experts + more)
