"""What a soak says of memory: looks made up, and the verdict on them."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tokenferry.cli import soak_memory
from tokenferry.cli.soak import find_leaks
from tokenferry.cli.soak_memory import Look, late_growth
from tokenferry.cli.soak_ranks import Report

MIB = 1 << 20
SECONDS = 600.0
FLAT, LEAK, UNKNOWN = "flat", "LEAK", "not judged"


def run(
    mib_a_quarter: float = 0.0,
    *,
    seconds: float = SECONDS,
    every: float = 3.0,
    kernels: Callable[[float], int] = lambda at: 0,
    mib_a_kernel: float = 0.0,
    gone: tuple[float, float] = (0.0, 0.0),
    noise: float = 8.0,
    mib_of_gpu: float | None = None,
) -> Report:
    """A rank.

    Args:
        mib_a_quarter: by which its memory grows.
        seconds: of the run.
        every: seconds between looks.
        kernels: made ready, by the share of the run that is over.
        mib_a_kernel: kept of each.
        gone: the share of the run at which that many MiB go away.
        noise: MiB by which single looks jump.
        mib_of_gpu: as ``mib_a_quarter``, of the GPU.
    """
    chance, looks, at = random.Random(1), [], 0.0
    while at <= seconds:
        share = at / seconds
        mib = 1000 + noise * chance.random() + 4 * share * mib_a_quarter + mib_a_kernel * kernels(share)
        mib -= gone[1] if share >= gone[0] else 0
        device = 0 if mib_of_gpu is None else int((4000 + 4 * share * mib_of_gpu) * MIB)
        looks.append(Look(at, int(mib * MIB), 10, device, kernels(share)))
        at += every
    return Report(looks=looks)


def verdict(*reports: Report, of: str = "of that, late in the run", num_gpus: int = 1) -> str:
    (leak,) = (leak for leak in find_leaks(reports, set(), 0, num_gpus) if leak.what == of)
    if leak.is_leak:
        return LEAK
    return UNKNOWN if leak.found.startswith("not judged") else FLAT


def until(share: float, each: float = 0.005) -> Callable[[float], int]:
    """Kernels that are made ready one after the other up to then."""
    return lambda at: int(min(at, share) / each)


def at(*shares: float) -> Callable[[float], int]:
    """Kernels that are made ready then."""
    return lambda now: sum(now >= share for share in shares)


@pytest.mark.parametrize(
    ("report", "wanted"),
    [
        (run(0), FLAT),
        (run(-30), FLAT),
        (run(5), FLAT),
        (run(11), LEAK),
        (run(11, seconds=300.0, every=1.5), LEAK),
        (run(40, seconds=260.0), UNKNOWN),
        (run(40, every=34.0), UNKNOWN),
        (run(40, every=33.0), LEAK),
        # A few kernels: what is kept of them is left out.
        (run(0, kernels=at(0.6, 0.9), mib_a_kernel=60), FLAT),
        (run(20, kernels=at(0.6, 0.9), mib_a_kernel=60), LEAK),
        (run(20, kernels=at(0.8, 0.85, 0.9), mib_a_kernel=60), UNKNOWN),
        # Many, but none in the last quarter.
        (run(0, kernels=until(0.74), mib_a_kernel=2), FLAT),
        (run(0, kernels=at(0.55, 0.6, 0.7), mib_a_kernel=60), FLAT),
        (run(20, kernels=until(0.74), mib_a_kernel=2), LEAK),
        # To the end: that there is no growth is seen, whose it would be is not.
        (run(0, kernels=until(1.0)), FLAT),
        (run(5, kernels=until(1.0)), FLAT),
        (run(12, kernels=until(1.0)), UNKNOWN),
        (run(0, kernels=until(1.0), mib_a_kernel=2), UNKNOWN),
        # What goes away once is no proof.
        (run(30, kernels=until(1.0), gone=(0.7, 80.0)), UNKNOWN),
        (run(100, kernels=until(1.0), gone=(0.88, 40.0)), UNKNOWN),
        (run(30, gone=(0.9, 80.0)), LEAK),
    ],
)  # fmt: skip
def test_verdict(report: Report, wanted: str) -> None:
    assert verdict(report) == wanted


def test_no_rank_is_left_out() -> None:
    flat, growing, unclear, short = run(0), run(20), run(20, kernels=until(1.0)), run(0, seconds=200.0)
    assert verdict(flat, flat) == FLAT
    assert verdict(flat, growing) == verdict(growing, flat) == LEAK
    assert verdict(flat, unclear) == verdict(unclear, flat) == UNKNOWN
    assert verdict(unclear, growing) == LEAK
    assert verdict(flat, short) == UNKNOWN
    assert verdict(Report()) == UNKNOWN


def test_what_is_not_judged_is_told_all_the_same() -> None:
    (leak,) = (leak for leak in find_leaks([run(0), run(20, kernels=until(1.0))], set(), 0) if "late" in leak.what)
    assert leak.found.startswith("not judged: +2")
    assert "kernels were compiled" in leak.found
    (leak,) = (leak for leak in find_leaks([run(0, seconds=200.0)], set(), 0) if "late" in leak.what)
    assert "too short" in leak.found


def test_memory_of_a_gpu_is_that_of_all_its_ranks() -> None:
    of = "GPU memory, late in the run"
    ranks = [run(0, mib_of_gpu=20.0) for _ in range(4)]
    assert verdict(*ranks, of=of) == FLAT
    assert verdict(*ranks, of=of, num_gpus=4) == LEAK
    assert verdict(*ranks[:2], of=of) == LEAK
    with_kernels = [run(0, mib_of_gpu=20.0), run(0, kernels=until(1.0), mib_of_gpu=20.0)]
    assert verdict(*with_kernels, of=of) == UNKNOWN  # whose kernels may lie on the GPU of the other
    assert not any("GPU" in leak.what for leak in find_leaks([run(0)], set(), 0))


def test_growth_is_that_of_a_quarter(monkeypatch: pytest.MonkeyPatch) -> None:
    for most in (soak_memory._MOST_COMPARED, 20):
        monkeypatch.setattr(soak_memory, "_MOST_COMPARED", most)
        for wanted in (-30.0, 0.0, 12.0):
            growth = late_growth(run(wanted, noise=0.0, every=1.0).looks, "resident")
            assert growth is not None
            assert growth.bytes / MIB == pytest.approx(wanted, abs=0.1)
            assert growth.is_own
