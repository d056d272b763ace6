"""The constructor of ElasticBuffer, its attributes and sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT
from tests.compatibility.rows import (
    ABSENT,
    ELASTIC_CASE,
    IGNORED,
    NOT_ON_CPU,
    WORKS,
    At,
    Check,
    add,
    ignored,
    refused,
    tries,
)
from tests.elastic_cases import Elastic
from tokenferry import (
    ElasticBuffer,
    EventHandle,
    PeerTimeoutError,
    TokenferryError,
    construction,
)

NEW = "__init__"
SIZES = {"num_max_tokens_per_rank": 64, "hidden": 1024, "num_topk": 4}


def make(at: At, **options: Any) -> ElasticBuffer:
    return ElasticBuffer(**{"group": at.group, "num_gpu_timeout_secs": TIMEOUT, **options})


def check_works(at: At, buffer: ElasticBuffer) -> None:
    """A dispatch and a combine."""
    elastic = at.elastic_scenario(expand=True)
    recv_x, ids, weights, handle, _ = elastic.dispatch(buffer)
    elastic.check_rows(recv_x)
    elastic.check_weights(weights, ids)
    elastic.check_combine(buffer, handle, len(recv_x))


@tries(
    "ElasticBuffer", NEW, "group", "groups of one rank", "ranks and size are those of the group; dispatch and combine"
)
def _(at: At) -> str:
    groups = [dist.new_group([rank]) for rank in range(at.num_ranks)]
    with make(at, group=groups[at.rank]) as buffer:
        assert (buffer.rank, buffer.group_size, buffer.group) == (0, 1, groups[at.rank])
        elastic = Elastic(ELASTIC_CASE, 0, 1, expand=True)
        elastic.check_rows(elastic.dispatch(buffer)[0])
    return WORKS


@tries("ElasticBuffer", NEW, "num_bytes", "4096", "a ceiling for the stage; by default the hint of the sizes")
def _(at: At) -> str:
    with make(at, num_bytes=4096) as buffer:
        assert buffer.num_bytes == 4096
        check_works(at, buffer)
    with make(at, **SIZES) as buffer:
        assert buffer.num_bytes == ElasticBuffer.get_buffer_size_hint(at.group, **SIZES)  # type: ignore[arg-type]
    return WORKS


@tries("ElasticBuffer", NEW, "num_cpu_bytes", "4096", "there is no storage on the host")
def _(at: At) -> str:
    return refused("num_cpu_bytes", lambda: make(at, num_cpu_bytes=4096))


@tries("ElasticBuffer", NEW, "num_max_tokens_per_rank", "64", "of dispatches that do not say")
def _(at: At) -> str:
    with make(at, num_max_tokens_per_rank=64) as buffer:
        assert buffer.num_max_tokens_per_rank == 64
        handle = at.elastic_scenario(expand=False).dispatch(buffer, num_max_tokens_per_rank=None)[3]
        assert handle.num_max_tokens_per_rank == 64
    return WORKS


def _size(name: str, value: Any) -> Check:
    def check(at: At) -> str:
        sizes = {"num_max_tokens_per_rank": 4096, "hidden": 1024, "num_topk": 4}
        with make(at, **sizes) as buffer, make(at, **(sizes | {name: value})) as other:
            wanted = ElasticBuffer.get_buffer_size_hint(at.group, **(sizes | {name: value}))
            assert other.num_bytes == wanted != buffer.num_bytes
            check_works(at, other)
        return WORKS

    return check


add("ElasticBuffer", NEW, "hidden", "7168", "for the size", _size("hidden", 7168))
add("ElasticBuffer", NEW, "num_topk", "128", "for the size", _size("num_topk", 128))
_effect = "for the size; what is given is what travels"
add("ElasticBuffer", NEW, "use_fp8_dispatch", "True", _effect, _size("use_fp8_dispatch", True))


def _without_meaning(name: str, value: Any) -> Check:
    def check(at: At) -> str:
        def construct() -> None:
            with make(at, **{name: value}) as buffer:
                check_works(at, buffer)

        return ignored(name, construct)

    return check


add(
    "ElasticBuffer",
    NEW,
    "allow_hybrid_mode",
    "False",
    "there is one node",
    _without_meaning("allow_hybrid_mode", False),
)
add("ElasticBuffer", NEW, "sl_idx", "0", "there is no network", _without_meaning("sl_idx", 0))
_check = _without_meaning("num_allocated_qps", 17)
add("ElasticBuffer", NEW, "num_allocated_qps", "17", "there are no queue pairs", _check)


@tries("ElasticBuffer", NEW, "deterministic", "True", "results are the same at any time, whether asked for or not")
def _(at: At) -> str:
    for given in (True, False):
        with make(at, deterministic=given) as buffer:
            assert buffer.deterministic == given
            check_works(at, buffer)
            check_works(at, buffer)
    return WORKS


@tries(
    "ElasticBuffer", NEW, "allow_multiple_reduction", "False", "one rounding in all: sums of copies travel in float32"
)
def _(at: At) -> str:
    with make(at, allow_multiple_reduction=False) as buffer:
        check_works(at, buffer)  # by the rules of the buffer
    with make(at) as buffer:
        check_works(at, buffer)
    return WORKS


@tries("ElasticBuffer", NEW, "prefer_overlap_with_compute", "False", "`get_theoretical_num_sms` says more")
def _(at: At) -> str:
    with make(at, prefer_overlap_with_compute=False) as buffer, make(at) as other:
        assert buffer.get_theoretical_num_sms(8, 2) > other.get_theoretical_num_sms(8, 2)
    return WORKS


def _timeout(name: str) -> Check:
    def check(at: At) -> str:
        with ElasticBuffer(at.group, **{name: 0.3}) as buffer:  # type: ignore[arg-type]
            if at.rank == 0:
                started = time.monotonic()
                with pytest.raises(PeerTimeoutError):
                    at.elastic_scenario(expand=False).dispatch(buffer)
                assert 0.25 < time.monotonic() - started < 10
            dist.barrier()
        return WORKS

    return check


for _name in ("num_cpu_timeout_secs", "num_gpu_timeout_secs"):
    _effect = "an absent rank raises `PeerTimeoutError` after the longer of the two"
    add("ElasticBuffer", NEW, _name, "0.3", _effect, _timeout(_name))


@tries("ElasticBuffer", NEW, "explicitly_destroy", "True", "`destroy()` is allowed either way, and not needed")
def _(at: At) -> str:
    for given in (True, False):
        buffer = make(at, explicitly_destroy=given)
        assert buffer.explicitly_destroy == given
        buffer.destroy()
        assert buffer.runtime is None
    return WORKS


@tries("ElasticBuffer", NEW, "device", '`"cpu"`', "comes before `TOKENFERRY_DEVICE` (not in DeepEP)")
def _(at: At) -> str:
    with mock.patch.dict("os.environ", {construction.DEVICE_VARIABLE: "nonsense"}), make(at, device="cpu") as buffer:
        check_works(at, buffer)
    return WORKS


@tries("ElasticBuffer", NEW, "node", "the rank", "several nodes are refused, on every rank (not in DeepEP)")
def _(at: At) -> str:
    with pytest.raises(TokenferryError, match="one node"):
        make(at, node=at.rank)
    return WORKS


@tries("ElasticBuffer", "destroy", "", "twice", "local; `runtime` is None afterwards")
def _(at: At) -> str:
    buffer = make(at)
    buffer.destroy()
    buffer.destroy()
    assert buffer.runtime is None
    return WORKS


@tries("ElasticBuffer", "__enter__", "", "`with buffer:`", "destroys at the end of the block (not in DeepEP)")
def _(at: At) -> str:
    with make(at) as buffer:
        assert buffer.is_available()
    assert buffer.runtime is None
    return WORKS


@tries("ElasticBuffer", "is_available", "", "before and after `destroy`", "True, then False (not in DeepEP)")
def _(at: At) -> str:
    buffer = make(at)
    assert buffer.is_available()
    buffer.destroy()
    assert not buffer.is_available()
    return WORKS


@tries("ElasticBuffer", ".topology", "", "read", "one node, and its ranks (not in DeepEP)")
def _(at: At) -> str:
    assert (at.elastic.topology.num_nodes, at.elastic.topology.num_ranks) == (1, at.num_ranks)
    return WORKS


for _name, _wanted in {
    "group": lambda at: at.group,
    "rank": lambda at: at.rank,
    "group_size": lambda at: at.num_ranks,
    "num_bytes": lambda at: 0,
    "num_max_tokens_per_rank": lambda at: 32,
}.items():

    def _attribute(at: At, name: str = _name, wanted: Callable[[At], Any] = _wanted) -> str:
        assert getattr(at.elastic, name) == wanted(at)
        return WORKS

    add("ElasticBuffer", f".{_name}", "", "read", "as given, or of the group", _attribute)

HINT = {
    "num_max_tokens_per_rank": (8192, True),
    "hidden": (16384, True),
    "num_topk": (512, True),
    "use_fp8_dispatch": (True, True),
    "allow_hybrid_mode": (False, False),
    "allow_multiple_reduction": (False, False),
}


@tries("ElasticBuffer", "get_buffer_size_hint", "group", "the group", "not looked at")
def _(at: At) -> str:
    given: list[Any] = [at.group, None]
    assert len({ElasticBuffer.get_buffer_size_hint(group, 64, 1024) for group in given}) == 1
    return IGNORED


def _hint(name: str, value: Any, matters: bool) -> Check:
    def check(at: At) -> str:
        sizes: dict[str, Any] = {"num_max_tokens_per_rank": 4096, "hidden": 4096, "num_topk": 8}
        plain = ElasticBuffer.get_buffer_size_hint(at.group, **sizes)
        other = ElasticBuffer.get_buffer_size_hint(at.group, **(sizes | {name: value}))
        assert (other != plain) == matters
        return WORKS if matters else IGNORED

    return check


for _name, (_value, _matters) in HINT.items():
    _effect = "enters the formula" if _matters else "does not enter the formula"
    add("ElasticBuffer", "get_buffer_size_hint", _name, str(_value), _effect, _hint(_name, _value, _matters))

SMS = {
    "num_experts": (512, False),
    "num_topk": (16, False),
    "num_scaleout_topk": (2, False),
    "rdma_gbs": (50, False),
    "nvlink_gbs": (900, True),
    "sm_read_gbs": (50, True),
    "sm_write_gbs": (10, True),
}


def _sms(name: str, value: Any, matters: bool) -> Check:
    def check(at: At) -> str:
        usual = {"num_experts": 64, "num_topk": 4}
        plain = at.elastic.get_theoretical_num_sms(**usual)
        other = at.elastic.get_theoretical_num_sms(**(usual | {name: value}))
        assert (other > plain) == matters
        assert (other == plain) != matters
        return WORKS if matters else IGNORED

    return check


for _name, (_value, _matters) in SMS.items():
    _effect = "enters the formula" if _matters else "does not enter the formula"
    add("ElasticBuffer", "get_theoretical_num_sms", _name, str(_value), _effect, _sms(_name, _value, _matters))


@tries("ElasticBuffer", "get_theoretical_num_qps", "num_sms", "24", "0: there are no queue pairs")
def _(at: At) -> str:
    assert at.elastic.get_theoretical_num_qps(24) == 0
    return IGNORED


for _name in ("get_physical_domain_size", "get_logical_domain_size"):

    def _domain(at: At, name: str = _name) -> str:
        assert getattr(at.elastic, name)() == (1, at.num_ranks)
        return WORKS

    add("ElasticBuffer", _name, "", "called", "one node, and its ranks", _domain)


@tries("ElasticBuffer", "capture", "", "called", "an `EventHandle`")
def _(at: At) -> str:
    assert isinstance(ElasticBuffer.capture(), EventHandle)
    return WORKS


@tries("ElasticBuffer", "get_comm_stream", "", "called", "a stream; CPU ranks have a single one")
def _(at: At) -> str:
    assert isinstance(at.elastic.get_comm_stream(), torch.cpu.Stream)
    return WORKS


def _barrier(name: str, value: bool) -> Check:
    def check(at: At) -> str:
        started = time.monotonic()
        if at.rank == 0:
            time.sleep(0.05)
        at.elastic.barrier(**{name: value})
        assert time.monotonic() - started > 0.04
        return NOT_ON_CPU if name == "with_cpu_sync" else IGNORED

    return check


for _name, _value in {"use_comm_stream": False, "with_cpu_sync": True, "sequential": False}.items():
    add(
        "ElasticBuffer",
        "barrier",
        _name,
        str(_value),
        "no rank goes on before all are there",
        _barrier(_name, _value),
    )

for _prefix in ("engram_", "pp_", "agrs_"):

    def _missing(at: At, prefix: str = _prefix) -> str:
        assert not [name for name in dir(ElasticBuffer) if name.startswith(prefix)]
        return ABSENT

    add("ElasticBuffer", f"{_prefix}*", "", "`dir`", "of other parallelism", _missing)
