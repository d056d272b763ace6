"""Cases of dispatch and combine that every rank derives alike from a seed, and checks against the oracle.

The functions here run on the ranks. Rows are random bytes, so every bit pattern of a dtype travels; fresh memory is
poisoned, so an element that nobody writes shows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests import oracle
from tokenferry import Buffer, DispatchHandle

TIMEOUT = 30.0
"""Seconds that a rank waits for its peers; long enough for a loaded machine."""

ROUTINGS = (
    "random",
    "duplicates",
    "sparse",
    "nothing",
    "one_rank",
    "one_expert",
    "own",
    "others",
    "all",
    "second_half",
)
X_LAYOUTS = ("rows", "every_other", "columns", "offset", "broadcast")
SCALE_LAYOUTS = ("rows", "columns", "padded_columns", "every_other", "broadcast")
BIASES = ("none", "one", "two", "second")
COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Case:
    """One set of inputs for all ranks. Rank r has ``tokens[r % len(tokens)]`` tokens."""

    tokens: tuple[int, ...] = (7,)
    row_bytes: int = 128
    dtype: torch.dtype = torch.bfloat16
    num_topk: int = 3
    local_experts: int = 2
    routing: str = "random"
    x_layout: str = "rows"
    scales: torch.dtype | None = None
    scale_columns: int = 1
    scale_layout: str = "rows"
    alignment: int = 1
    spare_rows: int = 0
    combine_dtype: torch.dtype = torch.bfloat16
    combine_bytes: int = 128
    bias: str = "none"
    seed: int = 0
    num_nodes: int = 1


def same(actual: object, expected: torch.Tensor, what: str) -> None:
    """Assert that two tensors are equal bit for bit, and that ``actual`` is packed row by row."""
    assert isinstance(actual, torch.Tensor), f"{what}: {type(actual).__name__}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {list(actual.shape)}, not {list(expected.shape)}"
    assert actual.is_contiguous(), f"{what}: strides {actual.stride()}"
    if actual.numel() == 0:
        return
    got, wanted = bits(actual), bits(expected)
    wrong = (got != wanted).any(1).nonzero().flatten().tolist()
    assert not wrong, f"{what}: rows {wrong[:8]} of {len(got)} differ: {actual[wrong[0]]}, not {expected[wrong[0]]}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, bytes] of a tensor that is not empty."""
    packed = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
    return packed.flatten().view(torch.uint8).view(tensor.size(0), -1)


