"""What rules share that start complete and lose edges by magnitude."""

import torch
from torch import Tensor

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import Candidates, Rule
from dnw_graph.wiring.select import top_k


def check_until(until: float) -> None:
    """Raise where ``until`` is not a share of a training."""
    if not 0 < until <= 1:
        raise ValueError(f"until must be a share of the training, above 0 to 1, got {until}")


class GradualPruning(Rule):
    r"""The :math:`k_t` largest ``|w|`` are real, from all candidates down to ``k``.

    .. math:: k_t = k + (E - k) (1 - t / t_1)^3

    after a share ``t`` of the training; :math:`t_1` is ``until``. Source of the schedule: Zhu and
    Gupta 2017, equation 1.

    Args:
        until: Share of the training at which ``k`` are left.

    Raises:
        ValueError: An argument out of range.
    """

    ranking = "none"

    def __init__(self, until: float = 0.75) -> None:
        check_until(until)
        self.until = until

    @property
    def timed(self) -> bool:
        """See :attr:`Rule.timed`: always."""
        return True

    def start_fan_in(self, topology: Topology, num_edges: int) -> Tensor:
        """See :meth:`Rule.start_fan_in`: all candidates."""
        return topology.rowptr.diff()

    def number(self, candidates: Candidates) -> int:
        """Return the number of real edges :math:`k_t`."""
        left = max(0.0, 1 - candidates.progress.fraction / self.until) ** 3
        k = candidates.num_edges
        return k + round((len(candidates.weight) - k) * left)

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`; ``k`` edges from ``until`` on, in evaluation too."""
        weight, number = candidates.weight, self.number(candidates)
        if number == len(weight):
            return torch.arange(number, device=weight.device)
        return top_k(weight, number)
