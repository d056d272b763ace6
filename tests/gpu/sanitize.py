"""Small cases for NVIDIA's compute-sanitizer, every call against the oracle; between them they run every kernel.

From the root of the repository, without torch's caching of memory, which would hide accesses past a tensor's end:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --report-api-errors no --error-exitcode 1 python3 -m tests.gpu.sanitize high-throughput
    compute-sanitizer --tool racecheck --error-exitcode 1 python3 -m tests.gpu.sanitize low-latency
    compute-sanitizer --target-processes all --tool racecheck --error-exitcode 1 python3 -m tests.gpu.sanitize nodes

Torch asks CUDA for memory that it may not have, which memcheck would count.

One process with one rank on GPU 0 pulls all rows from itself, and pushes all to itself: nothing passes through the
stage. ``nodes``, ``rail`` and ``stage`` have two ranks in processes of their own, each with a GPU, or both with time
slices of one, without MPS. The last line but one names the kernels that were launched.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import torch.distributed as dist

from tests.cases import Case
from tests.gpu import test_elastic, test_internode, test_rail
from tests.gpu.conftest import take_node
from tests.gpu.test_dispatch_combine import FAMILIES, SMALL, check_cases
from tests.gpu.test_internode_low_latency import CASES as NODE_CASES
from tests.gpu.test_low_latency import ODD, check_shapes
from tests.gpu.test_low_latency import SMALL as LOW_LATENCY
from tests.internode_cases import NodeScenario, make_buffer, small_chunks
from tests.internode_low_latency_cases import NodeScenario as LowLatencyNodeScenario
from tests.internode_low_latency_cases import make_buffer as make_low_latency_buffer
from tests.low_latency_cases import check_case
from tests.test_ops import CASES as OPERATOR_CASES
from tests.test_ops import check_cases as check_operators
from tokenferry.cli.ranks import RankPool
from tokenferry.dataplane.cuda import expert_major_programs, low_latency_programs, parts_programs, programs
from tokenferry.dataplane.cuda.launch import Kernel
from tokenferry.rail import CARRIER_VARIABLE, NVSHMEM, carriers_of

TIMEOUT = 600.0
"""Seconds that a kernel waits: under the sanitizer it is slow."""
PROGRAMS = (programs, parts_programs, expert_major_programs, low_latency_programs)
_KERNELS = "tokenferry.dataplane.cuda.kernels."


def whole(cases: Iterable[Case]) -> list[Case]:
    """The same with four times as many tokens, at most 396, of a multiple of four choices: all columns fill 16 bytes.

    Bulk copies read small columns in those, also where a tensor ends before. So does all memory that CUDA hands out,
    but memcheck counts what was asked for. Weights of a combine are those of the rows that came, as many as may be.
    """
    return [_whole(case) for case in cases]


def _whole(case: Case) -> Case:
    tokens, num_topk = tuple(4 * min(count, 99) for count in case.tokens), -(-case.num_topk // 4) * 4
    return replace(case, tokens=tokens, num_topk=num_topk, local_experts=max(case.local_experts, num_topk))


def high_throughput(rank: int, num_ranks: int) -> None:
    for cases in (FAMILIES["small"][:3], FAMILIES["scaled"]):
        for bulk in (True, False):
            check_cases(rank, num_ranks, whole(cases), bulk, timeout=TIMEOUT)


def low_latency(rank: int, num_ranks: int) -> None:
    for exact in (False, True):
        check_shapes(rank, num_ranks, [*LOW_LATENCY[::7], ODD[1]], {"exact_combine": exact, "timeout": TIMEOUT})


def expert_major(rank: int, num_ranks: int) -> None:
    for bulk in (True, False):
        for cases in (test_elastic.FAMILIES["small"][:2], test_elastic.FAMILIES["scaled"]):
            test_elastic.check_cases(rank, num_ranks, whole(cases), bulk, multiple=bulk, num_gpu_timeout_secs=TIMEOUT)


def stage(rank: int, num_ranks: int) -> None:
    """Every tensor is new memory here, which peers have not opened yet."""
    for bulk in (True, False):
        check_cases(rank, num_ranks, whole([SMALL]), bulk, 1 << 20, TIMEOUT)


def nodes(rank: int, num_ranks: int) -> None:
    for bulk in (True, False):
        with make_buffer(rank, "2x1", device="cuda", timeout=TIMEOUT) as buffer:
            plane = buffer.runtime.party().plane  # type: ignore[union-attr]
            plane._target = plane._target._replace(can_bulk=plane._target.can_bulk and bulk)
            for case in whole([test_internode.CASE, test_internode.SCALED]):
                NodeScenario(case, rank, "2x1", device="cuda").check_all(buffer, config=small_chunks(32))
    check_operators(rank, num_ranks, "cuda", TIMEOUT, whole(OPERATOR_CASES)[::3], "2x1")
    options: dict[str, Any] = {"device": "cuda", "num_rdma_bytes": 32 << 20, "timeout": TIMEOUT}
    with make_low_latency_buffer(rank, "2x1", **options) as buffer:
        for name in ("bf16", "ue8m0"):
            check_case(buffer, LowLatencyNodeScenario(NODE_CASES[name], rank, "2x1", device="cuda"))


def operators(rank: int, num_ranks: int) -> None:
    check_operators(rank, num_ranks, "cuda", TIMEOUT, whole(OPERATOR_CASES))


def rail(rank: int, num_ranks: int) -> None:
    """Through NVSHMEM, where it is."""
    if NVSHMEM not in carriers_of("cuda"):
        print("rail: there is no NVSHMEM here", flush=True)
    else:
        with mock.patch.dict(os.environ, {CARRIER_VARIABLE: NVSHMEM}):
            test_rail.exchanges(rank, num_ranks, "sanitized", 12, (1, 100, 4096, 65_537, 1 << 20), TIMEOUT)


CHECKS: dict[str, tuple[int, Callable[[int, int], None]]] = {
    "high-throughput": (1, high_throughput),
    "low-latency": (1, low_latency),
    "expert-major": (1, expert_major),
    "operators": (1, operators),
    "stage": (2, stage),
    "nodes": (2, nodes),
    "rail": (2, rail),
}
"""Ranks, and what they do."""


def kernels_of(module: ModuleType) -> Iterator[Kernel]:
    for value in vars(module).values():
        for kernel in value.values() if isinstance(value, dict) else (value,):
            if isinstance(kernel, Kernel):
                yield kernel


def name_of(kernel: Kernel) -> str:
    """The kernel's file and function."""
    function = kernel._kernel.fn
    return f"{function.__module__.removeprefix(_KERNELS)}.{function.__name__}"


