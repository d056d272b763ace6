"""What callers do to inputs and outputs: gradients, strides, lifetimes, and writes into memory that is not theirs."""

from __future__ import annotations

import gc
import sys
import weakref
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, Case, Scenario, bits, check_works, same
from tests.conftest import PoolOf
from tokenferry import Buffer

CASE = Case(tokens=(9, 0, 20), num_topk=4, bias="two", combine_dtype=torch.float32)
FP8 = Case(tokens=(9, 4, 20), dtype=torch.float8_e4m3fn, scales=torch.float32, scale_columns=2)


def _tensors(*results: Any) -> list[torch.Tensor]:
    """All tensors in a nest of tuples and lists."""
    found: list[torch.Tensor] = []
    for result in results:
        if isinstance(result, torch.Tensor):
            found.append(result)
        elif isinstance(result, (tuple, list)):
            found.extend(_tensors(*result))
    return found


class Memory(bytearray):
    """Bytes that can be watched: they go with the last tensor over them, under whatever name."""


def _watched_copy(tensor: torch.Tensor, watched: list[weakref.ref[Any]]) -> torch.Tensor:
    if not tensor.numel():
        return tensor
    memory = Memory(bits(tensor).flatten().numpy().tobytes())
    watched.append(weakref.ref(memory))
    return torch.frombuffer(memory, dtype=tensor.dtype).view(tensor.shape)


def _lifetimes(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        gc.collect()
        gc.disable()  # reference counting alone has to free everything
        try:
            for case in (CASE, FP8):
                scenario = Scenario(case, rank, num_ranks)
                watched: list[weakref.ref[Any]] = []
                arguments: dict[str, Any] = {
                    name: None if value is None else _watched_copy(value, watched)
                    for name, value in (scenario.layout_arguments(buffer) | scenario.topk_arguments()).items()
                }
                x: Any = tuple(_watched_copy(part, watched) for part in _tensors(scenario.x))
                rest: list[Any]
                recv_x, *rest = buffer.dispatch(x if case is FP8 else x[0], **arguments)
                rows, weights = (_watched_copy(t[rank], watched) for t in (scenario.rows_of, scenario.weights_of))
                combined_x, combined_weights, _ = buffer.combine(rows, rest[3], weights, scenario.bias)
                assert sys.getrefcount(recv_x) <= 2  # the name, and the argument of this call
                assert sys.getrefcount(combined_x) <= 2
                assert sys.getrefcount(combined_weights) <= 2
                assert sys.getrefcount(rest[0]) <= 2
                assert sys.getrefcount(rest[1]) <= 2
                watched += [weakref.ref(output) for output in _tensors(recv_x, rest, combined_x, combined_weights)]
                assert all(watch() is not None for watch in watched)
                del x, recv_x, rest, rows, weights, combined_x, combined_weights, arguments
                assert [watch() for watch in watched if watch() is not None] == []
        finally:
            gc.enable()


def test_no_reference_to_inputs_or_outputs_is_kept(pool_of: PoolOf) -> None:
    pool_of(3).run(_lifetimes)


def _storage_ranges(tensors: list[torch.Tensor]) -> list[tuple[int, int]]:
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.numel()]
    return sorted((storage.data_ptr(), storage.data_ptr() + storage.nbytes()) for storage in storages)


def _separate(rank: int, num_ranks: int, case: Case) -> None:
    with Buffer(dist.group.WORLD, 1 << 20, timeout=TIMEOUT) as buffer:
        scenario = Scenario(case, rank, num_ranks)
        arguments = scenario.layout_arguments(buffer) | scenario.topk_arguments()
        result: Any = buffer.dispatch(scenario.x, **arguments)
        rows = scenario.rows_of[rank]
        combined = buffer.combine(rows, result[4], scenario.weights_of[rank], scenario.bias)
        stage = buffer.get_local_buffer_tensor(torch.uint8)
        fresh = _tensors(result[:3], combined, [e for e in result[4] if e is not arguments["is_token_in_rank"]])
        given = _tensors(scenario.x, list(arguments.values()), rows, scenario.weights_of[rank], scenario.bias)
        ranges = _storage_ranges(fresh)
        assert len(set(ranges)) == len(ranges), "two outputs share their memory"
        for start, end in ranges:
            for other, other_end in _storage_ranges([*given, stage]):
                assert end <= other or other_end <= start, "an output lies in an input or in the stage"
        for output in fresh:
            if output.is_floating_point():
                output.requires_grad_()
                assert output.is_leaf


