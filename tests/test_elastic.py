"""ElasticBuffer on CPU ranks: every kind of call against the oracle, bit for bit, and what must be refused."""

from __future__ import annotations

import inspect
import itertools
import math
import time
import weakref
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tokenferry
from tests.cases import Case, poisoned_memory
from tests.conftest import PoolOf, but_slow, slow
from tests.elastic_cases import Elastic, elastic_buffer
from tokenferry import (
    ArgumentError,
    Buffer,
    BufferStateError,
    CapacityError,
    DispatchHandle,
    ElasticBuffer,
    EPHandle,
    EventHandle,
    EventOverlap,
    MismatchError,
    PeerError,
)
from tokenferry import elastic as elastic_module
from tokenferry.construction import Wishes

FP8 = {"dtype": torch.float8_e4m3fn, "scales": torch.float32, "scale_columns": 3}
CASES = {
    "plain": Case(tokens=(7, 12), num_topk=3, local_experts=4, alignment=4),
    "align 1": Case(tokens=(5, 9, 2), num_topk=4, local_experts=3, bias="two"),
    "fp8": Case(tokens=(9, 4), num_topk=2, local_experts=4, alignment=8, scale_layout="padded_columns", **FP8),
    "packed scales": Case(tokens=(9, 4), num_topk=2, alignment=3, **(FP8 | {"scales": torch.int32})),
    "sparse": Case(tokens=(11, 6), routing="sparse", num_topk=5, local_experts=3, alignment=2, bias="one"),
    "duplicates": Case(tokens=(8, 3), routing="duplicates", num_topk=4, alignment=4),
    "one expert": Case(tokens=(6, 5), routing="one_expert", num_topk=2, alignment=16),
    "nothing": Case(tokens=(6, 5), routing="nothing", alignment=4),
    "no tokens": Case(tokens=(0, 0), alignment=4),
    "idle rank": Case(tokens=(0, 9), num_topk=2, alignment=4),
    "float32": Case(tokens=(6, 7), routing="own", num_topk=5, combine_dtype=torch.float32, alignment=2),
    "float64": Case(tokens=(6, 7), combine_dtype=torch.float64, num_topk=4),
    "one choice": Case(tokens=(6, 7), num_topk=1, alignment=128),
}
MODES = {"compact": (False, True), "expanded": (True, True), "compact worst": (False, False), "worst": (True, False)}


def _check(rank: int, num_ranks: int, case: Case, modes: tuple[str, ...], num_bytes: int, multiple: bool) -> None:
    with elastic_buffer(dist.group.WORLD, num_bytes, allow_multiple_reduction=multiple) as buffer, poisoned_memory():
        for expand, cpu_sync in (MODES[mode] for mode in modes):
            if case.routing in ("duplicates", "one_expert", "own") and not cpu_sync:
                case = replace(case, routing="random", local_experts=8)  # no room for an expert that is chosen twice
            Elastic(case, rank, num_ranks, expand=expand, cpu_sync=cpu_sync).check_all(buffer)


@pytest.mark.parametrize(
    ("num_ranks", "name"),
    but_slow(
        itertools.product((2, 4), CASES),
        *((2, name) for name in CASES if name not in ("plain", "idle rank")),
        *((4, name) for name in CASES if name not in ("fp8", "nothing")),
    ),
)
def test_against_the_oracle(pool_of: PoolOf, num_ranks: int, name: str) -> None:
    pool_of(num_ranks).run(_check, CASES[name], tuple(MODES), 0, True)


@pytest.mark.parametrize(
    ("num_bytes", "num_ranks"),
    but_slow(itertools.product((0, 128, 4096), (1, 3)), (0, 1), (0, 3), (4096, 1), (4096, 3)),
)
def test_small_stages_and_one_rounding(pool_of: PoolOf, num_ranks: int, num_bytes: int) -> None:
    case = Case(
        tokens=(23, 40), num_topk=4, local_experts=3, alignment=4, row_bytes=8192, combine_bytes=8192
    )  # more than the smallest stage holds
    pool_of(num_ranks).run(_check, case, ("compact", "expanded"), num_bytes, False)


