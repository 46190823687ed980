"""Static graphs of many small blocks: one function in compiled code, equal to the equations."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology, attach, cost, freeze
from dnw_graph.node import NODES, Bias, Gelu, Identity, Linear, NormReluConv, Relu, Tanh
from dnw_graph.schedule import _blocks, _maps, _pointwise
from tests.conftest import relative_error

POINTWISE = [
    Identity,
    Relu,
    Gelu,
    Tanh,
    Bias,
    Linear,
    partial(Gelu, scale=True, bias=True),
    partial(Relu, bias=True),
    partial(Tanh, scale=True),
]


def random_topology(seed: int) -> Topology:
    """Return a random acyclic graph, some of whose outputs may feed other nodes."""
    generator = torch.Generator().manual_seed(seed)
    nodes = int(torch.randint(6, 30, (), generator=generator))
    share = float(torch.rand((), generator=generator)) * 0.6
    pairs = torch.rand(nodes, nodes, generator=generator).triu(1).gt(1 - share).nonzero().t()
    pairs = pairs[:, pairs[1] > 1]  # inputs have no parents
    paths = torch.tensor([[0, 1, 1], [2, nodes - 1, nodes - 2]])
    edges = torch.cat([pairs, paths], 1).unique(dim=1)
    return Topology.from_edges(edges, inputs=[1, 0], outputs=[nodes - 1, 2], num_nodes=nodes)


def draw(graph: nn.Module, seed: int) -> None:
    """Give every parameter a value of its own."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.uniform_(-1, 1)


def outputs_and_gradients(graph: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the outputs, and the gradients of a weighted sum of them to input and parameters."""
    x = x.clone().requires_grad_()
    y = graph(x)
    target = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
    grads = torch.autograd.grad(
        (y * target.to(y.dtype)).sum(),
        [x, *graph.parameters()],
        allow_unused=True,
        materialize_grads=True,
    )
    return [y, *grads]


@given(
    seed=st.integers(0, 10**6),
    node=st.sampled_from(POINTWISE),
    output=st.sampled_from(POINTWISE),
    rule=st.sampled_from(["dnw", "random", "complete", "top_kast", "gse(every=1)"]),
    shape=st.sampled_from([(3,), (70,), (2, 5), (2, 3, 4)]),
)
@settings(max_examples=40, deadline=None)
def test_random_graphs_equal_the_reference(
    seed: int, node: Any, output: Any, rule: str, shape: tuple[int, ...]
) -> None:
    topology = random_topology(seed)
    budget = None if rule == "complete" else max(1, topology.num_candidates // 2)
    options: dict[str, Any] = {
        "rule": rule,
        "num_edges": budget,
        "node": node,
        "output_node": output,
    }
    torch.manual_seed(seed)
    ours = NeuralGraph(topology, **options).double()
    draw(ours, seed)
    theirs = NeuralGraph(topology, backend="reference", **options).double()
    theirs.load_state_dict(ours.state_dict())
    for graph in (ours, theirs):
        if graph.rule.follows_training:
            attach(graph, torch.optim.SGD(graph.parameters(), lr=0.1), total_steps=10)
    x = torch.randn(shape[0], 2, *shape[1:], dtype=torch.float64)
    results = [outputs_and_gradients(graph, x) for graph in (ours, theirs)]
    for mine, expected in zip(*results, strict=True):
        assert torch.allclose(mine, expected, atol=1e-10, rtol=1e-10)


@given(
    seed=st.integers(0, 10**6),
    node=st.sampled_from(
        [NormReluConv, partial(NormReluConv, norm="instance"), "relu_conv"]
        + [partial(NormReluConv, norm=norm, steps=2) for norm in ("batch", "instance")]
    ),
    rule=st.sampled_from(["dnw", "random", "complete", "top_kast", "gse(every=1)"]),
    stride=st.sampled_from([1, 2]),
    training=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
@settings(max_examples=40, deadline=None)
def test_random_graphs_of_maps_equal_the_reference(
    seed: int, node: Any, rule: str, stride: int, training: bool, dtype: torch.dtype
) -> None:
    topology = random_topology(seed)
    budget = None if rule == "complete" else max(1, topology.num_candidates // 2)
    options: dict[str, Any] = {"rule": rule, "num_edges": budget, "stride": stride}
    torch.manual_seed(seed)
    ours = NeuralGraph(topology, node=node, **options).to(dtype)
    draw(ours, seed)
    slow = partial(NODES[node] if isinstance(node, str) else node, use_fused=False)
    theirs = NeuralGraph(topology, node=slow, backend="reference", **options).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    for graph in (ours, theirs):
        if graph.rule.follows_training:
            attach(graph, torch.optim.SGD(graph.parameters(), lr=0.1), total_steps=10)
        graph.train(training)
    x = torch.randn(3, 2, 7, 6, dtype=dtype)
    results = [outputs_and_gradients(graph, x) for graph in (ours, theirs)]
    for found, graph in zip(results, (ours, theirs), strict=True):
        found += [buffer.double() for buffer in graph.buffers()]
    bound = 1e-10 if dtype == torch.float64 else 1e-3
    for mine, expected in zip(*results, strict=True):
        assert relative_error(mine, expected) < bound or torch.allclose(mine, expected, atol=bound)


class Mixed(nn.Module):
    """A node function of one's own, with parameters of nodes and one that they share."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.rand(num_nodes))
        self.power = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, t: float) -> Tensor:
        slope = self.slope.view(-1, *[1] * (x.dim() - 1))
        return torch.where(x > 0, x, slope * x) * self.power


