"""Measures of a wiring, compared with random wirings of the same blocks and budget."""

import math
import warnings
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args, overload

import networkx as nx
import numpy as np
import rustworkx
import scipy.sparse
import torch
from torch import nn
from tqdm import tqdm

from dnw_graph._deprecated import warn_renamed
from dnw_graph._wrapped import unwrapped
from dnw_graph.analysis.structure import Floats, Ints, Structure, structure_of, structures_of
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.topology import Role, Topology

Null = Literal["budget", "degrees"]
"""Properties that random wirings share with the measured one; see :func:`measure`."""

SAMPLE = 256  # maximum number of start nodes of shortest paths
DIRECT = 10**10  # maximum of nodes times edges for exact betweenness


@dataclass(frozen=True)
class Statistic:
    """One number of a wiring, compared with random wirings.

    Attributes:
        value: Value for the wiring.
        mean: Mean over random wirings; see ``null`` of :func:`measure`.
        std: Standard deviation over random wirings.
    """

    value: float
    mean: float
    std: float

    @property
    def z(self) -> float:
        """Number of standard deviations from the mean.

        It is 0 if the value equals the mean up to rounding; otherwise infinite if ``std`` is 0, and
        NaN if a number is missing.
        """
        difference, rounding = self.value - self.mean, 1e-12 * max(1.0, abs(self.mean))
        if math.isnan(difference) or math.isnan(self.std) or abs(difference) < rounding:
            return 0.0 if abs(difference) < rounding else math.nan
        return difference / self.std if self.std > rounding else math.copysign(math.inf, difference)


@dataclass(frozen=True)
class BlockPair:
    """Edges from one block to another.

    Attributes:
        source: Index of the source block.
        target: Index of the target block.
        candidates: Number of candidate edges.
        edges: Number of real edges, compared with a hypergeometric distribution: the budget drawn
            uniformly from all candidates.
    """

    source: int
    target: int
    candidates: int
    edges: Statistic


@dataclass(frozen=True)
class DeadNodes:
    """Dead, unreachable and constant nodes; a node may be in several groups.

    Attributes:
        no_edge_out: Dead nodes: no real edge out, and not an output. The paper counts these.
        no_path_to_output: Other unreachable nodes: a real edge out, but no path to an output.
        no_edge_in: Constant nodes without a real edge in, and not an input.
        no_path_from_input: Other constant nodes: a real edge in, but no path from an input.
    """

    no_edge_out: Ints
    no_path_to_output: Ints
    no_edge_in: Ints
    no_path_from_input: Ints

    def __getattr__(self, name: str) -> Ints:
        renamed = {
            "unheard": "no_edge_out",
            "lost": "no_path_to_output",
            "unfed": "no_edge_in",
            "cut_off": "no_path_from_input",
        }
        if name not in renamed:
            raise AttributeError(f"'DeadNodes' object has no attribute {name!r}")
        warn_renamed(f"DeadNodes.{name}", renamed[name])
        value: Ints = getattr(self, renamed[name])
        return value


@dataclass(frozen=True)
class Measures:
    """Measures of a wiring, as :func:`measure` returns them.

    Attributes:
        structure: The wiring.
        statistics: Statistics by name; see :data:`STATISTICS`.
        pairs: Edges between blocks, for each pair with candidates.
        dead: Dead, unreachable and constant nodes.
        path_lengths: Number of pairs of an input and an output, by the number of edges on their
            shortest path; -1 for pairs without a path.
        betweenness: Share of shortest paths that go through each node ``[V]`` (Freeman 1977).
        weights: Quantiles of the weights of real edges, by share; empty without edges.
    """

    structure: Structure
    statistics: Mapping[str, Statistic]
    pairs: tuple[BlockPair, ...]
    dead: DeadNodes
    path_lengths: Mapping[int, int]
    betweenness: Floats
    weights: Mapping[float, float]

    def hubs(self, number: int = 10) -> list[tuple[Hashable, int, int, float]]:
        """Return name, in-degree, out-degree and betweenness of the nodes with the most edges."""
        s = self.structure
        order = np.argsort(-(s.in_degree + s.out_degree), kind="stable")[:number]
        return [
            (s.names[v], int(s.in_degree[v]), int(s.out_degree[v]), float(self.betweenness[v]))
            for v in order.tolist()
        ]

    def __str__(self) -> str:
        lines = [f"{'':28} {'value':>12} {'random':>12} {'z':>8}"]
        for name, s in self.statistics.items():
            lines.append(f"{name:28} {s.value:12,.4g} {s.mean:12,.4g} {s.z:8.1f}")
        return "\n".join(lines)


