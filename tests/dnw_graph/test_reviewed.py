"""What was wrong when somebody built wirings from the documentation alone."""

import copy

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GCN

from dnw_graph import (
    NeuralGraph,
    Topology,
    edited,
    freeze,
    freeze_graphs,
    frozen,
    save_frozen,
    sparsify,
)
from dnw_graph.analysis import measure
from dnw_graph.node import Formula

LAYERS = Topology.layered([4, 8, 3])


class Shifted(nn.Module):
    """Takes inputs only, and says what it computes and how large its states are."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.gain = 1.5

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()

    def formula(self, t: float) -> Formula:
        return Formula(relu=True)


@pytest.mark.parametrize("node", [Shifted, nn.ReLU, nn.Identity])
def test_functions_of_inputs_alone_are_frozen(node: type[nn.Module]) -> None:
    graph = NeuralGraph(LAYERS, rule="complete", node=node).eval()
    x = torch.randn(5, 4)
    torch.testing.assert_close(freeze(graph)(x), graph(x))


@pytest.mark.parametrize("node", ["gelu", "tanh", nn.ELU])
def test_what_cannot_be_frozen_is_named(node: str) -> None:
    graph = NeuralGraph(LAYERS, rule="complete", node=node)
    name = {"gelu": "Gelu", "tanh": "Tanh"}.get(node, "ELU")
    with pytest.raises(ValueError, match=f"does not support the node function {name}: expected"):
        freeze(graph)


def test_the_gain_counts_whether_or_not_a_function_takes_the_time() -> None:
    class InTime(Shifted):
        def forward(self, x: Tensor, t: float) -> Tensor:  # type: ignore[override]
            return x.relu()

    one, other = (NeuralGraph(LAYERS, rule="complete", node=n) for n in (Shifted, InTime))
    assert torch.equal(one.bounds(), other.bounds())


def test_arguments_with_defaults_are_not_the_number_of_nodes() -> None:
    class Swish(nn.Module):
        def __init__(self, beta: float = 1.0) -> None:
            super().__init__()
            self.beta = beta

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.beta * x)

    class Counting(Swish):
        def __init__(self, num_nodes: int = 1) -> None:
            super().__init__(float(num_nodes))

    graph = NeuralGraph(LAYERS, rule="complete", node=Swish)
    assert [node.function.beta for node in list(graph.nodes)[:2]] == [1.0, 1.0]
    graph = NeuralGraph(LAYERS, rule="complete", node=Counting)
    assert [node.function.beta for node in list(graph.nodes)[:2]] == [4.0, 8.0]


def sequences(read: str = "end") -> NeuralGraph:
    schedule = f"discrete(steps=7, input='new', read={read!r})"
    topology = Topology.recurrent(4, 12, 3)
    return NeuralGraph(topology, num_edges=120, node="relu", schedule=schedule).eval()


@pytest.mark.parametrize(
    "lengths", [[-1, 5], [0, 5], [9, 5], [2.5, 5.0], 5, [True, True], [5], [5, 5, 5]]
)
def test_frozen_sequences_check_lengths_as_the_graph_does(lengths: object) -> None:
    graph, x = sequences(), torch.randn(2, 8, 4)
    for network in (graph, freeze(graph)):
        with pytest.raises(ValueError, match=r"lengths must be whole numbers \[2\] from 1 to 8"):
            network(x, lengths=torch.tensor(lengths))


def test_frozen_sequences_check_frames_channels_and_states() -> None:
    network = freeze(sequences())
    with pytest.raises(ValueError, match="sequence of 10 frames does not fit in 7 steps"):
        network(torch.randn(2, 10, 4))
    for shape in ((2, 8, 5), (2, 0, 4), (2, 8)):
        with pytest.raises(ValueError, match=r"expected input \[B, T, 4, ...\]"):
            network(torch.randn(shape))
    x = torch.randn(2, 8, 4)
    (layer,) = network
    state = layer.initial_state(x)
    for wrong in (state.states, layer.initial_state(x[:1])):
        with pytest.raises(ValueError, match="expected a state returned by an earlier call"):
            network(x, wrong)


@pytest.mark.parametrize("read", ["end", "every"])
def test_frozen_sequences_are_exported(read: str) -> None:
    network = freeze(sequences(read))
    program = frozen.to_exported(network, torch.randn(5, 8, 4)).module()
    x = torch.randn(3, 8, 4)
    torch.testing.assert_close(program(x), network(x))


def test_a_message_that_nobody_sends_is_not_in_the_way() -> None:
    graph = NeuralGraph(
        LAYERS,
        rule="complete",
        node="relu",
        output_node="relu_conv",
        message="relu",
        schedule="discrete(steps=2, input='held')",
    ).eval()
    x = torch.randn(2, 4, 6, 6)
    torch.testing.assert_close(freeze(graph)(x), graph(x))


def test_a_wiring_without_choice_is_not_compared_with_itself_unsaid() -> None:
    graph = NeuralGraph(LAYERS, rule="complete", node="relu")
    with pytest.warns(UserWarning, match="every candidate is real"):
        measure(graph, random=2)


def test_channels_are_given_to_all_or_none() -> None:
    graph = nx.DiGraph([("a", "c"), ("b", "c")])
    graph.nodes["a"].update(role="input", channel=1)
    graph.nodes["b"]["role"], graph.nodes["c"]["role"] = "input", "output"
    with pytest.raises(ValueError, match=r"nodes \['b'\] have no channel, but others have"):
        Topology.from_networkx(graph)


def test_errors_say_what_to_do() -> None:
    graph = NeuralGraph(LAYERS, rule="complete", node="relu")
    with pytest.raises(ValueError, match=r"graphs that are not frozen: pass freeze\(model\)"):
        frozen.to_onnx(graph, torch.randn(2, 4), "never.onnx")
    with pytest.raises(ValueError, match=r"type torch.float32, got torch.float64"):
        freeze(graph)(torch.randn(2, 4).double())
    with pytest.raises(TypeError, match=r"expected a FrozenModel, as freeze\(\) returns"):
        save_frozen(freeze_graphs(nn.Sequential(graph)), "never.safetensors")
    with pytest.raises(TypeError, match=r"hidden must be a whole number of nodes, got 3\.5"):
        Topology.recurrent(2, 3.5, 1)
    for bound in (float("inf"), 1e39, None, "large"):
        with pytest.raises(ValueError, match="init must return a finite bound"):
            NeuralGraph(LAYERS, rule="complete", node="relu", init=lambda _, b=bound: b)


@pytest.mark.parametrize("read", ["end", "every"])
def test_frames_after_all_sequences_have_ended_do_not_count(read: str) -> None:
    schedule = f"discrete(steps=9, input='new', read={read!r})"
    topology = Topology.recurrent(3, 8, 2)
    graph = NeuralGraph(topology, rule="complete", node="norm", schedule=schedule)
    twin = copy.deepcopy(graph)
    x, lengths = torch.randn(4, 5, 3, 6, 6), torch.tensor([5, 3, 3, 3])
    longer = torch.cat([x, torch.randn(4, 3, 3, 6, 6)], 1)
    y, state = graph(x, graph.initial_state(x), lengths=lengths)
    z, after = twin(longer, twin.initial_state(x), lengths=lengths)
    torch.testing.assert_close(z if read == "end" else z[:, :5], y)
    torch.testing.assert_close(after.states, state.states)
    for name, value in graph.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value)


def test_types_that_do_not_fit_are_named() -> None:
    with pytest.raises(TypeError, match=r"or a networkx\.DiGraph, got Topology"):
        measure(LAYERS)
    graph = sequences()
    x = torch.randn(2, 8, 4)
    state = graph.initial_state(x)
    with pytest.raises(ValueError, match=r"states \[2, 19\] of torch.float32, got \[2, 19\] of"):
        graph(x, state._replace(states=state.states.double()))

    class Halved(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:1]

    with pytest.raises(ValueError, match="node function Halved of block 0 must return states"):
        NeuralGraph(LAYERS, rule="complete", node=Halved)(torch.randn(2, 4))


def test_a_state_of_another_topology_is_refused_though_shapes_agree() -> None:
    def graph(edges: list[tuple[int, int]], outputs: tuple[int, int] = (3, 4)) -> NeuralGraph:
        topology = Topology.from_edges(torch.tensor(edges).t(), [0, 1], outputs)
        return NeuralGraph(topology, rule="complete", node="identity")

    edges = [(0, 2), (2, 3), (1, 3), (2, 4)]
    state = graph(edges).state_dict()
    graph(edges).load_state_dict(state)
    for other in (graph([(0, 2), (2, 3), (1, 4), (2, 4)]), graph(edges, outputs=(4, 3))):
        with pytest.raises(RuntimeError, match="weight belongs to another topology"):
            other.load_state_dict(state)
        nested = nn.Sequential(other)
        with pytest.raises(RuntimeError, match=r"0.weight belongs to another topology"):
            nested.load_state_dict({f"0.{name}": value for name, value in state.items()})
    old = {name: value for name, value in state.items() if name != "fingerprint"}
    new = graph(edges)
    assert new.load_state_dict(old).missing_keys == []
    assert int(new.fingerprint) == new.topology.fingerprint


def test_the_fingerprint_is_of_structure_not_of_names_or_of_how_it_was_built() -> None:
    complete = Topology.layered([2, 3, 2], skip=False)
    renamed = nx.relabel_nodes(complete.to_networkx(), str)
    other = Topology(complete.edge_index.flip(1), complete.block, complete.role)
    prints = {t.fingerprint for t in (complete, other, Topology.from_networkx(renamed))}
    assert len(prints) == 1
    assert Topology.layered([2, 3, 2]).fingerprint not in prints


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_an_edge_cannot_be_edited_to_a_weight_that_is_not_finite(weight: float) -> None:
    graph = NeuralGraph(LAYERS, rule="complete", node="relu")
    wiring = graph.to_networkx()
    wiring.edges[0, 4]["weight"] = weight
    with pytest.raises(ValueError, match=f"edge 0 -> 4 has weight {weight}"):
        edited(graph, wiring)


def test_errors_say_what_was_expected() -> None:
    graph = NeuralGraph(LAYERS, rule="complete", node="relu")
    with pytest.raises(ValueError, match="got one that is frozen already"):
        freeze(freeze(graph))
    with pytest.raises(ValueError, match=r"could not trace GCN: .* freeze_graphs"):
        freeze(GCN(4, 8, 2))
    with pytest.raises(
        TypeError, match="density must be a number or a mapping from names, got 'x'"
    ):
        sparsify(nn.Linear(4, 4), density="x")  # type: ignore[arg-type]
    for build in (Topology.from_networkx, Topology.from_edges):
        edges = nx.DiGraph([(0, 1)]) if build == Topology.from_networkx else [[0], [1]]
        with pytest.raises(
            TypeError, match=r"inputs must be a list of nodes, such as \[0\], got 0"
        ):
            build(edges, 0, [1])  # type: ignore[operator]
    few = Topology.random_dag("erdos_renyi", 12, 3, 2, p=0.4)
    with pytest.raises(ValueError, match=r"groups of 4 at each node, but node \w+ has \d"):
        NeuralGraph(few, rule="n_of_m", node="relu")
    assert Topology.from_edges([[], []], [0], [1]).num_candidates == 0
