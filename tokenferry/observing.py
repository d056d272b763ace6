"""What is seen of a Buffer's operations: counts, ranges for profilers, and lines for the debugging eye."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterable
from time import monotonic_ns
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch.autograd import profiler

from tokenferry.dataplane import OperationKind
from tokenferry.stats import BufferStats

if TYPE_CHECKING:
    from tokenferry.runtime import Runtime
    from tokenferry.runtime_cuda import CudaRuntime

DEBUG_VARIABLE = "TOKENFERRY_DEBUG"

logger = logging.getLogger("tokenferry")

_KIND_NAMES = {kind.value: kind.name.lower() for kind in OperationKind}

Method = TypeVar("Method", bound=Callable[..., Any])


class StatsMethods:
    """The methods of Buffer that tell what it did."""

    rank: int
    group_size: int
    _debug = False

    def _live_runtime(self) -> Runtime | CudaRuntime:
        raise NotImplementedError

    def stats(self, *, reset: bool = False) -> BufferStats:
        """What this rank has counted: operations, time in them, bytes, and for whom it waited. Local, and cheap.

        On a GPU what its kernels have waited is copied from the device, some 50 us; no kernel is waited for.

        Args:
            reset: begin again at 0 afterwards.

        Raises:
            BufferStateError: the Buffer was destroyed, or a CUDA graph is being captured.
        """
        runtime = self._live_runtime()
        waits = runtime.kernel_waits(reset=reset)
        counted = runtime.recorder.snapshot(self.rank, _KIND_NAMES, self.group_size, runtime.rail_bytes(), waits)
        if reset:
            runtime.recorder.reset()
        return counted


def debug_wanted() -> bool:
    """Whether ``TOKENFERRY_DEBUG`` asks for a line about every operation; makes sure that it is seen."""
    if os.environ.get(DEBUG_VARIABLE, "0") in ("", "0"):
        return False
    if not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
        logger.addHandler(handler)
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    return True


def observed(kind: OperationKind, cached: OperationKind | None = None, name: str = "") -> Callable[[Method], Method]:
    """Count the calls of a method of Buffer, and show them to whom it may concern.

    While a profiler of torch records what the host does, each call is a range of its own, named
    ``tokenferry::<method>``; ``torch.autograd.profiler.emit_nvtx`` turns these into NVTX ranges. Profiles of kernels
    alone do not contain them.

    Args:
        kind: what to count a call as.
        cached: likewise with a handle, which is the second argument.
        name: to show it by; by default that of the method.
    """

    def decorate(method: Method) -> Method:
        shown = name or method.__name__

        @functools.wraps(method)
        def observe(self: Any, *args: Any, **kwargs: Any) -> Any:
            counted = kind
            if cached is not None and (args[1] if len(args) > 1 else kwargs.get("handle")) is not None:
                counted = cached
            runtime = self.runtime
            started = monotonic_ns()
            if self._debug or profiler._is_profiler_enabled:
                result = _shown(self, method, shown, args, kwargs)
            else:
                result = method(self, *args, **kwargs)
            if runtime is not None:
                runtime.recorder.called(counted, monotonic_ns() - started)
            return result

        return cast(Method, observe)

    return decorate


def _shown(buffer: Any, method: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    """Call a method in a range of the profiler, if there is one, and log a line about it in debug mode."""
    started = monotonic_ns()
    try:
        if profiler._is_profiler_enabled:
            with profiler.record_function(f"tokenferry::{name}"):
                result = method(buffer, *args, **kwargs)
        else:
            result = method(buffer, *args, **kwargs)
    except BaseException as error:
        if buffer._debug:
            what = f"raised {type(error).__name__}: {error}"
            _tell(buffer, name, monotonic_ns() - started, what)
        raise
    if buffer._debug:
        spent, given = monotonic_ns() - started, [*args, *kwargs.values()]
        _tell(buffer, name, spent, f"{_shapes(given)} -> {_shapes(_flat(result))}")
    return result


def _tell(buffer: Any, name: str, nanoseconds: int, what: str) -> None:
    runtime = buffer.runtime
    epoch = "?" if runtime is None or not runtime.epoch else runtime.epoch
    logger.info("rank %d epoch %s %s %.3f ms: %s", buffer.rank, epoch, name, nanoseconds / 1e6, what)


def _flat(result: object) -> Iterable[object]:
    if isinstance(result, (tuple, list)):
        return [part for element in result for part in _flat(element)]
    return [result]


def _shapes(values: Iterable[object]) -> str:
    """Dtypes and shapes of the tensors among some values, and in tuples among them."""
    tensors = [value for value in _flat(list(values)) if isinstance(value, torch.Tensor)]
    return " ".join(f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in tensors)
