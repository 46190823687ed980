"""Frozen graphs in discrete time that take or return sequences: one step, over and over."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.unroll import Unrolled, compact, formula_of, numbers_of
from dnw_graph.neural_graph import GraphState, NeuralGraph
from dnw_graph.node import Formula
from dnw_graph.schedule import Discrete, checked_lengths
from dnw_graph.topology import Role
from dnw_graph.topology._order import reached


class FrozenRecurrent(nn.Module):
    """A graph in discrete time as its step, a static graph from states and a frame to new states.

    It is called as the graph is, with ``state`` and ``lengths`` too. Nodes from which no output is
    reached, in any number of steps, are not computed; in a state that is returned they hold 0.

    Args:
        graph: The graph in time; it stays as it is.

    Raises:
        ValueError: A node function that cannot be frozen, or that depends on the time.
    """

    nodes: Tensor
    channels: Tensor
    inputs: Tensor
    outputs: Tensor

    def __init__(self, graph: NeuralGraph) -> None:
        super().__init__()
        schedule = graph.schedule
        assert isinstance(schedule, Discrete)
        self.schedule, topology = schedule, graph.topology
        self.num_nodes, self.num_inputs = topology.num_nodes, topology.num_inputs
        wiring = graph.wiring()
        edge_index = wiring.edge_index.cpu()[:, wiring.edge_weight.cpu() != 0]
        needed = reached(edge_index.flip(0), self.num_nodes, topology.outputs.unique())
        place = needed.cumsum(0) - 1
        #: The nodes whose states are computed, ascending.
        self.register_buffer("nodes", needed.nonzero().flatten(), persistent=False)
        read = needed[topology.inputs].nonzero().flatten()
        #: Channels that are read, and which of the nodes above read them.
        self.register_buffer("channels", read, persistent=False)
        self.register_buffer("inputs", place[topology.inputs[read]], persistent=False)
        #: Which of them are outputs, by channel.
        self.register_buffer("outputs", place[topology.outputs], persistent=False)
        self.step = _step(graph, needed)
        self.start = _start(graph, topology.inputs[read])

    def forward(
        self, x: Tensor, state: GraphState | None = None, lengths: Tensor | None = None
    ) -> Any:
        """Return the states of the outputs; see :meth:`NeuralGraph.forward`."""
        schedule = self.schedule
        self._check(x, state)
        frames = list(x.unbind(1)) if schedule.takes_sequence else [x]
        if lengths is not None:
            lengths = checked_lengths(schedule, x, lengths)
            alive = [(lengths > t).view(-1, *[1] * (x.dim() - 2)) for t in range(len(frames))]
            frames = [torch.where(a, f, 0) for a, f in zip(alive, frames, strict=True)]
        nothing = torch.zeros_like(frames[0])
        if state is None:
            z = self._first(frames[0])
            flows = frames[1:] if schedule.input == "new" else []
            if schedule.input == "held":
                flows = [x] * schedule.steps
            steps = schedule.steps
        else:
            z = state.states[:, self.nodes]
            if schedule.input == "start":
                z = z.clone()
                z[:, self.inputs] = x[:, self.channels]
            flows = frames if schedule.input != "start" else []
            steps = len(frames) if schedule.input == "new" else schedule.steps
            flows = [x] * steps if schedule.input == "held" else flows
        outputs = []
        for step in range(steps):
            new = self.step(torch.cat([flows[step] if step < len(flows) else nothing, z], 1))
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
        """Raise where the graph itself would."""
        at = 2 if self.schedule.takes_sequence else 1
        if x.dim() <= at or x.shape[at] != self.num_inputs or (at == 2 and not x.shape[1]):
            shape = f"[B, {'T, ' * (at - 1)}{self.num_inputs}, ...]"
            raise ValueError(f"expected input {shape}, got {list(x.shape)}")
        if state is None:
            if at == 2 and x.shape[1] > self.schedule.steps + 1:
                raise ValueError(
                    f"a sequence of {x.shape[1]} does not flow in within {self.schedule.steps} "
                    f"steps; give {self.schedule.steps + 1} frames or fewer, or a state"
                )
            return
        expected = [x.shape[0], self.num_nodes, *x.shape[at + 1 :]]
        if not isinstance(state, GraphState) or list(state.states.shape) != expected:
            raise ValueError(
                f"expected a state as a call returns it, with states {expected}; begin with "
                "initial_state(x)"
            )

    def initial_state(self, x: Tensor) -> GraphState:
        """Return the state before anything flowed in; see :meth:`NeuralGraph.initial_state`."""
        features = x.shape[2 + self.schedule.takes_sequence :]
        return GraphState(x.new_zeros(x.shape[0], self.num_nodes, *features), 0)

    def _first(self, frame: Tensor) -> Tensor:
        """Return the states at the start: those of the inputs, and 0 elsewhere."""
        given = frame[:, self.channels] if self.schedule.input == "start" else self.start(frame)
        z = frame.new_zeros(frame.shape[0], len(self.nodes), *frame.shape[2:])
        return z.index_copy(1, self.inputs, given)


def _step(graph: NeuralGraph, needed: Tensor) -> FrozenGraph:
    """Return a graph from a frame and the states of needed nodes to the new states of these."""
    topology, number = graph.grouping.topology, graph.topology.num_nodes
    original = graph.grouping.original(torch.arange(number, device="cpu"))
    wiring = graph.wiring().regrouped(graph.grouping)
    weight = wiring.edge_weight.detach().float().cpu()
    edge_index = wiring.edge_index.cpu()[:, weight != 0]
    unrolled = Unrolled()
    # What a block sends reads channels behind those of the frame; nodes tell them apart by number.
    frames, before, after = (torch.full((number,), -1, device="cpu") for _ in range(3))
    for block in topology.blocks:
        own = slice(block.nodes.start, block.nodes.stop)
        if block.role == Role.INPUT:
            frames[own] = numbers_of(unrolled, block, Role.INPUT, Formula())
        shifted = replace(block, nodes=range(number + own.start, number + own.stop))
        message = _of_any_time(graph, graph.messages[block.index])
        before[own] = numbers_of(unrolled, shifted, Role.INPUT, message)
    for block in topology.blocks:
        own = slice(block.nodes.start, block.nodes.stop)
        formula = _of_any_time(graph, graph.nodes[block.index])
        after[own] = numbers_of(unrolled, block, Role.OUTPUT, formula)
    unrolled.edges.append(
        (torch.stack([before[edge_index[0]], after[edge_index[1]]]), weight[weight != 0])
    )
    fed = topology.inputs
    ones = torch.ones(len(fed), dtype=torch.float32, device="cpu")
    unrolled.edges.append((torch.stack([frames[fed], after[fed]]), ones))
    channel = torch.zeros(2 * number, dtype=torch.int64, device="cpu")
    channel[fed] = torch.arange(len(fed), device="cpu")
    channel[number:] = len(fed) + (needed.cumsum(0) - 1)[original]
    place = original.argsort()  # numbers in the grouping, by number in the topology
    return compact(unrolled, channel, after[place[needed.nonzero().flatten()]])


def _start(graph: NeuralGraph, inputs: Tensor) -> FrozenGraph:
    """Return a graph from a frame to the states of some inputs that it flows into."""
    topology = graph.grouping.topology
    unrolled = Unrolled()
    frames, after = (torch.full((topology.num_nodes,), -1, device="cpu") for _ in range(2))
    blocks = [block for block in topology.blocks if block.role == Role.INPUT]
    for role, numbers in ((Role.INPUT, frames), (Role.OUTPUT, after)):
        for block in blocks:
            formula = Formula()
            if role == Role.OUTPUT:
                formula = _of_any_time(graph, graph.nodes[block.index])
            own = slice(block.nodes.start, block.nodes.stop)
            numbers[own] = numbers_of(unrolled, block, role, formula)
    fed = topology.inputs
    ones = torch.ones(len(fed), dtype=torch.float32, device="cpu")
    unrolled.edges.append((torch.stack([frames[fed], after[fed]]), ones))
    channel = torch.zeros(topology.num_nodes, dtype=torch.int64, device="cpu")
    channel[fed] = torch.arange(len(fed), device="cpu")
    place = graph.grouping.original(torch.arange(topology.num_nodes, device="cpu")).argsort()
    return compact(unrolled, channel, after[place[inputs]])


def _of_any_time(graph: NeuralGraph, module: nn.Module) -> Formula:
    """Return the formula of a function that is the same at all times.

    Raises:
        ValueError: It is not.
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
                    f"freeze() takes no {type(module).__name__} that depends on the time in a "
                    "graph that takes or returns sequences"
                )
    if first.stride != 1:
        raise ValueError("freeze() takes no strides in discrete time")
    return first
