"""The data plane of CPU ranks: whole-row copies between tensors and the stages of the ranks, in torch.

Both operations stage their rows, publish them as one or more messages on the heap's ring, and read those of the
peers while their own are being read (``exchange.py``). The first message of an operation also carries its
signature, so that all ranks agree, or all step back, before any output is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from tokenferry.dataplane import (
    DispatchExchange,
    Layout,
    LowLatencyCombinePlan,
    LowLatencyDispatchPlan,
    OperationKind,
    Outputs,
    Part,
    Pending,
    ReducePlan,
    Relays,
    ScaleFormat,
    SendPlan,
    Signature,
)
from tokenferry.dataplane.cpu.combine import Combine, sum_rows
from tokenferry.dataplane.cpu.dispatch import Dispatch
from tokenferry.dataplane.cpu.exchange import least_room
from tokenferry.dataplane.cpu.low_latency import CombineReceive, DispatchReceive, PendingReceives, Receive
from tokenferry.dataplane.cpu.pages import advise_huge_pages
from tokenferry.errors import BufferStateError
from tokenferry.memory.heap import Heap

_CPU = torch.device("cpu")


class CpuDataPlane:
    """The operations of CPU ranks over a heap in shared memory; see :class:`tokenferry.dataplane.DataPlane`."""

    values_at_hand = True
    least_part_bytes = 8 << 20

    def __init__(self, heap: Heap) -> None:
        self.heap = heap
        self._pending = PendingReceives(heap)

    @property
    def epoch(self) -> int:
        """See :attr:`tokenferry.dataplane.DataPlane.epoch`."""
        return self.heap.epoch

    def layout(self, topk_idx: torch.Tensor, num_experts: int, num_ranks: int, *, expands: bool = False) -> Layout:
        """See :meth:`tokenferry.dataplane.DataPlane.layout`."""
        per_rank = num_experts // num_ranks
        absent = topk_idx < 0
        member = torch.zeros(topk_idx.size(0), num_ranks + 1, dtype=torch.bool, device=_CPU)
        rank_of = topk_idx.div(per_rank, rounding_mode="floor").masked_fill_(absent, num_ranks)
        member.scatter_(1, rank_of, True)
        member = member[:, :num_ranks].contiguous()
        return Layout(
            num_tokens_per_rank=member.sum(0, dtype=torch.int32),
            num_tokens_per_expert=torch.bincount(topk_idx[~absent], minlength=num_experts).to(torch.int32),
            is_token_in_rank=member,
        )

    @contextmanager
    def dispatch(self, signature: Signature, plan: SendPlan) -> Iterator[DispatchExchange]:
        """See :meth:`tokenferry.dataplane.DataPlane.dispatch`."""
        self._begin_with_all()
        with self.heap.operation("dispatch") as operation:
            exchange = Dispatch(self.heap, operation, signature, plan)
            exchange.agree()
            yield exchange

    def dispatch_along(self, signature: Signature, plan: SendPlan, outputs: Outputs) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.dispatch_along`."""
        with self.dispatch(signature, plan) as exchange:
            exchange.pull(outputs)

    def pull_reduce(self, signature: Signature, plan: ReducePlan, outs: Sequence[torch.Tensor]) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.pull_reduce`."""
        self._begin_with_all()
        name = "barrier" if signature.operation == OperationKind.BARRIER else "combine"
        with self.heap.operation(name) as operation:
            exchange = Combine(self.heap, operation, signature, plan, outs)
            exchange.agree()
            exchange.pull_reduce()

    def sum_rows(
        self, parts: Sequence[Part], biases: Sequence[torch.Tensor], out: torch.Tensor, num_sms: int = 0
    ) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.sum_rows`."""
        sum_rows(parts, biases, out)

    def clear_unused(self, outputs: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.clear_unused`."""
        num_used = int((places >= 0).sum())
        if num_used < len(places):
            for rows in outputs:
                rows[num_used:].view(torch.uint8).zero_()

    def check(self) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.check`."""
        self.heap.check_usable()

    def postpone_input_errors(self, postponed: bool) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.postpone_input_errors`: they are raised where they happen."""

    def bad_input(self) -> torch.Tensor | None:
        """See :meth:`tokenferry.dataplane.DataPlane.bad_input`."""
        return None

    def forgive(self) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.forgive`."""

    def has_room(self, row_bytes: int) -> bool:
        """See :meth:`tokenferry.dataplane.DataPlane.has_room`."""
        return self.heap.can_stage(least_room(row_bytes, self.heap.num_ranks))

    def give_up(self, reason: str) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.give_up`."""
        self.heap.fail(reason)

    def warm(self, plans: Sequence[SendPlan], reduces: Sequence[Sequence[torch.Tensor]], num_experts: int) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.warm`: nothing takes long the first time."""

    def _begin_with_all(self) -> None:
        """Finish what was sent before; an operation of all ranks reads the rings from where that ends."""
        if self.heap.masked():
            listed = ", ".join(str(rank) for rank in sorted(self.heap.masked()))
            raise BufferStateError(f"rank {listed} masked: only low-latency operations go on without it")
        self._pending.finish()

    def low_latency_tables(
        self, num_ranks: int, num_local_experts: int, num_max_tokens: int, num_topk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_tables`."""
        return (
            torch.empty((num_local_experts, num_ranks * num_max_tokens), dtype=torch.int32, device=_CPU),
            torch.empty((num_local_experts, num_ranks), dtype=torch.int64, device=_CPU),
            torch.empty(num_local_experts, dtype=torch.int32, device=_CPU),
        )

    def warm_low_latency(
        self, scale_format: ScaleFormat, num_max_tokens: int, hidden: int, num_topk: int, num_local_experts: int,
        relays: Relays | None,
    ) -> None:  # fmt: skip
        """See :meth:`tokenferry.dataplane.DataPlane.warm_low_latency`: nothing takes long the first time."""

    def advance(self) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.advance`."""
        with self.heap.guarded():
            self._pending.advance()

    def low_latency_dispatch(self, signature: Signature, plan: LowLatencyDispatchPlan) -> Pending:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_dispatch`."""
        with self.heap.operation("low_latency_dispatch") as operation:
            return self._sent(DispatchReceive(self.heap, operation, signature, plan, self._pending))

    def low_latency_combine(self, signature: Signature, plan: LowLatencyCombinePlan) -> Pending:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_combine`."""
        with self.heap.operation("low_latency_combine") as operation:
            return self._sent(CombineReceive(self.heap, operation, signature, plan, self._pending))

    def _sent(self, receive: Receive) -> Pending:
        self._pending.add(receive)
        return _Finish(self._pending, receive)

    def set_masked(self, rank: int, masked: bool) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.set_masked`."""
        self.heap.set_masked([rank], masked)

    def write_mask(self, status: torch.Tensor) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.write_mask`."""
        masked = self.heap.masked()
        status.copy_(torch.tensor([rank in masked for rank in range(self.heap.num_ranks)], device=_CPU))

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`tokenferry.dataplane.DataPlane.empty_rows`."""
        rows = torch.empty((num_rows, width), dtype=dtype, device=_CPU)
        advise_huge_pages(rows)
        return rows

    def empty_strided(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`tokenferry.dataplane.DataPlane.empty_strided`."""
        slabs = torch.empty_strided(shape, strides, dtype=dtype, device=_CPU)
        advise_huge_pages(slabs)
        return slabs


class _Finish(NamedTuple):
    """A sent operation; see :class:`tokenferry.dataplane.Pending`."""

    pending: PendingReceives
    receive: Receive

    def written(self) -> tuple[torch.Tensor, ...]:
        return ()

    def finish(self) -> None:
        self.pending.finish(self.receive)
