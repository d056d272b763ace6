"""Construction, destruction, and what a Buffer is as a Python object."""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, Case, Scenario, check_works, named_segments, segments, wait_for
from tests.conftest import PoolOf
from tokenferry import ArgumentError, Buffer, BufferStateError, ElasticBuffer, TokenferryError
from tokenferry.cli.ranks import RankPool

KEYWORDS: dict[str, Any] = {
    "num_nvl_bytes": 1 << 20,
    "num_rdma_bytes": 256,
    "low_latency_mode": True,
    "num_qps_per_rank": 12.5,
    "allow_nvlink_for_low_latency_mode": False,
    "allow_mnnvl": True,
    "explicitly_destroy": True,
    "use_fabric": True,
    "allow_nvlink_for_normal_mode": False,
    "enable_shrink": True,
}


def _keywords(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, **KEYWORDS) as buffer:
        assert (buffer.rank, buffer.group_size) == (rank, num_ranks)
        assert buffer.group is dist.group.WORLD
        for name in ("num_nvl_bytes", "num_rdma_bytes", "low_latency_mode", "explicitly_destroy", "enable_shrink"):
            assert getattr(buffer, name) == KEYWORDS[name], name
        assert buffer.runtime is not None
        assert buffer.runtime.is_available()
        check_works(buffer)
    for name, value in KEYWORDS.items():
        with Buffer(group=dist.group.WORLD, **{name: value}, timeout=TIMEOUT) as buffer:
            check_works(buffer)
    with Buffer(dist.group.WORLD) as buffer:
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (0, 0)
        assert (buffer.low_latency_mode, buffer.explicitly_destroy) == (False, False)


def test_keywords_and_attributes(pool_of: PoolOf) -> None:
    pool_of(2).run(_keywords)


def _positional(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, 128, 256, True, 1, False, True) as buffer:
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes, buffer.low_latency_mode) == (128, 256, True)
        check_works(buffer)
    for unknown in ({"num_nvl_byte": 128}, {"num_nvl_peers": 8}, {"overlap": True}):
        with pytest.raises(TypeError):
            Buffer(dist.group.WORLD, **unknown)
    with pytest.raises(TypeError):
        Buffer(dist.group.WORLD, 128, 0, False, 1, True, False, True)  # type: ignore[call-arg] # the eighth has had two meanings


def test_positional_arguments(pool_of: PoolOf) -> None:
    pool_of(2).run(_positional)


def _logged(rank: int, num_ranks: int) -> list[tuple[int, str]]:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[assignment, method-assign]
    logger = logging.getLogger("tokenferry")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    for _ in range(3):
        Buffer(dist.group.WORLD, **{**KEYWORDS, "low_latency_mode": False}).destroy()
    return [(record.levelno, record.getMessage()) for record in records]


def test_ignored_arguments_are_logged_once() -> None:
    with RankPool(1, num_threads=1) as pool:  # a fresh process: what is said once is said once for each
        messages = pool.run(_logged)[0]
    assert {level for level, _ in messages} == {logging.INFO}
    ignored = [name for name in KEYWORDS if name not in ("num_nvl_bytes", "explicitly_destroy", "low_latency_mode")]
    for name in ignored:
        assert sum(text.startswith(f"{name} ") for _, text in messages) == 1, name
    assert len(messages) == len(ignored) + 3  # and a line for each Buffer


class FakeComm:
    """The three methods of an mpi4py communicator, over torch's group."""

    def Get_rank(self) -> int:
        return dist.get_rank()

    def Get_size(self) -> int:
        return dist.get_world_size()

    def allgather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return values


def _with_comm(rank: int, num_ranks: int) -> None:
    comm = FakeComm()
    with Buffer(None, 1 << 20, comm=comm, timeout=TIMEOUT) as buffer:
        assert buffer.group is comm
        assert (buffer.rank, buffer.group_size) == (rank, num_ranks)
        check_works(buffer)
    with Buffer(group=dist.group.WORLD, comm=None, timeout=TIMEOUT) as buffer:
        check_works(buffer)


def test_mpi_communicator(pool_of: PoolOf) -> None:
    pool_of(3).run(_with_comm)


def test_groups_and_communicators_that_are_none() -> None:
    for arguments, message in (
        ({"group": "world"}, "group: got str; allowed: a torch.distributed process group"),
        ({"comm": 3}, "comm: got int; allowed: an mpi4py communicator"),
        ({"group": "world", "comm": 3}, "comm: got int; allowed: None with a group"),
    ):
        with pytest.raises(ArgumentError, match=message):
            Buffer(**arguments, device="cpu")


