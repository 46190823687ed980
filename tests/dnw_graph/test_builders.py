"""Ways of making a topology."""

from collections.abc import Callable

import networkx as nx
import pytest
import torch

from dnw_graph import NeuralGraph, Role, Topology


def edges(topology: Topology) -> set[tuple[int, int]]:
    """Return the candidates by the nodes' names."""
    pairs = topology.edge_index.t().tolist()
    return {(topology.names[u], topology.names[v]) for u, v in pairs}


def test_bipartite() -> None:
    topology = Topology.bipartite(2, 3)
    assert edges(topology) == {(u, v) for u in (0, 1) for v in (2, 3, 4)}
    assert topology.blocks[1].complete


def test_complete() -> None:
    cyclic = Topology.complete(2, 3, 1)
    assert edges(cyclic) == {(u, v) for u in range(6) for v in range(6)}
    assert [b.role for b in cyclic.blocks] == [Role.INPUT, Role.HIDDEN, Role.OUTPUT]
    assert all(block.complete for block in cyclic.blocks)
    assert cyclic.depth is None
    acyclic = Topology.complete(2, 3, 1, acyclic=True)
    assert edges(acyclic) == {(u, v) for u in range(5) for v in range(2, 6) if u < v}
    assert acyclic.depth == 4
    assert edges(Topology.complete(1, 0, 1)) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_from_blocks() -> None:
    inputs, hidden = range(3), torch.tensor([5, 3, 4])
    blocks = [(3, "input", []), (3, Role.HIDDEN, [0, 2]), (2, "output", hidden)]
    topology = Topology.from_blocks(blocks, names="abcdefgh", outputs=torch.tensor([7, 6]))
    expected = {(u, v) for u in (0, 2) for v in (3, 4, 5)}
    expected |= {(u, v) for u in (3, 4, 5) for v in (6, 7)}
    assert set(map(tuple, topology.edge_index.t().tolist())) == expected
    assert topology.names == tuple("abcdefgh")
    assert topology.outputs.tolist() == [7, 6]
    assert [block.complete for block in topology.blocks] == [True, False, True]
    same = Topology(
        topology.edge_index, topology.block, topology.role, None, None, torch.tensor([7, 6])
    )
    assert same.fingerprint == topology.fingerprint
    for last, message in (
        ((2, "output", [0, 8]), r"block 2 has sources from 0 to 8, but there are 8 nodes"),
        ((2, "output", [3, 4, 3]), r"block 2 lists source 3 more than once"),
        ((0, "output", inputs), r"at least one node, got 0"),
        ((2, "end", inputs), r"unknown role 'end' \(known: input, hidden, output"),
        ((2, "hidden", inputs), r"at least one input node and one output node"),
    ):
        with pytest.raises(ValueError, match=message):
            Topology.from_blocks([*blocks[:2], last])
    for block in ((2, "output"), (2, "output", 3), {"size": 2}):
        with pytest.raises(TypeError, match=r"a block must be \(number of nodes, role, numbers of"):
            Topology.from_blocks([*blocks[:2], block])


def test_complete_takes_memory_for_nodes_only() -> None:
    topology = Topology.complete(100, 20_000, 100)
    assert topology.num_candidates == 20_200**2
    assert topology._table.numel() == 3 * 20_200


def test_recurrent() -> None:
    topology = Topology.recurrent(2, 3, 1)
    hidden = range(2, 5)
    expected = {(u, v) for u in (0, 1, *hidden) for v in hidden} | {(u, 5) for u in hidden}
    assert edges(topology) == expected
    graph = NeuralGraph(
        topology, rule="complete", node="relu", schedule="discrete(steps=4, input='new')"
    )
    assert graph(torch.randn(2, 3, 2)).shape == (2, 1)


def test_grid() -> None:
    topology = Topology.grid(3, 3, reach=1)
    expected = {
        (3 * c + r, 3 * (c + 1) + s)
        for c in (0, 1)
        for r in range(3)
        for s in range(3)
        if abs(r - s) <= 1
    }
    assert edges(topology) == expected
    assert topology.num_inputs == topology.num_outputs == 3
    assert edges(Topology.grid(2, 2, reach=0)) == {(0, 2), (1, 3)}


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [
        ("erdos_renyi", {"p": 0.1}),
        ("watts_strogatz", {"k": 4, "p": 0.25}),
        ("barabasi_albert", {"m": 2}),
    ],
)
def test_random_graphs_are_oriented_and_connected(kind: str, parameters: dict[str, float]) -> None:
    topology = Topology.random_dag(kind, 40, 4, 3, seed=1, **parameters)
    pairs = edges(topology)
    assert all(u < v and v >= 4 and u < 37 for u, v in pairs)
    graph = nx.DiGraph(list(pairs))
    for node in range(4, 40):
        assert any(nx.has_path(graph, i, node) for i in range(4)), node
    for node in range(37):
        assert any(nx.has_path(graph, node, o) for o in range(37, 40)), node
    again = Topology.random_dag(kind, 40, 4, 3, seed=1, **parameters)
    other = Topology.random_dag(kind, 40, 4, 3, seed=2, **parameters)
    assert edges(again) == pairs != edges(other)
    undirected = {
        "erdos_renyi": lambda: nx.gnp_random_graph(40, 0.1, seed=1),
        "watts_strogatz": lambda: nx.connected_watts_strogatz_graph(40, 4, 0.25, seed=1),
        "barabasi_albert": lambda: nx.barabasi_albert_graph(40, 2, seed=1),
    }[kind]()
    drawn = {(min(e), max(e)) for e in undirected.edges}
    assert {e for e in drawn if e[1] >= 4 and e[0] < 37} <= pairs
    y = NeuralGraph(topology, num_edges=len(pairs) // 2, node="relu")(torch.randn(2, 4))
    assert y.shape == (2, 3)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Topology.bipartite(0, 3), r"got \[0, 3\]"),
        (
            lambda: Topology.complete(0, 3, 1),
            r"at least one input and one output, got 0 inputs and 1",
        ),
        (lambda: Topology.complete(1, -2, 1), r"leave -2 hidden nodes, but at least 0"),
        (lambda: Topology.recurrent(2, 0, 1), r"leave 0 hidden nodes, but at least 1"),
        (lambda: Topology.grid(3, 1), r"two columns .* got 3 rows, 1 columns"),
        (lambda: Topology.random_dag("ring", 9, 1, 1), r"unknown random graph 'ring' \(known: erd"),
        (lambda: Topology.random_dag("erdos_renyi", 9, 1, 1), r"erdos_renyi with {}: .*'p'"),
        (lambda: Topology.random_dag("erdos_renyi", 9, 1, 1, q=1), r"with {'q': 1}: .*'p'"),
        (lambda: Topology.random_dag("barabasi_albert", 3, 1, 1, m=3), r"with {'m': 3}: .*m"),
        (lambda: Topology.random_dag("erdos_renyi", 3, 2, 2, p=0.5), r"leave -1 hidden nodes"),
        (lambda: Topology.random_dag("erdos_renyi", 9, 1, 1, p=1.5), r"from 0 to 1, got 1.5"),
        (lambda: Topology.random_dag("erdos_renyi", 9, 1, 1, p=float("nan")), r"from 0 to 1, got"),
        (lambda: Topology.layered([5, 2.0, 3]), r"got \[5, 2.0, 3\]"),
        (lambda: Topology.grid(3, 2, reach=1.5), r"whole numbers, got .* a reach of 1.5"),
    ],
)
def test_errors(build: Callable[[], Topology], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
