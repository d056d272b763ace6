"""Bursts of low-latency operations: several in flight, hooks called in a random order of every rank's own.

Expert e multiplies its rows by a power of two that belongs to e. Formula of combine: ``y[t] = sum over k, ascending,
of weights[t, k] * row of ids[t, k]`` in float32, rounded once. With FP8, and where ranks or nodes sum on their own
first, within a bound.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tokenferry.buffer import Buffer
from tokenferry.cli.soak_faults import Bench, expect
from tokenferry.cli.soak_world import Chance, Shape, World, random_shape, same

MOST_TOKENS = 24
MOST_HIDDEN = 512
MOST_EXPERTS = 3
"""Of a rank."""
_MOST_IN_FLIGHT = 5
_MOST_CHOICES = 4
_FORMATS = ((False, False), (False, False), (True, False), (True, True))
"""Whether rows are quantised to FP8, and whether scales are powers of two then."""
_FP8_ERROR = 2.0**-3
"""Of a value, beside the largest of its group: half a step of e4m3 is 2**-4, and a rounded scale doubles it."""
_BF16_ERROR = 2.0**-7


def factor_of(expert: int) -> float:
    """What an expert multiplies its rows by."""
    return float(2.0 ** (expert % 5 - 2))


def _drawn(kind: random.Random) -> tuple[int, int, tuple[bool, bool]]:
    """Local experts, hidden and format of a flight."""
    experts, hidden = kind.randrange(1, MOST_EXPERTS + 1), 128 * kind.randrange(1, MOST_HIDDEN // 128 + 1)
    return experts, hidden, kind.choice(_FORMATS)


def warm(buffer: Buffer, kinds: Sequence[str]) -> None:
    """Compile what flights of these kinds need, together with the other ranks."""
    topks = {min(_shape_of(kind).num_topk, _MOST_CHOICES) for kind in kinds}
    for kind, num_topk in itertools.product(kinds, sorted(topks)):
        experts, hidden, of_rows = _drawn(random.Random(kind))
        buffer.low_latency_warmup(MOST_TOKENS, hidden, num_topk, experts * buffer.group_size, *of_rows)


def _shape_of(kind: str) -> Shape:
    chance = Chance(0)
    chance.kinds = [kind]
    return random_shape(chance, 1, 1)


class Flight:
    """One dispatch, and its combine."""

    def __init__(self, bench: Bench) -> None:
        common = bench.common
        shape = random_shape(common, bench.num_ranks, MOST_TOKENS)
        tokens = tuple(min(count, MOST_TOKENS) for count in shape.tokens)
        experts, hidden, self.format = _drawn(common.kind())
        num_topk = min(shape.num_topk, _MOST_CHOICES)
        shape = type(shape)(tokens, torch.bfloat16, 2 * hidden, 0, num_topk, experts, shape.sparse, shape.seed)
        self.bench, self.world, self.hidden = bench, World(shape, bench.rank), hidden
        self.is_fp8 = self.format[0]
        is_one_sum = bench.device.type == "cpu" and max(bench.layout) == 0  # else ranks or nodes sum on their own
        self.is_exact = not self.is_fp8 and is_one_sum
        for one in self.world.inputs:
            _drop_crowds(one.ids, self.world.num_experts)
        self.most = max(MOST_TOKENS, *tokens)
        mine, self.out = self.world.mine, torch.empty(0)
        self.given = tuple(part.to(bench.device) for part in (mine.x, mine.ids, mine.weights))

    def dispatch(self, is_hooked: bool) -> Callable[[], None] | None:
        """Send; returns the hook."""
        x, ids, _ = self.given
        self.result: tuple[Any, ...] = self.bench.buffer.low_latency_dispatch(
            x,
            ids,
            self.most,
            self.world.num_experts,
            None,
            None,
            *self.format,
            return_recv_hook=is_hooked,
        )
        hook: Callable[[], None] | None = self.result[4]
        return hook

    def check_dispatch(self) -> None:
        """Compare rows and counts; note what the experts make of them."""
        received, count, _, _, _ = self.result
        rows = received
        if self.is_fp8:
            data, scales = (tensor.cpu() for tensor in received)
            rows = data.float() * scales.repeat_interleave(128, 2)
        rows = rows.cpu()
        out = torch.full(rows.shape, torch.nan, dtype=torch.bfloat16)
        local = self.world.shape.local_experts
        for expert in range(local):
            number = self.bench.rank * local + expert
            wanted = torch.cat([one.x[(one.ids == number).nonzero()[:, 0]] for one in self.world.inputs])
            expect(int(count[expert]) == len(wanted), f"{int(count[expert])} rows of expert {number}: {len(wanted)}")
            got = rows[expert, : len(wanted)]
            if self.is_fp8:
                largest = wanted.float().view(-1, self.hidden // 128, 128).abs().amax(2).repeat_interleave(128, 1)
                bound = _FP8_ERROR * largest.view(got.shape) + 1e-4
                expect(bool(((got - wanted.float()).abs() <= bound).all()), f"rows of expert {number} are far off")
            else:
                same(f"rows of expert {number}", got, wanted)
            out[expert, : len(wanted)] = (got * factor_of(number)).to(torch.bfloat16)
        self.out = out.to(self.bench.device)

    def combine(self, is_hooked: bool) -> Callable[[], None] | None:
        """Send home; returns the hook."""
        _, ids, weights = self.given
        self.combined, _, hook = self.bench.buffer.low_latency_combine(
            self.out, ids, weights, self.result[2], return_recv_hook=is_hooked
        )
        return hook

    def has_rows(self) -> bool:
        """Whether the experts' outputs are there."""
        return self.out.dim() == 3

    def check_combine(self) -> None:
        """Compare the sums."""
        mine = self.world.mine
        total = torch.zeros(mine.x.shape)
        factors = torch.tensor([factor_of(expert) for expert in range(self.world.num_experts)])
        for choice in range(mine.ids.size(1)):
            ids = mine.ids[:, choice]
            have = ids >= 0
            rows = (mine.x[have] * factors[ids[have], None]).to(torch.bfloat16)
            total[have] += mine.weights[have, choice, None] * rows.float()
        if self.is_exact:
            same("combined_x", self.combined, total.to(torch.bfloat16))
            return
        weight = (mine.weights.abs() * torch.where(mine.ids >= 0, factors[mine.ids], 0.0)).sum(1, keepdim=True)
        error = _FP8_ERROR if self.is_fp8 else _BF16_ERROR
        bound = (
            (error + _BF16_ERROR) * weight * mine.x.float().abs().amax(1, keepdim=True) + 1e-3 if len(total) else 0
        )
        expect(bool(((self.combined.cpu().float() - total).abs() <= bound).all()), "combined_x is far off")


