"""get_dispatch_layout, dispatch, combine, and their internode twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cases import Scenario, same
from tests.compatibility.rows import CASE, NOT_ON_CPU, WORKS, At, Check, add, forks, tries
from tests.test_events import CountingEvent
from tokenferry import ArgumentError, Buffer, Config, EventHandle, EventOverlap

Call = Callable[..., Any]
"""(At, **options) -> what a method returns; the event is last."""


def layout(at: At, **options: Any) -> Any:
    return at.buffer.get_dispatch_layout(at.scenario.given.topk_idx, at.scenario.num_experts, **options)


@tries(
    "Buffer", "get_dispatch_layout", "topk_idx", "duplicates, -1", "counts for ranks and experts, and who goes where"
)
def _(at: At) -> str:
    ids = torch.tensor([[0, 0, 5], [-1, -1, -1], [4, 3, -1]])
    per_rank, per_node, per_expert, member, _ = at.buffer.get_dispatch_layout(ids, 6)
    assert (per_rank.tolist(), per_node, per_expert.tolist()) == ([1, 2], None, [2, 0, 0, 1, 1, 1])
    assert member.tolist() == [[True, True], [False, False], [False, True]]
    assert at.nodes.get_dispatch_layout(ids, 6)[1].tolist() == [1, 2]  # type: ignore[union-attr]
    with pytest.raises(ArgumentError, match=r"^topk_idx: got .*int32"):
        at.buffer.get_dispatch_layout(ids.int(), 6)
    return WORKS


@tries("Buffer", "get_dispatch_layout", "num_experts", "8 and 16", "shared out among the ranks in blocks")
def _(at: At) -> str:
    ids = torch.tensor([[5]])
    assert at.buffer.get_dispatch_layout(ids, 8)[3].tolist() == [[False, True]]
    assert at.buffer.get_dispatch_layout(ids, 16)[3].tolist() == [[True, False]]
    return WORKS


# The event arguments, of every method that has them.


def _previous_event(call: Call) -> Check:
    def check(at: At) -> str:
        counting = CountingEvent()
        call(at, previous_event=EventOverlap(counting))
        assert counting.log == ["wait"]
        for previous in (None, EventOverlap(), Buffer.capture()):
            call(at, previous_event=previous)
        with pytest.raises(ArgumentError, match=r"^previous_event"):
            call(at, previous_event="now")
        return WORKS

    return check


def _async_finish(call: Call) -> Check:
    def check(at: At) -> str:
        assert call(at)[-1].event is None
        event = call(at, async_finish=True)[-1]
        assert isinstance(event.event, EventHandle)
        event.current_stream_wait()
        return WORKS

    return check


def _allocate(call: Call) -> Check:
    def check(at: At) -> str:
        rest: dict[str, Any] = {"async_finish": True, "allocate_on_comm_stream": True}
        assert call(at, previous_event=Buffer.capture(), **rest)[-1].event is not None
        for wrong in (rest, {**rest, "async_finish": False, "previous_event": Buffer.capture()}):
            with pytest.raises(ArgumentError, match=r"^allocate_on_comm_stream"):
                call(at, **wrong)
        return NOT_ON_CPU

    return check


def add_events(method: str, call: Call) -> None:
    kinds = "`EventOverlap`, an empty one, None"
    add("Buffer", method, "previous_event", kinds, "waited for, once", _previous_event(call))
    add(
        "Buffer",
        method,
        "async_finish",
        "True",
        "an event is returned; `.event` is None without",
        _async_finish(call),
    )
    rule = "wants `previous_event` with an event, and `async_finish`, else `ArgumentError`"
    add("Buffer", method, "allocate_on_comm_stream", "True", rule, _allocate(call))


add_events("get_dispatch_layout", layout)

# dispatch, under both names.


class Twin:
    """A method and how it is called: ``internode_dispatch`` and its combine want a config."""

    def __init__(self, prefix: str) -> None:
        self.rest = {"config": Config()} if prefix else {}
        self.dispatch, self.combine = prefix + "dispatch", prefix + "combine"

    def send(self, at: At, x: Any = None, **options: Any) -> Any:
        """A dispatch of the scenario, with some arguments changed."""
        given = at.scenario.layout_arguments(at.buffer) | at.scenario.topk_arguments() | self.rest
        return getattr(at.buffer, self.dispatch)(at.scenario.x if x is None else x, **(given | options))

    def reuse(self, at: At, **options: Any) -> Any:
        return getattr(at.buffer, self.dispatch)(at.scenario.x, at.dispatched[4], **(self.rest | options))

    def sum(self, at: At, rows: Any = None, **options: Any) -> Any:
        rows = at.scenario.own_rows if rows is None else rows
        return getattr(at.buffer, self.combine)(rows, **({"handle": at.dispatched[4]} | self.rest | options))


def _x(twin: Twin, at: At) -> None:
    at.scenario.check_dispatch(twin.send(at))
    fp8 = Scenario(
        CASE.__class__(tokens=(9, 6), dtype=torch.float8_e4m3fn, scales=torch.int32, scale_columns=2,
                       scale_layout="columns", num_topk=4, local_experts=3),
        at.rank, at.num_ranks,
    )  # fmt: skip
    given = fp8.layout_arguments(at.buffer) | fp8.topk_arguments() | twin.rest
    fp8.check_dispatch(getattr(at.buffer, twin.dispatch)(fp8.x, **given))


def _handle(twin: Twin, at: At) -> None:
    at.scenario.check_cached(twin.reuse(at))


def _refuses(name: str, change: Callable[[Any], Any]) -> Callable[[Twin, At], None]:
    def check(twin: Twin, at: At) -> None:
        right = at.scenario.layout_arguments(at.buffer)[name]
        for wrong in (None, change(right)):
            with pytest.raises(ArgumentError, match=rf"^{name}"):
                twin.send(at, **{name: wrong})
        at.scenario.check_dispatch(twin.send(at, **{name: right.clone()}))

    return check


def _per_node(twin: Twin, at: At) -> None:
    at.scenario.check_dispatch(twin.send(at, num_tokens_per_rdma_rank=torch.zeros(7)))  # inside a node
    given = at.scenario.layout_arguments(at.nodes) | at.scenario.topk_arguments() | twin.rest
    method = getattr(at.nodes, twin.dispatch)
    with pytest.raises(ArgumentError, match=r"^num_tokens_per_rdma_rank"):
        method(at.scenario.x, **(given | {"num_tokens_per_rdma_rank": None}))
    at.scenario.check_rows(method(at.scenario.x, **given)[0])


def _per_expert(twin: Twin, at: At) -> None:
    everyone, nobody = torch.full((6,), 2, dtype=torch.int32), {"topk_idx": None, "topk_weights": None}
    assert twin.send(at, num_tokens_per_expert=everyone, **nobody)[3] == [4, 4, 4]
    with pytest.raises(ArgumentError, match=r"^num_tokens_per_expert"):
        twin.send(at, num_tokens_per_expert=everyone.long())


def _topk_idx(twin: Twin, at: At) -> None:
    ids = twin.send(at)[1]
    same(ids, at.scenario.wanted.topk_idx, "recv_topk_idx")
    assert twin.send(at, topk_idx=None, topk_weights=None)[1] is None


def _topk_weights(twin: Twin, at: At) -> None:
    weights = at.scenario.given.topk_weights * -2
    wanted = at.scenario.wanted.topk_weights * -2
    same(twin.send(at, topk_weights=weights)[2], wanted + 0.0, "recv_topk_weights")


def _alignment(twin: Twin, at: At) -> None:
    plain, aligned = twin.send(at), twin.send(at, expert_alignment=8)
    assert aligned[3] == [-(-count // 8) * 8 for count in plain[3]] != plain[3]
    assert torch.equal(aligned[0].view(torch.uint8), plain[0].view(torch.uint8))


def _worst(twin: Twin, at: At) -> None:
    total = at.scenario.num_rows[at.rank] + 5
    at.scenario.check_dispatch(twin.send(at, num_worst_tokens=total), num_worst_tokens=total)


def _config(twin: Twin, at: At) -> None:
    for config in (Config(24, 8, 256), Buffer.get_dispatch_config(16)):
        at.scenario.check_dispatch(twin.send(at, config=config))
    with pytest.raises(ArgumentError, match=r"^config\.num_sms"):
        twin.send(at, config=Config(21))
    if twin.rest:
        with pytest.raises(ArgumentError, match=r"^config"):
            twin.send(at, config=None)


DISPATCH: dict[str, tuple[str, str, Callable[[Twin, At], None]]] = {
    "x": ("bfloat16; FP8 with scales", "rows by (source rank, source token); scales of any strides", _x),
    "handle": ("of an earlier dispatch", "the same ways again; None in slots 1 to 4", _handle),
    "num_tokens_per_rank": (
        "of the layout; wrong ones",
        "must be the counts of `is_token_in_rank`",
        _refuses("num_tokens_per_rank", lambda given: given + 1),
    ),
    "num_tokens_per_rdma_rank": ("of the layout; None", "wanted between nodes, not looked at inside one", _per_node),
    "is_token_in_rank": (
        "of the layout; wrong ones",
        "who goes where; bool [T, R]",
        _refuses("is_token_in_rank", lambda given: given.int()),
    ),
    "num_tokens_per_expert": ("without top-k", "the list is their sum over ranks", _per_expert),
    "topk_idx": ("ids; None", "local ids or -1; None", _topk_idx),
    "topk_weights": ("negative ones", "travel with the ids; 0 where the id is -1", _topk_weights),
    "expert_alignment": ("8", "rounds up the list, and nothing else", _alignment),
    "num_worst_tokens": ("5 more than come", "so many rows, an empty list, -1 in the tail", _worst),
}
CONFIG = ("presets, `Config(24, 8, 256)`", "results are the same; odd `num_sms` is an `ArgumentError`")


# combine


def _rows(twin: Twin, at: At) -> None:
    combined = twin.sum(at, bias=at.scenario.bias)[0]
    same(combined, at.scenario.wanted_combined, "combined_x")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        ones = torch.ones(at.scenario.num_rows[at.rank], 8, dtype=dtype)
        wanted = at.dispatched[4].is_token_in_rank.sum(1, keepdim=True).expand(-1, 8).to(dtype)
        same(twin.sum(at, ones)[0], wanted.contiguous(), "combined_x")


def _combine_handle(twin: Twin, at: At) -> None:
    rebuilt = tuple(element.clone() for element in at.dispatched[4])
    for _ in range(2):
        same(twin.sum(at, bias=at.scenario.bias, handle=rebuilt)[0], at.scenario.wanted_combined, "combined_x")


def _combine_weights(twin: Twin, at: At) -> None:
    assert twin.sum(at)[1] is None
    same(twin.sum(at, topk_weights=at.scenario.own_weights)[1], at.scenario.wanted_weights, "combined_topk_weights")


def _bias(twin: Twin, at: At) -> None:
    rows, ones = torch.zeros_like(at.scenario.own_rows), torch.ones_like(at.scenario.biases[0])
    for bias, value in ((None, 0.0), (ones, 1.0), ((ones, 2 * ones), 3.0), ((None, ones), 1.0)):
        assert (twin.sum(at, rows, bias=bias)[0] == value).all()


def _combine_config(twin: Twin, at: At) -> None:
    for config in (Config(24, 8, 256), Buffer.get_combine_config(16)):
        combined = twin.sum(at, bias=at.scenario.bias, config=config)[0]
        same(combined, at.scenario.wanted_combined, "combined_x")
    with pytest.raises(ArgumentError, match=r"^config\.num_sms"):
        twin.sum(at, config=Config(21))
    if twin.rest:
        with pytest.raises(ArgumentError, match=r"^config"):
            twin.sum(at, config=None)


COMBINE: dict[str, tuple[str, str, Callable[[Twin, At], None]]] = {
    "x": ("bfloat16, float16, float32, float64", "summed over ranks in their order, one rounding", _rows),
    "handle": ("a tuple of clones, twice", "any six tensors that are equal; never changed", _combine_handle),
    "topk_weights": ("float32 [M, K]", "summed the same way; None without", _combine_weights),
    "bias": ("a tensor, a pair, None in a pair", "added first", _bias),
}


def _bound(check: Callable[[Twin, At], None], twin: Twin, status: str) -> Check:
    def bound(at: At) -> str:
        check(twin, at)
        return status

    return bound


for _twin in (Twin(""), Twin("internode_")):
    for _name, (_tried, _effect, _check) in DISPATCH.items():
        add("Buffer", _twin.dispatch, _name, _tried, _effect, _bound(_check, _twin, WORKS))
    add("Buffer", _twin.dispatch, "config", *CONFIG, _bound(_config, _twin, NOT_ON_CPU))
    add_events(_twin.dispatch, _twin.send)
    for _name, (_tried, _effect, _check) in COMBINE.items():
        add("Buffer", _twin.combine, _name, _tried, _effect, _bound(_check, _twin, WORKS))
    add("Buffer", _twin.combine, "config", *CONFIG, _bound(_combine_config, _twin, NOT_ON_CPU))
    add_events(_twin.combine, _twin.sum)
forks("Buffer", "dispatch", ["quant_mode"], lambda at, options: Twin("").send(at, **options))
