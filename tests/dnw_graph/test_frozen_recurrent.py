"""Frozen graphs that take or return sequences, with states kept between calls."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dnw_graph import NeuralGraph, Topology, freeze, freeze_graphs, load_frozen, save_frozen
from dnw_graph.frozen import FrozenRecurrent, to_exported
from dnw_graph.node import NormReluConv, Relu
from tests.conftest import relative_error
from tests.dnw_graph.test_grouping import EARLY_OUTPUT

SCHEDULES = [
    "discrete(steps=7, input='new')",
    "discrete(steps=7, input='new', read='every')",
    "discrete(steps=5, input='held', read='every')",
    "discrete(steps=5, input='start', read='every')",
]
NODES: list[dict[str, Any]] = [
    {"node": "relu", "output_node": "relu"},
    {"node": partial(Relu, scale=True, bias=True), "input_node": "bias", "message": "relu"},
    {"node": partial(NormReluConv, norm="instance"), "output_node": "relu_conv"},
]


def made(topology: Topology, schedule: str, options: dict[str, Any]) -> NeuralGraph:
    torch.manual_seed(1)
    number = topology.num_candidates * 3 // 4
    graph = NeuralGraph(topology, num_edges=number, schedule=schedule, **options)
    with torch.no_grad():
        for parameter in graph.nodes.parameters():
            parameter.uniform_(-1, 1)
    return graph.eval()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("options", NODES, ids=["relu", "affine", "maps"])
@pytest.mark.parametrize(
    "topology", [EARLY_OUTPUT, Topology.recurrent(2, 9, 3)], ids=["renumbered", "recurrent"]
)
def test_a_frozen_graph_computes_the_same(
    topology: Topology, schedule: str, options: dict[str, Any]
) -> None:
    graph = made(topology, schedule, options)
    features = (5, 4) if isinstance(options["node"], partial) and "norm" in str(options) else ()
    frames = (6,) if graph.schedule.takes_sequence else ()
    x = torch.randn(3, *frames, 2, *features)
    frozen = freeze(graph)
    assert isinstance(frozen[0], FrozenRecurrent)
    assert relative_error(frozen(x), graph(x)) < 1e-5
    ours, theirs = frozen[0].initial_state(x), graph.initial_state(x)
    for part in x.split(2, 1) if frames else (x, x):
        y, ours = frozen(part, ours)
        expected, theirs = graph(part, theirs)
        assert relative_error(y, expected) < 1e-5
        assert ours.step == theirs.step
    read = frozen[0].nodes
    assert relative_error(ours.states[:, read], theirs.states[:, read]) < 1e-5
    if frames:
        lengths = torch.tensor([6, 1, 4])
        assert relative_error(frozen(x, lengths=lengths), graph(x, lengths=lengths)) < 1e-5
        ours, theirs = frozen[0].initial_state(x), graph.initial_state(x)
        y, ours = frozen(x, ours, lengths)
        expected, theirs = graph(x, theirs, lengths)
        assert relative_error(y, expected) < 1e-5


def test_nodes_that_no_output_reads_are_not_computed() -> None:
    topology = Topology.recurrent(2, 9, 2)
    graph = NeuralGraph(topology, num_edges=6, node="relu", schedule=SCHEDULES[1]).eval()
    frozen = freeze(graph)[0]
    assert isinstance(frozen, FrozenRecurrent)
    assert len(frozen.nodes) < topology.num_nodes
    x = torch.randn(2, 4, 2)
    assert torch.allclose(frozen(x), graph(x), atol=1e-6)


def test_one_step_is_exported_and_networks_take_it() -> None:
    graph = made(Topology.recurrent(2, 9, 3), SCHEDULES[1], NODES[0])
    frozen = freeze(graph)
    step = frozen[0].step
    frame, states = torch.randn(2, 2), torch.randn(2, len(frozen[0].nodes))
    program = to_exported(step, torch.cat([frame, states], 1))
    both = torch.cat([frame, states], 1)
    assert relative_error(program.module()(both), step(both)) < 1e-5
    network = torch.nn.Sequential(graph, torch.nn.Linear(3, 2)).eval()
    x = torch.randn(2, 5, 2)
    for copy in (freeze(network), freeze_graphs(network)):
        assert relative_error(copy(x), network(x)) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_file_holds_the_graph(schedule: str, tmp_path: Path) -> None:
    network = torch.nn.Sequential(made(Topology.recurrent(2, 9, 3), schedule, NODES[1])).eval()
    frozen, path = freeze(network), tmp_path / "graph.safetensors"
    save_frozen(frozen, path, notes={"rate": "8 kHz"})
    loaded = load_frozen(path)
    x = torch.randn(2, *([6] if "new" in schedule else []), 2)
    assert torch.equal(loaded(x), frozen(x))
    y, state = loaded(x, loaded[0].initial_state(x))
    expected, expected_state = frozen(x, frozen[0].initial_state(x))
    assert torch.equal(y, expected)
    assert torch.equal(state.states, expected_state.states)
    assert loaded.notes == {"rate": "8 kHz"}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("outputs", lambda x: x + 100, "outputs must be from 0 to"),
        ("channels", lambda x: x - 1, "channels must be from 0 to 1"),
        ("nodes", lambda x: x.float(), "nodes must be a vector of int64"),
        ("inputs", lambda x: x[None], "inputs must be a vector of int64"),
    ],
)
def test_a_file_with_wrong_indices_is_refused(
    name: str, change: Callable[[torch.Tensor], torch.Tensor], message: str, tmp_path: Path
) -> None:
    frozen = freeze(made(Topology.recurrent(2, 9, 3), SCHEDULES[1], NODES[0]))
    setattr(frozen[0], name, change(getattr(frozen[0], name)))
    save_frozen(frozen, tmp_path / "graph.safetensors")
    with pytest.raises(ValueError, match=message):
        load_frozen(tmp_path / "graph.safetensors")


def test_errors() -> None:
    graph = made(Topology.recurrent(2, 9, 3), SCHEDULES[1], NODES[0])
    frozen, x = freeze(graph), torch.randn(2, 5, 2)
    with pytest.raises(ValueError, match="pass an example"):
        frozen.report()
    static = freeze(NeuralGraph(Topology.layered([2, 3]), num_edges=4, node="relu"))
    with pytest.raises(ValueError, match="frozen alone"):
        static(torch.randn(1, 2), frozen[0].initial_state(x))
    timed = partial(NormReluConv, norm="batch", steps=2)
    moving = NeuralGraph(
        Topology.recurrent(2, 4, 2), num_edges=12, node=timed, schedule=SCHEDULES[0]
    )
    with torch.no_grad():
        moving.nodes[0].norm[1].bias.fill_(1)
    with pytest.raises(
        ValueError, match="does not support a NormReluConv that depends on the time"
    ):
        freeze(moving)
