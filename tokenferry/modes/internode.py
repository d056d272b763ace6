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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from tokenferry.config import align_all
from tokenferry.dataplane import HeldRows, OperationKind, Outputs, Part, PartPlan, ReducePlan, SendPlan
from tokenferry.errors import HeapError
from tokenferry.handles import DispatchHandle
from tokenferry.modes import inputs, intranode
from tokenferry.modes.choices import Choices, Relayed
from tokenferry.modes.chunks import ChunkedRows, Chunking, bounds, edges_of, num_parts_of, on_device, pieces
from tokenferry.modes.inputs import Inputs, Party, Rows, as_bytes, topk_idx_t
from tokenferry.modes.intranode import Received, signature_of
from tokenferry.modes.nodes import Nodes, Operation
from tokenferry.modes.routes import (
    PartRows,
    Routes,
    in_nodes,
    make_handle,
    places_of,
    starts_of,
    tokens_of,
)
from tokenferry.modes.shares import Offer, Share, share_bytes
from tokenferry.rail import Transfer
from tokenferry.validation import check_tensor, require

_MOST_SUMS = 8
"""In which a combine adds up what comes from the nodes: enough that the last one is short."""


def tokens_per_node(party: Party, is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """int32 [G]: tokens that go to each node, from bool [T, R]."""
    return in_nodes(_nodes(party).topology, is_token_in_rank).sum(0, dtype=torch.int32)


def _nodes(party: Party) -> Nodes:
    assert party.nodes is not None
    return party.nodes


def dispatch(party: Party, given: Inputs, num_tokens_per_rdma_rank: object, chunking: Chunking) -> Received:
    """Dispatch with fresh counts; see :meth:`tokenferry.Buffer.dispatch`.

    Args:
        party: who takes part.
        given: checked inputs.
        num_tokens_per_rdma_rank: int32 [G].
        chunking: of the rows.
    """
    nodes = _nodes(party)
    topology, rows, ids = nodes.topology, given.rows, given.topk_idx
    node_member = in_nodes(topology, given.is_token_in_rank)
    sent = _checked_per_node(party, num_tokens_per_rdma_rank, node_member)
    tokens = tokens_of(node_member, sent)
    columns, row_bytes = _present(as_bytes(*rows)), _row_bytes(rows, ids)
    sizes = [chunking.rows(count, row_bytes * len(topology.local_ranks)) for count in sent]
    signature = signature_of(OperationKind.DISPATCH, rows, 0 if ids is None else ids.size(1), given.num_experts)
    with nodes.operation(party, "dispatch", signature) as operation:
        operation.offer(sent, sizes)
        choices = Choices(topology, given, tokens)
        chunks = ChunkedRows(operation, party.plane, nodes.others, columns, tokens, sizes)
        offers = operation.offers()
        choices.post(operation, offers)
        chunks.begin(offers)  # the network has work while ranks agree
        relayed = choices.wait()
        members = [source.members for source in relayed]
        cut = [offers[node].chunk if node in offers else _whole(members[node]) for node in range(len(sent))]
        chosen = torch.stack([source.num_per_expert for source in relayed]).sum(0)
        shares = operation.share(members, cut, [], given.num_worst_tokens, chosen, row_bytes)
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
        delivery = _Delivery(party, operation, routes, shares, chunks, relayed, outputs)
        delivery.begin(columns)
        handle = make_handle(
            topology, routes, given.is_token_in_rank, node_member, given.num_tokens_per_rank, num_rows
        )
        delivery.run()
        places_of(handle).copy_(places)
        nodes.routes.remember(handle, routes)
    local_experts = given.num_experts // topology.num_ranks
    if given.num_worst_tokens:
        return Received(recv_x, recv_scales, recv_ids, recv_weights, [], handle)
    own = slice(topology.local_index * local_experts, (topology.local_index + 1) * local_experts)
    per_expert = list(map(sum, zip(*(share.extra[own] for share in shares), strict=True)))
    per_expert = align_all(per_expert, given.expert_alignment)
    return Received(recv_x, recv_scales, recv_ids, recv_weights, per_expert, handle)


def _checked_per_node(party: Party, given: object, node_member: torch.Tensor) -> list[int]:
    """Tokens that go to each node, as the caller says, too."""
    name, count = "num_tokens_per_rdma_rank", node_member.size(1)
    require(given is not None, name, None, f"what get_dispatch_layout returns second: ranks are on {count} nodes")
    per_node = check_tensor(name, given, shape=(count,), dtypes=(torch.int32,), device=party.device)
    said, sent = torch.stack([per_node, node_member.sum(0, dtype=torch.int32)]).tolist()
    require(said == sent, name, said, f"{sent}, as in is_token_in_rank")
    return list(sent)


def _row_bytes(rows: Rows, topk_idx: torch.Tensor | None) -> int:
    """Of a row and what travels with it."""
    wide = [part.size(1) * part.element_size() for part in rows if part is not None]
    return sum(wide) + (0 if topk_idx is None else 12 * topk_idx.size(1))


def _whole(member: torch.Tensor) -> int:
    """A chunk that holds all rows."""
    return max(1, len(member))


def _present(tensors: Iterable[torch.Tensor | None]) -> list[torch.Tensor]:
    return [tensor for tensor in tensors if tensor is not None]


class _Delivery:
    """The rows of a dispatch on their way: chunk by chunk over the rail, part by part inside the node.

    While one chunk is pulled the network has two more. On GPUs the order on the stream is all that parts need; the
    host stays one chunk behind, so that not more than three take memory.

    Args:
        party: who takes part.
        operation: shared, but not agreed on.
        routes: of the operation.
        shares: of the ranks of the node.
        chunks: the rows on the rail.
        relayed: choices of the rows that it relays, [G]; None: no choices travel.
        outputs: to be filled.
    """

    def __init__(
        self,
        party: Party,
        operation: Operation,
        routes: Routes,
        shares: Sequence[Share],
        chunks: ChunkedRows,
        relayed: Sequence[Relayed] | None,
        outputs: Outputs,
    ) -> None:
        self._party = party
        self._operation = operation
        self._routes = routes
        self._shares = shares
        self._chunks = chunks
        self._relayed = relayed
        self._outputs = outputs
        self._topology = _nodes(party).topology
        self._others = _nodes(party).others
        starts = torch.tensor(routes.starts, device="cpu")
        self._filled, *self._edges = on_device([starts, *edges_of(shares)], party.device)  # int64 [G, L] ...

    def begin(self, columns: Sequence[torch.Tensor]) -> None:
        """Bring the rows of this node, and agree with the others.

        Args:
            columns: of this rank's rows.
        """
        outputs, total = self._outputs, sum(map(sum, self._routes.counts))
        for tensor, value in ((outputs.recv_src_idx, -1), (outputs.topk_idx, -1), (outputs.topk_weights, 0)):
            if tensor is not None and total < len(tensor):
                tensor[total:].fill_(value)
        self._pull(self._topology.node, 0, columns)
        self._operation.agree()
        self._chunks.post()

    def run(self) -> None:
        """Bring the rows of the other nodes."""
        num_parts = {node: num_parts_of(self._shares, node) for node in self._others}
        for number in range(max([*num_parts.values(), self._chunks.count])):
            for node in self._others:
                columns = self._chunks.wait(number, node)
                if number < num_parts[node]:
                    self._pull(node, number, columns)
            self._chunks.finish(number - 1)
            self._chunks.post()
        self._operation.finish()
        self._check()

    def _pull(self, node: int, number: int, columns: Sequence[torch.Tensor]) -> None:
        """Forward the rows of a part to the ranks of this node, and receive what is for this one."""
        party, share = self._party, self._shares[self._topology.local_index]
        rows = slice(*bounds(share.num_rows[node], share.chunks[node], number))
        ids = weights = None
        if self._relayed is not None:
            ids, weights = ((None if t is None else t[rows]) for t in self._relayed[node][:2])
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
            part=PartPlan(len(self._outputs.rows), self._filled[node], self._edges[node][number], self._experts()),
        )
        with party.plane.dispatch(self._operation.signature, plan) as exchange:
            exchange.pull(self._outputs)

    def _experts(self) -> range | None:
        """The experts of this rank."""
        if self._relayed is None:
            return None
        per_rank = len(self._relayed[0].num_per_expert) // len(self._topology.local_ranks)
        return range(self._topology.rank * per_rank, (self._topology.rank + 1) * per_rank)

    def _check(self) -> None:
        """Check that all rows are there."""
        for node, filled in enumerate(self._filled.tolist()):
            for index, (start, count) in enumerate(
                zip(self._routes.starts[node], self._routes.counts[node], strict=True)
            ):
                if filled[index] != start + count:
                    rank = self._topology.ranks_of_node(node)[index]
                    raise HeapError(f"{filled[index] - start} of the {count} rows of rank {rank} came")


