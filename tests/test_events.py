"""EventHandle, EventOverlap, and the event arguments of every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, Case, Scenario, check_works
from tests.conftest import PoolOf
from tokenferry import ArgumentError, Buffer, EventHandle, EventOverlap

CASE = Case(tokens=(9, 4), bias="one")


class CountingEvent(EventHandle):
    """Counts the waits, and writes them into a log that others share."""

    def __init__(self, log: list[str] | None = None) -> None:
        super().__init__()
        self.log: list[str] = [] if log is None else log

    def current_stream_wait(self) -> None:
        super().current_stream_wait()
        self.log.append("wait")


def test_event_handle_needs_nothing() -> None:
    EventHandle().current_stream_wait()
    assert Buffer.capture().event is not None
    Buffer.capture().current_stream_wait()


def test_attributes() -> None:
    empty = EventOverlap()
    assert empty.event is None
    assert empty.extra_tensors is None
    handle, tensors = EventHandle(), (torch.zeros(1),)
    assert EventOverlap(handle).event is handle
    assert EventOverlap(handle, tensors).extra_tensors is tensors
    assert EventOverlap(event=handle, extra_tensors=tensors).event is handle


def test_wait_without_event_raises() -> None:
    with pytest.raises(AssertionError, match="event"):
        EventOverlap().current_stream_wait()
    with pytest.raises(RuntimeError, match="event"):
        EventOverlap(None).current_stream_wait()


def test_wait_may_be_repeated() -> None:
    event = CountingEvent()
    overlap = EventOverlap(event)
    overlap.current_stream_wait()
    overlap.current_stream_wait()
    assert event.log == ["wait", "wait"]


def test_release_drops_event_and_tensors() -> None:
    event = CountingEvent()
    overlap = EventOverlap(event, (torch.zeros(1),))
    overlap.current_stream_wait(release_handle=True)
    assert event.log == ["wait"]
    assert overlap.event is None
    assert overlap.extra_tensors is None


def test_hook_runs_once_and_after_the_wait() -> None:
    event = CountingEvent()
    overlap = EventOverlap(event)
    overlap.register_hook_after_wait(lambda: event.log.append("hook"))
    assert overlap.hook_after_wait is not None
    overlap.current_stream_wait()
    assert overlap.hook_after_wait is None
    overlap.current_stream_wait()
    assert event.log == ["wait", "hook", "wait"]


@pytest.mark.parametrize("called", [False, True])
def test_block_waits_at_its_end(called: bool) -> None:
    event = CountingEvent()
    overlap = EventOverlap(event)
    with overlap() if called else overlap as entered:
        assert entered is overlap
        event.log.append("body")
    assert event.log == ["body", "wait"]
    assert overlap.event is event


def test_called_with_release_drops_the_event_after_the_block() -> None:
    event = CountingEvent()
    overlap = EventOverlap(event, (torch.zeros(1),))
    with overlap(release_handle=True):
        assert overlap.event is event
    assert event.log == ["wait"]
    assert overlap.event is None
    assert overlap.extra_tensors is None


def test_called_with_release_runs_the_hook_too() -> None:
    event = CountingEvent()
    overlap = EventOverlap(event)
    overlap.register_hook_after_wait(lambda: event.log.append("hook"))
    with overlap(release_handle=True):
        pass
    assert event.log == ["wait", "hook"]
    assert overlap.event is None
    overlap.event = CountingEvent(event.log)
    with overlap:
        pass
    assert overlap.event is not None, "once"


def test_block_without_event() -> None:
    with EventOverlap(), EventOverlap()():
        pass


def test_block_waits_and_passes_exceptions_on() -> None:
    event = CountingEvent()
    with pytest.raises(KeyError), EventOverlap(event):
        raise KeyError
    assert event.log == ["wait"]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "layout": lambda buffer, it, handle, **options: buffer.get_dispatch_layout(
        it.given.topk_idx, it.num_experts, **options
    ),
    "dispatch": lambda buffer, it, handle, **options: it.dispatch(buffer, **options),
    "dispatch_without_topk": lambda buffer, it, handle, **options: it.dispatch(buffer, topk=False, **options),
    "cached_dispatch": lambda buffer, it, handle, **options: buffer.dispatch(it.x, handle=handle, **options),
    "worst_case_dispatch": lambda buffer, it, handle, **options: it.dispatch(buffer, num_worst_tokens=50, **options),
    "combine": lambda buffer, it, handle, **options: it.combine(buffer, handle, **options),
}


def _event_arguments(rank: int, num_ranks: int, name: str) -> None:
    operation = OPERATIONS[name]
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        scenario = Scenario(CASE, rank, num_ranks)
        handle = scenario.dispatch(buffer)[4]
        for previous in (None, EventOverlap(), EventOverlap(None), Buffer.capture(), EventOverlap(CountingEvent())):
            for async_finish in (False, True):
                result = operation(buffer, scenario, handle, previous_event=previous, async_finish=async_finish)
                event = result[-1]
                assert isinstance(event, EventOverlap)
                assert (event.event is not None) == async_finish
                if async_finish:
                    assert isinstance(event.event, EventHandle)
                    event.current_stream_wait()
        counting = CountingEvent()
        options = {"async_finish": True, "allocate_on_comm_stream": True}
        result = operation(buffer, scenario, handle, previous_event=EventOverlap(counting), **options)
        assert counting.log == ["wait"]
        with result[-1]:
            pass


@pytest.mark.parametrize("name", OPERATIONS)
def test_events_of_operations(pool_of: PoolOf, name: str) -> None:
    pool_of(2).run(_event_arguments, name)


def _chained(rank: int, num_ranks: int) -> None:
    """Every operation waits for the event of the one before, as Megatron's and SGLang's do."""
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        scenario = Scenario(CASE, rank, num_ranks)
        for asynchronous in (False, True):
            options: dict[str, Any] = {"async_finish": asynchronous, "allocate_on_comm_stream": asynchronous}
            previous = EventOverlap(EventHandle())
            layout = buffer.get_dispatch_layout(
                scenario.given.topk_idx, scenario.num_experts, previous_event=previous, **options
            )
            per_rank, per_node, per_expert, member, event = layout
            *results, event = buffer.dispatch(
                scenario.x,
                **scenario.topk_arguments(),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=member,
                num_tokens_per_expert=per_expert,
                previous_event=event,
                **options,
            )
            scenario.check_dispatch((*results, EventOverlap()))
            combined = scenario.combine(buffer, results[4], previous_event=event, **options)
            if asynchronous:
                combined[-1].current_stream_wait()
            scenario.check_combine((*combined[:2], EventOverlap()))


def test_chain_of_events(pool_of: PoolOf) -> None:
    pool_of(2).run(_chained)


BAD_OPTIONS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "no previous event": ("allocate_on_comm_stream", lambda: {"async_finish": True, "allocate_on_comm_stream": True}),
    "empty previous event": (
        "allocate_on_comm_stream",
        lambda: {"previous_event": EventOverlap(), "async_finish": True, "allocate_on_comm_stream": True},
    ),
    "not async": (
        "allocate_on_comm_stream",
        lambda: {"previous_event": Buffer.capture(), "allocate_on_comm_stream": True},
    ),
    "neither": ("allocate_on_comm_stream", lambda: {"allocate_on_comm_stream": True}),
    "not an event": ("previous_event", lambda: {"previous_event": "now"}),
}


def _bad_event_arguments(rank: int, num_ranks: int, name: str) -> None:
    operation = OPERATIONS[name]
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        scenario = Scenario(CASE, rank, num_ranks)
        handle = scenario.dispatch(buffer)[4]
        for argument, options in BAD_OPTIONS.values():
            if rank == 1:
                with pytest.raises(ArgumentError, match=f"^{argument}"):
                    operation(buffer, scenario, handle, **options())
        check_works(buffer)


@pytest.mark.parametrize("name", OPERATIONS)
def test_event_rules_raise_before_peers_are_touched(pool_of: PoolOf, name: str) -> None:
    pool_of(2).run(_bad_event_arguments, name)


def _comm_stream(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        assert isinstance(buffer.get_comm_stream(), torch.cpu.Stream)


def test_comm_stream(pool_of: PoolOf) -> None:
    pool_of(1).run(_comm_stream)
