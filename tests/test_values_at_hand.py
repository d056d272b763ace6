"""Modes over a data plane whose tensors' values are not at hand: on the meta device, where reading one raises."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tokenferry import ArgumentError
from tokenferry.dataplane import (
    DataPlane,
    Layout,
    LowLatencyCombinePlan,
    LowLatencyDispatchPlan,
    Outputs,
    ReducePlan,
    SendPlan,
    Signature,
)
from tokenferry.modes import intranode, low_latency
from tokenferry.modes.inputs import Party, check_inputs

META = torch.device("meta")
RANKS, EXPERTS, TOKENS, TOPK, HIDDEN, RECEIVED = 2, 4, 6, 3, 128, 9


def int32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=META)


class MetaPlane:
    """Notes what it is given."""

    values_at_hand = False

    def __init__(self) -> None:
        self.given: list[Any] = []

    def layout(self, topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> Layout:
        member = torch.empty((len(topk_idx), RANKS), dtype=torch.bool, device=META)
        return Layout(int32(RANKS), int32(num_experts), member)

    @contextmanager
    def dispatch(self, signature: Signature, plan: SendPlan) -> Iterator[Any]:
        self.given += [signature, plan]
        yield SimpleNamespace(
            num_rows=len(plan.handle.recv_src_idx) if plan.handle else plan.num_worst_tokens or RECEIVED,
            num_received_per_expert=[] if plan.handle or plan.num_worst_tokens else [5, 7],
            rank_prefix_matrix=int32(RANKS, RANKS),
            channel_prefix_matrix=int32(RANKS, 1),
            recv_channel_prefix_matrix=int32(RANKS, 1),
            send_head=int32(len(plan.rows), RANKS),
            pull=self._pull,
        )

    def dispatch_along(self, signature: Signature, plan: SendPlan, outputs: Outputs) -> None:
        self.given += [signature, plan, outputs]

    def _pull(self, outputs: Outputs) -> bool:
        self.given.append(outputs)
        return True

    def pull_reduce(self, signature: Signature, plan: ReducePlan, outs: Sequence[torch.Tensor]) -> None:
        self.given += [signature, plan, outs]

    def low_latency_tables(
        self, num_ranks: int, num_local: int, most: int, num_topk: int
    ) -> tuple[torch.Tensor, ...]:
        return (
            int32(num_local, RANKS * most),
            torch.empty((num_local, RANKS), dtype=torch.int64, device=META),
            int32(num_local),
        )

    def low_latency_dispatch(self, signature: Signature, plan: LowLatencyDispatchPlan) -> Any:
        return SimpleNamespace(finish=lambda: None)

    def low_latency_combine(self, signature: Signature, plan: LowLatencyCombinePlan) -> Any:
        return SimpleNamespace(finish=lambda: None)

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty((num_rows, width), dtype=dtype, device=META)

    def empty_strided(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=META)


def party() -> tuple[Party, list[Any]]:
    plane = MetaPlane()
    return Party(cast(DataPlane, plane), 1, RANKS, META), plane.given


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.empty((TOKENS, HIDDEN), dtype=torch.bfloat16, device=META)
    ids = torch.empty((TOKENS, TOPK), dtype=torch.int64, device=META)
    return x, ids, torch.empty((TOKENS, TOPK), device=META)


def dispatch(who: Party, *, num_worst_tokens: int = 0) -> intranode.Received:
    x, ids, weights = inputs()
    per_rank, per_expert, member = intranode.layout(who, ids, EXPERTS)
    given = check_inputs(who, x, per_rank, member, per_expert, ids, weights, 4, num_worst_tokens)
    return intranode.dispatch(who, given)


@pytest.mark.parametrize("num_worst_tokens", [0, 20])
def test_dispatch(num_worst_tokens: int) -> None:
    who, given = party()
    received = dispatch(who, num_worst_tokens=num_worst_tokens)
    _, plan, outputs = given
    num_rows = num_worst_tokens or RECEIVED
    assert received.x.shape == (num_rows, HIDDEN)
    assert received.num_per_expert == ([] if num_worst_tokens else [8, 8])
    assert received.handle is not None
    assert received.handle.recv_src_idx.shape == (num_rows,)
    assert isinstance(outputs, Outputs)
    assert outputs.rows is received.x
    assert outputs.topk_idx is received.topk_idx
    assert outputs.topk_weights is received.topk_weights
    assert plan.num_worst_tokens == num_worst_tokens
    assert plan.handle is None


@pytest.mark.parametrize("num_worst_tokens", [0, 20])
def test_along_a_handle(num_worst_tokens: int) -> None:
    who, given = party()
    handle = dispatch(who, num_worst_tokens=num_worst_tokens).handle
    assert handle is not None
    given.clear()
    received = intranode.cached_dispatch(who, inputs()[0], tuple(handle))
    signature, plan, outputs = given
    assert signature.handle == 0
    assert plan.handle == handle
    assert (plan.topk_idx, plan.num_tokens_per_rank, plan.num_tokens_per_expert) == (None, None, None)
    assert (outputs.topk_idx, outputs.topk_weights, outputs.recv_src_idx) == (None, None, None)
    given.clear()
    combined, weights = intranode.combine(who, received.x, handle, None, None)
    signature, plan, outs = given
    assert signature.handle == 0
    assert plan.handle == handle
    assert outs[0] is combined
    assert combined.shape == (TOKENS, HIDDEN)
    assert weights is None


@pytest.mark.parametrize("receives_now", [False, True])
def test_low_latency(receives_now: bool) -> None:
    who, _ = party()
    x, ids, weights = inputs()
    sent = low_latency.dispatch(who, x, ids, 8, EXPERTS, None, None, False, False, False, receives_now)
    out, _ = low_latency.combine(who, sent.x, ids, weights, sent.handle, None, None, None, receives_now)
    assert out.shape == (TOKENS, HIDDEN)


def test_shapes_are_checked() -> None:
    who, given = party()
    _, ids, _ = inputs()
    with pytest.raises(ArgumentError, match="topk_idx"):
        intranode.layout(who, ids.int(), EXPERTS)
    handle = dispatch(who).handle
    assert handle is not None
    given.clear()
    with pytest.raises(ArgumentError, match="send_head"):
        intranode.cached_dispatch(who, inputs()[0], handle._replace(send_head=int32(TOKENS, RANKS + 1)))
    assert not given
