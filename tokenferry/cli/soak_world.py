"""What every rank brings to a random operation, and what each must get: plain PyTorch over the inputs of all ranks.

Every rank derives the inputs of all ranks from one seed, so nothing but the operation under test travels. An expert
of rank r multiplies rows by a power of two that belongs to r, which is exact.

Legend of dims: T tokens of a rank, H elements of a row, K choices, E experts, L local experts, R ranks, S scales.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_OPAQUE = (torch.float8_e4m3fn, torch.uint8)


@dataclass(frozen=True)
class Shape:
    """One operation's worth of shapes; rank r has ``tokens[r]`` tokens."""

    tokens: tuple[int, ...]
    dtype: torch.dtype
    row_bytes: int
    num_scales: int
    num_topk: int
    local_experts: int
    sparse: float
    """Share of choices that are -1."""
    seed: int


class Chance(random.Random):
    """What all ranks draw alike."""

    kinds: Sequence[str] = ()
    """Seeds of what kernels are compiled for, which takes seconds. None: it is drawn anew every time."""

    def kind(self) -> random.Random:
        """To draw from what kernels are compiled for."""
        return random.Random(self.choice(self.kinds)) if self.kinds else self


def random_shape(chance: Chance, num_ranks: int, most_tokens: int) -> Shape:
    """Any shape, small ones more often than large ones."""
    kind = chance.kind()
    dtype = kind.choice([*FLOATS, *_OPAQUE])
    width = kind.choice([1, 3, 8, 64, 225, 448])
    return Shape(
        tokens=tuple(chance.choice([0, 1, chance.randrange(40), most_tokens]) for _ in range(num_ranks)),
        dtype=dtype,
        row_bytes=16 * width,
        num_scales=kind.choice([0, 1, 7]) if dtype in _OPAQUE else 0,
        num_topk=kind.choice([1, 2, 6, 8]),
        local_experts=kind.choice([1, 3, 16]),
        sparse=chance.choice([0.0, 0.0, 0.3, 0.9, 1.0]),
        seed=chance.getrandbits(40),
    )


class Inputs(NamedTuple):
    """What one rank brings."""

    x: torch.Tensor
    """[T, H]."""
    scales: torch.Tensor | None
    """float32 [T, S]."""
    ids: torch.Tensor
    """int64 [T, K]."""
    weights: torch.Tensor
    """float32 [T, K]."""


def factor_of(rank: int) -> float:
    """What the experts of a rank multiply rows by."""
    return float(2.0 ** (rank % 5 - 2))


