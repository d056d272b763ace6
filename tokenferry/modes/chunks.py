"""Chunks: in what pieces rows cross the network, so that the ranks of a node pull one while the next is on its way.

Every source cuts what it sends to a relay in equal chunks, and says in its offer how large they are. All sends and
receives of one number are one exchange of the rail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from tokenferry.config import Config
from tokenferry.dataplane import DataPlane
from tokenferry.modes.nodes import Operation
from tokenferry.modes.shares import Offer, Share
from tokenferry.rail import Transfer


class Chunking(NamedTuple):
    """How large chunks are.

    A further chunk hides part of the pull, and costs a message to every node and an operation inside this one. So
    there are few of them, unless the caller's own ``Config`` says otherwise.
    """

    most_rows: int
    """Of a chunk, unless that were less than the bytes below."""
    least_bytes: int
    """That a chunk makes the ranks of a node pull, if each row goes to all of them."""

    def rows(self, num_rows: int, bytes_inside: int) -> int:
        """Rows of the equal chunks in which so many rows travel.

        Args:
            num_rows: that one rank sends to another.
            bytes_inside: that the ranks of a node pull for a row at most.
        """
        most = max(self.most_rows, self.least_bytes // max(bytes_inside, 1))
        return pieces(num_rows, max(pieces(num_rows, most), 1)) or most


def chunking_of(config: Config, least_bytes: int) -> Chunking:
    """As many rows as DeepEP's rings to a node hold, ``num_sms / 2`` of them.

    Args:
        config: of the operation.
        least_bytes: as in :class:`Chunking`; 0 with a ``Config`` that the caller made.
    """
    return Chunking(max(1, config.num_sms // 2) * config.num_max_rdma_chunked_recv_tokens, least_bytes)


def pieces(count: int, size: int) -> int:
    """Pieces of ``size`` that ``count`` rows make."""
    return -(-count // size)


def bounds(count: int, size: int, number: int) -> tuple[int, int]:
    """First row, and the row past the last, of a piece; both ``count`` past the end."""
    return min(number * size, count), min((number + 1) * size, count)


def edges_of(shares: Sequence[Share]) -> list[torch.Tensor]:
    """Where parts begin and the last one ends, [G] of int64 [parts + 1, L]: rows that each relay has of the node.

    On the CPU; see :func:`on_device`.
    """
    edges = []
    for node in range(len(shares[0].num_rows)):
        sizes = [(share.num_rows[node], min(share.chunks[node], max(share.num_rows[node], 1))) for share in shares]
        rows, chunks = torch.tensor(sizes, device="cpu").unbind(1)
        numbers = torch.arange(max(num_parts_of(shares, node), 1) + 1, device="cpu")
        edges.append(torch.minimum(numbers.unsqueeze(1) * chunks, rows))
    return edges


def on_device(tables: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Tables [any, L] on a device, where they become one memory: a GPU stops the host for each copy."""
    return list(torch.split(torch.cat(list(tables)).to(device), [len(table) for table in tables]))


def num_parts_of(shares: Sequence[Share], node: int) -> int:
    """Parts in which the rows of a source node move inside this one."""
    return max(pieces(share.num_rows[node], share.chunks[node]) for share in shares)


class _Posted(NamedTuple):
    transfer: Transfer
    received: dict[int, list[torch.Tensor]]
    """By node: the columns of its chunk."""


class ChunkedRows:
    """The rows of a dispatch on the rail: those that this rank sends, and those that it relays.

    The first chunk may be posted as soon as offers are known: whatever the ranks agree on, both ends of a rail know
    what it has. What is not wanted then is dropped.

    Args:
        operation: of the rows.
        plane: of the rank.
        others: the other nodes.
        columns: uint8 [T, width], contiguous: what it sends.
        tokens: [G]: int64, which of the rows go to each node.
        sizes: [G]: rows of a chunk of these, as offered.
    """

    def __init__(
        self,
        operation: Operation,
        plane: DataPlane,
        others: Sequence[int],
        columns: Sequence[torch.Tensor],
        tokens: Sequence[torch.Tensor],
        sizes: Sequence[int],
    ) -> None:
        self._operation = operation
        self._plane = plane
        self._columns = columns
        self._tokens = tokens
        self._sizes = sizes
        self._offers: Mapping[int, Offer] = {}
        self._gathered = {node: self._gather(node, 0) for node in others}
        self._posted: dict[int, _Posted] = {}
        self._num_posted = 0
        self.count = 0

    def begin(self, offers: Mapping[int, Offer]) -> None:
        """Post the first chunks: the other nodes that take part have made these offers."""
        self._offers = offers
        going = (pieces(len(self._tokens[node]), self._sizes[node]) for node in offers)
        coming = (pieces(offer.num_rows, offer.chunk) for offer in offers.values())
        self.count = max([0, *going, *coming])
        self.post()
        self._gathered.clear()

    def post(self) -> None:
        """Begin to send and to receive the next chunks, if there are any."""
        number = self._num_posted
        if number == self.count:
            return
        sends, received = {}, {}
        for node, offer in self._offers.items():
            sends[node] = self._gather(node, number) if number else self._gathered[node]
            low, high = bounds(offer.num_rows, offer.chunk, number)
            received[node] = self._empty(high - low)
        self._posted[number] = _Posted(self._operation.post(sends, received), received)
        self._num_posted += 1

    def wait(self, number: int, node: int) -> list[torch.Tensor]:
        """Wait for the chunk of a node, which may have no rows; returns its columns."""
        if number >= self.count:
            return self._empty(0)
        self._posted[number].transfer.wait(node)
        return self._posted[number].received[node]

    def finish(self, number: int) -> None:
        """Wait until nothing is under way in the chunks of this number, and let go of their memory."""
        if number in self._posted:
            self._posted.pop(number).transfer.finish()

    def _gather(self, node: int, number: int) -> list[torch.Tensor]:
        tokens = self._tokens[node][slice(*bounds(len(self._tokens[node]), self._sizes[node], number))]
        return [column.index_select(0, tokens) for column in self._columns]

    def _empty(self, num_rows: int) -> list[torch.Tensor]:
        return [self._plane.empty_rows(num_rows, column.size(1), column.dtype) for column in self._columns]
