"""tokenferry.nn against finite differences and against dense single-process twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd import gradcheck

from tests.conftest import PoolOf, slow
from tokenferry import ArgumentError, Buffer
from tokenferry.nn import ExpertParallelMoE
from tokenferry.nn.functional import combine, dispatch
from tokenferry.nn.moe import initial_expert, initial_router


def gather(tensor: torch.Tensor) -> list[torch.Tensor]:
    """What every rank has, by rank; first dimensions may differ."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, tensor.detach().contiguous().numpy())
    return [torch.from_numpy(part) for part in parts]


class Mine(torch.autograd.Function):
    """This rank's rows of a tensor that all ranks have; with Everyones, makes the ranks one function."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor, start: int, length: int) -> torch.Tensor:
        return whole[start : start + length].clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch.cat(gather(grad)), None, None


class Everyones(torch.autograd.Function):
    """The rows of all ranks, on all ranks, whose losses are the same."""

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor) -> torch.Tensor:
        parts = gather(mine)
        ctx.sizes = [part.size(0) for part in parts]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad.split(ctx.sizes)[dist.get_rank()].clone()


class Shared(torch.autograd.Function):
    """A parameter that all ranks use: its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, whole: torch.Tensor) -> torch.Tensor:
        return whole.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return torch.stack(gather(grad)).sum(0)


def mine(whole: torch.Tensor, sizes: list[int], rank: int) -> torch.Tensor:
    return Mine.apply(whole, sum(sizes[:rank]), sizes[rank])


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


TOKENS = [3, 2]
# Four experts on two ranks: both ranks, one rank twice, no choice, a duplicate, another rank only.
ROUTES = torch.tensor([[0, 3], [2, 3], [-1, 1], [2, 2], [0, -1]])


