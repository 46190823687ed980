"""What a wiring looks like in numbers, beside random wirings with the same blocks and budget."""

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

from dnw_graph._wrapped import unwrapped
from dnw_graph.analysis.structure import Floats, Ints, Structure, structure_of, structures_of
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.topology import Role, Topology

Null = Literal["budget", "degrees"]
"""What random wirings share with the one that is measured; see :func:`measure`."""

SAMPLE = 256  # nodes from which shortest paths go, where there are more
DIRECT = 10**10  # nodes times edges up to which every node counts for betweenness


@dataclass(frozen=True)
class Statistic:
    """One number of a wiring, against random ones.

    Attributes:
        value: Of the wiring.
        mean: Of random wirings; see ``null`` of :func:`measure`.
        std: Their standard deviation.
    """

    value: float
    mean: float
    std: float

    @property
    def z(self) -> float:
        """Standard deviations from the mean; infinite where random wirings do not differ."""
        apart, rounding = self.value - self.mean, 1e-12 * max(1.0, abs(self.mean))
        if math.isnan(apart) or math.isnan(self.std) or abs(apart) < rounding:
            return 0.0 if abs(apart) < rounding else math.nan
        return apart / self.std if self.std > rounding else math.copysign(math.inf, apart)


@dataclass(frozen=True)
class BlockPair:
    """Edges from one block to another.

    Attributes:
        source: Index of the block that sends.
        target: Index of the one that is fed.
        candidates: How many edges there may be.
        edges: How many are real, against a hypergeometric distribution: the budget, drawn from all
            candidates alike.
    """

    source: int
    target: int
    candidates: int
    edges: Statistic


@dataclass(frozen=True)
class DeadNodes:
    """Nodes that do nothing, by reason; a node may be in several.

    Attributes:
        unheard: No real edge leads out, and it is no output: dead as the paper counts.
        lost: An edge leads out, but no path to an output.
        unfed: No real edge leads in, and it is no input: what it sends is a constant.
        cut_off: An edge leads in, but no path from an input.
    """

    unheard: Ints
    lost: Ints
    unfed: Ints
    cut_off: Ints


@dataclass(frozen=True)
class Measures:
    """What :func:`measure` found.

    Attributes:
        structure: The wiring.
        statistics: Numbers by name, against random wirings; see :data:`STATISTICS`.
        pairs: Edges between blocks, for each pair with candidates.
        dead: Nodes that do nothing.
        path_lengths: How many pairs of an input and an output are so many edges apart, by number
            of edges; -1 for pairs without a path.
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
        """Return name, edges in, edges out and betweenness of the nodes with the most edges."""
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
    """Return the share of real edges that pass over a block."""
    return float((s.block[s.target] - s.block[s.source] > 1).mean()) if s.num_edges else math.nan


def _spaced(nodes: Ints) -> Ints:
    """Return :data:`SAMPLE` of some nodes, evenly spaced."""
    return nodes[np.linspace(0, len(nodes) - 1, SAMPLE).astype(np.int64)]


def _distances(matrix: scipy.sparse.csr_array, start: Ints) -> Ints:
    """Return the edges on a shortest path from each start to each node ``[V, starts]``, or -1.

    Breadth first from all starts at once, a sparse product a level.
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
    """Return how many pairs of an input and an output are so many edges apart; -1 without path.

    From :data:`SAMPLE` inputs, evenly spaced, where there are more.
    """
    inputs, outputs = s.nodes_of(Role.INPUT), s.nodes_of(Role.OUTPUT)
    if len(inputs) > SAMPLE:
        inputs = _spaced(inputs)
    lengths, counts = np.unique(_distances(s.matrix, inputs)[outputs], return_counts=True)
    return {int(n): int(c) for n, c in zip(lengths, counts, strict=True)}


def mean_path(s: Structure) -> float:
    """Return the mean number of edges from an input to an output, of pairs with a path."""
    lengths = {n: c for n, c in path_lengths(s).items() if n >= 0}
    total = sum(lengths.values())
    return sum(n * c for n, c in lengths.items()) / total if total else math.nan


