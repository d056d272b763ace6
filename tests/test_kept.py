"""What calls keep for later ones: used for no call that differs, bounded, without tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from tests.host_path import EXPERTS, MOST, RANKS, ROWS, TOKENS, Rank, rank_on_a_gpu
from tokenferry import ArgumentError, BufferStateError, Config
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.handles import DispatchHandle
from tokenferry.kept import _MOST_GUARDS, MOST_KEPT, Kept, Known, kind_of
from tokenferry.modes import expert_major, inputs, intranode, low_latency

Call = Callable[[Rank], Any]


@pytest.fixture(scope="module")
def rank() -> Iterator[Rank]:
    with rank_on_a_gpu() as one:
        yield one


def all_kept(rank: Rank) -> list[Kept[Any]]:
    plane: Any = rank.buffer.runtime._plane  # type: ignore[union-attr]
    found = [value for module in (expert_major, inputs, intranode, low_latency) for value in vars(module).values()]
    return [value for value in found if isinstance(value, Kept)] + [
        plane._calls,
        plane._kinds,
        plane._known_places,
        plane._low_latency._prepared,
        plane._low_latency._tables,
    ]


def forget(rank: Rank) -> None:
    for kept in all_kept(rank):
        kept.clear()


def dispatch(rank: Rank, *, x: Any = None, ids: Any = None, **given: Any) -> Any:
    x, ids = rank.x if x is None else x, rank.ids if ids is None else ids if ids is not False else None
    per_rank, _, per_expert, member, _ = rank.layout
    arguments = {
        "num_tokens_per_rank": per_rank, "is_token_in_rank": member, "num_tokens_per_expert": per_expert,
        "topk_weights": rank.weights, "num_worst_tokens": ROWS, **given,
    }  # fmt: skip
    return rank.buffer.dispatch(x, topk_idx=ids, **arguments)


def combine_rows(rank: Rank, count: int) -> Any:
    """A combine as if so many rows had come."""
    assert rank.handle is not None
    handle = rank.handle._replace(recv_src_idx=rank.handle.recv_src_idx[:count])
    return rank.buffer.combine(rank.y[:count], handle, rank.recv_weights[:count])


def elastic(rank: Rank, **given: Any) -> Any:
    arguments = {"x": rank.x, "topk_idx": rank.ids, "topk_weights": rank.weights, "num_experts": EXPERTS, **given}
    arguments = {"expert_alignment": 4, "do_expand": True, "do_cpu_sync": False, **arguments}
    *results, handle, _ = rank.elastic.dispatch(**arguments)
    return *results, *handle.tensors()


def low_dispatch(
    rank: Rank, *, x: Any = None, ids: Any = None, most: Any = MOST, experts: Any = EXPERTS, **how: Any
) -> Any:
    x, ids = rank.x if x is None else x, rank.ids if ids is None else ids
    return rank.buffer.low_latency_dispatch(x, ids, most, experts, **how)


def low_combine(rank: Rank, *, x: Any = None, ids: Any = None, weights: Any = None, **how: Any) -> Any:
    x, ids = rank.slabs if x is None else x, rank.ids if ids is None else ids
    weights = rank.weights if weights is None else weights
    return rank.buffer.low_latency_combine(x, ids, weights, how.pop("handle", rank.low_latency_handle), **how)


def columns(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, column after column."""
    return tensor.t().contiguous().t()


USUAL: dict[str, Call] = {
    "dispatch": dispatch,
    "cached": lambda rank: rank.buffer.dispatch(rank.x, rank.handle),
    "combine": lambda rank: rank.buffer.combine(rank.y, rank.handle),
    "elastic": lambda rank: elastic(rank),
    "low dispatch": low_dispatch,
    "low combine": low_combine,
}
"""After these every preparation is there."""

