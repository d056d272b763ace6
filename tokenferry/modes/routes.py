"""Where the rows of an operation between nodes go, and the handle that keeps it.

Legend of dims: T tokens of this rank, R ranks on G nodes, L on each, M received rows, B rows that this rank relays.
The *place* of a row is its source token where source and relay are one rank, else its number among the rows that the
relay got from the source.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, chain
from typing import NamedTuple

import torch

from tokenferry.errors import ArgumentError
from tokenferry.handles import InternodeHandle
from tokenferry.topology import Topology
from tokenferry.validation import check_tensor, describe, require

_NAMES = tuple(f"handle.{name}" for name in InternodeHandle._fields)
_META = InternodeHandle._fields.index("recv_src_meta")


class PartRows(NamedTuple):
    """Where the rows of all parts begin that are summed inside the node: [G] of int64 [parts + 1, L]."""

    edges: list[torch.Tensor]
    """The edges of the parts, in rows that each relay has of the node."""
    first: list[torch.Tensor]
    """The first row of each, in rows of this rank."""


class Routes(NamedTuple):
    """The routes of an operation, as one rank sees them in its three roles."""

    tokens: list[torch.Tensor]
    """[G]: int64, the tokens that it sends to each node, ascending."""
    members: list[torch.Tensor]
    """[G]: bool [rows, L], the ranks of its node that each row goes to which it relays; by source node. Of its own
    node: bool [T, L], every token."""
    starts: list[list[int]]
    """[G][L]: its first received row of each source rank."""
    counts: list[list[int]]
    """[G][L]: its received rows of each source rank."""
    rows: torch.Tensor | None = None
    """int64: see :func:`rows_by_rank`; of a handle."""
    parts: dict[tuple[object, ...], PartRows] | None = None
    """Of a handle: the last ones, by what they depend on, rows and chunks of the ranks of the node."""

    @property
    def num_relayed(self) -> list[int]:
        """[G]: rows of each source node that it relays."""
        return [len(member) for member in self.members]


def in_nodes(topology: Topology, is_token_in_rank: torch.Tensor) -> torch.Tensor:
    """Membership in nodes, bool [T, G]: whether a token goes to some rank of the node, from bool [T, R]."""
    order = [rank for node in range(topology.num_nodes) for rank in topology.ranks_of_node(node)]
    by_node = is_token_in_rank if order == sorted(order) else is_token_in_rank[:, order]
    return by_node.contiguous().view(len(by_node), topology.num_nodes, len(topology.local_ranks)).any(2)


def index_of(ranks: Sequence[int]) -> slice | list[int]:
    """What takes these ranks out of a dim of ranks; without a table, which a GPU would have to be sent, if it can."""
    in_a_row = list(ranks) == list(range(ranks[0], ranks[0] + len(ranks)))
    return slice(ranks[0], ranks[0] + len(ranks)) if in_a_row else list(ranks)


def tokens_of(node_member: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """[G]: int64, the tokens of each node, ascending, from bool [T, G] and how many there are: a GPU stops once."""
    return list(torch.split(node_member.t().nonzero()[:, 1].contiguous(), list(counts)))


def starts_of(topology: Topology, counts: Sequence[Sequence[int]]) -> list[list[int]]:
    """[G][L]: the first row of each source rank, of rows ordered by source rank, from their counts [G][L]."""
    starts = [[0] * len(row) for row in counts]
    total = 0
    for node, index in topology.places:
        starts[node][index] = total
        total += counts[node][index]
    return starts


def by_rank(topology: Topology, table: Sequence[Sequence[int]]) -> list[int]:
    """[R], in the order of ranks, from [G][L]."""
    return [table[node][index] for node, index in topology.places]


def make_handle(
    topology: Topology,
    routes: Routes,
    is_token_in_rank: torch.Tensor,
    node_member: torch.Tensor,
    num_tokens_per_rank: torch.Tensor,
    num_rows: int,
) -> InternodeHandle:
    """The handle of a dispatch; the places of the rows, :func:`places_of` it, are still to be set.

    Args:
        topology: who is where.
        routes: of the dispatch.
        is_token_in_rank: bool [T, R].
        node_member: bool [T, G], what :func:`in_nodes` makes of it.
        num_tokens_per_rank: int32 [R].
        num_rows: M.
    """
    device = is_token_in_rank.device
    members = list(routes.members)
    members[topology.node] = members[topology.node][routes.tokens[topology.node]]
    relayed = [len(member) for member in members]
    counts = by_rank(topology, routes.counts)
    numbers = {
        "rdma_channel_prefix_matrix": [len(tokens) for tokens in routes.tokens],
        "recv_rdma_channel_prefix_matrix": relayed,
        "recv_rdma_rank_prefix_sum": list(accumulate(relayed)),
        "recv_gbl_channel_prefix_matrix": by_rank(topology, routes.starts),
        "recv_gbl_rank_prefix_sum": list(accumulate(counts)),
        "counts": counts,
        "nodes": [node for node, _ in topology.places],
    }
    # Sent at once, since a GPU stops for it.
    sent = torch.tensor(list(chain(*numbers.values())), dtype=torch.int32, device=device)
    tables = dict(zip(numbers, torch.split(sent, list(map(len, numbers.values()))), strict=True))
    nodes = torch.repeat_interleave(tables.pop("nodes"), tables.pop("counts"), output_size=sum(counts))
    meta = torch.full((num_rows, 2), -1, dtype=torch.int32, device=device)
    meta[: len(nodes), 0] = nodes
    return InternodeHandle(
        is_token_in_rank=is_token_in_rank,
        gbl_channel_prefix_matrix=num_tokens_per_rank.view(-1, 1).clone(),
        recv_src_meta=meta.view(torch.uint8),
        send_rdma_head=_heads(node_member),
        send_nvl_head=torch.cat([_heads(member) for member in members]),
        **{name: table.view(-1, 1) if name.endswith("matrix") else table for name, table in tables.items()},
    )


def _heads(member: torch.Tensor) -> torch.Tensor:
    """int32 of the same shape: the position of each true value among those of its column, -1 for the others."""
    return member.cumsum(0, dtype=torch.int32).mul_(member).sub_(1)


def check_handle(topology: Topology, device: torch.device, handle: object) -> tuple[InternodeHandle, Routes]:
    """The handle as an :class:`InternodeHandle`, and its routes, if it fits this group.

    Raises:
        ArgumentError: it does not, or it contradicts itself.
    """
    if not isinstance(handle, (tuple, list)) or len(handle) != len(_NAMES):
        given = f"{len(handle)} elements" if isinstance(handle, (tuple, list)) else type(handle).__name__
        raise ArgumentError("handle", given, f"the {len(_NAMES)} tensors that dispatch returned")
    ranks, nodes, local = topology.num_ranks, topology.num_nodes, len(topology.local_ranks)
    shapes: tuple[tuple[int | None, ...], ...] = (
        (None, ranks),
        (nodes, 1),
        (ranks, 1),
        (nodes, 1),
        (nodes,),
        (ranks, 1),
        (ranks,),
        (None, 8),
        (None, nodes),
        (None, local),
    )
    for name, value, shape in zip(_NAMES, handle, shapes, strict=True):
        dtype = {_NAMES[0]: torch.bool, _NAMES[7]: torch.uint8}.get(name, torch.int32)
        check_tensor(name, value, shape=shape, dtypes=(dtype,), device=device)
    known = InternodeHandle._make(element.contiguous() for element in handle)
    return known, _routes_of(topology, known)


class _Known(NamedTuple):
    """The routes of a handle, and how it is known again."""

    elements: tuple[Callable[[], torch.Tensor | None], ...]
    """References to those of the handle, which keep none of them alive."""
    marks: tuple[tuple[int, int, torch.Size], ...]
    """What tells of each whether it is as it was: see :func:`_marks`."""
    routes: Routes


class KnownRoutes:
    """The routes of the handles that a rank's dispatches have made, each while its tensors live and stay as they are.

    To find routes in a handle takes dozens of small kernels, and the host waits for some. Of the tensors in a handle
    the library alone has made these here, and nobody has reason to write to them; who does by an operation of torch
    is noticed, and the handle is looked at again, like all that come from elsewhere (copies, what ``torch.ops``
    returns). Not noticed are writes that torch does not count: through ``.data``, NumPy or DLPack, by collectives and
    kernels. In ``torch.inference_mode``, where torch counts none, every handle is looked at every time.

    Args:
        topology: who is where.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._known: dict[int, _Known] = {}
        """By the identity of ``recv_src_meta``."""

    def of(self, device: torch.device, handle: object) -> tuple[InternodeHandle, Routes]:
        """As :func:`check_handle`, which looks at handles that are not known."""
        known = self._find(handle)
        if known is None:
            return check_handle(self._topology, device, handle)
        checked, routes = InternodeHandle._make(handle), known.routes  # type: ignore[arg-type]
        if routes.rows is None:  # the places were still to come
            received = by_rank(self._topology, routes.counts)
            routes = routes._replace(rows=rows_by_rank(places_of(checked), received), parts={})
            self.remember(checked, routes)
        return checked, routes

    def remember(self, handle: InternodeHandle, routes: Routes) -> None:
        """Know the routes of a handle that was made here."""
        if torch.is_inference_mode_enabled() or any(element.is_inference() for element in handle):
            return
        key = id(handle.recv_src_meta)
        forget = partial(_forget, weakref.ref(self), key)
        self._known[key] = _Known(tuple(weakref.ref(element, forget) for element in handle), _marks(handle), routes)

    def _find(self, handle: object) -> _Known | None:
        if not isinstance(handle, (tuple, list)) or len(handle) != len(_NAMES):
            return None
        known = self._known.get(id(handle[_META]))
        if known is None or not all(
            element() is given for element, given in zip(known.elements, handle, strict=True)
        ):
            return None
        return known if known.marks == _marks(handle) else None


