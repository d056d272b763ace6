"""The protocol of the kernels: right under stress, and no step of it can be left out."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from tests.cases import Case
from tests.conftest import but_slow
from tests.kernels import simulator
from tests.kernels.mutants import mutated_modules
from tests.kernels.schedules import Scheduler, put_to_sleep, stop_at_deadlocks
from tests.kernels.world import ALL_MODULES, Rank, World
from tokenferry.dataplane.cuda import programs
from tokenferry.dataplane.cuda.kernels import combine, dispatch, flags, layout, notify, rounds, sync, words
from tokenferry.dataplane.cuda.status import Status
from tokenferry.errors import HeapError

Modules = dict[str, ModuleType]

SIZES = ((11, 6), (7, 12), (0, 9), (13, 1))
STAGE = 512
"""Rounds of 5 tokens in a dispatch of ``SIZES`` and of 4 rows in a combine, with two ranks."""
SLOW = 0.01
DIRECT = {"direct": (True,), "staged": (False,), "mixed": (True, False)}
MISMATCH, TORN = words.MISMATCH.value, words.TORN.value
HOSTS = 100
"""Added to a rank: the queue of what its host does while its kernels run."""


@triton.jit
def overwrite(target, count, BLOCK: tl.constexpr):
    """What the owner of a tensor may do with it as soon as an operation is over."""
    i = tl.arange(0, BLOCK)
    tl.store(target + i, tl.full([BLOCK], 0xEE, tl.uint8), mask=i < count)


@triton.jit
def wait_for_counts(counts, copy, COUNT: tl.constexpr):
    """What a host does that waits for counts."""
    while tl.atomic_add(counts, 0, sem="acquire", scope="sys") == 0:
        pass
    i = tl.arange(0, COUNT)
    tl.store(copy + i, tl.load(counts + i))


class Calls:
    """One dispatch and what follows it on all ranks, each call only queued; ``check`` when all have run."""

    def __init__(self, world: World, number: int, seed: int, *, routing: str = "random", num_sms: int = 4) -> None:
        sizes = SIZES[(number + seed) % len(SIZES)]
        case = Case(
            tokens=(*sizes, 5), row_bytes=16, num_topk=2, local_experts=2, combine_bytes=16, routing=routing,
            seed=10 * seed + number,
        )  # fmt: skip
        self.world = world
        self.cached: dict[int, Any] = {}
        self.is_combined = False
        self.ranks = [Rank(world, case, rank, num_sms) for rank in range(world.num_ranks)]
        self.worst = max(self.ranks[0].num_rows) + 1 + seed % 3
        for rank in self.ranks:
            given = rank.given  # the oracle's, not to be overwritten
            rank.given = replace(given, topk_idx=given.topk_idx.clone(), topk_weights=given.topk_weights.clone())

    def dispatch(self) -> None:
        for rank in self.ranks:
            rank.layout()
            rank.notify(self.worst)
            rank.pull(self.worst)

    def dispatch_cached(self) -> None:
        for rank in self.ranks:
            first = rank.out
            rank.pull(self.worst, rank.handle(), signature=44)
            self.cached[rank.rank], rank.out = rank.out, first

    def overwrite(self) -> None:
        """What the dispatches have read."""
        for rank in self.ranks:
            for tensor in (rank.x, rank.given.topk_idx, rank.given.topk_weights):
                self._overwrite(rank.rank, tensor)

    def combine(self, signatures: tuple[int, ...] = (43,)) -> None:
        self.is_combined = True
        for rank in self.ranks:
            rank.combine(rank.handle(), signature=signatures[rank.rank % len(signatures)])
            columns, _ = self.world.kept[-1]
            for tensor in columns:
                self._overwrite(rank.rank, tensor)

    def check(self) -> None:
        for rank in self.ranks:
            rank.given = rank.inputs[rank.rank]
            rank.check_layout()
            rank.check_dispatch()
            if self.is_combined:
                rank.check_combine()
            if rank.rank in self.cached:
                rank.out = self.cached[rank.rank]
                rank.check_dispatch(cached=True)

    def _overwrite(self, rank: int, tensor: torch.Tensor) -> None:
        size = tensor.numel() * tensor.element_size()
        if size:
            flat = tensor.view(torch.uint8).flatten()
            block = triton.next_power_of_2(size)
            self.world.simulator.launch(rank, overwrite, (1,), flat, size, BLOCK=block)


class Paces(Scheduler):
    """To whom one program of every other launch is slow."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._slow: dict[Any, int] = {}

    def pace_of(self, program: Any) -> float:
        if program.launch not in self._slow:
            self._slow[program.launch] = self.randrange(2 * program.grid[0])
        return SLOW if program.index[0] == self._slow[program.launch] else 1


