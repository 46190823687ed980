"""In time all nodes fire at once: one block per role, whatever the blocks of the topology are."""

import copy
import pickle
from functools import partial
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology, attach, cost, edited, freeze
from dnw_graph.node import Norm, NormReluConv, Relu
from dnw_graph.topology import by_role
from tests.conftest import relative_error

INSTANCE = partial(NormReluConv, norm="instance")
EARLY_OUTPUT = Topology.from_edges(  # node 4 is an output, but fires before 5 and 6 and feeds 6
    [[0, 1, 2, 3, 2, 5, 4, 0], [2, 2, 3, 5, 4, 6, 6, 5]], inputs=[1, 0], outputs=[6, 4]
)


def by_hand(graph: NeuralGraph, x: Tensor, steps: int) -> Tensor:
    """Return the states of the outputs after some steps of relu, as a loop over the equation."""
    topology, wiring = graph.topology, graph.wiring()
    matrix = torch.zeros(topology.num_nodes, topology.num_nodes, dtype=graph.weight.dtype)
    kept = torch.zeros_like(graph.weight).index_fill(0, wiring.edge_id, 1) * graph.weight
    weight = kept + (graph.weight - graph.weight.detach()) * (kept == 0)  # straight through
    source, target = topology.edge_index
    matrix = matrix.index_put((target, source), weight)
    z = torch.zeros(topology.num_nodes, len(x), dtype=x.dtype)
    z[topology.inputs] = x.t()
    for _ in range(steps):
        z = (matrix @ z).relu()
    return z[topology.outputs].t()


