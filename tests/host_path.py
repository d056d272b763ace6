"""What a call on a GPU rank costs its host, without a GPU: ``python -m tests.host_path``.

The real code runs from the method to the launch, over a GPU that is played (:mod:`tests.played_gpu`), as rank
0 of eight. Counts are exact. Times are those of the Python code on this machine: launches, events, allocations of
device memory and the calls of the driver cost next to nothing here. ``python -m tests.host_path NAME`` lists the
Python functions that run in one of the calls.

``python -m tests.host_path --gpu`` times the same calls on a real GPU, on which this process is the only rank: host
time of a call, and how much of it the launches, the allocations, the events and the driver take.
"""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tests import played_gpu
from tokenferry import Buffer, ElasticBuffer, ops
from tokenferry.buffer import Handle
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.dataplane.cuda.launch import Variant
from tokenferry.memory.driver import Driver

RANKS, EXPERTS, TOKENS, TOPK, HIDDEN, MOST, ROWS, ALIGNMENT = 8, 64, 16, 8, 512, 16, 96, 4


class Cost(NamedTuple):
    """What one call costs."""

    microseconds: float
    python: int
    """Calls of Python functions, in whatever module."""
    c: int
    """Calls of functions and methods that are written in C."""
    operators: int
    """Operators of torch, and allocations: below the dispatcher too. Views that are made below it are not counted."""
    allocations: int
    events: int
    """Recorded or waited for."""
    identities: int
    """Questions to the driver which allocation an address lies in."""
    captures: int
    """Looks whether a graph is captured."""
    launches: int


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func).removeprefix("aten.")] += 1
        return func(*args, **kwargs or {})


