"""The analytic model behind ``tokenferry plan``: what each hop carries, how long it takes, what memory it needs.

Letters as in ``plan_routing``; times in seconds, rates in GB/s (1e9 bytes). High throughput: a row crosses the
network once for each node, over the rail, in chunks, and is pulled by every rank there that wants it; combine is the
way back, and rows are summed in each node first. Low latency: one hop, a row for each rank. ``docs/planning.md`` has
the formulas and what they leave out.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from tokenferry.cli.plan_routing import MOST_CHUNKS, MOST_SMS, Machine, Routing, Shape, check, route
from tokenferry.config import Config, align_up
from tokenferry.memory.symm import LIST_BYTES
from tokenferry.runtime import DEFAULT_STAGE_BYTES

SM_GBPS = 49.0
"""What one SM moves through its shared memory, in rows that only travel; measured on H100 (docs/planning.md)."""
REDUCING_SM_GBPS = 48.0
"""Likewise, rows that are summed in float32: 4096 tokens of two ranks, 117 MB with 8 and 12 SMs of an H200 in 311 and
213 us, less what a combine takes without bytes (bench/results/h200-2ranks-combine-by-hand.json)."""
FLAG_SECONDS = 2.3e-6
"""A word written by one GPU until another sees it over NVLink; measured between two H100."""
KERNEL_SECONDS = 14.6e-6 / 2
"""A low-latency operation of one token where everything is local, in a graph: launch and loads one after the other
(bench/results/h100-low-latency-by-hand.json). Taken for any kernel."""
EXCHANGE_SECONDS = 34e-6
"""An empty NCCL all_to_all in one node; taken for any exchange between nodes."""
NETWORK_FLAG_SECONDS = 5e-6
"""A small write to another node until it is seen there: assumed, not measured."""
SLAB_GBPS = {"dispatch": 2600.0, "combine": 3930.0}
"""Low latency: rows between where they arrive and the slabs of the experts, counted as bf16. From what 128 tokens
take longer than one, where everything is local (same file)."""

CHOICE_BYTES = 8 + 4
"""Of an expert id and its weight, which travel with a row of a dispatch."""
PUSHED_CHOICE_BYTES = 8
"""Of a choice beside a low-latency row: local expert and position."""
CONTROL_BYTES = 176128
"""In front of the lists of a heap (dataplane/cuda/kernels/words.py)."""
PUSH_SLOTS = 4
HIGH_THROUGHPUT, LOW_LATENCY = MODES = ("high-throughput", "low-latency")

_GOOD_ENOUGH = 1.02
"""Times the least time: what the recommended number of SMs may cost."""


class Hop(NamedTuple):
    """What one part of the machine carries in an operation, for a rank in one direction."""

    name: str
    rows: float
    """Of an average rank."""
    busiest_rows: float
    """Of the busiest one, whose time it is."""
    row_bytes: int
    rate: float
    """GB/s."""

    @property
    def seconds(self) -> float:
        """Of the busiest rank."""
        return self.busiest_rows * self.row_bytes / (self.rate * 1e9)


class Operation(NamedTuple):
    """A dispatch or a combine."""

    name: str
    hops: tuple[Hop, ...]
    seconds: float
    latency: float
    """Seconds that it would take without any bytes."""
    chunks: int = 1

    @property
    def bottleneck(self) -> str:
        """The part that takes longest alone."""
        parts = {hop.name: hop.seconds for hop in self.hops} | {"latency": self.latency}
        return max(parts, key=lambda name: parts[name])


class Plan(NamedTuple):
    """All that is predicted."""

    mode: str
    machine: Machine
    shape: Shape
    routing: Routing
    operations: tuple[Operation, ...]
    """Dispatch and combine; low latency: and combine with ``exact_combine``."""
    configs: tuple[Config, ...]
    """Recommended for dispatch and combine; low latency takes none."""
    memory: dict[str, int]
    """Bytes of a rank's Buffer, by part."""


def predict(machine: Machine, shape: Shape, mode: str = HIGH_THROUGHPUT) -> Plan:
    """Predict one case.

    Raises:
        ArgumentError: numbers that do not fit together.
    """
    check(machine, shape)
    routing = route(machine, shape)
    memory = {"control": CONTROL_BYTES, "lists": LIST_BYTES, "stage": DEFAULT_STAGE_BYTES}
    if mode == LOW_LATENCY:
        quick = low_latency(machine, shape, routing)
        exact = low_latency(machine, shape, routing, per_expert=True)[1]
        operations = (*quick, exact._replace(name="exact combine"))
        memory["push area"] = push_bytes(machine, shape)
        return Plan(mode, machine, shape, routing, operations, (), memory)
    pair = high_throughput(machine, shape, routing)
    if machine.nodes > 1:
        memory["rail"] = rail_bytes(machine, shape, routing, min(operation.chunks for operation in pair))
    return Plan(mode, machine, shape, routing, pair, recommended_configs(machine, shape, routing), memory)


def high_throughput(machine: Machine, shape: Shape, routing: Routing) -> tuple[Operation, Operation]:
    """Dispatch and combine over rails: once over the network for each node, then pulled inside the node."""
    T, G, L = shape.tokens, machine.nodes, machine.gpus_per_node
    rail = T * routing.nodes * (G - 1) / G, T * (G - 1) * routing.busiest_node
    pulled = T * routing.ranks * (L - 1) / L, T * G * (L - 1) * routing.busiest_rank
    received = T * routing.ranks + rail[0], T * machine.ranks * routing.busiest_rank + rail[0]
    relayed = T * routing.ranks + rail[0], T * G * routing.ranks_in_busiest_node + rail[0]
    operations = []
    for name, row, each, moved, kernels, flags, exchanges in (
        ("dispatch", shape.row_bytes + shape.topk * CHOICE_BYTES, SM_GBPS, received, 2, 3, 3),
        ("combine", shape.combine_row_bytes, REDUCING_SM_GBPS, relayed, 1, 2, 2),
    ):
        hops = (
            Hop("network", *rail, row, machine.network),
            Hop("NVLink", *pulled, row, machine.nvlink),
            Hop("SMs", *moved, row, machine.sms * each),
        )
        inside = kernels * KERNEL_SECONDS + (flags * FLAG_SECONDS if L > 1 else 0.0)
        operations.append(_in_chunks(name, hops, inside, exchanges * EXCHANGE_SECONDS, machine, T))
    return operations[0], operations[1]


