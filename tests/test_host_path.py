"""What calls on a GPU rank ask of its host, counted, and the streams and events that they use: nothing is timed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.host_path import ALIGNMENT, CALLS, EXPERTS, RANKS, ROWS, Cost, Rank, breakdown, cost, rank_on_a_gpu
from tests.played_gpu import raw
from tokenferry import ArgumentError, EventHandle, EventOverlap
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.dataplane.cuda.launch import Variant, _below
from tokenferry.streams import CommStream

MOST = {
    #                              Python    C  operators  allocations  events  identities  captures  launches
    "get_dispatch_layout":        ( 33,  25,         2,           2,      4,          0,        0,        1),
    "dispatch":                   ( 81,  82,         5,           5,      6,          2,        2,        2),
    "dispatch, num_worst_tokens": ( 68,  56,         5,           5,      6,          2,        1,        2),
    "layout and dispatch":        (100,  84,         7,           7,     10,          2,        1,        3),
    "cached dispatch":            ( 40,  31,         1,           1,      4,          1,        1,        1),
    "combine":                    ( 40,  33,         1,           1,      4,          1,        1,        1),
    "combine, weights":           ( 46,  44,         2,           2,      4,          2,        1,        1),
    "combine, async_finish":      ( 50,  34,         1,           1,      5,          1,        1,        1),
    "elastic, expert-major":      (121, 120,        11,           9,      8,          3,        2,        4),
    "elastic, compact":           (115, 114,        10,           9,      8,          2,        2,        4),
    "elastic, cached":            ( 96,  77,         4,           3,      4,          3,        1,        1),
    "elastic combine":            ( 67,  62,         2,           2,      6,          1,        1,        2),
    "low_latency_dispatch":       ( 25,  36,         5,           3,      0,          0,        0,        1),
    "low_latency_combine":        ( 22,  27,         1,           1,      0,          0,        0,        1),
    "low_latency_dispatch, hook": ( 41,  48,         6,           4,      0,          0,        2,        2),
    "low_latency_combine, hook":  ( 39,  39,         2,           2,      0,          0,        2,        2),
}  # fmt: skip
"""Two Python functions and four of C more than with torch 2.13, whose wrappers are among them."""


@pytest.fixture(scope="module")
def rank() -> Iterator[Rank]:
    with rank_on_a_gpu() as one:
        yield one


@pytest.mark.parametrize("name", MOST)
def test_costs(rank: Rank, name: str) -> None:
    found, most = cost(rank, name)[1:], MOST[name]
    fields = Cost._fields[1:]
    assert all(count <= limit for count, limit in zip(found, most, strict=True)), dict(
        zip(fields, found, strict=True)
    )
    assert found[fields.index("launches")] == most[-1]  # the call went all the way


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("ops.")])
def test_operators_add_little(rank: Rank, name: str) -> None:
    plain = {"ops.dispatch": "layout and dispatch", "ops.cached_dispatch": "cached dispatch"}
    added = cost(rank, name).python - cost(rank, plain.get(name, name.removeprefix("ops."))).python
    assert added <= ADDED[name]


ADDED = {
    "ops.dispatch": -6,
    "ops.cached_dispatch": 8,
    "ops.combine": 8,
    "ops.low_latency_dispatch": 5,
    "ops.low_latency_combine": 7,
}
"""Python functions beside those of the Buffer's methods; handles are checked, as all that are only tensors."""


def test_breakdown(rank: Rank) -> None:
    names = ("low_latency_combine", "combine", "dispatch, num_worst_tokens")
    alone, combined, dispatched = (breakdown(rank, name, 3) for name in names)
    for parts in (alone, combined, dispatched):
        assert parts["whole"] == pytest.approx(sum(parts.values()) - parts["whole"])
    assert alone["events"] == alone["driver"] == 0 < min(alone["launches"], alone["allocations"])
    assert min(combined.values()) > 0
    assert min(dispatched.values()) > 0
    assert torch.empty.__name__ == "empty"  # nothing is timed any more


