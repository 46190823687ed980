"""Topologies as networkx graphs, and these as files."""

import json
import math
import numbers
import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import ParseError

import networkx as nx
import numpy as np
import torch

from dnw_graph.topology.role import Role

_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def nodes_of(
    graph: nx.DiGraph,
    inputs: Iterable[Hashable] | None,
    outputs: Iterable[Hashable] | None,
) -> dict[str, Any]:
    """Return names, edges, inputs, outputs and blocks of a graph, nodes by their place in it.

    Raises:
        ValueError: An undirected graph or one with parallel edges, an unknown role, inputs or
            outputs that are no nodes, channels or blocks that are no whole numbers, channels that
            nodes share, blocks of some nodes only.
    """
    if not graph.is_directed() or graph.is_multigraph():
        raise ValueError(
            f"a topology is made of a networkx.DiGraph, got a {type(graph).__name__}: edges need a "
            "direction, and there is one between two nodes at most"
        )
    names = list(graph)
    place = {name: v for v, name in enumerate(names)}
    ends = {}
    for role, given in ((Role.INPUT, inputs), (Role.OUTPUT, outputs)):
        if given is None:
            found = [name for name in names if _role(graph, name) == role]
            channels = _channels(graph, found)
            found.sort(key=lambda name: channels.get(name, place[name]))
        else:
            if not isinstance(given, Iterable):
                raise TypeError(
                    f"{role.name.lower()}s must be a list of nodes, such as [{given!r}], "
                    f"got {given!r}"
                )
            found = list(given)
            if missing := [name for name in found if name not in place]:
                raise ValueError(f"{role.name.lower()}s {missing[:5]} are no nodes of the graph")
        ends[role] = [place[name] for name in found]
    blocks = [_number(graph, name, "block") for name in names]
    if None in blocks and any(block is not None for block in blocks):
        without = [name for name, block in zip(names, blocks, strict=True) if block is None]
        raise ValueError(f"nodes {without[:5]} have no block, but others have; give all or none")
    edges = torch.tensor([(place[u], place[v]) for u, v in graph.edges], dtype=torch.int64)
    return {
        "names": names,
        "edges": edges.view(-1, 2).t(),
        "inputs": ends[Role.INPUT],
        "outputs": ends[Role.OUTPUT],
        "blocks": None if None in blocks else blocks,
    }


