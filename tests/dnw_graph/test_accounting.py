"""What a network costs, counted by hand."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from dnw_graph import (
    Cost,
    NeuralGraph,
    Topology,
    attach,
    bake,
    cost,
    freeze,
    sparsify,
    sparsity,
)
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
        unreachable_nodes=3,
    )


def test_nodes_that_lead_nowhere_are_what_freezing_removes() -> None:
    # 0 -> 1 -> 2 -> 3 and 2 -> 6 in the first graph; its output 6 feeds nothing in the second.
    first = Topology.from_edges(
        [[0, 1, 2, 0, 4, 2], [1, 2, 3, 4, 5, 6]], inputs=[0], outputs=[5, 6]
    )
    second = Topology.from_edges([[0], [2]], inputs=[0, 1], outputs=[2])
    options = {"node": "norm_relu_conv", "rule": "complete"}
    model = nn.Sequential(NeuralGraph(first, **options), NeuralGraph(second, **options)).eval()
    counted = cost(model, example=torch.zeros(1, 1, 4, 4))
    assert (counted.dead_nodes, counted.unreachable_nodes) == (1 + 1, 4 + 1)
    assert "5 unreachable nodes" in str(counted)
    # The outputs of the first graph are the inputs of the second: one node each once frozen.
    assert freeze(model).graphs[0].num_nodes == 7 + 3 - counted.unreachable_nodes - 1
    alone = cost(model[0], example=torch.zeros(1, 1, 4, 4))
    assert (alone.dead_nodes, alone.unreachable_nodes) == (1, 1)


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
        "MACs per image",
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


STEM = 2 * 27 * 36  # 3x3x3 to two channels on 6x6 pixels; the graph below reads one of them


def read_one() -> NeuralGraph:
    return graph_with([0, 2, 8])


class Branches(nn.Module):
    """A convolution whose output goes to a graph, and to something else."""

    def __init__(self, *branches: nn.Module, add: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 3, padding=1, bias=False)
        self.branches, self.add = nn.ModuleList(branches), add

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        out = sum(branch(x) for branch in self.branches)
        return out + x if self.add else out


def test_a_layer_counts_the_channels_that_anything_reads() -> None:
    def of_stem(model: nn.Module) -> int:
        graphs = [m for m in model.modules() if isinstance(m, NeuralGraph)]
        return cost(model, image_size=6).macs - sum(cost(g, image_size=6).macs for g in graphs)

    other = graph_with([1, 2, 8])  # reads the other channel
    conv = nn.Conv2d(3, 2, 3, padding=1, bias=False)
    between = nn.Sequential(conv, nn.BatchNorm2d(2), nn.ReLU(), read_one())
    assert of_stem(between) == STEM // 2
    assert of_stem(Branches(read_one())) == STEM // 2
    assert of_stem(Branches(read_one(), read_one())) == STEM // 2
    assert of_stem(Branches(read_one(), other)) == STEM
    assert of_stem(Branches(read_one(), nn.Identity())) == STEM
    assert of_stem(Branches(read_one(), add=True)) == STEM


def test_layers_by_kind() -> None:
    image = torch.zeros(1, 4, 8, 8)

    def macs(layer: nn.Module, example: torch.Tensor = image) -> int:
        return cost(layer, example=example).macs

    assert macs(nn.Conv2d(4, 6, 3, stride=2, padding=1)) == 4 * 6 * 9 * 16
    assert macs(nn.Conv2d(4, 4, 3, padding=1, groups=4)) == 4 * 9 * 64
    assert macs(nn.ConvTranspose2d(4, 6, 2, stride=2)) == 4 * 6 * 4 * 64
    assert macs(nn.AvgPool2d(2)) == 4 * 64
    assert macs(nn.Linear(5, 7), torch.zeros(1, 3, 5)) == 3 * 5 * 7
    assert macs(nn.Conv1d(4, 6, 3), torch.zeros(1, 4, 10)) == 4 * 6 * 3 * 8
    assert macs(torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 6, 1))) == 24 * 64


def test_a_graph_without_images() -> None:
    graph = NeuralGraph(Topology.layered([6, 5, 3]), num_edges=20, node="relu")
    assert cost(graph, example=torch.zeros(1, 6)).macs == 20


def test_a_node_function_at_the_outputs_counts_outputs_with_an_edge_in() -> None:
    graph = graph_with([0, 2, 8], output_node="norm_relu_conv")
    assert cost(graph, image_size=4).parameters == 3 + (2 + 1) * 9


def test_layers_it_cannot_count_are_named() -> None:
    with pytest.warns(UserWarning, match="does not know how many multiply-adds Bilinear takes"):
        assert cost(_Squared(), example=torch.zeros(1, 4)).macs == 0


class _Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(4, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.form(x, x)


def test_an_image_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="too small for stride 2"):
        cost(graph_with([0, 2, 8], stride=2), image_size=1)


class Mixed(nn.Module):
    """A node function with parameters of each node, and some that all nodes share."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.ones(num_nodes, 1, 3))
        self.shared = nn.Linear(7, 7, bias=False)

    def forward(self, x: torch.Tensor, t: float = 0.0) -> torch.Tensor:
        return x * self.own.sum() * self.shared.weight.sum()


