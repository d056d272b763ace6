"""The low-latency methods of Buffer, kept apart from the rest for length alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from tokenferry.config import low_latency_size_hint
from tokenferry.dataplane import OperationKind, Pending
from tokenferry.errors import ArgumentError, BufferStateError, PeerTimeoutError
from tokenferry.events import EventOverlap
from tokenferry.modes import low_latency, paranoid_low_latency
from tokenferry.modes.inputs import Party
from tokenferry.modes.low_latency import LowLatencyHandle
from tokenferry.observing import observed
from tokenferry.rendezvous import COMPILING_SECONDS, Meetings
from tokenferry.validation import check_int, check_tensor, require

if TYPE_CHECKING:
    from tokenferry.runtime import Runtime
    from tokenferry.runtime_cuda import CudaRuntime

logger = logging.getLogger("tokenferry")

Hook = Callable[[], None]


class LowLatencyMethods:
    """Dispatch and combine for decoding: worst-case shapes, no host round trip, receive on demand.

    Every operation sends at once and receives when it is called for. With ``return_recv_hook`` the receive waits
    for the hook. Any number of operations may be in flight, hooks may be called in any order, each takes effect
    once, and a receive may be complete before its hook is called. Replays of a CUDA graph are not known to the host:
    call the hooks of operations sent outside of it before it is replayed.

    On GPUs what kernels find is raised by the next call on the Buffer; outputs are undefined until then.
    """

    low_latency_mode: bool
    enable_shrink: bool
    group_size: int
    rank: int
    runtime: Runtime | CudaRuntime | None
    _proves_low_latency: bool
    _meetings: Meetings

    def _live_runtime(self) -> Runtime | CudaRuntime:
        raise NotImplementedError

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes for ``num_rdma_bytes``; see :func:`tokenferry.config.low_latency_size_hint`."""
        return low_latency_size_hint(num_max_dispatch_tokens_per_rank, hidden, num_ranks, num_experts)

    @observed(OperationKind.LOW_LATENCY_DISPATCH)
    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        *,
        use_nvfp4: bool = False,
        x_global_scale: torch.Tensor | None = None,
    ) -> tuple[
        torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        torch.Tensor,
        LowLatencyHandle,
        EventOverlap,
        Hook | None,
    ]:
        """Send every token to its experts, one row per (token, choice).

        Args:
            x: bfloat16 [T, H], T <= N; H a multiple of 128 with FP8, else of 8.
            topk_idx: int64 [T, K], K <= 32, contiguous: expert ids, or -1 for no choice.
            num_max_dispatch_tokens_per_rank: N, equal on all ranks; at most N choices of one expert by a rank.
            num_experts: E, a multiple of the ranks.
            cumulative_local_expert_recv_stats: int32 [L]; the received rows of each local expert are added.
            dispatch_wait_recv_cost_stats: int64 [R]; the time waited for each rank is added, in nanoseconds.
            use_fp8: quantise to float8_e4m3fn with a scale for 128 channels (formula: spec of DeepEP, and
                :mod:`tokenferry.dataplane.cpu.fp8`).
            round_scale: scales are powers of two. Without FP8 there are no scales, and the two flags mean nothing.
            use_ue8m0: scales are exponent bytes, four in an int32; needs ``round_scale``.
            async_finish: return an event.
            return_recv_hook: return a function that receives; outputs are set when it has been called. Excludes
                ``async_finish``.
            use_nvfp4: must be False.
            x_global_scale: must be None.

        Returns:
            ``recv_x``, bfloat16 [L, R * N, H], or with FP8 a tuple of float8_e4m3fn [L, R * N, H] and the scales,
            float32 [L, R * N, H / 128] or int32 [L, R * N, ceil(H / 512)], column-major in the last two dimensions;
            the rows of each expert int32 [L]; the handle; the event; the hook or None. Slab rows are ordered by
            (source rank, source token, choice); those past the count are not set.

        Raises:
            ArgumentError: an argument is not allowed; no peer was touched.
            NotImplementedError: ``use_nvfp4`` is True, or ``x_global_scale`` given; no peer was touched.
            MismatchError: ranks disagree on the operation or its shapes; the Buffer is unusable afterwards.
            CorruptionError: what came is not what was sent, on CPU ranks in paranoid mode only; raised where the
                operation is received.
            PeerTimeoutError, PeerLostError: ranks did not take part (with ``enable_shrink`` they are masked instead).
            BufferStateError: on GPUs, graph replays came round to an operation whose hook was not called; the Buffer
                is unusable afterwards.
        """
        if use_nvfp4:
            raise NotImplementedError("use_nvfp4: got True; allowed: False: rows travel in bfloat16 or FP8")
        if x_global_scale is not None:
            raise NotImplementedError(
                "x_global_scale: got a scale; allowed: None: FP8 rows have a scale for 128 channels"
            )
        if async_finish and return_recv_hook:
            raise _two_ways_to_finish()
        runtime = self.runtime or self._live_runtime()
        party = self._low_latency_party(runtime)
        run = paranoid_low_latency.dispatch if self._proves_low_latency else low_latency.dispatch
        given = (
            party,
            x,
            topk_idx,
            num_max_dispatch_tokens_per_rank,
            num_experts,
            cumulative_local_expert_recv_stats,
            dispatch_wait_recv_cost_stats,
            use_fp8,
            round_scale,
            use_ue8m0,
            not return_recv_hook,
        )
        if async_finish:
            with runtime.comm.turn(None, True, False) as turn, runtime.comm.in_order():
                sent = run(*given)
                stats = (cumulative_local_expert_recv_stats, dispatch_wait_recv_cost_stats)
                written = (sent.x, sent.scales, sent.num_received, *sent.handle[:2], *stats)
                event = turn.finish((x, topk_idx, *stats), written)
        else:
            with runtime.comm.in_order():
                sent = run(*given)
            event = EventOverlap()
        recv_x, scales, num_received, handle, pending = sent
        rows = recv_x if scales is None else (recv_x, scales)
        return rows, num_received, handle, event, _hook(runtime, pending) if return_recv_hook else None

    @observed(OperationKind.LOW_LATENCY_COMBINE)
    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[object, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Send the experts' rows home and sum them, weighted.

        Args:
            x: bfloat16 [L, R * N, H], rows where dispatch put them.
            topk_idx: int64 [T, K]: those of the dispatch, or the same with further -1.
            topk_weights: float32 [T, K].
            handle: of the dispatch.
            use_logfmt: accepted, without effect: rows, or sums of them, travel as they do without it, never in
                fewer bits than bfloat16. Excludes ``zero_copy``.
            zero_copy: take the rows from :meth:`get_next_low_latency_combine_buffer` instead of ``x``.
            async_finish: return an event.
            return_recv_hook: as in :meth:`low_latency_dispatch`.
            out: bfloat16 [T, H], contiguous, to write to and return.
            combine_wait_recv_cost_stats: int64 [R]; the time waited for each rank is added, in nanoseconds.

        Returns:
            [T, H]: the sum over choices, ascending, of weight times row in float32, rounded once; on GPUs without
            ``exact_combine`` the sum over ranks, ascending, of such sums over each rank's experts, these rounded to
            bfloat16 too; the event; the hook or None.

        Raises:
            As :meth:`low_latency_dispatch`.
        """
        if async_finish and return_recv_hook:
            raise _two_ways_to_finish()
        if use_logfmt and zero_copy:
            raise ArgumentError("use_logfmt", "True with zero_copy", "one of the two")
        runtime = self.runtime or self._live_runtime()
        party = self._low_latency_party(runtime)
        known = low_latency.check_handle(party, handle)
        run = paranoid_low_latency.combine if self._proves_low_latency else low_latency.combine
        given = (
            party,
            x,
            topk_idx,
            topk_weights,
            known,
            self._combine_rows(party, known) if zero_copy else None,
            out,
            combine_wait_recv_cost_stats,
            not return_recv_hook,
        )
        if async_finish:
            with runtime.comm.turn(None, True, False) as turn, runtime.comm.in_order():
                combined, pending = run(*given)
                written = (combined, combine_wait_recv_cost_stats)
                event = turn.finish((x, topk_idx, topk_weights, *known[:2], *written), written)
        else:
            with runtime.comm.in_order():
                combined, pending = run(*given)
            event = EventOverlap()
        return combined, event, _hook(runtime, pending) if return_recv_hook else None

    def get_next_low_latency_combine_buffer(self, handle: tuple[object, ...]) -> torch.Tensor:
        """bfloat16 [L, R * N, H] for the experts' outputs, to be combined with ``zero_copy=True`` next.

        The same memory at every call for a shape: the current stream waits for the operation that read it last.
        """
        runtime = self._live_runtime()
        party = self._low_latency_party(runtime)
        with runtime.comm.in_order():
            return self._combine_rows(party, low_latency.check_handle(party, handle))

    def _combine_rows(self, party: Party, handle: LowLatencyHandle) -> torch.Tensor:
        shape = low_latency.combine_buffer_shape(party, handle)
        return self._live_runtime().combine_rows(shape)

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """Make the Buffer fit for low-latency operations after foreign use of its memory.

        A collective barrier: when it returns, what any rank has queued on its GPU before the call is done, such as
        writes to the tensors of :meth:`tokenferry.Buffer.get_local_buffer_tensor`, which rows of peers would get in
        the way of. Nothing else is left to do: flags and counters lie outside of that memory. With ``enable_shrink``
        masked ranks are not waited for, and those that do not come are masked.

        Raises:
            ArgumentError: an argument is not allowed.
            PeerTimeoutError: ranks did not come within the deadline, and cannot be masked.
            PeerLostError: the store that ranks meet in is gone, see :meth:`tokenferry.Buffer.shrink`.
        """
        self._low_latency_party()
        check_int("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank, minimum=1)
        check_int("hidden", hidden, minimum=1)
        check_int("num_experts", num_experts, minimum=1)
        runtime = self._live_runtime()
        runtime.comm.synchronize()
        masked = self._masked_ranks() if self.enable_shrink else []
        try:
            self._meetings.gather(
                "clean_low_latency_buffer", ranks=[rank for rank in range(self.group_size) if rank not in masked]
            )
        except PeerTimeoutError as error:
            if not self.enable_shrink:
                raise
            logger.warning("%s: masked", error)
            for rank in error.ranks:
                self.low_latency_update_mask_buffer(rank, True)

    def _masked_ranks(self) -> list[int]:
        status = torch.empty(self.group_size, dtype=torch.int32, device=self._low_latency_party().device)
        self.low_latency_query_mask_buffer(status)
        return [rank for rank, is_masked in enumerate(status.tolist()) if is_masked]

    def low_latency_warmup(
        self,
        num_max_dispatch_tokens_per_rank: int,
        hidden: int,
        num_topk: int,
        num_experts: int,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
    ) -> None:
        """Compile what low-latency operations of these shapes need, on all ranks, before any waits for another.

        Collective, like construction. Without it the first operation compiles, for seconds, while its peers wait.
        Required before a CUDA graph is captured, unless the same operations ran before. Nothing to do on CPU ranks.

        Args:
            num_max_dispatch_tokens_per_rank: as in :meth:`low_latency_dispatch`.
            hidden: elements of a row.
            num_topk: choices of a token.
            num_experts: experts of all ranks, a multiple of the ranks.
            use_fp8: as in :meth:`low_latency_dispatch`.
            round_scale: as in :meth:`low_latency_dispatch`.
            use_ue8m0: as in :meth:`low_latency_dispatch`.
        """
        scale_format = low_latency.scale_format_of(use_fp8, round_scale, use_ue8m0)
        party = self._low_latency_party()
        with self._live_runtime().comm.in_order():
            low_latency.warm(party, num_max_dispatch_tokens_per_rank, hidden, num_topk, num_experts, scale_format)
        self._meetings.gather("low_latency_warmup", more_seconds=COMPILING_SECONDS)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank (send it nothing, wait for nothing, skip its experts) or, by default, take it back.

        Local: every rank has a view of its own.

        Raises:
            ArgumentError: no such rank, or this one is to be masked.
            BufferStateError: without ``enable_shrink``.
        """
        party = self._shrink_party()
        rank = check_int("rank_to_mask", rank_to_mask, minimum=0)
        require(rank < self.group_size, "rank_to_mask", rank, f"a rank below {self.group_size}")
        require(not mask or rank != self.rank, "rank_to_mask", rank, "another rank than this one")
        with self._live_runtime().comm.in_order():
            party.plane.set_masked(rank, mask)

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Write 1 for every masked rank and 0 for the others into int32 [R]."""
        party = self._shrink_party()
        status = check_tensor(
            "mask_status", mask_status, shape=(self.group_size,), dtypes=(torch.int32,), device=party.device
        )
        with self._live_runtime().comm.in_order():
            party.plane.write_mask(status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Take all masked ranks back."""
        party = self._shrink_party()
        with self._live_runtime().comm.in_order():
            for rank in range(self.group_size):
                party.plane.set_masked(rank, False)

    def _low_latency_party(self, runtime: Runtime | CudaRuntime | None = None) -> Party:
        party = (runtime or self._live_runtime()).party()
        if not self.low_latency_mode:
            raise BufferStateError("construct the Buffer with low_latency_mode=True for low-latency operations")
        return party

    def _shrink_party(self) -> Party:
        party = self._low_latency_party()
        if not self.enable_shrink:
            raise BufferStateError("shrink mode must be enabled: construct the Buffer with enable_shrink=True")
        return party


def _two_ways_to_finish() -> ArgumentError:
    return ArgumentError("async_finish", "True with return_recv_hook", "one of the two")


def _hook(runtime: Runtime | CudaRuntime, pending: Pending) -> Hook:
    """What receives, on the stream that is current then, when it is called first."""
    comm, waiting, lock = runtime.comm, [pending], threading.Lock()

    def hook() -> None:
        with lock:
            if waiting:
                with comm.in_order():
                    waiting[0].finish()
                waiting.clear()

    return hook