def cached_dispatch(party: Party, x: object, handle: object, chunking: Chunking) -> Received:
    """Dispatch rows along a handle; see :meth:`tokenferry.Buffer.dispatch`."""
    rows = inputs.check_rows(party, x)
    nodes = _nodes(party)
    known, routes = nodes.routes.of(party.device, handle)
    num_tokens = len(known.is_token_in_rank)
    require(len(rows.x) == num_tokens, "x", f"{len(rows.x)} rows", f"the {num_tokens} rows of the handle")
    columns, row_bytes, sent = _present(as_bytes(*rows)), _row_bytes(rows, None), list(map(len, routes.tokens))
    sizes = [chunking.rows(count, row_bytes * len(nodes.topology.local_ranks)) for count in sent]
    signature = signature_of(OperationKind.CACHED_DISPATCH, rows)
    with nodes.operation(party, "dispatch", signature) as operation:
        operation.offer(sent, sizes)
        chunks = ChunkedRows(operation, party.plane, nodes.others, columns, routes.tokens, sizes)
        offers = operation.offers()
        chunks.begin(offers)
        operation.check_routes(offers, routes.num_relayed)
        cut = [offers[node].chunk if node in offers else _whole(part) for node, part in enumerate(routes.members)]
        shares = operation.share(routes.members, cut, routes.counts, 0, None, row_bytes)
        recv_x, recv_scales = intranode.empty_rows_like(party, rows, len(known.recv_src_meta))
        outputs = Outputs(*as_bytes(recv_x, recv_scales), None, None, None)
        delivery = _Delivery(party, operation, routes, shares, chunks, None, outputs)
        delivery.begin(columns)
        delivery.run()
    return Received(recv_x, recv_scales, None, None, None, None)


