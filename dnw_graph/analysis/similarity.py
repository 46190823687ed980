"""How alike two wirings of the same blocks are, edge for edge and up to names of nodes."""

from dataclasses import dataclass

import networkx as nx
import numpy as np
import scipy.sparse
from scipy.optimize import linear_sum_assignment

from dnw_graph.analysis.measures import Statistic
from dnw_graph.analysis.structure import Ints, Structure, structure_of
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.topology import Role

ROUNDS = 4  # of matching each block anew, given how the others are matched


@dataclass(frozen=True)
class Similarity:
    """How alike two wirings are.

    Attributes:
        jaccard: Share of the edges of either that are in both, against pairs of random wirings.
        matched: The same once the hidden nodes of the second are renamed, within their blocks, so
            that as many edges agree as matching finds; random wirings are matched too.
        renamed: Node of the second that stands for each of the first ``[V]``.
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

    Which nodes correspond is a graph matching problem. Each block is matched in turn by the linear
    assignment that shares most edges with blocks as they are matched so far, a local optimum;
    inputs and outputs, which mean something, stay.

    Args:
        first: A graph, or what its ``to_networkx`` gives.
        second: Another with as many nodes in each block; where both call theirs alike, in any
            order.
        random: How many pairs of random wirings to compare with, 2 or more.
        seed: Of these.

    Raises:
        ValueError: The two have other blocks, or fewer than two random pairs.
    """
    if random < 2:
        raise ValueError(f"a deviation needs two random pairs or more, got {random}")
    a, b = structure_of(first), structure_of(second)
    b = _in_order(b, a)
    if not np.array_equal(a.block, b.block) or not np.array_equal(a.role, b.role):
        sizes = [[len(block.nodes) for block in s.topology.blocks] for s in (a, b)]
        raise ValueError(f"wirings of other blocks are not compared: {sizes[0]} and {sizes[1]}")
    generator = np.random.default_rng(seed)
    renamed = _match(a, b)
    found = [(jaccard(a, b), jaccard(a, b, renamed))]
    for _ in range(random):
        one, other = a.random(generator), b.random(generator)
        found.append((jaccard(one, other), jaccard(one, other, _match(one, other))))
    values = np.array(found)
    plain, matched = (
        Statistic(float(column[0]), float(column[1:].mean()), float(column[1:].std(ddof=1)))
        for column in values.T
    )
    return Similarity(plain, matched, renamed)


def _in_order(b: Structure, a: Structure) -> Structure:
    """Return a wiring with its nodes numbered as those of the same names in another one."""
    place = {name: v for v, name in enumerate(a.names)}
    if list(a.names) == list(b.names) or place.keys() != set(b.names):
        return b
    number = np.array([place[name] for name in b.names])
    if not np.array_equal(a.block[number], b.block):
        return b
    return Structure(a.topology, number[b.source], number[b.target], b.weight)


def jaccard(a: Structure, b: Structure, renamed: Ints | None = None) -> float:
    """Return the share of the edges of either that are in both; 1 where neither has any.

    Args:
        a: A wiring.
        b: Another of the same nodes.
        renamed: Node of ``b`` that stands for each of ``a``; the same unless given.
    """
    number = a.num_nodes
    ours, theirs = (s.source * number + s.target for s in (a, b))
    if renamed is not None:
        ours = renamed[a.source] * number + renamed[a.target]
    both = len(np.intersect1d(ours, theirs, assume_unique=True))
    either = len(ours) + len(theirs) - both
    return both / either if either else 1.0


def _match(a: Structure, b: Structure) -> Ints:
    """Return a node of ``b`` for each of ``a``, of the same block."""
    ahead, back = a.matrix, a.matrix.T.tocsr()
    ahead_b, back_b = b.matrix.tocsc(), b.matrix.T.tocsc()
    hidden = [block for block in a.topology.blocks if block.role == Role.HIDDEN]
    renamed = np.arange(a.num_nodes)
    fixed = a.role != Role.HIDDEN
    best, best_found = jaccard(a, b), renamed.copy()
    for turn in range(ROUNDS):
        for block in hidden if turn % 2 == 0 else reversed(hidden):
            nodes = slice(block.nodes.start, block.nodes.stop)
            known = np.flatnonzero(fixed)  # what is matched already
            shared = _shared(ahead[nodes], ahead_b, known, renamed, nodes)
            shared += _shared(back[nodes], back_b, known, renamed, nodes)
            _, columns = linear_sum_assignment(shared, maximize=True)
            renamed[nodes] = columns + nodes.start
            fixed[nodes] = True
        found = jaccard(a, b, renamed)
        if found > best:
            best, best_found = found, renamed.copy()
    return best_found


def _shared(
    ours: scipy.sparse.csr_array,
    theirs: scipy.sparse.csc_array,
    known: Ints,
    renamed: Ints,
    nodes: slice,
) -> np.ndarray:
    """Return how many matched neighbours each node of a block has in common with each other's."""
    there = theirs[:, renamed[known]].tocsr()[nodes]
    return (ours[:, known] @ there.T).toarray()