OTHERS: dict[str, Call] = {
    **USUAL,
    "dispatch, other dtype": lambda rank: dispatch(rank, x=rank.x.half()),
    "dispatch, narrower": lambda rank: dispatch(rank, x=rank.x[:, :256]),
    "dispatch, scales": lambda rank: dispatch(rank, x=(rank.x.to(torch.float8_e4m3fn), rank.x[:, :4].float())),
    "dispatch, fewer choices": lambda rank: dispatch(
        rank, ids=rank.ids[:, :4].contiguous(), topk_weights=rank.weights[:, :4]
    ),
    "dispatch, more room": lambda rank: dispatch(rank, num_worst_tokens=ROWS + 1),
    "dispatch, fewer tokens": lambda rank: dispatch(
        rank, x=rank.x[:5], ids=rank.ids[:5], topk_weights=rank.weights[:5], is_token_in_rank=rank.layout[3][:5]
    ),
    "dispatch, fewer SMs": lambda rank: dispatch(rank, config=Config(8)),
    "cached, other dtype": lambda rank: rank.buffer.dispatch(rank.x.half(), rank.handle),
    "cached, wider dtype": lambda rank: rank.buffer.dispatch(rank.x.float(), rank.handle),
    "cached, narrower": lambda rank: rank.buffer.dispatch(rank.x[:, :256], rank.handle),
    "cached, scales": lambda rank: rank.buffer.dispatch(
        (rank.x.to(torch.float8_e4m3fn), rank.x[:, :4].float()), rank.handle
    ),
    "cached, integer scales": lambda rank: rank.buffer.dispatch(
        (rank.x.to(torch.float8_e4m3fn), rank.x[:, :4].int()), rank.handle
    ),
    "cached, fewer SMs": lambda rank: rank.buffer.dispatch(rank.x, rank.handle, config=Config(8)),
    "combine, fewer rows": lambda rank: combine_rows(rank, 5),
    "combine, one row": lambda rank: combine_rows(rank, 1),
    "combine, no rows": lambda rank: combine_rows(rank, 0),
    "combine, other dtype": lambda rank: rank.buffer.combine(rank.y.half(), rank.handle),
    "combine, narrower": lambda rank: rank.buffer.combine(rank.y[:, :256], rank.handle),
    "combine, weights": lambda rank: rank.buffer.combine(rank.y, rank.handle, rank.recv_weights),
    "combine, fewer weights": lambda rank: rank.buffer.combine(rank.y, rank.handle, rank.recv_weights[:, :3]),
    "combine, bias": lambda rank: rank.buffer.combine(rank.y, rank.handle, None, rank.x),
    "combine, two biases": lambda rank: rank.buffer.combine(rank.y, rank.handle, None, (rank.x, rank.x)),
    "combine, fewer SMs": lambda rank: rank.buffer.combine(rank.y, rank.handle, config=Config(8)),
    "elastic, other alignment": lambda rank: elastic(rank, expert_alignment=8),
    "elastic, compact": lambda rank: elastic(rank, do_expand=False),
    "elastic, other experts": lambda rank: elastic(rank, num_experts=2 * EXPERTS),
    "elastic, fewer tokens": lambda rank: elastic(
        rank, x=rank.x[:5], topk_idx=rank.ids[:5], topk_weights=rank.weights[:5]
    ),
    "low dispatch, fewer": lambda rank: low_dispatch(rank, x=rank.x[:5], ids=rank.ids[:5]),
    "low dispatch, none": lambda rank: low_dispatch(rank, x=rank.x[:0], ids=rank.ids[:0]),
    "low dispatch, narrower": lambda rank: low_dispatch(rank, x=rank.x[:, :256]),
    "low dispatch, bfloat16": lambda rank: low_dispatch(rank, use_fp8=False),
    "low dispatch, rounded": lambda rank: low_dispatch(rank, round_scale=True),
    "low dispatch, exponents": lambda rank: low_dispatch(rank, round_scale=True, use_ue8m0=True),
    "low dispatch, more room": lambda rank: low_dispatch(rank, most=MOST + 4),
    "low dispatch, other experts": lambda rank: low_dispatch(rank, experts=2 * EXPERTS),
    "low dispatch, fewer choices": lambda rank: low_dispatch(rank, ids=rank.ids[:, :3].contiguous()),
    "low combine, fewer": lambda rank: low_combine(rank, ids=rank.ids[:5], weights=rank.weights[:5]),
}
SAME: dict[str, tuple[str, Call]] = {
    "dispatch, columns": ("dispatch", lambda rank: dispatch(rank, x=columns(rank.x))),
    "dispatch, gradient": ("dispatch", lambda rank: dispatch(rank, x=rank.x.clone().requires_grad_())),
    "dispatch, weights as columns": ("dispatch", lambda rank: dispatch(rank, topk_weights=columns(rank.weights))),
    "cached, columns": ("cached", lambda rank: rank.buffer.dispatch(columns(rank.x), rank.handle)),
    "cached, parameter": ("cached", lambda rank: rank.buffer.dispatch(torch.nn.Parameter(rank.x), rank.handle)),
    "cached, plain handle": ("cached", lambda rank: rank.buffer.dispatch(rank.x, tuple(rank.handle))),  # type: ignore[arg-type]
    "combine, columns": ("combine", lambda rank: rank.buffer.combine(columns(rank.y), rank.handle)),
    "combine, gradient": ("combine", lambda rank: rank.buffer.combine(rank.y.clone().requires_grad_(), rank.handle)),
    "low dispatch, columns": ("low dispatch", lambda rank: low_dispatch(rank, x=columns(rank.x))),
    "low dispatch, parameter": ("low dispatch", lambda rank: low_dispatch(rank, x=torch.nn.Parameter(rank.x))),
    "low combine, plain handle": (
        "low combine",
        lambda rank: low_combine(rank, handle=tuple(rank.low_latency_handle)),
    ),
}
"""Calls that come to the same launches as usual ones, by these."""


