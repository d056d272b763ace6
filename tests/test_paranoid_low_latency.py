"""Paranoid mode of low-latency operations: results are those of the oracle, what goes wrong is found and named."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests import internode_low_latency_cases
from tests.conftest import PoolOf, slow
from tests.internode_low_latency_cases import NodeScenario
from tests.low_latency_cases import FORMATS, Case, Scenario, check_case, make_buffer
from tests.test_low_latency_faults import serve
from tests.test_paranoid import check_found, paranoid, told_of
from tokenferry import ArgumentError, BufferStateError, CorruptionError
from tokenferry.dataplane.cpu.low_latency import CombineReceive, DispatchReceive, Receive
from tokenferry.modes import paranoid_low_latency
from tokenferry.modes.paranoid_low_latency import _Proven

TARGET = Case(tokens=(6,), spare=2, num_topk=2, routing="one_expert", seed=7)
"""All tokens choose the last expert, of the last rank."""


@contextmanager
def proofs_counted() -> Iterator[mock.Mock]:
    with mock.patch.object(paranoid_low_latency, "_Proven", side_effect=_Proven) as made:
        yield made


def _check_cases(rank: int, num_ranks: int, cases: list[Case], num_rdma_bytes: int) -> int:
    with paranoid(), make_buffer(num_rdma_bytes=num_rdma_bytes) as buffer, proofs_counted() as made:
        for case in cases:
            scenario = Scenario(case, rank, num_ranks)
            check_case(buffer, scenario)
            serve(buffer, scenario, hooked=True)
    return made.call_count


@pytest.mark.parametrize(("num_ranks", "num_rdma_bytes"), [*slow((1, 0), (3, 0)), (3, 128)])
def test_every_format_gives_what_the_oracle_says(pool_of: PoolOf, num_ranks: int, num_rdma_bytes: int) -> None:
    routings = ("random", "duplicates", "sparse", "nothing")
    cases = [
        Case((5, 0, 3), 2, 640, 3, 2, routing, form, seed)
        for seed, (form, routing) in enumerate(zip(FORMATS, routings, strict=True))
    ]
    assert set(pool_of(num_ranks).run(_check_cases, cases, num_rdma_bytes)) == {6 * len(cases)}


def _check_nodes(rank: int, num_ranks: int, layout: str, exact: bool) -> int:
    with (
        paranoid(),
        internode_low_latency_cases.make_buffer(rank, layout, exact_combine=exact) as buffer,
        proofs_counted() as made,
    ):
        for form in ("bf16", "rounded"):
            case = Case((5, 2), num_topk=3, format=form)
            internode_low_latency_cases.check_case(buffer, NodeScenario(case, rank, layout, exact=exact))
    return made.call_count


@pytest.mark.parametrize(("layout", "exact"), [("2x1", True), ("2x2", False)])
def test_between_nodes(pool_of: PoolOf, layout: str, exact: bool) -> None:
    assert min(pool_of(2 if layout == "2x1" else 4).run(_check_nodes, layout, exact)) >= 4


def _statistics(rank: int, num_ranks: int) -> None:
    scenario = Scenario(TARGET, rank, num_ranks)
    with paranoid(), make_buffer() as buffer:
        waits = torch.zeros(num_ranks, dtype=torch.int64)
        counts = torch.zeros(TARGET.local_experts, dtype=torch.int32)
        options = {"dispatch_wait_recv_cost_stats": waits, "cumulative_local_expert_recv_stats": counts}
        result = scenario.dispatch(buffer, **options)
        assert counts.tolist() == result[1].tolist()
        assert [wait > 0 for wait in waits.tolist()] == [peer != rank for peer in range(num_ranks)]
        scenario.combine(buffer, result, combine_wait_recv_cost_stats=waits)
        for name in options:
            with pytest.raises(ArgumentError, match=name):
                scenario.dispatch(buffer, **{name: torch.zeros(num_ranks + 5, dtype=torch.int64)})
        scenario.check_dispatch(scenario.dispatch(buffer))


def test_statistics_count_operations_and_not_proofs(pool_of: PoolOf) -> None:
    pool_of(2).run(_statistics)


# Something goes wrong: a byte that a rank puts in its stage, or on its rail, is not what it should be.


@contextmanager
def flipped(kind: type[Receive], number: int, section: int, byte: int, bits: int) -> Iterator[None]:
    """Flip bits of a byte of a section of the message with this number among those of a kind."""
    publish, seen = kind.publish, []

    def publishing(self: Any) -> None:
        if isinstance(self, kind):
            seen.append(self)
            if len(seen) == number + 1:
                payload = self.heap.stage_view(self.heap.rank, self._offset, self._head[0])
                payload[self._sections[section] + byte] ^= bits
        publish(self)

    with mock.patch.object(Receive, "publish", publishing):
        yield
    assert len(seen) > number


DISPATCH_FLIPS = {
    "expert of the same rank": ("bf16", 0, 2 * 16, 1, None),
    "expert of another rank": ("plain", 0, 2 * 16, 2, None),
    "row": ("bf16", 1, 3 * 256 - 1, 4, 2),
    "fp8 row": ("rounded", 1, 3 * 128 - 1, 4, 2),
    "scale": ("plain", 2, 2 * 4, 1, 2),
    "packed scale": ("ue8m0", 2, 2 * 4, 1, 2),
}
"""Format, section, byte, bits, and the token that is named."""


def _flip_in_dispatch(rank: int, num_ranks: int, what: str, number: int, is_paranoid: bool, hooked: bool) -> Any:
    form, section, byte, bits, _ = DISPATCH_FLIPS[what]
    if number:
        section, byte = 1, 3 * 16 - 1  # of the checksum of token 2
    scenario = Scenario(Case(**{**vars(TARGET), "format": form}), rank, num_ranks)
    spoil = flipped(DispatchReceive, number, section, byte, bits) if rank == 0 else mock.MagicMock()

    def call() -> None:
        result = scenario.dispatch(buffer, return_recv_hook=hooked)
        if hooked:
            result[4]()
        scenario.check_dispatch(result)

    with paranoid(str(int(is_paranoid))), make_buffer() as buffer, spoil:
        return told_of(call, lambda: scenario.check_dispatch(scenario.dispatch(buffer)))


@pytest.mark.parametrize("hooked", [*slow(False), True])
@pytest.mark.parametrize("what", DISPATCH_FLIPS)
def test_a_flipped_byte_of_a_dispatch_is_named(pool_of: PoolOf, what: str, hooked: bool) -> None:
    told = pool_of(2).run(_flip_in_dispatch, what, 0, True, hooked)
    text = check_found(told, 1, "low_latency_dispatch", (0,), DISPATCH_FLIPS[what][4])
    assert "low_latency_dispatch (epoch 1)" in text
    assert ("bytes differ" in text) == ("expert" not in what)


@pytest.mark.parametrize("what", DISPATCH_FLIPS)
def test_without_the_mode_nobody_notices(pool_of: PoolOf, what: str) -> None:
    assert pool_of(2).run(_flip_in_dispatch, what, 0, False, True) == [["fine", "fine"], ["wrong result", "fine"]]


def test_a_flipped_byte_of_a_checksum_is_found_like_one_of_a_row(pool_of: PoolOf) -> None:
    check_found(pool_of(2).run(_flip_in_dispatch, "row", 1, True, True), 1, "low_latency_dispatch", (0,), 2)


COMBINE_FLIPS = {"token": (0, 2 * 4, 4), "expert": (1, 2 * 4, 1), "row": (2, 3 * 256 - 1, 4)}


def _flip_in_combine(rank: int, num_ranks: int, what: str, proof: bool, is_paranoid: bool, hooked: bool) -> Any:
    scenario = Scenario(TARGET, rank, num_ranks)
    section, byte, bits = COMBINE_FLIPS[what]
    kind: type[Receive] = CombineReceive
    if proof:  # the second row of what goes home once more, which is that of token 1
        kind, section, byte = DispatchReceive, 1, 288 + byte % 256
    with paranoid(str(int(is_paranoid))), make_buffer() as buffer:
        result = scenario.dispatch(buffer)

        def call() -> None:
            answer = scenario.combine(buffer, result, return_recv_hook=hooked)
            if hooked:
                answer[2]()
            scenario.check_combine(answer)

        with flipped(kind, 0, section, byte, bits) if rank == num_ranks - 1 else mock.MagicMock():
            return told_of(call, lambda: scenario.check_dispatch(scenario.dispatch(buffer)))


@pytest.mark.parametrize("hooked", [False, *slow(True)])
@pytest.mark.parametrize("what", COMBINE_FLIPS)
def test_a_flipped_byte_of_a_combine_is_named(pool_of: PoolOf, what: str, hooked: bool) -> None:
    told = pool_of(2).run(_flip_in_combine, what, False, True, hooked)
    text = check_found(told, 0, "low_latency_combine", (1,), 2)
    assert "the sum of token 2 is not that of its rows" in text


@pytest.mark.parametrize("what", COMBINE_FLIPS)
def test_without_the_mode_nobody_notices_a_wrong_sum(pool_of: PoolOf, what: str) -> None:
    told = pool_of(2).run(_flip_in_combine, what, False, False, True)
    assert told == [["wrong result", "fine"], ["fine", "fine"]]


def test_a_flipped_byte_on_the_second_way_home_is_named(pool_of: PoolOf) -> None:
    told = pool_of(2).run(_flip_in_combine, "row", True, True, True)
    text = check_found(told, 0, "low_latency_combine", (1,), 1)
    assert "row 1 that came home once more differs" in text


def _flip_on_rail(rank: int, num_ranks: int, operation: str, is_paranoid: bool) -> Any:
    scenario = NodeScenario(TARGET, rank, "2x1")
    with paranoid(str(int(is_paranoid))), internode_low_latency_cases.make_buffer(rank, "2x1") as buffer:
        result = scenario.dispatch(buffer)
        assert buffer.runtime is not None
        rail, done = buffer.runtime.party().nodes.rail, []
        post = rail.post

        def posting(sends: Any, receives: Any) -> Any:
            for tensor in (tensor for tensors in sends.values() for tensor in tensors):
                if not done and tensor.dim() == 2 and tensor.size(1) == TARGET.hidden:
                    tensor.view(torch.uint8)[2, 5] ^= 4
                    done.append(True)
            return post(sends, receives)

        def call() -> None:
            if operation == "dispatch":
                scenario.check_dispatch(scenario.dispatch(buffer))
            else:
                scenario.check_combine(scenario.combine(buffer, result))

        sender = rank == (0 if operation == "dispatch" else 1)
        with mock.patch.object(rail, "post", posting) if sender else mock.MagicMock():
            told = told_of(call, lambda: scenario.check_dispatch(scenario.dispatch(buffer)))
        assert bool(done) == sender
        return told


@pytest.mark.parametrize(("operation", "finder"), [("dispatch", 1), ("combine", 0)])
def test_a_flipped_byte_between_nodes(pool_of: PoolOf, operation: str, finder: int) -> None:
    told = pool_of(2).run(_flip_on_rail, operation, False)
    assert told[finder] == ["wrong result", "fine"]
    assert told[1 - finder] == ["fine", "fine"]
    check_found(pool_of(2).run(_flip_on_rail, operation, True), finder, f"low_latency_{operation}", (1 - finder,), 2)


# Masks.


def _masked(rank: int, num_ranks: int, operation: str, is_spoiled: bool) -> Any:
    """Rank 2 of three is masked by the others; rank 1 spoils a byte."""
    scenario = Scenario(TARGET, rank, num_ranks)
    partly = Scenario(Case(**{**vars(TARGET), "routing": "distinct", "seed": 4}), rank, num_ranks, masked=(2,))
    with paranoid(), make_buffer(enable_shrink=True) as buffer:
        serve(buffer, scenario)
        dist.barrier()
        if rank == 2:
            return ["fine", "fine"]
        buffer.low_latency_update_mask_buffer(2, True)
        result = partly.dispatch(buffer)
        partly.check_dispatch(result)
        kind: type[Receive] = DispatchReceive if operation == "dispatch" else CombineReceive

        def call() -> None:
            if operation == "dispatch":
                partly.check_dispatch(partly.dispatch(buffer))
            else:
                partly.check_combine(partly.combine(buffer, result))

        section, row = (1, 3) if operation == "dispatch" else (2, 0)
        with flipped(kind, 0, section, row * 256 + 5, 64) if is_spoiled and rank == 1 else mock.MagicMock():
            return told_of(call, lambda: partly.check_dispatch(partly.dispatch(buffer)))


@pytest.mark.parametrize(("operation", "token"), [("dispatch", 3), ("combine", 0)])
def test_operations_are_proven_without_masked_ranks(pool_of: PoolOf, operation: str, token: int) -> None:
    assert pool_of(3).run(_masked, operation, False) == [["fine", "fine"]] * 3
    (error, after), (fine, _), _ = pool_of(3).run(_masked, operation, True)
    assert isinstance(error, CorruptionError)
    assert (error.operation, error.ranks, error.token) == (f"low_latency_{operation}", (1,), token)
    assert isinstance(after, BufferStateError)
    assert fine == "fine"  # it has what it asked for, and masks rank 0 next


def _masked_between(rank: int, num_ranks: int, operation: str, spoiler: int) -> Any:
    """Rank 0 masks rank 2 when it has received an operation, and not yet its proof."""
    scenario = Scenario(Case(**{**vars(TARGET), "routing": "distinct", "seed": 0}), rank, 3)
    finish, done = _Proven.finish, []

    def finishing(self: Any) -> None:
        if rank == 0 and not done:
            done.append(True)
            self._pending[0].finish()
            buffer.low_latency_update_mask_buffer(2, True)
        finish(self)

    def call() -> None:
        with mock.patch.object(_Proven, "finish", finishing):
            if operation == "dispatch":
                scenario.check_dispatch(scenario.dispatch(buffer))
            else:
                scenario.check_combine(scenario.combine(buffer, result))

    def after() -> None:
        dist.barrier()

    with paranoid(), make_buffer(enable_shrink=True) as buffer:
        result = scenario.dispatch(buffer) if operation == "combine" else None
        spoil = flipped(DispatchReceive, 0, 1, 3 * 256 + 5, 4) if rank == spoiler else mock.MagicMock()
        with spoil:
            return told_of(call, after)


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_what_cannot_be_compared_is_not_called_wrong(pool_of: PoolOf, operation: str) -> None:
    assert pool_of(3).run(_masked_between, operation, -1) == [["fine", "fine"]] * 3


def test_the_other_ranks_are_compared(pool_of: PoolOf) -> None:
    told = pool_of(3).run(_masked_between, "dispatch", 1)
    assert told[0][0].ranks == (1,), told


def _keeps_nothing(rank: int, num_ranks: int) -> None:
    scenario = Scenario(TARGET, rank, num_ranks)
    with paranoid(), make_buffer() as buffer:
        result = scenario.dispatch(buffer, return_recv_hook=True)
        hook, received = result[4], weakref.ref(result[0])
        hook()
        del result
        gc.collect()
        assert received() is None


def test_no_references_are_kept_once_received(pool_of: PoolOf) -> None:
    pool_of(2).run(_keeps_nothing)
