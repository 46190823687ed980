"""What is left of a graph: a node a firing, if a path leads from it to an output."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.layout import Part
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.node import Formula, WithoutTime
from dnw_graph.schedule import Discrete, Static
from dnw_graph.topology import Block, Role
from dnw_graph.topology._order import reached

Edges = tuple[Tensor, Tensor]
"""Sources and targets ``[2, n]``, and weights ``[n]``."""


class _Layer(NamedTuple):
    """Nodes that fire together, all of one block: in discrete time there is one for each step."""

    block: Block
    role: Role
    formula: Formula


class Unrolled:
    """A graph in which every node fires once.

    Nodes are numbered layer by layer, as these are added. A layer is given by a block, a role and a
    formula.
    """

    def __init__(self) -> None:
        self.layers: list[_Layer] = []
        self.edges: list[Edges] = []
        self.size = 0

    def add(self, *layer: Any) -> int:
        """Add a layer, given as :class:`_Layer` is; return the number of its first node."""
        self.layers.append(_Layer(*layer))
        self.size += len(self.layers[-1].block.nodes)
        return self.size - len(self.layers[-1].block.nodes)


def unroll(graph: NeuralGraph, wanted: Tensor) -> FrozenGraph:
    """Freeze a graph.

    Args:
        graph: The graph; it stays as it is.
        wanted: Which channels of its output are read ``[outputs]``, boolean.

    Returns:
        What is left; every node counts as reached.

    Raises:
        ValueError: A schedule or a node function that cannot be frozen.
    """
    topology, wiring = graph.grouping.topology, graph.wiring().regrouped(graph.grouping)
    edge_index, weight = wiring.edge_index.cpu(), wiring.edge_weight.detach().float().cpu()
    edges = edge_index[:, weight != 0], weight[weight != 0]
    unrolled, schedule = Unrolled(), graph.schedule
    if isinstance(schedule, Static):
        last = _once(graph, unrolled, edges)
    elif isinstance(schedule, Discrete) and not schedule.takes_sequence | schedule.gives_sequence:
        last = _in_steps(graph, schedule, unrolled, edges)
    else:
        raise ValueError(
            "freeze() takes graphs that are static or in discrete time, got schedule "
            f"{type(schedule).__name__}"
        )
    channel = torch.empty(topology.num_nodes, dtype=torch.int64, device="cpu")
    channel[topology.inputs] = torch.arange(topology.num_inputs, device="cpu")
    frozen = compact(unrolled, channel, last[topology.outputs][wanted])
    frozen.node = graph.grouping.original(frozen.node)
    return frozen


def _once(graph: NeuralGraph, unrolled: Unrolled, edges: Edges) -> Tensor:
    """Add each block; return the number of each node there ``[V]``."""
    sending = graph.topology.block[edges[0][0]].unique().tolist()
    for block in graph.topology.blocks:
        formula = formula_of(graph.nodes[block.index], 0.0)
        message = formula_of(graph.messages[block.index], 0.0)
        if block.role != Role.OUTPUT:
            formula = chained(formula, message)
        elif block.index in sending and not _is_identity(message):
            raise ValueError("freeze() takes no output that sends other than its state")
        unrolled.add(block, block.role, formula)
    unrolled.edges.append(edges)
    return torch.arange(graph.topology.num_nodes, device="cpu")


def _in_steps(graph: NeuralGraph, schedule: Discrete, unrolled: Unrolled, edges: Edges) -> Tensor:
    """Add what all blocks send at each step; return the number of each node at the last ``[V]``."""
    topology, (edge_index, weight) = graph.grouping.topology, edges
    blocks = topology.blocks
    held = schedule.input == "held"
    given = torch.full((topology.num_nodes,), -1, device="cpu")
    last = torch.arange(topology.num_nodes, device="cpu")
    for block in blocks:
        if held and block.role == Role.INPUT:
            given[_range(block)] = numbers_of(unrolled, block, Role.INPUT, Formula())
    sending = set(topology.block[edge_index[0]].tolist())
    for step in range(schedule.steps + 1):
        before, last = last, torch.empty_like(last)
        for block in blocks:
            formula, role = Formula(), Role.HIDDEN
            if step or (held and block.role == Role.INPUT):
                formula = formula_of(graph.nodes[block.index], float(max(step - 1, 0)))
            if step < schedule.steps and block.index in sending:
                formula = chained(formula, formula_of(graph.messages[block.index], float(step)))
            elif step == schedule.steps and block.role == Role.OUTPUT:
                role = Role.OUTPUT
            if formula.stride != 1:
                raise ValueError("freeze() takes no strides in discrete time")
            if not step and not held and block.role == Role.INPUT:
                role = Role.INPUT
            last[_range(block)] = numbers_of(unrolled, block, role, formula)
        if step:
            unrolled.edges.append(
                (torch.stack([before[edge_index[0]], last[edge_index[1]]]), weight)
            )
        if held:
            fed = (given >= 0).nonzero().flatten()
            unrolled.edges.append(
                (
                    torch.stack([given[fed], last[fed]]),
                    torch.ones(len(fed), dtype=torch.float32, device="cpu"),
                )
            )
    return last


def _range(block: Block) -> slice:
    return slice(block.nodes.start, block.nodes.stop)


def numbers_of(unrolled: Unrolled, *layer: Any) -> Tensor:
    """Add a layer, and return the numbers of its nodes."""
    first = unrolled.add(*layer)
    return torch.arange(first, unrolled.size, device="cpu")


def formula_of(module: Any, t: float) -> Formula:
    """Return what a node or message function computes in evaluation.

    Raises:
        ValueError: It does not say.
    """
    formula = module.formula(t) if hasattr(module, "formula") else None
    if not isinstance(formula, Formula):
        own = module.function if isinstance(module, WithoutTime) else module
        raise ValueError(
            f"freeze() does not know the node function {type(own).__name__}: it knows scale, "
            "shift, norm, ReLU and 3x3 filter; a function that is made of these says so by a "
            "method formula(t) that returns a dnw_graph.node.Formula, and a graph with any other "
            "stays as it is"
        )
    return formula


def _is_identity(formula: Formula) -> bool:
    return formula.scale is None and formula.eps is None and not formula.relu | _filters(formula)


def _filters(formula: Formula) -> bool:
    return formula.filters is not None


def chained(first: Formula, then: Formula) -> Formula:
    """Return one formula for two, of which the second sees what the first gives."""
    if _is_identity(then):
        return first
    if _is_identity(first):
        return then
    if _filters(first) or then.scale is not None or then.eps is not None:
        raise ValueError(
            "freeze() does not know this message: after a node function with a filter it takes "
            "identity only, and no norm after any"
        )
    relu = first.relu or then.relu
    return replace(first, relu=relu, filters=then.filters, stride=then.stride)


def compact(unrolled: Unrolled, channel: Tensor, ends: Tensor) -> FrozenGraph:
    """Number what is needed anew: layers of inputs first, edges by target and source."""
    edge_index = torch.cat([index for index, _ in unrolled.edges], 1)
    weight = torch.cat([weight for _, weight in unrolled.edges])
    needed = reached(edge_index.flip(0), unrolled.size, ends.unique())
    number = torch.full((unrolled.size,), -1, device="cpu")
    order: list[Tensor] = []
    parts: list[Part] = []
    tensors: list[tuple[Tensor, ...]] = []
    for nodes, layer in sorted(_numbered(unrolled), key=lambda pair: pair[1].role != Role.INPUT):
        kept = nodes[needed[nodes]]
        if not len(kept):
            continue
        first = parts[-1].past if parts else 0
        number[kept] = torch.arange(first, first + len(kept), device="cpu")
        order.append(kept - nodes[0] + layer.block.nodes.start)
        parts.append(_part(layer, first, len(kept)))
        tensors.append(_rows(layer.formula, kept - nodes[0]))
    strides = [layer.formula.stride for layer in unrolled.layers if layer.role == Role.INPUT]
    stride = max(strides)
    live = needed[edge_index[0]] & needed[edge_index[1]]
    source, target = number[edge_index[:, live]]
    by_target = (target * max(unrolled.size, 1) + source).argsort()
    node = torch.cat(order) if order else torch.empty(0, dtype=torch.int64, device="cpu")
    inputs = [channel[part] for part, p in zip(order, parts, strict=True) if p.role == Role.INPUT]
    none = (_zeros(0), _zeros(0), _zeros(0, 3, 3))
    scale, shift, filters = (torch.cat(rows) for rows in zip(none, *tensors, strict=True))
    return FrozenGraph(
        [_levelled(part, stride) for part in parts],
        (stride,) * (stride > 1),
        edge_index=torch.stack([source, target])[:, by_target],
        edge_weight=weight[live][by_target],
        inputs=torch.cat(inputs) if inputs else node[:0],
        outputs=number[ends],
        node=node,
        scale=scale,
        shift=shift,
        filters=filters,
        reached=torch.ones(len(node), dtype=torch.bool, device="cpu"),
    )


def _zeros(*shape: int) -> Tensor:
    """Return zeros, whatever the default type and device."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _numbered(unrolled: Unrolled) -> Iterator[tuple[Tensor, _Layer]]:
    first = 0
    for layer in unrolled.layers:
        yield torch.arange(first, first + len(layer.block.nodes), device="cpu"), layer
        first += len(layer.block.nodes)


def _part(layer: _Layer, first: int, size: int) -> Part:
    formula = layer.formula
    return Part(
        first=first,
        past=first + size,
        role=layer.role,
        norm=formula.scale is not None,
        eps=formula.eps,
        relu=formula.relu,
        filters=_filters(formula),
    )


def _levelled(part: Part, stride: int) -> Part:
    """Return a part with its levels: inputs lead to the second where there is a stride."""
    level = int(stride > 1)
    return replace(part, reads=0 if part.role == Role.INPUT else level, level=level)


def _rows(formula: Formula, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, shift and filters of some nodes of a layer."""
    ones, zeros = _zeros(len(kept)) + 1, _zeros(len(kept))
    filters = _zeros(len(kept), 3, 3)
    given = [formula.scale, formula.shift, formula.filters]
    scale, shift, filters = (
        default if tensor is None else tensor.detach().float().cpu()[kept]
        for tensor, default in zip(given, (ones, zeros, filters), strict=True)
    )
    return scale, shift, filters
