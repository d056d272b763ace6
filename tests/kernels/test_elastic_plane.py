"""ElasticBuffer as on GPUs, down to the kernels: the CUDA data plane's own host code over the simulator.

Each rank is a thread. Where its host would wait for the device, all ranks' launches so far run under the simulator.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.conftest import slow
from tests.elastic_cases import Elastic
from tests.kernels.expert_world import simulate
from tests.kernels.test_expert_major import DIRECT
from tests.kernels.world import LIST_CAPACITY, World
from tokenferry import ElasticBuffer
from tokenferry.dataplane.cuda import CudaDataPlane
from tokenferry.dataplane.cuda.exchange import Rooms
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.dataplane.tensors import allocator_of
from tokenferry.kept import Kept
from tokenferry.modes.inputs import Party
from tokenferry.streams import NoStream

CPU = torch.device("cpu")
BASE: dict[str, Any] = {"row_bytes": 32, "combine_bytes": 32}
CASES = {
    "expanded": (Case(tokens=(7, 6), num_topk=3, local_experts=3, alignment=4, **BASE), True, True),
    "expanded worst": (Case(tokens=(7, 6), num_topk=2, local_experts=3, alignment=4, **BASE), True, False),
    "compact": (Case(tokens=(5, 8), num_topk=2, alignment=3, bias="two", **BASE), False, True),
    "compact worst": (Case(tokens=(0, 8), num_topk=2, **BASE), False, False),
    "fp8": (
        Case(
            tokens=(6, 5), num_topk=2, local_experts=2, row_bytes=16, combine_bytes=16, dtype=torch.float8_e4m3fn,
            scales=torch.float32, scale_columns=3, bias="one",
        ),
        True,
        True,
    ),
}  # fmt: skip


class Plane(CudaDataPlane):
    """The data plane of one rank, its device simulated."""

    def __init__(self, world: World, rank: int, wait_for_device: Any) -> None:
        self._world, self.rank, self.num_ranks = world, rank, world.num_ranks
        self._wait = wait_for_device
        self._device = CPU
        self.empty_strided = allocator_of(CPU)
        self.heap = SimpleNamespace(list_capacity=LIST_CAPACITY, stage=world.stage, stage_bytes=2 * world.half)  # type: ignore[assignment]
        self.status = SimpleNamespace(  # type: ignore[assignment]
            check=self._check, arm=world.counts[rank].data_ptr, unread_address=world.counts[rank].data_ptr(),
            wait_for_counts=self._counts,
        )  # fmt: skip
        self._queue = SimpleNamespace(  # type: ignore[assignment]
            handle=rank, stream=SimpleNamespace(query=None), start=lambda: None, keep=world.kept.append
        )
        self._follower = SimpleNamespace(follow=lambda: None)  # type: ignore[assignment]
        self.rooms = Rooms()
        self._state, self._sums = world.states[rank], world.sums[rank]
        self._context = world.context(rank)
        self._target, self._half = world.target, world.half
        self._stage, self._calls, self._kinds = (world.stage, world.half), Kept(), Kept()
        self._timeout, self._most_programs = 1 << 40, 4

    def _check(self) -> None:
        assert self._world.code(self.rank) == 0

    def _counts(self, num_local: int, _: Any) -> tuple[int, list[int]]:
        self._wait()
        counts, first = self._world.counts[self.rank], words.HOST_EXPERTS.value
        assert counts[words.HOST_CODE.value] == 0
        return int(counts[words.HOST_ROWS.value]), counts[first : first + num_local].tolist()

    def _places(self, *columns: torch.Tensor | None) -> list[int]:
        return [self._place(column) for column in columns]

    def _place(self, tensor: torch.Tensor | None) -> int:
        self._world.kept.append(tensor)
        if tensor is not None and not 0 <= tensor.data_ptr() - self._world.base < 1 << words.PLACE_SHIFT.value:
            return -1  # other memory than that of this process's threads
        return self._world.place(self.rank, tensor)

    def after_pull(self, *args: Any) -> None:
        super().after_pull(*args)
        self._wait()

    def pull_reduce(self, signature: Any, plan: Any, outs: Any) -> None:
        super().pull_reduce(signature, plan, outs)
        if plan.metadata is None:  # else this has been called for the sums
            self._wait()


def elastic_buffer(world: World, rank: int, wait: Any, *, multiple: bool) -> ElasticBuffer:
    buffer = object.__new__(ElasticBuffer)
    plane = Plane(world, rank, wait)
    party = Party(plane, rank, world.num_ranks, CPU)
    runtime = SimpleNamespace(comm=NoStream(), device=CPU, party=lambda sms=0: party._replace(num_sms=sms))
    buffer.runtime, buffer.group_size, buffer.rank = runtime, world.num_ranks, rank  # type: ignore[assignment]
    buffer.num_max_tokens_per_rank, buffer.prefer_overlap_with_compute = 0, True
    buffer.allow_multiple_reduction, buffer._is_paranoid = multiple, False
    return buffer


@pytest.mark.parametrize(
    ("name", "direct"),
    [
        ("expanded", "mixed"),
        *slow(("expanded worst", "direct")),
        ("compact", "staged"),
        *slow(("compact worst", "mixed")),
        *slow(("fp8", "direct")),
    ],
)
def test_public_calls(monkeypatch: Any, name: str, direct: str) -> None:
    case, expand, cpu_sync = CASES[name]
    world = World(monkeypatch, 2, len(name), direct=DIRECT[direct], stage_bytes=1 << 11, max_steps=10**7)
    simulate(monkeypatch, world)
    world.base = torch.empty(1 << 24).data_ptr() & ~(
        (1 << 43) - 1
    )  # threads have their memory where large tensors lie
    for table in world.regions:
        table[0, :, 1] = world.base
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    barrier = threading.Barrier(2, action=world.run)

    def run(rank: int) -> None:
        try:
            buffer = elastic_buffer(world, rank, barrier.wait, multiple=name != "fp8")
            buffer.barrier()
            Elastic(case, rank, 2, expand=expand, cpu_sync=cpu_sync).check_all(buffer)
            buffer.barrier()
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(2) as pool:
        errors = [future.exception() for future in [pool.submit(run, rank) for rank in range(2)]]
    for error in sorted((e for e in errors if e), key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
