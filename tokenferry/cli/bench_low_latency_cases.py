"""The cases of the low-latency benchmark: what a rank runs, checks and counts, and the ways in which it times a call.

*call*: from a drained device and a start that all ranks share, the time around one call. *chained*: the same around a
chain of calls, for one of them. *host*: the wall time that the host spends in one call of that chain. *graph*: a
replay of a CUDA graph of several calls, for one of them; how decoding runs. *send* and *receive*: the two launches of
an operation that returns a hook; when the second begins, all ranks have sent.

Legend of dims: T tokens of this rank, N most tokens of any rank, H elements of a row, K choices, E experts,
L = E / R local experts, R ranks.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist

from tokenferry.buffer import Buffer
from tokenferry.cli.bench_cases import BASELINE, OURS, SCALE_BLOCK, BenchError
from tokenferry.cli.bench_cuda_cases import DEEPEP, nccl_group
from tokenferry.cli.bench_host import HostPart, host_parts
from tokenferry.cli.bench_low_latency_baseline import FixedCollectives
from tokenferry.cli.bench_low_latency_clocks import Clock, GraphClock, HostClock
from tokenferry.cli.bench_operators import OPERATORS, OperatorContender, expert_rows

OPERATIONS = ("dispatch", "combine", "pair")
KINDS = ("call", "chained", "host", "graph")
"""The ways of timing; CPU ranks have no graphs."""
PHASES = ("send", "receive")
"""The launches of a dispatch or a combine with a hook."""
WAIT_STATISTICS = "with wait statistics"
"""tokenferry, given tensors to count the waits for each rank in."""
FOREIGN = (BASELINE, DEEPEP)
"""Contenders whose failure ends nothing but their part."""
DTYPES = ("fp8", "bf16")
"""What dispatch sends; combine sends bfloat16."""

_TIMEOUT = 60.0
"""Seconds: the first calls of a rank compile kernels while its peers wait."""
_TOLERANCES = {"bf16": 2**-6, "fp8": 2**-4 + 2**-6}
"""Relative errors that roundings explain: bfloat16 once or twice, after three bits behind the point with fp8."""
_SMALLEST = 1e-3
"""Absolute errors that small elements of a block of fp8 may have."""

_T = TypeVar("_T")

Samples = dict[str, dict[str, list[float]]]
"""Seconds of one call in every repetition, by operation and by way of timing."""


@dataclasses.dataclass(frozen=True)
class LowLatencyCase:
    """One token count and dtype."""

    device: str
    ranks: int
    tokens: int
    """Of each rank."""
    max_tokens: int
    """What the operations are told that a rank has at most."""
    hidden: int
    dtype: str
    """One of :data:`DTYPES`."""
    topk: int
    experts: int
    """Of all ranks."""
    exact: bool
    """Whether combine sends every row, as CPU ranks always do."""
    seed: int

    def row_bytes(self, operation: str) -> int:
        """Bytes of a row, its scales included, that dispatch or combine sends."""
        if operation == "dispatch" and self.dtype == "fp8":
            return self.hidden + self.hidden // SCALE_BLOCK * 4
        return 2 * self.hidden

    def size_hint(self, maker: Any = Buffer) -> int:
        """Bytes for ``num_rdma_bytes``, as a contender's Buffer class says."""
        return int(maker.get_low_latency_rdma_size_hint(self.max_tokens, self.hidden, self.ranks, self.experts))


class Effort(NamedTuple):
    """How much of everything is run; the same on all ranks."""

    calls: int = 30
    """Samples of *call*."""
    stretches: int = 5
    """Samples of *chained* and *host*."""
    chain: int = 100
    """Calls in a stretch."""
    ahead: int = 20
    """Calls right before them, without a pause and not timed: a host is slow in its first ones."""
    replays: int = 10
    """Samples of *graph*."""
    captured: int = 40
    """Calls in a graph: a step of decoding has one or two for every layer."""
    phases: int = 20
    """Samples of *send* and *receive*."""
    warm_ups: int = 3
    """Calls that are not timed: the first ones compile and allocate."""
    host_profile: bool = False
    """Profile the host in a stretch of pairs too."""

    def limited(self, iterations: int | None) -> Effort:
        """With so many samples of a call, and no more of anything else."""
        if iterations is None:
            return self
        return self._replace(
            calls=iterations,
            stretches=min(self.stretches, iterations),
            replays=min(self.replays, iterations),
            phases=min(self.phases, iterations),
        )


