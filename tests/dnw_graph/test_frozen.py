"""Frozen graphs compute what they were made of, without what nobody needs."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology
from dnw_graph.frozen import FrozenGraph, FrozenModel, freeze
from dnw_graph.node import Norm, NormReluConv
from models import create_model
from tests.conftest import BUDGETED, ready, relative_error

INSTANCE = partial(NormReluConv, norm="instance", eps=1e-3)
GRAPHS: dict[str, dict[str, Any]] = {
    "batch norm": {"node": "norm_relu_conv"},
    "stride 2": {"node": "norm_relu_conv", "stride": 2},
    "stride 3": {"node": "norm_relu_conv", "stride": 3},
    "instance norm": {"node": INSTANCE},
    "plain inputs": {"node": "norm_relu_conv", "input_node": "identity"},
    "filtered outputs": {"node": "norm_relu_conv", "output_node": "norm_relu_conv"},
    "relu": {"node": "relu"},
    "norm": {"node": "norm"},
    "messages": {"node": "norm", "message": "relu_conv"},
    "steps": {"node": "norm_relu_conv", "schedule": "discrete(steps=4)"},
    "held": {"node": "norm_relu_conv", "schedule": "discrete(steps=4, input='held')"},
    "steps of their own": {
        "node": partial(Norm, norm="instance", eps=1e-3, steps=3),
        "output_node": partial(Norm, steps=2),
        "message": "relu_conv",
        "schedule": "discrete(steps=4)",
    },
}


def lived_in(module: nn.Module) -> nn.Module:
    """Give norms statistics and parameters that a training might have left."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0, 0.3)
            norm.running_var.uniform_(0.5, 2)
        if isinstance(norm, nn.BatchNorm2d | nn.InstanceNorm2d):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0, 0.3)
    return module.eval()


