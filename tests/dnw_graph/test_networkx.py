"""Graphs to networkx and back, in memory and in files."""

import copy
import itertools
import json
import pickle
import re
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dnw_graph import NeuralGraph, Topology, edited, freeze, read_graph, write_graph


@st.composite
def wirings(draw: st.DrawFn) -> nx.DiGraph:
    """Draw a directed graph with roles, nodes in any order and called anything."""
    size = draw(st.integers(2, 8))
    pairs = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))
    labels = draw(st.sampled_from([list(range(size)), [f"n{i}" for i in range(size)]]))
    order = draw(st.permutations(range(size)))
    graph = nx.DiGraph()
    for v in order:
        graph.add_node(labels[v], role={0: "input", 1: "output"}.get(v, "hidden"))
    graph.add_edges_from((labels[u], labels[v]) for u, v in draw(st.sets(pairs, max_size=20)))
    return graph


def stripped(graph: nx.DiGraph) -> nx.DiGraph:
    """Return nodes, roles and edges alone."""
    bare = nx.DiGraph()
    bare.add_nodes_from((v, {"role": data["role"]}) for v, data in graph.nodes(data=True))
    bare.add_edges_from(graph.edges)
    return bare


@given(wirings())
def test_networkx_to_topology_and_back_loses_nothing(graph: nx.DiGraph) -> None:
    topology = Topology.from_networkx(graph)
    back = topology.to_networkx()
    assert nx.utils.graphs_equal(stripped(back), graph)
    again = Topology.from_networkx(back)
    assert nx.utils.graphs_equal(again.to_networkx(), back)
    assert torch.equal(again.edge_index, topology.edge_index)
    assert torch.equal(again.block, topology.block)
    assert list(again.names) == list(topology.names)
    for name in ("inputs", "outputs"):
        ours, theirs = getattr(again, name), getattr(topology, name)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("suffix", [".json", ".graphml"])
