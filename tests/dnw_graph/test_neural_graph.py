"""The graph as a layer: what it equals, what the paper claims of it, how it behaves in a module."""

import copy
import itertools
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Rule, Topology
from dnw_graph.aggregation import Backend, Sparse
from dnw_graph.node import NormReluConv
from dnw_graph.schedule import Static
from dnw_graph.wiring import DNW, Candidates
from tests.conftest import relative_error
from tests.dnw_graph.test_aggregation import gradients


def test_adjacent_complete_blocks_are_depthwise_separable_convolutions() -> None:
    """Section 2.4: MobileNetV1's layers, here norm, ReLU, depthwise 3x3 with a stride, 1x1."""
    sizes = [4, 7, 5]
    graph = NeuralGraph(Topology.layered(sizes, skip=False), rule="complete", stride=2)
    layers = nn.Sequential()
    edges = graph.weight.detach().split(
        [b.edges.stop - b.edges.start for b in graph.topology.blocks]
    )
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        depthwise = nn.Conv2d(inputs, inputs, 3, 2 - i, padding=1, groups=inputs, bias=False)
        depthwise.weight.data = graph.nodes[i].conv.weight.data.clone()
        pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        pointwise.weight.data = edges[i + 1].view(outputs, inputs, 1, 1).clone()
        layers.extend([nn.BatchNorm2d(inputs), nn.ReLU(), depthwise, pointwise])
    x = torch.randn(3, 4, 9, 9, requires_grad=True)
    expected, got = layers(x), graph(x)
    assert relative_error(got, expected.detach()) < 1e-5
    (wanted,) = torch.autograd.grad(expected.square().sum(), x)
    assert relative_error(torch.autograd.grad(got.square().sum(), x)[0], wanted) < 1e-4


def test_a_perceptron_is_a_static_graph() -> None:
    """Section 2.1: ReLU at hidden nodes, none at the inputs; features without pixels."""
    graph = NeuralGraph(
        Topology.layered([6, 8, 7, 3], skip=False),
        rule="complete",
        node="relu",
        input_node="identity",
    )
    first, second, last = (w for w in graph.weight.detach().split([0, 48, 56, 21]) if len(w))
    x = torch.randn(5, 6)
    hidden = F.relu(x @ first.view(8, 6).t())
    hidden = F.relu(hidden @ second.view(7, 8).t())
    assert relative_error(graph(x), hidden @ last.view(3, 7).t()) < 1e-6


@pytest.mark.parametrize("loss", ["cross entropy", "squared", "logistic"])
def test_a_swap_lowers_the_loss_of_the_mini_batch(loss: str) -> None:
    """The paper's claim: states fixed and the step small, hallucinated (i, k) for real (j, k).

    Both edges of a target are nearly tied at the threshold, a step of SGD is taken, and where it
    swaps them, the new wiring is compared with the old one at the same, new weights. Where it does
    not, swapping against its advice must raise the loss.
    """
    target = torch.randn(8, 4)
    losses = {
        "cross entropy": lambda y: F.cross_entropy(y, target.argmax(1)),
        "squared": lambda y: F.mse_loss(y, target),
        "logistic": lambda y: F.binary_cross_entropy_with_logits(y, (target > 0).double()),
    }
    target = target.double()
    evaluate = losses[loss]
    swaps = kept = 0
    for seed in range(200):
        torch.manual_seed(seed)
        graph = NeuralGraph(Topology.layered([10, 4]), num_edges=13, node="identity").double()
        ids = torch.randperm(40)
        graph.weight.data[ids[:12]] = torch.randn(12).sign().double() * 0.5  # safely real
        graph.weight.data[ids[12:]] = 0.0  # safely hallucinated
        k = int(graph.topology.edge_index[1, ids[12]])
        same_target = graph.topology.edge_index[1, ids] == k
        pair = ids[12:][same_target[12:]][:2]
        if len(pair) < 2:
            continue
        signs = torch.randn(2).sign().double()
        graph.weight.data[pair] = signs * torch.tensor([1e-6, 1e-6 - 1e-14], dtype=torch.float64)
        x = torch.randn(8, 10, dtype=torch.float64)
        before = graph.wiring().edge_id
        assert pair[0] in before
        assert pair[1] not in before
        evaluate(graph(x)).backward()
        with torch.no_grad():
            graph.weight -= 1e-7 * graph.weight.grad
        after = graph.wiring().edge_id
        assert set(before.tolist()) ^ set(after.tolist()) <= set(pair.tolist())

        def with_edges(edge_id: Tensor, graph: NeuralGraph = graph, x: Tensor = x) -> Tensor:
            matrix = torch.zeros(40, dtype=torch.float64)
            matrix[edge_id] = graph.weight.detach()[edge_id]
            return evaluate(x @ matrix.view(4, 10).t())

        swapped = torch.where(before == pair[0], pair[1], before)
        if torch.equal(before, after):
            kept += 1
            assert with_edges(swapped) > with_edges(before)
        else:
            swaps += 1
            assert with_edges(after) < with_edges(before)
    assert min(swaps, kept) > 50


