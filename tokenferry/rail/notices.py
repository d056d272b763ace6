"""Who gave up on a rail, and because of whom: what a rank tells the others before its connections close.

Whoever waits for a rank may be waiting for one that waits itself. Where a rail has three ranks or more, each of them
that gives up or lets go says so at once to all others, by a connection that carries nothing else: Gloo breaks those
on which a wait has missed its deadline. Who gives up because of a rank that gave up passes the reason on; who waited
for several, and cannot tell which is missing, hears from those that are there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

import torch
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from tokenferry.rail import RailError

_NOT_YET, _LOST, _TIMED_OUT = -1, 0, 1
_GRACE_SHARE, _MOST_GRACE_SECONDS = 0.05, 1.0
"""Of the seconds that a wait lasts: ranks that wait for the same one do not give up at the same instant."""
_GRACE_SECONDS_IF_LOST = 0.2
"""Where a connection has closed: the notice of who closed it is right behind, if there is one."""
_LOOK_EVERY = 0.002
"""Seconds."""


class Notices:
    """The notices of one rail of three ranks or more.

    Args:
        store: of the rail.
        node: of this rank.
        num_nodes: of the rail.
        timeout: seconds that a wait on the rail lasts.

    A notice is int8 [num_nodes + 1]: 1 for each node that is to blame, then whether that missed the deadline or is
    lost. The last element arrives last.
    """

    def __init__(self, store: PrefixStore, node: int, num_nodes: int, timeout: timedelta) -> None:
        self._node = node
        self._grace = min(_GRACE_SHARE * timeout.total_seconds(), _MOST_GRACE_SECONDS)
        self._group = cast(Any, ProcessGroupGloo(PrefixStore("notices", store), node, num_nodes, timeout))
        self._own = torch.full((num_nodes + 1,), _NOT_YET, dtype=torch.int8)
        self._heard = {other: torch.full_like(self._own, _NOT_YET) for other in range(num_nodes) if other != node}
        self._works: Any = [self._group.recv([notice], other, 0) for other, notice in self._heard.items()]

    def failure(self, nodes: Sequence[int], timed_out: bool, reason: str, is_lost: bool) -> RailError:
        """Tell the others that this rank gives up, and find out who is to blame.

        Args:
            nodes: one of which this rank waited for in vain.
            timed_out: they were silent until the deadline; else the connection to one is lost.
            reason: in words.
            is_lost: the connection to these nodes has closed; else they may give up only later.
        """
        self._tell(nodes, timed_out)
        until = time.monotonic() + (_GRACE_SECONDS_IF_LOST if is_lost else self._grace)
        culprits, givers = self._found(nodes)
        while not all(map(self._has_heard, culprits)) and time.monotonic() < until:
            time.sleep(_LOOK_EVERY)
            culprits, givers = self._found(nodes)
        if not culprits:  # they wait for each other, or for this rank
            return RailError(nodes, timed_out, reason)
        if not culprits <= set(nodes):
            timed_out = any(int(self._heard[node][-1]) == _TIMED_OUT for node in givers)
            reason = f"found by node {', '.join(map(str, sorted(givers)))}, which this rank waited for"
        return RailError(sorted(culprits), timed_out, reason)

    def _found(self, nodes: Sequence[int]) -> tuple[set[int], set[int]]:
        """Those that nobody else is to blame for, as far as is known by now; and who blames others."""
        culprits, givers, left = set[int](), set[int](), set(nodes)
        while left:
            node = left.pop()
            blamed = self._blamed_by(node)
            (givers if blamed - {node} else culprits).add(node)
            left |= blamed - {self._node} - givers - culprits
        return culprits, givers

    def _tell(self, nodes: Sequence[int], timed_out: bool) -> None:
        """Once. A notice is so short that it is on its way when this returns, if there is a connection."""
        if self._group is None or self._own[-1] != _NOT_YET:
            return
        self._own[:] = 0
        self._own[list(nodes)] = 1
        self._own[-1] = _TIMED_OUT if timed_out else _LOST
        for other in self._heard:
            with suppress(RuntimeError):  # it is gone
                self._works.append(self._group.send([self._own], other, 0))

    def _has_heard(self, node: int) -> bool:
        return int(self._heard[node][-1]) != _NOT_YET

    def _blamed_by(self, node: int) -> set[int]:
        return set(self._heard[node][:-1].nonzero().flatten().tolist()) if self._has_heard(node) else set()

    def close(self) -> None:
        """Let go of the connections. Who waits for this rank learns that nobody else is to blame."""
        self._tell([self._node], False)
        self._group = None
        self._works = []

    def held(self) -> object:
        """What a forked child must keep, and not use."""
        held = self._group, self._works
        self._group = None
        return held
