"""Nodes of one, two and four ranks, bit for bit against the oracle; rails over NCCL, in two ways, and NVSHMEM.

Each node has a GPU, where there are as many. On one GPU NCCL joins ranks only if it takes them for those of several
hosts: then all rails run over its network transport.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, Case
from tests.conftest import NodesOf, slow
from tests.internode_cases import (
    CONTIGUOUS,
    NODE_ROUTINGS,
    NodeScenario,
    check_nodes,
    check_rail_bytes,
    make_buffer,
    small_chunks,
)
from tests.test_ops import CASES as OPERATOR_CASES
from tests.test_ops import check_cases as check_operators
from tokenferry import PeerError, TokenferryError
from tokenferry.dataplane.cuda import parts_programs, programs
from tokenferry.modes import internode
from tokenferry.rail.device_rail import DeviceRail

CASE = Case(tokens=(70, 0, 33, 128), row_bytes=1040, num_topk=3, local_experts=4, combine_bytes=1040, bias="two")
SCALED = Case(
    tokens=(64, 5), dtype=torch.float8_e4m3fn, row_bytes=512, scales=torch.float32, scale_columns=4,
    scale_layout="columns", num_topk=6, local_experts=4, combine_dtype=torch.float32, combine_bytes=1024,
    spare_rows=9,
)  # fmt: skip
WIDE = Case(tokens=(600, 411), row_bytes=14336, num_topk=8, local_experts=16, combine_bytes=14336)
ROUTINGS = (*NODE_ROUTINGS, "own", "others", "one_rank", "all", "sparse")


@pytest.mark.parametrize("layout", CONTIGUOUS)
@pytest.mark.parametrize("case", [CASE, SCALED], ids=["plain", "scaled"])
def test_every_call(direct: NodesOf, layout: str, case: Case) -> None:
    direct(layout).run(check_nodes, layout, case, 16, 0, False, "cuda")


def test_operators(direct: NodesOf) -> None:
    direct("2x1").run(check_operators, "cuda", TIMEOUT, OPERATOR_CASES, "2x1")


@pytest.mark.parametrize(
    ("layout", "routing"),
    [
        *itertools.product(("2x2", "3x2"), ROUTINGS),
        *slow(*itertools.product(("2x1", "3x1", "2x4", "3x4"), NODE_ROUTINGS)),
    ],
)
def test_routings(direct: NodesOf, layout: str, routing: str) -> None:
    direct(layout).run(check_nodes, layout, replace(CASE, routing=routing), 24, 0, False, "cuda")


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize(("layout", "chunk"), [("2x1", 128), ("2x2", 0), ("3x2", 200)])
def test_wide_rows(direct: NodesOf, layout: str, chunk: int, exact: bool) -> None:
    direct(layout).run(check_nodes, layout, WIDE, chunk, 0, exact, "cuda")


@pytest.mark.parametrize("layout", CONTIGUOUS)
def test_over_a_network(over_network: NodesOf, layout: str) -> None:
    over_network(layout).run(check_nodes, layout, CASE, 16, 0, False, "cuda")


@pytest.mark.parametrize("layout", ["2x2", "3x2"])
def test_bytes_on_the_rail(direct: NodesOf, layout: str) -> None:
    for sent, rows in direct(layout).run(check_rail_bytes, layout, replace(WIDE, tokens=(500,)), "cuda"):
        assert rows <= sent <= 1.03 * rows


def _compiled() -> dict[str, int]:
    """How many variants there are, by kernel."""
    return {
        name: function.cache_info().misses
        for module in (programs, parts_programs)
        for name, function in vars(module).items()
        if hasattr(function, "cache_info")
    }


def _warmed(rank: int, num_ranks: int, layout: str) -> None:
    """Nothing is compiled while other ranks wait."""
    with make_buffer(rank, layout, device="cuda") as buffer:
        scenario = NodeScenario(WIDE, rank, layout, device="cuda")
        buffer.warmup(7168, WIDE.num_topk, scenario.num_experts)
        before = _compiled()
        result = scenario.dispatch(buffer)
        scenario.check_dispatch(result)
        scenario.check_cached(buffer.dispatch(scenario.x, handle=result[4]))
        scenario.check_combine(scenario.combine(buffer, result[4]))
        assert _compiled() == before


@pytest.mark.parametrize("layout", ["2x2", "3x2"])
def test_warmup(direct: NodesOf, layout: str) -> None:
    direct(layout).run(_warmed, layout)


def _many(rank: int, num_ranks: int, layout: str) -> None:
    """Calls of all kinds on one Buffer, with chunks of changing size and random delays."""
    generator = torch.Generator().manual_seed(rank)
    with make_buffer(rank, layout, device="cuda") as buffer:
        for turn in range(40):
            case = replace(CASE, seed=turn, routing=("random", "sparse", "others")[turn % 3])
            time.sleep(float(torch.rand((), generator=generator)) * 0.01)
            NodeScenario(case, rank, layout, device="cuda").check_all(buffer, config=small_chunks(8 + 8 * (turn % 5)))


@pytest.mark.parametrize("layout", ["2x2", "3x2"])
def test_many_calls(direct: NodesOf, layout: str) -> None:
    direct(layout).run(_many, layout)


def _silent(rank: int, num_ranks: int, layout: str) -> tuple[str, float]:
    scenario = NodeScenario(CASE, rank, layout, device="cuda")
    with make_buffer(rank, layout, device="cuda") as buffer:  # compiles, for which four seconds may be too short
        scenario.check_dispatch(scenario.dispatch(buffer))
    with make_buffer(rank, layout, device="cuda", timeout=4.0) as buffer:
        scenario.check_dispatch(scenario.dispatch(buffer))
        dist.barrier()
        started, text = time.monotonic(), ""
        if rank != 1:
            with pytest.raises(PeerError) as caught:
                scenario.dispatch(buffer)
            text = str(caught.value)
        seconds = time.monotonic() - started
        dist.barrier()
    assert float(torch.ones(8, device="cuda").sum()) == 8  # the context is alive
    with make_buffer(rank, layout, device="cuda") as buffer:
        scenario.check_dispatch(scenario.dispatch(buffer))
    return text, seconds


@pytest.mark.parametrize("layout", ["2x1", "3x1"])
def test_silent_node_is_named(direct: NodesOf, layout: str) -> None:
    for text, seconds in direct(layout).run(_silent, layout)[::2]:
        assert "rank 1: node 1 (ranks 1), over the rail" in text
        assert seconds < 5.0


def _stuck(rank: int, num_ranks: int, layout: str) -> tuple[str, float]:
    """A node takes part in the first chunks only: NCCL waits for its rows in vain."""
    scenario = NodeScenario(replace(CASE, tokens=(70, 90)), rank, layout, device="cuda")
    with make_buffer(rank, layout, device="cuda") as buffer:
        scenario.check_dispatch(scenario.dispatch(buffer))
    with make_buffer(rank, layout, device="cuda", timeout=4.0) as buffer:
        scenario.check_dispatch(scenario.dispatch(buffer))
        dist.barrier()
        text, seconds = "", 0.0
        if rank != 1:
            started = time.monotonic()
            with pytest.raises(PeerError) as caught:
                scenario.dispatch(buffer, config=small_chunks(8))
            text, seconds = str(caught.value), time.monotonic() - started
        else:
            # A rank that raises closes its rail: one that hangs keeps it.
            kept = mock.patch.object(DeviceRail, "close")
            failing = mock.patch.object(internode._Delivery, "run", side_effect=KeyError)
            with kept, failing, pytest.raises(KeyError):
                scenario.dispatch(buffer, config=small_chunks(8))
        dist.barrier()
    assert float(torch.ones(8, device="cuda").sum()) == 8  # the context is alive
    with make_buffer(rank, layout, device="cuda") as buffer:
        scenario.check_dispatch(scenario.dispatch(buffer))
    return text, seconds


@pytest.mark.parametrize("layout", ["2x1", "3x1"])
def test_rows_that_do_not_come(direct: NodesOf, layout: str) -> None:
    for text, seconds in direct(layout).run(_stuck, layout)[::2]:
        assert "rank 1: node 1 (ranks 1), over the rail" in text
        assert seconds < 5.0


def _refused(rank: int, num_ranks: int) -> None:
    options = {"low_latency_mode": True, "num_rdma_bytes": 1 << 20, "exact_combine": True}
    with pytest.raises(TokenferryError, match="low_latency_mode with exact_combine between nodes"):
        make_buffer(rank, "2x1", device="cuda", **options)
    with make_buffer(rank, "2x1", device="cuda") as buffer:
        scenario = NodeScenario(CASE, rank, "2x1", device="cuda")
        with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(TokenferryError, match="CUDA graph"):
            scenario.dispatch(buffer)
        scenario.check_dispatch(scenario.dispatch(buffer))


def test_what_is_not_there_is_refused(direct: NodesOf) -> None:
    direct("2x1").run(_refused)
