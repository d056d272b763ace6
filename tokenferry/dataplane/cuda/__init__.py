"""The data plane of CUDA ranks: rows are pulled over NVLink, from the tensors where they lie into their final rows.

Dispatch is two kernels, ``notify`` (of a part: ``announce_part``) and ``dispatch``; a cached dispatch and a combine
are one (of held rows: behind ``note_held``). The kernels agree, wait, signal and release among themselves
(``kernels/``); the host launches them, waits only where the shape of an output depends on counts, and looks for
reported errors whenever it is here.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch

from tokenferry.dataplane import (
    HeldRows,
    Layout,
    LowLatencyCombinePlan,
    LowLatencyDispatchPlan,
    Outputs,
    Part,
    PartPlan,
    Pending,
    ReducePlan,
    Relays,
    ScaleFormat,
    SendPlan,
    Signature,
)
from tokenferry.dataplane.cuda import expert_major_programs, parts_programs, programs
from tokenferry.dataplane.cuda.exchange import CudaDispatch, Kind, Rooms
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.dataplane.cuda.launch import Call, Job, Placed, compile_together
from tokenferry.dataplane.cuda.low_latency import LowLatency, Place
from tokenferry.dataplane.cuda.rank import CudaRank, Queue
from tokenferry.dataplane.tensors import piece_of
from tokenferry.errors import ArgumentError
from tokenferry.handles import DispatchHandle
from tokenferry.kept import Kept, make
from tokenferry.memory.direct import Regions
from tokenferry.memory.symm import SymmetricHeap

DEFAULT_NUM_SMS = 16


class CudaDataPlane(CudaRank):
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
    least_part_bytes = 32 << 20
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
        names: Sequence[int] | None = None,
    ) -> None:
        super().__init__(heap, regions, queue, timeout, most_programs, names)
        self.rooms = Rooms()
        self._kinds: Kept[Kind] = Kept()
        self._calls: Kept[Call] = Kept()
        num_sms = torch.cuda.get_device_properties(heap.device).multi_processor_count
        place = Place(
            rank=self.rank,
            num_ranks=self.num_ranks,
            address=heap.addresses[self.rank],
            offset=heap.push,
            nbytes=heap.push_bytes,
            target=self._target,
            timeout=self._timeout,
            num_sms=most_programs,
            shares_gpu=most_programs < num_sms,
            shrinks=may_mask,
            exact=exact_combine,
        )
        context = self._context[0], self._context[1], self._context[4]
        # No cycle: a Buffer that is dropped goes at once.
        weak_check: Any = weakref.WeakMethod(self.check)
        weak_aligned: Any = weakref.WeakMethod(self._aligned)
        self._low_latency = LowLatency(
            place,
            context,
            lambda: weak_check()(),
            torch.cuda.is_current_stream_capturing,
            lambda tensor: weak_aligned()(tensor),
        )

    # High throughput.

    def layout(self, topk_idx: torch.Tensor, num_experts: int, num_ranks: int, *, expands: bool = False) -> Layout:
        """See :meth:`tokenferry.dataplane.DataPlane.layout`."""
        self.check()
        ranks, target = num_ranks, self._target
        limit = self._sums.shape[0] - ranks
        if num_experts > limit:
            raise ArgumentError("num_experts", num_experts, f"at most {limit} on a GPU with {self.num_ranks} ranks")
        topk_idx = self._aligned(topk_idx)
        num_tokens, num_topk = topk_idx.shape
        # What ``pack`` is to read lies behind the counts of experts, in memory that lives as long as these.
        num_spans, words_behind = programs.spans_of(num_tokens, num_topk, num_experts) if expands else (0, 0)
        counts = self.empty(ranks + num_experts + words_behind)
        member = self.empty_rows(num_tokens, ranks, torch.bool)
        if ranks != self.num_ranks:
            target = target._replace(num_ranks=ranks)
        self._queue.start()
        programs.layout(
            self._queue.handle, topk_idx, self._sums, counts, member, self._state, num_experts, target, num_spans
        )  # fmt: skip
        of_ranks, of_experts = piece_of(counts, (ranks,), (1,), 0), piece_of(counts, (num_experts,), (1,), ranks)
        return make(Layout, (of_ranks, of_experts, member))

    def dispatch(self, signature: Signature, plan: SendPlan) -> CudaDispatch:
        """See :meth:`tokenferry.dataplane.DataPlane.dispatch`."""
        self.check()
        waits = plan.handle is None and plan.num_worst_tokens == 0 and plan.part is None
        if waits and torch.cuda.is_current_stream_capturing():
            given = "while a CUDA graph is captured: the host would have to wait for the counts"
            if plan.experts is not None:
                raise ArgumentError("do_cpu_sync", f"True {given}", "False, or a cached dispatch (handle=...)")
            raise ArgumentError("num_worst_tokens", f"0 {given}", "> 0, or a cached dispatch (handle=...)")
        rows = self._aligned(plan.rows)
        if rows is not plan.rows:
            plan = plan._replace(rows=rows)
        if plan.experts is not None and plan.experts.metadata is not None:
            metadata = self._aligned(plan.experts.metadata)
            plan = plan._replace(experts=plan.experts._replace(metadata=metadata))
        self._follower.follow()
        exchange = CudaDispatch(self, signature, plan)
        if plan.handle is None:
            exchange.notify()
        return exchange

    def dispatch_along(self, signature: Signature, plan: SendPlan, outputs: Outputs) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.dispatch_along`."""
        self.check()
        rows, scales, handle, num_sms = self._aligned(plan.rows), plan.scales, plan.handle, plan.num_sms
        assert handle is not None
        prefix, src_idx = handle.rank_prefix_matrix, handle.recv_src_idx
        num_rows = src_idx.shape[0]
        key = signature, rows.shape, num_sms
        call = self._calls.get(key)
        if call is None:
            call = self._calls.keep(key, self._dispatch_call(signature, plan))
        self._follower.follow()
        places = self._places(rows, scales)
        self._queue.start()
        # What ``dispatch_tensors`` would return, which is a function more.
        tensors = (
            rows, scales, None, None, outputs.rows, outputs.scales, None, None, src_idx, prefix, None, None,
        )  # fmt: skip
        call.launch(self._queue.handle, self._context, tensors, (*places, 0, 0, num_rows, int(plan.zero_unused)))

    def _dispatch_call(self, signature: Signature, plan: SendPlan) -> Call:
        self._check_stage(programs.dispatch_record(plan))
        return programs.dispatch_call(
            plan, programs.number_of(signature), self.heap.list_capacity, self._stage, self.rank,
            signature.operation, self._timeout, self._target, self._num_programs(plan.num_sms),
        )  # fmt: skip

    def _num_programs(self, num_sms: int) -> int:
        return min(num_sms or DEFAULT_NUM_SMS, self._most_programs)

    def kind_of(self, signature: Signature, plan: SendPlan) -> Kind:
        """Of a dispatch with fresh counts."""
        experts = plan.experts
        of_experts = () if experts is None else (experts.num_local, experts.alignment, experts.expand)
        key = signature, plan.rows.shape, plan.num_worst_tokens, plan.num_sms, of_experts
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds.keep(key, Kind(plan))
        return kind

    def notify(
        self, signature: Signature, plan: SendPlan, kind: Kind, tables: Sequence[Placed | None], pulls_meanwhile: bool
    ) -> SendPlan:
        """Launch the exchange of counts.

        Args:
            signature: of the dispatch.
            plan: of the dispatch.
            kind: of the dispatch.
            tables: what it writes: ``send_head``, the prefix matrix, the channel matrices, the tables of the experts.
            pulls_meanwhile: whether the pull is launched before the host looks at the counts, whatever they are.

        Returns:
            The plan as the pull wants it: ids packed where they say which rows copies are.
        """
        host_reads = plan.num_worst_tokens == 0
        host_waits = host_reads and not pulls_meanwhile
        experts = plan.experts
        call = kind.notify[host_waits]
        if call is None:
            call = kind.notify[host_waits] = self._notify_call(signature, plan, host_waits)
        given = plan.topk_idx
        if experts is not None and experts.expand:
            assert given is not None
            given = self._aligned(given)
            plan = plan._replace(topk_idx=self.empty_rows(given.shape[0], given.shape[1], given.dtype))
        places = self._send_places(plan)
        status = self.status
        host = status.arm() if host_reads else status.unread_address
        heap, state, ready, _, words_of_status = self._context
        self._queue.start()
        if experts is not None and experts.expand:
            assert given is not None
            assert plan.topk_idx is not None
            assert plan.num_tokens_per_expert is not None
            expert_major_programs.pack(
                self._queue.handle, given, plan.topk_idx, plan.num_tokens_per_expert,
                experts.num_local * self.num_ranks, self._target,
            )  # fmt: skip
        context = heap, state, ready, words_of_status, host
        call.launch(self._queue.handle, context, programs.notify_tensors(plan, *tables), places)
        return plan

    def _notify_call(self, signature: Signature, plan: SendPlan, host_waits: bool) -> Call:
        assert plan.num_tokens_per_expert is not None
        num_local = plan.num_tokens_per_expert.numel() // self.num_ranks
        if num_local > words.MAX_LOCAL_EXPERTS:
            allowed = f"at most {words.MAX_LOCAL_EXPERTS}"
            raise ArgumentError("num_tokens_per_expert", f"{num_local} experts a rank", allowed)
        self._check_stage(programs.dispatch_record(plan))
        return programs.notify_call(
            plan, programs.number_of(signature), num_local, self._check_list(plan), self.rank, signature.operation,
            self._timeout, host_waits, self._target,
        )  # fmt: skip

    def announce_part(self, signature: Signature, plan: SendPlan, part: PartPlan, table: torch.Tensor) -> None:
        """Launch what stands for the exchange of counts where no host waits; it fills the int32 [3, R] ``table``."""
        limit = self._check_list(plan)
        self._check_stage(programs.dispatch_record(plan))
        self._queue.start()
        parts_programs.announce_part(
            self._queue.handle,
            self._context,
            plan,
            part,
            table,
            self._send_places(plan),
            programs.number_of(signature),
            limit,
            self.rank,
            signature.operation,
            self._timeout,
            self._target,
        )

    def _check_list(self, plan: SendPlan) -> int:
        """The most tokens that lists of tokens have room for; raise if this rank has more."""
        num_tokens, limit = plan.rows.shape[0], self.heap.list_capacity
        if num_tokens > limit:
            raise ArgumentError("x", f"{num_tokens} tokens", f"at most {limit} on a GPU with {self.num_ranks} ranks")
        return limit

    def _send_places(self, plan: SendPlan) -> Sequence[int]:
        return self._places(plan.rows, plan.scales, plan.topk_idx, plan.topk_weights)

    def wait_for_counts(self, plan: SendPlan) -> tuple[int, list[int]]:
        """Wait for the counts of a dispatch: rows that come, pairs of every local expert."""
        assert plan.num_tokens_per_expert is not None
        num_local = plan.num_tokens_per_expert.numel() // self.num_ranks
        try:
            return self.status.wait_for_counts(num_local, self._queue.stream.query)
        except ArgumentError:
            self.forgive()
            raise

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
        kind: Kind | None,
        prefix: Placed,
        outputs: Outputs,
        num_rows: int,
        bases: Placed | None = None,
    ) -> None:
        """Launch the pull of a dispatch; one with fresh counts has a kind."""
        self._queue.start()
        handle = plan.handle
        if handle is not None and outputs.topk_idx is not None and outputs.topk_weights is not None:
            with torch.cuda.stream(self._queue.stream):  # the rows past the last, of which there is no count here
                outputs.topk_idx.fill_(-1)
                outputs.topk_weights.zero_()
        src_idx = outputs.recv_src_idx if handle is None else handle.recv_src_idx
        places: Sequence[int] = (0, 0, 0, 0) if handle is None else self._send_places(plan)
        num_expanded = int(plan.zero_unused)
        if plan.experts is not None and plan.experts.expand:
            num_expanded = outputs.rows.shape[0]
        if kind is None:
            ids_of_part = None if plan.part is None else (plan.part.expert_ids,)
            key = "pull", signature, plan.rows.shape, plan.num_sms, handle is None, ids_of_part or 0
            call = self._calls.get(key)
            if call is None:
                call = self._calls.keep(key, self._dispatch_call(signature, plan))
        else:
            call = kind.pull
            if call is None:
                call = kind.pull = self._dispatch_call(signature, plan)
        tensors = programs.dispatch_tensors(plan, outputs, src_idx, prefix, bases)
        call.launch(self._queue.handle, self._context, tensors, (*places, num_rows, num_expanded))

    def pull_reduce(self, signature: Signature, plan: ReducePlan, outs: Sequence[torch.Tensor]) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.pull_reduce`."""
        self.check()
        given, added, handle, num_sms, metadata, _, held_rows = plan
        if metadata is not None:
            self._pull_reduce_copies(signature, plan, metadata, outs)
            return
        columns = [self._aligned(column) for column in given]
        biases = [self._aligned(bias) for bias in added] if added else added
        held = None if held_rows is None else self._held_tables(handle, held_rows)
        out, rows = outs[0], columns[0]
        num_topk = columns[1].shape[1] if len(columns) > 1 else 0
        num_rows, width = rows.shape
        key = (signature, width, rows.dtype, out.dtype, num_topk, len(biases), held is None, num_sms)
        call = self._calls.get(key)
        if call is None:
            self._check_stage(programs.combine_record(columns) * self.num_ranks)
            call = programs.combine_call(
                columns, outs, len(biases), self._stage, self.rank, signature.operation, self._timeout,
                self._target, self._num_programs(num_sms), held is not None,
            )  # fmt: skip
            self._calls.keep(key, call)
        self._follower.follow()
        places = self._places(*columns)
        self._queue.start()
        tensors = programs.combine_tensors(columns, outs, biases, handle, held)
        place_rows, place_weights = places if len(places) > 1 else (places[0], 0)
        numbers = place_rows, place_weights, programs.number_of(signature), out.shape[0], num_rows
        call.launch(self._queue.handle, self._context, tensors, numbers)

    def _held_tables(self, handle: DispatchHandle, held: HeldRows) -> programs.HeldTables:
        """The routes of a combine of held rows, once the device gets there."""
        member = handle.is_token_in_rank
        send_head = self.empty_table(member.numel())
        tables = programs.HeldTables(self.empty_table(4 * self.num_ranks), held.tokens, send_head)
        self._queue.start()
        parts_programs.note_held(self._queue.handle, member, held, tables, self._target)
        return tables

    def sum_rows(
        self, parts: Sequence[Part], biases: Sequence[torch.Tensor], out: torch.Tensor, num_sms: int = 0
    ) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.sum_rows`."""
        self.check()
        if not out.numel():
            return
        wide = functools.reduce(torch.promote_types, [part.rows.dtype for part in parts], out.dtype)
        stream = torch.cuda.current_stream(self._device)
        if not torch.cuda.is_current_stream_capturing():
            for tensor in (out, *(part.rows for part in parts)):
                tensor.record_stream(stream)  # it may be memory of another one
        parts = [part._replace(rows=self._aligned(part.rows.to(wide))) for part in parts]
        biases = [self._aligned(bias) for bias in biases]
        found = self.empty_rows(out.size(0), len(parts), torch.int64)
        sms = num_sms or DEFAULT_NUM_SMS
        parts_programs.sum_rows(stream.cuda_stream, parts, biases, out, wide, found, self._target, sms)

    def clear_unused(self, outputs: Sequence[torch.Tensor], places: torch.Tensor) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.clear_unused`; on the current stream."""
        stream = torch._C._cuda_getCurrentRawStream(self._target.device)
        for rows in outputs:
            if rows.numel():
                programs.clear(stream, rows, places, self._target)

    def has_room(self, row_bytes: int) -> bool:
        """See :meth:`tokenferry.dataplane.DataPlane.has_room`."""
        return programs.most_record(row_bytes) * self.num_ranks <= self._half

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
        sums = self.empty_rows(metadata.shape[0], x.shape[1], wide)
        biases, whole = plan.biases, outs[0]
        if wide != x.dtype:
            biases = [bias.to(wide) for bias in biases]
            whole = self.empty_rows(whole.shape[0], whole.shape[1], wide)
        self._queue.start()
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
        summed = ReducePlan([sums, *plan.columns[1:]], biases, plan.handle, plan.num_sms)
        self.pull_reduce(signature, summed, [whole, *outs[1:]])
        if whole is not outs[0]:
            with torch.cuda.stream(self._queue.stream):
                outs[0].copy_(whole)

    def warm(self, plans: Sequence[SendPlan], reduces: Sequence[Sequence[torch.Tensor]], num_experts: int) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.warm`."""
        jobs = programs.to_warm(plans, reduces, num_experts, self._target)
        self._compile(chain(jobs, parts_programs.to_warm(plans, reduces, self._target)))

    # Low latency, on the current stream.

    def low_latency_tables(
        self, num_ranks: int, num_local_experts: int, num_max_tokens: int, num_topk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_tables`."""
        return self._low_latency.tables(num_ranks, num_local_experts, num_max_tokens, num_topk, self.empty_strided)

    def warm_low_latency(
        self, scale_format: ScaleFormat, num_max_tokens: int, hidden: int, num_topk: int, num_local_experts: int,
        relays: Relays | None,
    ) -> None:  # fmt: skip
        """See :meth:`tokenferry.dataplane.DataPlane.warm_low_latency`."""
        shape = scale_format, num_max_tokens, hidden, num_topk, num_local_experts, relays
        sums = () if relays is None else parts_programs.sums_to_warm(torch.bfloat16, hidden, self._target)
        self._compile(chain(self._low_latency.to_warm(*shape), sums))

    def _compile(self, jobs: Iterable[Job]) -> None:
        compile_together(jobs, self.rank, self.num_ranks)

    def advance(self) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.advance`: kernels wait for no host."""

    def low_latency_dispatch(self, signature: Signature, plan: LowLatencyDispatchPlan) -> Pending:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_dispatch`."""
        self.check()
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        return self._low_latency.dispatch(stream, signature, plan)

    def low_latency_combine(self, signature: Signature, plan: LowLatencyCombinePlan) -> Pending:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_combine`."""
        self.check()
        stream = torch._C._cuda_getCurrentRawStream(self._device.index)
        return self._low_latency.combine(stream, signature, plan)

    def close(self) -> None:
        """Refuse operations, and hooks that were not called."""
        self.status.close()
        self._follower.close()
        self._low_latency.close()

    def set_masked(self, rank: int, masked: bool) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.set_masked`."""
        if rank != self.rank:
            self._state[words.MASKED.value + rank].fill_(masked)

    def write_mask(self, status: torch.Tensor) -> None:
        """See :meth:`tokenferry.dataplane.DataPlane.write_mask`."""
        first = words.MASKED.value
        status.copy_(self._state[first : first + self.num_ranks])
