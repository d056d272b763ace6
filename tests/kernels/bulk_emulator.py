"""The bulk-copy kernels in the simulator: Gluon read as Triton, the engine played.

A tensor has an element for each thread, and threads of a program go in step. Copies are late: a load lands when its
barrier is waited for, at the earliest by chance, a store reads shared memory and later writes global memory likewise.
So a wait that is missing shows as wrong data, and a wait for what nobody sends ends the program.
"""

from __future__ import annotations

import ctypes
import importlib
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
from tests.kernels.mutants import _forgotten, _found_at

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
    return tl.tensor(handle, tl.block_type(dtype, [len(values)]))


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
    def arrive(barrier: Any, on: Any) -> None:
        announce(barrier, 0, on)

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

    def words(address: Any, width: int, dtype: tl.dtype) -> tl.tensor:
        shared = engine().shared
        values = [shared[at : at + width].view(f"i{width}")[0] for at in numbers(address)[0]]
        if not address.type.is_block():
            return tl.tensor(stock.TensorHandle(np.array(values), dtype), dtype)
        return tensor(np.array(values), dtype)

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


class _Shared:
    """A kernel's first allocation of shared memory, which lies at its start: slots, one after the other."""

    def __init__(self, dtype: tl.dtype, shape: list[Any], layout: Any) -> None:
        self._dtype, self._width = dtype, int(getattr(shape[-1], "value", shape[-1]))

    def index(self, slot: Any) -> Any:
        nbytes = self._width * self._dtype.primitive_bitwidth // 8
        first = int(numbers(slot)[0][0]) * nbytes
        values = engine().shared[first : first + nbytes].copy().view(stock._get_np_dtype(self._dtype))
        handle = stock.TensorHandle(values, self._dtype)
        return SimpleNamespace(load=lambda layout: tl.tensor(handle, tl.block_type(self._dtype, [self._width])))

    def _keep_alive(self) -> None:
        assert not engine().loads, "loads that nobody waited for"


def _gluon() -> dict[str, ModuleType]:
    gluon, language = ModuleType("triton.experimental.gluon"), _Language("triton.experimental.gluon.language")
    gluon.jit = triton.jit  # type: ignore[attr-defined]
    gluon.language = language  # type: ignore[attr-defined]
    language.BlockedLayout = lambda *sizes: sizes  # type: ignore[attr-defined]
    language.arange = lambda start, end, layout=None: tl.arange(start, end)  # type: ignore[attr-defined]
    language.thread_barrier = lambda: tl.debug_barrier()  # type: ignore[attr-defined]
    language.zeros = lambda shape, dtype, layout=None: tl.zeros(shape, dtype)  # type: ignore[attr-defined]
    language.SwizzledSharedLayout = lambda **options: options  # type: ignore[attr-defined]
    language.allocate_shared_memory = _Shared  # type: ignore[attr-defined]
    nvidia, hopper = (ModuleType(f"{language.__name__}.{name}") for name in ("nvidia", "nvidia.hopper"))
    hopper.mbarrier = SimpleNamespace(MBarrierLayout=dict, init=lambda *_, **__: None)  # type: ignore[attr-defined]
    return {module.__name__: module for module in (gluon, language, nvidia, hopper)}


def bulk_dispatch(name: str = "", path: Any = None) -> ModuleType:
    """The module ``bulk_dispatch``, its kernels readable by the interpreter.

    Args:
        name: a module of the kernels, and
        path: where it is found instead.
    """
    return _readable("bulk_dispatch", name, path)


def bulk_combine(name: str = "", path: Any = None) -> ModuleType:
    """The module ``bulk_combine`` likewise."""
    return _readable("bulk_combine", name, path)


def _readable(wanted: str, name: str, path: Any) -> ModuleType:
    shims = _gluon()
    with (
        _forgotten(PACKAGE),
        mock.patch.dict(sys.modules, shims),
        mock.patch.object(triton.experimental, "gluon", shims["triton.experimental.gluon"]),
        nullcontext() if path is None else _found_at(name, path),
    ):
        importlib.import_module(PACKAGE)
        sys.modules[f"{PACKAGE}.bulk"] = emulated_bulk()
        columns: Any = importlib.import_module(f"{PACKAGE}.bulk_columns")
        columns.tl = tl  # the interpreter looks for it
        return importlib.import_module(f"{PACKAGE}.{wanted}")
