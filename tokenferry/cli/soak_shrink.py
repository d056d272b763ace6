"""The end of a soak: ranks are killed, one after the other, and the others go on without them."""

from __future__ import annotations

import gc
import os
import random
import signal

import torch
import torch.distributed as dist

from tokenferry.buffer import Buffer
from tokenferry.cli.ranks import RankError, RankPool
from tokenferry.cli.soak_faults import Bench, expect, expected
from tokenferry.cli.soak_low_latency import burst
from tokenferry.cli.soak_ranks import TIMEOUT, Settings, segments
from tokenferry.cli.soak_world import Chance
from tokenferry.errors import PeerLostError

_MOST_KILLED = 3


def end(pool: RankPool, settings: Settings) -> int:
    """Kill up to three ranks, which leaves at least one.

    Args:
        pool: of the soak; of no use afterwards.
        settings: of the soak.

    Returns:
        How many were killed.

    Raises:
        RankError: another rank failed.
    """
    chance = random.Random(settings.seed + 1)
    victims = chance.sample(range(pool.num_ranks), min(_MOST_KILLED, pool.num_ranks - 1))
    if not victims:
        return 0
    try:
        pool.run(outlive, settings.seed, victims)
    except RankError as error:
        if set(error.failures) != set(victims):
            raise
    return len(victims)


def outlive(rank: int, num_ranks: int, seed: int, victims: list[int]) -> None:
    """Be killed when it is this rank's turn; else notice, shrink, and work on.

    Raises:
        AssertionError: a result is wrong, or an error was not what it should be.
    """
    common, own = Chance(seed), random.Random(seed * 1009 + rank)
    device = torch.device("cpu")
    left = list(range(num_ranks))
    with Buffer(dist.group.WORLD, low_latency_mode=True, timeout=TIMEOUT, device=device, node="one") as buffer:
        for victim in [*victims, None]:
            layout = (0,) * len(left)
            bench = Bench(buffer, buffer.rank, len(left), layout, False, device, common, own)
            for _ in range(common.randrange(1, 4)):
                bench.works(bench.world())
                burst(bench, lambda: None)
            if victim is None:
                break
            if rank == victim:
                os.kill(os.getpid(), signal.SIGKILL)
            with expected(PeerLostError, ranks=[left.index(victim)]):
                bench.dispatch(bench.world())
            survivors = buffer.shrink([left.index(victim)])
            left.remove(victim)
            numbers = left.index(rank), len(left), len(left)
            expect((buffer.rank, buffer.group_size, len(survivors.ranks)) == numbers, f"{survivors}: not {left}")
    gc.collect()
    expect(not segments(), "shared memory is still mapped when ranks were killed")
