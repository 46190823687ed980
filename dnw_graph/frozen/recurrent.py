"""Frozen graphs in discrete time that take or return sequences."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.unroll import Unrolled, add_layer, compact, formula_of
from dnw_graph.neural_graph import GraphState, NeuralGraph
from dnw_graph.node import Formula
from dnw_graph.schedule import Discrete, checked_lengths
from dnw_graph.schedule.checks import check_input_shape, check_state
from dnw_graph.topology import Role
from dnw_graph.topology.order import reached


class FrozenRecurrent(nn.Module):
    """A frozen graph in discrete time that applies its step repeatedly.

    The step is a static frozen graph, from a frame and states to new states. The module takes the
    same arguments as the graph, including ``state`` and ``lengths``. Nodes that lead to no output
    in any number of steps are not computed; in a returned state they are 0.

    Args:
        step: Graph from the channels of a frame, followed by the states of ``nodes``, to their new
            states.
        start: Graph from a frame to the states at time 0 of the nodes ``inputs``.
        schedule: The schedule of the graph.
        num_nodes: Number of nodes of the graph.
        num_inputs: Number of channels of a frame.
        indices: ``nodes``: nodes whose states are computed, ascending. ``channels``: channels that
            input nodes read. ``inputs``: indices in ``nodes`` of these input nodes. ``outputs``:
            indices in ``nodes`` of the outputs, by channel.

    Raises:
        ValueError: If an index is out of range.
    """

    nodes: Tensor
    channels: Tensor
    inputs: Tensor
    outputs: Tensor

    def __init__(
        self,
        step: FrozenGraph,
        start: FrozenGraph,
        schedule: Discrete,
        num_nodes: int,
        num_inputs: int,
        indices: Mapping[str, Tensor],
    ) -> None:
        super().__init__()
        self.step, self.start, self.schedule = step, start, schedule
        self.num_nodes, self.num_inputs = num_nodes, num_inputs
        count = len(indices["nodes"])
        sizes = {"nodes": num_nodes, "channels": num_inputs, "inputs": count, "outputs": count}
        for name, size in sizes.items():
            index = indices[name]
            if index.dtype != torch.int64 or index.dim() != 1:
                raise ValueError(f"{name} must be a vector of int64")
            if len(index) and not 0 <= int(index.min()) <= int(index.max()) < size:
                raise ValueError(f"{name} must be from 0 to {size - 1}")
            self.register_buffer(name, index)

    def forward(
        self, x: Tensor, state: GraphState | None = None, lengths: Tensor | None = None
    ) -> Any:
        """Return the states of the outputs; see :meth:`NeuralGraph.forward`."""
        schedule = self.schedule
        self._check(x, state)
        frames = list(x.unbind(1)) if schedule.takes_sequence else [x]
        if lengths is not None:
            lengths = checked_lengths(schedule, x, lengths)
            masks = [(lengths > t).view(-1, *[1] * (x.dim() - 2)) for t in range(len(frames))]
            frames = [torch.where(mask, f, 0) for mask, f in zip(masks, frames, strict=True)]
        no_frame = torch.zeros_like(frames[0])
        if state is None:
            z = self._first_states(frames[0])
            step_frames = frames[1:] if schedule.input == "new" else []
            if schedule.input == "held":
                step_frames = [x] * schedule.steps
            steps = schedule.steps
        else:
            z = state.states[:, self.nodes]
            if schedule.input == "start":
                z = z.clone()
                z[:, self.inputs] = x[:, self.channels]
            step_frames = frames if schedule.input != "start" else []
            steps = len(frames) if schedule.input == "new" else schedule.steps
            step_frames = [x] * steps if schedule.input == "held" else step_frames
        outputs = []
        for step in range(steps):
            frame = step_frames[step] if step < len(step_frames) else no_frame
            new = self.step(torch.cat([frame, z], 1))
            if state is not None and lengths is not None:
                new = torch.where((lengths > step).view(-1, *[1] * (z.dim() - 1)), new, z)
            z = new
            if schedule.gives_sequence or step + 1 == steps:
                outputs.append(z[:, self.outputs])
        y = torch.stack(outputs, 1) if schedule.gives_sequence else outputs[0]
        if state is None:
            return y
        states = z.new_zeros(z.shape[0], self.num_nodes, *z.shape[2:])
        return y, GraphState(states.index_copy(1, self.nodes, z), state.step + steps)

    def _check(self, x: Tensor, state: GraphState | None) -> None:
        """Raise ValueError if an input or a state does not fit the graph."""
        schedule = self.schedule
        check_input_shape(schedule, self.num_inputs, x)
        if state is not None:
            features = x.shape[2 + schedule.takes_sequence :]
            check_state(state, GraphState, [x.shape[0], self.num_nodes, *features])
        elif schedule.takes_sequence and x.shape[1] > schedule.steps + 1:
            raise ValueError(
                f"a sequence of {x.shape[1]} frames does not fit in {schedule.steps} steps; pass "
                f"{schedule.steps + 1} frames or fewer, or a state"
            )

    def initial_state(self, x: Tensor) -> GraphState:
        """Return the state before the first step, 0 everywhere, for inputs like ``x``."""
        features = x.shape[2 + self.schedule.takes_sequence :]
        return GraphState(x.new_zeros(x.shape[0], self.num_nodes, *features), 0)

    def _first_states(self, frame: Tensor) -> Tensor:
        """Return the states at time 0: those of the inputs, and 0 for other nodes."""
        states = frame[:, self.channels] if self.schedule.input == "start" else self.start(frame)
        z = frame.new_zeros(frame.shape[0], len(self.nodes), *frame.shape[2:])
        return z.index_copy(1, self.inputs, states)


def freeze_recurrent(graph: NeuralGraph) -> FrozenRecurrent:
    """Return a frozen copy of a graph in discrete time that takes or returns sequences.

    Raises:
        ValueError: If a node function cannot be frozen, or depends on the time.
    """
    topology, schedule, wiring = graph.topology, graph.schedule, graph.wiring()
    assert isinstance(schedule, Discrete)
    edge_index = wiring.edge_index.cpu()[:, wiring.edge_weight.cpu() != 0]
    needed = reached(edge_index.flip(0), topology.num_nodes, topology.outputs.unique())
    index = needed.cumsum(0) - 1
    channels = needed[topology.inputs].nonzero().flatten()
    return FrozenRecurrent(
        _step(graph, needed),
        _start(graph, topology.inputs[channels]),
        schedule,
        topology.num_nodes,
        topology.num_inputs,
        {
            "nodes": needed.nonzero().flatten(),
            "channels": channels,
            "inputs": index[topology.inputs[channels]],
            "outputs": index[topology.outputs],
        },
    )


def _step(graph: NeuralGraph, needed: Tensor) -> FrozenGraph:
    """Return a graph from a frame and the states of the needed nodes to their new states."""
    topology, number = graph.grouping.topology, graph.topology.num_nodes
    original = graph.grouping.original(range(number))
    wiring = graph.wiring().regrouped(graph.grouping)
    weight = wiring.edge_weight.detach().float().cpu()
    edge_index = wiring.edge_index.cpu()[:, weight != 0]
    unrolled = Unrolled()
    # Channels of the states follow those of the frame: nodes that read them are shifted by number.
    frames, before, after = (torch.full((number,), -1, device="cpu") for _ in range(3))
    for block in topology.blocks:
        nodes = block.nodes
        if block.role == Role.INPUT:
            frames[block.rows] = add_layer(unrolled, block, Role.INPUT, Formula())
        shifted = replace(block, nodes=range(number + nodes.start, number + nodes.stop))
        message = _time_independent_formula(graph, graph.messages[block.index])
        before[block.rows] = add_layer(unrolled, shifted, Role.INPUT, message)
    for block in topology.blocks:
        formula = _time_independent_formula(graph, graph.nodes[block.index])
        after[block.rows] = add_layer(unrolled, block, Role.OUTPUT, formula)
    unrolled.edges.append(
        (torch.stack([before[edge_index[0]], after[edge_index[1]]]), weight[weight != 0])
    )
    inputs = topology.inputs
    ones = torch.ones(len(inputs), dtype=torch.float32, device="cpu")
    unrolled.edges.append((torch.stack([frames[inputs], after[inputs]]), ones))
    channel = torch.zeros(2 * number, dtype=torch.int64, device="cpu")
    channel[inputs] = torch.arange(len(inputs), device="cpu")
    channel[number:] = len(inputs) + (needed.cumsum(0) - 1)[original]
    grouped = original.argsort()  # numbers in the grouping, by number in the topology
    return compact(unrolled, channel, after[grouped[needed.nonzero().flatten()]])


def _start(graph: NeuralGraph, inputs: Tensor) -> FrozenGraph:
    """Return a graph from a frame to the states at time 0 of some input nodes."""
    topology = graph.grouping.topology
    unrolled = Unrolled()
    frames, after = (torch.full((topology.num_nodes,), -1, device="cpu") for _ in range(2))
    blocks = [block for block in topology.blocks if block.role == Role.INPUT]
    for role, numbers in ((Role.INPUT, frames), (Role.OUTPUT, after)):
        for block in blocks:
            formula = Formula()
            if role == Role.OUTPUT:
                formula = _time_independent_formula(graph, graph.nodes[block.index])
            numbers[block.rows] = add_layer(unrolled, block, role, formula)
    sources = topology.inputs
    ones = torch.ones(len(sources), dtype=torch.float32, device="cpu")
    unrolled.edges.append((torch.stack([frames[sources], after[sources]]), ones))
    channel = torch.zeros(topology.num_nodes, dtype=torch.int64, device="cpu")
    channel[sources] = torch.arange(len(sources), device="cpu")
    grouped = graph.grouping.original(range(topology.num_nodes)).argsort()
    return compact(unrolled, channel, after[grouped[inputs]])


def _time_independent_formula(graph: NeuralGraph, module: nn.Module) -> Formula:
    """Return the formula of a node or message function that does not depend on the time.

    Raises:
        ValueError: If it depends on the time, has a stride, or has no formula.
    """
    assert isinstance(graph.schedule, Discrete)
    first = formula_of(module, 0.0)
    for t in range(1, graph.schedule.steps):
        later = formula_of(module, float(t))
        for name, value in vars(first).items():
            other = getattr(later, name)
            same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
            if not same:
                raise ValueError(
                    f"freeze() does not support a {type(module).__name__} that depends on the time "
                    "in a graph that takes or returns sequences"
                )
    if first.stride != 1:
        raise ValueError(f"freeze() does not support strides in discrete time, got {first.stride}")
    return first