@contextmanager
def poisoned_memory() -> Iterator[set[int]]:
    """Let every fresh tensor start as NaN, or as a large integer; yields the addresses of those that did."""
    addresses: set[int] = set()

    def poisoning(create: Any) -> Any:
        def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = create(*args, **kwargs)
            if tensor.device.type == "cpu" and tensor.numel():
                poison = 255 if tensor.is_floating_point() else 0x5A
                tensor.untyped_storage().fill_(poison)  # type: ignore[attr-defined]
                addresses.add(tensor.data_ptr())
            return tensor

        return poisoned

    with (
        mock.patch.object(torch, "empty", poisoning(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoning(torch.empty_like)),
        mock.patch.object(torch, "empty_strided", poisoning(torch.empty_strided)),
        mock.patch.object(torch.Tensor, "new_empty", poisoning(torch.Tensor.new_empty)),
    ):
        yield addresses


@contextmanager
def filled_memory() -> Iterator[None]:
    """Let every fresh tensor start as NaN, or as the largest integer: torch's own way, on any device."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def generator(case: Case, rank: int, salt: int) -> torch.Generator:
    """A generator for one of the random tensors of a rank."""
    return torch.Generator().manual_seed(((case.seed * 64 + rank) * 16 + salt) % 2**63)


def random_bytes(shape: tuple[int, int], dtype: torch.dtype, source: torch.Generator) -> torch.Tensor:
    """[rows, width] of random bits."""
    rows, width = shape
    return torch.randint(0, 256, (rows, width * dtype.itemsize), dtype=torch.uint8, generator=source).view(dtype)


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (one row of them, if ``layout`` is "broadcast") under other strides."""
    rows, width = values.shape
    if layout == "columns":
        return values.t().contiguous().t()
    if layout == "padded_columns":
        return torch.cat([values, values[:3]]).t().contiguous().t()[:rows]
    if layout == "every_other":
        return torch.stack([values, values], 2).view(rows, 2 * width)[:, ::2]
    if layout == "offset":
        return torch.cat([values.flatten()[:1], values.flatten()])[1:].view(rows, width) if rows else values
    if layout == "broadcast":
        return values[:1].expand(rows, width) if rows else values.new_zeros(1, width)[0].expand(0, width)
    return values


def choices(case: Case, rank: int, num_ranks: int) -> torch.Tensor:
    """int64 [T, K]: the expert ids that a rank's tokens choose."""
    shape = (case.tokens[rank % len(case.tokens)], case.num_topk)
    local, source = case.local_experts, generator(case, rank, 1)
    num_experts = num_ranks * local
    ids = torch.randint(0, num_experts, shape, generator=source)
    coin = torch.rand(shape, generator=source)
    match case.routing:
        case "random" if case.num_topk <= num_experts:
            return torch.rand(shape[0], num_experts, generator=source).argsort(1)[:, : case.num_topk].contiguous()
        case "duplicates":
            return ids % min(3, num_experts)
        case "sparse":
            return ids.masked_fill(coin < 0.6, -1)
        case "nothing":
            return ids.fill_(-1)
        case "one_rank":
            return ids % local + (num_ranks - 1) * local
        case "one_expert":
            return ids.fill_(num_experts // 2)
        case "own":
            return ids % local + rank * local
        case "others":
            return torch.where(ids // local == rank, -1, ids)
        case "all":
            return torch.arange(shape[1]).expand(shape) % num_ranks * local + ids % local
        case "grouped":  # a token chooses among the experts of two ranks
            groups = torch.rand(shape[0], num_ranks, generator=source).argsort(1)[:, :2]
            return groups.gather(1, ids % groups.size(1)) * local + ids // num_ranks % local
        case "last_node":  # all tokens go to it
            of_node = num_experts // case.num_nodes
            return ids % of_node + num_experts - of_node
        case "silent_node":  # ranks of the first node choose nothing, and nobody chooses them
            of_node = num_experts // case.num_nodes
            return ids.fill_(-1) if rank * local < of_node else ids % (num_experts - of_node) + of_node
        case "second_half":
            ids[: shape[0] // 2] = -1
    return ids


def make_inputs(case: Case, rank: int, num_ranks: int, device: str = "cpu") -> oracle.Inputs:
    """What a rank brings to the dispatch of a case."""
    ids = choices(case, rank, num_ranks)
    num_tokens = ids.size(0)
    x = random_bytes((num_tokens, case.row_bytes // case.dtype.itemsize), case.dtype, generator(case, rank, 2))
    scales = None
    if case.scales is not None:
        values = random_bytes((num_tokens, case.scale_columns), case.scales, generator(case, rank, 3))
        scales = laid_out(values.to(device), case.scale_layout)
    weights = torch.randn(ids.shape, generator=generator(case, rank, 4))
    return oracle.Inputs(laid_out(x.to(device), case.x_layout), scales, ids.to(device), weights.to(device))


class Scenario:
    """A case on one rank: its inputs, what the oracle says, and the calls with their checks."""

    def __init__(self, case: Case, rank: int, num_ranks: int, device: str = "cpu") -> None:
        self.case, self.rank, self.num_ranks, self.device = case, rank, num_ranks, device
        self.num_experts = num_ranks * case.local_experts
        self.inputs = [make_inputs(case, peer, num_ranks) for peer in range(num_ranks)]
        self.given = make_inputs(case, rank, num_ranks, device)
        self.wanted = oracle.dispatch(self.inputs, self.num_experts, rank, case.alignment)
        self.num_rows = oracle.num_received(self.inputs, self.num_experts)
        self.rows_of = [
            self._randn(peer, case.combine_bytes // case.combine_dtype.itemsize, 5).to(case.combine_dtype)
            for peer in range(num_ranks)
        ]
        self.weights_of = [self._randn(peer, case.num_topk, 6) for peer in range(num_ranks)]
        num_biases = {"none": 0, "two": 2}.get(case.bias, 1)
        shape = (self.given.x.size(0), self.rows_of[rank].size(1))
        self.biases = [
            torch.randn(shape, generator=generator(case, rank, 7 + i)).to(case.combine_dtype)
            for i in range(num_biases)
        ]
        self.own_rows = self.rows_of[rank].to(device)
        self.own_weights = self.weights_of[rank].to(device)
        self.wanted_combined = oracle.combine(self.inputs, self.num_experts, rank, self.rows_of, self.biases)
        self.wanted_weights = oracle.combine(self.inputs, self.num_experts, rank, self.weights_of)

    def _randn(self, peer: int, width: int, salt: int) -> torch.Tensor:
        return torch.randn(self.num_rows[peer], width, generator=generator(self.case, peer, salt))

    @property
    def x(self) -> Any:
        """What to pass as ``x``."""
        return self.given.x if self.given.scales is None else (self.given.x, self.given.scales)

    @property
    def bias(self) -> Any:
        """What to pass as ``bias``."""
        biases = [bias.to(self.device) for bias in self.biases]
        match self.case.bias:
            case "one":
                return biases[0]
            case "two":
                return tuple(biases)
            case "second":
                return (None, biases[0])
        return None

    def layout_arguments(self, buffer: Buffer) -> dict[str, Any]:
        """The arguments of a dispatch that come from ``get_dispatch_layout``."""
        per_rank, per_node, per_expert, member, _ = buffer.get_dispatch_layout(self.given.topk_idx, self.num_experts)
        return {
            "num_tokens_per_rank": per_rank,
            "num_tokens_per_rdma_rank": per_node,
            "num_tokens_per_expert": per_expert,
            "is_token_in_rank": member,
        }

    def topk_arguments(self) -> dict[str, Any]:
        """The top-k arguments of a dispatch."""
        return {"topk_idx": self.given.topk_idx, "topk_weights": self.given.topk_weights}

    def dispatch(self, buffer: Buffer, *, topk: bool = True, **options: Any) -> tuple[Any, ...]:
        """A dispatch with fresh counts."""
        arguments = self.layout_arguments(buffer) | (self.topk_arguments() if topk else {})
        return buffer.dispatch(self.x, expert_alignment=self.case.alignment, **arguments, **options)

    def combine(self, buffer: Buffer, handle: Any, *, weights: bool = True, **options: Any) -> tuple[Any, ...]:
        """A combine of this scenario's rows, with top-k weights or without."""
        padding = self.rows_of_handle(handle) - self.num_rows[self.rank]
        rows, weight_rows = (
            torch.cat([t, t.new_full((padding, t.size(1)), torch.nan)]) for t in (self.own_rows, self.own_weights)
        )
        return buffer.combine(rows, handle, weight_rows if weights else None, bias=self.bias, **options)

    def rows_of_handle(self, handle: Any) -> int:
        """Rows of the outputs that the handle belongs to."""
        return len(handle[3])

    def check_rows(self, recv_x: Any) -> None:
        """Compare received rows (and scales) as far as they are defined."""
        num_rows = self.num_rows[self.rank]
        if self.wanted.scales is None:
            same(recv_x[:num_rows], self.wanted.x, "recv_x")
            return
        assert isinstance(recv_x, tuple)
        assert len(recv_x) == 2
        same(recv_x[0][:num_rows], self.wanted.x, "recv_x[0]")
        same(recv_x[1][:num_rows], self.wanted.scales, "recv_x[1]")

    def check_handle(self, handle: Any, num_worst_tokens: int = 0) -> None:
        """Compare a handle element by element."""
        assert isinstance(handle, tuple)
        assert len(handle) == 6
        num_rows = self.num_rows[self.rank]
        for name, element in zip(DispatchHandle._fields, handle, strict=True):
            if name == "recv_src_idx" and num_worst_tokens:
                assert len(element) == num_worst_tokens
                assert (element[num_rows:] == -1).all()
                element = element[:num_rows]
            same(element, getattr(self.wanted, name), name)

    def check_dispatch(self, result: tuple[Any, ...], *, topk: bool = True, num_worst_tokens: int = 0) -> None:
        """Compare everything that a dispatch with fresh counts returned."""
        recv_x, ids, weights, per_expert, handle, event = result
        num_rows = self.num_rows[self.rank]
        total = num_worst_tokens or num_rows
        for part in recv_x if isinstance(recv_x, tuple) else (recv_x,):
            assert part.size(0) == total
        self.check_rows(recv_x)
        if topk:
            assert (len(ids), len(weights)) == (total, total)
            same(ids[:num_rows], self.wanted.topk_idx, "recv_topk_idx")
            same(weights[:num_rows], self.wanted.topk_weights, "recv_topk_weights")
            assert (ids[num_rows:] == -1).all()
            assert (weights[num_rows:] == 0).all()
        else:
            assert ids is None
            assert weights is None
        assert per_expert == ([] if num_worst_tokens else self.wanted.num_per_expert)
        assert all(type(count) is int for count in per_expert)
        self.check_handle(handle, num_worst_tokens)
        assert event.event is None

    def check_cached(self, result: tuple[Any, ...]) -> None:
        """Compare everything that a dispatch along a handle returned."""
        recv_x, *nothing, event = result
        assert nothing == [None] * 4
        self.check_rows(recv_x)
        assert event.event is None

    def check_combine(self, result: tuple[Any, ...], *, weights: bool = True) -> None:
        """Compare everything that a combine returned."""
        combined, combined_weights, event = result
        same(combined, self.wanted_combined, "combined_x")
        if weights:
            same(combined_weights, self.wanted_weights, "combined_topk_weights")
        else:
            assert combined_weights is None
        assert event.event is None

    def check_all(self, buffer: Buffer, **options: Any) -> None:
        """Every kind of call on this scenario, each against the oracle."""
        poisoning = poisoned_memory if self.device == "cpu" else filled_memory
        with poisoning() as poisoned:
            result = self.dispatch(buffer, **options)
        handle = result[4]
        self.check_dispatch(result)
        if poisoned is not None:
            outputs = [*(result[0] if isinstance(result[0], tuple) else (result[0],)), *result[1:3]]
            assert all(output.data_ptr() in poisoned for output in outputs if output.numel())
        with poisoning():
            self.check_cached(buffer.dispatch(self.x, handle=handle, **options))
            result = self.dispatch(buffer, topk=False, **options)
            self.check_dispatch(result, topk=False)
            self.check_combine(self.combine(buffer, result[4], weights=False, **options), weights=False)
            num_worst_tokens = max(1, self.num_rows[self.rank] + self.case.spare_rows)
            result = self.dispatch(buffer, num_worst_tokens=num_worst_tokens, **options)
            self.check_dispatch(result, num_worst_tokens=num_worst_tokens)
            cached = buffer.dispatch(self.x, handle=result[4], **options)
            assert (cached[0][0] if isinstance(cached[0], tuple) else cached[0]).size(0) == num_worst_tokens
            self.check_cached(cached)
            self.check_combine(self.combine(buffer, result[4], **options))
            self.check_combine(self.combine(buffer, handle, **options))
        self.check_handle(handle)


def check_case(rank: int, num_ranks: int, case: Case, num_nvl_bytes: int = 0, device: str = "cpu") -> None:
    """Run every kind of call on one case, on a Buffer of its own."""
    with Buffer(dist.group.WORLD, num_nvl_bytes, timeout=TIMEOUT, device=device) as buffer:
        Scenario(case, rank, num_ranks, device).check_all(buffer)


def check_small_stage(rank: int, num_ranks: int, case: Case, num_nvl_bytes: int) -> None:
    """A dispatch and a combine of one case, with a short deadline: a stage that is too small must not block."""
    with Buffer(dist.group.WORLD, num_nvl_bytes, timeout=15.0) as buffer, poisoned_memory():
        check_works(buffer, case)


def check_works(buffer: Buffer, case: Case | None = None, device: str = "cpu") -> None:
    """A dispatch and a combine with fresh counts on any Buffer."""
    scenario = Scenario(case or Case(), buffer.rank, buffer.group_size, device)
    result = scenario.dispatch(buffer)
    scenario.check_dispatch(result)
    scenario.check_combine(scenario.combine(buffer, result[4]))


def segments() -> list[str]:
    """Shared-memory segments of tokenferry that this process has mapped; "(deleted)" is what has no name any more."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line.partition("/dev/shm/")[2] for line in lines if "/tokenferry-" in line]


def named_segments() -> list[str]:
    """Those of them that anybody could still open."""
    return [name for name in segments() if not name.endswith("(deleted)")]


def wait_for(condition: Any, seconds: float = 5.0) -> bool:
    """Whether a condition comes true within some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
