"""Names of an earlier version work, and say what they are called now."""

import importlib

import pytest
import torch
from torch import nn

from dnw_graph import NeuralGraph, Topology, cost, freeze, inherit, sparsify
from dnw_graph.analysis import measure
from dnw_graph.wiring import Candidates, TrainingProgress

RENAMED = {
    "dnw_graph.wiring": {
        "Choice": "EdgeSelector",
        "Moment": "TrainingProgress",
        "Wired": "CandidateModule",
        "choices": "selectors",
    },
    "dnw_graph.aggregation": {"Aggregation": "Backend"},
    "dnw_graph.schedule": {
        "Carried": "RecurrentState",
        "Flow": "ForwardPass",
        "PullFunction": "AggregateFunction",
    },
}


@pytest.mark.parametrize("module", RENAMED)
def test_an_earlier_name_is_the_same_object(module: str) -> None:
    package = importlib.import_module(module)
    for old, new in RENAMED[module].items():
        with pytest.warns(DeprecationWarning, match=rf"{module}\.{old} has been renamed to {new}"):
            assert getattr(package, old) is getattr(package, new)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        package.Nothing  # noqa: B018


def test_attributes_go_by_their_earlier_names() -> None:
    topology = Topology.layered([3, 4, 2])
    graph = NeuralGraph(topology, num_edges=7)
    with pytest.warns(DeprecationWarning, match="choice has been renamed to selector"):
        assert graph.choice is graph.selector
    with pytest.warns(DeprecationWarning, match="aggregation has been renamed to backend"):
        assert graph.aggregation is graph.backend
    progress = TrainingProgress(step=3, total_steps=12)
    candidates = Candidates(torch.ones(20), 7, topology, {}, progress)
    with pytest.warns(DeprecationWarning, match=r"candidates\.moment"):
        assert candidates.moment is progress
    with pytest.warns(DeprecationWarning, match=r"progress\.fraction"):
        assert progress.progress == progress.fraction == 0.25


def test_nodes_of_a_wiring_are_counted_under_earlier_names() -> None:
    graph = NeuralGraph(Topology.layered([3, 4, 2]), num_edges=7, node="relu")
    counted, dead = cost(graph), measure(graph, random=2).dead
    with pytest.warns(DeprecationWarning, match="unneeded_nodes has been renamed to unreachable"):
        assert counted.unneeded_nodes == counted.unreachable_nodes
    for old, new in {"unheard": "no_edge_out", "cut_off": "no_path_from_input"}.items():
        with pytest.warns(DeprecationWarning, match=rf"{old} has been renamed to {new}"):
            assert getattr(dead, old) is getattr(dead, new)
    frozen, x = freeze(graph.eval()), torch.randn(2, 3)
    with pytest.warns(DeprecationWarning, match="plainly has been renamed to forward_by_torch"):
        assert torch.equal(frozen.plainly(x), frozen.forward_by_torch(x))
    with pytest.warns(DeprecationWarning, match=r"FrozenGraph\.plainly has been renamed"):
        assert torch.equal(frozen[0].plainly(x), frozen[0].forward_by_torch(x))
    with pytest.raises(AttributeError, match="no attribute 'alive'"):
        dead.alive  # noqa: B018


def earlier(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state as version 0.1 wrote it."""
    return {name.replace("selector.", "choice."): value for name, value in state.items()}


def test_states_with_earlier_names_are_loaded() -> None:
    def network() -> nn.Module:
        graph = NeuralGraph(Topology.layered([3, 4, 2]), rule="random", num_edges=7)
        return nn.Sequential(graph, sparsify(nn.Linear(2, 5), 0.4, rule="random"))

    trained, loaded = network(), network()
    state = trained.state_dict()
    names = {"0.selector.edge_id", "1.parametrizations.weight.0.selector.edge_id"}
    assert names <= state.keys()
    loaded.load_state_dict(earlier(state))
    assert all(torch.equal(state[name], value) for name, value in loaded.state_dict().items())


def test_a_wiring_is_inherited_from_states_with_earlier_names() -> None:
    def graph(rule: str) -> NeuralGraph:
        return NeuralGraph(Topology.layered([3, 4, 2]), rule=rule, num_edges=7, node="relu")

    weights = {"weight": torch.arange(26.0)}
    first, second = graph("fine_tune"), graph("fine_tune")
    inherit(first, initial=weights, trained=weights)
    remembered = {**weights, "choice.edge_id": torch.arange(7)}
    inherit(second, initial=remembered, trained=remembered)
    assert torch.equal(first.wiring().edge_id, second.wiring().edge_id)


def test_a_layer_that_is_called_choice_keeps_its_name() -> None:
    class Network(nn.Module):
        def __init__(self, rule: str | None) -> None:
            super().__init__()
            self.choice = nn.Linear(6, 5)
            if rule:
                sparsify(self, 0.4, rule=rule)

    dense, sparse = Network(None), Network("lottery")
    state = dense.state_dict()
    inherit(sparse, initial=state, trained=state)
    kept = sparse.choice.weight
    assert torch.equal(kept[kept != 0], state["choice.weight"][kept != 0])
    assert int((kept != 0).sum()) == 12