def disturb(monkeypatch: Any, world: World, seed: int) -> None:
    """Even seeds: uneven programs. Odd ones: launches begin late by random numbers of steps, and one rank always.

    Not both: while all others are late a slow program is not slow. Nor is it while kernels wait for their stores, so
    with uneven programs these arrive soon.
    """
    monkeypatch.setattr(simulator, "ARRIVAL_WHEN_FINISHED", (0.7, 0.03)[seed % 2])
    monkeypatch.setattr(simulator, "END_OF_LATE_LOADS", (0.3, 0.01)[seed % 2])
    if seed % 2 == 0:
        world.simulator.random = Paces(seed)
        return
    world.simulator.random = Scheduler(seed)
    source, launch = random.Random(seed), world.simulator.launch
    late = source.randrange(world.num_ranks + 1)

    def delayed(rank: int, *args: Any, **kwargs: Any) -> None:
        launch(rank, *args, delay=source.choice((0, 0, source.randrange(200))) + 100 * (rank == late), **kwargs)

    monkeypatch.setattr(world.simulator, "launch", delayed)


def repeated(
    monkeypatch: Any,
    seed: int,
    modules: Modules | None = None,
    *,
    direct: str,
    length: int = 2,
    num_ranks: int = 2,
    stage_bytes: int = STAGE,
    num_sms: int = 4,
    combines: bool = True,
    routing: str = "random",
) -> None:
    """Pairs of dispatch and combine in a row, one of them with a cached dispatch; tensors are overwritten at once."""
    world = World(
        monkeypatch, num_ranks, seed, direct=DIRECT[direct], stage_bytes=stage_bytes, modules=modules,
        max_steps=8000 * length * (num_ranks - 1),
    )  # fmt: skip
    disturb(monkeypatch, world, seed)
    monkeypatch.setattr(programs, "_TOKENS_PER_BLOCK", 4)
    calls = [Calls(world, number, seed, routing=routing, num_sms=num_sms) for number in range(length)]
    for number, call in enumerate(calls):
        call.dispatch()
        if combines and number == 0:
            call.dispatch_cached()
        call.overwrite()
        if combines:
            call.combine()
    world.run()
    for call in calls:
        call.check()
    assert [world.code(rank) for rank in range(num_ranks)] == [0] * num_ranks


def alternating(monkeypatch: Any, seed: int, modules: Modules | None = None) -> None:
    """Cached dispatches of different sizes through stages, right behind each other."""
    world = World(monkeypatch, 2, seed, direct=(False,), stage_bytes=256, modules=modules, max_steps=20_000)
    disturb(monkeypatch, world, seed)
    calls = [Calls(world, number, seed, routing="one_rank") for number in range(2)]
    for call in calls:
        call.dispatch()
    for call in calls * 2:
        call.dispatch_cached()
    world.run()
    for call in calls:
        call.check()
    assert [world.code(rank) for rank in range(2)] == [0, 0]


def unread(monkeypatch: Any, seed: int, modules: Modules | None = None, *, cached: bool = False) -> None:
    """A program of rank 1 reads nothing of a staged dispatch before the next one is sent, as far as may be."""
    world = World(monkeypatch, 2, seed, direct=(False,), stage_bytes=4096, modules=modules, max_steps=5000)
    put_to_sleep(world.simulator, seed, {-1: (3, 16)})
    # Not cached, other lists; cached, no tokens of rank 0 after many.
    calls = [Calls(world, number, 2 if cached else 0, routing="one_rank") for number in range(2)]
    for call in calls:
        call.dispatch()
    if cached:
        calls[0].dispatch_cached()
    world.run()
    for call in calls:
        call.check()
    assert [world.code(rank) for rank in range(2)] == [0, 0]


def counted(monkeypatch: Any, seed: int, modules: Modules | None = None) -> None:
    """A host reads the counts of a dispatch as soon as it may."""
    world = World(monkeypatch, 2, seed, modules=modules, max_steps=5000)
    disturb(monkeypatch, world, seed)
    calls = Calls(world, 0, seed)
    before = world.counts
    for rank in calls.ranks:
        rank.layout()
        rank.notify()
    world.counts = [torch.full((8,), -7, dtype=torch.int64) for _ in before]
    for rank, counts in enumerate(before):
        world.simulator.launch(HOSTS + rank, wait_for_counts, (1,), counts, world.counts[rank], COUNT=8)
    world.run()
    for rank in calls.ranks:
        rank.check_counts()