@given(st.integers(0, 10**6), st.sampled_from(["reference", "sparse", "dense"]))
@settings(max_examples=40, deadline=None)
def test_steps_follow_the_equation_whatever_the_blocks(seed: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    nodes = int(torch.randint(6, 14, (), generator=generator))
    pairs = torch.rand(nodes, nodes, generator=generator).triu(1).gt(0.5).nonzero().t()
    edges = torch.cat([pairs, torch.tensor([[0, 1, 2], [2, nodes - 1, nodes - 2]])], 1).unique(
        dim=1
    )
    # Outputs in the middle of the graph, and inputs and outputs in an order of their own.
    topology = Topology.from_edges(edges, inputs=[1, 0], outputs=[nodes - 1, 2], num_nodes=nodes)
    torch.manual_seed(seed)
    graph = NeuralGraph(
        topology,
        num_edges=max(1, topology.num_candidates // 2),
        node="relu",
        output_node="relu",
        schedule="discrete(steps=3, read='every')",
        backend=backend,
    ).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    ours, theirs = graph(x)[:, -1], by_hand(graph, x, 3)
    assert torch.allclose(ours, theirs, atol=1e-10)
    target = torch.randn_like(ours)
    grads = [torch.autograd.grad((y * target).sum(), graph.weight)[0] for y in (ours, theirs)]
    assert torch.allclose(*grads, atol=1e-10)


@pytest.mark.parametrize(
    ("topology", "blocks"),
    [
        (Topology.random_dag("watts_strogatz", 60, 4, 5, k=4, p=0.5), 3),
        (Topology.complete(4, 30, 3, acyclic=True), 3),
        (Topology.layered([3, 4, 4, 2]), 3),
        (EARLY_OUTPUT, 3),
        (Topology.layered([64, 128, 128, 10]), 4),  # dense products of blocks of their own
        (Topology.complete(3, 40, 2), 3),
        (Topology.bipartite(3, 2), 2),
    ],
)
def test_there_is_one_block_per_role(topology: Topology, blocks: int) -> None:
    grouping = by_role(topology)
    assert len(grouping.topology.blocks) == blocks
    nodes = grouping.original(torch.arange(topology.num_nodes))
    assert [topology.names[v] for v in nodes] == list(grouping.topology.names)
    ours = nodes[grouping.topology.edge_index]
    theirs = topology.edge_index
    if grouping.edge is not None:
        theirs = theirs[:, grouping.edge]
    assert torch.equal(ours, theirs)
    assert torch.equal(nodes[grouping.topology.inputs], topology.inputs)
    assert torch.equal(nodes[grouping.topology.outputs], topology.outputs)


def test_wirings_have_the_same_edges() -> None:
    topology = EARLY_OUTPUT
    for rule in ("dnw", "top_kast", "gse(every=1)"):
        graph = NeuralGraph(
            topology, rule=rule, num_edges=5, node="relu", schedule="discrete(input='held')"
        )
        wiring = graph.wiring()
        found = wiring.regrouped(graph.grouping).validate()
        nodes = graph.grouping.original(torch.arange(topology.num_nodes))
        pairs = [nodes[found.edge_index].t().tolist(), wiring.edge_index.t().tolist()]
        ours, theirs = (
            {
                tuple(edge): weight
                for edge, weight in zip(edges, w.edge_weight.tolist(), strict=True)
            }
            for edges, w in zip(pairs, (found, wiring), strict=True)
        )
        assert ours == theirs
        assert torch.equal(found.trained(graph.weight)[found.position], found.edge_weight)


@pytest.mark.parametrize(
    "schedule", ["discrete(steps=4, input='held')", "continuous(method='rk4')"]
)
def test_weights_keep_the_order_of_the_topology(schedule: str) -> None:
    """What is saved, measured and drawn goes by the topology that was given."""
    graph = NeuralGraph(
        EARLY_OUTPUT, num_edges=6, node="relu", output_node="relu", schedule=schedule
    )
    drawn = graph.to_networkx()
    data = graph.to_data()
    names = graph.topology.names
    for (u, v), weight in zip(data.edge_index.t().tolist(), data.edge_weight, strict=True):
        assert drawn.edges[names[u], names[v]]["weight"] == float(weight)
        edge = (graph.topology.edge_index == torch.tensor([[u], [v]])).all(0).nonzero()
        assert graph.weight[edge] == weight
    x = torch.randn(4, 2)
    again = edited(graph, drawn)
    assert torch.allclose(again(x), graph(x), atol=1e-6)
    for other in (copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert torch.equal(other(x), graph(x))


def functions_by_block(graph: NeuralGraph) -> dict[str, Tensor]:
    """Return a checkpoint as it was when every block of the topology had a node function."""
    state = {}
    grouping, topology = graph.grouping, graph.topology
    for name, value in graph.state_dict().items():
        kind, _, rest = name.partition(".")
        if kind not in ("nodes", "messages"):
            state[name] = value
            continue
        index, _, parameter = rest.partition(".")
        group = grouping.topology.blocks[int(index)]
        nodes = grouping.original(torch.arange(group.nodes.start, group.nodes.stop))
        for block in topology.blocks:
            mine = (topology.block[nodes] == block.index).nonzero().flatten()
            if len(mine):
                by_node = value.dim() and len(value) == len(group.nodes)
                state[f"{kind}.{block.index}.{parameter}"] = value[mine] if by_node else value
    return state


@pytest.mark.parametrize("wrapped", [False, True])
def test_checkpoints_with_a_function_per_block_are_read(wrapped: bool) -> None:
    options: dict[str, Any] = {
        "num_edges": 6,
        "node": NormReluConv,
        "output_node": partial(Norm, norm="batch"),
        "message": "relu_conv",
        "schedule": "discrete(steps=4, input='held')",
    }
    first, second = (NeuralGraph(EARLY_OUTPUT, **options) for _ in range(2))
    first(torch.randn(4, 2, 5, 5))  # statistics
    old = functions_by_block(first)
    assert len(old) > len(first.state_dict())
    if wrapped:
        holder = nn.Sequential(nn.Identity(), second)
        holder.load_state_dict({f"1.{name}": value for name, value in old.items()})
    else:
        second.load_state_dict(old)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    second.load_state_dict(first.state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing"):
        second.load_state_dict({**old, "nodes.1.conv.weight": torch.zeros(7, 1, 3, 3)})


def test_frozen_graphs_compute_the_same() -> None:
    graph = NeuralGraph(
        EARLY_OUTPUT,
        num_edges=8,
        node=INSTANCE,
        output_node=INSTANCE,
        schedule="discrete(steps=4, input='held')",
    ).eval()
    x = torch.randn(2, 2, 6, 6)
    frozen = freeze(graph)
    assert relative_error(frozen(x), graph(x)) < 1e-5
    live = frozen[0] if isinstance(frozen, nn.Sequential) else frozen
    nodes = next(m for m in live.modules() if hasattr(m, "outputs")).node
    assert set(nodes.tolist()) <= set(range(EARLY_OUTPUT.num_nodes))


def test_cost_is_that_of_the_same_graph_in_one_block_per_role() -> None:
    topology = Topology.random_dag("barabasi_albert", 30, 3, 4, m=3)
    grouping = by_role(topology)
    torch.manual_seed(0)
    ours = NeuralGraph(topology, num_edges=40, node=INSTANCE, schedule="discrete(steps=6)")
    theirs = NeuralGraph(
        grouping.topology, num_edges=40, node=INSTANCE, schedule="discrete(steps=6)"
    )
    with torch.no_grad():
        order = grouping.edge
        theirs.weight.copy_(ours.weight if order is None else ours.weight[order])
    assert cost(ours, image_size=8) == cost(theirs, image_size=8)


def test_gse_grows_edges_of_the_topology_that_was_given() -> None:
    torch.manual_seed(0)
    graph = NeuralGraph(
        EARLY_OUTPUT,
        rule="gse(every=1)",
        num_edges=4,
        node=Relu,
        output_node="identity",
        schedule="discrete(steps=4, read='every')",
    )
    optimizer = torch.optim.SGD(graph.parameters(), lr=0.1)
    attach(graph, optimizer, total_steps=20)
    for _ in range(10):
        optimizer.zero_grad()
        graph(torch.randn(8, 2).abs()).square().sum().backward()
        optimizer.step()
        graph.wiring().validate()
    assert nx.is_directed_acyclic_graph(graph.to_networkx())
