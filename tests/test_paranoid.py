"""Paranoid mode: results are those of the oracle, what goes wrong on the way is found and named, poison is there."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cases import TIMEOUT, Case, Scenario, check_case, check_works, random_bytes
from tests.conftest import PoolOf, slow
from tests.internode_cases import NodeScenario, check_nodes, make_buffer
from tokenferry import (
    ArgumentError,
    Buffer,
    BufferStateError,
    CorruptionError,
    PeerLostError,
    TokenferryError,
)
from tokenferry.construction import choose_paranoid, note_what_is_not_proven
from tokenferry.dataplane import Part
from tokenferry.dataplane.cpu.combine import Combine, sum_rows
from tokenferry.dataplane.cpu.dispatch import Dispatch
from tokenferry.memory.heap import POISON
from tokenferry.modes.checksums import added_up, checksums, differ
from tokenferry.modes.paranoid import Paranoid

FP8 = torch.float8_e4m3fn


@contextmanager
def paranoid(value: str = "1") -> Iterator[None]:
    with mock.patch.dict(os.environ, {"TOKENFERRY_PARANOID": value}):
        yield


# Nothing goes wrong.

CASES = {
    "ordinary": Case(tokens=(7, 5, 0), spare_rows=3),
    "fp8": Case((9, 4), dtype=FP8, scales=torch.float32, scale_columns=3, scale_layout="columns", alignment=8),
    "rows of any strides": Case((40, 3), row_bytes=1040, x_layout="offset", routing="duplicates", bias="two"),
    "double": Case((6,), dtype=torch.float64, combine_dtype=torch.float64, routing="sparse", bias="second"),
    "nothing": Case((5,), routing="nothing"),
}


def _check_case(rank: int, num_ranks: int, case: Case, num_nvl_bytes: int) -> int:
    with paranoid(), mock.patch.object(Paranoid, "send", autospec=True, side_effect=Paranoid.send) as send:
        check_case(rank, num_ranks, case, num_nvl_bytes)
    return send.call_count


@pytest.mark.parametrize("num_ranks", [*slow(1, 2), 3])
@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_call_gives_what_the_oracle_says(pool_of: PoolOf, num_ranks: int, name: str) -> None:
    proofs = pool_of(num_ranks).run(_check_case, CASES[name], 0)
    assert proofs == [8] * num_ranks  # one for every dispatch and every combine


def test_a_small_stage(pool_of: PoolOf) -> None:
    pool_of(2).run(_check_case, Case((300, 200), row_bytes=2048, combine_bytes=2048), 4096)


def _check_nodes(rank: int, num_ranks: int, layout: str, exact: bool) -> None:
    case = Case((9, 4), scales=torch.float32, dtype=FP8, scale_columns=2, bias="one", spare_rows=2)
    with paranoid():
        check_nodes(rank, num_ranks, layout, case, chunk=3, exact=exact)


@pytest.mark.parametrize(("layout", "exact"), [("2x1", False), *slow(("2x1", True), ("2x2 alternating", False))])
def test_between_nodes(pool_of: PoolOf, layout: str, exact: bool) -> None:
    pool_of(2 if layout == "2x1" else 4).run(_check_nodes, layout, exact)


# Something goes wrong: a byte that rank 0 puts in its stage, or on its rail, is not what it should be.

COLUMNS = {"source index": 1, "row": 3, "scale": 4, "weight": 6}
"""Section of a message of a dispatch; before a row are three others."""
TARGET = Case((6,), dtype=FP8, scales=torch.float32, scale_columns=4, num_topk=2, routing="one_rank")
"""All tokens go to the last rank; its rows come home to both."""


@contextmanager
def flipped(
    kind: type[Dispatch] | type[Combine], section: int, width: int, byte: int, bits: int = 4
) -> Iterator[None]:
    """In the first message of this kind whose rows have so many bytes, flip bits of a byte of a section."""
    original, done = kind.publish, []

    def publish(self: Any, offset: int, nbytes: int, **fields: Any) -> None:
        plan = self._plan
        rows = (plan.rows if kind is Dispatch else plan.columns[0]).view(torch.uint8)
        if not done and rows.size(1) == width:
            done.append(True)
            if kind is Dispatch:
                sections = self._sections(len(self._counts), fields["bound"], fields["num_rows"])
            else:
                sizes = [fields["num_rows"] * of_column for of_column in self._widths]
                sections = [sum(-(-size // 128) * 128 for size in sizes[:index]) for index in range(len(sizes))]
            payload = self.heap.stage_view(self.rank, offset, nbytes)
            payload[sections[section] + byte] ^= bits
        original(self, offset, nbytes, **fields)

    with mock.patch.object(kind, "publish", publish):
        yield
    assert done


def _flip_in_dispatch(rank: int, num_ranks: int, column: str, is_paranoid: bool, how: str) -> Any:
    scenario = Scenario(TARGET, rank, num_ranks)
    with paranoid(str(int(is_paranoid))), Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        handle = scenario.dispatch(buffer)[4] if how == "cached" else None
        # token 2: the last word of it; as a source index, that of token 5, which becomes 13
        places = {"source index": (4 * 5, 8), "row": (3 * 128 - 1, 4), "scale": (3 * 16 - 1, 4), "weight": (5 * 4, 4)}
        byte, bits = places[column]
        spoil = flipped(Dispatch, COLUMNS[column], TARGET.row_bytes, byte, bits) if rank == 0 else mock.MagicMock()
        worst = 20 if how == "worst" else 0
        with spoil:
            return _told(buffer, scenario, lambda: _dispatch(buffer, scenario, handle, worst))


def _dispatch(buffer: Buffer, scenario: Scenario, handle: Any, worst: int) -> None:
    if handle is None:
        scenario.check_dispatch(scenario.dispatch(buffer, num_worst_tokens=worst), num_worst_tokens=worst)
    else:
        scenario.check_cached(buffer.dispatch(scenario.x, handle=handle))


def _told(buffer: Buffer, scenario: Scenario, call: Any) -> Any:
    return told_of(call, lambda: scenario.check_dispatch(scenario.dispatch(buffer)))


def told_of(call: Any, next_one: Any) -> Any:
    """What a call raises (a result that is not the oracle's: "wrong result"), and what the next one does."""
    told: list[Any] = []
    for step in (call, next_one):
        started = time.monotonic()
        try:
            step()
            told.append("fine")
        except AssertionError as error:
            told.append(error if isinstance(error, TokenferryError) else "wrong result")
        except TokenferryError as error:
            told.append(error)
        assert time.monotonic() - started < TIMEOUT / 3
    return told


def check_found(told: list[Any], finder: int, operation: str, ranks: tuple[int, ...], token: int | None) -> str:
    error = told[finder][0]
    assert isinstance(error, CorruptionError), told
    assert (error.operation, error.ranks, error.token) == (operation, ranks, token), error
    assert isinstance(told[finder][1], BufferStateError)
    for rank, (first, after) in enumerate(told):
        if rank != finder:
            assert first == "fine" or isinstance(first, (CorruptionError, PeerLostError)), first
            assert isinstance(after, (PeerLostError, BufferStateError)), after
            assert first != "fine" or "CorruptionError" in str(after) or "over the rail" in str(after)
    return str(error)


HOWS = [(how, column) for how in ("fresh", "worst", "cached") for column in COLUMNS]
HOWS = [pair for pair in HOWS if pair not in (("cached", "source index"), ("cached", "weight"))]  # stay at home


@pytest.mark.parametrize(("how", "column"), HOWS)
def test_a_flipped_byte_of_a_dispatch_is_named(pool_of: PoolOf, how: str, column: str) -> None:
    told = pool_of(2).run(_flip_in_dispatch, column, True, how)
    text = check_found(told, 1, "dispatch", (0,), 5 if column == "source index" else 2)
    assert f"dispatch (epoch {3 if how == 'cached' else 1}): rank 0: row" in text
    assert ("source differ" in text) == (column == "source index")


@pytest.mark.parametrize("column", COLUMNS)
def test_without_the_mode_nobody_notices(pool_of: PoolOf, column: str) -> None:
    told = pool_of(2).run(_flip_in_dispatch, column, False, "fresh")
    assert told == [["fine", "fine"], ["wrong result", "fine"]]


def _flip_in_proof(rank: int, num_ranks: int) -> Any:
    scenario = Scenario(TARGET, rank, num_ranks)
    width = 16 * 2  # source and token, sums for two ranks, filled up
    spoil = flipped(Dispatch, 3, width, 3 * width - 9) if rank == 0 else mock.MagicMock()
    with paranoid(), Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer, spoil:
        return _told(buffer, scenario, lambda: scenario.dispatch(buffer))


def test_a_flipped_byte_of_a_checksum_is_found_like_one_of_a_row(pool_of: PoolOf) -> None:
    check_found(pool_of(2).run(_flip_in_proof), 1, "dispatch", (0,), 2)


def _flip_in_combine(rank: int, num_ranks: int, section: int, is_paranoid: bool) -> Any:
    scenario = Scenario(TARGET, rank, num_ranks)
    with paranoid(str(int(is_paranoid))), Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        handle = scenario.dispatch(buffer)[4]
        byte = 3 * (TARGET.combine_bytes if section == 0 else 4 * TARGET.num_topk) - 4  # of the third row
        last = rank == num_ranks - 1
        spoil = flipped(Combine, section, TARGET.combine_bytes, byte) if last else mock.MagicMock()
        with spoil:
            return _told(buffer, scenario, lambda: scenario.check_combine(scenario.combine(buffer, handle)))


@pytest.mark.parametrize("num_ranks", [*slow(2), 3])
@pytest.mark.parametrize("section", [0, 1])
def test_a_flipped_byte_of_a_combine_is_named(pool_of: PoolOf, section: int, num_ranks: int) -> None:
    told = pool_of(num_ranks).run(_flip_in_combine, section, True)
    text = check_found(told, 0, "combine", (num_ranks - 1,), 2)
    assert "combine (epoch 3)" in text
    assert "the sum of token 2 is not that of its rows" in text


@pytest.mark.parametrize("section", [0, 1])
def test_without_the_mode_nobody_notices_a_wrong_sum(pool_of: PoolOf, section: int) -> None:
    told = pool_of(2).run(_flip_in_combine, section, False)
    assert told == [["wrong result", "fine"], ["fine", "fine"]]


def _flip_on_rail(rank: int, num_ranks: int, operation: str, is_paranoid: bool) -> Any:
    scenario = NodeScenario(TARGET, rank, "2x1")
    with paranoid(str(int(is_paranoid))), make_buffer(rank, "2x1") as buffer:
        handle = scenario.dispatch(buffer)[4]
        assert buffer.runtime is not None
        rail, done = buffer.runtime.party().nodes.rail, []
        post = rail.post

        def posting(sends: Any, receives: Any) -> Any:
            width = TARGET.row_bytes if operation == "dispatch" else TARGET.combine_bytes
            for tensors in sends.values():
                rows = tensors[0].view(torch.uint8)
                if not done and rows.dim() == 2 and rows.size(1) == width and len(rows):
                    rows[2, 5] ^= 4
                    done.append(True)
            return post(sends, receives)

        sender = rank == (0 if operation == "dispatch" else 1)
        with mock.patch.object(rail, "post", posting) if sender else mock.MagicMock():
            if operation == "dispatch":
                return _told(buffer, scenario, lambda: scenario.check_dispatch(scenario.dispatch(buffer)))
            return _told(buffer, scenario, lambda: scenario.check_combine(scenario.combine(buffer, handle)))


@pytest.mark.parametrize(("operation", "finder"), [("dispatch", 1), ("combine", 0)])
def test_a_flipped_byte_between_nodes(pool_of: PoolOf, operation: str, finder: int) -> None:
    told = pool_of(2).run(_flip_on_rail, operation, False)
    assert told[finder] == ["wrong result", "fine"]
    assert told[1 - finder] == ["fine", "fine"]
    told = pool_of(2).run(_flip_on_rail, operation, True)
    check_found(told, finder, operation, (1 - finder,), 2)


# Poison, and agreement.


def _poison(rank: int, num_ranks: int, is_paranoid: bool) -> float:
    """How much of what the other rank staged for a dispatch is poison after one more, a small one."""
    large, small = (Scenario(Case((tokens,), routing="all", seed=3), rank, num_ranks) for tokens in (64, 1))
    with paranoid(str(int(is_paranoid))), Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        large.check_dispatch(large.dispatch(buffer))
        small.check_dispatch(small.dispatch(buffer))
        buffer._meetings.gather("test")
        runtime: Any = buffer.runtime
        staged = runtime._heap.stage_view(1 - rank, 4096, 4096)  # in the middle of the rows
        share = float((staged == POISON).float().mean())
        buffer._meetings.gather("test")
        return share


def test_what_peers_have_released_is_poison(pool_of: PoolOf) -> None:
    assert pool_of(2).run(_poison, True) == [1.0, 1.0]
    assert max(pool_of(2).run(_poison, False)) < 0.1


def _differ_in_the_variable(rank: int, num_ranks: int) -> str:
    with paranoid(str(rank % 2)), pytest.raises(TokenferryError) as error:
        Buffer(dist.group.WORLD, timeout=TIMEOUT)
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        check_works(buffer)
    return str(error.value)


def test_ranks_that_differ_are_told(pool_of: PoolOf) -> None:
    wanted = "the ranks of a Buffer must agree on TOKENFERRY_PARANOID: rank 0 has 0, rank 1 has 1"
    assert pool_of(2).run(_differ_in_the_variable) == [wanted] * 2


def test_a_line_says_what_is_not_covered(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tokenferry")
    for is_paranoid, device, low_latency in ((False, "cuda:0", True), (True, "cpu", True), (True, "cuda:0", False)):
        note_what_is_not_proven(is_paranoid, torch.device(device), low_latency)
    assert not caplog.messages
    note_what_is_not_proven(True, torch.device("cuda:0"), True)
    assert caplog.messages == ["paranoid: low-latency operations on GPUs carry no checksums"]


def test_another_value_is_refused() -> None:
    with paranoid("yes"), pytest.raises(ArgumentError, match="TOKENFERRY_PARANOID: got 'yes'; allowed: 0 or 1"):
        choose_paranoid()


# Checksums and sums.


@given(
    num_rows=st.integers(1, 5),
    row_bytes=st.integers(1, 40),
    seed=st.integers(0, 1 << 30),
    changes=st.lists(
        st.tuples(st.integers(0, 39), st.integers(1, 255)), min_size=1, max_size=3, unique_by=lambda c: c[0]
    ),
)
@settings(max_examples=60, deadline=None)
def test_changed_bytes_change_the_checksum_of_their_row(
    num_rows: int, row_bytes: int, seed: int, changes: list[tuple[int, int]]
) -> None:
    rows = random_bytes((num_rows, row_bytes), torch.uint8, torch.Generator().manual_seed(seed))
    before, row = checksums(rows, 1), seed % num_rows
    changed = rows.clone()
    for byte, bits in {place % row_bytes: bits for place, bits in changes}.items():
        changed[row, byte] ^= bits
    differs = (checksums(changed, 1) != before).tolist()
    assert differs == [index == row for index in range(num_rows)]


def test_checksums_of_words_in_another_order_or_of_the_sign_bits_alone_differ() -> None:
    words = torch.arange(6).view(1, 6)
    signs = words.clone().bitwise_xor_(torch.tensor([1, 0, 0, 1, 0, 0]) << 63)
    rows = torch.cat([words, words.flip(1), signs, words.roll(1, 1)])
    assert len(set(checksums(rows, 1).tolist())) == 4
    assert not torch.equal(checksums(rows, 1), checksums(rows, 2))


def _checksum_in_plain_integers(row: bytes, salt: int) -> int:
    """As documented."""

    def mix(word: int) -> int:
        for shift, factor in ((32, 0xFF51AFD7ED558CCD), (29, 0xC4CEB9FE1A85EC53)):
            word = (word ^ word >> shift) * factor % 2**64
        return word

    row = row.ljust(-(-len(row) // 8) * 8, b"\0")
    words = [int.from_bytes(row[start : start + 8], "little") for start in range(0, len(row), 8)]
    keys = [mix((index + (salt << 40)) * 0x9E3779B97F4A7C15 % 2**64) for index in range(len(words))]
    return sum(mix((word + key) % 2**64) for word, key in zip(words, keys, strict=True)) % 2**64


@pytest.mark.parametrize(("num_rows", "row_bytes"), [(3, 16), (70, 4100), (2, 1 << 19), (0, 16), (4, 0)])
def test_checksums_are_those_of_plain_integers(num_rows: int, row_bytes: int) -> None:
    rows = random_bytes((num_rows, row_bytes), torch.uint8, torch.Generator().manual_seed(7))
    found = [checksum % 2**64 for checksum in checksums(rows, 3).tolist()]
    some = range(0, num_rows, 23)
    assert len(found) == num_rows
    assert [found[row] for row in some] == [_checksum_in_plain_integers(bytes(rows[row].tolist()), 3) for row in some]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_are_those_of_the_data_plane(dtype: torch.dtype) -> None:
    source = torch.Generator().manual_seed(5)
    like = torch.empty((300, 1000), dtype=dtype)
    biases = [torch.randn(like.shape, generator=source).to(dtype) for _ in range(2)]
    parts = [Part(None, torch.randn(like.shape, generator=source).to(dtype))]
    for share in (0.9, 0.3, 0.0):
        tokens = (torch.rand(300, generator=source) < share).nonzero().flatten()
        parts.append(Part(tokens, torch.randn(len(tokens), 1000, generator=source).to(dtype)))
    sum_rows(parts, biases, like)
    assert not differ(like, added_up(parts, biases, like)).any()


def test_nans_are_alike_and_zeros_are_not() -> None:
    nans = torch.tensor([0x7F81, 0x7FC0, 0, 1], dtype=torch.int16).view(torch.bfloat16).view(4, 1)
    others = torch.tensor([0x7FC1, 0, -(1 << 15), 1], dtype=torch.int16).view(torch.bfloat16).view(4, 1)
    assert differ(nans, others).tolist() == [False, True, True, False]
