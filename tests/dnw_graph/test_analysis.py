"""Measures against networkx and closed forms, histories against what happened."""

import contextlib
import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dnw_graph import NeuralGraph, Topology, sparsify
from dnw_graph.analysis import (
    HistoryWriter,
    Measures,
    Record,
    Statistic,
    Structure,
    WiringHistory,
    betweenness,
    jaccard,
    load_history,
    measure,
    real_edges,
    similarity,
    small_worldness,
    structure_of,
)
from dnw_graph.analysis import measures as m


def path(length: int) -> nx.DiGraph:
    graph = nx.path_graph(length + 1, create_using=nx.DiGraph)
    nx.set_node_attributes(graph, {0: "input", length: "output"}, "role")
    return graph


@st.composite
def wirings(draw: st.DrawFn) -> nx.DiGraph:
    """Draw a graph in layers, with inputs first and outputs last."""
    sizes = draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    topology = Topology.layered(sizes)
    keep = draw(st.lists(st.booleans(), min_size=1, max_size=topology.num_candidates))
    graph = topology.to_networkx()
    gone = [e for e, kept in zip(list(graph.edges), keep, strict=False) if not kept]
    graph.remove_edges_from(gone)
    return graph


def of_role(graph: nx.DiGraph, role: str) -> list[int]:
    return [v for v, r in graph.nodes(data="role") if r == role]


@settings(max_examples=60)
@given(wirings())
def test_measures_are_those_of_networkx(graph: nx.DiGraph) -> None:
    s = structure_of(graph)
    assert s.num_edges == graph.number_of_edges()
    name = dict(zip(s.names, range(s.num_nodes), strict=True))
    assert {name[v]: d for v, d in graph.in_degree} == dict(enumerate(s.in_degree))
    assert {name[v]: d for v, d in graph.out_degree} == dict(enumerate(s.out_degree))
    lengths: dict[int, int] = {}
    for u in of_role(graph, "input"):
        found = nx.single_source_shortest_path_length(graph, u)
        for v in of_role(graph, "output"):
            lengths[found.get(v, -1)] = lengths.get(found.get(v, -1), 0) + 1
    assert m.path_lengths(s) == lengths
    both = graph.to_undirected()
    touched = [v for v, d in both.degree if d]
    expected = nx.clustering(both, touched)
    mean = sum(expected.values()) / len(touched) if touched else math.nan
    assert m.clustering(s) == pytest.approx(mean, nan_ok=True)
    apart = [
        n for u in touched for n in nx.single_source_shortest_path_length(both, u).values() if n > 0
    ]
    assert m.typical_path(s) == pytest.approx(np.mean(apart) if apart else math.nan, nan_ok=True)
    central = nx.betweenness_centrality(graph)
    assert betweenness(s) == pytest.approx([central[v] for v in s.names], abs=1e-12)
    ancestors = {v for out in of_role(graph, "output") for v in [*nx.ancestors(graph, out), out]}
    assert m.unreachable(s) == len(graph) - len(ancestors)
    dead = m.dead_nodes(s)
    heads = {v for v in graph if not graph.out_degree(v) and graph.nodes[v]["role"] != "output"}
    assert {s.names[v] for v in dead.no_edge_out} == heads
    assert {s.names[v] for v in dead.no_path_to_output} == set(graph) - ancestors - heads
    come = {v for u in of_role(graph, "input") for v in [*nx.descendants(graph, u), u]}
    unfed = {v for v in graph if not graph.in_degree(v) and graph.nodes[v]["role"] != "input"}
    assert {s.names[v] for v in dead.no_edge_in} == unfed
    assert {s.names[v] for v in dead.no_path_from_input} == set(graph) - come - unfed


@pytest.mark.filterwarnings("ignore:every candidate is real")
def test_quantiles_of_weights() -> None:
    graph = NeuralGraph(Topology.bipartite(10, 20), rule="complete")
    with torch.no_grad():
        graph.weight.copy_(torch.randperm(200) / 199)
    found = measure(graph, random=2).weights
    assert found == pytest.approx({share: share for share in found}, abs=1e-6)
    assert len(found) == 9


def test_a_path() -> None:
    s = structure_of(path(6))
    assert m.path_lengths(s) == {6: 1}
    assert m.typical_path(s) == pytest.approx((6 + 2) / 3)  # mean distance on a path of n + 1
    assert m.clustering(s) == 0
    # Node i of n lies between i before it and n - i after it.
    assert betweenness(s) == pytest.approx([i * (6 - i) / (6 * 5) for i in range(7)])
    assert m.skipping(s) == 0