def connected(s: Structure) -> float:
    """Return the share of pairs of an input and an output with a path."""
    lengths = path_lengths(s)
    return 1 - lengths.get(-1, 0) / sum(lengths.values())


def _undirected(s: Structure) -> scipy.sparse.csr_array:
    both = s.matrix + s.matrix.T
    both.setdiag(0)
    both.eliminate_zeros()
    both.data[:] = 1
    return both


def clustering(s: Structure) -> float:
    """Return the mean clustering coefficient, directions apart (Watts & Strogatz 1998).

    Of nodes that touch an edge: the others would only count how sparse it is.
    """
    both = _undirected(s)
    degree = both.sum(1)
    triangles = (both @ both).multiply(both).sum(1)
    pairs = degree * (degree - 1)
    local = np.divide(triangles, pairs, out=np.zeros(len(degree)), where=pairs > 0)
    return float(local[degree > 0].mean()) if (degree > 0).any() else math.nan


def typical_path(s: Structure) -> float:
    """Return the mean shortest path between nodes that are connected, directions apart.

    From :data:`SAMPLE` nodes, evenly spaced, where more touch an edge.
    """
    both = _undirected(s)
    nodes = np.flatnonzero(both.sum(1) > 0)
    if len(nodes) > SAMPLE:
        nodes = _spaced(nodes)
    found = _distances(both, nodes)
    apart = found[found > 0]
    return float(apart.mean()) if len(apart) else math.nan


def unneeded(s: Structure) -> float:
    """Return how many nodes have no path to an output."""
    return float((~s.reached_from(s.nodes_of(Role.OUTPUT), backward=True)).sum())


def _dead(s: Structure) -> float:
    return float(((s.out_degree == 0) & (s.role != Role.OUTPUT)).sum())


STATISTICS: dict[str, Callable[[Structure], float]] = {
    "largest in-degree": lambda s: float(s.in_degree.max(initial=0)),
    "largest out-degree": lambda s: float(s.out_degree.max(initial=0)),
    "deviation of in-degrees": lambda s: float(s.in_degree.std()),
    "deviation of out-degrees": lambda s: float(s.out_degree.std()),
    "edges that skip a block": skipping,
    "dead nodes": _dead,
    "nodes without path to output": unneeded,
    "inputs and outputs connected": connected,
    "mean path, input to output": mean_path,
    "clustering": clustering,
    "typical path": typical_path,
}
"""Numbers of a wiring, by name; :func:`measure` compares each with random wirings."""


def betweenness(s: Structure, seed: int = 0) -> Floats:
    """Return the share of shortest paths through each node ``[V]`` (Freeman 1977, Brandes 2001).

    Over :data:`SAMPLE` nodes drawn at random where all would take too long.
    """
    if not s.num_edges:
        return np.zeros(s.num_nodes)
    if s.num_nodes * s.num_edges > DIRECT:
        graph = nx.DiGraph()
        graph.add_nodes_from(range(s.num_nodes))
        graph.add_edges_from(zip(s.source.tolist(), s.target.tolist(), strict=True))
        sampled = nx.betweenness_centrality(graph, k=min(SAMPLE, s.num_nodes), seed=seed)
        return np.array([sampled[v] for v in range(s.num_nodes)])
    graph = rustworkx.PyDiGraph(multigraph=False)
    graph.add_nodes_from(range(s.num_nodes))
    graph.add_edges_from_no_data(list(zip(s.source.tolist(), s.target.tolist(), strict=True)))
    found = rustworkx.digraph_betweenness_centrality(graph)
    return np.array([found[v] for v in range(s.num_nodes)])


