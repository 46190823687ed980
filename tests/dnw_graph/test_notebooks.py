"""What objects show in a notebook."""

import re
from xml.etree import ElementTree

import torch

from dnw_graph import NeuralGraph, Topology, cost

SVG = "{http://www.w3.org/2000/svg}"


def drawn(html: str) -> tuple[str, ElementTree.Element]:
    """Return the caption and the picture."""
    caption, picture = re.fullmatch(r"<div>(.*)</div>(<svg.*</svg>)", html).groups()
    return caption, ElementTree.fromstring(picture)


def titles(picture: ElementTree.Element, kind: str) -> list[str]:
    return [element.find(f"{SVG}title").text for element in picture.iter(f"{SVG}{kind}")]


def test_a_topology_draws_its_candidates() -> None:
    caption, picture = drawn(Topology.layered([4, 6, 5, 3])._repr_html_())
    assert caption == "119 candidate edges"
    assert titles(picture, "rect") == [
        "block 0: 4 input nodes",
        "block 1: 6 hidden nodes",
        "block 2: 5 hidden nodes",
        "block 3: 3 output nodes",
    ]
    assert sorted(titles(picture, "path")) == [
        "12 edges from block 0 to block 3",
        "15 edges from block 2 to block 3",
        "18 edges from block 1 to block 3",
        "20 edges from block 0 to block 2",
        "24 edges from block 0 to block 1",
        "30 edges from block 1 to block 2",
    ]
    assert [text.text for text in picture.iter(f"{SVG}text")] == ["4", "6", "5", "3"]


def test_a_graph_draws_its_real_edges() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=10, node="relu")
    with torch.no_grad():
        graph.weight.fill_(0.01)
        source, _ = graph.topology.block[graph.topology.edge_index]
        graph.weight[(source == 1).nonzero().flatten()[:8]] = 1.0  # the rest: the first candidates
    caption, picture = drawn(graph._repr_html_())
    assert caption == ("NeuralGraph: 10 of 54 candidate edges are real, rule dnw, schedule static")
    assert sorted(titles(picture, "path")) == [
        "2 edges from block 0 to block 1",
        "8 edges from block 1 to block 2",
    ]


def test_many_blocks_and_cycles() -> None:
    chain = Topology.layered([1] * 60)
    assert chain._repr_html_() == f"<div>{chain.num_candidates:,} candidate edges</div>"
    _, picture = drawn(Topology.recurrent(3, 7, 2)._repr_html_())
    assert any("from block 1 to block 1" in title for title in titles(picture, "path"))


def test_cost_is_a_table() -> None:
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=54, node="relu")
    html = cost(graph, image_size=5)._repr_html_()
    rows = [[cell.text for cell in row] for row in ElementTree.fromstring(html)]
    assert rows[0] == ["multiply-adds per image", f"{54 * 25:,}"]
    assert dict(rows)["candidate edges"] == "54"
