"""The low-latency kernels between nodes: what a rank sends are the tokens of its rail, some of each node."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.conftest import but_slow, slow
from tests.internode_cases import LAYOUTS
from tests.kernels.low_latency_world import LowLatencyWorld, known_expert_rows, poisoned
from tests.kernels.mutants import mutated_module
from tests.kernels.test_low_latency import disturb
from tests.low_latency_cases import FORMATS, Case, Scenario
from tokenferry.config import align_up
from tokenferry.dataplane import LowLatencyCombinePlan, LowLatencyDispatchPlan, OperationKind, Relays, Signature
from tokenferry.dataplane.cuda import low_latency_programs as programs
from tokenferry.dataplane.cuda.kernels import low_latency_dispatch, words
from tokenferry.modes.low_latency import LowLatencyHandle, scale_format_of

CASE = Case(tokens=(3, 0, 5, 1), spare=1, hidden=8, num_topk=3, seed=4)


def signature(operation: OperationKind) -> Signature:
    return Signature(operation, 0, 0, 0, 0, 0, 0, 0)


class Node:
    """The ranks of one of several nodes; what the rails bring is known."""

    def __init__(self, monkeypatch: Any, case: Case, layout: str, node: int, seed: int, dispatch: Any = None) -> None:
        node_of = LAYOUTS[layout]
        first_seen = list(dict.fromkeys(node_of))
        self.members = [[r for r, its in enumerate(node_of) if its == name] for name in first_seen]
        order = [(self.members[first_seen.index(name)].index(rank), first_seen.index(name)) for rank, name in
                 enumerate(node_of)]  # fmt: skip
        self.case, self.node, self.num_ranks = case, node, len(node_of)
        self.scenarios = [Scenario(case, rank, self.num_ranks) for rank in range(self.num_ranks)]
        self.most = self.scenarios[0].most
        self.relays = Relays(order, self.most, node)
        each, here = len(self.members), len(self.members[node])
        layouts = programs.layouts(
            here, each * self.most, case.hidden, case.num_topk, case.local_experts, each, False
        )
        nbytes = 2 * align_up(max(layout[-1] for layout in layouts))
        modules = {} if dispatch is None else {"dispatch": dispatch}
        self.world = LowLatencyWorld(monkeypatch, here, seed, push_bytes=nbytes, most_programs=4, modules=modules)
        disturb(monkeypatch, self.world, seed, 0.2)
        self.results: list[tuple[Any, ...]] = []
        self.sums: list[torch.Tensor] = []
        self.kept: list[Any] = []
        for buffer in self.world.buffers:
            self._keep_ids(buffer.plane._low_latency)

    def _keep_ids(self, low_latency: Any) -> None:
        """Launches are only queued: nothing that they read may go."""
        relayed = low_latency._relayed

        def keeping(*given: Any) -> Any:
            self.kept.append(relayed(*given))
            return self.kept[-1]

        low_latency._relayed = keeping

    def _of_rail(self, index: int, name: str, filler: float) -> torch.Tensor:
        """What the ranks of a rail have, N rows of each."""
        blocks = []
        for ranks in self.members:
            given = getattr(self.scenarios[ranks[index]], name)
            block = given.new_full((self.most, given.size(1)), filler)
            block[: len(given)] = given
            blocks.append(block)
        return torch.cat(blocks)

    def dispatch(self) -> None:
        case, experts = self.case, self.num_ranks * self.case.local_experts
        slab = self.num_ranks * self.most
        for index, rank in enumerate(self.members[self.node]):
            plane = self.world.buffers[index].plane
            flags = {"round_scale": False, "use_ue8m0": False, **FORMATS[case.format]}
            scale_format = scale_format_of(flags["use_fp8"], flags["round_scale"], flags["use_ue8m0"])
            fp8, columns = flags["use_fp8"], programs.num_scales(scale_format, case.hidden)
            dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
            rows = plane.empty_rows(case.local_experts * slab, case.hidden, dtype)
            scales = None
            if fp8:
                kind = torch.int32 if flags["use_ue8m0"] else torch.float32
                scales = poisoned(torch.empty((case.local_experts, columns, slab), dtype=kind)).transpose(1, 2)
            tables = plane.low_latency_tables(self.num_ranks, case.local_experts, self.most, case.num_topk)
            plan = LowLatencyDispatchPlan(
                topk_idx=self._of_rail(index, "ids", -1),
                x=self._of_rail(index, "x", torch.nan),
                scale_format=scale_format,
                first_expert=rank * case.local_experts,
                num_local_experts=case.local_experts,
                num_max_tokens=len(self.members) * self.most,
                recv_x=rows.view(case.local_experts, slab, case.hidden),
                recv_scales=scales,
                recv_src_info=tables[0],
                layout_range=tables[1],
                recv_count=tables[2],
                recv_stats=None,
                wait_stats=None,
                receives_now=True,
                relays=self.relays,
            )
            plane._low_latency.dispatch(index, signature(OperationKind.LOW_LATENCY_DISPATCH), plan)
            handle = LowLatencyHandle(tables[0], tables[1], self.most, case.hidden, experts)
            self.results.append(((plan.recv_x, scales) if fp8 else plan.recv_x, tables[2], handle, None, None))
            self.kept.append(plan)

    def combine(self) -> None:
        for index, rank in enumerate(self.members[self.node]):
            scenario, handle = self.scenarios[rank], self.results[index][2]
            ids = self._of_rail(index, "ids", -1)
            sums = poisoned(torch.empty((len(ids), self.case.hidden), dtype=torch.bfloat16))
            plan = LowLatencyCombinePlan(
                x=known_expert_rows(scenario),
                src_info=handle.src_info,
                layout_range=handle.layout_range,
                first_expert=rank * self.case.local_experts,
                num_experts=handle.num_experts,
                topk_idx=ids,
                topk_weights=self._of_rail(index, "weights", torch.nan),
                out=sums,
                wait_stats=None,
                receives_now=True,
                relays=self.relays,
            )
            plane = self.world.buffers[index].plane
            plane._low_latency.combine(index, signature(OperationKind.LOW_LATENCY_COMBINE), plan)
            self.sums.append(sums)
            self.kept.append(plan)

    def check(self) -> None:
        for index, rank in enumerate(self.members[self.node]):
            assert self.world.code(index) == words.OK.value
            self.scenarios[rank].check_dispatch(self.results[index])
        for index, sums in enumerate(self.sums):
            for number, ranks in enumerate(self.members):
                source = self.scenarios[ranks[index]]
                wanted = source.expected(self._here(source.ids), by_rank=True)
                at = number * self.most
                assert torch.equal(sums[at : at + len(wanted)], wanted), (index, number)
                assert not sums[at + len(wanted) : at + self.most].any()

    def _here(self, ids: torch.Tensor) -> torch.Tensor:
        """The choices of this node's experts."""
        owners = ids.div(self.case.local_experts, rounding_mode="floor")
        return ids.masked_fill(~torch.isin(owners, torch.tensor(self.members[self.node])), -1)


