"""Paranoid mode of ElasticBuffer: results are those of the oracle, what goes wrong is found and named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, Case
from tests.conftest import PoolOf, but_slow, slow
from tests.elastic_cases import Elastic, elastic_buffer
from tests.test_paranoid import check_found, flipped, paranoid, told_of
from tokenferry import Buffer, CorruptionError, HeapError, TokenferryError
from tokenferry.dataplane.cpu.combine import Combine
from tokenferry.dataplane.cpu.dispatch import Dispatch
from tokenferry.dataplane.cpu.expert_major import CopyMap
from tokenferry.modes.paranoid import Paranoid

MODES = {"compact": (False, True), "expanded": (True, True), "compact worst": (False, False), "worst": (True, False)}
"""Whether rows are expanded, and whether the host waits."""
FP8 = {"dtype": torch.float8_e4m3fn, "scales": torch.float32, "scale_columns": 4}
CASES = {
    "ordinary": Case((7, 12), num_topk=3, local_experts=8, alignment=4),
    "fp8": Case((9, 4, 0), num_topk=2, local_experts=4, alignment=8, bias="two", **FP8),
    "sparse": Case((5, 6), routing="sparse", num_topk=5, local_experts=6, alignment=2, combine_dtype=torch.float32),
    "nothing": Case((6, 5), routing="nothing", alignment=4),
}


def _check(rank: int, num_ranks: int, case: Case, multiple: bool, num_bytes: int) -> int:
    with (
        paranoid(),
        elastic_buffer(dist.group.WORLD, num_bytes, allow_multiple_reduction=multiple) as buffer,
        mock.patch.object(Paranoid, "send", autospec=True, side_effect=Paranoid.send) as send,
    ):
        for expand, cpu_sync in MODES.values():
            Elastic(case, rank, num_ranks, expand=expand, cpu_sync=cpu_sync).check_all(buffer)
        buffer.barrier()
    return send.call_count


@pytest.mark.parametrize("name", but_slow(CASES, "sparse"))
@pytest.mark.parametrize("num_ranks", [3, *slow(1)])
def test_every_kind_of_call_gives_what_the_oracle_says(pool_of: PoolOf, num_ranks: int, name: str) -> None:
    proofs = pool_of(num_ranks).run(_check, CASES[name], num_ranks == 1, 0)
    assert proofs == [2 * 6 + 2 * 10] * num_ranks  # one for every dispatch and every combine


def test_a_small_stage_and_duplicates(pool_of: PoolOf) -> None:
    case = Case((60, 40), row_bytes=4096, combine_bytes=4096, routing="duplicates", num_topk=4, local_experts=4)
    pool_of(2).run(_check_with_sync, case)


def _check_with_sync(rank: int, num_ranks: int, case: Case) -> None:
    with paranoid(), elastic_buffer(dist.group.WORLD, 128) as buffer:
        for expand in (False, True):
            Elastic(case, rank, num_ranks, expand=expand).check_all(buffer)


# Something goes wrong.

TARGET = Case((6,), num_topk=2, local_experts=4, routing="one_rank", alignment=4, **FP8)
"""All tokens go to the last rank; its rows come home to both."""
COLUMNS = {
    "source index": (1, 4 * 5, 8),
    "row": (3, 3 * 128 - 1, 4),
    "scale": (4, 3 * 16 - 1, 4),
    "id": (5, 16 * 2, 1),
}
"""Section of a message of a dispatch, byte, bits: of token 2; as a source index, of token 5, which becomes 13."""


def _flip_in_dispatch(rank: int, num_ranks: int, column: str, mode: str, cached: bool, is_paranoid: bool) -> Any:
    expand, cpu_sync = MODES[mode]
    scenario = Elastic(TARGET, rank, num_ranks, expand=expand, cpu_sync=cpu_sync)
    with paranoid(str(int(is_paranoid))), elastic_buffer(dist.group.WORLD) as buffer:
        handle = scenario.dispatch(buffer)[3] if cached else None

        def call() -> None:
            if handle is None:
                recv_x, ids, weights, made, _ = scenario.dispatch(buffer)
                scenario.check_handle(made)
            else:
                recv_x, ids, weights, *_ = buffer.dispatch(
                    scenario.x, topk_weights=scenario.given.topk_weights, handle=handle
                )
            scenario.check_rows(recv_x)
            scenario.check_weights(weights, ids)

        section, byte, bits = COLUMNS[column]
        spoil = flipped(Dispatch, section, TARGET.row_bytes, byte, bits) if rank == 0 else mock.MagicMock()
        with spoil:
            return told_of(call, lambda: scenario.check_rows(scenario.dispatch(buffer)[0]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("column", COLUMNS)
def test_a_flipped_byte_of_a_dispatch_is_named(pool_of: PoolOf, column: str, mode: str) -> None:
    told = pool_of(2).run(_flip_in_dispatch, column, mode, False, True)
    if column == "id" and MODES[mode][0]:  # it contradicts the counts: found in every mode
        assert isinstance(told[1][0], HeapError)
        assert "rank 0 sent rows that contradict its counts" in str(told[1][0])
    else:
        check_found(told, 1, "dispatch", (0,), 5 if column == "source index" else 2)


@pytest.mark.parametrize("mode", ["compact", "expanded"])
@pytest.mark.parametrize("column", ["row", "scale"])
def test_a_flipped_byte_of_a_dispatch_along_a_handle_is_named(pool_of: PoolOf, column: str, mode: str) -> None:
    check_found(pool_of(2).run(_flip_in_dispatch, column, mode, True, True), 1, "dispatch", (0,), 2)


@pytest.mark.parametrize(
    ("column", "mode"), [("id", "compact"), *((column, "expanded") for column in COLUMNS if column != "id")]
)
def test_without_the_mode_nobody_notices(pool_of: PoolOf, column: str, mode: str) -> None:
    told = pool_of(2).run(_flip_in_dispatch, column, mode, False, False)
    assert told == [["fine", "fine"], ["wrong result", "fine"]]


def _flip_in_combine(rank: int, num_ranks: int, section: int, expand: bool, is_paranoid: bool) -> Any:
    scenario = Elastic(TARGET, rank, num_ranks, expand=expand)
    with paranoid(str(int(is_paranoid))), elastic_buffer(dist.group.WORLD) as buffer:
        recv_x, _, _, handle, _ = scenario.dispatch(buffer)
        byte = 3 * (TARGET.combine_bytes if section == 0 else 4 * TARGET.num_topk) - 4  # of the third row
        last = rank == num_ranks - 1
        spoil = flipped(Combine, section, TARGET.combine_bytes, byte) if last else mock.MagicMock()
        with spoil:
            return told_of(
                lambda: scenario.check_combine(buffer, handle, len(recv_x[0])),
                lambda: scenario.check_rows(scenario.dispatch(buffer)[0]),
            )


@pytest.mark.parametrize("expand", [False, True])
@pytest.mark.parametrize("section", [0, 1])
def test_a_flipped_byte_of_a_combine_is_named(pool_of: PoolOf, section: int, expand: bool) -> None:
    told = pool_of(2).run(_flip_in_combine, section, expand, True)
    assert "the sum of token 2 is not that of its rows" in check_found(told, 0, "combine", (1,), 2)
    told = pool_of(2).run(_flip_in_combine, section, expand, False)
    assert told == [["wrong result", "fine"], ["fine", "fine"]]


# What only expanding can get wrong, on the rank that receives.


@contextmanager
def _mistake(what: str) -> Iterator[None]:
    """One in the first dispatch that is expanded, when all copies are there."""
    finish, done = CopyMap.finish, []

    def spoiling(self: Any) -> None:
        finish(self)
        if done:
            return
        done.append(True)
        outputs, metadata = self._outputs, self._outputs.metadata
        if what == "a copy":
            metadata = self._plan.metadata if metadata is None else metadata
            outputs.rows.view(torch.uint8)[int(metadata[2, 3]), -1] ^= 4  # of the second choice
        elif what == "a place":  # two copies of an expert, rows and all, in each other's place
            experts = torch.searchsorted(self._ends.long(), metadata[:, 2:].long(), right=True)
            rows = ((metadata[:, 2:] >= 0) & (experts == experts[0, 0])).nonzero()[:2]
            (one, first), (other, second) = rows.tolist()
            a, b = int(metadata[one, 2 + first]), int(metadata[other, 2 + second])
            metadata[one, 2 + first], metadata[other, 2 + second] = b, a
            for column in (outputs.rows, outputs.scales, outputs.topk_weights):
                column[[a, b]] = column[[b, a]]
        elif what == "padding":
            outputs.rows[int(self._ends[self._ends % 4 > 0][0]), 0] = 1
        elif what == "an end":
            self._ends[-1] += 1
        elif what == "no row":
            metadata[1, 2:] = 1 << 20
        elif what == "past the end":
            metadata[-1, 0] = 0

    with mock.patch.object(CopyMap, "finish", spoiling):
        yield
    assert done


def _with_a_mistake(rank: int, num_ranks: int, what: str, cached: bool) -> Any:
    cpu_sync = what != "past the end"
    scenario = Elastic(TARGET, rank, num_ranks, expand=True, cpu_sync=cpu_sync)
    with paranoid(), elastic_buffer(dist.group.WORLD) as buffer:
        handle = scenario.dispatch(buffer)[3] if cached else None

        def call() -> None:
            if handle is None:
                scenario.dispatch(buffer, do_zero_padding=True)
            else:
                buffer.dispatch(scenario.x, handle=handle, topk_weights=scenario.given.topk_weights)

        with _mistake(what) if rank == num_ranks - 1 else mock.MagicMock():
            return told_of(call, lambda: scenario.check_rows(scenario.dispatch(buffer)[0]))


MISTAKES = {
    "a copy": ("its copies differ", (0,), 2),
    "a place": ("handle.recv_src_metadata is not that of its choices", None, None),
    "padding": ("between experts, are not zeros", (1,), None),
    "an end": ("choices of the local experts came", (1,), None),
    "no row": ("copies of rows are not among", (1,), None),
    "past the end": ("has sources past the last row", (1,), None),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_mistakes_of_expanding_are_named(pool_of: PoolOf, what: str) -> None:
    told = pool_of(2).run(_with_a_mistake, what, False)
    error = told[1][0]
    assert isinstance(error, CorruptionError), told
    text, ranks, token = MISTAKES[what]
    assert text in str(error)
    assert ranks is None or (error.ranks, error.token) == (ranks, token), error


def test_a_copy_that_differs_along_a_handle_is_named(pool_of: PoolOf) -> None:
    error = pool_of(2).run(_with_a_mistake, "a copy", True)[1][0]
    assert isinstance(error, CorruptionError)
    assert (error.ranks, error.token) == ((0,), 2)


def _differ_in_the_variable(rank: int, num_ranks: int) -> str:
    with paranoid(str(rank % 2)), pytest.raises(TokenferryError) as error:
        elastic_buffer(dist.group.WORLD)
    Buffer(dist.group.WORLD, timeout=TIMEOUT).destroy()
    return str(error.value)


def test_ranks_that_differ_are_told(pool_of: PoolOf) -> None:
    wanted = "the ranks of a Buffer must agree on TOKENFERRY_PARANOID: rank 0 has 0, rank 1 has 1"
    assert pool_of(2).run(_differ_in_the_variable) == [wanted] * 2
