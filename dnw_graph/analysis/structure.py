"""Wirings as arrays, and random wirings with the same properties."""

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
from dnw_graph.topology.order import reached
from dnw_graph.wiring import Wiring, selectors, whole

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Structure:
    """The real edges of a graph.

    Attributes:
        topology: The topology, with nodes in blocks and candidate edges.
        source: Source node of each edge ``[k]``, by number in the topology.
        target: Target node of each edge ``[k]``.
        weight: Weight of each edge ``[k]``.
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
        """Names of the nodes."""
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
        """Adjacency matrix ``[V, V]``, with sources in rows and targets in columns."""
        ones = np.ones(self.num_edges, dtype=np.float64)
        shape = self.num_nodes, self.num_nodes
        return scipy.sparse.csr_array((ones, (self.source, self.target)), shape=shape)

    def nodes_of(self, role: Role) -> Ints:
        """Return the nodes of a role, ascending."""
        return np.flatnonzero(self.role == role)

    def reached_from(self, start: Ints, backward: bool = False) -> NDArray[np.bool_]:
        """Return a mask of the nodes with a path of real edges from one of ``start`` ``[V]``.

        With ``backward``, of the nodes with a path to one of them. Includes the nodes themselves.
        """
        ends = (self.target, self.source) if backward else (self.source, self.target)
        edge_index, nodes = torch.from_numpy(np.stack(ends)), torch.from_numpy(np.asarray(start))
        return reached(edge_index, self.num_nodes, nodes).numpy()

    def random(self, generator: np.random.Generator) -> "Structure":
        """Return a wiring with as many edges, drawn uniformly from all candidates."""
        number = self.topology.num_candidates
        ids = generator.choice(number, self.num_edges, replace=False, shuffle=False)
        ids.sort()
        source, target = self.topology.edges(torch.from_numpy(ids)).numpy()
        return replace(self, source=source, target=target)

    def rewired(self, generator: np.random.Generator, rounds: int = 50) -> "Structure":
        """Return a random wiring with the same in- and out-degree of every node.

        Uses double-edge swaps (Maslov and Sneppen 2002): edges ``a -> b`` and ``c -> d`` become
        ``a -> d`` and ``c -> b`` if these are candidates and not real yet. Each round pairs all
        edges again. (The swaps of networkx cannot be restricted to candidates.)

        Args:
            generator: Random number generator.
            rounds: Number of rounds.
        """
        source, target, num_pairs = self.source, self.target.copy(), self.num_edges // 2
        for _ in range(rounds):
            order = generator.permutation(self.num_edges)[: 2 * num_pairs]
            first, second = order.reshape(2, num_pairs)
            old_keys = np.sort(self._keys(source, target))
            new_keys = np.stack(
                [
                    self._keys(source[first], target[second]),
                    self._keys(source[second], target[first]),
                ]
            )
            _, index, counts = np.unique(new_keys, return_inverse=True, return_counts=True)
            is_allowed = counts[index.reshape(new_keys.shape)] == 1
            place = np.searchsorted(old_keys, new_keys).clip(max=len(old_keys) - 1)
            is_allowed &= old_keys[place] != new_keys
            is_allowed &= self.are_candidates(new_keys % self.num_nodes, new_keys // self.num_nodes)
            # Some swaps are skipped: otherwise the parity of the permutation of few edges is fixed.
            swaps = is_allowed.all(0) & (generator.random(num_pairs) < 0.75)
            first, second = first[swaps], second[swaps]
            target[first], target[second] = target[second], target[first]
        order = np.lexsort((source, target))
        return replace(self, source=source[order], target=target[order], weight=self.weight[order])

    def _keys(self, source: Ints, target: Ints) -> Ints:
        """Return a number for each pair of nodes, ordered by target and then source."""
        keys: Ints = target * self.num_nodes + source
        return keys

    def are_candidates(self, source: Ints, target: Ints) -> NDArray[np.bool_]:
        """Return whether each pair of nodes is a candidate edge."""
        blocks = self.topology.blocks
        may_connect = np.zeros((len(blocks), len(blocks)), dtype=bool)
        for block in blocks:
            may_connect[list(block.sources), block.index] = True
        result: NDArray[np.bool_] = may_connect[self.block[source], self.block[target]]
        is_listed = np.array([not block.complete for block in blocks])[self.block[target]] & result
        if is_listed.any():
            keys, edge_keys = self._listed_keys, self._keys(source[is_listed], target[is_listed])
            place = np.searchsorted(keys, edge_keys).clip(max=len(keys) - 1)
            result[is_listed] = keys[place] == edge_keys
        return result

    @cached_property
    def _listed_keys(self) -> Ints:
        """The :meth:`_keys` of the candidates into blocks that are not complete, ascending."""
        ids = [
            torch.arange(block.edges.start, block.edges.stop, device="cpu")
            for block in self.topology.blocks
            if not block.complete
        ]
        return self._keys(*self.topology.edges(torch.cat(ids)).numpy())


def structure_of(
    graph: "nn.Module | nx.DiGraph | Structure", candidates: Topology | None = None
) -> Structure:
    """Return the real edges of a graph as arrays.

    Args:
        graph: A graph, a sparse layer (a bipartite graph from input channels times filter positions
            to output channels), or a graph from ``to_networkx``, edited or not. Edges with
            ``real=False`` are candidates only; an edge without ``weight`` has weight 1.
        candidates: Edges that could have been real. By default, for a networkx graph: its edges, if
            any has the attribute ``real``; otherwise all edges that a topology of complete blocks
            allows.

    Raises:
        ValueError: If the graph is not a topology, an edge is not a candidate, or a network does
            not have exactly one graph.
        TypeError: If ``graph`` is of another type.
    """
    if isinstance(graph, Structure):
        return graph
    if isinstance(graph, nn.Module):
        structures = structures_of(graph)
        if len(structures) != 1:
            names = ", ".join(list(structures)[:5]) or "none"
            raise ValueError(
                f"the network has {len(structures)} graphs ({names}); pass one of them"
            )
        return next(iter(structures.values()))
    if not isinstance(graph, nx.DiGraph):
        raise TypeError(
            "expected a NeuralGraph, a sparse layer, a network, or a networkx.DiGraph, got "
            f"{type(graph).__name__}"
        )
    topology = Topology.from_networkx(graph)
    if candidates is None:
        has_marks = any("real" in data for _, _, data in graph.edges(data=True))
        candidates = topology if has_marks else _complete(topology)
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
    structure = Structure(candidates, source[order], target[order], rows[order, 2])
    _check_candidates(structure)
    return structure


def structures_of(model: nn.Module) -> dict[str, Structure]:
    """Return the real edges of each graph and sparse layer of a network, by module name."""
    structures = {}
    for name, selector, weight in selectors(unwrapped(model)):
        flat = selector.flat(whole(weight.detach()))
        wiring = Wiring.of(selector.select(flat, training=False), flat, selector.topology)
        source, target = selector.topology.edges(wiring.edge_id.cpu()).numpy()
        values = wiring.edge_weight.detach().double().cpu().numpy()
        layer = name.removesuffix("parametrizations.weight").removesuffix(".")
        layer = layer.replace("parametrizations.", "")  # for parameters other than weight
        structures[layer] = Structure(selector.topology, source, target, values)
    return structures


def _check_candidates(structure: Structure) -> None:
    """Raise ValueError if an edge is not a candidate."""
    invalid = np.flatnonzero(~structure.are_candidates(structure.source, structure.target))
    if len(invalid):
        u, v = structure.source[invalid[0]], structure.target[invalid[0]]
        raise ValueError(
            f"edge {structure.names[u]!r} -> {structure.names[v]!r} is not a candidate of the "
            "topology"
        )


def _complete(topology: Topology) -> Topology:
    """Return the topology with all candidates from every block to every later block.

    If any edge leads back or stays within a block, candidates lead from every node to every node
    except inputs without incoming edges.
    """
    block = topology.block
    source, target = topology.edge_index
    forward = bool((block[source] < block[target]).all())
    sizes = [len(b.nodes) for b in topology.blocks]
    ends = torch.tensor([0, *sizes], device="cpu").cumsum(0)
    blocks = []
    for b in topology.blocks:
        is_fixed = b.role == Role.INPUT and not b.edges
        last = 0 if is_fixed else int(ends[b.index]) if forward else topology.num_nodes
        blocks.append((len(b.nodes), b.role, range(last)))
    return Topology.from_blocks(blocks, topology.names, topology.inputs, topology.outputs)
