"""Paranoid mode of the low-latency pair on CPU ranks: each operation is proven when it is received.

**Dispatch.** A second dispatch of the same choices takes ``[source rank << 32 | token, checksum]`` of every token the
same ways, with a message of its own. Counts, places and rows must be what it says.

**Combine.** The rows go home once more, each with ``[home << 32 | rank, expert << 32 | token, checksum of all that,
0]`` behind it, by a dispatch whose experts are the ranks. PyTorch adds them up there, and the bits must agree.

What a rank sends is taken when the operation is called; it is compared when the operation is received, in its hook.
Ranks that are masked in one of the two and not in the other are left out: nothing can be said of them.

Legend of dims: T tokens of this rank, N most tokens of any rank, H elements of a row, K choices, E experts,
L = E / R local experts, R ranks, S slots of a slab, n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from tokenferry.dataplane import Part, Pending, ScaleFormat
from tokenferry.dataplane.cpu.fp8 import pack_ue8m0, quantise
from tokenferry.errors import CorruptionError
from tokenferry.modes import low_latency
from tokenferry.modes.checksums import added_up, checksums, differ, sum_of_rows
from tokenferry.modes.inputs import Party
from tokenferry.modes.low_latency import Dispatched, LowLatencyHandle
from tokenferry.modes.paranoid import and_others, suspicion

_HALF = 32
_LOW = (1 << _HALF) - 1
_WORD = 4
"""Elements of bfloat16 in an int64."""
_NOWHERE = 1 << 62
_CPU = torch.device("cpu")


def dispatch(
    party: Party,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    num_max_tokens: int,
    num_experts: int,
    recv_stats: torch.Tensor | None,
    wait_stats: torch.Tensor | None,
    use_fp8: bool,
    round_scale: bool,
    use_ue8m0: bool,
    receives_now: bool,
) -> Dispatched:
    """See :func:`tokenferry.modes.low_latency.dispatch`; receiving raises :class:`CorruptionError`."""
    waits = _Waits(party, "dispatch_wait_recv_cost_stats", wait_stats)
    sizes, formats = (num_max_tokens, num_experts), (use_fp8, round_scale, use_ue8m0)
    sent = low_latency.dispatch(party, x, topk_idx, *sizes, recv_stats, waits.first, *formats, False)
    epoch = _epoch(party)
    with suspicion(party):
        sums = _sums_of_sent(x.detach().contiguous(), low_latency.scale_format_of(*formats))
        origin = torch.arange(len(sums), device=_CPU) + (party.rank << _HALF)
        words = torch.stack([origin, sums], 1).view(torch.bfloat16)
        proof = low_latency.dispatch(party, words, topk_idx, *sizes, None, waits.second, False, False, False, False)

        def check() -> None:
            _check_dispatch(epoch, sent, proof, waits.in_both(), party.rank)

        pending = _Proven(party, (sent.pending, proof.pending), waits, check)
        if receives_now:
            pending.finish()
    return sent._replace(pending=pending)


def _sums_of_sent(x: torch.Tensor, scale_format: ScaleFormat) -> torch.Tensor:
    """int64 [T]: checksums of what must arrive of bfloat16 [T, H]."""
    if scale_format == ScaleFormat.NONE:
        return sum_of_rows(x, None)
    data, scales = quantise(x, round_scale=scale_format != ScaleFormat.PLAIN)
    return sum_of_rows(data, pack_ue8m0(scales) if scale_format == ScaleFormat.UE8M0 else scales)


def _check_dispatch(epoch: int, sent: Dispatched, proof: Dispatched, sources: torch.Tensor, rank: int) -> None:
    """Compare a dispatch with its proof, for int64 [n] source ranks."""
    name, mine, proven = "low_latency_dispatch", sent.handle, proof.handle
    counts, wanted = mine.layout_range & _LOW, proven.layout_range & _LOW
    astray = (counts != wanted)[:, sources].nonzero()
    if len(astray):
        expert, source = int(astray[0, 0]), int(sources[astray[0, 1]])
        told = f"{int(counts[expert, source])} rows of rank {source} for local expert {expert} came"
        ranks = sorted(set(sources[astray[:, 1]].tolist()))
        raise CorruptionError(name, epoch, ranks, f"{told}, checksums of {int(wanted[expert, source])}")
    begins = counts.cumsum(1) - counts
    if not torch.equal(mine.layout_range >> _HALF, begins) or not torch.equal(sent.num_received, counts.sum(1).int()):
        raise CorruptionError(name, epoch, [rank], "layout_range and the rows of the experts do not fit each other")
    places, of_source = _slots(mine.layout_range, mine.src_info.size(1), sources)
    theirs, _ = _slots(proven.layout_range, proven.src_info.size(1), sources)
    words = proof.x.flatten(0, 1)[theirs].view(torch.int64)
    bits = sent.x.flatten(0, 1).view(torch.uint8)[places]  # torch does not index FP8 everywhere
    scales = None
    if sent.scales is not None:
        slab = mine.src_info.size(1)
        scales = sent.scales[places.div(slab, rounding_mode="floor"), places % slab].contiguous()
    spoiled = sum_of_rows(bits, scales) != words[:, 1]
    tokens, proven_tokens = (handle.src_info.flatten()[at] for handle, at in ((mine, places), (proven, theirs)))
    wrong_place = (tokens != proven_tokens) | (words[:, 0] != (of_source << _HALF) + proven_tokens)
    wrong = (spoiled | wrong_place).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        source, expert = int(of_source[row]), int(places[row]) // mine.src_info.size(1)
        is_named = int(words[row, 0]) >> _HALF == source
        token = int(words[row, 0]) & _LOW if is_named else int(proven_tokens[row])
        what = "place or source differ from what was sent" if wrong_place[row] else "bytes differ from what was sent"
        where = f"local expert {expert}, token {token} of rank {source}"
        ranks = sorted(set(of_source[wrong].tolist()))
        raise CorruptionError(name, epoch, ranks, f"{where}: {what}{and_others(len(wrong) - 1, 'row')}", token)


def _slots(layout_range: torch.Tensor, slab: int, sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 [n]: places in the [L * S] slabs of the rows from some source ranks, expert by expert; their sources."""
    ranges = layout_range[:, sources]
    counts = (ranges & _LOW).flatten()
    starts = (ranges >> _HALF) + torch.arange(len(ranges), device=_CPU).unsqueeze(1) * slab
    before = counts.cumsum(0) - counts
    places = torch.repeat_interleave(starts.flatten() - before, counts) + torch.arange(int(counts.sum()), device=_CPU)
    return places, torch.repeat_interleave(sources.repeat(len(ranges)), counts)