def _random_cases(rank: int, num_ranks: int, seeds: range) -> None:
    with elastic_buffer(dist.group.WORLD) as buffer, poisoned_memory():
        for seed in seeds:
            source = torch.Generator().manual_seed(seed)

            def pick(values: Any, source: torch.Generator = source) -> Any:
                return values[int(torch.randint(len(values), (), generator=source))]

            case = Case(
                tokens=tuple(pick([0, 1, 5, 17, 30]) for _ in range(num_ranks)),
                num_topk=pick([1, 2, 6, 8]),
                local_experts=pick([1, 2, 7]),
                routing=pick(["random", "duplicates", "sparse", "others", "own", "second_half"]),
                alignment=pick([1, 2, 8]),
                combine_dtype=pick([torch.bfloat16, torch.float16]),
                seed=seed,
            )
            Elastic(case, rank, num_ranks, expand=seed % 2 == 0).check_all(buffer)


@pytest.mark.parametrize("seeds", [range(5), *slow(range(5, 12))], ids=str)
def test_random_cases(pool_of: PoolOf, seeds: range) -> None:
    pool_of(4).run(_random_cases, seeds)


# Refusals.


def _bad_arguments(rank: int, num_ranks: int) -> None:
    with elastic_buffer(dist.group.WORLD) as buffer:
        elastic = Elastic(Case(tokens=(5, 6), num_topk=2, alignment=4), rank, num_ranks, expand=True)
        x, ids, weights = elastic.x, elastic.given.topk_idx, elastic.given.topk_weights
        base: dict[str, Any] = {
            "topk_idx": ids, "topk_weights": weights, "num_experts": elastic.num_experts,
            "num_max_tokens_per_rank": 9,
        }  # fmt: skip
        for name, wrong in (
            ("topk_idx", {"topk_idx": None}),
            ("topk_idx", {"topk_idx": ids.int()}),
            ("topk_idx", {"topk_idx": ids + 100}),
            ("topk_idx", {"topk_idx": ids[:, :0], "topk_weights": None}),
            ("topk_weights", {"topk_weights": weights.double()}),
            ("topk_weights", {"topk_weights": weights[:, :1]}),
            ("num_experts", {"num_experts": None}),
            ("num_experts", {"num_experts": elastic.num_experts + 1}),
            ("x", {"num_max_tokens_per_rank": 4}),
            ("x", {"num_max_tokens_per_rank": None}),
            ("num_max_tokens_per_rank", {"num_max_tokens_per_rank": 1 << 30}),
            ("num_max_tokens_per_rank", {"num_max_tokens_per_rank": "9"}),
            ("expert_alignment", {"expert_alignment": 0}),
            ("num_sms", {"num_sms": -1}),
            ("num_qps", {"num_qps": 1.5}),
            ("previous_event", {"previous_event": 3}),
            ("previous_event_before_epilogue", {"previous_event_before_epilogue": 3}),
            ("cumulative_local_expert_recv_stats", {"cumulative_local_expert_recv_stats": torch.zeros(2)}),
        ):
            with pytest.raises(ArgumentError, match=f"^{name}: got"):
                buffer.dispatch(x, **(base | wrong))
        for name in ("use_nvfp4",):
            with pytest.raises(NotImplementedError, match=name):
                buffer.dispatch(x, **(base | {name: True}))
        for name in ("overlap", "num_worst_tokens", "x_global_scale", "config", "do_expand_fast"):
            with pytest.raises(TypeError, match=name):
                buffer.dispatch(x, **(base | {name: 1}))

        recv_x, _, recv_weights, handle, _ = elastic.dispatch(buffer)
        for name, beside in (
            ("topk_idx", {"topk_idx": ids}),
            ("num_experts", {"num_experts": 2 * elastic.num_experts}),
            ("num_max_tokens_per_rank", {"num_max_tokens_per_rank": 1000}),
            ("expert_alignment", {"expert_alignment": 1}),
            ("do_cpu_sync", {"do_cpu_sync": True}),
            ("topk_weights", {"topk_weights": weights[1:]}),
        ):
            with pytest.raises(ArgumentError, match=f"^{name}: got"):
                buffer.dispatch(x, handle=handle, **beside)
        with pytest.raises(ArgumentError, match=r"^x: got"):
            buffer.dispatch(x[1:], handle=handle)
        with pytest.raises(ArgumentError, match=r"^handle: got tuple"):
            buffer.dispatch(x, handle=tuple(handle.routes))  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match=r"^handle: got NoneType"):
            buffer.combine(recv_x, None)  # type: ignore[arg-type]
        for name, wrong in (
            ("topk_weights", {"topk_weights": recv_weights.view(-1, 1)}),
            ("bias", {"bias": 3}),
            ("num_sms", {"num_sms": -2}),
        ):
            with pytest.raises(ArgumentError, match=f"^{name}: got"):
                buffer.combine(recv_x, handle, **wrong)
        with pytest.raises(ArgumentError, match=r"^x: got"):
            buffer.combine(recv_x.int(), handle)
        with pytest.raises(TypeError, match="config"):
            buffer.combine(recv_x, handle, config=None)  # type: ignore[call-arg]
        kept = handle.recv_src_metadata.clone()
        handle.recv_src_metadata[0, 2] = len(recv_x)
        with pytest.raises(ArgumentError, match=r"^handle\.recv_src_metadata: got the copy"):
            buffer.combine(recv_x, handle)
        handle.recv_src_metadata[0, 2] = -2
        with pytest.raises(ArgumentError, match=r"^handle\.recv_src_metadata: got the copy -2"):
            buffer.dispatch(x, handle=handle)
        handle.recv_src_metadata = kept
        compact = buffer.dispatch(x, **base)
        with pytest.raises(ArgumentError, match=r"^do_expand: got"):
            buffer.dispatch(x, handle=compact[3], do_expand=True)
        for rows in (compact[0][1:], torch.cat([compact[0], compact[0][:1]])):
            with pytest.raises(ArgumentError, match=r"^x: got"):
                buffer.combine(rows, compact[3])
        elastic.check_all(buffer)  # nothing of this touched a peer
        buffer.destroy()
        buffer.destroy()
        with pytest.raises(BufferStateError):
            elastic.dispatch(buffer)
        with pytest.raises(BufferStateError):
            buffer.barrier()


