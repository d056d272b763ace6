"""Derivatives through the operators: against a dense twin, finite differences, and each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.distributed as dist
from torch.autograd import gradcheck, gradgradcheck

from tests.conftest import PoolOf, slow
from tests.operators import draw, recorded_calls
from tests.test_nn import ROUTES, TOKENS, gather
from tests.test_nn import draw as draw_whole
from tokenferry import Buffer, ops
from tokenferry.nn import functional

EXPERTS = 4


class Mine(torch.autograd.Function):
    """This rank's rows of a tensor that all ranks have."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.sizes = sizes
        return whole.split(sizes)[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Everyones.apply(grad, ctx.sizes), None


class Everyones(torch.autograd.Function):
    """The rows of all ranks, on all ranks, whose losses are the same: with Mine the ranks are one function."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.sizes = sizes
        return torch.cat(gather(mine))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return Mine.apply(grad, ctx.sizes), None


def expert(x: torch.Tensor, factors: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Sum over the choices of each row: weight * tanh(factor of the expert * row), nothing for -1."""
    per_choice = (x[:, None] * factors[ids.clamp(min=0)]).tanh() * weights[..., None]
    return per_choice.masked_fill((ids < 0)[..., None], 0).sum(1)


def layer(buffer: Buffer, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, factors: torch.Tensor) -> Any:
    """Dispatch, the local experts, combine with a bias."""
    local = EXPERTS // buffer.group_size
    got = functional.dispatch(buffer, x, ids, weights, EXPERTS)
    mine = factors[buffer.rank * local : (buffer.rank + 1) * local]
    out = expert(got.x, mine, got.topk_idx, got.topk_weights)
    return functional.combine(buffer, out, got.handle, bias=(None, x.square()))


def against_dense(rank: int, num_ranks: int) -> None:
    """Float64: the same loss and gradients as in one process without ranks."""
    ids = ROUTES.split(TOKENS)[rank].contiguous()
    inputs = [draw_whole(*shape, seed=seed) for seed, shape in enumerate([(5, 2), (5, 2), (EXPERTS, 2), (5, 2)])]
    x, weights, factors = (value.clone().requires_grad_() for value in inputs[:3])
    loss = ((expert(x, factors, ROUTES, weights) + x.square()) * inputs[3]).sum()
    wanted = torch.autograd.grad(loss, (x, weights, factors))
    mine = [value.split(TOKENS)[rank].clone().requires_grad_() for value in inputs[:2]]
    shared = inputs[2].clone().requires_grad_()
    with Buffer(dist.group.WORLD) as buffer:
        out = layer(buffer, mine[0], ids, mine[1], shared)
        (out * inputs[3].split(TOKENS)[rank]).sum().backward()
    dist.all_reduce(shared.grad)
    for have, want in zip(mine, wanted[:2], strict=True):
        torch.testing.assert_close(have.grad, want.split(TOKENS)[rank], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shared.grad, wanted[2], rtol=1e-12, atol=1e-12)


def finite_differences(rank: int, num_ranks: int) -> None:
    """The layer as one function of what all ranks have."""
    ids = ROUTES.split(TOKENS)[rank].contiguous()
    factors = draw_whole(EXPERTS, 2, seed=2)
    with Buffer(dist.group.WORLD) as buffer:

        def function(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            out = layer(buffer, Mine.apply(x, TOKENS), ids, Mine.apply(weights, TOKENS), factors)
            return Everyones.apply(out, TOKENS)

        inputs = draw_whole(5, 2, seed=0).requires_grad_(), draw_whole(5, 2, seed=1).requires_grad_()
        assert gradcheck(function, inputs)


def second_derivatives(rank: int, num_ranks: int) -> None:
    """Each operator, and its gradient's gradient."""
    ids = ROUTES.split(TOKENS)[rank].contiguous()
    with Buffer(dist.group.WORLD) as buffer:
        name = ops.register(buffer)
        rows, _, _, _, *handle = ops.dispatch(torch.zeros(len(ids), 4), ids, torch.ones(ids.shape), name, EXPERTS)
        sizes = [len(part) for part in gather(rows)]
        everywhere = torch.ones(ids.shape)

        def dispatched(x: torch.Tensor) -> torch.Tensor:
            out = ops.dispatch(Mine.apply(x, TOKENS), ids, everywhere, name, EXPERTS)[0]
            return Everyones.apply(out, sizes)

        def dispatched_again(x: torch.Tensor) -> torch.Tensor:
            return Everyones.apply(ops.cached_dispatch(Mine.apply(x, TOKENS), handle, name)[0], sizes)

        def combined(x: torch.Tensor) -> torch.Tensor:
            return Everyones.apply(ops.combine(Mine.apply(x, sizes), handle, name)[0], TOKENS)

        for function, have in ((dispatched, TOKENS), (dispatched_again, TOKENS), (combined, sizes)):
            value = draw_whole(sum(have), 2, seed=4).requires_grad_()
            assert gradcheck(function, (value,))
            assert gradgradcheck(lambda value, function=function: function(value).pow(3), (value,))


@pytest.mark.parametrize("check", [against_dense, finite_differences, *slow(second_derivatives)])
def test_in_float64(pool_of: PoolOf, check: Callable[..., None]) -> None:
    pool_of(2).run(check)


def float32_weights(rank: int, num_ranks: int) -> None:
    """The router's weights as operators carry them, with gradients wanted for rows, for weights, for both."""
    x, ids, weights = draw(rank, 6)
    ranks = torch.tensor([len({e // 2 for e in row}) for row in ids.tolist()])[:, None]
    with Buffer(dist.group.WORLD) as buffer:
        name = ops.register(buffer)
        for wanted in ((True, True), (True, False), (False, True)):
            x, weights = x.detach().requires_grad_(wanted[0]), weights.detach().requires_grad_(wanted[1])
            rows, _, recv_weights, _, *handle = ops.dispatch(x, ids, weights, name, EXPERTS)
            assert (rows.requires_grad, recv_weights.requires_grad) == wanted
            out, out_weights = ops.combine(rows, handle, name, recv_weights)
            torch.testing.assert_close(out, x * ranks)
            assert torch.equal(out_weights, weights)
            factor = torch.arange(1.0, 13.0).view(6, 2)
            with recorded_calls(buffer) as calls:
                ((out.square().sum() if wanted[0] else 0) + (out_weights * factor).square().sum()).backward()
            if wanted[0]:
                torch.testing.assert_close(x.grad, 2 * x.detach() * ranks**2)
            if wanted[1]:
                torch.testing.assert_close(weights.grad, 2 * weights.detach() * factor.square())
            assert (
                calls
                == {
                    (True, True): ["cached dispatch", "cached dispatch", "combine"],
                    (True, False): ["cached dispatch", "combine"],
                    (False, True): ["cached dispatch", "combine"],
                }[wanted]
            )
            x.grad = weights.grad = None


def only_one_output_used(rank: int, num_ranks: int) -> None:
    """What backward does not hand over counts as zero, on every rank alike."""
    x, ids, weights = (t.requires_grad_(t.is_floating_point()) for t in draw(rank, 5))
    with Buffer(dist.group.WORLD) as buffer:
        got = functional.dispatch(buffer, x, ids, weights, EXPERTS)
        got.topk_weights.sum().backward()
        assert not x.grad.any()
        assert torch.equal(weights.grad, torch.ones_like(weights))
        got = functional.dispatch(buffer, x, ids, weights, EXPERTS)
        got.x.sum().backward()
        assert x.grad.all()
        assert torch.equal(weights.grad, torch.ones_like(weights))
        quantised = (x.detach().to(torch.float8_e4m3fn).repeat(1, 2), torch.rand(5, 1))
        name = ops.name_of(buffer)
        rows, _, recv_weights, *_ = ops.dispatch(quantised[0], ids, weights, name, EXPERTS, 0, 1, quantised[1])
        assert not rows.requires_grad
        (recv_weights * rows.float().sum(1, keepdim=True)).sum().backward()
        per_token = quantised[0].float().sum(1, keepdim=True)
        torch.testing.assert_close(weights.grad, 1 + per_token.expand(5, 2))


@pytest.mark.parametrize("check", [float32_weights, only_one_output_used])
def test_router_weights(pool_of: PoolOf, check: Callable[..., None]) -> None:
    pool_of(2).run(check)


def transforms(rank: int, num_ranks: int) -> None:
    x, ids, weights = draw(rank, 5)
    with Buffer(dist.group.WORLD) as buffer:

        def function(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            got = functional.dispatch(buffer, x, ids, weights, EXPERTS)
            out = got.x.sin() * got.topk_weights.sum(1, keepdim=True)
            return functional.combine(buffer, out, got.handle).cos()

        def slope(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            grads = torch.func.grad(lambda *given: function(*given).sum(), argnums=(0, 1))(x, weights)
            return grads[0].square().sum() + grads[1].square().sum()

        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = function(*leaves)
        grads = torch.autograd.grad(out.sum(), leaves, create_graph=True)
        seconds = torch.autograd.grad(sum(grad.square().sum() for grad in grads), leaves)
        directional = sum((grad * leaf).sum() for grad, leaf in zip(grads, leaves, strict=True)).detach()
        along_x = (grads[0] * leaves[0]).sum().detach()

        same(torch.func.grad(lambda *given: function(*given).sum(), argnums=(0, 1))(x, weights), grads)
        value, pull = torch.func.vjp(function, x, weights)
        same((value, *pull(torch.ones_like(value))), (out, *grads))
        same(torch.func.grad(slope, argnums=(0, 1))(x, weights), seconds)
        same(torch.func.jvp(function, (x, weights), (x, weights))[1].sum(), directional)
        same(torch.func.jvp(lambda x: function(x, weights), (x,), (x,))[1].sum(), along_x)
        with forward_ad.dual_level():
            dual = function(forward_ad.make_dual(x, x), weights)
            same(forward_ad.unpack_dual(dual).tangent.sum(), along_x)
        with pytest.raises(RuntimeError, match="Batching rule not implemented for tokenferry::dispatch"):
            torch.func.vmap(lambda x: function(x, weights))(torch.stack([x, x]))


def same(have: Any, want: Any) -> None:
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-5)


def test_transforms(pool_of: PoolOf) -> None:
    """``torch.func``: grad, vjp, jvp, grad of grad; not vmap."""
    pool_of(2).run(transforms)