def run(node: Node) -> None:
    node.dispatch()
    node.combine()
    node.world.run()
    node.check()


@pytest.mark.parametrize(
    ("layout", "node"),
    but_slow(
        [("2x1", 1), ("2x2", 0), ("2x2 alternating", 1), ("3x2 mixed", 0), ("3x2 mixed", 2), ("3x1", 2)],
        ("2x1", 1),
        ("2x2", 0),
        ("2x2 alternating", 1),
        ("3x2 mixed", 0),
    ),
)
def test_layouts(monkeypatch: Any, layout: str, node: int) -> None:
    run(Node(monkeypatch, CASE, layout, node, seed=len(layout)))


@pytest.mark.parametrize("name", but_slow(FORMATS, *(name for name in FORMATS if name != "ue8m0")))
def test_formats(monkeypatch: Any, name: str) -> None:
    case = Case(tokens=(2, 3), hidden=128, num_topk=2, local_experts=1, format=name, seed=1)
    run(Node(monkeypatch, case, "2x2 alternating", 0, seed=1))


@pytest.mark.parametrize("routing", ["duplicates", "nothing", *slow("own", "one_expert")])
def test_routings(monkeypatch: Any, routing: str) -> None:
    case = Case(tokens=(3, 2), hidden=8, num_topk=2, routing=routing, seed=2)
    run(Node(monkeypatch, case, "2x2", 1, seed=2))


@pytest.mark.parametrize("wrong", [8, 1 << 40, *slow(-2)])
def test_ids_that_name_no_expert_are_reported(monkeypatch: Any, wrong: int) -> None:
    node = Node(monkeypatch, CASE, "2x2", 0, seed=1)
    node.scenarios[2].ids[1, 0] = wrong  # of the other node
    node.dispatch()
    node.world.run()
    assert [node.world.code(rank) for rank in range(2)] == [words.BAD_EXPERT.value, words.OK.value]


FAULTS = {
    "counts of one source": ("place = (rank * G + source) * L + e % L", "place = rank * G * L + e % L"),
    "positions over all": ("token // each * each, token, e", "0, token, e"),
    "sources in order of relays": ("s < tl.load(ints_at(order) + source * G + number)", "s < source * G + number"),
    "ranges in order of relays": (
        "place = tl.load(ints_at(order) + R * G + s, mask=s < R * G, other=0)", "place = s"
    ),
    "tokens of the relay": ("own_token = token - number * each", "own_token = token"),
    "room of all sources": ("(e >= 0) & (position < each)", "(e >= 0) & (position < 0)"),
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    but_slow(
        FAULTS, "counts of one source", "sources in order of relays", "tokens of the relay", "positions over all"
    ),
)
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    module = mutated_module(low_latency_dispatch, *FAULTS[name])
    node = Node(monkeypatch, replace(CASE, tokens=(3, 2, 4, 1)), "2x2", 1, seed=3, dispatch=module)
    with pytest.raises(AssertionError):
        run(node)