# Streams and events, with every call of the driver in order.


class Log:
    """What a block asks the GPU for; streams and events by name."""

    def __init__(self, rank: Rank) -> None:
        self._gpu = rank.gpu
        self.comm = rank.buffer.get_comm_stream().stream_id
        self.names: dict[object, str] = {self.comm: "comm", 0: "default"}

    def __enter__(self) -> list[tuple[object, ...]]:
        self._gpu.log = self.lines = []
        return self.lines

    def __exit__(self, *_: object) -> None:
        raws = {raw(stream): name for stream, name in self.names.items() if isinstance(stream, int)}
        events: dict[object, str] = {}
        found: list[tuple[object, ...]] = []
        for kind, *what in self.lines:
            if kind == "launch":
                found.append((kind, what[0], raws[what[4]]))
            elif kind in ("record event", "wait for event"):
                event = self.names.get(what[1]) or events.setdefault(what[1], f"event {len(events)}")
                found.append((kind, self.names[what[0]], event))
            elif kind in ("record stream", "set stream"):
                found.append((kind, self.names[what[0]]))
            elif kind == "set device":
                found.append((kind, what[0]))
        self.lines[:] = found
        self._gpu.log = None


ENTRY = [("record event", "default", "event 0"), ("wait for event", "comm", "event 0")]
COMBINE = [("launch", "combine", "comm")]


def leaving(event: str) -> list[tuple[str, ...]]:
    return [("record event", "comm", event), ("wait for event", "default", event)]


def renamed(lines: list[Any], **names: str) -> list[Any]:
    return [tuple(names.get(word, word) if isinstance(word, str) else word for word in line) for line in lines]


def test_comm_waits_for_the_current_stream_which_waits_for_it(rank: Rank) -> None:
    with Log(rank) as log:
        assert rank.combine()[2].event is None
    assert log == [*ENTRY, *COMBINE, *leaving("event 1")]


def test_the_stream_that_is_current_now_is_meant(rank: Rank) -> None:
    usual = [*ENTRY, *COMBINE, *leaving("event 1")]
    other = torch.cuda.Stream()
    for _ in range(2):
        log = Log(rank)
        log.names[other.stream_id] = "other"
        with torch.cuda.stream(other), log as lines:
            rank.combine()
        assert lines == renamed(usual, default="other")
        with Log(rank) as lines:
            rank.combine()
        assert lines == usual


def test_an_operation_on_comm_itself_waits_for_nothing(rank: Rank) -> None:
    with torch.cuda.stream(rank.buffer.get_comm_stream()), Log(rank) as log:
        rank.combine()
    assert log == COMBINE


EXPANDED = ["layout", "pack", "notify", "dispatch"]


