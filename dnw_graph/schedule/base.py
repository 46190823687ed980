"""The contract of a schedule."""

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
"""``aggregate(block, messages)``: the inputs of a block, given what each block so far sends."""


@dataclass
class RecurrentState:
    """What goes from one call to the next in time.

    Attributes:
        states: States of each block ``[nodes, B, *features]``; the schedule puts new ones here.
        step: Steps done before this call; likewise.
        lengths: Frames of each sequence of the batch ``[B]``, after which its states stay; None if
            all have as many.
    """

    states: list[Tensor]
    step: int
    lengths: Tensor | None


@dataclass(frozen=True)
class ForwardPass:
    """A graph in one forward pass: the real edges are decided, nothing has fired yet.

    Attributes:
        wiring: The real edges.
        weight: Candidate weights ``[E]``, or those of real edges (:meth:`Wiring.trained`).
        backend: How messages are summed.
        nodes: Node function of each block.
        messages: What a block sends, given its states: a module a block.
        evaluations: How often the graph was evaluated, to be counted by schedules that find out.
        state: States to begin with, and to be replaced by the last ones, if the call has any.
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
        """Return what sums messages; made once a pass, since it prepares the weights once."""
        blocks = self.topology.blocks
        weights = self.weight.split([len(self.wiring.span(block)) for block in blocks])
        prepared = self.backend.prepare(self.wiring)

        def aggregate(block: Block, messages: Sequence[Tensor]) -> Tensor:
            if not block.edges:
                return messages[0].new_zeros(len(block.nodes), *messages[0].shape[1:])
            sources = tuple(blocks[i] for i in block.sources)
            given = [messages[i] for i in block.sources]
            asked = BlockEdges(block, sources, self.wiring, prepared)
            total: Tensor = self.backend(asked, weights[block.index], given)
            return total

        return aggregate

    def fire(self, block: Block, inputs: Tensor, t: float) -> Tensor:
        """Return the states of a block: what its node function makes of its inputs.

        Raises:
            ValueError: The node function returned another number of nodes, or lost the batch.
        """
        return _checked(self.nodes[block.index], "node", block, inputs, t)

    def send(self, block: Block, states: Tensor, t: float) -> Tensor:
        """Return what a block sends along its edges.

        Raises:
            ValueError: As :meth:`fire`.
        """
        return _checked(self.messages[block.index], "message", block, states, t)


class Schedule(ABC):
    """Decides in which order nodes fire, and how often; holds settings only."""

    #: Whether the graph is given a sequence: ``[B, T, inputs, *features]``.
    takes_sequence: bool = False

    #: Whether it returns one.
    gives_sequence: bool = False

    #: Whether it can begin with states handed in (:attr:`ForwardPass.state`).
    carries_state: bool = False

    #: Whether states have the size of what the graph is given, whatever the strides.
    keeps_size: bool = False

    @abstractmethod
    def check(self, topology: Topology) -> None:
        """Raise where the schedule cannot run a topology.

        Raises:
            ValueError: Naming the nodes in the way.
        """

    def group(self, topology: Topology) -> Grouping:
        """Return the blocks in which nodes fire, each with one node function; as they are."""
        return Grouping(topology)

    @abstractmethod
    def run(self, forward_pass: ForwardPass, frames: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs.

        Args:
            forward_pass: The graph.
            frames: What it is given ``[inputs, *features]``, by number of the node: once, or at
                each time where it :attr:`takes_sequence`.

        Returns:
            States of the output nodes ``[outputs, *features]``, by number of the node: once, or at
            each time where it :attr:`gives_sequence`.
        """

    def firings(self, evaluations: Mapping[str, int]) -> int:
        """Return how often each node fires in a pass.

        Args:
            evaluations: What :attr:`ForwardPass.evaluations` held after it.
        """
        return 1


def checked_lengths(schedule: Schedule, x: Tensor, lengths: Tensor) -> Tensor:
    """Return the lengths of sequences ``[B, T, ...]`` on their device.

    Raises:
        ValueError: Not a whole number from 1 to ``T`` for each, or no sequences.
    """
    if not schedule.takes_sequence:
        raise ValueError(
            "lengths are those of sequences: give a schedule that takes some, such as "
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
    """Split what the inputs are given ``[inputs, *features]`` by index of the block."""
    blocks = [block for block in topology.blocks if block.role == Role.INPUT]
    parts = x.split([len(block.nodes) for block in blocks])
    return {block.index: part for block, part in zip(blocks, parts, strict=True)}


def outputs_of(topology: Topology, states: Sequence[Tensor]) -> Tensor:
    """Return the states of the output nodes, by number of the node, given those of each block."""
    found = [states[block.index] for block in topology.blocks if block.role == Role.OUTPUT]
    return found[0] if len(found) == 1 else torch.cat(found)


def is_observed(module: nn.Module) -> bool:
    """Return whether hooks have to be called with what a module reads and returns."""
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
    """Return whether a node or message function returns what it is given."""
    return type(module) is Identity and module.scale is None and module.bias is None


def _checked(module: nn.Module, kind: str, block: Block, x: Tensor, t: float) -> Tensor:
    out: Tensor = module(x, t)
    if out.dim() != x.dim() or out.shape[:2] != x.shape[:2]:
        what = "states" if kind == "node" else "messages"
        own = module.function if isinstance(module, WithoutTime) else module
        raise ValueError(
            f"{kind} function {type(own).__name__} of block {block.index} must return {what} "
            f"[{len(block.nodes)}, B, ...] for inputs {list(x.shape)}, got {list(out.shape)}"
        )
    return out


SCHEDULES = PartRegistry("schedule", Schedule)
