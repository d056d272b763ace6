"""What a soak does with CUDA graphs: operations of both modes in one graph, replayed between eager calls.

The tensors that a graph reads stay where they are; what they hold, and so the routes, is new for every replay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from tokenferry.cli.soak_faults import Bench
from tokenferry.cli.soak_low_latency import Flight
from tokenferry.cli.soak_world import FLOATS, World, random_shape, same

_MOST_TOKENS = 40
_MOST_REPLAYS = 3


def fits(bench: Bench) -> bool:
    """Whether there are graphs, and all operations may be in one."""
    return bench.device.type == "cuda" and max(bench.layout) == 0


def capture(run: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph of what ``run`` puts on the current stream.

    Returns:
        What replays it.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


class Replays:
    """A graph with a dispatch, a cached dispatch, a combine and a low-latency pair.

    Args:
        bench: of a Buffer with low-latency mode.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        shape = random_shape(bench.common, bench.num_ranks, _MOST_TOKENS)
        self.shape = replace(shape, dtype=bench.common.kind().choice(FLOATS), num_scales=0)
        self.worst = max(1, sum(shape.tokens))
        mine = World(self.shape, bench.rank).mine
        self.x, self.ids, self.weights = (part.to(bench.device) for part in (mine.x, mine.ids, mine.weights))
        self.flight = Flight(bench)
        self.result: tuple[Any, ...] = ()
        self._run()
        self.flight.check_dispatch()
        self._run()  # what a graph holds has run before: nothing is compiled in it
        self._read_by_the_graph = self.flight.out
        self.replay = capture(self._run)

    def _run(self) -> None:
        buffer, experts = self.bench.buffer, self.bench.num_ranks * self.shape.local_experts
        per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(self.ids, experts)
        received = buffer.dispatch(
            self.x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            topk_idx=self.ids,
            topk_weights=self.weights,
            num_worst_tokens=self.worst,
        )
        assert received[4] is not None
        assert isinstance(received[0], torch.Tensor)
        again = buffer.dispatch(self.x, handle=received[4])[0]
        combined = buffer.combine(received[0], received[4], received[2])
        self.flight.dispatch(False)
        if self.flight.has_rows():
            self.flight.combine(False)
        self.result = received, again, combined

    def step(self) -> int:
        """Replay with other rows and routes, and check; returns how often."""
        bench = self.bench
        times = bench.common.randrange(1, _MOST_REPLAYS + 1)
        world = World(replace(self.shape, seed=bench.common.getrandbits(40)), bench.rank)
        for mine, given in zip((self.x, self.ids, self.weights), _brought(world), strict=True):
            mine.copy_(given)
        for _ in range(times):
            self.replay()
        received, again, (combined, weights, _) = self.result
        world.check_received(received, 1, self.worst)
        rows, _ = world.received_x()
        same("recv_x along the handle", again[: len(rows)], rows)
        values = world.mine.x
        wide = torch.promote_types(values.dtype, torch.float32)
        counts = world.members[bench.rank].sum(1)
        total = torch.zeros(values.shape, dtype=wide)
        for times_added in range(world.num_ranks):
            total += values.to(wide) * (counts > times_added)[:, None]
        same("combined_x", combined, total.to(values.dtype))
        same("combined_topk_weights", weights, torch.where(world.mine.ids >= 0, world.mine.weights, 0.0))
        self.flight.check_dispatch()
        self.flight.check_combine()
        return times


def _brought(world: World) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return world.mine.x, world.mine.ids, world.mine.weights
