"""Matplotlib figures of wirings, legible from tens to hundreds of thousands of edges.

The ``draw_`` functions return a figure; ``figure.savefig("wiring.svg")`` writes SVG, PNG or PDF.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import networkx as nx
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import MaxNLocator

from dnw_graph.analysis.history import WiringHistory
from dnw_graph.analysis.measures import block_pairs
from dnw_graph.analysis.structure import Floats, Structure, structure_of
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.topology import Role, Topology

Graph: TypeAlias = NeuralGraph | nx.DiGraph | Structure
"""Types of graphs that can be drawn."""

CELLS = 256  # maximum number of rows and columns of an adjacency heat map
COLORS = {Role.INPUT: "#4c78a8", Role.HIDDEN: "#9d9d9d", Role.OUTPUT: "#e45756"}
LEARNED, RANDOM = "#1f77b4", "#b0b0b0"


def draw_blocks(graphs: Graph | Mapping[str, Graph]) -> Figure:
    """Draw blocks and the edges between them.

    The width of a line shows the number of edges, and its colour compares that number with their
    share of the candidates: red for more edges, blue for fewer. The height of a block shows its
    number of nodes. Edges that skip a block are curved.

    Args:
        graphs: A graph, or several by title.
    """
    structures = _structures_by_title(graphs)
    figure = Figure(figsize=(3.2 * len(structures) + 1, 3.6), layout="constrained")
    panels = figure.subplots(1, len(structures), squeeze=False)[0]
    norm = Normalize(-2, 2)
    for axes, (title, s) in zip(panels, structures.items(), strict=True):
        _draw_blocks(axes, s, norm)
        axes.set_title(f"{title}\n{s.num_edges:,} edges".strip(), size=9)
    bar = figure.colorbar(
        ScalarMappable(norm, "coolwarm"), ax=list(panels), ticks=[-2, -1, 0, 1, 2], shrink=0.7
    )
    bar.ax.set_yticklabels(["¼", "½", "as random", "2x", "4x"], size=7)
    return figure


def _draw_blocks(axes: Axes, s: Structure, norm: Normalize) -> None:
    """Draw one panel of :func:`draw_blocks`."""
    blocks = s.topology.blocks
    tallest = max(len(block.nodes) for block in blocks)
    largest = max((pair.edges.value for pair in block_pairs(s)), default=1) or 1
    for pair in block_pairs(s):
        if not pair.edges.value:
            continue
        ratio = np.log2(np.array(pair.edges.value / (pair.edges.mean or 1)))
        is_next = pair.target == pair.source + 1
        height = -0.2 if is_next else 0.0
        arrow = FancyArrowPatch(
            (pair.source, height),
            (pair.target, height),
            connectionstyle=f"arc3,rad={0.0 if is_next else -0.45}",
            arrowstyle="-",
            linewidth=0.4 + 9 * pair.edges.value / largest,
            color=ScalarMappable(norm, "coolwarm").to_rgba(ratio),
            alpha=0.85,
        )
        axes.add_patch(arrow)
    for block in blocks:
        height = 0.3 + 0.7 * len(block.nodes) / tallest
        axes.bar(block.index, -height, 0.2, color=COLORS[block.role], zorder=3)
        axes.annotate(
            f"{len(block.nodes):,}",
            (block.index, -height),
            (0, -9),
            size=7,
            ha="center",
            textcoords="offset points",
        )
    axes.set_xlim(-0.5, len(blocks) - 0.5)
    axes.set_ylim(-1.2, 0.1 + 0.25 * max(len(blocks) - 1, 1))
    axes.set_axis_off()


def draw_adjacency(graphs: Graph | Mapping[str, Graph]) -> Figure:
    """Draw the adjacency matrix of each graph: target nodes in rows, source nodes in columns.

    If there are more nodes than cells, a cell shows the number of its edges. Lines separate blocks.

    Args:
        graphs: A graph, or several by title.
    """
    structures = _structures_by_title(graphs)
    figure = Figure(figsize=(3.4 * len(structures) + 0.8, 3.6), layout="constrained")
    panels = figure.subplots(1, len(structures), squeeze=False)[0]
    for axes, (title, s) in zip(panels, structures.items(), strict=True):
        image = _adjacency(s, s.source, s.target)
        image_artist = axes.imshow(
            np.ma.masked_equal(image, 0),
            cmap="viridis",
            norm=LogNorm(1, max(image.max(), 2)),
            interpolation="nearest",
            extent=(0, s.num_nodes, s.num_nodes, 0),
        )
        _draw_block_borders(axes, s)
        axes.set_title(title or f"{s.num_edges:,} edges", size=9)
        figure.colorbar(image_artist, ax=axes, shrink=0.6).ax.tick_params(labelsize=7)
    return figure


def _adjacency(s: Structure, source: np.ndarray, target: np.ndarray) -> Floats:
    """Return the number of edges in each cell of the adjacency matrix ``[cells, cells]``."""
    cells = min(CELLS, s.num_nodes)
    image = np.zeros((cells, cells))
    np.add.at(image, (target * cells // s.num_nodes, source * cells // s.num_nodes), 1)
    return image


def _draw_block_borders(axes: Axes, s: Structure) -> None:
    """Draw lines between blocks in an adjacency matrix, and label its axes."""
    for block in s.topology.blocks[1:]:
        axes.axhline(block.nodes.start, color="#00000030", linewidth=0.5)
        axes.axvline(block.nodes.start, color="#00000030", linewidth=0.5)
    axes.set_xlabel("source node", size=8)
    axes.set_ylabel("target node", size=8)
    axes.tick_params(labelsize=7)


def draw_degrees(graph: Graph, *, seed: int = 0) -> Figure:
    """Draw the cumulative distributions of in- and out-degrees, compared with a random wiring.

    Args:
        graph: A graph.
        seed: Seed of the random wiring, which has the same blocks and budget.
    """
    s = structure_of(graph)
    random = s.random(np.random.default_rng(seed))
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), ("in", "out"), strict=True):
        for structure, label, color in ((random, "random", RANDOM), (s, "learned", LEARNED)):
            degrees = np.sort(structure.in_degree if kind == "in" else structure.out_degree)
            share = 1 - np.arange(len(degrees)) / len(degrees)
            axes.step(degrees, share, where="pre", label=label, color=color)
        axes.set_xscale("symlog", linthresh=1)
        axes.set_yscale("log")
        axes.set_xlabel(f"{kind}-degree")
    figure.axes[0].set_ylabel("share of nodes with this degree or more")
    figure.axes[0].legend(frameon=False)
    return figure


def draw_history(history: WiringHistory) -> Figure:
    """Draw births and deaths of edges by epoch, and the ages of the real edges at the end.

    Args:
        history: History of one graph; see :func:`dnw_graph.analysis.load_history`.
    """
    figure = Figure(figsize=(7, 2.8), layout="constrained")
    moves, ages = figure.subplots(1, 2)
    epochs = history.epochs[1:]
    moves.plot(epochs, history.births[1:], color=LEARNED, marker=".", label="births")
    moves.plot(epochs, history.deaths[1:], color="#e45756", marker=".", label="deaths")
    if epochs and max(history.births[1:].max(), history.deaths[1:].max()) > 0:
        moves.set_yscale("log")
    moves.set_xlabel("epoch")
    moves.set_ylabel("edges since the previous record")
    moves.xaxis.set_major_locator(MaxNLocator(integer=True))
    moves.legend(frameon=False)
    per_epoch = history.steps[-1] / history.epochs[-1] if history.epochs[-1] else 1
    ages.hist(history.ages() / per_epoch, bins=min(40, max(len(epochs), 1)), color=LEARNED)
    ages.set_xlabel("age of the real edges at the end, epochs")
    ages.set_ylabel("edges")
    return figure


def draw_against_random(graph: Graph, *, seed: int = 0) -> Figure:
    """Draw blocks and adjacency matrix of a wiring next to those of a random wiring.

    Args:
        graph: A graph.
        seed: Seed of the random wiring, which has the same blocks and budget.
    """
    s = structure_of(graph)
    pair = {"learned": s, "random": s.random(np.random.default_rng(seed))}
    figure = Figure(figsize=(8, 7), layout="constrained")
    rows = figure.subplots(2, 2, height_ratios=(2, 3))
    norm = Normalize(-2, 2)
    largest = max(
        _adjacency(structure, structure.source, structure.target).max()
        for structure in pair.values()
    )
    for axes, (title, structure) in zip(rows.T, pair.items(), strict=True):
        _draw_blocks(axes[0], structure, norm)
        axes[0].set_title(title)
        image = _adjacency(structure, structure.source, structure.target)
        axes[1].imshow(
            np.ma.masked_equal(image, 0),
            norm=LogNorm(1, max(largest, 2)),
            interpolation="nearest",
            extent=(0, structure.num_nodes, structure.num_nodes, 0),
        )
        _draw_block_borders(axes[1], structure)
    return figure


def animate(
    history: WiringHistory, topology: Topology, path: str | Path, *, per_second: int = 4
) -> None:
    """Write an animation of the adjacency matrix during training as a GIF, one frame per record.

    Edges that are new since the previous record are red, the others blue.

    Args:
        history: History of one graph.
        topology: Topology of the graph.
        path: Path of the GIF file.
        per_second: Frames per second.

    Raises:
        ValueError: If the topology has another number of candidates than the history.
    """
    if topology.num_candidates != history.candidates:
        raise ValueError(
            f"the history is of {history.candidates:,} candidates, the topology has "
            f"{topology.num_candidates:,}"
        )
    empty = np.zeros(0, dtype=np.int64)
    s = Structure(topology, empty, empty, empty.astype(np.float64))
    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    axes = figure.subplots()
    frames = [_frame(s, history, index) for index in range(len(history.records))]
    largest = max(float(np.abs(frame).max()) for frame in frames) or 1.0
    image_artist = axes.imshow(
        frames[0],
        cmap="coolwarm",
        norm=TwoSlopeNorm(0, -(largest**0.5), largest**0.5),
        interpolation="nearest",
        extent=(0, topology.num_nodes, topology.num_nodes, 0),
    )
    _draw_block_borders(axes, s)

    def show(index: int) -> Sequence[Artist]:
        image_artist.set_data(np.sign(frames[index]) * np.sqrt(np.abs(frames[index])))
        axes.set_title(f"epoch {history.epochs[index]:g}", size=9)
        return [image_artist]

    animation = FuncAnimation(figure, show, frames=len(frames))
    animation.save(Path(path), PillowWriter(fps=per_second))


def _frame(s: Structure, history: WiringHistory, index: int) -> Floats:
    """Return the adjacency matrix at a record: positive numbers for cells with new edges."""
    record, real = history.records[index], history.real(index)
    is_new = np.isin(real, record.born) if index else np.zeros(len(real), dtype=bool)
    source, target = s.topology.edges(torch.from_numpy(real)).numpy()
    old = _adjacency(s, source[~is_new], target[~is_new])
    born = _adjacency(s, source[is_new], target[is_new])
    return np.where(born > 0, born, -old)


def _structures_by_title(graphs: Graph | Mapping[str, Graph]) -> dict[str, Structure]:
    """Return structures by title; the title of a single graph is empty."""
    if isinstance(graphs, Mapping) and not isinstance(graphs, nx.DiGraph):
        return {title: structure_of(graph) for title, graph in graphs.items()}
    return {"": structure_of(graphs)}