def refused(monkeypatch: Any, seed: int, modules: Modules | None = None, *, host_waits: bool = True) -> None:
    """Ranks that mean different dispatches, then different combines; what follows each is as if nothing was."""
    world = World(monkeypatch, 2, seed, direct=(True, False), stage_bytes=STAGE, modules=modules, max_steps=10_000)
    disturb(monkeypatch, world, seed)
    calls, after = (Calls(world, number, seed) for number in range(2))
    for rank in calls.ranks:
        rank.layout()
        rank.notify(0 if host_waits else calls.worst, signature=rank.rank)
        if not host_waits:
            rank.pull(calls.worst)
    after.dispatch()
    after.overwrite()
    if not host_waits:
        after.combine((1, 2))
    outs = [rank.outs for rank in after.ranks if not host_waits]
    after.combine()
    world.run()
    after.check()
    for rank in calls.ranks:
        assert world.code(rank.rank) == MISMATCH
        assert host_waits or (rank.out.topk_idx == -1).all()
        assert all(out.isnan().all() for refused_outs in outs for out in refused_outs)


def _repeated(direct: str, **options: Any) -> Callable[..., None]:
    return lambda *given: repeated(*given, direct=direct, **options)


SCENARIOS: dict[str, Callable[..., None]] = {
    "direct": _repeated("direct"),
    "staged": _repeated("staged", length=1),
    "mixed": _repeated("mixed"),
    "three ranks": _repeated("direct", num_ranks=3, length=1),
    "one way": _repeated("direct", routing="one_rank"),
    "mixed, one way": _repeated("mixed", routing="one_rank"),
    "dispatches": _repeated("staged", routing="sparse", stage_bytes=4096, combines=False, length=4),
    "direct dispatches": _repeated("direct", combines=False),
    "many rounds": _repeated("staged", stage_bytes=256, length=1),
    "alternating": alternating,
    "unread": unread,
    "unread, cached": lambda *given: unread(*given, cached=True),
    "counted": counted,
    "refused": refused,
    "refused, no host waits": lambda *given: refused(*given, host_waits=False),
}


@dataclass(frozen=True)
class Mutant:
    """A fault: ``old`` replaced by ``new`` in ``module``, to be found in one of the scenarios."""

    module: ModuleType
    old: str
    new: str
    scenario: str
    count: int = 1

    def modules(self) -> Modules:
        entries = (layout, notify, dispatch, combine)
        copies = mutated_modules(self.module, self.old, self.new, self.count, entries=entries)
        return dict(zip(ALL_MODULES, copies, strict=True))


WRITE_MESSAGE = """            write_message(
                heap, rank, reader, signature, num_tokens, num_rows, 0, 0, staged, places, NUM_COLUMNS
            )  # fmt: skip
"""
SIGNAL_MESSAGE = """            if at_once == 0:
                tl.debug_barrier()
                signal(word(heap_of(heap, reader), PUBLISHED + rank * LINE), progress(epoch, 1))
"""
SIGNAL_MESSAGES = """    if at_once:
        signal_all(heap, PUBLISHED + rank * LINE, progress(epoch, 1), R)
"""
MESSAGES_FIRST = SIGNAL_MESSAGES + "    alive = True\n    for step"
SIGNAL_LIST = "        tl.debug_barrier()\n        signal(word(base, PUBLISHED + rank * LINE), progress(epoch, 1))\n"
WAIT_FOR_READERS = "if (staged == 0) & is_usable(state):"
LISTEN = "alive = wait_all_published(heap, state, status, rank, epoch, 1, operation, timeout, True, R)"
LAST_STAGER = "if is_last(state + STAGE_ARRIVED + this % 2, num_stagers):"
LAST_READER = "if is_last(state + ROUND_ARRIVED + this % 2, num_readers):"
LIST = """        sent = send_list(ids, member, send_head, num_tokens, reader, R, BLOCK)
        if sent != tl.sum(tl.where(r == reader, counts, 0)):
            tl.store(status + DETAIL + reader, sent.to(tl.int64))
            report(status, BAD_COUNTS, operation, epoch)
"""
HOST_DONE = "tl.debug_barrier()\n    tell_host(host + HOST_DONE, epoch)"

