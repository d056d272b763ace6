"""Wrong arguments of low-latency operations: an error that names the argument, and no peer notices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import PoolOf
from tests.low_latency_cases import Case, Scenario, make_buffer
from tests.test_faults import outcome
from tokenferry import Buffer

N, E, H, K = 6, 8, 128, 3


def _x(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def _ids(*shape: int, value: int = 1) -> torch.Tensor:
    ids = torch.arange(shape[0] * (shape[1] if len(shape) > 1 else 1)).remainder(E)
    ids = ids.view(shape).clone()
    if ids.numel() and value != 1:
        ids.view(-1)[-1] = value
    return ids


DISPATCH: dict[str, tuple[str, dict[str, Any]]] = {
    "x of another dtype": ("x", {"x": _x(4, H, dtype=torch.float16)}),
    "x of one dimension": ("x", {"x": _x(H)}),
    "x on another device": ("x", {"x": torch.empty(4, H, dtype=torch.bfloat16, device="meta")}),
    "x is no tensor": ("x", {"x": None}),
    "x quantised already": ("x", {"x": (_x(4, H), torch.zeros(4, 1))}),
    "more tokens than the most": ("x", {"x": _x(N + 1, H), "topk_idx": _ids(N + 1, K)}),
    "hidden not a multiple of 128": ("x", {"x": _x(4, 136)}),
    "hidden 0": ("x", {"x": _x(4, 0)}),
    "hidden not a multiple of 8": ("x", {"x": _x(4, 12), "use_fp8": False}),
    "ids of another dtype": ("topk_idx", {"topk_idx": _ids(4, K).int()}),
    "ids of one dimension": ("topk_idx", {"topk_idx": _ids(4)}),
    "no choices": ("topk_idx", {"topk_idx": _ids(4, 0)}),
    "ids of other tokens": ("topk_idx", {"topk_idx": _ids(3, K)}),
    "ids not contiguous": ("topk_idx", {"topk_idx": _ids(K, 4).t()}),
    "ids on another device": ("topk_idx", {"topk_idx": torch.empty(4, K, dtype=torch.int64, device="meta")}),
    "an id too large": ("topk_idx", {"topk_idx": _ids(4, K, value=E)}),
    "an id below -1": ("topk_idx", {"topk_idx": _ids(4, K, value=-2)}),
    "too many choices": ("topk_idx", {"topk_idx": torch.full((4, 33), -1)}),
    "more than N choices of an expert": ("topk_idx", {"topk_idx": torch.zeros(4, 2, dtype=torch.int64)}),
    "N of 0": ("num_max_dispatch_tokens_per_rank", {"num_max_dispatch_tokens_per_rank": 0}),
    "N no int": ("num_max_dispatch_tokens_per_rank", {"num_max_dispatch_tokens_per_rank": 6.0}),
    "experts not shared evenly": ("num_experts", {"num_experts": E + 1}),
    "no experts": ("num_experts", {"num_experts": 0}),
    "ue8m0 without round_scale": ("use_ue8m0", {"use_ue8m0": True}),
    "event and hook": ("async_finish", {"async_finish": True, "return_recv_hook": True}),
    "received rows of another dtype": (
        "cumulative_local_expert_recv_stats",
        {"cumulative_local_expert_recv_stats": torch.zeros(E // 2, dtype=torch.int64)},
    ),
    "received rows of another length": (
        "cumulative_local_expert_recv_stats",
        {"cumulative_local_expert_recv_stats": torch.zeros(E, dtype=torch.int32)},
    ),
    "waits of another dtype": (
        "dispatch_wait_recv_cost_stats",
        {"dispatch_wait_recv_cost_stats": torch.zeros(2, dtype=torch.int32)},
    ),
    "waits of another shape": (
        "dispatch_wait_recv_cost_stats",
        {"dispatch_wait_recv_cost_stats": torch.zeros(2, 2, dtype=torch.int64)},
    ),
    "waits not contiguous": (
        "dispatch_wait_recv_cost_stats",
        {"dispatch_wait_recv_cost_stats": torch.zeros(4, dtype=torch.int64)[::2]},
    ),
}

SLAB = (E // 2, 2 * N, H)
HANDLE = (torch.zeros(SLAB[:2], dtype=torch.int32), torch.zeros(E // 2, 2, dtype=torch.int64), N, H, E)


def _handle(at: int, value: object) -> dict[str, Any]:
    return {"handle": (*HANDLE[:at], value, *HANDLE[at + 1 :])}


COMBINE: dict[str, tuple[str, dict[str, Any]]] = {
    "x of another dtype": ("x", {"x": _x(*SLAB, dtype=torch.float32)}),
    "x of two dimensions": ("x", {"x": _x(SLAB[0] * SLAB[1], H)}),
    "x of another slab": ("x", {"x": _x(SLAB[0], N, H)}),
    "x of another hidden": ("x", {"x": _x(*SLAB[:2], 256)}),
    "x on another device": ("x", {"x": torch.empty(SLAB, dtype=torch.bfloat16, device="meta")}),
    "x wrong beside zero_copy": ("x", {"x": _x(*SLAB[:2], 256), "zero_copy": True}),
    "ids of another dtype": ("topk_idx", {"topk_idx": _ids(4, K).int()}),
    "more tokens than the most": ("topk_idx", {"topk_idx": _ids(7, K), "topk_weights": torch.zeros(7, K)}),
    "an id too large": ("topk_idx", {"topk_idx": _ids(4, K, value=E)}),
    "an id below -1": ("topk_idx", {"topk_idx": _ids(4, K, value=-2)}),
    "ids not contiguous": ("topk_idx", {"topk_idx": _ids(K, 4).t()}),
    "weights of another dtype": ("topk_weights", {"topk_weights": torch.zeros(4, K, dtype=torch.float64)}),
    "weights of other choices": ("topk_weights", {"topk_weights": torch.zeros(4, K + 1)}),
    "weights of other tokens": ("topk_weights", {"topk_weights": torch.zeros(3, K)}),
    "no weights": ("topk_weights", {"topk_weights": None}),
    "no handle": ("handle", {"handle": None}),
    "a short handle": ("handle", {"handle": HANDLE[:4]}),
    "a long handle": ("handle", {"handle": (*HANDLE, 1)}),
    "src_info of another shape": ("handle.src_info", _handle(0, HANDLE[0][:, :-1])),
    "src_info of another dtype": ("handle.src_info", _handle(0, HANDLE[0].long())),
    "ranges of another shape": ("handle.layout_range", _handle(1, HANDLE[1][:-1])),
    "ranges of another dtype": ("handle.layout_range", _handle(1, HANDLE[1].int())),
    "another N": ("handle.src_info", _handle(2, N + 1)),
    "N no int": ("handle.num_max_dispatch_tokens_per_rank", _handle(2, None)),
    "another hidden": ("x", _handle(3, 256)),
    "other experts": ("handle.src_info", _handle(4, 2 * E)),
    "experts not shared evenly": ("handle.num_experts", _handle(4, E + 1)),
    "logfmt and zero_copy": ("use_logfmt", {"use_logfmt": True, "zero_copy": True}),
    "event and hook": ("async_finish", {"async_finish": True, "return_recv_hook": True}),
    "out of another shape": ("out", {"out": _x(5, H)}),
    "out of another dtype": ("out", {"out": _x(4, H, dtype=torch.float32)}),
    "out not contiguous": ("out", {"out": _x(4, 2 * H)[:, ::2]}),
    "out is no tensor": ("out", {"out": [1]}),
    "waits of another dtype": (
        "combine_wait_recv_cost_stats",
        {"combine_wait_recv_cost_stats": torch.zeros(2, dtype=torch.float32)},
    ),
    "waits of another shape": (
        "combine_wait_recv_cost_stats",
        {"combine_wait_recv_cost_stats": torch.zeros(3, dtype=torch.int64)},
    ),
}


def bad_dispatch(buffer: Buffer, options: dict[str, Any]) -> None:
    given = {
        "x": _x(4, H),
        "topk_idx": _ids(4, K),
        "num_max_dispatch_tokens_per_rank": N,
        "num_experts": E,
        **options,
    }
    buffer.low_latency_dispatch(**given)


def bad_combine(buffer: Buffer, options: dict[str, Any]) -> None:
    given = {
        "x": _x(*SLAB),
        "topk_idx": _ids(4, K),
        "topk_weights": torch.zeros(4, K),
        "handle": HANDLE,
        **options,
    }
    buffer.low_latency_combine(**given)


def all_wrong(rank: int, num_ranks: int) -> dict[str, dict[str, Any]]:
    """Rank 1 makes every mistake, while rank 0 waits for its messages; both go on."""
    scenario = Scenario(Case(tokens=(4, 5)), rank, num_ranks)
    results = {}
    with make_buffer() as buffer:
        first = scenario.dispatch(buffer)
        if rank == 1:
            for name, (_, options) in DISPATCH.items():
                results[f"dispatch: {name}"] = outcome(lambda options=options: bad_dispatch(buffer, options))
            for name, (_, options) in COMBINE.items():
                results[f"combine: {name}"] = outcome(lambda options=options: bad_combine(buffer, options))
            bad_zero = {"num_max_dispatch_tokens_per_rank": 4, "hidden": 128, "num_experts": 8}
            for name in bad_zero:
                results[f"clean: {name}"] = outcome(
                    lambda name=name: buffer.clean_low_latency_buffer(**{**bad_zero, name: 0})
                )
            results["next: handle"] = outcome(lambda: buffer.get_next_low_latency_combine_buffer(HANDLE[:3]))
        scenario.check_dispatch(first)
        scenario.check_combine(scenario.combine(buffer, first))
        scenario.check_dispatch(scenario.dispatch(buffer))
    return results


@pytest.fixture(scope="module")
def mistakes(pool_of: PoolOf) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = pool_of(2).run(all_wrong)[1]
    return results


WANTED = {
    **{f"dispatch: {name}": argument for name, (argument, _) in DISPATCH.items()},
    **{f"combine: {name}": argument for name, (argument, _) in COMBINE.items()},
    **{f"clean: {name}": name for name in ("num_max_dispatch_tokens_per_rank", "hidden", "num_experts")},
    "next: handle": "handle",
}


@pytest.mark.parametrize("mistake", WANTED)
def test_mistake_is_named(mistakes: dict[str, dict[str, Any]], mistake: str) -> None:
    result = mistakes[mistake]
    assert result["kind"] == "ArgumentError", result
    assert result["text"].startswith(WANTED[mistake]), result
