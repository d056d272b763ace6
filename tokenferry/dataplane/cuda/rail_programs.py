"""The kernel of exchanges through NVSHMEM: how many programs, where their slots lie, what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tokenferry.dataplane.cuda.kernels import rail
from tokenferry.dataplane.cuda.launch import Kernel, Variant

MOST_PEERS = 64
"""A program for each way and peer at the least, and all of them at a time."""
_MOST_LANES = 8
"""Programs that send to one peer: 114 GB/s by two H200 of a host, which is more than a network card carries."""
_SLOTS = 4
"""Pieces of a lane that are on their way at a time."""
_LEAST_SLOT = 1 << 12
_ALIGNMENT = 128
_LEAST_PIECE = 1 << 14
"""Bytes, unless a slot has less room."""
_PIECES_OF_A_LANE = 2
"""Of a message of any size: so that all lanes take part, and one piece is copied out while the next is put."""
_WARPS = 16
_WIDTH = 4096
"""16-byte words that a program copies at a time, eight a thread."""
_I64 = torch.int64


class Shape(NamedTuple):
    """What the memory of a rail looks like, the same on all of its ranks."""

    num_peers: int
    lanes: int
    slots: int
    slot_bytes: int
    """What a piece has at most."""

    @property
    def flags(self) -> tuple[int, int]:
        """Where the flags of slots lie that are free at first, and where these end; flags before are unset."""
        places = self.lanes * self.slots
        return 8 * places, 16 * places

    @property
    def home_bytes(self) -> int:
        """For each peer: flags, 16 bytes of nothing, the ring, the stage."""
        align = int(rail.RING_ALIGNMENT.value)
        return -(-(self.flags[1] + 16) // align) * align + 2 * self.lanes * self.slots * self.slot_bytes

    @property
    def grid(self) -> int:
        """Programs, which must run at a time."""
        return 2 * self.num_peers * self.lanes


def shape_of(num_peers: int, nbytes: int) -> Shape:
    """What fits in so many bytes for all peers.

    Raises:
        ValueError: too many peers, or nothing fits.
    """
    if num_peers > MOST_PEERS:
        raise ValueError(f"{num_peers} other nodes; allowed: at most {MOST_PEERS}")
    lanes = max(1, _MOST_LANES // num_peers)
    each = nbytes // num_peers - rail.RING_ALIGNMENT.value - 16 * (lanes * _SLOTS + 1)
    slot_bytes = each // (2 * lanes * _SLOTS) // _LEAST_SLOT * _LEAST_SLOT
    if slot_bytes < _LEAST_SLOT:
        raise ValueError(f"{nbytes} bytes for {num_peers} other nodes; allowed: {_LEAST_SLOT} bytes a slot, or more")
    return Shape(num_peers, lanes, _SLOTS, slot_bytes)


class Peer(NamedTuple):
    """The rank of a rail on another node."""

    node: int
    rank: int
    """As NVSHMEM counts."""
    region: int
    """Where its memory lies, as an address here."""


class End(NamedTuple):
    """A rank's end of a rail. Addresses are of its own memory, symmetric or not."""

    shape: Shape
    region: int
    rank: int
    """As NVSHMEM counts."""
    peers: int
    """int64 [num_peers, 2], what :func:`homes_of` returns."""
    state: int
    """int64 [2], zeros."""
    told: int
    """int64 [1 + num_peers], zeros in pinned memory."""
    timeout: int
    """Nanoseconds that a wait lasts."""
    heaps: int = 0
    """For the interpreter alone: int64, where the symmetric memory of each rank begins."""

    def launch(self, variant: Variant, stream: int, messages: int, num_sends: int, num_messages: int) -> None:
        """Queue an exchange: ``messages``, those to send first, are int64 [num_messages, 5]."""
        shape = self.shape
        arguments = (
            messages, self.peers, self.state, self.told, self.heaps, self.region, shape.home_bytes, self.rank,
            num_sends, num_messages, shape.num_peers, shape.lanes, shape.slots, shape.slot_bytes, self.timeout,
        )  # fmt: skip
        variant.launch(shape.grid, stream, arguments)


def homes_of(shape: Shape, node: int, peers: Sequence[Peer]) -> list[tuple[int, int]]:
    """For each peer its rank, and where it keeps what is for this one: a rank's peers are in the order of nodes."""
    return [(peer.rank, peer.region + (node - (node > peer.node)) * shape.home_bytes) for peer in peers]


class RailKernel:
    """The kernel, linked with NVSHMEM's device code.

    Args:
        bitcode: that code.
        prepare: called with a module that has been loaded.
    """

    def __init__(self, bitcode: Path, prepare: Callable[[int], object]) -> None:
        options = {"extern_libs": {"libnvshmem_device": str(bitcode)}}
        self._kernel = Kernel(rail.exchange, (*(_I64,) * 5, *(None,) * 10), options, prepare)

    def compile(self) -> None:
        """Seconds, the first time; needs no NVSHMEM."""
        self._kernel.compile(_WARPS, 1, WIDTH=_WIDTH)

    def load(self) -> Variant:
        """Load it on the current device."""
        return self._kernel.variant(_WARPS, WIDTH=_WIDTH)


def messages_of(shape: Shape, parts: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int, int, int]]:
    """The messages of one way: ``parts`` are (peer, address, bytes); pieces of a peer are numbered in their order."""
    numbered: dict[int, int] = {}
    messages = []
    for peer, address, nbytes in parts:
        piece = _piece_of(shape, nbytes)
        first = numbered.get(peer, 0)
        numbered[peer] = first + -(-nbytes // piece)
        messages.append((address, nbytes, peer, first, piece))
    return messages


def _piece_of(shape: Shape, nbytes: int) -> int:
    """Bytes of the pieces of a message, which both ends know by its size."""
    share = -(-nbytes // (_PIECES_OF_A_LANE * shape.lanes))
    return min(max(-(-share // _ALIGNMENT) * _ALIGNMENT, _LEAST_PIECE), shape.slot_bytes)