def burst(bench: Bench, late: Callable[[], None]) -> None:
    """Dispatches in flight together, then their combines, in another order.

    Args:
        bench: of a Buffer with low-latency mode.
        late: called between operations.
    """
    common = bench.common
    flights = [Flight(bench) for _ in range(common.randrange(1, _MOST_IN_FLIGHT + 1))]
    _fly(bench, [(flight.dispatch, flight.check_dispatch) for flight in flights], late)
    common.shuffle(flights)
    again = common.choices(flights, k=common.randrange(2))  # along a handle that was used
    _fly(bench, [(flight.combine, flight.check_combine) for flight in flights], late)
    _fly(bench, [(flight.combine, flight.check_combine) for flight in again], late)


def _fly(
    bench: Bench,
    operations: list[tuple[Callable[[bool], Callable[[], None] | None], Callable[[], None]]],
    late: Callable[[], None],
) -> None:
    """Send all; receive those with hooks in an order of this rank's own."""
    waiting = []
    for send, check in operations:
        hook = send(bench.common.random() < 0.7)
        if hook is None:
            check()
        else:
            waiting.append((hook, check))
        late()
    bench.own.shuffle(waiting)
    for hook, check in waiting:
        late()
        hook()
        check()


def _drop_crowds(ids: torch.Tensor, num_experts: int) -> None:
    """Drop choices of an expert beyond the most that a rank may send it."""
    for expert in range(num_experts):
        at = (ids == expert).nonzero()[MOST_TOKENS:]
        ids[at[:, 0], at[:, 1]] = -1
