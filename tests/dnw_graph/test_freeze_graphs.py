"""Graphs in networks of any shape are frozen where they stand."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv

from dnw_graph import NeuralGraph, Topology, freeze, freeze_graphs
from dnw_graph.frozen import FrozenModel, to_exported, to_onnx
from tests.conftest import relative_error


def mixer(size: int, schedule: str = "static") -> NeuralGraph:
    topology = Topology.layered([size, 2 * size, size])
    return NeuralGraph(topology, num_edges=4 * size, node="relu", schedule=schedule)


class Residual(nn.Module):
    """A convolution, then a graph of maps beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.graph = NeuralGraph(Topology.layered([6, 12, 6]), num_edges=50)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        return (x + self.graph(x)).mean((2, 3))


class Transformer(nn.Module):
    """Attention, then a graph as the mixer of features of each token, the same one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.first = self.second = mixer(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x, x, x, need_weights=False)[0]
        for graph in (self.first, self.second):
            x = x + graph(x.transpose(1, 2)).transpose(1, 2)
        return x


class OnGraphs(nn.Module):
    """A model of PyTorch Geometric that takes two arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = GCNConv(5, 8)
        self.layers = nn.ModuleDict({"mix": nn.Sequential(mixer(8), nn.Linear(8, 3))})

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.layers["mix"](self.conv(x, edge_index).relu())


CASES: list[tuple[type[nn.Module], tuple[Any, ...], int]] = [
    (Residual, (torch.randn(2, 3, 6, 6),), 1),
    (Transformer, (torch.randn(2, 5, 8),), 1),
    (OnGraphs, (torch.randn(4, 5), torch.tensor([[0, 1, 2], [1, 2, 3]])), 1),
]


@pytest.mark.parametrize(("kind", "inputs", "number"), CASES)
@pytest.mark.parametrize("wrap", [lambda m: m, torch.optim.swa_utils.AveragedModel])
def test_a_frozen_copy_computes_the_same(
    kind: type[nn.Module], inputs: tuple[Any, ...], number: int, wrap: Any
) -> None:
    torch.manual_seed(0)
    model = kind()
    model(*inputs)  # statistics
    before = copy.deepcopy(model.state_dict())
    frozen = freeze_graphs(wrap(model))
    assert model.training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    model.eval()
    assert relative_error(frozen(*inputs), model(*inputs)) < 1e-5
    assert not any(isinstance(module, NeuralGraph) for module in frozen.modules())
    assert len({id(m) for m in frozen.modules() if isinstance(m, FrozenModel)}) == number
    with pytest.raises(ValueError, match="a frozen model cannot be trained"):
        frozen.train()


def test_compiled_graphs_inside_are_unwrapped() -> None:
    torch.manual_seed(0)
    model = Residual().eval()
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    model.graph = torch.compile(model.graph, backend="eager")  # type: ignore[assignment]
    assert relative_error(freeze_graphs(model)(x), expected) < 1e-5


@pytest.mark.parametrize(("kind", "inputs", "number"), CASES[:2])
def test_frozen_copies_are_exported(
    kind: type[nn.Module], inputs: tuple[Any, ...], number: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    frozen = freeze_graphs(kind())
    program = to_exported(frozen, inputs[0])
    assert relative_error(program.module()(*inputs), frozen(*inputs)) < 1e-5
    to_onnx(frozen, inputs[0], tmp_path / "network.onnx")  # compares itself
    assert (tmp_path / "network.onnx").stat().st_size > 1000


def test_errors_name_what_is_in_the_way() -> None:
    with pytest.raises(ValueError, match=r"freeze_graphs\(\) freezes each graph in its place"):
        freeze(Residual())
    with pytest.raises(ValueError, match=r"freeze_graphs\(\) found no NeuralGraph"):
        freeze_graphs(nn.Sequential(nn.Linear(2, 2)))
    model = nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"mix": mixer(8, "continuous")}))
    with pytest.raises(ValueError, match=r"graph 1.mix: freeze\(\) takes graphs that are static"):
        freeze_graphs(model)
    assert isinstance(freeze_graphs(mixer(4)), FrozenModel)
