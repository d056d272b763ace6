"""Buffer: the public face of tokenferry. Checks the life cycle and events, picks the mode, moves no data."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar, overload

import torch
import torch.distributed as dist

from tokenferry.buffer_internode import InternodeMethods
from tokenferry.buffer_low_latency import LowLatencyMethods
from tokenferry.buffer_memory import MemoryMethods
from tokenferry.config import (
    ALIGNMENT,
    Config,
    check_config,
    combine_preset,
    dispatch_preset,
)
from tokenferry.construction import (
    AnyRuntime,
    Wishes,
    choose_carrier,
    choose_device,
    choose_paranoid,
    construct_runtime,
    note_ignored,
    note_what_is_not_proven,
    timeout_seconds,
)
from tokenferry.dataplane import OperationKind
from tokenferry.errors import ArgumentError, BufferStateError
from tokenferry.events import EventHandle, EventOverlap
from tokenferry.handles import Handle
from tokenferry.modes import inputs
from tokenferry.modes.high_throughput import HighThroughput
from tokenferry.modes.intranode import Received
from tokenferry.modes.paranoid import Paranoid
from tokenferry.observing import StatsMethods, debug_wanted, observed
from tokenferry.rendezvous import COMPILING_SECONDS, Meetings, meet
from tokenferry.shrink import ShrinkMethods
from tokenferry.streams import NoTurn, Turn, check_events
from tokenferry.topology import Topology
from tokenferry.validation import check_int

logger = logging.getLogger("tokenferry")

_Rows = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_AnyRows = TypeVar("_AnyRows", torch.Tensor, tuple[torch.Tensor, torch.Tensor])
"""What comes is of the kind that is sent."""


class Buffer(LowLatencyMethods, InternodeMethods, MemoryMethods, ShrinkMethods, StatsMethods):
    """The expert-parallel communication buffer of one rank: dispatch and combine among the ranks of a group.

    Construction is collective over ``group``: every rank must construct. Every operation is collective too: all
    ranks call the same operations in the same order; ranks without tokens take part with zero rows.

    Args:
        group: a ``torch.distributed`` process group of any backend; used only to construct.
        num_nvl_bytes: ceiling, in bytes, for the memory through which rows travel inside a node; a multiple of
            128. A hint: smaller is slower, never wrong. 0 means 32 MB.
        num_rdma_bytes: with ``low_latency_mode``, on GPUs: memory that rows of low-latency operations are pushed to,
            equal on all ranks, see :meth:`get_low_latency_rdma_size_hint`; on CPU ranks: a further ceiling for the
            memory above (the larger one holds). A multiple of 128. Without meaning otherwise.
        low_latency_mode: allow the low-latency operations too, in any order with the others.
        num_qps_per_rank: accepted, without meaning here; a float is fine.
        allow_nvlink_for_low_latency_mode: accepted, without meaning here.
        allow_mnnvl: accepted, without meaning here.
        explicitly_destroy: accepted; :meth:`destroy` may always be called, and need not be.
        use_fabric: accepted, without meaning here.
        allow_nvlink_for_normal_mode: accepted, without meaning here.
        enable_shrink: low-latency operations mask ranks that die or stay silent, and go on without them.
        exact_combine: low-latency combines on GPUs send every row, and round once, instead of one sum, rounded to
            bfloat16, for each token and rank; CPU ranks always do. Between nodes partial sums travel in float32.
        comm: an mpi4py communicator, used where ``group`` is None.
        timeout: seconds to wait for a peer that makes no progress; by default the environment variable
            ``TOKENFERRY_TIMEOUT``, else 100.
        device: where the tensors of this rank live, a GPU or ``"cpu"``, for all ranks alike; by default the
            environment variable ``TOKENFERRY_DEVICE``, else the current GPU if there is one.
        heap_bytes: GPU memory for :meth:`empty`, equal on all ranks.
        node: name of the node this rank is on; by default found as :func:`tokenferry.topology.node_key` says.
        carrier: what moves rows between nodes; by default the environment variable ``TOKENFERRY_CARRIER``, else
            ``"process_group"``: Gloo for CPU ranks, NCCL for GPUs. ``"nvshmem"``, for GPUs, where it is installed:
            all ranks of the first such Buffer of a process join NVSHMEM, and ranks of later ones must be among them.

    Raises:
        ArgumentError: an argument is not allowed.
        TokenferryError: nodes of unequal size, no shared memory or no connection between nodes on some rank.
            Raised on every rank.
    """

    num_sms: ClassVar[int] = 20
    """SMs of the presets; see :meth:`set_num_sms`."""

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: float = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        *,
        explicitly_destroy: bool = False,
        use_fabric: bool = False,
        allow_nvlink_for_normal_mode: bool = True,
        enable_shrink: bool = False,
        exact_combine: bool = False,
        comm: Any | None = None,
        timeout: float | None = None,
        device: torch.device | str | int | None = None,
        heap_bytes: int = 0,
        node: str | int | None = None,
        carrier: str | None = None,
    ) -> None:
        self.runtime: AnyRuntime | None = None
        self._debug = debug_wanted()
        num_nvl_bytes = check_int("num_nvl_bytes", num_nvl_bytes, minimum=0, multiple_of=ALIGNMENT)
        num_rdma_bytes = check_int("num_rdma_bytes", num_rdma_bytes, minimum=0, multiple_of=ALIGNMENT)
        seconds = timeout_seconds(timeout)
        note_ignored(
            num_rdma_bytes=num_rdma_bytes != 0 and not low_latency_mode,
            num_qps_per_rank=num_qps_per_rank != 24,
            allow_nvlink_for_low_latency_mode=not allow_nvlink_for_low_latency_mode,
            allow_mnnvl=allow_mnnvl,
            use_fabric=use_fabric,
            allow_nvlink_for_normal_mode=not allow_nvlink_for_normal_mode,
            enable_shrink=enable_shrink and not low_latency_mode,
        )
        chosen = choose_device(device)
        rendezvous = meet(group, comm, chosen)
        self.rank = rendezvous.rank
        self.group_size = rendezvous.num_ranks
        self.group: Any = group if group is not None else comm
        self.num_nvl_bytes = num_nvl_bytes
        self.num_rdma_bytes = num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink
        push_bytes = num_rdma_bytes if low_latency_mode else 0
        heap_bytes = check_int("heap_bytes", heap_bytes, minimum=0)
        self._wishes = Wishes(
            chosen,
            group is not None,
            num_nvl_bytes,
            push_bytes,
            heap_bytes,
            seconds,
            enable_shrink and low_latency_mode,
            exact_combine,
            choose_carrier(carrier, chosen),
            paranoid=choose_paranoid(),
        )
        self._node = node
        self._proves_low_latency = self._wishes.paranoid and chosen.type == "cpu"
        self.runtime = construct_runtime(rendezvous, self._wishes, node)
        self._rendezvous = rendezvous.without_group()
        self._meetings = Meetings(self._rendezvous, self.runtime.key, seconds)
        note_what_is_not_proven(self._wishes.paranoid, chosen, low_latency_mode)
        logger.info(
            "Buffer of rank %d of %d on %s: stage up to %d bytes, timeout %g s, nodes %s, carrier between them: %s",
            self.rank,
            self.group_size,
            chosen,
            num_nvl_bytes,
            seconds,
            self.topology.node_of,
            self._wishes.carrier if self.topology.num_nodes > 1 else "none",
        )

    # Life cycle.

    def destroy(self) -> None:
        """Let go of the Buffer's memory, and of the group. Local: no peer is waited for, none is harmed.

        May be called again. ``group`` is None afterwards: so ``destroy_process_group`` finds its last reference.
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
            BufferStateError: the Buffer was destroyed.
        """
        return self._live_runtime().topology

    def _live_runtime(self) -> AnyRuntime:
        if self.runtime is None:
            raise BufferStateError("the Buffer was destroyed")
        return self.runtime

    # Class-wide settings.

    @staticmethod
    def is_sm90_compiled() -> bool:
        """Whether FP8 rows can be moved; always True here."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """Set the SM count of the presets of all Buffers.

        Args:
            new_num_sms: an even number.
        """
        Buffer.num_sms = check_int("new_num_sms", new_num_sms, minimum=0, multiple_of=2)

    @staticmethod
    def capture() -> EventOverlap:
        """An event at the current point of the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The preset for dispatch among ``num_ranks`` ranks, any number of them."""
        return dispatch_preset(num_ranks, Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The preset for combine among ``num_ranks`` ranks, any number of them."""
        return combine_preset(num_ranks, Buffer.num_sms)

    # High throughput.

    def get_dispatch_layout(
        self,
        topk_idx: torch.Tensor,
        num_experts: int,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor, EventOverlap]:
        """Count what a dispatch of these choices would send. No communication.

        Args:
            topk_idx: int64 [T, K], contiguous: expert ids from 0 to ``num_experts - 1``, or -1 for no choice.
            num_experts: experts of all ranks, a multiple of the ranks; expert e lives on rank e // (E / R).
            previous_event: wait for this event instead of the current stream.
            async_finish: return an event instead of making the current stream wait.
            allocate_on_comm_stream: needs ``previous_event`` with an event, and ``async_finish``.

        Returns:
            ``num_tokens_per_rank`` int32 [R], ``num_tokens_per_rdma_rank`` int32 [G] (None inside a node),
            ``num_tokens_per_expert`` int32 [E] (duplicates count), ``is_token_in_rank`` bool [T, R], and the event.

        Raises:
            ArgumentError: an argument is not allowed.
        """
        event = check_events(previous_event, async_finish, allocate_on_comm_stream)
        runtime = self._live_runtime()
        with runtime.comm.turn(event, async_finish, allocate_on_comm_stream) as turn:
            result, per_node = HighThroughput(runtime.party(), None).layout(topk_idx, num_experts)
            done = turn.finish((topk_idx,), (*result, per_node))
        return result.num_tokens_per_rank, per_node, result.num_tokens_per_expert, result.is_token_in_rank, done

    @overload
    def dispatch(
        self,
        x: _AnyRows,
        handle: None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[_AnyRows, torch.Tensor | None, torch.Tensor | None, list[int], Handle, EventOverlap]: ...
    @overload
    def dispatch(
        self,
        x: _AnyRows,
        handle: tuple[torch.Tensor, ...],
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: None = None,
        topk_weights: None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[_AnyRows, None, None, None, None, EventOverlap]: ...
    @observed(OperationKind.DISPATCH, OperationKind.CACHED_DISPATCH)
    def dispatch(
        self,
        x: _Rows,
        handle: tuple[torch.Tensor, ...] | None = None,
        num_tokens_per_rank: torch.Tensor | None = None,
        num_tokens_per_rdma_rank: torch.Tensor | None = None,
        is_token_in_rank: torch.Tensor | None = None,
        num_tokens_per_expert: torch.Tensor | None = None,
        topk_idx: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        expert_alignment: int = 1,
        num_worst_tokens: int = 0,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[
        _Rows,
        torch.Tensor | None,
        torch.Tensor | None,
        list[int] | None,
        Handle | None,
        EventOverlap,
    ]:
        """Send every token once to every rank that holds one of its experts.

        Args:
            x: [T, H] of any real dtype with rows of a multiple of 16 bytes, or a tuple of one-byte data [T, H] and
                scales [T, S], float32 or int32, of any strides.
            handle: of an earlier dispatch: sends ``x`` along the same routes, without new counts. Excludes
                ``topk_idx`` and ``topk_weights``; the count arguments are not looked at.
            num_tokens_per_rank: int32 [R], from :meth:`get_dispatch_layout`.
            num_tokens_per_rdma_rank: int32 [G], from :meth:`get_dispatch_layout`; not looked at inside a node.
            is_token_in_rank: bool [T, R], from :meth:`get_dispatch_layout`.
            num_tokens_per_expert: int32 [E], from :meth:`get_dispatch_layout`.
            topk_idx: int64 [T, K], K <= 32, contiguous; together with ``topk_weights`` or not at all.
            topk_weights: float32 [T, K].
            expert_alignment: round each entry of the returned list up to a multiple of this.
            num_worst_tokens: give the outputs exactly this many rows, and return an empty list. Needs top-k: rows
                past the last received one have ``recv_topk_idx`` -1 and weight 0, their ``recv_x`` is not set.
            config: tuning; results never depend on it.
            previous_event: as in :meth:`get_dispatch_layout`.
            async_finish: as in :meth:`get_dispatch_layout`.
            allocate_on_comm_stream: as in :meth:`get_dispatch_layout`.

        Returns:
            ``recv_x`` [M, H] (or the tuple, scales contiguous), rows ordered by (source rank, source token);
            ``recv_topk_idx`` [M, K], local expert ids or -1; ``recv_topk_weights`` [M, K], 0 where the id is -1;
            the list of (token, choice) pairs for each local expert; the handle; the event. With a handle
            everything between ``recv_x`` and the event is None.

        Raises:
            ArgumentError: an argument is not allowed; no peer was touched.
            MismatchError: ranks called different operations or disagree on shapes; raised on every rank.
            CorruptionError: what came is not what was sent; in paranoid mode only.
            CapacityError: ``num_worst_tokens`` is too small on some rank; raised on every rank.
            PeerTimeoutError, PeerLostError: ranks did not take part.
        """
        if config is not None:
            check_config(config)
        event = None
        if previous_event is not None or allocate_on_comm_stream:
            event = check_events(previous_event, async_finish, allocate_on_comm_stream)
        if handle is not None:
            if topk_idx is not None or topk_weights is not None:
                name = "topk_weights" if topk_idx is None else "topk_idx"
                raise ArgumentError(name, "a tensor beside handle", "None: the handle has the routes already")
            if num_worst_tokens != 0:
                raise ArgumentError("num_worst_tokens", num_worst_tokens, "0 beside handle")
        runtime = self._live_runtime()
        routes: tuple[torch.Tensor | None, ...]
        with runtime.comm.turn(event, async_finish, allocate_on_comm_stream) as turn:
            mode = self._mode(runtime, config)
            if handle is not None:
                routes = handle
                received = mode.cached_dispatch(x, handle)
            else:
                routes = num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert, topk_idx, topk_weights
                given = inputs.check_inputs(mode.party, x, *routes, expert_alignment, num_worst_tokens)
                received = mode.dispatch(given, num_tokens_per_rdma_rank)
            done = _finish(turn, x, routes, received)
        rows: _Rows = received.x if received.scales is None else (received.x, received.scales)
        return rows, received.topk_idx, received.topk_weights, received.num_per_expert, received.handle, done

    @observed(OperationKind.DISPATCH, name="dispatch")
    def _dispatch_choices(
        self,
        x: _Rows,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        num_experts: int,
        expert_alignment: int,
        num_worst_tokens: int,
        config: Config | None,
    ) -> Received:
        """:meth:`get_dispatch_layout` and :meth:`dispatch` as one operation, for those who need no layout."""
        if config is not None:
            check_config(config)
        runtime = self._live_runtime()
        with runtime.comm.turn(None, False, False) as turn:
            mode = self._mode(runtime, config)
            (per_rank, per_expert, member), per_node = mode.layout(topk_idx, num_experts)
            routes = per_rank, member, per_expert, topk_idx, topk_weights
            given = inputs.check_inputs(mode.party, x, *routes, expert_alignment, num_worst_tokens)
            received = mode.dispatch(given, per_node)
            _finish(turn, x, routes, received)
        return received

    @observed(OperationKind.COMBINE)
    def combine(
        self,
        x: torch.Tensor,
        handle: tuple[torch.Tensor, ...],
        topk_weights: torch.Tensor | None = None,
        bias: torch.Tensor | tuple[torch.Tensor | None, torch.Tensor | None] | None = None,
        config: Config | None = None,
        previous_event: EventOverlap | None = None,
        async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, EventOverlap]:
        """Send the rows back and sum, for every token, those of the ranks that had it. No weights are applied.

        Args:
            x: [M, H] in bfloat16, float16, float32 or float64, rows as dispatch returned them.
            handle: of the dispatch.
            topk_weights: float32 [M, K], summed the same way.
            bias: None, one tensor or a tuple of two, each [T, H] of x's dtype, added first.
            config: tuning; results never depend on it.
            previous_event: as in :meth:`get_dispatch_layout`.
            async_finish: as in :meth:`get_dispatch_layout`.
            allocate_on_comm_stream: as in :meth:`get_dispatch_layout`.

        Returns:
            ``combined_x`` [T, H] of x's dtype: ``bias_0 + bias_1 + sum over ranks, ascending``, in float32 (float64
            for float64) with one rounding; between nodes the sum over the ranks of each node is rounded first, unless
            ``exact_combine`` is set; ``combined_topk_weights`` float32 [T, K] or None; the event.

        Raises:
            ArgumentError: an argument is not allowed; no peer was touched.
            MismatchError: ranks called different operations or disagree on shapes; raised on every rank.
            CorruptionError: a sum is not that of the rows that were sent; in paranoid mode only.
            PeerTimeoutError, PeerLostError: ranks did not take part.
        """
        if config is not None:
            check_config(config)
        event = None
        if previous_event is not None or allocate_on_comm_stream:
            event = check_events(previous_event, async_finish, allocate_on_comm_stream)
        runtime = self._live_runtime()
        with runtime.comm.turn(event, async_finish, allocate_on_comm_stream) as turn:
            combined, weights = self._mode(runtime, config).combine(x, handle, topk_weights, bias)
            if turn.is_plain:
                done = turn.finish()
            else:
                added = bias if isinstance(bias, tuple) else (bias,)
                done = turn.finish((x, *handle, topk_weights, *added), (combined, weights))
        return combined, weights, done

    def warmup(
        self,
        hidden: int,
        num_topk: int,
        num_experts: int,
        dtype: torch.dtype = torch.bfloat16,
        scale_bytes: int = 0,
        combine_dtype: torch.dtype | None = None,
    ) -> None:
        """Compile what operations on such tensors need, on all ranks, before any of them waits for another.

        Collective, like construction. Without it the first operation compiles, for seconds, while its peers wait.
        Required before a CUDA graph is captured, unless the same operations ran before. CPU ranks only meet.

        Args:
            hidden: elements of a row.
            num_topk: choices of a token.
            num_experts: experts of all ranks, a multiple of the ranks.
            dtype: of the rows that are dispatched.
            scale_bytes: bytes of a row's scales; 0 for none.
            combine_dtype: of the rows that are combined; by default ``dtype``, or bfloat16 where that has one byte.
                Combines with biases compile at their first call.

        Raises:
            PeerTimeoutError, PeerLostError: ranks did not come within the deadline and five minutes.
        """
        runtime = self._live_runtime()
        with runtime.comm.turn(None, False, False):
            mode = HighThroughput(runtime.party(), None)
            mode.warm(hidden, num_topk, num_experts, dtype, scale_bytes, combine_dtype)
        self._meetings.gather("warmup", more_seconds=COMPILING_SECONDS)

    def _mode(self, runtime: AnyRuntime, config: Config | None) -> HighThroughput:
        party = runtime.party(Buffer.num_sms if config is None else config.num_sms)
        return (Paranoid if self._wishes.paranoid else HighThroughput)(party, config)

    @staticmethod
    def _unpack_bias(bias: object) -> tuple[object, object]:
        return inputs.unpack_bias(bias)


def _finish(
    turn: Turn | NoTurn, x: object, routes: Iterable[torch.Tensor | None], received: Received
) -> EventOverlap:
    """End the turn of a dispatch of ``x``, which went along ``routes``."""
    if turn.is_plain:
        return turn.finish()
    outputs = (received.x, received.scales, received.topk_idx, received.topk_weights, *(received.handle or ()))
    return turn.finish((*(x if isinstance(x, tuple) else (x,)), *routes), outputs)