@given(st.integers(0, 999), st.data())
def test_relabelling_nodes_permutes_the_outputs_and_nothing_else(
    seed: int, data: st.DataObject
) -> None:
    torch.manual_seed(seed)
    edges = torch.tensor([[0, 0, 1, 2, 2, 3, 1, 4, 3], [2, 3, 3, 4, 5, 5, 6, 6, 4]])
    label = torch.tensor(data.draw(st.permutations(range(7))))
    inputs, outputs = [1, 0], [6, 5]

    def build(edge_index: Tensor, inputs: list[int], outputs: list[int]) -> NeuralGraph:
        topology = Topology.from_edges(edge_index, inputs, outputs)
        graph = NeuralGraph(topology, num_edges=7, node="relu")
        names = torch.tensor(topology.names)[topology.edge_index]
        with torch.no_grad():  # a weight that depends on nothing but the edge's original ends
            for i, (u, v) in enumerate(names.t().tolist()):
                graph.weight[i] = table[u, v]
        return graph

    table = torch.randn(7, 7)
    plain = build(edges, inputs, outputs)
    old, table = table, torch.empty(7, 7)
    table[label[:, None], label[None, :]] = old
    relabelled = build(label[edges], label[inputs].tolist(), label[outputs].tolist())
    x = torch.randn(3, 2)
    assert torch.allclose(plain(x), relabelled(x), atol=1e-6)
    swapped = build(label[edges], label[inputs].tolist(), label[outputs].flip(0).tolist())
    assert torch.allclose(plain(x).flip(1), swapped(x), atol=1e-6)


