"""What ranks of several nodes say to each other to agree on an operation, in words.

Legend: G nodes of L ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tokenferry.dataplane import Signature
from tokenferry.errors import HeapError
from tokenferry.topology import Topology
from tokenferry.validation import MEMORY_BYTES

WORDS = torch.int64
_WORDS_AT_A_TIME = 64


class Verdict(NamedTuple):
    """What is wrong, if anything, in numbers that every rank turns into the same exception."""

    kind: int = 0
    rank: int = 0
    other: int = 0
    field: int = 0
    """Of the signature."""
    given: int = 0
    wanted: int = 0


FINE, SIGNATURES, NODE, CAPACITY, ROUTES, STAGE = range(6)


class Offer(NamedTuple):
    """What a rank says to its peer on another node."""

    signature: Signature
    epoch: int
    num_rows: int
    """Rows that the peer gets of it."""
    chunk: int
    """In chunks of so many."""


class Share(NamedTuple):
    """What a rank tells the others of its node."""

    verdict: Verdict
    num_rows: list[int]
    """[G]: rows of each source node that it relays."""
    chunks: list[int]
    """[G]: rows of a chunk of these."""
    counts: list[list[int]]
    """[G][L]: of these, the rows for each rank of the node."""
    expected: list[list[int]]
    """[G][L]: rows that it expects of each source rank, if it knows. Else nothing."""
    worst: int
    """Rows of its outputs, where fixed; else 0."""
    extra: list[int]
    """What the operation adds: as many words on all ranks."""


def share_bytes(topology: Topology, num_expected: int, num_extra: int) -> int:
    """Bytes of a :class:`Share` with so many words of ``extra``; ``num_expected``: 1 with what is expected, or 0."""
    nodes = topology.num_nodes
    counts = nodes * len(topology.local_ranks) * (1 + num_expected)
    return WORDS.itemsize * padded(len(Verdict._fields) + 2 * nodes + counts + 1 + num_extra)


def padded(num_words: int) -> int:
    """Words that move: a GPU has one kernel for each width of a row, so let there be few."""
    return -(-num_words // _WORDS_AT_A_TIME) * _WORDS_AT_A_TIME


def parse_share(words: list[int], nodes: int, ranks: int, has_expected: bool, row_bytes: int) -> Share:
    """The share that these words are.

    Raises:
        HeapError: they make no sense.
    """
    rest = iter(words)

    def take(count: int) -> list[int]:
        return [next(rest) for _ in range(count)]

    verdict = Verdict._make(take(len(Verdict._fields)))
    num_rows, chunks = take(nodes), take(nodes)
    counts = [take(ranks) for _ in range(nodes)]
    expected = [take(ranks) for _ in range(nodes)] if has_expected else []
    share = Share(verdict, num_rows, chunks, counts, expected, take(1)[0], list(rest))
    received = sum(map(sum, counts))
    if (
        min([*words[len(Verdict._fields) :], *(chunk - 1 for chunk in chunks)]) < 0
        or max(num_rows) >= 1 << 31
        or received * row_bytes > ranks * MEMORY_BYTES
    ):
        raise HeapError(f"a rank of this node relays {num_rows} rows, in chunks of {chunks}, for {counts}")
    return share
