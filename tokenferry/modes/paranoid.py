"""Paranoid mode: dispatch and combine, each proven end to end before it returns.

**Dispatch.** A second dispatch takes a row of checksums for every token the same ways, from scratch: with counts,
lists and messages of its own. Its row is ``[source rank << 32 | token, sum_0, ..., sum_{R-1}]``, where ``sum_r`` is
the checksum of all that rank r must receive of the token: row, scales, and the choices as r sees them. The receiver
computes it from what came::

    x, scales, topk  --dispatch-->            recv_x, ...   --checksum-->  equal?
       '--checksum--> sums --second dispatch-->  sums  ----------------------'

**Combine.** The rows go home once more, by a dispatch that is proven so; PyTorch adds them up there, in the order of
combine, and the bits must be the same (NaN is NaN, whatever its payload).

What differs raises :class:`CorruptionError`; this rank's Buffer is given up, and its peers are told.

Legend of dims: T tokens of this rank, K choices, R ranks, L local experts, M received rows, W words of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch

from tokenferry.dataplane import Part
from tokenferry.errors import CorruptionError, StepBackError
from tokenferry.handles import DispatchHandle, Handle, make_handle
from tokenferry.modes import inputs
from tokenferry.modes.checksums import added_up, checksums, differ, sum_of_rows
from tokenferry.modes.high_throughput import HighThroughput
from tokenferry.modes.inputs import Inputs, Party, Rows
from tokenferry.modes.intranode import Received

PARANOID_VARIABLE = "TOKENFERRY_PARANOID"
_TOKEN_BITS = 32


class Paranoid(HighThroughput):
    """The operations of one rank, proven. Collective like those: all ranks are paranoid, or none is."""

    def dispatch(self, given: Inputs, num_tokens_per_rdma_rank: object) -> Received:
        """See :meth:`HighThroughput.dispatch`.

        Raises:
            CorruptionError: what came is not what was sent.
        """
        received = super().dispatch(given, num_tokens_per_rdma_rank)
        with suspicion(self.party):
            assert received.handle is not None
            proof = Proof(self, "dispatch", given, received, received.handle)
            proof.check_routes()
            proof.check_rows()
        return received

    def cached_dispatch(self, x: object, handle: tuple[torch.Tensor, ...]) -> Received:
        """See :meth:`HighThroughput.cached_dispatch` and :meth:`dispatch`."""
        received = super().cached_dispatch(x, handle)
        with suspicion(self.party):
            known = make_handle(handle)
            given = self.along(known.is_token_in_rank, inputs.check_rows(self.party, x))
            Proof(self, "dispatch", given, received, known).check_rows()
        return received

    def combine(
        self, x: torch.Tensor, handle: tuple[torch.Tensor, ...], topk_weights: torch.Tensor | None, bias: object
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See :meth:`HighThroughput.combine`.

        Raises:
            CorruptionError: a sum is not that of the rows.
        """
        combined = super().combine(x, handle, topk_weights, bias)
        epoch = self.epoch
        with suspicion(self.party):
            known = make_handle(handle)
            columns = inputs.check_columns(self.party, x, topk_weights, known.num_rows)
            shape = len(known.is_token_in_rank), columns[0].size(1)
            biases = inputs.check_biases(self.party, bias, shape, columns[0].dtype)
            self.prove_sums(epoch, combined, known, columns[0], columns[1] if len(columns) > 1 else None, biases)
        return combined

    def prove_sums(
        self,
        epoch: int,
        combined: tuple[torch.Tensor, torch.Tensor | None],
        known: Handle,
        rows: torch.Tensor,
        weights: torch.Tensor | None,
        biases: Sequence[torch.Tensor],
    ) -> None:
        """Send the rows of a combine home once more, and compare what it made of them with their sums.

        Args:
            epoch: of the combine.
            combined: rows [T, H], and weights float32 [T, K] or None.
            known: handle of the dispatch.
            rows: [at least M, H], which are summed.
            weights: float32 [at least M, K].
            biases: [T, H].

        Raises:
            CorruptionError: they differ.
        """
        sources = self.sources(known)
        back = sources.unsqueeze(1) == torch.arange(self.party.num_ranks, device=self.party.device)
        given = self.along(back, Rows(rows[: len(back)], None if weights is None else weights[: len(back)]))
        home = super().dispatch(given, self.tokens_per_node(back))
        assert home.handle is not None
        tokens = [column.nonzero().flatten() for column in known.is_token_in_rank.unbind(1)]
        self._check_counts(epoch, self.counts(home.handle), [len(of_rank) for of_rank in tokens])
        Proof(self, "combine", given, home, home.handle, epoch, tokens).check_rows()
        self._check_sum(epoch, combined[0], tokens, home.x, biases)
        if combined[1] is not None and home.scales is not None:
            self._check_sum(epoch, combined[1], tokens, home.scales, ())

    @staticmethod
    def _check_counts(epoch: int, counts: list[int], wanted: list[int]) -> None:
        ranks = [rank for rank, count in enumerate(counts) if count != wanted[rank]]
        if ranks:
            raise CorruptionError("combine", epoch, ranks, f"{counts} rows of the ranks came home, not {wanted}")

    def _check_sum(
        self,
        epoch: int,
        combined: torch.Tensor,
        tokens: Sequence[torch.Tensor],
        rows: torch.Tensor,
        biases: Sequence[torch.Tensor],
    ) -> None:
        """Compare a combined column [T, width] with the sums of the rows of ``tokens`` [R]."""
        nodes = self.party.nodes
        counts = [len(of_rank) for of_rank in tokens]
        parts = [Part(*part) for part in zip(tokens, torch.split(rows, counts), strict=True)]
        if nodes is not None:
            dtype = torch.promote_types(rows.dtype, torch.float32) if nodes.exact else rows.dtype
            topology = nodes.topology
            ranks_of = [topology.ranks_of_node(node) for node in range(topology.num_nodes)]
            like = combined.to(dtype)
            parts = [Part(None, added_up([parts[rank] for rank in ranks], (), like)) for ranks in ranks_of]
        wrong = differ(combined, added_up(parts, biases, combined)).nonzero().flatten()
        if len(wrong):
            token = int(wrong[0])
            ranks = [rank for rank, of_rank in enumerate(tokens) if bool((of_rank == token).any())]
            reason = f"the sum of token {token} is not that of its rows{and_others(len(wrong) - 1, 'token')}"
            raise CorruptionError("combine", epoch, ranks or [self.party.rank], reason, token)

    # What proofs need.

    @property
    def epoch(self) -> int:
        """Number of the last operation."""
        return self.party.plane.epoch if self.party.nodes is None else self.party.nodes.epoch

    def along(self, is_token_in_rank: torch.Tensor, rows: Rows) -> Inputs:
        """What a dispatch of rows without choices is given, from bool [T, R]."""
        member, ranks = is_token_in_rank.contiguous(), self.party.num_ranks
        nothing = torch.zeros(ranks, dtype=torch.int32, device=self.party.device)
        return Inputs(rows, None, None, member, member.sum(0, dtype=torch.int32), nothing, ranks, 1, 0)

    def send(self, given: Inputs) -> Received:
        """A dispatch that is not proven."""
        return super().dispatch(given, self.tokens_per_node(given.is_token_in_rank))

    def counts(self, handle: Handle) -> list[int]:
        """[R]: rows received from each source rank."""
        if isinstance(handle, DispatchHandle):
            ends = handle.rank_prefix_matrix[:, self.party.rank]
        else:
            ends = handle.recv_gbl_rank_prefix_sum
        return [end - start for start, end in pairwise([0, *ends.tolist()])]

    def sources(self, handle: Handle) -> torch.Tensor:
        """int64 [M]: the source rank of each received row."""
        counts = torch.tensor(self.counts(handle), device=self.party.device)
        return torch.arange(self.party.num_ranks, device=self.party.device).repeat_interleave(counts)


