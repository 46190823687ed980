"""Autocast on CPUs with and without units for the narrower type."""

import warnings

import pytest
import torch
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology, precision
from dnw_graph.aggregation import _matmul
from models import create_model
from tests.conftest import relative_error

RESULT = {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
"""Types of results under autocast on a CPU."""
NARROW = [torch.bfloat16, torch.float16]
BOUND = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8}


@pytest.fixture(params=[True, False], ids=["with units", "without units"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Pretend that the processor has units for narrow types, or has none."""
    has = precision.has
    narrow = {name for names in precision._UNITS.values() for name in names}

    def pretend(*names: str) -> bool:
        return bool(request.param) if narrow.issuperset(names) else has(*names)

    monkeypatch.setattr(precision, "has", pretend)
    return bool(request.param)


@pytest.mark.parametrize("dtype", NARROW)
def test_products_are_those_of_float32(units: bool, dtype: torch.dtype) -> None:
    states = [torch.randn(n, 3, 41, 43).to(dtype) for n in (5, 8)]  # more than a part
    grad = torch.randn(6, 3, 41, 43).to(dtype)
    expected = grad.float().flatten(1) @ torch.cat(states).float().flatten(1).t()
    grads = list(grad.split([2, 4]))
    actual = _matmul.outer(states, grads, torch.float32)
    assert relative_error(actual, expected) < (2.0**-8 if units else 1e-5)
    weight, out = torch.randn(6, 5).to(dtype), torch.randn(6, 100).to(dtype)
    z = torch.randn(5, 100).to(dtype)
    total = out.float() + weight.float() @ z.float()
    _matmul.add_product(weight, z, out, first=False)
    assert out.dtype == dtype
    assert relative_error(out.float(), total) < BOUND[dtype]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("backend", ["auto", "sparse", "dense"])
@pytest.mark.parametrize("node", ["relu", "norm_relu_conv"])
def test_graphs_under_autocast(units: bool, dtype: torch.dtype, backend: str, node: str) -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=30, node=node, backend=backend)
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    expected = graph(x)
    with torch.autocast("cpu", dtype):
        y = graph(x)
    assert y.dtype == RESULT[dtype]
    assert relative_error(y.float(), expected) < BOUND[dtype]
    inputs = [x, *graph.parameters()]
    weighting = torch.randn(y.shape)
    ours = torch.autograd.grad((y.float() * weighting).sum(), inputs)
    theirs = torch.autograd.grad((expected * weighting).sum(), inputs)
    for actual, wanted in zip(ours, theirs, strict=True):
        assert relative_error(actual, wanted) < 4 * BOUND[dtype]


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("name", ["mbv1_dnw", "tiny_static", "tiny_discrete"])
def test_models_under_autocast(units: bool, dtype: torch.dtype, name: str) -> None:
    model = create_model(name, num_classes=10, image_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", dtype):
        y = model(x)
    assert y.dtype == (dtype if units else RESULT[dtype])  # that of the classifier
    assert relative_error(y.float(), model(x)) < 0.1


def test_layers_are_called_in_float32_without_units(units: bool) -> None:
    types: list[torch.dtype] = []

    class Layer(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            types.append(y.dtype)
            return y

    layer, x = Layer(3, 2), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert precision.call(layer, x).dtype == torch.bfloat16
    assert precision.call(layer, x).dtype == torch.float32
    assert types == [torch.bfloat16 if units else torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_other_types_keep_them(units: bool, dtype: torch.dtype) -> None:
    model = create_model("mbv1_dnw", num_classes=10, image_size=32).eval().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 32, 32, dtype=dtype))
    assert y.dtype == dtype


def test_a_cpu_without_units_is_said_once(units: bool) -> None:
    graph, x = NeuralGraph(Topology.layered([4, 3]), num_edges=5, node="relu"), torch.randn(2, 4)
    precision.warn_without_units.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph(x)
        assert not caught
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                graph(x)
    precision.warn_without_units.cache_clear()
    messages = [str(w.message) for w in caught]
    assert len(messages) == (0 if units else 1)
    assert all("no units for bfloat16" in message for message in messages)


def test_one_graph_compiles_under_autocast(units: bool) -> None:
    model = create_model("tiny_static", num_classes=10, image_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert relative_error(compiled(x).float(), model(x).float()) < 0.05