USES: dict[str, Callable[[Buffer, Scenario, Any], object]] = {
    "layout": lambda buffer, it, handle: it.layout_arguments(buffer),
    "dispatch": lambda buffer, it, handle: buffer.dispatch(it.x, handle=handle),
    "combine": lambda buffer, it, handle: it.combine(buffer, handle),
    "tensor": lambda buffer, it, handle: buffer.get_local_buffer_tensor(torch.uint8),
    "stream": lambda buffer, it, handle: buffer.get_comm_stream(),
    "topology": lambda buffer, it, handle: buffer.topology,
}


def _destroyed(rank: int, num_ranks: int, explicitly: bool) -> None:
    buffer = Buffer(dist.group.WORLD, explicitly_destroy=explicitly, timeout=TIMEOUT)
    scenario = Scenario(Case(), rank, num_ranks)
    handle = scenario.dispatch(buffer)[4]
    assert buffer.is_available()
    for _ in range(3):
        buffer.destroy()
        assert buffer.runtime is None
        assert not buffer.is_available()
    for use in USES.values():
        with pytest.raises(BufferStateError, match="destroyed"):
            use(buffer, scenario, handle)
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as other:
        check_works(other)
        other.destroy()
    assert other.runtime is None


@pytest.mark.parametrize("explicitly", [False, True])
def test_use_after_destroy(pool_of: PoolOf, explicitly: bool) -> None:
    pool_of(2).run(_destroyed, explicitly)


def _left_by_exception(rank: int, num_ranks: int) -> None:
    with pytest.raises(KeyError), Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        raise KeyError
    assert buffer.runtime is None


def _let_go(rank: int, num_ranks: int) -> None:
    group = dist.new_group()
    gc.collect()
    before = sys.getrefcount(group)
    for construct in (Buffer, functools.partial(ElasticBuffer, num_max_tokens_per_rank=4, hidden=64, num_topk=2)):
        buffer: Any = construct(group)
        assert buffer.group is group
        assert sys.getrefcount(group) > before
        if isinstance(buffer, Buffer):
            with pytest.raises(ArgumentError, match="size: got 'a'"):
                buffer.empty(2, "a")  # type: ignore[arg-type]
        buffer.destroy()
        buffer.destroy()
        gc.collect()
        assert sys.getrefcount(group) == before
        assert buffer.group is None
        with pytest.raises(BufferStateError, match="destroyed"):
            buffer.stats() if isinstance(buffer, Buffer) else buffer.barrier()
    dist.destroy_process_group(group)


def test_a_destroyed_buffer_lets_its_group_go(pool_of: PoolOf) -> None:
    """Else its threads would run on behind ``destroy_process_group``, to the end of the process, and abort it."""
    pool_of(2).run(_let_go)


def test_leaving_a_block_by_an_exception_destroys(pool_of: PoolOf) -> None:
    pool_of(2).run(_left_by_exception)


def _dropped(rank: int, num_ranks: int) -> None:
    gc.collect()
    before = len(segments())
    buffer = Buffer(dist.group.WORLD, 1 << 20, timeout=TIMEOUT)
    assert len(segments()) == before + num_ranks
    dist.barrier()
    assert named_segments() == []
    check_works(buffer)
    watch = weakref.ref(buffer)
    dist.barrier()
    if rank == 0:
        gc.disable()
        started = time.monotonic()
        del buffer
        assert time.monotonic() - started < 1.0
        assert watch() is None
        assert len(segments()) == before
        gc.enable()
        dist.barrier()
    else:
        dist.barrier()
        assert len(segments()) == before + num_ranks  # the others' own is theirs
        assert buffer.is_available()
        buffer.destroy()
        assert wait_for(lambda: len(segments()) == before)


def test_dropping_the_last_reference_frees_the_memory_and_asks_nobody(pool_of: PoolOf) -> None:
    pool_of(3).run(_dropped)


def _one_destroys(rank: int, num_ranks: int) -> None:
    buffer = Buffer(dist.group.WORLD, timeout=TIMEOUT)
    scenario = Scenario(Case(tokens=(40, 9), routing="all"), rank, num_ranks)
    if rank == 1:
        time.sleep(0.3)
    result = scenario.dispatch(buffer)
    if rank == 0:
        buffer.destroy()  # while rank 1 may still read what rank 0 sent
    scenario.check_dispatch(result)
    if rank != 0:
        started = time.monotonic()
        with pytest.raises(TokenferryError, match="rank 0"):
            scenario.combine(buffer, result[4])
        assert time.monotonic() - started < 5.0
        buffer.destroy()
    dist.barrier()


def test_destroying_on_one_rank_hangs_nobody(pool_of: PoolOf) -> None:
    pool_of(3).run(_one_destroys)