def test_bad_arguments(pool_of: PoolOf) -> None:
    pool_of(2).run(_bad_arguments)


def _bad_construction(rank: int, num_ranks: int) -> None:
    group = dist.group.WORLD
    for name, wrong in (
        ("num_bytes", {"num_bytes": -1}),
        ("num_max_tokens_per_rank", {"num_max_tokens_per_rank": -1}),
        ("hidden", {"hidden": 1.5}),
        ("num_gpu_timeout_secs", {"num_gpu_timeout_secs": 0}),
        ("num_cpu_timeout_secs", {"num_cpu_timeout_secs": "long", "num_gpu_timeout_secs": 5}),
        ("num_cpu_timeout_secs", {"num_cpu_timeout_secs": True, "num_gpu_timeout_secs": 5}),
        ("num_gpu_timeout_secs", {"num_cpu_timeout_secs": 5, "num_gpu_timeout_secs": math.nan}),
        ("device", {"device": "tpu"}),
    ):
        with pytest.raises(ArgumentError, match=f"^{name}: got"):
            ElasticBuffer(group, **wrong)
    with pytest.raises(NotImplementedError, match="num_cpu_bytes"):
        ElasticBuffer(group, 1 << 20, num_cpu_bytes=1 << 20)
    with pytest.raises(TypeError):
        ElasticBuffer(group, num_nvl_bytes=1 << 20)  # type: ignore[call-arg]
    with pytest.raises(tokenferry.TokenferryError, match="node"):
        ElasticBuffer(group, node=rank)
    with mock.patch.object(elastic_module, "Wishes", wraps=Wishes) as wishes:
        ElasticBuffer(group, num_cpu_timeout_secs=5, num_gpu_timeout_secs=math.inf).destroy()
    assert wishes.call_args.kwargs["timeout"] == 365 * 86400


