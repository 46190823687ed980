"""Discrete and continuous time."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology
from dnw_graph.node import NODES, Norm, NormReluConv
from dnw_graph.schedule import Continuous, Discrete, Schedule, outputs_of, parts_of
from tests.conftest import relative_error

INSTANCE = partial(NormReluConv, norm="instance")
CYCLE = Topology.from_edges(
    [[0, 1, 2, 3, 4, 4, 2, 3], [2, 3, 3, 4, 2, 0, 5, 5]], inputs=[0, 1], outputs=[5]
)


def dense(graph: NeuralGraph) -> Tensor:
    """Return the real weights as a matrix ``[V, V]``, targets in rows."""
    wiring, size = graph.wiring(), graph.topology.num_nodes
    source, target = wiring.edge_index
    ids = torch.arange(len(wiring.edge_id))
    assert len(ids) == graph.num_edges
    matrix = graph.weight.new_zeros(size, size)
    return matrix.index_put((target, source), graph.weight[wiring.edge_id])


def test_a_perceptron_takes_as_many_steps_as_it_has_layers() -> None:
    topology = Topology.layered([4, 6, 3], skip=False)
    graph = NeuralGraph(topology, rule="complete", node="relu", schedule="discrete(steps=2)")
    x = torch.randn(5, 4)
    first, second = graph.weight.split([24, 18])
    expected = (x @ first.view(6, 4).t()).relu() @ second.view(3, 6).t()
    assert torch.allclose(graph(x), expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "sparse", "auto"])
def test_cyclic_graphs_follow_the_equation(backend: str) -> None:
    options: dict[str, Any] = {"num_edges": 6, "node": "relu", "backend": backend}
    graph = NeuralGraph(CYCLE, schedule="discrete(steps=4)", **options)
    x = torch.randn(3, 2)
    z, matrix = torch.zeros(6, 3), dense(graph)
    z[:2] = x.t()
    for _ in range(4):
        total = matrix @ z
        z = torch.cat([total[:5].relu(), total[5:]])
    assert torch.allclose(graph(x), z[5:].t(), atol=1e-6)
    graph(x).sum().backward()
    assert graph.weight.grad is not None


def test_input_may_be_held_or_new_at_every_step() -> None:
    options: dict[str, Any] = {"num_edges": 7, "node": "relu", "output_node": "relu"}
    held = NeuralGraph(CYCLE, schedule=Discrete(3, input="held", read="every"), **options)
    new = NeuralGraph(CYCLE, schedule=Discrete(3, input="new", read="every"), **options)
    new.load_state_dict(held.state_dict())
    frames = torch.randn(3, 4, 2)  # B, T, inputs

    def by_hand(frames: list[Tensor | None]) -> Tensor:
        drive = [torch.zeros(6, 3) for _ in range(4)]
        for t, frame in enumerate(frames):
            if frame is not None:
                drive[t][:2] = frame.t()
        z, seen = drive[0].relu(), []
        for t in range(3):
            z = (dense(held) @ z + drive[t + 1]).relu()
            seen.append(z[5:].t())
        return torch.stack(seen, dim=1)

    assert torch.allclose(held(frames[:, 0]), by_hand([frames[:, 0]] * 4), atol=1e-6)
    assert torch.allclose(new(frames), by_hand(list(frames.unbind(1))), atol=1e-6)
    short = by_hand([frames[:, 0], frames[:, 1]])
    assert torch.allclose(new(frames[:, :2]), short, atol=1e-6)
    assert new(frames).shape == (3, 3, 1)


@pytest.mark.parametrize("rule", ["dnw", "random"])
def test_held_inputs_and_enough_steps_are_a_static_graph(rule: str) -> None:
    topology = Topology.layered([4, 6, 5, 7, 3])
    options: dict[str, Any] = {"num_edges": 60, "rule": rule, "node": INSTANCE}
    static = NeuralGraph(topology, **options)
    discrete = NeuralGraph(topology, schedule=Discrete(topology.depth, input="held"), **options)
    discrete.load_state_dict(static.state_dict())
    x = torch.randn(3, 4, 6, 6)
    grads = []
    for graph in (static, discrete):
        y = graph(x)
        y.square().sum().backward()
        parts: dict[str, list[Tensor]] = {}
        for name, parameter in graph.named_parameters():
            assert parameter.grad is not None
            parts.setdefault(name.split(".", 2)[-1], []).append(parameter.grad)
        grads.append({name: torch.cat(grad) for name, grad in parts.items()})
    assert relative_error(discrete(x), static(x)) < 1e-5
    for name, grad in grads[0].items():
        assert relative_error(grads[1][name], grad) < 1e-4, name


def test_strides_are_padded_back_to_the_size_of_the_states() -> None:
    topology = Topology.layered([2, 3, 2])
    graph = NeuralGraph(
        topology, rule="complete", node=INSTANCE, stride=2, schedule=Discrete(2, input="held")
    )
    first = graph.nodes[0]
    seen: list[Tensor] = []
    graph.nodes[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    x = torch.randn(3, 2, 6, 6)
    assert graph(x).shape == (3, 2, 6, 6)
    small = first(x.transpose(0, 1))
    assert small.shape[2:] == (3, 3)
    whole = nn.functional.pad(small, (0, 3, 0, 3))
    weight = graph.weight[:6].view(3, 2)
    assert torch.allclose(seen[0], torch.einsum("vu,ubhw->vbhw", weight, whole), atol=1e-5)


def test_there_may_be_a_norm_for_each_step() -> None:
    node = partial(NormReluConv, norm="batch", steps=3)
    graph = NeuralGraph(CYCLE, num_edges=7, node=node, schedule="discrete(steps=3)")
    graph(torch.randn(4, 2, 5, 5) + 2).square().mean().backward()
    norms = graph.nodes[1].norm
    assert len(norms) == 3
    assert all(int(norm.num_batches_tracked) == 1 for norm in norms)
    means = [norm.running_mean for norm in norms]
    assert not torch.allclose(means[1], means[2])
    # What hidden nodes are after the last step is not read.
    assert [norm.weight.grad is not None for norm in norms] == [True, True, False]


@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize("training", [True, False])
def test_norm_and_relu_conv_are_norm_relu_conv_in_two(kind: str, training: bool) -> None:
    topology = Topology.layered([3, 5, 2])
    together = NeuralGraph(
        topology, num_edges=12, node=partial(NormReluConv, norm=kind), input_node="identity"
    ).train(training)
    apart = NeuralGraph(
        topology,
        num_edges=12,
        node=partial(Norm, norm=kind),
        input_node="identity",
        message="relu_conv",
    ).train(training)
    apart.weight.data.copy_(together.weight)
    apart.messages[1].conv.weight.data.copy_(together.nodes[1].conv.weight)
    with torch.no_grad():  # the inputs' messages are relu_conv too; let these pass through
        apart.messages[0].conv.weight.zero_()[:, :, 1, 1] = 1
    x = torch.rand(4, 3, 6, 5)
    for graph in (together, apart):
        graph(x).square().sum().backward()
    assert relative_error(apart(x), together(x)) < 1e-5
    ours, theirs = apart.messages[1].conv.weight.grad, together.nodes[1].conv.weight.grad
    assert relative_error(ours, theirs) < 1e-4
    ours, theirs = apart.nodes[1].norm.weight.grad, together.nodes[1].norm.weight.grad
    assert relative_error(ours, theirs) < 1e-4
    assert relative_error(apart.weight.grad, together.weight.grad) < 1e-4


class TanhConv(nn.Module):
    """Smooth, as an accurate adjoint needs it: kinks as of ReLU cost it three digits."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_nodes, num_nodes, 3, padding=1, groups=num_nodes)

    def forward(self, x: Tensor, t: float) -> Tensor:
        return self.conv(x.tanh().transpose(0, 1)).transpose(0, 1)


