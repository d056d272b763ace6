"""What the mode layer does on the host around a plane on a GPU, counted: torch operators and looks at tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from tokenferry import ArgumentError, DispatchHandle
from tokenferry.dataplane import DataPlane, Layout, Outputs, ReducePlan, SendPlan, Signature
from tokenferry.modes import intranode
from tokenferry.modes.inputs import Party, check_inputs

CPU = torch.device("cpu")
RANKS, EXPERTS, TOKENS, TOPK, HIDDEN, RECEIVED = 2, 4, 6, 3, 128, 9


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


class IdlePlane:
    """Does nothing, with tensors made beforehand, and notes what it is given."""

    values_at_hand = False

    def __init__(self) -> None:
        self.given: list[Any] = []
        self._layout = Layout(int32(RANKS), int32(EXPERTS), torch.zeros(TOKENS, RANKS, dtype=torch.bool))
        self._exchange = SimpleNamespace(
            num_rows=RECEIVED,
            num_received_per_expert=[],
            rank_prefix_matrix=int32(RANKS, RANKS),
            channel_prefix_matrix=int32(RANKS, 1),
            recv_channel_prefix_matrix=int32(RANKS, 1),
            send_head=int32(TOKENS, RANKS),
            pull=self._pull,
        )
        kinds = ((HIDDEN, torch.bfloat16), (TOPK, torch.int64), (TOPK, torch.float32))
        self._sources = torch.empty(RECEIVED, dtype=torch.int32)
        self._rows = {(n, w, t): torch.empty(n, w, dtype=t) for n in (TOKENS, RECEIVED) for w, t in kinds}

    def _pull(self, outputs: Outputs) -> bool:
        self.given.append(outputs)
        return True

    def layout(self, topk_idx: torch.Tensor, num_experts: int, num_ranks: int) -> Layout:
        return self._layout

    @contextmanager
    def dispatch(self, signature: Signature, plan: SendPlan) -> Iterator[Any]:
        self.given += [signature, plan]
        yield self._exchange

    def dispatch_along(self, signature: Signature, plan: SendPlan, outputs: Outputs) -> None:
        self.given += [signature, plan, outputs]

    def pull_reduce(self, signature: Signature, plan: ReducePlan, outs: Sequence[torch.Tensor]) -> None:
        self.given += [signature, plan, outs]

    def empty_rows(self, num_rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
        found = self._rows.get((num_rows, width, dtype))
        return torch.empty(num_rows, width, dtype=dtype) if found is None else found

    def empty_strided(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        assert (shape, strides, dtype) == ((RECEIVED,), (1,), torch.int32)
        return self._sources


class Operators(TorchDispatchMode):
    """Names the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


class Reads(TorchFunctionMode):
    """Counts the attributes read and methods called of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


class World:
    """A rank with everything that good calls need."""

    def __init__(self) -> None:
        self.plane = IdlePlane()
        self.party = Party(cast(DataPlane, self.plane), 1, RANKS, CPU)
        self.x = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
        self.y = torch.ones(RECEIVED, HIDDEN, dtype=torch.bfloat16)
        self.ids, self.weights = torch.zeros(TOKENS, TOPK, dtype=torch.int64), torch.ones(TOKENS, TOPK)
        self.recv_weights = torch.ones(RECEIVED, TOPK)
        handle = self.dispatch().handle
        assert handle is not None
        self.handle = handle
        self.plane.given.clear()

    def layout(self) -> Layout:
        return intranode.layout(self.party, self.ids, EXPERTS)

    def dispatch(self) -> intranode.Received:
        per_rank, per_expert, member = self.plane._layout
        given = check_inputs(self.party, self.x, per_rank, member, per_expert, self.ids, self.weights, 1, RECEIVED)
        return intranode.dispatch(self.party, given)

    def cached_dispatch(self) -> intranode.Received:
        return intranode.cached_dispatch(self.party, self.x, self.handle)

    def combine(self, weights: Any = None, bias: Any = None) -> Any:
        return intranode.combine(self.party, self.y, self.handle, weights, bias)


CALLS: dict[str, tuple[Callable[[World], Any], list[str], int]] = {
    "layout": (World.layout, [], 8),
    "dispatch": (World.dispatch, [], 46),
    "cached_dispatch": (World.cached_dispatch, [], 12),
    "combine": (World.combine, [], 12),
    "combine_weights": (lambda w: w.combine(w.recv_weights), [], 19),
    "combine_biases": (lambda w: w.combine(None, (w.x, w.x)), [], 26),
}
"""Calls, the operators that they run, and how often they may look at a tensor: about 0.1 us each."""


@pytest.mark.parametrize("name", CALLS)
def test_operators(name: str) -> None:
    call, wanted, _ = CALLS[name]
    world = World()
    with Operators() as operators:
        call(world)
    assert operators.names == wanted


@pytest.mark.parametrize("name", CALLS)
def test_reads(name: str) -> None:
    call, _, most = CALLS[name]
    world = World()
    call(world)  # what it finds out is kept
    with Reads() as reads:
        call(world)
    assert 0 < reads.count <= most


def test_good_tensors_are_passed_on_themselves() -> None:
    world = World()
    world.combine(world.recv_weights, (None, world.x))
    _, plan, _ = world.plane.given
    assert plan.columns[0] is world.y
    assert plan.columns[1] is world.recv_weights
    assert plan.biases[0] is world.x
    assert plan.handle is world.handle


def odd(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in tensors that are not packed."""
    negated = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
    assert negated.is_neg()
    return {
        "grad": tensor.clone().requires_grad_(),
        "columns": tensor.t().contiguous().t(),
        "padded": torch.cat([tensor, tensor], 1)[:, : tensor.size(1)],
        "neg": negated,
    }


