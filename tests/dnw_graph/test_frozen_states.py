"""States of frozen graphs in bfloat16: their error is bounded, and nothing else changes."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology, freeze, freeze_graphs, load_frozen, save_frozen
from dnw_graph.frozen import FrozenGraph, FrozenModel, _kernels, engine
from dnw_graph.frozen.engine import _packed, _unpacked
from models import create_model
from tests.conftest import relative_error
from tests.dnw_graph.test_frozen import GRAPHS, KERNELS, lived_in

ROUNDOFF = 2.0**-8  # of 8 significant bits
SMALLEST = 2.0**-95  # states below are stored as about this


def error_bound(graph: FrozenGraph, x: Tensor) -> Tensor:
    """Return a bound on the error of each output, for states with 8 significant bits.

    With ``e_u`` for the error of a stored state ``Z_u``, the input of a node has at most the error
    ``sum_u |A_vu| e_u``. The formula ``K * max(a I + b, 0)`` turns an error ``d`` into at most
    ``|K| * |a| d``, and storing the result adds ``ROUNDOFF (|Z_v| + e_v) + SMALLEST``.
    """
    states = graph.states(x)
    last, by_level = (
        len(graph.strides),
        [x.new_zeros(len(x), 0, *s) for s in graph.sizes(x.shape[2:])],
    )
    outputs = []
    for at, (part, state) in enumerate(zip(graph.parts, states, strict=True)):
        error = torch.zeros_like(state)
        if at and part.role != graph.parts[0].role:
            earlier = by_level[part.reads].flatten(2)
            error = (graph._matrix(at).abs() @ earlier).unflatten(2, by_level[part.reads].shape[2:])
            error = error * graph.scale[part.first : part.past].abs().view(-1, 1, 1)
            if part.filters:
                filters = graph.filters[part.first : part.past, None].abs()
                stride = graph.strides[part.reads] if part.level > part.reads else 1
                error = nn.functional.conv2d(error, filters, None, stride, 1, groups=len(part))
        if part.level == last:
            outputs.append(error)
        stored = error + ROUNDOFF * (state.abs() + error) + SMALLEST
        by_level[part.level] = torch.cat([by_level[part.level], stored], 1)
    return torch.cat(outputs, 1)[:, graph.places[graph.outputs]]


@settings(max_examples=25)
@given(st.data())
@pytest.mark.parametrize("kind", ["batch norm", "stride 2", "stride 3", "relu", "norm", "steps"])
def test_errors_are_within_the_bound(kind: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99), label="seed"))
    options = GRAPHS[kind]
    in_time = "schedule" in options
    topology = Topology.complete(4, 9, 3) if in_time else Topology.layered([5, 7, 6, 3])
    k = data.draw(st.integers(20, 60), label="edges")
    frozen = freeze(lived_in(NeuralGraph(topology, num_edges=k, **options)), torch.bfloat16)
    size = data.draw(st.tuples(st.integers(3, 20), st.integers(3, 20)), label="maps")
    x = torch.randn(data.draw(st.integers(1, 4), label="images"), topology.num_inputs, *size)
    name = data.draw(st.sampled_from(list(KERNELS)), label="kernel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "kernel_of", lambda *_: KERNELS[name])
        output = frozen(x)
    expected, (graph,) = frozen.forward_by_torch(x), frozen.graphs
    assert output.dtype == torch.float32
    bound = error_bound(graph, x) + 1e-5 * (1 + expected.abs())  # the latter for sums in float32
    assert bool(((output - expected).abs() <= bound).all())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["mbv1_dnw", "tiny_static", "tiny_discrete"])
def test_networks(name: str, threads: int) -> None:
    torch.manual_seed(0)
    model = lived_in(create_model(name, num_classes=10, image_size=32))
    exact, rounded = freeze(model), freeze(model, torch.bfloat16)
    x, before = torch.randn(3, 3, 32, 32), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        error = relative_error(rounded(x), exact(x))
        alone = relative_error(rounded(x[1:2]), rounded(x)[1:2])
    finally:
        torch.set_num_threads(before)
    assert 2e-6 < error < 2e-2  # it did round
    assert alone < 4e-2  # a number may be packed with another
    assert torch.equal(rounded.forward_by_torch(x), exact.forward_by_torch(x))


def test_constant_nodes_are_stored_likewise() -> None:
    topology = Topology.from_edges(
        [[0, 1, 2, 3, 3], [3, 3, 4, 4, 5]], inputs=[0, 1], outputs=[4, 5], num_nodes=6
    )
    graph = lived_in(NeuralGraph(topology, num_edges=5))
    with torch.no_grad():
        graph.weight.fill_(1.0)
    frozen, x = freeze(graph, torch.bfloat16), torch.randn(2, 2, 6, 5)
    assert not bool(frozen.graphs[0].reached.all())
    assert relative_error(frozen(x), frozen.forward_by_torch(x)) < 1e-2


def test_rows_are_packed_as_documented() -> None:
    """Check signs, sizes and zeros, and that the kernel packs as ``_packed`` does."""
    torch.manual_seed(0)
    rows = torch.randn(6, 8 * _kernels.LANES) * 10.0 ** torch.randint(-6, 6, (6, 1))
    rows[rows.abs() < 0.3] = 0
    restored = _unpacked(_packed(rows))
    assert bool(((restored - rows).abs() <= ROUNDOFF * rows.abs() + 2 * SMALLEST).all())
    second = restored.unflatten(1, (-1, 2, _kernels.LANES))[:, :, 1]
    assert torch.equal(second, second.bfloat16().float())

    graph = NeuralGraph(Topology.layered([6, 1]), num_edges=6, node="relu").eval()
    frozen, whole = freeze(graph, torch.bfloat16), 2 * _kernels.LANES  # one row of 32 images
    frozen(rows[:, :whole].T.contiguous())
    (plan,) = frozen.graphs[0].engine._plans.values()
    assert torch.equal(plan._rows(0), _packed(rows[:, :whole].relu()))


def test_a_file_keeps_the_type(tmp_path: Path) -> None:
    model = lived_in(create_model("tiny_static", num_classes=10))
    x = torch.randn(2, 3, 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        frozen = freeze(model, dtype)
        save_frozen(frozen, tmp_path / "model.safetensors")
        again = load_frozen(tmp_path / "model.safetensors")
        assert [graph.state_dtype for graph in again.graphs] == [dtype]
        assert torch.equal(again(x), frozen(x))


def test_the_type_may_be_changed_later_and_must_be_known() -> None:
    graph = lived_in(NeuralGraph(Topology.layered([5, 9, 3]), num_edges=40))
    frozen, x = freeze(graph), torch.randn(2, 5, 6, 6)
    exact = frozen(x)
    frozen.graphs[0].state_dtype = torch.bfloat16
    assert not torch.equal(frozen(x), exact)
    assert torch.equal(frozen(x), freeze(graph, torch.bfloat16)(x))
    with pytest.raises(ValueError, match=r"float32 or torch\.bfloat16, not in torch\.float16"):
        freeze(graph, torch.float16)


def test_every_graph_of_a_network_is_set() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = NeuralGraph(Topology.layered([6, 9, 6]), num_edges=70, node="relu")

        def forward(self, x: Tensor) -> Tensor:
            return x + self.graph(x)

    network = freeze_graphs(Residual(), torch.bfloat16)
    (frozen,) = (module for module in network.modules() if isinstance(module, FrozenModel))
    assert frozen.graphs[0].state_dtype == torch.bfloat16
    sequences = Topology.recurrent(3, 7, 2)
    recurrent = NeuralGraph(
        sequences,
        num_edges=30,
        node="relu",
        schedule="discrete(steps=5, input='new', read='every')",
    )
    steps = freeze(recurrent.eval(), torch.bfloat16)
    x = torch.randn(2, 5, 3)
    assert relative_error(steps(x), recurrent(x).detach()) < 2e-2
