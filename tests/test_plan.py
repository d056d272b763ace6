"""The analytic model of ``tokenferry plan`` against enumeration, simulated traffic, and its limits."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.conftest import slow
from tokenferry.cli import plan_model, plan_routing
from tokenferry.cli.plan_model import LOW_LATENCY, MODES, Hop, Plan, predict
from tokenferry.cli.plan_routing import Machine, Routing, Shape, route
from tokenferry.config import Config

# Where tokens go: all possible choices of a token, with their probabilities.


def choices_in_turn(shape: Shape) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Experts drawn one after the other in proportion to their weights; in chosen groups only, if any are.

    A group is chosen when one of its experts is the first of a group among M in the order of all experts.
    """
    weights = plan_routing.popularity(shape)
    size = shape.experts // shape.groups
    for order in itertools.permutations(range(shape.experts)):
        left, probability = weights.sum(), 1.0
        for expert in order:
            probability *= weights[expert] / left
            left -= weights[expert]
        groups = list(dict.fromkeys(expert // size for expert in order))[: shape.topk_groups]
        yield probability, tuple([expert for expert in order if expert // size in groups][: shape.topk])


def enumerate_routing(machine: Machine, shape: Shape) -> dict[str, float]:
    """What ``Routing`` estimates, but for the busiest node: the sum over all orders of the experts."""
    per_rank = shape.experts // machine.ranks
    ranks = nodes = total = 0.0
    hits, choices = np.zeros(machine.ranks), np.zeros(machine.ranks)
    for probability, chosen in choices_in_turn(shape):
        places = [expert // per_rank for expert in chosen]
        total += probability
        ranks += probability * len(set(places))
        nodes += probability * len({place // machine.gpus_per_node for place in places})
        for place in set(places):
            hits[place] += probability
            choices[place] += probability * places.count(place)
    assert total == pytest.approx(1)
    return {"ranks": ranks, "nodes": nodes, "busiest_rank": hits.max(), "busiest_choices": choices.max()}


@pytest.mark.parametrize(
    ("nodes", "gpus", "experts", "topk", "groups", "topk_groups", "skew"),
    [
        (1, 2, 6, 2, 1, 1, 0.0),
        (3, 1, 6, 4, 1, 1, 0.0),
        (3, 2, 6, 3, 3, 2, 0.0),
        (2, 2, 8, 3, 4, 2, 0.0),
        (2, 1, 6, 2, 3, 1, 0.0),
        (3, 2, 6, 3, 1, 1, 1.0),
        (2, 2, 8, 2, 1, 1, 2.0),
        (3, 2, 6, 2, 3, 2, 1.0),
    ],
)
def test_routing_is_that_of_all_orders(
    nodes: int, gpus: int, experts: int, topk: int, groups: int, topk_groups: int, skew: float
) -> None:
    machine = Machine(nodes, gpus)
    shape = Shape(topk=topk, experts=experts, groups=groups, topk_groups=topk_groups, skew=skew)
    found, true = route(machine, shape), enumerate_routing(machine, shape)
    is_exact = skew == 0 and groups == topk_groups
    assert (found.samples == 0) == is_exact
    for name, value in true.items():
        error = {"ranks": found.ranks_error, "nodes": found.nodes_error}.get(name, found.busiest_error)
        if skew == 0 and name.startswith("busiest"):
            error = max(found.ranks_error, found.nodes_error)
        slack = 1e-9 if is_exact else 4 * error * (topk if name == "busiest_choices" else 1) + 1e-9
        assert abs(getattr(found, name) - value) <= slack, name


@pytest.mark.parametrize("topk_groups", [1, 3, 4, 8])
def test_limited_groups_cut_off_distinct_groups(topk_groups: int) -> None:
    """Until M groups have been seen nothing is left out: a token is on min(M, D) groups, D those of a free token."""
    experts, groups, topk = 256, 8, 8
    size = experts // groups
    only = [0.0] * (groups + 1)  # choices that fall on d given groups and on no fewer
    for d in range(1, groups + 1):
        only[d] = sum((-1) ** (d - k) * math.comb(d, k) * math.comb(k * size, topk) for k in range(d + 1))
    share = [math.comb(groups, d) * only[d] / math.comb(experts, topk) for d in range(groups + 1)]
    assert sum(share) == pytest.approx(1)
    expected = sum(min(topk_groups, d) * p for d, p in enumerate(share))
    found = route(Machine(groups, 8), Shape(topk=topk, experts=experts, groups=groups, topk_groups=topk_groups))
    assert abs(found.nodes - expected) <= 4 * found.nodes_error + 1e-9
    assert found.nodes <= topk_groups + 1e-9


def test_published_example() -> None:
    """performance.md: with 4 ranks and top-8 of 256 experts f = 3.6, others than its own 2.7."""
    found = route(Machine(1, 4), Shape())
    assert round(found.ranks, 1) == 3.6
    assert round(found.ranks * 3 / 4, 1) == 2.7


def test_popularity_falls_with_the_place() -> None:
    weights = plan_routing.popularity(Shape(experts=16, skew=0.5))
    assert sorted(weights, reverse=True) == pytest.approx([place**-0.5 for place in range(1, 17)])
    assert list(weights) != sorted(weights, reverse=True)
    assert list(weights) != list(plan_routing.popularity(Shape(experts=16, skew=0.5, seed=1)))


# What each hop carries: tokens that are moved one hop after the other, and counted.

TOKENS = 3000


def simulate(machine: Machine, shape: Shape) -> dict[str, dict[str, torch.Tensor]]:
    """Rows of every rank on every hop, in and out, for dispatch (combine is the way back) and low latency."""
    generator = torch.Generator().manual_seed(5)
    R, L, G, T = machine.ranks, machine.gpus_per_node, machine.nodes, shape.tokens
    weights = torch.from_numpy(plan_routing.popularity(shape)).log()
    uniform = torch.rand(R * T, shape.experts, generator=generator, dtype=torch.float64)
    scores = weights - (-uniform.log()).log()  # Gumbel: the greatest are draws in proportion to the weights
    grouped = scores.view(R * T, shape.groups, -1)
    kept = grouped.amax(2).topk(shape.topk_groups).indices
    mask = torch.zeros(R * T, shape.groups, dtype=torch.bool).scatter_(1, kept, True)
    scores = grouped.masked_fill(~mask[:, :, None], -math.inf).view(R * T, -1)
    ranks = scores.topk(shape.topk).indices // (shape.experts // R)
    at = torch.zeros(R * T, R).scatter_(1, ranks, 1.0).view(R, T, G, L)  # [source, token, node, local index]
    on_node = at.amax(3)
    counts = {name: torch.zeros(R) for name in ("rail in", "rail out", "pull in", "pull out", "received", "relayed")}
    pairs = torch.zeros(R, R)  # rows from a rank to a rank
    for source in range(R):
        home, local = divmod(source, L)
        for node in range(G):
            relay = node * L + local
            rows = on_node[source, :, node].sum()
            if node != home:
                counts["rail out"][source] += rows
                counts["rail in"][relay] += rows
            for index in range(L):
                rows = at[source, :, node, index].sum()
                reader = node * L + index
                counts["received"][reader] += rows
                counts["relayed"][relay] += rows
                pairs[source, reader] += rows
                if reader != relay:
                    counts["pull in"][reader] += rows
                    counts["pull out"][relay] += rows
    far = torch.tensor([[a // L != b // L for b in range(R)] for a in range(R)])
    near = ~far & ~torch.eye(R, dtype=torch.bool)
    choices = torch.bincount(ranks.flatten(), minlength=R).float()
    quick = {"far in": (pairs * far).sum(0), "near in": (pairs * near).sum(0), "slab": choices}
    return {"rails": counts, "quick": quick}


CLUSTERS = [
    pytest.param(Machine(3, 2), Shape(TOKENS, experts=12, topk=3), id="uniform"),
    pytest.param(Machine(3, 2), Shape(TOKENS, experts=24, topk=4, groups=6, topk_groups=2), id="groups"),
    pytest.param(Machine(3, 2), Shape(TOKENS, experts=24, topk=4, skew=1.0), id="skew"),
    pytest.param(Machine(2, 4), Shape(TOKENS, experts=16, topk=4, groups=4, topk_groups=2, skew=0.7), id="both"),
    pytest.param(Machine(4, 1), Shape(TOKENS, experts=16, topk=4, skew=0.5), id="one GPU a node"),
    pytest.param(Machine(1, 4), Shape(TOKENS, experts=16, topk=4, skew=0.5), id="one node"),
]


@pytest.mark.parametrize(("machine", "shape"), CLUSTERS)
def test_rows_are_those_of_simulated_traffic(machine: Machine, shape: Shape) -> None:
    moved = simulate(machine, shape)
    rails, quick = moved["rails"], moved["quick"]
    dispatch, combine = predict(machine, shape).operations
    near = {"rel": 0.03, "abs": 1e-9}
    for operation in (dispatch, combine):
        network, nvlink, sms = operation.hops
        assert network.rows == pytest.approx(float(rails["rail out"].mean()), **near)
        assert network.busiest_rows == pytest.approx(
            float(max(rails["rail in"].max(), rails["rail out"].max())), **near
        )
        assert nvlink.rows == pytest.approx(float(rails["pull in"].mean()), **near)
        assert nvlink.busiest_rows == pytest.approx(
            float(max(rails["pull in"].max(), rails["pull out"].max())), **near
        )
        handled = rails["received"] if operation is dispatch else rails["relayed"]
        assert sms.rows == pytest.approx(float((handled + rails["rail out"]).mean()), **near)
        # The busiest rank's own rows on the rail are taken as the mean: they are fewer where its node is busy.
        least = float((handled + rails["rail out"]).max())
        assert 0.97 * least <= sms.busiest_rows <= 1.03 * float(handled.max() + rails["rail out"].mean())
    for operation in predict(machine, shape, LOW_LATENCY).operations[:2]:
        network, nvlink, slabs = operation.hops
        assert network.rows == pytest.approx(float(quick["far in"].mean()), **near)
        assert network.busiest_rows == pytest.approx(float(quick["far in"].max()), **near)
        assert nvlink.rows == pytest.approx(float(quick["near in"].mean()), **near)
        assert nvlink.busiest_rows == pytest.approx(float(quick["near in"].max()), **near)
        assert slabs.rows == pytest.approx(float(quick["slab"].mean()), **near)
        assert slabs.busiest_rows == pytest.approx(float(quick["slab"].max()), **near)


def test_a_row_for_each_expert_counts_choices() -> None:
    dispatch, combine = predict(Machine(2, 4), Shape(tokens=100), LOW_LATENCY).operations[1:]
    assert combine.name == "exact combine"
    assert combine.hops[0].rows == pytest.approx(100 * 8 * 4 / 8)
    assert combine.hops[1].rows == pytest.approx(100 * 8 * 3 / 8)
    assert dispatch.hops[0].rows < combine.hops[0].rows


# Time.


def simulate_two_stages(first: float, second: float, chunks: int) -> float:
    """When the second stage is through with the last chunk; each takes chunks in turn."""
    done_first = done_second = 0.0
    for _ in range(chunks):
        done_first += first
        done_second = max(done_first, done_second) + second
    return done_second


@pytest.mark.parametrize("chunks", [1, 2, 5, 64])
@pytest.mark.parametrize("network", [5.0, 50.0, 500.0])
def test_chunks_are_two_stages_in_turn(chunks: int, network: float) -> None:
    """Each takes an exchange and, for each of three other nodes, an operation inside the node."""
    operations = predict(Machine(4, 8, network=network, chunks=chunks), Shape()).operations
    alone = predict(Machine(1, 8), Shape()).operations
    for operation, inside, agreement in zip(operations, alone, (3, 2), strict=True):
        there = operation.hops[0].seconds / chunks + plan_model.EXCHANGE_SECONDS
        here = max(hop.seconds for hop in operation.hops[1:]) / chunks + 3 * inside.latency
        staged = simulate_two_stages(there, here, chunks)
        assert operation.chunks == chunks
        before = agreement * plan_model.EXCHANGE_SECONDS + inside.latency
        assert operation.seconds == pytest.approx(before + staged)
        assert simulate_two_stages(here, there, chunks) == pytest.approx(staged)


def test_chunks_are_chosen_to_be_fastest() -> None:
    best = predict(Machine(8, 8), Shape()).operations
    for chunks in range(1, 65):
        asked = predict(Machine(8, 8, chunks=chunks), Shape()).operations
        assert all(a.seconds >= b.seconds - 1e-12 for a, b in zip(asked, best, strict=True))


def times(machine: Machine, shape: Shape) -> list[float]:
    return [operation.seconds for mode in MODES for operation in predict(machine, shape, mode).operations]


@pytest.mark.parametrize(("nodes", "limited"), [(1, False), (4, False), *slow((4, True))])
def test_times_fall_with_what_is_faster_and_grow_with_the_load(nodes: int, limited: bool) -> None:
    machine = Machine(nodes, 8)
    shape = Shape(groups=8, topk_groups=4 if limited else 8)
    now = times(machine, shape)

    def changed(**by: float) -> list[float]:
        of_machine = {name: value for name, value in by.items() if hasattr(machine, name)}
        of_shape = {name: value for name, value in by.items() if hasattr(shape, name)}
        return times(dataclasses.replace(machine, **of_machine), dataclasses.replace(shape, **of_shape))

    for faster in (changed(nvlink=900.0), changed(network=100.0), changed(sms=40)):
        assert all(after <= before for after, before in zip(faster, now, strict=True))
    link = changed(nvlink=900.0) if nodes == 1 else changed(network=100.0)
    assert all(after < 0.9 * before for after, before in zip(link, now, strict=True))
    for slower in (changed(nvlink=100.0), changed(network=10.0), changed(sms=2)):
        assert all(after >= before for after, before in zip(slower, now, strict=True))
    for larger in (changed(tokens=8192), changed(hidden=8192), changed(skew=1.0)):
        assert all(after > before for after, before in zip(larger, now, strict=True))
    fewer = changed(topk=4)
    assert all(after < before for after, before in zip(fewer, now, strict=True))


@pytest.mark.parametrize("topk_groups", [4, 8])
def test_a_token_reaches_more_places_the_more_there_are(topk_groups: int) -> None:
    before = Routing(0, 0, 1, 1, 0, 0)
    for nodes in (1, 2, 4, 8, 16, 32):
        found = route(Machine(nodes, 8), Shape(groups=8, topk_groups=topk_groups))
        slack = 4 * (found.ranks_error + found.nodes_error + before.ranks_error + before.nodes_error)
        assert found.ranks > before.ranks - slack
        assert found.nodes > before.nodes - slack
        assert found.nodes <= found.ranks + 1e-9 <= min(8, 8 * nodes) + 2e-9
        before = found


# Limits.


def hops(plan: Plan) -> Iterator[Hop]:
    return (hop for operation in plan.operations for hop in operation.hops)


def test_one_rank_crosses_nothing() -> None:
    for mode in MODES:
        plan = predict(Machine(1, 1), Shape(), mode)
        assert plan.routing[:2] == (1, 1)
        assert all(hop.rows == hop.busiest_rows == 0 for hop in hops(plan) if hop.name in ("network", "NVLink"))
        assert all(operation.bottleneck in ("SMs", "slabs") for operation in plan.operations)


def test_one_node_has_no_network_and_one_gpu_a_node_no_nvlink() -> None:
    for mode in MODES:
        assert all(hop.rows == 0 for hop in hops(predict(Machine(1, 8), Shape(), mode)) if hop.name == "network")
        alone = predict(Machine(8, 1), Shape(), mode)
        assert alone.routing.ranks == pytest.approx(alone.routing.nodes)
        assert all(hop.rows == hop.busiest_rows == 0 for hop in hops(alone) if hop.name == "NVLink")
    assert "rail" not in predict(Machine(1, 8), Shape()).memory
    assert predict(Machine(2, 8), Shape()).memory["rail"] > 0


@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_a_token_for_all_experts_goes_everywhere(skew: float) -> None:
    found = route(Machine(2, 4), Shape(topk=16, experts=16, skew=skew))
    assert found[:6] == pytest.approx((8, 2, 1, 1, 4, 2))


@pytest.mark.timed
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_thousands_of_ranks_take_seconds(skew: float) -> None:
    start = time.perf_counter()
    for mode in MODES:
        plan = predict(Machine(512, 8), Shape(experts=4096, groups=512, topk_groups=4, skew=skew), mode)
        assert plan.routing.nodes <= 4 + 1e-9
        assert plan.routing.ranks <= 8
    assert time.perf_counter() - start < 8


def test_skew_makes_a_rank_busy() -> None:
    """Nearly every token chooses the most popular expert when popularity falls off steeply."""
    found = route(Machine(8, 8), Shape(skew=3.0))
    assert found.busiest_rank > 0.99
    assert found.busiest_rank > 8 * found.ranks / 64
    assert found.busiest_node >= found.busiest_rank - 1e-9


# Memory and Config.


def test_memory_is_that_of_the_library() -> None:
    programs = pytest.importorskip("tokenferry.dataplane.cuda.low_latency_programs", exc_type=ImportError)
    words = pytest.importorskip("tokenferry.dataplane.cuda.kernels.words", exc_type=ImportError)
    assert words.CONTROL_BYTES == plan_model.CONTROL_BYTES
    assert words.MAX_SLOTS == plan_model.PUSH_SLOTS
    for ranks, tokens, hidden, topk, experts in ((2, 128, 7168, 8, 256), (8, 64, 512, 2, 16), (16, 1, 4096, 8, 64)):
        layouts = programs.layouts(ranks, tokens, hidden, topk, experts // ranks, 1, False)
        slot = -(-max(layout[-1] for layout in layouts) // 128) * 128
        shape = Shape(tokens, hidden, "fp8", topk, experts)
        assert plan_model.push_bytes(Machine(1, ranks), shape) == 4 * slot


@pytest.mark.parametrize(("nodes", "gpus"), [(1, 2), (1, 8), (8, 8), (4, 1)])
def test_recommended_sms_are_the_fewest_that_do(nodes: int, gpus: int) -> None:
    machine, shape = Machine(nodes, gpus), Shape()
    plan = predict(machine, shape)

    def seconds(number: int, sms: int) -> float:
        return predict(dataclasses.replace(machine, sms=sms), shape).operations[number].seconds

    for number, config in enumerate(plan.configs):
        best = seconds(number, plan_routing.MOST_SMS)
        assert seconds(number, config.num_sms) <= 1.02 * best
        assert config.num_sms == 2 or seconds(number, config.num_sms - 2) > 1.02 * best


@pytest.mark.parametrize(("nodes", "tokens"), [(2, 4096), (8, 4096), (4, 16)])
def test_recommended_chunks_are_those_of_the_prediction(nodes: int, tokens: int) -> None:
    chunks_module = pytest.importorskip("tokenferry.modes.chunks", exc_type=ImportError)
    plan = predict(Machine(nodes, 8), Shape(tokens=tokens))
    assert Config(*dataclasses.astuple(plan.configs[0])) == plan.configs[0]
    for number, config in enumerate(plan.configs):
        machine = dataclasses.replace(plan.machine, sms=config.num_sms)
        chunks = predict(machine, plan.shape).operations[number].chunks
        rows = tokens * plan.routing.nodes / nodes  # of a source, for one node
        most = chunks_module.chunking_of(config, 0).most_rows
        assert most * chunks >= rows
        assert most < rows / chunks + 7 * config.num_sms / 2 or chunks == 1
