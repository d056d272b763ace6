"""Faults that a soak injects, and the errors that every rank must see.

Those of :data:`DURING` leave the Buffer usable; those of :data:`AFTERWARDS` end it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.buffer import Buffer
from tokenferry.cli.soak_world import Chance, World, random_shape, same_rows
from tokenferry.errors import (
    ArgumentError,
    CapacityError,
    HeapError,
    MismatchError,
    PeerError,
    PeerLostError,
    TokenferryError,
)
from tokenferry.memory.shm import Segment

_FAULT_TIMEOUT = 30.0
_MOST_TOKENS = 12
_LATE = 0.3


@dataclass(frozen=True)
class Bench:
    """A Buffer under test, and the dice of its ranks."""

    buffer: Buffer
    rank: int
    num_ranks: int
    layout: tuple[int, ...]
    exact: bool
    device: torch.device
    common: Chance
    own: random.Random

    def dispatch(self, world: World, buffer: Buffer | None = None, **options: Any) -> tuple[Any, ...]:
        """A dispatch of what this rank brings, with fresh counts."""
        buffer, mine = buffer or self.buffer, world.mine
        ids = mine.ids.to(self.device)
        per_rank, per_node, per_expert, member, _ = buffer.get_dispatch_layout(ids, world.num_experts)
        x: Any = mine.x.to(self.device)
        if mine.scales is not None:
            x = x, mine.scales.to(self.device)
        return buffer.dispatch(
            options.pop("x", x),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_node,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            topk_idx=options.pop("topk_idx", ids),
            topk_weights=mine.weights.to(self.device),
            **options,
        )

    def world(self) -> World:
        """A small one, with a row for every rank."""
        shape = random_shape(self.common, self.num_ranks, _MOST_TOKENS)
        tokens = tuple(count + 4 for count in shape.tokens)
        seeds = iter(lambda: self.common.getrandbits(40), None)
        for seed in seeds:
            shape = type(shape)(tokens, torch.bfloat16, shape.row_bytes, 0, 4, shape.local_experts, 0.0, seed)
            world = World(shape, self.rank)
            if min(world.num_received) > 1:
                return world
        raise AssertionError

    def odd(self) -> int:
        """The rank that is at fault."""
        return self.common.randrange(self.num_ranks)

    def works(self, world: World, buffer: Buffer | None = None) -> None:
        """An ordinary dispatch."""
        world.check_received(self.dispatch(world, buffer), 1, 0)


def expect(is_true: bool, otherwise: str) -> None:
    """Raise unless something is true."""
    if not is_true:
        raise AssertionError(otherwise)


@contextmanager
def expected(*kinds: type[TokenferryError], ranks: list[int] | None = None) -> Iterator[None]:
    """Let the block raise one of these errors, which names these ranks."""
    try:
        yield
    except kinds as error:
        if ranks is not None and isinstance(error, PeerError):
            expect(list(error.ranks) == ranks, f"blames ranks {error.ranks}, not {ranks}: {error}")
    else:
        raise AssertionError(f"no {' or '.join(kind.__name__ for kind in kinds)}")


def _other_width(bench: Bench) -> None:
    """One rank dispatches rows of another width."""
    world, odd = bench.world(), bench.odd()
    x = world.mine.x.to(bench.device)
    with expected(MismatchError):
        bench.dispatch(world, x=torch.cat([x, x], 1) if bench.rank == odd else x)


def _other_operation(bench: Bench) -> None:
    """One rank combines, the others dispatch."""
    world, odd = bench.world(), bench.odd()
    result = bench.dispatch(world)
    with expected(MismatchError):
        if bench.rank == odd:
            bench.buffer.combine(result[0], result[4])
        else:
            bench.dispatch(world)


def _too_few_rows(bench: Bench) -> None:
    """One rank's outputs are too small for what it receives."""
    world, odd = bench.world(), bench.odd()
    worst = world.num_received[bench.rank] - (bench.rank == odd)
    with expected(CapacityError, ranks=[odd]):
        bench.dispatch(world, num_worst_tokens=worst)


