"""The bulk-copy kernels in the simulator: Gluon read as Triton, the engine played.

A tensor has an element for each thread, and threads of a program go in step. Copies are late: a load lands when its
barrier is waited for, at the earliest by chance, a store reads shared memory and later writes global memory likewise.
So a wait that is missing shows as wrong data, and a wait for what nobody sends ends the program. To read what a copy
under way is to write is a fault, whatever is done with it.
"""

from __future__ import annotations

import ctypes
import importlib
import math
import random
import sys
from collections import defaultdict
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.experimental.gluon
import triton.language as tl
from triton.runtime import interpreter as stock

from tests.kernels import interpreter
from tests.kernels.mutants import forgotten, found_at, mutated_source

PACKAGE = "tokenferry.dataplane.cuda.kernels"
SHARED_BYTES = (128 + 64 + 32) * 1024
SOON = (0.0, 0.2)
"""How likely a copy that is under way goes on at each step: in every other program only when it is waited for."""


class Engine:
    """The shared memory of one program, and what is under way."""

    def __init__(self, seed: int) -> None:
        self.shared = np.full(SHARED_BYTES, 0xEE, np.uint8)
        self.base = self.shared.ctypes.data
        self.random = random.Random(seed)
        self.soon = SOON[seed % 2]
        self.barriers: dict[int, list[int]] = {}
        """By address: parity of the phase, arrivals that it still needs, of how many, bytes that it waits for."""
        self.loads: list[tuple[int, int, int, int]] = []
        self.groups: dict[int, list[list[Any]]] = defaultdict(list)
        """By thread: groups of target, source, bytes, what was read (None: not yet)."""

    def step(self) -> None:
        for load in [load for load in self.loads if self.random.random() < self.soon]:
            self.land(load)
        for groups in self.groups.values():
            for store in groups:
                if self.random.random() < self.soon:
                    self.read(store)

    def may_read(self, first: np.ndarray, nbytes: int) -> None:
        """Check that what is read, so many bytes from each of some addresses on, is there."""
        if self.loads:
            _, targets, _, sizes = np.array(self.loads).T
            starts = first.reshape(-1, 1)
            late = (starts < targets + sizes) & (targets < starts + nbytes)
            assert not late.any(), "what a copy under way is to write is read"

    def land(self, load: tuple[int, int, int, int]) -> None:
        self.loads.remove(load)
        barrier, target, source, nbytes = load
        ctypes.memmove(self.base + target, source, nbytes)
        self.barriers[barrier][3] -= nbytes
        self.complete(barrier)

    def complete(self, barrier: int) -> None:
        state = self.barriers[barrier]
        assert state[3] >= 0, "more bytes than announced"
        if state[1] == 0 and state[3] == 0:
            state[0], state[1] = state[0] ^ 1, state[2]

    def read(self, store: list[Any]) -> None:
        if store[2] and store[3] is None:
            store[3] = bytes(self.shared[store[1] : store[1] + store[2]])

    def write(self, thread: int) -> None:
        for store in self.groups.pop(thread, []):
            self.read(store)
            if store[2]:
                ctypes.memmove(store[0], store[3], store[2])


def engine() -> Engine:
    program: Any = interpreter.running.program
    if not hasattr(program, "engine"):
        program.engine = Engine(program.index[0])
    program.engine.step()
    return program.engine


def numbers(*tensors: Any) -> list[np.ndarray]:
    """What is in tensors (or scalars), one element a thread."""
    arrays = [np.asarray(t.handle.data if isinstance(t, tl.tensor) else getattr(t, "value", t)) for t in tensors]
    size = max(array.size for array in arrays)
    return [np.broadcast_to(array.reshape(-1), (size,)).astype(np.int64) for array in arrays]


def tensor(values: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    handle = stock.TensorHandle(values.astype(stock._get_np_dtype(dtype)), dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(values.shape)))


