"""How the low-latency benchmark times calls: on GPUs with events, on CPU ranks with the clock of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from tokenferry.cli import bench_cuda_cases
from tokenferry.cli.bench_cuda_cases import CudaClock, Stretch
from tokenferry.cli.bench_start import start_together

_HEAD_START = 1_000_000
"""Clock cycles of a GPU, half a millisecond: the host queues what is timed meanwhile."""


class Clock(bench_cuda_cases.Clock, Protocol):
    """How calls are timed."""

    def launch(self, call: Callable[[], object]) -> float:
        """Drain, start together with all ranks, and return the seconds of what a call has the device do."""

    def capture(self, call: Callable[[], object], count: int) -> Callable[[], object] | None:
        """Return what replays a graph of ``count`` calls, or None where there are no graphs."""


class GraphClock(CudaClock):
    """Events on the current stream of the current GPU."""

    def launch(self, call: Callable[[], object]) -> float:
        """See :meth:`Clock.launch`."""
        self.drain()
        start_together()
        torch.cuda._sleep(_HEAD_START)  # type: ignore[no-untyped-call]
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) * 1e-3

    def capture(self, call: Callable[[], object], count: int) -> Callable[[], object]:
        """See :meth:`Clock.capture`."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(count):
                call()
        return graph.replay


class HostClock:
    """Wall time of CPU ranks, which have done what a call asks for when it returns."""

    def drain(self) -> None:
        """See :meth:`Clock.drain`."""

    def stretch(self, call: Callable[[], object], count: int, ahead: int = 0) -> Stretch:
        """See :meth:`Clock.stretch`."""
        start_together()
        for _ in range(ahead):
            call()
        begin = time.perf_counter()
        for _ in range(count):
            call()
        seconds = time.perf_counter() - begin
        return Stretch(seconds, seconds)

    def launch(self, call: Callable[[], object]) -> float:
        """See :meth:`Clock.launch`."""
        return self.stretch(call, 1).device

    def capture(self, call: Callable[[], object], count: int) -> None:
        """See :meth:`Clock.capture`."""
