"""Rules that change the gradients of hallucinated edges before the optimizer reads them."""

import copy
import math
from collections.abc import Callable
from unittest import mock

import networkx as nx
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Rule, Topology, attach, edited, freeze, sparsify
from dnw_graph.wiring import Candidates, DNWFactored, top_k
from dnw_graph.wiring._factors import average_factored
from tests.conftest import ready, relative_error

TOPOLOGY = Topology.layered([6, 8, 5])


def factored(grad: np.ndarray, edge_index: np.ndarray, scale: float) -> np.ndarray:
    """The definition, an edge at a time."""
    (source, target), quiet = edge_index, 0.01
    mean = np.array([np.mean(grad[source == u] ** 2) for u in source])
    r = np.sqrt(np.maximum(mean, quiet**2 * np.mean(grad**2)))
    r[mean == 0] = np.inf
    mean = np.array([np.mean((grad / r)[target == v] ** 2) for v in target])
    c = np.sqrt(np.maximum(mean, quiet**2))
    c[mean == 0] = np.inf
    return scale * grad / r / c


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Complete blocks, any acyclic graph, and graphs with cycles."""
    kind, sizes = draw(st.sampled_from(["layered", "edges", "cyclic"])), st.integers(1, 6)
    if kind == "layered":
        return Topology.layered(draw(st.lists(sizes, min_size=2, max_size=4)))
    if kind == "cyclic":
        return Topology.complete(draw(sizes), draw(sizes), draw(sizes))
    number = draw(st.integers(3, 9))
    pairs = [(u, v) for u in range(number) for v in range(u + 1, number)]
    edges = draw(st.lists(st.sampled_from(pairs), min_size=1, unique=True))
    return Topology.from_edges(torch.tensor(edges).t(), inputs=[0], outputs=[number - 1])


@pytest.mark.parametrize("compiled", [True, False])
@given(
    topology=topologies(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    data=st.data(),
)
def test_the_average_of_factored_gradients_is_what_it_says(
    compiled: bool, topology: Topology, dtype: torch.dtype, data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    grad = torch.randn(topology.num_candidates, generator=generator, dtype=torch.float64)
    size = data.draw(st.sampled_from([1e-12, 1.0, 1e6]))
    silent = torch.rand(topology.num_nodes, generator=generator) < 0.2
    loud = 10 ** torch.randn(topology.num_nodes, generator=generator).double()
    source, target = topology.edge_index
    grad = (size * grad * loud[source]).masked_fill(silent[source] | silent[target], 0).to(dtype)
    average = torch.rand(topology.num_candidates, generator=generator).to(dtype)
    wanted = factored(grad.double().numpy(), topology.edge_index.numpy(), 0.25)
    wanted += 0.75 * average.double().numpy()
    with mock.patch("dnw_graph._jit.can_compile", return_value=compiled):
        average_factored(average, grad, topology, 0.25)
    exact = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-2}[dtype]
    error = np.abs(average.double().numpy() - wanted).max()
    assert error <= exact * np.abs(wanted).max()


def test_factored_gradients_do_not_depend_on_the_size_of_states_or_targets() -> None:
    grad = torch.randn(TOPOLOGY.num_candidates, dtype=torch.float64)
    source, target = TOPOLOGY.edge_index
    louder = grad * (1 + 9 * torch.rand(19))[source] * (1 + 9 * torch.rand(19))[target]
    # Alternating rows and columns once is not exact, but loud nodes are no longer ahead.
    before = louder.abs().log().std() - grad.abs().log().std()
    quiet, loud = (torch.zeros_like(grad) for _ in range(2))
    average_factored(quiet, grad, TOPOLOGY, 1.0)
    average_factored(loud, louder, TOPOLOGY, 1.0)
    assert before > 0.1
    assert float((loud - quiet).abs().mean()) < 0.15 * float(quiet.abs().mean())


def moved(
    weight: np.ndarray,
    raw: np.ndarray,
    mask: np.ndarray,
    topology: Topology,
    rate: float,
    average: np.ndarray | float = 0.0,
) -> np.ndarray:
    """Where hallucinated edges are after a step, in a few lines of NumPy."""
    average = 0.9 * average + 0.1 * factored(raw, topology.edge_index.numpy(), 1.0)
    return weight - rate * np.abs(weight[mask]).min() * average


@pytest.mark.parametrize("step", [0, 3])
def test_hallucinated_edges_move_by_factored_gradients_and_real_ones_by_the_optimizer(
    step: int,
) -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(TOPOLOGY, rule=DNWFactored(rate=0.3), num_edges=31, node="relu")
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    attach(graph, optimizer, total_steps=10)
    x = torch.randn(16, 6)
    for _ in range(step):
        optimizer.zero_grad()
        graph(x).square().sum().backward()
        optimizer.step()
    other = nn.Parameter(graph.weight.detach().clone())
    plain = torch.optim.SGD([other], lr=0.1, momentum=0.9, weight_decay=0.1)
    plain.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, mask = graph.weight.detach().clone(), graph.wiring().mask
    average = graph.selector.average.numpy().copy()
    assert average.any() == (step > 0)
    optimizer.zero_grad()
    graph(x).square().sum().backward()
    raw = other.grad = graph.weight.grad.clone()
    optimizer.step()
    plain.step()
    rate = 0.3 * np.cos(np.pi / 2 * step / 10)
    wanted = moved(before.numpy(), raw.numpy(), mask.numpy(), TOPOLOGY, rate, average)
    assert torch.allclose(graph.weight[~mask], torch.from_numpy(wanted).float()[~mask], atol=1e-6)
    assert torch.equal(graph.weight[mask], other[mask])
    assert torch.equal(graph.weight.grad, raw)
    state = [o.state_dict()["state"][0]["momentum_buffer"] for o in (optimizer, plain)]
    assert torch.equal(*state)


@pytest.mark.parametrize(
    "schedule", ["discrete(steps=3)", "continuous", "continuous(adjoint=True)"]
)
def test_graphs_in_time_move_likewise(schedule: str) -> None:
    """With cycles, and blocks that are not complete."""
    torch.manual_seed(0)
    edges = torch.stack([torch.arange(90) % 9, torch.arange(90) // 10]).unique(dim=1)
    kept = torch.rand(edges.shape[1]) < 0.7
    topology = Topology.from_edges(edges[:, kept], inputs=[0, 1], outputs=[8])
    graph = NeuralGraph(
        topology, rule="dnw_factored(rate=0.3)", num_edges=25, node="identity", schedule=schedule
    ).double()
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    attach(graph, optimizer, total_steps=1)
    before, mask = graph.weight.detach().clone(), graph.wiring().mask
    graph(torch.randn(7, 2).double()).square().sum().backward()
    raw = graph.weight.grad.clone()
    assert raw[~mask].any()
    optimizer.step()
    wanted = torch.from_numpy(moved(before.numpy(), raw.numpy(), mask.numpy(), topology, 0.3))
    wanted = torch.where(mask, before - 0.1 * raw, wanted)
    assert relative_error(graph.weight.detach(), wanted) < 1e-12


def test_hallucinated_weights_rest_after_a_share_of_the_training() -> None:
    graph = NeuralGraph(
        TOPOLOGY, rule="dnw_factored(until=0.5, momentum=0.0)", num_edges=31, node="relu"
    )
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.0)
    attach(graph, optimizer, total_steps=8)
    x, sizes = torch.randn(16, TOPOLOGY.num_inputs), []
    for _ in range(8):
        before = graph.weight.detach().clone()
        optimizer.zero_grad()
        graph(x).square().sum().backward()
        real = graph.wiring().mask
        theta = before[real].abs().min()
        optimizer.step()
        sizes.append(
            float(((graph.weight.detach() - before) / theta)[~real].square().mean().sqrt())
        )
    assert sizes[4:] == [0, 0, 0, 0]
    ratios = [size / sizes[0] for size in sizes[:4]]
    expected = [math.cos(math.pi / 2 * step / 4) for step in range(4)]
    assert ratios == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("channels_last", [False, True])
def test_hallucinated_weights_begin_smaller(channels_last: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 8, 3)
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    drawn = layer.weight.detach().clone()
    real = top_k(drawn.reshape(-1), 40)
    sparsify(layer, 40 / 432, rule="dnw_factored(start=0.25)")
    expected = (0.25 * drawn).reshape(-1)
    expected[real] = drawn.reshape(-1)[real]
    stored = layer.parametrizations.weight.original.detach()
    assert torch.equal(stored.reshape(-1), expected)
    assert stored.stride() == drawn.stride()


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_learns_with_it(name: str) -> None:
    """A fixed random wiring of this size stays above 0.84 of the loss at the start."""
    torch.manual_seed(0)
    topology = Topology.layered([8, 24, 24, 4])
    graph = NeuralGraph(topology, rule="dnw_factored", num_edges=120, node="relu")
    optimizer, x = OPTIMIZERS[name](graph.parameters()), torch.randn(256, 8)
    attach(graph, optimizer, total_steps=300)
    labels, first, losses = (x @ torch.randn(8, 4)).argmax(1), graph.wiring().edge_id, []
    for _ in range(300):
        optimizer.zero_grad()
        loss = F.cross_entropy(graph(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert not torch.equal(graph.wiring().validate().edge_id, first)


@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_is_followed_too(by_keyword: bool) -> None:
    """The gradient exists only once the optimizer has called it, as Lightning lets it."""
    graphs = []
    for _ in range(2):
        torch.manual_seed(0)
        graphs.append(NeuralGraph(TOPOLOGY, rule="dnw_factored", num_edges=31, node="relu"))
    x = torch.randn(16, 6)

    def closure(graph: NeuralGraph, optimizer: torch.optim.Optimizer) -> Tensor:
        optimizer.zero_grad()
        loss = graph(x).square().sum()
        loss.backward()
        return loss

    first, second = (ready(graph) for graph in graphs)
    for _ in range(3):
        closure(graphs[0], first)
        first.step()
        called = lambda: closure(graphs[1], second)  # noqa: E731
        loss = second.step(closure=called) if by_keyword else second.step(called)
        assert loss is not None
    assert torch.equal(graphs[0].weight, graphs[1].weight)


def test_removing_what_attach_did_removes_both_halves() -> None:
    graph = NeuralGraph(TOPOLOGY, rule="dnw_factored", num_edges=31, node="relu")
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    attachment = attach(graph, optimizer, total_steps=5)
    graph(torch.randn(4, 6)).square().sum().backward()
    attachment.remove()
    raw = graph.weight.grad.clone()
    optimizer.step()
    assert torch.equal(graph.weight.grad, raw)
    with pytest.raises(ValueError, match="needs to follow the steps"):
        graph(torch.randn(4, 6))
    first = attach(graph, optimizer, total_steps=5)
    with attach(graph, torch.optim.SGD(graph.parameters(), lr=0.1), total_steps=5):
        first.remove()  # is followed no longer, and leaves the second alone
        graph(torch.randn(4, 6))
    with pytest.raises(ValueError, match="needs to follow the steps"):
        graph(torch.randn(4, 6))


@pytest.mark.parametrize("unscaled", [False, True])
def test_gradients_of_fused_optimizers_have_to_be_unscaled_first(unscaled: bool) -> None:
    graph = NeuralGraph(TOPOLOGY, rule="dnw_factored", num_edges=31, node="relu")
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1, fused=True)
    attach(graph, optimizer, total_steps=5)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    scaler.scale(graph(torch.randn(16, 6)).square().sum()).backward()
    before, real = graph.weight.detach().clone(), graph.wiring().mask
    if not unscaled:
        with pytest.raises(ValueError, match=r"dnw_factored .* call scaler.unscale_\(optimizer\)"):
            scaler.step(optimizer)
        return
    scaler.unscale_(optimizer)
    raw = graph.weight.grad.clone()
    scaler.step(optimizer)
    assert torch.allclose((before - graph.weight.detach())[real], 0.1 * raw[real], atol=1e-6)


def test_statistics_may_be_recomputed_by_a_copy_that_follows_no_training() -> None:
    graph = NeuralGraph(TOPOLOGY, rule="sr_ste", num_edges=31, node="norm_relu_conv")
    loader = [torch.randn(4, 6, 5, 5)]
    averaged = torch.optim.swa_utils.AveragedModel(graph)
    torch.optim.swa_utils.update_bn(loader, averaged)
    assert averaged.module.nodes[0].norm.num_batches_tracked == 1


def test_a_pass_whose_weights_were_replaced_does_not_decide_the_next_step() -> None:
    """As where a checkpoint is loaded between a pass and a step that has its own gradient."""
    graph = NeuralGraph(TOPOLOGY, rule=Halved(), num_edges=31, node="relu")
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    attach(graph, optimizer, total_steps=5)
    graph(torch.randn(16, 6)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        graph.weight.copy_(torch.randn(TOPOLOGY.num_candidates))
    real, before = graph.wiring().mask, graph.weight.detach().clone()
    graph.weight.grad = torch.ones(TOPOLOGY.num_candidates)
    optimizer.step()
    moved = before - graph.weight.detach()
    assert torch.allclose(moved[real], torch.full([31], 0.1), atol=1e-6)
    assert torch.allclose(moved[~real], torch.full([len(moved) - 31], 0.05), atol=1e-6)


def test_a_gradient_is_never_changed_twice() -> None:
    layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    layers[2].weight = layers[0].weight
    layers = sparsify(layers, 0.5, rule=Halved())  # they share what chooses, too
    optimizer = torch.optim.SGD(layers.parameters(), lr=0.1)
    attach(layers, optimizer, total_steps=5)
    mask = layers.eval()[0].weight != 0
    layers.train()(torch.randn(8, 6)).square().sum().backward()
    weight = layers[0].parametrizations.weight.original
    raw = weight.grad.clone()
    optimizer.step()
    assert torch.allclose(weight.grad, torch.where(mask, raw, raw / 2))
    graphs = nn.ModuleList(NeuralGraph(TOPOLOGY, rule=Halved(), num_edges=31) for _ in range(2))
    graphs[1].weight = graphs[0].weight
    with pytest.raises(ValueError, match=r"0 and 1 share their weights, which rule Halved cannot"):
        attach(graphs, torch.optim.SGD(graphs.parameters(), lr=0.1), total_steps=5)


def test_exports_have_the_weights_of_a_pass() -> None:
    torch.manual_seed(0)
    graph, x = soft_graph(), torch.randn(4, 6)
    exported = graph.to_networkx()
    assert torch.allclose(edited(graph, exported)(x), graph(x), atol=1e-6)
    data = graph.to_data()
    weights = [exported.edges[edge]["weight"] for edge in data.edge_index.t().tolist()]
    assert torch.equal(torch.tensor(weights), data.edge_weight)
    assert torch.allclose(edited(graph, without_weights(exported))(x), graph(x), atol=1e-6)
    full = graph.to_networkx(candidates=True)
    trained = [full.edges[edge]["weight"] for edge in TOPOLOGY.edge_index.t().tolist()]
    assert torch.equal(torch.tensor(trained), graph.weight.detach())


def soft_graph() -> NeuralGraph:
    """In evaluation, at weights where the threshold matters."""
    graph = NeuralGraph(TOPOLOGY, rule="soft_threshold", num_edges=31, node="relu")
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    attach(graph, optimizer, total_steps=1)
    optimizer.step()
    real = graph.wiring()
    assert len(real.edge_id) == 31
    assert float((graph.weight.detach()[real.edge_id] - real.edge_weight).abs().min()) > 0.01
    return graph.eval()


def without_weights(graph: nx.DiGraph) -> nx.DiGraph:
    bare = graph.copy()
    for _, _, data in bare.edges(data=True):
        del data["weight"]
    return bare


def one_step(rule: Rule | str) -> tuple[NeuralGraph, Tensor, Tensor, Tensor]:
    """Take a step; return the graph, its weights before, and gradients before and after the rule.

    The gradient before is the loss's to all candidates, computed without the rule.
    """
    torch.manual_seed(0)
    graph = NeuralGraph(TOPOLOGY, rule=rule, num_edges=31, node="relu").double()
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    attach(graph, optimizer, total_steps=10)
    x, before = torch.randn(16, 6).double(), graph.weight.detach().clone()
    plain = NeuralGraph(TOPOLOGY, rule="dnw", num_edges=31, node="relu").double()
    plain.load_state_dict({"weight": before})
    plain(x).square().sum().backward()
    graph(x).square().sum().backward()
    optimizer.step()
    return graph, before, plain.weight.grad, graph.weight.grad


def largest(weight: Tensor, number: int) -> np.ndarray:
    """Ids of the largest magnitudes, as NumPy sorts them."""
    return np.argsort(-np.abs(weight.numpy()), kind="stable")[:number]


def test_sr_ste_lets_hallucinated_weights_decay() -> None:
    _, weight, raw, grad = one_step("sr_ste(decay=0.3)")
    wanted, real = raw.numpy() + 0.3 * weight.numpy(), largest(weight, 31)
    wanted[real] = raw.numpy()[real]
    assert np.allclose(grad.numpy(), wanted, rtol=1e-12, atol=0)


def test_top_kast_has_gradients_for_a_larger_set() -> None:
    _, weight, raw, grad = one_step("top_kast(backward=1.5, decay=0.3)")
    real, larger = largest(weight, 31), largest(weight, round(1.5 * 31))
    wanted = np.zeros(118)
    wanted[larger] = raw.numpy()[larger] + 0.3 / (31 / 118) * weight.numpy()[larger]
    wanted[real] = raw.numpy()[real] + 0.3 * weight.numpy()[real]
    assert np.allclose(grad.numpy(), wanted, rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match=r"backward must be a multiple .* 1 or more, got 0.5"):
        NeuralGraph(TOPOLOGY, rule="top_kast(backward=0.5)", num_edges=31)
    everything = one_step("top_kast(backward=100, decay=0)")
    assert relative_error(everything[3], everything[2]) < 1e-12


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("backend", ["reference", "dense", "sparse"])
def test_every_backend_gives_gradients_to_the_same_edges(backend: str, images: bool) -> None:
    """Fused and unfused paths alike, against the gradient of all candidates."""
    grads = []
    for rule, which in (("dnw", "reference"), ("top_kast", backend)):
        torch.manual_seed(0)
        graph = NeuralGraph(
            TOPOLOGY,
            rule=rule,
            num_edges=31,
            node="norm_relu_conv" if images else "relu",
            backend=which,
        ).double()
        attach(graph, torch.optim.SGD(graph.parameters(), lr=0.1), total_steps=1)
        torch.manual_seed(1)
        x = torch.randn(4, 6, *[5, 5] * images, dtype=torch.float64)
        graph(x).square().sum().backward()
        grads.append(graph.weight.grad)
    kept = torch.zeros(118, dtype=torch.bool)
    kept[largest(graph.weight.detach(), 62)] = True
    assert relative_error(grads[1], grads[0] * kept) < 1e-10
    assert not grads[1][~kept].any()


@pytest.mark.filterwarnings("ignore")  # of the compiler's own
@pytest.mark.parametrize("rule", ["top_kast", "soft_threshold", "dnw_factored", "sr_ste"])
def test_rules_that_change_a_pass_survive_compilation(rule: str) -> None:
    torch.manual_seed(0)
    plain = NeuralGraph(TOPOLOGY, rule=rule, num_edges=31, node="relu")
    compiled = copy.deepcopy(plain)
    for graph, call in ((plain, plain), (compiled, torch.compile(compiled))):
        optimizer = ready(graph, 10)
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
            call(x).square().sum().backward()
            optimizer.step()
    assert torch.allclose(plain.weight, compiled.weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("schedule", ["static", "discrete(steps=2)", "continuous(adjoint=True)"])
def test_soft_thresholds_shape_the_pass_and_gradients_pass_straight_through(schedule: str) -> None:
    torch.manual_seed(0)
    cut = NeuralGraph(
        TOPOLOGY, rule="soft_threshold(until=0.5)", num_edges=31, node="identity", schedule=schedule
    ).double()
    optimizer = torch.optim.SGD(cut.parameters(), lr=0.0)
    attach(cut, optimizer, total_steps=10)
    dense = NeuralGraph(TOPOLOGY, rule="complete", node="identity", schedule=schedule).double()
    for step in range(10):
        weight, x = cut.weight.detach(), torch.randn(5, 6).double()
        number = 31 + round(87 * max(0.0, 1 - step / 10 / 0.5) ** 3)
        order = largest(weight, 118)
        threshold = 0.0 if number == 118 else abs(float(weight[order[number]]))
        soft = np.sign(weight.numpy()) * np.maximum(np.abs(weight.numpy()) - threshold, 0)
        dense.weight.data.copy_(torch.from_numpy(soft))
        grads = []
        for graph in (cut, dense):
            graph.weight.grad = None
            graph(x).square().sum().backward()
            grads.append(graph.weight.grad)
        assert torch.allclose(cut(x), dense(x), rtol=1e-10, atol=1e-12)
        assert relative_error(grads[0], grads[1]) < 1e-8
        assert len(cut.wiring(training=True).edge_id) == number
        optimizer.step()
    assert number == 31


def test_soft_thresholds_reach_layers_and_frozen_networks() -> None:
    torch.manual_seed(0)
    layer = sparsify(nn.Linear(9, 7), 0.25, rule="soft_threshold")
    drawn = layer.parametrizations.weight.original.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(layer, optimizer, total_steps=1)
    assert torch.equal(layer.weight, drawn)  # complete at first
    optimizer.step()
    order = largest(drawn.flatten(), 63)
    threshold = abs(float(drawn.flatten()[order[16]]))
    soft = drawn.sign() * (drawn.abs() - threshold).clamp_min(0)
    assert torch.allclose(layer.weight, soft)
    assert int((layer.weight != 0).sum()) == 16
    layer.weight.sum().backward()
    assert bool((layer.parametrizations.weight.original.grad == 1).all())
    graph = NeuralGraph(TOPOLOGY, rule="soft_threshold", num_edges=31, node="norm_relu_conv")
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    attach(graph, optimizer, total_steps=1)
    optimizer.step()
    x = torch.randn(3, 6, 7, 7)
    assert torch.allclose(freeze(graph.eval())(x), graph(x), atol=1e-5)


class Shrunk(Rule):
    """Has gradients for the even candidates only, and weights of half the size in a pass."""

    def select(self, candidates: Candidates) -> Tensor:
        return top_k(candidates.weight, candidates.num_edges)

    def gradient_edges(self, candidates: Candidates, edge_id: Tensor) -> Tensor:
        return torch.arange(0, len(candidates.weight), 2)

    def edge_weight(self, candidates: Candidates, edge_id: Tensor) -> Tensor:
        return candidates.weight[edge_id] / 2


class ShrunkReal(Shrunk):
    """Likewise, with gradients for real edges only."""

    def straight_through(self, progress: object) -> bool:
        return False

    def gradient_edges(self, candidates: Candidates, edge_id: Tensor) -> None:
        return None


@pytest.mark.parametrize("rule", [Shrunk, ShrunkReal])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_layer_has_the_weights_and_gradients_that_its_rule_says(
    rule: type[Rule], memory_format: torch.memory_format
) -> None:
    layer = nn.Conv2d(4, 6, 3).to(memory_format=memory_format)
    plain = layer.weight.detach().clone()
    sparsify(layer, 0.25, rule=rule)
    real = top_k(plain.reshape(-1), 54)
    wanted = torch.zeros(216)
    wanted[real] = plain.reshape(-1)[real] / 2
    weight = layer.weight
    assert weight.is_contiguous(memory_format=memory_format)
    assert torch.allclose(weight.reshape(-1), wanted, atol=1e-7)
    assert int((weight != 0).sum()) == 54
    weight.sum().backward()
    passes = torch.zeros(216)
    passes[real if rule is ShrunkReal else slice(0, None, 2)] = 1
    grad = layer.parametrizations.weight.original.grad
    assert torch.equal(grad.reshape(-1), passes)


@pytest.mark.parametrize("channels_last", [False, True])
def test_layers_move_likewise(channels_last: bool) -> None:
    """Sources are input channels times places in the filter."""
    torch.manual_seed(0)
    layer = sparsify(nn.Conv2d(4, 6, 3, bias=False), 0.2, rule="dnw_factored(rate=0.3)")
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    attach(layer, optimizer, total_steps=5)
    weight, mask = layer.parametrizations.weight.original, layer.eval().weight != 0
    before = weight.detach().clone()
    layer.train()(torch.randn(2, 4, 5, 5)).square().sum().backward()
    raw = weight.grad.clone()
    optimizer.step()
    flat = [x.reshape(-1).numpy() for x in (before, raw, mask)]
    wanted = torch.from_numpy(moved(*flat, Topology.bipartite(36, 6), 0.3)).view(6, 4, 3, 3)
    wanted = torch.where(mask, before - raw, wanted.float())
    assert torch.allclose(weight.detach(), wanted, atol=1e-5)
    assert weight.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


class Halved(Rule):
    """Lets hallucinated edges learn at half the speed."""

    def select(self, candidates: Candidates) -> Tensor:
        return top_k(candidates.weight, candidates.num_edges)

    def before_step(self, candidates: Candidates, grad: Tensor, edge_id: Tensor) -> None:
        real = grad[edge_id]
        grad.mul_(0.5)
        grad[edge_id] = real


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_rule_of_ones_own_may_change_gradients(channels_last: bool) -> None:
    layer = sparsify(nn.Conv2d(4, 6, 3), 0.2, rule=Halved())
    if channels_last:
        layer = layer.to(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match=r"Halved needs to follow .* call dnw_graph.attach"):
        layer(torch.randn(2, 4, 5, 5))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    attach(layer, optimizer, total_steps=5)
    weight, mask = layer.parametrizations.weight.original, layer.eval().weight != 0
    layer.train()(torch.randn(2, 4, 5, 5)).square().sum().backward()
    raw, before = weight.grad.clone(), weight.detach().clone()
    optimizer.step()
    assert torch.allclose(before - weight.detach(), torch.where(mask, raw, raw / 2), atol=1e-6)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"rate": 0.0}, "rate must be above 0, got 0.0"),
        ({"rate": float("nan")}, "rate must be above 0, got nan"),
        ({"momentum": 1.0}, "momentum must be 0 or more and below 1, got 1.0"),
        ({"start": 1.5}, "start must be between 0 and 1, got 1.5"),
        ({"until": 0.0}, "until must be a share of the training run, above 0 to 1, got 0.0"),
    ],
)
def test_arguments_are_checked(argument: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DNWFactored(**argument)