def skipping(s: Structure) -> float:
    """Return the share of real edges that skip at least one block."""
    return float((s.block[s.target] - s.block[s.source] > 1).mean()) if s.num_edges else math.nan


def _spaced(nodes: Ints) -> Ints:
    """Return :data:`SAMPLE` of the nodes, evenly spaced."""
    return nodes[np.linspace(0, len(nodes) - 1, SAMPLE).astype(np.int64)]


def _distances(matrix: scipy.sparse.csr_array, start: Ints) -> Ints:
    """Return distances from each start to each node, in edges ``[V, starts]``; -1 without a path.

    This is a breadth-first search from all starts at once, with one sparse product per level.
    """
    forward = matrix.T.tocsr().astype(np.float32)
    distance = np.full((matrix.shape[0], len(start)), -1, dtype=np.int64)
    frontier = np.zeros(distance.shape, dtype=np.float32)
    frontier[start, np.arange(len(start))] = 1
    level = 0
    while frontier.any():
        distance[frontier > 0] = level
        frontier = ((forward @ frontier > 0) & (distance < 0)).astype(np.float32)
        level += 1
    return distance


def path_lengths(s: Structure) -> dict[int, int]:
    """Return the number of pairs of an input and an output by distance; -1 without a path.

    If there are more than :data:`SAMPLE` inputs, uses that many, evenly spaced.
    """
    inputs, outputs = s.nodes_of(Role.INPUT), s.nodes_of(Role.OUTPUT)
    if len(inputs) > SAMPLE:
        inputs = _spaced(inputs)
    lengths, counts = np.unique(_distances(s.matrix, inputs)[outputs], return_counts=True)
    return {int(n): int(c) for n, c in zip(lengths, counts, strict=True)}


def mean_path(s: Structure) -> float:
    """Return the mean distance from an input to an output, over pairs with a path."""
    lengths = {n: c for n, c in path_lengths(s).items() if n >= 0}
    total = sum(lengths.values())
    return sum(n * c for n, c in lengths.items()) / total if total else math.nan


def connected(s: Structure) -> float:
    """Return the share of pairs of an input and an output that have a path."""
    lengths = path_lengths(s)
    return 1 - lengths.get(-1, 0) / sum(lengths.values())


def _undirected(s: Structure) -> scipy.sparse.csr_array:
    """Return the adjacency matrix of the undirected graph, without self-loops."""
    graph = s.matrix + s.matrix.T
    graph.setdiag(0)
    graph.eliminate_zeros()
    graph.data[:] = 1
    return graph


def clustering(s: Structure) -> float:
    """Return the mean clustering coefficient of the undirected graph (Watts & Strogatz 1998).

    Nodes without edges are excluded, since they would only measure sparsity.
    """
    graph = _undirected(s)
    degree = graph.sum(1)
    triangles = (graph @ graph).multiply(graph).sum(1)
    pairs = degree * (degree - 1)
    local = np.divide(triangles, pairs, out=np.zeros(len(degree)), where=pairs > 0)
    return float(local[degree > 0].mean()) if (degree > 0).any() else math.nan


def typical_path(s: Structure) -> float:
    """Return the mean distance between connected nodes of the undirected graph.

    If more than :data:`SAMPLE` nodes have edges, starts from that many, evenly spaced.
    """
    graph = _undirected(s)
    nodes = np.flatnonzero(graph.sum(1) > 0)
    if len(nodes) > SAMPLE:
        nodes = _spaced(nodes)
    distances = _distances(graph, nodes)
    lengths = distances[distances > 0]
    return float(lengths.mean()) if len(lengths) else math.nan


def unreachable(s: Structure) -> float:
    """Return the number of unreachable nodes, which have no path to an output."""
    return float((~s.reached_from(s.nodes_of(Role.OUTPUT), backward=True)).sum())


def _dead(s: Structure) -> float:
    """Return the number of dead nodes, which have no real edge out."""
    return float(((s.out_degree == 0) & (s.role != Role.OUTPUT)).sum())


