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
    local = num_experts // num_ranks
    chosen = [{expert // local for expert in choices if expert >= 0} for choices in topk_idx.tolist()]
    return torch.tensor([[rank in ranks for rank in range(num_ranks)] for ranks in chosen]).view(-1, num_ranks).bool()


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
        chosen_by, weights_of = given.topk_idx.tolist(), given.topk_weights.tolist()
        for token in members[source][:, rank].nonzero().flatten().tolist():
            rows.append(given.x[token])
            sources.append(token)
            if given.scales is not None:
                scales.append(given.scales[token])
            mine = [0 <= e - rank * local < local and e >= 0 for e in chosen_by[token]]
            ids.append([e - rank * local if m else -1 for e, m in zip(chosen_by[token], mine, strict=True)])
            weights.append([w if m else 0.0 for w, m in zip(weights_of[token], mine, strict=True)])
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
        for seen, token in enumerate(members[rank][:, target].nonzero().flatten().tolist()):
            head[token, target] = seen
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
        first = sum(int(members[source][:, target].sum()) for source in range(rank))
        tokens = member[:, target].nonzero().flatten()
        out[tokens] += rows_of[target][first : first + len(tokens)].to(wide)
    return out.to(dtype)


def combine_between_nodes(
    inputs: list[Inputs],
    num_experts: int,
    rank: int,
    rows_of: list[torch.Tensor],
    node_of: list[int],
    biases: list[torch.Tensor] | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """As :func:`combine`, but each node's ranks are summed first, and that sum is rounded unless ``exact``."""
    num_ranks = len(inputs)
    members = [membership(given.topk_idx, num_ranks, num_experts) for given in inputs]
    num_tokens, width, dtype = inputs[rank].x.size(0), rows_of[0].size(1), rows_of[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = torch.zeros(num_tokens, width, dtype=wide)
    for bias in biases or []:
        out += bias.to(wide)
    for node in range(max(node_of) + 1):
        partial = torch.zeros(num_tokens, width, dtype=wide)
        for target in range(num_ranks):
            if node_of[target] != node:
                continue
            first = sum(int(members[source][:, target].sum()) for source in range(rank))
            tokens = members[rank][:, target].nonzero().flatten()
            partial[tokens] += rows_of[target][first : first + len(tokens)].to(wide)
        out += partial if exact else partial.to(dtype).to(wide)
    return out.to(dtype)


def internode_handle(
    inputs: list[Inputs], num_experts: int, rank: int, node_of: list[int]
) -> dict[str, torch.Tensor]:
    """The handle of a dispatch between nodes, with a single channel."""
    num_ranks, num_nodes, here = len(inputs), max(node_of) + 1, node_of[rank]
    ranks_of = [[r for r in range(num_ranks) if node_of[r] == node] for node in range(num_nodes)]
    index = ranks_of[here].index(rank)
    members = [membership(given.topk_idx, num_ranks, num_experts) for given in inputs]
    mine = members[rank]

    def goes_to(source: int, token: int, node: int) -> bool:
        return any(bool(members[source][token, target]) for target in ranks_of[node])

    rdma_head = torch.full((len(mine), num_nodes), -1, dtype=torch.int32)
    sent = [0] * num_nodes
    for token in range(len(mine)):
        for node in range(num_nodes):
            if goes_to(rank, token, node):
                rdma_head[token, node] = sent[node]
                sent[node] += 1
    relayed, nvl_head = [], []
    for node in range(num_nodes):
        source = ranks_of[node][index]
        tokens = [token for token in range(len(members[source])) if goes_to(source, token, here)]
        relayed.append(len(tokens))
        seen = [0] * len(ranks_of[here])
        for token in tokens:
            row = []
            for place, target in enumerate(ranks_of[here]):
                has = bool(members[source][token, target])
                row.append(seen[place] if has else -1)
                seen[place] += has
            nvl_head.append(row)
    starts, received, meta = [], [], []
    for source in range(num_ranks):
        starts.append(len(meta))
        place = 0
        for token in range(len(members[source])):
            if members[source][token, rank]:
                meta.append([node_of[source], token if node_of[source] == here else place])
            place += goes_to(source, token, here)
        received.append(len(meta))

    def ints(values: object, *shape: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32).view(shape)

    return {
        "is_token_in_rank": mine,
        "rdma_channel_prefix_matrix": ints(sent, -1, 1),
        "gbl_channel_prefix_matrix": ints([int(column.sum()) for column in mine.unbind(1)], -1, 1),
        "recv_rdma_channel_prefix_matrix": ints(relayed, -1, 1),
        "recv_rdma_rank_prefix_sum": ints([sum(relayed[: node + 1]) for node in range(num_nodes)], -1),
        "recv_gbl_channel_prefix_matrix": ints(starts, -1, 1),
        "recv_gbl_rank_prefix_sum": ints(received, -1),
        "recv_src_meta": ints(meta, -1, 2).view(torch.uint8),
        "send_rdma_head": rdma_head,
        "send_nvl_head": ints(nvl_head, -1, len(ranks_of[here])),
    }
