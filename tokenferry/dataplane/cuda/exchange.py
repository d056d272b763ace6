"""One dispatch on a GPU: exchange the counts, then pull."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tokenferry.dataplane import Outputs, SendPlan, Signature
from tokenferry.dataplane.cuda.launch import Address, Call, Placed
from tokenferry.dataplane.tensors import piece_of
from tokenferry.errors import HeapError

if TYPE_CHECKING:
    from tokenferry.dataplane.cuda import CudaDataPlane


_SLACK = 16
"""A room is larger than what came by one of so many parts."""


class Room:
    """How many rows dispatches of a kind are likely to receive, and to expand these to, by those before them.

    So outputs can be made, and the pull be launched, while the counts are still under way: no row waits for the host.
    It costs memory for 1/16 more rows while routing is steady, and a second launch where the guess was too low. What
    a rank guesses is its own affair.
    """

    __slots__ = ("_expanded", "_num_tokens", "_rows")

    def __init__(self) -> None:
        self._num_tokens = self._rows = self._expanded = 0

    def guess(self, num_tokens: int) -> tuple[int, int]:
        """Rows to make room for, and expanded ones, if they are (else 0).

        (0, 0): nothing to go by, as the number of tokens is far from the last one.
        """
        before, rows, expanded = self._num_tokens, self._rows, self._expanded
        if 8 * abs(num_tokens - before) > before or rows == 0:
            return 0, 0
        return -(-rows * (_SLACK + 1) // _SLACK), -(-expanded * (_SLACK + 1) // _SLACK)

    def note(self, num_tokens: int, num_rows: int, num_expanded: int) -> None:
        """Remember what came: at once where it is more than before, by and by where it is less."""
        self._num_tokens = num_tokens
        self._rows = max(num_rows, (self._rows + num_rows) // 2)
        self._expanded = max(num_expanded, (self._expanded + num_expanded) // 2)


class Rooms:
    """Those of a rank, by kinds: a signature, and the alignment of expanded rows (else 1)."""

    def __init__(self) -> None:
        self._known: dict[tuple[Signature, int], Room] = {}

    def of(self, kind: tuple[Signature, int]) -> Room:
        """That of a kind."""
        room = self._known.get(kind)
        if room is None:
            room = self._known[kind] = Room()
        return room


class Kind:
    """What dispatches with fresh counts, of as many tokens and with the same numbers, have in common.

    Attributes:
        notify: what is launched, once it is known: where the host does not look at the counts first, where it does.
        pull: what is launched then, once it is known.
        size: int32 words of all tables.
        places: where, in these, they begin: channel matrices, heads, ends of ranks, pairs of experts, bases.
    """

    __slots__ = ("notify", "places", "pull", "size")

    def __init__(self, plan: SendPlan) -> None:
        self.notify: list[Call | None] = [None, None]
        self.pull: Call | None = None
        num_tokens, ranks = plan.is_token_in_rank.shape
        experts = plan.experts
        channels = ranks * ranks
        heads = channels + 2 * ranks
        rank_ends = -(-(heads + num_tokens * ranks) // 4) * 4  # on 16 bytes, as all that follow
        pairs = bases = end = rank_ends + -(-ranks // 4) * 4
        if experts is not None:
            bases = pairs + 2 * (-(-experts.num_local // 4) * 4)
            end = bases + experts.expand * (ranks * experts.num_local + 1)
        self.size, self.places = end, (channels, heads, rank_ends, pairs, bases)


class CudaDispatch:
    """See :class:`tokenferry.dataplane.DispatchExchange`. Of a part, the device alone knows what comes."""

    num_rows = num_expanded_rows = 0
    _kind: Kind | None = None
    """With fresh counts."""
    _room: Room
    """Where the outputs may be made before the counts are known."""
    _prefix: Placed
    _bases: Address | None = None
    _small: torch.Tensor | None = None
    """Memory of all tables, until tensors are made of them."""
    _tables: tuple[Address, ...]
    """What ``notify`` writes: heads, the prefix matrix, the channel matrices, those of the experts."""
    _is_open = _guesses = False

    def __init__(self, plane: CudaDataPlane, signature: Signature, plan: SendPlan) -> None:
        self._plane = plane
        self._signature = signature
        self._plan = plan
        self.num_received_per_expert: list[int] = []
        self.rank_ends = self.num_pairs = self.expert_ends = plan.is_token_in_rank  # of no use but with experts
        handle = plan.handle
        if plan.part is not None:
            self.num_rows = plan.part.num_rows
            self.rank_prefix_matrix = self._prefix = plane.empty_table(3 * plane.num_ranks)
            self.send_head = self.channel_prefix_matrix = self.recv_channel_prefix_matrix = plane.empty(0)
        elif handle is not None:
            self.num_rows = handle.recv_src_idx.shape[0]
            self.num_expanded_rows = 0 if plan.experts is None else plan.experts.num_worst_rows
            (
                self.rank_prefix_matrix, self.channel_prefix_matrix, self.recv_channel_prefix_matrix, _, _,
                self.send_head,
            ) = handle  # fmt: skip
            self._prefix = self.rank_prefix_matrix
        else:
            self._kind = kind = plane.kind_of(signature, plan)
            if plan.may_guess:
                experts = plan.experts
                alignment = 1 if experts is None or not experts.expand else experts.alignment
                self._room = plane.rooms.of((signature, alignment))
            self._make_tables(kind)

    def _make_tables(self, kind: Kind) -> None:
        """Those of the handle and, behind them, those of the experts: see ``lay_out_experts``, which writes these.

        The device gets their addresses; tensors are made of them while it works, by :meth:`_see_tables`.
        """
        channels, heads, rank_ends, _, bases = kind.places
        self._small = self._plane.empty(kind.size)
        base = self._small.data_ptr()
        self._prefix = Address(base)
        if self._plan.experts is not None:
            self._bases = Address(base + 4 * bases)
        # The two channel matrices lie one behind the other, and so do the tables of the experts.
        self._tables = (
            Address(base + 4 * heads), self._prefix, Address(base + 4 * channels), Address(base + 4 * rank_ends)
        )  # fmt: skip

    def _see_tables(self) -> None:
        """Make tensors of what :meth:`_make_tables` has laid out."""
        small, self._small, kind = self._small, None, self._kind
        if small is None or kind is None:
            return
        channels, heads, rank_ends, pairs, _ = kind.places
        num_tokens, ranks = self._plan.is_token_in_rank.shape
        of_ranks, experts = (ranks, 1), self._plan.experts
        self._prefix = self.rank_prefix_matrix = piece_of(small, (ranks, ranks), (ranks, 1), 0)
        self.channel_prefix_matrix = piece_of(small, of_ranks, (1, 1), channels)
        self.recv_channel_prefix_matrix = piece_of(small, of_ranks, (1, 1), channels + ranks)
        self.send_head = piece_of(small, (num_tokens, ranks), (ranks, 1), heads)
        if experts is not None:
            local = experts.num_local
            self.rank_ends = piece_of(small, (ranks,), (1,), rank_ends)
            self.num_pairs = piece_of(small, (local,), (1,), pairs)
            self.expert_ends = piece_of(small, (local,), (1,), pairs + -(-local // 4) * 4)

    def __enter__(self) -> CudaDispatch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.abandon()

    def notify(self) -> None:
        """Tell the ranks what comes and learn the counts, from the host's side if outputs depend on them."""
        plan = self._plan
        if plan.part is not None:
            self._plane.announce_part(self._signature, plan, plan.part, self.rank_prefix_matrix)
            self._is_open = True
            return
        kind, worst, experts = self._kind, plan.num_worst_tokens, plan.experts
        assert kind is not None
        if worst:
            self.num_rows, self.num_expanded_rows = worst, 0 if experts is None else experts.num_worst_rows
        elif plan.may_guess:
            self.num_rows, self.num_expanded_rows = self._room.guess(plan.rows.shape[0])
            self._guesses = self.num_rows > 0
        self._plan = self._plane.notify(self._signature, plan, kind, self._tables, self._guesses)
        self._is_open = True
        if worst or self._guesses:
            return
        self._is_open = False  # if this raises, all ranks have stepped back, or the Buffer has failed
        try:
            self._wait_for_counts()
        except HeapError:  # ranks that know of nothing wrong wait for what was announced
            self._is_open = True
            self.abandon()
            raise
        self._is_open = True
        try:
            self._plane.check()  # what else was reported meanwhile
        except BaseException:
            self.abandon()
            raise

    def _wait_for_counts(self) -> None:
        plan, experts = self._plan, self._plan.experts
        self.num_rows, self.num_received_per_expert = counts = self._plane.wait_for_counts(plan)
        if experts is not None and experts.expand:
            alignment = experts.alignment
            self.num_expanded_rows = sum([-(-count // alignment) for count in counts[1]]) * alignment
        if plan.may_guess:
            self._room.note(plan.rows.shape[0], self.num_rows, self.num_expanded_rows)

    def pull(self, outputs: Outputs) -> bool:
        """See :meth:`tokenferry.dataplane.DispatchExchange.pull`."""
        self._is_open = False
        self._launch(outputs, self.num_rows)
        self._see_tables()
        if self._guesses:  # while the rows travel
            self._guesses = False
            room, expanded_room = self.num_rows, self.num_expanded_rows
            self._wait_for_counts()
            self._is_open = self.num_rows > room or self.num_expanded_rows > expanded_room
            self._plane.check()
        is_done = not self._is_open
        if is_done and self._plan.experts is not None and (outputs.rows.shape[0] or outputs.metadata is not None):
            self._plane.after_pull(self._plan, self.rank_prefix_matrix, outputs, self.expert_ends)
        return is_done

    def abandon(self) -> None:
        """After an error on this host alone: take part in what was announced, and receive nothing."""
        if self._is_open:
            if self._guesses:
                self._plane.status.leave_counts()
            nothing = self._plan.rows[:0]
            none = torch.empty(0, dtype=torch.int32, device=nothing.device)
            columns = (nothing, self._plan.scales, self._plan.topk_idx, self._plan.topk_weights)
            self._is_open = False
            self._launch(Outputs(*columns, none, none), -1)

    def _launch(self, outputs: Outputs, num_rows: int) -> None:
        self._plane.pull(self._signature, self._plan, self._kind, self._prefix, outputs, num_rows, self._bases)