MUTANTS = {
    # Waiting and signalling.
    "signal relaxed": Mutant(flags, 'xchg(flag, value, sem="release"', 'xchg(flag, value, sem="relaxed"', "staged"),
    "wait relaxed": Mutant(flags, 'sem="acquire"', 'sem="relaxed"', "staged"),
    "wait for any step": Mutant(flags, "(epoch << EPOCH_SHIFT) | step", "epoch << EPOCH_SHIFT", "staged"),
    "wait for any epoch": Mutant(flags, "(epoch << EPOCH_SHIFT) | step", "step", "direct"),
    "wait for just this step": Mutant(
        flags, "agreed(acquire(flag) >= value)", "agreed(acquire(flag) == value)", "staged", 2
    ),
    # The message.
    "message over an unread one": Mutant(
        sync, "before = progress(epoch - 1, ALL)", "before = progress(epoch * 0, 0)", "unread, cached"
    ),
    "message after its flag": Mutant(sync, WRITE_MESSAGE + SIGNAL_MESSAGE, SIGNAL_MESSAGE + WRITE_MESSAGE, "mixed"),
    "messages after their flags": Mutant(sync, "    alive = True\n    for step", MESSAGES_FIRST, "direct"),
    "nobody waits for messages": Mutant(sync, "progress(epoch, step), rank", "0, rank", "direct"),
    "messages of the previous epoch": Mutant(
        sync, "progress(epoch, step), rank", "progress(epoch - 1, step), rank", "direct"
    ),
    "one message is not waited for": Mutant(flags, "in range(1, R):", "in range(1, R - 1):", "direct"),
    "whoever comes ends the wait": Mutant(
        flags, "missing = missing ^ (1 << peer)", "missing = zero()", "three ranks"
    ),
    "all have come when one has": Mutant(
        flags, "            missing = still\n", "            missing = still & 1\n", "three ranks"
    ),
    "nobody reads any more": Mutant(sync, "tl.load(state + SETTLED) == epoch - 1", "epoch > 0", "unread"),
    "list over an unread one": Mutant(sync, "reader, progress(epoch - 1, ALL)", "reader, 0", "unread"),
    "list after its flag": Mutant(notify, LIST + SIGNAL_LIST, SIGNAL_LIST + LIST, "direct dispatches"),
    "no barrier after the list": Mutant(notify, SIGNAL_LIST, SIGNAL_LIST.partition("\n")[2], "direct"),
    "nobody listens": Mutant(notify, LISTEN, "alive = True", "direct"),
    "counts after their flag": Mutant(
        notify, "    if alive:\n        code", "    " + HOST_DONE + "\n    if alive:\n        code", "counted"
    ),
    "no barrier after the counts": Mutant(notify, "    " + HOST_DONE, HOST_DONE.partition("\n")[2], "counted"),
    "counts relaxed": Mutant(
        flags, 'xchg(address, value, sem="release"', 'xchg(address, value, sem="relaxed"', "counted"
    ),
    # The end of an operation.
    "no barrier before counting": Mutant(sync, "    tl.debug_barrier()\n    last", "    last", "staged"),
    "counting relaxed": Mutant(sync, '"acq_rel"', '"relaxed"', "staged"),
    "counting does not release": Mutant(sync, '"acq_rel"', '"acquire"', "staged"),
    "counting does not acquire": Mutant(sync, '"acq_rel"', '"release"', "direct"),
    "ended by the last but one": Mutant(
        sync, "is_last(state + ARRIVED, programs)", "is_last(state + ARRIVED, programs - 1)", "one way"
    ),
    "counter stays": Mutant(sync, "tl.store(counter, 0)", "tl.store(counter, tl.where(total > 1, 1, 0))", "direct"),
    "release before the reads": Mutant(
        sync,
        "    if is_last(state + ARRIVED",
        "    release_all(heap, rank, epoch, ALL, R)\n    if is_last(state + ARRIVED",
        "one way",
    ),
    "owner does not wait for its readers": Mutant(
        sync, WAIT_FOR_READERS, WAIT_FOR_READERS.replace("staged == 0", "staged < 0"), "one way"
    ),
    "epoch stays": Mutant(sync, "tl.store(state + EPOCH, epoch)", "pass", "direct"),
    "counts of tokens stay": Mutant(
        layout, "tl.store(sums + i, tl.zeros([EB], tl.int32), mask=inside)", "pass", "direct"
    ),
    "all rows are direct": Mutant(sync, "(seen == 0).to(tl.int32)", "(seen < 0).to(tl.int32)", "mixed"),
    # Rounds.
    "half is not free": Mutant(rounds, "if this >= 2:", "if this < 0:", "staged"),
    "half of the round before is free": Mutant(
        rounds, "progress(epoch, this - 1)", "progress(epoch, this - 2)", "many rounds"
    ),
    "round published by the first": Mutant(rounds, LAST_STAGER, "if True:", "staged"),
    "round published early": Mutant(
        rounds, "* LINE, progress(epoch, this + 2)", "* LINE, progress(epoch, this + 3)", "staged"
    ),
    "round is not waited for": Mutant(
        rounds, "source, progress(epoch, this + 2)", "source, progress(epoch, this + 1)", "staged"
    ),
    "one counter of stagers": Mutant(rounds, "STAGE_ARRIVED + this % 2", "STAGE_ARRIVED", "staged"),
    "round released by the first": Mutant(rounds, LAST_READER, "if True:", "many rounds"),
    "round released early": Mutant(rounds, "epoch, this + 1, R)", "epoch, this + 2, R)", "many rounds"),
    "one counter of readers": Mutant(rounds, "ROUND_ARRIVED + this % 2", "ROUND_ARRIVED", "many rounds"),
    "round is not released": Mutant(rounds, "release_all(heap, rank, epoch, this + 1, R)", "pass", "staged"),
    "dispatch in one half": Mutant(dispatch, "(this % 2) * half", "0 * half", "staged", 2),
    "combine in one half": Mutant(combine, "(this % 2) * half", "0 * half", "staged", 2),
    "combine does not wait for rounds": Mutant(combine, "if alive & by_rounds:", "if rank < 0:", "staged"),
    # Refusals.
    "refused dispatch stays open": Mutant(notify, "if HOST_WAITS & (code != BAD_PEER):", "if False:", "refused"),
    "refused dispatch goes on": Mutant(notify, "tl.store(state + SKIPPED, epoch)", "pass", "refused, no host waits"),
    "refused combine goes on": Mutant(
        dispatch, "if all_mean(heap, rank, signature, R) == 0:", "if rank < 0:", "refused, no host waits"
    ),
}