class Rank:
    """Rank 0, with everything that good calls need."""

    def __init__(self, buffer: Buffer, gpu: played_gpu.Gpu | None, large: torch.Tensor, small: torch.Tensor) -> None:
        self.buffer, self._gpu = buffer, gpu
        local, slab = EXPERTS // buffer.group_size, buffer.group_size * MOST
        rows = large.view(torch.bfloat16)
        self.x = rows[: TOKENS * HIDDEN].view(TOKENS, HIDDEN)
        self.y = rows[1 << 16 :][: ROWS * HIDDEN].view(ROWS, HIDDEN)
        self.slabs = rows[1 << 20 :][: local * slab * HIDDEN].view(local, slab, HIDDEN)
        self.ids = small[: 8 * TOKENS * TOPK].view(torch.int64).view(TOKENS, TOPK)
        self.weights = small[1 << 16 :][: 4 * TOKENS * TOPK].view(torch.float32).view(TOKENS, TOPK)
        self.recv_weights = small[1 << 17 :][: 4 * ROWS * TOPK].view(torch.float32).view(ROWS, TOPK)
        if gpu is None:  # one that is played looks at no ids
            self.ids.copy_(torch.arange(TOKENS * TOPK).view(TOKENS, TOPK) % EXPERTS)
        self.layout = buffer.get_dispatch_layout(self.ids, EXPERTS)
        self.handle = self.dispatch()[4]
        assert self.handle is not None
        self.low_latency_handle = self.low_latency_dispatch()[2]
        self.elastic, self.num_coming = elastic_buffer(buffer), ROWS
        if gpu is not None:
            self.told: dict[int, Any] = {}
            self.counts = buffer.runtime.party().plane.status.counts.numpy()  # type: ignore[union-attr]
            gpu.done["notify"] = self.tell_counts
        self.copies = rows[1 << 18 :][: ALIGNMENT * local * HIDDEN].view(ALIGNMENT * local, HIDDEN)
        self.elastic_handle = self.elastic_dispatch()[3]
        self.name = ops.register(buffer)
        self.tensors = list(self.handle)
        for call in CALLS.values():  # memory that is new becomes known to all
            for _ in range(3):
                call(self)
                if gpu is not None:
                    buffer.follow()  # type: ignore[attr-defined]

    @property
    def gpu(self) -> played_gpu.Gpu:
        """The GPU that is played."""
        assert self._gpu is not None
        return self._gpu

    def drain(self) -> None:
        """Wait for a real GPU: a full queue would hold the host up."""
        if self._gpu is None:
            torch.cuda.synchronize()

    def tell_counts(self) -> None:
        """What ``notify`` leaves for a host that waits: rows as in the other calls, of all local experts alike."""
        told = self.told.get(self.num_coming)
        if told is None:
            first, local = words.HOST_EXPERTS.value, EXPERTS // RANKS
            told = self.told[self.num_coming] = self.counts[: first + local].copy()
            told[words.HOST_DONE.value], told[words.HOST_CODE.value] = 1, 0
            told[words.HOST_ROWS.value], told[first:] = self.num_coming, self.num_coming // local
        self.counts[: len(told)] = told

    def get_dispatch_layout(self) -> Any:
        return self.buffer.get_dispatch_layout(self.ids, EXPERTS)

    def layout_and_dispatch(self) -> Any:
        return self.dispatch(self.get_dispatch_layout())

    def dispatch(
        self, layout: Any = None, num_worst_tokens: int = ROWS
    ) -> tuple[Any, Any, Any, Any, Handle | None, Any]:
        per_rank, _, per_expert, member, _ = layout or self.layout
        return self.buffer.dispatch(
            self.x,
            num_tokens_per_rank=per_rank,
            is_token_in_rank=member,
            num_tokens_per_expert=per_expert,
            topk_idx=self.ids,
            topk_weights=self.weights,
            num_worst_tokens=num_worst_tokens,
        )

    def cached_dispatch(self) -> Any:
        return self.buffer.dispatch(self.x, self.handle)

    def combine(self, weights: torch.Tensor | None = None, **events: Any) -> Any:
        return self.buffer.combine(self.y, self.handle, weights, **events)

    def elastic_dispatch(self, **how: Any) -> Any:
        arguments = {"num_experts": EXPERTS, "expert_alignment": ALIGNMENT, "do_expand": True, **how}
        return self.elastic.dispatch(self.x, self.ids, self.weights, **arguments)

    def elastic_cached_dispatch(self) -> Any:
        return self.elastic.dispatch(self.x, handle=self.elastic_handle)

    def elastic_combine(self) -> Any:
        return self.elastic.combine(self.copies, self.elastic_handle)

    def low_latency_dispatch(self, **how: Any) -> Any:
        return self.buffer.low_latency_dispatch(self.x, self.ids, MOST, EXPERTS, **how)

    def low_latency_combine(self, **how: Any) -> Any:
        return self.buffer.low_latency_combine(self.slabs, self.ids, self.weights, self.low_latency_handle, **how)

    def low_latency_dispatch_with_hook(self) -> None:
        self.low_latency_dispatch(return_recv_hook=True)[-1]()

    def low_latency_combine_with_hook(self) -> None:
        self.low_latency_combine(return_recv_hook=True)[-1]()

    def ops_dispatch(self) -> Any:
        return ops.dispatch(self.x, self.ids, self.weights, self.name, EXPERTS, ROWS)

    def ops_cached_dispatch(self) -> Any:
        return ops.cached_dispatch(self.x, self.tensors, self.name)

    def ops_combine(self) -> Any:
        return ops.combine(self.y, self.tensors, self.name)

    def ops_low_latency_dispatch(self) -> Any:
        return ops.low_latency_dispatch(self.x, self.ids, self.name, MOST, EXPERTS)

    def ops_low_latency_combine(self) -> Any:
        handle = list(self.low_latency_handle[:2])
        return ops.low_latency_combine(self.slabs, self.ids, self.weights, handle, self.name, MOST, EXPERTS)