def launches(rank: Rank, call: Call) -> list[Any]:
    """What a call launches, without the addresses, and the shapes, strides and dtypes of what it returns."""
    rank.gpu.log = []
    try:
        result = call(rank)
        log = [line for line in rank.gpu.log if line[0] == "launch"]
    finally:
        rank.gpu.log = None

    def looks(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, value.stride()
        return [looks(part) for part in value] if isinstance(value, (tuple, list)) else type(value)

    def is_address(value: Any) -> bool:
        return isinstance(value, int) and (1 << 40 <= value < 1 << 48 or value == -1)  # -1: of no region

    return [[[part for part in line if not is_address(part)] for line in log], looks(result)]


@pytest.mark.parametrize("name", OTHERS)
def test_another_call_is_prepared_as_if_it_were_the_first(rank: Rank, name: str) -> None:
    forget(rank)
    wanted = launches(rank, OTHERS[name])
    forget(rank)
    for usual in USUAL.values():
        usual(rank)
    assert launches(rank, OTHERS[name]) == wanted
    assert launches(rank, OTHERS[name]) == wanted  # kept by now
    for usual in USUAL:
        assert (launches(rank, OTHERS[usual]) == wanted) == (usual == name)


@pytest.mark.parametrize("name", SAME)
def test_tensors_that_are_laid_out_otherwise(rank: Rank, name: str) -> None:
    usual, call = SAME[name]
    for _ in range(2):
        wanted = launches(rank, USUAL[usual])
        assert wanted[0]
        for _ in range(2):
            assert launches(rank, call) == wanted
        forget(rank)


BAD: dict[str, Call] = {
    "dispatch, rows": lambda rank: dispatch(rank, x=rank.x[1:]),
    "dispatch, row bytes": lambda rank: dispatch(rank, x=rank.x[:, :5]),
    "dispatch, complex": lambda rank: dispatch(rank, x=rank.x.to(torch.complex64)),
    "dispatch, no tensor": lambda rank: dispatch(rank, x=[1.0]),
    "dispatch, scales of nothing": lambda rank: dispatch(rank, x=(rank.x.to(torch.float8_e4m3fn), None)),
    "dispatch, one": lambda rank: dispatch(rank, x=(rank.x,)),
    "dispatch, two": lambda rank: dispatch(rank, x=(rank.x, rank.x)),
    "dispatch, list": lambda rank: dispatch(rank, x=[rank.x, rank.x]),
    "dispatch, three": lambda rank: dispatch(rank, x=(rank.x,) * 3),
    "dispatch, ids": lambda rank: dispatch(rank, ids=rank.ids.int()),
    "dispatch, ids as columns": lambda rank: dispatch(rank, ids=columns(rank.ids)),
    "dispatch, weights": lambda rank: dispatch(rank, topk_weights=rank.weights.double()),
    "dispatch, weights alone": lambda rank: dispatch(rank, ids=False),
    "dispatch, no weights": lambda rank: dispatch(rank, topk_weights=None),
    "dispatch, member": lambda rank: dispatch(rank, is_token_in_rank=rank.layout[3].to(torch.uint8)),
    "dispatch, member as columns": lambda rank: dispatch(rank, is_token_in_rank=columns(rank.layout[3])),
    "dispatch, counts": lambda rank: dispatch(rank, num_tokens_per_rank=rank.layout[0].long()),
    "dispatch, no counts": lambda rank: dispatch(rank, num_tokens_per_rank=None),
    "dispatch, experts": lambda rank: dispatch(rank, num_tokens_per_expert=rank.layout[2][1:]),
    "dispatch, alignment": lambda rank: dispatch(rank, expert_alignment=1.0),
    "dispatch, alignment True": lambda rank: dispatch(rank, expert_alignment=True),
    "dispatch, room": lambda rank: dispatch(rank, num_worst_tokens=float(ROWS)),
    "dispatch, device": lambda rank: dispatch(rank, x=rank.x.to("meta")),
    "dispatch, sparse": lambda rank: dispatch(rank, x=rank.x.float().to_sparse()),
    "elastic, alignment": lambda rank: elastic(rank, expert_alignment=1.0),
    "elastic, alignment True": lambda rank: (elastic(rank, expert_alignment=1), elastic(rank, expert_alignment=True)),
    "elastic, experts": lambda rank: elastic(rank, num_experts=float(EXPERTS)),
    "cached, rows": lambda rank: rank.buffer.dispatch(rank.x[1:], rank.handle),
    "cached, one": lambda rank: rank.buffer.dispatch((rank.x,), rank.handle),  # type: ignore[arg-type]
    "cached, two": lambda rank: rank.buffer.dispatch((rank.x, rank.x), rank.handle),
    "cached, three": lambda rank: rank.buffer.dispatch((rank.x,) * 3, rank.handle),  # type: ignore[arg-type]
    "cached, device": lambda rank: rank.buffer.dispatch(rank.x.to("meta"), rank.handle),
    "cached, dimensions": lambda rank: rank.buffer.dispatch(rank.x[None], rank.handle),
    "cached, no tensor": lambda rank: rank.buffer.dispatch(None, rank.handle),  # type: ignore[arg-type]
    "cached, config": lambda rank: rank.buffer.dispatch(rank.x, rank.handle, config=7),  # type: ignore[arg-type]
    "cached, handle": lambda rank: rank.buffer.dispatch(rank.x, rank.handle[:5]),  # type: ignore[index]
    "combine, rows": lambda rank: rank.buffer.combine(rank.y[1:], rank.handle),
    "combine, dtype": lambda rank: rank.buffer.combine(rank.y.int(), rank.handle),
    "combine, device": lambda rank: rank.buffer.combine(rank.y.to("meta"), rank.handle),
    "combine, weights": lambda rank: rank.buffer.combine(rank.y, rank.handle, rank.recv_weights.double()),
    "combine, rows of weights": lambda rank: rank.buffer.combine(rank.y, rank.handle, rank.recv_weights[1:]),
    "combine, bias": lambda rank: rank.buffer.combine(rank.y, rank.handle, None, rank.x[1:]),
    "low dispatch, dtype": lambda rank: low_dispatch(rank, x=rank.x.half()),
    "low dispatch, device": lambda rank: low_dispatch(rank, x=rank.x.to("meta")),
    "low dispatch, width": lambda rank: low_dispatch(rank, x=rank.x[:, :200]),
    "low dispatch, rows": lambda rank: low_dispatch(rank, x=rank.x[1:]),
    "low dispatch, ids": lambda rank: low_dispatch(rank, ids=rank.ids.int()),
    "low dispatch, ids as columns": lambda rank: low_dispatch(rank, ids=columns(rank.ids)),
    "low dispatch, most": lambda rank: low_dispatch(rank, most=float(MOST)),
    "low dispatch, too few": lambda rank: low_dispatch(rank, most=TOKENS - 1),
    "low dispatch, experts": lambda rank: low_dispatch(rank, experts=float(EXPERTS)),
    "low dispatch, odd experts": lambda rank: low_dispatch(rank, experts=EXPERTS + 1),
    "low dispatch, list of experts": lambda rank: low_dispatch(rank, experts=[EXPERTS]),
    "low dispatch, exponents": lambda rank: low_dispatch(rank, use_ue8m0=True),
    "low dispatch, statistics": lambda rank: low_dispatch(rank, cumulative_local_expert_recv_stats=rank.weights),
    "low dispatch, waits": lambda rank: low_dispatch(rank, dispatch_wait_recv_cost_stats=rank.weights),
    "low combine, dtype": lambda rank: low_combine(rank, x=rank.slabs.half()),
    "low combine, slabs": lambda rank: low_combine(rank, x=rank.slabs[1:]),
    "low combine, weights": lambda rank: low_combine(rank, weights=rank.weights[1:]),
    "low combine, ids as columns": lambda rank: low_combine(rank, ids=columns(rank.ids)),
    "low combine, out": lambda rank: low_combine(rank, out=rank.x[1:]),
    "low combine, waits": lambda rank: low_combine(rank, combine_wait_recv_cost_stats=rank.weights),
    "low combine, copied handle": lambda rank: low_combine(
        rank, handle=(rank.low_latency_handle[0].clone(), *rank.low_latency_handle[1:])
    ),
    "low combine, handle": lambda rank: low_combine(
        rank, handle=(rank.low_latency_handle[0].long(), *rank.low_latency_handle[1:])
    ),
    "low combine, size in handle": lambda rank: low_combine(
        rank, handle=(*rank.low_latency_handle[:2], float(MOST), *rank.low_latency_handle[3:])
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calls_are_refused_as_ever(rank: Rank, name: str) -> None:
    forget(rank)
    with pytest.raises(ArgumentError) as first:
        BAD[name](rank)
    for _ in range(2):
        for usual, call in (*USUAL.items(), *((name, call) for name, (_, call) in SAME.items())):
            assert launches(rank, call)[0], usual
        with pytest.raises(ArgumentError) as later:
            BAD[name](rank)
        assert str(later.value) == str(first.value)


def test_a_handle_that_changes_in_place_is_checked_again(rank: Rank) -> None:
    for index, name in enumerate(intranode._HANDLE_NAMES):
        handle = tuple(element.clone() for element in rank.handle)  # type: ignore[union-attr]
        for _ in range(2):
            rank.buffer.dispatch(rank.x, handle)
            rank.buffer.combine(rank.y, handle)
        handle[index].unsqueeze_(0)
        for call in (
            lambda handle=handle: rank.buffer.dispatch(rank.x, handle),
            lambda handle=handle: rank.buffer.combine(rank.y, handle),
        ):
            with pytest.raises(ArgumentError, match=name):
                call()


def test_x_that_changes_in_place_is_checked_again(rank: Rank) -> None:
    x = rank.x.clone()
    rank.buffer.dispatch(x, rank.handle)
    low_dispatch(rank, x=x)
    x.resize_(TOKENS - 1, x.size(1))
    with pytest.raises(ArgumentError, match=r"^x"):
        rank.buffer.dispatch(x, rank.handle)
    with pytest.raises(ArgumentError, match=r"^topk_idx"):
        low_dispatch(rank, x=x)


@pytest.mark.parametrize("name", USUAL)
def test_what_went_wrong_before_is_raised(rank: Rank, name: str) -> None:
    call = USUAL[name]
    call(rank)
    plane: Any = rank.buffer.runtime._plane  # type: ignore[union-attr]
    plane.status.words[words.CODE.value] = words.BAD_EXPERT.value
    with pytest.raises(ArgumentError, match="topk_idx"):
        call(rank)
    assert launches(rank, call)[0]
    plane.status.failed = True
    try:
        for _ in range(2):
            with pytest.raises(BufferStateError):
                call(rank)
    finally:
        plane.status.failed = False
    assert launches(rank, call)[0]


def test_nothing_runs_on_a_buffer_that_was_destroyed() -> None:
    with rank_on_a_gpu() as rank:
        runtime = rank.buffer.runtime
        for call in USUAL.values():
            call(rank)
        rank.buffer.runtime = rank.elastic.runtime = None
        try:
            for call in USUAL.values():
                with pytest.raises(BufferStateError, match="destroyed"):
                    call(rank)
        finally:
            rank.buffer.runtime = runtime


def test_what_is_kept_is_bounded_and_holds_no_tensor(rank: Rank) -> None:
    forget(rank)
    for call in (*OTHERS.values(), *(call for _, call in SAME.values()), Rank.elastic_dispatch):
        call(rank)

    def parts(value: Any) -> Iterator[Any]:
        yield value
        inside = [getattr(value, name) for name in getattr(value, "__slots__", ())]
        for part in value if isinstance(value, (tuple, list)) else inside:
            yield from parts(part)

    for kept in all_kept(rank):
        assert 0 < len(kept) <= MOST_KEPT
        for key, value in kept.items():
            assert not any(isinstance(part, torch.Tensor) for part in (*parts(key), *parts(value)))


def combine_along(rank: Rank, handle: list[Any]) -> Any:
    return rank.buffer.combine(rank.y, handle)  # type: ignore[arg-type]


@pytest.mark.parametrize("element", range(6))
def test_handles_of_tensors_are_known_while_they_fit(rank: Rank, element: int) -> None:
    forget(rank)
    name = f"handle.{DispatchHandle._fields[element]}"
    good = [tensor.clone() for tensor in rank.tensors]
    wanted = launches(rank, lambda rank: combine_along(rank, good))
    (((guards, is_known),),) = intranode._handles.values()
    assert guards.check(*good)
    assert is_known

    def fails(other: Any, match: str = name) -> None:
        with pytest.raises(ArgumentError, match=re.escape(match)):
            combine_along(rank, [*good[:element], other, *good[element + 1 :]])

    tensor = good[element]
    nested = torch.nested.nested_tensor([tensor.flatten()[:1]] * 2, dtype=torch.float32)
    for other in (
        tensor.to(torch.int64),
        tensor.to("meta"),
        tensor[None],
        tensor.to_sparse(),
        nested,
        None,
        "tensor",
    ):
        fails(other)
    if element in (0, 4, 5):
        fails(tensor[:, 1:])
        fails(tensor[1:], name if element != 4 else "handle.send_head")
        transposed = [*good[:element], columns(tensor), *good[element + 1 :]]
        assert launches(rank, lambda rank: combine_along(rank, transposed)) == wanted
    tensor.resize_(*tensor.shape, 1)
    fails(tensor)
    tensor.resize_(rank.tensors[element].shape)
    assert launches(rank, lambda rank: combine_along(rank, good)) == wanted
    assert list(intranode._handles.values()) == [[(guards, True)]]


@pytest.mark.parametrize("num_rows", [0, 1])
def test_few_rows_do_not_tell_how_many_lie(rank: Rank, num_rows: int) -> None:
    """Columns of a wider table are contiguous while they have a row at most; of more they are to be copied."""
    forget(rank)
    assert rank.handle is not None
    table = torch.stack([rank.handle.recv_src_idx] * 2, 1)
    assert table[:num_rows, 0].is_contiguous()
    party: Any = rank.buffer.runtime.party()  # type: ignore[union-attr]
    for count in (num_rows, ROWS):
        given = [*rank.tensors[:3], table[:count, 0], *rank.tensors[4:]]
        found = intranode.check_handle(party, given).recv_src_idx
        assert found.is_contiguous()
        assert torch.equal(found, rank.handle.recv_src_idx[:count])
    assert not intranode._handles


def test_of_handles_that_differ_the_last_are_known(rank: Rank) -> None:
    forget(rank)
    party: Any = rank.buffer.runtime.party()  # type: ignore[union-attr]

    def with_channels(one: torch.Tensor, other: torch.Tensor) -> list[torch.Tensor]:
        given = [rank.tensors[0], one, other, *rank.tensors[3:]]
        intranode.check_handle(party, given)
        return given

    same = torch.zeros(RANKS, 1, dtype=torch.int32)
    with_channels(same, same)
    assert not intranode._handles, "guards do not take the same tensor twice"
    for num_channels in range(1, 2 * _MOST_GUARDS):
        last = with_channels(*torch.zeros(2, RANKS, num_channels, dtype=torch.int32).unbind())
    (known,) = intranode._handles.values()
    assert len(known) == _MOST_GUARDS
    assert [guards.check(*last) for guards, _ in known] == [True] + [False] * (_MOST_GUARDS - 1)


def test_handles_are_known_in_inference_mode(rank: Rank) -> None:
    forget(rank)
    for modes in range(1, 7):
        with torch.inference_mode(modes > 1):
            combine_along(rank, rank.tensors)
        (known,) = intranode._handles.values()
        assert len(known) == min(modes, 2)


def test_only_operators_ask_for_zeros_past_the_last_row(rank: Rank) -> None:
    plain, asked = (
        [part for (line,) in [launches(rank, call)[0]] for part in line]
        for call in (Rank.cached_dispatch, Rank.ops_cached_dispatch)
    )
    assert [pair for pair in zip(plain, asked, strict=True) if pair[0] != pair[1]] == [(0, 1)]


def test_combines_of_other_numbers_of_rows_are_not_prepared_anew(rank: Rank) -> None:
    """As routing changes from step to step."""
    plane: Any = rank.buffer.runtime._plane  # type: ignore[union-attr]
    forget(rank)
    for count in (ROWS, 5, 1, 0, 4):
        combine_rows(rank, count)
        assert len(intranode._combines) == len(plane._calls) == 1


def test_kept_forgets_everything_when_it_is_full() -> None:
    kept: Kept[int] = Kept()
    for number in range(3 * MOST_KEPT + 5):
        assert kept.keep((number,), number) == number
        assert kept.get((number,)) == number
        assert len(kept) <= MOST_KEPT
    assert kept.keep((1, None), 7) == 7
    assert (1, None) not in kept


def test_calls_are_found_by_all_that_checks_look_at() -> None:
    x, ids = torch.zeros(4, 6), torch.zeros(4, 2, dtype=torch.int64)
    known: Known[str] = Known()
    assert known.find((1,), x, ids) is None
    assert known.add((1,), "usual", x, ids) == "usual"
    assert known.find((1,), x, ids) == known.find((1,), x + 1, ids + 1) == "usual"
    assert known.find((2,), x, ids) is None
    nested = [torch.nested.nested_tensor([x, x[:2]], layout=layout) for layout in (torch.strided, torch.jagged)]
    others: list[Any] = [x.double(), x[:, :3], x[:3], x[None], columns(x), x.to("meta"), x.to_sparse(), *nested]
    others += [x.clone().requires_grad_(), torch.nn.Parameter(x), torch.zeros(4, 7)[:, :6], x.tolist(), None, 3]
    for other in others:
        assert known.find((1,), other, ids) is None
        assert known.find((1,), x, other) is None
    known.add((1,), "columns", columns(x), ids)
    assert known.find((1,), columns(x), ids) == "columns"
    for few in (x[:1], x[:0]):
        known.add((1,), "few", few, ids)
        assert known.find((1,), torch.zeros(4, 12)[: len(few), :6], ids) == "few"
    for number in range(9):
        known.add((1,), str(number), x, ids.new_zeros(4, 3 + number))
    assert known.find((1,), x, ids) is None, "of those of one shape the last four are known"
    assert len(known) == 3
    for never in (nested[0], torch.nn.Parameter(x), x.to_sparse()):
        known.add((3,), "never", never, ids)
    known.add((None,), "never", x, ids)
    assert len(known) == 3


def test_kinds() -> None:
    x = torch.zeros(4, 6)
    others = [x.double(), x[:, :3], x.t(), x.flatten(), x.to("meta"), columns(x), x.view(2, 12)]
    assert kind_of(x) == kind_of(torch.ones(4, 6)) is not None
    assert len({kind_of(x), *map(kind_of, others)}) == len(others) + 1
    nested = torch.nested.nested_tensor([x, x[:2]])
    for value in (None, 3, [x], x.to_sparse(), nested, torch.nn.Parameter(x)):
        assert kind_of(value) is None


ROWS_OF_TOKENS = ("x", "is_token_in_rank", "topk_idx", "topk_weights")


@pytest.mark.parametrize("name", ROWS_OF_TOKENS)
def test_numbers_of_rows_must_fit_in_calls_that_are_known(rank: Rank, name: str) -> None:
    per_rank, _, per_expert, member, _ = rank.layout
    tensors = dict(zip(ROWS_OF_TOKENS, (rank.x, member, rank.ids, rank.weights), strict=True))

    def dispatch(**tensors: torch.Tensor) -> Any:
        counts = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert}
        return rank.buffer.dispatch(**tensors, **counts, num_worst_tokens=ROWS)  # type: ignore[arg-type, call-overload]

    fewer = {name: tensor[:-1] for name, tensor in tensors.items()}
    for known in (tensors, fewer, tensors):
        dispatch(**known)
    for some in (tensors | {name: fewer[name]}, fewer | {name: tensors[name]}):
        with pytest.raises(ArgumentError, match="is_token_in_rank" if name == "x" else name):
            dispatch(**some)


@pytest.mark.parametrize("name", ["x", "topk_idx", "topk_weights"])
def test_numbers_of_rows_must_fit_in_elastic_calls_that_are_known(rank: Rank, name: str) -> None:
    tensors = {"x": rank.x, "topk_idx": rank.ids, "topk_weights": rank.weights}
    fewer = {name: tensor[:-1] for name, tensor in tensors.items()}

    def dispatch(most: int, **tensors: torch.Tensor) -> Any:
        return rank.elastic.dispatch(
            **tensors, num_experts=EXPERTS, num_max_tokens_per_rank=most, do_cpu_sync=False, do_expand=True
        )

    for known in (tensors, fewer, tensors):
        dispatch(TOKENS, **known)
    for some in (tensors | {name: fewer[name]}, fewer | {name: tensors[name]}):
        with pytest.raises(ArgumentError, match="topk_idx" if name == "x" else name):
            dispatch(TOKENS, **some)
    dispatch(TOKENS - 1, **fewer)
    with pytest.raises(ArgumentError, match="num_max_tokens_per_rank"):
        dispatch(TOKENS - 1, **tensors)


def test_kinds_of_calls_in_turn_are_all_known(rank: Rank) -> None:
    """Widths, dtypes, and what torch makes of tensors: more at a time than are kept of any one."""
    forget(rank)
    widths, dtypes = (64, 128, 256, 512), (torch.bfloat16, torch.float16, torch.float32)
    rows = [rank.x[:, :width].to(dtype) for width in widths for dtype in dtypes]
    with mock.patch.object(inputs, "_check_inputs", side_effect=inputs._check_inputs) as checks:
        for _ in range(3):
            for x in rows:
                dispatch(rank, x=x)
    assert checks.call_count == len(rows)


def test_a_row_of_a_wider_tensor_is_known(rank: Rank) -> None:
    forget(rank)
    hidden = torch.stack([rank.x[:1]] * 2, 1)
    one = {"ids": rank.ids[:1], "topk_weights": rank.weights[:1], "is_token_in_rank": rank.layout[3][:1]}
    with mock.patch.object(inputs, "_check_inputs", side_effect=inputs._check_inputs) as checks:
        wanted = launches(rank, lambda rank: dispatch(rank, x=rank.x[:1], **one))
        for _ in range(3):
            assert launches(rank, lambda rank: dispatch(rank, x=hidden[:, 0], **one)) == wanted
        for room in range(ROWS, ROWS + 3):
            dispatch(rank, num_worst_tokens=room)
    assert checks.call_count <= 3


def test_tensors_that_are_known_are_packed_too(rank: Rank) -> None:
    forget(rank)
    per_rank, _, per_expert, member, _ = rank.layout
    party: Any = rank.buffer.runtime.party()  # type: ignore[union-attr]
    weights, scales = torch.rand(TOKENS, 8), torch.rand(TOKENS, 4)
    data = torch.randint(0, 256, (TOKENS, 64), dtype=torch.uint8)
    with mock.patch.object(inputs, "_check_inputs", side_effect=inputs._check_inputs) as checks:
        for _ in range(2):
            given = inputs.check_inputs(
                party,
                (columns(data), columns(scales)),
                per_rank,
                member,
                per_expert,
                rank.ids,
                columns(weights),
                1,
                0,
            )
            for found, wanted in zip((*given.rows, given.topk_weights), (data, scales, weights), strict=True):
                assert found is not None
                assert found.is_contiguous()
                assert torch.equal(found, wanted)
    assert checks.call_count == 1


@pytest.mark.parametrize("name", ["is_token_in_rank", "topk_idx"])
def test_what_must_be_contiguous_is_refused_behind_a_single_row(rank: Rank, name: str) -> None:
    """A row of a wider tensor is contiguous, whatever its strides; what lies like that and has more rows is not."""
    forget(rank)
    per_rank, _, per_expert, member, _ = rank.layout
    counts = {"num_tokens_per_rank": per_rank, "num_tokens_per_expert": per_expert}
    tensors = {"x": rank.x, "is_token_in_rank": member, "topk_idx": rank.ids, "topk_weights": rank.weights}
    tensors[name] = torch.stack([tensors[name]] * 2, 1)[:, 0]
    assert tensors[name][:1].is_contiguous()
    for _ in range(2):
        one = {name: tensor[:1] for name, tensor in tensors.items()}
        rank.buffer.dispatch(**one, **counts, num_worst_tokens=ROWS)  # type: ignore[arg-type, call-overload]
        with pytest.raises(ArgumentError, match=name):
            rank.buffer.dispatch(**tensors, **counts, num_worst_tokens=ROWS)  # type: ignore[arg-type, call-overload]


def test_elastic_ids_that_must_be_contiguous(rank: Rank) -> None:
    forget(rank)
    ids = torch.stack([rank.ids] * 2, 1)[:, 0]
    for _ in range(2):
        elastic(rank, x=rank.x[:1], topk_idx=ids[:1], topk_weights=rank.weights[:1])
        with pytest.raises(ArgumentError, match="topk_idx"):
            elastic(rank, topk_idx=ids)
