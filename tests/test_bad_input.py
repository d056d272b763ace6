"""Bad arguments on one rank: an error that names the argument, and peers that notice nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.cases import TIMEOUT, Case, Scenario, check_works
from tests.conftest import PoolOf
from tokenferry import ArgumentError, Buffer, Config
from tokenferry.validation import check_tensor

CASE = Case(tokens=(9, 6), num_topk=4, local_experts=3, bias="two")
FP8 = Case(
    tokens=(9, 6), dtype=torch.float8_e4m3fn, scales=torch.float32, scale_columns=2, num_topk=4, local_experts=3
)
NUM_RANKS, NUM_EXPERTS, NUM_TOKENS = 2, 6, 6
"""Of the cases, on rank 1, which is the one that errs."""

Change = Callable[[dict[str, Any]], dict[str, Any]]


def replaced(name: str, change: Callable[[Any], Any]) -> Change:
    """The arguments with one of them changed."""
    return lambda arguments: arguments | {name: change(arguments[name])}


def given(**values: Any) -> Change:
    """The arguments with some set."""
    return lambda arguments: arguments | values


def element(index: int, change: Callable[[Any], Any]) -> Change:
    """The arguments with one element of the handle changed."""
    return replaced("handle", lambda handle: (*handle[:index], change(handle[index]), *handle[index + 1 :]))


def part(index: int, change: Callable[[Any], Any]) -> Change:
    """The arguments with one part of a tuple x changed."""
    return replaced("x", lambda x: tuple(change(p) if i == index else p for i, p in enumerate(x)))


def meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to("meta")


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def with_value(value: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor.flatten()[-1] = value
        return tensor

    return change


def one_more(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[0] += 1
    return tensor


def longer(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:1]])


def wider(tensor: torch.Tensor) -> torch.Tensor:
    return torch.cat([tensor, tensor[:, :1]], 1)


NOT_INTS: tuple[Any, ...] = (True, 1.0, "1", torch.ones(2))

LAYOUT: list[tuple[str, Change]] = [
    ("topk_idx", replaced("topk_idx", torch.Tensor.int)),
    ("topk_idx", replaced("topk_idx", torch.Tensor.float)),
    ("topk_idx", replaced("topk_idx", torch.Tensor.flatten)),
    ("topk_idx", replaced("topk_idx", torch.Tensor.tolist)),
    ("topk_idx", replaced("topk_idx", strided)),
    ("topk_idx", replaced("topk_idx", meta)),
    ("topk_idx", given(topk_idx=None)),
    ("topk_idx", replaced("topk_idx", with_value(NUM_EXPERTS))),
    ("topk_idx", replaced("topk_idx", with_value(-2))),
    ("topk_idx", replaced("topk_idx", with_value(2**40))),
    ("topk_idx", given(topk_idx=torch.zeros(6, 33, dtype=torch.int64))),
    ("num_experts", given(num_experts=7)),
    ("num_experts", given(num_experts=0)),
    ("num_experts", given(num_experts=-2)),
    *[("num_experts", given(num_experts=value)) for value in (*NOT_INTS, None)],
]

DISPATCH: list[tuple[str, Change]] = [
    ("x", replaced("x", torch.Tensor.flatten)),
    ("x", replaced("x", lambda x: x[None])),
    ("x", replaced("x", meta)),
    ("is_token_in_rank", replaced("x", longer)),
    ("x", replaced("x", torch.Tensor.tolist)),
    ("x", replaced("x", torch.Tensor.to_sparse)),
    ("x", given(x=None)),
    ("x", replaced("x", lambda x: x[:, :5])),
    ("x", replaced("x", lambda x: x[:, :0])),
    ("x", replaced("x", lambda x: torch.zeros(6, 8, dtype=torch.complex64))),
    ("x", replaced("x", lambda x: (x,))),
    ("x", replaced("x", lambda x: (x.view(torch.uint8), torch.ones(6, 1), torch.ones(6, 1)))),
    ("num_tokens_per_rank", given(num_tokens_per_rank=None)),
    ("num_tokens_per_rank", replaced("num_tokens_per_rank", torch.Tensor.long)),
    ("num_tokens_per_rank", replaced("num_tokens_per_rank", longer)),
    ("num_tokens_per_rank", replaced("num_tokens_per_rank", strided)),
    ("num_tokens_per_rank", replaced("num_tokens_per_rank", meta)),
    ("num_tokens_per_rank", replaced("num_tokens_per_rank", one_more)),
    ("num_tokens_per_rank", replaced("num_tokens_per_rank", torch.Tensor.tolist)),
    ("is_token_in_rank", given(is_token_in_rank=None)),
    ("is_token_in_rank", replaced("is_token_in_rank", torch.Tensor.int)),
    ("is_token_in_rank", replaced("is_token_in_rank", longer)),
    ("is_token_in_rank", replaced("is_token_in_rank", wider)),
    ("is_token_in_rank", replaced("is_token_in_rank", strided)),
    ("is_token_in_rank", replaced("is_token_in_rank", meta)),
    ("is_token_in_rank", replaced("is_token_in_rank", torch.Tensor.flatten)),
    ("num_tokens_per_expert", given(num_tokens_per_expert=None)),
    ("num_tokens_per_expert", replaced("num_tokens_per_expert", torch.Tensor.long)),
    ("num_tokens_per_expert", replaced("num_tokens_per_expert", longer)),
    ("num_tokens_per_expert", replaced("num_tokens_per_expert", strided)),
    ("num_tokens_per_expert", replaced("num_tokens_per_expert", meta)),
    ("num_tokens_per_expert", given(num_tokens_per_expert=torch.empty(0, dtype=torch.int32))),
    ("num_tokens_per_expert", replaced("num_tokens_per_expert", lambda counts: counts - 100)),
    ("num_tokens_per_expert", replaced("num_tokens_per_expert", lambda counts: counts + 1000)),
    ("topk_idx", replaced("topk_idx", torch.Tensor.int)),
    ("topk_idx", replaced("topk_idx", longer)),
    ("topk_idx", replaced("topk_idx", strided)),
    ("topk_idx", replaced("topk_idx", meta)),
    ("topk_idx", replaced("topk_idx", with_value(NUM_EXPERTS))),
    ("topk_idx", replaced("topk_idx", with_value(-2))),
    ("topk", given(topk_idx=None)),
    ("topk", given(topk_weights=None)),
    ("topk_idx", given(topk_idx=torch.zeros(6, 33, dtype=torch.int64), topk_weights=torch.zeros(6, 33))),
    ("topk_weights", replaced("topk_weights", torch.Tensor.bfloat16)),
    ("topk_weights", replaced("topk_weights", torch.Tensor.double)),
    ("topk_weights", replaced("topk_weights", longer)),
    ("topk_weights", replaced("topk_weights", wider)),
    ("topk_weights", replaced("topk_weights", meta)),
    ("topk_weights", replaced("topk_weights", torch.Tensor.to_sparse)),
    ("num_worst_tokens", given(topk_idx=None, topk_weights=None, num_worst_tokens=64)),
    ("num_worst_tokens", given(num_worst_tokens=-1)),
    *[("num_worst_tokens", given(num_worst_tokens=value)) for value in NOT_INTS],
    ("expert_alignment", given(expert_alignment=0)),
    ("expert_alignment", given(expert_alignment=-8)),
    *[("expert_alignment", given(expert_alignment=value)) for value in (*NOT_INTS, None)],
    ("config", given(config=Config(21))),
    ("config", given(config={"num_sms": 20})),
    ("config", given(config=20)),
]

SCALED_DISPATCH: list[tuple[str, Change]] = [
    ("x", replaced("x", list)),
    ("x", replaced("x", lambda x: (x[0], None))),
    ("x", part(0, torch.Tensor.float)),
    ("x", part(0, meta)),
    ("x", part(0, torch.Tensor.flatten)),
    ("x", part(1, longer)),
    ("x", part(1, torch.Tensor.double)),
    ("x", part(1, torch.Tensor.bfloat16)),
    ("x", part(1, torch.Tensor.long)),
    ("x", part(1, torch.Tensor.flatten)),
    ("x", part(1, meta)),
    ("x", part(1, torch.Tensor.tolist)),
]

HANDLE: list[tuple[str, Change]] = [
    ("handle", replaced("handle", lambda handle: handle[:5])),
    ("handle", replaced("handle", lambda handle: (*handle, handle[0]))),
    ("handle", replaced("handle", lambda handle: handle[0])),
    ("handle", replaced("handle", lambda handle: dict(enumerate(handle)))),
    ("handle", element(0, lambda matrix: torch.zeros(3, 3, dtype=torch.int32))),
    ("handle", element(0, torch.Tensor.long)),
    ("handle", element(0, lambda matrix: None)),
    ("handle", element(1, lambda matrix: torch.zeros(3, 1, dtype=torch.int32))),
    ("handle", element(3, lambda sources: sources[:-1])),
    ("handle", element(3, meta)),
    ("handle", element(4, torch.Tensor.int)),
    ("handle", element(4, wider)),
    ("handle", element(4, torch.zeros_like)),
    ("handle", element(4, longer)),
    ("handle", element(5, torch.Tensor.float)),
    ("handle", given(handle=())),
    ("config", given(config=Config(21))),
    ("config", given(config="fast")),
]

CACHED_DISPATCH: list[tuple[str, Change]] = [
    *HANDLE,
    ("x", replaced("x", longer)),
    ("x", replaced("x", lambda x: x[:-1])),
    ("x", replaced("x", lambda x: x[:, :5])),
    ("x", replaced("x", meta)),
    ("topk_idx", given(topk_idx=torch.zeros(6, 4, dtype=torch.int64))),
    ("topk_weights", given(topk_weights=torch.zeros(6, 4))),
    ("topk", given(topk_idx=torch.zeros(6, 4, dtype=torch.int64), topk_weights=torch.zeros(6, 4))),
]

COMBINE: list[tuple[str, Change]] = [
    *HANDLE,
    ("handle", given(handle=None)),
    ("x", replaced("x", longer)),
    ("x", replaced("x", lambda x: x[:-1])),
    ("x", replaced("x", torch.Tensor.flatten)),
    ("x", replaced("x", meta)),
    ("x", replaced("x", torch.Tensor.int)),
    ("x", replaced("x", lambda x: x.to(torch.float8_e4m3fn))),
    ("x", replaced("x", lambda x: x.to(torch.complex64))),
    ("x", replaced("x", lambda x: x[:, :5])),
    ("x", replaced("x", lambda x: x[:, :0])),
    ("x", replaced("x", lambda x: (x, torch.ones(len(x), 1)))),
    ("x", given(x=None)),
    ("topk_weights", replaced("topk_weights", longer)),
    ("topk_weights", replaced("topk_weights", torch.Tensor.bfloat16)),
    ("topk_weights", replaced("topk_weights", torch.Tensor.flatten)),
    ("topk_weights", replaced("topk_weights", meta)),
    ("topk_weights", replaced("topk_weights", lambda weights: weights[:, :0])),
    ("topk_weights", replaced("topk_weights", lambda weights: weights[:, :1].expand(-1, 33))),
    ("bias", replaced("bias", list)),
    ("bias", replaced("bias", lambda bias: (*bias, bias[0]))),
    ("bias", replaced("bias", lambda bias: bias[:1])),
    ("bias", replaced("bias", lambda bias: bias[0].float())),
    ("bias", replaced("bias", lambda bias: longer(bias[0]))),
    ("bias", replaced("bias", lambda bias: bias[0][0])),
    ("bias", replaced("bias", lambda bias: (bias[0], wider(bias[1])))),
    ("bias", replaced("bias", lambda bias: (None, meta(bias[1])))),
    ("bias", replaced("bias", lambda bias: (bias[0], 0.0))),
    ("bias", given(bias=0.0)),
]

CALLS = {
    "layout": (CASE, LAYOUT),
    "dispatch": (CASE, DISPATCH),
    "scaled_dispatch": (FP8, SCALED_DISPATCH),
    "cached_dispatch": (CASE, CACHED_DISPATCH),
    "combine": (CASE, COMBINE),
}


def _good_arguments(call: str, buffer: Buffer, scenario: Scenario, handle: Any) -> dict[str, Any]:
    match call:
        case "layout":
            return {"topk_idx": scenario.given.topk_idx, "num_experts": scenario.num_experts}
        case "cached_dispatch":
            return {"x": scenario.x, "handle": handle}
        case "combine":
            rows, weights = scenario.rows_of[scenario.rank], scenario.weights_of[scenario.rank]
            return {"x": rows, "handle": handle, "topk_weights": weights, "bias": scenario.bias}
        case _:
            return {"x": scenario.x} | scenario.layout_arguments(buffer) | scenario.topk_arguments()


def _err(rank: int, num_ranks: int, call: str) -> list[str]:
    """Make every bad call on rank 1, a good one on all ranks after each; returns what went wrong."""
    case, mistakes = CALLS[call]
    wrong = []
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        scenario = Scenario(case, rank, num_ranks)
        handle = scenario.dispatch(buffer)[4]
        method: Any = {"layout": buffer.get_dispatch_layout, "combine": buffer.combine}.get(call, buffer.dispatch)
        for index, (name, change) in enumerate(mistakes):
            if rank == 1:
                arguments = change(_good_arguments(call, buffer, scenario, handle))
                try:
                    method(**arguments)
                except ArgumentError as error:
                    if not str(error).startswith(name):
                        wrong.append(f"{index}: {name} is not what the message starts with: {error}")
                except Exception as error:
                    wrong.append(f"{index}: {name}: {type(error).__name__}: {error}")
                else:
                    wrong.append(f"{index}: {name}: no error")
            check_works(buffer)
    return wrong


@pytest.mark.parametrize("call", CALLS)
def test_bad_arguments(pool_of: PoolOf, call: str) -> None:
    assert pool_of(NUM_RANKS).run(_err, call)[1] == []


def _handle_of_another_group(rank: int, num_ranks: int) -> None:
    pair = dist.new_group([0, 1])
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as whole:
        if rank < 2:
            with Buffer(pair, timeout=TIMEOUT) as buffer:
                scenario = Scenario(CASE, rank, 2)
                handle = scenario.dispatch(buffer)[4]
                with pytest.raises(ArgumentError, match=r"^handle"):
                    whole.dispatch(scenario.x, handle=handle)
                with pytest.raises(ArgumentError, match=r"^handle"):
                    whole.combine(scenario.rows_of[rank], handle)
        check_works(whole)


def test_handle_of_another_group(pool_of: PoolOf) -> None:
    pool_of(3).run(_handle_of_another_group)


BUFFER_TENSOR: list[tuple[str, dict[str, Any]]] = [
    ("size", {"size": torch.Size([4097])}),
    ("size", {"size": torch.Size([4000]), "offset": 128}),
    ("offset", {"offset": -1}),
    ("offset", {"dtype": torch.float32, "offset": 2}),
    ("offset", {"offset": 1.0}),
    ("use_rdma_buffer", {"use_rdma_buffer": True}),
]

CONSTRUCTOR: list[tuple[str, dict[str, Any]]] = [
    ("num_nvl_bytes", {"num_nvl_bytes": 100}),
    ("num_nvl_bytes", {"num_nvl_bytes": -128}),
    ("num_nvl_bytes", {"num_nvl_bytes": 128.0}),
    ("num_nvl_bytes", {"num_nvl_bytes": None}),
    ("num_nvl_bytes", {"num_nvl_bytes": True}),
    ("num_rdma_bytes", {"num_rdma_bytes": 1}),
    ("num_rdma_bytes", {"num_rdma_bytes": -128}),
    ("num_rdma_bytes", {"num_rdma_bytes": "128"}),
    *[("timeout", {"timeout": value}) for value in (0, -1.0, float("nan"), -math.inf, "soon", [1], True)],
    ("group", {"group": None}),
]


def _err_elsewhere(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD, 4096, timeout=TIMEOUT) as buffer:
        if rank == 1:
            for name, arguments in BUFFER_TENSOR:
                with pytest.raises(ArgumentError, match=f"^{name}"):
                    buffer.get_local_buffer_tensor(**{"dtype": torch.uint8} | arguments)
            for name, arguments in CONSTRUCTOR:
                with pytest.raises(ArgumentError, match=f"^{name}"):
                    Buffer(**{"group": dist.group.WORLD} | arguments)
        check_works(buffer)


def test_bad_arguments_of_other_methods(pool_of: PoolOf) -> None:
    pool_of(NUM_RANKS).run(_err_elsewhere)


@pytest.mark.parametrize("other", ["cuda:1", "cpu"])
def test_tensors_of_another_gpu(other: str) -> None:
    here = torch.device("cuda", 0)
    with FakeTensorMode():
        good, bad = torch.zeros(3, 4, device=here), torch.zeros(3, 4, device=other)
    assert check_tensor("x", good, shape=(3, None), device=here) is good
    with pytest.raises(ArgumentError, match=rf"^x: got .* on {other}; allowed: a tensor on cuda:0"):
        check_tensor("x", bad, shape=(3, None), device=here)


def test_argument_errors_are_what_callers_catch() -> None:
    error = ArgumentError("x", "a list", "a tensor")
    assert isinstance(error, RuntimeError)  # DeepEP's C++ checks
    assert isinstance(error, AssertionError)  # DeepEP's Python checks
    assert isinstance(error, ValueError)
    assert "x" in str(error)
    assert "a list" in str(error)
    assert "a tensor" in str(error)
