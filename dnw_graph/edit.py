"""Conversion of a graph that was edited with networkx back to a :class:`NeuralGraph`."""

import copy
import math
from collections.abc import Hashable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dnw_graph._wrapped import unwrapped
from dnw_graph.aggregation import Backend
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.schedule import Schedule
from dnw_graph.topology import Topology
from dnw_graph.topology.files import check_graph
from dnw_graph.wiring import Rule

if TYPE_CHECKING:
    import networkx as nx


def edited(
    graph: NeuralGraph,
    wiring: "nx.DiGraph",
    *,
    rule: str | Rule | type[Rule] | None = None,
    num_edges: int | None = None,
    backend: str | Backend | type[Backend] | None = None,
    allow_new_names: bool = False,
) -> NeuralGraph:
    """Return a graph like ``graph``, with the edges of a networkx graph.

    Each edge has its ``weight`` in ``wiring``; without one, its weight in ``graph``; otherwise a
    newly drawn one. Nodes of ``graph`` keep their node functions; those of other nodes are newly
    initialised. An output to which no path of edges leads from an input is constant. The result has
    its own parameters, so create the optimizer and call :func:`dnw_graph.attach` again.

    Args:
        graph: The original graph, which is not changed.
        wiring: The result of :meth:`NeuralGraph.to_networkx` after any changes, with
            ``candidates=True`` to keep hallucinated edges. Its edges are the candidates; those with
            ``real=False`` are not real. Nodes are identified by name, which may have become a
            string, or have moved to the node attribute ``id``, ``name`` or ``label``.
        rule: The rule, if different from that of ``graph``. A rule with fixed edges fixes the real
            edges of ``wiring``, or the largest of them if the budget is smaller.
        num_edges: The budget ``k``; the number of real edges of ``wiring`` by default.
        backend: The backend, if different from that of ``graph``.
        allow_new_names: Whether fewer than half of the nodes may have a name of ``graph``.

    Raises:
        ValueError: If the names are not those of the graph, the schedule or backend cannot run the
            topology, a weight is not a finite number, or ``graph`` is a copy of a graph whose node
            functions were built by a local function.
        TypeError: If ``graph`` is not a :class:`NeuralGraph`, or ``wiring`` not a networkx graph.
    """
    graph = _checked(unwrapped(graph))
    check_graph(wiring)
    wiring = _with_names_of(graph.topology, wiring, allow_new_names)
    schedule = copy.copy(graph.schedule)
    vars(schedule)["allows_constant_outputs"] = True  # not by setattr, as it may be frozen
    topology = _topology(wiring, schedule)
    real = [data.get("real", True) for _, _, data in wiring.edges(data=True)]
    new = NeuralGraph(
        topology,
        rule=graph.rule if rule is None else rule,
        num_edges=sum(real) if num_edges is None else num_edges,
        schedule=schedule,
        stride=graph.stride,
        init=graph.init,
        backend=graph.backend if backend is None else backend,
        **graph.functions,
    ).to(graph.weight)
    with torch.no_grad():
        weights, ids = _weights(new, wiring, graph)
        if "edge_id" in new.selector._buffers:
            _set_fixed_edges(weights, new.selector.get_buffer("edge_id"), ids)
        new.selector.set_weights_of_candidates(new.weight, weights)
        new.weight.requires_grad_(graph.weight.requires_grad)
        for new_functions, old_functions in (
            (new.nodes, graph.nodes),
            (new.messages, graph.messages),
        ):
            _keep_functions(
                new_functions, new.grouping.topology, old_functions, graph.grouping.topology
            )
    return new.train(graph.training)


def _checked(graph: nn.Module) -> NeuralGraph:
    """Return a graph that can be built again, or raise an error."""
    if not isinstance(graph, NeuralGraph):
        raise TypeError(f"edited() takes a NeuralGraph, got a {type(graph).__name__}")
    if not {"node", "input_node", "output_node", "message"} <= graph.functions.keys():
        # See NeuralGraph.__getstate__.
        raise ValueError(
            "this graph is a copy, and copies do not keep node functions that a lambda or a local "
            "function builds: edit the original graph, or build its node functions with a class"
        )
    return graph


