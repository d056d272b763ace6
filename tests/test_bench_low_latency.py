"""The low-latency benchmark: on CPU ranks, and as on GPUs with CPU ranks and a clock that knows the answers."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

from tests.conftest import slow
from tests.test_bench import LOW_LATENCY
from tests.test_bench_cuda import FakeClock, a_device
from tokenferry import Buffer
from tokenferry.cli import bench, bench_low_latency, bench_low_latency_cases, bench_low_latency_clocks, main
from tokenferry.cli.bench_cases import BASELINE, OURS, BenchError
from tokenferry.cli.bench_cuda_cases import DEEPEP
from tokenferry.cli.bench_host import host_line, host_parts
from tokenferry.cli.bench_low_latency_baseline import FixedCollectives
from tokenferry.cli.bench_low_latency_cases import (
    WAIT_STATISTICS,
    BufferContender,
    Effort,
    LowLatencyCase,
    Traffic,
    Workload,
    check,
    count_traffic,
    prepare,
    run_cases,
)
from tokenferry.cli.bench_low_latency_clocks import GraphClock
from tokenferry.cli.bench_low_latency_plot import draw
from tokenferry.cli.bench_machine import describe_gpus
from tokenferry.cli.bench_operators import OPERATORS, expert_rows
from tokenferry.cli.ranks import RankPool

SMALL = ["bench", *LOW_LATENCY, "--hidden", "128", "--experts", "8", "--topk", "3", "--iterations", "2"]
PHASED = {"call", "chained", "host", "send", "receive"}


class FakeGraphClock(FakeClock):
    """What the device does of itself takes 10 us on rank 0 and 30 us on rank 1."""

    def launch(self, call: Callable[[], object]) -> float:
        call()
        return (10 + 20 * dist.get_rank()) * 1e-6

    def capture(self, call: Callable[[], object], count: int) -> Callable[[], object]:
        call()
        return lambda: None


def run_on_cpu(rank: int, num_ranks: int, cases: list[LowLatencyCase], largest: LowLatencyCase, *rest: Any) -> Any:
    effort, rivals, _ = rest
    on_cpu = [replace(case, device="cpu") for case in cases]
    return run_cases(rank, num_ranks, on_cpu, replace(largest, device="cpu"), effort, rivals, FakeGraphClock())


def a_case(**changes: Any) -> LowLatencyCase:
    shape: dict[str, Any] = {
        "device": "cpu",
        "ranks": 2,
        "tokens": 5,
        "max_tokens": 16,
        "hidden": 256,
        "dtype": "bf16",
        "topk": 3,
        "experts": 8,
        "exact": False,
        "seed": 4,
    }
    return LowLatencyCase(**{**shape, **changes})


def wire_by_hand(ranks: int, tokens: int, topk: int, experts: int) -> tuple[float, float]:
    """Rows that one token sends to other ranks: one for each rank, one for each expert."""
    rows = choices = 0
    for rank in range(ranks):
        case = a_case(ranks=ranks, tokens=tokens, topk=topk, experts=experts, hidden=128, seed=0)
        for chosen in prepare(case, rank).topk_idx.tolist():
            owners = [expert // (experts // ranks) for expert in chosen]
            rows += len(set(owners) - {rank})
            choices += sum(owner != rank for owner in owners)
    return rows / (ranks * tokens), choices / (ranks * tokens)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a small run on CPU ranks has put its results."""
    out = tmp_path_factory.mktemp("low-latency")
    assert main([*SMALL, "--tokens", "140", "1", "3", "--output", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def results(directory: Path) -> dict[str, Any]:
    loaded = json.loads((directory / "bench-low-latency.json").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_results_on_cpu_ranks(results: dict[str, Any], directory: Path) -> None:
    assert results["mode"] == "low-latency"
    assert results["machine"]["device"] == "cpu"
    assert results["notes"] == ["ranks are processes of one CPU: no claim of speed"]
    assert (results["method"]["calls"], results["method"]["phases"], results["method"]["chain"]) == (2, 2, 4)
    assert not [word for word in (socket.gethostname(), str(directory.parent)) if word in json.dumps(results)]
    ran = [tuple(entry["case"][key] for key in ("tokens", "max_tokens", "dtype")) for entry in results["cases"]]
    assert ran == [(tokens, max(tokens, 128), dtype) for tokens in (1, 3, 140) for dtype in ("fp8", "bf16")]
    for entry in results["cases"]:
        assert entry["case"]["ranks"] == 2
        assert entry["heap_bytes_per_rank"] > 0
        (operations,) = entry["contenders"].values()
        assert {name: set(kinds) for name, kinds in operations.items()} == {
            "dispatch": PHASED,
            "combine": PHASED,
            "pair": {"call", "chained", "host"},
        }
        for kinds in operations.values():
            for found in kinds.values():
                assert found["samples"] == 2
                assert 0 < found["fastest_seconds"] <= found["p10_seconds"] <= found["median_seconds"]
                assert found["median_seconds"] <= found["p90_seconds"] <= found["slowest_seconds"]
    assert [(fit["contender"], fit["dtype"], fit["kind"]) for fit in results["fits"]] == [
        (OURS, "fp8", "chained"),
        (OURS, "bf16", "chained"),
    ]
    assert (directory / "bench-low-latency.png").read_bytes().startswith(b"\x89PNG")


def test_bytes_match_a_count_by_hand(results: dict[str, Any]) -> None:
    for entry in results["cases"]:
        case, wire = entry["case"], entry["wire"]
        rows, choices = wire_by_hand(2, case["tokens"], 3, 8)
        assert wire["dispatch"]["row_bytes"] == {"fp8": 128 + 4, "bf16": 256}[case["dtype"]]
        assert wire["combine"]["row_bytes"] == 256
        for operation, sent in (("dispatch", rows), ("combine", choices)):  # CPU ranks send every row home
            found = wire[operation]
            assert found["rows_per_token"] == pytest.approx(sent)
            assert found["bytes_per_token"] == pytest.approx(sent * found["row_bytes"])
            assert found["rows_per_token_one_for_each_expert"] == pytest.approx(choices)
            assert found["bytes_per_token_one_for_each_expert"] == pytest.approx(choices * found["row_bytes"])


def test_earlier_results_are_drawn_and_compared(
    directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = directory / "bench-low-latency.json"
    copy = tmp_path / "copy.json"
    copy.write_text(earlier.read_text())
    assert main(["bench", "--draw", str(copy)]) == 0
    assert copy.with_suffix(".png").exists()
    arguments = [*SMALL, "--tokens", "1", "2", "--dtype", "fp8", "--no-plot", "--output", str(tmp_path)]
    capsys.readouterr()
    assert main([*arguments, "--against", str(earlier)]) == 0
    shown = capsys.readouterr().out
    compared = shown.partition("as fast as in bench-low-latency.json")[2].splitlines()
    assert [line for line in compared if "chained: dispatch" in line and "x (" in line]
    assert [line for line in compared if "not in the earlier file" in line]
    assert [line.split()[:2] for line in shown.splitlines()[-2:]] == [["1", "fp8"], ["2", "fp8"]]
    assert not (tmp_path / "bench-low-latency.png").exists()
    assert "fitted" not in shown


# As on GPUs.


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two GPUs that are none, ranks that are CPU processes; where results are saved."""

    @contextmanager
    def shared(given: bool) -> Iterator[None]:
        (tmp_path / "shared").write_text(str(given))
        yield

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(bench_low_latency, "take_device", a_device)
    monkeypatch.setattr(bench_low_latency, "run_cases", run_on_cpu)
    monkeypatch.setattr(bench_low_latency, "sharing_gpus", shared)
    monkeypatch.setattr(bench, "results_directory", lambda: tmp_path)
    return tmp_path


def test_results_as_on_gpus(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--device", "cuda", "--tokens", "1", "2", "4", "--dtype", "bf16", "--save"]) == 0
    assert (saved / "shared").read_text() == "False"
    results = json.loads((saved / "h100-2ranks-low-latency.json").read_text())
    assert (saved / "h100-2ranks-low-latency.png").read_bytes().startswith(b"\x89PNG")
    assert [note.partition(":")[0] for note in results["notes"]] == [BASELINE, "DeepEP V1 left out"]
    assert (results["machine"]["gpu"], results["machine"]["ranks"]) == ("NVIDIA H100 80GB HBM3", 2)
    assert results["versions"]["cuda"] == "13.0"
    expected = {
        "call": (2e-3, 4e-3),
        "chained": (1e-3, 3e-3),
        "host": (5e-4, 5e-4),
        "graph": (2.5e-7, 7.5e-7),  # of 40 calls
        "send": (1e-5, 3e-5),
        "receive": (1e-5, 3e-5),
    }
    for entry in results["cases"]:
        rows, choices = wire_by_hand(2, entry["case"]["tokens"], 3, 8)
        assert entry["wire"]["combine"]["rows_per_token"] == pytest.approx(rows)
        assert entry["wire"]["combine"]["rows_per_token_one_for_each_expert"] == pytest.approx(choices)
        for operation, kinds in entry["contenders"][OURS].items():
            assert set(kinds) == set(expected) - (set() if operation != "pair" else {"send", "receive"})
            for kind, found in kinds.items():
                first, second = expected[kind]
                assert found["rank_median_seconds"] == pytest.approx([first, second])
                for name in ("median", "p10", "p90", "fastest", "slowest"):
                    assert found[f"{name}_seconds"] == pytest.approx(second)
    for fit in results["fits"]:
        assert (fit["kind"], fit["operation"]) == ("graph", "pair")
        assert fit["constant_seconds"] == pytest.approx(7.5e-7)
        assert fit["seconds_per_token"] == pytest.approx(0, abs=1e-9)
    shown = capsys.readouterr().out
    assert "2 ranks on 2 x NVIDIA H100 80GB HBM3" in shown
    assert "NVLink" not in shown
    assert "0.75 us +" in shown
    assert len([line for line in shown.splitlines()[-3:] if "0.7 (0.7 .. 0.7)" in line]) == 3


@pytest.mark.slow
def test_ranks_that_share_gpus_and_send_every_row(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--ranks", "4", "--tokens", "6", "--max-tokens", "6", "--dtype", "fp8", "--exact", "--save"]
    assert main([*SMALL, "--device", "cuda", *arguments]) == 0
    assert (saved / "shared").read_text() == "True"
    assert capsys.readouterr().out.count("4 RANKS SHARE 2 GPUS") == 2
    results = json.loads((saved / "h100-4ranks-shared-low-latency-exact.json").read_text())
    assert "NO NVLink figures" in results["notes"][0]
    assert "GPU for each rank" in results["notes"][1]
    assert results["fits"] == []
    (entry,) = results["cases"]
    assert (entry["case"]["exact"], entry["case"]["max_tokens"]) == (True, 6)
    rows, choices = wire_by_hand(4, 6, 3, 8)
    assert rows < choices
    assert entry["wire"]["dispatch"]["rows_per_token"] == pytest.approx(rows)
    assert entry["wire"]["combine"]["rows_per_token"] == pytest.approx(choices)


def test_default_cases() -> None:
    settled: dict[str, Any] = {
        "mode": "low-latency",
        "device": "cpu",
        "num_nvl_bytes": [0],
        "kernels": False,
        "nodes": 1,
    }
    settled |= {"routing": "uniform", "staged": False, "host_profile": False}
    absent = ("modes", "mb", "sms", "seconds", "max_tokens", "tokens", "dtype", "ranks")
    parser = bench_low_latency.argparse.ArgumentParser()
    args = parser.parse_args([])
    args.__dict__.update({**settled, **dict.fromkeys(absent), "exact": False, "fail": parser.error})
    assert bench_low_latency.settle(args)
    assert (args.ranks, args.dtype, args.tokens) == (2, ["fp8", "bf16"], [1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    args.hidden, args.topk, args.experts, args.seed = 7168, 8, 256, 0
    groups = bench_low_latency.groups_of(args, [(dtype, count) for dtype in args.dtype for count in args.tokens])
    assert [(len(group), group[0].max_tokens) for group in groups] == [(16, 128), (2, 256), (2, 512)]
    assert groups[-1][-1].tokens == 512


def test_rivals() -> None:
    machine = {"device": "cuda", **describe_gpus([a_device(0, 1)] * 2, 2)}
    chosen, notes = bench_low_latency.choose_rivals(machine, "yes", True)
    assert chosen == [BASELINE, DEEPEP]
    assert "never run" in notes[1]
    assert bench_low_latency.choose_rivals(machine, "yes", False) == ([], ["no other contenders: --no-baseline"])
    assert bench_low_latency.choose_rivals(machine, "is not there", True)[0] == [BASELINE]
    shared = {"device": "cuda", **describe_gpus([a_device(0, 1)] * 4, 2)}
    assert bench_low_latency.choose_rivals(shared, "yes", True)[0] == []


@pytest.mark.slow
def test_operators_wait_statistics_and_a_profile_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    beside = ["--beside", "operators", "wait-statistics", "--host-profile"]
    assert main([*SMALL, "--tokens", "3", *beside, "--output", str(tmp_path)]) == 0
    for entry in json.loads((tmp_path / "bench-low-latency.json").read_text())["cases"]:
        assert entry["contenders"].keys() == {OURS, OPERATORS, WAIT_STATISTICS}
        assert entry["contenders"][OPERATORS].keys() == {"dispatch", "combine", "pair"}
        parts = {part["where"]: part for part in entry["host_parts"]}
        assert parts["buffer_low_latency.py"]["calls"] >= 2
        assert parts["buffer_low_latency.py"]["seconds"] > 0
        assert any(where.startswith("torch") for where in parts)
    assert "host under the profiler" in capsys.readouterr().out
    assert (tmp_path / "bench-low-latency.png").exists()


def count_waits(rank: int, num_ranks: int) -> int:
    case = a_case()
    work = prepare(case, rank)
    waits = work.topk_idx.new_zeros(num_ranks)
    with Buffer(dist.group.WORLD, num_rdma_bytes=case.size_hint(), low_latency_mode=True, device="cpu") as buffer:
        contender = BufferContender(case, work, buffer, waits)
        for _ in range(5):
            dist.barrier()
            time.sleep(0.01 * rank)
            contender.pair()
        dist.barrier()
    return int(waits.sum())


def test_wait_statistics_are_counted(pool_of: Callable[[int], RankPool]) -> None:
    assert pool_of(2).run(count_waits)[0] > 5e6


def spin() -> None:
    sum(range(20000))


def test_parts_of_the_host_add_up() -> None:
    def call() -> None:
        spin()
        torch.zeros(1)

    parts = {part.where: part for part in host_parts(call, 10)}
    builtin = parts["builtins.sum"]
    assert builtin.calls == 1
    assert builtin.seconds > 0.5 * sum(part.seconds for part in parts.values())
    assert parts["test_bench_low_latency.py:spin"].calls == 1
    assert "builtins.sum" in host_line(list(parts.values())).partition(":")[2].partition(",")[0]


class Standin(Buffer):
    """The library itself in the place of DeepEP."""

    def __init__(self, group: dist.ProcessGroup, num_nvl_bytes: int, *rest: Any, **options: Any) -> None:
        assert (rest, num_nvl_bytes) == ((a_case().size_hint(),), 0)
        assert options == {"low_latency_mode": True, "num_qps_per_rank": 4}
        super().__init__(group, 0, *rest, device="cpu", **options)


def beside_deepep(rank: int, num_ranks: int) -> list[Any]:
    module = ModuleType("deep_ep")
    module.Buffer = Standin  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, deep_ep=module):
        cases = [a_case(tokens=tokens, dtype=dtype) for tokens in (1, 5) for dtype in ("fp8", "bf16")]
        return run_cases(rank, num_ranks, cases, a_case(), Effort().limited(1), [BASELINE, DEEPEP], FakeGraphClock())


def test_rivals_run_beside(pool_of: Callable[[int], RankPool]) -> None:
    for results in pool_of(2).run(beside_deepep):
        assert len(results) == 4
        for result in results:
            assert result.samples.keys() == {OURS, BASELINE, DEEPEP}
            assert result.samples[OURS].keys() == result.samples[DEEPEP].keys()
            assert result.samples[OURS].keys() == result.samples[BASELINE].keys()
            phases = {"send", "receive"}
            assert result.samples[OURS]["combine"].keys() - result.samples[BASELINE]["combine"].keys() == phases


class BrokenOnOne(FixedCollectives):
    def combine(self, rows: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor]:
        (sums,) = super().combine(rows, weights)
        return (sums * 2 if dist.get_rank() == 1 else sums,)


def run_broken(*args: Any) -> Any:
    with mock.patch.object(bench_low_latency_cases, "FixedCollectives", BrokenOnOne):
        return run_on_cpu(*args)


def test_a_rival_that_fails_is_left_out_and_named(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_low_latency, "run_cases", run_broken)
    assert main([*SMALL, "--device", "cuda", "--tokens", "1", "200", "--dtype", "bf16", "--save"]) == 0
    results = json.loads((saved / "h100-2ranks-low-latency.json").read_text())
    assert all(entry["contenders"].keys() == {OURS} for entry in results["cases"])
    assert len(results["cases"]) == 2
    (note,) = [note for note in results["notes"] if "left out: it failed" in note]
    assert note.startswith(f"{BASELINE} left out: it failed on rank 1: BenchError: {BASELINE}, 1 tokens")
    assert note in capsys.readouterr().out


# The parts.


def test_traffic_by_hand() -> None:
    ids = torch.tensor([[0, 1, 2], [3, 4, 5], [6, 7, 0], [2, 3, 0]])
    # Two experts a rank. Rank 0: no, 1, | 1, 2, 2 | 3, 3, no | 1, 1, no.
    assert count_traffic(ids, 0, 4, 8) == Traffic(4, 1 + 2 + 1 + 1, 1 + 3 + 2 + 2)
    assert count_traffic(ids, 3, 4, 8) == Traffic(4, 2 + 2 + 1 + 2, 3 + 3 + 1 + 3)


def test_inputs_are_reproducible_and_differ_between_ranks() -> None:
    work = prepare(a_case(), 1)
    assert torch.equal(work.x, prepare(a_case(), 1).x)
    assert not torch.equal(work.x, prepare(a_case(), 0).x)
    assert work.x.dtype == torch.bfloat16
    assert all(len(set(row)) == 3 for row in work.topk_idx.tolist())


def test_rows_of_experts_are_dequantised() -> None:
    data = torch.full((2, 4, 256), float("nan")).to(torch.float8_e4m3fn)
    scales = torch.full((2, 2, 4), float("nan")).transpose(1, 2)
    data[1, :3], scales[1, :3] = 2.0, torch.tensor([0.5, 4.0])
    rows = expert_rows((data, scales), torch.tensor([0, 3]))
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[1, :3, :128], torch.ones(3, 128, dtype=torch.bfloat16))
    assert torch.equal(rows[1, :3, 128:], torch.full((3, 128), 8.0, dtype=torch.bfloat16))


class Broken:
    """A Buffer whose combine is off by a factor."""

    def __init__(self, work: Workload, factor: float) -> None:
        self._sum = work.x.float() * work.topk_weights.sum(1, keepdim=True) * factor

    def low_latency_dispatch(self, *_: object, **__: object) -> tuple[Any, ...]:
        return torch.empty(0), torch.empty(0), (), None, None

    def low_latency_combine(self, *_: object, **__: object) -> tuple[Any, ...]:
        return self._sum.to(torch.bfloat16), None, None


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_wrong_results_are_an_error(dtype: str) -> None:
    case = a_case(dtype=dtype)
    work = prepare(case, 0)
    check(OURS, BufferContender(case, work, Broken(work, 1.0)), case, work, 0)
    check(OURS, BufferContender(case, work, Broken(work, {"bf16": 1.005, "fp8": 1.06}[dtype])), case, work, 0)
    for factor in (0.0, 0.9, 1.1, float("nan")):
        with pytest.raises(BenchError, match=rf"tokenferry, 5 tokens, {dtype}: rank 0 got \d+ of 1280"):
            check(OURS, BufferContender(case, work, Broken(work, factor)), case, work, 0)


def test_an_error_of_a_rank_ends_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_low_latency, "run_cases", raise_on_a_rank)
    assert main([*SMALL, "--tokens", "1", "--no-plot"]) == 1
    assert "rank 1 failed" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_found_before_an_error_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_low_latency, "run_cases", raise_late)
    assert main([*SMALL, "--tokens", "1", "200", "--dtype", "fp8", "--output", str(tmp_path)]) == 1
    results = json.loads((tmp_path / "bench-low-latency.json").read_text())
    assert [entry["case"]["tokens"] for entry in results["cases"]] == [1]
    assert results["notes"][-1].startswith("ended early")
    assert not (tmp_path / "bench-low-latency.png").exists()


def raise_late(rank: int, num_ranks: int, cases: list[LowLatencyCase], *rest: Any) -> Any:
    if cases[0].tokens > 1:
        raise BenchError("late")
    return run_cases(rank, num_ranks, cases, *rest)


def raise_on_a_rank(rank: int, *_: object) -> list[Any]:
    if rank == 1:
        raise BenchError("wrong")
    return []


def test_graph_clock_hides_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    told = mock.MagicMock()
    told.Event().elapsed_time.return_value = 0.25
    for name in ("Event", "CUDAGraph", "graph", "synchronize", "_sleep"):
        monkeypatch.setattr(torch.cuda, name, getattr(told, name))
    monkeypatch.setattr(bench_low_latency_clocks, "start_together", told.start_together)
    clock = GraphClock()
    told.reset_mock()
    replay = clock.capture(told.call, 2)
    names = [call[0] for call in told.mock_calls]
    assert names == ["CUDAGraph", "graph", "graph().__enter__", "call", "call", "graph().__exit__"]
    told.reset_mock()
    assert clock.launch(replay) == 2.5e-4
    names = [call[0].removeprefix("Event().") for call in told.mock_calls]
    assert names[:3] == ["synchronize", "start_together", "_sleep"]
    assert names[3:] == ["record", "CUDAGraph().replay", "record", "synchronize", "elapsed_time"]


def test_low_latency_needs_a_gpu_on_cuda(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(SystemExit):
        main(["bench", *LOW_LATENCY, "--device", "cuda"])
    assert "--device" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("names", "tokens"),
    [
        ((OURS,), (8,)), ((OURS, BASELINE, DEEPEP), (1, 2, 4)),
        *slow(((OURS,), (1, 2, 4)), ((OURS, BASELINE, DEEPEP), (8,))),
    ],
)  # fmt: skip
def test_plot_of_results_by_hand(names: tuple[str, ...], tokens: tuple[int, ...], tmp_path: Path) -> None:
    found = {f"{name}_seconds": 1e-5 for name in ("median", "p10", "p90")}
    operations = {operation: {"chained": found, "graph": found} for operation in ("dispatch", "combine", "pair")}
    fit = {"contender": OURS, "dtype": "fp8", "constant_seconds": 1e-5, "seconds_per_token": 1e-7}
    shape = {"ranks": 2, "hidden": 7168, "topk": 8, "experts": 256, "exact": True}
    cases = [
        {"case": {**shape, "tokens": count, "dtype": dtype}, "contenders": dict.fromkeys(names, operations)}
        for dtype in ("fp8", "bf16")
        for count in tokens
    ]
    machine = describe_gpus([a_device(0, 1)] * 2, 2)
    results = {"machine": machine, "cases": cases, "fits": [fit], "method": {"captured": 10, "chain": 20}}
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_bands_are_inside_of_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    found = {"median_seconds": 1e-5, "p10_seconds": 1e-7, "p90_seconds": 1e-1}
    operations = {operation: {"graph": found} for operation in ("dispatch", "combine", "pair")}
    shape = {"ranks": 2, "hidden": 7168, "topk": 8, "experts": 256, "exact": True, "dtype": "fp8"}
    cases = [{"case": {**shape, "tokens": count}, "contenders": {OURS: operations}} for count in (1, 2)]
    machine = describe_gpus([a_device(0, 1)] * 2, 2)
    draw({"machine": machine, "cases": cases, "fits": [], "method": {"captured": 10}}, tmp_path / "plot.png")
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    for band in axes.collections:
        ends = band.get_paths()[0].vertices[:, 1]
        assert low < ends.min() < ends.max() < high
