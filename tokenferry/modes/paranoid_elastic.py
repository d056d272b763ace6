"""Paranoid mode of ElasticBuffer: dispatch and combine that tell where rows are from, each proven before it returns.

A row and the choices of its token are proven as in :mod:`tokenferry.modes.paranoid`. Expanded, the choices are those
that the metadata says: copy ``slots[i, k]`` of row i lies among the rows of the expert that was choice k. Then the
places are what the choices demand, every copy has the checksum of the first, and rows between experts are zeros where
that was asked for.

Legend of dims: T tokens of this rank, N most tokens of any rank, H elements of a row, K choices, L local experts,
R ranks, M received rows, X expanded rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenferry.errors import CorruptionError
from tokenferry.handles import EPHandle
from tokenferry.modes import expert_major, inputs, intranode
from tokenferry.modes.checksums import sum_of_rows
from tokenferry.modes.expert_major import Received, Sizes
from tokenferry.modes.inputs import Inputs, Party
from tokenferry.modes.paranoid import Paranoid, Proof, and_others, suspicion


def dispatch(
    party: Party, x: object, topk_idx: object, topk_weights: object, sizes: Sizes, *, copy_topk: bool
) -> Received:
    """See :func:`tokenferry.modes.expert_major.dispatch`.

    Raises:
        CorruptionError: what came is not what was sent.
    """
    received = expert_major.dispatch(party, x, topk_idx, topk_weights, sizes, copy_topk=copy_topk)
    with suspicion(party):
        proof = _Expanding(party, x, topk_weights, received, received.handle)
        proof.check_routes()
        proof.check_rows(sizes.zero_padding)
        proof.check_metadata(sizes.host_waits)
    return received


def cached_dispatch(
    party: Party, x: object, handle: EPHandle, topk_weights: object, *, zero_padding: bool
) -> Received:
    """See :func:`tokenferry.modes.expert_major.cached_dispatch` and :func:`dispatch`."""
    received = expert_major.cached_dispatch(party, x, handle, topk_weights, zero_padding=zero_padding)
    with suspicion(party):
        _Expanding(party, x, topk_weights, received, handle).check_rows(zero_padding)
    return received


def combine(
    party: Party, x: object, handle: EPHandle, topk_weights: object, bias: object, *, one_rounding: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`tokenferry.modes.expert_major.combine`.

    Raises:
        CorruptionError: a sum is not that of the rows.
    """
    combined = expert_major.combine(party, x, handle, topk_weights, bias, one_rounding=one_rounding)
    with suspicion(party):
        assert isinstance(x, torch.Tensor)
        rows, weights = x.detach(), topk_weights.detach() if isinstance(topk_weights, torch.Tensor) else None
        shape = len(handle.routes.is_token_in_rank), rows.size(1)
        biases = [] if bias is None else inputs.check_biases(party, bias, shape, rows.dtype)
        mode = Paranoid(party, None)
        epoch = mode.epoch
        if handle.do_expand:
            count = sum(mode.counts(handle.routes))
            slots = handle.recv_src_metadata[:count, 2:].long()
            wide = torch.promote_types(rows.dtype, torch.float32)
            if weights is not None:
                weights = _taken(weights.unsqueeze(1), slots.reshape(-1)).view(slots.shape)
            total = torch.zeros((count, rows.size(1)), dtype=wide, device=party.device)
            for slot in slots.unbind(1):
                total += _taken(rows, slot).to(wide)
            rows = total if one_rounding else total.to(rows.dtype)
        weights = None if weights is None else weights.contiguous()
        mode.prove_sums(epoch, combined, handle.routes, rows.contiguous(), weights, biases)
    return combined