def combine(
    party: Party,
    x: torch.Tensor,
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    known: LowLatencyHandle,
    zero_copy_buffer: torch.Tensor | None,
    out: torch.Tensor | None,
    wait_stats: torch.Tensor | None,
    receives_now: bool,
) -> tuple[torch.Tensor, Pending]:
    """See :func:`tokenferry.modes.low_latency.combine`; receiving raises :class:`CorruptionError`."""
    waits = _Waits(party, "combine_wait_recv_cost_stats", wait_stats)
    result, first = low_latency.combine(
        party, x, topk_idx, topk_weights, known, zero_copy_buffer, out, waits.first, False
    )
    epoch = _epoch(party)
    with suspicion(party):
        rows = (x if zero_copy_buffer is None else zero_copy_buffer).detach()
        words, homes = _rows_to_send(party, rows, known)
        most = known.src_info.numel()
        proof = low_latency.dispatch(
            party, words, homes, most, party.num_ranks, None, waits.second, False, False, False, False
        )
        ids, weights = topk_idx.clone(), topk_weights.detach().clone()

        def check() -> None:
            mine = _Homecoming(party, epoch, known, proof, waits.in_second())
            mine.check_rows()
            mine.check_sums(result.detach(), ids, weights, waits.in_one())

        pending = _Proven(party, (first, proof.pending), waits, check)
        if receives_now:
            pending.finish()
    return result, pending


