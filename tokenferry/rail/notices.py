"""Who gave up on a rail, and because of whom: what a rank tells the others before its connections close.

Whoever waits for a rank may be waiting for one that waits itself. Where a rail has three ranks or more, each of them
that gives up or lets go says so at once to all others, by connections that carry nothing else: Gloo breaks those on
which a wait has missed its deadline. Who waits on the rail, and hears that another has given up, says whom it waits
for. So who gives up because of a rank that waits, or gave up, passes the reason on; who waited for several, and does
not know which is missing, hears from those that are there.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from tokenferry.rail import RailError

_NOT_YET, _LOST, _TIMED_OUT = -1, 0, 1
_NOTICE, _HELLO = 0, 1
_GRACE_SHARE, _MOST_GRACE_SECONDS = 0.05, 1.0
"""Of the seconds that a wait lasts: until those that are there have said so."""
_GRACE_SECONDS_IF_LOST = 0.2
"""Where a connection has closed: the notice of who closed it came before, if there is one."""
_LOOK_EVERY = 0.002
"""Seconds."""


class Notices:
    """The notices of one rail of three ranks or more.

    Args:
        store: of the rail.
        node: of this rank.
        num_nodes: of the rail.
        timeout: seconds that a wait on the rail lasts.
        patience: how long the others are waited for now.

    A notice is int8 [num_nodes + 1]: 1 for each node that is to blame, then whether that missed the deadline or is
    lost. The last element arrives last. That of this rank is what it has told.

    Raises:
        RuntimeError: some rank of the rail does not come.
    """

    def __init__(
        self, store: PrefixStore, node: int, num_nodes: int, timeout: timedelta, patience: timedelta
    ) -> None:
        self.grace = min(_GRACE_SHARE * timeout.total_seconds(), _MOST_GRACE_SECONDS)
        self._node = node
        self._others = [other for other in range(num_nodes) if other != node]
        self._lock = threading.Lock()
        with torch.inference_mode(False):
            notices = torch.full((num_nodes, num_nodes + 1), _NOT_YET, dtype=torch.int8, device="cpu")
            hellos = torch.zeros((num_nodes, 1), dtype=torch.int8, device="cpu")
            self._own, self._notices = [notices[node]], notices.numpy()
            self._group = _connected(PrefixStore("notices", store), node, num_nodes, patience)
            try:
                self._works = [self._group.recv([notices[other]], other, _NOTICE) for other in self._others]
                # Who has been greeted has a connection, and knows of the receive before: notices need not wait.
                greetings = [self._group.recv([hellos[other]], other, _HELLO) for other in self._others]
                greetings += [self._group.send([hellos[node]], other, _HELLO) for other in self._others]
                while greetings:
                    greetings.pop().wait()
            except BaseException:
                self._group, self._works, greetings = None, [], []
                raise

    def failure(self, nodes: Collection[int], timed_out: bool, reason: str, is_lost: bool) -> RailError:
        """Tell the others that this rank gives up, and find out who is to blame.

        Args:
            nodes: one of which this rank waited for in vain.
            timed_out: they were silent until the deadline; else the connection to one is lost.
            reason: in words.
            is_lost: the connection to these nodes has closed; else they may say only now whom they wait for.
        """
        self._tell(nodes, timed_out)
        until = time.monotonic() + (_GRACE_SECONDS_IF_LOST if is_lost else self.grace)
        while not all(map(self._has_heard, self._ends(nodes))) and time.monotonic() < until:
            time.sleep(_LOOK_EVERY)
        culprits, reached = self._ends(nodes), self._reached(nodes)
        if not culprits and self._node not in reached:  # a circle of others
            culprits = {node for node in reached if node in self._reached(self._blamed_by(node))}
        if not culprits:  # they wait for this rank
            return RailError(sorted(nodes), timed_out, reason)
        if not culprits <= set(nodes):
            givers = {node for node in reached - {self._node} if self._blamed_by(node)}
            timed_out = any(int(self._notices[node, -1]) == _TIMED_OUT for node in givers)
            reason = f"found by node {', '.join(map(str, sorted(givers)))}, which this rank waited for"
        return RailError(sorted(culprits), timed_out, reason)

    def answer(self, nodes: Collection[int]) -> None:
        """While this rank waits for these nodes, now and then: say so if one has given up because of another."""
        if self._has_heard(self._node) or not (self._notices[:, -1] != _NOT_YET).any():
            return
        if any(self._has_heard(other) and not self._notices[other, other] for other in self._others):
            self._tell(nodes, True)

    def close(self) -> None:
        """Let go of the connections. Who waits for this rank learns that nobody else is to blame."""
        self._tell([self._node], False)
        with self._lock:
            held = self._group, self._works
            self._group, self._works = None, []
        del held

    def held(self) -> object:
        """What a forked child must keep, and not use."""
        held = self._group, self._works
        self._group = None
        return held

    def _tell(self, nodes: Collection[int], timed_out: bool) -> None:
        """Once. A notice is so short that it is on its way when this returns, if there is a connection."""
        with self._lock:
            if self._group is None or self._has_heard(self._node):
                return
            own = self._notices[self._node]
            own[:] = 0
            own[list(nodes)] = 1
            own[-1] = _TIMED_OUT if timed_out else _LOST
            for other in self._others:
                with suppress(RuntimeError):  # it is gone
                    self._works.append(self._group.send(self._own, other, _NOTICE))

    def _has_heard(self, node: int) -> bool:
        return int(self._notices[node, -1]) != _NOT_YET

    def _blamed_by(self, node: int) -> set[int]:
        """Those that a node blames, except itself."""
        return set(self._notices[node, :-1].nonzero()[0].tolist()) - {node} if self._has_heard(node) else set()

    def _reached(self, nodes: Iterable[int]) -> set[int]:
        """These, those that they blame, those that these blame, ...; nobody is followed through this rank."""
        reached, left = set[int](), set(nodes)
        while left:
            reached.add(node := left.pop())
            if node != self._node:
                left |= self._blamed_by(node) - reached
        return reached

    def _ends(self, nodes: Iterable[int]) -> set[int]:
        """Those of them that nobody else is to blame for, as far as is known by now."""
        return {node for node in self._reached(nodes) - {self._node} if not self._blamed_by(node)}


def _connected(store: PrefixStore, node: int, num_nodes: int, timeout: timedelta) -> Any:
    """A group by the interfaces that torch would take, whose connections are made now.

    With connections that Gloo makes late, the end of a group may wait for the others for ever.
    """
    kind: Any = ProcessGroupGloo
    names = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
    devices = [kind.create_device(interface=name, lazy_init=False) for name in names]
    options = kind._Options()
    options._devices = devices or [kind.create_default_device(lazy_init=False)]
    options._threads = 2 * len(options._devices)
    options._timeout = timeout
    return kind(store, node, num_nodes, options)
