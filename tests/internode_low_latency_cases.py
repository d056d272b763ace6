"""Cases of the low-latency pair between nodes, which are groups of ranks of this machine; run on the ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from tests import low_latency_oracle as oracle
from tests.cases import TIMEOUT, poisoned_memory
from tests.internode_cases import LAYOUTS
from tests.low_latency_cases import Case, Scenario, check_case
from tokenferry import Buffer


def make_buffer(rank: int, layout: str, **options: Any) -> Buffer:
    """A Buffer for low latency among nodes of this layout."""
    arguments = {"timeout": TIMEOUT, "low_latency_mode": True, "node": LAYOUTS[layout][rank], **options}
    return Buffer(dist.group.WORLD, **arguments)


class NodeScenario(Scenario):
    """A case on one of the ranks of several nodes."""

    def __init__(self, case: Case, rank: int, layout: str, exact: bool = False, device: str = "cpu") -> None:
        nodes = LAYOUTS[layout]
        super().__init__(case, rank, len(nodes), device=device)
        first_seen = list(dict.fromkeys(nodes))
        self.node_of = [first_seen.index(node) for node in nodes]
        self.exact = exact

    def combined(self, ids: torch.Tensor, row_of: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
        """Each node sums its rows first, and rounds unless ``exact``; on GPUs each of its ranks before."""
        total = torch.zeros(len(ids), self.case.hidden, dtype=torch.float32)
        for node in range(max(self.node_of) + 1):
            its = torch.tensor([self.node_of[e // self.case.local_experts] == node for e in range(self.num_experts)])
            here = (ids >= 0) & its[ids.clamp(min=0)]
            of_node = ids.masked_fill(~here, -1)
            if self.device == "cuda":
                hidden, local = self.case.hidden, self.case.local_experts
                total += oracle.combined_by_rank(of_node, self.weights, row_of, hidden, local).float()
            else:
                wide = oracle.combined_wide(of_node, self.weights, row_of, self.case.hidden)
                total += wide if self.exact else wide.to(torch.bfloat16).float()
        return total.to(torch.bfloat16)


def check_nodes(
    rank: int, num_ranks: int, layout: str, cases: list[Case], exact: bool = False, device: str = "cpu"
) -> None:
    """One Buffer, one case after the other, memory poisoned."""
    options = {"num_rdma_bytes": 32 << 20} if device == "cuda" else {}
    with make_buffer(rank, layout, exact_combine=exact, device=device, **options) as buffer, poisoned_memory():
        for case in cases:
            check_case(buffer, NodeScenario(case, rank, layout, exact, device))