def dead_nodes(s: Structure) -> DeadNodes:
    """Return nodes that do nothing, and why."""
    ins, outs = s.nodes_of(Role.INPUT), s.nodes_of(Role.OUTPUT)
    leads = s.reached_from(outs, backward=True)
    comes = s.reached_from(ins)
    sends, is_fed = s.out_degree > 0, s.in_degree > 0
    return DeadNodes(
        unheard=np.flatnonzero(~sends & (s.role != Role.OUTPUT)),
        lost=np.flatnonzero(sends & ~leads),
        unfed=np.flatnonzero(~is_fed & (s.role != Role.INPUT)),
        cut_off=np.flatnonzero(is_fed & ~comes),
    )


def block_pairs(s: Structure) -> tuple[BlockPair, ...]:
    """Return edges between blocks, beside what their share of the candidates would give."""
    blocks = s.topology.blocks
    number, k = s.topology.num_candidates, s.num_edges
    real = np.zeros((len(blocks), len(blocks)), dtype=np.int64)
    np.add.at(real, (s.block[s.source], s.block[s.target]), 1)
    found = []
    for block in blocks:
        for i, there in _candidates_by_source(s, block.index).items():
            share = there / number
            variance = k * share * (1 - share) * (number - k) / max(number - 1, 1)
            edges = Statistic(float(real[i, block.index]), k * share, math.sqrt(variance))
            found.append(BlockPair(i, block.index, there, edges))
    return tuple(found)


def _candidates_by_source(s: Structure, j: int) -> dict[int, int]:
    """Return how many candidates lead into a block, by the block they come from."""
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

    Above 1 where nodes cluster more than in random wirings, and paths are about as short.
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
    """Measure a wiring, and random ones with the same blocks and budget.

    At 20,000 nodes it takes a minute; where it takes more than two seconds, progress is shown on a
    terminal.

    Args:
        graph: A graph, a sparse layer, or what ``to_networkx`` gives, edited or not; or a network,
            of which each graph and sparse layer is measured.
        candidates: Which edges might have been real; see :func:`structure_of`.
        random: Number of random wirings that ``mean`` and ``std`` are taken over, 2 or more.
        null: What random wirings share: ``"budget"``, the number of edges, drawn from all
            candidates alike; ``"degrees"``, also the numbers of edges into and out of every node,
            by double-edge swaps (:meth:`Structure.rewired`).
        seed: Of the random wirings, and of samples.

    Returns:
        Measures of the graph; of a network, measures by name of the module.

    Raises:
        ValueError: A graph that is not a topology, a network without a graph or sparse layer,
            fewer than two random wirings, or an unknown null model.
    """
    if null not in get_args(Null):
        raise ValueError(f"unknown null model {null!r} (known: {', '.join(get_args(Null))})")
    if random < 2:
        raise ValueError(f"a deviation needs two random wirings or more, got {random}")
    graph = unwrapped(graph) if isinstance(graph, nn.Module) else graph
    single = NeuralGraph | nn.Linear | nn.modules.conv._ConvNd
    if isinstance(graph, nn.Module) and not isinstance(graph, single):
        structures = structures_of(graph)
        if not structures:
            raise ValueError("the network has no NeuralGraph and no sparse layer to measure")
        return {name: _measured(s, random, null, seed) for name, s in structures.items()}
    return _measured(structure_of(graph, candidates), random, null, seed)


def _measured(s: Structure, random: int, null: Null, seed: int) -> Measures:
    if s.num_edges == s.topology.num_candidates and null == "budget":
        warnings.warn(
            "every candidate is real, so each random wiring is the wiring itself; to compare with "
            "others over the same blocks, measure graph.to_networkx()",
            stacklevel=3,
        )
    generator = np.random.default_rng(seed)
    draw = s.random if null == "budget" else s.rewired
    drawn = [draw(generator) for _ in range(random)]
    with tqdm(
        total=len(STATISTICS) + 1, desc="measuring", delay=2, leave=False, disable=None
    ) as bar:
        statistics = {}
        for name, function in STATISTICS.items():
            values = np.array([function(one) for one in drawn])
            values = values[~np.isnan(values)]  # no path, say, in one of them
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