SMOOTH: dict[str, Any] = {"node": partial(Norm, norm="instance", eps=1.0), "message": TanhConv}
PAPER: dict[str, Any] = {"node": partial(Norm, norm="instance"), "message": "relu_conv"}


def continuous(schedule: Continuous, rule: str = "dnw", **options: Any) -> NeuralGraph:
    torch.manual_seed(0)
    topology = Topology.from_edges(
        torch.cartesian_prod(torch.arange(9), torch.arange(9)).t(), inputs=range(3), outputs=[7, 8]
    )
    return NeuralGraph(
        topology, num_edges=30, rule=rule, schedule=schedule, **{**PAPER, **options}
    ).double()


@pytest.mark.parametrize("rule", ["dnw", "random"])
def test_adjoint_and_direct_gradients_agree(rule: str) -> None:
    x, found = torch.randn(2, 3, 5, 5, dtype=torch.float64), []
    for adjoint in (False, True):
        graph = continuous(Continuous(rtol=1e-7, atol=1e-7, adjoint=adjoint), rule, **SMOOTH)
        graph(x).square().sum().backward()
        found.append({n: p.grad for n, p in graph.named_parameters()})
        assert graph.evaluations["forward"] > 10
        assert (graph.evaluations["backward"] > 10) == adjoint
    real = continuous(Continuous(), rule, **SMOOTH).wiring().mask
    direct, adjoint_ = (grads["weight"] for grads in found)
    assert relative_error(adjoint_[real], direct[real]) < 1e-4
    assert bool(direct[~real].any()) == (rule == "dnw")
    assert relative_error(adjoint_[~real], direct[~real]) < 1e-4
    for name, grad in found[0].items():
        assert relative_error(found[1][name], grad) < 1e-4, name


