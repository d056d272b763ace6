"""Ranks under the simulator whose low-latency operations go through the package's own code, down to the launches."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from tests.kernels.simulator import Simulator
from tests.kernels.world import Simulated
from tests.low_latency_cases import Scenario, factor_of
from tokenferry.dataplane import LowLatencyCombinePlan, LowLatencyDispatchPlan, Pending, Signature
from tokenferry.dataplane.cuda import low_latency as host
from tokenferry.dataplane.cuda import low_latency_programs as programs
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.dataplane.cuda.programs import Target
from tokenferry.dataplane.tensors import allocator_of
from tokenferry.modes import low_latency as mode
from tokenferry.modes.inputs import Party

CPU = torch.device("cpu")


class LowLatencyWorld:
    """R ranks.

    Args:
        monkeypatch: puts the simulated kernels in the place of the compiled ones.
        num_ranks: R.
        seed: of the scheduler.
        push_bytes: of the push area of a rank.
        most_programs: that send, and that receive, each at most, but three that send.
        modules: kernels' modules by name, to run mutants.
        options: fields of :class:`tokenferry.dataplane.cuda.low_latency.Place`.
    """

    def __init__(
        self,
        monkeypatch: Any,
        num_ranks: int,
        seed: int,
        *,
        push_bytes: int = 1 << 17,
        most_programs: int = 5,
        modules: dict[str, ModuleType] | None = None,
        max_steps: int = 600_000,
        has_fp8: bool = True,
        **options: Any,
    ) -> None:
        self.num_ranks = num_ranks
        self.simulator = Simulator(seed, max_steps=max_steps)
        monkeypatch.setattr(programs, "THREADS", 1)
        for name in ("dispatch", "combine"):
            module = (modules or {}).get(name) or getattr(programs, f"{name}_kernels")
            kernels = getattr(programs, f"_{name.upper()}")
            simulated = Simulated(self.simulator, getattr(module, name), next(iter(kernels.values())))
            monkeypatch.setattr(programs, f"_{name.upper()}", dict.fromkeys(kernels, simulated))
        for variants in (programs.dispatch, programs.combine):
            variants.cache_clear()
        heap_bytes = words.CONTROL_BYTES + push_bytes
        self.heaps = [torch.full((heap_bytes,), 0xCD, dtype=torch.uint8) for _ in range(num_ranks)]
        self.states = [torch.zeros(words.STATE_WORDS, dtype=torch.int64) for _ in range(num_ranks)]
        self.status = [torch.zeros(words.STATUS_WORDS, dtype=torch.int64) for _ in range(num_ranks)]
        self.table = torch.tensor([heap.data_ptr() for heap in self.heaps])
        place = host.Place(
            rank=0, num_ranks=num_ranks, address=0, offset=words.CONTROL_BYTES, nbytes=push_bytes,
            target=Target(num_ranks, False, 0, has_fp8), num_sms=most_programs,
            shares_gpu=True, **{"timeout": 1 << 40, "shrinks": False, "exact": False, **options},
        )  # fmt: skip
        self.buffers = []
        for rank in range(num_ranks):
            self.heaps[rank][: words.CONTROL_BYTES] = 0
            context = tuple(t.data_ptr() for t in (self.table, self.states[rank], self.status[rank]))
            low_latency = host.LowLatency(
                place._replace(rank=rank, address=self.heaps[rank].data_ptr()), context, lambda: None, lambda: False,
                lambda tensor: tensor,
            )  # fmt: skip
            self.buffers.append(SimulatedBuffer(low_latency, rank, num_ranks))

    def run(self) -> None:
        self.simulator.run()

    def code(self, rank: int) -> int:
        return int(self.status[rank][words.CODE.value])


class _Plane:
    """As much of a data plane as the mode asks for; launches are queued."""

    values_at_hand = False

    def __init__(self, low_latency: host.LowLatency, rank: int) -> None:
        self._low_latency = low_latency
        self._rank = rank
        self.signature = 0

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return poisoned(torch.empty(num_rows, width, dtype=dtype))

    def empty_strided(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.empty_rows(shape[0] * shape[1], shape[2], dtype).as_strided(shape, strides)

    def low_latency_tables(self, num_ranks: int, num_local_experts: int, num_max_tokens: int, num_topk: int) -> Any:
        tables = self._low_latency.tables(num_ranks, num_local_experts, num_max_tokens, num_topk, allocator_of(CPU))
        tables[0].untyped_storage().fill_(0x5A)
        return tables

    def low_latency_dispatch(self, signature: Signature, plan: LowLatencyDispatchPlan) -> Pending:
        return self._low_latency.dispatch(self._rank, signature._replace(handle=self.signature), plan)

    def low_latency_combine(self, signature: Signature, plan: LowLatencyCombinePlan) -> Pending:
        return self._low_latency.combine(self._rank, signature._replace(handle=self.signature), plan)


class SimulatedBuffer:
    """The low-latency methods of a Buffer, as :class:`tests.low_latency_cases.Scenario` calls them."""

    def __init__(self, low_latency: host.LowLatency, rank: int, num_ranks: int) -> None:
        self.rank = rank
        self.plane = _Plane(low_latency, rank)
        self._party = Party(self.plane, rank, num_ranks, CPU)
        self._kept: list[Any] = []

    def _hook(self, pending: Pending, is_wanted: bool) -> Any:
        return (lambda: pending.finish(self.rank)) if is_wanted else None

    def low_latency_dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, most: int, num_experts: int, *, use_fp8: bool,
        round_scale: bool = False, use_ue8m0: bool = False, return_recv_hook: bool = False, stats: Any = None,
        wait_stats: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        x, topk_idx = x.clone(), topk_idx.clone()  # the launch is only queued
        sent = mode.dispatch(
            self._party, x, topk_idx, most, num_experts, stats, wait_stats, use_fp8, round_scale, use_ue8m0,
            not return_recv_hook,
        )  # fmt: skip
        self._kept.append((x, topk_idx, sent, sent.pending.written()))
        rows = sent.x if sent.scales is None else (sent.x, sent.scales)
        return rows, sent.num_received, sent.handle, None, self._hook(sent.pending, return_recv_hook)

    def low_latency_combine(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor, handle: Any, *,
        return_recv_hook: bool = False, wait_stats: Any = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        x = x.clone()
        known = mode.check_handle(self._party, handle)
        out = torch.full((len(topk_idx), x.size(2)), torch.nan, dtype=x.dtype)
        result, pending = mode.combine(
            self._party, x, topk_idx, topk_weights, known, None, out, wait_stats, not return_recv_hook
        )
        self._kept.append((x, topk_idx, topk_weights, handle, pending, pending.written()))
        return result, None, self._hook(pending, return_recv_hook)


def poisoned(tensor: torch.Tensor) -> torch.Tensor:
    tensor.view(torch.uint8).fill_(0xFF)
    return tensor


def known_expert_rows(scenario: Scenario) -> torch.Tensor:
    """What the experts make of the rows that the oracle says they get, NaN past the last."""
    case = scenario.case
    shape = (case.local_experts, scenario.num_ranks * scenario.most, case.hidden)
    out = torch.full(shape, torch.nan, dtype=torch.bfloat16)
    for expert, rows in enumerate(scenario.rows):
        for slot, (source, token) in enumerate(rows):
            out[expert, slot] = scenario.sent_row(source, token) * factor_of(
                scenario.rank * case.local_experts + expert
            )
    return out
