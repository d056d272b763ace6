"""Commands that cannot write what they are to write, or have no GPU, and those whose process is ended."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.conftest import PoolOf, slow
from tokenferry import ArgumentError, Buffer, ops
from tokenferry.cli import COMMANDS, bench, bench_low_latency, main
from tokenferry.cli.ranks import RankPool
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
    with pytest.raises(SystemExit) as stopped:
        main([word.replace("FILE", str(file)) for word in command])
    assert stopped.value.code == 2
    option = next(word for word in command if word in ("--output", "--plot"))
    assert f"{command[0]}: error: argument {option}: {file}: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", [["soak"], ["doctor", "--live"], ["bench"], ["bench", "--mode", "low-latency"]])
def test_a_gpu_that_is_not_there_is_told(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--device", "cuda"])
    assert stopped.value.code == 2
    told = f"{command[0]}: error: argument --device: got cuda; allowed: cpu, since there is no GPU"
    assert told in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", list(COMMANDS))
def test_ctrl_c_while_a_command_is_imported(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib, "import_module", mock.Mock(side_effect=KeyboardInterrupt))
    assert main([command]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("words", "is_quiet"),
    [(["-m", "tokenferry", "plan"], True), (["tokenferry", "plan"], True), (["-c", "import tokenferry"], False)],
)
class StoppedPool(RankPool):
    """Ctrl-C comes after the first case."""

    asked = False

    def run(self, function: Any, *args: Any) -> Any:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        return super().run(function, *args)


@pytest.mark.parametrize(
    ("mode", "module", "file"),
    [("high-throughput", bench, "bench"), ("low-latency", bench_low_latency, "bench-low-latency")],
)
def test_what_a_benchmark_found_before_ctrl_c_is_written(
    mode: str,
    module: Any,
    file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(module, "RankPool", StoppedPool)
    shape = ["--ranks", "2", "--hidden", "128", "--experts", "8", "--topk", "2", "--iterations", "2"]
    tokens = ["--tokens", "8", "200", "--dtype", "bf16", "--output", str(tmp_path)]
    assert main(["bench", "--mode", mode, *shape, *tokens]) == 130
    results = json.loads((tmp_path / f"{file}.json").read_text())
    assert [entry["case"]["tokens"] for entry in results["cases"]] == [8]
    assert results["notes"][-1] == "ended early: interrupted"
    assert not (tmp_path / f"{file}.png").exists()
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "interrupted"
    assert f"written: {tmp_path / file}.json" in shown.out


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
