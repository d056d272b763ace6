"""What low-latency dispatch and combine must return, for all ranks at once: loops, one process, no package code.

Legend of dims: R ranks, E experts, L = E / R of them on a rank, N most tokens of a rank, T tokens, K choices.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import torch

GROUP = 128
Rows = list[list[tuple[int, int]]]
"""For each local expert the (source rank, source token) of its rows."""


def received_rows(topk_idx: Sequence[torch.Tensor], num_experts: int, rank: int) -> Rows:
    """The rows of each expert of ``rank``, by source rank, source token and choice."""
    num_local = num_experts // len(topk_idx)
    slabs: Rows = [[] for _ in range(num_local)]
    for source, ids in enumerate(topk_idx):
        for token, row in enumerate(ids.tolist()):
            for expert in row:
                if expert // num_local == rank and expert >= 0:
                    slabs[expert % num_local].append((source, token))
    return slabs


def layout_range(rows: Rows, num_ranks: int) -> list[list[int]]:
    """``(begin << 32) | count`` of each source in each slab."""
    table = []
    for slab in rows:
        begin, line = 0, []
        for source in range(num_ranks):
            count = sum(1 for row in slab if row[0] == source)
            line.append(begin * 2**32 + count)
            begin += count
        table.append(line)
    return table


def combined_by_rank(
    topk_idx: torch.Tensor,
    topk_weights: torch.Tensor,
    row_of: dict[tuple[int, int], torch.Tensor],
    hidden: int,
    num_local: int,
) -> torch.Tensor:
    """As :func:`combined`, but each rank of ``num_local`` experts sums its rows first, and rounds."""
    total = torch.zeros(len(topk_idx), hidden, dtype=torch.float32)
    ranks = sorted({expert // num_local for expert, _ in row_of})
    for rank in ranks:
        its = topk_idx.masked_fill(topk_idx.div(num_local, rounding_mode="floor") != rank, -1)
        total += combined(its, topk_weights, row_of, hidden).to(torch.float32)
    return total.to(torch.bfloat16)


def combined(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor, row_of: dict[tuple[int, int], torch.Tensor], hidden: int
) -> torch.Tensor:
    """bfloat16 [T, H] from the experts' rows by (expert, token); one that is missing counts nothing."""
    return combined_wide(topk_idx, topk_weights, row_of, hidden).to(torch.bfloat16)


def combined_wide(
    topk_idx: torch.Tensor, topk_weights: torch.Tensor, row_of: dict[tuple[int, int], torch.Tensor], hidden: int
) -> torch.Tensor:
    """As :func:`combined`, before it is rounded: float32 [T, H]."""
    out = torch.zeros(len(topk_idx), hidden, dtype=torch.float32)
    for token, ids in enumerate(topk_idx.tolist()):
        for choice, expert in enumerate(ids):
            if (expert, token) in row_of:
                out[token] += topk_weights[token, choice] * row_of[expert, token].to(torch.float32)
    return out


def as_float32(value: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def e4m3_code(value: float) -> int:
    """The byte of the nearest float8_e4m3fn, ties to even, 448 and above saturated."""
    sign = 0x80 if math.copysign(1.0, value) < 0 else 0
    size = abs(value)
    if size >= 448:
        return sign | 0x7E
    exponent = max(math.frexp(size)[1] - 1, -6) if size else -6
    steps = round(size / 2.0 ** (exponent - 3))  # 8 to 16, or 0 to 8 where numbers are denormal
    return sign | min(((exponent + 6) << 3) + steps, 0x7E)


def group_scale(amax: float, round_scale: bool) -> tuple[float, float]:
    """The factor for the data and the stored scale of a group."""
    amax = max(as_float32(1e-4), amax)
    scale = as_float32(amax * as_float32(1 / 448))
    if not round_scale:
        return as_float32(448 / amax), scale
    mantissa, exponent = math.frexp(scale)
    exponent -= mantissa == 0.5  # scale = mantissa * 2 ** exponent: an exact power of two stays
    return 2.0**-exponent, 2.0**exponent


def quantised(x: torch.Tensor, round_scale: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [T, H] codes and float32 [T, H / 128] scales of finite rows."""
    codes, scales = [], []
    for row in x.tolist():
        for start in range(0, len(row), GROUP):
            group = row[start : start + GROUP]
            factor, scale = group_scale(max(abs(value) for value in group), round_scale)
            codes += [e4m3_code(as_float32(value * factor)) for value in group]
            scales.append(scale)
    num_groups = x.size(1) // GROUP
    return (
        torch.tensor(codes, dtype=torch.uint8).view(x.shape),
        torch.tensor(scales, dtype=torch.float32).view(len(x), num_groups),
    )


def packed_ue8m0(scales: torch.Tensor) -> torch.Tensor:
    """int32 [T, ceil(S / 4)]: byte b of column j is the exponent of group 4 j + b, or 0 where there is none."""
    num_columns = math.ceil(scales.size(1) / 4)
    packed = torch.zeros(len(scales), num_columns, dtype=torch.int32)
    for token, row in enumerate(scales.tolist()):
        for column in range(num_columns):
            exponents = [math.frexp(scale)[1] - 1 + 127 for scale in row[4 * column : 4 * column + 4]]
            exponents += [0] * (4 - len(exponents))
            packed[token, column] = struct.unpack("<i", bytes(exponents))[0]
    return packed


def e4m3_values() -> list[float]:
    """What each of the 256 codes stands for."""
    values = []
    for code in range(256):
        exponent, mantissa = code >> 3 & 15, code & 7
        size = math.ldexp(8 + mantissa, exponent - 10) if exponent else math.ldexp(mantissa, -9)
        size = math.nan if code & 0x7F == 0x7F else size
        values.append(-size if code & 0x80 else size)
    return values


def dequantised(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32 [T, H]."""
    data = torch.tensor(e4m3_values(), dtype=torch.float32)[codes.long()]
    return data * scales.repeat_interleave(GROUP, 1)
