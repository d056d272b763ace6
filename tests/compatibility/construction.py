"""The constructor of Buffer, its attributes, class-wide settings, and memory."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, check_works
from tests.compatibility.rows import (
    ABSENT,
    NOT_ON_CPU,
    WORKS,
    At,
    Check,
    absent,
    add,
    forks,
    ignored,
    messages,
    tries,
)
from tests.test_lifecycle import FakeComm
from tokenferry import (
    ArgumentError,
    Buffer,
    BufferStateError,
    EventHandle,
    EventOverlap,
    InternodeHandle,
    PeerTimeoutError,
    construction,
)

NEW = "__init__"


def make(at: At, **options: Any) -> Buffer:
    return Buffer(at.group, **{"timeout": TIMEOUT, **options})


@tries("Buffer", NEW, "group", "groups of one rank", "ranks and size are those of the group; dispatch and combine")
def _(at: At) -> str:
    groups = [dist.new_group([rank]) for rank in range(at.num_ranks)]
    with Buffer(groups[at.rank], timeout=TIMEOUT) as buffer:
        assert (buffer.rank, buffer.group_size, buffer.group) == (0, 1, groups[at.rank])
        check_works(buffer)
    return WORKS


@tries("Buffer", NEW, "num_nvl_bytes", "4096", "a ceiling for the stage: larger rows pass through it in parts")
def _(at: At) -> str:
    with make(at, num_nvl_bytes=4096) as buffer:
        assert buffer.num_nvl_bytes == 4096 == buffer.get_local_buffer_tensor(torch.uint8).numel()
        x = torch.full((3, 8192), at.rank, dtype=torch.int16)
        layout = buffer.get_dispatch_layout(torch.full((3, 1), 1 - at.rank), 2)
        rows = buffer.dispatch(x, None, layout[0], None, layout[3], layout[2])[0]
        assert torch.equal(rows, torch.full_like(x, 1 - at.rank))  # type: ignore[arg-type]
    return WORKS


@tries("Buffer", NEW, "num_rdma_bytes", "8192", "the size of the memory for low-latency rows")
def _(at: At) -> str:
    with make(at, num_rdma_bytes=8192, low_latency_mode=True) as buffer:
        assert buffer.num_rdma_bytes == 8192
        assert buffer.get_local_buffer_tensor(torch.uint8, use_rdma_buffer=True).numel() == 8192
        at.quick_scenario.check_dispatch(at.quick_scenario.dispatch(buffer))
    return WORKS


@tries("Buffer", NEW, "low_latency_mode", "True", "allows low-latency operations; without, `BufferStateError`")
def _(at: At) -> str:
    with pytest.raises(BufferStateError, match="low_latency_mode"):
        at.quick_scenario.dispatch(at.buffer)
    with make(at, low_latency_mode=True) as buffer:
        at.quick_scenario.check_dispatch(at.quick_scenario.dispatch(buffer))
        check_works(buffer)
    return WORKS


WITHOUT_MEANING: dict[str, tuple[Any, str]] = {
    "num_qps_per_rank": (12.5, "any number, also a fraction"),
    "allow_nvlink_for_low_latency_mode": (False, "peers are reached the same way"),
    "allow_mnnvl": (True, "likewise"),
    "use_fabric": (True, "likewise"),
    "allow_nvlink_for_normal_mode": (False, "likewise"),
}


def _without_meaning(name: str, value: Any) -> Check:
    def check(at: At) -> str:
        def construct() -> None:
            with make(at, **{name: value}) as buffer:
                check_works(buffer)

        return ignored(name, construct)

    return check


for _name, (_value, _effect) in WITHOUT_MEANING.items():
    add("Buffer", NEW, _name, str(_value), _effect, _without_meaning(_name, _value))


@tries("Buffer", NEW, "explicitly_destroy", "True", "`destroy()` is allowed either way, and not needed")
def _(at: At) -> str:
    for given in (True, False):
        buffer = make(at, explicitly_destroy=given)
        assert buffer.explicitly_destroy == given
        buffer.destroy()
        assert buffer.runtime is None
        check_works(make(at, explicitly_destroy=given))  # and dropped
    return WORKS


@tries("Buffer", NEW, "enable_shrink", "True", "allows the mask calls; without, `BufferStateError`")
def _(at: At) -> str:
    with make(at, low_latency_mode=True, enable_shrink=True) as buffer:
        buffer.low_latency_clean_mask_buffer()
    with make(at, low_latency_mode=True) as buffer, pytest.raises(BufferStateError, match="enable_shrink"):
        buffer.low_latency_clean_mask_buffer()
    return WORKS


@tries("Buffer", NEW, "exact_combine", "True", "partial sums travel between nodes in float32 (not in DeepEP)")
def _(at: At) -> str:
    other = 1 - at.rank
    ids = torch.tensor([[2 * other, 2 * other + 1, 2 * at.rank]])
    results = []
    for exact in (False, True):
        with make(at, node=at.rank, low_latency_mode=True, exact_combine=exact) as buffer:
            x = torch.ones(1, 8, dtype=torch.bfloat16)
            rows, _, handle, *_ = buffer.low_latency_dispatch(x, ids, 2, 4, use_fp8=False)
            weights = torch.tensor([[256.0, 1.0, -256.0]])
            results.append(buffer.low_latency_combine(rows, ids, weights, handle)[0][0, 0].item())  # type: ignore[arg-type]
    assert results == [0.0, 1.0]  # 257 is no bfloat16
    return WORKS


@tries("Buffer", NEW, "comm", "with `group=None`", "an mpi4py communicator (its three methods that are called)")
def _(at: At) -> str:
    comm = FakeComm()
    with Buffer(None, comm=comm, timeout=TIMEOUT) as buffer:
        assert buffer.group is comm
        check_works(buffer)
    return WORKS


@tries(
    "Buffer", NEW, "timeout", "0.3", "an absent rank raises `PeerTimeoutError` after so many seconds (not in DeepEP)"
)
def _(at: At) -> str:
    with make(at, timeout=0.3) as buffer:
        if at.rank == 0:
            started = time.monotonic()
            with pytest.raises(PeerTimeoutError):
                at.scenario.dispatch(buffer)
            assert 0.25 < time.monotonic() - started < 10
        dist.barrier()
    return WORKS


@tries("Buffer", NEW, "device", '`"cpu"`', "comes before `TOKENFERRY_DEVICE` (not in DeepEP)")
def _(at: At) -> str:
    with mock.patch.dict("os.environ", {construction.DEVICE_VARIABLE: "nonsense"}):
        with pytest.raises(ArgumentError, match="nonsense"):
            make(at)
        with make(at, device="cpu") as buffer:
            check_works(buffer)
    return WORKS


@tries("Buffer", NEW, "heap_bytes", "4096", "`empty` takes any memory on CPU ranks (not in DeepEP)")
def _(at: At) -> str:
    with make(at, heap_bytes=4096) as buffer:
        assert buffer.empty(8192, dtype=torch.uint8).numel() == 8192
        check_works(buffer)
    return NOT_ON_CPU


@tries("Buffer", NEW, "node", "the rank", "ranks on other nodes are reached by a carrier (not in DeepEP)")
def _(at: At) -> str:
    assert (at.buffer.topology.num_nodes, at.nodes.topology.num_nodes) == (1, 2)
    at.scenario.check_rows(at.scenario.dispatch(at.nodes)[0])
    return WORKS


@tries("Buffer", NEW, "carrier", '`"process_group"`', "comes before `TOKENFERRY_CARRIER` (not in DeepEP)")
def _(at: At) -> str:
    with mock.patch.dict("os.environ", {"TOKENFERRY_CARRIER": "nonsense"}):
        with pytest.raises(ArgumentError, match="nonsense"):
            make(at, node=at.rank)
        with make(at, node=at.rank, carrier="process_group") as buffer:
            assert isinstance(at.scenario.dispatch(buffer)[4], InternodeHandle)
    return WORKS


forks("Buffer", NEW, ["num_nvl_peers"], lambda at, options: make(at, **options))

# Attributes.

ATTRIBUTES: dict[str, tuple[str, Any]] = {
    "rank": ("of this process in the group", lambda at: at.rank),
    "group_size": ("ranks of the group", lambda at: at.num_ranks),
    "group": ("as given", lambda at: at.group),
    "num_nvl_bytes": ("as given", lambda at: 0),
    "num_rdma_bytes": ("as given", lambda at: 1 << 20),
    "low_latency_mode": ("as given", lambda at: True),
    "explicitly_destroy": ("as given", lambda at: False),
    "enable_shrink": ("as given", lambda at: True),
}


def _attribute(name: str, wanted: Any) -> Check:
    def check(at: At) -> str:
        assert getattr(at.quick, name) == wanted(at)
        return WORKS

    return check


for _name, (_effect, _wanted) in ATTRIBUTES.items():
    add("Buffer", f".{_name}", "", "read", _effect, _attribute(_name, _wanted))


@tries("Buffer", ".nvshmem_qp_depth", "", "`hasattr`", "there are no queue pairs")
def _(at: At) -> str:
    assert not hasattr(at.quick, "nvshmem_qp_depth")
    return ABSENT


@tries("Buffer", ".topology", "", "read", "nodes, and the ranks of each (not in DeepEP)")
def _(at: At) -> str:
    assert at.nodes.topology.node_of == (0, 1)
    return WORKS


@tries("Buffer", ".num_sms", "", "read", "20, or what `set_num_sms` was given")
def _(at: At) -> str:
    assert Buffer.num_sms == 20 == at.buffer.num_sms
    return WORKS


# Life cycle and class-wide settings.


@tries("Buffer", "destroy", "", "twice", "local, whatever `explicitly_destroy` says; `runtime` is None afterwards")
def _(at: At) -> str:
    buffer = make(at)
    for _ in range(2):
        buffer.destroy()
        assert buffer.runtime is None
    return WORKS


@tries("Buffer", "__enter__", "", "`with buffer:`", "destroys at the end of the block (not in DeepEP)")
def _(at: At) -> str:
    with make(at) as buffer:
        assert buffer.is_available()
    assert buffer.runtime is None
    return WORKS


@tries(
    "Buffer", "is_available", "", "before and after `destroy`", "True, then False (in DeepEP a method of `runtime`)"
)
def _(at: At) -> str:
    buffer = make(at)
    assert buffer.is_available()
    buffer.destroy()
    assert not buffer.is_available()
    return WORKS


@tries("Buffer", "is_sm90_compiled", "", "called", "True: FP8 rows and several nodes are there")
def _(at: At) -> str:
    assert Buffer.is_sm90_compiled() is True
    return WORKS


@tries("Buffer", "set_num_sms", "new_num_sms", "24", "of presets from then on, also when called on an instance")
def _(at: At) -> str:
    try:
        at.buffer.set_num_sms(24)
        assert Buffer.num_sms == 24 == Buffer.get_dispatch_config(2).num_sms == Buffer.get_combine_config(2).num_sms
        with pytest.raises(ArgumentError, match="new_num_sms"):
            Buffer.set_num_sms(23)
    finally:
        Buffer.set_num_sms(20)
    return WORKS


def _preset(name: str) -> Check:
    def check(at: At) -> str:
        for num_ranks in (1, 3, 6, 8, 100):
            config = getattr(Buffer, name)(num_ranks)
            assert config.get_nvl_buffer_size_hint(1024, num_ranks) > 0
        assert getattr(Buffer, name)(8) != getattr(Buffer, name)(16)
        return WORKS

    return check


for _name in ("get_dispatch_config", "get_combine_config"):
    add("Buffer", _name, "num_ranks", "1, 3, 6, 8, 100", "a `Config` for any number", _preset(_name))


@tries("Buffer", "capture", "", "called", "an `EventOverlap` with an event")
def _(at: At) -> str:
    event = at.buffer.capture()
    assert isinstance(event, EventOverlap)
    assert isinstance(event.event, EventHandle)
    return WORKS


@tries("Buffer", "get_comm_stream", "", "called", "a stream; CPU ranks have a single one")
def _(at: At) -> str:
    assert isinstance(at.buffer.get_comm_stream(), torch.cpu.Stream)
    return WORKS


absent("Buffer", ["get_low_latency_rdma_size_hint_m2n"], lambda at: Buffer, "known to forks only, which probe for it")

# Memory.


def _tensor(at: At, **options: Any) -> torch.Tensor:
    return at.quick.get_local_buffer_tensor(**{"dtype": torch.uint8, "use_rdma_buffer": True, **options})


@tries("Buffer", "get_local_buffer_tensor", "dtype", "float32", "of the tensor over the whole memory")
def _(at: At) -> str:
    tensor = _tensor(at, dtype=torch.float32)
    assert (tensor.dtype, tensor.numel()) == (torch.float32, (1 << 20) // 4)
    tensor.zero_()
    return WORKS


@tries("Buffer", "get_local_buffer_tensor", "size", "[3, 5]", "its shape")
def _(at: At) -> str:
    assert _tensor(at, size=torch.Size([3, 5])).shape == (3, 5)
    return WORKS


@tries("Buffer", "get_local_buffer_tensor", "offset", "64", "in bytes; the rest is shorter by as many")
def _(at: At) -> str:
    part = _tensor(at, offset=64)
    assert part.data_ptr() == _tensor(at).data_ptr() + 64
    assert part.numel() == (1 << 20) - 64
    return WORKS


@tries(
    "Buffer",
    "get_local_buffer_tensor",
    "use_rdma_buffer",
    "True",
    "`num_rdma_bytes`, which peers never write to on CPU ranks",
)
def _(at: At) -> str:
    tensor = _tensor(at)
    assert tensor.numel() == at.quick.num_rdma_bytes
    tensor.fill_(7)
    at.quick_scenario.check_dispatch(at.quick_scenario.dispatch(at.quick))
    assert (tensor == 7).all()
    return WORKS


@tries("Buffer", "empty", "size", "3, 5", "its shape (not in DeepEP)")
def _(at: At) -> str:
    assert at.buffer.empty(3, 5).shape == (3, 5)
    return WORKS


@tries("Buffer", "empty", "dtype", "float32", "of the tensor (not in DeepEP)")
def _(at: At) -> str:
    assert at.buffer.empty(2, dtype=torch.float32).dtype == torch.float32
    return WORKS


@tries("Buffer", "stats", "reset", "True", "counts begin again at 0 (not in DeepEP)")
def _(at: At) -> str:
    check_works(at.buffer)
    assert at.buffer.stats(reset=True).of("dispatch").count > 0
    assert at.buffer.stats().of("dispatch").count == 0
    return WORKS


@tries("Buffer", "shrink", "dead_ranks", "the other rank", "goes on with those who are left (not in DeepEP)")
def _(at: At) -> str:
    if at.rank == 0:
        buffer = make(at)
        dist.barrier()
        assert buffer.shrink([1]).ranks == (0,)
        assert (buffer.rank, buffer.group_size) == (0, 1)
        check_works(buffer)
        buffer.destroy()
    else:
        make(at).destroy()
        dist.barrier()
    return WORKS


WARMUP = {"hidden": 256, "num_topk": 2, "num_experts": 4, "dtype": torch.float32, "scale_bytes": 8}
LOW_LATENCY_WARMUP = {"num_max_dispatch_tokens_per_rank": 8, "hidden": 256, "num_topk": 2, "num_experts": 4}


def _warmup(method: str, name: str, value: Any, rest: dict[str, Any]) -> Check:
    def check(at: At) -> str:
        with messages() as said:
            getattr(at.quick, method)(**{**rest, name: value})
        assert said == []
        return NOT_ON_CPU

    return check


for _name, _value in {**WARMUP, "combine_dtype": torch.float16}.items():
    _effect = "nothing compiles on CPU ranks (not in DeepEP)"
    add(
        "Buffer",
        "warmup",
        _name,
        str(_value).removeprefix("torch."),
        _effect,
        _warmup("warmup", _name, _value, WARMUP),
    )
for _name, _value in {**LOW_LATENCY_WARMUP, "use_fp8": False, "round_scale": True, "use_ue8m0": True}.items():
    _rest = LOW_LATENCY_WARMUP | {"round_scale": True}
    _check = _warmup("low_latency_warmup", _name, _value, _rest)
    add("Buffer", "low_latency_warmup", _name, str(_value), "nothing compiles on CPU ranks (not in DeepEP)", _check)
