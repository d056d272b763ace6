"""Ranks that suffer a fault: on every kind of Buffer, with results checked before and afterwards. Runs on the ranks.

All ranks dispatch; then the last one acts, and the others go on to combine, dispatch, combine ... as if nothing were,
until something is raised. What an ``act`` does is in the tests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests import cases, internode_cases, internode_low_latency_cases, low_latency_cases
from tests.elastic_cases import Elastic
from tests.faults import After, Holdings, Seen
from tokenferry import Buffer, BufferStateError, ElasticBuffer
from tokenferry.memory.heap import Heap

NORMAL = "dispatch, combine"
EXPANDED = "`ElasticBuffer`"
QUICK = "low latency"
MASKING = "low latency, `enable_shrink`"
NODES = "two nodes"
QUICK_NODES = "two nodes, low latency"
ONE_NODE = (NORMAL, EXPANDED, QUICK)
ALL = (*ONE_NODE, NODES, QUICK_NODES)
LAYOUT = "2x2"
LARGE = 4096
"""Bytes of a row with which rows do not fit the smallest stage at a time."""
OPERATIONS = 4
"""After which a rank that has raised nothing gives up."""
LATE = 0.5
"""Seconds that the other ranks stay away where the rank at fault is to wait for them."""


def num_ranks_of(kind: str) -> int:
    return len(internode_cases.LAYOUTS[LAYOUT]) if kind in (NODES, QUICK_NODES) else 3


class World:
    """A kind of Buffer on one rank, with operations that are checked against the oracle.

    Args:
        kind: of Buffer.
        rank: this one.
        num_ranks: by default as many as the kind wants; fewer are on one node.
        row_bytes: of a row, if it is not a small one; rows go through the smallest stage then.
        masked: ranks that low-latency operations go on without.
    """

    def __init__(
        self,
        kind: str,
        rank: int,
        num_ranks: int | None = None,
        *,
        row_bytes: int = 0,
        masked: tuple[int, ...] = (),
    ) -> None:
        self.kind, self.rank = kind, rank
        self.num_ranks = num_ranks or num_ranks_of(kind)
        across = num_ranks is None and kind in (NODES, QUICK_NODES)
        self.options: dict[str, Any] = {"node": internode_cases.LAYOUTS[LAYOUT][rank]} if across else {}
        width = row_bytes or 128
        if row_bytes:
            self.options["num_nvl_bytes"] = 128
        tokens = (7, 4) if row_bytes != LARGE else (40,)
        case = cases.Case(tokens=tokens, row_bytes=width, combine_bytes=width)
        quick_case = low_latency_cases.Case(
            tokens=(5, 3, 4), num_topk=4, routing="distinct", hidden=row_bytes // 2 or 128
        )
        self.scenario: Any
        if kind in (QUICK, MASKING, QUICK_NODES):
            self.options |= {"low_latency_mode": True, "enable_shrink": kind == MASKING}
            if across:
                self.scenario = internode_low_latency_cases.NodeScenario(quick_case, rank, LAYOUT)
            else:
                self.scenario = low_latency_cases.Scenario(quick_case, rank, self.num_ranks, masked)
        elif kind == EXPANDED:
            self.scenario = Elastic(case, rank, self.num_ranks, expand=True)
        elif across:
            self.scenario = internode_cases.NodeScenario(case, rank, LAYOUT)
        else:
            self.scenario = cases.Scenario(case, rank, self.num_ranks)

    def open(self, timeout: float = cases.TIMEOUT, group: Any = None, **options: Any) -> Any:
        """A Buffer of this kind. Collective."""
        group = group or dist.group.WORLD
        if self.kind == EXPANDED:
            return ElasticBuffer(group, num_gpu_timeout_secs=timeout)
        return Buffer(group, timeout=timeout, **self.options, **options)

    def dispatch(self, buffer: Any) -> tuple[Any, ...]:
        """Dispatch, checked."""
        result: tuple[Any, ...] = self.scenario.dispatch(buffer)
        if self.kind == EXPANDED:
            self.scenario.check_rows(result[0])
        else:
            self.scenario.check_dispatch(result)
        return result

    def combine(self, buffer: Any, result: tuple[Any, ...]) -> None:
        """Combine what belongs to a dispatch, checked."""
        if self.kind == EXPANDED:
            self.scenario.check_combine(buffer, result[3], len(result[0]))
        elif self.kind in (QUICK, MASKING, QUICK_NODES):
            self.scenario.check_combine(self.scenario.combine(buffer, result))
        else:
            self.scenario.check_combine(self.scenario.combine(buffer, result[4]))

    def turn(self, buffer: Any) -> None:
        """One after the other."""
        self.combine(buffer, self.dispatch(buffer))

    def operations(self, buffer: Any, result: tuple[Any, ...]) -> Iterator[Callable[[], object]]:
        """Combine, dispatch, combine ...: a rank that has done one may do the next."""
        for _ in range(OPERATIONS // 2):
            yield lambda: self.combine(buffer, result)
            yield lambda: self.dispatch(buffer)


class Situation:
    """What an act has to do with.

    Attributes:
        world: of the rank.
        buffer: that all ranks have dispatched with.
        result: of that.
        rank: at fault.
    """

    def __init__(self, world: World, buffer: Any, result: tuple[Any, ...], mark: Path) -> None:
        self.world, self.buffer, self.result, self.rank = world, buffer, result, world.rank
        self._mark = mark

    def happens(self, note: str = "") -> None:
        """Write down that the fault happens now, as this process may not live to tell."""
        self._mark.write_text(f"{time.monotonic()} {note}")


Act = Callable[[Situation], bool]
"""Done by the rank at fault; whether it goes on like the others then. If not, it stays away and keeps its Buffer."""


def suffer(
    rank: int,
    num_ranks: int,
    kind: str,
    act: Act,
    after: After,
    timeout: float,
    mark: Path,
    options: dict[str, Any],
) -> Seen:
    """What a rank sees of a fault of the last one.

    Args:
        rank: this one.
        num_ranks: of the group.
        kind: of Buffer.
        act: of the rank at fault.
        after: what is tried in the end.
        timeout: deadline of the Buffer.
        mark: where the rank at fault says when.
        options: ``row_bytes`` of :class:`World`; ``late``: the other ranks stay away for a while; ``read_late``: they
            read the memory of the rank at fault when it is gone; ``everybody`` does as the rank at fault;
            ``own_group``: the Buffer has a process group of its own.
    """
    last, seen = num_ranks - 1, Seen()
    world = World(kind, rank, row_bytes=options.get("row_bytes", 0))
    with world.open() as buffer:  # what libraries keep for good, they have from here on
        world.turn(buffer)
    before = Holdings.settled()
    group = dist.new_group(list(range(num_ranks))) if options.get("own_group") else None
    buffer = world.open(timeout, group)
    result = world.dispatch(buffer)
    dist.barrier()
    goes_on = True
    if rank == last or options.get("everybody"):
        situation = Situation(world, buffer, result, mark)
        situation.happens()
        with seen.operation():
            goes_on = act(situation)
        if seen.error is None:
            seen.operations.clear()  # an act that returns is none
        del situation
    elif options.get("late"):
        time.sleep(LATE)
    if after is After.WITHOUT and rank != last:
        world = World(kind, rank, masked=(last,))
    for operation in world.operations(buffer, result):
        if seen.error is not None or not goes_on:
            break
        with seen.operation(), _reading_late(last, seen) if options.get("read_late") else nullcontext():
            operation()
    seen.available = buffer.is_available()
    if not seen.available and buffer.runtime is not None:
        try:
            world.dispatch(buffer)
            raise AssertionError("a Buffer that is lost goes on")
        except BufferStateError:
            pass
    _try(world, buffer, after, last)
    del buffer, result, operation, world, group
    seen.left = before.left()
    return seen


@contextmanager
def _reading_late(owner: int, seen: Seen) -> Iterator[None]:
    """Begin to read the owner's memory when it has destroyed its Buffer, or does not do so for a while."""
    stage_view = Heap.stage_view

    def view(heap: Heap, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        if rank == owner != heap.rank:
            seen.read_late |= cases.wait_for(lambda: heap.trouble([owner]) is not None, 0.3)
        return stage_view(heap, rank, offset, nbytes)

    with mock.patch.object(Heap, "stage_view", view):
        yield


def _try(world: World, buffer: Any, after: After, last: int) -> None:
    """What ranks can do afterwards; in the end the Buffer is gone."""
    if after is After.GOES_ON:
        dist.barrier()
        world.turn(buffer)
    elif after is After.WITHOUT and world.rank != last:
        world.turn(buffer)
    elif after is After.SHRINK:
        # Between nodes a whole node goes, as all nodes must have the same number of ranks.
        node_of = buffer.topology.node_of
        gone = [rank for rank in range(world.num_ranks) if node_of[rank] == node_of[last]]
        gone = gone if len(set(node_of)) > 1 else [last]
        if world.rank not in gone:
            buffer.shrink(gone)
            survivors = World(world.kind, buffer.rank, buffer.group_size)
            survivors.turn(buffer)
    if after is After.ANEW:
        dist.barrier()
    buffer.destroy()
    if after is After.ANEW:
        with world.open() as again:
            world.turn(again)
    elif after is After.SURVIVORS:
        group = dist.new_group(list(range(last)), use_local_synchronization=True)
        with World(world.kind, world.rank, last).open(group=group) as again:
            World(world.kind, world.rank, last).turn(again)
        dist.destroy_process_group(group)


Spoil = Callable[[Path], AbstractContextManager[None]]
"""Makes something wrong for the time of a block; writes down when, for the rank at fault."""


def construct(
    rank: int, num_ranks: int, kind: str, spoil: Spoil, after: After, mark: Path, options: dict[str, Any]
) -> Seen:
    """What a rank sees when a Buffer is made while something is wrong on the last one; arguments as above.

    ``deadline`` is that of the process group, in seconds.
    """
    world, seen = World(kind, rank), Seen(available=False)
    with world.open() as buffer:
        world.turn(buffer)
    before = Holdings.settled()
    seconds = timedelta(seconds=options["deadline"]) if "deadline" in options else None
    group = dist.new_group(list(range(num_ranks)), seconds)
    dist.barrier(group)
    spoils = spoil(mark) if rank == num_ranks - 1 or options.get("everybody") else nullcontext()
    with spoils, seen.operation():
        world.open(group=group)
    if rank != num_ranks - 1 or after is After.LATER:
        dist.destroy_process_group(group)
    del group
    if after is After.LATER:
        with world.open() as buffer:
            world.turn(buffer)
    seen.left = before.left()
    return seen
