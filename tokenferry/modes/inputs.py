"""What operations of high throughput are given, checked; values of tensors where the data plane has them at hand.

Legend of dims: T tokens of this rank, H elements of a row, K choices, S scale columns, E experts, R ranks, M received
rows.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from tokenferry.dataplane import DataPlane
from tokenferry.errors import ArgumentError
from tokenferry.handles import OperatorRows
from tokenferry.kept import Alike, Kind, is_packed, kind_of, make
from tokenferry.modes.nodes import Nodes
from tokenferry.validation import check_int, check_tensor, describe, require

topk_idx_t = torch.int64
"""Dtype of expert ids."""

MAX_TOPK = 32
ROW_ALIGNMENT = 16
COMBINE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SCALE_DTYPES = (torch.float32, torch.int32)


class Party(NamedTuple):
    """Who takes part, and with what."""

    plane: DataPlane
    rank: int
    num_ranks: int
    device: torch.device
    num_sms: int = 0
    """SMs that an operation may use; 0: the data plane chooses."""
    nodes: Nodes | None = None
    """The way to the ranks on other nodes, if there are any. The plane reaches the ranks of the own node."""


class Inputs(NamedTuple):
    """What a dispatch with fresh counts is given, checked."""

    rows: Rows
    topk_idx: torch.Tensor | None
    """int64 [T, K], contiguous."""
    topk_weights: torch.Tensor | None
    """float32 [T, K], contiguous."""
    is_token_in_rank: torch.Tensor
    """bool [T, R]."""
    num_tokens_per_rank: torch.Tensor
    """int32 [R]."""
    num_tokens_per_expert: torch.Tensor
    """int32 [E]."""
    num_experts: int
    expert_alignment: int
    num_worst_tokens: int


class Rows(NamedTuple):
    """The rows that a dispatch moves."""

    x: torch.Tensor
    """[T, H], contiguous."""
    scales: torch.Tensor | None
    """[T, S], contiguous."""


_inputs: Alike[tuple[int, bool]] = Alike()
"""Experts; whether the tensors are taken as they are."""
_MOST_ROWS = 1 << 31


def check_topk_idx(party: Party, topk_idx: object, num_tokens: int | None, num_experts: int) -> torch.Tensor:
    """Return expert ids [T, K], checked to be -1 or in [0, E) where values are at hand."""
    ids = check_tensor(
        "topk_idx",
        topk_idx,
        shape=(num_tokens, None),
        dtypes=(topk_idx_t,),
        device=party.device,
        contiguous=True,
    )
    if ids.shape[1] > MAX_TOPK:
        raise ArgumentError("topk_idx", f"{ids.shape[1]} choices a token", f"at most {MAX_TOPK}")
    if party.plane.values_at_hand:
        check_ids(ids, num_experts)
    return ids


def check_ids(ids: torch.Tensor, num_experts: int) -> None:
    """Raise unless all expert ids are -1 or in [0, E)."""
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        allowed = f"expert ids from 0 to {num_experts - 1}, or -1 for no choice"
        require(low >= -1, "topk_idx", f"the value {low}", allowed)
        require(high < num_experts, "topk_idx", f"the value {high}", allowed)


def check_num_experts(party: Party, name: str, num_experts: int) -> int:
    """Return the number of experts if the ranks can share them evenly."""
    count = check_int(name, num_experts, minimum=1)
    if count % party.num_ranks != 0:
        raise ArgumentError(name, f"{count} experts", f"a multiple of the {party.num_ranks} ranks")
    return count


def check_rows(party: Party, x: object) -> Rows:
    """Return the checked input of a dispatch: a tensor, or a tuple of one-byte data and scales."""
    scales: torch.Tensor | None = None
    if isinstance(x, tuple):
        if len(x) != 2:
            raise ArgumentError("x", f"a tuple of {len(x)}", "a tensor, or a tuple (data, scales)")
        x, given_scales = x
        data = check_tensor("x[0]", x, shape=(None, None), device=party.device)
        if data.itemsize != 1:
            raise ArgumentError("x[0]", describe(data), "one-byte elements beside scales")
        scales = check_tensor(
            "x[1]", given_scales, shape=(data.shape[0], None), dtypes=_SCALE_DTYPES, device=party.device
        )
    else:
        data = check_tensor("x", x, shape=(None, None), device=party.device)
    if data.dtype.is_complex:
        raise ArgumentError("x", describe(data), "a real dtype")
    check_row_bytes(data)
    return Rows(packed(data), None if scales is None else packed(scales))


def kinds_of_rows(x: object) -> tuple[Kind | None, ...]:
    """The kinds of rows, and of scales if there are any; what :func:`check_rows` refuses is of no kind."""
    if type(x) is tuple:
        return (kind_of(x[0]), kind_of(x[1])) if len(x) == 2 else (None,)
    return (kind_of(x),)


def check_row_bytes(rows: torch.Tensor) -> None:
    """Raise unless rows are a positive multiple of 16 bytes."""
    row_bytes = rows.shape[1] * rows.itemsize
    if row_bytes == 0 or row_bytes % ROW_ALIGNMENT != 0:
        allowed = f"rows of a positive multiple of {ROW_ALIGNMENT} bytes"
        raise ArgumentError("x", f"rows of {row_bytes} bytes", allowed)


def check_inputs(
    party: Party,
    x: object,
    num_tokens_per_rank: torch.Tensor | None,
    is_token_in_rank: torch.Tensor | None,
    num_tokens_per_expert: torch.Tensor | None,
    topk_idx: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    expert_alignment: int,
    num_worst_tokens: int,
) -> Inputs:
    """Check what a dispatch with fresh counts is given."""
    per_rank, member, per_expert = num_tokens_per_rank, is_token_in_rank, num_tokens_per_expert
    ids, weights, worst = topk_idx, topk_weights, num_worst_tokens
    data: Any
    scales: Any
    data, scales = x if isinstance(x, tuple) and len(x) == 2 else (x, None)
    tensors: tuple[Any, ...] = data, member
    if ids is not None or weights is not None:
        tensors = *tensors, ids, weights
    if scales is not None:
        tensors = *tensors, scales
    num_rowed = len(tensors)
    tensors = *tensors, per_rank, per_expert
    are_sizes = type(expert_alignment) is int and (type(worst) is int or type(worst) is OperatorRows)
    sizes = (expert_alignment, worst > 0) if are_sizes and 0 <= worst < _MOST_ROWS else None
    key = (party.num_ranks, party.device, sizes, isinstance(x, tuple), num_rowed)
    known = _inputs.find(key, tensors)
    if known is None or not have_as_many_rows(tensors[:num_rowed]):
        given = _check_inputs(party, x, per_rank, member, per_expert, ids, weights, expert_alignment, worst)
        taken = *given.rows, given.topk_idx, given.topk_weights
        as_given = all(map(operator.is_, taken, (data, scales, ids, weights)))
        has_gaps = any(tensor is not None and not is_packed(tensor) for tensor in taken)
        any_rows = [True] * num_rowed + [False, False]
        any_strides = [tensor is data or tensor is weights or tensor is scales for tensor in tensors]
        _inputs.add(key, (given.num_experts, as_given and not has_gaps), tensors, any_rows, any_strides)
        return given._replace(num_worst_tokens=worst) if type(worst) is OperatorRows else given
    num_experts, as_given = known
    if party.plane.values_at_hand:
        _check_counts(per_rank, member, per_expert)  # type: ignore[arg-type]
        if ids is not None:
            check_ids(ids, num_experts)
    if as_given:
        rows = make(Rows, (data, scales))
    else:
        rows = make(Rows, (packed(data), None if scales is None else packed(scales)))
        if ids is not None and weights is not None:
            ids, weights = packed(ids), packed(weights)
    return make(Inputs, (rows, ids, weights, member, per_rank, per_expert, num_experts, expert_alignment, worst))


def _check_counts(per_rank: torch.Tensor, member: torch.Tensor, per_expert: torch.Tensor) -> None:
    given, sent = per_rank.tolist(), member.sum(0).tolist()
    require(given == sent, "num_tokens_per_rank", given, f"{sent}, as in is_token_in_rank")
    fewest, most = (int(bound) for bound in per_expert.aminmax())
    limit = len(member) * MAX_TOPK
    found = fewest if fewest < 0 else most
    require(0 <= fewest <= most <= limit, "num_tokens_per_expert", f"the value {found}", f"counts from 0 to {limit}")


def _check_inputs(
    party: Party,
    x: object,
    num_tokens_per_rank: object,
    is_token_in_rank: object,
    num_tokens_per_expert: object,
    topk_idx: object,
    topk_weights: object,
    expert_alignment: int,
    num_worst_tokens: int,
) -> Inputs:
    rows = check_rows(party, x)
    num_tokens, ranks, device = rows.x.shape[0], party.num_ranks, party.device
    int32 = (torch.int32,)
    per_rank = check_tensor(
        "num_tokens_per_rank", num_tokens_per_rank, shape=(ranks,), dtypes=int32, device=device, contiguous=True
    )
    member = check_tensor(
        "is_token_in_rank",
        is_token_in_rank,
        shape=(num_tokens, ranks),
        dtypes=(torch.bool,),
        device=device,
        contiguous=True,
    )
    per_expert = check_tensor(
        "num_tokens_per_expert", num_tokens_per_expert, shape=(None,), dtypes=int32, device=device, contiguous=True
    )
    num_experts = check_num_experts(party, "num_tokens_per_expert", per_expert.shape[0])
    if party.plane.values_at_hand:
        _check_counts(per_rank, member, per_expert)
    expert_alignment = check_int("expert_alignment", expert_alignment, minimum=1)
    num_worst_tokens = check_int("num_worst_tokens", num_worst_tokens, minimum=0)
    if num_worst_tokens >= _MOST_ROWS:
        raise ArgumentError("num_worst_tokens", num_worst_tokens, "less than 2^31")
    if (topk_idx is None) != (topk_weights is None):
        raise ArgumentError("topk_weights", "only one of topk_idx and topk_weights", "both or none")
    if num_worst_tokens and topk_idx is None:
        allowed = "0, or top-k tensors with it (they mark the unused rows)"
        raise ArgumentError("num_worst_tokens", f"{num_worst_tokens} without topk_idx", allowed)
    ids = weights = None
    if topk_idx is not None:
        ids = packed(check_topk_idx(party, topk_idx, num_tokens, num_experts))
        weights = check_tensor("topk_weights", topk_weights, shape=ids.shape, dtypes=(torch.float32,), device=device)
        weights = packed(weights)
    return Inputs(rows, ids, weights, member, per_rank, per_expert, num_experts, expert_alignment, num_worst_tokens)


def have_as_many_rows(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether tensors have equal first dimensions."""
    num_rows = tensors[0].shape[0]
    for tensor in tensors:  # noqa: SIM110 (half a microsecond)
        if tensor.shape[0] != num_rows:
            return False
    return True


