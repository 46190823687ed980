"""Every backend against the reference, and the reference against a dense einsum."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch_geometric.typing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dnw_graph import NeuralGraph, Role, Topology
from dnw_graph.aggregation import BACKENDS, Auto, Dense, Reference, Sparse
from dnw_graph.aggregation.base import BlockEdges
from dnw_graph.node import NormReluConv
from tests.conftest import BUDGETED, ready, relative_error

NODES = {
    "identity": "identity",
    "relu": "relu",
    "batch": "norm_relu_conv",
    "instance": partial(NormReluConv, norm="instance"),
}


def by_einsum(graph: NeuralGraph, x: Tensor, kind: str) -> Tensor:
    """Evaluate a static graph with one dense matrix, node functions in [B, C, H, W]."""
    topology = graph.topology
    wiring, weight = graph.wiring(training=True), graph.weight
    if wiring.slot is not None:  # of real edges only
        none = weight.new_zeros(topology.num_candidates)
        weight = none.index_put((wiring.edge_id,), weight[wiring.slot])
    hallucinated = weight - weight.detach()  # 0, with a gradient of 1
    if not wiring.straight_through:
        hallucinated = hallucinated * wiring.with_gradient.mask
    real = weight + (wiring.candidate_weight - weight).detach()
    used = torch.where(wiring.mask, real, hallucinated)
    matrix = used.new_zeros(topology.num_nodes, topology.num_nodes)
    matrix = matrix.index_put((topology.edge_index[1], topology.edge_index[0]), used)
    states, outputs = [], []
    for block, node in zip(topology.blocks, graph.nodes, strict=True):
        if block.role == Role.INPUT:
            z = x
        else:
            rows = matrix[block.nodes.start : block.nodes.stop, : block.nodes.start]
            z = torch.einsum("vu,buhw->bvhw", rows, torch.cat(states, dim=1))
        if block.role == Role.OUTPUT:
            outputs.append(z)
        elif kind == "relu":
            z = F.relu(z)
        elif kind in ("batch", "instance"):
            over = (0, 2, 3) if kind == "batch" else (2, 3)
            mean, var = z.mean(over, keepdim=True), z.var(over, keepdim=True, unbiased=False)
            scale, shift = (p.view(1, -1, 1, 1) for p in (node.norm.weight, node.norm.bias))
            z = F.relu((z - mean) / (var + 1e-5).sqrt() * scale + shift)
            z = F.conv2d(z, node.conv.weight, None, node.stride, 1, 1, len(block.nodes))
        states.append(z)
    return torch.cat(outputs, dim=1)


def gradients(y: Tensor, graph: NeuralGraph, x: Tensor) -> list[Tensor]:
    weighting = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    named = [x, *graph.parameters()]
    return list(torch.autograd.grad((y * weighting).sum(), named, materialize_grads=True))


@given(
    sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5),
    skip=st.booleans(),
    kind=st.sampled_from(list(NODES)),
    rule=st.sampled_from(BUDGETED),
    stride=st.integers(1, 2),
    seed=st.integers(0, 99),
    data=st.data(),
)
@pytest.mark.parametrize("backend", list(BACKENDS))
def test_gradients_equal_a_dense_einsum(
    backend: str,
    sizes: list[int],
    skip: bool,
    kind: str,
    rule: str,
    stride: int,
    seed: int,
    data: st.DataObject,
) -> None:
    torch.manual_seed(seed)
    topology = Topology.layered(sizes, skip=skip)
    k = data.draw(st.integers(1, topology.num_candidates))
    stride = stride if kind in ("batch", "instance") else 1
    graph = NeuralGraph(
        topology, rule=rule, num_edges=k, node=NODES[kind], stride=stride, backend=backend
    ).double()
    ready(graph)
    for parameter in graph.parameters():  # so that no scale is 1 and no shift 0
        parameter.data += 0.1 * torch.randn_like(parameter)
    x = torch.randn(3, sizes[0], 5, 4, dtype=torch.float64, requires_grad=True)
    expected, got = by_einsum(graph, x, kind), graph(x)
    assert got.shape == expected.shape
    assert relative_error(got, expected.detach()) < 1e-10
    for ours, theirs in zip(gradients(got, graph, x), gradients(expected, graph, x), strict=True):
        assert relative_error(ours, theirs) < 1e-8 or float((ours - theirs).norm()) < 1e-10


@st.composite
def irregular(draw: st.DrawFn) -> Topology:
    """Draw a random acyclic topology: incomplete blocks, sources in any of them."""
    n = draw(st.integers(4, 14))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    upper = torch.rand(n, n, generator=generator).triu(1) > draw(st.sampled_from([0.3, 0.7]))
    upper[:, :2], upper[-2:] = False, False
    upper[0, -2:] = True
    return Topology.from_edges(
        upper.nonzero().t(), inputs=[1, 0], outputs=[n - 1, n - 2], num_nodes=n
    )


@given(irregular(), st.sampled_from(BUDGETED), st.integers(1, 3), st.data())
def test_backends_agree_on_irregular_topologies(
    topology: Topology, rule: str, batch: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, topology.num_candidates))
    graph = NeuralGraph(topology, rule=rule, num_edges=k, backend="reference").double()
    ready(graph)
    x = torch.randn(batch, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = graph(x)
    wanted = gradients(expected, graph, x)
    for backend in (Sparse(), Auto()):
        graph.backend = backend
        y = graph(x)
        assert relative_error(y, expected.detach()) < 1e-10
        for ours, theirs in zip(gradients(y, graph, x), wanted, strict=True):
            assert relative_error(ours, theirs) < 1e-8 or float((ours - theirs).norm()) < 1e-10


@pytest.mark.parametrize("backend", ["reference", "dense", "auto"])
def test_backends_agree_across_devices(device: str, backend: str) -> None:
    if device == "cpu" and backend == "reference":
        pytest.skip("would compare the reference on a CPU with itself")
    graph = NeuralGraph(Topology.layered([8, 12, 12, 5]), num_edges=70, backend="reference")
    x = torch.randn(2, 8, 9, 9, requires_grad=True)
    expected = graph(x)
    wanted = gradients(expected, graph, x)
    there = NeuralGraph(graph.topology, num_edges=70, backend=backend)
    there.load_state_dict(graph.state_dict())
    there.to(device)
    on_device = x.detach().to(device).requires_grad_()
    y = there(on_device)
    assert relative_error(y.cpu(), expected.detach()) < 1e-4
    for ours, theirs in zip(gradients(y, there, on_device), wanted, strict=True):
        assert relative_error(ours.cpu(), theirs.cpu()) < 1e-4


@pytest.mark.parametrize("scatter", [True, False], ids=["torch-scatter", "without"])
def test_reference_with_and_without_torch_scatter(
    scatter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if scatter and not torch_geometric.typing.WITH_TORCH_SCATTER:
        pytest.skip("torch-scatter is not installed")
    monkeypatch.setattr(torch_geometric.typing, "WITH_TORCH_SCATTER", scatter)
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=15, backend="reference")
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    y = graph(x)
    expected = by_einsum(graph, x, "batch")
    assert relative_error(y, expected.detach()) < 1e-5
    for ours, theirs in zip(gradients(y, graph, x), gradients(expected, graph, x), strict=True):
        assert relative_error(ours, theirs) < 1e-4


def test_reference_goes_through_candidates_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=15, backend="reference")
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    whole = gradients(graph(x), graph, x)
    monkeypatch.setattr("dnw_graph.aggregation.reference._ELEMENTS_AT_ONCE", 5 * 50)
    for ours, theirs in zip(gradients(graph(x), graph, x), whole, strict=True):
        assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("pixels", [(1, 1), (13, 17), (40, 40)])
def test_sparse_kernels_on_all_tile_shapes(threads: int, pixels: tuple[int, int]) -> None:
    before = torch.get_num_threads()
    graph = NeuralGraph(
        Topology.layered([30, 40, 20]), num_edges=400, node="relu", backend="sparse"
    )
    x = torch.randn(2, 30, *pixels, requires_grad=True)
    try:
        torch.set_num_threads(threads)
        y = graph(x)
        got = gradients(y, graph, x)
    finally:
        torch.set_num_threads(before)
    expected = by_einsum(graph, x, "relu")
    assert relative_error(y, expected.detach()) < 1e-5
    for ours, theirs in zip(got, gradients(expected, graph, x), strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_an_empty_batch_passes_through() -> None:
    graph = NeuralGraph(Topology.layered([3, 4, 2]), num_edges=10, node="relu")
    assert graph(torch.zeros(0, 3, 6, 6)).shape == (0, 2, 6, 6)


def test_auto_goes_by_cost() -> None:
    topology = Topology.layered([8, 8, 8])

    def chosen(num_edges: int) -> type:
        graph = NeuralGraph(topology, num_edges=num_edges)
        edges = BlockEdges(topology.blocks[1], (topology.blocks[0],), graph.wiring())
        return type(graph.backend.choose(edges))

    assert chosen(10) is Sparse
    assert chosen(topology.num_candidates) is Dense


def test_dense_refuses_blocks_of_few_candidates() -> None:
    edges = torch.stack([torch.arange(20), torch.arange(20, 40)])
    topology = Topology.from_edges(edges, inputs=range(20), outputs=range(20, 40))
    with pytest.raises(ValueError, match=r'block 1, where 20 of 400 pairs.*backend="auto"'):
        NeuralGraph(topology, num_edges=2, node="relu", backend="dense")
    NeuralGraph(topology, num_edges=2, node="relu", backend=Reference())
    with pytest.raises(ValueError, match="unknown backend 'spars'; did you mean 'sparse'"):
        NeuralGraph(topology, num_edges=2, node="relu", backend="spars")