@contextmanager
def suspicion(party: Party) -> Iterator[None]:
    """If a proof does not come to its end, no operation runs here any more, and the peers are told."""
    try:
        yield
    except StepBackError:
        raise
    except BaseException as error:
        party.plane.give_up(f"{type(error).__name__}: {error}")
        if party.nodes is not None:
            party.nodes.rail.close()
        raise


class Proof:
    """The checksums of a dispatch, which have come; and what they say. Choices may have no weights.

    Args:
        mode: of this rank.
        name: of the operation, for messages.
        given: what this rank has dispatched.
        received: what came.
        handle: of the dispatch.
        epoch: of the operation; by default the last one.
        tokens: the token of each row from each rank; by default those that the handle has.
    """

    def __init__(
        self,
        mode: Paranoid,
        name: str,
        given: Inputs,
        received: Received,
        handle: Handle,
        epoch: int | None = None,
        tokens: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._mode = mode
        self._name = name
        self._epoch = mode.epoch if epoch is None else epoch
        self._received = received
        self._handle = handle
        self._tokens = tokens
        self._num_local = given.num_experts // mode.party.num_ranks
        sums = self._sums_to_send(given)
        bare = given._replace(rows=Rows(sums, None), topk_idx=None, topk_weights=None, num_worst_tokens=0)
        self._proof = mode.send(bare)
        assert self._proof.handle is not None
        self._proven = self._proof.handle

    def _sums_to_send(self, given: Inputs) -> torch.Tensor:
        """int64 [T, 1 + R], or [T, 2] without choices; padded to whole rows."""
        rank, ranks = self._mode.party.rank, self._mode.party.num_ranks
        ids, weights = given.topk_idx, given.topk_weights
        num_tokens = len(given.is_token_in_rank)
        token = torch.arange(num_tokens, device=self._mode.party.device)
        of_rows = sum_of_rows(*given.rows)
        sums = [of_rows]
        if ids is not None:
            sums = [of_rows + _sum_of_choices(*self._seen_by(peer, ids, weights)) for peer in range(ranks)]
        columns = [token + (rank << _TOKEN_BITS), *sums]
        return torch.stack(columns + columns[:1] * (len(columns) % 2), 1)

    def _seen_by(
        self, rank: int, ids: torch.Tensor, weights: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Choices as a rank receives them."""
        local = ids - rank * self._num_local
        elsewhere = (local < 0) | (local >= self._num_local)
        return local.masked_fill(elsewhere, -1), None if weights is None else weights.masked_fill(elsewhere, 0)

    def check_routes(self) -> None:
        """Compare counts and handle with those of the second dispatch.

        Raises:
            CorruptionError: they differ.
        """
        self._check_counts()
        if self._received.num_per_expert and self._received.num_per_expert != self._proof.num_per_expert:
            what = f"num_recv_tokens_per_expert is {self._received.num_per_expert}"
            raise self._error(range(self._mode.party.num_ranks), f"{what}, then {self._proof.num_per_expert}")
        for name, first, second in zip(self._handle._fields, self._handle, self._proven, strict=True):
            if not name.startswith("recv_src") and not torch.equal(first, second):
                raise self._error(range(self._mode.party.num_ranks), f"handle.{name} differs from that of the proof")

    def _check_counts(self) -> None:
        mine, proven = self._mode.counts(self._handle), self._mode.counts(self._proven)
        ranks = [rank for rank, count in enumerate(mine) if count != proven[rank]]
        if ranks:
            raise self._error(ranks, f"{mine} rows of the ranks came, checksums of {proven}")

    def check_rows(self) -> None:
        """Compare the rows that came, and where they are from, with the checksums.

        Raises:
            CorruptionError: they differ.
        """
        self._check_counts()
        origin, count = self._proof.x[:, 0], len(self._proof.x)
        sums = self._proof.x[:, 1]
        recv = self._received
        found = sum_of_rows(recv.x[:count], None if recv.scales is None else recv.scales[:count])
        if recv.topk_idx is not None:
            sums = self._proof.x[:, 1 + self._mode.party.rank]
            weights = None if recv.topk_weights is None else recv.topk_weights[:count]
            found += _sum_of_choices(recv.topk_idx[:count], weights)
        spoiled = found != sums
        source = self._mode.sources(self._proven)
        astray = origin >> _TOKEN_BITS != source
        astray[1:] |= origin.diff() <= 0
        places, proven = _places(self._handle), _places(self._proven)
        astray |= (places[:count] != proven).any(1)
        if isinstance(self._handle, DispatchHandle):
            astray |= origin & ((1 << _TOKEN_BITS) - 1) != places[:count, 0]
        wrong = (spoiled | astray).nonzero().flatten()
        if len(wrong):
            self._raise(wrong, source, origin, astray)
        if bool((places[count:] != -1).any()):
            raise self._error([self._mode.party.rank], "the handle has source tokens past the last row")

    def _raise(self, wrong: torch.Tensor, source: torch.Tensor, origin: torch.Tensor, astray: torch.Tensor) -> None:
        row = int(wrong[0])
        rank = int(source[row])
        if self._tokens is not None:
            token = int(torch.cat(list(self._tokens))[row])
        elif bool(origin[row] >> _TOKEN_BITS == rank):
            token = int(origin[row]) & ((1 << _TOKEN_BITS) - 1)
        else:  # the checksums themselves went wrong
            token = int(_places(self._handle)[row, -1])
        what = "place or source differ from what was sent" if astray[row] else "bytes differ from what was sent"
        others = and_others(len(wrong) - 1, "row")
        ranks = sorted(set(source[wrong].tolist()))
        raise self._error(ranks, f"row {row}, token {token} of rank {rank}: {what}{others}", token)

    def _error(self, ranks: Sequence[int], reason: str, token: int | None = None) -> CorruptionError:
        return CorruptionError(self._name, self._epoch, ranks, reason, token)


def and_others(count: int, what: str) -> str:
    """The end of a sentence about the first thing that is wrong."""
    return f", and {count} more {what}s" if count else ""


def _places(handle: Handle) -> torch.Tensor:
    """int32 [M, 1 or 2]: what the handle says of the source of each row, its token or place last."""
    if isinstance(handle, DispatchHandle):
        return handle.recv_src_idx.view(-1, 1)
    return handle.recv_src_meta.contiguous().view(torch.int32)


def _sum_of_choices(ids: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    sums = checksums(ids, 3)
    return sums if weights is None else sums + checksums(weights, 4)
