"""An exchange over a rail: bytes into the rings of other ranks, piece by piece, a flag behind each.

Every rank has memory of its own for each peer, *home*::

    full[lane, slot]    1: the peer has put a piece into the ring's slot; set by the peer, unset by this rank
    free[lane, slot]    1: the peer has emptied its ring's slot; set by the peer, unset by this rank
    ring[lane, slot]    what the peer sends
    stage[lane, slot]   what this rank sends, from where the network takes it

Pieces of a peer are numbered within an exchange, message by message. The one numbered n goes by lane n % LANES, in
slot n / LANES % SLOTS there. So both ends know where it is, no flag holds a number, and a captured exchange can be
replayed any number of times. A program sends to, or receives from, one peer in one lane. It waits, to a deadline, for
what its peer's programs do in the same exchange or before: all programs must run at a time. Whatever does not come in
time ends the rail; a program that the host has given up waits for nothing and puts nothing.

A message is (address, bytes, peer, number of its first piece, bytes of its pieces); a peer (rank, address of its home
for this rank, as :mod:`.put` has it).
"""

from __future__ import annotations

import triton
import triton.language as tl

from tokenferry.dataplane.cuda.kernels.flags import agreed, tell_host, wait_at_least, word, zero
from tokenferry.dataplane.cuda.kernels.put import fence, put, store_bytes

MESSAGE_WORDS = tl.constexpr(5)
PEER_WORDS = tl.constexpr(2)

# Words of a rail's state, in device memory.
GIVEN_UP = tl.constexpr(0)
"""By the host."""
MISSED = tl.constexpr(1)
"""A deadline: the rail has ended."""
STATE_WORDS = 2

# Words that the host is told, in pinned memory: whether a deadline was missed, then by peer whether by that one.
TOLD = tl.constexpr(0)
TOLD_PEERS = tl.constexpr(1)

RING_ALIGNMENT = tl.constexpr(128)


@triton.jit
def full_flag(home, place):
    """The address of a flag that says that a slot of the ring is full."""
    return home + place * 8


@triton.jit
def free_flag(home, place, places):
    """The address of a flag that says that a slot at the peer is free."""
    return home + (places + place) * 8


@triton.jit
def nothing(home, places):
    """The address of 16 bytes that mean nothing."""
    return home + 2 * places * 8


@triton.jit
def slot_in(home, place, places, slot_bytes):
    """The address of a slot of the ring; ``place + places``: of the stage."""
    flags = (2 * places * 8 + 16 + RING_ALIGNMENT - 1) // RING_ALIGNMENT * RING_ALIGNMENT
    return home + flags + place * slot_bytes


@triton.jit
def goes_on(state):
    """Whether the rail has not ended, as all threads see it."""
    over = tl.load(state + GIVEN_UP, volatile=True) + tl.load(state + MISSED, volatile=True)
    return agreed(over == 0)


@triton.jit
def wait_for(flag, state, told, peer, timeout):
    """Wait for a flag, and unset it; False if the rail has ended."""
    there = wait_at_least(state, word(flag, 0), 1, timeout, 0, peer, given_up=state + GIVEN_UP)
    if there:
        tl.store(word(flag, 0), 0)
    elif agreed(tl.load(state + GIVEN_UP, volatile=True) == 0):
        tl.store(state + MISSED, 1)
        tl.store(told + TOLD_PEERS + peer, 1)
        tl.debug_barrier()
        tell_host(told + TOLD, zero().to(tl.int64) + 1)
    return there


@triton.jit(
    do_not_specialize=[
        "home", "home_bytes", "own", "num_sends", "num_messages", "num_peers", "lanes", "slots", "slot_bytes",
        "timeout",
    ],
)  # fmt: skip
def exchange(
    messages, peers, state, told, heaps, home: tl.int64, home_bytes: tl.int64, own: tl.int32, num_sends: tl.int32,
    num_messages: tl.int32, num_peers: tl.int32, lanes: tl.int32, slots: tl.int32, slot_bytes: tl.int64,
    timeout: tl.int64, WIDTH: tl.constexpr,
):  # fmt: skip
    """Send messages, and receive those behind them, by ``2 * num_peers * lanes`` programs.

    Args:
        messages: int64 [num_messages, 5], see above; those to send come first.
        peers: int64 [num_peers, 2], see above.
        state: int64 [2], see above.
        told: int64 [1 + num_peers], see above.
        heaps: int64, where the symmetric memory of all ranks begins; for the interpreter alone.
        home: where this rank's memory for its first peer begins; the others' follow, ``home_bytes`` each.
        home_bytes: see ``home``.
        own: this rank, as ``heaps`` counts.
        num_sends: messages that this rank sends.
        num_messages: and those that it receives.
        num_peers: of this rank.
        lanes: of each peer.
        slots: of each lane.
        slot_bytes: of a slot, a multiple of 16: what a piece has at most.
        timeout: nanoseconds that a wait lasts.
        WIDTH: 16-byte words that a program copies at a time.
    """
    program = tl.program_id(0)
    lane = program % lanes
    peer = program // lanes % num_peers
    receives = program // lanes // num_peers != 0
    home += peer * home_bytes
    rank = tl.load(peers + peer * PEER_WORDS)
    theirs = tl.load(peers + peer * PEER_WORDS + 1)
    places = lanes * slots
    number = tl.where(receives, num_sends, 0)
    end = tl.where(receives, num_messages, num_sends)
    alive = goes_on(state)
    while alive & (number < end):
        message = messages + number * MESSAGE_WORDS
        nbytes = tl.load(message + 1)
        first, piece = tl.load(message + 3), tl.load(message + 4)
        begin = ((lane - first % lanes + lanes) % lanes) * piece
        if tl.load(message + 2) != peer:
            begin = nbytes
        while alive & (begin < nbytes):
            place = lane * slots + (first + begin // piece) // lanes % slots
            address = tl.load(message) + begin
            size = tl.minimum(piece, nbytes - begin)
            if receives:
                alive = wait_for(full_flag(home, place), state, told, peer, timeout)
                if alive:
                    store_bytes(address, slot_in(home, place, places, slot_bytes), size, WIDTH)
                    fence()
                    to, at, flag = nothing(theirs, places), nothing(home, places), free_flag(theirs, place, places)
                    put(to, at, size * 0 + 16, flag, heaps, own, rank)
            else:
                alive = wait_for(free_flag(home, place, places), state, told, peer, timeout)
                if alive:
                    stage = slot_in(home, place + places, places, slot_bytes)
                    store_bytes(stage, address, size, WIDTH)
                    fence()
                    to, flag = slot_in(theirs, place, places, slot_bytes), full_flag(theirs, place)
                    put(to, stage, size, flag, heaps, own, rank)
            begin += lanes * piece
        number += 1
