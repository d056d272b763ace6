"""The operations of ElasticBuffer, and EPHandle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.cases import same
from tests.compatibility.rows import (
    ELASTIC_CASE,
    IGNORED,
    NOT_ON_CPU,
    WORKS,
    At,
    Check,
    add,
    forks,
    refused,
    tries,
)
from tests.elastic_cases import Elastic
from tests.test_events import CountingEvent
from tokenferry import (
    ArgumentError,
    EPHandle,
    EventHandle,
    EventOverlap,
)

SEND, SUM = "dispatch", "combine"


def send(at: At, expand: bool = False, **options: Any) -> tuple[Any, ...]:
    return at.elastic_scenario(expand=expand).dispatch(at.elastic, **options)


def _both(check: Callable[[At, Elastic, tuple[Any, ...]], None]) -> Check:
    """Of a compact and of an expanded dispatch."""

    def both(at: At) -> str:
        for expand in (False, True):
            elastic = at.elastic_scenario(expand=expand)
            check(at, elastic, elastic.dispatch(at.elastic))
        return WORKS

    return both


_effect = "rows by (source rank, source token), or by expert; scales of any strides"
add("ElasticBuffer", SEND, "x", "bfloat16", _effect, _both(lambda at, elastic, got: elastic.check_rows(got[0])))
_effect = "local ids or -1, or the order of expanded rows"
add("ElasticBuffer", SEND, "topk_idx", "ids", _effect, _both(lambda at, elastic, got: elastic.check_handle(got[3])))
_check = _both(lambda at, elastic, got: elastic.check_weights(got[2], got[1]))
add("ElasticBuffer", SEND, "topk_weights", "float32 [T, K]", "travel with the rows; [X] expanded", _check)


@tries(
    "ElasticBuffer",
    SEND,
    "cumulative_local_expert_recv_stats",
    "int32 [L]",
    "pairs of each local expert are added to it",
)
def _(at: At) -> str:
    stats = torch.full((4,), 100, dtype=torch.int32)
    handle = send(at, cumulative_local_expert_recv_stats=stats)[3]
    assert torch.equal(stats, handle.num_unaligned_recv_tokens_per_expert + 100)
    return WORKS


@tries(
    "ElasticBuffer",
    SEND,
    "num_experts",
    "16 instead of 8",
    "shared out among the ranks in blocks; needed without a handle",
)
def _(at: At) -> str:
    assert len(send(at, num_experts=16)[3].num_recv_tokens_per_expert_list) == 8
    with pytest.raises(ArgumentError, match=r"^num_experts"):
        send(at, num_experts=None)
    return WORKS


@tries(
    "ElasticBuffer",
    SEND,
    "num_max_tokens_per_rank",
    "11",
    "size of outputs without CPU sync; also above the buffer's",
)
def _(at: At) -> str:
    for most in (11, 50):
        assert len(send(at, num_max_tokens_per_rank=most, do_cpu_sync=False)[0]) == at.num_ranks * most
    return WORKS


@tries("ElasticBuffer", SEND, "expert_alignment", "16", "rounds up the list and the beginnings of experts")
def _(at: At) -> str:
    elastic = Elastic(replace(ELASTIC_CASE, alignment=16), at.rank, at.num_ranks, expand=True)
    got = elastic.dispatch(at.elastic)
    elastic.check_rows(got[0])
    elastic.check_handle(got[3])
    return WORKS


@tries("ElasticBuffer", SEND, "num_sms", "12", "kept in the handle; results are the same")
def _(at: At) -> str:
    got = send(at, num_sms=12)
    assert got[3].num_sms == 12
    at.elastic_scenario(expand=False).check_rows(got[0])
    return NOT_ON_CPU


@tries("ElasticBuffer", SEND, "num_qps", "7", "there are no queue pairs")
def _(at: At) -> str:
    at.elastic_scenario(expand=False).check_rows(send(at, num_qps=7)[0])
    return IGNORED


@tries("ElasticBuffer", SEND, "handle", "of an earlier dispatch", "the same ways again, without new counts")
def _(at: At) -> str:
    for expand in (False, True):
        elastic = at.elastic_scenario(expand=expand)
        handle = elastic.dispatch(at.elastic)[3]
        again = at.elastic.dispatch(elastic.x, topk_weights=elastic.given.topk_weights, handle=handle)
        elastic.check_rows(again[0])
        assert again[3] is handle
    return WORKS


@tries("ElasticBuffer", SEND, "do_handle_copy", "False", "the handle has the ids themselves, not a copy")
def _(at: At) -> str:
    elastic = at.elastic_scenario(expand=False)
    assert elastic.dispatch(at.elastic, do_handle_copy=False)[3].topk_idx is elastic.given.topk_idx
    assert elastic.dispatch(at.elastic)[3].topk_idx is not elastic.given.topk_idx
    return WORKS


@tries("ElasticBuffer", SEND, "do_cpu_sync", "False", "outputs as large as they could be, the list empty")
def _(at: At) -> str:
    for expand in (False, True):
        elastic = Elastic(ELASTIC_CASE, at.rank, at.num_ranks, expand=expand, cpu_sync=False)
        got = elastic.dispatch(at.elastic)
        elastic.check_rows(got[0])
        elastic.check_handle(got[3])
        assert got[3].num_recv_tokens_per_expert_list == []
    return WORKS


@tries("ElasticBuffer", SEND, "do_expand", "True", "a row for each (token, choice), expert by expert; ids None")
def _(at: At) -> str:
    elastic = at.elastic_scenario(expand=True)
    got = elastic.dispatch(at.elastic)
    elastic.check_rows(got[0])
    elastic.check_weights(got[2], got[1])
    return WORKS


@tries("ElasticBuffer", SEND, "do_zero_padding", "True", "rows that only align the experts are 0")
def _(at: At) -> str:
    elastic = at.elastic_scenario(expand=True)
    got = elastic.dispatch(at.elastic, do_zero_padding=True)
    elastic.check_rows(got[0], padded=True)
    elastic.check_rows(at.elastic.dispatch(elastic.x, handle=got[3], do_zero_padding=True)[0], padded=True)
    return WORKS


@tries(
    "ElasticBuffer",
    SEND,
    "use_tma_aligned_col_major_sf",
    "True",
    "scales column by column, each beginning on 16 bytes",
)
def _(at: At) -> str:
    case = replace(ELASTIC_CASE, dtype=torch.float8_e4m3fn, scales=torch.float32, scale_columns=3)
    elastic = Elastic(case, at.rank, at.num_ranks, expand=True)
    elastic.check_rows(elastic.dispatch(at.elastic)[0])
    got = elastic.dispatch(at.elastic, use_tma_aligned_col_major_sf=True)
    elastic.check_rows(got[0], column_major=True)
    return WORKS


@tries("ElasticBuffer", SEND, "use_nvfp4", "True", "known to frameworks, not built; False is accepted")
def _(at: At) -> str:
    send(at, use_nvfp4=False)
    return refused("use_nvfp4", lambda: send(at, use_nvfp4=True))


FORKS = ["overlap", "num_worst_tokens", "x_global_scale", "config"]
forks("ElasticBuffer", SEND, FORKS, lambda at, options: send(at, **options))

# combine


def add_up(at: At, **options: Any) -> tuple[Any, ...]:
    recv_x, _, _, handle, _ = send(at)
    return at.elastic.combine(**({"x": recv_x, "handle": handle} | options))


_effect = "summed over copies and ranks; also fewer rows, if all that came are there"
_check = _both(lambda at, elastic, got: elastic.check_combine(at.elastic, got[3], len(got[0]), weights=False))
add("ElasticBuffer", SUM, "x", "bfloat16", _effect, _check)
_check = _both(lambda at, elastic, got: elastic.check_combine(at.elastic, got[3], len(got[0])))
add("ElasticBuffer", SUM, "topk_weights", "float32 [M, K] or [X]", "summed the same way; None without", _check)


def _handle(at: At, elastic: Elastic, got: tuple[Any, ...]) -> None:
    for _ in range(2):
        elastic.check_combine(at.elastic, got[3], len(got[0]))
    with pytest.raises(ArgumentError, match=r"^handle: got tuple"):
        at.elastic.combine(got[0], tuple(got[3].routes))  # type: ignore[arg-type]


add("ElasticBuffer", SUM, "handle", "of a dispatch, twice", "used any number of times", _both(_handle))


@tries("ElasticBuffer", SUM, "bias", "a tensor, a pair", "added first")
def _(at: At) -> str:
    recv_x, _, _, handle, _ = send(at)
    ones = torch.ones_like(at.elastic_scenario(expand=False).x)
    for bias, value in ((None, 0.0), (ones, 1.0), ((ones, 2 * ones), 3.0)):
        assert (at.elastic.combine(torch.zeros_like(recv_x), handle, bias=bias)[0] == value).all()
    return WORKS


def _same_sum(name: str, value: int, status: str) -> Check:
    def check(at: At) -> str:
        same(add_up(at, **{name: value})[0], add_up(at)[0], "combined_x")
        return status

    return check


add("ElasticBuffer", SUM, "num_sms", "12", "results are the same", _same_sum("num_sms", 12, NOT_ON_CPU))
add("ElasticBuffer", SUM, "num_qps", "7", "there are no queue pairs", _same_sum("num_qps", 7, IGNORED))


def _events(call: Callable[..., tuple[Any, ...]], name: str) -> Check:
    def check(at: At) -> str:
        for wrap in (lambda event: event, EventOverlap):
            counting = CountingEvent()
            call(at, **{name: wrap(counting)})
            assert counting.log == ["wait"]
        call(at, **{name: EventOverlap(None)})
        with pytest.raises(ArgumentError, match=rf"^{name}"):
            call(at, **{name: 3})
        return WORKS

    return check


def _async(call: Callable[..., tuple[Any, ...]]) -> Check:
    def check(at: At) -> str:
        assert call(at)[-1].event is None
        event = call(at, async_with_compute_stream=True)[-1]
        assert isinstance(event.event, EventHandle)
        event.current_stream_wait()
        return WORKS

    return check


def _allocate(call: Callable[..., tuple[Any, ...]]) -> Check:
    def check(at: At) -> str:
        result = call(at, allocate_on_comm_stream=True)
        same(result[0], call(at)[0], "x")
        return NOT_ON_CPU

    return check


for _method, _call in ((SEND, send), (SUM, add_up)):
    _kinds = "`EventHandle`, `EventOverlap`, an empty one"
    add("ElasticBuffer", _method, "previous_event", _kinds, "waited for, once", _events(_call, "previous_event"))
    _name = "previous_event_before_epilogue"
    add("ElasticBuffer", _method, _name, _kinds, "waited for at the beginning, once", _events(_call, _name))
    _effect = "an event is returned; `.event` is None without"
    add("ElasticBuffer", _method, "async_with_compute_stream", "True", _effect, _async(_call))
    _effect = "outputs come from that stream's memory"
    add("ElasticBuffer", _method, "allocate_on_comm_stream", "True", _effect, _allocate(_call))
forks("ElasticBuffer", SUM, ["config", "out"], lambda at, options: add_up(at, **options))

# EPHandle

FIELDS = {
    "do_expand": "rows expert by expert",
    "num_experts": "of all ranks",
    "expert_alignment": "of the dispatch",
    "num_max_tokens_per_rank": "of the dispatch",
    "num_sms": "of the dispatch",
    "topk_idx": "int64 [T, K]",
    "num_recv_tokens": "M",
    "num_expanded_tokens": "X",
    "num_recv_tokens_per_expert_list": "L ints, also where nothing came; empty without CPU sync",
    "psum_num_recv_tokens_per_scaleup_rank": "int32 [R]",
    "psum_num_recv_tokens_per_expert": "int32 [L]",
    "num_unaligned_recv_tokens_per_expert": "int32 [L]",
    "recv_src_metadata": "int32 [M, K + 2]; combine reads the copies from it",
    "token_metadata_at_forward": "None",
    "channel_linked_list": "None",
    "dst_buffer_slot_idx": "int32 [T, K]",
    "routes": "the tensors of an intranode dispatch (not in DeepEP)",
}


def _field(name: str) -> Check:
    def check(at: At) -> str:
        elastic = at.elastic_scenario(expand=True)
        recv_x, _, _, handle, _ = elastic.dispatch(at.elastic)
        assert isinstance(handle, EPHandle)
        assert {field for field in vars(handle) if not field.startswith("_")} == set(FIELDS) - {"dst_buffer_slot_idx"}
        kept = getattr(handle, name)
        setattr(handle, name, None)
        assert name == "dst_buffer_slot_idx" or getattr(handle, name) is None
        setattr(handle, name, kept)
        elastic.check_handle(handle)
        assert (kept is None) == (name in ("token_metadata_at_forward", "channel_linked_list"))
        elastic.check_combine(at.elastic, handle, len(recv_x))
        return WORKS

    return check


for _name, _effect in FIELDS.items():
    add("EPHandle", f".{_name}", "", "taken away, put back", _effect, _field(_name))