class Told(Mixed):
    macs_per_pixel, parameters_per_node = 4, 5


def test_parameters_of_any_node_function_count_and_what_is_unknown_is_named() -> None:
    # Real: 0 -> 2, 0 -> 3, 2 -> 5; node 2 alone has an edge out besides input 0.
    with pytest.warns(UserWarning, match="how many multiply-adds Mixed takes and leaves"):
        counted = cost(graph_with([0, 2, 8], node=Mixed))
    assert counted.parameters == 3 + (1 + 1) * 3 + 2 * 49
    assert counted.macs == 3
    counted = cost(graph_with([0, 2, 8], node=Told))
    assert (counted.parameters, counted.macs) == (3 + 2 * 5, 3 + 2 * 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cost(graph_with([0, 2, 8], node=lambda _: Timeless())).macs == 3


class Timeless(nn.GELU):
    def forward(self, x: torch.Tensor, t: float = 0.0) -> torch.Tensor:
        return super().forward(x)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def test_layers_of_unknown_cost_count_their_parameters() -> None:
    with pytest.warns(UserWarning, match="multiply-adds Scaled takes"):
        counted = cost(nn.Sequential(Scaled(), nn.Linear(8, 2)), example=torch.zeros(1, 3, 8))
    assert (counted.parameters, counted.macs) == (24 + 16, 3 * 16)


@pytest.mark.parametrize("batch_first", [False, True])
def test_transformer_layers_are_counted(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        counted = cost(layer, example=torch.zeros((1, 5, 8) if batch_first else (5, 1, 8)))
    weights = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    assert counted.parameters == weights
    assert counted.macs == 5 * weights + 2 * 5 * 5 * 8


class Across(nn.Module):
    """Attention from 2 queries to a sequence."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        keys = x[..., : self.attention.kdim]
        states: torch.Tensor = self.attention(x[:, :2], value=x, key=keys, need_weights=False)[0]
        return states


def test_attention_counts_projections_at_their_positions_and_products() -> None:
    example = torch.zeros(1, 5, 8)
    counted = cost(Across(), example=example)
    assert counted.parameters == 4 * 64
    assert counted.macs == (2 + 5 + 5 + 2) * 64 + 2 * 2 * 5 * 8
    counted = cost(Across(kdim=6, add_bias_kv=True, add_zero_attn=True), example=example)
    assert counted.macs == (2 + 5 + 2) * 64 + 5 * 6 * 8 + 2 * 2 * 7 * 8
    network = sparsify(Across(), 0.25)
    counted = cost(network, example=example)
    assert (counted.parameters, counted.real_edges, counted.candidate_edges) == (64, 64, 256)
    real = [int(w.count_nonzero()) for w in bake(network).attention.in_proj_weight.chunk(3)]
    assert counted.macs == 2 * real[0] + 5 * (real[1] + real[2]) + 2 * 16 + 2 * 2 * 5 * 8


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: nn.Module, pack: bool = False) -> None:
        super().__init__()
        self.layer, self.pack = layer, pack

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pack:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([x.shape[1]]), True)
            return self.layer(packed)[0].data[-1:]
        return self.layer(x)[0][:, -1]


@pytest.mark.parametrize("pack", [False, True])
def test_recurrent_layers_count_once_per_position(pack: bool) -> None:
    lstm = nn.LSTM(4, 6, num_layers=2, bidirectional=True, batch_first=True)
    weights = sum(p.numel() for p in lstm.parameters() if p.dim() > 1)
    example = torch.zeros(1, 7, 4)
    counted = cost(Last(lstm, pack), example=example)
    assert (counted.parameters, counted.macs) == (weights, 7 * weights)
    counted = cost(Last(sparsify(lstm, 0.5), pack), example=example)
    assert counted.parameters == counted.real_edges == weights // 2
    assert (counted.macs, counted.candidate_edges) == (7 * weights // 2, weights)


def test_a_layer_counts_positions_that_a_network_moves_into_the_batch() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.linear = nn.Conv2d(3, 4, 1), nn.Linear(4, 5)
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            maps = self.pool(self.conv(x.flatten(0, 1))).flatten(1)
            return self.linear(maps).unflatten(0, x.shape[:2])

    counted = cost(Frames(), example=torch.zeros(1, 6, 3, 2, 2))
    assert counted.macs == 6 * (4 * 12 + 4 * 4 + 20)


def test_recurrent_cells_count_once_per_call() -> None:
    cell = nn.GRUCell(4, 6)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = cell

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.cell(x, self.cell(x))

    counted = cost(Twice(), example=torch.zeros(1, 4))
    assert (counted.parameters, counted.macs) == (18 * 10, 2 * 18 * 10)


def test_embeddings_count_real_weights_and_shared_ones_once() -> None:
    embedding = nn.Embedding(8, 3)
    example = torch.zeros(1, 2, dtype=torch.int64)
    assert cost(embedding, example=example).parameters == 24
    output = nn.Linear(3, 8, bias=False)
    output.weight = embedding.weight
    assert cost(nn.Sequential(embedding, output), example=example).parameters == 24
    sparse = sparsify(nn.Sequential(embedding), 0.5, embeddings=True)
    counted = cost(sparse, example=example)
    assert (counted.parameters, counted.candidate_edges, counted.macs) == (12, 24, 0)


@pytest.mark.parametrize("node", ["relu", "identity"])
def test_graphs_and_linear_networks_are_given_features(node: str) -> None:
    graph = NeuralGraph(Topology.layered([6, 5, 3]), num_edges=20, node=node)
    assert cost(graph).macs == 20
    assert cost(graph, image_size=4).macs == 20 * 16
    assert cost(nn.Sequential(nn.Linear(5, 6, bias=False), graph)).macs <= 30 + 20
    network = nn.Sequential(graph, nn.Linear(3, 2, bias=False))
    assert cost(network).macs == 20 + 6


def test_graphs_of_maps_ask_for_their_size() -> None:
    with pytest.raises(ValueError, match=r"cannot be run on an input \[1, 2\] .* pass image_size"):
        cost(graph_with([0, 2, 8]))


@pytest.mark.parametrize("rule", ["set(every=2)", "rigl(every=2)"])
def test_edges_that_have_just_grown_count(rule: str) -> None:
    torch.manual_seed(0)
    layer = sparsify(nn.Sequential(nn.Linear(20, 10, bias=False)), 0.2, rule=rule)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(layer, optimizer, total_steps=20)
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(4, 20)).square().mean().backward()
        optimizer.step()
    assert int(layer[0].weight.count_nonzero()) < 40
    assert sparsity(layer).nonzero == 40
    assert cost(layer) == Cost(macs=40, parameters=40, real_edges=40, candidate_edges=200)
    assert sparsity(bake(layer)).nonzero < 40  # plain layers have no edges but other weights


def test_freezing_never_adds_multiply_adds_and_counts_them_the_same_way() -> None:
    torch.manual_seed(0)
    for density in (0.02, 0.3, 0.9):
        topology = Topology.layered([8, 40, 40, 16])
        graph = NeuralGraph(
            topology,
            num_edges=int(density * topology.num_candidates),
            node="norm_relu_conv",
            stride=2,
        )
        tail = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))
        model = nn.Sequential(nn.Conv2d(3, 8, 3), graph, *tail).eval()
        before, frozen = cost(model, image_size=20), freeze(model)
        report = frozen.report(20)
        assert 0.5 * before.macs < report.macs <= before.macs
        assert report.parameters <= before.parameters
        counted = cost(frozen, image_size=20)
        assert (counted.macs, counted.parameters) == (report.macs, report.parameters)


class Halved(nn.Module):
    macs_per_pixel, parameters_per_node = 1, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / 2


class Embedded(nn.Module):
    """A module with weights of its own beside a child."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.act = nn.Parameter(torch.ones(4, 5)), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(x @ self.weight)


def test_functions_without_time_and_modules_with_children_count() -> None:
    assert cost(graph_with([0, 2, 8], node=Halved)).macs == 3 + 2
    with pytest.warns(UserWarning, match="how many multiply-adds Embedded takes"):
        counted = cost(nn.Sequential(Embedded(), nn.Linear(5, 2)), example=torch.zeros(1, 4))
    assert counted.parameters == 20 + 10


def test_the_first_convolution_says_how_many_channels_an_image_has() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.conv = nn.Linear(8, 10), nn.Conv2d(3, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x).mean((2, 3)))

    assert cost(HeadFirst(), image_size=5).macs == 27 * 8 * 9 + 80
    assert cost(HeadFirst()).macs > cost(HeadFirst(), image_size=32).macs
