"""Weights begin so that the scale of states is kept, or as in the paper."""

import math
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from dnw_graph import NeuralGraph, Topology, attach, edited
from dnw_graph.analysis import scales
from dnw_graph.init import FanIn, Start, gain_of
from dnw_graph.node import Gelu, Relu, Tanh

DEEP = Topology.layered([64, *[128] * 8, 10], skip=False)
DEEPER = Topology.layered([64, *[128] * 28, 10], skip=False)
SKIPPING = Topology.layered([64, *[128] * 8, 10])


def sums_of_squares(graph: NeuralGraph) -> torch.Tensor:
    """Return the sum of the squared weights of the real edges into each node ``[V]``."""
    wiring = graph.wiring()
    sums = torch.zeros(graph.topology.num_nodes)
    return sums.index_add(0, wiring.edge_index[1], wiring.edge_weight.square())


@pytest.mark.parametrize("topology", [DEEP, SKIPPING], ids=["adjacent", "skip"])
@pytest.mark.parametrize("share", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("rule", ["dnw", "random", "rigl", "gse", "constant_fan_in(m=12)"])
def test_squared_real_weights_sum_to_the_squared_gain(
    topology: Topology, share: float, rule: str
) -> None:
    torch.manual_seed(0)
    number = None if rule.startswith("constant") else int(share * topology.num_candidates)
    graph = NeuralGraph(topology, rule=rule, num_edges=number, node="relu")
    sums = sums_of_squares(graph)
    for block in topology.blocks[1:]:
        mean = float(sums[block.nodes.start : block.nodes.stop].mean())
        assert mean == pytest.approx(2, rel=0.25 if block.index < 9 else 0.7), block.index
    if rule == "dnw" and share < 0.1:  # and no node has many more edges than another one
        degrees = graph.wiring().rowptr.diff()[64:-10].float()
        assert degrees.std() < 2 * math.sqrt(degrees.mean())


@pytest.mark.parametrize("rule", ["l1_anneal", "soft_threshold", "complete"])
def test_rules_that_begin_with_all_edges_count_all(rule: str) -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(DEEP, rule=rule, num_edges=None if rule == "complete" else 1000, node=Tanh)
    assert float(sums_of_squares(graph)[64:].mean()) == pytest.approx(1.5925**2, rel=0.1)


@pytest.mark.parametrize(
    ("node", "gain"),
    [(Relu, 2**0.5), (Gelu, 1.5335), (Tanh, 1.5925), (nn.ReLU, 2**0.5), (nn.SELU, 1.0)],
)
def test_gains_keep_normal_inputs_at_scale(node: Any, gain: float) -> None:
    graph = NeuralGraph(Topology.bipartite(2, 2), rule="complete", node=node)
    states = graph.nodes[0](torch.randn(2, 200_000), 0.0)
    assert gain_of(graph.nodes[0]) == pytest.approx(gain, abs=0.01)
    assert float(states.square().mean().sqrt()) * gain == pytest.approx(1, abs=0.02)


def test_paper_networks_begin_as_in_the_paper() -> None:
    graph = NeuralGraph(SKIPPING, num_edges=500)
    torch.manual_seed(3)
    graph.reset_parameters()
    torch.manual_seed(3)
    bound = 1 / math.sqrt(64 + 8 * 128)
    assert torch.equal(graph.weight, torch.empty(len(graph.weight)).uniform_(-bound, bound))
    plain = NeuralGraph(SKIPPING, num_edges=500, node="relu", init="uniform")
    assert float(plain.weight.detach().abs().max()) <= bound


def test_init_is_a_name_a_class_an_object_or_a_function() -> None:
    for init in ("fan_in", FanIn, FanIn()):
        assert isinstance(NeuralGraph(DEEP, num_edges=9, init=init).init, FanIn)

    def by_degree(start: Start) -> torch.Tensor:
        return 1 / (1 + start.topology.rowptr.diff())

    graph = NeuralGraph(DEEP, num_edges=9, node="relu", init=by_degree)
    assert float(graph.weight.detach().abs().max()) <= 1 / 65
    first, last = graph.weight.detach()[: 64 * 128], graph.weight.detach()[-1280:]
    assert float(first.abs().max()) > float(last.abs().max())
    assert NeuralGraph(DEEP, num_edges=9, init=lambda _: 0.0).weight.detach().abs().max() == 0
    first = graph.weight.detach().clone()
    graph.reset_parameters()
    assert not torch.equal(first, graph.weight)
    assert float(graph.weight.detach().abs().max()) <= 1 / 65
    with pytest.raises(ValueError, match="unknown init 'fanin'; did you mean 'fan_in'"):
        NeuralGraph(DEEP, num_edges=9, init="fanin")
    for wrong in (lambda _: -1.0, lambda _: torch.ones(3)):
        with pytest.raises(
            ValueError, match="a finite bound, 0 or more, for each of the 1098 nodes"
        ):
            NeuralGraph(DEEP, num_edges=9, init=wrong)


def test_new_edges_of_edited_graphs_begin_alike() -> None:
    topology = Topology.layered([3, 4, 2])
    graph = NeuralGraph(topology, num_edges=20, node="relu", init=lambda _: 0.125)
    wiring = graph.to_networkx()
    for _, _, data in wiring.edges(data=True):
        del data["weight"]
    wiring.add_edge("new", 7, weight=None)
    wiring.nodes["new"].update(role="input", channel=3)
    del wiring.edges["new", 7]["weight"]
    assert float(edited(graph, wiring).weight.detach().abs().max()) <= 0.125


def test_scales_tell_weights_that_are_too_small() -> None:
    torch.manual_seed(0)
    x = torch.randn(128, 64)
    kept = scales(NeuralGraph(DEEP, num_edges=20_000, node="relu"), x)[""]
    lost = scales(NeuralGraph(DEEP, num_edges=20_000, node="relu", init="uniform"), x)[""]
    assert all(0.5 < scale.inputs < 2 for scale in kept)
    assert lost[-1].inputs < 1e-6
    assert [scale.role for scale in kept] == ["input", *["hidden"] * 8, "output"]
    assert "block" in str(kept)
    assert len(str(kept).splitlines()) == 11
    in_time = NeuralGraph(
        Topology.random_dag("watts_strogatz", 30, 4, 3, k=4, p=0.5),
        num_edges=30,
        node="relu",
        schedule="discrete(steps=6, input='held')",
    )
    model = nn.Sequential(nn.Linear(5, 4), in_time)
    assert len(scales(model, torch.randn(9, 5))["1"]) == 1 + 6 * 3
    assert not in_time.nodes[0]._forward_hooks
    with pytest.raises(ValueError, match="but found none"):
        scales(nn.Linear(2, 2), torch.randn(1, 2))


@pytest.mark.parametrize("topology", [DEEP, DEEPER], ids=["9 levels", "30 levels"])
def test_deep_graphs_learn_with_defaults(topology: Topology) -> None:
    digits = load_digits()
    x = torch.tensor(digits.data, dtype=torch.float32)
    x, y = (x - x.mean()) / x.std(), torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    torch.manual_seed(0)
    graph = NeuralGraph(topology, num_edges=topology.num_candidates // 5, node="relu")
    optimizer = torch.optim.Adam(graph.parameters(), lr=1e-3)
    attach(graph, optimizer, total_steps=30 * 23)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)  # accuracy settles
    for _ in range(30):
        for batch in train[torch.randperm(len(train))].split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(graph(x[batch]), y[batch]).backward()
            optimizer.step()
        decay.step()
    with torch.no_grad():
        accuracy = float((graph(x[test]).argmax(1) == y[test]).float().mean())
    assert accuracy >= 0.85