@pytest.mark.parametrize(
    "options",
    [
        {"node": partial(Norm, norm="instance", eps=1e-3)},
        {"node": partial(NormReluConv, norm="instance", eps=1e-3), "message": "identity"},
    ],
)
def test_tolerances_hold(options: dict[str, Any]) -> None:
    def output(tolerance: float) -> Tensor:
        return continuous(Continuous(rtol=tolerance, atol=tolerance), **options)(x)

    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    rough, fine = output(1e-3), output(1e-7)
    assert 1e-6 < relative_error(rough, fine) < 1e-2


def test_solvers_with_a_fixed_step() -> None:
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    fine = continuous(Continuous(rtol=1e-7, atol=1e-7), **SMOOTH)(x)
    euler = continuous(Continuous(method="euler", step_size=0.25), **SMOOTH)
    y = euler(x)
    assert euler.evaluations == {"forward": 4, "backward": 0}
    assert 1e-3 < relative_error(y, fine) < 1


def test_continuous_time_equals_the_matrix_exponential() -> None:
    graph = NeuralGraph(
        CYCLE, num_edges=6, node="identity", schedule=Continuous(rtol=1e-7, atol=1e-7, t1=2.0)
    ).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    start = torch.zeros(6, 3, dtype=torch.float64)
    start[:2] = x.t()
    expected = torch.linalg.matrix_exp(2 * dense(graph)) @ start
    assert torch.allclose(graph(x), expected[5:].t(), atol=1e-5)


