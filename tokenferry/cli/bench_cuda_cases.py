"""The cases of the benchmark on GPUs: what a rank runs, and the three ways in which it times a call.

*call*: from a drained device and a start that all ranks share, the time between two CUDA events around one call.
*chained*: the same around calls in the middle of a chain, for one of them. *host*: the wall time that the host spends
in one of those. Only *chained* says what a program pays that has other work to hide the host's behind; *call* has
the host's time in it.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from tokenferry.buffer import Buffer
from tokenferry.cli.bench_cases import (
    BASELINE,
    CUDA_MODES,
    EXTRA_MODES,
    OURS,
    Call,
    Case,
    Result,
    Workload,
    baseline_calls,
    check_agreement,
    count_traffic,
    expanded_calls,
    prepare,
    tokenferry_calls,
)
from tokenferry.cli.bench_machine import describe_device
from tokenferry.cli.bench_operators import OPERATORS, operator_calls
from tokenferry.cli.bench_start import start_together

BARE = "all_to_all_single"
"""The bytes alone, between nodes of one rank: one exchange of all that goes to other ranks, back again for a pair."""
DEEPEP = "DeepEP V1"
DEEPEP_RANKS = (2, 4, 8)
"""Numbers of ranks that DeepEP V1 can run inside a node."""
DEEPEP_DTYPES = ("bf16", "fp8")

STAGED = "expandable_segments:True"
"""The setting of torch's allocator with which all rows pass through the stage."""
_DEEPEP_BYTES = 2_000_000_000
"""What DeepEP's own test of this mode gives its buffer."""
_TIMEOUT = 60.0
"""Seconds: the first calls of a rank compile kernels while its peers wait."""


@dataclasses.dataclass(frozen=True)
class CudaCase(Case):
    """One line of the benchmark on GPUs."""

    sms: int
    """SMs that an operation may use; 0 where it has no say."""