STATISTICS: dict[str, Callable[[Structure], float]] = {
    "largest in-degree": lambda s: float(s.in_degree.max(initial=0)),
    "largest out-degree": lambda s: float(s.out_degree.max(initial=0)),
    "deviation of in-degrees": lambda s: float(s.in_degree.std()),
    "deviation of out-degrees": lambda s: float(s.out_degree.std()),
    "edges that skip a block": skipping,
    "dead nodes": _dead,
    "nodes without path to output": unreachable,
    "inputs and outputs connected": connected,
    "mean path, input to output": mean_path,
    "clustering": clustering,
    "typical path": typical_path,
}
"""Statistics of a wiring, by name; :func:`measure` compares each with random wirings."""


def betweenness(s: Structure, seed: int = 0) -> Floats:
    """Return the share of shortest paths through each node ``[V]`` (Freeman 1977, Brandes 2001).

    In large graphs (see :data:`DIRECT`), estimates it from :data:`SAMPLE` random nodes.
    """
    if not s.num_edges:
        return np.zeros(s.num_nodes)
    if s.num_nodes * s.num_edges > DIRECT:
        graph = nx.DiGraph()
        graph.add_nodes_from(range(s.num_nodes))
        graph.add_edges_from(zip(s.source.tolist(), s.target.tolist(), strict=True))
        centrality = nx.betweenness_centrality(graph, k=min(SAMPLE, s.num_nodes), seed=seed)
        return np.array([centrality[v] for v in range(s.num_nodes)])
    graph = rustworkx.PyDiGraph(multigraph=False)
    graph.add_nodes_from(range(s.num_nodes))
    graph.add_edges_from_no_data(list(zip(s.source.tolist(), s.target.tolist(), strict=True)))
    centrality = rustworkx.digraph_betweenness_centrality(graph)
    return np.array([centrality[v] for v in range(s.num_nodes)])


def dead_nodes(s: Structure) -> DeadNodes:
    """Return the dead, unreachable and constant nodes."""
    inputs, outputs = s.nodes_of(Role.INPUT), s.nodes_of(Role.OUTPUT)
    leads_to_output = s.reached_from(outputs, backward=True)
    has_input_path = s.reached_from(inputs)
    has_edge_out, has_edge_in = s.out_degree > 0, s.in_degree > 0
    return DeadNodes(
        no_edge_out=np.flatnonzero(~has_edge_out & (s.role != Role.OUTPUT)),
        no_path_to_output=np.flatnonzero(has_edge_out & ~leads_to_output),
        no_edge_in=np.flatnonzero(~has_edge_in & (s.role != Role.INPUT)),
        no_path_from_input=np.flatnonzero(has_edge_in & ~has_input_path),
    )


def block_pairs(s: Structure) -> tuple[BlockPair, ...]:
    """Return the real edges between blocks, compared with their share of the candidates."""
    blocks = s.topology.blocks
    number, k = s.topology.num_candidates, s.num_edges
    real = np.zeros((len(blocks), len(blocks)), dtype=np.int64)
    np.add.at(real, (s.block[s.source], s.block[s.target]), 1)
    pairs = []
    for block in blocks:
        for i, num_candidates in _candidates_by_source(s, block.index).items():
            share = num_candidates / number
            variance = k * share * (1 - share) * (number - k) / max(number - 1, 1)
            edges = Statistic(float(real[i, block.index]), k * share, math.sqrt(variance))
            pairs.append(BlockPair(i, block.index, num_candidates, edges))
    return tuple(pairs)


def _candidates_by_source(s: Structure, j: int) -> dict[int, int]:
    """Return the number of candidates into a block, by source block."""
    blocks = s.topology.blocks
    block = blocks[j]
    if block.complete:
        return {i: len(blocks[i].nodes) * len(block.nodes) for i in block.sources}
    ids = np.arange(block.edges.start, block.edges.stop)
    source = s.topology.edges(torch.from_numpy(ids))[0].numpy()
    counts = np.bincount(s.block[source], minlength=len(blocks))
    return {i: int(n) for i, n in enumerate(counts) if n}


def weight_quantiles(s: Structure) -> dict[float, float]:
    """Return quantiles of the weights of real edges, by share."""
    if not s.num_edges:
        return {}
    shares = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
    return dict(zip(shares, np.quantile(s.weight, shares).tolist(), strict=True))


