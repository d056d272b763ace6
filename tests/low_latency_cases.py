"""Cases of the low-latency pair that every rank derives alike from a seed, and checks against the oracle.

The functions here run on the ranks. An expert multiplies its rows by a power of two of its own, so that each row
of each expert is known to the rank it returns to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tests import low_latency_oracle as oracle
from tests.cases import TIMEOUT, poisoned_memory
from tokenferry import Buffer

ROUTINGS = ("random", "duplicates", "sparse", "nothing", "odd_ranks_nothing", "one_expert", "distinct", "own")
FORMATS: dict[str, dict[str, bool]] = {
    "bf16": {"use_fp8": False},
    "plain": {"use_fp8": True},
    "rounded": {"use_fp8": True, "round_scale": True},
    "ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


@dataclass(frozen=True)
class Case:
    """One set of inputs for all ranks. Rank r has ``tokens[r % len(tokens)]`` tokens, N is the most, or more."""

    tokens: tuple[int, ...] = (5,)
    spare: int = 0
    hidden: int = 128
    num_topk: int = 3
    local_experts: int = 2
    routing: str = "random"
    format: str = "bf16"
    seed: int = 0


def make_buffer(**options: Any) -> Buffer:
    return Buffer(dist.group.WORLD, low_latency_mode=True, **{"timeout": TIMEOUT, **options})


def factor_of(expert: int) -> float:
    """What an expert multiplies its rows by."""
    return float(2.0 ** (expert % 7 - 3))


def _generator(case: Case, rank: int, salt: int) -> torch.Generator:
    return torch.Generator().manual_seed(((case.seed * 64 + rank) * 16 + salt) % 2**63)


def _ids(case: Case, rank: int, num_ranks: int, num_tokens: int, most: int) -> torch.Tensor:
    """int64 [T, K] with no more than ``most`` choices of any expert."""
    num_experts, source = num_ranks * case.local_experts, _generator(case, rank, 1)
    shape = (num_tokens, case.num_topk)
    ids = torch.randint(0, num_experts, shape, generator=source)
    if case.routing == "duplicates":
        ids = ids[:, :1].expand(shape).clone()
        ids[:, case.num_topk // 2 + 1 :] = torch.randint(0, num_experts, shape, generator=source)[:, :1]
    elif case.routing == "sparse":
        ids[torch.rand(shape, generator=source) < 0.6] = -1
    elif case.routing == "nothing" or (case.routing == "odd_ranks_nothing" and rank % 2):
        ids.fill_(-1)
    elif case.routing == "one_expert":
        ids[:, 1:], ids[:, 0] = -1, num_experts - 1
    elif case.routing == "distinct":
        ids = torch.rand(num_tokens, max(num_experts, case.num_topk), generator=source).argsort(1)
        ids = ids[:, : case.num_topk].masked_fill(ids[:, : case.num_topk] >= num_experts, -1).contiguous()
    elif case.routing == "own":
        ids = rank * case.local_experts + ids % case.local_experts
    counts = [0] * num_experts
    for token in range(num_tokens):
        for choice, expert in enumerate(ids[token].tolist()):
            if expert >= 0:
                counts[expert] += 1
                if counts[expert] > most:
                    ids[token, choice] = -1
    return ids


class Scenario:
    """The inputs of all ranks for a case, and what this rank must get. Ranks in ``masked`` count as absent.

    Tensors go to ``device`` for the calls, and come back to be checked.
    """

    def __init__(
        self, case: Case, rank: int, num_ranks: int, masked: tuple[int, ...] = (), device: str = "cpu"
    ) -> None:
        self.device = device
        self.case, self.rank, self.num_ranks, self.masked = case, rank, num_ranks, masked
        self.num_experts = num_ranks * case.local_experts
        tokens = [case.tokens[r % len(case.tokens)] for r in range(num_ranks)]
        self.most = max([1, *tokens]) + case.spare
        self.all_ids = [_ids(case, r, num_ranks, tokens[r], self.most) for r in range(num_ranks)]
        self.all_x = [
            (torch.randn(tokens[r], case.hidden, generator=_generator(case, r, 2)) * 4 - 1).to(torch.bfloat16)
            for r in range(num_ranks)
        ]
        self.x, self.ids = self.all_x[rank], self.all_ids[rank]
        self.weights = torch.rand(self.ids.shape, generator=_generator(case, rank, 3)) * 2 - 0.5
        self.weights[torch.rand(self.ids.shape, generator=_generator(case, rank, 4)) < 0.1] = 0.0
        present = [ids if r not in masked else ids[:0] for r, ids in enumerate(self.all_ids)]
        self.rows = oracle.received_rows(present, self.num_experts, rank)
        self.codes: list[torch.Tensor] = []
        self.scales: list[torch.Tensor] = []
        if case.format != "bf16":
            for x in self.all_x:
                codes, scales = oracle.quantised(x, case.format != "plain")
                self.codes.append(codes)
                self.scales.append(scales)

    def dispatch(self, buffer: Buffer, **options: Any) -> tuple[Any, ...]:
        """Dispatch what this rank has; the arguments are overwritten as soon as the call returns."""
        x, ids = self.x.to(self.device, copy=True), self.ids.to(self.device, copy=True)
        result = buffer.low_latency_dispatch(
            x, ids, self.most, self.num_experts, **{**FORMATS[self.case.format], **options}
        )
        x.fill_(7.0)
        ids.fill_(0)
        return result

    def check_dispatch(self, result: tuple[Any, ...]) -> None:
        """Every row, scale, count and index, shapes and strides."""
        received, count, handle, _, _ = result
        num_local, slab, hidden = self.case.local_experts, self.num_ranks * self.most, self.case.hidden
        assert len(result) == 5
        fp8 = self.case.format != "bf16"
        data, scales = received if fp8 else (received, None)
        assert isinstance(received, tuple) == fp8
        assert data.shape == (num_local, slab, hidden)
        assert data.dtype == (torch.float8_e4m3fn if fp8 else torch.bfloat16)
        assert data.is_contiguous()
        assert count.dtype == torch.int32
        assert count.tolist() == [len(rows) for rows in self.rows]
        src_info, ranges, most, known_hidden, num_experts = handle
        assert (most, known_hidden, num_experts) == (self.most, hidden, self.num_experts)
        assert src_info.dtype == torch.int32
        assert src_info.shape == (num_local, slab)
        assert ranges.dtype == torch.int64
        assert ranges.tolist() == oracle.layout_range(self.rows, self.num_ranks)
        bits = (data.view(torch.uint8) if fp8 else data.view(torch.int16)).cpu()
        src_info = src_info.cpu()
        sources = self.codes if fp8 else [x.view(torch.int16) for x in self.all_x]
        for expert, rows in enumerate(self.rows):
            assert src_info[expert, : len(rows)].tolist() == [token for _, token in rows]
            for slot, (source, token) in enumerate(rows):
                assert torch.equal(bits[expert, slot], sources[source][token]), (expert, slot, source, token)
        if scales is not None:
            packed = self.case.format == "ue8m0"
            wanted = [oracle.packed_ue8m0(s) if packed else s for s in self.scales]
            columns = wanted[0].size(1)
            assert scales.dtype == (torch.int32 if packed else torch.float32)
            assert scales.shape == (num_local, slab, columns)
            assert scales.stride() == (slab * columns, 1, slab)
            scales = scales.cpu()
            for expert, rows in enumerate(self.rows):
                for slot, (source, token) in enumerate(rows):
                    assert torch.equal(scales[expert, slot], wanted[source][token])

    def expert_rows(self, result: tuple[Any, ...]) -> torch.Tensor:
        """bfloat16 [L, R * N, H]: what the experts make of the received rows, NaN past the last."""
        received, count = result[0], result[1]
        if self.case.format == "bf16":
            rows = received.cpu().float()
        else:
            data, scales = (tensor.cpu() for tensor in received)
            if self.case.format == "ue8m0":
                exponents = torch.stack([scales >> 8 * byte & 0xFF for byte in range(4)], 3).flatten(2)
                scales = (exponents[..., : self.case.hidden // 128] << 23).view(torch.float32)
            rows = data.float() * scales.repeat_interleave(128, 2)
        out = torch.full(rows.shape, float("nan"), dtype=torch.bfloat16)
        for expert, used in enumerate(count.tolist()):
            factor = factor_of(self.rank * self.case.local_experts + expert)
            out[expert, :used] = (rows[expert, :used] * factor).to(torch.bfloat16)
        return out

    def sent_row(self, source: int, token: int) -> torch.Tensor:
        """float32 [H]: what arrives of a row."""
        if self.case.format == "bf16":
            return self.all_x[source][token].float()
        return oracle.dequantised(self.codes[source][token, None], self.scales[source][token, None])[0]

    def expected(self, ids: torch.Tensor | None = None, *, by_rank: bool = False) -> torch.Tensor:
        """What combine must return, for the dispatched ids or some of them."""
        ids = self.ids if ids is None else ids
        row_of = {
            (expert, token): (self.sent_row(self.rank, token) * factor_of(expert)).to(torch.bfloat16)
            for token, row in enumerate(self.ids.tolist())
            for expert in row
            if expert >= 0 and expert // self.case.local_experts not in self.masked
        }
        if by_rank:
            return oracle.combined_by_rank(ids, self.weights, row_of, self.case.hidden, self.case.local_experts)
        return self.combined(ids, row_of)

    def combined(self, ids: torch.Tensor, row_of: dict[tuple[int, int], torch.Tensor]) -> torch.Tensor:
        """bfloat16 [T, H]: the sums over choices, from the experts' rows by (expert, token)."""
        return oracle.combined(ids, self.weights, row_of, self.case.hidden)

    def combine(self, buffer: Buffer, result: tuple[Any, ...], **options: Any) -> tuple[Any, ...]:
        """Combine what the experts make of a dispatch; the rows are overwritten as soon as the call returns."""
        rows = self.expert_rows(result).to(self.device)
        ids, weights = self.ids.to(self.device), self.weights.to(self.device)
        answer = buffer.low_latency_combine(rows, ids, weights, result[2], **options)
        rows.fill_(3.0)
        return answer

    def check_combine(
        self, answer: tuple[Any, ...], ids: torch.Tensor | None = None, *, by_rank: bool = False
    ) -> None:
        """``by_rank``: each rank has summed its rows first."""
        combined = answer[0].cpu()
        assert len(answer) == 3
        expected = self.expected(ids, by_rank=by_rank)
        assert combined.dtype == torch.bfloat16
        assert combined.shape == expected.shape
        assert torch.equal(combined, expected), (combined, expected)

    def fewer_ids(self) -> torch.Tensor:
        """The dispatched ids with further -1."""
        drop = torch.rand(self.ids.shape, generator=_generator(self.case, self.rank, 5)) < 0.4
        return self.ids.masked_fill(drop, -1)


