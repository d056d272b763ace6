"""What kernels do with garbage from a peer: an error in the status, or wrong rows; in time, and never out of bounds.

Two ranks. What rank 1 stores into the heap of rank 0 is spoiled on its way. The simulator knows all memory that there
is: an access to any other address fails the test. What ranks show each other lies in arenas, alone far and wide.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterError

from tests.cases import Case
from tests.conftest import but_slow
from tests.kernels.low_latency_world import LowLatencyWorld
from tests.kernels.mutants import mutated_modules
from tests.kernels.simulator import Simulator
from tests.kernels.test_low_latency import Calls, world_of
from tests.kernels.world import LIST_CAPACITY, Rank, World
from tests.low_latency_cases import Case as LowLatencyCase
from tokenferry.dataplane.cuda.kernels import (
    combine,
    dispatch,
    flags,
    layout,
    low_latency,
    low_latency_combine,
    low_latency_dispatch,
    notify,
    rounds,
    sync,
    words,
)
from tokenferry.dataplane.cuda.status import Status
from tokenferry.errors import HeapError, TokenferryError

ENTRIES = (layout, notify, dispatch, combine, flags, rounds)
LOW_ENTRIES = (low_latency_dispatch, low_latency_combine, flags, low_latency)
TIMEOUT = 1500
"""Steps."""
ARENA, GUARD = 4096, 1 << 16
PLACE = 1 << words.PLACE_SHIFT.value
LONGS = (-1, 1, 4, 5, 512, 513, 1 << 21, 1 << 31, 1 << 40, 1 << 62, -(1 << 63))
PLACES = (
    PLACE + ARENA - 16,
    PLACE + ARENA,
    2 * PLACE - 16,
    2 * PLACE,
    255 * PLACE,
    256 * PLACE,
    -1,
    PLACE + 8,
    1 << 62,
)
INTS = (-1, 3, 4, 7, 511, 512, 1 << 20, (1 << 31) - 1, -(1 << 31))
MESSAGE = words.MESSAGES.value + words.MESSAGE_BYTES.value
EXPERTS, LIST = words.EXPERTS.value + words.EXPERTS_BYTES.value, words.LISTS.value + 4 * LIST_CAPACITY


def message_words(first: int, count: int = 1) -> tuple[int, int]:
    return MESSAGE + 8 * first, MESSAGE + 8 * (first + count)


TARGETS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "tokens": (message_words(words.NUM_TOKENS.value), LONGS),
    "rows": (message_words(words.NUM_ROWS.value), LONGS),
    "staged": (message_words(words.STAGED.value), LONGS),
    "place": (message_words(words.COLUMNS.value, 4), PLACES),
    "counts": (message_words(words.COUNTS.value, 2), LONGS),
    "message": (message_words(1, 40), LONGS),
    "experts": ((EXPERTS, EXPERTS + 1024), INTS),
    "list": ((LIST, LIST + 4 * LIST_CAPACITY), INTS),
    "all pushed": ((0, 1 << 30), (*INTS, *LONGS)),
}
"""From where to where the words of rank 1 lie in the heap of rank 0, and what they may become."""

Modules = Sequence[ModuleType]


class Spoiler:
    """Spoils what rank 1 stores into the heap of rank 0, where its words of one kind lie.

    Args:
        heap: of rank 0.
        target: a name in ``TARGETS``.
        value: what they become; None: a value for each by the seed, or as it is.
        seed: decides.
    """

    def __init__(self, heap: torch.Tensor, target: str, value: int | None, seed: int) -> None:
        (begin, end), self.values = TARGETS[target]
        self.begin, self.end = heap.data_ptr() + begin, heap.data_ptr() + min(end, heap.numel())
        self.value, self.random = value, random.Random(seed)
        self.is_on = True
        self.spoiled = 0

    def __call__(self, program: Any, addresses: np.ndarray, values: np.ndarray) -> np.ndarray:
        inside = (addresses >= self.begin) & (addresses < self.end)
        is_word = values.dtype in (np.int32, np.int64)
        if not self.is_on or not is_word or not program.launch.name.startswith("rank 1 ") or not inside.any():
            return values
        changed = values.copy()
        for index in np.flatnonzero(inside):
            if self.value is not None or self.random.random() < 0.5:
                value = self.random.choice(self.values) if self.value is None else self.value
                word = value & ((1 << 8 * changed.itemsize) - 1)
                changed.flat[index] = np.array(word, dtype=f"u{changed.itemsize}").astype(changed.dtype)
                self.spoiled += 1
        return changed


def know(simulator: Simulator, arenas: list[torch.Tensor]) -> None:
    """All tensors that there are, and of the arenas the middle."""
    hidden = {arena.untyped_storage().data_ptr() for arena in arenas}
    storages = {found.untyped_storage() for found in gc.get_objects() if type(found) is torch.Tensor}
    ranges = {(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.data_ptr() not in hidden}
    ranges |= {(arena.data_ptr() + GUARD, arena.data_ptr() + GUARD + ARENA) for arena in arenas}
    simulator.restrict(ranges)


class FuzzedWorld(World):
    """What a rank shows lies in its arena, the only region that its peers have open."""

    def __init__(
        self, monkeypatch: Any, seed: int, modules: Modules, target: str, value: int | None, *, direct: bool
    ) -> None:
        named = dict(zip(("layout", "notify", "dispatch", "combine"), modules, strict=False))
        super().__init__(monkeypatch, 2, seed, direct=(direct,), stage_bytes=512, modules=named, max_steps=200_000)
        self.timeout = TIMEOUT
        self.simulator.let_time_pass(monkeypatch, modules[-2])
        # Rounds of tokens that are not there end at once, but each takes the interpreter long.
        monkeypatch.setattr(modules[-1], "MOST_TOKENS", tl.constexpr(2 * LIST_CAPACITY))
        self.arenas = [torch.zeros(ARENA + 2 * GUARD, dtype=torch.uint8) for _ in range(2)]
        self.used = [0, 0]
        for table in self.regions:
            table[0, :, 0] = self.table
            table[1, :, 0] = self.heaps[0].numel()
            table[0, :, 1] = torch.tensor([arena.data_ptr() + GUARD for arena in self.arenas])
            table[1, :, 1] = ARENA
        self.spoiler = Spoiler(self.heaps[0], target, value, seed)
        self.simulator.spoil = self.spoiler

    def place(self, rank: int, tensor: torch.Tensor | None) -> int:
        if tensor is None or not tensor.numel() or not self.direct[rank]:
            return super().place(rank, tensor)
        begin, nbytes = self.used[rank], tensor.numel() * tensor.element_size()
        assert begin + nbytes <= ARENA
        self.arenas[rank][GUARD + begin :][:nbytes] = tensor.contiguous().view(torch.uint8).flatten()
        self.used[rank] = begin + -(-nbytes // 16) * 16
        return PLACE | begin

    def run(self) -> None:
        know(self.simulator, self.arenas)
        super().run()


def outcome(world: World | LowLatencyWorld) -> TokenferryError | None:
    """What the host of rank 0 would raise."""
    code = world.code(0)
    status = object.__new__(Status)
    status._rank, status._num_ranks, status._timeout, status._names = 0, 2, 1.0, (0, 1)
    details = world.status[0][words.DETAIL.value :][:2].tolist()
    error = status._error(code, "an operation", 1, details) if code else None
    assert type(error) is not TokenferryError, error
    if code == words.BAD_PEER.value:
        assert isinstance(error, HeapError)
        assert details == [0, 1]
        assert world.status[0][words.HAS_FAILED.value] == code, "the Buffer is lost"
    return error


def high_throughput(
    monkeypatch: Any, operation: str, target: str, value: int | None, modules: Modules = ENTRIES, *, seed: int = 0,
    direct: bool = True,
) -> TokenferryError | None:  # fmt: skip
    """A dispatch; or one that is fine, and a cached one or a combine; direct or in rounds."""
    world = FuzzedWorld(monkeypatch, seed, modules, target, value, direct=direct)
    case = Case(tokens=(4, 3), row_bytes=16, num_topk=2, local_experts=2, combine_bytes=16, seed=seed % 5)
    ranks = [Rank(world, case, rank, num_sms=2) for rank in range(2)]
    worst = max(ranks[0].num_rows) + 1
    world.spoiler.is_on = operation in ("dispatch", "exact")
    for rank in ranks:
        rank.layout()
        rank.notify(0 if operation == "exact" else worst)
        if operation != "exact" or rank.rank == 1:
            rank.pull(worst)
    world.run()
    if operation == "exact":
        counts, experts = world.counts[0], words.HOST_EXPERTS.value
        assert counts[words.HOST_DONE.value] != 0
        if counts[words.HOST_CODE.value] == 0:
            assert 0 <= counts[words.HOST_ROWS.value] <= 2 * LIST_CAPACITY
            assert (counts[experts : experts + 2] >= 0).all()
    elif operation != "dispatch":
        assert outcome(world) is None
        world.spoiler.is_on = True
        for rank in ranks:
            if operation == "cached":
                rank.pull(worst, rank.handle(), signature=44)
            else:
                rank.combine(rank.handle())
        world.run()
    assert world.spoiler.spoiled or value is None
    return outcome(world)


def low(monkeypatch: Any, value: int | None, modules: Modules = LOW_ENTRIES, *, seed: int = 0) -> None:
    """A low-latency dispatch and a combine, of both of which any words may be spoiled."""
    case = LowLatencyCase(tokens=(2, 2), hidden=8, num_topk=2, seed=seed % 5)
    world = world_of(
        monkeypatch, 2, seed, case, exact=seed % 2 == 1, timeout=TIMEOUT, max_steps=200_000,
        modules=dict(zip(("dispatch", "combine"), modules, strict=False)),
    )  # fmt: skip
    world.simulator.random = random.Random(seed)
    world.simulator.let_time_pass(monkeypatch, *modules[2:])
    world.simulator.spoil = spoiler = Spoiler(world.heaps[0], "all pushed", value, seed)
    # All but the signatures, with which it would be over.
    spoiler.begin += words.CONTROL_BYTES
    calls = Calls(world, case)
    calls.dispatch()
    know(world.simulator, [])
    world.run()
    received = calls.results[0][1]
    assert ((received >= 0) & (received <= 2 * calls.scenarios[0].most)).all(), "rows that no slab has"
    calls.combine()
    know(world.simulator, [])
    world.run()
    assert spoiler.spoiled
    outcome(world)


FOUND = [
    ("dispatch", "tokens", 513, True),
    ("dispatch", "tokens", 1 << 40, False),
    ("dispatch", "place", PLACE + ARENA - 16, True),
    ("dispatch", "list", 1 << 20, True),
    ("dispatch", "counts", 5, True),
    ("exact", "counts", -1, True),
    ("exact", "experts", -1, True),
    ("cached", "place", 255 * PLACE, True),
    ("combine", "place", PLACE + ARENA - 16, True),
]
"""Operation, words, value, direct: what is found and told, with the name of the rank."""


@pytest.mark.parametrize(("operation", "target", "value", "direct"), FOUND)
def test_garbage_is_found(monkeypatch: Any, operation: str, target: str, value: int, direct: bool) -> None:
    error = high_throughput(monkeypatch, operation, target, value, direct=direct)
    assert isinstance(error, HeapError)
    assert "ranks [1] sent" in str(error)


FUZZED = ("dispatch message", "cached message", "combine message", "combine rows", "cached tokens", "dispatch list")


@pytest.mark.parametrize("seed", but_slow(range(6), 4, 5))
def test_garbage_does_no_harm(monkeypatch: Any, seed: int) -> None:
    operation, target = FUZZED[seed % len(FUZZED)].split()
    high_throughput(monkeypatch, operation, target, None, seed=seed, direct=seed % 3 > 0)


@pytest.mark.parametrize("value", [1 << 40, None])
def test_garbage_does_no_harm_in_low_latency(monkeypatch: Any, value: int | None) -> None:
    low(monkeypatch, value, seed=7 if value is None else 0)


@dataclass(frozen=True)
class Mutant:
    """A check that is left out: ``old`` replaced by ``new`` in ``module``, and what finds that."""

    module: ModuleType
    old: str
    new: str
    case: tuple[str, str, int] | int


MUTANTS = {
    "sizes of regions": Mutant(
        sync, "(rows * row_bytes <= room)", "(room > 0)", ("dispatch", "place", PLACE + ARENA - 16)
    ),
    "rows of a combine": Mutant(sync, "rows * row_bytes", "row_bytes", ("combine", "place", PLACE + ARENA - 16)),
    "tokens of lists": Mutant(
        dispatch, "fits = (t >= first) & (t < last)", "fits = t >= first", ("dispatch", "list", 1 << 20)
    ),
    "counts of rows": Mutant(notify, "(counts < 0) | (counts > tokens)", "counts > tokens", ("exact", "counts", -1)),
    "counts of choices": Mutant(
        notify, "bad = bad | bad_choices(own, source, tokens, num_local)", "pass", ("exact", "experts", -1)
    ),
    "counts of low latency": Mutant(
        low_latency_dispatch, "count = tl.minimum(tl.maximum(count, 0), each)", "pass", 1 << 20
    ),
    "places in slabs": Mutant(low_latency_dispatch, " & (at >= 0) & (at < slab)", "", 1 << 40),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_check_that_is_left_out_is_missed(monkeypatch: Any, name: str) -> None:
    mutant = MUTANTS[name]
    entries = LOW_ENTRIES if isinstance(mutant.case, int) else ENTRIES
    modules = mutated_modules(mutant.module, mutant.old, mutant.new, entries=entries)
    try:
        if isinstance(mutant.case, int):
            low(monkeypatch, mutant.case, modules)
        else:
            error = high_throughput(monkeypatch, *mutant.case, modules)
            assert isinstance(error, HeapError)
    except (AssertionError, InterpreterError):
        return
    pytest.fail("nobody missed it")
