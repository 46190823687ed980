"""The nodes and edges of networkx graphs, checked."""

import math
import numbers
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from dnw_graph.topology.files import check_graph
from dnw_graph.topology.role import Role

if TYPE_CHECKING:
    import networkx as nx


def nodes_of(
    graph: "nx.DiGraph",
    inputs: Iterable[Hashable] | None,
    outputs: Iterable[Hashable] | None,
) -> dict[str, Any]:
    """Return names, edges, inputs, outputs and blocks, with nodes numbered in iteration order.

    Raises:
        ValueError: If the graph is undirected or has parallel edges, a role is unknown, inputs or
            outputs are not nodes, channels or blocks are not whole numbers, nodes share a channel,
            or only some nodes have a block.
        TypeError: If inputs or outputs are not a list.
    """
    check_graph(graph)
    if not graph.is_directed() or graph.is_multigraph():
        raise ValueError(
            f"expected a networkx.DiGraph, got a {type(graph).__name__}: edges need a direction, "
            "and there is at most one from a node to another"
        )
    names = list(graph)
    place = {name: v for v, name in enumerate(names)}
    ends = {}
    for role, argument in ((Role.INPUT, inputs), (Role.OUTPUT, outputs)):
        if argument is None:
            nodes = [name for name in names if _role(graph, name) == role]
            channels = _channels(graph, nodes)
            nodes.sort(key=lambda name: channels.get(name, place[name]))
        else:
            if not isinstance(argument, Iterable):
                raise TypeError(
                    f"{role.name.lower()}s must be a list of nodes, such as [{argument!r}], "
                    f"got {argument!r}"
                )
            nodes = list(argument)
            if missing := [name for name in nodes if name not in place]:
                raise ValueError(f"{role.name.lower()}s {missing[:5]} are not nodes of the graph")
        ends[role] = [place[name] for name in nodes]
    blocks = [_number(graph, name, "block") for name in names]
    if None in blocks and any(block is not None for block in blocks):
        without = [name for name, block in zip(names, blocks, strict=True) if block is None]
        raise ValueError(
            f"nodes {without[:5]} have no block, but others have: set it for all nodes or none"
        )
    edges = torch.tensor([(place[u], place[v]) for u, v in graph.edges], dtype=torch.int64)
    return {
        "names": names,
        "edges": edges.view(-1, 2).t(),
        "inputs": ends[Role.INPUT],
        "outputs": ends[Role.OUTPUT],
        "blocks": None if None in blocks else blocks,
    }


def _channels(graph: "nx.DiGraph", names: Sequence[Hashable]) -> dict[Hashable, int]:
    """Return the channels of nodes, or nothing if none of them has one.

    Raises:
        ValueError: If two nodes share a channel, or only some have one.
    """
    channels: dict[Hashable, int] = {}
    nodes: dict[int, Hashable] = {}
    for name in names:
        channel = _number(graph, name, "channel")
        if channel is None:
            continue
        if channel in nodes:
            raise ValueError(f"nodes {nodes[channel]!r} and {name!r} share channel {channel}")
        channels[name], nodes[channel] = channel, name
    if channels and (without := [name for name in names if name not in channels]):
        raise ValueError(
            f"nodes {without[:5]} have no channel, but others have: set it for all or none"
        )
    return channels


def _number(graph: "nx.DiGraph", name: Hashable, attribute: str) -> int | None:
    """Return an attribute of a node as a whole number; other programs write 2 as 2.0.

    Raises:
        ValueError: If the attribute is not a whole number.
    """
    value = graph.nodes[name].get(attribute)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not float(value).is_integer():
        raise ValueError(f"{attribute} {value!r} of node {name!r} is not a whole number")
    return int(value)


def _role(graph: "nx.DiGraph", name: Hashable) -> Role:
    """Return the role of a node, which is hidden if it has no attribute ``role``."""
    try:
        return Role.of(graph.nodes[name].get("role", "hidden"))
    except ValueError as error:
        raise ValueError(f"node {name!r} has {error}") from None
