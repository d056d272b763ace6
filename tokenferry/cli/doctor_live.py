"""``tokenferry doctor --live``: local ranks at work, one of them slow on purpose, and the report that names it."""

from __future__ import annotations

import time
from pathlib import Path

import torch
import torch.distributed as dist

from tokenferry.buffer import Buffer
from tokenferry.cli.ranks import RankPool
from tokenferry.waits import WaitReport, wait_report

_TOKENS, _HIDDEN, _TOPK, _EXPERTS = 256, 512, 4, 8
"""Of a rank."""
_TIMEOUT = 60.0


def live(
    num_ranks: int,
    slow: int | None,
    delay_ms: float,
    seconds: float,
    picture: Path | None,
    *,
    device: str = "cpu",
    is_quiet: bool = False,
) -> WaitReport:
    """Let ranks dispatch and combine, and print a report about once a second.

    Args:
        num_ranks: to start.
        slow: the rank that is late for every dispatch; None: nobody is.
        delay_ms: how late.
        seconds: how long.
        picture: PNG file for the whole time; None: no picture.
        device: type of the device of the ranks, who share GPUs where they are more.
        is_quiet: print nothing.

    Returns:
        The report of the whole time.
    """
    with RankPool(num_ranks, num_threads=1) as pool:
        reports: list[WaitReport] = pool.run(_work, slow, delay_ms / 1e3, seconds, picture, device, is_quiet)
    return reports[0]


def _work(
    rank: int,
    num_ranks: int,
    slow: int | None,
    delay: float,
    seconds: float,
    picture: Path | None,
    device_type: str,
    is_quiet: bool,
) -> WaitReport:
    device = torch.device(device_type)
    if device.type == "cuda":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    made = torch.Generator().manual_seed(rank)
    x = torch.randn((_TOKENS, _HIDDEN), generator=made).bfloat16().to(device)
    experts = num_ranks * _EXPERTS
    ids = torch.rand((_TOKENS, experts), generator=made).topk(_TOPK).indices.to(device)
    weights = torch.rand((_TOKENS, _TOPK), generator=made).to(device)
    began = time.monotonic()
    next_report = began + min(1.0, seconds)
    calls = 0
    with Buffer(dist.group.WORLD, timeout=_TIMEOUT, device=device) as buffer:
        while True:
            if rank == slow:
                time.sleep(delay)
            per_rank, _, per_expert, member, _ = buffer.get_dispatch_layout(ids, experts)
            recv_x, _, _, _, handle, _ = buffer.dispatch(
                x,
                num_tokens_per_rank=per_rank,
                is_token_in_rank=member,
                num_tokens_per_expert=per_expert,
                topk_idx=ids,
                topk_weights=weights,
            )
            assert isinstance(recv_x, torch.Tensor)
            assert handle is not None
            buffer.combine(recv_x, handle)
            calls += 1
            now = torch.tensor([time.monotonic() - began, float(time.monotonic() > next_report)])
            dist.broadcast(now, 0)
            if now[1]:
                next_report += 1.0
                report = wait_report(buffer)
                if rank == 0 and not is_quiet:
                    verdict = report.text.splitlines()[0]
                    print(f"{now[0]:5.1f} s, {calls} dispatches and combines: {verdict}", flush=True)
            if now[0] >= seconds:
                return wait_report(buffer, picture)