@pytest.mark.filterwarnings("ignore:every candidate is real")
def test_a_complete_bipartite_block() -> None:
    graph = NeuralGraph(Topology.bipartite(4, 6), rule="complete")
    found = measure(graph)
    assert found.path_lengths == {1: 24}
    (pair,) = found.pairs
    assert (pair.candidates, pair.edges) == (24, Statistic(24.0, 24.0, 0.0))
    assert pair.edges.z == 0
    for name, statistic in found.statistics.items():
        assert statistic.value == pytest.approx(statistic.mean), name
        assert statistic.z == 0
    # All edges have an end on either side: two apart within a side, one across.
    apart = (2 * 24 * 1 + (4 * 3 + 6 * 5) * 2) / (10 * 9)
    assert found.statistics["typical path"].value == pytest.approx(apart)


def test_a_small_world() -> None:
    """A ring of neighbours with a few shortcuts clusters far more than chance would have it."""
    ring = nx.connected_watts_strogatz_graph(120, 8, 0.05, seed=0)
    graph = nx.DiGraph((min(e), max(e)) for e in ring.edges)
    nx.set_node_attributes(graph, {0: "input", 119: "output"}, "role")
    nodes = Topology.from_networkx(graph)
    everything = nx.DiGraph((u, v) for u in graph for v in graph if u < v)
    nx.set_node_attributes(everything, {0: "input", 119: "output"}, "role")
    found = measure(graph, Topology.from_networkx(everything))
    c = found.statistics["clustering"]
    assert c.value == pytest.approx(nx.average_clustering(ring), rel=1e-9)
    assert c.value > 0.45
    assert c.mean == pytest.approx(8 / 119, rel=0.2)  # of a random graph: its density
    assert c.z > 20
    assert 3 < small_worldness(found) < 10
    assert len(nodes.names) == 120


def test_random_wirings_have_the_same_blocks_and_budget() -> None:
    graph = NeuralGraph(Topology.layered([5, 8, 8, 4]), num_edges=60, node="relu")
    s, generator = structure_of(graph), np.random.default_rng(0)
    known = set(map(tuple, graph.topology.edge_index.t().tolist()))
    counts = np.zeros((4, 4))
    for _ in range(300):
        drawn = s.random(generator)
        edges = list(zip(drawn.source.tolist(), drawn.target.tolist(), strict=True))
        assert len(set(edges)) == 60
        assert set(edges) <= known
        np.add.at(counts, (drawn.block[drawn.source], drawn.block[drawn.target]), 1 / 300)
    for pair in m.block_pairs(s):
        assert counts[pair.source, pair.target] == pytest.approx(pair.edges.mean, abs=0.6)


def test_the_null_model_is_not_surprised_by_random_wirings() -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(Topology.layered([10, 30, 30, 10]), rule="random", num_edges=300)
    found = measure(graph, random=40)
    assert all(abs(s.z) < 4 for s in found.statistics.values()), str(found)
    assert all(abs(pair.edges.z) < 4 for pair in found.pairs)
    assert "largest out-degree" in str(found)


def test_what_stands_out_has_a_large_z() -> None:
    wiring = NeuralGraph(Topology.layered([10, 30, 10]), rule="random", num_edges=100).to_networkx()
    wiring.add_edges_from((5, v) for v in range(10, 50))  # a hub
    found = measure(wiring)
    assert found.statistics["largest out-degree"].z > 5
    name, _, out, _ = found.hubs(1)[0]
    assert (name, out) == (5, 40)


def test_candidates_of_a_networkx_graph() -> None:
    graph = NeuralGraph(Topology.grid(3, 4), num_edges=12, node="relu")
    exact = structure_of(graph)
    marked = structure_of(graph.to_networkx(candidates=True))
    assert marked.topology.num_candidates == graph.topology.num_candidates
    assert jaccard(exact, marked) == 1
    assert structure_of(graph.to_networkx()).topology.num_candidates == 9 * (9 + 6 + 3) // 3
    given = structure_of(graph.to_networkx(), graph.topology)
    assert np.array_equal(given.weight, exact.weight)
    wrong = graph.to_networkx()
    wrong.add_edge(0, 11)
    with pytest.raises(ValueError, match="edge 0 -> 11 is not a candidate of the topology"):
        structure_of(wrong, graph.topology)
    wrong.add_node("new", block=1)
    wrong.add_edge(0, "new")
    with pytest.raises(ValueError, match="the candidates have no node 'new'"):
        structure_of(wrong, graph.topology)
    with pytest.raises(ValueError, match=r"random must be 2 or more, .* got 1"):
        measure(graph, random=1)


