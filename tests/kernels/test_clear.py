"""Zeros past the last row of a worst case: what is used stays, what is not is zero, nothing else is touched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.mutants import mutated_module
from tests.kernels.simulator import Simulator
from tests.kernels.world import Simulated
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import clear as clear_kernels

ROWS, WIDTH = 10, 1500
"""int32 elements: more than one block."""


def is_right(
    monkeypatch: Any, num_used: int, *, stride: int = 1, num_rows: int = ROWS, module: Any = clear_kernels
) -> bool:
    """Of a tensor with a row on either side."""
    simulator = Simulator(num_used)
    monkeypatch.setattr(programs, "_CLEAR", Simulated(simulator, module.clear, programs._CLEAR))
    monkeypatch.setattr(programs, "_CLEARING_PROGRAMS", 3)
    programs._clear.cache_clear()
    around = torch.randint(1, 1 << 30, (num_rows + 2, WIDTH), dtype=torch.int32)
    places = torch.full((num_rows + 2, stride), -1, dtype=torch.int32)
    places[1 : 1 + num_used, 0] = torch.arange(num_used, dtype=torch.int32)
    wanted = around.clone()
    wanted[1 + num_used : 1 + num_rows] = 0
    simulator.restrict((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in (around, places))
    programs.clear(0, around[1:-1], places[1:-1, 0], programs.Target(2, False, 0))
    simulator.run()
    programs._clear.cache_clear()
    return torch.equal(around, wanted)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("num_used", [0, 1, 7, ROWS])
def test_rows_past_the_last(monkeypatch: Any, num_used: int, stride: int) -> None:
    assert is_right(monkeypatch, num_used, stride=stride)


def test_a_single_row(monkeypatch: Any) -> None:
    assert is_right(monkeypatch, 0, num_rows=1)
    assert is_right(monkeypatch, 1, num_rows=1)


MUTANTS = {
    "a place of zero counts as none": ("other=0) < 0", "other=1) < 1"),
    "the first program's rows alone": ("row -= tl.num_programs(0)", "row -= num_rows"),
    "the last row stays": ("row = num_rows - 1 -", "row = num_rows - 2 -"),
    "one block of a row": ("range(0, width, BLOCK)", "range(0, 1, BLOCK)"),
    "a row's neighbour": ("mask=i < width", "mask=i < width + BLOCK"),
    "places are packed": ("places + row * stride", "places + row"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    module = mutated_module(clear_kernels, *MUTANTS[name])
    found = (is_right(monkeypatch, used, stride=stride, module=module) for used in (1, 4) for stride in (1, 2))
    assert not all(found)
