"""What a rank does with garbage from a peer: an exception of the family, in time, and never a byte out of bounds.

Two ranks run in two threads of one process. What one of them publishes is spoiled on its way: header words, and words
of the payload with its counts and tables. The other must return or raise a TokenferryError.
"""

from __future__ import annotations

import ast
import os
import pickle
import stat
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import tokenferry
from tests import low_latency_cases
from tests.cases import TIMEOUT, Case, Scenario, check_works
from tests.conftest import PoolOf
from tests.internode_cases import NodeScenario, make_buffer
from tokenferry import Buffer, HeapError, TokenferryError
from tokenferry.memory.heap import Heap
from tokenferry.memory.shm import Segment
from tokenferry.modes import expert_major, intranode, low_latency, shares
from tokenferry.modes.expert_major import Received
from tokenferry.modes.inputs import check_inputs
from tokenferry.runtime import Runtime
from tokenferry.topology import Topology

DEADLINE = 0.15
PATIENCE = 30.0
"""Seconds after which an operation hangs."""
EXPERTS, LOCAL, TOPK, MOST = 4, 2, 2, 6

SHAPES = {"one message": (5, 128), "several messages": (7, 8192)}
"""Tokens, and bytes of a row."""


class Spoiler:
    """Spoils messages of a heap.

    Args:
        number: of the first message that is spoiled, as those before are fine.
        header: header words by index, and what they become (None: as they are).
        payload: where in the payload, as a share of its words, and what the int32 there becomes.
    """

    def __init__(self, number: int, header: Mapping[int, int], payload: Sequence[tuple[float, int]]) -> None:
        self.number, self.header, self.payload = number, header, payload
        self.seen = 0

    def attach(self, heap: Heap) -> None:
        original = heap.publish

        def publish(fields_of: Mapping[int, Sequence[int]]) -> None:
            spoiled = {peer: list(fields) for peer, fields in fields_of.items()}
            if self.seen >= self.number:
                for fields in spoiled.values():
                    offset, nbytes = fields[3], fields[4]
                    words = heap.stage_view(heap.rank, offset, nbytes // 4 * 4).view(torch.int32)
                    for share, value in self.payload:
                        if len(words):
                            words[int(share * (len(words) - 1))] = value
                    for index, value in self.header.items():
                        fields[index] = value
            self.seen += 1
            original(spoiled)

        heap.publish = publish  # type: ignore[method-assign]


class Pair:
    """Two ranks in one process; rank 1 is the one that is spoiled."""

    def __init__(self, timeout: float = DEADLINE) -> None:
        self.runtimes = [Runtime(Topology(rank, (0, 0)), 1 << 16, timeout) for rank in range(2)]
        handles = [runtime.get_local_ipc_handle() for runtime in self.runtimes]
        for runtime in self.runtimes:
            runtime.sync(handles)
        for runtime in self.runtimes:
            runtime.hide()

    def run(self, operation: Callable[[int, intranode.Party], Any]) -> list[Any]:
        """The operation on both ranks: what it returned or raised, by rank."""
        outcomes: list[Any] = [None, None]

        def call(rank: int) -> None:
            try:
                outcomes[rank] = operation(rank, self.runtimes[rank].party())
            except BaseException as error:  # looked at by the test
                outcomes[rank] = error

        threads = [threading.Thread(target=call, args=(rank,), daemon=True) for rank in range(2)]
        for thread in threads:
            thread.start()
        ends = time.monotonic() + PATIENCE
        for thread in threads:
            thread.join(max(0.0, ends - time.monotonic()))
            assert not thread.is_alive(), "it hangs"
        return outcomes

    def close(self) -> None:
        for runtime in self.runtimes:
            runtime.destroy()


def dispatched(shape: str, rank: int, party: intranode.Party) -> intranode.Received:
    tokens, row_bytes = SHAPES[shape]
    made = torch.Generator().manual_seed(rank)
    ids = torch.rand(tokens, EXPERTS, generator=made).topk(TOPK).indices
    per_rank, per_expert, member = intranode.layout(party, ids, EXPERTS)
    x = torch.randn(tokens, row_bytes // 2, generator=made).bfloat16()
    weights = torch.rand(tokens, TOPK, generator=made)
    return intranode.dispatch(party, check_inputs(party, x, per_rank, member, per_expert, ids, weights, 1, 0))


def cached(shape: str, rank: int, party: intranode.Party, before: Any) -> Any:
    tokens, row_bytes = SHAPES[shape]
    return intranode.cached_dispatch(party, torch.ones(tokens, row_bytes // 2).bfloat16(), before[rank].handle)


def combined(shape: str, rank: int, party: intranode.Party, before: Any) -> Any:
    return intranode.combine(party, before[rank].x, before[rank].handle, before[rank].topk_weights, None)


def expanded(shape: str, rank: int, party: intranode.Party, *, host_waits: bool = True) -> expert_major.Received:
    tokens, row_bytes = SHAPES[shape]
    made = torch.Generator().manual_seed(rank)
    ids = torch.rand(tokens, EXPERTS, generator=made).topk(TOPK).indices
    x = torch.randn(tokens, row_bytes // 2, generator=made).bfloat16()
    sizes = expert_major.Sizes(EXPERTS, tokens, 4, True, host_waits, True, 0)
    return expert_major.dispatch(party, x, ids, torch.rand(tokens, TOPK, generator=made), sizes, copy_topk=True)


def expanded_worst(shape: str, rank: int, party: intranode.Party) -> expert_major.Received:
    return expanded(shape, rank, party, host_waits=False)


def expanded_cached(shape: str, rank: int, party: intranode.Party, before: Any) -> Any:
    tokens, row_bytes = SHAPES[shape]
    x = torch.ones(tokens, row_bytes // 2).bfloat16()
    return expert_major.cached_dispatch(party, x, before[rank].handle, None, zero_padding=True)


def expanded_combined(shape: str, rank: int, party: intranode.Party, before: Any) -> Any:
    received = before[rank]
    weights = received.topk_weights
    return expert_major.combine(party, received.x, received.handle, weights, None, one_rounding=False)


def low_dispatched(shape: str, rank: int, party: intranode.Party) -> Any:
    tokens, row_bytes = SHAPES[shape]
    made = torch.Generator().manual_seed(rank)
    ids = torch.rand(min(tokens, MOST), EXPERTS, generator=made).topk(TOPK).indices
    x = torch.randn(len(ids), row_bytes // 2, generator=made).bfloat16()
    return low_latency.dispatch(party, x, ids, MOST, EXPERTS, None, None, False, False, False, True)


def low_combined(shape: str, rank: int, party: intranode.Party, before: Any) -> Any:
    received = before[rank]
    made = torch.Generator().manual_seed(rank)
    tokens = min(SHAPES[shape][0], MOST)
    ids = torch.rand(tokens, EXPERTS, generator=made).topk(TOPK).indices
    weights = torch.ones(tokens, TOPK)
    x = received.x.nan_to_num()
    return low_latency.combine(party, x, ids, weights, received.handle, None, None, None, True)


FIRST = {
    "cached": dispatched,
    "combine": dispatched,
    "cached expanded": expanded,
    "combine of expanded": expanded,
    "low-latency combine": low_dispatched,
}
OPERATIONS: dict[str, Any] = {
    "dispatch": dispatched,
    "cached": cached,
    "combine": combined,
    "expanded": expanded,
    "expanded, worst case": expanded_worst,
    "cached expanded": expanded_cached,
    "combine of expanded": expanded_combined,
    "low-latency dispatch": low_dispatched,
    "low-latency combine": low_combined,
}
EDGES = [0, 1, 2, 3, 5, 64, 127, 128, 129, 1 << 12, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 62, (1 << 63) - 1]
WORDS = st.one_of(st.sampled_from([*EDGES, *[-edge for edge in EDGES], -(1 << 63)]), st.integers(-300, 300))
INT32 = st.one_of(
    st.sampled_from([0, 1, -1, 2, 3, 4, 5, 6, 7, 100, 1 << 20, (1 << 31) - 1, -(1 << 31)]), st.integers(-9, 9)
)
SHARES = st.one_of(st.floats(0, 1), st.floats(0, 0.05), st.sampled_from([0.0, 1.0]))
HEADERS = st.one_of(
    st.dictionaries(st.integers(0, 17), WORDS, max_size=3),
    st.dictionaries(st.integers(1, 8), WORDS, max_size=2),
    st.fixed_dictionaries(dict.fromkeys(range(18), WORDS)),
)
PAYLOADS = st.lists(st.tuples(SHARES, INT32), max_size=8)


def spoil(name: str, shape: str, spoiler: Spoiler) -> Any:
    """What rank 0 makes of an operation with a rank 1 whose messages are spoiled."""
    pair = Pair()
    try:
        before: Any = None
        operation = OPERATIONS[name]
        if name in FIRST:
            slow = [runtime._heap for runtime in pair.runtimes]
            for heap in slow:
                heap.timeout = PATIENCE
            before = pair.run(lambda rank, party: FIRST[name](shape, rank, party))
            assert not any(isinstance(outcome, BaseException) for outcome in before), before
            for heap in slow:
                heap.timeout = DEADLINE
        spoiler.attach(pair.runtimes[1]._heap)
        given_before = () if before is None else (before,)
        return pair.run(lambda rank, party: operation(shape, rank, party, *given_before))[0]
    finally:
        pair.close()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATIONS)
@settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(number=st.sampled_from([0, 0, 0, 1, 2]), header=HEADERS, payload=PAYLOADS)
@example(number=0, header={}, payload=[])
@example(number=0, header={}, payload=[(share / 40, -1) for share in range(41)])
@example(number=0, header={}, payload=[(share / 40, 1 << 30) for share in range(41)])
@example(number=0, header={3: 4}, payload=[])
@example(number=0, header={4: 1 << 40}, payload=[])
def test_garbage_is_refused(
    name: str, shape: str, number: int, header: dict[int, int], payload: list[tuple[float, int]]
) -> None:
    outcome = spoil(name, shape, Spoiler(number, header, payload))
    if isinstance(outcome, BaseException):
        assert isinstance(outcome, TokenferryError), repr(outcome)
    if not header and not payload:
        assert not isinstance(outcome, BaseException) or "no sign of life" in str(outcome), repr(outcome)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("held", "put"), [(2, 0), (0, 2), (1, 0), (3, -1)])
def test_choices_that_contradict_their_counts_are_refused(shape: str, held: int, put: int) -> None:
    """Expanded rows go where the counts say: choices that came from elsewhere would be written over other rows."""
    pair, changed = Pair(), []
    heap = pair.runtimes[1]._heap
    publish = heap.publish

    def publishing(fields_of: Mapping[int, Sequence[int]]) -> None:
        offset, nbytes, num_rows = fields_of[0][3:6]
        column = 128 * -(-num_rows * 4 * TOPK // 128)  # the weights, which the ids are ahead of
        ids_end = nbytes - column
        ids_start = ids_end - 128 * -(-num_rows * 8 * TOPK // 128)
        ids = heap.stage_view(1, offset + ids_start, num_rows * 8 * TOPK).view(torch.int64)
        changed.extend((ids == held).nonzero().flatten().tolist())
        ids[ids == held] = put
        publish(fields_of)

    with mock.patch.object(heap, "publish", publishing), warnings.catch_warnings():
        warnings.simplefilter("error")  # torch resizes outputs that are too small, and warns
        outcome = pair.run(lambda rank, party: expanded(shape, rank, party))[0]
    pair.close()
    assert changed
    of_another_rank = (held, put) == (3, -1)
    assert isinstance(outcome, Received if of_another_rank else HeapError), outcome
    assert of_another_rank or "rank 1 sent rows that contradict its counts" in str(outcome)


def _spoiled_offers(rank: int, num_ranks: int, word: int, value: int) -> str:
    """A dispatch between nodes, to which rank 1 sends one wrong word over its rail."""
    scenario = NodeScenario(Case(), rank, "2x2")
    with make_buffer(rank, "2x2") as buffer:
        runtime = buffer.runtime
        assert isinstance(runtime, Runtime)
        rail = runtime.party().nodes.rail  # type: ignore[union-attr]
        post = rail.post

        def spoiled(sends: Any, receives: Any) -> Any:
            rail.post = post
            for parts in sends.values():
                parts[0][word] = value
            return post(sends, receives)

        if rank == 1:
            rail.post = spoiled  # type: ignore[method-assign]
        try:
            scenario.dispatch(buffer)
        except TokenferryError as error:
            return type(error).__name__
    return "nothing"


@pytest.mark.parametrize(("word", "value"), [(-1, 0), (-2, -1), (-2, 1 << 50)])
def test_garbage_on_the_rail_is_refused(pool_of: PoolOf, word: int, value: int) -> None:
    outcomes = pool_of(4).run(_spoiled_offers, word, value)
    assert "nothing" not in outcomes, outcomes
    assert outcomes[3] == "PeerLostError", outcomes


def test_share_with_garbage_is_refused() -> None:
    fine = [*[0] * 6, 3, 0, 1, 2, 1, 1, 1, 0, 0, 5]
    assert shares.parse_share(fine, 2, 2, False, 128).counts == [[1, 1], [1, 0]]
    for place, value in ((6, -1), (8, 0), (9, 0), (10, -2), (11, 1 << 60), (14, -1)):
        with pytest.raises(HeapError, match="relays"):
            shares.parse_share([*fine[:place], value, *fine[place + 1 :]], 2, 2, False, 128)


def test_words_of_other_ranks_do_no_harm() -> None:
    """Whatever a peer writes into the words that it may write: a deadline, no more."""
    for word in (-(1 << 63), -1, 1, 1 << 40, (1 << 63) - 1):
        pair = Pair()
        own = pair.runtimes[0]._heap
        words = own._own.words
        words[own._released + 16] = words[own._first + 16] = word
        outcome = pair.run(lambda rank, party: dispatched("several messages", rank, party))[0]
        assert isinstance(outcome, (intranode.Received, TokenferryError)), repr(outcome)
        pair.close()


def test_names_of_segments_cannot_be_guessed_and_are_private() -> None:
    segments = [Segment.create(4096) for _ in range(50)]
    try:
        names = [segment.name.removeprefix("/tokenferry-") for segment in segments]
        assert len(set(names)) == 50
        assert all(len(bytes.fromhex(name)) == 12 for name in names), "96 random bits"
        for position in range(24):
            assert len({name[position] for name in names}) > 4, "no digit is fixed"
        for segment in segments:
            assert stat.S_IMODE(os.fstat(segment._fd).st_mode) == 0o600
            with pytest.raises(FileExistsError):
                os.close(os.open(f"/dev/shm{segment.name}", os.O_CREAT | os.O_EXCL))
    finally:
        for segment in segments:
            segment.retire()
            segment.close()


def _names_while_in_use(rank: int, num_ranks: int) -> list[list[str]]:
    seen: list[list[str]] = []
    unlink = Heap.unlink

    def noting(self: Heap) -> None:
        seen.append([self._own.name.lstrip("/")])
        unlink(self)

    def named() -> list[str]:
        return [name for name in os.listdir("/dev/shm") if name in seen[0]]

    with mock.patch.object(Heap, "unlink", noting):
        buffer = Buffer(dist.group.WORLD, timeout=TIMEOUT)
    seen.append(named())
    check_works(buffer)
    seen.append(named())
    buffer.destroy()
    return seen


@pytest.mark.skipif(not Path("/dev/shm").exists(), reason="shared memory is not a folder here")
def test_segments_have_no_name_once_a_buffer_is_there(pool_of: PoolOf) -> None:
    for first, *later in pool_of(2).run(_names_while_in_use):
        assert len(first) == 1
        assert later == [[], []]


def _without_pickle(rank: int, num_ranks: int, layout: str) -> None:
    """Operations in a process that refuses to unpickle anything."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("unpickled")

    if layout:
        buffer, scenario = make_buffer(rank, layout), NodeScenario(Case(), rank, layout)
    else:
        buffer, scenario = low_latency_cases.make_buffer(), Scenario(Case(), rank, num_ranks)  # type: ignore[assignment]
    low = low_latency_cases.Scenario(low_latency_cases.Case(), rank, num_ranks)
    with buffer, ExitStack() as stack:
        for name in ("loads", "load", "Unpickler"):
            stack.enter_context(mock.patch.object(pickle, name, refuse))
        stack.enter_context(mock.patch.object(torch, "load", refuse))
        result = scenario.dispatch(buffer)
        scenario.check_dispatch(result)
        scenario.check_combine(scenario.combine(buffer, result[4]))
        scenario.check_cached(buffer.dispatch(scenario.x, handle=result[4]))
        if not layout:
            sent = low.dispatch(buffer)
            low.check_dispatch(sent)
            low.check_combine(low.combine(buffer, sent))


@pytest.mark.parametrize("layout", ["", "2x1"])
def test_operations_unpickle_nothing(pool_of: PoolOf, layout: str) -> None:
    pool_of(2).run(_without_pickle, layout)


def test_data_path_does_not_know_pickle() -> None:
    package = Path(tokenferry.__file__).parent
    files = [file for folder in ("memory", "dataplane", "modes", "rail") for file in (package / folder).rglob("*.py")]
    assert len(files) > 20
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in getattr(node, "names", [])] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [node.attr] if isinstance(node, ast.Attribute) else []
            wrong = {"pickle", "marshal", "shelve", "dill", "all_gather_object", "recv_object_list"} & set(names)
            assert not wrong, f"{file.name}: {wrong}"
