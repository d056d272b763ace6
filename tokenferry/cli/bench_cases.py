"""The cases of the benchmark: what is prepared, what is called, and how a rank times it.

Legend of dims: T tokens of this rank, H elements of a row, K choices, E experts, R ranks, M received rows.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from tokenferry.buffer import Buffer
from tokenferry.cli.bench_baseline import Routes, TorchDistributed, expert_major
from tokenferry.elastic import ElasticBuffer
from tokenferry.handles import Handle

DTYPES = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
}
SCALE_BLOCK = 128
"""Elements of an fp8 row that share one float32 scale."""
MODES = {
    "layout": "get_dispatch_layout",
    "dispatch": "dispatch",
    "cached": "cached dispatch",
    "combine": "combine",
    "pair": "chained pair",
}
CUDA_MODES = {**MODES, "cached-pair": "cached pair"}
"""Modes on GPUs."""
EXTRA_MODES = {"expanded": "expanded dispatch"}
"""Modes of any device that run only when they are asked for: those of an ElasticBuffer."""
ALL_MODES = {**CUDA_MODES, **EXTRA_MODES}
ROUTINGS = ("uniform", "others")
"""Where tokens go: to any experts, or only to those of other ranks, so that every row crosses."""
CHAINED_PAIRS = 4
"""Pairs of dispatch and combine that follow each other without a barrier in one timed stretch."""

_BLOCKS = 2
_WARM_UPS = 2
_FEWEST_ITERATIONS = 6
_MOST_ITERATIONS = 1000

OURS = "tokenferry"
BASELINE = "torch.distributed"


class BenchError(RuntimeError):
    """The benchmark cannot go on."""


class Result(NamedTuple):
    """What a call returns, in a form in which contenders can be compared."""

    tensors: list[torch.Tensor]
    counts: list[int]


Call = Callable[[], Result]


class Clock(Protocol):
    """How a device is timed."""

    def time(self, call: Callable[[], object]) -> float:
        """Align all ranks, run the call, and return its seconds on this rank."""


class CpuClock:
    """Wall time between two points of the calling thread, from a barrier on."""

    def time(self, call: Callable[[], object]) -> float:
        """See :meth:`Clock.time`."""
        dist.barrier()
        start = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - start
        del result  # giving the memory back is not part of the call
        return seconds


CLOCKS: dict[str, type[Clock]] = {"cpu": CpuClock}
"""The devices that can be timed."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One line of the benchmark."""

    mode: str
    """A key of :data:`MODES`, or on GPUs of :data:`CUDA_MODES`."""
    device: str
    ranks: int
    tokens: int
    """Of each rank."""
    hidden: int
    dtype: str
    """A key of :data:`DTYPES`: what dispatch sends."""
    topk: int
    experts: int
    """Of all ranks."""
    num_nvl_bytes: int
    """Ceiling of the stage; 0 for the library's default."""
    seed: int
    nodes: int = dataclasses.field(default=1, kw_only=True)
    """Groups of neighbouring ranks that count as nodes: tokenferry goes between them over TCP."""
    routing: str = dataclasses.field(default=ROUTINGS[0], kw_only=True)
    """One of :data:`ROUTINGS`."""

    @property
    def calls_per_iteration(self) -> int:
        """Calls in one timed stretch; a time is that of the stretch divided by this."""
        return CHAINED_PAIRS if self.mode == "pair" else 1

    @property
    def combine_dtype(self) -> torch.dtype:
        """What the experts return: fp8 rows come back as bfloat16."""
        return torch.bfloat16 if self.dtype == "fp8" else DTYPES[self.dtype]

    def row_bytes(self) -> int:
        """Bytes that cross for each row that one call of this mode moves to or from another rank."""
        row = self.hidden * DTYPES[self.dtype].itemsize
        scales = self.hidden // SCALE_BLOCK * 4 if self.dtype == "fp8" else 0
        choices = self.topk * (8 + 4)
        returned = self.hidden * self.combine_dtype.itemsize
        return {
            "layout": 0,
            "dispatch": row + scales + choices,
            "expanded": row + scales + choices,
            "cached": row + scales,
            "combine": returned,
            "pair": row + scales + choices + returned,
            "cached-pair": row + scales + returned,
        }[self.mode]


