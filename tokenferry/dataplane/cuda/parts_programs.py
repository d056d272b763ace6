"""The kernels of operations in parts, and of local sums: variants, parameters in order, how many programs work."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from tokenferry.dataplane import HeldRows, Part, PartPlan, SendPlan
from tokenferry.dataplane.cuda.kernels import parts as kernels
from tokenferry.dataplane.cuda.kernels import sum_rows as sum_kernels
from tokenferry.dataplane.cuda.launch import Job, Kernel, Variant
from tokenferry.dataplane.cuda.programs import HeldTables, Target

_I8, _I32, _I64 = torch.uint8, torch.int32, torch.int64
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_ANNOUNCE_PART = Kernel(kernels.announce_part, (_I64, _I64, _I32, _I64, _I8, _I32, _I64, _I64, *(None,) * 11))
_NOTE_HELD = Kernel(kernels.note_held, (_I8, _I64, _I64, _I64, _I32, _I32, None))
_FIND_ROWS = Kernel(sum_kernels.find_rows, (_I64, *(None,) * 29))
_SUM_ROWS = {
    (rows, sums): Kernel(sum_kernels.sum_rows, (_I64, sums, sums, sums, rows, None, None))
    for rows in _FLOATS
    for sums in _FLOATS
    if torch.promote_types(rows, sums) == rows
}
_PARTS_A_LAUNCH = 8
_TOKENS_PER_BLOCK = 256
_TILE_BYTES = 32 * 1024
"""Of rows that a program asks for at a time: an SM's share of what keeps the memory busy."""
_PIECE_BYTES = 4096
"""Of one row among these."""


def announce_part(
    stream: int,
    context: tuple[int, ...],
    plan: SendPlan,
    part: PartPlan,
    table: torch.Tensor,
    places: Sequence[int],
    signature: int,
    list_capacity: int,
    rank: int,
    operation: int,
    timeout: int,
    target: Target,
) -> None:
    """Launch ``announce_part``; it writes ``table``, int32 [3, R]."""
    heap, state, ready, _, status = context
    tensors = (plan.is_token_in_rank, table, part.starts, part.first_tokens)
    assert all(tensor.is_contiguous() for tensor in tensors)
    numbers = (signature, plan.rows.size(0), part.num_rows, list_capacity, rank, operation, timeout)
    addresses = (tensor.data_ptr() for tensor in tensors)
    _announce_part(target).launch(
        target.num_ranks + 1, stream, (heap, state, ready, status, *addresses, *places, *numbers)
    )


@functools.cache
def _announce_part(target: Target) -> Variant:
    return _ANNOUNCE_PART.variant(
        8, NUM_COLUMNS=4, R=target.num_ranks, RB=triton.next_power_of_2(target.num_ranks), BLOCK=1024
    )


def note_held(stream: int, member: torch.Tensor, held: HeldRows, tables: HeldTables, target: Target) -> None:
    """Launch ``note_held``; it writes the table and ``send_head``."""
    tensors = (member, held.starts, held.ends, held.first_tokens, tables.table, tables.send_head)
    assert all(tensor.is_contiguous() for tensor in tensors)
    addresses = (tensor.data_ptr() for tensor in tensors)
    _note_held(target).launch(target.num_ranks, stream, (*addresses, member.size(0)))


@functools.cache
def _note_held(target: Target) -> Variant:
    return _NOTE_HELD.variant(8, R=target.num_ranks, BLOCK=1024)


def sum_rows(
    stream: int,
    parts: Sequence[Part],
    biases: Sequence[torch.Tensor],
    out: torch.Tensor,
    dtype: torch.dtype,
    found: torch.Tensor,
    target: Target,
    num_sms: int,
) -> None:
    """Launch ``find_rows`` and ``sum_rows``. Rows are packed, and of one dtype; ``found``: int64 [T, G]."""
    num_tokens, width = out.shape
    row_bytes = width * dtype.itemsize
    for first in range(0, len(parts), _PARTS_A_LAUNCH):
        here = parts[first : first + _PARTS_A_LAUNCH]
        none = (0,) * (_PARTS_A_LAUNCH - len(here))
        tokens = (0 if part.tokens is None else part.tokens.data_ptr() for part in here)
        rows = (part.rows.data_ptr() for part in here)
        counts = (part.rows.size(0) for part in here)
        numbers = (first, len(here), len(parts), num_tokens, row_bytes)
        arguments = (found.data_ptr(), *tokens, *none, *rows, *none, *counts, *none, *numbers)
        blocks = -(-num_tokens // _TOKENS_PER_BLOCK) * len(here)
        _find_rows(target).launch(min(max(num_sms, 1), blocks), stream, arguments)
    variant = _sum_rows((dtype, out.dtype), width, len(biases), target)
    bias_0, bias_1 = (biases[index].data_ptr() if index < len(biases) else 0 for index in range(2))
    arguments = (found.data_ptr(), bias_0, bias_1, out.data_ptr(), 0, len(parts), num_tokens)
    variant.launch(max(num_sms, 1), stream, arguments)


@functools.cache
def _find_rows(target: Target) -> Variant:
    return _FIND_ROWS.variant(4, BLOCK=_TOKENS_PER_BLOCK)


def alignment(width: int, dtype: torch.dtype) -> int:
    """Bytes on which the rows of local sums begin."""
    return 16 if width * dtype.itemsize % 16 == 0 else dtype.itemsize


@functools.cache
def _sum_rows(dtypes: tuple[torch.dtype, torch.dtype], width: int, num_biases: int, target: Target) -> Variant:
    item = dtypes[0].itemsize
    block = min(int(triton.next_power_of_2(width)), _PIECE_BYTES // item)
    return _SUM_ROWS[dtypes].variant(
        16,
        WIDTH=width,
        ALIGN=alignment(width, dtypes[0]),
        ACC=tl.float64 if dtypes[1] == torch.float64 else tl.float32,
        BIAS_0=num_biases > 0,
        BIAS_1=num_biases > 1,
        RT=min(_TILE_BYTES // (block * item), 64),
        BLOCK=block,
    )


def to_warm(plans: Sequence[SendPlan], reduces: Sequence[Sequence[torch.Tensor]], target: Target) -> Iterator[Job]:
    """What parts of such dispatches and combines launch beside the kernels of all dispatches and combines."""
    if any(plan.part is not None for plan in plans):
        yield functools.partial(_announce_part, target)
        yield functools.partial(_note_held, target)
        for columns in reduces:
            for column in columns:
                yield from sums_to_warm(column.dtype, column.size(1), target)


def sums_to_warm(dtype: torch.dtype, width: int, target: Target) -> Iterator[Job]:
    """Local sums of this dtype and width, of rows as wide or wider."""
    yield functools.partial(_find_rows, target)
    for rows in sorted({dtype, torch.promote_types(dtype, torch.float32)}, key=str):
        yield functools.partial(_sum_rows, (rows, dtype), width, 0, target)