def launches(rank: Rank, num_coming: int, **how: Any) -> list[str]:
    """The kernels of an elastic dispatch that receives so many rows, and where its host has the counts."""
    tell_counts, rank.num_coming = rank.gpu.done["notify"], num_coming
    log = Log(rank)
    try:
        rank.gpu.done["dispatch"] = lambda: (tell_counts(), rank.gpu.done.pop("dispatch"))  # type: ignore[assignment]
        rank.gpu.done["notify"] = lambda: None
        with log as lines:
            rows, _, weights, handle, _ = rank.elastic_dispatch(**how)
    finally:
        rank.gpu.done["notify"], rank.num_coming = tell_counts, ROWS
        rank.gpu.done.pop("dispatch", None)
    assert handle.num_recv_tokens == len(handle.recv_src_metadata) == len(handle.routes.recv_src_idx) == num_coming
    assert handle.num_recv_tokens_per_expert_list == [-(-num_coming // 8 // ALIGNMENT) * ALIGNMENT] * 8
    expands = how.get("do_expand", True)
    assert len(rows) == len(weights) == (sum(handle.num_recv_tokens_per_expert_list) if expands else num_coming)
    assert {line[2] for line in lines if line[0] == "launch"} == {"comm"}
    return [str(line[1]) for line in lines if line[0] == "launch"]


def test_an_elastic_dispatch_pulls_before_the_counts_are_there(rank: Rank) -> None:
    rank.elastic_dispatch()
    assert launches(rank, ROWS) == EXPANDED
    assert launches(rank, ROWS, do_zero_padding=True) == [*EXPANDED, "pad"]


def test_an_elastic_dispatch_pulls_again_for_want_of_room(rank: Rank) -> None:
    rank.elastic_dispatch()
    assert launches(rank, 2 * ROWS) == [*EXPANDED, "dispatch"]  # more rows, and more copies
    assert launches(rank, 2 * ROWS) == EXPANDED
    rank.elastic_dispatch(do_expand=False)
    compact = ["layout", "notify", "dispatch", "sources"]
    assert launches(rank, ROWS, do_expand=False) == compact
    assert launches(rank, 2 * ROWS, do_expand=False) == [*compact[:-1], "dispatch", "sources"]


def test_outputs_come_from_the_memory_of_comm_where_it_works_on_them(rank: Rank) -> None:
    def streams(**how: Any) -> list[tuple[object, ...]]:
        with Log(rank) as log:
            rank.elastic_dispatch(**how)
        return [line for line in log if line[0] in ("set stream", "record stream")]

    assert streams() == []
    stats = torch.zeros(EXPERTS // RANKS, dtype=torch.int32)
    for how in ({"allocate_on_comm_stream": True}, {"cumulative_local_expert_recv_stats": stats}):
        first, *recorded, last = streams(**how)
        assert (first, last) == (("set stream", "comm"), ("set stream", "default"))
        assert set(recorded) == {("record stream", "default")}


def test_async_finish_returns_the_event_and_keeps_the_tensors(rank: Rank) -> None:
    with Log(rank) as log:
        event = rank.combine(async_finish=True)[2].event
    assert isinstance(event, EventHandle)
    assert log == [
        *ENTRY,
        ("set stream", "comm"),
        *ENTRY,  # what was allocated in between may have been used there
        *COMBINE,
        *[("record stream", "default")],  # the output
        *[("record stream", "comm")] * 7,  # the rows and the handle
        ("record event", "comm", "event 1"),
        ("set stream", "default"),
    ]


def test_a_previous_event_is_all_that_is_waited_for(rank: Rank) -> None:
    event = EventOverlap(EventHandle())
    log = Log(rank)
    log.names[id(event.event._event)] = "given"  # type: ignore[union-attr]
    with log as lines:
        rank.combine(previous_event=event)
    assert lines == [
        ("wait for event", "comm", "given"),
        ("set stream", "comm"),
        *COMBINE,
        ("record stream", "default"),
        *leaving("event 0"),
        ("set stream", "default"),
    ]


def test_another_current_device_is_put_back(rank: Rank) -> None:
    rank.gpu.device = 3
    try:
        with Log(rank) as log:
            rank.combine()
            rank.low_latency_combine()
        devices = [line for line in log if line[0] == "set device"]
        assert devices == [("set device", 0), ("set device", 3)] * 2
        assert rank.gpu.device == 3
    finally:
        rank.gpu.device = 0


def test_a_failed_operation_leaves_the_streams_in_order(rank: Rank) -> None:
    comm = rank.buffer.runtime.comm  # type: ignore[union-attr]
    assert isinstance(comm, CommStream)
    with Log(rank) as log, pytest.raises(ArgumentError, match="bias"):
        rank.buffer.combine(rank.y, rank.handle, None, 3, async_finish=True)  # type: ignore[arg-type]
    assert log == [*ENTRY, ("set stream", "comm"), *leaving("event 1"), ("set stream", "default")]
    taken: list[bool] = []

    def take() -> None:
        taken.append(comm.lock.acquire(timeout=10))
        comm.lock.release()

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    assert taken == [True]


def test_low_latency_runs_on_the_current_stream(rank: Rank) -> None:
    first, other = torch.cuda.Stream(), torch.cuda.Stream()
    log = Log(rank)
    log.names |= {first.stream_id: "first", other.stream_id: "other"}
    with torch.cuda.stream(first):
        rank.low_latency_dispatch()
        with log as lines:
            rank.low_latency_dispatch()
            rank.low_latency_combine()
    assert lines == [("launch", "dispatch", "first"), ("launch", "combine", "first")]
    with torch.cuda.stream(other), log as lines:
        rank.low_latency_dispatch()
    launch = ("launch", "dispatch", "other")
    behind = [("record event", "first", "event 0"), ("wait for event", "other", "event 0")]
    assert [line for line in lines if line[0] != "set stream"] == [*behind, launch]


def test_places_of_tensors(rank: Rank) -> None:
    plane: Any = rank.buffer.runtime.party().plane  # type: ignore[union-attr]
    nothing = rank.x[:0]
    assert plane._places(None, nothing) == [0, 0]
    first, second, missing = plane._places(rank.x, rank.x[1], torch.empty(3))
    assert second - first == rank.x[0].nbytes
    assert plane._places(nothing, rank.x, None, rank.x[1]) == [0, first, 0, second]
    assert missing == -1


def test_places_are_known_while_the_memory_is_there(rank: Rank) -> None:
    plane: Any = rank.buffer.runtime.party().plane  # type: ignore[union-attr]
    driver: Any = plane._regions.driver
    columns = rank.x, None, rank.ids
    places = plane._places(*columns)
    assert plane._places(*columns) is places
    driver._identity.value += 1  # freed, and taken again: other allocations at the same addresses
    others = plane._places(*columns)
    assert [place >> words.PLACE_SHIFT.value for place in others] != [
        place >> words.PLACE_SHIFT.value for place in places
    ]
    assert plane._places(*columns) is others


# Launches.


class _Launcher:
    """Like Triton's: puts some things in front of the arguments, and calls ``launch``."""

    def __init__(self, *between: Any, takes_tuple: bool = False) -> None:
        self.between, self.launched, self.takes_tuple = between, [], takes_tuple
        self.launch = lambda *arguments: self.launched.append(arguments)

    def __call__(self, x: int, y: int, z: int, stream: int, function: object, *rest: Any) -> None:
        between = [value() if callable(value) else value for value in self.between]
        if self.takes_tuple:
            hooks, arguments = rest[:4], rest[4:]
            self.launch(x, y, z, stream, function, *between[:2], *hooks, *between[2:], arguments)
        else:
            self.launch(x, y, z, stream, function, *between, *rest)


def test_launches_are_those_of_tritons_launcher() -> None:
    leading = (11, (4, 1, 0), None, None, None)
    newer = _Launcher(False, True, None, None, [object()], b"signature", takes_tuple=True)
    for launcher in (_Launcher(False, True, None, None), _Launcher(), _Launcher(7), newer):
        run, found, takes_tuple = _below(launcher, leading)
        assert run is launcher.launch
        assert takes_tuple == launcher.takes_tuple
        assert launcher.launched == []  # it was only asked
        Variant(run, found, (None, None), takes_tuple).launch(3, 5, (70, 71))
        launcher(3, 1, 1, 5, *leading, 70, 71, None, None)
        assert launcher.launched[0] == launcher.launched[1]


def test_launchers_that_allocate_or_are_of_another_make_are_called_themselves() -> None:
    leading = (11, (4, 1, 0), None, None, None)

    def other(*_: object) -> None:
        pass

    for launcher in (_Launcher(lambda: torch.empty(1)), other):
        assert _below(launcher, leading) == (launcher, leading, False)
