"""The soak: it runs, its reference is right, and it finds what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests import oracle
from tests.cases import TIMEOUT
from tests.conftest import PoolOf, slow
from tokenferry import Buffer, MismatchError
from tokenferry.cli import main, soak_graphs, soak_plot, soak_ranks
from tokenferry.cli import soak as command
from tokenferry.cli.mps import MPS_CONTROL
from tokenferry.cli.ranks import RankError
from tokenferry.cli.soak_faults import DURING, Bench, expected
from tokenferry.cli.soak_low_latency import Flight, warm
from tokenferry.cli.soak_memory import Look
from tokenferry.cli.soak_ranks import Report, Settings, layouts_of, soak
from tokenferry.cli.soak_world import FLOATS, Chance, World, random_shape, rows, same
from tokenferry.dataplane.cpu import combine as cpu_combine
from tokenferry.dataplane.cpu import dispatch as cpu_dispatch
from tokenferry.dataplane.cpu import low_latency as cpu_low_latency
from tokenferry.dataplane.cpu.expert_major import CopyMap

MINUTE = 55.0
"""Of a soak, in seconds, beside shorter ones."""


@pytest.mark.slow
def test_short_soak_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tokenferry", "soak", "--minutes", "0.03", "--ranks", "2", "--seed", "3"]
    picture, result = tmp_path / "soak.png", tmp_path / "soak.json"
    done = subprocess.run(
        [*command, "--plot", str(picture), "--output", str(result)],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all results as plain PyTorch has them" in done.stdout
    assert "shared memory with a name         0" in done.stdout
    assert "LEAK" not in done.stdout
    assert "killed          1 ranks in the end, one after the other; the others went on" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert str(picture) in done.stdout
    written = json.loads(result.read_text())
    assert "\n".join(written["lines"]) in done.stdout
    assert written["command"].endswith("--plot soak.png --output soak.json")
    assert written["machine"]["cores"] > 0
    assert len(written["looks"]["of_ranks"]) == 2
    assert all(Look(*look).resident > 1 << 20 for looks in written["looks"]["of_ranks"] for look in looks)


@pytest.mark.parametrize("num_ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_soak_in_this_process_group(pool_of: PoolOf, num_ranks: int) -> None:
    reports: list[Report] = pool_of(num_ranks).run(soak, Settings(3.0 if num_ranks > 1 else 0.5, 7, "cpu", 100))
    assert len({str((report.calls, report.faults, report.layouts)) for report in reports}) == 1
    assert sum(reports[0].calls.values()) > 10
    assert all(report.segments == 0 for report in reports)
    assert all((report.bytes_moved > 0) == (num_ranks > 1) for report in reports)


def _soak_with_played_graphs(rank: int, num_ranks: int, settings: Settings, spoil: bool) -> Report:
    """A graph on CPU ranks: what it holds runs again."""

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            run()
            if spoil and rank == 0:
                replays.result[2][0][-1:].add_(1)

        replays = run.__self__  # type: ignore[attr-defined]
        run()
        return replay

    with (
        mock.patch.object(soak_graphs, "fits", lambda bench: max(bench.layout) == 0),
        mock.patch.object(soak_graphs, "capture", capture),
        mock.patch.object(soak_ranks, "_PARANOID_SHARE", 0.0 if spoil else 0.3),
        mock.patch.object(soak_ranks, "_ELASTIC_SHARE", 0.0 if spoil else 0.5),
    ):
        return soak(rank, num_ranks, settings)


@pytest.mark.timeout(300)
def test_everything_for_a_minute(pool_of: PoolOf) -> None:
    reports: list[Report] = pool_of(3).run(_soak_with_played_graphs, Settings(MINUTE, 11, "cpu", 100), False)
    report = reports[0]
    assert len({str((of_rank.calls, of_rank.faults, of_rank.ways)) for of_rank in reports}) == 1
    assert min(report.ways.values()) > 0, report.ways
    assert len(report.ways) == 4, report.ways
    assert {"elastic dispatch", "elastic combine", "elastic cached dispatch"} <= report.calls.keys()
    assert not any(leak.is_leak for leak in command.find_leaks(reports, set(), 0))


def test_a_wrong_replay_is_found(pool_of: PoolOf) -> None:
    with pytest.raises(RankError, match="replay of a graph: AssertionError: combined_x"):
        pool_of(2).run(_soak_with_played_graphs, Settings(30.0, 1, "cpu", 60), True)


def _with_a_wrong_copy(rank: int, num_ranks: int) -> None:
    finish = CopyMap.finish

    def spoiling(self: Any) -> None:
        finish(self)
        self._outputs.rows.view(torch.uint8)[-1:, -1:] ^= 1

    with (
        mock.patch.object(soak_ranks, "_ELASTIC_SHARE", 1.0),
        mock.patch.object(soak_ranks, "_PARANOID_SHARE", 0.0),  # which finds it first
        mock.patch.object(CopyMap, "finish", spoiling) if rank == 0 else nullcontext(),
    ):
        soak(rank, num_ranks, Settings(30.0, 5, "cpu", 60))


def test_a_wrong_copy_is_found(pool_of: PoolOf) -> None:
    with pytest.raises(RankError, match="ElasticBuffer: AssertionError: expanded rows"):
        pool_of(2).run(_with_a_wrong_copy)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("num_ranks", [3, 6])
def test_long_soak(pool_of: PoolOf, num_ranks: int) -> None:
    reports: list[Report] = pool_of(num_ranks).run(soak, Settings(300.0, num_ranks, "cpu", 300))
    assert len(reports[0].faults) > 6
    assert not any(leak.is_leak for leak in command.find_leaks(reports, set(), 0))


def _wrong(rank: int, num_ranks: int, what: str) -> None:
    """A soak of a library that makes one mistake, on one rank."""

    rows_of, take_rows, add_up = cpu_low_latency.rows_of, cpu_dispatch.take_rows, cpu_combine.add_up

    def add_up_wrongly(parts: Any, biases: Any, out: torch.Tensor, *rest: Any) -> Any:
        result = add_up(parts, biases, out, *rest)
        out[-1:].add_(1)
        return result

    def take_wrong_rows(source: torch.Tensor, chosen: torch.Tensor, out: torch.Tensor) -> None:
        take_rows(source, chosen, out)
        out.view(torch.uint8)[-1:, -1:].bitwise_xor_(1)

    def stage_wrong_rows(*args: Any) -> torch.Tensor:
        found = rows_of(*args)
        return found.roll(1, 0) if found.size(1) > 32 else found

    mistakes: dict[str, tuple[Any, str, Any]] = {
        "a sum": (cpu_combine, "add_up", add_up_wrongly),
        "a row": (cpu_dispatch, "take_rows", take_wrong_rows),
        "a low-latency row": (cpu_low_latency, "rows_of", stage_wrong_rows),
    }
    with mock.patch.object(*mistakes[what]) if rank == 0 else nullcontext():
        soak(rank, num_ranks, Settings(30.0, 5, "cpu", 60))


@pytest.mark.parametrize(
    ("what", "complaint"),
    [("a row", "recv_"), *slow(("a sum", "combined_x"), ("a low-latency row", "rows of expert"))],
)
def test_mistakes_are_found(pool_of: PoolOf, what: str, complaint: str) -> None:
    with pytest.raises(RankError) as caught:
        pool_of(2).run(_wrong, what)
    assert complaint in str(caught.value)
    assert "episode" in str(caught.value)


@pytest.mark.parametrize("seed", range(6))
def test_reference_is_that_of_the_oracle(seed: int) -> None:
    chance = Chance(seed)
    shape = random_shape(chance, 3, 20)
    inputs = None
    for rank in range(3):
        world = World(shape, rank)
        inputs = [oracle.Inputs(one.x, one.scales, one.ids, one.weights) for one in world.inputs]
        wanted = oracle.dispatch(inputs, world.num_experts, rank, 4)
        result = (
            wanted.x if wanted.scales is None else (wanted.x, wanted.scales),
            wanted.topk_idx,
            wanted.topk_weights,
            wanted.num_per_expert,
            None,
            None,
        )
        world.check_received(result, 4, 0)
        assert world.num_received == oracle.num_received(inputs, world.num_experts)
        if wanted.x.numel():
            spoiled = wanted.x.clone()
            spoiled.view(torch.uint8)[-1, -1] ^= 1
            with pytest.raises(AssertionError, match="recv_x: 1 of"):
                world.check_received(
                    (spoiled if wanted.scales is None else (spoiled, wanted.scales), *result[1:]), 4, 0
                )
        dtype = chance.choice(FLOATS)
        made = torch.Generator().manual_seed(seed)
        values = [rows(dtype, len(one.x), 64, made) for one in world.inputs]
        rows_of = [World(shape, peer).expert_rows(values) for peer in range(3)]
        bias = [rows(dtype, len(values[rank]), 64, made)]
        one_node = oracle.combine(inputs, world.num_experts, rank, rows_of, bias)
        same("combined", world.combined(values[rank], bias, [0, 0, 0], False), one_node)
        for exact in (False, True):
            nodes = oracle.combine_between_nodes(inputs, world.num_experts, rank, rows_of, [0, 1, 2], bias, exact)
            same("combined", world.combined(values[rank], bias, [0, 1, 2], exact), nodes)


def test_layouts_are_all_the_even_ones() -> None:
    assert layouts_of(1) == [(0,)]
    assert layouts_of(4) == [(0, 0, 0, 0), (0, 1, 2, 3), (0, 0, 1, 1), (0, 1, 0, 1)]


def test_missing_error_is_a_failure() -> None:
    with pytest.raises(AssertionError, match="no MismatchError"), expected(MismatchError):
        pass
    with pytest.raises(AssertionError, match="blames"), expected(MismatchError, ranks=[2]):
        raise MismatchError("dispatch", 1, [1], "made up")
    assert all(fault.inject.__doc__ for fault in DURING.values())


def test_leaks_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    clean = Report(calls=Counter({"dispatch": 3}), files=(10, 12), resident=(1 << 20, 3 << 20), resident_peak=4 << 20)
    assert not any(leak.is_leak for leak in command.find_leaks([clean, clean], set(), 0))
    leaky = Report(segments=2, files=(10, 30))
    leaks = command.find_leaks([clean, leaky], {"tokenferry-1"}, 1)
    assert [leak.is_leak for leak in leaks] == [True, True, True, True, False, False]
    page = command.summary(Settings(1.0, 2, "cpu", 3), [clean, leaky], leaks, 1.0, 0)
    assert page.count("LEAK") == 4
    assert "dispatch                          3" in page
    assert "+20 in the rank with most" in page


def test_what_is_drawn(tmp_path: Path) -> None:
    pictures = []
    for name, on_device in (("with.png", 900 << 20), ("without.png", 0)):
        looks = [Look(seconds, 100 << 20, 10, on_device) for seconds in range(0, 300, 5)]
        drawn = [Report(calls=Counter({"dispatch": 3}), looks=looks)] * 2
        lines = command._headlines(Settings(300.0, 1, "cuda", 3), drawn)
        assert len(lines) == 3
        soak_plot.draw(drawn, lines, tmp_path / name)
        pictures.append((tmp_path / name).read_bytes())
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert len(pictures[0]) > len(pictures[1])


def _soak_without_ranks(reports: list[Report], *options: str) -> int:
    """The command, whose ranks leave these reports."""
    with (
        mock.patch.object(command, "RankPool") as pool,
        mock.patch.object(command, "named_segments", return_value=set()),
        mock.patch.object(command.soak_shrink, "end", return_value=0),
    ):
        pool.return_value.__enter__.return_value.run.return_value = reports
        pool.return_value.__enter__.return_value.processes = []
        return main(["soak", "--ranks", str(len(reports)), *options])


def test_a_leak_ends_with_1_and_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "new" / "soak.json"
    looks = [Look(1.0, 2 << 20, 10), Look(2.25, 3 << 20, 11, 4, 5)]
    for files, code in (((10, 12), 0), ((10, 30), 1)):
        report = Report(calls=Counter({"dispatch": 3}), files=files, looks=looks)
        assert _soak_without_ranks([report], "--output", str(result)) == code
        written = json.loads(result.read_text())
        page = "\n".join(written["lines"])
        assert page in capsys.readouterr().out
        assert ("LEAK" in page) == bool(code)
        assert [Look(*look) for look in written["looks"]["of_ranks"][0]] == looks
        assert written["looks"]["fields"] == list(Look._fields)
        assert written["machine"]["cores"] > 0
        assert {"date", "versions", "git", "command"} <= written.keys()


def test_files_are_refused_before_the_run_and_not_left_by_one_that_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for bad in (tmp_path, tmp_path / "file" / "soak.json"):
        with pytest.raises(SystemExit):
            _soak_without_ranks([Report()], "--output", str(bad))
        assert "--output" in capsys.readouterr().err
    with mock.patch.object(command, "RankPool", side_effect=RankError({0: "made up"}, [None])):
        assert main(["soak", "--output", str(tmp_path / "file")]) == 1
    assert not (tmp_path / "file").exists()


def flights_that_are_warm(rank: int, num_ranks: int) -> tuple[int, int]:
    """How many shapes of low-latency operations were made ready, and how many of these are used."""
    chance = Chance(3)
    chance.kinds = ["3 0", "3 1", "3 2"]
    with Buffer(dist.group.WORLD, low_latency_mode=True, timeout=TIMEOUT, device="cpu", node="one") as buffer:
        with mock.patch.object(buffer, "low_latency_warmup", wraps=buffer.low_latency_warmup) as warmup:
            warm(buffer, chance.kinds)
        ready = {call.args for call in warmup.call_args_list}
        bench = Bench(buffer, rank, num_ranks, (0,) * num_ranks, False, torch.device("cpu"), chance, chance)
        used = set()
        for _ in range(60):
            flight = Flight(bench)
            shape = flight.world.shape
            used.add((flight.most, flight.hidden, shape.num_topk, flight.world.num_experts, *flight.format))
    assert used <= ready
    return len(ready), len(used)


def test_flights_of_kinds_are_made_ready(pool_of: PoolOf) -> None:
    (ready, used), _ = pool_of(2).run(flights_that_are_warm)
    assert ready == used > 3


def test_named_segments_are_those_of_tokenferry(tmp_path: Path) -> None:
    (tmp_path / "tokenferry-1").touch()
    (tmp_path / "other").touch()
    with mock.patch.object(command, "_SHARED_MEMORY", tmp_path):
        assert command.named_segments() == {"tokenferry-1"}
    with mock.patch.object(command, "_SHARED_MEMORY", tmp_path / "none"):
        assert command.named_segments() == set()


def test_names_that_go_within_a_moment_are_no_leak(tmp_path: Path) -> None:
    left, others = tmp_path / "tokenferry-1", tmp_path / "tokenferry-2"
    left.touch()
    others.touch()
    timer = threading.Timer(0.3, others.unlink)
    with mock.patch.object(command, "_SHARED_MEMORY", tmp_path):
        timer.start()
        assert command.left_segments({"tokenferry-1"}) == set()
        assert not others.exists()
        with mock.patch.object(command, "_MOMENT", 0.2):
            assert command.left_segments(set()) == {"tokenferry-1"}
    timer.join()


def test_kinds_of_shapes_are_few_where_asked_for_and_others_with_every_seed() -> None:
    chance, found = Chance(1), []
    for seed in (None, 1, 2, 3):
        chance.kinds = [] if seed is None else [f"{seed} {number}" for number in range(5)]
        shapes = [random_shape(chance, 3, 20) for _ in range(60)]
        assert len({s.tokens for s in shapes}) > 20
        found.append({(s.dtype, s.row_bytes, s.num_scales, s.num_topk, s.local_experts) for s in shapes})
        assert len({s.num_topk for s in shapes}) > 1
    free, *few = found
    assert len(free) > 20
    assert [len(kinds) for kinds in few] == [5, 5, 5]
    assert len(set.union(*few)) > 10
    assert any(kind[2] for kind in set.union(*few)), "with scales"


def test_ranks_that_share_gpus_have_mps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    found: list[bool] = []

    class Pool:
        def __init__(self, num_ranks: int, num_threads: int) -> None:
            names = "CUDA_MPS_PIPE_DIRECTORY", "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"
            found.append(all(name in os.environ for name in names))
            raise RankError({0: "no GPU"}, [])

    monkeypatch.setattr(command, "RankPool", Pool)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["soak", "--device", "cuda", "--ranks", "4"]) == 1
    assert "more ranks than GPUs need CUDA's MPS" in capsys.readouterr().err
    assert found == []
    control = tmp_path / MPS_CONTROL
    control.write_text("#!/bin/sh\nexit 0\n")
    control.chmod(0o755)
    assert main(["soak", "--device", "cuda", "--ranks", "4", "--seed", "3"]) == 1
    assert "again with: tokenferry soak --device cuda --ranks 4 --seed 3" in capsys.readouterr().err
    assert main(["soak", "--device", "cuda", "--ranks", "2"]) == 1
    assert found == [True, False]
