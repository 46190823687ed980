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


SCHEDULES = PartRegistry("schedule", Schedule)