class Classifier(nn.Module):
    """Somebody's network with a graph inside."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.graph = NeuralGraph(
            Topology.layered([8, 12, 12, 6]), num_edges=90, stride=2, **options
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.graph(self.stem(x)).mean((2, 3)))


def test_a_deep_copy_is_independent_and_equal() -> None:
    model = Classifier()
    x = torch.randn(2, 3, 8, 8)
    twin = copy.deepcopy(model)
    assert torch.equal(model(x), twin(x))
    with torch.no_grad():
        twin.graph.weight.mul_(-1)
    assert not torch.equal(model(x), twin(x))


def test_state_dicts_hold_what_was_learned_and_the_fingerprint() -> None:
    model, other = Classifier(rule="random"), Classifier(rule="random")
    other.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model.eval()(x), other.eval()(x))
    learned = {n for n in model.state_dict() if n.startswith("graph.")} - {
        f"graph.{n}" for n, _ in model.graph.named_parameters()
    }
    others = ("graph.selector.edge_id", "graph.fingerprint")
    assert all("norm" in name or name in others for name in learned)


def test_moves_to_a_device_and_a_type(device: str) -> None:
    model = Classifier().to(device, torch.float64)
    y = model(torch.randn(2, 3, 8, 8, dtype=torch.float64, device=device))
    assert y.dtype == torch.float64
    assert y.device.type == device


def test_autocast_computes_in_bfloat16_and_keeps_weights_in_float32(device: str) -> None:
    model = Classifier().to(device)
    x = torch.randn(4, 3, 8, 8, device=device)
    exact = model(x)
    exact.square().sum().backward()
    wanted = model.graph.weight.grad.clone()
    model.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        got = model(x)
        states = model.graph(model.stem(x))
    assert states.dtype == torch.bfloat16
    got.float().square().sum().backward()
    assert model.graph.weight.grad.dtype == torch.float32
    # 8 bits of mantissa through six roundings in a row, forward and backward
    assert relative_error(got.float(), exact.detach()) < 6 * 2**-8
    assert relative_error(model.graph.weight.grad, wanted) < 12 * 2**-8


@pytest.mark.parametrize("backend", ["sparse", "dense"])
def test_compiles_as_one_piece(backend: str) -> None:
    model = Classifier(backend=backend)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    wanted = gradients(model(x), model.graph, x)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(gradients(compiled(x), model.graph, x), wanted, strict=True):
        assert relative_error(ours, theirs) < 1e-5


def test_wiring_weights_can_have_an_optimizer_group_of_their_own() -> None:
    model = Classifier()
    wiring = [m.weight for m in model.modules() if isinstance(m, NeuralGraph)]
    rest = [p for p in model.parameters() if all(p is not w for w in wiring)]
    optimizer = torch.optim.SGD([{"params": wiring, "lr": 0.0}, {"params": rest}], lr=0.1)
    before, stem = model.graph.weight.detach().clone(), model.stem.weight.detach().clone()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert torch.equal(before, model.graph.weight)
    assert not torch.equal(stem, model.stem.weight)


def test_initial_weights_are_uniform_by_the_number_of_source_nodes() -> None:
    """U(-1/sqrt(n), 1/sqrt(n)): 8 inputs and 24 hidden nodes feed others here."""
    weight = NeuralGraph(Topology.layered([8, 24, 30]), num_edges=9).weight.detach()
    bound = 32**-0.5
    assert 0.95 * bound < float(weight.abs().max()) <= bound
    assert float(weight.std()) == pytest.approx(bound / 3**0.5, rel=0.1)


class Dirac(nn.Module):
    """A node function with an initialisation of its own."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_nodes, num_nodes, 3, padding=1, groups=num_nodes, bias=False)
        nn.init.dirac_(self.conv.weight, groups=num_nodes)

    def forward(self, x: Tensor, t: float) -> Tensor:
        return self.conv(x.transpose(0, 1)).transpose(0, 1).relu_()


def test_node_functions_keep_the_weights_they_were_built_with() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20, node=Dirac)
    assert float(graph.nodes[0].conv.weight.detach().sum()) == 4.0


def test_resetting_draws_weights_wiring_and_node_functions_anew() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), rule="random", num_edges=20)
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    graph.nodes[0].norm.running_mean += 1
    graph.reset_parameters()
    after = graph.state_dict()
    for name in ("weight", "selector.edge_id", "nodes.0.conv.weight"):
        assert not torch.equal(before[name], after[name]), name
    assert float(after["nodes.0.norm.running_mean"].abs().max()) == 0.0


def test_can_be_built_without_memory_and_filled_later() -> None:
    with torch.device("meta"):
        graph = NeuralGraph(Topology.layered([4, 6, 3]), rule="random", num_edges=20)
    graph.to_empty(device="cpu").reset_parameters()
    assert bool(graph(torch.randn(2, 4, 5, 5)).isfinite().all())


def test_outputs_may_be_changed_in_place_and_inputs_are_not() -> None:
    x = torch.randn(1, 4, 5, 5)
    before = x.clone()
    for backend in ("reference", "dense", "sparse"):
        graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20, backend=backend)
        nn.Sequential(graph, nn.ReLU(inplace=True))(x).sum().backward()
        hidden = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20, node=Dirac, backend=backend)
        hidden(x).sum().backward()
        assert hidden.nodes[1].conv.weight.grad is not None
    assert torch.equal(x, before)