def _rows_to_send(party: Party, x: torch.Tensor, known: LowLatencyHandle) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 [n, H + 16]: the rows that go home, and what is behind each; and their homes, int64 [n, 1]."""
    slab = known.src_info.size(1)
    places, homes = _slots(known.layout_range, slab, torch.arange(party.num_ranks, device=_CPU))
    experts = places.div(slab, rounding_mode="floor") + party.rank * len(known.src_info)
    rows = x.flatten(0, 1)[places]
    named = torch.stack([(homes << _HALF) + party.rank, (experts << _HALF) + known.src_info.flatten()[places]], 1)
    tail = torch.stack([*named.unbind(1), _sums_of_going_home(rows, named), torch.zeros_like(homes)], 1)
    return torch.cat([rows, tail.view(torch.bfloat16)], 1), homes.unsqueeze(1)


def _sums_of_going_home(rows: torch.Tensor, named: torch.Tensor) -> torch.Tensor:
    return checksums(rows, 1) + checksums(named, 5)


class _Homecoming:
    """The rows of a combine that came home once more.

    Args:
        party: who takes part.
        epoch: of the combine.
        known: handle of the dispatch.
        proof: the dispatch that they came by.
        ranks: int64 [n]: who took part in it.
    """

    def __init__(
        self, party: Party, epoch: int, known: LowLatencyHandle, proof: Dispatched, ranks: torch.Tensor
    ) -> None:
        self._party = party
        self._epoch = epoch
        self._known = known
        slab = known.src_info.size(1)
        self._num_local = known.num_experts // party.num_ranks
        self._most = slab // party.num_ranks
        places, self._of_rank = _slots(proof.handle.layout_range, proof.handle.src_info.size(1), ranks)
        whole = proof.x.flatten(0, 1)[places]
        self._rows = whole[:, : known.hidden].contiguous()
        self._tail = whole[:, known.hidden :].contiguous().view(torch.int64)
        self._experts, self._tokens = self._tail[:, 1] >> _HALF, self._tail[:, 1] & _LOW

    def check_rows(self) -> None:
        """Raise unless every row is what its rank sent here.

        Raises:
            CorruptionError: one is not.
        """
        named, sums = self._tail[:, :2].contiguous(), self._tail[:, 2]
        wrong = (named[:, 0] != (self._party.rank << _HALF) + self._of_rank) | (self._tokens >= self._most)
        wrong |= self._experts.div(self._num_local, rounding_mode="floor") != self._of_rank
        wrong |= _sums_of_going_home(self._rows, named) != sums
        rows = wrong.nonzero().flatten()
        if len(rows):
            row = int(rows[0])
            reason = f"row {row} that came home once more differs from what was sent"
            ranks = sorted(set(self._of_rank[rows].tolist()))
            raise self._error(ranks, reason + and_others(len(rows) - 1, "row"), int(self._tokens[row]))

    def check_sums(
        self, combined: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, unsure: torch.Tensor
    ) -> None:
        """Compare what combine has made with the sums of the rows.

        Args:
            combined: bfloat16 [T, H].
            ids: int64 [T, K].
            weights: float32 [T, K].
            unsure: int64 [n]: ranks that took part in one of the two only. Their tokens are left out.

        Raises:
            CorruptionError: they differ.
        """
        where = torch.full((self._known.num_experts * self._most,), _NOWHERE, device=_CPU)
        count = torch.arange(len(self._rows), device=_CPU)
        where.scatter_reduce_(0, self._experts * self._most + self._tokens, count, "amin")
        row_of = where[ids.clamp(min=0) * self._most + torch.arange(len(ids), device=_CPU).unsqueeze(1)]
        owner = ids.div(self._num_local, rounding_mode="floor")
        there = (ids >= 0) & (row_of < _NOWHERE)
        nodes = self._party.nodes
        if nodes is None:
            total = self._sum(row_of, weights, there)
        else:
            topology = nodes.topology
            of_node = [
                there & torch.isin(owner, torch.tensor(topology.ranks_of_node(node), device=_CPU))
                for node in range(topology.num_nodes)
            ]
            dtype = torch.float32 if nodes.exact else combined.dtype
            parts = [Part(None, self._sum(row_of, weights, mine).to(dtype)) for mine in of_node]
            total = added_up(parts, (), combined)
        is_sure = ~(torch.isin(owner, unsure) & (ids >= 0)).any(1)
        wrong = (differ(combined, total.to(combined.dtype)) & is_sure).nonzero().flatten()
        if len(wrong):
            token = int(wrong[0])
            ranks = sorted(set(owner[token][there[token]].tolist())) or [self._party.rank]
            others = and_others(len(wrong) - 1, "token")
            raise self._error(ranks, f"the sum of token {token} is not that of its rows{others}", token)

    def _sum(self, row_of: torch.Tensor, weights: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """float32 [T, H]: sums over choices, ascending."""
        total = torch.zeros((len(row_of), self._known.hidden), device=_CPU)
        for choice in range(row_of.size(1)):
            have = there[:, choice].nonzero().flatten()
            total[have] += weights[have, choice, None] * self._rows[row_of[have, choice]].float()
        return total

    def _error(self, ranks: Sequence[int], reason: str, token: int) -> CorruptionError:
        return CorruptionError("low_latency_combine", self._epoch, ranks, reason, token)


class _Waits:
    """How long an operation and its proof waited for each rank: with it, who took part in each.

    Args:
        party: who takes part.
        name: of the argument.
        stats: of the caller, int64 [R], added to; or None.
    """

    def __init__(self, party: Party, name: str, stats: object) -> None:
        self._party = party
        self._stats = low_latency.check_stats(party, name, stats, party.num_ranks, torch.int64)
        self.first = torch.zeros(party.num_ranks, dtype=torch.int64, device=_CPU)
        self.second = torch.zeros_like(self.first)

    def add(self) -> None:
        """Add those of the operation to the caller's."""
        if self._stats is not None:
            self._stats += self.first
            self._stats = None

    def _took_part(self, waits: torch.Tensor) -> torch.Tensor:
        found = waits > 0
        found[self._party.rank] = True
        return found if self._party.nodes is None else torch.ones_like(found)  # no rank is masked between nodes

    def in_both(self) -> torch.Tensor:
        """int64 [n]: ranks that took part in the operation and in its proof."""
        return (self._took_part(self.first) & self._took_part(self.second)).nonzero().flatten()

    def in_second(self) -> torch.Tensor:
        """int64 [n]: ranks that took part in the proof."""
        return self._took_part(self.second).nonzero().flatten()

    def in_one(self) -> torch.Tensor:
        """int64 [n]: ranks that took part in one of them only."""
        return (self._took_part(self.first) ^ self._took_part(self.second)).nonzero().flatten()


class _Proven:
    """An operation and its proof, sent; see :class:`tokenferry.dataplane.Pending`."""

    def __init__(self, party: Party, pending: Sequence[Pending], waits: _Waits, check: Callable[[], None]) -> None:
        self._party = party
        self._pending = pending
        self._waits = waits
        self._check = check

    def written(self) -> Sequence[torch.Tensor | None]:
        return [tensor for pending in self._pending for tensor in pending.written()]

    def finish(self) -> None:
        with suspicion(self._party):
            for pending in self._pending:
                pending.finish()
            self._waits.add()
            self._check()


def _epoch(party: Party) -> int:
    return party.plane.epoch if party.nodes is None else party.nodes.epoch
