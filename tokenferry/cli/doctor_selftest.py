"""The self-test of ``tokenferry doctor``: ranks dispatch, combine and compare with plain PyTorch for some seconds."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
import torch.distributed as dist

from tokenferry.buffer import Buffer
from tokenferry.cli.doctor_checks import Finding, Level
from tokenferry.cli.ranks import RankError, RankPool
from tokenferry.cli.soak_faults import Bench
from tokenferry.cli.soak_low_latency import MOST_EXPERTS, MOST_HIDDEN, MOST_TOKENS, Flight
from tokenferry.cli.soak_world import Chance, Shape, World, rows, same

_TIMEOUT = 100.0
"""On GPUs the first operations compile."""
_TOKENS, _HIDDEN, _TOPK, _EXPERTS = 64, 256, 4, 4


class Outcome(NamedTuple):
    """What one rank saw."""

    rounds: int
    """Dispatches, combines and low-latency pairs, each."""
    pair_seconds: float
    """The fastest dispatch and combine, but for the first ones."""


def self_test(device: str, num_ranks: int, seconds: float) -> Finding:
    """Start ranks and let them work; what came of it."""
    area, kind = "self-test", f"{num_ranks} ranks on {'GPUs' if device == 'cuda' else 'this CPU'}"
    try:
        with RankPool(num_ranks, num_threads=1) as pool:
            outcomes: list[Outcome] = pool.run(_work, device, seconds)
    except RankError as error:
        reasons = {text.strip().splitlines()[-1] for text in error.failures.values()}
        remedy = "look at the other findings first; TOKENFERRY_DEBUG=1 shows the operations before"
        return Finding(area, Level.BROKEN, f"{kind}: {'; '.join(sorted(reasons))}", remedy)
    fastest = max(outcome.pair_seconds for outcome in outcomes)
    what = f"{kind}: {outcomes[0].rounds} times dispatch, combine and the low-latency pair, all results right; "
    return Finding(area, Level.FINE, what + f"the fastest dispatch + combine took {fastest * 1e3:.2f} ms")


def _work(rank: int, num_ranks: int, device_type: str, seconds: float) -> Outcome:
    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    hint = Buffer.get_low_latency_rdma_size_hint(MOST_TOKENS, MOST_HIDDEN, num_ranks, MOST_EXPERTS * num_ranks)
    chance = Chance(0)
    layout = (0,) * num_ranks
    fastest = float("inf")
    count, ends = 0, float("inf")
    with Buffer(dist.group.WORLD, 0, hint, True, timeout=_TIMEOUT, device=device, node="one") as buffer:
        bench = Bench(buffer, rank, num_ranks, layout, False, device, chance, chance)
        going = torch.ones(1)
        while going.item():
            shape = Shape((_TOKENS,) * num_ranks, torch.bfloat16, 2 * _HIDDEN, 0, _TOPK, _EXPERTS, 0.1, count)
            world = World(shape, rank)
            dist.barrier()
            began = time.perf_counter()
            result = bench.dispatch(world)
            combined, _, _ = buffer.combine(result[0], result[4])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if count:
                fastest = min(fastest, time.perf_counter() - began)
            world.check_received(result, 1, 0)
            # Rows go back as they came: each is summed over the ranks that had it; without one the sum is 0, not -0.
            copies = world.members[rank].sum(1, keepdim=True)
            same("combined_x", combined, (world.mine.x.float() * copies + 0.0).bfloat16())
            values = [rows(torch.float32, _TOKENS, 512, torch.Generator().manual_seed(count)) for _ in layout]
            summed, _, _ = buffer.combine(world.expert_rows(values).to(device), result[4])
            same("combined_x", summed, world.combined(values[rank], [], list(layout), False))
            flight = Flight(bench)
            flight.dispatch(False)
            flight.check_dispatch()
            flight.combine(False)
            flight.check_combine()
            count += 1
            if count == 1:  # in which kernels were compiled, on GPUs
                ends = time.monotonic() + seconds
            going = torch.tensor([float(count < 2 or time.monotonic() < ends)])
            dist.broadcast(going, 0)
    return Outcome(count, fastest)