def test_continuous_time_is_float32_inside_autocast() -> None:
    graph = continuous(Continuous()).float()
    x = torch.randn(2, 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = graph(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, graph(x))


@pytest.mark.parametrize(("rtol", "atol", "looser"), [(1e-9, 1e-12, "rtol"), (1e-12, 1e-9, "atol")])
def test_too_many_evaluations_say_what_to_loosen(rtol: float, atol: float, looser: str) -> None:
    graph = continuous(Continuous(rtol=rtol, atol=atol, max_evaluations=20))
    message = rf"more than 20 evaluations \(forward, .*loosen {looser}, now 1e-09.*max_evaluations"
    with pytest.raises(ValueError, match=message):
        graph(torch.randn(2, 3, 5, 5, dtype=torch.float64))
    graph = continuous(Continuous(adjoint=True))
    y = graph(torch.randn(2, 3, 5, 5, dtype=torch.float64)).sum()
    graph.schedule.max_evaluations = 8
    with pytest.raises(ValueError, match=r"more than 8 evaluations \(backward"):
        y.backward()


def test_steps_after_which_nothing_of_the_input_is_left_are_an_error() -> None:
    topology = Topology.layered([2, 3, 3, 1])
    for steps in (1, 2, 3):
        NeuralGraph(topology, num_edges=20, node="relu", schedule=f"discrete(steps={steps})")
    message = (
        r"after 4 steps no information from the input remains at output 8: .* no path .* 4 edges"
    )
    with pytest.raises(ValueError, match=message):
        NeuralGraph(topology, num_edges=20, node="relu", schedule="discrete(steps=4)")
    for words in ("input='held'", "read='every'"):
        schedule = f"discrete(steps=4, {words})"
        graph = NeuralGraph(topology, rule="complete", node="identity", schedule=schedule)
        assert graph(torch.randn(2, 2)).any()
    new = NeuralGraph(
        topology, rule="complete", node="identity", schedule="discrete(steps=6, input='new')"
    )
    assert new(torch.randn(2, 5, 2)).any()
    with pytest.raises(ValueError, match=r"a sequence of 3 frames remains .*pass steps=5, or"):
        new(torch.randn(2, 3, 2))
    loops = Topology.recurrent(2, 3, 1)
    assert torch.equal(loops.walks_from_inputs(50), torch.arange(2, 6))
    assert loops.walks_from_inputs(0).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("method='scipy_solver'", r"loses gradients: pass adjoint=True"),
        ("step_size=0.1", r"with method 'dopri5': .*step_size"),
        ("adjoint='no'", r"adjoint must be True or False, got 'no'"),
        ("max_evaluations=2.5", r"max_evaluations must be a whole number, got 2.5"),
        ("rectified=True, adjoint=True", r"changes states in place, which the adjoint"),
    ],
)
def test_arguments_of_continuous_time(words: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralGraph(Topology.layered([2, 1]), num_edges=1, schedule=f"continuous({words})")


def test_states_clipped_where_the_graph_is_evaluated() -> None:
    """Euler's method by hand: each evaluation clips what the solver goes on from."""
    torch.manual_seed(0)
    topology = Topology.complete(2, 3, 1)
    schedule = "continuous(method='euler', step_size=0.25, rectified=True)"
    graph = NeuralGraph(topology, num_edges=20, node="identity", schedule=schedule)
    weight = torch.zeros(6, 6)
    real = graph.wiring()
    weight[tuple(real.edge_index.flip(0))] = real.edge_weight.detach()
    x = torch.randn(4, 2)
    z = torch.cat([x, torch.zeros(4, 4)], 1).t()
    for _ in range(4):
        z = z.clamp_min(0)
        z = z + 0.25 * weight @ z
    assert torch.allclose(graph(x), z[5:].t(), atol=1e-6)
    graph(x).sum().backward()
    assert graph.weight.grad.any()


def test_no_images_in_continuous_time() -> None:
    graph = NeuralGraph(Topology.layered([2, 1]), num_edges=1, schedule="continuous")
    assert graph(torch.zeros(0, 2, 4, 4)).shape == (0, 1, 4, 4)


@pytest.mark.parametrize("node", ["norm_relu_conv", "relu"])
def test_outputs_may_feed_outputs(node: str) -> None:
    topology = Topology.from_edges([[0, 0, 1, 1, 4, 2], [2, 4, 2, 5, 5, 3]], [0, 1], [5, 4])
    fast, slow = (
        NeuralGraph(topology, rule="complete", node=node, backend=backend)
        for backend in ("auto", "reference")
    )
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(3, 2, 5, 5)
    assert torch.allclose(fast(x), slow(x), atol=1e-6)
    assert torch.allclose(fast(x)[:, 0].sum(), slow(x)[:, 0].sum(), atol=1e-5)


IN_TIME: list[Any] = [
    "discrete(steps=3)",
    "discrete(steps=3, input='held')",
    "discrete(steps=3, input='new', read='every')",
    "continuous",
    "continuous(adjoint=True)",
]


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("node", [*NODES])
@pytest.mark.parametrize("schedule", ["static", *IN_TIME])
def test_relabelling_nodes_permutes_the_outputs_and_nothing_else(
    schedule: str, node: str, data: st.DataObject
) -> None:
    size = data.draw(st.integers(5, 9), label="nodes")
    if schedule == "static":  # no cycle, nothing into inputs
        pairs = st.tuples(st.integers(0, size - 2), st.integers(2, size - 1))
        pairs = pairs.filter(lambda pair: pair[0] < pair[1])
    else:
        pairs = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))
    edges = data.draw(st.lists(pairs, min_size=4, max_size=30, unique=True), label="edges")
    staying = [] if schedule == "static" else [(0, 0), (1, 1)]  # so that inputs last
    edges = sorted({*edges, (0, size - 1), (1, size - 2), *staying})
    number = data.draw(st.permutations(range(size)), label="new numbers")
    inputs, outputs = [0, 1], [size - 1, size - 2]
    one = Topology.from_edges(torch.tensor(edges).t(), inputs, outputs, num_nodes=size)
    moved = [(number[u], number[v]) for u, v in edges]
    other = Topology.from_edges(
        torch.tensor(moved).t(),
        [number[v] for v in inputs],
        [number[v] for v in outputs],
        num_nodes=size,
    )
    options = {"num_edges": max(2, len(edges) // 2), "node": node, "schedule": schedule}
    a, b = (NeuralGraph(t, **options).double() for t in (one, other))
    of_nodes: dict[tuple[Any, str], Tensor] = {}  # what node functions hold, by name of the node
    for graph, name_of in ((a, number), (b, range(size))):
        for block, function in zip(graph.topology.blocks, graph.nodes, strict=True):
            names = [graph.topology.names[v] for v in block.nodes]
            for key, values in function.named_parameters():
                for name, value in zip(names, values.data, strict=True):
                    value.copy_(of_nodes.setdefault((name_of[name], key), torch.randn_like(value)))

    def by_name(graph: NeuralGraph) -> dict[tuple[int, int], int]:
        names = graph.topology.names
        return {
            (names[u], names[v]): i
            for i, (u, v) in enumerate(graph.topology.edge_index.t().tolist())
        }

    ours, theirs = by_name(a), by_name(b)
    with torch.no_grad():
        for u, v in edges:
            b.weight[theirs[number[u], number[v]]] = a.weight[ours[u, v]]
    shape = [2, 4, 2] if "new" in schedule else [2, 2]
    x = torch.randn(*shape, *([3, 3] if "conv" in node or "norm" in node else []))
    for training in (True, False):
        ours, theirs = (graph.train(training)(x.double()) for graph in (a, b))
        assert relative_error(ours, theirs) < 1e-9


def test_copies_and_checkpoints_of_graphs_in_time() -> None:
    graph = continuous(Continuous())
    other = copy.deepcopy(graph)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert torch.equal(graph(x), other(x))


LOST = Topology.from_edges([[0, 2, 3], [2, 0, 1]], inputs=[0], outputs=[1])
FAR = Topology.from_edges([[0, 1, 2], [1, 2, 3]], inputs=[0], outputs=[3])


@pytest.mark.parametrize(
    ("topology", "schedule", "message"),
    [
        (LOST, "discrete", r"no path of candidate edges leads from an input to output 1; add"),
        (LOST, "continuous", r"no path of candidate edges leads from an input to output 1; add"),
        (FAR, "discrete(steps=2)", r"in 2 steps nothing reaches output 3 .*pass steps=3 or more"),
        (FAR, "discrete(steps=0)", r"steps must be a whole number, 1 or more, got 0"),
        (FAR, "discrete(input='begin')", r"unknown input 'begin' \(known: start, held, new\)"),
        (FAR, "discrete(read='never')", r"unknown read 'never' \(known: end, every\)"),
        (FAR, "continuous(rtol=0)", r"rtol must be a number above 0, got 0"),
        (FAR, "continuous(t1=-1)", r"t1 must be a number above 0, got -1"),
        (FAR, "continuous(method='dopri6')", r"method 'dopri6': .*dopri5"),
        (CYCLE, "static", r"a static graph must not have a cycle, .* through nodes"),
    ],
)
def test_errors(topology: Topology, schedule: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralGraph(topology, num_edges=2, node="relu", schedule=schedule)


def test_a_solver_that_is_lost_says_so() -> None:
    graph = continuous(Continuous())
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"solver cannot continue \(.*lower the learning rate"):
        graph(x.fill_(float("nan")))


def test_errors_of_a_pass() -> None:
    new = NeuralGraph(FAR, num_edges=3, node="relu", schedule="discrete(steps=3, input='new')")
    with pytest.raises(
        ValueError, match=r"sequence of 5 frames does not fit in 3 steps; pass steps=4"
    ):
        new(torch.randn(2, 5, 1))
    with pytest.raises(ValueError, match=r"expected input \[B, T, 1, ...\], .* got \[2, 1\]"):
        new(torch.randn(2, 1))

    class Grow(nn.Module):
        def forward(self, x: Tensor, t: float) -> Tensor:
            return nn.functional.pad(x, (0, 1))

    grown = NeuralGraph(FAR, num_edges=3, node=lambda n: Grow(), schedule="discrete(steps=3)")
    with pytest.raises(
        ValueError, match=r"must not enlarge feature maps: expected at most \[4\] pixels"
    ):
        grown(torch.randn(2, 1, 4))


class Returns(Schedule):
    """A schedule that returns what a function makes of a pass."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def check(self, topology: Topology) -> None:
        pass

    def run(self, forward_pass: Any, frames: Any) -> Any:
        return self.function(forward_pass, forward_pass.topology.blocks, frames[0])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda f, b, x: x, r"run of schedule Returns must return a list .* \[2, B.*got Tensor"),
        (lambda f, b, x: [], r"one tensor, got a list of 0"),
        (lambda f, b, x: [x], r"one tensor, got \[\[3, 5\]\]"),
        (lambda f, b, x: [x[:2], x[:2]], r"one tensor, got a list of 2"),
        (lambda f, b, x: [None], r"one tensor, got a list of NoneType"),
        (
            lambda f, b, x: [f.aggregator()(b[2], [x])],
            r"block 2 is fed by blocks \[0, 1\].*got \[3\]",
        ),
        (lambda f, b, x: [f.fire(b[1], x, 0)], r"block 1 has 4 nodes, but the schedule passes \[3"),
        (lambda f, b, x: parts_of(f.topology, x.t()), r"expected inputs \[3, B, ...\], got \[5, 3"),
        (lambda f, b, x: outputs_of(f.topology, [x]), r"states of each of the 3 blocks, got 1"),
    ],
)
def test_a_schedule_of_ones_own_is_told_what_is_wrong(function: Any, message: str) -> None:
    topology = Topology.layered([3, 4, 2])
    graph = NeuralGraph(topology, rule="complete", schedule=Returns(function))
    with pytest.raises(ValueError, match=message):
        graph(torch.randn(5, 3))