def emulated_bulk() -> ModuleType:
    """Stands for the package's ``bulk``."""
    module = ModuleType(f"{PACKAGE}.bulk")
    module.SHARED_BYTES = SHARED_BYTES  # type: ignore[attr-defined]

    def offers(function: Any) -> Any:
        setattr(module, function.__name__, function)
        return function

    @offers
    def reserve() -> int:
        return 0

    @offers
    def keep(memory: int) -> None:
        machine = engine()
        assert not machine.loads, "loads that nobody waited for"
        assert not any(store[2] for groups in machine.groups.values() for store in groups), "stores likewise"

    @offers
    def shared_base(like: Any) -> Any:
        return like * 0

    @offers
    def init_barrier(barrier: Any, arrivals: Any, on: Any) -> None:
        for at, count, is_on in zip(*numbers(barrier, arrivals, on), strict=True):
            if is_on:
                engine().barriers[int(at)] = [0, int(count), int(count), 0]

    @offers
    def arrive(barrier: Any, on: Any) -> None:
        machine = engine()
        for at, is_on in zip(*numbers(barrier, on), strict=True):
            if is_on:
                state = machine.barriers[int(at)]
                assert state[1] > 0, "an arrival too many"
                state[1] -= 1
                machine.complete(int(at))

    @offers
    def announce(barrier: Any, nbytes: Any, on: Any) -> None:
        machine = engine()
        for at, count, is_on in zip(*numbers(barrier, nbytes, on), strict=True):
            if is_on:
                state = machine.barriers[int(at)]
                assert state[1] > 0, "an arrival too many"
                state[1] -= 1
                state[3] += int(count)
                machine.complete(int(at))

    @offers
    def load_bulk(target: Any, source: Any, nbytes: Any, barrier: Any, on: Any) -> None:
        machine = engine()
        for to, at, count, bar, is_on in zip(*numbers(target, source, nbytes, barrier, on), strict=True):
            if is_on:
                assert not (to | at | count) % 16
                assert 0 <= to <= to + count <= SHARED_BYTES
                machine.loads.append((int(bar), int(to), int(at), int(count)))

    @offers
    def store_bulk(target: Any, source: Any, nbytes: Any, on: Any) -> None:
        machine = engine()
        for thread, (to, at, count, is_on) in enumerate(zip(*numbers(target, source, nbytes, on), strict=True)):
            assert not is_on or not (to | at | count) % 16
            machine.groups[thread].append([int(to), int(at), int(count) if is_on else 0, None])

    @offers
    def wait_parity(barrier: Any, parity: Any) -> None:
        machine = engine()
        for at, awaited in zip(*numbers(barrier, parity), strict=True):
            for load in [load for load in machine.loads if load[0] == at]:
                if machine.barriers[int(at)][0] == awaited:
                    machine.land(load)
            assert machine.barriers[int(at)][0] != awaited, "nobody completes the phase"

    @offers
    def wait_stores_read(like: Any, PENDING: Any) -> None:
        machine = engine()
        for groups in machine.groups.values():
            for store in groups[: len(groups) - int(getattr(PENDING, "value", PENDING))]:
                machine.read(store)

    @offers
    def wait_stores(like: Any) -> None:
        machine = engine()
        for thread in list(machine.groups):
            machine.write(thread)

    @offers
    def fence_before_loads(like: Any) -> None:
        pass

    @offers
    def meet(like: Any) -> None:
        pass

    @offers
    def tell(address: Any, value: Any, on: Any) -> None:
        tl.debug_barrier()  # the thread's own stores come first
        tl.store(address, value, mask=on != 0)

    def words(address: Any, width: int, dtype: tl.dtype) -> tl.tensor:
        machine, (addresses,) = engine(), numbers(address)
        machine.may_read(addresses, width)
        values = np.array([machine.shared[at : at + width].view(f"i{width}")[0] for at in addresses])
        if isinstance(address, tl.tensor) and not address.type.is_block():
            return tl.tensor(stock.TensorHandle(values.astype(stock._get_np_dtype(dtype)), dtype), dtype)
        return tensor(values, dtype)

    @offers
    def load_shared(address: Any) -> tl.tensor:
        return words(address, 4, tl.int32)

    @offers
    def load_shared_long(address: Any) -> tl.tensor:
        return words(address, 8, tl.int64)

    def put(address: Any, value: Any, on: Any, width: int) -> None:
        shared = engine().shared
        for at, number, is_on in zip(*numbers(address, value, on), strict=True):
            if is_on:
                shared[at : at + width] = np.array([number], np.int64).astype(f"i{width}").view(np.uint8)

    @offers
    def store_shared(address: Any, value: Any, on: Any) -> None:
        put(address, value, on, 4)

    @offers
    def store_shared_long(address: Any, value: Any, on: Any) -> None:
        put(address, value, on, 8)

    return module