CALLS: dict[str, Callable[[Rank], object]] = {
    "get_dispatch_layout": Rank.get_dispatch_layout,
    "dispatch": lambda rank: rank.dispatch(num_worst_tokens=0),
    "dispatch, num_worst_tokens": Rank.dispatch,
    "layout and dispatch": Rank.layout_and_dispatch,
    "cached dispatch": Rank.cached_dispatch,
    "combine": Rank.combine,
    "combine, weights": lambda rank: rank.combine(rank.recv_weights),
    "combine, async_finish": lambda rank: rank.combine(async_finish=True),
    "elastic, expert-major": Rank.elastic_dispatch,
    "elastic, compact": lambda rank: rank.elastic_dispatch(do_expand=False),
    "elastic, cached": Rank.elastic_cached_dispatch,
    "elastic combine": Rank.elastic_combine,
    "low_latency_dispatch": Rank.low_latency_dispatch,
    "low_latency_combine": Rank.low_latency_combine,
    "low_latency_dispatch, hook": Rank.low_latency_dispatch_with_hook,
    "low_latency_combine, hook": Rank.low_latency_combine_with_hook,
    "ops.dispatch": Rank.ops_dispatch,
    "ops.cached_dispatch": Rank.ops_cached_dispatch,
    "ops.combine": Rank.ops_combine,
    "ops.low_latency_dispatch": Rank.ops_low_latency_dispatch,
    "ops.low_latency_combine": Rank.ops_low_latency_combine,
}


def elastic_buffer(buffer: Buffer) -> ElasticBuffer:
    """An ElasticBuffer over the runtime of a Buffer."""
    elastic = object.__new__(ElasticBuffer)
    elastic.runtime, elastic.rank, elastic.group_size = buffer.runtime, buffer.rank, buffer.group_size
    elastic.num_max_tokens_per_rank, elastic.prefer_overlap_with_compute = MOST, True
    elastic.allow_multiple_reduction, elastic._is_paranoid = True, False
    return elastic


@contextmanager
def rank_on_a_gpu() -> Iterator[Rank]:
    """Rank 0 of eight on a played GPU."""
    large, small = torch.zeros(1 << 24, dtype=torch.uint8), torch.zeros(1 << 21, dtype=torch.uint8)
    with (
        played_gpu.played([large, small]) as gpu,
        played_gpu.buffer_of_rank_0(gpu, RANKS, 1 << 22) as buffer,
    ):
        yield Rank(buffer, gpu, large, small)


def _microseconds(call: Callable[[Rank], object], rank: Rank, rounds: int) -> float:
    best = float("inf")
    for _ in range(rounds):
        rank.drain()
        began = time.perf_counter()
        for _ in range(10):
            call(rank)
        best = min(best, time.perf_counter() - began)
    return best / 10 * 1e6


