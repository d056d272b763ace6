"""Several ranks' kernels in one process, without a GPU, in an order that a seed decides.

Every program of every rank is a greenlet: one runs at a time. At each memory operation it may have to
hand over to another one. Tensors are torch's on the CPU; "symmetric memory" is tensors whose addresses lie in an
int64 tensor. What one seed does, it does again.

The memory is weaker than the CPU's:

*Stores* may stay in a buffer of their program and reach memory at any later time, in any order, except that two to
one location keep theirs. A release brings them there first: scalar stores always, since the thread that releases made
them; others only if a ``tl.debug_barrier()`` came between, since the compiler puts none before an atomic. What a
finished program has not written arrives before its kernel ends. A program sees its own stores.

*Loads* may see memory as it was at any time since the last acquire of their program, or since its kernel began, but
never older than the program's own stores there. Volatile loads and atomics see memory as it is.

*Loads before a release* of more than one element may also be late, if no barrier came between: other threads than the
releasing one do them. Such a load still has its early value here, but if anybody changes what it reads before the
program's next barrier or acquire, or soon after its end, the run fails with ``LateLoad``.

Not modelled: scopes (a gpu-scope release reaches a peer); acquires that cover less than everything (one of an
unrelated flag makes all visible here), or whose result is not used, which leaves the program's other threads
unordered; relaxed atomics that lag; a vector store that arrives in pieces; barriers that the compiler puts in on its
own; inline assembly, clocks and proxies.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import greenlet
import numpy as np
import triton.language as tl

from tests.kernels import interpreter

ARRIVAL = 0.1
"""Chance, per turn or memory operation of a program, that one of its buffered stores arrives."""

ARRIVAL_WHEN_FINISHED = 0.03
"""The same per turn for a finished program: its stores outlive it by many turns of others."""

END_OF_LATE_LOADS = 0.01
"""Chance per turn that the late loads of a finished program are done."""

REMEMBERED_CHANGES = 512
"""Changes of memory that a load can be too old for."""

GRANULE = 16
"""Bytes within which two accesses count as being to one location."""


class Deadlock(AssertionError):  # noqa: N818
    """Programs still run after ``max_steps`` memory operations."""


class LateLoad(AssertionError):  # noqa: N818
    """Memory changed that a program may still have been reading: no barrier came before its release."""


class OutOfBounds(AssertionError):  # noqa: N818
    """A program loads or stores where nothing lies that it may know."""


class Simulator:
    """Queues launches, then runs them.

    Args:
        seed: Decides every choice.
        weak: Chance that a store is buffered, and that a load looks into the past; 0 is sequential consistency.
        switch: Chance that a program hands over at a plain load or store; at what may be a wait it always does.
        max_steps: Memory operations after which the run counts as a deadlock.
    """

    def __init__(self, seed: int, *, weak: float = 0.6, switch: float = 0.3, max_steps: int = 2_000_000):
        interpreter.install()
        self.random = random.Random(seed)
        self.weak = weak
        self.switch = switch
        self.max_steps = max_steps
        self.steps = 0
        self.time = 0
        self.memory = _Memory()
        self.late_load: LateLoad | None = None
        self.known: tuple[np.ndarray, np.ndarray] | None = None
        self.spoil: Callable[[_Program, np.ndarray, np.ndarray], np.ndarray] | None = None
        """What becomes of the values of a store, for tests of what others make of them."""
        self._queues: dict[int, deque[_Launch]] = {}

    def launch(
        self, rank: int, kernel: Any, grid: tuple[int, ...], /, *args: Any, delay: int = 0, **kwargs: Any
    ) -> None:
        """Queue a launch behind the rank's earlier ones. Launch options such as ``num_warps`` are ignored.

        Args:
            rank: The rank; launches of one rank run one after the other, as on one stream.
            kernel: A ``triton.jit`` function.
            grid: One to three sizes.
            *args: Arguments of the kernel; tensors are passed as pointers and must outlive ``run``.
            delay: Steps (memory operations of anybody) by which the launch begins late, once it could begin.
            **kwargs: Arguments of the kernel, by name.
        """
        launch = _Launch(self, rank, kernel, grid, interpreter.callable_of(kernel, args, kwargs), delay)
        self._queues.setdefault(rank, deque()).append(launch)

    def run(self, hosts: Iterable[Iterator[None]] = ()) -> None:
        """Run all that is queued.

        Args:
            hosts: what hosts do meanwhile, between any two turns of programs; they yield where they wait.

        Raises:
            Deadlock: The step limit is reached.
            LateLoad: A release came too early for a load.
            Exception: What a program raised.
        """
        self.steps = 0
        self.late_load = None
        self.memory.forget()
        try:
            waiting = list(hosts)
            while any(self._queues.values()) or waiting:
                waiting = [host for host in waiting if next(host, self) is not self]
                self._begin_launches()
                self._give_turn()
                self._finish_late()
                self._end_launches()
        finally:
            self._stop()

    def restrict(self, ranges: Iterable[tuple[int, int]]) -> None:
        """From now on programs may touch these addresses only, (first, end) each."""
        starts, ends = np.array(sorted(ranges), dtype=np.int64).T
        self.known = starts.copy(), np.maximum.accumulate(ends)

    def let_time_pass(self, monkeypatch: Any, *modules: Any) -> None:
        """Give the kernels of some modules a clock: a nanosecond for every step of anybody, since the first run.

        Without it the interpreter's stands still, and no deadline ever passes.
        """
        for module in modules:
            monkeypatch.setattr(module, "now", lambda: tl.program_id(0).to(tl.int64) * 0 + self.time)

    def _pass(self) -> None:
        self.steps += 1
        self.time += 1

    @property
    def is_over_limit(self) -> bool:
        return self.steps > self.max_steps

    def look_for_late_loads(self, writer: _Program, addresses: np.ndarray) -> None:
        """Called when ``writer`` has changed memory."""
        for program in self._programs():
            if program is not writer and any(_overlap(late, addresses) for late in program.late_loads):
                self.late_load = LateLoad(f"{writer} changes what {program} may still be loading")

    def _current(self) -> list[_Launch]:
        return [queue[0] for queue in self._queues.values() if queue]

    def _running(self) -> list[_Program]:
        return [program for program in self._programs() if not program.is_finished]

    def _programs(self) -> list[_Program]:
        """Those of the launches that have begun and not ended."""
        return [program for launch in self._current() for program in launch.programs]

    def _begin_launches(self) -> None:
        for launch in self._current():
            launch.begin_if_due()

    def _give_turn(self) -> None:
        """Let one program run until it hands over. Programs that poll without news come less often."""
        running = self._running()
        if running:
            self._let_one_run(running)
        else:
            self._pass()
        if self.is_over_limit:
            names = ", ".join(map(str, self._running()))
            raise Deadlock(f"no end after {self.max_steps} steps; still running: {names or 'nothing'}")

    def _let_one_run(self, running: list[_Program]) -> None:
        program = self.random.choices(running, [1 / (1 + min(p.polls, 15)) for p in running])[0]
        program.take_turn()

    def _finish_late(self) -> None:
        """What finished programs left under way."""
        for program in self._programs():
            if program.is_finished and program.buffer and self.random.random() < ARRIVAL_WHEN_FINISHED:
                program.let_one_arrive()
            if program.is_finished and program.late_loads and self.random.random() < END_OF_LATE_LOADS:
                program.late_loads.clear()
        if self.late_load is not None:
            raise self.late_load

    def _end_launches(self) -> None:
        for queue in self._queues.values():
            if queue and queue[0].is_over:
                queue.popleft()

    def _stop(self) -> None:
        """End the programs of an unfinished run and empty the queues."""
        for program in self._running():
            program.stop()
        self._queues.clear()


class _Launch:
    """One kernel of one rank."""

    def __init__(
        self,
        simulator: Simulator,
        rank: int,
        kernel: Any,
        grid: tuple[int, ...],
        body: Callable[[], None],
        delay: int,
    ):
        self.simulator = simulator
        self.name = f"rank {rank} {kernel.__name__}"
        self.grid = (*grid, *(1,) * (3 - len(grid)))
        self.body = body
        self.delay = delay
        self.due: int | None = None
        self.programs: list[_Program] = []

    def begin_if_due(self) -> None:
        """Called while this launch is the first of its rank."""
        if self.due is None:
            self.due = self.simulator.steps + self.delay
        if not self.programs and self.simulator.steps >= self.due:
            self.programs = [_Program(self, index) for index in np.ndindex(*self.grid)]

    @property
    def is_over(self) -> bool:
        return bool(self.programs) and all(program.is_over for program in self.programs)


class _Program:
    """One program: a greenlet, its stores under way, and how old its loads can be (see ``interpreter.Program``)."""

    def __init__(self, launch: _Launch, index: tuple[int, ...]):
        self.simulator = launch.simulator
        self.memory = launch.simulator.memory
        self.random = launch.simulator.random
        self.launch = launch
        self.index = index
        self.grid = launch.grid
        self.buffer: list[_Store] = []
        self.loads: list[np.ndarray] = []  # of more than one element, since the last barrier
        self.late_loads: list[np.ndarray] = []  # those that a release has overtaken
        self.acquired_at = self.memory.now
        self.polls = 0
        self.last_poll: tuple[bytes, bytes] | None = None
        self.is_finished = False
        self.greenlet = greenlet.greenlet(self._main)

    def __str__(self) -> str:
        return f"{self.launch.name}{list(self.index)}"

    @property
    def is_over(self) -> bool:
        return self.is_finished and not self.buffer and not self.late_loads

    def load(self, addresses, *, is_volatile, perform):
        self._check_bounds(addresses)
        self._step(hands_over=is_volatile)
        self._see_own_stores(addresses)
        if is_volatile:
            return self._note_poll(addresses, perform())
        self.last_poll = None
        if addresses.size > 1:
            self.loads.append(addresses)
        if self.random.random() < self.simulator.weak:
            time = self.random.choice((self.acquired_at, self.random.randint(self.acquired_at, self.memory.now)))
            return self.memory.load_as_of(time, self, addresses, perform)
        return perform()

    def store(self, addresses, values, *, is_scalar):
        self._check_bounds(addresses)
        if self.simulator.spoil is not None:
            values = self.simulator.spoil(self, addresses, values)
        self._step()
        self.last_poll = None
        if not addresses.size:
            return
        self._see_own_stores(addresses)
        store = _Store(addresses, values, is_released=is_scalar)
        if self.random.random() < self.simulator.weak:
            self.buffer.append(store)
        else:
            self._arrive(store)

    def atomic(self, addresses, itemsize, *, acquires, releases, perform):
        self._check_bounds(addresses)
        self._step(hands_over=True)
        if not addresses.size:
            return perform()
        if releases:
            self._release()
        self._see_own_stores(addresses)
        result = self._change(addresses, itemsize, perform, is_atomic=True)
        if acquires:
            self.acquired_at = self.memory.now
            self._end_loads()  # the compiler hands an atomic's result to all threads behind a barrier
        return self._note_poll(addresses, result)

    def barrier(self):
        """The next release covers all threads' loads and stores so far."""
        self._end_loads()
        self.buffer = [store._replace(is_released=True) for store in self.buffer]

    def let_one_arrive(self) -> None:
        self._arrive(self.buffer.pop(self.random.randrange(len(self.buffer))))

    def take_turn(self) -> None:
        """Run until the program hands over, ends or raises."""
        self._switch(self.greenlet.switch)

    def stop(self) -> None:
        """Unwind it where it is."""
        self._switch(self.greenlet.throw)  # greenlet.GreenletExit

    def _switch(self, switch: Callable[[], Any]) -> None:
        interpreter.running.program = self
        try:
            switch()
        except BaseException as error:
            error.add_note(f"in {self}")
            raise
        finally:
            interpreter.running.program = None

    def _main(self) -> None:
        try:
            self.launch.body()
        finally:
            self.is_finished = True

    def _check_bounds(self, addresses: np.ndarray) -> None:
        if self.simulator.known is None or not addresses.size:
            return
        starts, ends = self.simulator.known
        found = np.asarray(addresses).astype(np.int64).ravel()
        place = np.searchsorted(starts, found, "right") - 1
        if (place < 0).any() or (found >= ends[np.maximum(place, 0)]).any():
            raise OutOfBounds(f"{self} touches memory that it does not know")

    def _step(self, *, hands_over: bool = False) -> None:
        """Before every memory operation."""
        self.simulator._pass()
        if self.buffer and self.random.random() < ARRIVAL:
            self.let_one_arrive()
        if hands_over or self.simulator.is_over_limit or self.random.random() < self.simulator.switch:
            self.greenlet.parent.switch()

    def _note_poll(self, addresses: np.ndarray, result: Any) -> Any:
        """Count how often in a row the program found the same where it may be waiting."""
        poll = addresses.tobytes(), result.data.tobytes()
        self.polls = self.polls + 1 if poll == self.last_poll else 0
        self.last_poll = poll
        return result

    def _release(self) -> None:
        """Bring the covered stores to memory, in any order; loads that are not covered are late from now on."""
        if self.simulator.weak:
            self.late_loads += self.loads
        covered = [store for store in self.buffer if store.is_released]
        self.buffer = [store for store in self.buffer if not store.is_released]
        self.random.shuffle(covered)
        for store in covered:
            self._arrive(store)

    def _see_own_stores(self, addresses: np.ndarray) -> None:
        """Bring own stores to these locations to memory, so that no two buffered ones overlap either."""
        touched = [store for store in self.buffer if _overlap(store.addresses, addresses)]
        if touched:
            self.buffer = [store for store in self.buffer if not any(store is other for other in touched)]
            for store in touched:
                self._arrive(store)

    def _arrive(self, store: _Store) -> None:
        self._change(
            store.addresses,
            store.values.itemsize,
            lambda: interpreter.write_words(store.addresses, store.values),
        )

    def _change(self, addresses: np.ndarray, itemsize: int, perform: Callable[[], Any], **options: bool) -> Any:
        now = self.memory.now
        result = self.memory.change(self, addresses, itemsize, perform, **options)
        if self.memory.now > now:
            self.simulator.look_for_late_loads(self, addresses)
        return result

    def _end_loads(self) -> None:
        self.loads.clear()
        self.late_loads.clear()


