"""A few small cases for NVIDIA's compute-sanitizer: one process, one rank, GPU 0, every call against the oracle.

From the root of the repository, without torch's caching of memory, which would hide accesses past a tensor's end:

    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m tests.gpu.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python3 -m tests.gpu.sanitize high-throughput

A single rank pulls all rows from itself, and pushes all to itself: nothing passes through the stage.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
import torch.distributed as dist

from tests.gpu.test_dispatch_combine import FAMILIES, check_cases
from tests.gpu.test_low_latency import ODD, SMALL, check_shapes

TIMEOUT = 600.0
"""Seconds that a kernel waits: under the sanitizer it is slow."""


def high_throughput() -> None:
    for name, cases in (("small", FAMILIES["small"][:3]), ("scaled", FAMILIES["scaled"])):
        for bulk in (True, False):
            check_cases(0, 1, cases, bulk, timeout=TIMEOUT)
            print(f"high-throughput: {name}, {'bulk' if bulk else 'plain'} kernels: done", flush=True)


def low_latency() -> None:
    for exact in (False, True):
        check_shapes(0, 1, [*SMALL[::7], ODD[1]], {"exact_combine": exact, "timeout": TIMEOUT})
        print(f"low-latency, {'every row' if exact else 'sums'} sent: done", flush=True)


CHECKS: dict[str, Callable[[], None]] = {"high-throughput": high_throughput, "low-latency": low_latency}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("mode", nargs="?", default="all", choices=[*CHECKS, "all"])
    mode = parser.parse_args().mode
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.cuda.set_device(0)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for name, check in CHECKS.items():
        if mode in (name, "all"):
            check()
    dist.destroy_process_group()
    print("done", flush=True)


if __name__ == "__main__":
    main()