def gradcheck_dispatch(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD) as buffer:
        ids = ROUTES.split(TOKENS)[rank].contiguous()

        def function(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            got = dispatch(buffer, mine(x, TOKENS, rank), ids, mine(weights, TOKENS, rank), 4)
            return Everyones.apply(got[0]), Everyones.apply(got[2])

        inputs = draw(5, 2, seed=1).requires_grad_(), draw(5, 2, seed=2).requires_grad_()
        x, weights = (whole.detach().split(TOKENS)[rank] for whole in inputs)
        narrow, wide = (dispatch(buffer, x, ids, w, 4) for w in (weights.float(), weights))
        assert torch.equal(wide[0], narrow[0])
        assert torch.equal(wide[2].float(), narrow[2])
        assert gradcheck(function, inputs)


def gradcheck_combine(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD) as buffer:
        ids = ROUTES.split(TOKENS)[rank].contiguous()
        got, *_, handle = dispatch(buffer, torch.zeros(TOKENS[rank], 2).double(), ids, torch.ones(ids.shape), 4)
        sizes = [part.size(0) for part in gather(got)]

        def function(x: torch.Tensor) -> torch.Tensor:
            return Everyones.apply(combine(buffer, mine(x, sizes, rank), handle))

        assert gradcheck(function, (draw(sum(sizes), 2, seed=3).requires_grad_(),))


def gradcheck_layer(rank: int, num_ranks: int, fast_mode: bool = True) -> None:
    with Buffer(dist.group.WORLD) as buffer:
        layer = ExpertParallelMoE(buffer, 2, 2, 4, 2, dtype=torch.float64)

        def function(x: torch.Tensor, router: torch.Tensor, *experts: torch.Tensor) -> torch.Tensor:
            names = ("gate_LIH", "up_LIH", "down_LHI")
            values = {name: mine(value, [2, 2], rank) for name, value in zip(names, experts, strict=True)}
            values["router_EH"] = Shared.apply(router)
            return Everyones.apply(torch.func.functional_call(layer, values, (mine(x, TOKENS, rank),)))

        inputs = [draw(*shape, seed=i) for i, shape in enumerate([(5, 2), (4, 2), (4, 2, 2), (4, 2, 2), (4, 2, 2)])]
        logits = (inputs[0] @ inputs[1].T).sort(dim=-1).values
        assert float((logits[:, 2] - logits[:, 1]).min()) > 1e-3  # no step of gradcheck changes a choice
        assert gradcheck(function, [value.requires_grad_() for value in inputs], fast_mode=fast_mode)


def gradcheck_layer_in_all_directions(rank: int, num_ranks: int) -> None:
    """Not in one random direction; that takes long."""
    gradcheck_layer(rank, num_ranks, fast_mode=False)


@pytest.mark.parametrize(
    "check", [gradcheck_layer, *slow(gradcheck_layer_in_all_directions, gradcheck_dispatch, gradcheck_combine)]
)
def test_gradcheck_in_float64(pool_of: PoolOf, check: Callable[..., None]) -> None:
    pool_of(2).run(check)


def dense(x: torch.Tensor, router: torch.Tensor, experts: list[torch.Tensor], num_topk: int) -> torch.Tensor:
    """The layer from its definition, token by token."""
    gate, up, down = experts
    rows = []
    for row in x:
        probabilities = F.linear(row, router).to(torch.promote_types(row.dtype, torch.float32)).softmax(-1)
        best, ids = probabilities.topk(num_topk)
        terms = [
            weight * (down[e] @ (F.silu(gate[e] @ row) * (up[e] @ row)))
            for weight, e in zip(best / best.sum(), ids.tolist(), strict=True)
        ]
        rows.append(torch.stack(terms).sum(0))
    return torch.stack(rows)


def layer_equals_dense(rank: int, num_ranks: int, dtype_name: str, tokens: list[int]) -> None:
    dtype = getattr(torch, dtype_name)
    hidden, intermediate, experts, topk = 12, 20, 8, 3
    whole = draw(sum(tokens), hidden, seed=5).to(dtype)
    target = draw(sum(tokens), hidden, seed=6).to(dtype)
    with Buffer(dist.group.WORLD) as buffer:
        layer = ExpertParallelMoE(buffer, hidden, intermediate, experts, topk, seed=7, dtype=dtype)
        x = whole.split(tokens)[rank].clone().requires_grad_()
        out = layer(x)
        (out * target.split(tokens)[rank]).sum().backward()
    stacked = [initial_expert(7, e, hidden, intermediate, dtype) for e in range(experts)]
    twin_experts = [torch.stack(parts).requires_grad_() for parts in zip(*stacked, strict=True)]
    twin_router = initial_router(7, experts, hidden, dtype).requires_grad_()
    twin_x = whole.clone().requires_grad_()
    twin_out = dense(twin_x, twin_router, twin_experts, topk)
    (twin_out * target).sum().backward()

    def same(have: torch.Tensor | None, want: torch.Tensor | None, start: int = 0) -> None:
        assert have is not None
        assert want is not None
        assert float(want.abs().max()) > 0.01  # two zeros would prove nothing
        bound = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(have, want[start : start + have.size(0)], rtol=bound, atol=bound)

    first_token, first_expert = sum(tokens[:rank]), rank * experts // num_ranks
    assert out.shape == (tokens[rank], hidden)
    same(out, twin_out, first_token)
    same(x.grad, twin_x.grad, first_token)
    router_grad = layer.router_EH.grad
    dist.all_reduce(router_grad)
    same(router_grad, twin_router.grad)
    for have, want in zip(layer.expert_parameters(), twin_experts, strict=True):
        assert have.size(0) == experts // num_ranks
        same(have.grad, want.grad, first_expert)
    locally = slice(first_expert, first_expert + experts // num_ranks)
    chosen = F.linear(whole, twin_router).topk(topk).indices
    assert layer.expert_load.tolist() == torch.bincount(chosen.flatten(), minlength=experts)[locally].tolist()
    member = (chosen.split(tokens)[rank] // (experts // num_ranks))[:, :, None] == torch.arange(num_ranks)
    assert layer.tokens_sent.tolist() == member.any(1).sum(0).tolist()


@pytest.mark.parametrize("dtype", ["float64", *slow("float32")])
@pytest.mark.parametrize("tokens", [[9], [5, 7], [0, 6], [3, 0, 8, 1], [0, 0, 1, 0]], ids=str)
def test_layer_equals_its_dense_twin(pool_of: PoolOf, tokens: list[int], dtype: str) -> None:
    """Ranks bring no token, or get none: one token with three choices leaves one rank of four without rows."""
    pool_of(len(tokens)).run(layer_equals_dense, dtype, tokens)


def no_tokens_at_all(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD) as buffer:
        layer = ExpertParallelMoE(buffer, 8, 8, 4, 2)
        x = torch.zeros(2, 0, 8, requires_grad=True)
        out = layer(x)
        out.sum().backward()
    assert out.shape == x.shape
    assert x.grad is not None
    for parameter in layer.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_no_tokens_on_any_rank(pool_of: PoolOf) -> None:
    pool_of(2).run(no_tokens_at_all)


def state_of(rank: int, num_ranks: int) -> tuple[str, dict[str, Any]]:
    with Buffer(dist.group.WORLD) as buffer:
        layer = ExpertParallelMoE(buffer, 8, 4, 8, 2, seed=3)
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        other = ExpertParallelMoE(buffer, 8, 4, 8, 2, seed=4)
        assert not torch.equal(other.router_EH, layer.router_EH)
        assert not torch.equal(other.gate_LIH, layer.gate_LIH)
        other.load_state_dict(state)
        x = draw(5, 8, seed=rank).float()
        assert torch.equal(other(x), layer(x))
        return repr(layer), {name: value.tolist() for name, value in state.items()}


def test_parameters_do_not_depend_on_the_number_of_ranks(pool_of: PoolOf) -> None:
    (alone,) = pool_of(1).run(state_of)
    for num_ranks in (2, 4):
        states = pool_of(num_ranks).run(state_of)
        assert f"rank={num_ranks - 1} of {num_ranks}" in states[-1][0]
        assert f"local experts {8 - 8 // num_ranks}..7" in states[-1][0]
        assert all(state["router_EH"] == alone[1]["router_EH"] for _, state in states)
        for name in ("gate_LIH", "up_LIH", "down_LHI"):
            assert [expert for _, state in states for expert in state[name]] == alone[1][name]


def strided_gradients(rank: int, num_ranks: int) -> None:
    ids = torch.tensor([[0, 3], [2, 3], [-1, 1], [-1, -1]])
    ranks_of_token = torch.tensor([2.0, 1.0, 1.0, 0.0])
    with Buffer(dist.group.WORLD) as buffer:
        x = draw(4, 8, seed=rank).float().requires_grad_()
        weights = torch.rand(4, 2).requires_grad_()
        received, _, received_weights, _, handle = dispatch(buffer, x, ids, weights, 4)
        (received.sum() + received_weights.sum()).backward(retain_graph=True)
        assert torch.equal(x.grad, ranks_of_token[:, None].expand(4, 8))
        assert torch.equal(weights.grad, (ids >= 0).float())
        x.grad = None
        out = combine(buffer, received, handle)
        out.sum().backward(retain_graph=True)
        assert torch.equal(x.grad, ranks_of_token[:, None].expand(4, 8))
        x.grad = None
        factors = draw(8, 4, seed=9).float()
        (out.T * factors).sum().backward()
        torch.testing.assert_close(x.grad, factors.T * ranks_of_token[:, None])


def test_gradients_of_any_stride(pool_of: PoolOf) -> None:
    pool_of(2).run(strided_gradients)


def several_handles(rank: int, num_ranks: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    with Buffer(dist.group.WORLD) as buffer:
        tokens = [6, 0] if rank == 0 else [4, 9]
        xs, handles, received, spread = [], [], [], []
        for count in tokens:
            ids = torch.randint(-1, 4, (count, 2), generator=generator)
            x = torch.randn(count, 8, generator=generator).requires_grad_()
            got, *_, handle = dispatch(buffer, x, ids, torch.ones(count, 2), 4)
            xs.append(x)
            handles.append(handle)
            received.append(got)
            spread.append(handle.is_token_in_rank.sum(1, keepdim=True))
        first = combine(buffer, received[0] * 2, handles[0])
        second = combine(buffer, received[1] * 3, handles[1])
        again = combine(buffer, received[0].square(), handles[0])
        factors = [torch.randn(part.shape, generator=generator) for part in (first, second, again)]
        sum((part * factor).sum() for part, factor in zip((first, second, again), factors, strict=True)).backward()
        want = spread[0] * (2 * factors[0] + 2 * xs[0].detach() * factors[2])
        torch.testing.assert_close(xs[0].grad, want)
        torch.testing.assert_close(xs[1].grad, spread[1] * 3 * factors[1])


def test_several_dispatches_alive_and_a_handle_used_twice(pool_of: PoolOf) -> None:
    pool_of(2).run(several_handles)


def worst_case_rows(rank: int, num_ranks: int) -> None:
    ids = torch.tensor([[0, 3], [2, 3], [-1, 1]])
    with Buffer(dist.group.WORLD) as buffer:
        plane = buffer.runtime.party().plane
        plane_type, empty_rows = type(plane), plane.empty_rows

        def poisoned(self: Any, rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
            rows_of_memory = empty_rows(rows, width, dtype)
            return rows_of_memory.fill_(float("nan")) if dtype.is_floating_point else rows_of_memory.fill_(77)

        original, plane_type.empty_rows = plane_type.empty_rows, poisoned
        try:
            x = draw(3, 8, seed=rank).float().requires_grad_()
            weights = torch.ones(3, 2, requires_grad=True)
            scale = torch.ones(8, requires_grad=True)
            got, local, got_weights, counts, handle = dispatch(buffer, x, ids, weights, 4, num_worst_tokens=16)
            out = combine(buffer, got * scale * got_weights.sum(1, keepdim=True), handle)
            out.sum().backward()
        finally:
            plane_type.empty_rows = original
        received = int(handle.rank_prefix_matrix[-1, rank])
        assert counts.numel() == 0
        assert got.size(0) == 16 > received > 0
        assert not got[received:].any()
        assert (local[received:] == -1).all()
        chosen = (ids >= 0).float()
        torch.testing.assert_close(out, x.detach() * chosen.sum(1, keepdim=True))
        torch.testing.assert_close(x.grad, chosen.sum(1, keepdim=True).expand(3, 8))
        torch.testing.assert_close(weights.grad, x.detach().sum(1, keepdim=True) * chosen)
        dist.all_reduce(scale.grad)
        everyone = sum((part * chosen.sum(1, keepdim=True)).sum(0) for part in gather(x))
        torch.testing.assert_close(scale.grad, everyone)


def test_worst_case_rows_leave_no_nan_in_gradients(pool_of: PoolOf) -> None:
    pool_of(2).run(worst_case_rows)


def wrong_arguments(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD) as buffer:
        with pytest.raises(ArgumentError, match=r"topk_weights: got torch\.float64 beside x in torch\.float32"):
            dispatch(buffer, torch.zeros(1, 8), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).double(), 2)
        with pytest.raises(ArgumentError, match="num_experts: got 3"):
            ExpertParallelMoE(buffer, 8, 8, 3, 1)
        with pytest.raises(ArgumentError, match=r"x: .* of shape \[3, 32\] on cpu; allowed: rows of 64 elements"):
            ExpertParallelMoE(buffer, 64, 128, num_ranks, 1)(torch.zeros(3, 32))
        with pytest.raises(ArgumentError, match="num_topk: got 5"):
            ExpertParallelMoE(buffer, 8, 8, 4, 5)


def test_wrong_arguments_are_named(pool_of: PoolOf) -> None:
    pool_of(2).run(wrong_arguments)
