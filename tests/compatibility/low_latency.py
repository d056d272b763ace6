"""The low-latency methods of Buffer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.compatibility.rows import (
    IGNORED,
    QUICK_CASE,
    WORKS,
    At,
    Check,
    add,
    forks,
    refused,
    tries,
)
from tests.low_latency_cases import Scenario as QuickScenario
from tokenferry import ArgumentError, Buffer, EventHandle

SEND, SUM = "low_latency_dispatch", "low_latency_combine"


def send(at: At, **options: Any) -> tuple[Any, ...]:
    return at.quick_scenario.dispatch(at.quick, **options)


def combine(at: At, **options: Any) -> tuple[Any, ...]:
    return at.quick_scenario.combine(at.quick, at.quick_dispatched, **options)


@tries(
    "Buffer", SEND, "x", "bfloat16 [T, H]; no rows", "slabs of local experts, ordered by (source rank, token, choice)"
)
def _(at: At) -> str:
    at.quick_scenario.check_dispatch(send(at))
    idle = QuickScenario(replace(QUICK_CASE, tokens=(0, 3)), at.rank, at.num_ranks)
    idle.check_dispatch(idle.dispatch(at.quick))
    return WORKS


@tries("Buffer", SEND, "topk_idx", "duplicates; all -1", "a row for each (token, choice); none for -1")
def _(at: At) -> str:
    for routing in ("duplicates", "nothing"):
        scenario = QuickScenario(replace(QUICK_CASE, routing=routing), at.rank, at.num_ranks)
        scenario.check_dispatch(scenario.dispatch(at.quick))
    return WORKS


@tries("Buffer", SEND, "num_max_dispatch_tokens_per_rank", "4 more than there are", "slabs have R times as many rows")
def _(at: At) -> str:
    scenario = QuickScenario(replace(QUICK_CASE, spare=4), at.rank, at.num_ranks)
    scenario.check_dispatch(scenario.dispatch(at.quick))
    assert scenario.most == 9
    return WORKS


@tries("Buffer", SEND, "num_experts", "10", "shared out among the ranks; also no power of two")
def _(at: At) -> str:
    scenario = QuickScenario(replace(QUICK_CASE, local_experts=5), at.rank, at.num_ranks)
    scenario.check_dispatch(scenario.dispatch(at.quick))
    return WORKS


@tries("Buffer", SEND, "cumulative_local_expert_recv_stats", "int32 [L]", "received rows are added to it")
def _(at: At) -> str:
    stats = torch.full((2,), 100, dtype=torch.int32)
    count = send(at, cumulative_local_expert_recv_stats=stats)[1]
    assert torch.equal(stats, count + 100)
    return WORKS


@tries(
    "Buffer", SEND, "dispatch_wait_recv_cost_stats", "int64 [R]", "nanoseconds waited for each rank are added to it"
)
def _(at: At) -> str:
    waits = torch.zeros(at.num_ranks, dtype=torch.int64)
    send(at, dispatch_wait_recv_cost_stats=waits)
    assert 0 < waits[1 - at.rank] < 10**11
    return WORKS


def _format(form: str) -> Check:
    def check(at: At) -> str:
        scenario = QuickScenario(replace(QUICK_CASE, format=form, hidden=640), at.rank, at.num_ranks)
        scenario.check_dispatch(scenario.dispatch(at.quick))
        return WORKS

    return check


add("Buffer", SEND, "use_fp8", "False, True", "rows in bfloat16, or FP8 with column-major scales", _format("plain"))
add("Buffer", SEND, "round_scale", "True", "scales are powers of two", _format("rounded"))
add(
    "Buffer", SEND, "use_ue8m0", "True with `round_scale`", "scales are exponents, four in an int32", _format("ue8m0")
)


@tries("Buffer", SEND, "async_finish", "True", "an event is returned; `.event` is None without")
def _(at: At) -> str:
    result = send(at, async_finish=True)
    assert isinstance(result[3].event, EventHandle)
    result[3].current_stream_wait()
    at.quick_scenario.check_dispatch(result)
    assert send(at)[3].event is None
    return WORKS


@tries("Buffer", SEND, "return_recv_hook", "True", "a function that receives; None without; not with `async_finish`")
def _(at: At) -> str:
    first, second = send(at, return_recv_hook=True), send(at, return_recv_hook=True)
    for result in (second, first):
        result[4]()
        at.quick_scenario.check_dispatch(result)
    assert send(at)[4] is None
    with pytest.raises(ArgumentError, match=r"^async_finish"):
        send(at, return_recv_hook=True, async_finish=True)
    return WORKS


@tries("Buffer", SEND, "use_nvfp4", "True", "known to frameworks, not built; False is accepted")
def _(at: At) -> str:
    at.quick_scenario.check_dispatch(send(at, use_nvfp4=False, x_global_scale=None))
    return refused("use_nvfp4", lambda: send(at, use_nvfp4=True, x_global_scale=torch.ones(1)))


@tries("Buffer", SEND, "x_global_scale", "a tensor", "likewise; None is accepted")
def _(at: At) -> str:
    return refused("x_global_scale", lambda: send(at, x_global_scale=torch.ones(1)))


forks("Buffer", SEND, ["topk_weights", "quant_mode"], lambda at, options: send(at, **options))


@tries("Buffer", SUM, "x", "bfloat16 [L, R N, H]", "rows go home, and are summed, weighted, in order of choices")
def _(at: At) -> str:
    at.quick_scenario.check_combine(combine(at))
    return WORKS


@tries("Buffer", SUM, "topk_idx", "further -1", "what is -1 now is left out")
def _(at: At) -> str:
    it, fewer = at.quick_scenario, at.quick_scenario.fewer_ids()
    rows = it.expert_rows(at.quick_dispatched)
    answer = at.quick.low_latency_combine(rows, fewer, it.weights, at.quick_dispatched[2])
    it.check_combine(answer, fewer)
    return WORKS


@tries("Buffer", SUM, "topk_weights", "zeros, negative ones", "factors of the choices")
def _(at: At) -> str:
    it, dispatched = at.quick_scenario, at.quick_dispatched
    rows = it.expert_rows(dispatched)
    zeros = at.quick.low_latency_combine(rows, it.ids, it.weights * 0, dispatched[2])[0]
    minus = at.quick.low_latency_combine(rows, it.ids, -it.weights, dispatched[2])[0]
    assert torch.equal(zeros, torch.zeros_like(zeros))
    assert torch.equal(minus, -it.expected())
    return WORKS


@tries("Buffer", SUM, "handle", "a list, twice", "what dispatch returned, or its five elements; never changed")
def _(at: At) -> str:
    received = (*at.quick_dispatched[:2], list(at.quick_dispatched[2]))
    for _ in range(2):
        at.quick_scenario.check_combine(at.quick_scenario.combine(at.quick, received))
    return WORKS


@tries("Buffer", SUM, "use_logfmt", "True", "results are the same, never in fewer bits; not with `zero_copy`")
def _(at: At) -> str:
    at.quick_scenario.check_combine(combine(at, use_logfmt=True))
    with pytest.raises(ArgumentError, match=r"^use_logfmt"):
        combine(at, use_logfmt=True, zero_copy=True)
    return IGNORED


@tries("Buffer", SUM, "zero_copy", "True", "takes the rows of `get_next_low_latency_combine_buffer`, not `x`")
def _(at: At) -> str:
    it, handle = at.quick_scenario, at.quick_dispatched[2]
    rows = at.quick.get_next_low_latency_combine_buffer(handle)
    rows[:, :, :] = it.expert_rows(at.quick_dispatched)
    answer = at.quick.low_latency_combine(torch.zeros_like(rows), it.ids, it.weights, handle, zero_copy=True)
    it.check_combine(answer)
    return WORKS


@tries("Buffer", SUM, "async_finish", "True", "an event is returned; `.event` is None without")
def _(at: At) -> str:
    answer = combine(at, async_finish=True)
    assert isinstance(answer[1].event, EventHandle)
    answer[1].current_stream_wait()
    at.quick_scenario.check_combine(answer)
    assert combine(at)[1].event is None
    return WORKS


@tries("Buffer", SUM, "return_recv_hook", "True", "a function that receives; None without; not with `async_finish`")
def _(at: At) -> str:
    answer = combine(at, return_recv_hook=True)
    answer[2]()
    at.quick_scenario.check_combine(answer)
    assert combine(at)[2] is None
    with pytest.raises(ArgumentError, match=r"^async_finish"):
        combine(at, return_recv_hook=True, async_finish=True)
    return WORKS


@tries("Buffer", SUM, "out", "bfloat16 [T, H]", "written, and returned itself")
def _(at: At) -> str:
    out = torch.full_like(at.quick_scenario.x, torch.nan)
    answer = combine(at, out=out)
    assert answer[0] is out
    at.quick_scenario.check_combine(answer)
    return WORKS


@tries("Buffer", SUM, "combine_wait_recv_cost_stats", "int64 [R]", "nanoseconds waited for each rank are added to it")
def _(at: At) -> str:
    waits = torch.zeros(at.num_ranks, dtype=torch.int64)
    combine(at, combine_wait_recv_cost_stats=waits)
    assert 0 < waits[1 - at.rank] < 10**11
    return WORKS


OVERLAP = [
    *["overlap", "src_signals", "src_signal_expect_value", "packed_recv_count", "comp_signal", "block_m"],
    *["threshold", "num_sms"],
]
forks("Buffer", SUM, OVERLAP, lambda at, options: combine(at, **options))


@tries(
    "Buffer", "get_next_low_latency_combine_buffer", "handle", "of a dispatch", "bfloat16 [L, R N, H], to be filled"
)
def _(at: At) -> str:
    rows = at.quick.get_next_low_latency_combine_buffer(at.quick_dispatched[2])
    assert (rows.shape, rows.dtype) == ((2, at.num_ranks * 5, 128), torch.bfloat16)
    return WORKS


CLEAN = {"num_max_dispatch_tokens_per_rank": 8, "hidden": 256, "num_experts": 4}


def _clean(name: str) -> Check:
    def check(at: At) -> str:
        before = send(at, return_recv_hook=True)
        at.quick.clean_low_latency_buffer(**CLEAN)
        before[4]()
        at.quick_scenario.check_dispatch(before)
        with pytest.raises(ArgumentError, match=rf"^{name}"):
            at.quick.clean_low_latency_buffer(**(CLEAN | {name: 0}))
        return IGNORED

    return check


for _name, _value in CLEAN.items():
    _effect = "a barrier, whatever the sizes: no state lies in the memory; 0 is an `ArgumentError`"
    add("Buffer", "clean_low_latency_buffer", _name, str(_value), _effect, _clean(_name))


def _masked(at: At) -> list[int]:
    status = torch.full((at.num_ranks,), 7, dtype=torch.int32)
    at.quick.low_latency_query_mask_buffer(status)
    return status.tolist()


@tries(
    "Buffer",
    "low_latency_update_mask_buffer",
    "rank_to_mask",
    "the other rank",
    "nothing comes from it, or goes there",
)
def _(at: At) -> str:
    dist.barrier()
    at.quick.low_latency_update_mask_buffer(1 - at.rank, True)
    alone = QuickScenario(QUICK_CASE, at.rank, at.num_ranks, masked=(1 - at.rank,))
    alone.check_dispatch(alone.dispatch(at.quick))
    dist.barrier()
    at.quick.low_latency_update_mask_buffer(1 - at.rank)
    dist.barrier()
    at.quick_scenario.check_dispatch(send(at))
    return WORKS


@tries("Buffer", "low_latency_update_mask_buffer", "mask", "True, False", "masks, and takes back")
def _(at: At) -> str:
    wanted = [int(rank != at.rank) for rank in range(at.num_ranks)]
    for mask in (True, False):
        at.quick.low_latency_update_mask_buffer(1 - at.rank, mask=mask)
        assert _masked(at) == (wanted if mask else [0, 0])
    return WORKS


@tries(
    "Buffer", "low_latency_query_mask_buffer", "mask_status", "int32 [R]", "1 for the masked ranks is written to it"
)
def _(at: At) -> str:
    assert _masked(at) == [0, 0]
    with pytest.raises(ArgumentError, match=r"^mask_status"):
        at.quick.low_latency_query_mask_buffer(torch.zeros(3, dtype=torch.int32))
    return WORKS


@tries("Buffer", "low_latency_clean_mask_buffer", "", "called", "takes all ranks back")
def _(at: At) -> str:
    at.quick.low_latency_update_mask_buffer(1 - at.rank, True)
    at.quick.low_latency_clean_mask_buffer()
    assert _masked(at) == [0, 0]
    return WORKS


HINT = {"num_max_dispatch_tokens_per_rank": 128, "hidden": 4096, "num_ranks": 2, "num_experts": 8}


def _hint(name: str) -> Check:
    def check(at: At) -> str:
        few, more = (Buffer.get_low_latency_rdma_size_hint(**(HINT | {name: HINT[name] * k})) for k in (1, 2))
        assert few % 128 == more % 128 == 0
        assert few > 0
        if name == "num_ranks":
            assert more == few
            return IGNORED
        assert more > few
        return WORKS

    return check


for _name in HINT:
    _effect = "does not enter DeepEP's formula either" if _name == "num_ranks" else "twice of it, more bytes"
    add("Buffer", "get_low_latency_rdma_size_hint", _name, str(HINT[_name]), _effect, _hint(_name))
