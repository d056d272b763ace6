"""One rank's calls of expanded operations under the simulator, as the host makes them; see :mod:`.world`."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from tests import oracle
from tests.cases import Case, generator, same
from tests.elastic_oracle import expanded_sums, expected, slot_weights
from tests.kernels.world import LIST_CAPACITY, Rank, Simulated, World
from tokenferry.config import align_up
from tokenferry.dataplane import ExpertPlan, OperationKind, Outputs, SendPlan
from tokenferry.dataplane.cuda import expert_major_programs, programs
from tokenferry.handles import DispatchHandle

KERNELS = ("pack", "sources", "pad")
SPARE_TOKENS = 2


def simulate(monkeypatch: Any, world: World, module: ModuleType | None = None) -> None:
    """Put the simulated kernels for expanded rows in the place of the compiled ones; ``module``: mutants of them."""
    module = module or expert_major_programs.kernels
    for name in KERNELS:
        original = getattr(expert_major_programs, f"_{name.upper()}")
        simulated = Simulated(world.simulator, getattr(module, name), original)
        monkeypatch.setattr(expert_major_programs, f"_{name.upper()}", simulated)
    sums = expert_major_programs._SUM_COPIES
    simulated = {key: Simulated(world.simulator, module.sum_copies, kernel) for key, kernel in sums.items()}
    monkeypatch.setattr(expert_major_programs, "_SUM_COPIES", simulated)
    monkeypatch.setattr(programs, "_PAIRS_PER_TILE", 8)
    monkeypatch.setattr(programs, "MOST_SPANS", 4)
    monkeypatch.setattr(expert_major_programs, "_COUNTS", 16)
    monkeypatch.setattr(expert_major_programs, "_PROGRAMS", 3)
    for name in (*KERNELS, "sum_copies"):
        getattr(expert_major_programs, f"_{name}").cache_clear()
    for cached in (programs.spans_of, programs._layout):
        cached.cache_clear()


class ExpandedRank(Rank):
    """One rank's calls on a case; launches are only queued."""

    def __init__(
        self, world: World, case: Case, rank: int, num_sms: int = 4, *, expand: bool = True, spare_rows: int = 0
    ) -> None:
        super().__init__(world, case, rank, num_sms)
        self.expand = expand
        self.most = max(case.tokens) + SPARE_TOKENS
        self.expectations = [
            expected(self.inputs, self.num_experts, peer, case.alignment, self.most) for peer in range(self.num_ranks)
        ]
        self.expectation = self.expectations[rank]
        self.num_expanded = len(self.expectation.rows) + spare_rows

    def _experts(self, handle: DispatchHandle | None = None) -> ExpertPlan:
        return ExpertPlan(
            num_local=self.case.local_experts,
            num_max_tokens=self.most,
            alignment=self.case.alignment,
            expand=self.expand,
            num_worst_rows=self.num_expanded,
            zero_padding=True,
            metadata=self.metadata if handle is not None and self.expand else None,
            expert_ends=self.ends if handle is not None else None,
        )

    def _plan(self, num_worst_tokens: int, handle: DispatchHandle | None) -> SendPlan:
        plan = super()._plan(num_worst_tokens, handle)
        ids = self.packed if self.expand and handle is None else self.given.topk_idx
        return plan._replace(topk_idx=ids, topk_weights=self.given.topk_weights, experts=self._experts(handle))

    def pack(self) -> None:
        """What goes before an expanded dispatch."""
        self.packed = torch.full_like(self.given.topk_idx, -9)
        if self.expand:
            expert_major_programs.pack(
                self.rank, self.given.topk_idx, self.packed, self.per_expert, self.num_experts, self.world.target
            )

    def make_tables(self) -> torch.Tensor:
        local, ranks = self.case.local_experts, self.num_ranks
        step, pairs = align_up(local, 4), align_up(ranks, 4)
        bases = pairs + 2 * step
        tables = torch.full((bases + ranks * local + 1,), -7, dtype=torch.int32)
        self.rank_ends, self.pairs, self.ends = tables[:ranks], tables[pairs:][:local], tables[pairs + step :][:local]
        self.bases = tables[bases:]
        return tables

    def pull(self, num_rows: int, handle: DispatchHandle | None = None, signature: int = 42) -> None:
        plan = self._plan(0, handle) if handle else self.plan
        num_topk = self.given.topk_idx.size(1)
        out_rows = self.num_expanded if self.expand else num_rows
        if handle is None:
            self.metadata = torch.full((num_rows, num_topk + 2), -9, dtype=torch.int32)
            self.sources = torch.full((num_rows,), -9, dtype=torch.int32)
        weights = torch.full((out_rows, 1 if self.expand else num_topk), torch.nan)
        ids = None if self.expand else torch.full((num_rows, num_topk), -1 if handle else 777)
        if handle and not self.expand:
            weights.zero_()
        self.out = Outputs(
            torch.full((out_rows, plan.rows.size(1)), 0xAB, dtype=torch.uint8),
            None if plan.scales is None else torch.full((out_rows, plan.scales.size(1)), 0xAB, dtype=torch.uint8),
            ids,
            weights,
            None if handle else self.sources,
            None if handle else self.metadata,
        )
        columns = (plan.rows, plan.scales, plan.topk_idx, plan.topk_weights)
        places = tuple(self.world.place(self.rank, column) for column in columns) if handle else (0, 0, 0, 0)
        kind = OperationKind.CACHED_EXPANDED_DISPATCH if handle else OperationKind.EXPANDED_DISPATCH
        prefix = handle.rank_prefix_matrix if handle else self.prefix
        call = programs.dispatch_call(
            plan, signature, LIST_CAPACITY, (self.world.stage, self.world.half), self.rank, kind, 1 << 40,
            self.world.target, self.num_sms,
        )  # fmt: skip
        tensors = programs.dispatch_tensors(plan, self.out, self.sources, prefix, self.bases)
        rows = num_rows, out_rows if self.expand else 0
        call.launch(self.rank, self.world.context(self.rank), tensors, (*places, *rows))
        if not self.expand and handle is None:
            expert_major_programs.sources(self.rank, self.out, prefix, self.most, self.rank, self.world.target)
        elif self.expand:
            expert_major_programs.pad(self.rank, self.out, self.ends, self.case.alignment, self.world.target)
        self.world.kept.append((plan, self.out))

    def handle(self) -> DispatchHandle:
        channels = self.channels.view(2, self.num_ranks, 1)
        return DispatchHandle(self.prefix, channels[0], channels[1], self.sources, self.member, self.send_head)

    def experts_rows(self, peer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What experts make of a rank's expanded rows, and weights; NaN in padding."""
        want, source = self.expectations[peer], generator(self.case, peer, 5)
        width = self.case.combine_bytes // self.case.combine_dtype.itemsize
        rows = torch.randn(len(want.rows), width, generator=source).to(self.case.combine_dtype)
        weights = torch.randn(len(want.rows), generator=source)
        for row, where in enumerate(want.rows):
            if where is None:
                rows[row], weights[row] = torch.nan, torch.nan
        return rows, weights

    def combine_expanded(self, sum_dtype: torch.dtype, signature: int = 43) -> None:
        """A combine of expanded rows: the sums of copies, then the combine of these."""
        dtype = self.case.combine_dtype
        given = [self.experts_rows(peer) for peer in range(self.num_ranks)]
        rows, _ = given[self.rank]
        metadata, handle, rounded = self.metadata, self.handle(), sum_dtype == dtype
        self.sum_dtype = sum_dtype
        self.rows_of = [
            expanded_sums(want, of, rounded=rounded).to(sum_dtype)
            for want, (of, _) in zip(self.expectations, given, strict=True)
        ]
        self.weights_of = [
            slot_weights(want, of, self.case.num_topk) for want, (_, of) in zip(self.expectations, given, strict=True)
        ]
        num_rows, num_tokens = len(metadata), self.given.x.size(0)
        sums = torch.full((num_rows, rows.size(1)), torch.nan, dtype=sum_dtype)
        expert_major_programs.sum_copies(
            self.rank, rows, metadata, sums, self.prefix,
            (self.world.states[self.rank].data_ptr(), self.world.status[self.rank].data_ptr()), self.rank,
            OperationKind.COMBINE, self.world.target,
        )  # fmt: skip
        weights = self.weights_of[self.rank]
        weights = torch.cat([weights, weights.new_full((num_rows - len(weights), weights.size(1)), torch.nan)])
        columns = [sums, weights]
        self.outs = [torch.full((num_tokens, c.size(1)), torch.nan, dtype=c.dtype) for c in columns]
        places = [self.world.place(self.rank, column) for column in columns]
        call = programs.combine_call(
            columns, self.outs, 0, (self.world.stage, self.world.half), self.rank, OperationKind.COMBINE,
            1 << 40, self.world.target, self.num_sms,
        )  # fmt: skip
        tensors = programs.combine_tensors(columns, self.outs, [], handle)
        call.launch(self.rank, self.world.context(self.rank), tensors, (*places, signature, num_tokens, num_rows))
        self.world.kept.append((rows, columns, handle))

    # What must have come.

    def check_expanded(self, *, cached: bool = False) -> None:
        want, out = self.expectation, self.out
        for name, got in (("x", out.rows), ("scales", out.scales)):
            if got is None:
                continue
            columns = [getattr(given, name).contiguous().view(torch.uint8) for given in self.inputs]
            zero = torch.zeros(got.size(1), dtype=torch.uint8)
            if self.expand:
                rows = [zero if row is None else columns[row[0]][row[1]] for row in want.rows]
            else:
                rows = [columns[source][token] for source, token in want.sources]
            if rows:
                same(got[: len(rows)], torch.stack(rows), name)
            assert (got[len(rows) :] == 0xAB).all()
        assert out.topk_weights is not None
        if self.expand:
            for row, where in enumerate(want.rows):
                weight = 0.0 if where is None else self.inputs[where[0]].topk_weights[where[1], where[2]]
                assert out.topk_weights[row, 0] == weight
            assert out.topk_weights[len(want.rows) :].isnan().all()
        else:
            assert out.topk_idx is not None
            same(out.topk_idx[: want.num_tokens], want.ids, "ids")
            same(out.topk_weights[: want.num_tokens], want.weights, "weights")
            assert (out.topk_idx[want.num_tokens :] == -1).all()
        if cached:
            return
        metadata = torch.tensor(want.metadata, dtype=torch.int32).view(want.num_tokens, self.case.num_topk + 2)
        if not self.expand:
            metadata[:, 2:] = -1
        same(self.metadata[: want.num_tokens], metadata, "metadata")
        assert (self.metadata[want.num_tokens :] == -1).all()
        assert (self.sources[want.num_tokens :] == -1).all()
        assert self.rank_ends.tolist() == want.psum_rank
        assert self.pairs.tolist() == want.pairs
        assert self.ends.tolist() == (want.psum_expanded if self.expand else want.psum_compact)

    def check_packed(self) -> None:
        seen = [0] * self.num_experts
        for choices, packed in zip(self.given.topk_idx.tolist(), self.packed.tolist(), strict=True):
            for expert, value in zip(choices, packed, strict=True):
                if expert < 0:
                    assert value == -1
                else:
                    assert (value >> 32, value & (1 << 32) - 1) == (seen[expert], expert)
                    seen[expert] += 1

    def check_combined(self) -> None:
        wanted = oracle.combine(self.inputs, self.num_experts, self.rank, self.rows_of)
        same(self.outs[0], wanted.to(self.sum_dtype), "combined")
        wanted = oracle.combine(self.inputs, self.num_experts, self.rank, self.weights_of)
        same(self.outs[1], wanted, "combined weights")


def run_ranks(world: World, ranks: list[ExpandedRank], worst: int, sum_dtype: torch.dtype) -> None:
    """A dispatch, a cached dispatch and a combine on all ranks, checked."""
    cached = []
    for rank in ranks:
        rank.layout()
        rank.pack()
        rank.notify(worst)
        rank.pull(worst)
        first = rank.out
        rank.pull(worst, rank.handle(), signature=44)
        cached.append(rank.out)
        rank.out = first
        if rank.expand:
            rank.combine_expanded(sum_dtype)
    world.run()
    for rank, again in zip(ranks, cached, strict=True):
        if rank.expand:
            rank.check_packed()
            rank.check_combined()
        rank.check_expanded()
        rank.out = again
        rank.check_expanded(cached=True)
