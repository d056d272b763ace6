"""The data plane of CUDA ranks: rows are pulled over NVLink, from the tensors where they lie into their final rows.

Dispatch is two kernels, ``notify`` and ``dispatch``; a cached dispatch and a combine are one. The kernels agree,
wait, signal and release among themselves (``kernels/``); the host launches them, waits only where the shape of an
output depends on counts, and looks for reported errors whenever it is here.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from tokenferry.dataplane import (
    DispatchExchange,
    ExpertPlan,
    Layout,
    LowLatencyCombinePlan,
    LowLatencyDispatchPlan,
    Outputs,
    Part,
    Pending,
    ReducePlan,
    ScaleFormat,
    SendPlan,
    Signature,
)
from tokenferry.dataplane.cuda import expert_major_programs, programs
from tokenferry.dataplane.cuda.exchange import CudaDispatch
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.dataplane.cuda.low_latency import LowLatency, Place
from tokenferry.dataplane.cuda.status import Status
from tokenferry.errors import ArgumentError
from tokenferry.memory.direct import Regions
from tokenferry.memory.symm import SymmetricHeap

DEFAULT_NUM_SMS = 16
_PROGRAMS_AN_SM = 4
_NANOSECONDS = 1_000_000_000


class Queue(Protocol):
    """Where the work goes: a stream."""

    @property
    def stream(self) -> torch.cuda.Stream:
        """The stream."""

    @property
    def handle(self) -> int:
        """Its address for the driver."""

    def start(self) -> None:
        """Make it wait for what the operation depends on; called before the first launch of every operation."""


class CudaDataPlane:
    """The operations of one CUDA rank; see :class:`tokenferry.dataplane.DataPlane`.

    Args:
        heap: attached.
        regions: attached, and with the heap as region 0.
        queue: of all launches.
        timeout: seconds that a kernel waits for a peer.
        most_programs: programs of a kernel that surely run at a time.
        may_mask: whether low-latency operations mask ranks that fail, and go on.
        exact_combine: whether low-latency combines send every row.
    """

    values_at_hand = False
    epoch = 0
    """Operations are counted on the device."""

    def __init__(
        self,
        heap: SymmetricHeap,
        regions: Regions,
        queue: Queue,
        timeout: float,
        most_programs: int,
        may_mask: bool,
        exact_combine: bool,
    ) -> None:
        self.heap = heap
        self.rank = heap.rank
        self.num_ranks = heap.num_ranks
        self.status = Status(heap.rank, heap.num_ranks, timeout)
        self._regions = regions
        self._queue = queue
        self._most_programs = most_programs
        self._timeout = min(int(timeout * _NANOSECONDS), 1 << 60)
        device = heap.device
        self._device = device
        with torch.inference_mode(False):
            self._state = torch.zeros(words.STATE_WORDS, dtype=torch.int64, device=device)
            most_counts = self.num_ranks * (1 + words.MAX_LOCAL_EXPERTS)
            self._sums = torch.zeros(most_counts, dtype=torch.int32, device=device)
            self._heap_table = torch.tensor(heap.addresses, dtype=torch.int64, device=device)
            self._region_table = torch.zeros_like(regions.table, device=device, pin_memory=False)
            self._ready = torch.zeros_like(regions.ready, device=device, pin_memory=False)
        self._copies: deque[tuple[torch.cuda.Event, int]] = deque()
        torch.cuda.synchronize(device)
        self._context = tuple(
            tensor.data_ptr()
            for tensor in (self._heap_table, self._state, self._ready, self._region_table, self.status.words)
        )
        capability = torch.cuda.get_device_capability(device)
        self._target = programs.Target(self.num_ranks, capability >= (9, 0), device.index, capability >= (8, 9))
        self._half = heap.stage_bytes // 2 // 128 * 128
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        place = Place(
            rank=self.rank,
            num_ranks=self.num_ranks,
            address=heap.addresses[self.rank],
            offset=heap.push,
            nbytes=heap.push_bytes,
            target=self._target,
            timeout=self._timeout,
            most_programs=_PROGRAMS_AN_SM * num_sms if most_programs == num_sms else most_programs,
            shrinks=may_mask,
            exact=exact_combine,
        )
        context = self._context[0], self._context[1], self._context[4]
        self._low_latency = LowLatency(place, context, self.check, torch.cuda.is_current_stream_capturing)

    # Before every operation.

    def check(self) -> None:
        """Raise what was reported since the last check."""
        with self._forgiving():
            self.status.check()

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Forget bad input once it has been reported."""
        try:
            yield
        except ArgumentError:
            with torch.cuda.stream(self._queue.stream):
                self._state[words.BAD_INPUT.value].zero_()
            raise

    def _follow_regions(self) -> None:
        """Learn what memory peers exposed, and tell them what the device here knows by now.

        The tables change in the order of the operations: one that runs sees them as they were when it began, and
        all of its programs see the same.
        """
        if torch.cuda.is_current_stream_capturing():
            return
        if self._regions.poll():
            self._queue.start()
            with torch.cuda.stream(self._queue.stream):
                self._region_table.copy_(self._regions.table, non_blocking=True)
                self._ready.copy_(self._regions.ready, non_blocking=True)
                copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
                copied.record()
            self._copies.append((copied, self._regions.version))
        while self._copies and self._copies[0][0].query():  # type: ignore[no-untyped-call]
            self._regions.acknowledge(self._copies.popleft()[1])

    def _place(self, tensor: torch.Tensor | None) -> int:
        """Where peers find a tensor, in one word."""
        if tensor is None or tensor.numel() == 0:
            return 0
        if self.num_ranks == 1:
            return -1
        region, offset = self._regions.expose(tensor.data_ptr(), tensor.numel() * tensor.element_size())
        return region << words.PLACE_SHIFT.value | offset if region >= 0 else -1

    def _aligned(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, copied if it does not begin on 16 bytes or is not packed."""
        if tensor.data_ptr() % 16 == 0 and tensor.is_contiguous():
            return tensor
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return copy.copy_(tensor)

    def _check_stage(self, record_bytes: int) -> None:
        if record_bytes > self._half:
            given = f"a stage of {self.heap.stage_bytes} bytes"
            raise ArgumentError("num_nvl_bytes", given, f"at least {2 * record_bytes} bytes for rows of this size")

    def empty(self, count: int) -> torch.Tensor:
        """int32 [count], unset."""
        return torch.empty(count, dtype=torch.int32, device=self._device)

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        """See :meth:`tokenferry.dataplane.DataPlane.empty_rows`."""
        return torch.empty((num_rows, width), dtype=dtype, device=self._device)

    # High throughput.

    def layout(self, topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> Layout:
        """See :meth:`tokenferry.dataplane.DataPlane.layout`."""
        self.check()
        ranks, num_tokens = self.num_ranks, topk_idx.size(0)
        limit = ranks * words.MAX_LOCAL_EXPERTS
        if num_experts > limit:
            raise ArgumentError("num_experts", num_experts, f"at most {limit} on a GPU with {ranks} ranks")
        topk_idx = self._aligned(topk_idx)
        counts = self.empty(ranks + num_experts)
        member = torch.empty((num_tokens, ranks), dtype=torch.bool, device=self._device)
        self._queue.start()
        programs.layout(
            self._queue.handle, topk_idx, self._sums, counts, member, self._state, num_experts, self._target
        )
        return Layout(counts[:ranks], counts[ranks:], member)

    @contextmanager
    def dispatch(self, signature: Signature, plan: SendPlan) -> Iterator[DispatchExchange]:
        """See :meth:`tokenferry.dataplane.DataPlane.dispatch`."""
        self.check()
        if plan.handle is None and plan.num_worst_tokens == 0 and torch.cuda.is_current_stream_capturing():
            given = "while a CUDA graph is captured: the host would have to wait for the counts"
            if plan.experts is not None:
                raise ArgumentError("do_cpu_sync", f"True {given}", "False, or a cached dispatch (handle=...)")
            raise ArgumentError("num_worst_tokens", f"0 {given}", "> 0, or a cached dispatch (handle=...)")
        plan = plan._replace(rows=self._aligned(plan.rows))
        if plan.experts is not None:
            plan = self._with_experts(plan, plan.experts)
        self._check_stage(programs.dispatch_record(plan))
        self._follow_regions()
        exchange = CudaDispatch(self, signature, plan)
        exchange.notify()
        try:
            yield exchange
        except BaseException:
            exchange.abandon()
            raise

    def notify(
        self,
        signature: Signature,
        plan: SendPlan,
        prefix: torch.Tensor,
        channels: torch.Tensor,
        send_head: torch.Tensor,
    ) -> None:
        """Launch the exchange of counts."""
        assert plan.num_tokens_per_rank is not None
        assert plan.num_tokens_per_expert is not None
        num_tokens = plan.rows.size(0)
        num_local = plan.num_tokens_per_expert.numel() // self.num_ranks
        limit = self.heap.list_capacity
        if num_tokens > limit:
            raise ArgumentError("x", f"{num_tokens} tokens", f"at most {limit} on a GPU with {self.num_ranks} ranks")
        if num_local > words.MAX_LOCAL_EXPERTS:
            raise ArgumentError(
                "num_tokens_per_expert", f"{num_local} experts a rank", f"at most {words.MAX_LOCAL_EXPERTS}"
            )
        host_waits = plan.num_worst_tokens == 0
        if host_waits:
            self.status.arm()
        self._queue.start()
        programs.notify(
            self._queue.handle,
            self._context,
            (self.status.counts if host_waits else self.status.unread).data_ptr(),
            plan,
            (send_head, prefix, channels),
            self._send_places(plan),
            _number(signature),
            num_local,
            limit,
            self.rank,
            signature.operation,
            self._timeout,
            host_waits,
            self._target,
        )

    def _send_places(self, plan: SendPlan) -> tuple[int, ...]:
        return tuple(self._place(column) for column in (plan.rows, plan.scales, plan.topk_idx, plan.topk_weights))

    def wait_for_counts(self, plan: SendPlan) -> tuple[int, list[int]]:
        """Wait for the counts of a dispatch: rows that come, pairs of every local expert."""
        assert plan.num_tokens_per_expert is not None
        num_local = plan.num_tokens_per_expert.numel() // self.num_ranks
        with self._forgiving():
            return self.status.wait_for_counts(num_local, torch.cuda.current_stream(self._device).query)

    def _with_experts(self, plan: SendPlan, experts: ExpertPlan) -> SendPlan:
        """The plan as its kernels want it: ids packed where they say which rows copies are."""
        if experts.metadata is not None:
            return plan._replace(experts=experts._replace(metadata=self._aligned(experts.metadata)))
        if not experts.expand:
            return plan
        assert plan.topk_idx is not None
        ids = self._aligned(plan.topk_idx)
        packed = torch.empty_like(ids)
        self._queue.start()
        num_experts = experts.num_local * self.num_ranks
        expert_major_programs.pack(self._queue.handle, ids, packed, num_experts, self._target)
        return plan._replace(topk_idx=packed)

    def lay_out_experts(
        self, plan: ExpertPlan, bases: torch.Tensor, num_pairs: torch.Tensor, ends: torch.Tensor
    ) -> None:
        """Launch what tells where the rows of the experts begin and end, once the counts are there."""
        self._queue.start()
        expert_major_programs.starts(
            self._queue.handle,
            self._context[0],
            bases,
            (num_pairs, ends),
            plan.alignment,
            self.rank,
            plan.expand,
            self._target,
        )

    def after_pull(self, plan: SendPlan, prefix: torch.Tensor, outputs: Outputs, ends: torch.Tensor) -> None:
        """Launch what a dispatch that tells where rows are from still has to write."""
        experts = plan.experts
        if experts is None:
            return
        if not experts.expand:
            if outputs.metadata is not None:
                most = experts.num_max_tokens
                expert_major_programs.sources(self._queue.handle, outputs, prefix, most, self.rank, self._target)
        elif experts.zero_padding and experts.num_local:
            known = ends if experts.expert_ends is None else experts.expert_ends
            expert_major_programs.pad(self._queue.handle, outputs, known, experts.alignment, self._target)

    def pull(
        self,
        signature: Signature,
        plan: SendPlan,
        prefix: torch.Tensor,
        outputs: Outputs,
        num_rows: int,
        bases: torch.Tensor | None = None,
    ) -> None:
        """Launch the pull of a dispatch."""
        self._queue.start()
        if plan.handle is not None and outputs.topk_idx is not None and outputs.topk_weights is not None:
            with torch.cuda.stream(self._queue.stream):  # the rows past the last, of which there is no count here
                outputs.topk_idx.fill_(-1)
                outputs.topk_weights.zero_()
        cached = plan.handle is not None
        src_idx = plan.handle.recv_src_idx if plan.handle is not None else outputs.recv_src_idx
        assert src_idx is not None
        programs.dispatch(
            self._queue.handle,
            self._context,
            plan,
            outputs,
            src_idx,
            prefix,
            self._send_places(plan) if cached else (0, 0, 0, 0),
            _number(signature),
            num_rows,
            self.heap.list_capacity,
            (self.heap.stage, self._half),
            self.rank,
            signature.operation,
            self._timeout,
            self._target,
            min(plan.num_sms or DEFAULT_NUM_SMS, self._most_programs),
            bases,
        )

    def pull_reduce(self, signature: Signature, plan: ReducePlan, outs: Sequence[torch.Tensor]) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.pull_reduce`."""
        self.check()
        if plan.metadata is not None:
            self._pull_reduce_copies(signature, plan, plan.metadata, outs)
            return
        columns = [self._aligned(column) for column in plan.columns]
        biases = [self._aligned(bias) for bias in plan.biases]
        self._check_stage(programs.combine_record(columns) * self.num_ranks)
        self._follow_regions()
        places = [self._place(column) for column in columns]
        self._queue.start()
        programs.combine(
            self._queue.handle,
            self._context,
            columns,
            outs,
            biases,
            plan.handle,
            (places[0], places[1] if len(places) > 1 else 0),
            _number(signature),
            (self.heap.stage, self._half),
            self.rank,
            signature.operation,
            self._timeout,
            self._target,
            min(plan.num_sms or DEFAULT_NUM_SMS, self._most_programs),
        )

    def sum_rows(
        self, parts: Sequence[Part], biases: Sequence[torch.Tensor], out: torch.Tensor, num_sms: int = 0
    ) -> None:
        """Needed between nodes only, which Buffers on GPUs refuse to span."""
        raise NotImplementedError("GPUs on several nodes")

    def has_room(self, row_bytes: int) -> bool:
        """As :meth:`sum_rows`."""
        raise NotImplementedError("GPUs on several nodes")

    def give_up(self, reason: str) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.give_up`; peers find out when this rank does not come."""
        self.status.give_up(reason)
        with torch.cuda.stream(self._queue.stream):
            self._state[words.FAILED.value].fill_(1)

    def _pull_reduce_copies(
        self, signature: Signature, plan: ReducePlan, metadata: torch.Tensor, outs: Sequence[torch.Tensor]
    ) -> None:
        """Sum the copies of each row, and combine the sums."""
        x = self._aligned(plan.columns[0])
        wide = plan.sum_dtype or x.dtype
        metadata = self._aligned(metadata)
        self._queue.start()
        with torch.cuda.stream(self._queue.stream):
            sums = torch.empty((metadata.size(0), x.size(1)), dtype=wide, device=self._device)
            expert_major_programs.sum_copies(
                self._queue.handle,
                x,
                metadata,
                sums,
                plan.handle.rank_prefix_matrix,
                (self._context[1], self._context[4]),
                self.rank,
                signature.operation,
                self._target,
            )
            biases = [bias.to(wide) for bias in plan.biases]
            whole = outs[0] if wide == x.dtype else torch.empty(outs[0].shape, dtype=wide, device=self._device)
            columns = [sums, *plan.columns[1:]]
            self.pull_reduce(
                signature, plan._replace(columns=columns, biases=biases, metadata=None), [whole, *outs[1:]]
            )
            if whole is not outs[0]:
                outs[0].copy_(whole)

    def warm(self, plans: Sequence[SendPlan], reduces: Sequence[Sequence[torch.Tensor]], num_experts: int) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.warm`."""
        programs.warm(plans, reduces, num_experts, self._target)

    # Low latency, on the current stream.

    def low_latency_tables(
        self, num_ranks: int, num_local_experts: int, num_max_tokens: int, num_topk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_tables`."""
        return self._low_latency.tables(num_local_experts, num_max_tokens, num_topk, self._device)

    def warm_low_latency(
        self, scale_format: ScaleFormat, num_max_tokens: int, hidden: int, num_topk: int, num_local_experts: int
    ) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.warm_low_latency`."""
        self._low_latency.warm(scale_format, num_max_tokens, hidden, num_topk, num_local_experts)

    def low_latency_dispatch(self, signature: Signature, plan: LowLatencyDispatchPlan) -> Pending:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_dispatch`."""
        self.check()
        if plan.topk_idx.data_ptr() % 16 or plan.x.data_ptr() % 16:
            plan = plan._replace(topk_idx=self._aligned(plan.topk_idx), x=self._aligned(plan.x))
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        return self._low_latency.dispatch(stream, _number(signature), signature.operation, plan)

    def low_latency_combine(self, signature: Signature, plan: LowLatencyCombinePlan) -> Pending:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_combine`."""
        self.check()
        if plan.out.data_ptr() % 16:
            raise ArgumentError("out", "memory that does not begin on 16 bytes", "memory that does")
        if (plan.topk_idx.data_ptr() | plan.topk_weights.data_ptr() | plan.x.data_ptr()) % 16:
            plan = plan._replace(
                topk_idx=self._aligned(plan.topk_idx),
                topk_weights=self._aligned(plan.topk_weights),
                x=self._aligned(plan.x),
            )
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        return self._low_latency.combine(stream, _number(signature), signature.operation, plan)

    def close(self) -> None:
        """Refuse hooks that were not called."""
        self._low_latency.close()

    def set_masked(self, rank: int, masked: bool) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.set_masked`."""
        if rank != self.rank:
            self._state[words.MASKED.value + rank].fill_(masked)

    def write_mask(self, status: torch.Tensor) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.write_mask`."""
        first = words.MASKED.value
        status.copy_(self._state[first : first + self.num_ranks])


@functools.lru_cache(maxsize=1024)
def _number(signature: Signature) -> int:
    """A signature in one word, the same in every process: integers hash alike everywhere."""
    return hash(tuple(int(value) for value in signature))
