"""What a network costs, counted by hand."""

import pytest
import torch
from torch import nn

from dnw_graph import Cost, NeuralGraph, Topology, cost
from models import create_model


def graph_with(edges: list[int], **options: object) -> NeuralGraph:
    """Return a graph over blocks of 2, 3 and 2 nodes in which just these candidates are real."""
    graph = NeuralGraph(Topology.layered([2, 3, 2]), num_edges=len(edges), **options)
    with torch.no_grad():
        graph.weight.zero_()
        graph.weight[edges] = 1.0
    return graph


def test_a_graph_by_hand() -> None:
    # Candidates 0 to 5 lead into nodes 2, 3, 4; 6 to 10 into node 5; 11 to 15 into node 6.
    # Real: 0 -> 2, 0 -> 3, 2 -> 5. Nodes 1, 3 and 4 have no edge out.
    counted = cost(graph_with([0, 2, 8], stride=2), image_size=8)
    pixels = 4 * 4
    assert counted == Cost(
        macs=3 * pixels + 2 * 9 * pixels,
        parameters=3 + 2 * 9,
        real_edges=3,
        candidate_edges=16,
        dead_nodes=3,
    )


def test_layers_count_the_channels_that_the_graph_reads_and_feeds() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, padding=1, bias=False),
        graph_with([0, 2, 8]),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2, 7),
    )
    inside = cost(model[1], image_size=6)
    counted = cost(model, image_size=6)
    assert counted.macs - inside.macs == 27 * 36 + 36 + 7  # stem to input 0; pool; output 5 to FC
    assert counted.parameters - inside.parameters == 27 + 7


def test_plain_networks_to_the_papers_digits() -> None:
    quarter, half = (cost(create_model("mbv1", width=d), image_size=224) for d in (0.25, 0.5))
    assert (round(quarter.macs / 1e6), round(quarter.parameters / 1e6, 1)) == (41, 0.5)
    assert (half.macs // 10**6, round(half.parameters / 1e6, 1)) == (149, 1.3)


def test_counting_leaves_the_network_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), graph_with([0, 2, 8]))
    model[1].eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    cost(model, image_size=6)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True]
    assert all(not m._forward_hooks for m in model.modules())


def test_printed_it_names_units() -> None:
    text = str(cost(graph_with([0, 2, 8]), image_size=8))
    for unit in (
        "MACs an image",
        "FLOPs",
        "parameters",
        "3 real of 16 candidate edges",
        "3 dead nodes",
    ):
        assert unit in text


def test_a_layer_that_runs_twice_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(x))

    counted = cost(Twice(), image_size=4)
    assert counted.macs == 2 * 9 * 16
    assert counted.parameters == 9


def test_an_image_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="too small for stride 2"):
        cost(graph_with([0, 2, 8], stride=2), image_size=1)
