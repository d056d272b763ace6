"""ElasticBuffer: the newer of DeepEP's two interfaces, over the same runtime as Buffer. Moves no data itself."""

from __future__ import annotations

import functools
import logging
import math
from types import TracebackType
from typing import Self

import torch
import torch.distributed as dist

from tokenferry.config import align_up
from tokenferry.construction import (
    AnyRuntime,
    Wishes,
    choose_device,
    choose_paranoid,
    construct_runtime,
    note_ignored,
    timeout_seconds,
)
from tokenferry.errors import ArgumentError, BufferStateError, TokenferryError
from tokenferry.events import EventHandle, EventOverlap
from tokenferry.handles import EPHandle
from tokenferry.modes import expert_major, paranoid_elastic
from tokenferry.modes.expert_major import Sizes
from tokenferry.rendezvous import meet
from tokenferry.streams import CommStream
from tokenferry.topology import Topology
from tokenferry.validation import check_int, require

logger = logging.getLogger("tokenferry")

_Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_Event = EventHandle | EventOverlap | None

_GRANULE = 2 << 20
"""Bytes that buffer sizes are multiples of."""
_NVLINK_GBS = 323.0
"""What pulls of rows reach over NVLink 4, in GB/s (docs/performance.md); where the caller names no other figure."""
_FEWEST_SMS = 4
_ALL_SMS = 16
"""SMs that an operation uses where it need not leave the others to compute: the data plane's own choice."""