def test_a_graph_of_half_precision_computes_as_well_as_it_can() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20, node="relu")
    for dtype in (torch.bfloat16, torch.float16):
        narrow, x = copy.deepcopy(graph).to(dtype), torch.randn(2, 4, 5, 5).to(dtype)
        wide = copy.deepcopy(narrow).float()  # the same rounded weights, and so the same wiring
        y = narrow(x)
        assert y.dtype == dtype
        assert relative_error(y.float(), wide(x.float()).detach()) < 3 * 2**-8


def test_autocast_reaches_graphs_whose_nodes_cast_nothing() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20, node="relu")
    with torch.autocast("cpu", torch.bfloat16):
        assert graph(torch.randn(2, 4, 5, 5)).dtype == torch.bfloat16
        exact = copy.deepcopy(graph).double()
        assert exact(torch.randn(2, 4, 5, 5).double()).dtype == torch.float64


def test_a_forked_process_can_run_a_graph() -> None:
    script = """if True:
        import multiprocessing, torch
        from dnw_graph import NeuralGraph, Rule, Topology
        graph, x = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20), torch.randn(2, 4, 5, 5)
        graph.eval()
        with torch.no_grad():
            expected = graph(x).sum().item()
        def child():
            torch.set_num_threads(1)
            with torch.no_grad():
                assert abs(graph(x).sum().item() - expected) < 1e-4
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(120)
        raise SystemExit(process.exitcode)
    """
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=180
    )
    assert done.returncode == 0, done.stderr


def test_training_without_a_gradient_to_the_input_or_the_weights() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=15)
    graph.weight.requires_grad_(False)
    graph(torch.randn(2, 4, 5, 5)).sum().backward()
    assert graph.nodes[0].conv.weight.grad is not None
    assert graph.weight.grad is None


def test_parts_may_be_names_classes_or_objects() -> None:
    topology, x = Topology.layered([4, 6, 3]), torch.randn(2, 4, 5, 5)
    for parts in (
        {"rule": "dnw", "schedule": "static", "node": "norm_relu_conv", "backend": "sparse"},
        {"rule": DNW, "schedule": Static, "node": NormReluConv, "backend": Sparse},
        {"rule": DNW(), "schedule": Static(), "node": NormReluConv, "backend": Sparse()},
    ):
        torch.manual_seed(1)
        y = NeuralGraph(topology, num_edges=20, **parts)(x)
        assert y.shape == (2, 3, 5, 5)
    with pytest.raises(TypeError, match="a callable that builds one module per block"):
        NeuralGraph(topology, num_edges=20, node=NormReluConv(6))
    with pytest.raises(TypeError, match="schedule must be a name"):
        NeuralGraph(topology, num_edges=20, schedule=nn.ReLU())


def test_a_backend_of_ones_own() -> None:
    class Loud(Sparse):
        calls = 0

        def message_and_aggregate(self, *args):  # noqa: ANN002, ANN202
            type(self).calls += 1
            return super().message_and_aggregate(*args)

    assert issubclass(Loud, Backend)
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20, backend=Loud())
    graph(torch.randn(2, 4, 5, 5))
    assert Loud.calls == 2


def test_to_data_is_the_wiring() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20)
    data = graph.to_data()
    assert data.edge_index.shape == (2, 20)
    assert data.num_nodes == 13
    assert torch.equal(data.edge_weight, graph.weight.detach()[graph.wiring().edge_id])
    smallest_real = float(data.edge_weight.abs().min())
    assert int((graph.weight.abs() >= smallest_real).sum()) == 20
    assert data.role.bincount().tolist() == [4, 6, 3]
    assert data.block.bincount().tolist() == [4, 6, 3]
    data.block.zero_()
    data.edge_index.zero_()
    graph.validate()
    assert int(graph.topology.block.max()) == 2


def test_to_data_keeps_the_names_of_nodes() -> None:
    topology = Topology.from_edges([[5, 5, 3], [3, 0, 0]], inputs=[5], outputs=[0])
    data = NeuralGraph(topology, num_edges=3, node="relu").to_data()
    named = {(data.name[u], data.name[v]) for u, v in data.edge_index.t().tolist()}
    assert named == {(5, 3), (5, 0), (3, 0)}


