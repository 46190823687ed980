"""Base class of rules that start complete and remove the edges of smallest magnitude."""

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import Candidates, Rule
from dnw_graph.wiring.select import top_k


def check_until(until: float) -> None:
    """Raise ValueError if ``until`` is not a share of a training run."""
    if not 0 < until <= 1:
        raise ValueError(
            f"until must be a share of the training run, above 0 and up to 1, got {until}"
        )


class GradualPruning(Rule):
    r"""Make the :math:`k_t` edges of largest ``|w|`` real, from all candidates down to ``k``.

    .. math:: k_t = k + (E - k) (1 - t / t_1)^3

    after a share ``t`` of the training run; :math:`t_1` is ``until``. Source of the schedule: Zhu
    and Gupta 2017, equation 1.

    Args:
        until: Share of the training run after which ``k`` edges are real.

    Raises:
        ValueError: If an argument is out of range.
    """

    ranking = "none"

    def __init__(self, until: float = 0.75) -> None:
        check_until(until)
        self.until = until

    @property
    @override
    def timed(self) -> bool:
        """Always True."""
        return True

    @override
    def start_fan_in(self, topology: Topology, num_edges: int) -> Tensor:
        """Return the number of candidates into each node ``[V]``."""
        return topology.rowptr.diff()

    def number(self, candidates: Candidates) -> int:
        """Return the number of real edges :math:`k_t`."""
        surplus = max(0.0, 1 - candidates.progress.fraction / self.until) ** 3
        k = candidates.num_edges
        return k + round((len(candidates.weight) - k) * surplus)

    @override
    def select(self, candidates: Candidates) -> Tensor:
        """Return the ids of the :math:`k_t` real edges, in evaluation too."""
        weight, number = candidates.weight, self.number(candidates)
        if number == len(weight):
            return torch.arange(number, device=weight.device)
        return top_k(weight, number)