class World:
    """The inputs of all ranks, and what ``rank`` must get of them."""

    def __init__(self, shape: Shape, rank: int) -> None:
        self.shape = shape
        self.rank = rank
        self.num_ranks = len(shape.tokens)
        self.num_experts = self.num_ranks * shape.local_experts
        self.inputs = [self._inputs(source) for source in range(self.num_ranks)]
        self.mine = self.inputs[rank]
        self.members = [self._member(one.ids) for one in self.inputs]
        self.num_received = [sum(int(member[:, reader].sum()) for member in self.members) for reader in self._ranks]

    @property
    def _ranks(self) -> range:
        return range(self.num_ranks)

    def _inputs(self, source: int) -> Inputs:
        shape = self.shape
        made = torch.Generator().manual_seed((shape.seed * 64 + source) % 2**63)
        count = shape.tokens[source]
        x = rows(shape.dtype, count, shape.row_bytes, made)
        scales = torch.rand((count, shape.num_scales), generator=made) if shape.num_scales else None
        ids = torch.randint(0, self.num_experts, (count, shape.num_topk), generator=made)
        ids[torch.rand(ids.shape, generator=made) < shape.sparse] = -1
        return Inputs(x, scales, ids, torch.rand(ids.shape, generator=made))

    def _member(self, ids: torch.Tensor) -> torch.Tensor:
        """Membership, bool [T, R]."""
        of_rank = torch.where(ids < 0, -1, ids // self.shape.local_experts)
        return torch.stack([(of_rank == rank).any(1) for rank in self._ranks], 1)

    def received(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Rows of all ranks, [T, ...] each, as this rank gets them."""
        return torch.cat([part[member[:, self.rank]] for part, member in zip(parts, self.members, strict=True)])

    def check_received(self, result: tuple[Any, ...], alignment: int, worst: int) -> None:
        """Compare what a dispatch with fresh counts returned, byte by byte."""
        recv_x, recv_ids, recv_weights, per_expert, _, _ = result
        local = self.shape.local_experts
        first = self.rank * local
        ids = self.received([one.ids for one in self.inputs])
        mine = (ids >= first) & (ids < first + local)
        pairs = torch.bincount(ids[mine] - first, minlength=local)
        same_rows(recv_x, self.received_x(), worst)
        same("recv_topk_idx", recv_ids[: len(ids)], torch.where(mine, ids - first, -1))
        weights = self.received([one.weights for one in self.inputs])
        same("recv_topk_weights", recv_weights[: len(ids)], torch.where(mine, weights, 0.0))
        expected = [] if worst else [-(-int(count) // alignment) * alignment for count in pairs]
        if per_expert != expected:
            raise AssertionError(f"rows of the local experts: got {per_expert}, not {expected}")
        if worst and not bool((recv_ids[len(ids) :] == -1).all()):
            raise AssertionError("recv_topk_idx past the last row: not -1")

    def received_x(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows, and scales if there are any."""
        scales = None
        if self.mine.scales is not None:
            scales = self.received([one.scales for one in self.inputs if one.scales is not None])
        return self.received([one.x for one in self.inputs]), scales

    def expert_rows(self, values: list[torch.Tensor]) -> torch.Tensor:
        """What this rank's experts make of its rows, from [T, H] of every rank."""
        return self.received(values) * factor_of(self.rank)

    def combined(
        self, values: torch.Tensor, biases: list[torch.Tensor], node_of: list[int], exact: bool
    ) -> torch.Tensor:
        """What a combine must return, from the own [T, H] that the experts were given."""
        wide = torch.promote_types(values.dtype, torch.float32)
        total = torch.zeros(values.shape, dtype=wide)
        for bias in biases:
            total += bias.to(wide)
        member = self.members[self.rank]
        nodes = sorted(set(node_of))
        for node in nodes:
            partial = torch.zeros_like(total) if len(nodes) > 1 else total
            for rank in [rank for rank in self._ranks if node_of[rank] == node]:
                partial += (values * factor_of(rank)).to(wide) * member[:, rank, None]
            if len(nodes) > 1:
                total += partial if exact else partial.to(values.dtype).to(wide)
        return total.to(values.dtype)


def rows(dtype: torch.dtype, count: int, row_bytes: int, made: torch.Generator) -> torch.Tensor:
    """[count, H] of finite values, or of any bytes where the dtype is not summed."""
    width = row_bytes // dtype.itemsize
    if dtype in FLOATS:
        return torch.randn((count, width), generator=made).to(dtype)
    return torch.randint(0, 256, (count, width), dtype=torch.uint8, generator=made).view(dtype)


def random_values(
    shape: Shape, chance: Chance, kind: random.Random, dtypes: Sequence[torch.dtype], widths: Sequence[int]
) -> list[torch.Tensor]:
    """[T, H] of every rank, fresh: of one of the dtypes, as wide as one of ``widths``, in 16 bytes."""
    seed, dtype, row_bytes = chance.getrandbits(40), kind.choice(dtypes), 16 * kind.choice(widths)
    return [
        rows(dtype, count, row_bytes, torch.Generator().manual_seed(seed * 64 + source))
        for source, count in enumerate(shape.tokens)
    ]


def same(what: str, got: torch.Tensor, wanted: torch.Tensor) -> None:
    """Raise unless two tensors have the same bytes.

    Raises:
        AssertionError: says where they differ first.
    """
    got = got.cpu()
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        raise AssertionError(f"{what}: got {got.dtype} {list(got.shape)}, not {wanted.dtype} {list(wanted.shape)}")
    if got.numel() == 0:
        return
    pairs = [tensor.contiguous().view(torch.uint8).flatten(1) for tensor in (got, wanted)]
    wrong = (pairs[0] != pairs[1]).any(1).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise AssertionError(f"{what}: {len(wrong)} of {len(got)} rows differ, first row {row}")


def same_rows(got: Any, wanted: tuple[torch.Tensor, torch.Tensor | None], worst: int = 0) -> None:
    """Compare received rows, with scales if there are any; with ``worst`` rows altogether, if that is not 0."""
    parts = got if isinstance(got, tuple) else (got,)
    for name, part, expected in zip(("recv_x", "recv_scales"), parts, wanted, strict=False):
        assert expected is not None
        if worst and len(part) != worst:
            raise AssertionError(f"{name}: {len(part)} rows, not {worst}")
        same(name, part[: len(expected)] if worst else part, expected)