def _bad_argument(bench: Bench) -> None:
    """One rank gives an expert that does not exist, is told so, and then calls as it should."""
    world, odd = bench.world(), bench.odd()
    if bench.rank == odd:
        with expected(ArgumentError):
            bench.dispatch(world, topk_idx=world.mine.ids + world.num_experts)
    bench.works(world)


def _very_late(bench: Bench) -> None:
    """One rank comes much later than the others."""
    world, odd = bench.world(), bench.odd()
    if bench.rank == odd:
        time.sleep(_LATE)
    bench.works(world)


@contextmanager
def _no_memory() -> Iterator[None]:
    """Let shared memory of this process not grow."""
    commit = Segment.commit

    def refuse(self: Segment, size: int) -> None:
        if size > self.committed:
            raise HeapError("no room (injected)")
        commit(self, size)

    Segment.commit = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        Segment.commit = commit  # type: ignore[method-assign]


def _out_of_memory(bench: Bench) -> None:
    """One rank gets no memory for its stage, once, on a Buffer of its own; then it does."""
    odd, world = bench.odd(), bench.world()
    wide = torch.arange(len(world.mine.x)).to(torch.uint8)[:, None].expand(-1, 256 << 10).contiguous()
    with Buffer(dist.group.WORLD, 4096, timeout=_FAULT_TIMEOUT, device="cpu", node="one") as buffer:
        with expected(CapacityError, ranks=[odd]):
            if bench.rank == odd:
                with _no_memory():
                    bench.dispatch(world, buffer, x=wide)
            else:
                bench.dispatch(world, buffer, x=wide)
        got = bench.dispatch(world, buffer, x=wide)[0]
        counts = [torch.arange(len(one.x)).to(torch.uint8)[:, None] for one in world.inputs]
        same_rows(got[:, :1], (world.received(counts), None))


@dataclass(frozen=True)
class Fault:
    """One that the Buffer survives."""

    inject: Callable[[Bench], None]
    only_cpu: bool = False
    only_one_node: bool = False

    def fits(self, bench: Bench) -> bool:
        """Whether it can be injected here."""
        if bench.num_ranks == 1 or (self.only_one_node and max(bench.layout) > 0):
            return False
        return bench.device.type == "cpu" or not self.only_cpu


DURING: dict[str, Fault] = {
    "rows of another width": Fault(_other_width),
    "another operation": Fault(_other_operation, only_cpu=True),
    "too few rows": Fault(_too_few_rows, only_cpu=True),
    "bad argument": Fault(_bad_argument, only_cpu=True),
    "rank 300 ms late": Fault(_very_late),
    "no memory for a stage": Fault(_out_of_memory, only_cpu=True, only_one_node=True),
}


def _gone(bench: Bench) -> None:
    """One rank destroys its Buffer without a word."""
    odd, world = bench.odd(), bench.world()
    if bench.rank == odd:
        bench.buffer.destroy()
    else:
        with expected(PeerLostError):
            bench.dispatch(world)
        expect(not bench.buffer.is_available(), "the Buffer is usable without a rank")


def _low_latency_disagreement(bench: Bench) -> None:
    """One rank sends rows of another width in a mode that cannot step back."""
    odd = bench.odd()
    x = torch.zeros((4, 256 if bench.rank == odd else 128), dtype=torch.bfloat16)
    with expected(MismatchError, PeerLostError):
        bench.buffer.low_latency_dispatch(
            x, torch.zeros((4, 1), dtype=torch.int64), 4, bench.num_ranks, use_fp8=False
        )
    expect(not bench.buffer.is_available(), "the Buffer is usable after a low-latency disagreement")


AFTERWARDS: dict[str, Callable[[Bench], None]] = {
    "Buffer destroyed on one rank": _gone,
    "low-latency disagreement": _low_latency_disagreement,
}
