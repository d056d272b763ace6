"""What a soak does with an ElasticBuffer: rows with their sources, compact and expanded, there and back.

An expert of rank r multiplies rows by the power of two that belongs to r. Formula of combine, expanded: ``y[t] = sum
over ranks r, ascending, of (sum over the choices of t on r, ascending, of the row)``, the inner sum rounded unless
there is one rounding.

Legend of dims: T tokens of a rank, K choices, M received rows, X expanded rows, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tokenferry.cli.soak_faults import Bench, expect
from tokenferry.cli.soak_world import FLOATS, World, factor_of, random_shape, random_values, same, same_rows
from tokenferry.elastic import ElasticBuffer

_MOST_TOKENS = 60
_ALIGNMENTS = (1, 4, 16)


class _Kept(NamedTuple):
    """An earlier dispatch."""

    world: World
    handle: Any
    num_rows: int
    """Of its outputs."""


class Elastic:
    """An ElasticBuffer under test.

    Args:
        bench: the dice of the ranks.
        timeout: in seconds.
    """

    def __init__(self, bench: Bench, timeout: float) -> None:
        self.bench = bench
        self.one_rounding = bench.common.random() < 0.3
        assert dist.group.WORLD is not None
        self.buffer = ElasticBuffer(
            dist.group.WORLD,
            bench.common.choice([0, 4096, 1 << 20]),
            num_gpu_timeout_secs=timeout,
            allow_multiple_reduction=not self.one_rounding,
            device=bench.device,
            node="one",
        )
        self._kept: _Kept | None = None

    def step(self) -> str:
        """One operation, checked; returns what it was."""
        common = self.bench.common
        steps: list[Callable[[_Kept], None]] = [self._cached, self._combine]
        if self._kept is None or common.random() < 0.4:
            self._dispatch()
            return "elastic dispatch"
        chosen = common.choice(steps)
        chosen(self._kept)
        return "elastic cached dispatch" if chosen == self._cached else "elastic combine"

    def _dispatch(self) -> None:
        bench, common = self.bench, self.bench.common
        world = World(random_shape(common, bench.num_ranks, _MOST_TOKENS), bench.rank)
        expand, alignment = common.random() < 0.6, common.choice(_ALIGNMENTS)
        is_twice = any(self._chooses_twice(one.ids) for one in world.inputs)
        host_waits = is_twice or common.random() < 0.5  # copies of a choice twice may find no room else
        mine = world.mine
        x: Any = mine.x.to(bench.device)
        if mine.scales is not None:
            x = x, mine.scales.to(bench.device)
        recv_x, ids, weights, handle, _ = self.buffer.dispatch(
            x,
            topk_idx=mine.ids.to(bench.device),
            topk_weights=mine.weights.to(bench.device),
            num_experts=world.num_experts,
            num_max_tokens_per_rank=max(*world.shape.tokens, 1),
            expert_alignment=alignment,
            do_expand=expand,
            do_cpu_sync=host_waits,
        )
        self._kept = kept = _Kept(world, handle, len(recv_x[0] if isinstance(recv_x, tuple) else recv_x))
        _, local, places = self._places(kept)
        there = local >= 0
        pairs = torch.bincount(local[there], minlength=world.shape.local_experts)
        counted = handle.num_unaligned_recv_tokens_per_expert
        expect(counted.tolist() == pairs.tolist(), f"pairs of the experts: {counted.tolist()}, not {pairs.tolist()}")
        self._check_rows(kept, recv_x, world.received_x())
        wanted = torch.where(there, world.received([one.weights for one in world.inputs]), 0.0)
        assert weights is not None
        if ids is not None:
            same("recv_topk_idx", ids[: len(local)], torch.where(there, local, -1))
            same("recv_topk_weights", weights[: len(local)], wanted)
        else:
            same(
                "recv_topk_weights", weights[places[there].to(weights.device)].view(-1, 1), wanted[there].view(-1, 1)
            )
            metadata = handle.recv_src_metadata[: len(local), 2:]
            same("places of the copies", metadata, places.to(torch.int32))

    @staticmethod
    def _chooses_twice(ids: torch.Tensor) -> bool:
        ordered = ids.sort(1).values
        return bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any())

    def _places(self, kept: _Kept) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[M, K]: choices of received rows; local ones, or -1; and the expanded row of each, or -1."""
        world, alignment = kept.world, kept.handle.expert_alignment
        num_local = world.shape.local_experts
        ids = world.received([one.ids for one in world.inputs])
        local = ids - world.rank * num_local
        local = local.masked_fill((ids < 0) | (local < 0) | (local >= num_local), -1)
        places = torch.full_like(local, -1)
        start = 0
        for expert in range(num_local):
            chosen = (local == expert).nonzero()
            places[chosen[:, 0], chosen[:, 1]] = torch.arange(start, start + len(chosen))
            start += -(-len(chosen) // alignment) * alignment
        return ids, local, places

    def _check_rows(self, kept: _Kept, recv_x: Any, wanted: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        if not kept.handle.do_expand:
            expect(kept.num_rows >= len(wanted[0]), f"{kept.num_rows} rows for {len(wanted[0])}")
            parts = tuple(part[: len(wanted[0])] for part in (recv_x if isinstance(recv_x, tuple) else (recv_x,)))
            same_rows(parts if len(parts) > 1 else parts[0], wanted)
            return
        _, local, places = self._places(kept)
        row = (local >= 0).nonzero()[:, 0]
        at = places[local >= 0]
        for got, sent in zip(recv_x if isinstance(recv_x, tuple) else (recv_x,), wanted, strict=False):
            assert sent is not None
            bits = got.contiguous().view(torch.uint8).cpu()
            same("expanded rows", bits[at], sent.contiguous().view(torch.uint8)[row])

    def _values(self, world: World, dtypes: Sequence[torch.dtype]) -> list[torch.Tensor]:
        common = self.bench.common
        return random_values(world.shape, common, common.kind(), dtypes, (1, 2, 3, 64))

    def _cached(self, kept: _Kept) -> None:
        values = self._values(kept.world, [*FLOATS, torch.uint8])
        mine = values[self.bench.rank].to(self.bench.device)
        recv_x = self.buffer.dispatch(mine, handle=kept.handle)[0]
        self._check_rows(kept, recv_x, (kept.world.received(values), None))

    def _combine(self, kept: _Kept) -> None:
        bench, world = self.bench, kept.world
        values = self._values(world, FLOATS)
        mine = world.expert_rows(values)
        x = mine.new_full((kept.num_rows, mine.size(1)), 7)
        if kept.handle.do_expand:
            _, local, places = self._places(kept)
            x[places[local >= 0]] = mine[(local >= 0).nonzero()[:, 0]]
        else:
            x[: len(mine)] = mine
        combined, _, _ = self.buffer.combine(x.to(bench.device), kept.handle)
        same("combined_x", combined, self._combined(kept, values[bench.rank]))

    def _combined(self, kept: _Kept, values: torch.Tensor) -> torch.Tensor:
        world = kept.world
        if not kept.handle.do_expand:
            return world.combined(values, [], [0] * world.num_ranks, False)
        wide = torch.promote_types(values.dtype, torch.float32)
        total = torch.zeros(values.shape, dtype=wide)
        for rank in range(world.num_ranks):
            row, partial = (values * factor_of(rank)).to(wide), torch.zeros_like(total)
            for ids in world.mine.ids.unbind(1):
                partial += torch.where(
                    (ids.div(world.shape.local_experts, rounding_mode="floor") == rank)[:, None], row, 0
                )
            total += partial if self.one_rounding else partial.to(values.dtype).to(wide)
        return total.to(values.dtype)
