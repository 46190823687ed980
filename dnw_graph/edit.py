"""A learned graph, edited with networkx and made a graph again."""

from collections.abc import Hashable

import networkx as nx
import torch
from torch import nn

from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.schedule import Schedule
from dnw_graph.topology import Topology
from dnw_graph.wiring import Rule


def edited(
    graph: NeuralGraph,
    wiring: nx.DiGraph,
    *,
    rule: str | Rule | type[Rule] | None = None,
    num_edges: int | None = None,
) -> NeuralGraph:
    """Return a graph like another one, with the edges of a networkx graph.

    Edges that stayed keep their weights, nodes that stayed their node functions; new edges have the
    ``weight`` given to them or one that is drawn, new nodes are as in a new graph.

    Args:
        graph: The graph; it stays as it is.
        wiring: What :meth:`NeuralGraph.to_networkx` made of it, changed at will. Its edges are the
            candidates; those with ``real=False`` do not count as real.
        rule: How edges are chosen, if otherwise than before. A rule that fixes them fixes these.
        num_edges: The budget ``k``; the number of real edges of ``wiring`` unless given.

    Raises:
        ValueError: A topology that the schedule cannot run; or a copy of a graph whose node
            functions were built by a local function.
    """
    if len(graph.functions) < 4:
        raise ValueError(
            "this graph is a copy, and copies do not know node functions that a lambda or a local "
            "function builds: edit the graph itself, or build them by a class"
        )
    topology = _topology(wiring, graph.schedule)
    real = [data.get("real", True) for _, _, data in wiring.edges(data=True)]
    new = NeuralGraph(
        topology,
        rule=graph.rule if rule is None else rule,
        num_edges=sum(real) if num_edges is None else num_edges,
        schedule=graph.schedule,
        stride=graph.stride,
        backend=graph.aggregation,
        **graph.functions,
    ).to(graph.weight)
    with torch.no_grad():
        ids = []
        for i, (u, v) in enumerate(topology.edge_index.t().tolist()):
            data = wiring.edges[topology.names[u], topology.names[v]]
            if "weight" in data:
                new.weight[i] = data["weight"]
            if data.get("real", True):
                ids.append(i)
        fixed = new.choice.get_buffer("edge_id") if "edge_id" in new.choice._buffers else None
        if fixed is not None and len(fixed) == len(ids):
            fixed.copy_(torch.tensor(ids))
        for ours, theirs in ((new.nodes, graph.nodes), (new.messages, graph.messages)):
            _keep_functions(ours, new.topology, theirs, graph.topology)
    return new.train(graph.training)


def _topology(wiring: nx.DiGraph, schedule: Schedule) -> Topology:
    """Return a topology in the blocks that nodes say, or in others where these do not do."""
    try:
        topology = Topology.from_networkx(wiring)
        schedule.check(topology)
    except ValueError:  # new nodes without a block, or edges that no longer lead to a later one
        bare = wiring.copy()
        for node in bare:
            bare.nodes[node].pop("block", None)
        topology = Topology.from_networkx(bare)
    return topology


def _keep_functions(
    ours: nn.ModuleList, topology: Topology, theirs: nn.ModuleList, before: Topology
) -> None:
    """Copy what belongs to nodes that there were before: tensors with an entry a node."""
    rows: dict[Hashable, tuple[nn.Module, int, int]] = {}
    for block, module in zip(before.blocks, theirs, strict=True):
        for at, v in enumerate(block.nodes):
            rows[before.names[v]] = module, at, len(block.nodes)
    for block, module in zip(topology.blocks, ours, strict=True):
        state = module.state_dict()
        for at, v in enumerate(block.nodes):
            source, row, size = rows.get(topology.names[v], (None, 0, 0))
            if type(source) is not type(module):
                continue
            for name, value in source.state_dict().items():
                mine = state[name]
                if not value.dim():
                    mine.copy_(value)
                elif len(value) == size and len(mine) == len(block.nodes):
                    mine[at] = value[row]