def test_graphs_without_edges_and_with_cycles() -> None:
    empty = structure_of(NeuralGraph(Topology.layered([2, 3, 1]), num_edges=3, node="relu"))
    none = Structure(empty.topology, *(x[:0] for x in (empty.source, empty.target, empty.weight)))
    found = measure(none)
    assert found.path_lengths == {-1: 2}
    assert math.isnan(found.statistics["clustering"].value)
    cyclic = NeuralGraph(
        Topology.complete(2, 5, 2), num_edges=30, node="relu", schedule="discrete(steps=4)"
    )
    assert measure(cyclic.to_networkx()).structure.topology.num_candidates == 81


def test_similarity_sees_through_other_names() -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(Topology.layered([6, 20, 20, 6]), rule="random", num_edges=150)
    a = structure_of(graph)
    number = np.arange(a.num_nodes)
    generator = np.random.default_rng(1)
    for block in a.topology.blocks[1:3]:
        number[block.nodes.start : block.nodes.stop] = generator.permutation(list(block.nodes))
    b = Structure(a.topology, number[a.source], number[a.target], a.weight)
    found = similarity(a, b)
    assert found.jaccard.value < 0.3
    assert found.matched.value == 1
    assert np.array_equal(found.renamed, number)
    assert found.matched.mean < 0.5
    assert found.matched.z > 5
    same = similarity(graph, graph.to_networkx(candidates=True))
    assert (same.jaccard.value, same.matched.value) == (1, 1)
    other = similarity(a, a.random(generator))
    assert abs(other.jaccard.z) < 5
    with pytest.raises(
        ValueError, match=r"must have the same blocks, got blocks of \[6, 20, 20, 6\] and"
    ):
        similarity(graph, NeuralGraph(Topology.layered([6, 6]), num_edges=3))


class Recorded(nn.Sequential):
    """Two graphs and a layer made sparse."""

    def __init__(self) -> None:
        graphs = [NeuralGraph(Topology.layered([4, 6, 4]), num_edges=15) for _ in range(2)]
        super().__init__(*graphs, nn.Conv2d(4, 8, 1))
        sparsify(self[2], density=0.5)


def shaken(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or parameter.shape[-1] == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))


