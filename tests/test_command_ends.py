"""Commands that cannot write what they are to write, or have no GPU, and those whose process is ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.conftest import PoolOf, slow
from tokenferry import ArgumentError, Buffer, ops
from tokenferry.cli import main
from tokenferry.waits import wait_report


@pytest.mark.parametrize(
    "command",
    [
        ["demo", "--ranks", "2", "--steps", "2", "--output", "FILE"],
        ["bench", "--ranks", "2", "--tokens", "16", "--output", "FILE"],
        ["soak", "--ranks", "2", "--minutes", "0.01", "--plot", "FILE/s.png"],
        ["doctor", "--live", "--ranks", "2", "--output", "FILE"],
    ],
)
def test_what_cannot_be_written_is_told_before_the_work(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    try:
        code = main([word.replace("FILE", str(file)) for word in command])
    except SystemExit as end:
        code = end.code  # type: ignore[assignment]
    shown = capsys.readouterr()
    assert code == 2
    assert "--output: " in shown.err or "--plot: " in shown.err
    assert str(file) in shown.err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_soak_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soak", "--device", "cuda"]) == 2
    assert "there is no GPU" in capsys.readouterr().err


PARENT = """
import os, sys, time
from tokenferry.cli.ranks import RankPool
from tests.test_command_ends import tell_and_sleep
if __name__ == "__main__":
    with RankPool(2, num_threads=1) as pool:
        pool.run(tell_and_sleep, sys.argv[1])
"""


def tell_and_sleep(rank: int, num_ranks: int, folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(60)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, *slow(signal.SIGKILL)])
def test_ranks_end_with_the_process_that_made_them(number: signal.Signals, tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=environment, cwd=root)
    try:
        until = time.monotonic() + 60
        while len(ranks := [int(path.name) for path in tmp_path.iterdir()]) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert all(map(is_running, ranks))
        parent.send_signal(number)
        parent.wait(20)
        until = time.monotonic() + 15
        while any(map(is_running, ranks)):
            assert time.monotonic() < until, "a rank goes on"
            time.sleep(0.05)
    finally:
        parent.kill()


def _met(rank: int, num_ranks: int) -> float:
    """Rank 0 leaves the meeting first, and takes the store with it: what the others look at is gone then."""
    with Buffer(dist.group.WORLD, timeout=10.0) as buffer:
        store = buffer._rendezvous.store
        assert store is not None
        if rank == 0:
            time.sleep(0.3)
        wait_report(buffer)
        left = time.monotonic()
        if rank:
            assert store.check([f"{buffer._meetings._name(1, other)}/left" for other in range(num_ranks)])
        return left


def test_nobody_leaves_a_meeting_before_all_have_what_they_came_for(pool_of: PoolOf) -> None:
    left = pool_of(3).run(_met)
    assert max(left) - min(left) < 1.0


def test_a_ring_of_one_token_is_refused_by_its_name(pool_of: PoolOf) -> None:
    pool_of(2).run(_refused)


def _refused(rank: int, num_ranks: int) -> None:
    with Buffer(dist.group.WORLD) as buffer:
        name, ids = ops.register(buffer), torch.zeros(2, 1, dtype=torch.int64)
        with pytest.raises(ArgumentError, match=r"^chunked_recv_tokens: got 1"):
            ops.dispatch(torch.ones(2, 8), ids, torch.ones(2, 1), name, 2, chunked_recv_tokens=1)
        dist.barrier()
