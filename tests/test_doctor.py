"""The doctor: what it finds, that it finds it, and who is slow."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import namedtuple
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist

from tests.cases import TIMEOUT, Case, Scenario
from tests.conftest import PoolOf
from tokenferry import Buffer, BufferStateError, cli
from tokenferry.cli import doctor, doctor_checks, doctor_selftest
from tokenferry.cli.doctor_checks import Finding, Level, environment, look_around, shared_memory
from tokenferry.memory.shm import Segment
from tokenferry.stats import BufferStats, OperationStats, PeerStats, Waits
from tokenferry.waits import analyse, find_slow, wait_report

MS = 1_000_000


def test_doctor_finds_nothing_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", "--json", "--ranks", "2", "--seconds", "0.5"])
    shown = capsys.readouterr()
    assert status == 0, shown
    told = json.loads(shown.out)
    assert told["broken"] == 0
    (test,) = [finding for finding in told["findings"] if finding["area"] == "self-test"]
    assert test["level"] == "ok"
    assert "all results right" in test["what"]
    areas = {finding["area"] for finding in told["findings"]}
    assert areas >= {"versions", "machine", "shared memory", "limits", "carriers", "GPUs"}


@pytest.mark.slow
def test_doctor_finds_nothing_wrong_for_as_long_as_it_looks() -> None:
    """Rounds differ: in some a token has no choice, and its sum is 0 whatever its sign was."""
    assert cli.main(["doctor", "--ranks", "3", "--seconds", "8"]) == 0


def test_broken_setting_is_exit_code_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TOKENFERRY_TIMEOUT", "soon")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    assert cli.main(["doctor", "--no-self-test"]) == 1
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    broken = [line for line in lines if line.startswith("broken")]
    assert len(broken) == 2
    assert "TOKENFERRY_TIMEOUT" in shown
    assert "nowhere0" in shown
    assert lines[-1].startswith("2 broken")


def levels(findings: Any) -> list[Level]:
    return [finding.level for finding in findings]


def test_no_finding_without_a_remedy() -> None:
    with pytest.raises(ValueError, match="no remedy: it is bad"):
        Finding("area", Level.BROKEN, "it is bad")
    assert all(finding.what for finding in look_around(2))


Usage = namedtuple("Usage", "total used free")


@pytest.mark.parametrize(
    ("free", "level"), [(1 << 30, Level.FINE), (64 << 20, Level.WARNING), (512 << 10, Level.BROKEN)]
)
def test_small_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch, free: int, level: Level) -> None:
    monkeypatch.setattr(doctor_checks.shutil, "disk_usage", lambda _: Usage(64 << 20, 0, free))
    found = next(iter(shared_memory(4)))
    assert found.level == level
    assert ("--shm-size" in found.remedy) == (level != Level.FINE)


def test_segments_that_were_left_are_told(tmp_path: Path) -> None:
    (tmp_path / "tokenferry-1").touch()
    (note,) = [finding for finding in shared_memory(1, tmp_path) if finding.level == Level.NOTE]
    assert "1 segments have a name" in note.what
    assert str(tmp_path) in note.remedy


def test_shared_memory_that_cannot_be_had_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> int:
        raise PermissionError(13, "no")

    monkeypatch.setattr("tokenferry.memory.shm._posixshmem.shm_open", refuse)
    assert levels(shared_memory(1))[-1] == Level.BROKEN


def test_missing_locks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segment, "locked", property(lambda self: False))
    last = list(shared_memory(1))[-1]
    assert last.level == Level.WARNING
    assert "advisory locks" in last.what


@pytest.mark.parametrize(
    ("given", "level", "word"),
    [
        ({"TOKENFERRY_TIMEOUT": "30"}, Level.FINE, "=30"),
        ({"TOKENFERRY_TIMEOUT": "-1"}, Level.BROKEN, "above 0"),
        ({"TOKENFERRY_DEVICE": "tpu:"}, Level.BROKEN, "TOKENFERRY_DEVICE"),
        ({"TOKENFERRY_CARRIER": "pigeon"}, Level.BROKEN, "process_group"),
        ({"TOKENFERRY_CARRIER": "nvshmem", "TOKENFERRY_DEVICE": "cpu"}, Level.BROKEN, "process_group"),
        ({"TOKENFERRY_NVSHMEM_BYTES": "7"}, Level.BROKEN, "TOKENFERRY_NVSHMEM_BYTES"),
        ({"TOKENFERRY_TIMOUT": "3"}, Level.WARNING, "TOKENFERRY_TIMOUT"),
        ({"NCCL_P2P_DISABLE": "1"}, Level.NOTE, "NVLink"),
        ({"NCCL_DEBUG": "INFO"}, Level.FINE, "NCCL_DEBUG=INFO"),
    ],
)
def test_variables_are_checked(given: dict[str, str], level: Level, word: str) -> None:
    with mock.patch.dict(os.environ, given):
        found = list(environment(given))
    assert level in levels(found)
    assert word in " ".join(finding.what for finding in found)
    if "TOKENFERRY_TIMOUT" in given:
        assert found[0].remedy == "did you mean TOKENFERRY_TIMEOUT?"


def test_old_torch_and_new_python_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks.torch, "__version__", "2.9.1+cpu")
    monkeypatch.setattr(doctor_checks.sys, "version_info", (3, 14, 0))
    python, old, *_ = doctor_checks._versions()
    assert (python.level, old.level) == (Level.WARNING, Level.BROKEN)
    assert "torch>=2.11" in old.remedy


def test_host_without_an_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> str:
        raise socket.gaierror("no such name")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(doctor_checks.socket, "gethostbyname", fail)
    assert levels(doctor_checks._carriers())[-1] == Level.WARNING


def test_check_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks, "describe_machine", mock.Mock(side_effect=OSError("made up")))
    found = list(look_around(1))
    (surprise,) = [finding for finding in found if finding.area == "doctor"]
    assert "made up" in surprise.what
    assert {"versions", "shared memory", "carriers"} <= {finding.area for finding in found}


class FakeGpus:
    """Two GPUs, of which one does not reach the other."""

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, index: int) -> Any:
        return namedtuple("Properties", "name major minor")("Made up", 7 + 2 * index, 0)

    def mem_get_info(self, index: int) -> tuple[int, int]:
        return 1 << 30, 2 << 30

    def can_device_access_peer(self, a: int, b: int) -> bool:
        return a > b


def test_gpus_apart_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_checks.torch, "cuda", FakeGpus())
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    found = list(doctor_checks.gpus())
    assert levels(found) == [Level.WARNING, Level.FINE, Level.BROKEN, Level.FINE, Level.NOTE]
    assert "from 0 to 1" in found[2].what


def test_self_test_times_what_comes_after_the_first_round(pool_of: PoolOf) -> None:
    for outcome in pool_of(2).run(doctor_selftest._work, "cpu", 1e-9):
        assert outcome.rounds == 2
        assert 0 < outcome.pair_seconds < 60


def test_self_test_that_fails_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_selftest, "_work", _fail)
    found = doctor_selftest.self_test("cpu", 1, 0.1)
    assert found.level == Level.BROKEN
    assert "AssertionError: made up" in found.what
    assert doctor.verdict([found]).strip().startswith("1 broken, 0 warnings")


def _fail(rank: int, num_ranks: int, device: str, seconds: float) -> None:
    raise AssertionError("made up")


def test_live_names_and_draws_the_slow_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--live", "--ranks", "3", "--slow", "2", "--delay", "150", "--seconds", "1.5", "--output", str(tmp_path))
    assert cli.main(["doctor", *words]) == 0
    shown = capsys.readouterr().out
    assert "Rank 2 is slow" in shown
    assert "Rank 0 is slow" not in shown
    assert "Rank 1 is slow" not in shown
    picture = (tmp_path / "waits.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000


def test_slow_rank_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--live", "--ranks", "2", "--slow", "2"])
    assert stopped.value.code == 2
    assert "argument --slow: got 2; allowed: a rank below 2, or -1" in capsys.readouterr().err


def stats_of(rank: int, waits: list[int], call_ns: int) -> BufferStats:
    peers = tuple(PeerStats(peer, Waits(int(total > 0), total, total), 0) for peer, total in enumerate(waits))
    return BufferStats(rank, len(waits), (OperationStats("combine", 1, call_ns, Waits(), 0, peers),), 0)


@pytest.mark.parametrize(
    ("waited", "slow"),
    [
        ([[0, 5, 5], [5, 0, 5], [5, 5, 0]], ()),
        ([[0, 5, 90], [5, 0, 80], [5, 5, 0]], (2,)),
        ([[0, 90, 3, 60], [4, 0, 3, 60], [4, 90, 0, 50], [3, 80, 3, 0]], (1, 3)),
        ([[0, 0, 4], [0, 0, 4], [0, 0, 0]], ()),  # milliseconds in a second
        ([[0, 30], [1, 0]], (1,)),
        ([[0]], ()),
    ],
)
def test_slow_ranks_are_those_that_stand_out(waited: list[list[int]], slow: tuple[int, ...]) -> None:
    nanoseconds = [[MS * cell for cell in row] for row in waited]
    assert find_slow(nanoseconds, [100 * MS] * len(waited)) == slow
    report = analyse([stats_of(rank, row, 100 * MS) for rank, row in enumerate(nanoseconds)])
    assert report.slow == slow
    for rank in range(len(waited)):
        assert (f"Rank {rank} is slow" in str(report)) == (rank in slow)
    if slow:
        total = sum(row[slow[0]] for row in waited)
        assert f"combine: {total}.0 ms in {len(waited) - 1} waits" in report.text
        assert report.text.splitlines()[-1].split("slow")[0].strip() == "^"


def test_report_of_many_ranks_shows_those_that_matter() -> None:
    ranks = 40
    rows = [[MS * (100 if peer == 33 and rank != 33 else 0) for peer in range(ranks)] for rank in range(ranks)]
    report = analyse([stats_of(rank, row, 200 * MS) for rank, row in enumerate(rows)])
    assert report.slow == (33,)
    assert "rank 33" in report.text
    assert "of 40" in report.text


def _reported(rank: int, num_ranks: int, folder: Path) -> Any:
    scenario = Scenario(Case(), rank, num_ranks)
    with Buffer(dist.group.WORLD, timeout=TIMEOUT) as buffer:
        for _ in range(2):
            if rank == 1:
                time.sleep(0.2)
            scenario.check_dispatch(scenario.dispatch(buffer))
            dist.barrier()
        gather, given = buffer._meetings.gather, []
        buffer._meetings.gather = lambda of, value: gather(of, given.append(value) or value)
        report = wait_report(buffer, folder / "drawn" / "waits.png", reset=True)
        assert json.loads(json.dumps(given)), "plain values"
        again = wait_report(buffer)
    with pytest.raises(BufferStateError):
        wait_report(buffer)
    return report.slow, report.text, again.waited


def test_wait_report_is_the_same_on_all_ranks(pool_of: PoolOf, tmp_path: Path) -> None:
    first, *others = pool_of(3).run(_reported, tmp_path)
    assert all(other == first for other in others)
    slow, text, waited_after_reset = first
    assert slow == (1,)
    assert text.startswith("Rank 1 is slow")
    assert waited_after_reset == ((0,) * 3,) * 3
    assert (tmp_path / "drawn" / "waits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        (["--slow", "0"], "--slow: got 0"),
        (["--delay", "9"], "--delay: got 9.0"),
        (["--device", "cuda"], "--device: got cuda"),
        (["--output", "there"], "--output: got there"),
        (["--live", "--no-self-test"], "--no-self-test: changes nothing"),
    ],
)
def test_what_would_change_nothing_is_refused(
    arguments: list[str], given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", *arguments])
    assert stopped.value.code == 2
    assert f"argument {given}" in capsys.readouterr().err


def test_a_carrier_that_is_not_on_this_host_is_told() -> None:
    given = {"TOKENFERRY_CARRIER": "nvshmem"}
    for files, level in ((None, Level.BROKEN), (mock.Mock(), Level.FINE)):
        with (
            mock.patch.dict(os.environ, given),
            mock.patch("tokenferry.rail.find_nvshmem", return_value=files),
            mock.patch.object(doctor_checks, "choose_device", return_value=mock.Mock(type="cuda")),
        ):
            (found,) = environment(given)
        assert found.level == level