def finds(monkeypatch: Any, mutant: Mutant, seed: int) -> bool:
    """Whether a seed shows the fault: wrong results or status, a deadlock or a late load."""
    stop_at_deadlocks(monkeypatch)
    try:
        SCENARIOS[mutant.scenario](monkeypatch, seed, mutant.modules())
    except AssertionError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_found(monkeypatch: Any, name: str) -> None:
    assert any(finds(monkeypatch, MUTANTS[name], seed) for seed in range(32))


@pytest.mark.parametrize(
    "scenario",
    but_slow(
        SCENARIOS,
        "direct",
        "mixed",
        "one way",
        "mixed, one way",
        "many rounds",
        "alternating",
        "refused, no host waits",
    ),
)
def test_right_protocol_passes(monkeypatch: Any, scenario: str) -> None:
    SCENARIOS[scenario](monkeypatch, 1)


@pytest.mark.parametrize("direct", but_slow(DIRECT, *(name for name in DIRECT if name != "mixed")))
def test_repeated_operations(monkeypatch: Any, direct: str) -> None:
    repeated(monkeypatch, 0, direct=direct, length=3, stage_bytes=1024, num_sms=3)


@pytest.mark.slow
@pytest.mark.parametrize("direct", DIRECT)
def test_repeated_operations_of_three_ranks(monkeypatch: Any, direct: str) -> None:
    repeated(monkeypatch, 1, direct=direct, num_ranks=3, num_sms=5)


@pytest.mark.parametrize("seed", but_slow(range(3), 1, 2))
def test_no_program_steps_back_alone_unnoticed(monkeypatch: Any, seed: int) -> None:
    """One program of every combine, another one in turn, finds a signature that nobody sent."""
    agreed = "signature, rank, R, MESSAGE_BYTES)"
    not_alone = f"{agreed} & ((signature != 43) | (tl.program_id(0) != {seed + 1}))"
    modules = Mutant(sync, agreed, not_alone, "direct").modules()
    world = World(monkeypatch, 2, seed, modules=modules, max_steps=20_000)
    calls = [Calls(world, number, seed) for number in range(2)]
    calls[0].dispatch()
    calls[0].combine()
    world.run()
    assert [world.code(rank) for rank in range(2)] == [TORN] * 2
    for rank, status in enumerate(world.status):
        assert status[words.HAS_FAILED.value] == TORN
        details = status[words.DETAIL.value :][:2].tolist()
        assert details[rank] == 1
        host = object.__new__(Status)
        host._rank, host._names = rank, range(8)
        error = host._error(TORN, "combine", 2, details)
        assert isinstance(error, HeapError)
        assert "combine (epoch 2): 1 programs" in str(error)
        status.zero_()
    calls[1].dispatch()  # nothing is left over for the next operation
    world.run()
    calls[1].check()
    assert [world.code(rank) for rank in range(2)] == [0, 0]
