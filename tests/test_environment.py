"""What the surroundings of a Buffer may be: torch's defaults, environment variables, nodes."""

from __future__ import annotations

import gc
import math
import os
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests import played_gpu
from tests.cases import TIMEOUT, Case, Scenario, check_works, named_segments, segments
from tests.conftest import PoolOf
from tests.internode_cases import LAYOUTS, NodeScenario
from tokenferry import Buffer, PeerTimeoutError, TokenferryError
from tokenferry import buffer as buffer_module
from tokenferry.construction import timeout_seconds
from tokenferry.topology import Topology


def _changed_defaults(rank: int, num_ranks: int, dtype: torch.dtype, device: str, layout: str) -> None:
    case = Case(tokens=(9, 4), bias="two", spare_rows=3)
    scenario = NodeScenario(case, rank, layout) if layout else Scenario(case, rank, num_ranks)
    node = LAYOUTS[layout][rank] if layout else None
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)
    try:
        with Buffer(dist.group.WORLD, 4096, timeout=TIMEOUT, node=node) as buffer:
            result = scenario.dispatch(buffer)
            worst = scenario.dispatch(buffer, num_worst_tokens=100)
            combined = buffer.combine(
                scenario.rows_of[rank], result[4], scenario.weights_of[rank], bias=scenario.bias
            )
            cached = buffer.dispatch(scenario.x, handle=result[4])
            event = Buffer.capture()
            event.current_stream_wait()
            stage = buffer.get_local_buffer_tensor(torch.uint8)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert stage.device.type == "cpu"
    scenario.check_dispatch(result)
    scenario.check_dispatch(worst, num_worst_tokens=100)
    scenario.check_combine(combined)
    scenario.check_cached(cached)


@pytest.mark.parametrize("layout", ["", "3x1"])
@pytest.mark.parametrize(("dtype", "device"), [(torch.bfloat16, "cpu"), (torch.float64, "meta")], ids=str)
def test_changed_defaults_do_no_harm(pool_of: PoolOf, dtype: torch.dtype, device: str, layout: str) -> None:
    pool_of(3 if layout else 2).run(_changed_defaults, dtype, device, layout)


def _noise(rank: int, num_ranks: int) -> None:
    noise = {
        "NVSHMEM_QP_DEPTH": "none",
        "EP_DISABLE_GIN": "1",
        "NVSHMEM_IB_ENABLE_IBGDA": "x",
        "EP_REUSE_NCCL_COMM": "0",
    }
    before = dict(os.environ)
    with mock.patch.dict(os.environ, noise), Buffer(dist.group.WORLD, low_latency_mode=True) as buffer:
        check_works(buffer)
        assert dict(os.environ) == before | noise


def test_variables_of_others_are_neither_read_nor_set(pool_of: PoolOf) -> None:
    pool_of(2).run(_noise)


def _timeout_variable(rank: int, num_ranks: int) -> None:
    with mock.patch.dict(os.environ, {"TOKENFERRY_TIMEOUT": "0.3"}):
        short = Buffer(dist.group.WORLD)
        long = Buffer(dist.group.WORLD, timeout=TIMEOUT)
    for value in ("soon", "0", "-3", "nan", ""):
        with (
            mock.patch.dict(os.environ, {"TOKENFERRY_TIMEOUT": value}),
            pytest.raises(ValueError, match="TOKENFERRY_TIMEOUT"),
        ):
            Buffer(dist.group.WORLD)
    scenario = Scenario(Case(), rank, num_ranks)
    dist.barrier()
    if rank == 0:
        started = time.monotonic()
        with pytest.raises(PeerTimeoutError, match=r"dispatch.*rank 1"):
            scenario.dispatch(short)
        assert 0.25 < time.monotonic() - started < 5.0
    dist.barrier()
    if rank == 1:
        time.sleep(0.8)
    scenario.check_dispatch(scenario.dispatch(long))


def test_timeout_variable(pool_of: PoolOf) -> None:
    pool_of(2).run(_timeout_variable)


@pytest.mark.parametrize("given", [math.inf, 1e300, 10**30, "inf"])
def test_endless_deadlines_are_long_ones(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(given, str):
        monkeypatch.setenv("TOKENFERRY_TIMEOUT", given)
    seconds = timeout_seconds(None if isinstance(given, str) else given)
    assert timedelta(seconds=seconds) == timedelta(days=365)
    options = {"stage_limit": 1 << 20, "push_bytes": 0, "heap_bytes": 0, "timeout": seconds}
    with (
        played_gpu.played([torch.zeros(1 << 16, dtype=torch.uint8)]) as gpu,
        played_gpu.runtime_of_rank_0(gpu, Topology(0, (0, 0)), range(2), options) as (runtime, _),
    ):
        plane: Any = runtime.party().plane
        assert plane._timeout == seconds * 1e9


def _nodes(rank: int, num_ranks: int) -> None:
    gc.collect()
    before = len(segments())
    for split in ([0, 0, 0, 1], [0, 1, 2, 1]):
        with (
            mock.patch.dict(os.environ, {"TOKENFERRY_NODE": f"node{split[rank]}"}),
            pytest.raises(TokenferryError, match="same number of ranks"),
        ):
            Buffer(dist.group.WORLD, timeout=TIMEOUT)
        with pytest.raises(TokenferryError, match="same number of ranks"):
            Buffer(dist.group.WORLD, node=split[rank], timeout=TIMEOUT)
    assert named_segments() == []
    gc.collect()
    assert len(segments()) == before
    with mock.patch.dict(os.environ, {"TOKENFERRY_NODE": str(rank)}), Buffer(dist.group.WORLD, node="one") as buffer:
        assert buffer.topology.num_nodes == 1
        assert buffer.topology.local_ranks == tuple(range(num_ranks))
        check_works(buffer)


def _mixed(rank: int, num_ranks: int) -> None:
    for name, value in (("exact_combine", rank == 1), ("enable_shrink", rank == 2)):
        with pytest.raises(TokenferryError, match=f"agree on {name}: .*rank 1 has {name == 'exact_combine'}"):
            Buffer(dist.group.WORLD, low_latency_mode=True, timeout=TIMEOUT, **{name: value})
    device = torch.device("cuda", 0) if rank == 2 else torch.device("cpu")
    with (
        mock.patch.object(buffer_module, "choose_device", return_value=device),
        pytest.raises(TokenferryError, match=r"agree on device: .*rank 1 has cpu, rank 2 has cuda"),
    ):
        Buffer(dist.group.WORLD, timeout=TIMEOUT)
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        check_works(buffer)


def test_ranks_that_want_different_buffers(pool_of: PoolOf) -> None:
    pool_of(3).run(_mixed)


def test_unequal_nodes_raise_on_every_rank(pool_of: PoolOf) -> None:
    pool_of(4).run(_nodes)
