"""The low-latency operations of a CUDA rank: which slot, how many programs, what is under way.

An operation is one launch where its result is asked for at once, two where a hook receives. The host never waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from tokenferry.config import ALIGNMENT, align_up
from tokenferry.dataplane import LowLatencyCombinePlan, LowLatencyDispatchPlan, Relays, ScaleFormat, Signature
from tokenferry.dataplane.cuda import low_latency_programs as programs
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.dataplane.cuda.launch import Job, Variant
from tokenferry.dataplane.cuda.programs import Target, number_of
from tokenferry.dataplane.tensors import Allocate, piece_of
from tokenferry.errors import ArgumentError, BufferStateError
from tokenferry.kept import Kept

MOST_TOKENS = 1 << 20
FEWEST_SLOTS = 2
_FEWEST_ROWS = 16
"""Of another rank, that there are programs for: ranks that decode have different numbers of tokens, or none."""


class Place(NamedTuple):
    """The push area of every rank's heap, and who pushes there."""

    rank: int
    num_ranks: int
    address: int
    """Of this rank's heap."""
    offset: int
    """Of the area in a heap, bytes."""
    nbytes: int
    target: Target
    timeout: int
    """Nanoseconds."""
    num_sms: int
    shares_gpu: bool
    """Whether other ranks run on the GPU: then one program on each of ``num_sms`` surely runs beside theirs."""
    shrinks: bool
    exact: bool

    @property
    def overlaps(self) -> bool:
        """Whether programs are placed while the kernel before ends. They would take SMs from other ranks'."""
        return self.target.can_bulk and not self.shares_gpu


class _Prepared(NamedTuple):
    """What calls of the same shapes share. The variants end with their numbers."""

    first: Variant
    """Sends; and receives, where that is to be done at once."""
    second: Variant | None
    """Receives."""
    grid: int
    """Programs of the first."""
    senders: int
    receivers: int
    table_bytes: int
    """Bytes of all tables of the dispatch."""


class _Tables(NamedTuple):
    """Where tables lie in their memory; see :meth:`LowLatency.tables`."""

    size: int
    """Words of 8 bytes of all."""
    slabs: tuple[int, int]
    """Shape of ``src_info``."""
    ranges: tuple[int, int]
    """Shape, in words of 8 bytes."""
    first_range: int
    """Words of 8 bytes in front of the ranges."""
    counts: tuple[int]
    """Shape."""
    first_count: int
    """Words of 4 bytes in front of the counts."""