def plainly(frozen: FrozenModel, x: Tensor) -> Tensor:
    """Run a frozen network by plain layers."""
    for layer in frozen:
        if isinstance(layer, FrozenGraph):
            x = torch.cat(layer.states(x), 1)[:, layer.outputs]
        else:
            x = layer(x)
    return x


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("kind", GRAPHS)
def test_outputs_are_those_of_the_graph(kind: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    options = GRAPHS[kind]
    in_time = "schedule" in options
    topology = Topology.complete(4, 9, 3) if in_time else Topology.layered([5, 7, 6, 3])
    k = data.draw(st.integers(1, 60), label="edges")
    graph = lived_in(NeuralGraph(topology, num_edges=k, **options))
    frozen = freeze(graph)
    size = data.draw(st.tuples(st.integers(3, 20), st.integers(3, 20)), label="maps")
    x = torch.randn(data.draw(st.integers(1, 4), label="images"), topology.num_inputs, *size)
    with torch.no_grad():
        expected = graph(x)
    for got in (frozen(x), plainly(frozen, x)):
        assert got.shape == expected.shape
        assert relative_error(got, expected) < 1e-5


@pytest.mark.parametrize("rule", BUDGETED)
def test_every_rule_can_be_frozen(rule: str) -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(Topology.layered([6, 8, 5]), rule=rule, num_edges=31, node="relu")
    ready(graph)
    x = torch.randn(7, 6)
    assert relative_error(freeze(graph)(x), graph.eval()(x).detach()) < 1e-6


def test_what_no_output_needs_is_gone_and_what_no_input_reaches_is_a_constant() -> None:
    # 0, 1 inputs; 2 feeds nobody; 3 is fed by nobody and feeds 4; 5 is an output without an edge.
    topology = Topology.from_edges(
        [[0, 0, 1, 3, 4, 1, 2], [2, 4, 4, 4, 6, 2, 5]], inputs=[0, 1], outputs=[5, 6], num_nodes=7
    )
    graph = lived_in(NeuralGraph(topology, num_edges=7))
    with torch.no_grad():
        names = torch.tensor(topology.names)[topology.edge_index]
        graph.weight[(names[0] == 2) & (names[1] == 5)] = 0
    (only,) = freeze(graph).graphs
    kept = [topology.names[v] for v in only.node]
    assert sorted(kept) == [0, 1, 3, 4, 5, 6]
    assert [topology.names[v] for v in only.node[~only.reached]] == [3, 5]
    assert only.num_edges == 4
    assert only.engine.num_edges == 4  # 0 -> 4, 1 -> 4, 4 -> 6, and what 3 sends to 4
    x = torch.randn(2, 2, 6, 5)
    with torch.no_grad():
        assert relative_error(only(x), graph(x)) < 1e-6
        assert not bool(only(x)[:, 0].any())


def test_a_graph_without_a_live_path_and_one_with_a_single_node() -> None:
    topology = Topology.layered([2, 3, 2])
    graph = lived_in(NeuralGraph(topology, num_edges=4, stride=2))
    with torch.no_grad():
        graph.weight.zero_()
    x = torch.randn(3, 2, 7, 8)
    (dead,) = freeze(graph).graphs
    assert (dead.num_nodes, dead.num_edges) == (2, 0)
    assert torch.equal(dead(x), torch.zeros(3, 2, 4, 4))
    with torch.no_grad():
        graph.weight[topology.edge_index[1] == 5] = 1.0  # into one output only
    (some,) = freeze(graph).graphs
    with torch.no_grad():
        assert relative_error(some(x), graph(x)) < 1e-6
    assert some(x[:0]).shape == (0, 2, 4, 4)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("mbv1_dnw", 64),
        ("mbv1_random", 37),
        ("mbv1_dnw_small", 32),
        ("tiny_static", 32),
        ("tiny_discrete", 32),
    ],
)
def test_networks(name: str, size: int) -> None:
    torch.manual_seed(1)
    model = lived_in(create_model(name, num_classes=10, image_size=size))
    before = copy.deepcopy(model.state_dict())
    frozen = freeze(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in frozen.modules())
    for images in (1, 3):
        x = torch.randn(images, 3, size, size)
        with torch.no_grad():
            expected = model(x)
        assert relative_error(frozen(x), expected) < 1e-5
        assert relative_error(plainly(frozen, x), expected) < 1e-5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_other_types_gradients_and_copies() -> None:
    graph = lived_in(NeuralGraph(Topology.layered([3, 5, 2]), num_edges=12))
    frozen, x = freeze(graph), torch.randn(2, 3, 6, 6)
    expected = frozen(x)
    assert relative_error(copy.deepcopy(frozen)(x), expected) == 0
    x.requires_grad_()
    frozen(x).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.any())
    assert relative_error(frozen.double()(x.detach().double()), expected.double()) < 1e-6
    assert relative_error(frozen.float()(x.detach()), expected) < 1e-6


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.graph = NeuralGraph(Topology.layered([2, 2]), num_edges=3, node="relu")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.graph(x)


class Odd(nn.Module):
    def __init__(self, nodes: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, t: float) -> Tensor:
        return x.sin()


def test_errors() -> None:
    topology = Topology.layered([2, 3, 2])
    continuous = NeuralGraph(topology, num_edges=5, node="relu", schedule="continuous")
    cases: list[tuple[nn.Module, str]] = [
        (continuous, r"static, or in discrete time .* got schedule Continuous"),
        (NeuralGraph(topology, num_edges=5, node=Odd), r"node function Odd: give it a method form"),
        (Twice(), r"modules follow one another, .* here graph \(call module\)|add"),
        (nn.Linear(2, 2), r"found no NeuralGraph in the network; bake\(\)"),
    ]
    for model, message in cases:
        with pytest.raises(ValueError, match=message):
            freeze(model)
    frozen = freeze(NeuralGraph(topology, num_edges=5, node="relu"))
    with pytest.raises(ValueError, match=r"a frozen model is not trained"):
        frozen.train()
