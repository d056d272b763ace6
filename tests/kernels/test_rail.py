"""Exchanges through rings, a flag behind each piece: NVSHMEM's puts are stores and a release here."""

from __future__ import annotations

import random
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.kernels.mutants import mutated_modules
from tests.kernels.simulator import Deadlock, LateLoad, OutOfBounds, Simulator
from tests.kernels.world import Simulated
from tokenferry.dataplane.cuda import rail_programs
from tokenferry.dataplane.cuda.kernels import flags, put
from tokenferry.dataplane.cuda.kernels import rail as rail_kernels

WIDTH = 2
PIECE = 48
POISON = 0xCD
TIMEOUT = 3_000
I64 = torch.int64


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: Any) -> None:
    """Of sizes that differ between messages, as those of large ones do."""
    monkeypatch.setattr(rail_programs, "_LEAST_PIECE", 16)
    monkeypatch.setattr(rail_programs, "_ALIGNMENT", 16)


class RailWorld:
    """The ranks of a rail, one on each node, and what they have to send.

    Ranks are not numbered as nodes are, and the memory of each for the rail begins elsewhere in its heap.
    """

    def __init__(
        self,
        num_nodes: int,
        seed: int,
        lanes: int = 2,
        slots: int = 2,
        kernels: ModuleType = rail_kernels,
        most: int = 600_000,
        timeout: int = TIMEOUT,
    ) -> None:
        self.simulator = Simulator(seed, max_steps=most)
        self.random = random.Random(seed)
        self.timeout = timeout
        self.nodes = range(num_nodes)
        self.shape = rail_programs.Shape(num_nodes - 1, lanes, slots, PIECE)
        types = rail_programs.RailKernel(None, None)._kernel.types  # type: ignore[arg-type]
        kernel = Simulated(self.simulator, kernels.exchange, type("Types", (), {"types": types}))
        self.variant = kernel.variant(1, WIDTH=WIDTH)
        nbytes = self.shape.num_peers * self.shape.home_bytes
        self.begins = [128 * (1 + node) for node in self.nodes]
        heaps = [torch.full((nbytes + 1024,), POISON, dtype=torch.uint8) for _ in self.nodes]
        self.heaps = heaps
        self.rank_of = [num_nodes - 1 - node for node in self.nodes]
        self.table = torch.tensor([heaps[self.rank_of.index(rank)].data_ptr() for rank in self.nodes])
        self.states = [torch.zeros(rail_kernels.STATE_WORDS, dtype=I64) for _ in self.nodes]
        self.told = [torch.zeros(num_nodes, dtype=I64) for _ in self.nodes]
        self.kept: list[torch.Tensor] = []
        self.ends = [self._end(node) for node in self.nodes]
        self.checks: list[tuple[torch.Tensor, torch.Tensor]] = []

    def flags(self, node: int) -> torch.Tensor:
        """[P, 2, places]: full, free."""
        begin, end = self.begins[node], self.shape.num_peers * self.shape.home_bytes
        homes = self.heaps[node][begin : begin + end].view(self.shape.num_peers, -1)
        return homes[:, : self.shape.flags[1]].view(I64).view(self.shape.num_peers, 2, -1)

    def others(self, node: int) -> list[int]:
        return [other for other in self.nodes if other != node]

    def _end(self, node: int) -> rail_programs.End:
        self.flags(node)[:, 0], self.flags(node)[:, 1] = 0, 1
        base = self.heaps[node].data_ptr()
        peers = [
            rail_programs.Peer(other, self.rank_of[other], base + self.begins[other]) for other in self.others(node)
        ]
        homes = torch.tensor(rail_programs.homes_of(self.shape, node, peers))
        self.kept.append(homes)
        places = homes.data_ptr(), self.states[node].data_ptr(), self.told[node].data_ptr()
        return rail_programs.End(
            self.shape, base + self.begins[node], self.rank_of[node], *places, self.timeout, self.table.data_ptr()
        )

    def _part(self, nbytes: int) -> torch.Tensor:
        """Bytes that lie on 16, or not, between others."""
        around = torch.full((nbytes + 64,), POISON, dtype=torch.uint8)
        self.kept.append(around)
        begin = -around.data_ptr() % 16 + self.random.choice((16, 16, 19, 24))
        return around[begin : begin + nbytes]

    def exchange(self, sizes: dict[tuple[int, int], list[int]], silent: tuple[int, ...] = ()) -> None:
        """Queue one: ``sizes`` in bytes by (source, reader)."""
        parts: dict[tuple[int, int], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for pair, given in sizes.items():
            for nbytes in given:
                source, came = self._part(nbytes), self._part(nbytes)
                source._base.random_(0, 256)  # type: ignore[union-attr]
                parts.setdefault(pair, []).append((source, came))
                self.checks.append((came, source))
        for node in self.nodes:
            if node in silent:
                continue
            others = self.others(node)
            going = [(others.index(o), p[0]) for o in others for p in parts.get((node, o), [])]
            coming = [(others.index(o), p[1]) for o in others for p in parts.get((o, node), [])]
            rows = [
                row
                for way in (going, coming)
                for row in rail_programs.messages_of(self.shape, [(n, p.data_ptr(), p.numel()) for n, p in way])
            ]
            table = torch.tensor(rows or [[0] * 5])
            self.kept.append(table)
            self.ends[node].launch(self.variant, node, table.data_ptr(), len(going), len(rows))

    def random_sizes(self) -> dict[tuple[int, int], list[int]]:
        pick = self.random
        return {
            (source, reader): [pick.choice((1, 16, 47, 48, 49, 130, 400)) for _ in range(pick.choice((0, 1, 1, 3)))]
            for source in self.nodes
            for reader in self.others(source)
        }

    def run(self) -> None:
        self.simulator.run()

    def is_right(self) -> bool:
        """Whether all came, nothing else was touched, and all flags are at rest."""
        rest = all(
            bool((self.flags(node)[:, 0] == 0).all() & (self.flags(node)[:, 1] == 1).all()) for node in self.nodes
        )
        outside = all(
            bool((heap[: self.begins[node]] == POISON).all())
            and bool((heap[self.begins[node] + self.shape.num_peers * self.shape.home_bytes :] == POISON).all())
            for node, heap in enumerate(self.heaps)
        )
        around = all(
            bool((part._base[: part.storage_offset()] == POISON).all())  # type: ignore[index]
            and bool((part._base[part.storage_offset() + part.numel() :] == POISON).all())  # type: ignore[index]
            for part, _ in self.checks
        )
        return rest and outside and around and all(torch.equal(came, wanted) for came, wanted in self.checks)


def ran(num_nodes: int, seed: int, exchanges: int = 3, **options: Any) -> bool:
    world = RailWorld(num_nodes, seed, **options)
    for _ in range(exchanges):
        world.exchange(world.random_sizes())
    world.run()
    return world.is_right() and not any(int(told.sum()) for told in world.told)


@pytest.mark.parametrize(("num_nodes", "lanes", "slots"), [(2, 1, 1), (2, 2, 2), (2, 3, 4), (3, 2, 1), (4, 1, 2)])
def test_exchanges(num_nodes: int, lanes: int, slots: int) -> None:
    for seed in range(4):
        assert ran(num_nodes, seed, lanes=lanes, slots=slots)


def test_silent_node_is_named_and_nothing_follows(monkeypatch: Any) -> None:
    """Node 2 does not come: the others say so within the deadline, and go on to nothing."""
    for seed in range(3):
        world = RailWorld(3, seed)
        world.simulator.let_time_pass(monkeypatch, flags)
        sizes = {(source, reader): [100] for source in range(3) for reader in range(3) if source != reader}
        world.exchange(sizes, silent=(2,))
        world.run()
        assert [told.tolist() for told in world.told] == [[1, 0, 1], [1, 0, 1], [0, 0, 0]]
        assert [int(state[rail_kernels.MISSED.value]) for state in world.states] == [1, 1, 0]
        before = [heap.clone() for heap in world.heaps]
        world.exchange(sizes, silent=(2,))
        world.run()
        assert all(map(torch.equal, before, world.heaps))


def test_what_the_host_has_given_up_waits_for_nothing(monkeypatch: Any) -> None:
    world = RailWorld(2, 0, timeout=1 << 40)
    world.simulator.let_time_pass(monkeypatch, flags)
    sizes = {(0, 1): [1000], (1, 0): [1000]}
    world.exchange(sizes, silent=(1,))

    def host() -> Any:
        while world.simulator.time < 1_500:
            yield
        world.states[0][rail_kernels.GIVEN_UP.value] = 1

    world.simulator.run([host()])
    assert world.told[0].tolist() == [0, 0]
    assert int((world.flags(1)[:, 0] == 1).sum()) == 4  # what fits into the ring, and no more
    world.flags(0)[:] = 1  # whatever comes by now
    before = [heap.clone() for heap in world.heaps]
    world.exchange(sizes, silent=(1,))
    world.run()
    assert all(map(torch.equal, before, world.heaps))


def test_only_what_a_rank_may_know_is_touched() -> None:
    world = RailWorld(3, 1)
    for _ in range(2):
        world.exchange(world.random_sizes())
    tensors = [*world.heaps, *world.kept, *world.states, *world.told, world.table]
    world.simulator.restrict((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    world.run()
    assert world.is_right()


def test_messages_are_numbered_by_peer(monkeypatch: Any) -> None:
    shape = rail_programs.Shape(2, 2, 2, PIECE)
    parts = [(0, 10, 100), (1, 20, 48), (0, 30, 1), (1, 40, 500), (0, 50, 96)]
    messages = rail_programs.messages_of(shape, parts)
    assert [message[4] for message in messages] == [32, 16, 16, 48, 32]
    assert [message[3] for message in messages] == [0, 0, 4, 3, 5]
    monkeypatch.undo()
    shape = rail_programs.Shape(2, 8, 4, 1 << 20)
    sizes = (1, 16384, 16385, 1 << 20, (1 << 20) + 1, 1 << 24, 1 << 30)
    messages = rail_programs.messages_of(shape, [(0, 0, nbytes) for nbytes in sizes])
    assert [message[4] for message in messages] == [1 << 14] * 3 + [1 << 16, (1 << 16) + 128, 1 << 20, 1 << 20]
    assert [message[3] for message in messages] == [0, 1, 2, 4, 20, 36, 52]


@pytest.mark.parametrize("num_peers", [1, 2, 3, 7, 8, 15, 64])
def test_shapes(num_peers: int) -> None:
    nbytes = 64 << 20
    shape = rail_programs.shape_of(num_peers, nbytes)
    assert shape.num_peers * shape.home_bytes <= nbytes
    assert 10 <= shape.grid <= 128
    assert shape.slot_bytes % 16 == 0
    assert shape.num_peers * shape.home_bytes > 0.8 * nbytes


def test_shapes_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="65 other nodes; allowed: at most 64"):
        rail_programs.shape_of(65, 1 << 30)
    with pytest.raises(ValueError, match="1048576 bytes for 64 other nodes"):
        rail_programs.shape_of(64, 1 << 20)


RAIL, PUT = rail_kernels, put
MUTANTS = {
    "no barrier before a flag": (PUT, "    tl.debug_barrier()\n\n\n", "\n\n"),
    "the flag of another slot": (RAIL, "full_flag(theirs, place)\n", "full_flag(theirs, place ^ 1)\n"),
    "no wait for a free slot": (RAIL, "wait_for(free_flag(home, place, places), state", "wait_for(state, state"),
    "no wait for a full slot": (RAIL, "wait_for(full_flag(home, place), state", "wait_for(state, state"),
    "free before it is read": (
        RAIL,
        "slot_bytes), size, WIDTH)\n                    fence()\n",
        "slot_bytes), size, WIDTH)\n",
    ),
    "a flag is not unset": (RAIL, "        tl.store(word(flag, 0), 0)\n", "        pass\n"),
    "the size of a whole piece": (RAIL, "size = tl.minimum(piece, nbytes - begin)", "size = piece"),
    "messages of others": (RAIL, "        if tl.load(message + 2) != peer:\n            begin = nbytes\n", ""),
    "the stage is the ring": (RAIL, "stage = slot_in(home, place + places,", "stage = slot_in(home, place,"),
    "bytes behind the words": (PUT, "num_words * 8, nbytes, WIDTH", "nbytes, nbytes, WIDTH"),
    "words behind the blocks": (PUT, "(2 * WIDTH), num_words, WIDTH", "(2 * WIDTH), 0, WIDTH"),
}


MUTANT_STEPS = 20_000


def ran_like_a_mutant(seed: int, kernels: ModuleType = rail_kernels) -> bool:
    return ran(2 + seed % 2, seed, kernels=kernels, slots=1 + seed % 2, most=MUTANT_STEPS)


def test_no_fault_is_found_where_there_is_none() -> None:
    assert all(map(ran_like_a_mutant, range(12)))


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_found(name: str) -> None:
    kernels = mutated_modules(*MUTANTS[name], entries=[rail_kernels])[0]

    def is_found(seed: int) -> bool:
        try:
            return not ran_like_a_mutant(seed, kernels)
        except (Deadlock, LateLoad, OutOfBounds):
            return True

    assert any(is_found(seed) for seed in range(12))
