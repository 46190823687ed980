"""Files of networkx graphs, in formats that other programs support."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import ParseError

import numpy as np

from dnw_graph._files import replacing

if TYPE_CHECKING:
    import networkx as nx

_NOT_XML = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


def check_graph(graph: Any) -> None:
    """Raise TypeError if a graph is not one of networkx."""
    import networkx as nx

    if not isinstance(graph, nx.Graph):
        hint = ": pass the result of its to_networkx()" if hasattr(graph, "to_networkx") else ""
        raise TypeError(f"expected a networkx.DiGraph, got a {type(graph).__name__}{hint}")


def write_graph(graph: "nx.DiGraph", path: str | Path) -> None:
    """Write a networkx graph to a file, with the attributes of its nodes and edges.

    An existing file is replaced only when the new one is complete. :func:`read_graph` reads GraphML
    and JSON.

    Args:
        graph: The graph, for example from :meth:`Topology.to_networkx` or
            :meth:`NeuralGraph.to_networkx`.
        path: Path that ends in ``.graphml``, ``.json`` (node-link data), ``.gexf`` (Gephi) or
            ``.cyjs`` (Cytoscape). In GraphML and GEXF, either all nodes have text as names or all
            have whole numbers.

    Raises:
        ValueError: If the suffix is unknown, or the format cannot hold names or attributes.
        TypeError: If ``graph`` is not a networkx graph.
    """
    import networkx as nx

    check_graph(graph)
    path = Path(path)
    if path.suffix not in (".json", ".graphml", ".gexf", ".cyjs"):
        raise ValueError(
            f"expected a path that ends in .graphml, .json, .gexf or .cyjs, got {path.name}"
        )
    try:
        with replacing(path) as partial:
            _write(graph, path.suffix, partial)
    except (TypeError, KeyError, nx.NetworkXException) as error:
        raise ValueError(f"{path.name} cannot hold this graph: {error}") from error


def _write(graph: "nx.DiGraph", suffix: str, path: Path) -> None:
    """Write a graph in the format of a suffix."""
    import networkx as nx

    if suffix == ".json":
        _check_json(graph)
        data = nx.node_link_data(graph, edges="edges")
        path.write_text(json.dumps(data, default=_plain), encoding="utf-8")
    elif suffix == ".cyjs":
        data = nx.cytoscape_data(graph)
        path.write_text(json.dumps(data, default=_plain), encoding="utf-8")
    elif suffix == ".gexf":
        _kind_of_names(graph)
        nx.write_gexf(graph, path)
    else:
        marked = graph.copy()
        marked.graph["names"] = _kind_of_names(graph)  # GraphML stores all names as text
        nx.write_graphml(marked, path)


def _check_json(graph: "nx.DiGraph") -> None:
    """Raise ValueError if an attribute has a name that node-link data reserves."""
    for name, data in graph.nodes(data=True):
        if "id" in data:
            raise ValueError(f"node {name!r} has an attribute 'id', a reserved name: rename it")
    for u, v, data in graph.edges(data=True):
        if reserved := {"source", "target"} & data.keys():
            raise ValueError(
                f"edge {u!r} -> {v!r} has an attribute {min(reserved)!r}, a reserved name: "
                "rename it"
            )


def _plain(value: Any) -> Any:
    """Return a NumPy scalar as a Python number."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{value!r} is neither text nor a number")


def _kind_of_names(graph: "nx.DiGraph") -> str:
    """Return ``"int"`` or ``"str"``; raise ValueError for mixed or other names."""
    if all(isinstance(name, int) and not isinstance(name, bool) for name in graph):
        return "int"
    for name in graph:
        if not isinstance(name, str) or _NOT_XML.search(name):
            raise ValueError(
                "in this format, the names of nodes must all be whole numbers or all be printable "
                f"text, got {name!r}: write a .json file instead"
            )
    return "str"


def _with_names_in_attribute(graph: "nx.DiGraph", attribute: str) -> "nx.DiGraph":
    """Return a graph with the names that igraph moved to an attribute when it wrote n0, n1, ..."""
    import networkx as nx

    names = {node: data.get(attribute) for node, data in graph.nodes(data=True)}
    renamed = list(graph) == [f"n{i}" for i in range(len(graph))]
    if not renamed or None in names.values() or len(set(names.values())) < len(names):
        return graph
    graph = nx.relabel_nodes(graph, names)
    for _, data in graph.nodes(data=True):
        del data[attribute]
    return graph


def read_graph(path: str | Path) -> "nx.DiGraph":
    """Read a directed graph from a ``.graphml`` or ``.json`` (node-link data) file.

    Names that igraph moved to an attribute when it wrote the file are restored.

    Raises:
        ValueError: If the suffix is unknown, the file is damaged, or the graph is undirected.
    """
    import networkx as nx

    path = Path(path)
    if path.suffix not in (".json", ".graphml"):
        raise ValueError(f"expected a .graphml or .json file, got {path.name}")
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
        raise ValueError(f"{path} does not hold a graph that can be read: {error}") from error
    if not graph.is_directed():
        raise ValueError(f"{path} holds an undirected graph, but a wiring needs a directed one")
    return graph