@contextmanager
def rank_on_this_gpu() -> Iterator[Rank]:
    """The only rank, on a real GPU."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Buffer(dist.group.WORLD, 0, 1 << 26, low_latency_mode=True, device="cuda") as buffer:
            large, small = (torch.zeros(size, dtype=torch.uint8, device="cuda") for size in (1 << 24, 1 << 21))
            yield Rank(buffer, None, large, small)
    finally:
        dist.destroy_process_group()


def breakdown(rank: Rank, name: str, rounds: int) -> dict[str, float]:
    """Microseconds of host time in a call, and of these: the parts below Python. With what it costs to time them."""
    runtime: Any = rank.buffer.runtime
    comm, plane = runtime.comm, runtime.party().plane
    parts: dict[str, list[tuple[Any, str]]] = {
        "launches": [(Variant, "launch")],
        "allocations": [(torch, "empty"), (torch.Tensor, "new_empty_strided"), (plane, "empty_strided")],
        "events": [(comm, f"_{verb}_{place}") for verb in ("record", "wait_for") for place in ("entry", "exit")],
        "driver": [(Driver, "identity")],
    }
    spent: Counter[str] = Counter()

    def timed(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return function(*args, **kwargs)
            finally:
                spent[part] += time.perf_counter_ns() - began

        return call

    best = {"whole": float("inf")}
    with pytest.MonkeyPatch.context() as patch:
        for part, places in parts.items():
            for owner, attribute in places:
                patch.setattr(owner, attribute, timed(part, getattr(owner, attribute)))
        for _ in range(rounds):
            rank.drain()
            spent.clear()
            began = time.perf_counter_ns()
            CALLS[name](rank)
            whole = time.perf_counter_ns() - began
            if whole < best["whole"] * 1e3:
                best = {"whole": whole / 1e3, **{part: spent[part] / 1e3 for part in parts}}
    best["rest"] = 2 * best["whole"] - sum(best.values())
    return best


def python_calls(call: Callable[[Rank], object], rank: Rank) -> tuple[Counter[str], int]:
    """The Python functions that a call runs, by file and name, and the number of C functions."""
    names: Counter[str] = Counter()
    played = {__file__, played_gpu.__file__}
    num_c = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        nonlocal num_c
        if frame.f_code.co_filename in played:
            return
        if event == "call":
            names[f"{frame.f_code.co_filename}:{frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            num_c += 1

    gc.collect()
    gc.disable()  # what is finalised meanwhile would be counted
    sys.setprofile(note)
    try:
        call(rank)
    finally:
        sys.setprofile(None)
        gc.enable()
    return names, num_c


def _counted(allocate: Callable[..., torch.Tensor], names: Counter[str]) -> Callable[..., torch.Tensor]:
    def call(*args: Any) -> torch.Tensor:
        names["empty_strided, below"] += 1
        return allocate(*args)

    return call


def cost(rank: Rank, name: str, rounds: int = 0) -> Cost:
    """What the call of that name costs; no time is taken with 0 ``rounds``."""
    call = CALLS[name]
    microseconds = _microseconds(call, rank, rounds) if rounds else 0.0
    rank.buffer.runtime._regions._polls = 0  # type: ignore[union-attr]  # every 64th call looks for freed memory
    names, num_c = python_calls(call, rank)
    counts = rank.gpu.counts
    counts.clear()
    plane: Any = rank.buffer.runtime.party().plane  # type: ignore[union-attr]
    with pytest.MonkeyPatch.context() as patch, _Operators() as operators:
        patch.setattr(plane, "empty_strided", _counted(plane.empty_strided, operators.names))
        call(rank)
    aten = {kind: number for kind, number in operators.names.items() if not kind.startswith("tokenferry")}
    return Cost(
        microseconds,
        names.total(),
        num_c,
        sum(aten.values()),
        sum(number for kind, number in aten.items() if "empty" in kind),
        counts["record event"] + counts["wait for event"],
        counts["identity"],
        counts["look at the capture"],
        counts["launch"],
    )


def table(rounds: int = 300) -> str:
    """The costs of all calls."""
    lines = [f"{'':28}" + "".join(f"{field:>13}" for field in Cost._fields)]
    with rank_on_a_gpu() as rank:
        for name in CALLS:
            found = cost(rank, name, rounds)
            lines.append(f"{name:28}{found.microseconds:13.1f}" + "".join(f"{number:13}" for number in found[1:]))
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in CALLS:  # the Python functions of one call
        with rank_on_a_gpu() as one:
            for called, number in python_calls(CALLS[sys.argv[1]], one)[0].most_common():
                print(f"{number:4} {called}")
    elif sys.argv[1:] == ["--gpu"]:
        with rank_on_this_gpu() as one:
            print(f"Python {platform.python_version()}, torch {torch.__version__}, {torch.cuda.get_device_name()}")
            for called, run in CALLS.items():
                found = breakdown(one, called, 500)
                spelled = ", ".join(f"{part} {microseconds:.1f}" for part, microseconds in found.items())
                print(f"{called:28} {_microseconds(run, one, 100):6.1f} us; timed inside: {spelled}")
    else:
        print(f"Python {platform.python_version()}, torch {torch.__version__}, rank 0 of {RANKS}, no GPU")
        print(table())
