"""Ranks of one GPU: programs that wait for each other are all resident, and leave room for the rails of nodes."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests import played_gpu
from tokenferry import runtime_cuda
from tokenferry.memory.direct import Regions
from tokenferry.topology import Topology

SMS = 132
"""Of the GPU that is played."""


@pytest.mark.parametrize(
    ("num_nodes", "each", "on_one_gpu"),
    [(1, 2, True), (1, 8, True), (2, 1, True), (2, 2, True), (2, 4, True), (2, 2, False)],
)
def test_programs_fit(num_nodes: int, each: int, on_one_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    num_ranks = num_nodes * each
    node = SimpleNamespace(group_name=str(each))
    monkeypatch.setattr(runtime_cuda, "node_group", lambda *_: node)
    with played_gpu.played([torch.zeros(1 << 16, dtype=torch.uint8)]) as gpu:
        runtime = runtime_cuda.CudaRuntime(
            Topology(0, tuple(rank // each for rank in range(num_ranks))),
            group=cast(Any, node),
            device=torch.device("cpu"),
            stage_limit=1 << 20,
            push_bytes=1 << 22,
            heap_bytes=0,
            timeout=10.0,
            may_mask=False,
            make_rail=None,
            exact_combine=False,
        )
        peers = [Regions(rank, each, played_gpu.PlayedDriver(gpu, ())) for rank in range(1, each)]
        name, size, heap, uuid = json.loads(runtime.get_local_ipc_handle())
        handles = [(name, size), *(peer.handle for peer in peers)] * num_nodes
        gpus = [uuid if on_one_gpu else f"{uuid} {rank}" for rank in range(num_ranks)]
        runtime.sync([json.dumps([*handle, heap, of]).encode() for handle, of in zip(handles, gpus, strict=True)])
        plane: Any = runtime._plane
        most = plane._low_latency._place.num_sms
        for regions in (runtime, *peers):
            regions.hide() if regions is runtime else regions.unlink()  # type: ignore[union-attr]
        runtime.device = runtime.comm.device
        runtime.destroy()
        for peer in peers:
            peer.close()
    if not on_one_gpu:
        assert most == SMS
    elif num_nodes == 1:
        assert 1 < most < SMS / num_ranks
    else:
        # An operation has senders and receivers; the kernels of rails need an SM that nobody else is on.
        assert 1 < most < SMS / 2 / num_ranks