def small_worldness(measures: Measures) -> float:
    """Return ``(C / C_random) / (L / L_random)`` (Humphries & Gurney 2008).

    It is above 1 if nodes cluster more than in random wirings while paths are about as short.
    """
    c, length = measures.statistics["clustering"], measures.statistics["typical path"]
    if not c.mean or not length.mean or not length.value:
        return math.nan
    return (c.value / c.mean) / (length.value / length.mean)


@overload
def measure(
    graph: "NeuralGraph | nn.Linear | nn.modules.conv._ConvNd | nx.DiGraph | Structure",
    candidates: Topology | None = None,
    *,
    random: int = 20,
    null: Null = "budget",
    seed: int = 0,
) -> Measures: ...


@overload
def measure(
    graph: nn.Module,
    candidates: None = None,
    *,
    random: int = 20,
    null: Null = "budget",
    seed: int = 0,
) -> dict[str, Measures]: ...


def measure(
    graph: "nn.Module | nx.DiGraph | Structure",
    candidates: Topology | None = None,
    *,
    random: int = 20,
    null: Null = "budget",
    seed: int = 0,
) -> Measures | dict[str, Measures]:
    """Measure a wiring, and random wirings with the same blocks and budget.

    Takes about a minute for 20,000 nodes. After two seconds, a terminal shows a progress bar.

    Args:
        graph: A graph, a sparse layer, or a graph from ``to_networkx``, edited or not; or a
            network, to measure each of its graphs and sparse layers.
        candidates: Edges that could have been real; see :func:`structure_of`.
        random: Number of random wirings for ``mean`` and ``std``, 2 or more.
        null: Properties that random wirings share with the measured one: ``"budget"``, the number
            of edges, which are drawn uniformly from all candidates; ``"degrees"``, also the in- and
            out-degree of every node, by double-edge swaps (:meth:`Structure.rewired`).
        seed: Seed of the random wirings and of samples.

    Returns:
        The measures of the graph; for a network, the measures by name of the module.

    Raises:
        ValueError: If the graph is not a topology, the network has no graph or sparse layer,
            ``random`` is below 2, or the null model is unknown.
    """
    if null not in get_args(Null):
        raise ValueError(f"unknown null model {null!r} (known: {', '.join(get_args(Null))})")
    if random < 2:
        raise ValueError(
            f"random must be 2 or more, for a standard deviation over random wirings, got {random}"
        )
    graph = unwrapped(graph) if isinstance(graph, nn.Module) else graph
    single = NeuralGraph | nn.Linear | nn.modules.conv._ConvNd
    if isinstance(graph, nn.Module) and not isinstance(graph, single):
        structures = structures_of(graph)
        if not structures:
            raise ValueError("the network has no NeuralGraph and no sparse layer to measure")
        return {name: _measure(s, random, null, seed) for name, s in structures.items()}
    return _measure(structure_of(graph, candidates), random, null, seed)


def _measure(s: Structure, random: int, null: Null, seed: int) -> Measures:
    """Return the measures of one wiring; see :func:`measure`."""
    if s.num_edges == s.topology.num_candidates and null == "budget":
        warnings.warn(
            "every candidate is real, so each random wiring is the wiring itself; to compare with "
            "other wirings of the same blocks, measure graph.to_networkx()",
            stacklevel=3,
        )
    generator = np.random.default_rng(seed)
    draw = s.random if null == "budget" else s.rewired
    randoms = [draw(generator) for _ in range(random)]
    with tqdm(
        total=len(STATISTICS) + 1, desc="measuring", delay=2, leave=False, disable=None
    ) as bar:
        statistics = {}
        for name, function in STATISTICS.items():
            values = np.array([function(wiring) for wiring in randoms])
            values = values[~np.isnan(values)]  # a random wiring may have no path, for example
            mean = float(values.mean()) if len(values) else math.nan
            std = float(values.std(ddof=1)) if len(values) > 1 else math.nan
            statistics[name] = Statistic(function(s), mean, std)
            bar.update()
        return Measures(
            structure=s,
            statistics=statistics,
            pairs=block_pairs(s),
            dead=dead_nodes(s),
            path_lengths=path_lengths(s),
            betweenness=betweenness(s, seed),
            weights=weight_quantiles(s),
        )
