"""What runs on every rank of a soak: random operations, the same on all ranks, each at a time of its own.

An *episode* is the life of one Buffer. Ranks draw what they do together from one generator, and what each does for
itself (delays, the order of its hooks) from another.
"""

from __future__ import annotations

import ctypes
import gc
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tokenferry.buffer import Buffer
from tokenferry.cli import soak_graphs
from tokenferry.cli.soak_elastic import Elastic
from tokenferry.cli.soak_faults import AFTERWARDS, DURING, Bench, expect
from tokenferry.cli.soak_low_latency import MOST_EXPERTS, MOST_HIDDEN, MOST_TOKENS, burst, warm
from tokenferry.cli.soak_memory import Look
from tokenferry.cli.soak_world import (
    FLOATS,
    Chance,
    World,
    factor_of,
    random_shape,
    random_values,
    rows,
    same,
    same_rows,
)
from tokenferry.modes.paranoid import PARANOID_VARIABLE
from tokenferry.nn import functional

TIMEOUT = 60.0
"""Seconds that a rank waits for another: on a loaded machine a rank may be late without being stuck."""
_MOST_ALIVE = 4
"""Handles that are kept for later calls, also on later Buffers."""
_STAGES = (0, 0, 4096, 65536, 1 << 20)
_MOST_DELAY = 0.005
_FAULT_SHARE = 0.12
_PARANOID_SHARE = 0.15
"""Of Buffers."""
_ELASTIC_SHARE = 0.3
"""Of Buffers on one node, that have an ElasticBuffer beside them."""
_WIDTHS = (1, 2, 3, 64, 225)
"""Of rows along a handle, in 16 bytes."""
_KINDS = 3
"""Of shapes and dtypes on GPUs; see :class:`tokenferry.cli.soak_world.Chance`."""
_LOOK_EVERY = 6
"""Operations between two looks at the clock, which all ranks take together."""


@dataclass(frozen=True)
class Settings:
    """What a soak is asked for."""

    seconds: float
    seed: int
    device: str
    most_tokens: int


@dataclass
class Report:
    """What one rank did, and what it held."""

    episodes: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    layouts: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    """What was special: Buffers and steps."""
    bytes_moved: int = 0
    """Read from other ranks' memory, and sent to other nodes."""
    waited_ns: int = 0
    segments: int = 0
    """Mapped when all Buffers were gone."""
    files: tuple[int, int] = (0, 0)
    """Open after the warm-up, and in the end."""
    resident: tuple[int, int] = (0, 0)
    """Bytes likewise."""
    resident_peak: int = 0
    looks: list[Look] = field(default_factory=list)
    """After every Buffer."""
    warm_seconds: float = 0.0
    """When the warm-up was over."""