@pytest.mark.parametrize("num_ranks", [1, 3])
@pytest.mark.parametrize("case", [CASE, FP8])
def test_outputs_are_fresh_memory(pool_of: PoolOf, num_ranks: int, case: Case) -> None:
    pool_of(num_ranks).run(_separate, case)


def _poisoned_stage(rank: int, num_ranks: int, case: Case, num_nvl_bytes: int) -> None:
    with Buffer(dist.group.WORLD, num_nvl_bytes, timeout=TIMEOUT) as buffer:

        def poison() -> None:
            dist.barrier()  # no rank is in an operation: the stage is the caller's
            buffer.get_local_buffer_tensor(torch.int8).fill_(-1)
            dist.barrier()

        scenario = Scenario(case, rank, num_ranks)
        poison()
        result = scenario.dispatch(buffer)
        poison()
        scenario.check_dispatch(result)
        combined = scenario.combine(buffer, result[4])
        poison()
        scenario.check_combine(combined)
        cached = buffer.dispatch(scenario.x, handle=result[4])
        poison()
        scenario.check_cached(cached)
        scenario.check_combine(combined)
        buffer.get_local_buffer_tensor(dtype=torch.int8).zero_()
        dist.barrier()
        scenario.check_dispatch(scenario.dispatch(buffer))


@pytest.mark.parametrize("case", [CASE, FP8])
@pytest.mark.parametrize("num_nvl_bytes", [128, 1 << 20])
def test_writes_into_the_stage_between_calls_do_no_harm(pool_of: PoolOf, case: Case, num_nvl_bytes: int) -> None:
    pool_of(3).run(_poisoned_stage, case, num_nvl_bytes)


def _local_buffer_tensor(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, 4096, timeout=TIMEOUT) as buffer:
        whole = buffer.get_local_buffer_tensor(torch.uint8)
        assert whole.shape == (4096,)
        part = buffer.get_local_buffer_tensor(torch.float32, torch.Size([3, 5]), 64)
        assert part.shape == (3, 5)
        assert part.data_ptr() == whole.data_ptr() + 64
        whole.zero_()
        part.fill_(1.0)
        assert whole[:64].eq(0).all()
        assert whole[64 : 64 + 60].view(torch.float32).eq(1.0).all()
        assert whole[64 + 60 :].eq(0).all()
        assert buffer.get_local_buffer_tensor(torch.int64, offset=4088).shape == (1,)
        assert buffer.get_local_buffer_tensor(torch.int64, offset=4096).shape == (0,)
        dist.barrier()
        check_works(buffer)
        dist.barrier()
        buffer.destroy()
        whole.fill_(3)  # a tensor that outlives its Buffer still is memory
        assert whole.sum() == 3 * 4096


def test_local_buffer_tensor(pool_of: PoolOf) -> None:
    pool_of(2).run(_local_buffer_tensor)


