"""Compile kernels ahead of their first launch, and launch them with as little host work as possible.

A launch through ``kernel[grid](...)`` binds, specialises and looks up every time. Here a variant is compiled once for
its constexpr parameters, whatever the values of the others, and launched with addresses and plain integers.
"""

from __future__ import annotations

import copy
import functools
import importlib
import operator
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple, TypeAlias

import torch

from tokenferry.dataplane.cuda import kernels

REGISTERS = {1: 255, 2: 255, 4: 255, 8: 208, 16: 128}
"""Registers a thread may take, by warps: one block an SM is enough, and without a limit some variants are spilled."""


Job: TypeAlias = Callable[[], object]
"""Compiles a variant that somebody keeps, if that has not been done."""


def compile_together(jobs: Iterable[Job], rank: int, num_ranks: int) -> None:
    """Do all jobs: first this rank's share, then those of the others, the last ones of each first.

    What a rank comes to there others have mostly compiled, and left in Triton's cache, where they share one. A rank
    that has less to do takes work from the end of what another one has.
    """
    all_jobs = list(jobs)
    shares = [all_jobs[first::num_ranks] for first in range(num_ranks)]
    for job in (*shares[rank], *chain(*(share[::-1] for share in (*shares[rank + 1 :], *shares[:rank])))):
        job()


@functools.cache
def settle_keys() -> None:
    """Have Triton find the keys of all functions of the kernels, in one order.

    Before Triton 3.9 the key of a function, part of that of a kernel in the cache of files, depends on which of those
    it calls had theirs before: on what this process has compiled so far. Another process would not find the kernel.
    """
    for found in sorted(module.name for module in pkgutil.iter_modules(kernels.__path__)):
        for value in vars(importlib.import_module(f"{kernels.__name__}.{found}")).values():
            getattr(value, "cache_key", None)


class Variant(NamedTuple):
    """A compiled kernel."""

    run: Any
    """Takes the grid, the stream, ``leading``, the kernel's arguments, ``constants``."""
    leading: tuple[Any, ...]
    constants: tuple[int | None, ...]
    """None for each, and before these what :meth:`ending` was given."""
    takes_tuple: bool = False
    """Whether it takes arguments and constants as one."""

    def ending(self, *numbers: int) -> Variant:
        """The same with the last arguments of all launches given."""
        return self._replace(constants=(*numbers, *self.constants))

    def launch(self, grid: int, stream: int, arguments: Sequence[int]) -> None:
        """Queue ``grid`` programs with addresses and integers, in the order of the kernel's parameters."""
        run, leading, constants, takes_tuple = self
        if takes_tuple:
            run(grid, 1, 1, stream, *leading, (*arguments, *constants))
        else:
            run(grid, 1, 1, stream, *leading, *arguments, *constants)


class Address(int):
    """Stands for a tensor where only its address counts: a view would take ten times as long to make."""

    data_ptr = int.__int__


Placed: TypeAlias = torch.Tensor | Address


class Call(NamedTuple):
    """A variant, with the last arguments of all its launches, and how many programs these have."""

    variant: Variant
    grid: int

    def launch(
        self,
        stream: int,
        context: Sequence[int],
        tensors: Sequence[Placed | None],
        places: Sequence[int],
    ) -> None:
        """Queue it, for a kernel whose parameters come in this order."""
        variant, grid = self
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        variant.launch(grid, stream, (*context, *addresses, *places))


def _below(run: Any, leading: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], bool]:
    """The function that Triton's launcher calls in the end, and what it puts in front of a kernel's arguments.

    Triton's own Python takes longer than that function. What it passes on differs between its versions, so it is
    asked: it launches nothing, twice. Where the answers are not the same (a kernel with scratch memory), and for
    launchers of another make, it is Triton's own that is called. Then: whether it takes the arguments as a tuple.
    """
    asked, passed = copy.copy(run), []
    try:
        launch = run.launch
        asked.launch = lambda *arguments: passed.append(arguments)
        for stream in (5, 6):
            asked(3, 1, 1, stream, *leading, _ARGUMENT)
        found, again = passed
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return run, leading, False
    between = found[4:-1]
    is_plain = len(found) == len(again) and all(map(operator.is_, between, again[4:-1]))
    takes_tuple = type(found[-1]) is tuple and found[-1] == (_ARGUMENT,)
    if found[:4] == (3, 1, 1, 5) and (found[-1] is _ARGUMENT or takes_tuple) and is_plain:
        return launch, between, takes_tuple
    return run, leading, False


_ARGUMENT = object()


class Kernel:
    """A kernel, to be compiled for values of its constexpr parameters.

    Attributes:
        types: as given.
        variants: how many have been made ready in this process, of all kernels.

    Args:
        kernel: a ``triton.jit`` or ``gluon.jit`` function whose constexpr parameters come last.
        types: dtype of what each pointer parameter points to, or None for an integer, in order.
        options: of the compiler, beside those that every kernel has.
        prepare: called with the module of a variant that has been loaded.
    """

    variants = 0

    def __init__(
        self,
        kernel: Any,
        types: Sequence[torch.dtype | None],
        options: Mapping[str, object] | None = None,
        prepare: Callable[[int], object] | None = None,
    ) -> None:
        self._kernel = kernel
        self.types = tuple(types)
        self._options = dict(options or {})
        self._prepare = prepare

    def variant(self, num_warps: int, **constants: object) -> Variant:
        """Compile the variant for these constexpr parameters; the caller keeps it."""
        compiled = self.compile(num_warps, 1, **constants)
        run = compiled.run  # loads the module
        if self._prepare is not None:
            self._prepare(compiled.module)
        leading = (compiled.function, compiled.packed_metadata, None, None, None)
        Kernel.variants += 1
        below, passed, takes_tuple = _below(run, leading)
        return Variant(below, passed, (None,) * len(constants), takes_tuple)

    def compile(self, num_warps: int, number: int, **constants: object) -> Any:
        """Compile as for a launch whose integers are all ``number``, which is to make no difference."""
        settle_keys()
        values = [number if dtype is None else dtype for dtype in self.types]
        options = {"num_warps": num_warps, "maxnreg": REGISTERS[num_warps], **self._options}
        return self._kernel.warmup(*values, **constants, grid=(1,), **options)