def _plain_class(rank: int, num_ranks: int) -> None:
    original = Buffer.__init__

    def patched(self: Buffer, *args: Any, **kwargs: Any) -> None:
        kwargs["num_nvl_bytes"] = 4096
        original(self, *args, **kwargs)

    class Derived(Buffer):
        seen = False

        def destroy(self) -> None:
            super().destroy()
            self.seen = True

    with mock.patch.object(Buffer, "__init__", patched), Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        assert buffer.num_nvl_bytes == 4096
        buffer.note = "clients hang things on it"  # type: ignore[attr-defined]
        check_works(buffer)
    with Derived(dist.group.WORLD, timeout=TIMEOUT) as derived:
        check_works(derived)
    assert derived.seen
    unborn = Buffer.__new__(Buffer)
    unborn.destroy()


def test_buffer_is_a_plain_class(pool_of: PoolOf) -> None:
    pool_of(2).run(_plain_class)


EVENT = ["previous_event", "async_finish", "allocate_on_comm_stream"]
SIGNATURES = {
    "get_dispatch_layout": ["topk_idx", "num_experts", *EVENT],
    "dispatch": [
        *["x", "handle", "num_tokens_per_rank", "num_tokens_per_rdma_rank", "is_token_in_rank"],
        *["num_tokens_per_expert", "topk_idx", "topk_weights", "expert_alignment", "num_worst_tokens", "config"],
        *EVENT,
    ],
    "combine": ["x", "handle", "topk_weights", "bias", "config", *EVENT],
    "get_local_buffer_tensor": ["dtype", "size", "offset", "use_rdma_buffer"],
    "destroy": [],
    "get_comm_stream": [],
}
STATIC_SIGNATURES = {
    "is_sm90_compiled": [],
    "set_num_sms": ["new_num_sms"],
    "capture": [],
    "get_dispatch_config": ["num_ranks"],
    "get_combine_config": ["num_ranks"],
    "get_low_latency_rdma_size_hint": ["num_max_dispatch_tokens_per_rank", "hidden", "num_ranks", "num_experts"],
}


def test_signatures() -> None:
    for name, parameters in SIGNATURES.items():
        assert list(inspect.signature(getattr(Buffer, name)).parameters) == ["self", *parameters], name
    for name, parameters in STATIC_SIGNATURES.items():
        assert isinstance(inspect.getattr_static(Buffer, name), staticmethod)
        assert list(inspect.signature(getattr(Buffer, name)).parameters) == parameters, name
    constructor = inspect.signature(Buffer.__init__).parameters
    first = ["group", "num_nvl_bytes", "num_rdma_bytes", "low_latency_mode", "num_qps_per_rank"]
    assert list(constructor)[1:8] == [*first, "allow_nvlink_for_low_latency_mode", "allow_mnnvl"]
    assert {*KEYWORDS, "comm"} <= set(constructor)
    assert [constructor[name].default for name in KEYWORDS] == [
        0,
        0,
        False,
        24,
        True,
        False,
        False,
        False,
        True,
        False,
    ]
    dispatch = inspect.signature(Buffer.dispatch).parameters
    assert (dispatch["expert_alignment"].default, dispatch["num_worst_tokens"].default) == (1, 0)
    assert isinstance(Buffer.is_sm90_compiled(), bool)


def test_unpack_bias() -> None:
    one, two = torch.zeros(1), torch.zeros(2)
    assert Buffer._unpack_bias(None) == (None, None)
    assert Buffer._unpack_bias(one) == (one, None)
    assert Buffer._unpack_bias((one, two)) == (one, two)


def _from_threads(rank: int, num_ranks: int) -> None:
    """Two threads, a Buffer each, as with two micro-batches in flight."""
    buffers = [Buffer(dist.group.WORLD, timeout=TIMEOUT) for _ in range(2)]
    failures: list[BaseException] = []

    def work(buffer: Buffer, seed: int) -> None:
        try:
            for turn in range(10):
                check_works(buffer, Case(tokens=(9, 0, 5), seed=seed + turn))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(buffer, 100 * i)) for i, buffer in enumerate(buffers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for buffer in buffers:
        buffer.destroy()
    assert failures == []


def test_two_threads(pool_of: PoolOf) -> None:
    pool_of(3).run(_from_threads)


_kept: Buffer | None = None


def _leave_open(rank: int, num_ranks: int) -> list[str]:
    global _kept
    _kept = Buffer(dist.group.WORLD, 1 << 20, timeout=TIMEOUT)
    check_works(_kept)
    return segments()


def test_processes_that_end_leave_nothing_behind() -> None:
    with RankPool(2, num_threads=1) as pool:
        segments = pool.run(_leave_open)
    assert [process.exitcode for process in pool.processes] == [0, 0]
    names = {name.removesuffix(" (deleted)") for of_rank in segments for name in of_rank}
    assert len(names) == 2
    assert [name for name in names if Path("/dev/shm", name).exists()] == []