class ElasticBuffer:
    """The expert-parallel communication buffer of one rank, with DeepEP's newer interface.

    Against :class:`tokenferry.Buffer`: one call instead of layout and dispatch; rows expert by expert on request;
    no wait for the host on request; handles are objects. Row order is always deterministic. Construction and every
    operation are collective over ``group``; ranks without tokens take part with zero rows.

    Args:
        group: a ``torch.distributed`` process group of any backend; used only to construct.
        num_bytes: ceiling for the memory through which rows travel that peers cannot read where they lie. A hint:
            smaller is slower, never wrong. By default :meth:`get_buffer_size_hint` of the sizes below.
        num_cpu_bytes: must be 0.
        num_max_tokens_per_rank: most tokens that a rank dispatches, where a dispatch does not say.
        hidden: elements of a row; for the size.
        num_topk: choices of a token; for the size.
        use_fp8_dispatch: for the size: rows of one byte an element, with scales.
        deterministic: accepted: results never depend on timing.
        allow_hybrid_mode: accepted, without meaning here.
        allow_multiple_reduction: whether the sum of a token's copies on a rank may be rounded before it travels. If
            not, it travels in float32, and there is one rounding.
        prefer_overlap_with_compute: whether operations use as few SMs as fill the link, rather than what is fastest.
        sl_idx: accepted, without meaning here.
        num_allocated_qps: accepted, without meaning here.
        num_cpu_timeout_secs: with the next, seconds to wait for a peer that makes no progress: the longer of the two.
            By default as :class:`tokenferry.Buffer` has it.
        num_gpu_timeout_secs: see above.
        explicitly_destroy: accepted; :meth:`destroy` may always be called, and need not be.
        device: where the tensors of this rank live; as in :class:`tokenferry.Buffer`.
        node: name of the node this rank is on; likewise.

    Raises:
        ArgumentError: an argument is not allowed.
        NotImplementedError: ``num_cpu_bytes`` is not 0.
        TokenferryError: the ranks are on several nodes, or memory is not to be had on some rank; on every rank.

    Attributes:
        group: as given.
        rank: of this process in the group.
        group_size: ranks of the group.
        num_bytes: as given, or the hint.
        num_max_tokens_per_rank: as given.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: float | None = None,
        num_gpu_timeout_secs: float | None = None,
        explicitly_destroy: bool = False,
        *,
        device: torch.device | str | int | None = None,
        node: str | int | None = None,
    ) -> None:
        self.runtime: AnyRuntime | None = None
        if num_cpu_bytes:
            raise NotImplementedError(
                f"num_cpu_bytes: got {num_cpu_bytes}; allowed: 0, there is no storage on the host"
            )
        self.num_max_tokens_per_rank = check_int("num_max_tokens_per_rank", num_max_tokens_per_rank, minimum=0)
        hidden = check_int("hidden", hidden, minimum=0)
        num_topk = check_int("num_topk", num_topk, minimum=0)
        deadlines = {"num_cpu_timeout_secs": num_cpu_timeout_secs, "num_gpu_timeout_secs": num_gpu_timeout_secs}
        given = [timeout_seconds(value, name) for name, value in deadlines.items() if value is not None]
        seconds = max(given) if given else timeout_seconds(None)
        note_ignored(sl_idx=sl_idx != 3, num_allocated_qps=num_allocated_qps != 0)
        chosen = choose_device(device)
        rendezvous = meet(group, None, chosen)
        self.group: dist.ProcessGroup | None = group
        self.rank = rendezvous.rank
        self.group_size = rendezvous.num_ranks
        if num_bytes is None:
            sizes = self.num_max_tokens_per_rank, hidden, num_topk
            num_bytes = ElasticBuffer.get_buffer_size_hint(group, *sizes, use_fp8_dispatch)
        self.num_bytes = check_int("num_bytes", num_bytes, minimum=0)
        self.hidden = hidden
        self.num_topk = num_topk
        self.use_fp8_dispatch = use_fp8_dispatch
        self.deterministic = deterministic
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.explicitly_destroy = explicitly_destroy
        self._is_paranoid = choose_paranoid()
        wishes = Wishes(
            chosen,
            group is not None,
            align_up(self.num_bytes),
            push_bytes=0,
            heap_bytes=0,
            timeout=seconds,
            may_mask=False,
            exact_combine=False,
            may_span_nodes=False,
            paranoid=self._is_paranoid,
        )
        self.runtime = construct_runtime(rendezvous, wishes, node)
        if self.topology.num_nodes > 1:
            self.destroy()
            raise TokenferryError("ElasticBuffer moves tokens inside one node only: use Buffer for several nodes")
        logger.info(
            "ElasticBuffer of rank %d of %d on %s: stage up to %d bytes, timeout %g s",
            self.rank,
            self.group_size,
            chosen,
            self.num_bytes,
            seconds,
        )

    # Life cycle.

    def destroy(self) -> None:
        """Let go of the memory, and of the group, which is None afterwards. Local: no peer is waited for.

        None is harmed. May be called again.
        """
        runtime, self.runtime = getattr(self, "runtime", None), None
        if runtime is not None:
            runtime.destroy()
            self.group = None

    def is_available(self) -> bool:
        """Whether operations can run: constructed, not destroyed, no operation failed."""
        return self.runtime is not None and self.runtime.is_available()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.destroy()

    @property
    def topology(self) -> Topology:
        """Where the ranks of the group are.

        Raises:
            BufferStateError: the buffer was destroyed.
        """
        topology = self._live_runtime().topology
        assert topology is not None
        return topology

    def _live_runtime(self) -> AnyRuntime:
        if self.runtime is None:
            raise BufferStateError("the ElasticBuffer was destroyed")
        return self.runtime

    # Sizes and streams.

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup,
        num_max_tokens_per_rank: int,
        hidden: int,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:
        """Bytes with which the rows of a dispatch pass in one round where they must be staged.

        ``2 N (row + 12 K + 64)``, rounded up to 2 MB: two halves, in each a row of N tokens (two bytes an element, or
        with ``use_fp8_dispatch`` one, and 4 for each 32 of them), K ids and weights, and what aligns them. No
        allocation: 32 MB are used, unless peers can read no tensor where it lies. Grows with every size.

        Args:
            group: not looked at.
            num_max_tokens_per_rank: N.
            hidden: elements of a row.
            num_topk: K.
            use_fp8_dispatch: see above.
            allow_hybrid_mode: not looked at.
            allow_multiple_reduction: not looked at.
        """
        tokens = check_int("num_max_tokens_per_rank", num_max_tokens_per_rank, minimum=0)
        hidden = check_int("hidden", hidden, minimum=0)
        num_topk = check_int("num_topk", num_topk, minimum=0)
        row_bytes = hidden + 4 * -(-hidden // 32) if use_fp8_dispatch else 2 * hidden
        return align_up(max(2 * tokens * (row_bytes + 12 * num_topk + 64), 1), _GRANULE)

    def get_theoretical_num_sms(
        self,
        num_experts: int,
        num_topk: int,
        num_scaleout_topk: int = 0,
        rdma_gbs: float = 0,
        nvlink_gbs: float = 0,
        sm_read_gbs: float = 200,
        sm_write_gbs: float = 50,
    ) -> int:
        """SMs that suffice to move rows as fast as the link brings them: an even number, at least 4.

        An SM reads a row in ``1 / sm_read_gbs`` a byte and writes it in ``1 / sm_write_gbs``, so that
        ``nvlink_gbs (1 / sm_read_gbs + 1 / sm_write_gbs)`` of them keep up. At least 16 unless
        ``prefer_overlap_with_compute``, at most those of the GPU.

        Args:
            num_experts: experts of all ranks; does not enter the formula.
            num_topk: choices of a token; likewise.
            num_scaleout_topk: accepted, without meaning inside a node.
            rdma_gbs: likewise.
            nvlink_gbs: of the link, one way; 0 stands for 323, what NVLink 4 gives pulls.
            sm_read_gbs: of one SM.
            sm_write_gbs: of one SM.
        """
        require(nvlink_gbs >= 0, "nvlink_gbs", nvlink_gbs, "a number of GB/s, or 0 for that of NVLink 4")
        require(sm_read_gbs > 0, "sm_read_gbs", sm_read_gbs, "a number above 0")
        require(sm_write_gbs > 0, "sm_write_gbs", sm_write_gbs, "a number above 0")
        needed = math.ceil((nvlink_gbs or _NVLINK_GBS) * (1 / sm_read_gbs + 1 / sm_write_gbs))
        chosen = max(needed, _FEWEST_SMS if self.prefer_overlap_with_compute else _ALL_SMS)
        most = chosen + 1
        device = self._live_runtime().device
        if device.type == "cuda":
            most = torch.cuda.get_device_properties(device).multi_processor_count
        return max(min(chosen + chosen % 2, most // 2 * 2), _FEWEST_SMS)

    @functools.cached_property
    def _usual_sms(self) -> int:
        return self.get_theoretical_num_sms(1, 1)

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """Queue pairs that suffice: none here."""
        check_int("num_sms", num_sms, minimum=0)
        return 0

    def get_physical_domain_size(self) -> tuple[int, int]:
        """Nodes, and ranks of each."""
        return 1, self.group_size

    def get_logical_domain_size(self) -> tuple[int, int]:
        """Groups of ranks between which the network is used, and ranks of each."""
        return 1, self.group_size

    @staticmethod
    def capture() -> EventHandle:
        """An event at the current point of the current stream."""
        return EventHandle()

    def get_comm_stream(self) -> torch.cuda.Stream | torch.cpu.Stream:
        """The stream that operations run on; CPU ranks have a single one."""
        comm = self._live_runtime().comm
        return comm.stream if isinstance(comm, CommStream) else torch.cpu.current_stream()

    def barrier(self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True) -> None:
        """Let work after this begin on no rank before work ahead of this is done on all.

        Args:
            use_comm_stream: accepted: both streams wait, whatever is asked for.
            with_cpu_sync: let this thread wait for the device, before and after.
            sequential: accepted, without meaning inside a node.
        """
        runtime = self._live_runtime()
        if with_cpu_sync:
            _synchronize(runtime.device)
        with runtime.comm.turn(None, False, True) as turn:
            expert_major.barrier(runtime.party())
            turn.finish((), ())
        if with_cpu_sync:
            _synchronize(runtime.device)

    # Operations.

    def dispatch(
        self,
        x: _Rows,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: _Event = None,
        previous_event_before_epilogue: _Event = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
        *,
        use_nvfp4: bool = False,
    ) -> tuple[_Rows, torch.Tensor | None, torch.Tensor | None, EPHandle, EventOverlap]:
        """Send every token to the ranks that hold its experts.

        Args:
            x: [T, H] of any real dtype with rows of a multiple of 16 bytes, or a tuple of one-byte data [T, H] and
                scales [T, S], float32 or int32, of any strides.
            topk_idx: int64 [T, K], 1 <= K <= 32, contiguous: expert ids from 0 to ``num_experts - 1``, or -1. Not
                with ``handle``.
            topk_weights: float32 [T, K].
            cumulative_local_expert_recv_stats: int32 [L]: the pairs of each local expert are added to it.
            num_experts: experts of all ranks, a multiple of the ranks. This and the next two may be left out, or must
                be as before, with ``handle``.
            num_max_tokens_per_rank: N, equal on all ranks, at least T; by default that of the buffer.
            expert_alignment: by default 1.
            num_sms: SMs to use; 0: :meth:`get_theoretical_num_sms`, or those of ``handle``.
            num_qps: accepted, without meaning here.
            previous_event: wait for this event instead of the current stream.
            previous_event_before_epilogue: another event to wait for.
            async_with_compute_stream: return an event instead of making the current stream wait.
            allocate_on_comm_stream: take the outputs from that stream's memory also where nothing else asks for it.
            handle: of an earlier dispatch: ``x`` goes the same ways, without new counts.
            do_handle_copy: keep a copy of ``topk_idx``, not the tensor itself.
            do_cpu_sync: wait for the counts, and give the outputs as many rows as come. By default so, unless there
                is a ``handle``. If not, they have as many as could come, and the per-expert list is empty.
            do_expand: give each (token, choice) a row, expert by expert; with ``handle``, as before.
            do_zero_padding: expanded: fill the rows that only align the experts with zeros; otherwise they are unset.
            use_tma_aligned_col_major_sf: return scales column by column, columns beginning on 16 bytes.
            use_nvfp4: must be False.

        Returns:
            ``recv_x``: [M, H], rows ordered by (source rank, source token); expanded [X, H], see
            :class:`tokenferry.EPHandle`. Of a tuple a tuple. ``recv_topk_idx``: int64 [M, K], local expert ids or -1;
            None if expanded. ``recv_topk_weights``: float32 [M, K], 0 where the id is -1; expanded [X]; None
            without ``topk_weights``. The handle, and the event.

            Without CPU sync M = R N, and X has room for min(K, L) choices of every row: rows past the last one are
            unset, but ids -1 and weights [M, K] 0.

        Raises:
            ArgumentError: an argument is not allowed; no peer was touched.
            NotImplementedError: ``use_nvfp4`` is True.
            MismatchError: ranks called different operations or disagree on shapes; raised on every rank.
            CorruptionError: what came is not what was sent; in paranoid mode only.
            CapacityError: without CPU sync, tokens choose an expert twice so often that a rank has no room for the
                copies; raised on every rank.
            PeerTimeoutError, PeerLostError: ranks did not take part.
        """
        if use_nvfp4:
            raise NotImplementedError("use_nvfp4: got True; allowed: False, rows travel as they are given")
        check_int("num_qps", num_qps, minimum=0)
        runtime = self._live_runtime()
        if handle is None:
            given = _or(num_max_tokens_per_rank, self.num_max_tokens_per_rank)
            require(num_experts is not None, "num_experts", None, "the number of experts of all ranks")
            assert num_experts is not None
            sms = check_int("num_sms", num_sms, minimum=0) or self._usual_sms
            host_waits = do_cpu_sync is not False
            sizes = Sizes(num_experts, given, _or(expert_alignment, 1), do_expand, host_waits, do_zero_padding, sms)
        else:
            sms = check_int("num_sms", num_sms, minimum=0) or expert_major.check_ep_handle(handle).num_sms
            expert_major.check_beside_handle(
                handle, topk_idx, num_experts, num_max_tokens_per_rank, expert_alignment, do_cpu_sync, do_expand
            )
        stats = cumulative_local_expert_recv_stats
        event = _event("previous_event", previous_event)
        before = _event("previous_event_before_epilogue", previous_event_before_epilogue)
        reads_what_came = stats is not None or use_tma_aligned_col_major_sf
        on_comm = allocate_on_comm_stream or before is not None or reads_what_came
        with runtime.comm.turn(event, async_with_compute_stream, on_comm) as turn:
            turn.wait(before)
            party = runtime.party(sms)
            local = (num_experts if handle is None else handle.num_experts) or 0
            expert_major.check_stats(party, stats, local // self.group_size)
            if handle is None:
                dispatch = paranoid_elastic.dispatch if self._is_paranoid else expert_major.dispatch
                received = dispatch(party, x, topk_idx, topk_weights, sizes, copy_topk=do_handle_copy)
            else:
                cached = paranoid_elastic.cached_dispatch if self._is_paranoid else expert_major.cached_dispatch
                received = cached(party, x, handle, topk_weights, zero_padding=do_zero_padding)
            scales = received.scales
            if scales is not None and use_tma_aligned_col_major_sf:
                scales = expert_major.column_major(scales)
            if stats is not None:
                stats.add_(received.handle.num_unaligned_recv_tokens_per_expert)
            if turn.is_plain:
                done = turn.finish()
            else:
                outputs = received.x, scales, received.topk_idx, received.topk_weights
                made = received.handle.tensors()
                read = (*(x if isinstance(x, tuple) else (x,)), topk_idx, topk_weights, stats)
                done = turn.finish((*read, *made), outputs if handle is not None else (*outputs, *made))
        rows: _Rows = received.x if scales is None else (received.x, scales)
        return rows, received.topk_idx, received.topk_weights, received.handle, done

    def combine(
        self,
        x: torch.Tensor,
        handle: EPHandle,
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: _Event = None,
        previous_event_before_epilogue: _Event = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Send the rows back and sum, for every token, all of its rows. No weights are applied.

        Args:
            x: bfloat16, float16, float32 or float64: rows as the dispatch returned them. Not expanded, [M, H], or
                fewer, if all that came are there; expanded [any, H], as many as ``handle.recv_src_metadata`` names.
            handle: of the dispatch.
            topk_weights: float32 [rows of x, K], summed the same way; expanded [rows of x], each put in its place.
            bias: None, one tensor or a tuple of two, each [T, H] of x's dtype, added first.
            num_sms: SMs to use; 0: those of the dispatch.
            num_qps: accepted, without meaning here.
            previous_event: as in :meth:`dispatch`.
            previous_event_before_epilogue: as in :meth:`dispatch`.
            async_with_compute_stream: as in :meth:`dispatch`.
            allocate_on_comm_stream: as in :meth:`dispatch`.

        Returns:
            ``combined_x`` [T, H] of x's dtype; ``combined_topk_weights`` float32 [T, K] or None; the event. Sums are
            in float32 (float64 for float64), ranks ascending, after the biases, rounded at the end. Expanded, what a
            rank adds is the sum of its copies, choices ascending, rounded too with ``allow_multiple_reduction``.

        Raises:
            ArgumentError: an argument is not allowed; no peer was touched.
            MismatchError: ranks called different operations or disagree on shapes; raised on every rank.
            CorruptionError: a sum is not that of the rows that were sent; in paranoid mode only.
            PeerTimeoutError, PeerLostError: ranks did not take part.
        """
        check_int("num_qps", num_qps, minimum=0)
        runtime = self._live_runtime()
        sms = check_int("num_sms", num_sms, minimum=0) or expert_major.check_ep_handle(handle).num_sms
        handle = expert_major.check_ep_handle(handle)
        event = _event("previous_event", previous_event)
        before = _event("previous_event_before_epilogue", previous_event_before_epilogue)
        on_comm = allocate_on_comm_stream or before is not None
        with runtime.comm.turn(event, async_with_compute_stream, on_comm) as turn:
            turn.wait(before)
            one_rounding = not self.allow_multiple_reduction
            combine = paranoid_elastic.combine if self._is_paranoid else expert_major.combine
            combined = combine(runtime.party(sms), x, handle, topk_weights, bias, one_rounding=one_rounding)
            if turn.is_plain:
                done = turn.finish()
            else:
                biases = bias if isinstance(bias, tuple) else (bias,)
                done = turn.finish((x, topk_weights, *biases, *handle.tensors()), combined)
        return *combined, done


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _event(name: str, given: object) -> EventHandle | None:
    """The event of an argument that may be one, or hold one, or be None."""
    if given is None or isinstance(given, EventHandle):
        return given
    if isinstance(given, EventOverlap):
        return given.event
    raise ArgumentError(name, type(given).__name__, "an EventHandle, an EventOverlap or None")


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
