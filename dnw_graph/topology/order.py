"""Sorting of edge lists, and levels and distances of nodes, without Python loops over edges."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor


def check_edges(edge_index: Tensor, num_nodes: int) -> None:
    """Raise ValueError for a wrong shape or type, or an edge with a node that does not exist."""
    if edge_index.dim() != 2 or edge_index.shape[0] != 2 or edge_index.is_floating_point():
        raise ValueError(
            f"edge_index must hold integers [2, E], got {edge_index.dtype} {list(edge_index.shape)}"
        )
    outside = (edge_index < 0) | (edge_index >= num_nodes)
    if bool(outside.any()):
        source, target = edge_index[:, outside.any(0)][:, 0].tolist()
        raise ValueError(
            f"edge {source} -> {target} has a node that does not exist: "
            f"there are {num_nodes} nodes, numbered from 0"
        )


def sorted_edges(
    edge_index: Tensor, num_nodes: int, describe: Callable[[Iterable[int]], str]
) -> Tensor:
    """Return the edges sorted by ``(target, source)``; raise ValueError if one is repeated."""
    check_edges(edge_index, num_nodes)
    edge_index = edge_index.long().cpu()
    key = edge_index[1] * num_nodes + edge_index[0]
    if not bool((key.diff() > 0).all()):
        key, order = key.sort()
        edge_index = edge_index[:, order]
        if bool((key.diff() == 0).any()):
            repeated = int((key.diff() == 0).nonzero()[0])
            source, target = edge_index[:, repeated].tolist()
            raise ValueError(
                f"edge {describe([source])} -> {describe([target])} is listed twice: there is at "
                "most one candidate edge from a node to another"
            )
    return edge_index.contiguous()


def levels(edge_index: Tensor, num_nodes: int) -> Tensor | None:
    """Return the length of the longest path that ends in each node, or None for a cycle."""
    children, ptr = _children(edge_index, num_nodes)
    waiting = np.bincount(children, minlength=num_nodes)
    level = np.zeros(num_nodes, dtype=np.int64)
    ready, depth, done = np.flatnonzero(waiting == 0), 0, 0
    while len(ready):
        level[ready], done = depth, done + len(ready)
        reached, times = np.unique(_children_of(ready, children, ptr), return_counts=True)
        waiting[reached] -= times
        ready, depth = reached[waiting[reached] == 0], depth + 1
    return torch.from_numpy(level) if done == num_nodes else None


def distances(edge_index: Tensor, num_nodes: int, start: Tensor) -> Tensor:
    """Return the length of a shortest path to each node from the nearest start, or -1."""
    children, ptr = _children(edge_index, num_nodes)
    distance = np.full(num_nodes, -1, dtype=np.int64)
    frontier, length = start.numpy(), 0
    while len(frontier):
        distance[frontier] = length
        nodes = np.unique(_children_of(frontier, children, ptr))
        frontier, length = nodes[distance[nodes] < 0], length + 1
    return torch.from_numpy(distance)


def reached(edge_index: Tensor, num_nodes: int, start: Tensor) -> Tensor:
    """Return whether each node is a start or has a path from one ``[V]``, boolean."""
    return distances(edge_index, num_nodes, start) >= 0


def walks(edge_index: Tensor, num_nodes: int, start: Tensor, length: int) -> Tensor:
    """Return the nodes where walks of ``length`` edges end, ascending."""
    children, ptr = _children(edge_index, num_nodes)
    ends = start.sort().values.numpy()
    for _ in range(length):
        before, ends = ends, np.unique(_children_of(ends, children, ptr))
        if np.array_equal(before, ends):
            break
    return torch.from_numpy(ends)


def _children(edge_index: Tensor, num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Return targets sorted by source, and where those of each source begin ``[V + 1]``."""
    source, target = edge_index.numpy()
    order = np.argsort(source, kind="stable")
    ptr = np.concatenate([[0], np.bincount(source, minlength=num_nodes).cumsum()])
    return target[order], ptr


def _children_of(nodes: np.ndarray, children: np.ndarray, ptr: np.ndarray) -> np.ndarray:
    """Return the targets of all edges out of some nodes."""
    counts = ptr[nodes + 1] - ptr[nodes]
    shift = np.repeat(ptr[nodes] - np.concatenate([[0], counts.cumsum()[:-1]]), counts)
    return children[shift + np.arange(counts.sum())]