def test_bad_construction(pool_of: PoolOf) -> None:
    pool_of(2).run(_bad_construction)


def _disagreement(rank: int, num_ranks: int) -> None:
    with elastic_buffer(dist.group.WORLD) as buffer:
        elastic = Elastic(Case(tokens=(5, 6), num_topk=2), rank, num_ranks, expand=True)
        for wrong in (
            {"do_expand": rank == 0},
            {"num_max_tokens_per_rank": 20 + rank},
            {"num_experts": elastic.num_experts * (1 + rank)},
            {"topk_weights": elastic.given.topk_weights if rank == 0 else None},
        ):
            with pytest.raises(MismatchError):
                elastic.dispatch(buffer, **wrong)
        handle, weights = elastic.dispatch(buffer)[3], elastic.given.topk_weights if rank == 0 else None
        with pytest.raises(MismatchError, match="has_weights"):
            buffer.dispatch(elastic.given.x, topk_weights=weights, handle=handle)
        elastic.check_all(buffer)
        once = torch.zeros(4, 3, dtype=torch.int64)  # three rows of each token, where there is room for two
        with pytest.raises(CapacityError, match="expanded rows: got"):
            elastic.dispatch(
                buffer, topk_idx=once[: elastic.given.x.size(0)].repeat(2, 1)[: elastic.given.x.size(0)],
                topk_weights=None, do_cpu_sync=False, num_max_tokens_per_rank=6,
            )  # fmt: skip
        elastic.check_all(buffer)


def test_ranks_that_disagree_step_back(pool_of: PoolOf) -> None:
    pool_of(2).run(_disagreement)


# What else is public.


def _surface(rank: int, num_ranks: int) -> None:
    group: Any = dist.group.WORLD
    hint = ElasticBuffer.get_buffer_size_hint(group, 128, 256, num_topk=4, use_fp8_dispatch=True)
    assert hint % (2 << 20) == 0
    assert hint > 0
    hints = [ElasticBuffer.get_buffer_size_hint(group, tokens, 4096, 8) for tokens in (1, 512, 8192)]
    assert hints == sorted(hints)
    assert hints[2] > ElasticBuffer.get_buffer_size_hint(group, 8192, 4096, 8, True)
    buffer = elastic_buffer(group, None, num_max_tokens_per_rank=128, hidden=256, num_topk=4, use_fp8_dispatch=True)  # type: ignore[arg-type]
    assert buffer.num_bytes == hint
    assert buffer.group is group
    assert buffer.num_max_tokens_per_rank == 128
    assert (buffer.rank, buffer.group_size) == (rank, num_ranks)
    assert buffer.is_available()
    assert weakref.ref(buffer)() is buffer
    assert buffer.get_physical_domain_size() == buffer.get_logical_domain_size() == (1, num_ranks)
    few, more = (buffer.get_theoretical_num_sms(256, 8, nvlink_gbs=gbs) for gbs in (100, 900))
    assert 4 <= few < buffer.get_theoretical_num_sms(256, 8) < more
    assert not (few | more) & 1
    eager = elastic_buffer(group, prefer_overlap_with_compute=False)
    assert eager.get_theoretical_num_sms(256, 8) >= 16
    assert isinstance(buffer.capture(), EventHandle)
    buffer.get_comm_stream()
    for options in ({}, {"use_comm_stream": False, "with_cpu_sync": True, "sequential": False}):
        buffer.barrier(**options)
    elastic = Elastic(Case(tokens=(5, 6), num_topk=2, alignment=4), rank, num_ranks, expand=True)
    result = elastic.dispatch(buffer, num_max_tokens_per_rank=None, num_sms=12)
    assert result[3].num_max_tokens_per_rank == 128
    assert result[3].num_sms == 12
    asked = elastic.dispatch(buffer, async_with_compute_stream=True, previous_event=buffer.capture())
    assert isinstance(asked[4].event, EventHandle)
    for event in (EventOverlap(), EventOverlap(EventHandle()), EventHandle()):
        elastic.dispatch(buffer, previous_event=event, previous_event_before_epilogue=event)
        buffer.combine(asked[0], asked[3], previous_event=event, allocate_on_comm_stream=True)
    with asked[4]:
        pass
    own = elastic.dispatch(buffer, do_handle_copy=False)[3]
    assert own.topk_idx is elastic.given.topk_idx
    assert asked[3].topk_idx is not elastic.given.topk_idx
    buffer.destroy()
    eager.destroy()


