"""Where rows lie: in the heap, in memory that peers open, in memory that they cannot, passing through the stage."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from tests.cases import Scenario
from tests.gpu.conftest import take_device
from tests.gpu.test_dispatch_combine import SMALL, WIDE, check_cases
from tokenferry import Buffer
from tokenferry.cli.ranks import RankPool

GpuPoolOf = Callable[[int], RankPool]


def check_heap(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, timeout=20.0, device="cuda", heap_bytes=64 << 20) as buffer:
        plane = buffer.runtime.party().plane
        scenario = Scenario(WIDE, rank, num_ranks, "cuda")
        for name in ("x", "topk_idx", "topk_weights"):
            tensor = getattr(scenario.given, name)
            lying = buffer.empty(*tensor.shape, dtype=tensor.dtype).copy_(tensor)
            assert plane._places(lying)[0] >> 44 == 0
            setattr(scenario.given, name, lying)
        scenario.own_rows = buffer.empty(*scenario.own_rows.shape, dtype=torch.bfloat16).copy_(scenario.own_rows)
        scenario.check_all(buffer)


def test_tensors_in_the_heap(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(2).run(check_heap)


def check_dropped_early(rank: int, num_ranks: int) -> None:
    """A tensor goes while peers, who come late, are still to read it: its next owner writes behind that."""
    room = max(WIDE.tokens) * WIDE.row_bytes
    with Buffer(dist.group.WORLD, timeout=20.0, device="cuda", heap_bytes=room) as buffer:
        scenario = Scenario(WIDE, rank, num_ranks, "cuda")
        handle = scenario.dispatch(buffer)[4]
        given = scenario.given.x
        for turn in range(2 * num_ranks):
            x = buffer.empty(*given.shape, dtype=given.dtype).copy_(given)
            place = x.data_ptr()
            if turn % num_ranks == rank:
                torch.cuda._sleep(100_000_000)
            received, *_, event = buffer.dispatch(x, handle=handle, async_finish=True)
            del x
            other = buffer.empty(*given.shape, dtype=given.dtype).zero_()
            assert other.data_ptr() == place
            del other
            event.current_stream_wait()
            scenario.check_rows(received)


def test_tensors_in_the_heap_that_are_dropped_early(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(2).run(check_dropped_early)


def check_becomes_direct(rank: int, num_ranks: int) -> None:
    """Memory of the allocator is opened by the peers while it is staged; freed, it is closed."""
    with Buffer(dist.group.WORLD, timeout=20.0, device="cuda") as buffer:
        regions = buffer.runtime.party().plane._regions
        scenario = Scenario(replace(WIDE, spare_rows=0), rank, num_ranks, "cuda")
        for _ in range(4):
            scenario.check_all(buffer)
            dist.barrier()
        region, _ = regions.expose(scenario.given.x.data_ptr(), 1)
        assert region > 0
        assert regions.is_ready(region)
        large = torch.ones(96 << 20, dtype=torch.uint8, device="cuda").view(torch.bfloat16)
        for _ in range(3):
            handle = scenario.dispatch(buffer)[4]
            buffer.combine(large[: len(handle[3]) * 512].view(-1, 512), handle)
            dist.barrier()
        gone, _ = regions.expose(large.data_ptr(), 1)
        assert regions.is_ready(gone)
        del large
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        regions.sweep()
        for _ in range(4):
            scenario.check_all(buffer)
            dist.barrier()


def test_memory_becomes_readable_and_is_let_go(gpu_pool_of: GpuPoolOf) -> None:
    gpu_pool_of(2).run(check_becomes_direct)


def use_expandable_segments(rank: int, num_ranks: int) -> None:
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    take_device(rank, num_ranks)


def check_all_staged(rank: int, num_ranks: int) -> None:
    check_cases(rank, num_ranks, [SMALL, WIDE], True, 4 << 20)
    with Buffer(dist.group.WORLD, 4 << 20, timeout=20.0, device="cuda") as buffer:
        plane = buffer.runtime.party().plane
        scenario = Scenario(WIDE, rank, num_ranks, "cuda")
        for _ in range(4):
            scenario.check_all(buffer)
        assert plane._places(scenario.given.x) == [-1]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_memory_that_cannot_be_shared_is_staged_in_rounds(sharing: bool, num_ranks: int) -> None:
    with RankPool(num_ranks, 1) as pool:
        pool.run(use_expandable_segments)
        pool.run(check_all_staged)