@given(graph=wirings())
def test_files_lose_nothing(graph: nx.DiGraph, suffix: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("files") / f"wiring{suffix}"
    whole = Topology.from_networkx(graph).to_networkx()
    write_graph(whole, path)
    assert nx.utils.graphs_equal(read_graph(path), whole)


@pytest.mark.parametrize("suffix", [".json", ".graphml"])
def test_a_learned_graph_survives_a_file(tmp_path: Path, suffix: str) -> None:
    graph = NeuralGraph(Topology.layered([3, 5, 4, 2]), num_edges=20)
    write_graph(graph.to_networkx(), tmp_path / f"wiring{suffix}")
    again = edited(graph, read_graph(tmp_path / f"wiring{suffix}"))
    x = torch.randn(4, 3, 5, 5)
    assert torch.allclose(again.eval()(x), graph.eval()(x), atol=1e-6)


def test_inputs_and_outputs_may_be_named_in_their_order() -> None:
    graph = nx.DiGraph([("a", "c"), ("b", "c"), ("c", "d"), ("b", "e")])
    topology = Topology.from_networkx(graph, inputs=["b", "a"], outputs=["e", "d"])
    assert [topology.names[v] for v in topology.inputs] == ["b", "a"]
    assert [topology.names[v] for v in topology.outputs] == ["e", "d"]
    channels = nx.get_node_attributes(topology.to_networkx(), "channel")
    assert channels == {"b": 0, "a": 1, "e": 0, "d": 1}


def test_a_graph_tells_weights_roles_and_liveness() -> None:
    graph = NeuralGraph(Topology.layered([3, 5, 2]), num_edges=6, node="relu")
    wiring, real = graph.to_networkx(), graph.wiring()
    assert sorted(wiring.edges) == sorted(map(tuple, real.edge_index.t().tolist()))
    for u, v in wiring.edges:
        at = (real.edge_index.t() == torch.tensor([u, v])).all(1).nonzero().item()
        assert wiring.edges[u, v]["weight"] == float(real.edge_weight[at])
    for node, data in wiring.nodes(data=True):
        assert data["alive"] == (wiring.out_degree(node) > 0 or data["role"] == "output")
    everything = graph.to_networkx(candidates=True)
    assert everything.number_of_edges() == graph.topology.num_candidates
    assert sum(real for _, _, real in everything.edges(data="real")) == 6


@pytest.mark.parametrize("rule", ["dnw", "random", "complete", "rigl"])
def test_editing_keeps_what_stayed(rule: str) -> None:
    graph = NeuralGraph(Topology.layered([3, 6, 5, 2]), rule=rule, num_edges=25)
    before = graph.to_networkx()
    wiring = before.copy()
    gone = next(iter(wiring.edges))
    wiring.remove_edge(*gone)
    free = next(e for e in graph.topology.edge_index.t().tolist() if not wiring.has_edge(*e))
    wiring.add_edge(*free, weight=0.75)
    after = edited(graph, wiring)
    learned = after.to_networkx()
    assert set(learned.edges) == set(wiring.edges)
    for edge in learned.edges:
        expected = 0.75 if edge == tuple(free) else before.edges[edge]["weight"]
        assert learned.edges[edge]["weight"] == pytest.approx(expected)
    for ours, theirs in zip(after.nodes, graph.nodes, strict=True):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
    assert graph.to_networkx().edges == before.edges
    assert type(after.rule) is type(graph.rule)


def test_hallucinated_edges_may_come_along() -> None:
    graph = NeuralGraph(Topology.layered([3, 6, 5, 2]), num_edges=25)
    same = edited(graph, graph.to_networkx(candidates=True))
    assert torch.equal(same.weight, graph.weight)
    assert same.num_edges == 25
    x = torch.randn(2, 3, 4, 4)
    assert torch.allclose(same(x), graph(x), atol=1e-6)


SCHEDULES_IN_TIME = ["discrete(steps=2)", "discrete(steps=2, input='new')", "continuous"]


@pytest.mark.parametrize("schedule", ["static", *SCHEDULES_IN_TIME])
def test_outputs_without_a_real_edge_stay_constant(schedule: str) -> None:
    topology = Topology.layered([3, 4, 2])
    graph = NeuralGraph(topology, num_edges=1, node="relu", schedule=schedule).eval()
    again = edited(graph, graph.to_networkx())
    assert edited(again, again.to_networkx()).wiring().edge_id.tolist() == [0]
    x = torch.randn(2, 3, 3) if "new" in schedule else torch.randn(2, 3)
    assert torch.allclose(again(x), graph(x))
    if schedule == "static":
        assert torch.allclose(freeze(again)(x), graph(x))
    with pytest.raises(ValueError, match=r"no path of candidate edges leads from an input"):
        NeuralGraph(again.topology, num_edges=1, schedule=schedule)


def test_nodes_may_come_and_go() -> None:
    graph = NeuralGraph(Topology.layered([3, 6, 2]), num_edges=20)
    wiring = graph.to_networkx()
    wiring.remove_node(4)
    wiring.add_edge(0, "new")
    wiring.add_edge("new", 5)
    wiring.add_edge(5, 10)
    after = edited(graph, wiring)
    assert after(torch.randn(2, 3, 4, 4)).shape == (2, 2, 4, 4)

    def filters(graph: NeuralGraph) -> dict[Any, torch.Tensor]:
        return {
            graph.topology.names[v]: graph.nodes[b.index].conv.weight[i]
            for b in graph.topology.blocks
            if b.role != 2
            for i, v in enumerate(b.nodes)
        }

    ours, theirs = filters(after), filters(graph)
    assert ours.keys() == (theirs.keys() | {"new"}) - {4}
    assert all(torch.equal(ours[v], theirs[v]) for v in ours if v != "new")


def bare(graph: NeuralGraph) -> nx.DiGraph:
    """Return the wiring without what its edges say, as many functions of networkx do."""
    wiring = nx.DiGraph()
    wiring.add_nodes_from(graph.to_networkx().nodes(data=True))
    wiring.add_edges_from(graph.to_networkx().edges)
    return wiring


def test_edges_that_lost_their_attributes_keep_their_weights() -> None:
    graph = NeuralGraph(Topology.layered([3, 6, 5, 2]), num_edges=25)
    assert nx.utils.graphs_equal(edited(graph, bare(graph)).to_networkx(), graph.to_networkx())


class Shared(torch.nn.Module):
    """What the nodes of a block share."""

    def __init__(self, num_nodes: int) -> None:
        super().__init__()
        self.slope = torch.nn.PReLU()
        self.mix = torch.nn.Parameter(torch.randn(2, 2))

    def forward(self, x: torch.Tensor, t: float) -> torch.Tensor:
        return self.slope(x) * self.mix.sum()


def test_what_nodes_share_is_kept_and_stays_frozen() -> None:
    graph = NeuralGraph(Topology.layered([3, 6, 2]), num_edges=20, node=Shared)
    with torch.no_grad():
        graph.nodes[1].slope.weight.fill_(0.77)
    graph.nodes[1].mix.requires_grad_(False)
    graph.weight.requires_grad_(False)
    wiring = graph.to_networkx()
    wiring.remove_node(4)
    after = edited(graph, wiring)
    assert after.nodes[1].slope.weight.item() == pytest.approx(0.77)
    assert torch.equal(after.nodes[1].mix, graph.nodes[1].mix)
    assert [p.requires_grad for p in after.nodes[1].parameters()] == [False, True]
    assert not after.weight.requires_grad


@pytest.mark.parametrize("rule", ["random", "set", "rigl"])
def test_a_smaller_budget_keeps_the_largest_of_the_real_edges(rule: str) -> None:
    graph = NeuralGraph(Topology.layered([6, 8, 4]), rule=rule, num_edges=60)
    real = graph.to_networkx(candidates=True)
    weights = {edge: abs(real.edges[edge]["weight"]) for edge in graph.to_networkx().edges}
    fewer = edited(graph, real, num_edges=40).to_networkx()
    assert set(fewer.edges) == set(sorted(weights, key=lambda edge: -weights[edge])[:40])
    more = edited(graph, real, num_edges=70).to_networkx()
    assert set(weights) < set(more.edges)
    assert more.number_of_edges() == 70


def test_another_backend_may_be_given() -> None:
    graph = NeuralGraph(Topology.layered([20, 20]), num_edges=20, backend="dense")
    wiring = graph.to_networkx(candidates=True)
    wiring.remove_edges_from([(u, v) for u, v in wiring.edges if v - u != 20])
    with pytest.raises(ValueError, match=r'backend dense does not support block 1.*backend="auto"'):
        edited(graph, wiring, num_edges=10)
    assert edited(graph, wiring, num_edges=10, backend="auto").num_edges == 10


@pytest.mark.parametrize("weight", [None, "much"])
def test_a_weight_that_is_no_number_is_an_error_that_names_the_edge(weight: Any) -> None:
    graph = NeuralGraph(Topology.layered([3, 2]), num_edges=6)
    wiring = graph.to_networkx()
    wiring.edges[1, 4]["weight"] = weight
    with pytest.raises(ValueError, match=rf"edge 1 -> 4 has weight {weight!r}, not a number"):
        edited(graph, wiring)


def test_copies_do_not_carry_local_functions() -> None:
    graph = NeuralGraph(Topology.layered([3, 2]), num_edges=4, node=lambda n: Pass())
    wiring = graph.to_networkx()
    assert edited(graph, wiring).num_edges == 4
    loaded = pickle.loads(pickle.dumps(graph))
    with pytest.raises(ValueError, match=r"copies do not keep node functions that a lambda"):
        edited(loaded, wiring)
    plain = NeuralGraph(Topology.layered([3, 2]), num_edges=4)
    assert edited(copy.deepcopy(plain), plain.to_networkx()).num_edges == 4


class Pass(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: float) -> torch.Tensor:
        return x


def named(**roles: str) -> nx.DiGraph:
    graph = nx.DiGraph([("a", "b"), ("b", "c")])
    nx.set_node_attributes(graph, {"a": "input", "c": "output"} | roles, "role")
    return graph


def channels(first: Any, second: Any) -> nx.DiGraph:
    graph = named(d="input")
    graph.add_edge("d", "b")
    nx.set_node_attributes(graph, {"d": "input"}, "role")
    nx.set_node_attributes(graph, {"a": first, "d": second}, "channel")
    return graph


def blocks(first: Any) -> nx.DiGraph:
    graph = named()
    nx.set_node_attributes(graph, {"a": first, "b": 1, "c": 2}, "block")
    return graph


PARTLY = named()
PARTLY.nodes["a"]["block"] = 0
LOOP = named()
LOOP.add_edge("b", "b")
LOST = named()
LOST.remove_edge("a", "b")


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        (nx.Graph([(0, 1)]), r"expected a networkx.DiGraph, got a Graph"),
        (nx.MultiDiGraph([(0, 1)]), r"expected a networkx.DiGraph, got a MultiDiGraph"),
        (named(b="middle"), r"node 'b' has unknown role 'middle' \(known: input, hidden, output"),
        (
            named(a="hidden"),
            r"needs at least one input node and one output node: .* role=\"input\"",
        ),
        (channels(0, 0), r"nodes 'a' and 'd' share channel 0"),
        (channels(0, "x"), r"channel 'x' of node 'd' is not a whole number"),
        (blocks(0.5), r"block 0.5 of node 'a' is not a whole number"),
        (PARTLY, r"nodes \['b', 'c'\] have no block, but others have"),
        (LOOP, r"a static graph must not have a cycle, .* through nodes 'b'"),
        (LOST, r"leads from an input to output 'c'"),
    ],
)
def test_errors(graph: nx.DiGraph, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuralGraph(Topology.from_networkx(graph), num_edges=1, node="relu")


def test_errors_of_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ends in .graphml, .json, .gexf or .cyjs, got"):
        write_graph(named(), tmp_path / "wiring.txt")
    with pytest.raises(ValueError, match=r"expected a .graphml or .json file, got wiring.txt"):
        read_graph(tmp_path / "wiring.txt")
    for name in ("wiring.json", "wiring.graphml"):
        (tmp_path / name).write_text("<nothing")
        with pytest.raises(ValueError, match=rf"{name} does not hold a graph that can be read"):
            read_graph(tmp_path / name)
    write_graph(nx.Graph([(0, 1)]), tmp_path / "wiring.json")
    with pytest.raises(
        ValueError, match=r"holds an undirected graph, but a wiring needs a directed one"
    ):
        read_graph(tmp_path / "wiring.json")
    (tmp_path / "wiring.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"expected node-link data, an object with nodes"):
        read_graph(tmp_path / "wiring.json")
    with pytest.raises(FileNotFoundError):
        read_graph(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match=r"but \['a'\] are both"):
        Topology.from_networkx(named(), inputs=["a"], outputs=["a", "b"])
    with pytest.raises(ValueError, match=r"inputs \['z'\] are not nodes of the graph"):
        Topology.from_networkx(named(), inputs=["z"])


def test_files_of_older_networkx_and_with_numpy_numbers_are_read(tmp_path: Path) -> None:
    wiring = Topology.layered([2, 1]).to_networkx()
    old = nx.node_link_data(wiring, edges="links")
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert nx.utils.graphs_equal(read_graph(tmp_path / "old.json"), wiring)
    wiring.edges[0, 2]["weight"] = np.float32(0.5)
    write_graph(wiring, tmp_path / "new.json")
    assert read_graph(tmp_path / "new.json").edges[0, 2]["weight"] == 0.5


@pytest.mark.parametrize(
    ("suffix", "edges", "message"),
    [
        (
            ".graphml",
            [(1, 3), ("1", 3)],
            r"must all be whole numbers or all be printable text, got 1:",
        ),
        (".graphml", [(True, False)], r"got True: write a .json file"),
        (".graphml", [(1.5, 2.5)], r"got 1.5"),
        (".graphml", [("a\x01", "b")], r"printable text, got 'a\\x01'"),
        (
            ".graphml",
            [("a", "b", {"note": None})],
            r"wiring.graphml cannot hold this graph: .*NoneType",
        ),
        (".json", [("a", "b", {"note": object()})], r"wiring.json cannot hold this graph"),
        (".json", [("a", "b", {"source": 1})], r"edge 'a' -> 'b' has an attribute 'source'"),
    ],
)
def test_what_a_file_cannot_hold_is_an_error_and_leaves_the_file_that_is_there(
    tmp_path: Path, suffix: str, edges: list[Any], message: str
) -> None:
    path = tmp_path / f"wiring{suffix}"
    write_graph(named(), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        write_graph(nx.DiGraph(edges), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    marked = named()
    marked.nodes["a"]["id"] = 1
    with pytest.raises(ValueError, match="node 'a' has an attribute 'id'"):
        write_graph(marked, tmp_path / "wiring.json")


def test_files_for_gephi_and_cytoscape(tmp_path: Path) -> None:
    wiring = NeuralGraph(Topology.layered([3, 5, 2]), num_edges=12).to_networkx()
    write_graph(wiring, tmp_path / "wiring.gexf")
    read = nx.read_gexf(tmp_path / "wiring.gexf", node_type=int)
    assert set(read.edges) == set(wiring.edges)
    for u, v, weight in wiring.edges(data="weight"):
        assert read.edges[u, v]["weight"] == pytest.approx(weight)
    assert nx.get_node_attributes(read, "role") == nx.get_node_attributes(wiring, "role")
    write_graph(wiring, tmp_path / "wiring.cyjs")
    elements = json.loads((tmp_path / "wiring.cyjs").read_text())["elements"]
    edges = {
        (e["data"]["source"], e["data"]["target"]): e["data"]["weight"] for e in elements["edges"]
    }
    assert edges == {(u, v): weight for u, v, weight in wiring.edges(data="weight")}
    assert [n["data"]["role"] for n in elements["nodes"]] == [
        r for _, r in wiring.nodes(data="role")
    ]


def small_graph(names: Any = None) -> NeuralGraph:
    torch.manual_seed(0)
    wiring = Topology.layered([3, 4, 2]).to_networkx()
    if names is not None:
        wiring = nx.relabel_nodes(wiring, names)
    graph = NeuralGraph(Topology.from_networkx(wiring), num_edges=10, node="norm")
    for parameter in graph.nodes.parameters():
        torch.nn.init.normal_(parameter)
    return graph.eval()


def through_gexf(wiring: nx.DiGraph, path: Path) -> nx.DiGraph:
    write_graph(wiring, path / "a.gexf")
    return nx.read_gexf(path / "a.gexf")


def without_graph_attributes(wiring: nx.DiGraph, path: Path) -> nx.DiGraph:
    write_graph(wiring, path / "a.graphml")
    text = (path / "a.graphml").read_text()
    (path / "a.graphml").write_text(re.sub(r'<data key="d\d+">int</data>', "", text, count=1))
    read = read_graph(path / "a.graphml")
    assert all(isinstance(name, str) for name in read)
    return read


def through_cytoscape(wiring: nx.DiGraph, path: Path) -> nx.DiGraph:
    """Return what is exported again: other ids, and the names as an attribute."""
    renamed = {name: (i + 4) % len(wiring) for i, name in enumerate(wiring)}
    export = nx.relabel_nodes(wiring, renamed)
    for name, number in renamed.items():
        export.nodes[number]["name"] = str(name)
    write_graph(export, path / "a.graphml")
    return read_graph(path / "a.graphml")


def as_igraph_writes(wiring: nx.DiGraph, path: Path) -> nx.DiGraph:
    """Return a graph from a file in the form of igraph 1.0: ids n0, names and numbers moved."""
    kinds = {"block": "double", "channel": "double", "role": "string", "id": "string"}
    lines = ['<graphml xmlns="http://graphml.graphdrawing.org/xmlns">']
    lines += [
        f'<key id="v_{key}" for="node" attr.name="{key}" attr.type="{kind}"/>'
        for key, kind in kinds.items()
    ]
    lines += ['<key id="g_names" for="graph" attr.name="names" attr.type="string"/>']
    lines += ['<key id="e_weight" for="edge" attr.name="weight" attr.type="double"/>']
    lines += ['<graph id="G" edgedefault="directed">']
    if all(isinstance(name, int) for name in wiring):
        lines += ['<data key="g_names">int</data>']
    ids = {name: f"n{i}" for i, name in enumerate(wiring)}
    for name, data in wiring.nodes(data=True):
        channel = data.get("channel", "NaN")
        values = {"block": data["block"], "channel": channel, "role": data["role"], "id": name}
        inner = "".join(f'<data key="v_{key}">{value}</data>' for key, value in values.items())
        lines += [f'<node id="{ids[name]}">{inner}</node>']
    for u, v, data in wiring.edges(data=True):
        weight = f'<data key="e_weight">{data["weight"]!r}</data>'
        lines += [f'<edge source="{ids[u]}" target="{ids[v]}">{weight}</edge>']
    file = path / "igraph.graphml"
    file.write_text("\n".join([*lines, "</graph></graphml>"]))
    return read_graph(file)


@pytest.mark.parametrize(
    ("way", "names"),
    [
        (without_graph_attributes, None),  # text names need no attribute
        *itertools.product(
            [through_gexf, through_cytoscape, as_igraph_writes],
            [None, lambda v: f"unit {v}", lambda v: f"n{(v + 1) % 9}"],
        ),
    ],
)
def test_graphs_that_went_through_other_programs_compute_the_same(
    way: Any, names: Any, tmp_path: Path
) -> None:
    graph = small_graph(names)
    wiring = way(graph.to_networkx(), tmp_path)
    x = torch.randn(5, 3, 4, 4)
    again = edited(graph, wiring)
    torch.testing.assert_close(again(x), graph(x))
    assert set(again.topology.names) == set(graph.topology.names)


def test_igraph_files_have_their_own_names_again(tmp_path: Path) -> None:
    graph = small_graph()
    read = as_igraph_writes(graph.to_networkx(), tmp_path)
    assert list(read) == list(range(9))
    topology = Topology.from_networkx(read)
    assert topology.inputs.tolist() == graph.topology.inputs.tolist()


def test_names_of_another_graph_are_an_error_unless_they_are_meant(tmp_path: Path) -> None:
    graph = small_graph()
    wiring = nx.relabel_nodes(graph.to_networkx(), lambda v: f"unit {v}")
    with pytest.raises(
        ValueError, match=r"0 of the 9 nodes have a name .* are 0, .* and 'unit 0', .*relabel_nodes"
    ):
        edited(graph, wiring)
    assert edited(graph, wiring, allow_new_names=True).topology.num_nodes == 9
    few = graph.to_networkx()  # some new nodes among known ones are an ordinary edit
    few.add_node("new", role="hidden", block=1)
    few.add_edge(0, "new"), few.add_edge("new", 7)
    assert "new" in edited(graph, few).topology.names
    pruned = graph.to_networkx().subgraph([0, 1, 2, 3, 7, 8])
    assert edited(graph, pruned).topology.num_nodes == 6


@pytest.mark.parametrize("value", ["2", 0.5, float("inf"), True, [1]])
def test_numbers_that_are_not_whole_are_refused(value: Any) -> None:
    wiring = small_graph().to_networkx()
    wiring.nodes[0]["channel"] = value
    with pytest.raises(ValueError, match=r"channel .* of node 0 is not a whole number"):
        Topology.from_networkx(wiring)
