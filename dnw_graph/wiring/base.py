"""The contract of a rule."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from dnw_graph._registry import PartRegistry
from dnw_graph.topology import Topology

RuleState = dict[str, Tensor]
"""What a rule remembers; a graph keeps it in buffers, so checkpoints and ``.to()`` carry it."""


class Rule(ABC):
    """Decides which candidate edges are real.

    A rule itself holds settings only, so that one object may serve many graphs; what it remembers
    of a graph is made by :meth:`init_state` and handed back to it.
    """

    #: Whether hallucinated edges have a gradient. If not, only the weights of real edges do.
    straight_through: ClassVar[bool] = True

    def budget(self, num_edges: int | None, num_candidates: int) -> int:
        """Return the number of real edges ``k``, and raise where the budget cannot be met.

        Args:
            num_edges: What the user asked for.
            num_candidates: Number of candidate edges ``E``.

        Raises:
            ValueError: No budget, one below 1, or one above ``E``.
            TypeError: Not a whole number.
        """
        if num_edges is None:
            raise ValueError(
                f"num_edges, the number of real edges, is missing: give 1 to {num_candidates:,}, "
                'or rule="complete" to keep every candidate'
            )
        if isinstance(num_edges, bool) or not isinstance(num_edges, int):
            raise TypeError(f"num_edges must be a whole number, got {num_edges!r}")
        if not 1 <= num_edges <= num_candidates:
            raise ValueError(
                f"num_edges must lie between 1 and the {num_candidates:,} candidate edges of the "
                f"topology, got {num_edges:,}"
            )
        return num_edges

    def init_state(self, topology: Topology, num_edges: int) -> RuleState:
        """Return what the rule remembers of a new graph; random draws use PyTorch's generator."""
        return {}

    @abstractmethod
    def select(self, weight: Tensor, num_edges: int, state: RuleState) -> Tensor:
        """Return the ids of the real edges, ascending, ``[k]`` int64; changes nothing.

        Args:
            weight: Candidate weights ``[E]``, without a gradient.
            num_edges: The budget ``k``.
            state: What :meth:`init_state` returned for this graph.
        """


RULES = PartRegistry("rule", Rule)
