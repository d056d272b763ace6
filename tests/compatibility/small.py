"""Config, EventHandle, EventOverlap, and what there is of DeepEP's compiled runtime."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch

from tests.compatibility.rows import IGNORED, NOT_ON_CPU, WORKS, At, Check, absent, add, forks, tries
from tests.test_events import CountingEvent
from tokenferry import ArgumentError, Config, EventHandle, EventOverlap

CONFIG = {
    "num_sms": 24,
    "num_max_nvl_chunked_send_tokens": 8,
    "num_max_nvl_chunked_recv_tokens": 288,
    "num_max_rdma_chunked_send_tokens": 8,
    "num_max_rdma_chunked_recv_tokens": 480,
}
ENTERS = {"num_max_nvl_chunked_recv_tokens": "nvl", "num_max_rdma_chunked_recv_tokens": "rdma"}


def _field(name: str, value: int) -> Check:
    def check(at: At) -> str:
        assert getattr(Config(**{name: value}), name) == value != getattr(Config(), name)
        assert getattr(Config(*CONFIG.values()), name) == value
        for kind in ("nvl", "rdma"):
            plain, other = (
                getattr(config, f"get_{kind}_buffer_size_hint")(1024, 16)
                for config in (Config(), Config(**{name: value}))
            )
            assert (other > plain) == (name == "num_sms" or ENTERS.get(name) == kind)
        with pytest.raises(ArgumentError, match=rf"^{name}"):
            Config(**{name: -1})
        return WORKS if name == "num_sms" or name in ENTERS else IGNORED

    return check


for _name, _value in CONFIG.items():
    _effect = (
        "kept, and enters the size hints"
        if _name == "num_sms" or _name in ENTERS
        else "kept; does not enter the size hints"
    )
    add("Config", "__init__", _name, str(_value), _effect, _field(_name, _value))
forks("Config", "__init__", ["num_qps"], lambda at, options: Config(**options))


def _config_hint(method: str, argument: str) -> Check:
    def check(at: At) -> str:
        hint = getattr(Config(), method)
        given: Any = {"hidden_bytes": ((1024, 16), (2048, 16)), "num_ranks": ((1024, 16), (1024, 64))}[argument]
        few, more = (hint(*arguments) for arguments in given)
        assert 0 < few < more
        assert few % 128 == more % 128 == 0
        assert hint(1024, 3) == 0 or "nvl" in method
        return WORKS

    return check


for _kind, _which in (("nvl", "num_nvl_bytes"), ("rdma", "num_rdma_bytes")):
    _method = f"get_{_kind}_buffer_size_hint"
    add(
        "Config",
        _method,
        "hidden_bytes",
        "1024, 2048",
        f"bytes for `{_which}`, growing",
        _config_hint(_method, "hidden_bytes"),
    )
    add("Config", _method, "num_ranks", "3, 16, 64", "likewise; any number", _config_hint(_method, "num_ranks"))


# Events.


@tries("EventHandle", "__init__", "stream", "None", "another stream than the current one (not in DeepEP)")
def _(at: At) -> str:
    EventHandle(None).current_stream_wait()
    return NOT_ON_CPU


@tries(
    "EventHandle", "current_stream_wait", "", "twice", "CPU ranks are done when a call returns: nothing to wait for"
)
def _(at: At) -> str:
    handle = EventHandle()
    handle.current_stream_wait()
    handle.current_stream_wait()
    return NOT_ON_CPU


@tries("EventHandle", "stream_wait", "stream", "None", "makes a stream wait (not in DeepEP)")
def _(at: At) -> str:
    EventHandle().stream_wait(None)  # type: ignore[arg-type]
    return NOT_ON_CPU


@tries("EventOverlap", "__init__", "event", "an `EventHandle`; None", "kept as `.event`, waited for; None is nothing")
def _(at: At) -> str:
    handle = CountingEvent()
    assert EventOverlap(handle).event is handle
    EventOverlap(handle).current_stream_wait()
    assert handle.log == ["wait"]
    assert EventOverlap(None).event is None
    return WORKS


@tries("EventOverlap", "__init__", "extra_tensors", "a tuple", "kept alive as `.extra_tensors`")
def _(at: At) -> str:
    tensors = (torch.zeros(1),)
    assert EventOverlap(None, tensors).extra_tensors is tensors
    return WORKS


@tries("EventOverlap", ".event", "", "set later", "may be moved from one to another")
def _(at: At) -> str:
    handle, empty = CountingEvent(), EventOverlap(None)
    empty.event = handle
    empty.current_stream_wait()
    assert handle.log == ["wait"]
    return WORKS


@tries("EventOverlap", "current_stream_wait", "release_handle", "True", "drops event and tensors after the wait")
def _(at: At) -> str:
    overlap = EventOverlap(CountingEvent(), (torch.zeros(1),))
    overlap.current_stream_wait(release_handle=True)
    assert (overlap.event, overlap.extra_tensors) == (None, None)
    with pytest.raises(AssertionError, match="event"):
        overlap.current_stream_wait()
    return WORKS


@tries("EventOverlap", "register_hook_after_wait", "hook", "a function", "called once, after the next wait")
def _(at: At) -> str:
    handle = CountingEvent()
    overlap = EventOverlap(handle)
    overlap.register_hook_after_wait(lambda: handle.log.append("hook"))
    overlap.current_stream_wait()
    overlap.current_stream_wait()
    assert handle.log == ["wait", "hook", "wait"]
    return WORKS


@tries("EventOverlap", "__call__", "release_handle", "True", "`with event():` waits at its end, and drops the event")
def _(at: At) -> str:
    handle = CountingEvent()
    overlap = EventOverlap(handle)
    with overlap(release_handle=True):
        assert handle.log == []
    assert (handle.log, overlap.event) == (["wait"], None)
    return WORKS


@tries("EventOverlap", "__enter__", "", "`with event:`", "waits at the end of the block, if there is an event")
def _(at: At) -> str:
    handle = CountingEvent()
    with EventOverlap(handle), EventOverlap(None):
        assert handle.log == []
    assert handle.log == ["wait"]
    return WORKS


# runtime


@tries("Buffer.runtime", "is_available", "", "called", "True while the Buffer can be used")
def _(at: At) -> str:
    assert at.buffer.runtime is not None
    assert at.buffer.runtime.is_available() is True
    return WORKS


@tries("Buffer.runtime", "get_local_ipc_handle", "", "called", "a bytearray, of another content than DeepEP's")
def _(at: At) -> str:
    assert at.buffer.runtime is not None
    assert isinstance(at.buffer.runtime.get_local_ipc_handle(), bytearray)
    return WORKS


@tries("Buffer.runtime", "destroy", "", "twice", "local; `Buffer.destroy` calls it")
def _(at: At) -> str:
    from tests.compatibility.construction import make

    runtime = make(at).runtime
    assert runtime is not None
    runtime.destroy()
    runtime.destroy()
    assert not runtime.is_available()
    return WORKS


MISSING = [
    *["get_num_rdma_ranks", "get_rdma_rank", "get_root_rdma_rank", "get_local_device_id"],
    *["get_local_nvshmem_unique_id", "get_local_buffer_tensor", "get_comm_stream", "get_dispatch_layout"],
    *["intranode_dispatch", "intranode_combine", "internode_dispatch", "internode_combine"],
    *["clean_low_latency_buffer", "low_latency_dispatch", "low_latency_combine"],
    "get_next_low_latency_combine_buffer",
]
absent("Buffer.runtime", MISSING, lambda at: at.buffer.runtime, "call the methods of `Buffer`")


@tries(
    "Buffer.runtime",
    "sync",
    "device_ids, ipc_handles, root_unique_id",
    "as DeepEP has it",
    "called by the constructor, with the handles alone",
)
def _(at: At) -> str:
    from tests.compatibility.rows import UNKNOWN

    with pytest.raises(TypeError):
        at.buffer.runtime.sync([0], [b""], None)  # type: ignore[union-attr, call-arg, list-item]
    return UNKNOWN


assert {field.name for field in fields(Config)} == set(CONFIG)