def _with_names_of(topology: Topology, wiring: "nx.DiGraph", allow_new_names: bool) -> "nx.DiGraph":
    """Return a networkx graph with its nodes renamed to the matching names of a topology.

    Raises:
        ValueError: If two nodes match one name, or fewer than half match any and that is not
            allowed.
    """
    import networkx as nx

    names = set(topology.names)
    by_text = {str(name): name for name in topology.names}
    matches = {}
    for node in wiring:
        if node in names or str(node) in by_text:
            matches[node] = node if node in names else by_text[str(node)]
    for attribute in ("name", "id", "label"):  # a program may have renumbered the nodes
        texts = {node: str(data.get(attribute)) for node, data in wiring.nodes(data=True)}
        by_attribute = {node: by_text[text] for node, text in texts.items() if text in by_text}
        if len(by_attribute) == len(wiring) == len(set(by_attribute.values())):
            matches = by_attribute
            break
    if len(set(matches.values())) < len(matches):
        raise ValueError(
            "two nodes match the same name of the graph, such as 1 and '1'; rename one of them"
        )
    if 2 * len(matches) < min(len(names), len(wiring)) and not allow_new_names:
        example = next(node for node in wiring if node not in matches)
        raise ValueError(
            f"only {len(matches)} of the {len(wiring)} nodes have a name of the graph, so the node "
            f"functions of the others would be newly initialised: names are {topology.names[0]!r}, "
            f"... in the graph, and {example!r}, ... in wiring. Rename its nodes with "
            "networkx.relabel_nodes, or pass allow_new_names=True"
        )
    return nx.relabel_nodes(wiring, {node: name for node, name in matches.items() if node != name})


def _weights(new: NeuralGraph, wiring: "nx.DiGraph", graph: NeuralGraph) -> tuple[Tensor, Tensor]:
    """Return the weights of all candidates ``[E]``, and the ids of the real ones."""
    names, ids = new.topology.names, []
    initial = new.selector.weights_of_candidates(new.weight)
    if new.rule.compact:  # only real edges have a weight, so draw one for each candidate
        bound = new.bounds().repeat_interleave(new.topology.rowptr.diff())
        initial.uniform_(-1, 1).mul_(bound.to(initial))
    weights = initial.tolist()
    old_weights: dict[tuple[Hashable, Hashable], float] = {}
    if any("weight" not in data for _, _, data in wiring.edges(data=True)):
        current = graph.selector.weights_of_candidates(graph.weight)
        if all(data.get("real", True) for _, _, data in wiring.edges(data=True)):
            real = graph.wiring()  # no hallucinated edges: use the weights of a forward pass
            current[real.edge_id] = real.edge_weight
        old_names, pairs = graph.topology.names, graph.topology.edge_index.t().tolist()
        for (u, v), weight in zip(pairs, current.tolist(), strict=True):
            if not math.isnan(weight):
                old_weights[old_names[u], old_names[v]] = weight
    for i, (u, v) in enumerate(new.topology.edge_index.t().tolist()):
        edge = names[u], names[v]
        data = wiring.edges[edge]
        try:
            weights[i] = float(data.get("weight", old_weights.get(edge, weights[i])))
        except (TypeError, ValueError):
            raise ValueError(f"{_edge(edge)} has weight {data['weight']!r}, not a number") from None
        if not math.isfinite(weights[i]) and "weight" in data:
            raise ValueError(
                f"{_edge(edge)} has weight {weights[i]}: weights must be finite; remove the edge, "
                "or leave out its weight to keep the current one"
            )
        if data.get("real", True):
            ids.append(i)
    tensor = torch.tensor(weights, dtype=torch.float64, device=new.weight.device)
    return tensor, torch.tensor(ids, dtype=torch.int64, device="cpu")


def _edge(edge: tuple[Hashable, Hashable]) -> str:
    return f"edge {edge[0]!r} -> {edge[1]!r}"


def _set_fixed_edges(weights: Tensor, fixed: Tensor, ids: Tensor) -> None:
    """Overwrite a rule's ``fixed`` edges with the largest of ``ids`` that the budget allows."""
    ids = ids.to(fixed.device)
    if len(ids) > len(fixed):
        ids = ids[weights[ids].abs().topk(len(fixed)).indices]
    others = fixed[~torch.isin(fixed, ids)]
    fixed.copy_(torch.cat([ids, others[: len(fixed) - len(ids)]]).sort().values)


def _topology(wiring: "nx.DiGraph", schedule: Schedule) -> Topology:
    """Return a topology with the blocks named by nodes, or derived ones if those are invalid."""
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
    new_functions: nn.ModuleList,
    topology: Topology,
    old_functions: nn.ModuleList,
    old_topology: Topology,
) -> None:
    """Copy the parameters of nodes of the old topology, and those shared by a block."""
    rows: dict[Hashable, tuple[nn.Module, int, int]] = {}
    for block, module in zip(old_topology.blocks, old_functions, strict=True):
        for i, v in enumerate(block.nodes):
            rows[old_topology.names[v]] = module, i, len(block.nodes)
    for block, module in zip(topology.blocks, new_functions, strict=True):
        state = module.state_dict()
        for i, v in enumerate(block.nodes):
            source, row, size = rows.get(topology.names[v], (None, 0, 0))
            if type(source) is not type(module):
                continue
            for name, value in source.state_dict().items():
                target = state[name]
                by_node = value.dim() and len(value) == size and len(target) == len(block.nodes)
                if by_node:
                    target[i] = value[row]
                elif target.shape == value.shape:
                    target.copy_(value)
            for parameter, old_parameter in zip(
                module.parameters(), source.parameters(), strict=True
            ):
                parameter.requires_grad_(old_parameter.requires_grad)
