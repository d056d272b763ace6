"""Ranks of one GPU: programs that wait for each other are all resident, and leave room for the rails of nodes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import played_gpu
from tokenferry.topology import Topology

SMS = 132
"""Of the GPU that is played."""


@pytest.mark.parametrize(
    ("num_nodes", "each", "on_one_gpu"),
    [(1, 2, True), (1, 8, True), (2, 1, True), (2, 2, True), (2, 4, True), (2, 2, False)],
)
def test_programs_fit(num_nodes: int, each: int, on_one_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    num_ranks = num_nodes * each
    topology = Topology(0, tuple(rank // each for rank in range(num_ranks)))
    options = {"stage_limit": 1 << 20, "push_bytes": 1 << 22, "heap_bytes": 0, "timeout": 10.0}
    gpus = [0] * num_ranks if on_one_gpu else range(num_ranks)
    with (
        played_gpu.played([torch.zeros(1 << 16, dtype=torch.uint8)]) as gpu,
        played_gpu.runtime_of_rank_0(gpu, topology, gpus, options) as (runtime, _),
    ):
        plane: Any = runtime._plane
        most = plane._low_latency._place.num_sms
    if not on_one_gpu:
        assert most == SMS
    elif num_nodes == 1:
        assert 1 < most < SMS / num_ranks
    else:
        # An operation has senders and receivers; the kernels of rails need an SM that nobody else is on.
        assert 1 < most < SMS / 2 / num_ranks
