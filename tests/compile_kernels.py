"""Compile the kernels for one architecture, without a GPU: ``python -m tests.compile_kernels 90 FOLDER NAME ...``.

The variants are those that :mod:`tokenferry.dataplane.cuda.programs` would launch. For each name of ``LAUNCHES``
the folder receives ``NAME.ptx`` and ``NAME.json``: what ptxas says about it, and how many variants there are after
other values of its integers. A process of its own, since compilers may abort.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

from tokenferry.dataplane import (
    ExpertPlan,
    HeldRows,
    OperationKind,
    Outputs,
    Part,
    PartPlan,
    ScaleFormat,
    SendPlan,
)
from tokenferry.dataplane.cuda import (
    expert_major_programs,
    launch,
    low_latency_programs,
    parts_programs,
    programs,
    rail_programs,
)
from tokenferry.handles import DispatchHandle
from tokenferry.memory import nvshmem

TOKENS, ROWS, NUM_SMS = 4096, 8192, 16
CONTEXT, STAGE, TIMEOUT = (0,) * 5, (1 << 20, 1 << 25), 10**10
BFLOAT16, FLOAT16, FLOAT32, FLOAT64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NUMBERS = (1, 16, 17, 2**33)
"""Values of integer parameters that Triton would make variants of, unless told not to."""


def layout(ranks: int, topk: int, experts: int = 64, *, spans: bool = False) -> None:
    ids, counts = torch.empty(TOKENS, topk, dtype=torch.int64), torch.empty(ranks + experts, dtype=torch.int32)
    member, state = torch.empty(TOKENS, ranks, dtype=torch.bool), torch.empty(16, dtype=torch.int64)
    programs.layout(0, ids, counts, counts, member, state, experts, programs.Target(ranks, False, 0), int(spans))


def plan_of(ranks: int, row_bytes: int, topk: int, scale_bytes: int = 0, *, cached: bool = False) -> SendPlan:
    handle = handle_of(ranks) if cached else None
    return SendPlan(
        rows=torch.empty(TOKENS, row_bytes, dtype=torch.uint8),
        scales=torch.empty(TOKENS, scale_bytes, dtype=torch.uint8) if scale_bytes else None,
        topk_idx=torch.empty(TOKENS, topk, dtype=torch.int64) if topk else None,
        topk_weights=torch.empty(TOKENS, topk) if topk else None,
        is_token_in_rank=torch.empty(TOKENS, ranks, dtype=torch.bool),
        num_tokens_per_rank=None if cached else torch.empty(ranks, dtype=torch.int32),
        num_tokens_per_expert=None if cached else torch.empty(64, dtype=torch.int32),
        num_worst_tokens=0,
        handle=handle,
    )


def handle_of(ranks: int) -> DispatchHandle:
    prefix, channel = torch.empty(ranks, ranks, dtype=torch.int32), torch.empty(ranks, 1, dtype=torch.int32)
    head, src_idx = torch.empty(TOKENS, ranks, dtype=torch.int32), torch.empty(ROWS, dtype=torch.int32)
    member = torch.empty(TOKENS, ranks, dtype=torch.bool)
    return DispatchHandle(prefix, channel, channel, src_idx, member, head)


def clear() -> None:
    rows, places = torch.empty(ROWS, 7168, dtype=torch.bfloat16), torch.empty(ROWS, dtype=torch.int32)
    programs.clear(0, rows, places, programs.Target(8, False, 0))


def notify(ranks: int, *, expand: bool | None = None) -> None:
    """``expand``: of rows that tell where they are from; None: they do not."""
    handle, plan, target = handle_of(ranks), plan_of(ranks, 16, 8), programs.Target(ranks, False, 0)
    if expand is not None:
        plan = plan._replace(experts=ExpertPlan(64 // ranks, TOKENS, 128, expand))
    call = programs.notify_call(plan, 0, 64 // ranks, TOKENS, 0, OperationKind.DISPATCH, TIMEOUT, True, target)
    results = (handle.send_head, handle.rank_prefix_matrix, handle.channel_prefix_matrix)
    tensors = programs.notify_tensors(plan, *results, None if expand is None else handle.recv_src_idx)
    call.launch(0, CONTEXT, tensors, (0,) * 4)


def dispatch(
    ranks: int, row_bytes: int, topk: int, scale_bytes: int = 0, *, cached: bool = False, bulk: bool = False
) -> None:
    plan, handle = plan_of(ranks, row_bytes, topk, scale_bytes, cached=cached), handle_of(ranks)
    outputs = Outputs(
        torch.empty(ROWS, row_bytes, dtype=torch.uint8),
        torch.empty(ROWS, scale_bytes, dtype=torch.uint8) if scale_bytes else None,
        torch.empty(ROWS, topk, dtype=torch.int64) if topk else None,
        torch.empty(ROWS, topk) if topk else None,
        handle.recv_src_idx,
    )
    kind = OperationKind.CACHED_DISPATCH if cached else OperationKind.DISPATCH
    call = programs.dispatch_call(plan, 0, TOKENS, STAGE, 0, kind, TIMEOUT, programs.Target(ranks, bulk, 0), NUM_SMS)
    tensors = programs.dispatch_tensors(plan, outputs, handle.recv_src_idx, handle.rank_prefix_matrix)
    call.launch(0, CONTEXT, tensors, (0, 0, 0, 0, ROWS, ROWS))


def expanded(
    ranks: int, row_bytes: int, topk: int, scale_bytes: int = 0, *, cached: bool = False, bulk: bool = False
) -> None:
    plan, handle = plan_of(ranks, row_bytes, topk, scale_bytes, cached=cached), handle_of(ranks)
    outputs, small = expanded_outputs(row_bytes, topk, scale_bytes), torch.empty(256, dtype=torch.int32)
    experts = ExpertPlan(64 // ranks, TOKENS, 128, True, ROWS, False, outputs.metadata if cached else None, small)
    plan = plan._replace(experts=experts)
    call = programs.dispatch_call(
        plan, 0, TOKENS, STAGE, 0, OperationKind.EXPANDED_DISPATCH, TIMEOUT, programs.Target(ranks, bulk, 0), NUM_SMS
    )  # fmt: skip
    tensors = programs.dispatch_tensors(plan, outputs, handle.recv_src_idx, handle.rank_prefix_matrix, small)
    call.launch(0, CONTEXT, tensors, (0, 0, 0, 0, ROWS, ROWS))


def expanded_outputs(row_bytes: int, topk: int, scale_bytes: int = 0) -> Outputs:
    return Outputs(
        torch.empty(ROWS, row_bytes, dtype=torch.uint8),
        torch.empty(ROWS, scale_bytes, dtype=torch.uint8) if scale_bytes else None,
        torch.empty(ROWS, topk, dtype=torch.int64),
        torch.empty(ROWS, 1),
        torch.empty(ROWS, dtype=torch.int32),
        torch.empty(ROWS, topk + 2, dtype=torch.int32),
    )


def pack(topk: int, experts: int) -> None:
    ids, counts = torch.empty(TOKENS, topk, dtype=torch.int64), torch.empty(experts, dtype=torch.int32)
    expert_major_programs.pack(0, ids, ids, counts, experts, programs.Target(8, False, 0))


def sources() -> None:
    outputs = expanded_outputs(16, 8)
    expert_major_programs.sources(
        0, outputs, handle_of(8).rank_prefix_matrix, TOKENS, 0, programs.Target(8, False, 0)
    )


def pad() -> None:
    ends = torch.empty(64, dtype=torch.int32)
    expert_major_programs.pad(0, expanded_outputs(7168, 8, 56 * 4), ends, 128, programs.Target(8, False, 0))


def sum_copies(dtype: torch.dtype, wide: torch.dtype) -> None:
    x, out = torch.empty(ROWS, 7168, dtype=dtype), torch.empty(ROWS, 7168, dtype=wide)
    metadata = torch.empty(ROWS, 10, dtype=torch.int32)
    prefix = handle_of(8).rank_prefix_matrix
    expert_major_programs.sum_copies(
        0, x, metadata, out, prefix, (0, 0), 0, OperationKind.COMBINE, programs.Target(8, False, 0)
    )


def combine(
    ranks: int,
    dtype: torch.dtype,
    row_bytes: int,
    topk: int = 8,
    biases: int = 0,
    *,
    bulk: bool = False,
    sums: torch.dtype | None = None,
) -> None:
    held = None if sums is None else held_tables(ranks)
    width = row_bytes // dtype.itemsize
    columns, outs = (
        [torch.empty(count, width, dtype=of), *[torch.empty(count, topk)] * (topk > 0)]
        for count, of in ((ROWS, dtype), (TOKENS, sums or dtype))
    )
    call = programs.combine_call(
        columns, outs, biases, STAGE, 0, OperationKind.COMBINE, TIMEOUT, programs.Target(ranks, bulk, 0), NUM_SMS,
        held is not None,
    )  # fmt: skip
    tensors = programs.combine_tensors(columns, outs, [outs[0]] * biases, handle_of(ranks), held)
    call.launch(0, CONTEXT, tensors, (0, 0, 0, TOKENS, ROWS))


def part(ranks: int, row_bytes: int, topk: int, scale_bytes: int = 0, *, bulk: bool = False) -> None:
    plan = plan_of(ranks, row_bytes, topk, scale_bytes)
    plan = plan._replace(num_tokens_per_rank=None, num_tokens_per_expert=None, part=part_plan(ranks))
    outputs = Outputs(plan.rows, plan.scales, plan.topk_idx, plan.topk_weights, None)
    call = programs.dispatch_call(
        plan, 0, TOKENS, STAGE, 0, OperationKind.DISPATCH, TIMEOUT, programs.Target(ranks, bulk, 0), NUM_SMS
    )
    tensors = programs.dispatch_tensors(plan, outputs, None, torch.empty(3 * ranks, dtype=torch.int32))
    call.launch(0, CONTEXT, tensors, (0, 0, 0, 0, ROWS, ROWS))


def part_plan(ranks: int) -> PartPlan:
    starts = torch.empty(ranks, dtype=torch.int64)
    return PartPlan(ROWS, starts, starts, range(64 // ranks))


def announce_part(ranks: int) -> None:
    table = torch.empty(3 * ranks, dtype=torch.int32)
    parts_programs.announce_part(
        0, CONTEXT, plan_of(ranks, 16, 8), part_plan(ranks), table, (0,) * 4, 0, TOKENS, 0, OperationKind.DISPATCH,
        TIMEOUT, programs.Target(ranks, False, 0),
    )  # fmt: skip


def held_tables(ranks: int) -> programs.HeldTables:
    words = torch.empty(TOKENS * ranks, dtype=torch.int32)
    return programs.HeldTables(words, words, words)


def note_held(ranks: int) -> None:
    starts = torch.empty(ranks, dtype=torch.int64)
    held = HeldRows(starts, starts, starts, torch.empty(ROWS, dtype=torch.int32))
    member = torch.empty(TOKENS, ranks, dtype=torch.bool)
    parts_programs.note_held(0, member, held, held_tables(ranks), programs.Target(ranks, False, 0))


def sum_rows(width: int, dtype: torch.dtype, sums: torch.dtype, biases: int = 0) -> None:
    out, found = torch.empty(TOKENS, width, dtype=sums), torch.empty(TOKENS, 9, dtype=torch.int64)
    parts = [Part(found[:, 0], torch.empty(TOKENS, width, dtype=dtype))]
    with mock.patch.object(parts_programs, "_find_rows"):
        parts_programs.sum_rows(
            0, parts, [out] * biases, out, dtype, found, programs.Target(8, False, 0), NUM_SMS
        )  # fmt: skip


def low_latency_dispatch(
    ranks: int, phase: str, scale_format: ScaleFormat, topk: int = 8, tokens: int = 4, *, nodes: int = 1,
    shrinks: bool = False,
) -> None:  # fmt: skip
    part = low_latency_programs.part_of(7168, tokens * ranks)
    shape = low_latency_programs.DispatchShape(
        scale_format, 7168, topk, 256 // ranks, nodes, part, shrinks, 4, capability() >= 90
    )
    low_latency_programs.dispatch.cache_clear()
    getattr(low_latency_programs.dispatch(shape, low_latency_target(ranks)), phase)


def low_latency_combine(
    ranks: int, phase: str, exact: bool, topk: int = 8, tokens: int = 4, *, shrinks: bool = False
) -> None:
    part = low_latency_programs.part_of(7168, tokens * ranks, topk)
    shape = low_latency_programs.CombineShape(7168, topk, 256 // ranks, part, shrinks, exact, 4, capability() >= 90)
    low_latency_programs.combine.cache_clear()
    getattr(low_latency_programs.combine(shape, low_latency_target(ranks)), phase)


def low_latency_target(ranks: int) -> programs.Target:
    return programs.Target(ranks, False, 0, capability() >= 89)


def capability() -> int:
    return int(triton.runtime.driver.active.get_current_target().arch)


LAUNCHES: dict[str, Callable[[], None]] = {
    "layout": lambda: layout(8, 8),
    "notify": lambda: notify(8),
    "dispatch 2 ranks": lambda: dispatch(2, 14336, 8),
    "dispatch 8 ranks": lambda: dispatch(8, 14336, 8),
    "dispatch fp8": lambda: dispatch(8, 7168, 8, 56 * 4),
    "dispatch 16 bytes": lambda: dispatch(8, 16, 1),
    "dispatch without choices": lambda: dispatch(8, 14336, 0),
    "dispatch cached": lambda: dispatch(8, 14336, 0, cached=True),
    "dispatch expanded": lambda: expanded(8, 14336, 8),
    "dispatch expanded fp8": lambda: expanded(8, 7168, 8, 56 * 4),
    "dispatch expanded cached": lambda: expanded(8, 14336, 8, cached=True),
    "dispatch expanded 32": lambda: expanded(32, 14336, 32),
    "dispatch part": lambda: part(8, 14336, 8),
    "dispatch part without choices": lambda: part(4, 14336, 0),
    "announce part": lambda: announce_part(8),
    "local clear": clear,
    "local note held": lambda: note_held(8),
    "local find rows": lambda: parts_programs._find_rows.__wrapped__(programs.Target(8, False, 0)),
    "local sum rows": lambda: sum_rows(7168, BFLOAT16, BFLOAT16, 2),
    "local sum rows fp32": lambda: sum_rows(7168, FLOAT32, BFLOAT16, 1),
    "local layout of spans": lambda: layout(8, 8, 256, spans=True),
    "local pack": lambda: pack(8, 256),
    "local pack, many experts": lambda: pack(32, 8192),
    "notify, expanded": lambda: notify(8, expand=True),
    "notify, compact": lambda: notify(2, expand=False),
    "local sources": sources,
    "local pad": pad,
    "local sum bf16": lambda: sum_copies(BFLOAT16, BFLOAT16),
    "local sum bf16 wide": lambda: sum_copies(BFLOAT16, FLOAT32),
    "combine bf16 2 ranks": lambda: combine(2, BFLOAT16, 14336),
    "combine bf16": lambda: combine(8, BFLOAT16, 14336),
    "combine bf16 biases": lambda: combine(8, BFLOAT16, 14336, 0, 2),
    "combine fp16": lambda: combine(8, FLOAT16, 14336),
    "combine fp32": lambda: combine(8, FLOAT32, 28672),
    "combine fp64": lambda: combine(8, FLOAT64, 14336),
    "combine 16 bytes": lambda: combine(8, BFLOAT16, 16),
    "combine held wide": lambda: combine(4, BFLOAT16, 14336, sums=FLOAT32),
    "low latency dispatch bf16": lambda: low_latency_dispatch(8, "both", ScaleFormat.NONE),
    "low latency dispatch fp8": lambda: low_latency_dispatch(2, "both", ScaleFormat.PLAIN),
    "low latency dispatch between nodes": lambda: low_latency_dispatch(4, "both", ScaleFormat.PLAIN, nodes=3),
    "low latency dispatch many tokens": lambda: low_latency_dispatch(8, "both", ScaleFormat.UE8M0, tokens=128),
    "low latency dispatch send": lambda: low_latency_dispatch(8, "send", ScaleFormat.ROUNDED, shrinks=True),
    "low latency dispatch receive": lambda: low_latency_dispatch(8, "receive", ScaleFormat.UE8M0, shrinks=True),
    "low latency dispatch 32": lambda: low_latency_dispatch(32, "both", ScaleFormat.PLAIN, 32, 128),
    "low latency combine": lambda: low_latency_combine(2, "both", False),
    "low latency combine many tokens": lambda: low_latency_combine(8, "both", False, tokens=128),
    "low latency combine exact": lambda: low_latency_combine(8, "both", True, tokens=128),
    "low latency combine send": lambda: low_latency_combine(8, "send", False, shrinks=True),
    "low latency combine receive": lambda: low_latency_combine(8, "receive", False, shrinks=True),
    "low latency combine 32": lambda: low_latency_combine(32, "both", False, 32, 128),
    "bulk dispatch": lambda: dispatch(8, 14336, 8, bulk=True),
    "bulk dispatch fp8": lambda: dispatch(8, 7168, 8, 56 * 4, bulk=True),
    "bulk dispatch cached": lambda: dispatch(8, 14336, 0, cached=True, bulk=True),
    "bulk dispatch expanded": lambda: expanded(8, 14336, 8, bulk=True),
    "bulk dispatch expanded fp8": lambda: expanded(8, 7168, 8, 56 * 4, bulk=True),
    "bulk dispatch expanded cached": lambda: expanded(8, 14336, 8, cached=True, bulk=True),
    "bulk dispatch part": lambda: part(8, 14336, 8, bulk=True),
    "bulk dispatch part fp8": lambda: part(8, 7168, 8, 56 * 4, bulk=True),
    "bulk combine held wide": lambda: combine(8, BFLOAT16, 14336, bulk=True, sums=FLOAT32),
    "bulk combine bf16": lambda: combine(8, BFLOAT16, 14336, bulk=True),
    "bulk combine fp32": lambda: combine(8, FLOAT32, 28672, bulk=True),
}
"""One launch each, by name: the kernel's, then the case. "bulk" needs sm_90, "local" tells no peer anything."""
NVSHMEM = nvshmem.find()
if NVSHMEM is not None:
    LAUNCHES["rail"] = rail_programs.RailKernel(NVSHMEM.device, print).load


