"""Activation checkpointing around the operators: what is saved is not run again, what is not is, on all ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.conftest import PoolOf, slow
from tests.operators import draw, recorded_calls
from tests.test_ops_compile import fresh_compiler, gradients, needs_compiler
from tokenferry import Buffer, ops
from tokenferry.nn import functional

EXPERTS = 4
FORWARD = ["dispatch", "combine"]
BACKWARD = ["cached dispatch", "combine"]


def save_operators(context: Any, operator: Any, *args: Any, **given: Any) -> CheckpointPolicy:
    saves = operator in ops.OPERATORS
    return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE


def recompute_dispatch(context: Any, operator: Any, *args: Any, **given: Any) -> CheckpointPolicy:
    return (
        CheckpointPolicy.MUST_SAVE
        if operator is torch.ops.tokenferry.combine.default
        else CheckpointPolicy.MUST_RECOMPUTE
    )


POLICIES: dict[str, dict[str, Any]] = {
    "all": {},
    "save": {"context_fn": functools.partial(create_selective_checkpoint_contexts, save_operators)},
    "half": {"context_fn": functools.partial(create_selective_checkpoint_contexts, recompute_dispatch)},
}


def check(rank: int, num_ranks: int, backend: str | None, num_blocks: int, policy: str, expected: list[str]) -> None:
    x, ids, weights = draw(rank, 6 - 5 * rank)
    scale = torch.linspace(1, 2, 8)
    with fresh_compiler(), Buffer(dist.group.WORLD) as buffer:
        ops.register(buffer)

        def block(x: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            got = functional.dispatch(buffer, x.cos(), ids, weights, EXPERTS)
            rows = F.silu(got.x * scale) * got.topk_weights.sum(1, keepdim=True)
            return functional.combine(buffer, rows, got.handle).sin()

        def run(block: Callable[..., torch.Tensor], *given: torch.Tensor) -> torch.Tensor:
            out, *others = given
            for _ in range(num_blocks):
                out = block(out, *others)
            return out

        saving = functools.partial(checkpoint, block, use_reentrant=False, **POLICIES[policy])
        function = functools.partial(run, saving)
        if backend is not None:
            function = torch.compile(function, backend=backend, fullgraph=True)
        wanted = gradients(functools.partial(run, block), x, weights, scale)
        with recorded_calls(buffer) as calls:
            have = gradients(function, x, weights, scale)
        torch.testing.assert_close(have, wanted)
        assert calls == FORWARD * num_blocks + expected * num_blocks


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all", FORWARD + BACKWARD),
        ("save", BACKWARD),
        ("half", ["dispatch", "cached dispatch", "combine"]),
    ],
)
def test_eager(pool_of: PoolOf, policy: str, expected: list[str]) -> None:
    pool_of(2).run(check, None, 2, policy, expected)


@pytest.mark.parametrize("policy", ["all", *slow("save", "half")])
@pytest.mark.parametrize(
    ("backend", "num_blocks"),
    [("aot_eager", 1), pytest.param("inductor", 2, marks=[needs_compiler, pytest.mark.slow])],
)
def test_compiled(pool_of: PoolOf, policy: str, backend: str, num_blocks: int) -> None:
    """A compiler would place what it recomputes as it likes: operators are always saved."""
    if policy == "all" and torch.__version__ < (2, 12):
        pytest.xfail("the compiler of torch 2.11 fails: it wants to save what is None")
    pool_of(2).run(check, backend, num_blocks, policy, BACKWARD)
