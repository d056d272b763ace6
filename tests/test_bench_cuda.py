"""The benchmark on GPUs, everything but the GPU: the ranks are CPU processes, and their clock knows the answers."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.conftest import slow
from tests.test_bench import SMALL, a_case
from tokenferry import Buffer
from tokenferry.cli import bench_cuda, bench_cuda_cases, main
from tokenferry.cli import mps as mps_module
from tokenferry.cli.bench_cases import BASELINE, CUDA_MODES, OURS, BenchError
from tokenferry.cli.bench_cuda_cases import (
    BARE,
    DEEPEP,
    NODES_EFFORT,
    CudaCase,
    Effort,
    Stretch,
    measure,
    run_cases,
)
from tokenferry.cli.bench_cuda_plot import draw
from tokenferry.cli.bench_cuda_report import KINDS, CudaReport
from tokenferry.cli.bench_machine import describe_gpus
from tokenferry.cli.bench_operators import MODES as OPERATED
from tokenferry.cli.bench_operators import OPERATORS
from tokenferry.cli.bench_start import start_together
from tokenferry.cli.ranks import RankPool


class FakeClock:
    """Every call takes 1 ms on rank 0 and 3 ms on rank 1, and the host 0.5 ms of it; a single one 1 ms more."""

    def drain(self) -> None:
        pass

    def stretch(self, call: Callable[[], object], count: int, ahead: int = 0) -> Stretch:
        for _ in range(min(count, 2)):
            call()
        return Stretch(count * (1 + 2 * dist.get_rank()) * 1e-3 + (count == 1) * 1e-3, count * 0.5e-3)


def run_on_cpu(rank: int, num_ranks: int, cases: list[CudaCase], effort: Effort, rivals: list[str], _: None) -> Any:
    return run_cases(rank, num_ranks, [replace(c, device="cpu") for c in cases], effort, rivals, FakeClock())


def a_device(rank: int, num_ranks: int, num_nodes: int = 1, staged: bool = False) -> dict[str, Any]:
    versions = {"triton": "3", "cuda": "13.0", "driver": "580", "nccl": "2.28"}
    shape: dict[str, Any] = {"gpu_sms": 132, "gpu_memory_bytes": 1 << 36, "gpu_capability": "9.0"}
    shape["gpu_allocator"] = bench_cuda_cases.STAGED if staged else ""
    return {"gpu": "NVIDIA H100 80GB HBM3", **shape, "versions": versions, "deep_ep": "is not there"}


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(bench_cuda, "take_device", a_device)
    monkeypatch.setattr(bench_cuda, "run_cases", run_on_cpu)


@pytest.fixture
def mps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What would control MPS; where it writes what it was told."""
    control, told = tmp_path / mps_module.MPS_CONTROL, tmp_path / "told"
    control.write_text(
        f'#!/bin/sh\nif [ "$1" = -d ]; then echo "start $CUDA_MPS_PIPE_DIRECTORY"; else cat; fi >> {told}\n'
    )
    control.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return told


CUDA = ["bench", "--device", "cuda", *SMALL[2:]]


