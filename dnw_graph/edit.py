"""A learned graph, edited with networkx and made a graph again."""

import math
from collections.abc import Hashable

import networkx as nx
import torch
from torch import Tensor, nn

from dnw_graph._wrapped import unwrapped
from dnw_graph.aggregation import Backend
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
    backend: str | Backend | type[Backend] | None = None,
    allow_new_names: bool = False,
) -> NeuralGraph:
    """Return a graph like another one, with the edges of a networkx graph.

    Edges have the ``weight`` that ``wiring`` gives them, otherwise the one they had before, and
    otherwise one that is drawn; nodes that stayed keep their node functions, new ones are as in a
    new graph. It has parameters of its own, so optimizers and what is attached are made anew.

    Args:
        graph: The graph; it stays as it is.
        wiring: What :meth:`NeuralGraph.to_networkx` made of it, changed at will. Its edges are the
            candidates; those with ``real=False`` do not count as real. Names may have become text
            on the way, or the attribute ``id``, ``name`` or ``label`` of the nodes.
        rule: How edges are chosen, if otherwise than before. A rule that fixes them fixes these,
            the largest of them where the budget is smaller.
        num_edges: The budget ``k``; the number of real edges of ``wiring`` unless given.
        backend: How messages are summed, if otherwise than before.
        allow_new_names: Whether fewer than half of the nodes may have a name of ``graph``.

    Raises:
        ValueError: Names that are not those of the graph; a topology that the schedule or backend
            cannot run; a weight that is not a number; a copy of a graph whose node functions were
            built by a local function.
    """
    inner = unwrapped(graph)
    if not isinstance(inner, NeuralGraph):
        raise TypeError(f"edited() takes a NeuralGraph, got a {type(inner).__name__}")
    graph = inner
    if len(graph.functions) < 4:
        raise ValueError(
            "this graph is a copy, and copies do not know node functions that a lambda or a local "
            "function builds: edit the graph itself, or build them by a class"
        )
    wiring = _with_names_of(graph.topology, wiring, allow_new_names)
    topology = _topology(wiring, graph.schedule)
    real = [data.get("real", True) for _, _, data in wiring.edges(data=True)]
    new = NeuralGraph(
        topology,
        rule=graph.rule if rule is None else rule,
        num_edges=sum(real) if num_edges is None else num_edges,
        schedule=graph.schedule,
        stride=graph.stride,
        init=graph.init,
        backend=graph.backend if backend is None else backend,
        **graph.functions,
    ).to(graph.weight)
    with torch.no_grad():
        weights, ids = _weights(new, wiring, graph)
        if "edge_id" in new.selector._buffers:
            _fix(weights, new.selector.get_buffer("edge_id"), ids)
        new.selector.set_weights_of_candidates(new.weight, weights)
        new.weight.requires_grad_(graph.weight.requires_grad)
        for ours, theirs in ((new.nodes, graph.nodes), (new.messages, graph.messages)):
            _keep_functions(ours, new.grouping.topology, theirs, graph.grouping.topology)
    return new.train(graph.training)


def _with_names_of(topology: Topology, wiring: nx.DiGraph, allow_new_names: bool) -> nx.DiGraph:
    """Return a networkx graph whose nodes have the names that they have in a topology.

    Raises:
        ValueError: Fewer than half of them do, and that is not allowed.
    """
    known = set(topology.names)
    by_text = {str(name): name for name in topology.names}
    best = {}
    for node in wiring:
        if node in known or str(node) in by_text:
            best[node] = node if node in known else by_text[str(node)]
    for attribute in ("name", "id", "label"):  # a program may have numbered the nodes anew
        texts = {node: str(data.get(attribute)) for node, data in wiring.nodes(data=True)}
        named = {node: by_text[text] for node, text in texts.items() if text in by_text}
        if len(named) == len(wiring) == len(set(named.values())):
            best = named
            break
    if len(set(best.values())) < len(best):
        raise ValueError(
            "two nodes stand for the same name of the graph, such as 1 and '1'; rename one of them"
        )
    if 2 * len(best) < min(len(known), len(wiring)) and not allow_new_names:
        example = next(node for node in wiring if node not in best)
        raise ValueError(
            f"{len(best)} of the {len(wiring)} nodes have a name of the graph, so the node "
            f"functions of the others would be drawn anew: names are {topology.names[0]!r}, ... "
            f"in the graph, and {example!r}, ... in what is given. Rename its nodes with "
            "networkx.relabel_nodes, or pass allow_new_names=True"
        )
    return nx.relabel_nodes(wiring, {node: name for node, name in best.items() if node != name})


def _weights(new: NeuralGraph, wiring: nx.DiGraph, graph: NeuralGraph) -> tuple[Tensor, Tensor]:
    """Return the weights of candidates ``[E]``, and the ids of those that are to be real."""
    names, ids = new.topology.names, []
    drawn = new.selector.weights_of_candidates(new.weight)
    if new.rule.compact:  # one for each edge that may become real
        bound = new.bounds().repeat_interleave(new.topology.rowptr.diff())
        drawn.uniform_(-1, 1).mul_(bound.to(drawn))
    weights = drawn.tolist()
    before: dict[tuple[Hashable, Hashable], float] = {}
    if any("weight" not in data for _, _, data in wiring.edges(data=True)):
        known = graph.selector.weights_of_candidates(graph.weight)
        if all(data.get("real", True) for _, _, data in wiring.edges(data=True)):
            real = graph.wiring()  # as in a pass, since no hallucinated edge is left beside them
            known[real.edge_id] = real.edge_weight
        called, pairs = graph.topology.names, graph.topology.edge_index.t().tolist()
        for (u, v), weight in zip(pairs, known.tolist(), strict=True):
            if not math.isnan(weight):
                before[called[u], called[v]] = weight
    for i, (u, v) in enumerate(new.topology.edge_index.t().tolist()):
        edge = names[u], names[v]
        data = wiring.edges[edge]
        try:
            weights[i] = float(data.get("weight", before.get(edge, weights[i])))
        except (TypeError, ValueError):
            raise ValueError(f"{_edge(edge)} has weight {data['weight']!r}, not a number") from None
        if not math.isfinite(weights[i]) and "weight" in data:
            raise ValueError(
                f"{_edge(edge)} has weight {weights[i]}: weights must be finite; remove the edge, "
                "or leave its weight out to keep the one it has"
            )
        if data.get("real", True):
            ids.append(i)
    kept = torch.tensor(weights, dtype=torch.float64, device=new.weight.device)
    return kept, torch.tensor(ids, dtype=torch.int64, device="cpu")


def _edge(edge: tuple[Hashable, Hashable]) -> str:
    return f"edge {edge[0]!r} -> {edge[1]!r}"


def _fix(weights: Tensor, fixed: Tensor, ids: Tensor) -> None:
    """Let a rule that keeps the edges it drew keep these instead, as far as the budget goes."""
    ids = ids.to(fixed.device)
    if len(ids) > len(fixed):
        ids = ids[weights[ids].abs().topk(len(fixed)).indices]
    others = fixed[~torch.isin(fixed, ids)]
    fixed.copy_(torch.cat([ids, others[: len(fixed) - len(ids)]]).sort().values)


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
    """Copy what belongs to nodes that there were before, and what the nodes of a block share."""
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
                by_node = value.dim() and len(value) == size and len(mine) == len(block.nodes)
                if by_node:
                    mine[at] = value[row]
                elif mine.shape == value.shape:
                    mine.copy_(value)
            for own, old in zip(module.parameters(), source.parameters(), strict=True):
                own.requires_grad_(old.requires_grad)
