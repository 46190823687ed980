"""Unroll graphs in time and remove nodes that no output needs."""

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
from dnw_graph.topology.order import reached

Edges = tuple[Tensor, Tensor]
"""Sources and targets ``[2, n]`` of edges, and their weights ``[n]``."""


class _Layer(NamedTuple):
    """The nodes of a block at one step; a static graph has one layer per block."""

    block: Block
    role: Role
    formula: Formula


class Unrolled:
    """A graph under construction in which each node fires once.

    A layer consists of a block, a role and a formula. Nodes are numbered in the order in which
    layers are added.
    """

    def __init__(self) -> None:
        self.layers: list[_Layer] = []
        self.edges: list[Edges] = []
        self.size = 0

    def add(self, *layer: Any) -> int:
        """Add a layer (a block, a role and a formula), and return the number of its first node.

        Raises:
            ValueError: If a tensor of the formula does not have one entry per node.
        """
        self.layers.append(_Layer(*layer))
        _check_formula(self.layers[-1])
        self.size += len(self.layers[-1].block.nodes)
        return self.size - len(self.layers[-1].block.nodes)


def unroll(graph: NeuralGraph, wanted: Tensor) -> FrozenGraph:
    """Freeze a static graph, or one in discrete time without sequences.

    Args:
        graph: The graph; it is not changed.
        wanted: Mask of the output channels to keep ``[outputs]``.

    Returns:
        The frozen graph without nodes that lead to no output; all of its nodes count as reached.

    Raises:
        ValueError: If the schedule or a node function cannot be frozen.
    """
    topology, wiring = graph.grouping.topology, graph.wiring().regrouped(graph.grouping)
    edge_index, weight = wiring.edge_index.cpu(), wiring.edge_weight.detach().float().cpu()
    edges = edge_index[:, weight != 0], weight[weight != 0]
    unrolled, schedule = Unrolled(), graph.schedule
    if isinstance(schedule, Static):
        last = _add_blocks(graph, unrolled, edges)
    elif isinstance(schedule, Discrete) and not (
        schedule.takes_sequence or schedule.gives_sequence
    ):
        last = _add_steps(graph, schedule, unrolled, edges)
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


def _add_blocks(graph: NeuralGraph, unrolled: Unrolled, edges: Edges) -> Tensor:
    """Add the blocks of a static graph, and return the number of each node in ``unrolled`` ``[V]``.

    Raises:
        ValueError: If a node or message function cannot be frozen.
    """
    sending = graph.topology.block[edges[0][0]].unique().tolist()
    for block in graph.topology.blocks:
        formula = formula_of(graph.nodes[block.index], 0.0)
        message = formula_of(graph.messages[block.index], 0.0)
        if block.role != Role.OUTPUT:
            formula = chained(formula, message)
        elif block.index in sending and not _is_identity(message):
            raise ValueError("freeze() does not support a message function on outputs")
        unrolled.add(block, block.role, formula)
    unrolled.edges.append(edges)
    return torch.arange(graph.topology.num_nodes, device="cpu")


def _add_steps(graph: NeuralGraph, schedule: Discrete, unrolled: Unrolled, edges: Edges) -> Tensor:
    """Add all blocks for each step, and return the number of each node at the last step ``[V]``.

    Raises:
        ValueError: If a node or message function cannot be frozen, or has a stride.
    """
    topology, (edge_index, weight) = graph.grouping.topology, edges
    blocks = topology.blocks
    held = schedule.input == "held"
    held_inputs = torch.full((topology.num_nodes,), -1, device="cpu")
    current = torch.arange(topology.num_nodes, device="cpu")
    for block in blocks:
        if held and block.role == Role.INPUT:
            held_inputs[block.rows] = add_layer(unrolled, block, Role.INPUT, Formula())
    sending = set(topology.block[edge_index[0]].tolist())
    for step in range(schedule.steps + 1):
        previous, current = current, torch.empty_like(current)
        for block in blocks:
            role, formula = _step_layer(graph, schedule, block, step, block.index in sending)
            current[block.rows] = add_layer(unrolled, block, role, formula)
        if step:
            unrolled.edges.append(
                (torch.stack([previous[edge_index[0]], current[edge_index[1]]]), weight)
            )
        if held:
            nodes = (held_inputs >= 0).nonzero().flatten()
            ones = torch.ones(len(nodes), dtype=torch.float32, device="cpu")
            unrolled.edges.append((torch.stack([held_inputs[nodes], current[nodes]]), ones))
    return current