class LowLatency:
    """See :class:`tokenferry.dataplane.DataPlane` for what the methods do.

    Operations use the slots of the area in turn. Before a slot comes round again its operation is received, whether
    its hook was called or not: so any number may be in flight, and hooks be called in any order.

    Args:
        place: where.
        context: addresses of the heap table, the state and the status.
        check: raises what earlier operations reported.
        is_capturing: tells whether a CUDA graph is captured on the current stream.
        aligned: makes a copy of a tensor, as kernels want one that does not begin on 16 bytes.
    """

    def __init__(
        self,
        place: Place,
        context: tuple[int, int, int],
        check: Callable[[], None],
        is_capturing: Callable[[], bool],
        aligned: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._place = place
        self._context = context
        self.check = check
        self.is_capturing = is_capturing
        self._aligned = aligned
        self.is_closed = False
        self.device = place.target.device
        self._depth = 0
        self._num_sent = 0
        self._pending: deque[Receive] = deque()
        self._prepared: Kept[_Prepared] = Kept()
        self._received = Receive(self, 0)
        self._tables: Kept[_Tables] = Kept()
        self._relay_tables: dict[object, tuple[torch.Tensor, torch.Tensor]] = {}

    def num_slots(self, layouts: Sequence[tuple[int, ...]]) -> int:
        """How many slots the area has, as many as fit or at least two; decided by the first operation's shapes."""
        if self._depth == 0:
            need = max(layout[-1] for layout in layouts)
            if FEWEST_SLOTS * align_up(need) > self._place.nbytes:
                raise self._too_small(FEWEST_SLOTS * align_up(need))
            self._depth = min(self._place.nbytes // align_up(need), words.MAX_SLOTS)
        return self._depth

    def _slot_bytes(self, layout: tuple[int, ...]) -> int:
        nbytes = self._place.nbytes // self._depth // ALIGNMENT * ALIGNMENT
        if layout[-1] > nbytes:
            raise self._too_small(self._depth * align_up(layout[-1]))
        return nbytes

    def _too_small(self, need: int) -> ArgumentError:
        return ArgumentError(
            "num_rdma_bytes", f"{self._place.nbytes} bytes", f"at least {need} bytes for operations of this shape"
        )

    def tables(
        self, num_sources: int, num_local_experts: int, num_max_tokens: int, num_topk: int, allocate: Allocate
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :meth:`tokenferry.dataplane.DataPlane.low_latency_tables`; all in one piece of memory.

        The ranges, int64 [L, R], follow ``src_info`` and the table behind it, then the counts. ``num_sources``: R;
        ``num_max_tokens``: of one of them.
        """
        key = num_sources, num_local_experts, num_max_tokens, num_topk
        size, slabs, ranges, first_range, counts, first_count = self._tables.get(key) or self._place_tables(*key)
        longs = allocate((size,), (1,), torch.int64)
        ints = longs.view(torch.int32)
        return (
            piece_of(ints, slabs, (slabs[1], 1), 0),
            piece_of(longs, ranges, (ranges[1], 1), first_range),
            piece_of(ints, counts, (1,), first_count),
        )

    def _place_tables(self, num_sources: int, num_local: int, num_max_tokens: int, num_topk: int) -> _Tables:
        each = num_sources // self._place.num_ranks
        first = self._ranges_at(num_local, each * num_max_tokens, num_topk) // 8
        size = self._storage_size(num_local, each * num_max_tokens, num_topk, each) // 8
        slabs, ranges = (num_local, num_sources * num_max_tokens), (num_local, num_sources)
        tables = _Tables(size, slabs, ranges, first, (num_local,), 2 * (first + num_local * num_sources))
        return self._tables.keep((num_sources, num_local, num_max_tokens, num_topk), tables)

    def _ranges_at(self, num_local: int, most: int, num_topk: int) -> int:
        """Bytes of the source tokens, the table and the tokens of each source."""
        ranks = self._place.num_ranks
        return align_up(4 * (num_local * ranks * most + ranks * most * num_topk + ranks), 16)

    def _storage_size(self, num_local: int, most: int, num_topk: int, each: int) -> int:
        """Bytes of what :meth:`tables` allocates, where a rank sends the tokens of ``each`` sources."""
        ranges = 8 * num_local * self._place.num_ranks * each
        return align_up(self._ranges_at(num_local, most, num_topk) + ranges + 4 * num_local, 16)

    def dispatch(self, stream: int, signature: Signature, plan: LowLatencyDispatchPlan) -> Receive:
        """Send, and receive if that is to be done at once."""
        order, each = None, 1
        if plan.relays is not None:
            order, ids = self._relayed(plan.relays, plan.num_local_experts, plan.topk_idx)
            plan, each = plan._replace(topk_idx=ids), self._each(plan.relays)
        (
            topk_idx, x, _, _, _, _, recv_x, recv_scales, src_info, layout_range, count, recv_stats, wait_stats,
            receives_now, _,
        ) = plan  # fmt: skip
        key = signature, x.shape[0], each, receives_now
        prepared = self._prepared.get(key) or self._prepare_dispatch(key, plan)
        ids_at, x_at = topk_idx.data_ptr(), x.data_ptr()
        if (ids_at | x_at) % 16:
            topk_idx, x = self._aligned(topk_idx), self._aligned(x)
            ids_at, x_at = topk_idx.data_ptr(), x.data_ptr()
        ticket = None if receives_now else _ticket(topk_idx)
        arguments = (
            *self._context,
            0 if ticket is None else ticket.data_ptr(),
            ids_at,
            x_at,
            recv_x.data_ptr(),
            0 if recv_scales is None else recv_scales.data_ptr(),
            src_info.data_ptr(),
            layout_range.data_ptr(),
            count.data_ptr(),
            0 if recv_stats is None else recv_stats.data_ptr(),
            0 if wait_stats is None else wait_stats.data_ptr(),
            0 if order is None else order.data_ptr(),
        )
        if receives_now:
            return self._run(stream, prepared, arguments)
        tensors = (
            topk_idx, x, recv_x, recv_scales, src_info, layout_range, count, recv_stats, wait_stats, order, ticket,
        )  # fmt: skip
        return self._send(stream, prepared, arguments, tensors)

    def _prepare_dispatch(self, key: tuple[Signature, int, int, bool], plan: LowLatencyDispatchPlan) -> _Prepared:
        place = self._place
        signature, num_rows, each, receives_now = key
        scale_format, num_local, most = plan.scale_format, plan.num_local_experts, plan.num_max_tokens
        hidden, num_topk = plan.x.shape[1], plan.topk_idx.shape[1]
        layouts = self._layouts(most, hidden, num_topk, num_local, each)
        depth = self.num_slots(layouts)
        layout = layouts[scale_format != ScaleFormat.NONE]
        part = programs.part_of(hidden, num_rows * place.num_ranks)
        shape = programs.DispatchShape(
            scale_format, hidden, num_topk, num_local, each, part, place.shrinks, depth, place.overlaps
        )
        parts = -(-hidden // part)
        prepared = self._prepare(
            programs.dispatch(shape, place.target),
            (*self._numbers(num_rows, most, signature, layout), *layout[:3], signature.operation, place.timeout),
            2 + num_rows * (parts + 1),
            1 + _rows_of_others(num_rows, most) * place.num_ranks * parts,
            programs.programs_of_dispatch(num_topk, place.target),
            receives_now,
        )
        return self._prepared.keep(key, prepared)

    def _prepare(
        self,
        variants: programs.Variants,
        numbers: tuple[int, ...],
        senders: int,
        receivers: int,
        an_sm: int,
        receives_now: bool,
        table_bytes: int = 0,
    ) -> _Prepared:
        """As many programs as there is work for, and as run at a time, of which ``an_sm`` fit on an SM."""
        most = self._place.num_sms * (1 if self._place.shares_gpu else an_sm)
        senders, receivers = max(min(senders, most), 3), max(min(receivers, most), 2)
        if receives_now:
            both = variants.both.ending(*numbers, senders)
            return _Prepared(both, None, senders + receivers, senders, receivers, table_bytes)
        send, receive = variants.send.ending(*numbers, senders), variants.receive.ending(*numbers, 0)
        return _Prepared(send, receive, senders, senders, receivers, table_bytes)

    def combine(self, stream: int, signature: Signature, plan: LowLatencyCombinePlan) -> Receive:
        """Send, and receive if that is to be done at once."""
        each = 1
        if plan.relays is not None:
            _, ids = self._relayed(plan.relays, plan.x.shape[0], plan.topk_idx)
            plan, each = plan._replace(topk_idx=ids), self._each(plan.relays)
        x, info, _, _, _, topk_idx, topk_weights, out, wait_stats, receives_now, _ = plan
        out_at = out.data_ptr()
        if out_at % 16:
            raise ArgumentError("out", "memory that does not begin on 16 bytes", "memory that does")
        key = signature, topk_idx.shape[0], each, receives_now
        prepared = self._prepared.get(key) or self._prepare_combine(key, plan)
        if info.storage_offset() != 0 or info.untyped_storage().nbytes() != prepared.table_bytes:
            raise _of_another_origin(plan)
        ids_at, weights_at, x_at = topk_idx.data_ptr(), topk_weights.data_ptr(), x.data_ptr()
        if (ids_at | weights_at | x_at) % 16:
            topk_idx, topk_weights, x = self._aligned(topk_idx), self._aligned(topk_weights), self._aligned(x)
            ids_at, weights_at, x_at = topk_idx.data_ptr(), topk_weights.data_ptr(), x.data_ptr()
        ticket = None if receives_now else _ticket(topk_idx)
        arguments = (
            *self._context,
            0 if ticket is None else ticket.data_ptr(),
            ids_at,
            weights_at,
            x_at,
            info.data_ptr(),
            out_at,
            0 if wait_stats is None else wait_stats.data_ptr(),
        )
        if receives_now:
            return self._run(stream, prepared, arguments)
        tensors = topk_idx, topk_weights, x, info, out, wait_stats, ticket
        return self._send(stream, prepared, arguments, tensors)

    def _prepare_combine(self, key: tuple[Signature, int, int, bool], plan: LowLatencyCombinePlan) -> _Prepared:
        place = self._place
        signature, num_rows, each, receives_now = key
        num_local, slab, hidden = plan.x.shape
        most, num_topk = slab // place.num_ranks, plan.topk_idx.shape[1]
        table_bytes = self._storage_size(num_local, most, num_topk, each)
        if plan.src_info.untyped_storage().nbytes() != table_bytes:
            raise _of_another_origin(plan)
        layouts = self._layouts(most, hidden, num_topk, num_local, each)
        depth, layout = self.num_slots(layouts), layouts[2]
        part = programs.part_of(hidden, num_rows * place.num_ranks, num_topk)
        shape = programs.CombineShape(
            hidden, num_topk, num_local, part, place.shrinks, place.exact, depth, place.overlaps
        )
        parts = -(-hidden // part)
        prepared = self._prepare(
            programs.combine(shape, place.target),
            (*self._numbers(num_rows, most, signature, layout), layout[0], signature.operation, place.timeout),
            2 + _rows_of_others(num_rows, most) * place.num_ranks * parts,
            num_rows * parts,
            programs.programs_of_combine(part, num_topk, place.exact),
            receives_now,
            table_bytes,
        )
        return self._prepared.keep(key, prepared)

    def to_warm(
        self, scale_format: ScaleFormat, most: int, hidden: int, num_topk: int, num_local: int, relays: Relays | None
    ) -> Iterator[Job]:
        """What operations of these shapes launch; ``most``: of all sources of a rank."""
        place, each = self._place, self._each(relays)
        if relays is not None:
            self._tables_of(relays, num_local, torch.device("cuda", self.device))
        depth = self.num_slots(self._layouts(most, hidden, num_topk, num_local, each))
        for num_tokens in sorted({1, most} if relays is None else {most}):
            part = programs.part_of(hidden, num_tokens * place.num_ranks)
            shape = programs.DispatchShape(
                scale_format, hidden, num_topk, num_local, each, part, place.shrinks, depth, place.overlaps
            )
            yield from programs.dispatch(shape, place.target).to_warm()
            part = programs.part_of(hidden, num_tokens * place.num_ranks, num_topk)
            combines = programs.CombineShape(
                hidden, num_topk, num_local, part, place.shrinks, place.exact, depth, place.overlaps
            )
            yield from programs.combine(combines, place.target).to_warm()

    def _numbers(self, num_rows: int, most: int, signature: Signature, layout: tuple[int, ...]) -> tuple[int, ...]:
        place, nbytes = self._place, self._slot_bytes(layout)
        number = hash((number_of(signature), self._depth, nbytes))  # ranks whose slots lie elsewhere disagree
        return place.address, num_rows, most, place.rank, number, place.offset, nbytes

    def _each(self, relays: Relays | None) -> int:
        """Sources whose tokens a rank sends."""
        return 1 if relays is None else len(relays.order) // self._place.num_ranks

    def _relayed(self, relays: Relays, num_local: int, topk_idx: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of the sources for the kernels, and the ids as they count the experts of this node alone."""
        order, numbers = self._tables_of(relays, num_local, topk_idx.device)
        return order, numbers[(topk_idx + 2).clamp_(0, len(numbers) - 1)]

    def _tables_of(self, relays: Relays, num_local: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The order of the sources, and what an id is on this node.

        int32 [2, R]: which of all a source is, by relay and number, and the reverse. int64 [E + 3]: for each id
        from -2 on the number of the expert here, -1 if it is elsewhere; for ids that name none, one that none has.
        """
        key = (tuple(relays.order), relays.node, num_local)
        if key not in self._relay_tables:
            each, experts = self._each(relays), self._place.num_ranks * num_local
            places = torch.tensor([rank * each + number for rank, number in relays.order], dtype=torch.int32)
            order = torch.cat([places.argsort().to(torch.int32), places])
            numbers = [experts, -1]
            for rank, node in relays.order:
                here = node == relays.node
                numbers += [rank * num_local + expert if here else -1 for expert in range(num_local)]
            with torch.inference_mode(False):
                table = torch.tensor([*numbers, experts], dtype=torch.int64)
                self._relay_tables[key] = order.to(device), table.to(device)
        return self._relay_tables[key]

    def _layouts(
        self, most: int, hidden: int, num_topk: int, num_local: int, each: int
    ) -> tuple[tuple[int, ...], ...]:
        ranks = self._place.num_ranks
        limit = min(MOST_TOKENS, (1 << 31) // (num_local * ranks)) - 1
        if most > limit:
            raise ArgumentError("num_max_dispatch_tokens_per_rank", most, f"at most {limit}")
        return programs.layouts(ranks, most, hidden, num_topk, num_local, each, self._place.exact)

    def _run(self, stream: int, prepared: _Prepared, arguments: tuple[int, ...]) -> Receive:
        """Send and receive."""
        if self._pending:
            self._make_room(stream)
        self._num_sent += 1
        prepared.first.launch(prepared.grid, stream, arguments)
        return self._received

    def _make_room(self, stream: int) -> None:
        """Receive what lies in the slot that is next."""
        if not self.is_capturing():
            # What was sent in a capture is received in it, or was never sent.
            self._pending = deque(pending for pending in self._pending if not pending.is_captured)
        while self._pending and self._pending[0].number <= self._num_sent + 1 - self._depth:
            self._pending[0].finish(stream)

    def _send(
        self,
        stream: int,
        prepared: _Prepared,
        arguments: tuple[int, ...],
        tensors: tuple[torch.Tensor | None, ...],
    ) -> Receive:
        """Send, to be received later."""
        if self._pending:
            self._make_room(stream)
        self._num_sent += 1
        first, second, grid, _, receivers, _ = prepared
        assert second is not None
        first.launch(grid, stream, arguments)

        def receive(stream: int) -> None:
            second.launch(receivers, stream, arguments)

        pending = Receive(self, self._num_sent, receive, tensors, self.is_capturing(), stream)
        self._pending.append(pending)
        return pending

    def forget(self, receive: Receive) -> None:
        """A receive has been launched."""
        if self._pending and self._pending[0] is receive:
            self._pending.popleft()
        elif receive in self._pending:
            self._pending.remove(receive)

    def close(self) -> None:
        """Refuse what has not been received: the memory goes away."""
        self.is_closed = True
        self._pending.clear()


def _ticket(like: torch.Tensor) -> torch.Tensor:
    """Where an operation that is to be received leaves its number."""
    return like.new_empty_strided((1,), (1,), dtype=torch.int64)


def _of_another_origin(plan: LowLatencyCombinePlan) -> ArgumentError:
    num_topk = plan.topk_idx.shape[1]
    allowed = f"the tensor that the dispatch of {num_topk} choices a token returned, not a copy of it"
    return ArgumentError("handle.src_info", "a tensor of another origin", allowed)


def _rows_of_others(num_rows: int, most: int) -> int:
    """Rows of another rank to have programs for: as many as here, but some also where this rank has few or none."""
    return max(num_rows, min(most, _FEWEST_ROWS))


class Receive:
    """The receive of an operation; see :class:`tokenferry.dataplane.Pending`."""

    def __init__(
        self,
        owner: LowLatency,
        number: int,
        receive: Callable[[int], None] | None = None,
        tensors: tuple[torch.Tensor | None, ...] = (),
        is_captured: bool = False,
        sent_on: int = -1,
    ) -> None:
        self.number = number
        self.is_captured = is_captured
        self._owner = owner
        self._receive = receive
        self._tensors = tensors
        self._sent_on = sent_on

    def written(self) -> tuple[torch.Tensor | None, ...]:
        """See :class:`tokenferry.dataplane.Pending`."""
        return self._tensors

    def finish(self, stream: int = -1) -> None:
        """Launch the receive on the current stream, whose address may be given, unless that has been done."""
        receive = self._receive
        if receive is None:
            return
        if self._owner.is_closed:
            raise BufferStateError("the Buffer was destroyed")
        if self.is_captured != self._owner.is_capturing():
            sent, now = ("in", "outside of") if self.is_captured else ("outside of", "in")
            raise BufferStateError(f"a low-latency operation was sent {sent} a CUDA graph and is received {now} it")
        device = self._owner.device
        stream = stream if stream >= 0 else torch._C._cuda_getCurrentRawStream(device)
        receive(stream)
        if stream != self._sent_on:  # the memory may be of that one, whose later work must not get it too early
            current = torch.cuda.current_stream(device)
            for tensor in self._tensors:
                if tensor is not None:
                    tensor.record_stream(current)
        self._receive, self._tensors = None, ()
        self._owner.forget(self)
        self._owner.check()
