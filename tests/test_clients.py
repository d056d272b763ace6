"""Every framework's calls on groups of one, two, three and six ranks, with and without tokens; further contracts."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.cases import TIMEOUT, Case, Scenario
from tests.clients import MOST, SERVING, Site
from tests.conftest import PoolOf, slow
from tests.elastic_cases import elastic_buffer
from tests.low_latency_cases import make_buffer
from tests.test_elastic_clients import CLIENTS as ELASTIC
from tests.test_elastic_clients import TOKENS
from tests.training_clients import TRAINING
from tokenferry import Buffer, compat
from tokenferry.construction import DEVICE_VARIABLE

SETS: dict[str, dict[str, Any]] = {"serving": SERVING, "training": TRAINING, "elastic": ELASTIC}
PARTS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0,), (1,), (2,), (3,), (4,), (5,)),
    2: ((0, 5), (1, 4), (2, 3)),
    3: ((0, 2, 4), (1, 3, 5)),
    6: ((0, 1, 2, 3, 4, 5),),
}
WHO_HAS_TOKENS = ("all", "all but the first", "none")


@contextmanager
def named_deep_ep() -> Iterator[Any]:
    compat.install()
    try:
        yield importlib.import_module("deep_ep")
    finally:
        compat.uninstall()


def run_clients(rank: int, num_ranks: int, size: int, kind: str, device: str = "cpu") -> None:
    """Clients on all groups of a size at the same time; those that serve in inference mode, where frameworks are."""
    parts = PARTS[size] if num_ranks == 6 else (tuple(range(num_ranks)),)
    groups = {part: dist.new_group(list(part)) for part in parts}
    mine = next(group for part, group in groups.items() if rank in part)
    named = mock.patch.dict("os.environ", {DEVICE_VARIABLE: device})  # no framework names the device of its Buffer
    with named, named_deep_ep() as deep_ep, nullcontext() if device == "cpu" else torch.device(device):
        for name, client in SETS[kind].items():
            for who in WHO_HAS_TOKENS:
                first = dist.get_rank(mine) == 0
                if who == "all but the first" and client is ELASTIC["megatron"]:
                    continue  # it says that no rank has more tokens than it has itself
                num_tokens = TOKENS if who == "all" or (who == "all but the first" and not first) else 0
                try:
                    with torch.inference_mode(kind == "serving"):
                        client(deep_ep, Site(mine, num_tokens))
                except Exception as error:
                    error.add_note(f"{name}, tokens: {who}")
                    raise
    dist.barrier()


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("size", [3, *slow(1, 2, 6)])
def test_sequences_of_calls(pool_of: PoolOf, size: int, kind: str) -> None:
    pool_of(6).run(run_clients, size, kind)


# Contracts that no client alone shows.


def _two_batches(rank: int, num_ranks: int) -> None:
    """Two threads share a Buffer and take turns, each with an operation of the other between its own two."""
    turns = [threading.Semaphore(1), threading.Semaphore(0)]
    scenarios = [Scenario(Case(tokens=(9, 0, 5), num_topk=4, seed=seed), rank, num_ranks) for seed in range(2)]
    failures: list[BaseException] = []

    def batch(me: int, buffer: Buffer) -> None:
        scenario = scenarios[me]
        try:
            for _ in range(20):
                assert turns[me].acquire(timeout=TIMEOUT)
                previous = buffer.capture()
                result = scenario.dispatch(buffer, previous_event=previous)
                turns[1 - me].release()
                scenario.check_dispatch(result)
                assert turns[me].acquire(timeout=TIMEOUT)
                combined = scenario.combine(buffer, result[4], previous_event=buffer.capture())
                turns[1 - me].release()
                scenario.check_combine(combined)
        except BaseException as error:
            failures.append(error)
            turns[1 - me].release()

    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        threads = [threading.Thread(target=batch, args=(me, buffer)) for me in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_two_threads_take_turns_on_one_buffer(pool_of: PoolOf) -> None:
    pool_of(3).run(_two_batches)


def _single_scale(rank: int, num_ranks: int) -> None:
    """One token of one block: its scale is a view of a scalar."""
    case = Case(tokens=(1,), row_bytes=128, dtype=torch.float8_e4m3fn, scales=torch.float32, num_topk=2)
    scenario = Scenario(case, rank, num_ranks)
    assert scenario.given.scales is not None
    scale = scenario.given.scales.clone().reshape(())
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        given = scenario.layout_arguments(buffer) | scenario.topk_arguments()
        scenario.check_dispatch(buffer.dispatch((scenario.given.x, scale.view(1, 1)), **given))


def test_single_scale(pool_of: PoolOf) -> None:
    pool_of(3).run(_single_scale)


def _wanting_gradients(rank: int, num_ranks: int) -> None:
    """Every output of every mode may be made a leaf, and goes on into the next operation as it is."""

    def leaves(*outputs: Any) -> None:
        for output in outputs:
            assert output.requires_grad_().is_leaf

    site = Site(dist.group.WORLD, TOKENS)
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        x, weights = site.x.clone().requires_grad_(), site.weights.clone().requires_grad_()
        per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(site.ids, site.num_experts)
        rows, _, recv_weights, _, handle, _ = buffer.dispatch(
            x, None, per_rank, None, member, per_expert, site.ids, weights
        )
        leaves(rows, recv_weights)
        combined, back, _ = buffer.combine(rows, handle, recv_weights, bias=x)  # type: ignore[arg-type]
        assert not combined.requires_grad
        leaves(combined, back)
        assert torch.equal(combined, (site.x * (site.copies + 1)).bfloat16())
        leaves(buffer.dispatch(combined, handle=handle)[0])
    with make_buffer() as buffer:
        slabs, counts, quick, _, _ = buffer.low_latency_dispatch(x, site.ids, MOST, site.num_experts, use_fp8=False)
        leaves(slabs)
        out = site.slab_experts(slabs.detach(), counts).requires_grad_()  # type: ignore[union-attr]
        y = torch.empty_like(site.x).requires_grad_()
        assert buffer.low_latency_combine(out, site.ids, weights, quick, out=y)[0] is y
        site.check(y.detach())
        leaves(buffer.low_latency_combine(out, site.ids, weights, quick)[0])
        rows, scales = buffer.low_latency_dispatch(x, site.ids, MOST, site.num_experts)[0]
        leaves(scales)
    with elastic_buffer(dist.group.WORLD, num_max_tokens_per_rank=MOST) as elastic:
        rows, _, recv_weights, ep_handle, _ = elastic.dispatch(
            x, site.ids, weights, num_experts=site.num_experts, do_expand=True
        )
        leaves(rows, recv_weights)
        leaves(*elastic.combine(rows, ep_handle, recv_weights)[:2])  # type: ignore[arg-type]


def test_outputs_may_want_gradients(pool_of: PoolOf) -> None:
    pool_of(3).run(_wanting_gradients)


def _random_sizes(rank: int, num_ranks: int, times: int, seed: int) -> int:
    """Dispatches of random size, one after the other; returns the tokens received.

    Row t of rank r in turn n is r, n, t: what must come is known without an oracle.
    """
    most, most_choices = 24, 4
    common = torch.Generator().manual_seed(seed)
    received = 0
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        for turn in range(times):
            tokens = torch.randint(0, most, (num_ranks,), generator=common).tolist()
            topk, width = (int(n) for n in torch.randint(1, most_choices + 1, (2,), generator=common))
            all_ids = [torch.randint(-1, 2 * num_ranks, (n, topk), generator=common) for n in tokens]
            sent = [torch.empty(n, 4 * width, dtype=torch.int32) for n in tokens]
            for source, rows in enumerate(sent):
                rows[:] = torch.arange(len(rows)).unsqueeze(1) + 1000 * source + 10_000 * turn
            per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(all_ids[rank], 2 * num_ranks)
            recv_x, ids, _, counts, handle, _ = buffer.dispatch(
                sent[rank], None, per_rank, None, member, per_expert, all_ids[rank], torch.ones(tokens[rank], topk)
            )
            mine = [(chosen // 2 == rank) & (chosen >= 0) for chosen in all_ids]
            wanted = torch.cat([rows[choices.any(1)] for rows, choices in zip(sent, mine, strict=True)])
            assert torch.equal(recv_x, wanted), turn  # type: ignore[arg-type]
            local = [
                chosen.sub(2 * rank).where(own, -1)[own.any(1)] for chosen, own in zip(all_ids, mine, strict=True)
            ]
            assert torch.equal(ids, torch.cat(local)), turn  # type: ignore[arg-type]
            assert counts == [int(ids.eq(expert).sum()) for expert in range(2)], turn  # type: ignore[union-attr]
            received += len(wanted)
            if turn % 10 == 0:
                y, _, _ = buffer.combine(recv_x.double(), handle)  # type: ignore[union-attr, arg-type]
                assert torch.equal(y, sent[rank] * member.sum(1, keepdim=True).double()), turn
    return received


@pytest.mark.parametrize("times", [100, pytest.param(100_000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_dispatches_of_random_size(pool_of: PoolOf, times: int) -> None:
    received = pool_of(2).run(_random_sizes, times, times)
    assert min(received) > 5 * times