class Budget(NamedTuple):
    """How long to measure one case."""

    seconds: float
    """For each contender; not looked at where ``iterations`` is given."""
    iterations: int | None


class Workload(NamedTuple):
    """What one rank brings to a case, and what of it the calls share."""

    columns: list[torch.Tensor]
    """The rows [T, H], and for fp8 their scales [T, H / 128]."""
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_tokens_per_rank: torch.Tensor
    num_tokens_per_expert: torch.Tensor
    is_token_in_rank: torch.Tensor
    num_tokens_per_rdma_rank: torch.Tensor | None


class RankResult(NamedTuple):
    """What one rank found out about a case."""

    times: dict[str, list[float]]
    """Seconds of each call, by contender."""
    wire_bytes: int
    """Bytes that this rank sends to other ranks in one call."""
    logical_bytes: int
    """Bytes of all rows that this rank sends in one call, those to itself included."""
    heap_bytes: int
    """Shared memory of this rank's Buffer after the case."""


def random_choices(case: Case, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random routing: int64 [T, K] distinct experts, all alike likely, and float32 [T, K] weights that sum to 1."""
    generator = torch.Generator(case.device).manual_seed(case.seed + rank)
    scores = torch.rand(case.tokens, case.experts, generator=generator, device=case.device)
    if case.routing == "others":
        local = case.experts // case.ranks
        scores[:, rank * local : (rank + 1) * local] = -1.0
    best = scores.topk(case.topk, dim=1)
    return best.indices, best.values.softmax(dim=1)


def random_rows(case: Case, rank: int) -> list[torch.Tensor]:
    """Normal rows [T, H]; as fp8, each block of 128 scaled to the format's largest value, and the scales."""
    generator = torch.Generator(case.device).manual_seed(case.seed + case.ranks + rank)
    rows = torch.randn(case.tokens, case.hidden, generator=generator, device=case.device)
    if case.dtype != "fp8":
        return [rows.to(DTYPES[case.dtype])]
    blocks = rows.view(case.tokens, -1, SCALE_BLOCK)
    scales = blocks.abs().amax(dim=2).clamp(min=1e-4) / torch.finfo(torch.float8_e4m3fn).max
    return [(blocks / scales.unsqueeze(2)).to(torch.float8_e4m3fn).view_as(rows), scales]


def prepare(case: Case, rank: int, buffer: Buffer) -> Workload:
    """Make the inputs of one rank."""
    ids, weights = random_choices(case, rank)
    per_rank, per_node, per_expert, member, _ = buffer.get_dispatch_layout(ids, case.experts)
    return Workload(random_rows(case, rank), ids, weights, per_rank, per_expert, member, per_node)


def count_traffic(is_token_in_rank: torch.Tensor, rank: int, row_bytes: int) -> tuple[int, int]:
    """Count what a rank sends in one call.

    Args:
        is_token_in_rank: bool [T, R].
        rank: whose tokens these are.
        row_bytes: bytes that travel for one row.

    Returns:
        Bytes to other ranks (``wire``) and bytes to all ranks (``logical``). Combine moves the same rows the
        other way.
    """
    rows = is_token_in_rank.sum(0).tolist()
    return (sum(rows) - rows[rank]) * row_bytes, sum(rows) * row_bytes


def tokenferry_calls(case: Case, work: Workload, buffer: Buffer) -> dict[str, Call]:
    """The modes by tokenferry, those of GPUs too."""
    x = work.columns[0] if len(work.columns) == 1 else (work.columns[0], work.columns[1])

    def layout() -> Result:
        counts = buffer.get_dispatch_layout(work.topk_idx, case.experts)
        return Result([counts[0], counts[2], counts[3]], [])

    def fresh() -> tuple[Result, Handle]:
        rows, ids, weights, counts, handle, _ = buffer.dispatch(
            x,
            num_tokens_per_rank=work.num_tokens_per_rank,
            num_tokens_per_rdma_rank=work.num_tokens_per_rdma_rank,
            is_token_in_rank=work.is_token_in_rank,
            num_tokens_per_expert=work.num_tokens_per_expert,
            topk_idx=work.topk_idx,
            topk_weights=work.topk_weights,
        )
        assert ids is not None
        assert weights is not None
        assert counts is not None
        assert handle is not None
        return Result([*_columns(rows), ids, weights], counts), handle

    first, handle = fresh()
    returned = first.tensors[0].to(case.combine_dtype)

    def cached() -> Result:
        return Result(_columns(buffer.dispatch(x, handle=handle)[0]), [])

    def combine() -> Result:
        return Result([buffer.combine(returned, handle)[0]], [])

    def pair() -> Result:
        there, new_handle = fresh()
        # An fp8 expert answers in bfloat16; its answer is at hand, because converting is not communication.
        back = returned if case.dtype == "fp8" else there.tensors[0]
        return Result([buffer.combine(back, new_handle)[0]], [])

    def cached_pair() -> Result:
        there = cached()
        back = returned if case.dtype == "fp8" else there.tensors[0]
        return Result([buffer.combine(back, handle)[0]], [])

    return {
        "layout": layout,
        "dispatch": lambda: fresh()[0],
        "cached": cached,
        "combine": combine,
        "pair": pair,
        "cached-pair": cached_pair,
    }


def expanded_calls(case: Case, work: Workload, stack: ExitStack, timeout: float | None = None) -> dict[str, Call]:
    """The modes of :data:`EXTRA_MODES`, on an ElasticBuffer that ends with the stack.

    It uses as many SMs as :meth:`Buffer.set_num_sms` was told last.
    """
    x = work.columns[0] if len(work.columns) == 1 else (work.columns[0], work.columns[1])
    group = dist.group.WORLD
    assert group is not None
    buffer = stack.enter_context(
        ElasticBuffer(
            group,
            num_max_tokens_per_rank=case.tokens,
            hidden=case.hidden,
            num_topk=case.topk,
            use_fp8_dispatch=case.dtype == "fp8",
            num_gpu_timeout_secs=timeout,
            device=case.device,
        )
    )

    def expanded() -> Result:
        rows, _, weights, handle, _ = buffer.dispatch(
            x,
            topk_idx=work.topk_idx,
            topk_weights=work.topk_weights,
            num_experts=case.experts,
            num_sms=Buffer.num_sms,
            do_expand=True,
        )
        assert weights is not None
        return Result([*_columns(rows), weights], handle.num_recv_tokens_per_expert_list)

    return {"expanded": expanded}


def baseline_calls(case: Case, work: Workload, group: dist.ProcessGroup | None = None) -> dict[str, Call]:
    """The modes by ``torch.distributed`` over a group, by default the default one; it has none for the layout."""
    plain = TorchDistributed(group, case.ranks // case.nodes)

    def fresh() -> tuple[Result, Routes]:
        tensors, counts, routes = plain.dispatch(
            work.columns,
            work.topk_idx,
            work.topk_weights,
            work.num_tokens_per_rank,
            work.num_tokens_per_expert,
            work.is_token_in_rank,
        )
        return Result(tensors, counts), routes

    first, routes = fresh()
    returned = first.tensors[0].to(case.combine_dtype)

    def cached() -> Result:
        return Result(plain.cached_dispatch(work.columns, routes), [])

    def combine() -> Result:
        return Result([plain.combine(returned, routes, case.tokens)], [])

    def pair() -> Result:
        there, new_routes = fresh()
        back = returned if case.dtype == "fp8" else there.tensors[0]
        return Result([plain.combine(back, new_routes, case.tokens)], [])

    def cached_pair() -> Result:
        there = cached()
        back = returned if case.dtype == "fp8" else there.tensors[0]
        return Result([plain.combine(back, routes, case.tokens)], [])

    def expanded() -> Result:
        there = fresh()[0]
        return Result(expert_major(there.tensors), there.counts)

    return {
        "dispatch": lambda: fresh()[0],
        "expanded": expanded,
        "cached": cached,
        "combine": combine,
        "pair": pair,
        "cached-pair": cached_pair,
    }


def run_case(rank: int, num_ranks: int, case: Case, budget: Budget, with_baseline: bool) -> RankResult:
    """Check and time one case on one rank; all ranks of the default process group call it together.

    Args:
        rank: this rank.
        num_ranks: ranks of the group, those of the case.
        case: what to run.
        budget: for how long.
        with_baseline: time ``torch.distributed`` too, in turn with tokenferry.

    Raises:
        BenchError: the two contenders do not agree bit for bit.
    """
    clock = CLOCKS[case.device]()
    node = rank * case.nodes // case.ranks if case.nodes > 1 else None
    with ExitStack() as stack:
        buffer = stack.enter_context(Buffer(dist.group.WORLD, case.num_nvl_bytes, device=case.device, node=node))
        work = prepare(case, rank, buffer)
        known = tokenferry_calls(case, work, buffer)
        if case.mode in EXTRA_MODES:
            known |= expanded_calls(case, work, stack)
        calls = {OURS: known[case.mode]}
        if with_baseline and case.mode != "layout":
            calls[BASELINE] = baseline_calls(case, work)[case.mode]
            check_agreement(case, rank, calls[OURS](), calls[BASELINE]())
        times = _time(clock, calls, case.calls_per_iteration, budget)
        assert buffer.runtime is not None
        heap_bytes = buffer.runtime.allocated_bytes()
    return RankResult(times, *count_traffic(work.is_token_in_rank, rank, case.row_bytes()), heap_bytes)


def check_agreement(case: Case, rank: int, ours: Result, theirs: Result) -> None:
    """Compare two results bit for bit.

    Raises:
        BenchError: they differ.
    """
    equal = ours.counts == theirs.counts and len(ours.tensors) == len(theirs.tensors)
    for mine, other in zip(ours.tensors, theirs.tensors, strict=False):
        same_kind = mine.dtype == other.dtype and mine.shape == other.shape
        equal &= same_kind and torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
    if not equal:
        raise BenchError(f"{ALL_MODES[case.mode]}: rank {rank} got other results from {OURS} than from {BASELINE}")


def _time(clock: Clock, calls: dict[str, Call], repeats: int, budget: Budget) -> dict[str, list[float]]:
    """Time the contenders in turn, each for a block of iterations behind calls that are not timed.

    Several blocks, so that what disturbs the machine meets both; blocks, because each contender leaves its own mark
    on the memory that the system has at hand, and a program uses one of them only.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    wanted: dict[str, int] = {}
    for block in range(1, _BLOCKS + 1):
        for name, call in calls.items():
            warm_up = [clock.time(call) for _ in range(_WARM_UPS)]
            if name not in wanted:
                wanted[name] = budget.iterations or _iterations_for(budget.seconds, repeats * warm_up[-1])
            while len(times[name]) < wanted[name] * block // _BLOCKS:
                times[name].append(clock.time(partial(_repeat, call, repeats)) / repeats)
    return times


def _iterations_for(budget: float, seconds: float) -> int:
    """How many iterations of ``seconds`` on this rank fit a budget; the same number on all ranks."""
    slowest = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return min(max(math.ceil(budget / float(slowest)), _FEWEST_ITERATIONS), _MOST_ITERATIONS)


def _repeat(call: Call, repeats: int) -> object:
    for _ in range(repeats - 1):
        call()
    return call()


def _columns(rows: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    return [rows] if isinstance(rows, torch.Tensor) else list(rows)