def test_surface(pool_of: PoolOf) -> None:
    pool_of(2).run(_surface)


def test_signatures() -> None:
    """The order of the arguments, and their defaults."""
    assert list(inspect.signature(ElasticBuffer.__init__).parameters)[1:17] == [
        "group", "num_bytes", "num_cpu_bytes", "num_max_tokens_per_rank", "hidden", "num_topk", "use_fp8_dispatch",
        "deterministic", "allow_hybrid_mode", "allow_multiple_reduction", "prefer_overlap_with_compute", "sl_idx",
        "num_allocated_qps", "num_cpu_timeout_secs", "num_gpu_timeout_secs", "explicitly_destroy",
    ]  # fmt: skip
    assert list(inspect.signature(ElasticBuffer.dispatch).parameters)[1:20] == [
        "x", "topk_idx", "topk_weights", "cumulative_local_expert_recv_stats", "num_experts",
        "num_max_tokens_per_rank", "expert_alignment", "num_sms", "num_qps", "previous_event",
        "previous_event_before_epilogue", "async_with_compute_stream", "allocate_on_comm_stream", "handle",
        "do_handle_copy", "do_cpu_sync", "do_expand", "do_zero_padding", "use_tma_aligned_col_major_sf",
    ]  # fmt: skip
    assert list(inspect.signature(ElasticBuffer.combine).parameters)[1:] == [
        "x", "handle", "topk_weights", "bias", "num_sms", "num_qps", "previous_event",
        "previous_event_before_epilogue", "async_with_compute_stream", "allocate_on_comm_stream",
    ]  # fmt: skip


def _barrier(rank: int, num_ranks: int, path: str) -> None:
    with elastic_buffer(dist.group.WORLD) as buffer:
        for turn in range(3):
            if rank == turn % num_ranks:
                torch.empty(1 << 20).normal_()  # the others come first
                with open(f"{path}/{turn}", "w"):
                    pass
            buffer.barrier()
            with open(f"{path}/{turn}"):
                pass
            with pytest.raises(FileNotFoundError), open(f"{path}/{turn + 10}"):
                pass


def _barrier_alone(rank: int, num_ranks: int) -> str:
    with elastic_buffer(dist.group.WORLD, num_gpu_timeout_secs=0.5, num_cpu_timeout_secs=0.5) as buffer:
        if rank:
            time.sleep(1.0)
            return ""
        with pytest.raises(PeerError) as caught:
            buffer.barrier()
        return str(caught.value)


def test_barrier_that_fails_says_so(pool_of: PoolOf) -> None:
    assert pool_of(2).run(_barrier_alone)[0].startswith("barrier (epoch 1): rank 1: ")