def _in_chunks(
    name: str, hops: tuple[Hop, Hop, Hop], inside: float, agreement: float, machine: Machine, tokens: int
) -> Operation:
    """The operation, cut in the chunks that were asked for, or as many as make it shortest.

    Between nodes a chunk takes an exchange, and an operation inside the node for each of the other nodes; before
    them come the exchanges to agree, and the operation for the node's own rows.
    """
    pull = max(hops[1].seconds, hops[2].seconds)
    if machine.nodes == 1:
        return Operation(name, hops, pull + inside, inside)

    def seconds(chunks: int, network: float, pull: float) -> float:
        there, here = network / chunks + EXCHANGE_SECONDS, pull / chunks + (machine.nodes - 1) * inside
        return agreement + inside + there + here + (chunks - 1) * max(there, here)

    choices = [machine.chunks] if machine.chunks else range(1, MOST_CHUNKS + 1)
    times = {count: seconds(count, hops[0].seconds, pull) for count in (min(count, tokens) for count in choices)}
    chunks = min(times, key=lambda count: times[count])
    return Operation(name, hops, times[chunks], seconds(chunks, 0.0, 0.0), chunks)


def recommended_configs(machine: Machine, shape: Shape, routing: Routing) -> tuple[Config, Config]:
    """For dispatch and for combine: the fewest SMs that are at most 2 % slower than more, and the best chunks.

    Where no row crosses a link, what Config has by default: the more SMs the better then.
    """
    if machine.ranks == 1:
        return Config(), Config()
    counts = range(2, MOST_SMS + 1, 2)
    pairs = [high_throughput(dataclasses.replace(machine, sms=sms), shape, routing) for sms in counts]

    def best(operations: list[Operation]) -> Config:
        enough = _GOOD_ENOUGH * min(operation.seconds for operation in operations)
        at = next(index for index, operation in enumerate(operations) if operation.seconds <= enough)
        if machine.nodes == 1:
            return Config(num_sms=counts[at])
        rows = shape.tokens * routing.busiest_node / operations[at].chunks  # of one source
        ring = math.ceil(rows / (counts[at] // 2))
        fewest = 2 * Config().num_max_rdma_chunked_send_tokens
        return Config(num_sms=counts[at], num_max_rdma_chunked_recv_tokens=max(ring, fewest))

    return best([pair[0] for pair in pairs]), best([pair[1] for pair in pairs])


def low_latency(
    machine: Machine, shape: Shape, routing: Routing, *, per_expert: bool = False
) -> tuple[Operation, Operation]:
    """Dispatch and combine in one hop, a row for each (token, rank), or for each (token, expert)."""
    T, G, L, R = shape.tokens, machine.nodes, machine.gpus_per_node, machine.ranks
    copies, busiest = (shape.topk, routing.busiest_choices) if per_expert else (routing.ranks, routing.busiest_rank)
    far = T * copies * (R - L) / R, T * (R - L) * busiest
    near = T * copies * (L - 1) / R, T * (L - 1) * busiest
    slab = T * shape.topk, T * R * routing.busiest_choices
    flag = NETWORK_FLAG_SECONDS if G > 1 else FLAG_SECONDS if R > 1 else 0.0
    choices = 1 if per_expert else shape.topk
    operations = []
    for name, row, flags in (
        ("dispatch", shape.row_bytes + choices * PUSHED_CHOICE_BYTES, 1),
        ("combine", shape.combine_row_bytes, 1 if per_expert else 2),  # weights go ahead where rows are summed
    ):
        network, nvlink = Hop("network", *far, row, machine.network), Hop("NVLink", *near, row, machine.nvlink)
        slabs = Hop("slabs", *slab, shape.combine_row_bytes, SLAB_GBPS[name])
        latency = KERNEL_SECONDS + flags * flag
        seconds = max(network.seconds, nvlink.seconds) + slabs.seconds + latency
        operations.append(Operation(name, (network, nvlink, slabs), seconds, latency))
    return operations[0], operations[1]


def rail_bytes(machine: Machine, shape: Shape, routing: Routing, chunks: int) -> int:
    """Bytes for three chunks of rows that leave over the rail and of rows that come, at the busiest relay."""
    tokens = -(-shape.tokens // chunks)
    rows = tokens * (machine.nodes - 1) * (routing.nodes / machine.nodes + routing.busiest_node)
    return align_up(
        math.ceil(min(3, chunks) * rows) * max(shape.row_bytes + shape.topk * CHOICE_BYTES, shape.combine_row_bytes)
    )


def push_bytes(machine: Machine, shape: Shape) -> int:
    """Bytes of the area that low-latency operations push to: four slots of rows of either dtype.

    Two slots would do; with ``exact_combine`` and fewer ranks than choices it is more.
    """
    rows = machine.ranks * shape.tokens
    width = align_up(rows * 2 * shape.hidden)
    dispatch = width + align_up(rows * shape.topk * PUSHED_CHOICE_BYTES) + 4 * shape.experts
    combine = width + rows * shape.topk * 4
    return PUSH_SLOTS * align_up(max(dispatch, combine))