def check_case(buffer: Buffer, scenario: Scenario, *, by_rank: bool = False) -> None:
    """Dispatch, and combine in every way there is."""
    case, ids, weights = scenario.case, scenario.ids, scenario.weights.to(scenario.device)
    result = scenario.dispatch(buffer)
    assert result[3].event is None
    assert result[4] is None
    scenario.check_dispatch(result)
    scenario.check_combine(scenario.combine(buffer, result), by_rank=by_rank)
    out = torch.full((len(ids), case.hidden), float("nan"), dtype=torch.bfloat16, device=scenario.device)
    answer = scenario.combine(buffer, result, out=out, use_logfmt=True)
    assert answer[0] is out
    assert answer[1].event is None
    assert answer[2] is None
    scenario.check_combine(answer, by_rank=by_rank)
    fewer = scenario.fewer_ids()
    rows = buffer.get_next_low_latency_combine_buffer(result[2])
    assert rows.shape == (case.local_experts, scenario.num_ranks * scenario.most, case.hidden)
    assert rows.dtype == torch.bfloat16
    rows[:, :, :] = scenario.expert_rows(result).to(scenario.device)
    ignored = torch.zeros_like(rows)
    answer = buffer.low_latency_combine(ignored, fewer.to(scenario.device), weights, result[2], zero_copy=True)
    scenario.check_combine(answer, fewer, by_rank=by_rank)


def check_cases(rank: int, num_ranks: int, cases: list[Case], options: dict[str, Any]) -> None:
    """One Buffer, one case after the other, memory poisoned."""
    with make_buffer(**options) as buffer, poisoned_memory():
        for case in cases:
            check_case(buffer, Scenario(case, rank, num_ranks))