def layouts_of(num_ranks: int) -> list[tuple[int, ...]]:
    """Node of every rank: all on one node, and every way to have nodes of the same size."""
    sizes = [size for size in range(1, num_ranks) if num_ranks % size == 0]
    blocks = [tuple(rank // size for rank in range(num_ranks)) for size in sizes]
    mixed = [tuple(rank % (num_ranks // size) for rank in range(num_ranks)) for size in sizes]
    return [(0,) * num_ranks, *dict.fromkeys(blocks + mixed)]


def soak(rank: int, num_ranks: int, settings: Settings) -> Report:
    """Run episodes until the time is over.

    Raises:
        AssertionError: a result is wrong, or an error was not what it should be; names the episode.
    """
    return _Soak(rank, num_ranks, settings).run()


class _Soak:
    def __init__(self, rank: int, num_ranks: int, settings: Settings) -> None:
        self.settings = settings
        self.rank, self.num_ranks = rank, num_ranks
        self.common = Chance(settings.seed)
        self.own = random.Random(settings.seed * 1009 + rank + 1)
        self.device = torch.device(settings.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)
            self.common.kinds = [f"{settings.seed} {number}" for number in range(_KINDS)]
        self.alive: list[tuple[tuple[int, ...], World, Any]] = []
        """Layout, world and handle of earlier dispatches."""
        self.report = Report()
        self._replays: soak_graphs.Replays | None = None
        self.what = "the start"

    def run(self) -> Report:
        self.started = time.monotonic()
        self.ends = self.started + self.settings.seconds
        report = self.report
        report.warm_seconds = self.settings.seconds / 4
        layouts = layouts_of(self.num_ranks) if self.device.type == "cpu" else [(0,) * self.num_ranks]
        warmed = False
        while True:
            layout = self.common.choice(layouts) if report.episodes % 2 else layouts[0]
            try:
                self._episode(layout)
            except Exception as error:
                where = f"episode {report.episodes} (nodes {layout}), {self.what}"
                raise AssertionError(f"{where}: {type(error).__name__}: {error}") from error
            report.episodes += 1
            report.layouts["x".join(str(n) for n in (max(layout) + 1, layout.count(layout[0])))] += 1
            goes_on = self._goes_on()
            self._look(warmed)
            warmed = warmed or time.monotonic() > self.started + report.warm_seconds
            if not goes_on:
                break
        self.alive.clear()
        gc.collect()
        report.segments = len(segments())
        return report

    def _goes_on(self) -> bool:
        """What rank 0's clock says."""
        word = torch.tensor([int(time.monotonic() < self.ends)])
        dist.broadcast(word, 0)
        return bool(word.item())

    def _look(self, warmed: bool) -> None:
        gc.collect()
        _trim()
        report, files, resident = self.report, len(os.listdir("/proc/self/fd")), resident_bytes()
        report.files = (report.files[0] if warmed else files, files)
        report.resident = (report.resident[0] if warmed else resident, resident)
        report.resident_peak = max(report.resident_peak, resident)
        seconds = time.monotonic() - self.started
        report.looks.append(Look(seconds, resident, files, self._device_bytes(), self._kernels()))

    def _kernels(self) -> int:
        if self.device.type == "cpu":
            return 0
        from tokenferry.dataplane.cuda.launch import Kernel  # CPU ranks need no Triton

        return Kernel.variants

    def _device_bytes(self) -> int:
        """Without what torch keeps of its own accord; all ranks look at the same time, since they may share a GPU."""
        if self.device.type == "cpu":
            return 0
        torch.cuda.empty_cache()
        dist.barrier()
        free, total = torch.cuda.mem_get_info(self.device)
        dist.barrier()
        return total - free

    def late(self) -> None:
        """Come later than the others, sometimes."""
        if self.own.random() < 0.2:
            time.sleep(self.own.random() * _MOST_DELAY)

    def _episode(self, layout: tuple[int, ...]) -> None:
        common = self.common
        exact = common.random() < 0.3
        one_node = max(layout) == 0
        is_paranoid, has_elastic = common.random() < _PARANOID_SHARE, one_node and common.random() < _ELASTIC_SHARE
        self.what = "construction"
        low_latency_bytes = Buffer.get_low_latency_rdma_size_hint(
            MOST_TOKENS, MOST_HIDDEN, self.num_ranks, MOST_EXPERTS * self.num_ranks
        )
        elastic: Elastic | None = None
        with _paranoid(is_paranoid):
            buffer = Buffer(
                dist.group.WORLD,
                common.choice(_STAGES),
                low_latency_bytes if self.device.type == "cuda" else 0,
                low_latency_mode=True,
                exact_combine=exact,
                timeout=TIMEOUT,
                device=self.device,
                node=str(layout[self.rank]),
            )
            bench = Bench(buffer, self.rank, self.num_ranks, layout, exact, self.device, common, self.own)
            try:
                self.what = "warm-up"
                warm(buffer, common.kinds)
                if has_elastic:
                    elastic = Elastic(bench, TIMEOUT)
                self._replays = None
                self._operate(bench, elastic, is_paranoid)
            except BaseException:
                buffer.destroy()  # else the others would wait for this rank until the deadline
                if elastic is not None:
                    elastic.buffer.destroy()
                raise
        self.report.ways["Buffers in paranoid mode"] += is_paranoid
        self.report.ways["ElasticBuffers beside them"] += has_elastic
        self._replays = None
        counted = buffer.stats()
        for of in counted.operations:
            self.report.calls[of.kind] += of.count
            self.report.bytes_moved += sum(peer.bytes_read for peer in of.peers)
            self.report.waited_ns += of.idle.total_ns
        self.report.bytes_moved += counted.rail_bytes_sent
        can_end = one_node and self.num_ranks > 1 and self.device.type == "cpu"
        if can_end and common.random() < 0.3:
            name = common.choice(list(AFTERWARDS))
            self.what = f"fault: {name}"
            AFTERWARDS[name](bench)
            self.report.faults[name] += 1
        if common.random() < 0.5:
            buffer.destroy()

    def _operate(self, bench: Bench, elastic: Elastic | None, is_paranoid: bool) -> None:
        for turn in range(self.common.randrange(6, 30)):
            if turn % _LOOK_EVERY == _LOOK_EVERY - 1 and not self._goes_on():
                break
            self.late()
            self._step(bench, elastic, is_paranoid)

    def _step(self, bench: Bench, elastic: Elastic | None, is_paranoid: bool) -> None:
        common, buffer = self.common, bench.buffer
        faults = [name for name, fault in DURING.items() if fault.fits(bench)]
        if faults and common.random() < _FAULT_SHARE:
            name = common.choice(faults)
            self.what = f"fault: {name}"
            DURING[name].inject(bench)
            expect(buffer.is_available(), f"the Buffer is unusable after {name}")
            self.report.faults[name] += 1
            return
        here = [(world, handle) for layout, world, handle in self.alive if layout == bench.layout]
        names = ["dispatch", "cached", "combine", "combine", "burst", "operators"]
        names += ["elastic"] * 3 if elastic is not None else []
        names += ["graph"] if soak_graphs.fits(bench) and not is_paranoid else []
        name = common.choice(names)
        if name == "burst":
            self.what = "low-latency burst"
            burst(bench, self.late)
        elif name == "operators":
            self._operators(bench)
        elif name == "graph":
            self.what = "replay of a graph"
            self._replays = self._replays or soak_graphs.Replays(bench)
            self.report.ways["replays of graphs"] += self._replays.step()
        elif name == "elastic" and elastic is not None:
            self.what = "ElasticBuffer"
            self.report.calls[elastic.step()] += 1
        elif name == "dispatch" or not here:
            self._dispatch(bench)
        else:
            world, handle = common.choice(here)
            self.what = f"{name} along a handle of {world.shape}"
            if name == "cached":
                self._cached(bench, world, handle)
            else:
                self._combine(bench, world, handle)

    def _dispatch(self, bench: Bench) -> None:
        common = self.common
        world = World(random_shape(common, self.num_ranks, self.settings.most_tokens), self.rank)
        alignment, is_worst = common.choice([1, 1, 8]), common.random() < 0.3
        spare = common.randrange(20)
        worst = max(1, world.num_received[self.rank] + spare) if is_worst else 0
        self.what = f"dispatch of {world.shape}, {worst} worst tokens"
        result = bench.dispatch(world, expert_alignment=alignment, num_worst_tokens=worst)
        world.check_received(result, alignment, worst)
        self.alive.append((bench.layout, world, result[4]))
        while len(self.alive) > _MOST_ALIVE:
            self.alive.pop(common.randrange(len(self.alive)))

    def _cached(self, bench: Bench, world: World, handle: Any) -> None:
        values = random_values(world.shape, self.common, self.common.kind(), [*FLOATS, torch.uint8], _WIDTHS)
        got = bench.buffer.dispatch(values[self.rank].to(self.device), handle=handle)[0]
        same_rows(got[: world.num_received[self.rank]], (world.received(values), None))

    def _operators(self, bench: Bench) -> None:
        """There and back through operators, and backward, which is the same."""
        shape = random_shape(self.common, self.num_ranks, self.settings.most_tokens)
        world = World(replace(shape, dtype=self.common.kind().choice(FLOATS), num_scales=0), self.rank)
        self.what = f"operators on {world.shape}"
        mine, nodes = world.mine, list(bench.layout)
        x = mine.x.to(self.device).requires_grad_()
        top = mine.ids.to(self.device), mine.weights.to(self.device)
        got = functional.dispatch(bench.buffer, x, *top, world.num_experts)
        same_rows(got.x.detach(), world.received_x())
        y = functional.combine(bench.buffer, got.x * factor_of(self.rank), got.handle)
        same("combined_x of operators", y.detach(), world.combined(mine.x, [], nodes, bench.exact))
        made = torch.Generator().manual_seed(self.common.getrandbits(40) + self.rank)
        gradient = rows(mine.x.dtype, len(mine.x), world.shape.row_bytes, made)
        (found,) = torch.autograd.grad(y, x, gradient.to(self.device))
        same("gradient of x", found, world.combined(gradient, [], nodes, bench.exact))
        self.report.ways["steps through operators"] += 1

    def _combine(self, bench: Bench, world: World, handle: Any) -> None:
        common, kind, mine = self.common, self.common.kind(), world.mine
        values = random_values(world.shape, common, kind, FLOATS, _WIDTHS)
        num_biases, has_weights = kind.choice([0, 0, 1, 2]), kind.random() < 0.5
        made = torch.Generator().manual_seed(common.getrandbits(40) + self.rank)
        biases = [torch.randn(values[self.rank].shape, generator=made).to(values[0].dtype) for _ in range(num_biases)]
        x = world.expert_rows(values)
        first = self.rank * world.shape.local_experts
        ids = world.received([one.ids for one in world.inputs])
        local = (ids >= first) & (ids < first + world.shape.local_experts)
        weights = torch.where(local, world.received([one.weights for one in world.inputs]), 0.0)
        worst = len(handle[7] if max(bench.layout) else handle[3])
        x, weights = (
            torch.cat([t, t.new_full((worst - len(t), t.size(1)), 7)]).to(self.device) for t in (x, weights)
        )
        given = [bias.to(self.device) for bias in biases]
        bias = (given[0], given[1]) if num_biases == 2 else given[0] if given else None
        combined, summed, _ = bench.buffer.combine(x, handle, weights if has_weights else None, bias=bias)
        same("combined_x", combined, world.combined(values[self.rank], biases, list(bench.layout), bench.exact))
        if summed is not None:
            same("combined_topk_weights", summed, torch.where(mine.ids >= 0, mine.weights, 0.0))


@contextmanager
def _paranoid(is_wanted: bool) -> Iterator[None]:
    """Let Buffers that are made in the block be paranoid, or not."""
    before = os.environ.get(PARANOID_VARIABLE)
    os.environ[PARANOID_VARIABLE] = str(int(is_wanted))
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARANOID_VARIABLE]
        else:
            os.environ[PARANOID_VARIABLE] = before


def _trim() -> None:
    """Let the allocator give back what it keeps, where it can: what is left is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def segments() -> list[str]:
    """Shared memory of tokenferry that this process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in lines if "/tokenferry-" in line]


def resident_bytes() -> int:
    """Of this process, without shared memory."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