class _Driver:
    """Stands for the driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def is_active(self) -> bool:
        return True


class _Recorder:
    """Compiles as ``launch.Kernel.variant`` does, but loads nothing."""

    def __init__(self) -> None:
        self.compiled: list[Any] = []
        self.num_variants = 0

    def compile(self, kernel: launch.Kernel, num_warps: int, **constants: object) -> launch.Variant:
        before = _count_variants(kernel._kernel)
        for number in NUMBERS:
            compiled = kernel.compile(num_warps, number, **constants)
        self.compiled.append(compiled)
        self.num_variants += _count_variants(kernel._kernel) - before
        return launch.Variant(lambda *_: None, (), (None,) * len(constants))


def _count_variants(kernel: Any) -> int:
    return sum(len(caches[0]) for caches in kernel.device_caches.values())


def _ptxas(ptx: str, capability: int) -> str:
    """What ptxas tells of a kernel that Triton found in its cache."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={sm_arch_from_capability(capability)}"]
        return subprocess.run(
            [*command, file.name, "-o", "/dev/null"], check=True, capture_output=True, text=True
        ).stderr


def compile_one(queue: Callable[[], None], capability: int) -> tuple[str, dict[str, int]]:
    """PTX and figures of the kernel that ``queue`` launches."""
    recorder, log = _Recorder(), io.StringIO()
    with (
        mock.patch.object(launch.Kernel, "variant", lambda *a, **k: recorder.compile(*a, **k)),
        torch.device("meta"),
        redirect_stdout(log),
    ):
        queue()
    (compiled,) = recorder.compiled
    ptx = compiled.asm["ptx"]
    said = log.getvalue() or _ptxas(ptx, capability)
    patterns = {"registers": r"Used (\d+) registers", "stack": r"(\d+) bytes stack", "spills": r"(\d+) bytes spill s"}
    found = {name: int(number) for name, pattern in patterns.items() for number in re.findall(pattern, said)}
    return ptx, found | {"variants": recorder.num_variants, "dynamic_shared": compiled.metadata.shared}


def main(arguments: Sequence[str]) -> None:
    capability, folder, names = int(arguments[0]), Path(arguments[1]), arguments[2:]
    triton.runtime.driver.set_active(_Driver(capability))
    triton.knobs.nvidia.dump_ptxas_log = True
    for name in names:
        ptx, found = compile_one(LAUNCHES[name], capability)
        (folder / f"{name}.ptx").write_text(ptx)
        (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
