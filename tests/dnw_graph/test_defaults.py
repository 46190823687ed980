"""Users may set PyTorch's default type and device: networks compute what they did."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dnw_graph
from dnw_graph import NeuralGraph, Topology, attach, cost, freeze, load_frozen, save_frozen
from dnw_graph.analysis import measure
from dnw_graph.frozen import to_onnx
from tests.conftest import BUDGETED


@pytest.fixture(params=["float64", "bfloat16", "meta"])
def other_default(request: pytest.FixtureRequest) -> Iterator[str]:
    """Set another default: a type, or a device on which nothing can be computed."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    yield request.param
    torch.set_default_dtype(dtype)
    torch.set_default_device(device)


def set_default(name: str) -> None:
    if name == "meta":
        torch.set_default_device(name)
    else:
        torch.set_default_dtype(getattr(torch, name))


def network(schedule: str = "static", node: str = "norm_relu_conv") -> nn.Sequential:
    torch.manual_seed(0)
    static = schedule == "static"
    topology = Topology.layered([6, 9, 5]) if static else Topology.complete(6, 9, 5)
    graph = NeuralGraph(topology, num_edges=60, schedule=schedule, node=node)
    tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), graph, *tail).eval()


@pytest.mark.parametrize("schedule", ["static", "discrete(steps=3)"])
@pytest.mark.parametrize("node", ["norm_relu_conv", "relu"])
def test_frozen_networks(other_default: str, tmp_path: Path, schedule: str, node: str) -> None:
    model, x = network(schedule, node), torch.randn(2, 3, 12, 12)
    expected = model(x)
    save_frozen(freeze(model), tmp_path / "before.safetensors")
    set_default(other_default)
    for frozen in (freeze(model), load_frozen(tmp_path / "before.safetensors")):
        for _ in range(3):  # the first calls choose among kernels
            torch.testing.assert_close(frozen(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(frozen.forward_by_torch(x), expected, rtol=1e-4, atol=1e-4)
        assert frozen.report(12).macs > 0
        save_frozen(frozen, tmp_path / "after.safetensors")


def test_exported_networks(other_default: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if other_default == "meta":
        pytest.skip("PyTorch's exporter itself makes tensors on the default device")
    model, x = network(), torch.randn(2, 3, 12, 12)
    expected = model(x)
    set_default(other_default)
    path = tmp_path / "network.onnx"
    to_onnx(freeze(model), x, path)
    session = onnxruntime.InferenceSession(path)
    (out,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert np.allclose(out, expected.detach().numpy(), rtol=1e-4, atol=1e-4)


RULES = sorted({*BUDGETED} - {"complete", "fine_tune", "lottery"})


@pytest.mark.parametrize("rule", RULES)
def test_training(other_default: str, rule: str) -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(Topology.layered([6, 9, 5]), rule=rule, num_edges=40, node="relu")
    x = torch.randn(4, 6)
    set_default(other_default)
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1, momentum=0.9)
    attach(graph, optimizer, total_steps=8)
    for _ in range(8):
        optimizer.zero_grad()
        (graph(x).square().mean() + dnw_graph.penalty(graph)).backward()
        optimizer.step()
    assert graph.weight.dtype == torch.float32
    assert len(graph.eval().wiring().edge_id) == 40


def test_analysis_and_cost(other_default: str) -> None:
    model, x = network(), torch.randn(1, 3, 12, 12)
    counted = cost(model, 12)
    measured = measure(model[2].to_networkx())
    set_default(other_default)
    assert cost(model, 12) == counted
    assert measure(model[2].to_networkx()).statistics.keys() == measured.statistics.keys()
    layer = dnw_graph.sparsify(nn.Sequential(nn.Linear(8, 4, device="cpu", dtype=x.dtype)), 0.5)
    if other_default != "meta":  # a graph that is made has the default device
        assert len(dnw_graph.edited(model[2], model[2].to_networkx()).wiring().edge_id) == 60
    assert layer[0].weight.count_nonzero() == 16


@pytest.mark.parametrize("name", ["float64", "bfloat16"])
def test_graphs_made_under_another_type_have_it(name: str) -> None:
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        graph = NeuralGraph(Topology.layered([6, 9, 5]), num_edges=40, node="norm_relu_conv")
        out = graph(torch.randn(2, 6, 5, 5))
        out.float().sum().backward()
    finally:
        torch.set_default_dtype(dtype)
    assert out.dtype == graph.weight.dtype == graph.weight.grad.dtype == getattr(torch, name)
