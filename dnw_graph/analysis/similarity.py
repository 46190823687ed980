"""Similarity of two wirings of the same blocks, directly and up to renaming of nodes."""

from dataclasses import dataclass

import networkx as nx
import numpy as np
import scipy.sparse
from scipy.optimize import linear_sum_assignment

from dnw_graph.analysis.measures import Statistic
from dnw_graph.analysis.structure import Ints, Structure, structure_of
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.topology import Role

ROUNDS = 4  # rounds in which each block is matched again, with the others fixed


@dataclass(frozen=True)
class Similarity:
    """Similarity of two wirings.

    Attributes:
        jaccard: Share of the edges of either wiring that are in both, compared with pairs of random
            wirings.
        matched: The same after renaming the hidden nodes of the second wiring, within their blocks,
            to match those of the first; random wirings are matched too.
        renamed: Node of the second wiring that corresponds to each node of the first ``[V]``.
    """

    jaccard: Statistic
    matched: Statistic
    renamed: Ints


def similarity(
    first: NeuralGraph | nx.DiGraph | Structure,
    second: NeuralGraph | nx.DiGraph | Structure,
    *,
    random: int = 5,
    seed: int = 0,
) -> Similarity:
    """Compare two wirings, such as those that two seeds learned.

    Finding corresponding nodes is a graph matching problem. Each block is matched in turn by a
    linear assignment that maximises the number of common edges with the blocks matched so far,
    which finds a local optimum. Inputs and outputs, which have a meaning, are not renamed.

    Args:
        first: A graph, or a graph from its ``to_networkx``.
        second: Another graph with as many nodes in each block; in any order if both have the same
            names.
        random: Number of pairs of random wirings to compare with, 2 or more.
        seed: Seed of the random wirings.

    Raises:
        ValueError: If the two wirings have different blocks, or ``random`` is below 2.
    """
    if random < 2:
        raise ValueError(
            f"random must be 2 or more, for a standard deviation over random pairs, got {random}"
        )
    a, b = structure_of(first), structure_of(second)
    b = _renumbered(b, a)
    if not np.array_equal(a.block, b.block) or not np.array_equal(a.role, b.role):
        sizes = [[len(block.nodes) for block in s.topology.blocks] for s in (a, b)]
        raise ValueError(
            f"the wirings must have the same blocks, got blocks of {sizes[0]} and {sizes[1]} nodes"
        )
    generator = np.random.default_rng(seed)
    renamed = _match(a, b)
    values = [(jaccard(a, b), jaccard(a, b, renamed))]  # this pair, then random pairs
    for _ in range(random):
        x, y = a.random(generator), b.random(generator)
        values.append((jaccard(x, y), jaccard(x, y, _match(x, y))))
    plain, matched = (
        Statistic(float(column[0]), float(column[1:].mean()), float(column[1:].std(ddof=1)))
        for column in np.array(values).T
    )
    return Similarity(plain, matched, renamed)


def _renumbered(b: Structure, a: Structure) -> Structure:
    """Return ``b`` with its nodes numbered as in ``a`` if both have the same names and blocks."""
    index_of = {name: v for v, name in enumerate(a.names)}
    if list(a.names) == list(b.names) or index_of.keys() != set(b.names):
        return b
    new_index = np.array([index_of[name] for name in b.names])
    if not np.array_equal(a.block[new_index], b.block):
        return b
    return Structure(a.topology, new_index[b.source], new_index[b.target], b.weight)


def jaccard(a: Structure, b: Structure, renamed: Ints | None = None) -> float:
    """Return the share of the edges of either wiring that are in both; 1 if neither has any.

    Args:
        a: A wiring.
        b: A wiring of the same nodes.
        renamed: Node of ``b`` that corresponds to each node of ``a``; by default the same node.
    """
    number = a.num_nodes
    keys_a, keys_b = (s.source * number + s.target for s in (a, b))
    if renamed is not None:
        keys_a = renamed[a.source] * number + renamed[a.target]
    both = len(np.intersect1d(keys_a, keys_b, assume_unique=True))
    either = len(keys_a) + len(keys_b) - both
    return both / either if either else 1.0


def _match(a: Structure, b: Structure) -> Ints:
    """Return the corresponding node of ``b`` for each node of ``a``, in the same block."""
    out_a, in_a = a.matrix, a.matrix.T.tocsr()
    out_b, in_b = b.matrix.tocsc(), b.matrix.T.tocsc()
    hidden = [block for block in a.topology.blocks if block.role == Role.HIDDEN]
    renamed = np.arange(a.num_nodes)
    fixed = a.role != Role.HIDDEN
    best, best_renamed = jaccard(a, b), renamed.copy()
    for round_index in range(ROUNDS):
        for block in hidden if round_index % 2 == 0 else reversed(hidden):
            nodes = block.rows
            matched = np.flatnonzero(fixed)
            shared = _common_neighbours(out_a[nodes], out_b, matched, renamed, nodes)
            shared += _common_neighbours(in_a[nodes], in_b, matched, renamed, nodes)
            _, columns = linear_sum_assignment(shared, maximize=True)
            renamed[nodes] = columns + nodes.start
            fixed[nodes] = True
        value = jaccard(a, b, renamed)
        if value > best:
            best, best_renamed = value, renamed.copy()
    return best_renamed


def _common_neighbours(
    matrix_a: scipy.sparse.csr_array,
    matrix_b: scipy.sparse.csc_array,
    matched: Ints,
    renamed: Ints,
    nodes: slice,
) -> np.ndarray:
    """Return the numbers of common matched neighbours of all pairs of nodes of a block."""
    columns_b = matrix_b[:, renamed[matched]].tocsr()[nodes]
    return (matrix_a[:, matched] @ columns_b.T).toarray()