def test_validate_names_weights_that_are_not_finite() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20)
    graph.validate()
    kept = graph.selector.rule
    graph.selector.rule = Chosen(torch.tensor([7, 5]))
    with pytest.raises(ValueError, match="ascending"):
        graph.validate()
    graph.selector.rule = kept
    graph.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match=r"1 are not, the first at weight\[7\]"):
        graph.validate()
    with pytest.raises(ValueError, match=r"weight 7 is nan"):
        graph(torch.randn(2, 4, 5, 5))


CYCLE = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 3, 1, 4]])


@pytest.mark.parametrize(
    ("edges", "inputs", "outputs", "message"),
    [
        (CYCLE, [0], [4], r"has one through nodes 1, 2, 3; remove an edge"),
        (torch.tensor([[0, 2], [1, 3]]), [0], [1, 3], r"leads from an input to output 3"),
        (torch.tensor([[0, 2, 1], [1, 0, 3]]), [0], [3], r"inputs must not have parents.*into 0;"),
    ],
)
def test_topologies_that_a_static_graph_cannot_run(
    edges: Tensor, inputs: list[int], outputs: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralGraph(Topology.from_edges(edges, inputs, outputs), num_edges=1, node="relu")


def test_inputs_come_first() -> None:
    edges, role = torch.tensor([[1], [2]]), torch.tensor([1, 0, 2])
    topology = Topology(edges, block=torch.tensor([0, 1, 2]), role=role)
    with pytest.raises(ValueError, match="blocks of the inputs must come first"):
        NeuralGraph(topology, num_edges=1, node="relu")


def test_blocks_out_of_order_are_not_called_a_cycle() -> None:
    edges, role = torch.tensor([[0, 2, 1], [2, 1, 3]]), torch.tensor([0, 1, 1, 2])
    topology = Topology(edges, block=torch.tensor([0, 1, 2, 3]), role=role, names=list("abcd"))
    with pytest.raises(ValueError, match=r"'c' -> 'b' leads from block 2 to block 1; .*from_edges"):
        NeuralGraph(topology, num_edges=1, node="relu")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 5, 8, 8), r"expected input \[B, 4, \.\.\.\].*got \[2, 5, 8, 8\]"),
        ((4,), r"expected input \[B, 4"),
        ((2, 4, 1, 8), r"1x8 pixels are too small for stride 2: pass larger images"),
        ((2, 4), r'needs feature maps \[B, C, H, W\].*node="relu"'),
    ],
)
def test_inputs_that_do_not_fit(shape: tuple[int, ...], message: str) -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20, stride=2)
    with pytest.raises(ValueError, match=message):
        graph(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"node": "relu", "stride": 2}, r"Relu supports stride 1 only, got 2"),
        (
            {"node": "norm_relu"},
            r"unknown node function 'norm_relu'.*linear, norm, norm_relu_conv",
        ),
        (
            {"schedule": "discreet"},
            r"unknown schedule 'discreet'; did you mean 'discrete'\? \(known: c",
        ),
        ({"stride": 0}, r"stride must be 1 or more, got 0"),
        ({"stride": 2.0}, r"stride must be a whole number of pixels, got 2.0"),
        ({"num_edges": 20.5}, r"num_edges must be a whole number, got 20.5"),
        ({"num_edges": True}, r"num_edges must be a whole number, got True"),
        ({"node": lambda n: None}, r"must build an nn.Module, got None"),
        ({"node": Dirac, "stride": 2}, r"cannot be called with \(4, stride=2\)"),
        ({"node": partial(NormReluConv, eps=0.0)}, r"eps must be above 0, got 0.0"),
        ({"node": lambda n: NormReluConv(n, norm="layer")}, r"unknown norm 'layer' \(known: batch"),
    ],
)
def test_errors_of_the_parts(options: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        NeuralGraph(Topology.layered([4, 6, 3]), **{"num_edges": 20, **options})


def test_a_topology_is_not_a_list() -> None:
    with pytest.raises(TypeError, match=r"must be a Topology, such as Topology.layered"):
        NeuralGraph([4, 6, 3], num_edges=20)


class Chosen(Rule):
    """Returns whatever it was given."""

    def __init__(self, chosen: Tensor) -> None:
        self.chosen = chosen

    def select(self, candidates: Candidates) -> Tensor:
        return self.chosen


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (torch.tensor([5, 3, 8]), r"ascending order without duplicates: use ids.sort\(\).values"),
        (torch.tensor([3, 3, 8]), r"ascending order"),
        (torch.tensor([-1, 3, 8]), r"edge ids from -1 to 8, but .* from 0 to 53"),
        (torch.tensor([3, 8, 54]), r"edge ids from 3 to 54"),
        (torch.ones(54, dtype=torch.bool), r"mask.nonzero\(\).flatten\(\).*got torch.bool \[54\]"),
        (torch.tensor([3, 8], dtype=torch.int32), r"int64 of shape \[k\].*got torch.int32"),
    ],
)
def test_rules_that_choose_badly(chosen: Tensor, message: str) -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), rule=Chosen(chosen), num_edges=3)
    with pytest.raises(ValueError, match=message):
        graph(torch.randn(2, 4, 5, 5))