def test_barrier_waits_for_all(pool_of: PoolOf, tmp_path: Any) -> None:
    pool_of(3).run(_barrier, str(tmp_path))


def _mutable(rank: int, num_ranks: int) -> None:
    """Tensors are taken out of the handle and put back, as a client does that saves them for backward."""
    names = (
        "topk_idx", "psum_num_recv_tokens_per_scaleup_rank", "psum_num_recv_tokens_per_expert", "recv_src_metadata",
        "dst_buffer_slot_idx", "token_metadata_at_forward", "channel_linked_list",
        "num_unaligned_recv_tokens_per_expert",
    )  # fmt: skip
    with elastic_buffer(dist.group.WORLD) as buffer:
        for expand in (False, True):
            elastic = Elastic(Case(tokens=(5, 6), num_topk=2, alignment=4), rank, num_ranks, expand=expand)
            recv_x, *_, handle, _ = elastic.dispatch(buffer)
            assert isinstance(handle, EPHandle)
            assert isinstance(handle.routes, DispatchHandle)
            saved = {name: getattr(handle, name) for name in names}
            for name in names:
                setattr(handle, name, None)
            for name, value in saved.items():
                setattr(handle, name, None if value is None else value.clone())
            elastic.check_handle(handle)
            elastic.check_combine(buffer, handle, len(recv_x))
            elastic.check_rows(buffer.dispatch(elastic.x, handle=handle)[0])


def test_handles_are_mutable(pool_of: PoolOf) -> None:
    pool_of(2).run(_mutable)


class Quantised(NamedTuple):
    """As what a framework's own quantisation returns."""

    data: torch.Tensor
    scales: torch.Tensor


def _named_tuples(rank: int, num_ranks: int) -> None:
    with elastic_buffer(dist.group.WORLD) as buffer:
        for expand in (False, True):
            case = Elastic(CASES["fp8"], rank, num_ranks, expand=expand)
            handle = case.dispatch(buffer)[3]
            quantised = Quantised(*case.x)
            case.check_rows(case.dispatch(buffer, x=quantised)[0])
            case.check_rows(buffer.dispatch(quantised, handle=handle)[0])


def test_rows_and_scales_in_a_named_tuple(pool_of: PoolOf) -> None:
    pool_of(2).run(_named_tuples)


def _bad_ids_later(rank: int, num_ranks: int) -> None:
    with elastic_buffer(dist.group.WORLD) as buffer:
        case = Elastic(CASES["plain"], rank, num_ranks, expand=True)
        for _ in range(2):
            case.check_rows(case.dispatch(buffer)[0])
            ids = case.given.topk_idx.clone()
            ids[0, 0] = case.num_experts
            with pytest.raises(ArgumentError, match="topk_idx"):
                case.dispatch(buffer, topk_idx=ids)


def test_ids_are_looked_at_in_calls_that_are_known(pool_of: PoolOf) -> None:
    pool_of(2).run(_bad_ids_later)


def _beside_a_buffer(rank: int, num_ranks: int) -> None:
    """Two buffers of the two interfaces, and several handles at a time."""
    from tests.cases import check_works

    group = dist.group.WORLD
    with Buffer(group, timeout=30.0) as old, elastic_buffer(group) as buffer:
        cases = [Elastic(Case(tokens=(5, 6), num_topk=2, seed=s), rank, num_ranks, expand=s > 0) for s in range(3)]
        results = [case.dispatch(buffer) for case in cases]
        check_works(old)
        for case, result in list(zip(cases, results, strict=True))[::-1]:
            case.check_rows(result[0])
            case.check_combine(buffer, result[3], len(result[0]))
            case.check_combine(buffer, result[3], len(result[0]))


def test_beside_a_buffer(pool_of: PoolOf) -> None:
    pool_of(2).run(_beside_a_buffer)