@given(
    seed=st.integers(0, 10**6),
    options=st.sampled_from(
        [
            {"node": Mixed, "message": "relu"},
            {"node": "relu", "message": Mixed, "output_node": Mixed},
            {"node": "norm", "message": "relu_conv"},
            {"node": "norm_relu_conv", "input_node": "relu_conv", "output_node": Mixed},
            {"node": nn.ELU, "input_node": "norm_relu_conv", "stride": 2},
        ]
    ),
    rule=st.sampled_from(["dnw", "random", "complete"]),
)
@settings(max_examples=25, deadline=None)
def test_random_graphs_of_other_functions_equal_the_reference(
    seed: int, options: dict[str, Any], rule: str
) -> None:
    topology = random_topology(seed)
    budget = None if rule == "complete" else max(1, topology.num_candidates // 2)
    torch.manual_seed(seed)
    ours, theirs = (
        NeuralGraph(topology, rule=rule, num_edges=budget, backend=backend, **options).double()
        for backend in ("auto", "reference")
    )
    draw(ours, seed)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 2, 6, 5, dtype=torch.float64)
    results = [outputs_and_gradients(graph, x) for graph in (ours, theirs)]
    for mine, expected in zip(*results, strict=True):
        assert torch.allclose(mine, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("node", ["relu", Mixed])
def test_gradients_of_some_outputs_after_those_of_others(node: Any) -> None:
    topology = random_topology(11)
    graph, reference = (
        NeuralGraph(topology, rule="complete", node=node, backend=backend)
        for backend in ("auto", "reference")
    )
    reference.load_state_dict(graph.state_dict())
    x = torch.randn(5, 2, requires_grad=True)
    found = []
    for one in (graph, reference):
        y = one(x)
        first = torch.autograd.grad(y.sum(), [one.weight], retain_graph=True)
        then = torch.autograd.grad(y[:, 1].sum(), [x, one.weight], retain_graph=True)
        last = torch.autograd.grad(y[:, 0].sum(), [x])
        found.append([*first, *then, *last])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def whole(
    graph: NeuralGraph, x: Tensor, monkeypatch: pytest.MonkeyPatch, kind: Any = _pointwise
) -> bool:
    """Return whether a graph is computed as one function of some kind."""
    calls = []
    real = kind._Function.apply

    class Spy:
        @staticmethod
        def apply(*args: Any) -> Any:
            calls.append(1)
            return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "_Function", Spy)
        graph(x)
    return bool(calls)


