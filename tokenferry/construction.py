"""How a Buffer comes to be: its arguments, its runtime, and the ranks that construct together."""

from __future__ import annotations

import functools
import logging
import math
import os
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch.distributed.distributed_c10d import _get_default_store

from tokenferry.errors import ArgumentError, TokenferryError
from tokenferry.modes.paranoid import PARANOID_VARIABLE
from tokenferry.rail import (
    CARRIER_VARIABLE,
    CARRIERS,
    DEADLINE_SHARE,
    NVSHMEM,
    PROCESS_GROUP,
    Rail,
    check_carrier,
    missing_carrier,
)
from tokenferry.rail.nvshmem_world import POOL_VARIABLE, pool_bytes
from tokenferry.rendezvous import Rendezvous
from tokenferry.runtime import Runtime
from tokenferry.topology import Topology, node_key
from tokenferry.validation import require

if TYPE_CHECKING:
    from tokenferry.runtime_cuda import CudaRuntime

AnyRuntime: TypeAlias = "Runtime | CudaRuntime"

DEVICE_VARIABLE = "TOKENFERRY_DEVICE"
TIMEOUT_VARIABLE = "TOKENFERRY_TIMEOUT"
DEFAULT_TIMEOUT = 100.0
"""Seconds."""
LONGEST_TIMEOUT = 365 * 86400.0
"""Seconds: all clocks can take as many."""

logger = logging.getLogger("tokenferry")

_noted: set[str] = set()


