"""Pictures show what is there: their parts are counted."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from PIL import Image

from dnw_graph import NeuralGraph, Topology
from dnw_graph.analysis import HistoryWriter, block_pairs, load_history, structure_of
from dnw_graph.analysis.pictures import (
    animate,
    draw_adjacency,
    draw_against_random,
    draw_blocks,
    draw_degrees,
    draw_history,
)


@pytest.fixture
def graph() -> NeuralGraph:
    return NeuralGraph(Topology.layered([20, 60, 300, 30]), num_edges=900, node="relu")


def saved(figure: Figure, path: Path) -> Path:
    for suffix in (".png", ".svg"):
        figure.savefig(path.with_suffix(suffix))
    with Image.open(path.with_suffix(".png")) as image:
        assert min(image.size) > 200
        assert len(np.unique(np.asarray(image))) > 20
    assert path.with_suffix(".svg").read_text().rstrip().endswith("</svg>")
    return path


def test_blocks(graph: NeuralGraph, tmp_path: Path) -> None:
    figure = draw_blocks({"one": graph, "other": graph.to_networkx()})
    saved(figure, tmp_path / "blocks")
    for axes in figure.axes[:2]:
        arrows = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
        pairs = [pair for pair in block_pairs(structure_of(graph)) if pair.edges.value]
        assert len(arrows) == len(pairs)
        assert [text.get_text() for text in axes.texts] == ["20", "60", "300", "30"]
    assert "900 edges" in figure.axes[0].get_title()
    widest = max(pairs, key=lambda pair: pair.edges.value)
    widths = [arrow.get_linewidth() for arrow in arrows]
    assert pairs[int(np.argmax(widths))] == widest


def test_every_edge_is_in_the_image_of_the_adjacency(graph: NeuralGraph, tmp_path: Path) -> None:
    figure = draw_adjacency(graph)
    saved(figure, tmp_path / "adjacency")
    (image,) = figure.axes[0].images
    cells = np.ma.filled(image.get_array(), 0)
    assert cells.sum() == 900
    assert cells.shape == (256, 256)  # 410 nodes, more than cells
    s, row, column = structure_of(graph), *np.nonzero(cells)
    assert set(zip(row, column, strict=True)) == set(
        zip(s.target * 256 // 410, s.source * 256 // 410, strict=True)
    )


def test_degrees_and_comparison(graph: NeuralGraph, tmp_path: Path) -> None:
    figure = draw_degrees(graph)
    saved(figure, tmp_path / "degrees")
    learned = figure.axes[0].lines[1]
    degrees = structure_of(graph).in_degree
    for x, share in zip(*learned.get_data(), strict=True):
        assert share <= (degrees >= x).mean() + 1e-9
    saved(draw_against_random(graph), tmp_path / "against")


def test_histories(tmp_path: Path) -> None:
    graph = NeuralGraph(Topology.layered([8, 12, 6]), num_edges=60, node="relu")
    writer = HistoryWriter(tmp_path, graph, steps_per_epoch=10)
    for step in (0, 10, 20, 30):
        writer.record(step)
        with torch.no_grad():
            graph.weight.add_(0.1 * torch.randn_like(graph.weight))
    history = load_history(tmp_path)["graph"]
    figure = draw_history(history)
    saved(figure, tmp_path / "history")
    births, deaths = (line.get_ydata() for line in figure.axes[0].lines)
    assert births.tolist() == history.births[1:].tolist()
    assert deaths.tolist() == history.deaths[1:].tolist()
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == 60
    animate(history, graph.topology, tmp_path / "wiring.gif")
    with Image.open(tmp_path / "wiring.gif") as film:
        assert film.n_frames == 4
    with pytest.raises(ValueError, match="is of 216 candidates, the topology has 18"):
        animate(history, Topology.layered([3, 6]), tmp_path / "other.gif")


def test_a_history_of_the_start_alone(tmp_path: Path) -> None:
    graph: Any = NeuralGraph(Topology.layered([8, 6]), num_edges=10)
    HistoryWriter(tmp_path, graph, steps_per_epoch=10).record(0)
    saved(draw_history(load_history(tmp_path)["graph"]), tmp_path / "history")