def _step_layer(
    graph: NeuralGraph, schedule: Discrete, block: Block, step: int, sends: bool
) -> tuple[Role, Formula]:
    """Return the role and the formula of a block at a step, 0 for the start."""
    held = schedule.input == "held"
    role, formula = Role.HIDDEN, Formula()
    if step or (held and block.role == Role.INPUT):
        formula = formula_of(graph.nodes[block.index], float(max(step - 1, 0)))
    if step < schedule.steps and sends:
        formula = chained(formula, formula_of(graph.messages[block.index], float(step)))
    elif step == schedule.steps and block.role == Role.OUTPUT:
        role = Role.OUTPUT
    if formula.stride != 1:
        raise ValueError(
            f"freeze() does not support strides in discrete time, got {formula.stride}"
        )
    if not step and not held and block.role == Role.INPUT:
        role = Role.INPUT
    return role, formula


def add_layer(unrolled: Unrolled, *layer: Any) -> Tensor:
    """Add a layer (a block, a role and a formula), and return the numbers of its nodes."""
    first = unrolled.add(*layer)
    return torch.arange(first, unrolled.size, device="cpu")


def formula_of(module: Any, t: float) -> Formula:
    """Return the formula of a node or message function at time ``t``, in evaluation.

    Raises:
        ValueError: If it has no method ``formula(t)`` that returns one.
    """
    formula = module.formula(t) if hasattr(module, "formula") else None
    if not isinstance(formula, Formula):
        function = module.function if isinstance(module, WithoutTime) else module
        raise ValueError(
            f"freeze() does not support the node function {type(function).__name__}: expected a "
            "method formula(t) that returns a dnw_graph.node.Formula of scale, shift, norm, ReLU "
            "and 3x3 filter; a graph with any other node function cannot be frozen"
        )
    return formula


def _check_formula(layer: _Layer) -> None:
    """Raise ValueError if a tensor of a formula does not have one entry per node of its block."""
    size = len(layer.block.nodes)
    for name, shape in (("scale", (size,)), ("shift", (size,)), ("filters", (size, 3, 3))):
        value = getattr(layer.formula, name)
        if value is None or (isinstance(value, Tensor) and value.shape == shape):
            continue
        found = list(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"the formula of the node function of block {layer.block.index} must have {name} "
            f"{list(shape)} or None, got {found}"
        )


def _is_identity(formula: Formula) -> bool:
    return not (_is_affine(formula) or formula.relu or _has_filters(formula))


def _is_affine(formula: Formula) -> bool:
    return any(part is not None for part in (formula.scale, formula.shift, formula.eps))


def _has_filters(formula: Formula) -> bool:
    return formula.filters is not None


def chained(first: Formula, then: Formula) -> Formula:
    """Return one formula for two, the second of which is applied to the result of the first.

    Raises:
        ValueError: If no formula computes both.
    """
    if _is_identity(then):
        return first
    if _is_identity(first):
        return then
    if _has_filters(first) or _is_affine(then):
        raise ValueError(
            "freeze() does not support this message function: it must be the identity after a node "
            "function with a filter, and must not have a scale, shift or norm after any other"
        )
    relu = first.relu or then.relu
    return replace(first, relu=relu, filters=then.filters, stride=then.stride)