def all_kernels() -> set[str]:
    return {name_of(kernel) for module in PROGRAMS for kernel in kernels_of(module)} | {"rail.exchange"}


@contextmanager
def launched() -> Iterator[set[str]]:
    """The names of the kernels that are made ready, which is when they are about to be launched first."""
    names: set[str] = set()
    make = Kernel.variant

    def noting(self: Kernel, num_warps: int, **constants: object) -> Any:
        names.add(name_of(self))
        return make(self, num_warps, **constants)

    with mock.patch.object(Kernel, "variant", noting):
        yield names


def run(rank: int, num_ranks: int, names: list[str]) -> set[str]:
    """Run checks on a rank; returns the kernels."""
    take_node(rank, num_ranks, num_ranks)
    with launched() as kernels:
        for name in names:
            CHECKS[name][1](rank, num_ranks)
            print(f"{name}: done on rank {rank}", flush=True)
    return kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checks", nargs="*", help=f"some of {', '.join(CHECKS)}; by default those of one rank")
    chosen = parser.parse_args().checks or [name for name, (ranks, _) in CHECKS.items() if ranks == 1]
    unknown = [name for name in chosen if name not in CHECKS]
    if unknown:
        parser.error(f"{', '.join(unknown)}; allowed: {', '.join(CHECKS)}")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    kernels: set[str] = set()
    alone = [name for name in chosen if CHECKS[name][0] == 1]
    if alone:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        kernels |= run(0, 1, alone)
        dist.destroy_process_group()
    together = [name for name in chosen if CHECKS[name][0] == 2]
    if together:
        os.environ.setdefault("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
        with RankPool(2, 1) as pool:
            kernels |= set().union(*pool.run(run, together))
    known = all_kernels()
    print(f"kernels, of {len(known)}: {' '.join(sorted(kernels & known))}")
    print("done", flush=True)


if __name__ == "__main__":
    main()
