"""The host of a GPU rank where something is wrong, or over; the GPU is played."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests import played_gpu
from tests.cases import filled_memory
from tests.host_path import EXPERTS, MOST, TOKENS, TOPK, Rank, rank_on_a_gpu
from tests.test_host_path import Log
from tokenferry import ArgumentError, BufferStateError, HeapError, PeerLostError, PeerTimeoutError, runtime_cuda
from tokenferry.dataplane import tensors
from tokenferry.dataplane.cuda.exchange import Rooms
from tokenferry.dataplane.cuda.follow import THREAD
from tokenferry.dataplane.cuda.kernels import words
from tokenferry.dataplane.cuda.status import Status
from tokenferry.topology import Topology

OPTIONS: dict[str, Any] = {"stage_limit": 1 << 20, "push_bytes": 1 << 22, "heap_bytes": 0, "timeout": 0.3}


@contextmanager
def runtime_of(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[runtime_cuda.CudaRuntime, Any]]:
    """The runtime of rank 0 and its plane, every rank on a GPU of its own."""
    with (
        played_gpu.played([torch.zeros(1 << 16, dtype=torch.uint8)]) as gpu,
        played_gpu.runtime_of_rank_0(gpu, topology, range(topology.num_ranks), OPTIONS) as (found, _),
    ):
        yield found, found._plane


# What kernels report.


def report(status: Status, code: Any, peer: int) -> None:
    status.words[words.OPERATION.value] = 1
    status.words[words.DETAIL.value + peer] = 9
    status.words[words.CODE.value] = code.value


@pytest.mark.parametrize("code", [words.TIMED_OUT, words.MISMATCH, words.CAPACITY, words.PEER_PROBLEM])
def test_ranks_are_named_as_in_the_group(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three nodes whose ranks take turns, this one has ranks 0, 3 and 6."""
    topology = Topology(0, (0, 1, 2) * 3)
    assert topology.local_ranks == (0, 3, 6)
    with runtime_of(topology, monkeypatch) as (_, plane):
        report(plane.status, code, 2)
        with pytest.raises(PeerTimeoutError if code is words.TIMED_OUT else Exception) as caught:
            plane.check()
        assert caught.value.ranks == (6,)  # type: ignore[union-attr]