class Effort(NamedTuple):
    """How much of everything is run; the same on all ranks."""

    calls: int = 30
    """Samples of *call*."""
    stretches: int = 5
    """Samples of *chained* and *host*."""
    chain: int = 100
    """Calls in a stretch, at most."""
    least_chain: int = 20
    """Calls in a stretch of however many tokens."""
    chained_tokens: int = 1 << 19
    """That all calls of a stretch have together, if it has more calls than the least."""
    ahead: int = 20
    """Calls right before those of a stretch, without a pause and not timed: a host is slow in its first ones."""
    warm_ups: int = 5
    """Calls that are not timed: the first ones compile, allocate, and let peers map what was allocated."""
    kernels: bool = False
    """Ask torch.profiler for the time of each kernel too."""

    def chain_of(self, case: CudaCase) -> tuple[int, int]:
        """Calls in a stretch, and ahead of it."""
        return min(self.chain, max(self.least_chain, self.chained_tokens // case.tokens)), self.ahead


NODES_EFFORT = Effort(calls=20, stretches=30, chain=4, least_chain=4, ahead=1)
"""Between nodes a call is long, and the speed of the network changes all the time: contenders take turns often."""


class Stretch(NamedTuple):
    """Seconds of a number of calls."""

    device: float
    host: float


class Samples(NamedTuple):
    """Seconds of one call, in every repetition, on one rank."""

    call: list[float]
    chained: list[float]
    host: list[float]


class CudaRankResult(NamedTuple):
    """What one rank found out about a case."""

    samples: dict[str, Samples]
    """By contender."""
    wire_bytes: int
    """Bytes that this rank sends to other ranks in one call; over all ranks, as many arrive."""
    logical_bytes: int
    """The same with the rows that it sends to itself."""
    heap_bytes: int
    """Device memory that the library has taken."""
    kernels: dict[str, float]
    """Seconds of each kernel in one chained call of tokenferry, by name; empty if not asked for."""


class Clock(Protocol):
    """How stretches are timed."""

    def drain(self) -> None:
        """Wait until the device has nothing left to do."""

    def stretch(self, call: Callable[[], object], count: int, ahead: int = 0) -> Stretch:
        """Drain, start together with all ranks, and time ``count`` calls, behind ``ahead`` that are not timed."""


class CudaClock:
    """Events on the current stream of the current GPU."""

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def drain(self) -> None:
        """See :meth:`Clock.drain`."""
        torch.cuda.synchronize()

    def stretch(self, call: Callable[[], object], count: int, ahead: int = 0) -> Stretch:
        """See :meth:`Clock.stretch`."""
        self.drain()
        start_together()
        for _ in range(ahead):
            call()
        self._begin.record()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        host = time.perf_counter() - begin
        self._end.record()
        self._end.synchronize()
        return Stretch(self._begin.elapsed_time(self._end) * 1e-3, host)


class Rival(NamedTuple):
    """A contender beside tokenferry."""

    name: str
    calls_at: Callable[[int], dict[str, Call]]
    """The modes it has, for a number of SMs (0: no matter), until asked for another number."""
    knows_sms: bool
    """If not, one measurement is good for all numbers of SMs."""


def take_device(rank: int, num_ranks: int, num_nodes: int = 1, staged: bool = False) -> dict[str, Any]:
    """Give this rank its GPU, and describe it.

    If ``staged``, torch's allocator takes memory from the driver in a way in which peers cannot open it.

    The GPUs go to the nodes in equal shares, one after the other where there are too few, then to the ranks of a node
    likewise. NCCL takes nodes for hosts, so that it goes between them through its network transport.
    """
    if staged:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = os.environ["PYTORCH_ALLOC_CONF"] = STAGED
    num_gpus, per_node = torch.cuda.device_count(), num_ranks // num_nodes
    node, local = divmod(rank, per_node)
    share = max(num_gpus // num_nodes, 1)
    index = (node * share + local % share) % num_gpus
    torch.cuda.set_device(index)
    if num_nodes > 1:
        os.environ["NCCL_HOSTID"] = f"node-{node}"
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    return {**describe_device(index), "deep_ep": _deepep_state()}


def run_cases(
    rank: int, num_ranks: int, cases: Sequence[CudaCase], effort: Effort, rivals: Sequence[str], clock: Clock | None
) -> list[CudaRankResult]:
    """Check and time cases that differ in mode and SMs alone; all ranks of the default group call it together.

    Args:
        rank: this rank.
        num_ranks: ranks of the group, those of the cases.
        cases: what to run, on one Buffer and one workload.
        effort: how much.
        rivals: contenders to run beside tokenferry: :data:`BASELINE`, :data:`DEEPEP`, :data:`BARE`,
            :data:`OPERATORS`.
        clock: by default a :class:`CudaClock`.

    Returns:
        A result for each case.

    Raises:
        BenchError: tokenferry and ``torch.distributed`` do not agree bit for bit.
    """
    results = _run_cases(rank, cases, effort, rivals, clock or CudaClock())
    torch.cuda.empty_cache()  # the next token count needs blocks of other sizes
    return results


def _run_cases(
    rank: int, cases: Sequence[CudaCase], effort: Effort, rivals: Sequence[str], clock: Clock
) -> list[CudaRankResult]:
    shape, results = cases[0], []
    node = rank * shape.nodes // shape.ranks if shape.nodes > 1 else None
    with ExitStack() as stack:
        buffer = stack.enter_context(
            Buffer(dist.group.WORLD, shape.num_nvl_bytes, device=shape.device, timeout=_TIMEOUT, node=node)
        )
        stack.callback(Buffer.set_num_sms, Buffer.num_sms)
        work = prepare(shape, rank, buffer)
        ours = tokenferry_calls(shape, work, buffer)
        if any(case.mode in EXTRA_MODES for case in cases):
            ours |= expanded_calls(shape, work, stack, _TIMEOUT)
        others = [_rival(name, shape, work, buffer) for name in rivals]
        known: dict[tuple[str, str], Samples] = {}
        for case in cases:
            if case.sms:
                Buffer.set_num_sms(case.sms)
            chain, ahead = effort.chain_of(case)
            calls: dict[str, Call] = {OURS: ours[case.mode]}
            names = [OURS]
            for rival in others:
                call = rival.calls_at(case.sms).get(case.mode)
                if call is None:
                    continue
                if rival.name in (BASELINE, OPERATORS):
                    check_agreement(case, rank, ours[case.mode](), call())
                names.append(rival.name)
                if rival.knows_sms or (rival.name, case.mode) not in known:
                    calls[rival.name] = call
            measured = measure(clock, calls, effort, chain, ahead)
            known |= {(name, case.mode): found for name, found in measured.items()}
            samples = {name: known[name, case.mode] for name in names}
            assert buffer.runtime is not None
            results.append(
                CudaRankResult(
                    samples,
                    *count_traffic(work.is_token_in_rank, rank, case.row_bytes()),
                    buffer.runtime.allocated_bytes(),
                    kernel_seconds(ours[case.mode], chain) if effort.kernels else {},
                )
            )
        clock.drain()
        buffer.get_dispatch_layout(work.topk_idx, shape.experts)  # raises what the last kernels may have reported
        clock.drain()
        dist.barrier()
    return results


def measure(
    clock: Clock, calls: Mapping[str, Callable[[], object]], effort: Effort, chain: int, ahead: int
) -> dict[str, Samples]:
    """Time calls in the three ways, with so many in a stretch and so many ahead of it; stretches take turns."""
    single: dict[str, list[Stretch]] = {}
    stretches: dict[str, list[Stretch]] = {name: [] for name in calls}
    for name, call in calls.items():
        clock.stretch(call, effort.warm_ups)
        single[name] = [clock.stretch(call, 1) for _ in range(effort.calls)]
    for _ in range(effort.stretches):
        for name, call in calls.items():
            stretches[name].append(clock.stretch(call, chain, ahead))
    return {
        name: Samples(
            [stretch.device for stretch in single[name]],
            [stretch.device / chain for stretch in stretches[name]],
            [stretch.host / chain for stretch in stretches[name]],
        )
        for name in calls
    }


def kernel_seconds(call: Callable[[], object], count: int) -> dict[str, float]:
    """Device seconds in one of ``count`` chained calls, by kernel, as torch.profiler finds them.

    Kernels wait for peers, so that the time of one includes how late those are.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            call()
        torch.cuda.synchronize()
    return {
        event.key: event.self_device_time_total * 1e-6 / count
        for event in profiler.key_averages()
        if event.device_type.name == "CUDA" and event.self_device_time_total > 0
    }


@functools.cache
def nccl_group() -> dist.ProcessGroup:
    """The ranks of the default group in a NCCL group; made at the first call, which is collective."""
    group = dist.new_group(backend="nccl")
    assert isinstance(group, dist.ProcessGroup)
    return group


def _rival(name: str, case: CudaCase, work: Workload, buffer: Buffer) -> Rival:
    if name == OPERATORS:
        operators = operator_calls(case, work, buffer)
        return Rival(name, lambda _: operators, knows_sms=True)
    group = nccl_group() if case.device == "cuda" else None
    if name == BASELINE:
        calls = baseline_calls(case, work, group)
        return Rival(name, lambda _: calls, knows_sms=False)
    if name == BARE:
        modes = [mode for mode in CUDA_MODES if mode != "layout"]
        bare = {mode: _bare_exchange(dataclasses.replace(case, mode=mode), work, group) for mode in modes}
        return Rival(name, lambda _: bare, knows_sms=False)
    return _deepep(case, work, group)


def _bare_exchange(case: CudaCase, work: Workload, group: dist.ProcessGroup | None) -> Call:
    """As many bytes to every other rank as one call sends there, and as many from it; of a pair there, then back."""
    rank = dist.get_rank()
    matrix = [torch.empty_like(work.num_tokens_per_rank) for _ in range(case.ranks)]
    dist.all_gather(matrix, work.num_tokens_per_rank, group=group)
    counts = torch.stack(matrix).fill_diagonal_(0).tolist()
    there, back = counts[rank], [row[rank] for row in counts]

    def bytes_of(mode: str) -> int:
        return dataclasses.replace(case, mode=mode).row_bytes()

    exchanges = {
        "combine": [(bytes_of("combine"), back, there)],
        "pair": [(bytes_of("dispatch"), there, back), (bytes_of("combine"), back, there)],
        "cached-pair": [(bytes_of("cached"), there, back), (bytes_of("combine"), back, there)],
    }.get(case.mode, [(case.row_bytes(), there, back)])
    device = work.num_tokens_per_rank.device

    def call() -> Result:
        for row_bytes, going, coming in exchanges:
            sent = torch.empty(sum(going), row_bytes, dtype=torch.uint8, device=device)
            dist.all_to_all_single(sent.new_empty(sum(coming), row_bytes), sent, coming, going, group=group)
        return Result([], [])

    return call


def _deepep(case: CudaCase, work: Workload, group: dist.ProcessGroup | None) -> Rival:
    """DeepEP V1, whose methods tokenferry's Buffer has too: the same calls on the other object.

    UNTESTED: written after the description of its API, never run, for want of a machine that has DeepEP. Its results
    are not compared. Every call uses its presets for the number of ranks; a handle is good for one number of SMs.
    """
    deep_ep = importlib.import_module("deep_ep")
    buffer = deep_ep.Buffer(group, _DEEPEP_BYTES)

    def calls_at(sms: int) -> dict[str, Call]:
        if sms:
            deep_ep.Buffer.set_num_sms(sms)
        return tokenferry_calls(case, work, buffer)

    return Rival(DEEPEP, calls_at, knows_sms=True)


def _deepep_state() -> str:
    """Whether DeepEP can be imported: "yes", or why not."""
    try:
        deep_ep = importlib.import_module("deep_ep")
    except Exception as error:  # a build for another torch fails in any way
        return f"cannot be imported ({type(error).__name__})"
    return "yes" if hasattr(deep_ep, "Buffer") else "has no V1 Buffer"
