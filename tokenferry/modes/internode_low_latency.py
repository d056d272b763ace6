"""The low-latency pair between nodes: blocks of a fixed size over the rails, then as inside a node.

Every rank sends its tokens, N rows whatever their number, to the rank of its local index on every node. That one, the
relay, sends the tokens of its whole rail inside its node, as if they were its own. In combine it sums, for each token
of its rail, the rows of its node, and sends N sums home; the source adds them, nodes ascending. FP8 rows cross the
network in bfloat16: the relay quantises them.

What a call posts it also forwards, so that no receive waits for the hook of another rank. On GPUs nothing waits for
the host, except at the first operation of a kind, when ranks compare what they call. A CUDA graph can hold others.

Formula: ``out[t] = round(sum over nodes g, ascending, of p_g[t])`` with ``p_g[t] = round(sum over the choices k of
experts on g, ascending, of topk_weights[t, k] * row of (t, topk_idx[t, k]))``; sums in float32.

Legend of dims: T tokens of this rank, N most tokens of a rank, H elements of a row, K choices, G nodes of L ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tokenferry.dataplane import LowLatencyCombinePlan, LowLatencyDispatchPlan, Part, Pending, Relays, Signature
from tokenferry.modes.nodes import Nodes, Operation
from tokenferry.rail import Transfer

if TYPE_CHECKING:
    from tokenferry.modes.inputs import Party


def dispatch(party: Party, nodes: Nodes, signature: Signature, plan: LowLatencyDispatchPlan) -> Pending:
    """Send the tokens; see :meth:`tokenferry.dataplane.DataPlane.low_latency_dispatch`."""
    most = plan.num_max_tokens
    with nodes.operation(party, "low_latency_dispatch", signature) as operation:
        _compare(party, nodes, operation)
        ids, x = _on_all_nodes(operation, nodes, most, [(plan.topk_idx, -1), (plan.x, None)])
        waits = _Waits(nodes, plan.wait_stats)
        inside = plan._replace(
            topk_idx=ids,
            x=x,
            num_max_tokens=len(ids),
            wait_stats=waits.inside,
            relays=relays_of(nodes, most),
        )
        pending = party.plane.low_latency_dispatch(signature, inside)
    return _Receive(nodes, operation, pending, waits)


def combine(party: Party, nodes: Nodes, signature: Signature, plan: LowLatencyCombinePlan, most: int) -> Pending:
    """Send the rows home; see :meth:`tokenferry.dataplane.DataPlane.low_latency_combine`.

    Args:
        party: who takes part.
        nodes: the way to the other nodes.
        signature: of the operation.
        plan: of this rank.
        most: N.
    """
    topology, hidden = nodes.topology, plan.out.size(1)
    dtype = torch.float32 if nodes.exact else plan.out.dtype
    with nodes.operation(party, "low_latency_combine", signature) as operation:
        _compare(party, nodes, operation)
        given = [(plan.topk_idx, -1), (plan.topk_weights, 0)]
        ids, weights = _on_all_nodes(operation, nodes, most, given)
        sums = party.plane.empty_rows(len(ids), hidden, dtype)
        waits = _Waits(nodes, plan.wait_stats)
        inside = plan._replace(
            topk_idx=ids,
            topk_weights=weights,
            out=sums,
            wait_stats=waits.inside,
            receives_now=True,
            relays=relays_of(nodes, most),
        )
        party.plane.low_latency_combine(signature, inside).finish()
        waits.add()
        homes = list(sums.view(topology.num_nodes, most, hidden).unbind())
        sends = {node: [homes[node]] for node in nodes.others}
        for node in nodes.others:
            homes[node] = party.plane.empty_rows(most, hidden, dtype)
        transfer = operation.post(sends, {node: [homes[node]] for node in nodes.others})
    return _Homecoming(nodes, operation, transfer, homes, plan.out)


def relays_of(nodes: Nodes, most: int) -> Relays:
    """Who relays for whom, of up to ``most`` tokens of a rank."""
    return Relays([(index, node) for node, index in nodes.topology.places], most, nodes.topology.node)


def _compare(party: Party, nodes: Nodes, operation: Operation) -> None:
    """Compare signatures along the rail, where the host waits anyway, and elsewhere the first time.

    Ranks of which some know a signature and others do not miss each other, and find out at the deadline.
    """
    if party.plane.values_at_hand or operation.signature not in nodes.compared:
        operation.compare()
        nodes.compared.add(operation.signature)
    operation.is_agreed = True


def _on_all_nodes(
    operation: Operation, nodes: Nodes, most: int, given: Sequence[tuple[torch.Tensor, float | None]]
) -> list[torch.Tensor]:
    """What the ranks of the rail have, one after the other: [G * N, width] for each [T, width].

    Rows past T have the value given with the tensor, and all rows of a rank that does not come; None: any.
    """
    here = nodes.topology.node
    blocks = []
    for tensor, filler in given:
        block = tensor.new_empty((nodes.topology.num_nodes, most, tensor.size(1)))
        if filler is not None:
            block.fill_(filler)
        block[here, : len(tensor)] = tensor
        blocks.append(block)
    transfer = operation.post(
        {node: [block[here] for block in blocks] for node in nodes.others},
        {node: [block[node] for block in blocks] for node in nodes.others},
    )
    for node in nodes.others:
        transfer.wait(node)
    transfer.settle()
    return [block.flatten(0, 1) for block in blocks]


class _Waits:
    """The statistics of waits for ranks of the node, among those of all ranks."""

    def __init__(self, nodes: Nodes, stats: torch.Tensor | None) -> None:
        self._ranks = nodes.topology.local_ranks
        self._stats = stats
        self.inside = None if stats is None else stats.new_zeros(len(self._ranks))

    def add(self) -> None:
        """Once those of the node are complete."""
        if self._stats is not None and self.inside is not None:
            for index, rank in enumerate(self._ranks):
                self._stats[rank] += self.inside[index]


class _Receive:
    """A dispatch that was sent; see :class:`tokenferry.dataplane.Pending`."""

    def __init__(self, nodes: Nodes, operation: Operation, pending: Pending, waits: _Waits) -> None:
        self._nodes = nodes
        self._operation = operation
        self._pending = pending
        self._waits = waits

    def written(self) -> Sequence[torch.Tensor | None]:
        return self._pending.written()

    def finish(self) -> None:
        with self._nodes.guarded(self._operation):
            self._pending.finish()
            self._waits.add()


class _Homecoming:
    """A combine that was sent; see :class:`tokenferry.dataplane.Pending`."""

    def __init__(
        self, nodes: Nodes, operation: Operation, transfer: Transfer, homes: list[torch.Tensor], out: torch.Tensor
    ) -> None:
        self._nodes = nodes
        self._operation = operation
        self._transfer = transfer
        self._homes = homes
        self._out = out

    def written(self) -> Sequence[torch.Tensor | None]:
        return (self._out,)

    def finish(self) -> None:
        is_over = self._nodes.is_over(self._operation.who.plane)
        with self._nodes.guarded(self._operation):
            if is_over:
                raise self._nodes.end_of_rail()
            for node in self._nodes.others:
                self._transfer.wait(node)
            self._transfer.settle()
            parts = [Part(None, home[: len(self._out)]) for home in self._homes]
            self._operation.who.plane.sum_rows(parts, (), self._out)
