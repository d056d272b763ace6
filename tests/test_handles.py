"""Handles: reused, rebuilt, several alive at once, and never changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, Case, Scenario, bits, poisoned_memory
from tests.conftest import PoolOf
from tokenferry import Buffer, Config

SCENARIOS = (
    Case(tokens=(9, 0, 20), num_topk=4, bias="one"),
    Case(tokens=(3, 31, 8), num_topk=2, routing="sparse", combine_dtype=torch.float32, seed=1),
    Case(tokens=(0, 0, 5), routing="one_rank", dtype=torch.uint8, scales=torch.float32, bias="two", seed=2),
)

FORMS: dict[str, Callable[[Any], Any]] = {
    "tuple": tuple,
    "list": list,
    "clones": lambda handle: tuple(element.clone() for element in handle),
    "saved_for_backward": lambda handle: _through_autograd(handle),
}


def _through_autograd(handle: Any) -> Any:
    class Save(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, *elements: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*elements)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            found.append(ctx.saved_tensors)
            return grads[0], *[None] * 6

    found: list[Any] = []
    Save.apply(torch.ones(1, requires_grad=True), *handle).sum().backward()  # type: ignore[no-untyped-call]
    return found[0]


def _use_rebuilt(rank: int, num_ranks: int, form: str) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        for case in SCENARIOS:
            scenario = Scenario(case, rank, num_ranks)
            handle = scenario.dispatch(buffer)[4]
            rebuilt = FORMS[form](handle)
            before = [element.clone() for element in rebuilt]
            versions = [element._version for element in rebuilt]
            for _ in range(3):
                with poisoned_memory():
                    scenario.check_cached(buffer.dispatch(scenario.x, handle=rebuilt))
                    scenario.check_combine(scenario.combine(buffer, rebuilt))
                    scenario.check_combine(scenario.combine(buffer, rebuilt, weights=False), weights=False)
            assert [element._version for element in rebuilt] == versions
            for old, new in zip(before, rebuilt, strict=True):
                assert torch.equal(old, new)


@pytest.mark.parametrize("form", FORMS)
def test_rebuilt_handle_works_any_number_of_times_and_is_never_changed(pool_of: PoolOf, form: str) -> None:
    pool_of(3).run(_use_rebuilt, form)


def _two_alive(rank: int, num_ranks: int, order: tuple[int, ...]) -> None:
    with Buffer(dist.group.WORLD, 65536, timeout=TIMEOUT) as buffer:
        scenarios = [Scenario(case, rank, num_ranks) for case in SCENARIOS]
        results = [scenario.dispatch(buffer) for scenario in scenarios]
        for index in order:
            scenarios[index].check_combine(scenarios[index].combine(buffer, results[index][4]))
        for scenario, result in zip(scenarios, results, strict=True):
            scenario.check_dispatch(result)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2, 1, 0)])
def test_several_dispatches_before_their_combines(pool_of: PoolOf, order: tuple[int, ...]) -> None:
    pool_of(3).run(_two_alive, order)


def _other_rows(rank: int, num_ranks: int) -> None:
    """A handle serves rows of any size and dtype: backward passes send other things than forward passes did."""
    first, other = Case(tokens=(9, 4)), Case(tokens=(9, 4), row_bytes=48, dtype=torch.float32)
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        handle = Scenario(first, rank, num_ranks).dispatch(buffer)[4]
        scenario = Scenario(other, rank, num_ranks)
        scenario.check_cached(buffer.dispatch(scenario.x, handle=handle))


def test_handle_serves_rows_of_another_size(pool_of: PoolOf) -> None:
    pool_of(2).run(_other_rows)


def _across_buffers(rank: int, num_ranks: int) -> None:
    """Megatron builds a larger Buffer while handles of the old one are alive."""
    scenario = Scenario(SCENARIOS[0], rank, num_ranks)
    old = Buffer(dist.group.WORLD, 4096, timeout=TIMEOUT)
    handle = scenario.dispatch(old)[4]
    with Buffer(dist.group.WORLD, 1 << 20, timeout=TIMEOUT) as new:
        scenario.check_combine(scenario.combine(new, handle))
        old.destroy()
        scenario.check_cached(new.dispatch(scenario.x, handle=handle))


def test_handle_outlives_its_buffer(pool_of: PoolOf) -> None:
    pool_of(3).run(_across_buffers)


def _configs(rank: int, num_ranks: int) -> None:
    configs = [None, Config(), Config(24, 8, 256), Config(2, 1, 2, 1, 2), Buffer.get_dispatch_config(num_ranks)]
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        scenario = Scenario(SCENARIOS[0], rank, num_ranks)
        for config in configs:
            result = scenario.dispatch(buffer, config=config)
            scenario.check_dispatch(result)
            for other in configs:
                scenario.check_cached(buffer.dispatch(scenario.x, handle=result[4], config=other))
                scenario.check_combine(scenario.combine(buffer, result[4], config=other))


def test_results_and_handles_do_not_depend_on_the_config(pool_of: PoolOf) -> None:
    pool_of(2).run(_configs)


def _membership_is_the_callers(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        scenario = Scenario(SCENARIOS[0], rank, num_ranks)
        arguments = scenario.layout_arguments(buffer)
        member = arguments["is_token_in_rank"]
        handle = buffer.dispatch(scenario.x, **arguments)[4]
        assert handle is not None
        assert handle.is_token_in_rank is member
        assert handle[0] is handle.rank_prefix_matrix
        received = [int(handle[0][source][rank]) for source in range(num_ranks)]
        assert received[-1] == len(handle.recv_src_idx)
        assert all(element.requires_grad is False for element in handle)


def test_handle_is_a_tuple_with_names(pool_of: PoolOf) -> None:
    pool_of(3).run(_membership_is_the_callers)


def _membership_without_topk(rank: int, num_ranks: int) -> None:
    """Without top-k tensors any membership will do, also one that no top-k choice describes."""
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        everyone = torch.ones(5, num_ranks, dtype=torch.bool)
        x = torch.full((5, 8), rank, dtype=torch.bfloat16)
        recv_x, ids, weights, per_expert, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=torch.full((num_ranks,), 5, dtype=torch.int32),
            is_token_in_rank=everyone,
            num_tokens_per_expert=torch.full((num_ranks,), 5, dtype=torch.int32),
        )
        wanted = torch.arange(num_ranks).repeat_interleave(5)[:, None].expand(-1, 8).bfloat16()
        assert isinstance(recv_x, torch.Tensor)
        assert handle is not None
        assert torch.equal(bits(recv_x), bits(wanted))
        assert (ids, weights, per_expert) == (None, None, [5 * num_ranks])
        combined, _, _ = buffer.combine(recv_x, handle)
        assert torch.equal(combined, x * num_ranks)


def test_membership_may_come_from_anywhere(pool_of: PoolOf) -> None:
    pool_of(3).run(_membership_without_topk)