class _Store(NamedTuple):
    """A store under way."""

    addresses: np.ndarray
    values: np.ndarray
    is_released: bool  # whether the next release of the program covers it


class _Change(NamedTuple):
    """What a store or an atomic did to memory."""

    program: _Program
    addresses: np.ndarray
    low: int
    high: int
    before: np.ndarray
    after: np.ndarray


class _Memory:
    """The process's memory, with enough of its past to show it to loads. Time counts changes."""

    def __init__(self):
        self.now = 0
        self.changes: deque[_Change] = deque(maxlen=REMEMBERED_CHANGES)

    def forget(self) -> None:
        """The past ends here: the host may have written since."""
        self.changes.clear()

    def change(
        self,
        program: _Program,
        addresses: np.ndarray,
        itemsize: int,
        perform: Callable[[], Any],
        *,
        is_atomic: bool = False,
    ) -> Any:
        """Remember what ``perform`` changes; an atomic that changes nothing is but a load."""
        before = interpreter.read_words(addresses, itemsize)
        result = perform()
        after = interpreter.read_words(addresses, itemsize)
        if is_atomic and np.array_equal(before, after):
            return result
        self.now += 1
        low, high = int(addresses.min()), int(addresses.max())
        self.changes.append(_Change(program, addresses, low, high, before, after))
        return result

    def load_as_of(self, time: int, program: _Program, addresses: np.ndarray, perform: Callable[[], Any]) -> Any:
        """Perform a load in the memory of a past time, no older than the program's own last change there."""
        undone = self._changes_after(time, program, addresses)
        for change in undone:
            interpreter.write_words(change.addresses, change.before)
        result = perform()
        for change in reversed(undone):
            interpreter.write_words(change.addresses, change.after)
        return result

    def _changes_after(self, time: int, program: _Program, addresses: np.ndarray) -> list[_Change]:
        """Changes that touch the addresses, the latest first."""
        if not addresses.size or time >= self.now:
            return []
        low, high = int(addresses.min()), int(addresses.max())
        found = []
        for change, _ in zip(reversed(self.changes), range(self.now - time), strict=False):
            if change.low < high + GRANULE and low < change.high + GRANULE:
                if change.program is program and _overlap(change.addresses, addresses):
                    break
                found.append(change)
        return found


def _overlap(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two accesses touch one granule."""
    if not first.size or not second.size:
        return False
    apart = first.max() < second.min() - GRANULE or second.max() < first.min() - GRANULE
    return not apart and bool(np.intersect1d(first // GRANULE, second // GRANULE).size)