def test_masked_ranks_are_named_as_in_the_group(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with runtime_of(Topology(0, (0, 1) * 2), monkeypatch) as (_, plane):
        plane.status.words[words.NEWLY_MASKED.value + 1] = 1
        plane.check()
    assert "from ranks [2] " in caplog.text


def test_bad_input_can_wait_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime_of(Topology(0, (0, 0)), monkeypatch) as (_, plane):
        plane.postpone_input_errors(True)
        report(plane.status, words.BAD_EXPERT, 0)
        plane.check()
        plane.postpone_input_errors(False)
        with pytest.raises(ArgumentError, match="topk_idx"):
            plane.check()
        plane.check()
        plane.postpone_input_errors(True)
        report(plane.status, words.TIMED_OUT, 1)
        with pytest.raises(PeerTimeoutError):
            plane.check()


def test_a_rank_that_gave_up_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime_of(Topology(0, (0, 1) * 3), monkeypatch) as (_, plane):
        report(plane.status, words.MISMATCH, 1)
        plane.status.words[words.DETAIL.value + 2] = 2
        with pytest.raises(PeerLostError, match="gave up") as caught:
            plane.check()
        assert caught.value.ranks == (4,)
        with pytest.raises(BufferStateError):
            plane.check()


# The end.


def test_nothing_is_launched_once_the_memory_is_gone() -> None:
    with rank_on_a_gpu() as rank:
        runtime: Any = rank.buffer.runtime
        plane: Any = runtime.party().plane
        runtime.device = runtime.comm.device
        rank.buffer.destroy()
        with pytest.raises(BufferStateError, match=r"^the Buffer was destroyed$"):
            plane.check()


def test_a_runtime_that_is_dropped_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the garbage collector comes: memory of peers stays mapped until then."""
    with played_gpu.played([torch.zeros(1 << 16, dtype=torch.uint8)]) as gpu:
        dropped, peers = played_gpu.runtime_of(gpu, Topology(0, (0, 0)), range(2), OPTIONS)
        plane, mailbox = weakref.ref(dropped._plane), dropped._regions._finalizer
        assert plane() is not None
        assert mailbox.alive
        dropped.device = dropped.comm.device
        del dropped
        assert plane() is None
        assert not mailbox.alive
        for peer in peers:
            peer.close()


def test_a_child_waits_for_no_lock_of_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    with runtime_of(Topology(0, (0, 0)), monkeypatch) as (runtime, _):
        is_held, is_over = threading.Event(), threading.Event()

        def hold() -> None:
            with runtime.comm.lock:
                is_held.set()
                is_over.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        is_held.wait()
        child = os.fork()
        if child == 0:
            signal.alarm(10)
            runtime.destroy()
            os._exit(0)
        is_over.set()
        thread.join()
        assert os.waitpid(child, 0)[1] == 0
        assert runtime._plane is not None


def test_a_runtime_that_the_following_thread_drops_waits_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be in the middle of following the mailboxes of that very runtime."""
    with played_gpu.played([torch.zeros(1 << 16, dtype=torch.uint8)]) as gpu:
        dropped, peers = played_gpu.runtime_of(gpu, Topology(0, (0, 0)), range(2), OPTIONS)
        held, mailbox = [dropped], dropped._regions._finalizer
        dropped.device = dropped.comm.device
        del dropped
        thread = threading.Thread(target=held.clear, name=THREAD)
        thread.start()
        thread.join()
        assert mailbox.alive
        other, more = played_gpu.runtime_of(gpu, Topology(0, (0, 0)), range(2), OPTIONS)
        assert not mailbox.alive
        other.device = other.comm.device
        other.destroy()
        for peer in (*peers, *more):
            peer.close()


class Rail:
    """Ends when it is closed what the device waits for."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.closed = 0

    def close(self, is_stuck: bool = False) -> None:
        self.closed += 1
        self.ended.set()


@pytest.mark.parametrize("hangs", [False, True])
def test_destroy_waits_for_other_nodes_up_to_its_deadline(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exchange that no host waits for, of a combine whose hook was not called or of a graph, may never end."""
    rail, log = Rail(), []
    with runtime_of(Topology(0, (0, 1)), monkeypatch) as (found, _):
        found.device = found.comm.device
        found._nodes = type("Nodes", (), {"rail": rail})()

        def synchronize(device: object = None) -> None:
            if hangs:
                assert rail.ended.wait(10)
            log.append(rail.closed)

        monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
        started = time.monotonic()
        found.destroy()
        seconds = time.monotonic() - started
    assert log == [int(hangs)]  # otherwise it is closed behind what is under way
    assert rail.ended.is_set()
    assert (seconds > OPTIONS["timeout"]) == hangs
    assert seconds < 5


# A turn.


@pytest.fixture(scope="module")
def rank() -> Iterator[Rank]:
    with rank_on_a_gpu() as one:
        yield one


def test_copies_that_comm_reads_live_until_the_current_stream_waits_for_it(rank: Rank) -> None:
    comm: Any = rank.buffer.runtime.comm  # type: ignore[union-attr]
    plane: Any = rank.buffer.runtime.party().plane  # type: ignore[union-attr]
    odd = torch.zeros(3 * TOPK + 1, dtype=torch.int64)[1:].view(3, TOPK)
    assert odd.data_ptr() % 16 == 8
    with comm.turn(None, False, False) as turn:
        plane.layout(odd, EXPERTS, 8)
        (kept,) = map(weakref.ref, comm._kept)
        assert kept() is not None
        turn.finish()
    assert kept() is None
    with comm.in_order():
        plane._aligned(odd)
    assert comm._kept == []


def test_a_refused_call_leaves_the_streams_alone(rank: Rank) -> None:
    """In a capture that ``comm`` is no part of yet, an event of it would break the capture."""
    with Log(rank) as log:
        for bad in ({"num_worst_tokens": -1}, {"topk_weights": None}):
            with pytest.raises(ArgumentError):
                rank.buffer.dispatch(rank.x, **_arguments(rank, **bad))
    assert log == []


def _arguments(rank: Rank, **changed: Any) -> dict[str, Any]:
    per_rank, _, per_expert, member, _ = rank.layout
    arguments = {
        "num_tokens_per_rank": per_rank,
        "is_token_in_rank": member,
        "num_tokens_per_expert": per_expert,
        "topk_idx": rank.ids,
        "topk_weights": rank.weights,
    }
    return arguments | changed


# Low latency.


def test_a_rank_without_tokens_serves_the_others(rank: Rank) -> None:
    low_latency: Any = rank.buffer.runtime.party().plane._low_latency  # type: ignore[union-attr]

    def programs(num_tokens: int) -> list[tuple[int, int]]:
        """Senders and receivers of a dispatch, and of a combine."""
        ids, known = rank.ids[:num_tokens], set(low_latency._prepared)
        handle = rank.buffer.low_latency_dispatch(rank.x[:num_tokens], ids, MOST, EXPERTS)[2]
        rank.buffer.low_latency_combine(rank.slabs, ids, rank.weights[:num_tokens], handle)
        made = [low_latency._prepared[key] for key in low_latency._prepared if key not in known]
        return [(one.senders, one.receivers) for one in made]

    all_tokens, none = programs(TOKENS - 1), programs(0)
    (senders, receivers), (for_others, own) = none
    assert senders <= 3
    assert own <= 2
    assert receivers >= all_tokens[0][1] > 8
    assert for_others >= all_tokens[1][0] > 8


def test_what_kernels_load_sixteen_bytes_of_is_copied_if_it_begins_in_between(rank: Rank) -> None:
    odd_x = torch.zeros(rank.x.numel() + 1, dtype=rank.x.dtype)[1:].view_as(rank.x)
    odd_ids = torch.zeros(rank.ids.numel() + 1, dtype=rank.ids.dtype)[1:].view_as(rank.ids)
    odd_weights = torch.zeros(rank.weights.numel() + 1)[1:].view_as(rank.weights)
    odd_slabs = torch.zeros(rank.slabs.numel() + 1, dtype=rank.slabs.dtype)[1:].view_as(rank.slabs)
    odd = {tensor.data_ptr() for tensor in (odd_x, odd_ids, odd_weights, odd_slabs)}
    assert any(address % 16 for address in odd)
    handle = rank.low_latency_handle
    for how in ({}, {"return_recv_hook": True}):
        rank.gpu.log = []
        hooks = [
            rank.buffer.low_latency_dispatch(odd_x, odd_ids, MOST, EXPERTS, **how)[-1],
            rank.buffer.low_latency_combine(odd_slabs, odd_ids, odd_weights, handle, **how)[-1],
        ]
        launched = [line for line in rank.gpu.log if line[0] == "launch"]
        rank.gpu.log = None
        assert len(launched) == 2
        assert not any(address in odd and address % 16 for line in launched for address in line)  # type: ignore[operator]
        for hook in hooks:
            if hook is not None:
                hook()
    out = torch.zeros(rank.x.numel() + 1, dtype=rank.x.dtype)[1:].view_as(rank.x)
    with pytest.raises(ArgumentError, match=r"out.*16 bytes"):
        rank.buffer.low_latency_combine(rank.slabs, rank.ids, rank.weights, handle, out=out)


def test_tensors_made_below_the_dispatcher_are_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, strides = (2, 3, 4), (12, 1, 3)
    wanted = torch.empty_strided(shape, strides, dtype=torch.float8_e4m3fn)
    given = torch.arange(20, dtype=torch.int32)
    for functions in (tensors._functions, {}):
        monkeypatch.setattr(tensors, "_functions", functions)
        for device in (torch.device("cpu"), torch.device("meta")):
            with torch.inference_mode(False):
                made = tensors.allocator_of(device)(shape, strides, torch.float8_e4m3fn)
            looks = (made.shape, made.stride(), made.dtype, made.device, made.requires_grad, made.is_inference())
            assert looks == (shape, strides, wanted.dtype, device, False, False)
    with filled_memory():
        assert tensors.allocator_of(torch.device("cpu"))((3,), (1,), torch.float32).isnan().all()
    for piece_of in (tensors.piece_of, tensors._as_strided):
        piece = piece_of(given, (2, 3), (3, 1), 5)
        assert torch.equal(piece, given[5:11].view(2, 3))
        assert piece.untyped_storage().data_ptr() == given.untyped_storage().data_ptr()


def test_rows_for_a_combine_wait_for_the_one_before(rank: Rank) -> None:
    handle = rank.low_latency_handle
    log = Log(rank)
    rows = rank.buffer.get_next_low_latency_combine_buffer(handle)
    rank.buffer.low_latency_combine(rows, rank.ids, rank.weights, handle, zero_copy=True, async_finish=True)
    with log as lines:
        assert rank.buffer.get_next_low_latency_combine_buffer(handle) is rows
    waits = [("record event", "comm", "event 0"), ("wait for event", "default", "event 0")]
    assert [line for line in lines if line[0] != "set stream"] == waits


def test_what_was_announced_is_served_when_a_peer_is_bad(rank: Rank) -> None:
    """The other ranks know of nothing wrong, and wait for the rows of this one, which may come through its stage."""
    plane: Any = rank.buffer.runtime.party().plane  # type: ignore[union-attr]
    tell_counts, log = rank.gpu.done["notify"], Log(rank)

    def tell_of_bad_peer() -> None:
        rank.counts[words.HOST_DONE.value], rank.counts[words.HOST_CODE.value] = 1, words.BAD_PEER.value

    plane.rooms = Rooms()
    rank.gpu.done["notify"] = tell_of_bad_peer
    try:
        with log as lines, pytest.raises(HeapError):
            rank.buffer.dispatch(rank.x, **_arguments(rank))
    finally:
        rank.gpu.done["notify"], plane.status.failed = tell_counts, False
    assert [line[1] for line in lines if line[0] == "launch"] == ["notify", "dispatch"]


@pytest.mark.usefixtures("rank")
def test_counts_are_waited_for_anew_where_they_will_be() -> None:
    status = Status(0, 2, 1.0)
    for _ in range(2):
        status.counts[words.HOST_DONE.value] = 1
        assert status.arm() == status.counts.data_ptr() != status.unread_address
        assert int(status.counts[words.HOST_DONE.value]) == 0
        status.leave_counts()
