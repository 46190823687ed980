"""The interface of a schedule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook

from dnw_graph._registry import PartRegistry
from dnw_graph.aggregation import Backend
from dnw_graph.aggregation.base import BlockEdges
from dnw_graph.node import Identity, WithoutTime
from dnw_graph.topology import Block, Grouping, Role, Topology
from dnw_graph.wiring import Wiring

AggregateFunction = Callable[[Block, Sequence[Tensor]], Tensor]
"""``aggregate(block, messages)`` returns the inputs of a block, given the messages by block."""


@dataclass
class RecurrentState:
    """The state that is carried from one call to the next in time.

    Attributes:
        states: States of each block ``[nodes, B, *features]``; the schedule writes new ones here.
        step: Number of steps before this call; the schedule updates it.
        lengths: Number of frames of each sequence ``[B]``, after which its states do not change;
            None if all sequences have the same length.
    """

    states: list[Tensor]
    step: int
    lengths: Tensor | None


@dataclass(frozen=True)
class ForwardPass:
    """A graph in one forward pass, after its real edges are chosen and before any node fires.

    Attributes:
        wiring: The real edges.
        weight: Candidate weights ``[E]``, or those of real edges (:meth:`Wiring.trained`).
        backend: The backend, which sums messages.
        nodes: Node function of each block.
        messages: Message function of each block, which is applied to its states.
        evaluations: Number of evaluations of the graph by phase, ``"forward"`` and ``"backward"``;
            written by schedules where it can vary.
        state: States to start from, which the schedule replaces by the last ones; None if the call
            passed no state.
    """

    wiring: Wiring
    weight: Tensor
    backend: Backend
    nodes: Sequence[nn.Module]
    messages: Sequence[nn.Module]
    evaluations: dict[str, int] = field(default_factory=dict)
    state: RecurrentState | None = None

    @property
    def topology(self) -> Topology:
        """The candidates."""
        return self.wiring.topology

    def aggregator(self) -> AggregateFunction:
        """Return a function that sums messages; call this once per pass, as it prepares weights."""
        blocks = self.topology.blocks
        weights = self.weight.split([len(self.wiring.span(block)) for block in blocks])
        prepared = self.backend.prepare(self.wiring)

        def aggregate(block: Block, messages: Sequence[Tensor]) -> Tensor:
            if not block.edges:
                return messages[0].new_zeros(len(block.nodes), *messages[0].shape[1:])
            sources = tuple(blocks[i] for i in block.sources)
            states = [messages[i] for i in block.sources if i < len(messages)]
            if [len(z) for z in states] != [len(source.nodes) for source in sources]:
                raise ValueError(
                    f"block {block.index} is fed by blocks {list(block.sources)}, so it needs the "
                    "messages of each, at the index of the block: expected nodes "
                    f"{[len(source.nodes) for source in sources]}, got {[len(z) for z in states]}"
                )
            edges = BlockEdges(block, sources, self.wiring, prepared)
            total: Tensor = self.backend(edges, weights[block.index], states)
            return total

        return aggregate

    def fire(self, block: Block, inputs: Tensor, t: float) -> Tensor:
        """Return the states of a block, computed from its inputs by its node function.

        Raises:
            ValueError: If the node function changes the number of nodes or images.
        """
        return _checked(self.nodes[block.index], "node", block, inputs, t)

    def send(self, block: Block, states: Tensor, t: float) -> Tensor:
        """Return the messages of a block, computed from its states by its message function.

        Raises:
            ValueError: If the message function changes the number of nodes or images.
        """
        return _checked(self.messages[block.index], "message", block, states, t)


class Schedule(ABC):
    """Determines in which order nodes fire, and how often; holds settings only."""

    #: Whether the input of the graph is a sequence ``[B, T, inputs, *features]``.
    takes_sequence: bool = False

    #: Whether the output of the graph is a sequence.
    gives_sequence: bool = False

    #: Whether the schedule can start from a state of an earlier call (:attr:`ForwardPass.state`).
    carries_state: bool = False

    #: Whether states have the size of the graph's input, regardless of strides.
    keeps_size: bool = False

    #: Whether an output may be constant because no path leads to it from an input. This is an error
    #: in a new graph; :func:`dnw_graph.edited` allows it, since real edges may leave out outputs.
    allows_constant_outputs: bool = False

    @abstractmethod
    def check(self, topology: Topology) -> None:
        """Check that the schedule can run a topology.

        Raises:
            ValueError: If it cannot; the message names the nodes that prevent it.
        """

    def group(self, topology: Topology) -> Grouping:
        """Return the blocks whose nodes fire together; by default those of the topology."""
        return Grouping(topology)

    @abstractmethod
    def run(self, forward_pass: ForwardPass, frames: Sequence[Tensor]) -> list[Tensor]:
        """Return the states of the output nodes.

        Args:
            forward_pass: The graph.
            frames: Inputs of the input nodes ``[inputs, *features]``, in node order: one tensor, or
                one per time step if :attr:`takes_sequence`.

        Returns:
            States of the output nodes ``[outputs, *features]``, in node order: one tensor, or one
            per time step if :attr:`gives_sequence`.
        """

    def firings(self, evaluations: Mapping[str, int]) -> int:
        """Return how often each node fires in a pass.

        Args:
            evaluations: :attr:`ForwardPass.evaluations` after the pass.
        """
        return 1


def checked_lengths(schedule: Schedule, x: Tensor, lengths: Tensor) -> Tensor:
    """Return the lengths of sequences ``[B, T, ...]`` on their device.

    Raises:
        ValueError: If the lengths are not one whole number from 1 to ``T`` per sequence, or the
            schedule does not take sequences.
    """
    if not schedule.takes_sequence:
        raise ValueError(
            "lengths are those of sequences: use a schedule that takes sequences, such as "
            "\"discrete(steps=9, input='new')\""
        )
    batch, frames = x.shape[:2]
    lengths = torch.as_tensor(lengths, device=x.device)
    whole = not lengths.is_floating_point() and lengths.dtype != torch.bool
    within = lengths.shape == (batch,) and bool(((lengths >= 1) & (lengths <= frames)).all())
    if not (whole and within):
        raise ValueError(
            f"lengths must be whole numbers [{batch}] from 1 to {frames}, the number of frames, "
            f"got {lengths}"
        )
    return lengths


def parts_of(topology: Topology, x: Tensor) -> dict[int, Tensor]:
    """Return the parts of the inputs ``[inputs, *features]`` by index of the block."""
    blocks = [block for block in topology.blocks if block.role == Role.INPUT]
    if len(x) != sum(len(block.nodes) for block in blocks):
        raise ValueError(f"expected inputs [{topology.num_inputs}, B, ...], got {list(x.shape)}")
    parts = x.split([len(block.nodes) for block in blocks])
    return {block.index: part for block, part in zip(blocks, parts, strict=True)}


def outputs_of(topology: Topology, states: Sequence[Tensor]) -> Tensor:
    """Return the states of the output nodes in node order, given the states of each block."""
    if len(states) != len(topology.blocks):
        raise ValueError(
            f"expected the states of each of the {len(topology.blocks)} blocks, got {len(states)}"
        )
    parts = [states[block.index] for block in topology.blocks if block.role == Role.OUTPUT]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def check_outputs(topology: Topology, reached: Tensor) -> None:
    """Raise ValueError if an output is not among the nodes in the mask ``reached [V]``."""
    constant = topology.outputs[~reached[topology.outputs]]
    if len(constant):
        raise ValueError(
            "no path of candidate edges leads from an input to output "
            f"{topology.describe(constant)}; add edges, or take the node out of the outputs"
        )


def is_observed(module: nn.Module) -> bool:
    """Return whether a module has hooks, which must be called with its inputs and outputs."""
    return has_any_global_hook() or any(
        hooks
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )


def is_identity(module: nn.Module) -> bool:
    """Return whether a node or message function returns its inputs unchanged."""
    return type(module) is Identity and module.scale is None and module.bias is None


def _checked(module: nn.Module, kind: str, block: Block, x: Tensor, t: float) -> Tensor:
    if len(x) != len(block.nodes):
        raise ValueError(
            f"block {block.index} has {len(block.nodes)} nodes, but the schedule passes "
            f"{list(x.shape)} to its {kind} function"
        )
    out: Tensor = module(x, t)
    fits = isinstance(out, Tensor) and out.dim() == x.dim() and out.shape[:2] == x.shape[:2]
    if not fits:
        result = "states" if kind == "node" else "messages"
        function = module.function if isinstance(module, WithoutTime) else module
        raise ValueError(
            f"{kind} function {type(function).__name__} of block {block.index} must return "
            f"{result} [{len(block.nodes)}, B, ...] for inputs {list(x.shape)}, "
            f"got {list(out.shape) if isinstance(out, Tensor) else type(out).__name__}"
        )
    return out


SCHEDULES = PartRegistry("schedule", Schedule)
