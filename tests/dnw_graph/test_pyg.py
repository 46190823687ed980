"""Graphs from and to PyTorch Geometric, and wirings in its networks."""

from typing import Any

import pytest
import torch
from torch_geometric import nn as geometric
from torch_geometric.data import Data
from torch_geometric.transforms import Compose, LocalDegreeProfile, RemoveDuplicatedEdges

from dnw_graph import NeuralGraph, Topology


@pytest.mark.parametrize("named", [False, True])
def test_from_data_is_the_inverse_of_to_data(named: bool) -> None:
    torch.manual_seed(0)
    topology = Topology.layered([4, 6, 5, 3])
    if named:  # channels in another order than the nodes
        edges = torch.tensor([[7, 7, 5, 1, 3], [1, 3, 3, 0, 2]])
        topology = Topology.from_edges(edges, inputs=[7, 5], outputs=[2, 0], names=list("abcdefgh"))
    graph = NeuralGraph(topology, num_edges=5 if named else 30, node="relu")
    data = graph.to_data()
    again = NeuralGraph.from_data(data, node="relu")
    x = torch.randn(5, topology.num_inputs)
    torch.testing.assert_close(again(x), graph(x))
    names = [
        {(d.name[u], d.name[v]) for u, v in d.edge_index.T.tolist()}
        for d in (data, again.to_data())
    ]
    assert names[0] == names[1]
    assert again.num_edges == data.num_edges


def test_from_data_of_ones_own() -> None:
    shuffled = torch.tensor([[2, 0, 1, 0, 2], [4, 2, 2, 3, 3]])
    data = Data(edge_index=shuffled, num_nodes=5)
    graph = NeuralGraph.from_data(data, [0, 1], [4, 3], num_edges=4, node="relu", rule="dnw")
    assert graph.topology.num_candidates == 5
    assert graph.num_edges == 4
    assert graph(torch.randn(3, 2)).shape == (3, 2)
    data.edge_weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    graph = NeuralGraph.from_data(data, [0, 1], [4, 3], node="identity")
    # node 2: 2 x0 + 3 x1; node 4: 1 z2; node 3: 4 x0 + 5 z2
    torch.testing.assert_close(graph(torch.tensor([[1.0, 10.0]])), torch.tensor([[32.0, 164.0]]))


def test_transforms_of_pyg_apply() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20, node="relu")
    data = Compose([RemoveDuplicatedEdges(), LocalDegreeProfile()])(graph.to_data())
    assert data.x.shape == (13, 5)
    x = torch.randn(2, 4)
    torch.testing.assert_close(NeuralGraph.from_data(data, node="relu")(x), graph(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edge_index": None}, r"torch_geometric\.data\.Data with edge_index, got Data without it"),
        ({"role": None}, r"expected data\.role.* pass inputs="),
        ({"edge_weight": torch.ones(3)}, r"must be 20 finite numbers, one per edge, got \[3\]"),
        ({"edge_weight": torch.full((20,), torch.nan)}, r"got \[20\] of them, 20 not finite"),
    ],
)
def test_data_without_what_is_needed(change: dict[str, Any], message: str) -> None:
    data = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20, node="relu").to_data()
    for name, value in change.items():
        if value is None:
            del data[name]
        else:
            data[name] = value
    with pytest.raises(ValueError, match=message):
        NeuralGraph.from_data(data, node="relu")


def test_a_graph_in_a_sequential_of_pyg() -> None:
    """Check a wiring between message passing layers: its channels are the features of a node."""
    torch.manual_seed(0)
    wiring = NeuralGraph(Topology.layered([8, 12, 8]), num_edges=100, node="relu")
    model = geometric.Sequential(
        "x, edge_index",
        [
            (geometric.GCNConv(5, 8), "x, edge_index -> x"),
            (wiring, "x -> x"),
            (geometric.GCNConv(8, 2), "x, edge_index -> x"),
        ],
    )
    edges = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 0, 1]])
    out = model(torch.randn(4, 5), edges)
    assert out.shape == (4, 2)
    out.square().mean().backward()
    assert wiring.weight.grad is not None
    assert int((wiring.weight.grad != 0).sum()) > 100  # of hallucinated edges, too
