"""Candidates: numbering, blocks, validation."""

import copy

import networkx as nx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dnw_graph import Role, Topology

ONE_EACH = torch.tensor([Role.INPUT, Role.OUTPUT])


def edge_set(topology: Topology) -> set[tuple[int, int]]:
    return {tuple(pair) for pair in topology.edge_index.t().tolist()}


@given(st.lists(st.integers(1, 5), min_size=2, max_size=5), st.booleans())
def test_layered_has_every_edge_between_its_blocks_and_no_other(
    sizes: list[int], skip: bool
) -> None:
    topology = Topology.layered(sizes, skip=skip)
    block = [j for j, size in enumerate(sizes) for _ in range(size)]
    expected = {
        (u, v)
        for u in range(len(block))
        for v in range(len(block))
        if (block[u] < block[v] if skip else block[u] + 1 == block[v])
    }
    assert edge_set(topology) == expected
    assert topology.num_candidates == topology.edge_index.shape[1] == len(expected)
    assert topology.depth == len(sizes) - 1
    assert [b.role for b in topology.blocks] == [
        Role.INPUT,
        *[Role.HIDDEN] * (len(sizes) - 2),
        Role.OUTPUT,
    ]
    assert all(b.complete for b in topology.blocks)


def test_candidates_into_a_block_view_as_a_matrix() -> None:
    topology = Topology.layered([2, 3, 4])
    for block in topology.blocks[1:]:
        edges = topology.edge_index[:, block.edges.start : block.edges.stop]
        matrix = edges.view(2, len(block.nodes), -1)
        assert torch.equal(matrix[1, :, 0], torch.arange(block.nodes.start, block.nodes.stop))
        assert torch.equal(matrix[0, 0], torch.arange(matrix.shape[2]))
        assert bool((matrix[0] == matrix[0, 0]).all())


@st.composite
def acyclic_edges(draw: st.DrawFn) -> tuple[list[tuple[int, int]], int]:
    n = draw(st.integers(3, 12))
    pairs = st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)).map(sorted).map(tuple)
    edges = draw(st.sets(pairs.filter(lambda e: e[0] < e[1]), min_size=1))
    label = draw(st.permutations(range(n)))
    return [(label[u], label[v]) for u, v in edges], n


@given(acyclic_edges())
def test_from_edges_levels_any_acyclic_graph_and_keeps_its_names(
    drawn: tuple[list[tuple[int, int]], int],
) -> None:
    edges, n = drawn
    graph = nx.DiGraph(edges)
    graph.add_nodes_from(range(n))
    inputs = [v for v in range(n) if graph.in_degree(v) == 0]
    outputs = [v for v in range(n) if graph.out_degree(v) == 0 and v not in inputs]
    topology = Topology.from_edges(torch.tensor(edges).t(), inputs[::-1], outputs[::-1], n)

    named = {(topology.names[u], topology.names[v]) for u, v in edge_set(topology)}
    assert named == set(edges)
    assert [topology.names[v] for v in topology.inputs.tolist()] == inputs[::-1]
    assert [topology.names[v] for v in topology.outputs.tolist()] == outputs[::-1]
    assert topology.depth == nx.dag_longest_path_length(graph)
    source, target = topology.edge_index
    assert bool((topology.block[source] < topology.block[target]).all())


def test_blocks_that_are_not_complete_say_so() -> None:
    edges = torch.tensor([[0, 1, 0], [2, 2, 3]])
    topology = Topology.from_edges(edges, inputs=[0, 1], outputs=[2, 3])
    assert [b.complete for b in topology.blocks] == [True, False]


def test_copies_share_the_topology() -> None:
    topology = Topology.layered([2, 2])
    assert copy.deepcopy({"a": topology})["a"] is topology


def test_a_cycle_has_no_depth_and_a_block_a_role() -> None:
    edges = torch.tensor([[0, 1, 2, 2], [1, 2, 1, 3]])
    topology = Topology.from_edges(edges, inputs=[0], outputs=[3])
    assert topology.depth is None
    assert [len(b.nodes) for b in topology.blocks] == [1, 2, 1]


def test_inputs_and_edges_may_be_tensors_or_lists() -> None:
    one = Topology.from_edges([[0, 1], [2, 2]], inputs=[0, 1], outputs=[2])
    other = Topology.from_edges(
        torch.tensor([[0, 1], [2, 2]]), inputs=torch.arange(2), outputs=torch.tensor([2])
    )
    assert torch.equal(one.edge_index, other.edge_index)


def test_numbers_of_blocks_may_have_gaps() -> None:
    topology = Topology(torch.tensor([[0], [1]]), torch.tensor([3, 7]), ONE_EACH)
    assert topology.block.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Topology.layered([3]), r"at least two blocks.*\[3\]"),
        (lambda: Topology.layered([3, 0]), r"at least one node.*\[3, 0\]"),
        (
            lambda: Topology.from_edges(torch.tensor([[0], [7]]), [0], [1], 3),
            r"edge 0 -> 7 has a node that does not exist: there are 3",
        ),
        (
            lambda: Topology.from_edges(torch.tensor([[0, 0], [1, 1]]), [0], [1]),
            r"edge 0 -> 1 is listed twice",
        ),
        (lambda: Topology.from_edges(torch.tensor([[0], [1]]), [0], [0, 1]), r"but \[0\] are both"),
        (
            lambda: Topology.from_edges(torch.tensor([[0], [1]]), [0], []),
            r"at least one input node and one output node",
        ),
        (lambda: Topology.from_edges(torch.tensor([[0], [1]]), [0], [9], 2), r"outputs \[9\]"),
        (lambda: Topology.from_edges(torch.tensor([0, 1]), [0], [1]), r"integers \[2, E\]"),
        (
            lambda: Topology.from_edges([[0.7], [1.9]], [0], [1]),
            r"integers \[2, E\], got torch.float",
        ),
        (
            lambda: Topology.from_edges(torch.tensor([[0], [1]]), [0, 0], [1]),
            r"inputs must list each input node once",
        ),
        (
            lambda: Topology(torch.tensor([[0], [1]]), torch.tensor([1, 0]), ONE_EACH),
            r"node 0 of block 1 comes before node 1 of block 0",
        ),
        (
            lambda: Topology(torch.tensor([[0], [1]]), torch.tensor([0, 0]), ONE_EACH),
            r"block 0 mixes roles: node 0 is INPUT, node 1 is OUTPUT",
        ),
        (
            lambda: Topology(torch.tensor([[0], [1]]), torch.tensor([0, 1]), torch.tensor([0, 5])),
            r"unknown roles \[5\]; known: .*HIDDEN=1",
        ),
        (
            lambda: Topology(torch.tensor([[0], [1]]), torch.tensor([0, 1, 1]), ONE_EACH),
            r"one entry per node",
        ),
    ],
)
def test_errors(make, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        make()


def test_names_are_one_a_node_and_differ() -> None:
    edges = [[0, 1], [2, 2]]
    with pytest.raises(ValueError, match=r"several are called \['a'\]"):
        Topology.from_edges(edges, inputs=[0, 1], outputs=[2], names=["a", "a", "b"])
    for names in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(ValueError, match=rf"each of the 3 nodes, got {len(names)}"):
            Topology.from_edges(edges, inputs=[0, 1], outputs=[2], names=names)
    with pytest.raises(TypeError):
        Topology.from_edges(edges, inputs=[0.9], outputs=[2])
