"""A wiring as arrays, and random wirings like it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import networkx as nx
import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch import nn

from dnw_graph._wrapped import unwrapped
from dnw_graph.topology import Role, Topology
from dnw_graph.topology._order import reached
from dnw_graph.wiring import Wiring, selectors, whole

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Structure:
    """The real edges of a graph.

    Attributes:
        topology: Nodes in blocks, and the candidates.
        source: Node that each edge leaves ``[k]``, by number in the topology.
        target: Node that it enters ``[k]``.
        weight: Its weight ``[k]``.
    """

    topology: Topology
    source: Ints
    target: Ints
    weight: Floats

    @property
    def num_nodes(self) -> int:
        """Number of nodes ``V``."""
        return self.topology.num_nodes

    @property
    def num_edges(self) -> int:
        """Number of real edges ``k``."""
        return len(self.source)

    @property
    def names(self) -> Sequence[Hashable]:
        """What nodes are called."""
        return self.topology.names

    @cached_property
    def block(self) -> Ints:
        """Block of each node ``[V]``."""
        return self.topology.block.numpy()

    @cached_property
    def role(self) -> Ints:
        """:class:`Role` of each node ``[V]``."""
        return self.topology.role.numpy()

    @cached_property
    def in_degree(self) -> Ints:
        """Number of edges into each node ``[V]``."""
        return np.bincount(self.target, minlength=self.num_nodes)

    @cached_property
    def out_degree(self) -> Ints:
        """Number of edges out of each node ``[V]``."""
        return np.bincount(self.source, minlength=self.num_nodes)

    @cached_property
    def matrix(self) -> scipy.sparse.csr_array:
        """1 where an edge leads from the node of the row to that of the column ``[V, V]``."""
        ones = np.ones(self.num_edges, dtype=np.float64)
        shape = self.num_nodes, self.num_nodes
        return scipy.sparse.csr_array((ones, (self.source, self.target)), shape=shape)

    def nodes_of(self, role: Role) -> Ints:
        """Return the nodes of a role, ascending."""
        return np.flatnonzero(self.role == role)

    def reached_from(self, start: Ints, backward: bool = False) -> NDArray[np.bool_]:
        """Return which nodes have a path of real edges from one of some nodes, or to one ``[V]``.

        These nodes themselves are among them.
        """
        ends = (self.target, self.source) if backward else (self.source, self.target)
        edge_index, nodes = torch.from_numpy(np.stack(ends)), torch.from_numpy(np.asarray(start))
        return reached(edge_index, self.num_nodes, nodes).numpy()

    def random(self, generator: np.random.Generator) -> "Structure":
        """Return as many edges drawn from all candidates alike: the same blocks and budget."""
        number = self.topology.num_candidates
        ids = generator.choice(number, self.num_edges, replace=False, shuffle=False)
        ids.sort()
        source, target = self.topology.edges(torch.from_numpy(ids)).numpy()
        return replace(self, source=source, target=target)

    def rewired(self, generator: np.random.Generator, rounds: int = 50) -> "Structure":
        """Return candidates drawn at random with as many edges into and out of every node.

        By double-edge swaps (Maslov and Sneppen 2002): of two edges, ``a -> b`` and ``c -> d``
        become ``a -> d`` and ``c -> b`` where these are candidates and not there yet. In each round
        all edges are paired anew. (Those of networkx do not know candidates.)

        Args:
            generator: Random numbers.
            rounds: How often.
        """
        source, target, half = self.source, self.target.copy(), self.num_edges // 2
        for _ in range(rounds):
            first, second = generator.permutation(self.num_edges)[: 2 * half].reshape(2, half)
            old = np.sort(self._keys(source, target))
            new = np.stack(
                [
                    self._keys(source[first], target[second]),
                    self._keys(source[second], target[first]),
                ]
            )
            _, place, times = np.unique(new, return_inverse=True, return_counts=True)
            allowed = times[place.reshape(new.shape)] == 1
            allowed &= old[np.searchsorted(old, new).clip(max=len(old) - 1)] != new
            allowed &= self.are_candidates(new % self.num_nodes, new // self.num_nodes)
            # Some are left out, else few edges would be an even or an odd permutation for ever.
            swapped = allowed.all(0) & (generator.random(half) < 0.75)
            first, second = first[swapped], second[swapped]
            target[first], target[second] = target[second], target[first]
        order = np.lexsort((source, target))
        return replace(self, source=source[order], target=target[order], weight=self.weight[order])

    def _keys(self, source: Ints, target: Ints) -> Ints:
        """Return a number for each pair of nodes, ascending with target and then source."""
        keys: Ints = target * self.num_nodes + source
        return keys

    def are_candidates(self, source: Ints, target: Ints) -> NDArray[np.bool_]:
        """Return which pairs of nodes are candidates."""
        blocks = self.topology.blocks
        fed = np.zeros((len(blocks), len(blocks)), dtype=bool)
        for block in blocks:
            fed[list(block.sources), block.index] = True
        found: NDArray[np.bool_] = fed[self.block[source], self.block[target]]
        listed = np.array([not block.complete for block in blocks])[self.block[target]] & found
        if listed.any():
            known, asked = self._listed, self._keys(source[listed], target[listed])
            found[listed] = known[np.searchsorted(known, asked).clip(max=len(known) - 1)] == asked
        return found

    @cached_property
    def _listed(self) -> Ints:
        """The candidates into blocks that are not complete, as :meth:`_keys`, ascending."""
        every = [
            torch.arange(block.edges.start, block.edges.stop, device="cpu")
            for block in self.topology.blocks
            if not block.complete
        ]
        return self._keys(*self.topology.edges(torch.cat(every)).numpy())


def structure_of(
    graph: "nn.Module | nx.DiGraph | Structure", candidates: Topology | None = None
) -> Structure:
    """Return the real edges of a graph as arrays.

    Args:
        graph: A graph, a layer made sparse (a bipartite graph from input channels times filter
            places to output channels), or what ``to_networkx`` gives, edited or not. Edges with
            ``real=False`` are candidates only; an edge without ``weight`` counts as 1.
        candidates: Which edges might have been real. Of a networkx graph, unless given: the edges
            with ``real``, where there are such; otherwise all from any block to any other that some
            edge leads to directly or not, as in a topology of complete blocks.

    Raises:
        ValueError: A graph that is not a topology, edges that are not candidates, or a network with
            another number of graphs than one.
    """
    if isinstance(graph, Structure):
        return graph
    if isinstance(graph, nn.Module):
        found = structures_of(graph)
        if len(found) != 1:
            names = ", ".join(list(found)[:5]) or "none"
            raise ValueError(f"the network has {len(found)} graphs ({names}); give one of them")
        return next(iter(found.values()))
    if not isinstance(graph, nx.DiGraph):
        raise TypeError(
            "expected a NeuralGraph, a sparse layer, a network, or a networkx.DiGraph, got "
            f"{type(graph).__name__}"
        )
    given = Topology.from_networkx(graph)
    if candidates is None:
        marked = any("real" in data for _, _, data in graph.edges(data=True))
        candidates = given if marked else _complete(given)
    place = {name: v for v, name in enumerate(candidates.names)}
    try:
        edges = [
            (place[u], place[v], float(data.get("weight", 1)))
            for u, v, data in graph.edges(data=True)
            if data.get("real", True)
        ]
    except KeyError as error:
        raise ValueError(f"the candidates have no node {error.args[0]!r}") from None
    rows = np.array(edges, dtype=np.float64).reshape(-1, 3)
    source, target = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
    order = np.lexsort((source, target))
    made = Structure(candidates, source[order], target[order], rows[order, 2])
    _check_candidates(made)
    return made


def structures_of(model: nn.Module) -> dict[str, Structure]:
    """Return the real edges of each graph and sparse layer of a network, by name of the module."""
    found = {}
    for name, selector, weight in selectors(unwrapped(model)):
        flat = selector.flat(whole(weight.detach()))
        wiring = Wiring.of(selector.select(flat, training=False), flat, selector.topology)
        source, target = selector.topology.edges(wiring.edge_id.cpu()).numpy()
        values = wiring.edge_weight.detach().double().cpu().numpy()
        layer = name.removesuffix("parametrizations.weight").removesuffix(".")
        layer = layer.replace("parametrizations.", "")  # of another parameter
        found[layer] = Structure(selector.topology, source, target, values)
    return found


def _check_candidates(made: Structure) -> None:
    strange = np.flatnonzero(~made.are_candidates(made.source, made.target))
    if len(strange):
        u, v = made.source[strange[0]], made.target[strange[0]]
        raise ValueError(
            f"edge {made.names[u]!r} -> {made.names[v]!r} is no candidate of the topology"
        )


def _complete(given: Topology) -> Topology:
    """Return the topology in which a block may be fed by every one before it.

    In one with edges back, or within a block, any node may feed any but inputs that nothing feeds.
    """
    block = given.block
    source, target = given.edge_index
    forward = bool((block[source] < block[target]).all())
    sizes = [len(b.nodes) for b in given.blocks]
    ends = torch.tensor([0, *sizes], device="cpu").cumsum(0)
    blocks = []
    for b in given.blocks:
        closed = b.role == Role.INPUT and not b.edges
        last = 0 if closed else int(ends[b.index]) if forward else given.num_nodes
        blocks.append((len(b.nodes), b.role, range(last)))
    return Topology.from_blocks(blocks, given.names, given.inputs, given.outputs)