CPU_EFFORT = Effort(calls=10, stretches=3, chain=4, ahead=0, phases=5, warm_ups=1)
"""Calls take a thousand times as long there."""


class Traffic(NamedTuple):
    """What the tokens of a rank have to do with other ranks."""

    tokens: int
    rows: int
    """Pairs of a token and another rank that has experts of it."""
    choices: int
    """Pairs of a token and an expert of it on another rank."""


class RankResult(NamedTuple):
    """What one rank found out about a case."""

    samples: dict[str, Samples]
    """By contender."""
    traffic: Traffic
    heap_bytes: int
    """Memory that the library has taken."""
    host_parts: list[HostPart]
    """The host in a pair of tokenferry; empty if not asked for."""
    left_out: dict[str, str]
    """Contenders of :data:`FOREIGN` that failed in this case or before it, and how."""


class Workload(NamedTuple):
    """What one rank brings to a case."""

    x: torch.Tensor
    """bfloat16 [T, H]."""
    topk_idx: torch.Tensor
    """int64 [T, K]: distinct experts, uniform."""
    topk_weights: torch.Tensor
    """float32 [T, K]: positive, of any sum."""


class Contender(Protocol):
    """The operations of one contender in a case."""

    has_hooks: bool
    """Whether dispatch and combine take ``return_recv_hook`` as their only argument, and return the hook last."""

    def dispatch(self) -> tuple[Any, ...]:
        """Dispatch."""

    def combine(self) -> tuple[Any, ...]:
        """Combine what a dispatch has brought."""

    def pair(self) -> tuple[Any, ...]:
        """Dispatch and combine; the sums come first."""


class CollectivesContender:
    """``torch.distributed`` in a case.

    Args:
        work: of this rank.
        case: what to run.
        group: of all ranks; None: the default one.
    """

    has_hooks = False

    def __init__(self, work: Workload, case: LowLatencyCase, group: dist.ProcessGroup | None) -> None:
        self._calls = FixedCollectives(group, *work, case.experts)
        self._received = self._calls.dispatch()

    def dispatch(self) -> tuple[Any, ...]:
        """See :class:`Contender`."""
        return self._calls.dispatch()

    def combine(self) -> tuple[Any, ...]:
        """See :class:`Contender`."""
        return self._calls.combine(*self._received)

    def pair(self) -> tuple[Any, ...]:
        """See :class:`Contender`."""
        return self._calls.combine(*self._calls.dispatch())


class BufferContender:
    """The operations of one Buffer in a case, its experts returning the rows as they come.

    An fp8 row comes back as bfloat16, converted beforehand, because converting is not communication.

    Args:
        case: what to run.
        work: of this rank.
        buffer: of tokenferry, or another one with its low-latency methods.
        waits: int64 [R]: what is waited for each rank is added to it.
    """

    has_hooks = True

    def __init__(self, case: LowLatencyCase, work: Workload, buffer: Any, waits: torch.Tensor | None = None) -> None:
        names = ("dispatch_wait_recv_cost_stats", "combine_wait_recv_cost_stats")
        self._dispatch_stats, self._combine_stats = ({} if waits is None else {name: waits} for name in names)
        self._case = case
        self._work = work
        self._buffer = buffer
        first = self.dispatch()
        self._handle = first[2]
        self._rows = expert_rows(first[0], first[1])

    def dispatch(self, return_recv_hook: bool = False) -> tuple[Any, ...]:
        """Dispatch; the hook comes last."""
        case, work = self._case, self._work
        result: tuple[Any, ...] = self._buffer.low_latency_dispatch(
            work.x,
            work.topk_idx,
            case.max_tokens,
            case.experts,
            use_fp8=case.dtype == "fp8",
            return_recv_hook=return_recv_hook,
            **self._dispatch_stats,
        )
        return result

    def combine(self, return_recv_hook: bool = False) -> tuple[Any, ...]:
        """Combine along the handle of the first dispatch; the hook comes last."""
        return self._combine(self._rows, self._handle, return_recv_hook)

    def pair(self) -> tuple[Any, ...]:
        """Dispatch and combine."""
        there = self.dispatch()
        return self._combine(self._rows if self._case.dtype == "fp8" else there[0], there[2])

    def _combine(self, rows: torch.Tensor, handle: Any, return_recv_hook: bool = False) -> tuple[Any, ...]:
        work = self._work
        result: tuple[Any, ...] = self._buffer.low_latency_combine(
            rows,
            work.topk_idx,
            work.topk_weights,
            handle,
            return_recv_hook=return_recv_hook,
            **self._combine_stats,
        )
        return result