def _taken(rows: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """``rows[slots]``, zeros where a slot is -1."""
    if not len(rows):
        return rows.new_zeros((len(slots), rows.size(1)))
    return rows[slots.clamp(min=0)].masked_fill_((slots < 0).unsqueeze(1), 0)


class _Expanding:
    """A dispatch as one that is not expanded, its proof, and what expanding adds.

    Args:
        party: who takes part.
        x: what this rank has dispatched.
        topk_weights: likewise.
        received: what came.
        handle: of the dispatch.
    """

    def __init__(self, party: Party, x: object, topk_weights: object, received: Received, handle: EPHandle) -> None:
        self._party = party
        self._received = received
        self._handle = handle
        self._mode = Paranoid(party, None)
        self._epoch = self._mode.epoch
        self._num_local = handle.num_experts // party.num_ranks
        ids = handle.topk_idx
        member = handle.routes.is_token_in_rank
        given = Inputs(
            rows=inputs.check_rows(party, x),
            topk_idx=ids,
            topk_weights=topk_weights.detach().contiguous() if isinstance(topk_weights, torch.Tensor) else None,
            is_token_in_rank=member,
            num_tokens_per_rank=member.sum(0, dtype=torch.int32),
            num_tokens_per_expert=torch.bincount(ids[ids >= 0], minlength=handle.num_experts).to(torch.int32),
            num_experts=handle.num_experts,
            expert_alignment=handle.expert_alignment,
            num_worst_tokens=0,
        )
        counts = self._mode.counts(handle.routes)
        self._count = sum(counts)
        """M."""
        self._source = self._mode.sources(handle.routes)
        self._slots = handle.recv_src_metadata[: self._count, 2:].long()
        compact = self._as_compact() if handle.do_expand else received
        listed = handle.num_recv_tokens_per_expert_list
        seen = intranode.Received(compact.x, compact.scales, compact.topk_idx, compact.topk_weights, listed, None)
        assert compact.topk_idx is not None
        self._ids = compact.topk_idx[: self._count]
        self._proof = Proof(self._mode, "dispatch", given, seen, handle.routes, self._epoch)

    def _as_compact(self) -> Received:
        """Each row once: its first copy; the choices that the metadata says; their weights."""
        received, slots = self._received, self._slots
        there = slots >= 0
        most = len(received.x)
        if bool((slots >= most).any()) or not bool(there.any(1).all()):
            raise self._error(f"copies of rows are not among the {most} rows there are, or there are none")
        self._first = slots.gather(1, there.to(torch.int8).argmax(1, keepdim=True)).flatten()
        ends = self._handle.psum_num_recv_tokens_per_expert
        ids = torch.searchsorted(ends.long().contiguous(), slots.contiguous(), right=True).masked_fill_(~there, -1)
        weights = received.topk_weights
        if weights is not None:
            weights = _taken(weights.unsqueeze(1), slots.reshape(-1)).view(slots.shape)
        scales = None if received.scales is None else received.scales[self._first]
        bits = received.x.view(torch.uint8)  # torch does not index FP8 everywhere
        return received._replace(
            x=bits[self._first].view(received.x.dtype), scales=scales, topk_idx=ids, topk_weights=weights
        )

    def check_routes(self) -> None:
        """See :meth:`tokenferry.modes.paranoid.Proof.check_routes`."""
        self._proof.check_routes()

    def check_rows(self, zero_padding: bool) -> None:
        """Check rows and choices, and what expanding has made of them.

        Args:
            zero_padding: whether rows between experts must be zeros.

        Raises:
            CorruptionError: they are not what was sent.
        """
        self._proof.check_rows()
        if not self._handle.do_expand:
            return
        received = self._received
        parts = [part for part in (received.x, received.scales, received.topk_weights) if part is not None]
        sums = sum_of_rows(received.x, received.scales)
        wrong = ((sums[self._slots.clamp(min=0)] != sums[self._first].unsqueeze(1)) & (self._slots >= 0)).any(1)
        self._raise_any(wrong, "its copies differ")
        if zero_padding:
            alignment = self._handle.expert_alignment
            for end in self._handle.psum_num_recv_tokens_per_expert.tolist():
                between = slice(end, -(-end // alignment) * alignment)
                if any(bool(part[between].contiguous().view(torch.uint8).any()) for part in parts):
                    raise self._error(f"rows {between.start} to {between.stop - 1}, between experts, are not zeros")

    def check_metadata(self, host_waits: bool) -> None:
        """Compare counts of experts, sources and places of copies with what the proven choices demand.

        Args:
            host_waits: whether the outputs have exactly as many rows as come.

        Raises:
            CorruptionError: they differ.
        """
        handle, ids = self._handle, self._ids
        num_topk, alignment = ids.size(1), handle.expert_alignment
        pairs = torch.bincount(ids[ids >= 0], minlength=self._num_local)
        aligned = (pairs + alignment - 1).div(alignment, rounding_mode="floor") * alignment
        starts = aligned.cumsum(0) - aligned
        ends = starts + pairs if handle.do_expand else starts + aligned
        wrong = handle.num_unaligned_recv_tokens_per_expert.tolist() != pairs.tolist()
        if wrong or handle.psum_num_recv_tokens_per_expert.tolist() != ends.tolist():
            raise self._error(f"{pairs.tolist()} choices of the local experts came, the handle has others")
        if handle.do_expand and host_waits and len(self._received.x) != int(aligned.sum()):
            raise self._error(f"{len(self._received.x)} expanded rows, not {int(aligned.sum())}")
        tokens = handle.routes.recv_src_idx[: self._count].long() + self._source * handle.num_max_tokens_per_rank
        first = (ids >= 0).to(torch.int8).argmax(1) + self._source * num_topk
        slots = torch.full_like(ids, -1)
        if handle.do_expand:
            chosen = (ids >= 0).nonzero()
            experts, order = ids[chosen[:, 0], chosen[:, 1]].sort(stable=True)
            place = torch.arange(len(order), device=ids.device) - (pairs.cumsum(0) - pairs)[experts]
            slots[chosen[order, 0], chosen[order, 1]] = starts[experts] + place
        wanted = torch.cat([tokens.unsqueeze(1), first.unsqueeze(1), slots], 1)
        metadata = handle.recv_src_metadata
        self._raise_any(
            (metadata[: self._count] != wanted).any(1), "handle.recv_src_metadata is not that of its choices"
        )
        if bool((metadata[self._count :] != -1).any()):
            raise self._error("handle.recv_src_metadata has sources past the last row")

    def _raise_any(self, wrong: torch.Tensor, what: str) -> None:
        rows = wrong.nonzero().flatten()
        if len(rows):
            row = int(rows[0])
            rank, token = int(self._source[row]), int(self._handle.routes.recv_src_idx[row])
            reason = f"row {row}, token {token} of rank {rank}: {what}{and_others(len(rows) - 1, 'row')}"
            raise self._error(reason, sorted(set(self._source[rows].tolist())), token)

    def _error(self, reason: str, ranks: Sequence[int] = (), token: int | None = None) -> CorruptionError:
        return CorruptionError("dispatch", self._epoch, ranks or [self._party.rank], reason, token)