class _Language(ModuleType):
    """Gluon's language as far as it is Triton's."""

    def __getattr__(self, name: str) -> Any:
        return getattr(tl, name)


class _Slots:
    """Rows of shared memory, from its start on."""

    def __init__(self, dtype: tl.dtype, shape: list[Any], row: int = 0) -> None:
        self.dtype, self.shape, self.row = dtype, shape, row

    def index(self, row: Any) -> _Slots:
        return _Slots(self.dtype, self.shape[1:], int(row))

    def load(self, layout: Any) -> tl.tensor:
        kind = np.dtype(stock._get_np_dtype(self.dtype))
        shape = [int(getattr(size, "value", size)) for size in self.shape]
        size = math.prod(shape) * kind.itemsize
        start = self.row * size
        engine().may_read(np.array([start]), size)
        return tensor(engine().shared[start : start + size].view(kind).reshape(shape), self.dtype)

    def _keep_alive(self) -> None:
        assert not engine().loads, "loads that nobody waited for"


def _gluon() -> dict[str, ModuleType]:
    """What stands for Gluon's modules."""
    gluon, language = ModuleType("triton.experimental.gluon"), _Language("triton.experimental.gluon.language")
    gluon.jit = triton.jit  # type: ignore[attr-defined]
    gluon.language = language  # type: ignore[attr-defined]
    offers: Any = language
    offers.BlockedLayout = offers.SwizzledSharedLayout = offers.SliceLayout = lambda *sizes, **options: None
    offers.arange = lambda start, end, layout=None: tl.arange(start, end)
    offers.zeros = lambda shape, dtype, layout=None: tl.zeros(shape, dtype)
    offers.allocate_shared_memory = lambda dtype, shape, layout: _Slots(dtype, shape)
    hopper: Any = ModuleType(f"{language.__name__}.nvidia.hopper")
    hopper.mbarrier = SimpleNamespace(MBarrierLayout=lambda: None, init=lambda barrier, count: None)
    return {module.__name__: module for module in (gluon, language, hopper)}


def bulk_module(entry: str, name: str = "", path: Any = None) -> ModuleType:
    """The module ``bulk_dispatch`` or ``bulk_combine``, its kernels readable by the interpreter.

    Args:
        entry: which of the two.
        name: a module of the kernels, and
        path: where it is found instead.
    """
    shims = _gluon()
    with (
        forgotten(PACKAGE),
        mock.patch.dict(sys.modules, shims),
        mock.patch.object(triton.experimental, "gluon", shims["triton.experimental.gluon"]),
        nullcontext() if path is None else found_at(name, path),
    ):
        importlib.import_module(PACKAGE)
        sys.modules[f"{PACKAGE}.bulk"] = emulated_bulk()
        columns: Any = importlib.import_module(f"{PACKAGE}.bulk_columns")
        columns.tl = tl  # the interpreter looks for it
        return importlib.import_module(f"{PACKAGE}.{entry}")


def mutated_bulk_module(entry: str, module: ModuleType, old: str, new: str) -> ModuleType:
    """One of them with a fault: ``old``, which occurs once in the source of ``module``, replaced by ``new``."""
    return bulk_module(entry, module.__name__, mutated_source(module, old, new))