def _channels(graph: nx.DiGraph, names: Sequence[Hashable]) -> dict[Hashable, int]:
    """Return the channels of those nodes that have one.

    Raises:
        ValueError: Two nodes share a channel, or some have none.
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
        raise ValueError(f"nodes {without[:5]} have no channel, but others have; give all or none")
    return channels


def _number(graph: nx.DiGraph, name: Hashable, attribute: str) -> int | None:
    """Return an attribute of a node that is a whole number, which other programs write as 2.0.

    Raises:
        ValueError: It is something else.
    """
    value = graph.nodes[name].get(attribute)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not float(value).is_integer():
        raise ValueError(f"{attribute} {value!r} of node {name!r} is not a whole number")
    return int(value)


def _role(graph: nx.DiGraph, name: Hashable) -> Role:
    """Return the role of a node, hidden where it has none."""
    role = graph.nodes[name].get("role", "hidden")
    try:
        return Role[role.upper()] if isinstance(role, str) else Role(role)
    except (KeyError, ValueError):
        known = ", ".join(r.name.lower() for r in Role)
        raise ValueError(f"node {name!r} has unknown role {role!r} (known: {known})") from None


def write_graph(graph: nx.DiGraph, path: str | Path) -> None:
    """Write a networkx graph with the attributes of its nodes and edges.

    A file that is there is replaced once the new one is written. :func:`read_graph` reads GraphML
    and JSON.

    Args:
        graph: The graph, such as :meth:`Topology.to_networkx` or :meth:`NeuralGraph.to_networkx`
            makes.
        path: A file that ends in ``.graphml``, ``.json`` (node-link data), ``.gexf`` (Gephi) or
            ``.cyjs`` (Cytoscape). GraphML and GEXF take nodes that are all called by text, or all
            by whole numbers.

    Raises:
        ValueError: Another ending, or names or attributes that such a file cannot hold.
    """
    path = Path(path)
    if path.suffix not in (".json", ".graphml", ".gexf", ".cyjs"):
        raise ValueError(
            f"a graph is written to .graphml, .json, .gexf or .cyjs, not to {path.name}"
        )
    partial = path.with_name(f"{path.name}.partial")
    try:
        if path.suffix == ".json":
            _check_json(graph)
            data = nx.node_link_data(graph, edges="edges")
            partial.write_text(json.dumps(data, default=_plain), encoding="utf-8")
        elif path.suffix == ".cyjs":
            data = nx.cytoscape_data(graph)
            partial.write_text(json.dumps(data, default=_plain), encoding="utf-8")
        elif path.suffix == ".gexf":
            _kind_of_names(graph)
            nx.write_gexf(graph, partial)
        else:
            marked = graph.copy()
            marked.graph["names"] = _kind_of_names(graph)  # GraphML knows names as text only
            nx.write_graphml(marked, partial)
    except (TypeError, KeyError, nx.NetworkXException) as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"the graph does not fit into {path.name}: {error}") from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def _check_json(graph: nx.DiGraph) -> None:
    """Refuse attributes by whose names node-link data call nodes and the ends of edges."""
    for name, data in graph.nodes(data=True):
        if "id" in data:
            raise ValueError(f"node {name!r} has an attribute 'id': call it otherwise")
    for u, v, data in graph.edges(data=True):
        if taken := {"source", "target"} & data.keys():
            raise ValueError(f"edge {u!r} -> {v!r} has an attribute {min(taken)!r}: rename it")


def _plain(value: Any) -> Any:
    """Return the number in a NumPy scalar."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is neither text nor a number")


def _kind_of_names(graph: nx.DiGraph) -> str:
    if all(isinstance(name, int) and not isinstance(name, bool) for name in graph):
        return "int"
    for name in graph:
        if not isinstance(name, str) or _NOT_XML.search(name):
            raise ValueError(
                "this format takes nodes that are all called by whole numbers, or all by text of "
                f"printed characters, but there is {name!r}: write a .json file"
            )
    return "str"


def _with_names_in_attribute(graph: nx.DiGraph, attribute: str) -> nx.DiGraph:
    """Return a graph with the names that igraph moves to an attribute, calling nodes n0, n1, ..."""
    names = {node: data.get(attribute) for node, data in graph.nodes(data=True)}
    renamed = list(graph) == [f"n{i}" for i in range(len(graph))]
    if not renamed or None in names.values() or len(set(names.values())) < len(names):
        return graph
    graph = nx.relabel_nodes(graph, names)
    for _, data in graph.nodes(data=True):
        del data[attribute]
    return graph


def read_graph(path: str | Path) -> nx.DiGraph:
    """Read a graph that :func:`write_graph`, or another program, has written.

    Where igraph wrote the file, nodes have their own names again.

    Raises:
        ValueError: A file that is no directed graph, or with another ending.
    """
    path = Path(path)
    if path.suffix not in (".json", ".graphml"):
        raise ValueError(f"a graph is read from .graphml or .json, not from {path.name}")
    try:
        if path.suffix == ".json":
            data = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(data, dict):
                raise ValueError("expected node-link data, an object with nodes and edges")
            edges = "edges" if "edges" in data else "links"  # as older networkx calls them
            graph = nx.node_link_graph(data, edges=edges)
        else:
            graph = nx.read_graphml(path)
            for added in ("node_default", "edge_default"):
                graph.graph.pop(added, None)
            graph = _with_names_in_attribute(graph, "id")
            if graph.graph.pop("names", "str") == "int":
                graph = nx.relabel_nodes(graph, int)
    except (
        *(ValueError, TypeError, LookupError, AttributeError),
        *(ParseError, nx.NetworkXException),
    ) as error:
        raise ValueError(f"{path} is no graph that can be read: {error}") from error
    if not graph.is_directed():
        raise ValueError(f"{path} holds an undirected graph; a wiring has directions")
    return graph