def test_a_history_tells_what_was_real_when(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Recorded()
    writer = HistoryWriter(tmp_path, model, steps_per_epoch=10)
    happened = []
    for step in (0, 5, 10, 20):
        writer.record(step)
        happened.append(real_edges(model))
        shaken(model)
    history = load_history(tmp_path)
    assert set(history) == set(happened[0])
    assert history.steps == [0, 5, 10, 20]
    assert history.epochs == [0, 0.5, 1, 2]
    for name, wiring in history.items():
        sets = [set(now[name][0].tolist()) for now in happened]
        for at, real in enumerate(sets):
            assert set(wiring.real(at).tolist()) == real
        assert set(wiring.real().tolist()) == sets[-1]
        assert wiring.births.tolist() == [len(b - a) for a, b in pairwise([set(), *sets])]
        assert wiring.deaths.tolist() == [len(a - b) for a, b in pairwise([set(), *sets])]
        steps = history.steps
        expected = []
        for edge in set().union(*sets):
            since = None
            for step, real in zip(steps, sets, strict=True):
                if edge in real and since is None:
                    since = step
                elif edge not in real and since is not None:
                    expected.append((since, step, True))
                    since = None
            if since is not None:
                expected.append((since, steps[-1], False))
        assert sorted(zip(*(x.tolist() for x in wiring.lives), strict=True)) == sorted(expected)
        ages = sorted(20 - begin for begin, _, over in expected if not over)
        assert sorted(wiring.ages().tolist()) == ages
        assert wiring.settled(0) is None
        assert wiring.settled(1) == 0


def test_a_history_goes_on_from_where_a_run_is_taken_up_again(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Recorded()
    writer = HistoryWriter(tmp_path, model, steps_per_epoch=10)
    for step in (0, 10, 20, 30):
        writer.record(step)
        if step == 10:
            kept = {k: v.clone() for k, v in model.state_dict().items()}
        shaken(model)
    model.load_state_dict(kept)
    shaken(model)
    again = HistoryWriter(tmp_path, model, steps_per_epoch=10)
    again.record(20)
    history = load_history(tmp_path)
    assert history.steps == [0, 10, 20]
    for name, (ids, _) in real_edges(model).items():
        assert np.array_equal(history[name].real(), ids)


def test_records_do_not_depend_on_others(tmp_path: Path) -> None:
    model, happened = Recorded(), []
    writer = HistoryWriter(tmp_path, model, steps_per_epoch=10)
    for step in (0, 10, 20, 30):
        writer.record(step)
        happened.append(real_edges(model))
        shaken(model)
    files = sorted((tmp_path / "history").iterdir())
    kept = files[1].read_bytes()
    files[1].write_bytes(kept[:50])
    with pytest.raises(ValueError, match=r"0000000010.npz is damaged.* without it"):
        load_history(tmp_path)
    files[1].unlink()
    history = load_history(tmp_path)
    assert history.steps == [0, 20, 30]
    for name, wiring in history.items():
        assert np.array_equal(wiring.real(1), happened[2][name][0])
    files[1].with_name("0000000015.npz").write_bytes(kept)
    with pytest.raises(ValueError, match=r"0000000015.npz is damaged.*the record of step 10"):
        load_history(tmp_path)


def changes(path: Path, step: int, born: list[int], died: list[int], real: int) -> None:
    """Write a record as version 0.1 did."""
    about = {"step": step, "epoch": step / 10, "candidates": {"graph": 9}, "real": {"graph": real}}
    np.savez_compressed(
        path / f"{step:010d}.npz",
        about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        **{
            f"graph/{name}": np.diff(ids, prepend=0).astype(np.uint16)
            for name, ids in {"born": born, "died": died}.items()
        },
    )


def test_histories_of_an_earlier_version_are_read(tmp_path: Path) -> None:
    (tmp_path / "history").mkdir()
    changes(tmp_path / "history", 0, [1, 4, 7], [], 3)
    changes(tmp_path / "history", 10, [2], [4], 3)
    changes(tmp_path / "history", 20, [4], [1], 3)
    history = load_history(tmp_path)["graph"]
    assert [history.real(at).tolist() for at in range(3)] == [[1, 4, 7], [1, 2, 7], [2, 4, 7]]
    assert history.births.tolist() == [3, 1, 1]
    (tmp_path / "history" / "0000000010.npz").unlink()
    with pytest.raises(ValueError, match="so one of them is missing"):
        load_history(tmp_path)


def test_a_record_may_be_repeated(tmp_path: Path) -> None:
    model = Recorded()
    writer = HistoryWriter(tmp_path, model, steps_per_epoch=10)
    for step in (0, 10, 20, 20, 10):
        writer.record(step)
        last = real_edges(model)
        shaken(model)
    history = load_history(tmp_path)
    assert history.steps == [0, 10]
    for name, (ids, _) in last.items():
        assert np.array_equal(history[name].real(), ids)


def test_deaths_without_births_are_changes_too() -> None:
    def record(step: int, born: range, died: range) -> Record:
        return Record(
            step, step / 10, *(np.array(list(ids), dtype=np.int64) for ids in (born, died))
        )

    none = range(0)
    history = WiringHistory(200, [record(0, range(100), none), record(10, none, range(50))])
    assert history.settled() is None
    history.records.append(record(20, none, none))
    assert history.settled() == 10


def test_a_random_wiring_without_a_path_does_not_hide_the_others() -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(Topology.layered([4, 10, 10, 4]), num_edges=12, node="relu")
    found = measure(graph, random=30).statistics["mean path, input to output"]
    assert math.isfinite(found.mean)
    assert math.isnan(Statistic(1.0, math.nan, math.nan).z)
    assert math.isnan(Statistic(1.0, 2.0, math.nan).z)


def test_similarity_goes_by_names() -> None:
    edges = [("a", "c"), ("b", "c"), ("b", "d"), ("c", "e"), ("d", "e")]
    graphs = []
    for order in ("abcde", "badce"):
        graph = nx.DiGraph()
        graph.add_nodes_from(order)
        graph.add_edges_from(edges)
        nx.set_node_attributes(graph, {"a": "input", "b": "input", "e": "output"}, "role")
        graphs.append(graph)
    assert similarity(*graphs).jaccard.value == 1


def test_damaged_histories_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no history of its wiring"):
        load_history(tmp_path)
    HistoryWriter(tmp_path, Recorded(), 10).record(0)
    (file,) = (tmp_path / "history").iterdir()
    whole = file.read_bytes()
    at = whole.index(b"real.npy") + 60  # within what is compressed
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for damage in (b"", b"nothing", whole[: len(whole) // 2], flipped):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"0000000000.npz is damaged, or not a record"):
            load_history(tmp_path)


@settings(max_examples=100)
@given(data=st.data())
def test_flipped_bits_are_noticed_or_harmless(
    data: st.DataObject, tmp_path_factory: object
) -> None:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("history")  # type: ignore[attr-defined]
    HistoryWriter(folder, Recorded(), 10).record(0)
    (file,) = (folder / "history").iterdir()
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(bytes(content))
    with contextlib.suppress(ValueError):
        for wiring in load_history(folder).values():
            assert (wiring.real() < wiring.candidates).all()


def test_networks_and_sparse_layers_are_measured() -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(Topology.layered([4, 6, 3]), num_edges=20)
    layers = nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Linear(10, 5, bias=False))
    sparsify(layers, 0.5)
    found = measure(nn.ModuleDict({"graph": graph, "layers": layers}), random=3)
    assert list(found) == ["graph", "layers.0", "layers.1"]
    alone = measure(graph, random=3)
    assert found["graph"].statistics == alone.statistics
    of_layer = measure(layers[1], random=3)
    assert isinstance(of_layer, Measures)
    kept = layers[1].weight.detach() != 0
    assert of_layer.structure.in_degree[10:].tolist() == kept.sum(1).tolist()
    assert of_layer.structure.out_degree[:10].tolist() == kept.sum(0).tolist()
    weights = np.sort(of_layer.structure.weight)
    assert np.allclose(weights, np.sort(layers[1].weight.detach()[kept].numpy()))
    filters = measure(layers[0], random=3).structure  # an edge is a number of a filter
    assert (filters.num_nodes, filters.num_edges) == (2 * 9 + 4, 36)


def test_modules_without_a_graph_are_not_measured() -> None:
    with pytest.raises(ValueError, match="has no NeuralGraph and no sparse layer"):
        measure(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match=r"has 0 graphs \(none\)"):
        measure(nn.Linear(3, 3))


@pytest.mark.parametrize(
    "topology",
    [
        Topology.layered([6, 8, 8, 4]),
        Topology.random_dag("erdos_renyi", 40, 5, 4, p=0.3),
        Topology.complete(4, 12, 3),
    ],
)
def test_random_wirings_with_the_same_degrees(topology: Topology) -> None:
    torch.manual_seed(0)
    number = topology.num_candidates // 3
    graph = NeuralGraph(topology, num_edges=number, node="relu", schedule="discrete(input='held')")
    s = structure_of(graph)
    generator = np.random.default_rng(0)
    candidates = set(map(tuple, topology.edge_index.t().tolist()))
    edges = set(zip(s.source.tolist(), s.target.tolist(), strict=True))
    for _ in range(5):
        drawn = s.rewired(generator)
        assert np.array_equal(drawn.in_degree, s.in_degree)
        assert np.array_equal(drawn.out_degree, s.out_degree)
        other = set(zip(drawn.source.tolist(), drawn.target.tolist(), strict=True))
        assert len(other) == s.num_edges
        assert other <= candidates
        assert other != edges
    found = measure(graph, random=3, null="degrees")
    assert found.statistics["deviation of in-degrees"].z == 0
    assert found.statistics["clustering"].std > 0
    assert measure(graph, random=3).statistics["deviation of in-degrees"].std > 0
    with pytest.raises(ValueError, match=r"unknown null model 'degree' \(known: budget, degrees\)"):
        measure(graph, null="degree")  # type: ignore[call-overload]


def test_every_wiring_with_the_same_degrees_is_as_likely() -> None:
    """Three sources of one edge each and three targets of one: the six permutations."""
    topology = Topology.bipartite(3, 3)
    s = Structure(topology, np.array([0, 1, 2]), np.array([3, 4, 5]), np.ones(3))
    generator = np.random.default_rng(1)
    drawn = [tuple(s.rewired(generator).source.tolist()) for _ in range(1200)]
    counts = Counter(drawn)
    assert len(counts) == 6
    assert all(150 < count < 250 for count in counts.values())