def compact(unrolled: Unrolled, channel: Tensor, ends: Tensor) -> FrozenGraph:
    """Return a frozen graph of the nodes that lead to an output.

    Layers of inputs come first. Edges are sorted by target and source.

    Args:
        unrolled: Layers and edges.
        channel: Input channel of each node of the graph, read for input nodes ``[V]``.
        ends: Numbers in ``unrolled`` of the outputs.
    """
    edge_index = torch.cat([index for index, _ in unrolled.edges], 1)
    needed = reached(edge_index.flip(0), unrolled.size, ends.unique())
    number = torch.full((unrolled.size,), -1, device="cpu")
    originals: list[Tensor] = []  # nodes of each part, by number in the graph
    parts: list[Part] = []
    rows: list[tuple[Tensor, ...]] = []
    for nodes, layer in sorted(_numbered(unrolled), key=lambda pair: pair[1].role != Role.INPUT):
        needed_nodes = nodes[needed[nodes]]
        if not len(needed_nodes):
            continue
        part = _part(layer, parts[-1].past if parts else 0, len(needed_nodes))
        number[needed_nodes] = torch.arange(part.first, part.past, device="cpu")
        originals.append(needed_nodes - nodes[0] + layer.block.nodes.start)
        parts.append(part)
        rows.append(_rows(layer.formula, needed_nodes - nodes[0]))
    stride = max(layer.formula.stride for layer in unrolled.layers if layer.role == Role.INPUT)
    edge_index, edge_weight = _renumbered(unrolled, number)
    none = torch.empty(0, dtype=torch.int64, device="cpu")
    inputs = [channel[n] for n, p in zip(originals, parts, strict=True) if p.role == Role.INPUT]
    empty = (_zeros(0), _zeros(0), _zeros(0, 3, 3))
    scale, shift, filters = (torch.cat(tensors) for tensors in zip(empty, *rows, strict=True))
    node = torch.cat(originals or [none])
    return FrozenGraph(
        [_levelled(part, stride) for part in parts],
        (stride,) * (stride > 1),
        edge_index=edge_index,
        edge_weight=edge_weight,
        inputs=torch.cat(inputs or [none]),
        outputs=number[ends],
        node=node,
        scale=scale,
        shift=shift,
        filters=filters,
        reached=torch.ones(len(node), dtype=torch.bool, device="cpu"),
    )


def _renumbered(unrolled: Unrolled, number: Tensor) -> Edges:
    """Return the edges between nodes that have a number, -1 for none, by target and source."""
    edge_index = number[torch.cat([index for index, _ in unrolled.edges], 1)]
    needed = (edge_index >= 0).all(0)
    source, target = edge_index = edge_index[:, needed]
    by_target = (target * max(unrolled.size, 1) + source).argsort()
    weight = torch.cat([weight for _, weight in unrolled.edges])
    return edge_index[:, by_target], weight[needed][by_target]


def _zeros(*shape: int) -> Tensor:
    """Return zeros in float32 on the CPU, regardless of the default type and device."""
    return torch.zeros(shape, dtype=torch.float32, device="cpu")


def _numbered(unrolled: Unrolled) -> Iterator[tuple[Tensor, _Layer]]:
    """Yield the numbers of the nodes of each layer, with the layer."""
    first = 0
    for layer in unrolled.layers:
        yield torch.arange(first, first + len(layer.block.nodes), device="cpu"), layer
        first += len(layer.block.nodes)


def _part(layer: _Layer, first: int, size: int) -> Part:
    """Return a part of ``size`` nodes of a layer, the first of which has number ``first``."""
    formula = layer.formula
    return Part(
        first=first,
        past=first + size,
        role=layer.role,
        norm=formula.scale is not None,
        eps=formula.eps,
        relu=formula.relu,
        filters=_has_filters(formula),
    )


def _levelled(part: Part, stride: int) -> Part:
    """Return a part with its levels: with a stride, only inputs read level 0."""
    level = int(stride > 1)
    return replace(part, reads=0 if part.role == Role.INPUT else level, level=level)


def _rows(formula: Formula, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, shift and filters of some nodes of a layer, by index in the layer."""
    tensors = formula.scale, formula.shift, formula.filters
    defaults = _zeros(len(nodes)) + 1, _zeros(len(nodes)), _zeros(len(nodes), 3, 3)
    scale, shift, filters = (
        default if tensor is None else tensor.detach().float().cpu()[nodes]
        for tensor, default in zip(tensors, defaults, strict=True)
    )
    return scale, shift, filters
