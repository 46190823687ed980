"""Arguments of a wrong type, which users pass by mistake: errors say what is expected."""

from collections.abc import Callable
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from torch import nn

from dnw_graph import (
    NeuralGraph,
    Topology,
    attach,
    bake,
    cost,
    edited,
    freeze,
    freeze_graphs,
    inherit,
    penalty,
    sparsify,
    sparsity,
    write_graph,
)

TOPOLOGY = Topology.layered([3, 4, 2])
NET = nn.Sequential(nn.Conv2d(3, 4, 3))


def make_graph(rule: str = "dnw") -> NeuralGraph:
    return NeuralGraph(TOPOLOGY, num_edges=5, node="relu", rule=rule)


@pytest.mark.parametrize("network", [TOPOLOGY, None, NET.state_dict(), NeuralGraph])
@pytest.mark.parametrize(
    "function",
    [
        *(cost, freeze, freeze_graphs, bake, sparsify, sparsity, penalty),
        lambda network: attach(network, torch.optim.SGD(NET.parameters(), 0.1), total_steps=5),
        lambda network: edited(network, nx.DiGraph()),
        lambda network: inherit(network, initial={}, trained={}),
    ],
)
def test_something_else_than_a_network(
    function: Callable[[object], object], network: object
) -> None:
    got = "the class NeuralGraph" if isinstance(network, type) else type(network).__name__
    with pytest.raises(TypeError, match=rf"expected a network, which is a torch.*, got {got}$"):
        function(network)


@pytest.mark.parametrize(
    ("size", "got"),
    [((3, 32, 32), r"\(3, 32, 32\)"), (torch.zeros(1, 3, 8, 8), "a tensor"), (8.0, "8.0")],
)
def test_an_image_size_that_is_not_a_number(size: object, got: str) -> None:
    with pytest.raises(
        TypeError, match=rf"image_size must be a number of .*, got {got}; .*example="
    ):
        cost(NET, size)


def test_an_image_without_pixels() -> None:
    with pytest.raises(ValueError, match=r"image_size must be 1 pixel or more, got 0"):
        cost(NET, 0)
    assert cost(NET, np.int64(8)) == cost(NET, 8)


def test_an_example_that_is_not_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"example must be a tensor .*, got tuple"):
        cost(NET, example=(1, 3, 32, 32))


@pytest.mark.parametrize("other", [TOPOLOGY, make_graph()])
def test_a_graph_that_is_not_one_of_networkx(other: object, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"expected a networkx.DiGraph.* pass .* its to_networkx"):
        edited(make_graph(), other)
    with pytest.raises(TypeError, match=r"expected a networkx.DiGraph.* pass .* its to_networkx"):
        write_graph(other, tmp_path / "graph.json")
    with pytest.raises(TypeError, match=r"expected a networkx.DiGraph, got a PosixPath"):
        write_graph(tmp_path / "graph.json", make_graph().to_networkx())


def test_something_else_than_an_optimizer() -> None:
    graph = make_graph()
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer .*, got generator"):
        attach(graph, graph.parameters(), total_steps=5)


def test_something_else_than_a_state() -> None:
    with pytest.raises(TypeError, match=r"must be a state_dict, .*, got a NeuralGraph"):
        inherit(make_graph("lottery"), initial=make_graph(), trained=make_graph())


@pytest.mark.parametrize("names", [None, [NET[0]]])
def test_layers_that_are_not_named(names: object) -> None:
    with pytest.raises(TypeError, match=r"keep_dense must be a list of names, such as \['0'\]"):
        sparsify(nn.Sequential(nn.Linear(3, 3)), 0.5, keep_dense=names)


def test_topologies() -> None:
    with pytest.raises(TypeError, match=r"sizes must be a list of numbers of nodes, .*, got 3"):
        Topology.layered(3)
    with pytest.raises(TypeError, match=r"use Topology.from_networkx"):
        Topology.from_edges(nx.DiGraph([(0, 1)]), [0], [1])
    with pytest.raises(TypeError, match=r"inputs and outputs must be numbers of nodes: 'str'"):
        Topology.from_edges([[0, 1], [1, 2]], "0", "2")
    edges, block = [[0, 1], [1, 2]], [0, 1, 2]
    expected = Topology(*map(torch.tensor, (edges, block, block)))
    assert Topology(edges, block, block).fingerprint == expected.fingerprint
    assert Topology(*map(np.array, (edges, block, block))).fingerprint == expected.fingerprint