def combine(
    party: Party, x: object, handle: object, topk_weights: object, bias: object, chunking: Chunking
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Sum the rows of every token; see :meth:`tokenferry.Buffer.combine`."""
    nodes = _nodes(party)
    known, routes = nodes.routes.of(party.device, handle)
    num_rows, num_tokens = len(known.recv_src_meta), len(known.is_token_in_rank)
    columns = inputs.check_columns(party, x, topk_weights, num_rows)
    biases = inputs.check_biases(party, bias, (num_tokens, columns[0].size(1)), columns[0].dtype)
    num_topk = columns[1].size(1) if len(columns) > 1 else 0
    row_bytes = sum(column.size(1) * column.element_size() for column in columns)
    sizes = [chunking.rows(count, row_bytes * len(nodes.topology.local_ranks)) for count in routes.num_relayed]
    signature = signature_of(OperationKind.COMBINE, Rows(columns[0], None), num_topk)
    with nodes.operation(party, "combine", signature) as operation:
        operation.offer(routes.num_relayed, sizes)
        offers = operation.offers()
        operation.check_routes(offers, [len(tokens) for tokens in routes.tokens])
        sizes[nodes.topology.node] = _whole(known.is_token_in_rank)
        shares = operation.share(routes.members, sizes, routes.counts, 0, None, row_bytes)
        homecoming = _Homecoming(party, operation, routes, shares, offers, columns, places_of(known).contiguous())
        homecoming.send()
        outs = [party.plane.empty_rows(num_tokens, column.size(1), column.dtype) for column in columns]
        for tokens, homes in homecoming.arrivals():
            added = [bias[tokens] for bias in biases]
            for index, out in enumerate(outs):
                parts = [Part(home.tokens, home.columns[index]) for home in homes]
                party.plane.sum_rows(parts, () if index else added, out[tokens], party.num_sms)
        operation.finish()
    return outs[0], outs[1] if num_topk else None


class _Home(NamedTuple):
    """Partial sums of a node, back at the source."""

    tokens: torch.Tensor | None
    """Ascending; None: every token has a row."""
    columns: list[torch.Tensor]

    def cut(self, rows: slice, first_token: int) -> _Home:
        """These rows, of tokens counted from the first."""
        tokens = self.tokens
        if tokens is not None:
            tokens = tokens[rows] if first_token == 0 else tokens[rows] - first_token
        return _Home(tokens, [column[rows] for column in self.columns])


class _Homecoming:
    """The rows of a combine on their way: summed part by part inside the node, then chunk by chunk over the rail.

    Everything is posted before the first sum over nodes: that of a chunk's tokens is formed while the next one comes.

    Args:
        party: who takes part.
        operation: shared, but not agreed on.
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
        self._parts = self._rows_of_parts()
        self._transfers: list[Transfer] = []
        self._homes: list[_Home] = []
        self._num_coming = 0
        exact = _nodes(party).exact
        self._dtypes = [torch.promote_types(c.dtype, torch.float32) if exact else c.dtype for c in columns]

    def send(self) -> None:
        """Send the partial sums of this node to their sources, and begin to receive those for this rank's tokens."""
        tokens = self._routes.tokens
        num_parts = {node: num_parts_of(self._shares, node) for node in self._others}
        first = {node: self._sum(node, 0) for node in self._others if num_parts[node]}
        homes = {node: _Home(tokens[node], self._empty(len(tokens[node]))) for node in self._others}
        self._operation.agree()  # the others' answers have come during the first sums
        coming = [pieces(len(tokens[node]), self._offers[node].chunk) for node in self._others]
        for number in range(max([*num_parts.values(), *coming])):
            sends = {node: self._sum(node, number) for node in self._others if 0 < number < num_parts[node]}
            receives = {}
            for node, offer in self._offers.items():
                part = slice(*bounds(len(tokens[node]), offer.chunk, number))
                receives[node] = [column[part] for column in homes[node].columns]
            self._transfers.append(self._operation.post(sends if number else first, receives))
        homes[self._topology.node] = _Home(None, self._sum(self._topology.node, 0))
        self._homes = [homes[node] for node in range(self._topology.num_nodes)]
        self._num_coming = max(coming)

    def arrivals(self) -> Iterator[tuple[slice, list[_Home]]]:
        """Tokens of this rank, and for each node their partial sums; a chunk's as soon as it is there.

        All tokens come, ascending. On GPUs the stream has waited for the rows, and not the host.
        """
        low, rows_below = 0, [0] * len(self._homes)
        arrived = 0
        for count, high, rows in self._complete():
            for transfer in self._transfers[arrived:count]:
                for node in self._others:
                    transfer.wait(node)
            arrived = count
            if high > low:
                cuts = [slice(*cut) for cut in zip(rows_below, rows, strict=True)]
                yield slice(low, high), [home.cut(cut, low) for home, cut in zip(self._homes, cuts, strict=True)]
            low, rows_below = high, rows

    def _complete(self) -> list[tuple[int, int, list[int]]]:
        """After how many transfers the tokens below which one are complete, and their rows of each node."""
        num_tokens, here = len(self._routes.members[self._topology.node]), self._topology.node
        every = [len(home.columns[0]) for home in self._homes]
        step = max(1, pieces(self._num_coming, _MOST_SUMS))
        counts = range(step, self._num_coming, step)
        found = []
        if counts:
            tokens = [self._routes.tokens[node] for node in self._others]
            padded = torch.cat([torch.nn.functional.pad(of_node, (0, 1), value=num_tokens) for of_node in tokens])
            places, first = [], 0
            for node, of_node in zip(self._others, tokens, strict=True):
                places.append([first + min(count * self._offers[node].chunk, len(of_node)) for count in counts])
                first += len(of_node) + 1
            missing = padded[torch.tensor(places, device=padded.device)].amin(0)  # the first token that is not there
            rows = [torch.searchsorted(of_node, missing) for of_node in tokens]
            for count, high, *row in zip(counts, *torch.stack([missing, *rows]).tolist(), strict=True):
                by_node = dict(zip(self._others, row, strict=True)) | {here: high}
                found.append((count, high, [by_node[node] for node in range(len(every))]))
        return [*found, (len(self._transfers), num_tokens, every)]

    def _rows_of_parts(self) -> PartRows:
        known, wanted_rows = self._routes.parts, self._routes.rows
        assert known is not None
        assert wanted_rows is not None
        key = tuple((*share.num_rows, *share.chunks) for share in self._shares)
        if key not in known:
            edges, count = edges_of(self._shares), self._topology.num_nodes
            ranks = [torch.tensor(self._topology.ranks_of_node(node), device="cpu") << 32 for node in range(count)]
            wanted = [of_node + ranks[node] for node, of_node in enumerate(edges)]
            tables = on_device([*edges, *wanted], self._places.device)
            found = torch.searchsorted(wanted_rows, torch.cat(tables[count:]))
            known.clear()
            known[key] = PartRows(tables[:count], list(torch.split(found, [len(of_node) for of_node in edges])))
        return known[key]

    def _sum(self, node: int, number: int) -> list[torch.Tensor]:
        """The sums over the ranks of this node for the rows of a part that this rank relays."""
        share = self._shares[self._topology.local_index]
        member = self._routes.members[node][slice(*bounds(share.num_rows[node], share.chunks[node], number))]
        nothing = self._places[:0]
        handle = DispatchHandle(nothing, nothing, nothing, nothing, member, nothing)
        first = self._parts.first[node]
        held = HeldRows(first[number], first[number + 1], self._parts.edges[node][number], self._places)
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
