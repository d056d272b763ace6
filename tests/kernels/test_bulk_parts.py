"""The bulk-copy kernels in parts, and their combine at all, with the engine played."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from triton.runtime.errors import InterpreterError

from tests.conftest import but_slow, slow
from tests.kernels import bulk_emulator
from tests.kernels.parts_world import Load, Parts, run_all, simulate
from tests.kernels.test_exchange import SMALL, run_pair
from tests.kernels.test_parts import DIRECT
from tests.kernels.world import Simulated, World
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import bulk_dispatch

LOADS = {
    "scales": (2, Load(((5, 4), (3, 6)), ((3, 4), (3, 3)), 32, 12, 2, num_weights=2, seed=6)),
    "wide sums": (2, Load(((6, 5),), ((4, 3),), 16, sums=torch.float32, seed=3)),
    "three ranks": (3, Load(((4, 0, 5),), ((2, 4, 3),), 16, num_weights=3, dtype=torch.float16, sums=torch.float16)),
}


def world_of(
    monkeypatch: Any, num_ranks: int, seed: int, direct: str, stage_bytes: int, module: ModuleType | None = None
) -> World:
    world = World(monkeypatch, num_ranks, seed, direct=DIRECT[direct], stage_bytes=stage_bytes, max_steps=400_000)
    dispatch = (module or bulk_emulator.bulk_module("bulk_dispatch")).dispatch
    combine = bulk_emulator.bulk_module("bulk_combine").combine
    monkeypatch.setattr(programs, "_BULK_DISPATCH", Simulated(world.simulator, dispatch, programs._BULK_DISPATCH))
    combines = {k: Simulated(world.simulator, combine, kernel) for k, kernel in programs._BULK_COMBINE.items()}
    monkeypatch.setattr(programs, "_BULK_COMBINE", combines)
    monkeypatch.setattr(programs, "_COMBINE", {})
    world.target = programs.Target(num_ranks, True, 0)
    programs._dispatch.cache_clear()
    programs._combine.cache_clear()
    simulate(monkeypatch, world)
    return world


@pytest.mark.parametrize(
    ("name", "direct", "stage_bytes"),
    [
        ("scales", "mixed", 512),
        *slow(("wide sums", "staged", 256)),
        *slow(("three ranks", "direct", 512)),
    ],
)
def test_all_parts(monkeypatch: Any, name: str, direct: str, stage_bytes: int) -> None:
    num_ranks, load = LOADS[name]
    world = world_of(monkeypatch, num_ranks, len(name), direct, stage_bytes)
    run_all(Parts(world, load, num_sms=2), tells=name != "wide sums")


def test_whole_operations(monkeypatch: Any) -> None:
    run_pair(world_of(monkeypatch, 2, 1, "mixed", 1 << 10), SMALL, num_worst_tokens=20)


TAIL = "if not CACHED and not PLACED:\n                fill_tail"
FAULTS = {
    "tokens of the part": ("token + load_shared_long(entry + FIRST_TOKEN).to(gl.int32)", "token"),
    "the tail is filled": (TAIL, TAIL.replace(" and not PLACED", "")),
}


@pytest.mark.parametrize("name", but_slow(FAULTS, "the tail is filled"))
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    module = bulk_emulator.mutated_bulk_module("bulk_dispatch", bulk_dispatch, *FAULTS[name])
    several = Parts(world_of(monkeypatch, 2, 1, "direct", 512, module), LOADS["scales"][1], num_sms=2)
    with pytest.raises((AssertionError, InterpreterError)):
        run_all(several, combines=False)