@pytest.mark.usefixtures("two_gpus")
def test_cuda_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CUDA, "--tokens", "8", "--sms", "8", "16", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    machine = results["machine"]
    assert (machine["gpu"], machine["gpus"], machine["ranks"]) == ("NVIDIA H100 80GB HBM3", 2, 2)
    assert machine["device"] == "cuda"
    assert machine["ranks_share_gpus"] is False
    assert results["versions"].keys() == {"python", "torch", "tokenferry", "triton", "cuda", "driver", "nccl"}
    assert (results["method"]["calls"], results["method"]["stretches"]) == (2, 2)
    assert results["notes"] == ["DeepEP V1 left out: deep_ep is not there"]
    ran = [tuple(entry["case"][key] for key in ("dtype", "tokens", "mode", "sms")) for entry in results["cases"]]
    moved = ("dispatch", "cached", "combine", "pair", "cached-pair")
    assert ran == [
        *(("bf16", 8, m, s) for m, s in [("layout", 0), *itertools.product(moved, (8, 16))]),
        *(("fp8", 8, m, s) for m in moved if m != "combine" for s in (8, 16)),
    ]
    for entry in results["cases"]:
        layout = entry["case"]["mode"] == "layout"
        assert entry["contenders"].keys() == ({OURS} if layout else {OURS, BASELINE})
        assert entry["ratio_to_baseline"] == ({} if layout else {"call": 1.0, "chained": 1.0, "host": 1.0})
        assert entry["kernel_seconds"] == {}
        for kinds in entry["contenders"].values():
            assert kinds.keys() == {"call", "chained", "host"}
            for kind, (first, second) in {
                "call": (2e-3, 4e-3),
                "chained": (1e-3, 3e-3),
                "host": (5e-4, 5e-4),
            }.items():
                found = kinds[kind]
                assert found["samples"] == 2
                for name in ("median", "fastest", "slowest", "p10", "p90"):
                    assert found[f"{name}_seconds"] == pytest.approx(second)
                assert found["rank_median_seconds"] == pytest.approx([first, second])
                assert found["rank_spread_seconds"] == pytest.approx(second - first)
            rate = entry["wire_bytes_per_rank"] / 3e-3 / 1e9
            assert kinds["chained"]["wire_gigabytes_per_second"] == pytest.approx(rate)
            assert "wire_gigabytes_per_second" not in kinds["host"]
    shown = capsys.readouterr().out
    assert "2 ranks on 2 x NVIDIA H100 80GB HBM3" in shown
    assert "NVLink" not in shown
    picture = tmp_path / "bench.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    assert main(["bench", "--draw", str(tmp_path / "bench.json")]) == 0
    assert picture.exists()


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.slow
def test_cuda_beside_and_extra_modes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modes = ["dispatch", *OPERATED, "expanded"]
    arguments = ["--tokens", "8", "--sms", "8", "--modes", *modes, "--beside", "operators", "--routing", "others"]
    assert main([*CUDA, *arguments, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert "every row crosses" in results["notes"][-1]
    for entry in results["cases"]:
        assert entry["case"]["routing"] == "others"
        assert entry["wire_bytes_per_rank"] == entry["logical_bytes_per_rank"] > 0
        wanted = {OURS, BASELINE, *([OPERATORS] if entry["case"]["mode"] in OPERATED else [])}
        assert entry["contenders"].keys() == wanted
    assert {entry["case"]["mode"] for entry in results["cases"]} == set(modes)
    assert "expanded dispatch" in capsys.readouterr().out
    assert (tmp_path / "bench.png").exists()
    with pytest.raises(SystemExit):
        main([*CUDA, "--beside", "wait-statistics"])


def fail_late(rank: int, num_ranks: int, cases: list[CudaCase], *rest: Any) -> Any:
    if cases[0].tokens > 8:
        raise BenchError("made to fail")
    return run_on_cpu(rank, num_ranks, cases, *rest)


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.slow
def test_what_was_found_before_a_failure_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_cuda, "run_cases", fail_late)
    arguments = [*CUDA, "--modes", "combine", "--dtype", "bf16", "--output", str(tmp_path)]
    assert main([*arguments, "--tokens", "8", "16"]) == 1
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [entry["case"]["tokens"] for entry in results["cases"]] == [8]
    assert results["notes"][-1] == "ended early: tokenferry.cli.bench_cases.BenchError: made to fail"
    assert "made to fail" in capsys.readouterr().err
    assert not (tmp_path / "bench.png").exists()
    (tmp_path / "bench.json").unlink()
    assert main([*arguments, "--tokens", "16"]) == 1
    assert not (tmp_path / "bench.json").exists()

    class Interrupted(RankPool):
        def run(self, function: Any, *args: Any) -> Any:
            if function is fail_late and args[0][0].tokens > 8:
                raise KeyboardInterrupt
            return super().run(function, *args)

    monkeypatch.setattr(bench_cuda, "RankPool", Interrupted)
    assert main([*arguments, "--tokens", "8", "16"]) == 130
    assert json.loads((tmp_path / "bench.json").read_text())["notes"][-1] == "ended early: interrupted"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.slow
def test_cuda_staged_over_the_ceiling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--tokens",
        "8",
        "--modes",
        "cached",
        "--num-nvl-bytes",
        "1M",
        "2M",
        "0",
        "--staged",
        "--no-baseline",
    ]
    assert main([*CUDA, *arguments, "--dtype", "bf16", "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["machine"]["gpu_allocator"] == "expandable_segments:True"
    assert "pass through the stage" in results["notes"][-1]
    assert [entry["case"]["num_nvl_bytes"] for entry in results["cases"]] == [1 << 20, 2 << 20, 0]
    shown = capsys.readouterr().out
    assert "stage up to 2 MiB" in shown
    assert (tmp_path / "bench.png").exists()
    assert main([*CUDA, *arguments[:4], "--no-plot", "--against", str(tmp_path / "bench.json")]) == 0


def test_a_staged_rank_tells_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(bench_cuda_cases, "describe_device", lambda index: {"index": index})
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    bench_cuda_cases.take_device(1, 2)
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == os.environ["PYTORCH_ALLOC_CONF"] == ""
    assert bench_cuda_cases.take_device(1, 2, 1, True)["index"] == 1
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == os.environ["PYTORCH_ALLOC_CONF"] == bench_cuda_cases.STAGED


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.slow
def test_cuda_says_that_ranks_share_gpus(tmp_path: Path, mps: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*CUDA, "--ranks", "4", "--tokens", "8", "--modes", "combine", "--output", str(tmp_path)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert shown.count("4 RANKS SHARE 2 GPUS") == 2
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results["machine"]["ranks_share_gpus"] is True
    assert "NO NVLink figures" in results["notes"][0]
    assert "NCCL refuses" in results["notes"][1]
    (entry,) = results["cases"]
    assert entry["contenders"].keys() == {OURS}
    start, end = mps.read_text().splitlines()
    assert start.startswith("start /")
    assert end == "quit"
    arguments[-1] = str(tmp_path / "again")
    assert main([*arguments, "--no-plot", "--against", str(tmp_path / "bench.json")]) == 0
    assert "chained 1.00x (7000.0 -> 7000.0)" in capsys.readouterr().out


def test_mps_is_there_or_named(mps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(os.environ)
    with mps_module.sharing_gpus(True):
        assert os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] == "1"
        assert mps.read_text() == f"start {os.environ['CUDA_MPS_PIPE_DIRECTORY']}\n"
    assert dict(os.environ) == before
    mps.unlink()
    with mps_module.sharing_gpus(False):
        assert dict(os.environ) == before
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/of/the/user")
    with mps_module.sharing_gpus(True):
        assert os.environ["CUDA_MPS_PIPE_DIRECTORY"] == "/of/the/user"
    assert not mps.exists()
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(mps_module.MpsError, match="MPS"), mps_module.sharing_gpus(True):
        pass


def test_mps_that_waits_in_vain_is_ended(mps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def tell(control: str, command: str, seconds: float) -> str:
        assert control == str(mps.with_name(mps_module.MPS_CONTROL))
        told.append(command)
        if told == ["quit"]:
            raise subprocess.TimeoutExpired(control, seconds)
        return "12\n345\n" if command == "get_server_list" else ""

    monkeypatch.setattr(mps_module, "_tell_mps", tell)
    with mps_module.sharing_gpus(True):
        pass
    assert told == ["quit", "get_server_list", "shutdown_server 12 -f", "shutdown_server 345 -f", "quit"]


def test_cuda_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for num_gpus, more, named in ((0, [], "--device"), (2, ["--seconds", "1"], "--seconds")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda num_gpus=num_gpus: num_gpus)
        with pytest.raises(SystemExit):
            main(["bench", "--device", "cuda", *more])
        assert named in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("two_gpus")
def test_between_nodes(tmp_path: Path) -> None:
    modes = ["dispatch", "combine", "pair"]
    command = [*CUDA, "--tokens", "8", "--nodes", "2", "--dtype", "bf16", "--modes", *modes]
    assert main([*command, "--output", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "bench.json").read_text())
    assert [entry["case"]["mode"] for entry in results["cases"]] == modes
    for entry in results["cases"]:
        assert entry["case"]["nodes"] == 2
        assert entry["contenders"].keys() == {OURS, BASELINE, BARE}
    assert "network transport" in results["notes"][0]


def test_bytes_of_the_bare_exchange(pool_of: Callable[[int], RankPool]) -> None:
    for mode, wanted in (("cached", ["there"]), ("combine", ["back"]), ("cached-pair", ["there", "back"])):
        for sent, received in pool_of(2).run(
            bare_bytes, a_cuda_case(mode=mode, topk=1, ranks=2, seed=1, device="cpu")
        ):
            assert sent == [way for way in received["expected"] if way[0] in wanted]


def bare_bytes(rank: int, num_ranks: int, case: CudaCase) -> Any:
    """Bytes of the exchanges, and those that the rows of one way have."""
    sent: list[tuple[str, int, int]] = []

    def note(output: torch.Tensor, given: torch.Tensor, coming: list[int], going: list[int], group: Any) -> None:
        way = "there" if going[1 - rank] == rows[1 - rank] and coming[1 - rank] == theirs else "back"
        sent.append((way, given.numel(), output.numel()))

    with Buffer(dist.group.WORLD, device="cpu") as buffer:
        work = bench_cuda_cases.prepare(case, rank, buffer)
        rows = work.num_tokens_per_rank.tolist()
        other = torch.empty_like(work.num_tokens_per_rank)
        dist.all_gather([work.num_tokens_per_rank.clone(), other][:: 1 - 2 * rank], work.num_tokens_per_rank)
        theirs = int(other[rank])
        call = bench_cuda_cases._bare_exchange(case, work, None)
        with mock.patch.object(dist, "all_to_all_single", note):
            call()
    width = replace(case, mode="cached").row_bytes(), replace(case, mode="combine").row_bytes()
    assert rows[1 - rank] != theirs
    expected = [
        ("there", rows[1 - rank] * width[0], theirs * width[0]),
        ("back", theirs * width[1], rows[1 - rank] * width[1]),
    ]
    return sent, {"expected": expected}


def test_rivals_and_file_names_of_cuda() -> None:
    machine = {**describe_gpus([a_device(0, 1)] * 2, 2), "nodes": 1}
    assert bench_cuda.choose_rivals(machine, "yes", True)[0] == [BASELINE, DEEPEP]
    for gpus, ranks, nodes, wanted in ((1, 2, 2, [BASELINE, BARE]), (4, 4, 2, [BASELINE]), (2, 4, 2, [])):
        shared = {**describe_gpus([a_device(0, 1)] * ranks, gpus), "nodes": nodes}
        assert bench_cuda.choose_rivals(shared, "yes", True)[0] == wanted
    with mock.patch.dict(os.environ, {"TOKENFERRY_CARRIER": "nvshmem"}):
        two_nodes = {**describe_gpus([a_device(0, 1)] * 2, 2), "nodes": 2}
        found, notes = bench_cuda.choose_rivals(two_nodes, "yes", True)
        assert found == []
        assert "through nvshmem" in notes[0]
    assert bench_cuda.choose_rivals(machine, "yes", False)[0] == []
    assert bench_cuda.choose_rivals({**machine, "ranks": 3}, "yes", True)[0] == [BASELINE]
    reports = [CudaReport(a_cuda_case(sms=sms), {}, 0, 0, 0, {}) for sms in (0, 8, 16)]
    assert bench_cuda.file_name(machine, reports[:2]) == "h100-80gb-hbm3-2ranks-37tokens"
    shared = describe_gpus([a_device(0, 1)] * 4, 2)
    assert bench_cuda.file_name(shared, reports) == "h100-80gb-hbm3-4ranks-shared-37tokens-sms"


def a_cuda_case(sms: int = 16, **changes: Any) -> CudaCase:
    return CudaCase(**asdict(a_case(**changes)), sms=sms)


def beside_deepep(rank: int, num_ranks: int, cases: list[CudaCase]) -> list[Any]:
    """A run where the library itself stands for DeepEP."""
    module = ModuleType("deep_ep")
    module.Buffer = type("Buffer", (Buffer,), {"__init__": lambda self, *_: Buffer.__init__(self, dist.group.WORLD)})  # type: ignore[attr-defined]
    sys.modules["deep_ep"] = module
    try:
        return run_cases(rank, num_ranks, cases, Effort(1, 1, 2, warm_ups=1), [BASELINE, DEEPEP], FakeClock())
    finally:
        del sys.modules["deep_ep"]


def test_contenders_take_turns() -> None:
    seen: list[tuple[object, int, int]] = []

    class Clock(FakeClock):
        def stretch(self, call: Callable[[], object], count: int, ahead: int = 0) -> Stretch:
            seen.append((call(), count, ahead))
            return Stretch(2.0 * count, 1.0 * count)

    found = measure(Clock(), {"a": lambda: "a", "b": lambda: "b"}, Effort(calls=2, stretches=2), 7, 3)
    assert seen[:3] == [("a", 5, 0), ("a", 1, 0), ("a", 1, 0)]
    assert seen[6:] == [("a", 7, 3), ("b", 7, 3)] * 2
    assert found["b"] == ([2.0] * 2, [2.0] * 2, [1.0] * 2)


def test_stretches_are_of_some_tokens() -> None:
    chains = [Effort().chain_of(a_cuda_case(tokens=tokens)) for tokens in (128, 4096, 16384, 65536)]
    assert chains == [(100, 20), (100, 20), (32, 20), (20, 20)]
    assert NODES_EFFORT.chain_of(a_cuda_case(tokens=4096, nodes=2)) == (4, 1)


@pytest.mark.parametrize(
    ("nodes", "iterations", "wanted", "told"),
    [
        (1, None, (30, 5, 100, 20), "around 100 calls, right behind 20 that are not timed, for one of them; fewer"),
        (2, None, (20, 30, 4, 1), "around 4 calls, right behind 1 that are not timed, for one of them.\n"),
        (2, 9, (9, 9, 4, 1), "around 4 calls"),
    ],
)
def test_effort(nodes: int, iterations: int | None, wanted: tuple[int, ...], told: str) -> None:
    args = SimpleNamespace(nodes=nodes, iterations=iterations, kernels=False)
    effort = bench_cuda._effort(args)  # type: ignore[arg-type]
    assert (effort.calls, effort.stretches, effort.chain, effort.ahead) == wanted
    assert told in bench_cuda._boundary(effort)


def test_deepep_runs_beside(pool_of: Callable[[int], RankPool]) -> None:
    cases = [a_cuda_case(ranks=2, mode=mode) for mode in CUDA_MODES]
    for results in pool_of(2).run(beside_deepep, cases):
        assert [DEEPEP in result.samples for result in results] == [True] * len(CUDA_MODES)
        assert [BASELINE in result.samples for result in results] == [mode != "layout" for mode in CUDA_MODES]


def meet_and_start(rank: int, num_ranks: int) -> list[tuple[float, float]]:
    times = []
    for turn in range(6):
        time.sleep(0.02 * ((rank + turn) % num_ranks))
        arrived = time.monotonic()
        start_together()
        times.append((arrived, time.monotonic()))
    return times


def test_ranks_start_together(pool_of: Callable[[int], RankPool]) -> None:
    for times in zip(*pool_of(3).run(meet_and_start), strict=True):
        assert min(left for _, left in times) > max(arrived for arrived, _ in times)


def test_cuda_clock_times_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("record")

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 4.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: told.append("drain"))
    monkeypatch.setattr(bench_cuda_cases, "start_together", lambda: told.append("together"))
    stretch = bench_cuda_cases.CudaClock().stretch(lambda: told.append("call"), 3)
    assert told == ["drain", "together", "record", "call", "call", "call", "record", "wait"]
    assert stretch.device == 4e-3
    assert 0 < stretch.host < 1


@pytest.mark.parametrize(
    ("tokens", "sms"), [((8,), (8,)), ((8, 4096), (8, 16)), *slow(((8, 64), (8,)), ((8,), (8, 24)))]
)
def test_cuda_plot_of_results_by_hand(tokens: tuple[int, ...], sms: tuple[int, ...], tmp_path: Path) -> None:
    found = {f"{name}_seconds": 1e-4 for name in ("median", "fastest", "slowest")}
    cases = [
        {
            "case": {**asdict(a_cuda_case(mode=mode, tokens=t, sms=s))},
            "contenders": {OURS: dict.fromkeys(KINDS, found)},
        }
        for mode in ("dispatch", "combine", "pair", "cached-pair")
        for t in tokens
        for s in sms
    ]
    machine = describe_gpus([a_device(0, 1)] * 4, 2)
    draw({"machine": machine, "cases": cases}, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
