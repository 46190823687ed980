"""The contract of a schedule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dnw_graph._registry import PartRegistry
from dnw_graph.topology import Block, Topology

PullFunction = Callable[[Block, Sequence[Tensor]], Tensor]
"""``pull(block, states)``: the inputs of a block, given the states of all blocks so far."""


class Schedule(ABC):
    """Decides in which order nodes fire, and how often; holds settings only."""

    @abstractmethod
    def check(self, topology: Topology) -> None:
        """Raise where the schedule cannot run a topology.

        Raises:
            ValueError: Naming the nodes in the way.
        """

    @abstractmethod
    def run(
        self, topology: Topology, x: Tensor, nodes: Sequence[nn.Module], pull: PullFunction
    ) -> Tensor:
        """Return the outputs.

        Args:
            topology: The graph.
            x: Inputs of the input nodes ``[inputs, *features]``, by number of the node.
            nodes: The node function of each block.
            pull: Sums messages; the real edges are decided already.

        Returns:
            States of the output nodes ``[outputs, *features]``, by number of the node.
        """


def fire(block: Block, node: nn.Module, inputs: Tensor, t: float) -> Tensor:
    """Return the states of a block: what its node function makes of its inputs.

    Raises:
        ValueError: The node function returned another number of nodes, or lost the batch.
    """
    states: Tensor = node(inputs, t)
    if states.dim() != inputs.dim() or states.shape[:2] != inputs.shape[:2]:
        raise ValueError(
            f"node function {type(node).__name__} of block {block.index} must return states "
            f"[{len(block.nodes)}, B, ...] for inputs {list(inputs.shape)}, "
            f"got {list(states.shape)}"
        )
    return states


SCHEDULES = PartRegistry("schedule", Schedule)