def choose_device(device: torch.device | str | int | None) -> torch.device:
    """The device that the caller, the environment or the machine names."""
    name = "device" if device is not None else DEVICE_VARIABLE
    if device is None:
        device = os.environ.get(DEVICE_VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(name, repr(device), "a torch.device on the CPU or a GPU") from error
    require(chosen.type in ("cpu", "cuda"), name, repr(device), "a torch.device on the CPU or a GPU")
    if chosen.type == "cpu":
        return torch.device("cpu")
    require(torch.cuda.is_available(), name, repr(device), "cpu: torch finds no GPU")
    return chosen if chosen.index is not None else torch.device("cuda", torch.cuda.current_device())


class Wishes(NamedTuple):
    """What the arguments of a Buffer ask of its runtime."""

    device: torch.device
    has_group: bool
    """Whether ranks are those of a process group, not of an mpi4py communicator."""
    stage_limit: int
    push_bytes: int
    heap_bytes: int
    timeout: float
    may_mask: bool
    exact_combine: bool
    carrier: str = PROCESS_GROUP
    may_span_nodes: bool = True
    paranoid: bool = False

    def shared(self) -> dict[str, str]:
        """What must be the same on all ranks, by the name of the argument."""
        memory = {POOL_VARIABLE: str(pool_bytes())} if self.carrier == NVSHMEM else {}
        return {
            "device": self.device.type,
            "carrier": self.carrier,
            "exact_combine": str(self.exact_combine),
            "enable_shrink": str(self.may_mask),
            PARANOID_VARIABLE: str(int(self.paranoid)),
            **memory,
        }


def make_runtime(wishes: Wishes, topology: Topology, key: str) -> AnyRuntime:
    """Construct the runtime of a rank: locally, without a word to the others.

    Args:
        wishes: of the caller.
        topology: who is where.
        key: names the Buffer among all of the group; equal on its ranks.
    """
    if topology.num_nodes > 1:
        _check_several_nodes(wishes, topology)
    if wishes.device.type == "cpu":
        return Runtime(
            topology,
            max(wishes.stage_limit, wishes.push_bytes),
            wishes.timeout,
            wishes.may_mask,
            _rail_maker(wishes, topology, key),
            wishes.exact_combine,
            wishes.paranoid,
        )
    if not wishes.has_group:
        raise ArgumentError("group", None, "a torch.distributed process group on GPUs (device='cpu' takes comm=)")
    from tokenferry.runtime_cuda import CudaRuntime

    return CudaRuntime(
        topology,
        store=_get_default_store(),
        device=wishes.device,
        stage_limit=wishes.stage_limit,
        push_bytes=wishes.push_bytes,
        heap_bytes=wishes.heap_bytes,
        timeout=wishes.timeout,
        may_mask=wishes.may_mask,
        make_rail=_rail_maker(wishes, topology, key),
        exact_combine=wishes.exact_combine,
        paranoid=wishes.paranoid,
    )


def _check_several_nodes(wishes: Wishes, topology: Topology) -> None:
    where = f"on {topology.num_nodes} nodes (TOKENFERRY_NODE overrides what counts as a node)"
    if not wishes.may_span_nodes:
        raise TokenferryError(f"this kind of Buffer keeps to one node, and the ranks are {where}")
    if wishes.device.type != "cpu" and wishes.push_bytes and wishes.exact_combine:
        raise TokenferryError(
            f"low_latency_mode with exact_combine between nodes is on CPU ranks only: the GPUs are {where}"
        )
    require(wishes.has_group, "group", None, f"a torch.distributed process group, with ranks {where}")
    require(not wishes.may_mask, "enable_shrink", True, f"False, with ranks {where}")


def _rail_maker(wishes: Wishes, topology: Topology, key: str) -> Callable[[], Rail] | None:
    if topology.num_nodes == 1:
        return None
    timeout = DEADLINE_SHARE * wishes.timeout
    key = f"{key}/{topology.local_index}"
    return functools.partial(CARRIERS[wishes.carrier], topology, key, timeout, wishes.device)


def choose_carrier(carrier: str | None, device: torch.device) -> str:
    """The carrier between nodes that the caller or the environment names, for ranks on such a device.

    Whether it is on this host, the ranks find out together.
    """
    name = CARRIER_VARIABLE if carrier is None else "carrier"
    given = os.environ.get(CARRIER_VARIABLE, PROCESS_GROUP) if carrier is None else carrier
    return check_carrier(name, given, device.type)


def choose_paranoid(_: None = None) -> bool:
    """Whether the environment asks for the paranoid mode."""
    given = os.environ.get(PARANOID_VARIABLE) or "0"
    require(given in ("0", "1"), PARANOID_VARIABLE, repr(given), "0 or 1")
    return given == "1"


def note_what_is_not_proven(is_paranoid: bool, device: torch.device, low_latency_mode: bool) -> None:
    """Say of a paranoid Buffer which of its operations are not proven."""
    if is_paranoid and low_latency_mode and device.type != "cpu":
        logger.info("paranoid: low-latency operations on GPUs carry no checksums")


def timeout_seconds(timeout: float | None, name: str = "timeout") -> float:
    """The deadline that the caller or the environment gives, in seconds: of longer ones, and endless ones, a year.

    Args:
        timeout: of the caller.
        name: of this argument.
    """
    given = timeout if timeout is not None else os.environ.get(TIMEOUT_VARIABLE, DEFAULT_TIMEOUT)
    if timeout is None:
        name = TIMEOUT_VARIABLE
    try:
        seconds = math.nan if isinstance(given, bool) else float(given)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    require(seconds > 0, name, repr(given), "a number of seconds above 0")
    return min(seconds, LONGEST_TIMEOUT)


def note_ignored(**is_set: bool) -> None:
    """Say once of every argument that is set, and means nothing here, that it is ignored."""
    for name, given in is_set.items():
        if given and name not in _noted:
            _noted.add(name)
            logger.info("%s has no meaning inside one node and is ignored", name)


def construct_runtime(rendezvous: Rendezvous, wishes: Wishes, node: str | int | None) -> AnyRuntime:
    """Create, exchange and open the heaps and rails; if that fails on one rank, it fails on all."""
    missing = missing_carrier(wishes.carrier, wishes.device.type)
    found = rendezvous.all_gather((node_key(node), f"tokenferry/{secrets.token_hex(8)}", wishes.shared(), missing))
    for name, first in found[0][2].items():
        given = [of_rank[2][name] for of_rank in found]
        listed = ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(given))
        if any(value != first for value in given):
            raise TokenferryError(f"the ranks of a Buffer must agree on {name}: {listed}")
    _raise_any_failure([of_rank[3] for of_rank in found])
    topology = Topology.from_keys(rendezvous.rank, [of_rank[0] for of_rank in found])
    runtime: AnyRuntime | None = None
    handle, failure = bytearray(), ""
    try:
        runtime = make_runtime(wishes, topology, found[0][1])
        handle = runtime.get_local_ipc_handle()
    except Exception as error:  # whatever it is, the others must not wait
        failure = str(error) or type(error).__name__
    try:
        offers = rendezvous.all_gather((handle.decode(), failure))
        _raise_any_failure([offer[1] for offer in offers])
        assert runtime is not None
        runtime.key = found[0][1]
        handles = [offer[0].encode() for offer in offers]
        steps: list[Callable[[], None]] = [functools.partial(runtime.sync, handles)]
        if topology.num_nodes > 1:
            steps.append(runtime.connect)
        for step in steps:
            try:
                step()
            except Exception as error:
                failure = str(error) or type(error).__name__
            _raise_any_failure(rendezvous.all_gather(failure))
        runtime.hide()
    except BaseException:
        if runtime is not None:
            runtime.destroy()
        raise
    return runtime


def _raise_any_failure(failures: list[str]) -> None:
    failed = {rank: reason for rank, reason in enumerate(failures) if reason}
    if failed:
        listed = "; ".join(f"rank {rank}: {reason}" for rank, reason in failed.items())
        raise TokenferryError(f"the Buffer cannot be constructed: {listed}")
