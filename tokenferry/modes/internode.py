"""Dispatch and combine between nodes: over the rails, then as inside a node.

A token crosses the network once for every node that it goes to, over its own rail, to the rank with its local index
there: its **relay**. From there on the relay is the owner of the row, and the ranks of its node pull it. Combine runs
backwards: the relay sums what the ranks of its node have of a token, one partial row goes home over the rail, and
the source sums the partial rows, nodes ascending::

    rank n of node s  --rail-->  rank n of node d  --pull-->  rank m of node d
                      <--rail--                    <--pull + sum--

The rows that a relay has of a source are cut in chunks. A *part* is chunk c of the rows that all relays of a node
have of source node s: one operation inside the node. The rails carry the next chunk meanwhile.

Formula: ``y[t] = round(bias_0[t] + bias_1[t] + sum over nodes g that have t, ascending, of p_g[t])`` with
``p_g[t] = round(sum over ranks r of g that have t, ascending, of x_r[row of (me, t) on r])``; sums in float32.

Legend of dims: T tokens of this rank, H elements of a row, K choices, E experts, R ranks on G nodes, L on each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from tokenferry.config import Config, align_up
from tokenferry.dataplane import HeldRows, OperationKind, Outputs, Part, PartPlan, ReducePlan, SendPlan
from tokenferry.errors import HeapError
from tokenferry.handles import DispatchHandle
from tokenferry.modes import intranode
from tokenferry.modes.intranode import Inputs, Party, Received, Rows, as_bytes, signature_of, topk_idx_t
from tokenferry.modes.nodes import Nodes, Offer, Operation, Share, share_bytes
from tokenferry.modes.routes import Routes, check_handle, in_nodes, make_handle, places_of, starts_of
from tokenferry.rail import Transfer
from tokenferry.topology import Topology
from tokenferry.validation import check_tensor, require


def chunk_of(config: Config) -> int:
    """Rows of a chunk: what DeepEP's rings to a node hold, ``num_sms / 2`` of them."""
    return max(1, config.num_sms // 2) * config.num_max_rdma_chunked_recv_tokens


def tokens_per_node(party: Party, is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """int32 [G]: tokens that go to each node, from bool [T, R]."""
    return in_nodes(_nodes(party).topology, is_token_in_rank).sum(0, dtype=torch.int32)


def _nodes(party: Party) -> Nodes:
    assert party.nodes is not None
    return party.nodes


class _Relayed(NamedTuple):
    """What a relay knows of the rows of one source."""

    members: torch.Tensor
    """bool [rows, L]."""
    topk_idx: torch.Tensor | None
    """int64 [rows, K]."""
    topk_weights: torch.Tensor | None
    """float32 [rows, K]."""
    num_per_expert: torch.Tensor
    """int32 [E / G]: choices of the experts of this node, rank by rank."""


def dispatch(party: Party, given: Inputs, num_tokens_per_rdma_rank: object, chunk: int) -> Received:
    """Dispatch with fresh counts; see :meth:`tokenferry.Buffer.dispatch`.

    Args:
        party: who takes part.
        given: checked inputs.
        num_tokens_per_rdma_rank: int32 [G].
        chunk: rows of a chunk.
    """
    nodes = _nodes(party)
    topology, rows, ids = nodes.topology, given.rows, given.topk_idx
    tokens = [column.nonzero().flatten() for column in in_nodes(topology, given.is_token_in_rank).unbind(1)]
    sent = [len(of_node) for of_node in tokens]
    _check_per_node(party, num_tokens_per_rdma_rank, sent)
    signature = signature_of(OperationKind.DISPATCH, rows, 0 if ids is None else ids.size(1), given.num_experts)
    with nodes.operation(party, "dispatch", signature) as operation:
        offers = operation.offer(sent, chunk)
        relayed = _exchange_choices(operation, topology, given, tokens, offers)
        members = [source.members for source in relayed]
        chunks = [offers[node].chunk if node in offers else _whole(members[node]) for node in range(len(sent))]
        chosen = torch.stack([source.num_per_expert for source in relayed]).sum(0).tolist()
        shares = operation.share(members, chunks, [], given.num_worst_tokens, chosen, _row_bytes(rows, ids))
        counts = [[share.counts[node][topology.local_index] for share in shares] for node in range(len(sent))]
        routes = Routes(tokens, members, starts_of(topology, counts), counts)
        num_rows = given.num_worst_tokens or sum(map(sum, counts))
        recv_x, recv_scales = intranode.empty_rows_like(party, rows, num_rows)
        recv_ids = recv_weights = None
        if ids is not None:
            recv_ids = party.plane.empty_rows(num_rows, ids.size(1), topk_idx_t)
            recv_weights = party.plane.empty_rows(num_rows, ids.size(1), torch.float32)
        places = torch.empty(num_rows, dtype=torch.int32, device=party.device)
        outputs = Outputs(*as_bytes(recv_x, recv_scales), recv_ids, recv_weights, places)
        _Delivery(party, operation, routes, shares, chunk, relayed).run(rows, outputs)
    local_experts = given.num_experts // topology.num_ranks
    first = topology.local_index * local_experts
    per_expert = [sum(share.extra[first + expert] for share in shares) for expert in range(local_experts)]
    aligned = [] if given.num_worst_tokens else [align_up(count, given.expert_alignment) for count in per_expert]
    handle = make_handle(topology, routes, given.is_token_in_rank, given.num_tokens_per_rank, places)
    return Received(recv_x, recv_scales, recv_ids, recv_weights, aligned, handle)


def _check_per_node(party: Party, given: object, sent: list[int]) -> None:
    name = "num_tokens_per_rdma_rank"
    per_node = check_tensor(name, given, shape=(len(sent),), dtypes=(torch.int32,), device=party.device).tolist()
    require(per_node == sent, name, per_node, f"{sent}, as in is_token_in_rank")


def _row_bytes(rows: Rows, topk_idx: torch.Tensor | None) -> int:
    """Of a row and what travels with it."""
    wide = [part.size(1) * part.element_size() for part in rows if part is not None]
    return sum(wide) + (0 if topk_idx is None else 12 * topk_idx.size(1))


def _whole(member: torch.Tensor) -> int:
    """A chunk that holds all rows."""
    return max(1, len(member))


def _exchange_choices(
    operation: Operation,
    topology: Topology,
    given: Inputs,
    tokens: Sequence[torch.Tensor],
    offers: Mapping[int, Offer],
) -> list[_Relayed]:
    """Tell the relays which ranks each row goes to, and its choices; learn the same as a relay. [G]."""
    per_rank = given.num_tokens_per_expert.view(topology.num_ranks, -1)

    def of_node(node: int, chosen: torch.Tensor | None) -> _Relayed:
        ranks = topology.ranks_of_node(node)
        parts = [given.is_token_in_rank[:, ranks], given.topk_idx, given.topk_weights]
        if chosen is not None:
            parts = [None if part is None else part[chosen] for part in parts]
        members, ids, weights = parts
        assert members is not None
        return _Relayed(members.contiguous(), ids, weights, per_rank[ranks, :].reshape(-1))

    def empty(num_rows: int) -> _Relayed:
        """As what a source of so many rows sends."""
        like = of_node(topology.node, tokens[topology.node][:0])
        ids, weights = (None if t is None else t.new_empty((num_rows, t.size(1))) for t in like[1:3])
        members = like.members.new_empty((num_rows, like.members.size(1)))
        return _Relayed(members, ids, weights, torch.zeros_like(like.num_per_expert))

    relayed = {node: empty(offer.num_rows) for node, offer in offers.items()}
    sends = {node: _present(of_node(node, tokens[node])) for node in offers}
    operation.exchange(sends, {node: _present(source) for node, source in relayed.items()})
    for node, source in relayed.items():  # whatever bytes came
        relayed[node] = source._replace(members=source.members.view(torch.uint8) != 0)
    here = topology.node
    return [
        of_node(here, None) if node == here else relayed.get(node, empty(0)) for node in range(topology.num_nodes)
    ]


def _present(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


class _Delivery:
    """The rows of a dispatch on their way: chunk by chunk over the rail, part by part inside the node.

    Args:
        party: who takes part.
        operation: agreed.
        routes: of the operation.
        shares: of the ranks of the node.
        chunk: rows of a chunk that this rank sends.
        relayed: choices of the rows that it relays, [G]; None: no choices travel.
    """

    def __init__(
        self,
        party: Party,
        operation: Operation,
        routes: Routes,
        shares: Sequence[Share],
        chunk: int,
        relayed: Sequence[_Relayed] | None,
    ) -> None:
        self._party = party
        self._operation = operation
        self._routes = routes
        self._shares = shares
        self._chunk = chunk
        self._relayed = relayed
        self._topology = _nodes(party).topology
        self._others = _nodes(party).others
        self._filled = torch.tensor(routes.starts, device=party.device)  # int64 [G, L]
        self._edges = edges_of(shares, party.device)

    def run(self, rows: Rows, outputs: Outputs) -> None:
        """Send the rows, and fill the outputs."""
        columns = _present(as_bytes(*rows))
        here = self._topology.node
        num_parts = {node: num_parts_of(self._shares, node) for node in self._others}
        sent = [pieces(len(self._routes.tokens[node]), self._chunk) for node in self._others]
        num_chunks = max([*num_parts.values(), *sent])
        posted = self._post(0, columns)
        self._pull(here, 0, columns, outputs)
        for number in range(num_chunks):
            following = self._post(number + 1, columns)
            for node in self._others:
                posted.transfer.wait(node)
                if number < num_parts[node]:
                    self._pull(node, number, posted.received[node], outputs)
            posted.transfer.finish()
            posted = following
        self._finish(outputs)

    def _post(self, number: int, columns: Sequence[torch.Tensor]) -> _Posted:
        """Begin to send and to receive the chunks of this number."""
        sends, received = {}, {}
        for node in self._others:
            tokens = self._routes.tokens[node][number * self._chunk : (number + 1) * self._chunk]
            sends[node] = [column.index_select(0, tokens) for column in columns]
            share = self._shares[self._topology.local_index]
            low, high = bounds(share.num_rows[node], share.chunks[node], number)
            received[node] = [self._party.plane.empty_rows(high - low, part.size(1), part.dtype) for part in columns]
        return _Posted(self._operation.post(sends, received), received)

    def _pull(self, node: int, number: int, columns: Sequence[torch.Tensor], outputs: Outputs) -> None:
        """Forward the rows of a part to the ranks of this node, and receive what is for this one."""
        party, share = self._party, self._shares[self._topology.local_index]
        rows = slice(*bounds(share.num_rows[node], share.chunks[node], number))
        ids = weights = None
        if self._relayed is not None:
            ids, weights = ((None if t is None else t[rows]) for t in self._relayed[node][1:3])
        plan = SendPlan(
            columns[0],
            columns[1] if len(columns) == 2 else None,
            topk_idx=ids,
            topk_weights=weights,
            is_token_in_rank=self._routes.members[node][rows],
            num_tokens_per_rank=None,
            num_tokens_per_expert=None,
            num_worst_tokens=0,
            handle=None,
            num_sms=party.num_sms,
            part=PartPlan(len(outputs.rows), self._filled[node], self._edges[node][number], self._experts()),
        )
        with party.plane.dispatch(self._operation.signature, plan) as exchange:
            exchange.pull(outputs)

    def _experts(self) -> range | None:
        """The experts of this rank."""
        if self._relayed is None:
            return None
        per_rank = len(self._relayed[0].num_per_expert) // len(self._topology.local_ranks)
        return range(self._topology.rank * per_rank, (self._topology.rank + 1) * per_rank)

    def _finish(self, outputs: Outputs) -> None:
        """Check that all rows are there, and mark those past the last."""
        for node, filled in enumerate(self._filled.tolist()):
            for index, (start, count) in enumerate(
                zip(self._routes.starts[node], self._routes.counts[node], strict=True)
            ):
                if filled[index] != start + count:
                    rank = self._topology.ranks_of_node(node)[index]
                    raise HeapError(f"{filled[index] - start} of the {count} rows of rank {rank} came")
        total = sum(map(sum, self._routes.counts))
        for tensor, value in ((outputs.recv_src_idx, -1), (outputs.topk_idx, -1), (outputs.topk_weights, 0)):
            if tensor is not None:
                tensor[total:].fill_(value)


class _Posted(NamedTuple):
    transfer: Transfer
    received: dict[int, list[torch.Tensor]]
    """By node: the columns of its chunk."""


def pieces(count: int, size: int) -> int:
    """Pieces of ``size`` that ``count`` rows make."""
    return -(-count // size)


def bounds(count: int, size: int, number: int) -> tuple[int, int]:
    """First row, and the row past the last, of a piece; both ``count`` past the end."""
    return min(number * size, count), min((number + 1) * size, count)


def edges_of(shares: Sequence[Share], device: torch.device) -> list[torch.Tensor]:
    """Where parts begin and the last one ends, [G] of int64 [parts + 1, L]: rows that each relay has of the node."""
    edges = []
    for node in range(len(shares[0].num_rows)):
        sizes = [(share.num_rows[node], min(share.chunks[node], max(share.num_rows[node], 1))) for share in shares]
        rows, chunks = torch.tensor(sizes, device="cpu").unbind(1)
        numbers = torch.arange(max(num_parts_of(shares, node), 1) + 1, device="cpu")
        edges.append(torch.minimum(numbers.unsqueeze(1) * chunks, rows))
    return list(torch.split(torch.cat(edges).to(device), [len(of_node) for of_node in edges]))


def num_parts_of(shares: Sequence[Share], node: int) -> int:
    """Parts in which the rows of a source node move inside this one."""
    return max(pieces(share.num_rows[node], share.chunks[node]) for share in shares)


def cached_dispatch(party: Party, x: object, handle: object, chunk: int) -> Received:
    """Dispatch rows along a handle; see :meth:`tokenferry.Buffer.dispatch`."""
    rows = intranode.check_rows(party, x)
    nodes = _nodes(party)
    known, routes = check_handle(nodes.topology, party.device, handle)
    num_tokens = len(known.is_token_in_rank)
    require(len(rows.x) == num_tokens, "x", f"{len(rows.x)} rows", f"the {num_tokens} rows of the handle")
    signature = signature_of(OperationKind.CACHED_DISPATCH, rows)
    with nodes.operation(party, "dispatch", signature) as operation:
        offers = operation.offer([len(tokens) for tokens in routes.tokens], chunk)
        operation.check_routes(offers, routes.num_relayed)
        chunks = [offers[node].chunk if node in offers else _whole(part) for node, part in enumerate(routes.members)]
        shares = operation.share(routes.members, chunks, routes.counts, 0, (), _row_bytes(rows, None))
        recv_x, recv_scales = intranode.empty_rows_like(party, rows, len(known.recv_src_meta))
        outputs = Outputs(*as_bytes(recv_x, recv_scales), None, None, None)
        _Delivery(party, operation, routes, shares, chunk, None).run(rows, outputs)
    return Received(recv_x, recv_scales, None, None, None, None)


def combine(
    party: Party, x: object, handle: object, topk_weights: object, bias: object, chunk: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum the rows of every token; see :meth:`tokenferry.Buffer.combine`."""
    nodes = _nodes(party)
    known, routes = check_handle(nodes.topology, party.device, handle)
    num_rows, num_tokens = len(known.recv_src_meta), len(known.is_token_in_rank)
    columns = intranode.check_columns(party, x, topk_weights, num_rows)
    biases = intranode.check_biases(party, bias, (num_tokens, columns[0].size(1)), columns[0].dtype)
    num_topk = columns[1].size(1) if len(columns) > 1 else 0
    signature = signature_of(OperationKind.COMBINE, Rows(columns[0], None), num_topk)
    with nodes.operation(party, "combine", signature) as operation:
        offers = operation.offer(routes.num_relayed, chunk)
        operation.check_routes(offers, [len(tokens) for tokens in routes.tokens])
        chunks = [chunk] * nodes.topology.num_nodes
        chunks[nodes.topology.node] = _whole(known.is_token_in_rank)
        shares = operation.share(
            routes.members, chunks, routes.counts, 0, (), sum(c.size(1) * c.element_size() for c in columns)
        )
        homes = _Homecoming(party, operation, routes, shares, offers, columns, places_of(known).contiguous()).run()
        outs = [party.plane.empty_rows(num_tokens, column.size(1), column.dtype) for column in columns]
        for index, out in enumerate(outs):
            parts = [Part(home.tokens, home.columns[index]) for home in homes]
            party.plane.sum_rows(parts, biases if index == 0 else (), out, party.num_sms)
    return outs[0], outs[1] if num_topk else None


class _Home(NamedTuple):
    """Partial sums of a node, back at the source."""

    tokens: torch.Tensor | None
    columns: list[torch.Tensor]


class _Homecoming:
    """The rows of a combine on their way: summed part by part inside the node, then chunk by chunk over the rail.

    Args:
        party: who takes part.
        operation: agreed.
        routes: of the dispatch that brought the rows.
        shares: of the ranks of the node.
        offers: of the other relays of this rank's tokens.
        columns: [M, width]: what is summed.
        places: int32 [M].
    """

    def __init__(
        self,
        party: Party,
        operation: Operation,
        routes: Routes,
        shares: Sequence[Share],
        offers: Mapping[int, Offer],
        columns: Sequence[torch.Tensor],
        places: torch.Tensor,
    ) -> None:
        self._party = party
        self._operation = operation
        self._routes = routes
        self._shares = shares
        self._offers = offers
        self._columns = columns
        self._places = places.contiguous()  # a column of the handle
        self._topology = _nodes(party).topology
        self._others = _nodes(party).others
        self._edges = edges_of(shares, party.device)
        self._held = self._rows_of_parts()
        exact = _nodes(party).exact
        self._dtypes = [torch.promote_types(c.dtype, torch.float32) if exact else c.dtype for c in columns]

    def run(self) -> list[_Home]:
        """The partial sums of all nodes, by node."""
        here, tokens = self._topology.node, self._routes.tokens
        homes = {node: _Home(tokens[node], self._empty(len(tokens[node]))) for node in self._others}
        num_parts = {node: num_parts_of(self._shares, node) for node in self._others}
        coming = [pieces(len(tokens[node]), self._offers[node].chunk) for node in self._others]
        transfers = []
        for number in range(max([*num_parts.values(), *coming])):
            sends = {node: self._sum(node, number) for node in self._others if number < num_parts[node]}
            receives = {}
            for node, offer in self._offers.items():
                part = slice(*bounds(len(tokens[node]), offer.chunk, number))
                receives[node] = [column[part] for column in homes[node].columns]
            transfers.append(self._operation.post(sends, receives))
        homes[here] = _Home(None, self._sum(here, 0))
        for transfer in transfers:
            for node in self._others:
                transfer.wait(node)
            transfer.finish()
        return [homes[node] for node in range(self._topology.num_nodes)]

    def _rows_of_parts(self) -> list[torch.Tensor]:
        """The first row of every part, [G] of int64 [parts + 1, L]: like the edges, in rows of this rank."""
        device, order = self._places.device, self._topology.places
        counts = [self._routes.counts[node][index] for node, index in order]
        ranks = torch.repeat_interleave(
            torch.arange(len(counts), device=device), torch.tensor(counts, device=device), output_size=sum(counts)
        )
        # Rows ascend by (source rank, place), so in one number they are searched all at once.
        rows = (ranks << 32) + self._places[: len(ranks)]
        number = {place: rank for rank, place in enumerate(order)}
        first = [
            [number[node, index] << 32 for index in range(len(self._shares))]
            for node in range(self._topology.num_nodes)
        ]
        wanted = [edges + start for edges, start in zip(self._edges, torch.tensor(first, device=device), strict=True)]
        found = torch.searchsorted(rows, torch.cat(wanted))
        return list(torch.split(found, [len(edges) for edges in self._edges]))

    def _sum(self, node: int, number: int) -> list[torch.Tensor]:
        """The sums over the ranks of this node for the rows of a part that this rank relays."""
        share = self._shares[self._topology.local_index]
        member = self._routes.members[node][slice(*bounds(share.num_rows[node], share.chunks[node], number))]
        nothing = self._places[:0]
        handle = DispatchHandle(nothing, nothing, nothing, nothing, member, nothing)
        starts, ends = self._held[node][number], self._held[node][number + 1]
        held = HeldRows(starts, ends, self._edges[node][number], self._places)
        plan = ReducePlan(self._columns, (), handle, self._party.num_sms, held=held)
        sums = self._empty(len(member))
        self._party.plane.pull_reduce(self._operation.signature, plan, sums)
        return sums

    def _empty(self, num_rows: int) -> list[torch.Tensor]:
        return [
            self._party.plane.empty_rows(num_rows, column.size(1), dtype)
            for column, dtype in zip(self._columns, self._dtypes, strict=True)
        ]


def warm(
    party: Party,
    hidden: int,
    num_topk: int,
    num_experts: int,
    dtype: torch.dtype,
    scale_bytes: int,
    combine_dtype: torch.dtype | None,
) -> None:
    """Make ready for such operations; see :meth:`tokenferry.Buffer.warmup`."""
    fresh, reduces = intranode.plans_to_warm(party, hidden, num_topk, num_experts, dtype, scale_bytes, combine_dtype)
    topology = _nodes(party).topology
    empty = torch.empty(0, dtype=torch.int64, device=party.device)
    part = fresh._replace(part=PartPlan(0, empty, empty, None))
    cached = part._replace(topk_idx=None, topk_weights=None)
    shares = [
        cached._replace(rows=torch.empty((0, nbytes), dtype=torch.uint8, device=party.device), scales=None, part=None)
        for nbytes in (share_bytes(topology, 0, num_experts // topology.num_nodes), share_bytes(topology, 1, 0))
    ]
    party.plane.warm([part, cached, *shares], reduces, num_experts)