def check(name: str, contender: Contender, case: LowLatencyCase, work: Workload, rank: int) -> None:
    """Run a pair and look at what comes back.

    Raises:
        BenchError: it is not what was sent, times the weights.
    """
    wanted = work.x.float() * work.topk_weights.sum(1, keepdim=True)
    error = (contender.pair()[0].float() - wanted).abs()
    wrong = ~(error <= _TOLERANCES[case.dtype] * wanted.abs() + _SMALLEST)  # also where there is no number
    if wrong.any():
        raise BenchError(
            f"{name}, {case.tokens} tokens, {case.dtype}: rank {rank} got {int(wrong.sum())} of {wrong.numel()} "
            "elements wrong"
        )


def prepare(case: LowLatencyCase, rank: int) -> Workload:
    """Make the inputs of one rank."""
    generator = torch.Generator(case.device).manual_seed(case.seed + rank)
    scores = torch.rand(case.tokens, case.experts, generator=generator, device=case.device)
    weights = torch.rand(case.tokens, case.topk, generator=generator, device=case.device)
    rows = torch.randn(case.tokens, case.hidden, generator=generator, device=case.device)
    return Workload(rows.to(torch.bfloat16), scores.topk(case.topk, dim=1).indices, weights)


def count_traffic(topk_idx: torch.Tensor, rank: int, ranks: int, experts: int) -> Traffic:
    """Count the rows that the tokens of a rank need."""
    owners = topk_idx // (experts // ranks)
    member = torch.zeros(len(owners), ranks, dtype=torch.bool, device=owners.device).scatter_(1, owners, True)
    member[:, rank] = False
    return Traffic(len(owners), int(member.sum()), int((owners != rank).sum()))


def measure(clock: Clock, contender: Contender, effort: Effort) -> Samples:
    """Time the operations of a contender in all ways."""
    samples = {name: _time(clock, getattr(contender, name), effort) for name in OPERATIONS}
    for name in ("dispatch", "combine") if contender.has_hooks else ():
        samples[name].update(_time_phases(clock, getattr(contender, name), effort))
    return samples


def _time(clock: Clock, call: Callable[[], object], effort: Effort) -> dict[str, list[float]]:
    clock.stretch(call, effort.warm_ups)
    calls = [clock.stretch(call, 1) for _ in range(effort.calls)]
    chains = [clock.stretch(call, effort.chain, effort.ahead) for _ in range(effort.stretches)]
    samples = {
        "call": [stretch.device for stretch in calls],
        "chained": [stretch.device / effort.chain for stretch in chains],
        "host": [stretch.host / effort.chain for stretch in chains],
    }
    replay = clock.capture(call, effort.captured)
    if replay is not None:
        clock.launch(replay)  # the first one loads the graph
        samples["graph"] = [clock.launch(replay) / effort.captured for _ in range(effort.replays)]
    return samples


def _time_phases(clock: Clock, send: Callable[[bool], tuple[Any, ...]], effort: Effort) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {phase: [] for phase in PHASES}
    results: list[tuple[Any, ...]] = []
    for turn in range(1 + effort.phases):
        sent = clock.launch(lambda: results.append(send(True)))
        result = results.pop()  # its tensors are to live until they are set
        received = clock.launch(result[-1])
        if turn > 0:  # the first one loads kernels
            samples["send"].append(sent)
            samples["receive"].append(received)
    return samples