def are_packed(kinds: Iterable[Kind | None]) -> bool:
    """Whether tensors of such kinds have one possible stride each: not so with a dimension of one or none."""
    return all(kind is None or (kind[3] and min(kind[0]) > 1) for kind in kinds)


def check_columns(party: Party, x: object, topk_weights: object, num_rows: int) -> list[torch.Tensor]:
    """The rows that a combine sums, and the weights if there are any, checked: packed [num_rows, width]."""
    rows = check_tensor("x", x, shape=(num_rows, None), dtypes=COMBINE_DTYPES, device=party.device)
    check_row_bytes(rows)
    columns = [packed(rows)]
    if topk_weights is not None:
        weights = check_tensor(
            "topk_weights", topk_weights, shape=(num_rows, None), dtypes=(torch.float32,), device=party.device
        )
        if not 0 < weights.shape[1] <= MAX_TOPK:
            raise ArgumentError("topk_weights", describe(weights), f"1 to {MAX_TOPK} columns")
        columns.append(packed(weights))
    return columns


def check_biases(party: Party, bias: object, shape: tuple[int, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """The biases that are not None, checked, outside of autograd."""
    return [
        resolved(check_tensor(name, given, shape=shape, dtypes=(dtype,), device=party.device))
        for name, given in zip(("bias[0]", "bias[1]"), unpack_bias(bias), strict=True)
        if given is not None
    ]


def unpack_bias(bias: object) -> tuple[object, object]:
    """The two biases of combine from its ``bias`` argument: None, one tensor, or a tuple of two."""
    if bias is None:
        return None, None
    if isinstance(bias, torch.Tensor):
        return bias, None
    if isinstance(bias, tuple) and len(bias) == 2:
        return bias[0], bias[1]
    raise ArgumentError("bias", type(bias).__name__, "None, one tensor, or a tuple of two")


def resolved(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor outside of autograd, its values as they are in memory; itself if it is so already."""
    return tensor.detach().resolve_neg() if tensor.requires_grad or tensor.is_neg() else tensor


def packed(tensor: torch.Tensor, is_packed: bool = False) -> torch.Tensor:
    """The tensor [n, width], resolved, with strides (width, 1) also where it has one column or no rows.

    ``is_packed``: its strides are known to be these.
    """
    if tensor.requires_grad or tensor.is_neg():
        tensor = resolved(tensor)
    if is_packed or tensor.stride() == (tensor.shape[1], 1):
        return tensor
    packed = tensor.contiguous()
    return packed.as_strided(packed.shape, (packed.size(1), 1))


def as_bytes(x: torch.Tensor, scales: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The same memory as uint8 [n, bytes of a row]; for packed rows."""
    return x.view(torch.uint8), None if scales is None else scales.view(torch.uint8)
