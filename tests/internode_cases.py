"""Cases of dispatch and combine between nodes, which are groups of ranks of this machine; run on the ranks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from tests import oracle
from tests.cases import TIMEOUT, Case, Scenario, same
from tokenferry import Buffer, Config, InternodeHandle
from tokenferry.modes.routes import check_handle
from tokenferry.topology import Topology

LAYOUTS: dict[str, tuple[int, ...]] = {
    "2x1": (0, 1),
    "3x1": (0, 1, 2),
    "2x2": (0, 0, 1, 1),
    "2x2 alternating": (1, 0, 1, 0),
    "3x2": (0, 0, 1, 1, 2, 2),
    "3x2 mixed": (2, 0, 1, 1, 0, 2),
    "2x3": (0, 0, 0, 1, 1, 1),
    "2x4": (0, 0, 0, 0, 1, 1, 1, 1),
    "3x4": (0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2),
    "2x8": (0,) * 8 + (1,) * 8,
}
"""Node of each rank, by name."""
CONTIGUOUS = ("2x1", "3x1", "2x2", "3x2", "2x4", "3x4")
NODE_ROUTINGS = ("random", "nothing", "grouped", "last_node", "silent_node")
"""Those of all layouts."""


def make_buffer(rank: int, layout: str, **options: Any) -> Buffer:
    """A Buffer among nodes of this layout."""
    return Buffer(dist.group.WORLD, node=LAYOUTS[layout][rank], **{"timeout": TIMEOUT, **options})


def small_chunks(rows: int) -> Config:
    """With which so many rows are a chunk."""
    return Config(2, 6, 256, max(1, rows // 2), max(2, rows))


class NodeScenario(Scenario):
    """A case on one of the ranks of several nodes."""

    def __init__(self, case: Case, rank: int, layout: str, exact: bool = False, device: str = "cpu") -> None:
        node_of = LAYOUTS[layout]
        super().__init__(replace(case, num_nodes=max(node_of) + 1), rank, len(node_of), device)
        first_seen = list(dict.fromkeys(node_of))
        self.node_of = [first_seen.index(node) for node in node_of]
        self.wanted_handle = oracle.internode_handle(self.inputs, self.num_experts, rank, self.node_of)
        self.wanted_combined = oracle.combine_between_nodes(
            self.inputs, self.num_experts, rank, self.rows_of, self.node_of, self.biases, exact
        )
        self.wanted_weights = oracle.combine_between_nodes(
            self.inputs, self.num_experts, rank, self.weights_of, self.node_of
        )

    def check_handle(self, handle: Any, num_worst_tokens: int = 0) -> None:
        """Compare a handle element by element."""
        assert isinstance(handle, InternodeHandle)
        for name, element in zip(InternodeHandle._fields, handle, strict=True):
            if name == "recv_src_meta" and num_worst_tokens:
                assert len(element) == num_worst_tokens
                assert (element[self.num_rows[self.rank] :] == 255).all()
                element = element[: self.num_rows[self.rank]]
            same(element, self.wanted_handle[name], name)
        _, routes = check_handle(Topology(self.rank, tuple(self.node_of)), handle[0].device, handle)
        assert all(member.is_contiguous() for member in routes.members), "kernels read one row after the other"

    def rows_of_handle(self, handle: Any) -> int:
        """Rows of the outputs that the handle belongs to."""
        return len(handle[7])


def check_nodes(
    rank: int,
    num_ranks: int,
    layout: str,
    case: Case,
    chunk: int = 0,
    num_nvl_bytes: int = 0,
    exact: bool = False,
    device: str = "cpu",
) -> None:
    """Every kind of call on one case."""
    options: dict[str, Any] = {} if not chunk else {"config": small_chunks(chunk)}
    with make_buffer(rank, layout, num_nvl_bytes=num_nvl_bytes, exact_combine=exact, device=device) as buffer:
        NodeScenario(case, rank, layout, exact, device).check_all(buffer, **options)


def check_rail_bytes(rank: int, num_ranks: int, layout: str, case: Case, device: str = "cpu") -> tuple[int, int]:
    """Bytes that the rail carried in a dispatch, and those of the rows to other nodes."""
    with make_buffer(rank, layout, device=device) as buffer:
        scenario = NodeScenario(case, rank, layout, device=device)
        runtime = buffer.runtime
        assert runtime is not None
        rail = runtime.party().nodes.rail
        before = rail.bytes_sent
        result = scenario.dispatch(buffer)
        scenario.check_dispatch(result)
        sent = rail.bytes_sent - before
        wanted = scenario.wanted_handle["rdma_channel_prefix_matrix"].view(-1)
        remote = int(wanted.sum() - wanted[scenario.node_of[rank]])
        return sent, remote * case.row_bytes