@pytest.mark.parametrize("kind", ["grad", "columns", "padded", "neg"])
@pytest.mark.parametrize("width", [4, 1])
def test_other_tensors_are_packed(kind: str, width: int) -> None:
    world = World()
    rows, weights, bias = torch.rand(RECEIVED, 4), torch.rand(RECEIVED, width), torch.rand(TOKENS, 4)
    world.y = odd(rows)[kind]
    world.combine(odd(weights)[kind], odd(bias)[kind])
    _, plan, _ = world.plane.given
    for column, values in zip(plan.columns, (rows, weights), strict=True):
        assert torch.equal(column, values)
        assert column.stride() == (values.size(1), 1)
    assert torch.equal(plan.biases[0], bias)
    assert not any(tensor.requires_grad or tensor.is_neg() for tensor in (*plan.columns, *plan.biases))
    world.plane.given.clear()
    world.x = odd(bias)[kind]
    world.cached_dispatch()
    _, plan, outputs = world.plane.given
    assert torch.equal(plan.rows, bias)
    assert not plan.rows.requires_grad
    assert isinstance(outputs, Outputs)
    assert outputs.rows.shape == (RECEIVED, 4)


COPIES: dict[str, Callable[[DispatchHandle], Any]] = {
    "tuple": tuple,
    "list": list,
    "replace": lambda handle: handle._replace(recv_src_idx=handle.recv_src_idx.clone()),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda handle: pickle.loads(pickle.dumps(handle)),
    "tree_map": lambda handle: tree_map(torch.clone, handle),
}


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_a_handle_are_checked(kind: str) -> None:
    world = World()
    original = world.handle
    world.handle = COPIES[kind](original)
    assert isinstance(world.handle, DispatchHandle) or kind in ("tuple", "list")
    world.cached_dispatch()
    world.combine()
    for index, element in enumerate(original):
        bad = DispatchHandle._make(element.double() if i == index else e for i, e in enumerate(original))
        world.handle = COPIES[kind](bad)
        with pytest.raises(ArgumentError, match=rf"^handle\.{DispatchHandle._fields[index]}"):
            world.combine()


def test_changes_of_an_own_handle_are_found() -> None:
    world = World()
    for index, name in enumerate(DispatchHandle._fields):
        for change in (torch.Tensor.double, lambda element: element.to("meta"), lambda element: element[None]):
            parts = list(world.handle)
            parts[index] = change(parts[index])
            for bad in (world.handle._replace(**{name: parts[index]}), type(world.handle)._make(parts)):
                with pytest.raises(ArgumentError, match=rf"^handle\.{name}"):
                    intranode.combine(world.party, world.y, bad, None, None)
    with pytest.raises(ArgumentError, match=r"^handle\.rank_prefix_matrix"):
        intranode.check_handle(world.party._replace(num_ranks=3), world.handle)
    with pytest.raises(ArgumentError, match=r"^handle\.rank_prefix_matrix"):
        intranode.check_handle(world.party._replace(device=torch.device("meta")), world.handle)
    world.handle.is_token_in_rank.resize_(TOKENS, RANKS + 1)
    with pytest.raises(ArgumentError, match=r"^handle\.is_token_in_rank"):
        world.combine()