def _forget(known: Callable[[], KnownRoutes | None], key: int, gone: object) -> None:
    """A tensor of these routes' handle is gone."""
    routes = known()
    if routes is not None:
        routes._known.pop(key, None)


def _marks(handle: Sequence[torch.Tensor]) -> tuple[tuple[int, int, torch.Size], ...]:
    """How often each tensor was written to, as far as torch counts, where it lies, and its shape."""
    return tuple((element._version, element.data_ptr(), element.shape) for element in handle)


def places_of(handle: InternodeHandle) -> torch.Tensor:
    """int32 [M]: the places of the received rows."""
    return handle.recv_src_meta.view(torch.int32)[:, 1]


def _routes_of(topology: Topology, handle: InternodeHandle) -> Routes:
    num_tokens, here, nodes = len(handle.is_token_in_rank), topology.node, topology.num_nodes
    heads, name = handle.send_rdma_head, "handle.send_rdma_head"
    require(len(heads) == num_tokens, name, f"{len(heads)} rows", f"{num_tokens}, as in is_token_in_rank")
    node_member = heads >= 0
    sums = (node_member.sum(0), handle.recv_rdma_rank_prefix_sum, handle.recv_gbl_rank_prefix_sum)
    numbers = torch.cat(sums).tolist()  # at once, since a GPU stops for it
    tokens = tokens_of(node_member, numbers[:nodes])
    ends, sums_of_ranks = numbers[nodes : 2 * nodes], numbers[2 * nodes :]
    relayed = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    name = "handle.recv_rdma_rank_prefix_sum"
    require(min(relayed) >= 0, name, ends, "ascending sums")
    require(ends[-1] == len(handle.send_nvl_head), name, ends, f"{len(handle.send_nvl_head)} rows, as send_nvl_head")
    members = list(torch.split(handle.send_nvl_head >= 0, relayed))
    members[here] = handle.is_token_in_rank[:, index_of(topology.local_ranks)].contiguous()
    received = [end - start for start, end in zip([0, *sums_of_ranks[:-1]], sums_of_ranks, strict=True)]
    name, num_rows = "handle.recv_gbl_rank_prefix_sum", len(handle.recv_src_meta)
    require(min(received) >= 0, name, sums_of_ranks, "ascending sums")
    require(sums_of_ranks[-1] <= num_rows, name, sums_of_ranks, f"at most the {num_rows} rows of recv_src_meta")
    counts = [[0] * len(topology.local_ranks) for _ in range(nodes)]
    for rank, (node, index) in enumerate(topology.places):
        counts[node][index] = received[rank]
    rows = rows_by_rank(places_of(handle), received)
    ascends = bool((rows.diff() > 0).all() & (places_of(handle)[: len(rows)] >= 0).all())
    require(ascends, "handle.recv_src_meta", describe(handle.recv_src_meta), "ascending places of each source rank")
    return Routes(tokens, members, starts_of(topology, counts), counts, rows, {})


def rows_by_rank(places: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """int64 [rows]: source rank and place in one number, which ascends, of the rows received from each rank, [R]."""
    device, total = places.device, sum(counts)
    ranks = torch.repeat_interleave(
        torch.arange(len(counts), device=device), torch.tensor(counts, device=device), output_size=total
    )
    return (ranks << 32) + places[:total]
