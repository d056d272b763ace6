"""The layer inside what shards and replicates models: DDP and FSDP."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import PoolOf
from tests.operators import draw
from tokenferry import Buffer
from tokenferry.nn import ExpertParallelMoE

Wrap = Callable[[nn.Sequential, list[nn.Parameter]], nn.Module]


def in_ddp(model: nn.Sequential, experts: list[nn.Parameter]) -> nn.Module:
    local = [name for name, parameter in model.named_parameters() if any(parameter is one for one in experts)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, local)
    return DistributedDataParallel(model)


def in_fsdp(model: nn.Sequential, experts: list[nn.Parameter]) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in model:
        fully_shard(module, mesh=mesh, ignored_params=set(experts))
    return fully_shard(model, mesh=mesh, ignored_params=set(experts))


def make_model(buffer: Buffer, seed: int) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(8, 8), ExpertParallelMoE(buffer, 8, 8, 4, 2, seed=seed), nn.Linear(8, 8))


def check(rank: int, num_ranks: int, wrap: Wrap) -> None:
    """Two steps with and without the wrapper: the same parameters, of experts and of what all ranks have."""
    with Buffer(dist.group.WORLD) as buffer:
        plain, model = make_model(buffer, 1), make_model(buffer, 1)
        experts = model[1].expert_parameters()
        wrapped = wrap(model, experts)
        for step in range(2):
            x = draw(rank + 2 * step, 5 - 3 * rank)[0]
            plain.zero_grad()
            plain(x).square().sum().backward()
            shared = [p for p in plain.parameters() if all(p is not e for e in plain[1].expert_parameters())]
            for parameter in shared:
                dist.all_reduce(parameter.grad)
                parameter.grad /= num_ranks
            wrapped.zero_grad()
            wrapped(x).square().sum().backward()
            for one in (plain, model):
                torch.optim.SGD(one.parameters(), lr=0.1).step()
            pairs = zip(plain.named_parameters(), model.named_parameters(), strict=True)
            for (name, want), (_, have) in pairs:
                whole = have.full_tensor() if isinstance(have, DTensor) else have
                assert isinstance(have, DTensor) == (wrap is in_fsdp and all(have is not e for e in experts)), name
                torch.testing.assert_close(whole, want, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("wrap", [in_ddp, in_fsdp])
def test_training_steps(pool_of: PoolOf, wrap: Wrap) -> None:
    pool_of(2).run(check, wrap)