def test_which_graphs_are_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    topology, x = random_topology(3), torch.randn(4, 2)
    options: dict[str, Any] = {"num_edges": topology.num_candidates // 2, "node": "relu"}
    assert whole(NeuralGraph(topology, **options), x, monkeypatch)
    assert whole(NeuralGraph(topology, backend="sparse", **options), x, monkeypatch)
    assert whole(NeuralGraph(topology, **options), torch.randn(4, 2, 3, 3), monkeypatch)
    assert not whole(NeuralGraph(topology, backend="reference", **options), x, monkeypatch)
    assert not whole(NeuralGraph(topology, message="bias", **options), x, monkeypatch)
    assert not whole(NeuralGraph(topology, **{**options, "node": nn.ELU}), x, monkeypatch)
    wide = NeuralGraph(Topology.layered([64, 64, 64]), rule="complete", node="relu")
    assert not whole(wide, torch.randn(4, 64), monkeypatch)  # dense products


def test_which_graphs_of_maps_are_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    topology, x = random_topology(3), torch.randn(4, 2, 5, 5)
    options: dict[str, Any] = {"num_edges": topology.num_candidates // 2}
    assert whole(NeuralGraph(topology, **options), x, monkeypatch, _maps)
    assert whole(NeuralGraph(topology, node="relu_conv", **options), x, monkeypatch, _maps)
    assert not whole(NeuralGraph(topology, backend="reference", **options), x, monkeypatch, _maps)
    assert not whole(NeuralGraph(topology, node="norm", **options), x, monkeypatch, _maps)
    assert not whole(NeuralGraph(topology, message="relu", **options), x, monkeypatch, _maps)
    mixed = NeuralGraph(topology, input_node="relu_conv", **options)
    assert not whole(mixed, x, monkeypatch, _maps)
    wide = NeuralGraph(Topology.layered([32, 64, 64]), num_edges=100)
    images = torch.randn(4, 32, 5, 5)
    assert not whole(wide, images, monkeypatch, _maps)
    assert whole(wide, images, monkeypatch, _blocks)


@pytest.mark.parametrize(
    "listen",
    [
        lambda node, hook: node.register_forward_hook(hook),
        lambda node, hook: node.register_forward_pre_hook(hook),
        lambda node, hook: node.register_full_backward_hook(hook),
        lambda node, hook: node.register_full_backward_pre_hook(hook),
        lambda node, hook: nn.modules.module.register_module_forward_hook(hook),
    ],
)
def test_hooks_of_node_functions_are_called(listen: Any) -> None:
    topology = random_topology(3)
    graph = NeuralGraph(topology, num_edges=topology.num_candidates // 2, node="relu")
    called = []
    handle = listen(graph.nodes[0], lambda *_: called.append(1))
    try:
        graph(torch.randn(4, 2, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert called


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"node": "gelu", "output_node": "tanh"}, (40, 2)),
        ({"node": "norm_relu_conv"}, (8, 2, 6, 6)),
    ],
)
def test_autocast_and_bfloat16(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    topology = random_topology(5)
    torch.manual_seed(0)
    graph = NeuralGraph(topology, rule="complete", **options)
    x = torch.randn(shape)
    exact = outputs_and_gradients(graph, x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = outputs_and_gradients(graph, x)
    assert rounded[0].dtype == torch.bfloat16
    assert rounded[2].dtype == torch.float32
    for ours, theirs in zip(rounded, exact, strict=True):
        assert relative_error(ours, theirs) < 0.05


@pytest.mark.parametrize(
    ("node", "shape"),
    [
        (partial(Gelu, scale=True, bias=True), (40, 2)),
        (NormReluConv, (8, 2, 6, 6)),
        (nn.ELU, (9, 2)),
    ],
)
def test_graphs_of_bfloat16(node: Any, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(random_topology(5), rule="complete", node=node)
    x = torch.randn(shape)
    exact = outputs_and_gradients(graph, x)
    rounded = outputs_and_gradients(graph.bfloat16(), x.bfloat16())
    for ours, theirs in zip(rounded, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert relative_error(ours, theirs) < 0.1


def test_what_a_whole_graph_cannot_do_goes_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    topology, x = random_topology(3), torch.randn(4, 2, 5, 5)
    for change in ("momentum", "affine", "statistics", "fused"):
        graph = NeuralGraph(topology, rule="complete")
        node: Any = graph.nodes[1]
        if change == "momentum":
            node.norm.momentum = None
        elif change == "affine":
            node.norm = nn.BatchNorm2d(node.num_nodes, affine=False)
            node.use_fused = False
        elif change == "statistics":
            node.norm = nn.BatchNorm2d(node.num_nodes, track_running_stats=False)
            node.use_fused = False
        else:
            node.use_fused = False
        assert not whole(graph, x, monkeypatch, _maps), change
        assert graph(x).shape == (4, 2, 5, 5)


def test_no_images_and_no_gradients() -> None:
    topology = random_topology(4)
    graph = NeuralGraph(topology, rule="complete", node="relu")
    assert graph(torch.randn(0, 2)).shape == (0, 2)
    with torch.no_grad():
        assert torch.equal(graph(torch.ones(3, 2)), graph(torch.ones(3, 2)))
    y = graph(torch.full((2, 2), torch.nan))
    assert bool(y.isnan().any())


@pytest.mark.parametrize(
    ("node", "shape"),
    [(partial(Gelu, scale=True, bias=True), (50, 4)), (NormReluConv, (5, 4, 8, 8))],
)
def test_nothing_is_summed_in_another_order_by_more_threads(
    node: Any, shape: tuple[int, ...]
) -> None:
    topology = Topology.random_dag("watts_strogatz", 80, 4, 5, k=6, p=0.5)
    graph = NeuralGraph(topology, num_edges=100, node=node)
    x, threads = torch.randn(shape), torch.get_num_threads()
    found = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.append(outputs_and_gradients(graph, x))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two) or relative_error(one, two) < 1e-6


@pytest.mark.parametrize(
    ("node", "shape"), [("relu", (6, 2)), (partial(NormReluConv, norm="instance"), (6, 2, 5, 5))]
)
def test_a_compiled_graph_computes_the_same(node: Any, shape: tuple[int, ...]) -> None:
    topology = random_topology(6)
    graph = NeuralGraph(topology, num_edges=topology.num_candidates // 2, node=node)
    compiled = torch.compile(copy.deepcopy(graph), fullgraph=True, backend="aot_eager")
    x = torch.randn(shape)
    ours, theirs = (outputs_and_gradients(g, x) for g in (compiled, graph))
    for one, two in zip(ours, theirs, strict=True):
        assert relative_error(one, two) < 1e-6


@pytest.mark.parametrize(
    ("node", "macs", "parameters"),
    [("relu", 0, 0), ("gelu", 0, 0), ("tanh", 0, 0), ("bias", 0, 1), ("linear", 1, 2)],
)
def test_pointwise_functions_are_counted(node: str, macs: int, parameters: int) -> None:
    graph = NeuralGraph(Topology.layered([3, 4, 2]), rule="complete", node=node)
    found = cost(graph)
    assert found.parameters == found.real_edges + 7 * parameters
    assert found.macs == found.real_edges + 7 * macs


@pytest.mark.parametrize("node", ["identity", "relu", "bias", "linear", partial(Relu, bias=True)])
def test_pointwise_functions_with_a_formula_are_frozen(node: Any) -> None:
    graph = NeuralGraph(random_topology(8), rule="complete", node=node, output_node=node)
    draw(graph, 1)
    graph.eval()
    x = torch.randn(5, 2)
    assert torch.allclose(freeze(graph)(x), graph(x), atol=1e-5)
    assert torch.allclose(freeze(graph)(x[:1]), graph(x[:1]), atol=1e-5)
