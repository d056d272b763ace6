"""Local sums on GPUs: bit for bit those of CPU ranks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cases import same
from tests.kernels.mutants import mutated_module
from tests.kernels.parts_world import PartsPlane, simulate
from tests.kernels.world import Simulated, World
from tokenferry.dataplane import Part
from tokenferry.dataplane.cpu.combine import sum_rows
from tokenferry.dataplane.cuda import parts_programs

B, H, F, D = torch.bfloat16, torch.float16, torch.float32, torch.float64
CASES: dict[str, tuple[int, int, torch.dtype, torch.dtype, list[int | None], int]] = {
    "bf16": (37, 24, B, B, [9, None, 0, 20], 1),
    "float32 partials": (21, 8, F, B, [None, 21], 2),
    "float16": (5, 40, F, H, [2, 3], 0),
    "float64": (9, 4, D, D, [4, None, 9], 1),
    "weights": (19, 3, F, F, [7, None, 12], 0),
    "many parts": (6, 8, B, B, [3, None, *range(7), 1, 5, 6, 2, 0, 4, 3, 3, 2], 0),
    "no rows": (4, 8, B, B, [0], 0),
    "no tokens": (0, 8, B, B, [0, None], 1),
}
"""Tokens, width, dtype of the parts, that of the sums, rows of each part (None: all), biases."""


def run(monkeypatch: Any, name: str, seed: int, module: Any = parts_programs.sum_kernels) -> None:
    num_tokens, width, dtype, sums, counts, num_biases = CASES[name]
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int, of: torch.dtype) -> torch.Tensor:
        return (torch.randn(count, width, generator=generator) * 100).to(of)

    def part(count: int | None) -> Part:
        if count is None:
            return Part(None, rows(num_tokens, dtype))
        tokens = torch.randperm(num_tokens, generator=generator)[:count].sort().values
        return Part(tokens, rows(count, dtype))

    parts, biases = [part(count) for count in counts], [rows(num_tokens, sums) for _ in range(num_biases)]
    world = World(monkeypatch, 2, seed)
    simulate(monkeypatch, world)
    find = Simulated(world.simulator, module.find_rows, parts_programs._FIND_ROWS)
    kernels = {k: Simulated(world.simulator, module.sum_rows, v) for k, v in parts_programs._SUM_ROWS.items()}
    monkeypatch.setattr(parts_programs, "_FIND_ROWS", find)
    monkeypatch.setattr(parts_programs, "_SUM_ROWS", kernels)
    monkeypatch.setattr(parts_programs, "_TOKENS_PER_BLOCK", 16)
    monkeypatch.setattr(parts_programs, "_TILE_BYTES", 128)
    monkeypatch.setattr(parts_programs, "_PIECE_BYTES", 32)
    parts_programs._find_rows.cache_clear()
    parts_programs._sum_rows.cache_clear()
    out, wanted = (torch.full((num_tokens, width), torch.nan, dtype=sums) for _ in range(2))
    stream, recorded = SimpleNamespace(cuda_stream=0), set()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda tensor, s: recorded.add((tensor.data_ptr(), s is stream))
    )
    PartsPlane(world, 0).sum_rows(parts, biases, out, num_sms=3)
    world.run()
    assert not num_tokens or recorded == {(t.data_ptr(), True) for t in (out, *(part.rows for part in parts))}
    sum_rows(parts, biases, wanted)
    same(out, wanted, "sums")


@pytest.mark.parametrize("name", CASES)
def test_sums_are_those_of_cpu_ranks(monkeypatch: Any, name: str) -> None:
    run(monkeypatch, name, 0)


FAULTS = {
    "rows of the first part": ("pick(part, (rows_0,", "pick(part * 0, (rows_0,"),
    "the row behind": ("zero_of(count), count, first) + i", "zero_of(count), count, first + 1) + i"),
    "the order of parts": (
        "found + t * num_parts + part, mask",
        "found + t * num_parts + num_parts - 1 - part, mask",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    module = mutated_module(parts_programs.sum_kernels, *FAULTS[name])
    with pytest.raises(AssertionError):
        run(monkeypatch, "weights", 1, module)
