"""Who is where: nodes, local indices, rails, and the variables they come from."""

from __future__ import annotations

import pytest

from tokenferry import TokenferryError, Topology
from tokenferry.topology import node_key


@pytest.mark.parametrize(
    ("keys", "node_of", "local_indices", "rails"),
    [
        ("a", (0,), (0,), [(0,)]),
        ("aaa", (0, 0, 0), (0, 1, 2), [(0,), (1,), (2,)]),
        ("aabb", (0, 0, 1, 1), (0, 1, 0, 1), [(0, 2), (1, 3), (0, 2), (1, 3)]),
        ("baba", (0, 1, 0, 1), (0, 0, 1, 1), [(0, 1), (0, 1), (2, 3), (2, 3)]),
        (
            "cabbca",
            (0, 1, 2, 2, 0, 1),
            (0, 0, 0, 1, 1, 1),
            [(0, 1, 2), (0, 1, 2), (0, 1, 2), (4, 5, 3)] + [(4, 5, 3)] * 2,
        ),
    ],
)
def test_layout_of_nodes(
    keys: str, node_of: tuple[int, ...], local_indices: tuple[int, ...], rails: list[tuple[int, ...]]
) -> None:
    for rank in range(len(keys)):
        topology = Topology.from_keys(rank, list(keys))
        assert topology.rank == rank
        assert topology.node_of == node_of
        assert topology.num_ranks == len(keys)
        assert topology.num_nodes == len(set(keys))
        assert topology.node == node_of[rank]
        assert topology.local_index == local_indices[rank]
        assert topology.rail == rails[rank]
        assert topology.rail[topology.node] == rank
        assert topology.local_ranks == topology.ranks_of_node(topology.node)
        assert topology.local_ranks[topology.local_index] == rank


@pytest.mark.parametrize("keys", ["aab", "abb", "aaabbb" + "c"])
def test_unequal_nodes_raise(keys: str) -> None:
    with pytest.raises(TokenferryError, match="same number of ranks"):
        Topology.from_keys(0, list(keys))


TORCHRUN = {"TORCHELASTIC_RUN_ID": "job", "GROUP_RANK": "3"}
SLURM = {"SLURM_PROCID": "9", "SLURM_NODEID": "2"}
NAMED = {"TOKENFERRY_NODE": "left"}


def test_precedence() -> None:
    everything = NAMED | TORCHRUN | SLURM
    keys = [
        node_key("mine", everything),
        node_key(None, everything),
        node_key(None, TORCHRUN | SLURM),
        node_key(None, SLURM),
        node_key(None, {}),
    ]
    assert len(set(keys)) == 5
    for key, mark in zip(keys, ("mine", "left", "3", "2", ""), strict=True):
        assert mark in key


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (NAMED, {"TOKENFERRY_NODE": "right"}),
        (TORCHRUN, TORCHRUN | {"GROUP_RANK": "4"}),
        (SLURM, SLURM | {"SLURM_NODEID": "0"}),
    ],
)
def test_nodes_differ_by_variable(one: dict[str, str], other: dict[str, str]) -> None:
    assert node_key(None, one) == node_key(None, dict(one))
    assert node_key(None, one) != node_key(None, other)


@pytest.mark.parametrize("partial", [{"GROUP_RANK": "3"}, {"SLURM_NODEID": "2"}, {"SLURM_PROCID": "1"}])
def test_leftover_variables_of_launchers_do_not_count(partial: dict[str, str]) -> None:
    """An allocation's variables leak into shells: they count only where the launcher started this process."""
    assert node_key(None, partial) == node_key(None, {})


def test_own_name_may_be_a_number() -> None:
    assert node_key(0) == node_key("0")
    assert node_key(0) != node_key(1)
    assert node_key(0, NAMED) == node_key(0, {})


def test_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENFERRY_NODE", "left")
    assert node_key() == node_key(None, NAMED)
    monkeypatch.delenv("TOKENFERRY_NODE")
    assert node_key() != node_key(None, NAMED)