class Returns(nn.Module):
    """Returns a part of what it is given."""

    def __init__(self, num_nodes: int, part: tuple[slice, ...]) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor, t: float) -> Tensor:
        return x[self.part]


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ((slice(0, 2),), r"block 1 must return states \[6, B, ...\] .* got \[2, 2, 5, 5\]"),
        ((slice(None), slice(0, 1)), r"must return states"),
        ((..., slice(1, 4), slice(1, 4)), r"block 0 has \[5, 5\], block 1 \[3, 3\]; only input"),
    ],
)
def test_node_functions_that_return_other_sizes(part: tuple[slice, ...], message: str) -> None:
    graph = NeuralGraph(
        Topology.layered([4, 6, 3]),
        num_edges=20,
        node=partial(Returns, part=part),
        input_node="identity",
    )
    with pytest.raises(ValueError, match=message):
        graph(torch.randn(2, 4, 5, 5))


@pytest.mark.parametrize(
    "x", [torch.ones(2, 4, 5, 5).long(), torch.ones(2, 4, 5, 5).double(), [1.0, 2.0]]
)
def test_inputs_of_another_type(x: object) -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20)
    with pytest.raises((ValueError, TypeError), match="expected"):
        graph(x)


class Doubled(nn.Module):
    """A node function that knows neither nodes nor time."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class TimedAndSized(nn.Module):
    """One that knows both, with a default for the number."""

    def __init__(self, num_nodes: int = 1) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_nodes, 1))

    def forward(self, x: Tensor, t: float) -> Tensor:
        return x + self.shift


@pytest.mark.parametrize(
    ("node", "function"),
    [
        (nn.GELU, nn.functional.gelu),
        (nn.ReLU, torch.relu),
        (nn.Tanh, torch.tanh),
        (Doubled, lambda x: 2 * x),
        (lambda _: nn.SiLU(), nn.functional.silu),
        (partial(nn.LeakyReLU, 0.5), lambda x: nn.functional.leaky_relu(x, 0.5)),
        (TimedAndSized, lambda x: x),
    ],
)
def test_modules_that_take_no_time_can_be_node_functions(node: Any, function: Any) -> None:
    torch.manual_seed(0)
    topology = Topology.layered([3, 4, 2], skip=False)
    graph = NeuralGraph(topology, rule="complete", node=node)
    x = torch.randn(5, 3)
    first, second = graph.weight.detach().split([12, 8])
    expected = function(function(x) @ first.view(4, 3).T) @ second.view(2, 4).T
    torch.testing.assert_close(graph(x), expected)
    in_time = NeuralGraph(
        Topology.complete(3, 4, 2), num_edges=20, node=node, schedule="discrete(steps=2)"
    )
    assert in_time(x).shape == (5, 2)
    assert copy.deepcopy(graph)(x).equal(graph(x))
