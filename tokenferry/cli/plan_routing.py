"""Where tokens go: the cluster and the shape that ``tokenferry plan`` is asked about, and ranks and nodes a token.

T tokens a rank, K choices, E experts, G nodes of L ranks, R = G L. Experts lie on ranks in order, E / R each.
A token goes to f distinct ranks on g distinct nodes, on average. ``docs/planning.md`` has the formulas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tokenferry.modes.inputs import MAX_TOPK
from tokenferry.validation import check_int, require

NVLINK_GBPS = 323.0
"""One direction, both busy, rows of 14336 bytes pulled by 8 SMs or more: measured between two H100."""
NETWORK_GBPS = 50.0
"""Of one GPU, one direction: the line rate of a 400 Gb/s adapter, without headers."""
MOST_SMS = 132
"""Of an H100."""
MOST_CHUNKS = 64
MOST_RANKS = 4096
MOST_EXPERTS = 1 << 17
SCALE_BLOCK = 128
DTYPES = ("bf16", "fp8")

_SAMPLED_VALUES = 1 << 22
_MOST_SAMPLES, _FEWEST_SAMPLES = 8192, 64


@dataclass(frozen=True)
class Machine:
    """A cluster: nodes, GPUs of each, GB/s of NVLink and network for a GPU in one direction, SMs an operation."""

    nodes: int = 1
    gpus_per_node: int = 8
    nvlink: float = NVLINK_GBPS
    network: float = NETWORK_GBPS
    sms: int = 20
    chunks: int = 0
    """That an operation between nodes is cut in; 0: as many as make it shortest."""

    @property
    def ranks(self) -> int:
        """R."""
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Shape:
    """What travels: tokens of each rank, elements of a row, and how tokens choose experts."""

    tokens: int = 4096
    hidden: int = 7168
    dtype: str = "bf16"
    topk: int = 8
    experts: int = 256
    groups: int = 1
    topk_groups: int = 1
    skew: float = 0.0
    seed: int = 0

    @property
    def row_bytes(self) -> int:
        """Of a dispatched row, scales included."""
        return self.hidden + 4 * self.hidden // SCALE_BLOCK if self.dtype == "fp8" else 2 * self.hidden

    @property
    def combine_row_bytes(self) -> int:
        """Of a row on its way back."""
        return 2 * self.hidden


def check(machine: Machine, shape: Shape) -> None:
    """Raise ArgumentError where the numbers are out of range or do not fit together."""
    for name in ("nodes", "gpus_per_node"):
        check_int(name, getattr(machine, name), minimum=1)
    require(machine.ranks <= MOST_RANKS, "nodes", machine.nodes, f"at most {MOST_RANKS} ranks in all")
    for name, rate in (("nvlink", machine.nvlink), ("network", machine.network)):
        require(0 < rate < math.inf, name, rate, "GB/s above 0")
    check_int("sms", machine.sms, minimum=2, multiple_of=2)
    require(machine.sms <= MOST_SMS, "sms", machine.sms, f"at most {MOST_SMS}")
    for name in ("chunks", "seed"):
        check_int(name, machine.chunks if name == "chunks" else shape.seed, minimum=0)
    for name in ("tokens", "topk", "groups", "topk_groups"):
        check_int(name, getattr(shape, name), minimum=1)
    most = min(MOST_CHUNKS, shape.tokens)
    require(machine.chunks <= most, "chunks", machine.chunks, f"at most {most}, of at least a token each")
    require(shape.dtype in DTYPES, "dtype", shape.dtype, " or ".join(DTYPES))
    check_int("hidden", shape.hidden, minimum=1, multiple_of=SCALE_BLOCK if shape.dtype == "fp8" else 8)
    check_int("experts", shape.experts, minimum=machine.ranks, multiple_of=machine.ranks)
    require(shape.experts <= MOST_EXPERTS, "experts", shape.experts, f"at most {MOST_EXPERTS}")
    require(shape.experts % shape.groups == 0, "groups", shape.groups, f"a divisor of {shape.experts} experts")
    require(shape.topk_groups <= shape.groups, "topk_groups", shape.topk_groups, f"at most {shape.groups} groups")
    reachable = min(shape.experts // shape.groups * shape.topk_groups, MAX_TOPK)
    require(shape.topk <= reachable, "topk", shape.topk, f"at most {reachable}")
    require(0 <= shape.skew <= 10, "skew", shape.skew, "from 0 (uniform) to 10")


class Routing(NamedTuple):
    """Where a token goes, on average over all tokens."""

    ranks: float
    """Distinct ranks (f)."""
    nodes: float
    """Distinct nodes (g)."""
    busiest_rank: float
    """Probability that the rank with the most popular experts gets the token; f / R without skew."""
    busiest_node: float
    """Likewise; g / G without skew."""
    ranks_in_busiest_node: float
    """Distinct ranks in that node; f / G without skew."""
    busiest_choices: float
    """Choices that fall on the busiest rank; K / R without skew."""
    samples: int = 0
    """Random tokens that this was estimated with; 0: exact."""
    ranks_error: float = 0.0
    """Standard error of ``ranks``."""
    nodes_error: float = 0.0
    busiest_error: float = 0.0
    """Standard error of ``busiest_rank``."""


def route(machine: Machine, shape: Shape) -> Routing:
    """Expected destinations of a token: exact where it may choose any experts, all alike; else sampled."""
    if shape.skew == 0 and shape.topk_groups == shape.groups:
        ranks, nodes = (
            places * hit_probability(shape.experts, shape.experts // places, shape.topk)
            for places in (machine.ranks, machine.nodes)
        )
        return _even(machine, shape, ranks, nodes)
    return _sampled(machine, shape)


def hit_probability(experts: int, of_place: int, topk: int) -> float:
    """That at least one of K distinct, uniform choices falls on a place: 1 - C(E - e, K) / C(E, K)."""
    return 1 - math.comb(experts - of_place, topk) / math.comb(experts, topk)


def _even(machine: Machine, shape: Shape, ranks: float, nodes: float) -> Routing:
    """All ranks and nodes alike."""
    R, G = machine.ranks, machine.nodes
    return Routing(ranks, nodes, ranks / R, nodes / G, ranks / G, shape.topk / R)


def popularity(shape: Shape) -> npt.NDArray[np.float64]:
    """Weights of the experts, 1 / place ** skew in a seeded random order; float64 [E]."""
    order = np.random.default_rng(shape.seed).permutation(shape.experts)
    return np.asarray((1.0 + order) ** -shape.skew)


def choose(shape: Shape, samples: int) -> npt.NDArray[np.int64]:
    """Choices of random tokens, distinct experts; int64 [samples, K].

    Experts are drawn one after the other in proportion to their weights, without replacement: the K earliest of
    exponential clocks. A token first keeps the groups whose earliest expert is among the M earliest of groups.
    """
    generator = np.random.default_rng([shape.seed, 1])
    clocks = generator.standard_exponential((samples, shape.experts), dtype=np.float32)
    clocks /= popularity(shape).astype(np.float32)
    if shape.topk_groups < shape.groups:
        grouped = clocks.reshape(samples, shape.groups, -1)
        late = np.argpartition(grouped.min(axis=2), shape.topk_groups - 1, axis=1)[:, shape.topk_groups :]
        np.put_along_axis(grouped, late[:, :, None], np.float32(np.inf), axis=1)
    return np.argpartition(clocks, shape.topk - 1, axis=1)[:, : shape.topk]


def _sampled(machine: Machine, shape: Shape) -> Routing:
    samples = max(_FEWEST_SAMPLES, min(_MOST_SAMPLES, _SAMPLED_VALUES // shape.experts))
    ranks = choose(shape, samples) // (shape.experts // machine.ranks)
    nodes = ranks // machine.gpus_per_node
    f, f_error = _mean(_distinct(ranks))
    g, g_error = _mean(_distinct(nodes))
    even = _even(machine, shape, f, g)
    if shape.skew == 0:
        return even._replace(samples=samples, ranks_error=f_error, nodes_error=g_error)
    # Places are chosen by weight, not by what was sampled: the greatest of noisy means would be too great.
    weights = popularity(shape).reshape(machine.nodes, machine.gpus_per_node, -1).sum(axis=2)
    rank, node = int(weights.argmax()), int(weights.sum(axis=1).argmax())
    there = _distinct(np.where(nodes == node, ranks, -1)) - (nodes != node).any(axis=1)
    busiest, busiest_error = _mean((ranks == rank).any(axis=1))
    return Routing(
        f,
        g,
        max(even.busiest_rank, busiest),
        max(even.busiest_node, _mean((nodes == node).any(axis=1))[0]),
        max(even.ranks_in_busiest_node, _mean(there)[0]),
        max(even.busiest_choices, _mean((ranks == rank).sum(axis=1))[0]),
        samples,
        f_error,
        g_error,
        busiest_error,
    )


def _distinct(places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    ordered = np.sort(places, axis=1)
    return np.asarray(1 + (np.diff(ordered, axis=1) != 0).sum(axis=1))


def _mean(values: npt.NDArray[np.generic]) -> tuple[float, float]:
    numbers = values.astype(np.float64)
    return float(numbers.mean()), float(numbers.std(ddof=1) / math.sqrt(len(numbers)))