def _gradients(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        scenario = Scenario(CASE, rank, num_ranks)
        arguments = scenario.layout_arguments(buffer) | scenario.topk_arguments()
        arguments["topk_weights"] = arguments["topk_weights"].clone().requires_grad_()
        result: Any = buffer.dispatch(scenario.given.x.clone().requires_grad_(), **arguments)
        scenario.check_dispatch(result)
        rows, weights = scenario.rows_of[rank].clone(), scenario.weights_of[rank].clone()
        biases: Any = tuple(bias.clone().requires_grad_() for bias in scenario.biases)
        combined = buffer.combine(rows.requires_grad_(), result[4], weights.requires_grad_(), biases)
        scenario.check_combine(combined)
        cached = buffer.dispatch(scenario.given.x.clone().requires_grad_(), handle=result[4])
        scenario.check_cached(cached)
        assert not any(output.requires_grad for output in _tensors(result, combined, cached))
        with torch.inference_mode():
            inference = scenario.dispatch(buffer)
            scenario.check_dispatch(inference)
        scenario.check_combine(scenario.combine(buffer, inference[4]))


def test_inputs_that_require_gradients(pool_of: PoolOf) -> None:
    pool_of(3).run(_gradients)


def _strided_inputs(rank: int, num_ranks: int, tokens: tuple[int, ...], num_topk: int) -> None:
    """What ``out.sum().backward()`` hands over, and other strides, in everything that may have them."""
    case = Case(tokens=tokens, num_topk=num_topk, combine_dtype=torch.float32)
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        scenario = Scenario(case, rank, num_ranks)
        handle = scenario.dispatch(buffer)[4]
        num_rows, num_tokens = scenario.num_rows[rank], scenario.given.x.size(0)
        one = torch.ones(())
        ones = one.expand(num_rows, 8), one.expand(num_rows, num_topk), one.expand(num_tokens, 8)
        combined, weights, _ = buffer.combine(ones[0], handle, ones[1], ones[2])
        packed = [t.clone(memory_format=torch.contiguous_format) for t in ones]
        wanted, wanted_weights, _ = buffer.combine(packed[0], handle, packed[1], packed[2])
        copies = handle.is_token_in_rank.sum(1, keepdim=True)
        same(wanted, (copies + 1.0).expand(-1, 8), "combined_x")
        same(combined, wanted, "combined_x")
        assert wanted_weights is not None
        same(weights, wanted_weights, "combined_topk_weights")
        columns = [t.t().contiguous().t() for t in (scenario.rows_of[rank], scenario.weights_of[rank])]
        scenario.check_combine(buffer.combine(columns[0], handle, columns[1]))
        recv_x = buffer.dispatch(torch.ones(()).expand(num_tokens, 4), handle=handle)[0]
        same(recv_x, torch.ones(num_rows, 4), "recv_x")
        arguments = scenario.layout_arguments(buffer) | scenario.topk_arguments()
        arguments["topk_weights"] = arguments["topk_weights"].t().contiguous().t()
        scenario.check_dispatch(buffer.dispatch(scenario.x, **arguments))


@pytest.mark.parametrize("tokens", [(5, 8), (1, 1), (0, 1), (0, 0)])
@pytest.mark.parametrize("num_topk", [1, 4])
def test_strides_of_everything(pool_of: PoolOf, tokens: tuple[int, ...], num_topk: int) -> None:
    pool_of(2).run(_strided_inputs, tokens, num_topk)


def _inputs_unchanged(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        scenario = Scenario(CASE, rank, num_ranks)
        arguments = scenario.layout_arguments(buffer) | scenario.topk_arguments()
        given = _tensors(scenario.x, list(arguments.values()), scenario.biases)
        given += [scenario.rows_of[rank], scenario.weights_of[rank]]
        before, versions = [t.clone() for t in given], [t._version for t in given]
        result: Any = buffer.dispatch(scenario.x, **arguments)
        scenario.check_combine(buffer.combine(given[-2], result[4], given[-1], scenario.bias))
        scenario.given.x.view(torch.uint8).zero_()  # the caller may write at once
        result[0].zero_()
        dist.barrier()
        assert [t._version for t in given[1:]] == versions[1:]
        for old, new in zip(before[1:], given[1:], strict=True):
            same(new, old, "an input")


def test_inputs_are_not_written(pool_of: PoolOf) -> None:
    pool_of(3).run(_inputs_unchanged)


def _overwritten_at_once(rank: int, num_ranks: int) -> None:
    """The caller overwrites its input the moment the call returns, while slower peers still read."""
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        for seed in range(10):
            scenario = Scenario(Case(tokens=(40, 3, 25), routing="all", row_bytes=4096, seed=seed), rank, num_ranks)
            x, rows = scenario.given.x.clone(), scenario.rows_of[rank].clone()
            arguments = scenario.layout_arguments(buffer)
            result: Any = buffer.dispatch(x, **arguments, **scenario.topk_arguments())
            x.zero_()
            combined = buffer.combine(rows, result[4])
            rows.zero_()
            scenario.check_dispatch(result)
            scenario.check_combine(combined, weights=False)


def test_inputs_may_be_overwritten_when_a_call_returns(pool_of: PoolOf) -> None:
    pool_of(3).run(_overwritten_at_once)
