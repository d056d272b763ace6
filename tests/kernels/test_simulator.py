"""The simulator itself: right protocols pass under every seed, and each fault shows within a few."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

from tests.kernels.mutants import mutated_module
from tests.kernels.simulator import Deadlock, LateLoad, Simulator
from tests.kernels.toy import exchange, sync

N, H, EPOCHS = 3, 32, 3


def addresses(tensors):
    return torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)


def wrong_rows(kernel, seed, num_ranks=2, delay=0, **options):
    """Run a few epochs of a toy; how many rows came out wrong."""
    simulator = Simulator(seed, **options)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(num_ranks, EPOCHS, N, H, generator=generator)
    out = torch.full_like(rows, -1)
    inboxes = [torch.full((2, N, H), -2.0) for _ in range(num_ranks)]
    flags = [torch.zeros(N, dtype=torch.int32) for _ in range(num_ranks)]
    released = [torch.zeros(N, dtype=torch.int32) for _ in range(num_ranks)]
    tables = addresses(inboxes), addresses(flags)
    counters = torch.zeros(num_ranks, dtype=torch.int32)
    released_table = addresses(released)
    for rank in range(num_ranks):
        for epoch in range(EPOCHS):
            names = {"counter": counters[rank], "released": released_table, "rank": rank, "epoch": epoch + 1}
            args = rows[rank, epoch], out[rank, epoch], *tables
            sizes = {"N": N, "H": H, "R": num_ranks}
            simulator.launch(rank, kernel, (N,), *args, **names, **sizes, delay=delay * rank, num_warps=4)
    simulator.run()
    return int((out != rows.roll(1, 0)).any(-1).sum())


MUTANTS = {
    "release to relaxed": (sync, 'sem="release"', 'sem="relaxed"', "exchange"),
    "acquire to relaxed": (sync, 'sem="acquire"', 'sem="relaxed"', "exchange"),
    "older epoch": (sync, "< epoch", "< epoch - 1", "exchange"),
    "no barrier": (
        exchange,
        "    tl.debug_barrier()\n    signal(own_word(flags",
        "    signal(own_word(flags",
        "exchange",
    ),
    "no wait": (exchange, "    wait(own_word(flags, rank), epoch)\n", "", "exchange_counted"),
    "counter to relaxed": (exchange, '"acq_rel"', '"relaxed"', "exchange_counted"),
    "no barrier before the counter": (
        exchange,
        "    tl.debug_barrier()\n    arrived",
        "    arrived",
        "exchange_counted",
    ),
    "no wait for the reader": (
        exchange,
        "    wait(own_word(released, rank) + row, epoch - 1)\n",
        "",
        "exchange_released",
    ),
    "signals too early": (exchange, "(0) - 1:", "(0) - 2:", "exchange_counted"),
}


@pytest.mark.parametrize("name", ["exchange", "exchange_counted", "exchange_released"])
def test_right_protocol_passes(name):
    for seed in range(12):
        assert wrong_rows(getattr(exchange, name), seed) == 0


def test_right_protocol_passes_with_more_ranks_late_starts_and_other_chances():
    for seed in range(4):
        assert wrong_rows(exchange.exchange_counted, seed, num_ranks=4, delay=50) == 0
        assert wrong_rows(exchange.exchange_counted, seed, weak=1.0, switch=1.0) == 0
        assert wrong_rows(exchange.exchange_counted, seed, weak=0.0) == 0


@pytest.mark.parametrize("name", MUTANTS)
def test_fault_is_found(name):
    module, old, new, kernel = MUTANTS[name]
    mutant = getattr(mutated_module(module, old, new, entry=exchange), kernel)
    assert any(wrong_rows(mutant, seed) for seed in range(12))


def test_release_that_does_not_wait_for_the_loads_is_found():
    old = "    tl.debug_barrier()\n    signal(own_word(released"
    mutant = mutated_module(exchange, old, "    signal(own_word(released").exchange_released

    def finds(seed):
        try:
            return wrong_rows(mutant, seed) > 0
        except LateLoad as error:
            return "may still be loading" in str(error)

    assert any(finds(seed) for seed in range(8))


def test_missing_release_needs_the_weak_memory():
    mutant = mutated_module(sync, 'sem="release"', 'sem="relaxed"', entry=exchange).exchange
    assert not any(wrong_rows(mutant, seed, weak=0.0) for seed in range(5))


def test_wait_for_what_never_comes_is_a_deadlock():
    mutant = mutated_module(sync, "< epoch", "<= epoch", entry=exchange).exchange
    with pytest.raises(Deadlock, match=r"rank 0 exchange\[0, 0, 0\].*rank 1 exchange"):
        wrong_rows(mutant, 0, max_steps=2000)


def test_one_seed_does_the_same_again():
    mutant = mutated_module(exchange, "    wait(own_word(flags, rank), epoch)\n", "").exchange_counted
    counts = [wrong_rows(mutant, seed) for seed in range(6)]
    assert counts == [wrong_rows(mutant, seed) for seed in range(6)]
    assert len(set(counts)) > 1


def test_own_stores_keep_their_order():
    for seed in range(10):
        target = torch.zeros(H, dtype=torch.int32)
        simulator = Simulator(seed)
        simulator.launch(0, exchange.store_twice, (1,), target, H=H)
        simulator.run()
        assert target.tolist() == [column + 107 for column in range(H)]


def test_atomics_of_many_programs_add_up():
    counter = torch.zeros(1, dtype=torch.int64)
    simulator = Simulator(0)
    for rank in range(3):
        simulator.launch(rank, exchange.increment, (2, 2), counter, 5, BY=2)
    simulator.run()
    assert counter.item() == 3 * 4 * 5 * 2


def test_delay_counts_steps():
    simulator = Simulator(0)
    counter = torch.zeros(1, dtype=torch.int64)
    simulator.launch(0, exchange.increment, (1,), counter, 1, BY=1, delay=100)
    simulator.run()
    assert simulator.steps > 100
    assert counter.item() == 1


def test_error_of_a_program_ends_the_run():
    simulator = Simulator(0)
    memory = torch.zeros(2)
    simulator.launch(0, exchange.increment, (1,), memory[:1], 1, BY="two")
    simulator.launch(1, exchange.increment, (2,), memory[1:], 5, BY=1)
    with pytest.raises(Exception) as error:
        simulator.run()
    assert error.value.__notes__ == ["in rank 0 increment[0, 0, 0]"]


def test_numbers_are_the_gpu_s():
    a, b = torch.randn(2, 64).to(torch.bfloat16) * 300
    total, narrowed = torch.empty_like(a), torch.empty(64, dtype=torch.float8_e4m3fn)
    simulator = Simulator(0)
    simulator.launch(0, exchange.numbers, (1,), a, b, total, narrowed, H=64)
    simulator.run()
    assert torch.equal(total, a + b)
    assert torch.equal(narrowed.float(), a.float().clamp(-448, 448).to(torch.float8_e4m3fn).float())


def test_mutation_leaves_the_modules_alone():
    mutant = mutated_module(sync, "< epoch", "> epoch", entry=exchange)
    assert sys.modules[exchange.__name__] is exchange is not mutant
    assert importlib.import_module(sync.__name__) is sync
    assert sys.modules["tests.kernels"].toy is sys.modules["tests.kernels.toy"]
    assert exchange.wait is sync.wait is not mutant.wait


def test_mutation_must_be_found():
    with pytest.raises(ValueError, match="occurs 4 times"):
        mutated_module(exchange, "tl.debug_barrier()", "pass")
    assert mutated_module(exchange, "tl.debug_barrier()", "pass", count=4)
