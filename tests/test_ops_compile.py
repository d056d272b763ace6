"""The operators in compiled programs: whole graphs, any number of tokens, nothing dropped, nothing reordered."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests import low_latency_cases
from tests.conftest import PoolOf, slow
from tests.operators import draw, recorded_calls
from tokenferry import Buffer, ops
from tokenferry.nn import ExpertParallelMoE, functional

EXPERTS = 4
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@contextmanager
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, in this process or another, counts."""
    torch._dynamo.reset()
    with (
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield


def gradients(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What the function returns, and the gradients of its squares."""
    leaves = [value.clone().requires_grad_() for value in inputs]
    out = function(*leaves)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check_layer(rank: int, num_ranks: int, backend: str, num_worst_tokens: int, tokens: tuple[int, int]) -> None:
    with fresh_compiler(), Buffer(dist.group.WORLD) as buffer:
        ops.register(buffer)
        x, ids, weights = draw(rank, tokens[rank])
        scale = torch.linspace(1, 2, 8)

        def layer(x: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor = ids) -> Any:
            got = functional.dispatch(buffer, x, ids, weights, EXPERTS, num_worst_tokens=num_worst_tokens)
            rows = F.silu(got.x * scale) * got.topk_weights.sum(1, keepdim=True)
            return functional.combine(buffer, rows, got.handle).sin()

        compiled = torch.compile(layer, backend=backend, fullgraph=True)
        wanted, have = gradients(layer, x, weights, scale), gradients(compiled, x, weights, scale)
        torch.testing.assert_close(have, wanted)


@pytest.mark.parametrize("tokens", [(0, 3), *slow(((6, 6),))], ids=str)
@pytest.mark.parametrize(
    ("backend", "num_worst_tokens"),
    [
        pytest.param("aot_eager", 0, marks=pytest.mark.slow),
        ("aot_eager", 40),
        pytest.param("inductor", 0, marks=[needs_compiler, pytest.mark.slow]),
        pytest.param("inductor", 40, marks=[needs_compiler, pytest.mark.slow]),
    ],
)
def test_layer(pool_of: PoolOf, backend: str, num_worst_tokens: int, tokens: tuple[int, int]) -> None:
    """A rank without tokens has a graph of its own, from which a compiler would love to drop a combine of nothing."""
    pool_of(2).run(check_layer, backend, num_worst_tokens, tokens)


def check_unused(rank: int, num_ranks: int, backend: str) -> None:
    with fresh_compiler(), Buffer(dist.group.WORLD) as buffer:
        ops.register(buffer)
        x, ids, weights = draw(rank, 5)

        def function(x: torch.Tensor) -> torch.Tensor:
            functional.dispatch(buffer, x, ids, weights, EXPERTS)
            got = functional.dispatch(buffer, x * 2, ids, weights, EXPERTS)
            functional.combine(buffer, got.x + 1, got.handle)
            functional.dispatch(buffer, x, ids, weights, EXPERTS)
            return functional.combine(buffer, got.x, got.handle)

        with recorded_calls(buffer) as calls:
            out = torch.compile(function, backend=backend, fullgraph=True)(x)
            assert calls == ["dispatch", "dispatch", "combine", "dispatch", "combine"]
        assert torch.equal(out, function(x))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
def test_nothing_is_dropped_or_merged(pool_of: PoolOf, backend: str) -> None:
    """Also not what has no use on this rank, or was computed before: the other ranks take part."""
    pool_of(2).run(check_unused, backend)


def check_module(rank: int, num_ranks: int) -> None:
    with fresh_compiler(), Buffer(dist.group.WORLD) as buffer:
        layer = ExpertParallelMoE(buffer, 16, 8, 2, 1)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        results = []
        for module in (layer, compiled):
            layer.zero_grad()
            results.append(gradients(module, draw(rank, 7 - rank, hidden=16)[0]))
            results[-1] += [parameter.grad.clone() for parameter in layer.parameters()]
            results[-1] += [layer.expert_load, layer.tokens_sent]
        torch.testing.assert_close(results[0], results[1])


@pytest.mark.slow
def test_whole_module(pool_of: PoolOf) -> None:
    pool_of(2).run(check_module)


def check_breaks(rank: int, num_ranks: int) -> None:
    with fresh_compiler(), Buffer(dist.group.WORLD) as buffer:
        x, ids, weights = draw(rank, 5)

        def step(x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_()
            got = functional.dispatch(buffer, x.sin(), ids, weights, EXPERTS)
            out = functional.combine(buffer, got.x.cos(), got.handle)
            out.square().sum().backward()
            return out.detach() + x.grad

        compiled = torch.compile(step, backend="aot_eager")
        for _ in range(2):
            assert torch.equal(compiled(x), step(x))
            torch._dynamo.reset()


def test_broken_graphs(pool_of: PoolOf) -> None:
    """Without ``fullgraph`` an operator may run between compiled pieces; what is inside of it is not compiled."""
    pool_of(2).run(check_breaks)


def check_low_latency(rank: int, num_ranks: int) -> None:
    with fresh_compiler(), low_latency_cases.make_buffer() as buffer:
        ops.register(buffer)
        x, ids, weights = draw(rank, 4, hidden=512)
        x = x.bfloat16()

        def function(x: torch.Tensor, use_fp8: bool) -> tuple[torch.Tensor, ...]:
            got = functional.low_latency_dispatch(buffer, x, ids, 8, EXPERTS, use_fp8=use_fp8)
            rows = got.x.float()
            if use_fp8:
                rows = (rows.unflatten(-1, (-1, 128)) * got.scales[..., None]).flatten(-2)
            out = functional.low_latency_combine(buffer, rows.bfloat16() * 2, ids, weights, got.handle)
            return out, got.num_received

        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        for use_fp8 in (True, False):
            assert all(map(torch.equal, compiled(x, use_fp8), function(x, use_fp8)))


def test_low_latency(pool_of: PoolOf) -> None:
    pool_of(2).run(check_low_latency)


def check_messages(rank: int, num_ranks: int) -> None:
    with fresh_compiler(), Buffer(dist.group.WORLD) as buffer:
        x, ids, weights = draw(rank, 4)

        def function(x: torch.Tensor) -> torch.Tensor:
            return functional.dispatch(buffer, x, ids, weights, EXPERTS).x

        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match=r"call tokenferry\.ops\.register\(buffer\) before compiling"):
            compiled(x)
        ops.register(buffer)
        assert torch.equal(compiled(x), function(x))


def test_a_buffer_without_a_name_is_refused(pool_of: PoolOf) -> None:
    pool_of(2).run(check_messages)


def check_export(rank: int, num_ranks: int) -> None:
    class Exchange(torch.nn.Module):
        def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            rows, _, _, _, *handle = torch.ops.tokenferry.dispatch(x, ids, weights, "exported", EXPERTS)
            return torch.ops.tokenferry.combine(rows * 2, handle, "exported")[0]

    inputs = draw(rank, 6)
    with Buffer(dist.group.WORLD) as buffer:
        ops.register(buffer, "exported")
        tokens = torch.export.Dim("tokens", min=0, max=100)
        program = torch.export.export(Exchange(), inputs, dynamic_shapes=({0: tokens}, {0: tokens}, {0: tokens}))
        module = program.module()
        want = Exchange()(*inputs)
        assert torch.equal(module(*inputs), want)
    inputs = draw(rank, 3 + 4 * rank)
    with Buffer(dist.group.WORLD) as buffer:
        ops.register(buffer, "exported")
        assert torch.equal(module(*inputs), Exchange()(*inputs))


def test_export(pool_of: PoolOf) -> None:
    """An exported program names its Buffer, and runs with whichever has the name."""
    pool_of(2).run(check_export)