def run_cases(
    rank: int,
    num_ranks: int,
    cases: Sequence[LowLatencyCase],
    largest: LowLatencyCase,
    effort: Effort,
    rivals: Sequence[str],
    clock: Clock | None,
) -> list[RankResult]:
    """Check and time cases that differ in tokens and dtype alone; all ranks of the default group call it together.

    Args:
        rank: this rank.
        num_ranks: ranks of the group, those of the cases.
        cases: what to run, on one Buffer.
        largest: the case of the whole run that needs most memory.
        effort: how much.
        rivals: contenders to run beside tokenferry: :data:`BASELINE`, :data:`DEEPEP`, :data:`OPERATORS`,
            :data:`WAIT_STATISTICS`.
        clock: by default one that suits the device.

    Returns:
        A result for each case.

    Raises:
        BenchError: what was sent, times the weights, does not come back. One of :data:`FOREIGN` that fails is left
            out instead.
    """
    shape, results = cases[0], []
    left_out: dict[str, str] = {}
    clock = clock or (GraphClock() if shape.device == "cuda" else HostClock())
    with Buffer(
        dist.group.WORLD,
        num_rdma_bytes=shape.size_hint(),
        low_latency_mode=True,
        exact_combine=shape.exact,
        timeout=_TIMEOUT,
        device=shape.device,
    ) as buffer:
        for case in cases:
            work = prepare(case, rank)
            most, fp8 = case.max_tokens, case.dtype == "fp8"
            buffer.low_latency_warmup(most, case.hidden, case.topk, case.experts, use_fp8=fp8)
            samples, parts = {}, []
            for name in (OURS, *rivals):
                if name in left_out:
                    continue
                attempt = _together if name in FOREIGN else _alone
                try:
                    contender = attempt(functools.partial(_ready, name, case, largest, work, buffer, rank))
                    samples[name] = attempt(functools.partial(measure, clock, contender, effort))
                    if name == OURS and effort.host_profile:
                        clock.drain()
                        parts = host_parts(contender.pair, effort.chain)
                    clock.drain()
                    # Raises what the last kernels may have reported, too.
                    attempt(functools.partial(check, name, contender, case, work, rank))
                except _LeftOutError as error:
                    left_out[name] = str(error)
                    samples.pop(name, None)
            assert buffer.runtime is not None
            traffic = count_traffic(work.topk_idx, rank, case.ranks, case.experts)
            taken = buffer.runtime.allocated_bytes()
            results.append(RankResult(samples, traffic, taken, parts, dict(left_out)))
        clock.drain()
        dist.barrier()
    torch.cuda.empty_cache()  # the next token count needs blocks of other sizes
    return results


class _LeftOutError(Exception):
    """A contender of others failed on some rank; raised on all of them."""


def _alone(attempt: Callable[[], _T]) -> _T:
    return attempt()


def _together(attempt: Callable[[], _T]) -> _T:
    """Raise on all ranks if it raises on any."""
    why = ""
    try:
        result = attempt()
    except Exception as error:
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    reasons: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(reasons, why)
    for rank, reason in enumerate(reasons):
        if reason:
            raise _LeftOutError(f"rank {rank}: {reason}")
    return result


def _ready(
    name: str, case: LowLatencyCase, largest: LowLatencyCase, work: Workload, buffer: Buffer, rank: int
) -> Contender:
    contender = _contender(name, case, largest, work, buffer)
    check(name, contender, case, work, rank)
    return contender


def _contender(name: str, case: LowLatencyCase, largest: LowLatencyCase, work: Workload, buffer: Buffer) -> Contender:
    if name == BASELINE:
        return CollectivesContender(work, case, _collectives_group(case.device))
    if name == OPERATORS:
        return OperatorContender(*work, case.max_tokens, case.experts, case.dtype == "fp8", buffer)
    waits = work.topk_idx.new_zeros(case.ranks) if name == WAIT_STATISTICS else None
    return BufferContender(case, work, _deepep(case, largest) if name == DEEPEP else buffer, waits)


@functools.cache
def _collectives_group(device: str) -> dist.ProcessGroup | None:
    return nccl_group() if device == "cuda" else None


def _deepep(case: LowLatencyCase, largest: LowLatencyCase) -> Any:
    """DeepEP's Buffer, ready for a case.

    UNTESTED: written after the description of its API, never run, for want of a machine that has DeepEP.
    """
    buffer = _deepep_buffer(largest)
    buffer.clean_low_latency_buffer(case.max_tokens, case.hidden, case.experts)
    return buffer


@functools.cache
def _deepep_buffer(largest: LowLatencyCase) -> Any:
    """One for the whole run: the memory under it is not made for being set up again and again."""
    maker = importlib.import_module("deep_ep").Buffer
    return maker(
        nccl_group() if largest.device == "cuda" else dist.group.WORLD,
        0,
        largest.size_hint(maker),
        low_latency_mode=True,
        num_qps_per_rank=largest.experts // largest.ranks,
    )
