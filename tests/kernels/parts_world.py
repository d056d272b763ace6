"""Ranks of a node that move the rows of several source nodes part by part: the CUDA data plane over the simulator.

A *source* is a rank of some node; its rows come through the rank of this node with its local index, in chunks. Part c
of a node are the chunks c of its sources. All that a plane is asked to do is only queued, until ``world.run()``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from tests.cases import same
from tests.kernels.test_elastic_plane import Plane
from tests.kernels.world import Simulated, World
from tokenferry.dataplane import HeldRows, OperationKind, Outputs, PartPlan, ReducePlan, SendPlan, Signature
from tokenferry.dataplane.cuda import parts_programs
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.handles import DispatchHandle

FIRST_EXPERT = 6
SPARE_ROWS = 2
FILL = 0xAB


def signature(number: int = 7) -> Signature:
    return Signature(OperationKind.DISPATCH, number, 0, 0, 0, 0, 0, 0)


def simulate(monkeypatch: Any, world: World, module: ModuleType | None = None) -> None:
    """Put the simulated kernels for parts in the place of the compiled ones; ``module``: mutants of them."""
    for name in ("announce_part", "note_held"):
        original = getattr(parts_programs, f"_{name.upper()}")
        simulated = Simulated(world.simulator, getattr(module or parts_programs.kernels, name), original)
        monkeypatch.setattr(parts_programs, f"_{name.upper()}", simulated)
        getattr(parts_programs, f"_{name}").cache_clear()
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


class PartsPlane(Plane):
    """A data plane to whom nothing is reported: tests look for themselves."""

    def __init__(self, world: World, rank: int) -> None:
        super().__init__(world, rank, lambda: None)
        self.status.check = lambda: None  # type: ignore[method-assign]

    def empty(self, count: int) -> torch.Tensor:
        tensor = super().empty(count)
        self._world.kept.append(tensor)  # the queue runs later
        return tensor.fill_(-7)

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        tensor = super().empty_rows(num_rows, width, dtype)
        self._world.kept.append(tensor)
        return tensor.fill_(-7)

    def _aligned(self, tensor: torch.Tensor) -> torch.Tensor:
        self._world.kept.append(super()._aligned(tensor))
        return self._world.kept[-1]


@dataclass(frozen=True)
class Load:
    """What the sources of some nodes send to R ranks; ``tokens[node][source]``."""

    tokens: tuple[tuple[int, ...], ...]
    chunks: tuple[tuple[int, ...], ...]
    row_bytes: int = 32
    scale_bytes: int = 0
    num_topk: int = 0
    width: int = 16
    dtype: torch.dtype = torch.bfloat16
    sums: torch.dtype = torch.bfloat16
    num_weights: int = 0
    seed: int = 0


@dataclass
class Source:
    """The rows of one source, and what came of those for each rank."""

    rows: torch.Tensor
    scales: torch.Tensor | None
    ids: torch.Tensor | None
    weights: torch.Tensor | None
    member: torch.Tensor

    def part(self, number: int, chunk: int) -> Source:
        span = slice(number * chunk, (number + 1) * chunk)
        return Source(*(None if t is None else t[span] for t in vars(self).values()))  # type: ignore[arg-type]


class Parts:
    """A dispatch in parts, and combines of its rows."""

    def __init__(self, world: World, load: Load, num_sms: int = 4) -> None:
        self.world, self.load, self.num_ranks, self.num_sms = world, load, world.num_ranks, num_sms
        self.local_experts = 3
        self.planes = [PartsPlane(world, rank) for rank in range(self.num_ranks)]
        generator = torch.Generator().manual_seed(load.seed)
        self.sources = [[self._source(count, generator) for count in counts] for counts in load.tokens]
        self.num_parts = [
            max(-(-count // chunk) for count, chunk in zip(*pair, strict=True))
            for pair in zip(load.tokens, load.chunks, strict=True)
        ]
        self.counts = [
            [[int(source.member[:, rank].sum()) for source in node] for node in self.sources]
            for rank in range(self.num_ranks)
        ]
        self.num_rows = [sum(map(sum, counts)) for counts in self.counts]
        self.room = [count + SPARE_ROWS for count in self.num_rows]
        self.outputs = [self._outputs(rank) for rank in range(self.num_ranks)]
        self.starts = [self._starts(rank) for rank in range(self.num_ranks)]
        self.columns = [self._columns(rank, generator) for rank in range(self.num_ranks)]

    def _source(self, count: int, generator: torch.Generator) -> Source:
        load, experts = self.load, FIRST_EXPERT + self.num_ranks * self.local_experts + 3

        def integers(high: int, *sizes: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
            return torch.randint(high, sizes, dtype=dtype, generator=generator)

        return Source(
            integers(256, count, load.row_bytes),
            integers(256, count, load.scale_bytes) if load.scale_bytes else None,
            integers(experts, count, load.num_topk, dtype=torch.int64) - 1 if load.num_topk else None,
            torch.rand(count, load.num_topk, generator=generator) if load.num_topk else None,
            integers(3, count, self.num_ranks) > 0,
        )

    def _outputs(self, rank: int) -> Outputs:
        load, count = self.load, self.room[rank] + SPARE_ROWS
        return Outputs(
            torch.full((count, load.row_bytes), FILL, dtype=torch.uint8),
            torch.full((count, load.scale_bytes), FILL, dtype=torch.uint8) if load.scale_bytes else None,
            torch.full((count, load.num_topk), 777) if load.num_topk else None,
            torch.full((count, load.num_topk), 7.5) if load.num_topk else None,
            torch.full((count,), -9, dtype=torch.int32),
        )

    def _starts(self, rank: int) -> list[torch.Tensor]:
        flat = torch.tensor([count for node in self.counts[rank] for count in node])
        return list((flat.cumsum(0) - flat).view(len(self.sources), -1).clone())

    def _columns(self, rank: int, generator: torch.Generator) -> list[torch.Tensor]:
        def rows(width: int, dtype: torch.dtype) -> torch.Tensor:
            values = torch.randn(self.num_rows[rank], width, generator=generator).to(dtype)
            return torch.cat([values, torch.full((SPARE_ROWS, width), torch.nan, dtype=dtype)])

        columns = [rows(self.load.width, self.load.dtype)]
        return columns + [rows(self.load.num_weights, torch.float32)] * (self.load.num_weights > 0)

    def experts(self, rank: int) -> range | None:
        first = FIRST_EXPERT + rank * self.local_experts
        return range(first, first + self.local_experts) if self.load.num_topk else None

    # The calls.

    def each_part(self) -> list[tuple[int, int]]:
        """(node, chunk), the nodes by turns."""
        return sorted(
            ((node, number) for node, count in enumerate(self.num_parts) for number in range(count)),
            key=lambda part: part[1],
        )

    def dispatch(
        self, node: int, number: int, numbers: Sequence[int] = (7,), *, tells: bool = True, fails: int = -1
    ) -> None:
        """Queue one part on all ranks. ``tells``: source tokens; ``fails``: whose host raises before the rows."""
        for rank, plane in enumerate(self.planes):
            own = self.sources[node][rank].part(number, self.load.chunks[node][rank])
            first = torch.tensor([number * chunk for chunk in self.load.chunks[node]])
            plan = SendPlan(
                own.rows, own.scales, own.ids, own.weights, own.member, None, None, 0, None, self.num_sms,
                part=PartPlan(self.room[rank], self.starts[rank][node], first, self.experts(rank)),
            )  # fmt: skip
            out = self.outputs[rank] if tells else self.outputs[rank]._replace(recv_src_idx=None)
            self.world.kept.append((own, plan, first))
            with suppress(OSError), plane.dispatch(signature(numbers[rank % len(numbers)]), plan) as exchange:
                if rank == fails:
                    raise OSError
                exchange.pull(out)

    def held(self, rank: int, node: int, number: int) -> HeldRows:
        """The rows that a rank has of a part."""
        starts, ends, first = [], [], []
        for source, chunk in enumerate(self.load.chunks[node]):
            begin = int(self._starts(rank)[node][source])
            places = self.sources[node][source].member[:, rank].nonzero().flatten()
            edges = torch.searchsorted(places, torch.tensor([number * chunk, (number + 1) * chunk]))
            starts.append(begin + int(edges[0]))
            ends.append(begin + int(edges[1]))
            first.append(number * chunk)
        tokens = self.wanted(rank).recv_src_idx
        assert tokens is not None
        return HeldRows(torch.tensor(starts), torch.tensor(ends), torch.tensor(first), tokens)

    def combine(
        self, node: int, number: int, change: Callable[[int, HeldRows], HeldRows] = lambda rank, held: held
    ) -> list[list[torch.Tensor]]:
        """Queue one part on all ranks; what each gets."""
        outs = []
        for rank, plane in enumerate(self.planes):
            own = self.sources[node][rank].part(number, self.load.chunks[node][rank])
            none = torch.empty(0, dtype=torch.int32)
            held = change(rank, self.held(rank, node, number))
            handle = DispatchHandle(none, none, none, none, own.member, none)
            plan = ReducePlan(self.columns[rank], (), handle, self.num_sms, held=held)
            dtypes = [self.load.sums, torch.float32]
            mine = [
                torch.full((len(own.member), column.size(1)), torch.nan, dtype=dtype)
                for column, dtype in zip(self.columns[rank], dtypes, strict=False)
            ]
            plane.pull_reduce(signature(), plan, mine)
            self.world.kept.append((own, plan, mine, held))
            outs.append(mine)
        return outs

    # What must come of it.

    def wanted(self, rank: int) -> Outputs:
        """All that a rank receives."""
        columns: list[list[torch.Tensor | None]] = [[], [], [], [], []]
        for node in self.sources:
            for source in node:
                tokens = source.member[:, rank].nonzero().flatten()
                ids = weights = None
                if source.ids is not None and source.weights is not None:
                    experts = self.experts(rank)
                    assert experts is not None
                    here = (source.ids >= experts.start) & (source.ids < experts.stop)
                    ids = torch.where(here, source.ids - experts.start, -1)
                    weights = source.weights * here
                taken = [source.rows, source.scales, ids, weights]
                for column, part in zip(columns, taken, strict=False):
                    column.append(None if part is None else part[tokens])
                columns[4].append(tokens.int())
        return Outputs(*(None if part[0] is None else torch.cat(part) for part in columns))  # type: ignore[arg-type]

    def check(self, ranks: Sequence[int] | None = None, *, tells: bool = True) -> None:
        """That everything has come, and nothing else was written."""
        for rank in range(self.num_ranks) if ranks is None else ranks:
            wanted = self.wanted(rank)
            for name, got, want in zip(Outputs._fields, self.outputs[rank], wanted, strict=True):
                if want is None or (name == "recv_src_idx" and not tells):
                    continue
                same(got[: len(want)], want, f"{name} of rank {rank}")
                self.check_untouched(name, got[len(want) :])
            first = self._starts(rank)
            ends = [start + torch.tensor(counts) for start, counts in zip(first, self.counts[rank], strict=True)]
            assert [s.tolist() for s in self.starts[rank]] == [e.tolist() for e in ends]

    @staticmethod
    def check_untouched(name: str, rows: torch.Tensor) -> None:
        fill = {"rows": FILL, "scales": FILL, "topk_idx": 777, "topk_weights": 7.5, "recv_src_idx": -9}[name]
        assert (rows == fill).all(), f"{name}: written past the end"

    def check_sums(self, node: int, number: int, outs: list[list[torch.Tensor]]) -> None:
        dtypes = (self.load.sums, torch.float32)
        for rank in range(self.num_ranks):
            member = self.sources[node][rank].part(number, self.load.chunks[node][rank]).member
            for index, (got, dtype) in enumerate(zip(outs[rank], dtypes, strict=False)):
                column = self.columns[rank][index]
                acc = torch.promote_types(column.dtype, torch.float32)
                total = torch.zeros((len(member), column.size(1)), dtype=acc)
                for owner in range(self.num_ranks):
                    held = self.held(owner, node, number)
                    span = slice(int(held.starts[rank]), int(held.ends[rank]))
                    total[member[:, owner]] += self.columns[owner][index][span].to(acc)
                same(got, total.to(dtype), f"sums of column {index} of rank {rank}")

    def codes(self) -> list[int]:
        return [self.world.code(rank) for rank in range(self.num_ranks)]


def run_all(parts: Parts, *, tells: bool = True, combines: bool = True) -> None:
    """All parts of a dispatch right behind each other, then all of a combine."""
    for node, number in parts.each_part():
        parts.dispatch(node, number, tells=tells)
    sums = [(part, parts.combine(*part)) for part in parts.each_part()] if combines else []
    parts.world.run()
    parts.check(tells=tells)
    for part, outs in sums:
        parts.check_sums(*part, outs)
    assert parts.codes() == [words.OK.value] * parts.num_ranks
