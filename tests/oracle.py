"""What every rank must get, from the inputs of all ranks at once, in plain single-process PyTorch.

Written from the definitions, not from the code: loops over ranks and tokens, no shared helpers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Inputs:
    """What one rank brings. Tensors on the CPU."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor


def membership(topk_idx: torch.Tensor, num_ranks: int, num_experts: int) -> torch.Tensor:
    """bool [T, R]: token t has at least one expert on rank r."""
    member = torch.zeros(topk_idx.size(0), num_ranks, dtype=torch.bool)
    for token, choices in enumerate(topk_idx.tolist()):
        for expert in choices:
            if expert >= 0:
                member[token, expert // (num_experts // num_ranks)] = True
    return member


def choices_of_experts(topk_idx: torch.Tensor, num_experts: int) -> list[int]:
    """Number of (token, choice) pairs for every expert."""
    counts = [0] * num_experts
    for choices in topk_idx.tolist():
        for expert in choices:
            if expert >= 0:
                counts[expert] += 1
    return counts


def tokens_per_rank(topk_idx: torch.Tensor, num_ranks: int, num_experts: int) -> list[int]:
    """Number of tokens with at least one expert on each rank."""
    return [int(column.sum()) for column in membership(topk_idx, num_ranks, num_experts).unbind(1)]


def num_received(inputs: list[Inputs], num_experts: int) -> list[int]:
    """Rows that every rank receives."""
    sent = [tokens_per_rank(given.topk_idx, len(inputs), num_experts) for given in inputs]
    return [sum(counts) for counts in zip(*sent, strict=True)]


@dataclass
class Expected:
    """What dispatch must return on one rank."""

    x: torch.Tensor
    scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    num_per_expert: list[int]
    rank_prefix_matrix: torch.Tensor
    channel_prefix_matrix: torch.Tensor
    recv_channel_prefix_matrix: torch.Tensor
    recv_src_idx: torch.Tensor
    is_token_in_rank: torch.Tensor
    send_head: torch.Tensor


def dispatch(inputs: list[Inputs], num_experts: int, rank: int, alignment: int = 1) -> Expected:
    """What ``rank`` must receive; the handle is that of a single channel."""
    num_ranks = len(inputs)
    local = num_experts // num_ranks
    members = [membership(given.topk_idx, num_ranks, num_experts) for given in inputs]
    rows, scales, ids, weights, sources = [], [], [], [], []
    for source, given in enumerate(inputs):
        for token in range(given.x.size(0)):
            if not members[source][token, rank]:
                continue
            rows.append(given.x[token])
            sources.append(token)
            if given.scales is not None:
                scales.append(given.scales[token])
            mine = [0 <= e - rank * local < local and e >= 0 for e in given.topk_idx[token].tolist()]
            ids.append(
                [e - rank * local if m else -1 for e, m in zip(given.topk_idx[token].tolist(), mine, strict=True)]
            )
            weights.append([w if m else 0.0 for w, m in zip(given.topk_weights[token].tolist(), mine, strict=True)])
    first = inputs[rank]
    num_topk = first.topk_idx.size(1)
    chosen = [choices_of_experts(given.topk_idx, num_experts) for given in inputs]
    totals = [sum(c[rank * local + e] for c in chosen) for e in range(local)]
    prefix = torch.zeros(num_ranks, num_ranks, dtype=torch.int32)
    for target in range(num_ranks):
        running = 0
        for source in range(num_ranks):
            running += int(members[source][:, target].sum())
            prefix[source, target] = running
    head = torch.full(members[rank].shape, -1, dtype=torch.int32)
    for target in range(num_ranks):
        seen = 0
        for token in range(first.x.size(0)):
            if members[rank][token, target]:
                head[token, target] = seen
                seen += 1
    return Expected(
        x=torch.stack(rows) if rows else first.x.new_empty(0, first.x.size(1)),
        scales=None
        if first.scales is None
        else (torch.stack(scales) if scales else first.scales.new_empty(0, first.scales.size(1))),
        topk_idx=torch.tensor(ids, dtype=torch.int64).view(-1, num_topk),
        topk_weights=torch.tensor(weights, dtype=torch.float32).view(-1, num_topk),
        num_per_expert=[(count + alignment - 1) // alignment * alignment for count in totals],
        rank_prefix_matrix=prefix,
        channel_prefix_matrix=torch.tensor([[int(column.sum())] for column in members[rank].unbind(1)]).int(),
        recv_channel_prefix_matrix=torch.zeros(num_ranks, 1, dtype=torch.int32),
        recv_src_idx=torch.tensor(sources, dtype=torch.int32),
        is_token_in_rank=members[rank],
        send_head=head,
    )


def combine(
    inputs: list[Inputs],
    num_experts: int,
    rank: int,
    rows_of: list[torch.Tensor],
    biases: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """What ``rank`` must get when rank r combines ``rows_of[r]``: float32 sums, biases first, ranks ascending.

    With weights [M, K] for rows this is what becomes of ``topk_weights``.
    """
    num_ranks = len(inputs)
    members = [membership(given.topk_idx, num_ranks, num_experts) for given in inputs]
    member = members[rank]
    dtype = rows_of[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.zeros(member.size(0), rows_of[0].size(1), dtype=wide)
    for bias in biases or []:
        out += bias.to(wide)
    for target in range(num_ranks):
        row = sum(int(members[source][:, target].sum()) for source in range(rank))
        for token in range(member.size(0)):
            if member[token, target]:
                out[token] += rows_of[target][row].to(wide)
                row += 1
    return out.to(dtype)
