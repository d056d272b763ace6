"""What every rank must get from an ElasticBuffer, from the inputs of all ranks at once: loops, no shared helpers."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tests.oracle import Inputs, dispatch


@dataclass
class Expected:
    """What a dispatch must return on one rank; rows that nobody defines are None in ``rows``."""

    num_tokens: int
    """Tokens received."""
    sources: list[tuple[int, int]]
    """(rank, token) of each."""
    ids: torch.Tensor
    """int64 [M, K], local or -1."""
    weights: torch.Tensor
    """float32 [M, K], 0 where the id is -1."""
    pairs: list[int]
    """(token, choice) pairs of each local expert."""
    aligned: list[int]
    psum_rank: list[int]
    psum_compact: list[int]
    psum_expanded: list[int]
    metadata: list[list[int]]
    """Of an expanded dispatch; compact, the copies are -1."""
    rows: list[tuple[int, int, int] | None] = field(default_factory=list)
    """Expanded: (rank, token, choice) of each row; None in padding."""


def expected(inputs: list[Inputs], num_experts: int, rank: int, alignment: int, num_max_tokens: int) -> Expected:
    """What ``rank`` must receive."""
    num_ranks, num_topk = len(inputs), inputs[0].topk_idx.size(1)
    local = num_experts // num_ranks
    plain = dispatch(inputs, num_experts, rank)
    sources, per_rank = [], []
    for source, given in enumerate(inputs):
        for token, choices in enumerate(given.topk_idx.tolist()):
            if any(e // local == rank for e in choices if e >= 0):
                sources.append((source, token))
        per_rank.append(len(sources))
    rows: list[tuple[int, int, int] | None] = []
    where: dict[tuple[int, int, int], int] = {}
    pairs, psum_compact, psum_expanded, running = [], [], [], 0
    for expert in range(rank * local, (rank + 1) * local):
        count = 0
        for source, token in sources:
            for choice in range(num_topk):
                if inputs[source].topk_idx[token, choice] == expert:
                    where[source, token, choice] = len(rows)
                    rows.append((source, token, choice))
                    count += 1
        pairs.append(count)
        psum_expanded.append(len(rows))
        while len(rows) % alignment:
            rows.append(None)
        running += (count + alignment - 1) // alignment * alignment
        psum_compact.append(running)
    metadata = []
    for source, token in sources:
        slots = [where.get((source, token, choice), -1) for choice in range(num_topk)]
        first = next(choice for choice in range(num_topk) if slots[choice] >= 0)
        metadata.append([source * num_max_tokens + token, source * num_topk + first, *slots])
    return Expected(
        num_tokens=len(sources),
        sources=sources,
        ids=plain.topk_idx,
        weights=plain.topk_weights,
        pairs=pairs,
        aligned=[(count + alignment - 1) // alignment * alignment for count in pairs],
        psum_rank=per_rank,
        psum_compact=psum_compact,
        psum_expanded=psum_expanded,
        metadata=metadata,
        rows=rows,
    )


def expanded_sums(want: Expected, rows: torch.Tensor, *, rounded: bool) -> torch.Tensor:
    """[M, H]: the sums of each received token's copies, choices ascending in float32."""
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.zeros(want.num_tokens, rows.size(1), dtype=wide)
    for row, (_, _, *slots) in enumerate(want.metadata):
        for slot in slots:
            if slot >= 0:
                out[row] += rows[slot].to(wide)
    return out.to(rows.dtype) if rounded else out


def slot_weights(want: Expected, weights: torch.Tensor, num_topk: int) -> torch.Tensor:
    """float32 [M, K]: the weights of the copies."""
    out = torch.zeros(want.num_tokens, num_topk)
    for row, (_, _, *slots) in enumerate(want.metadata):
        for choice, slot in enumerate(slots):
            if slot >= 0:
                out[row, choice] = weights[slot]
    return out
