"""Checksums of rows, sums of rows, and whether two are the same: in PyTorch, with nothing of a data plane."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from tokenferry.dataplane import Part

_BLOCK_BYTES = 1 << 18
"""Of temporaries on CPUs: they stay in the core's cache."""
_BLOCK_BYTES_ON_GPUS = 1 << 29


def checksums(rows: torch.Tensor, salt: int) -> torch.Tensor:
    """The checksum of each row: ``sum over j of mix(word_j + key_j)``, modulo 2^64; no defence against intent.

    ``mix`` is one to one, so that one changed word always shows; that several cancel out is a matter of chance, in
    the order of 2^-60.

    Args:
        rows: [n, width], contiguous: words of 8 bytes, the last filled up with zeros.
        salt: rows under another salt have other keys.

    Returns:
        int64 [n].
    """
    num_rows, nbytes = rows.size(0), rows.size(1) * rows.element_size()
    num_words = -(-nbytes // 8)
    sums = torch.zeros(num_rows, dtype=torch.int64, device=rows.device)
    if not num_rows or not num_words:
        return sums
    source, keys = rows.view(torch.uint8), _keys(num_words, salt, rows.device)
    step = max(1, _block_bytes(rows) // (8 * num_words))
    block = torch.zeros((min(step, num_rows), num_words), dtype=torch.int64, device=rows.device)
    for low in range(0, num_rows, step):
        high = min(low + step, num_rows)
        words = block[: high - low]
        words.view(torch.uint8)[:, :nbytes].copy_(source[low:high])
        if nbytes % 8:
            words.view(torch.uint8)[:, nbytes:].zero_()
        torch.sum(_mix(words.add_(keys)), 1, out=sums[low:high])
    return sums


def sum_of_rows(x: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    """int64 [n]: one checksum of each row and its scales."""
    sums = checksums(x, 1)
    return sums if scales is None else sums + checksums(scales, 2)


@lru_cache(maxsize=64)
def _keys(count: int, salt: int, device: torch.device) -> torch.Tensor:
    """int64 [count], equal on all ranks."""
    with torch.inference_mode(False):
        numbers = torch.arange(count, device=device) + (salt << 40)
        return _mix(numbers * _signed(0x9E3779B97F4A7C15))


def _mix(words: torch.Tensor) -> torch.Tensor:
    """Stir int64 words in place, one to one: a change of any bit changes about half of all."""
    for shift, factor in ((32, 0xFF51AFD7ED558CCD), (29, 0xC4CEB9FE1A85EC53)):
        words ^= (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        words *= _signed(factor)
    return words


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def added_up(parts: Sequence[Part], biases: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """Sums of rows as combine has them, [T, width] of the dtype of ``like``: by column, with nothing of a data plane.

    Args:
        parts: added in this order, after the biases.
        biases: [T, width].
        like: [T, width].
    """
    num_tokens, width = like.shape
    dtype = torch.promote_types(like.dtype, torch.float32)
    out = torch.empty_like(like)
    step = max(16, _block_bytes(like) // (dtype.itemsize * max(1, num_tokens)))
    for low in range(0, width, step):
        part_of = slice(low, min(low + step, width))
        total = torch.zeros((num_tokens, part_of.stop - low), dtype=dtype, device=like.device)
        for bias in biases:
            total += bias[:, part_of]
        for tokens, rows in parts:
            if tokens is None:
                total += rows[:, part_of]
            else:
                total.index_add_(0, tokens, rows[:, part_of].to(dtype))
        out[:, part_of] = total
    return out


def differ(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Bool [T]: the rows of two floating tensors [T, width] whose bits differ elsewhere than in two NaNs."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[first.element_size()]
    unequal = first.view(integer) != second.view(integer)
    return (unequal & ~(first.isnan() & second.isnan())).any(1)


def _block_bytes(like: torch.Tensor) -> int:
    return _BLOCK_BYTES if like.device.type == "cpu" else _BLOCK_BYTES_ON_GPUS
