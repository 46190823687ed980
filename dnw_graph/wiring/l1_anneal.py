"""Starts complete; a penalty makes weights small, and the smallest are removed for good."""

import torch
from torch import Tensor

from dnw_graph.wiring.base import RULES, Candidates, Forget, Moment, Rule
from dnw_graph.wiring.select import top_k


def falling_number(candidates: Candidates, until: float) -> int:
    r"""Return ``k + (E - k)(1 - t / until)^3`` after a share ``t`` of the training, then ``k``."""
    left = max(0.0, 1 - candidates.moment.progress / until) ** 3
    k = candidates.num_edges
    return k + round((len(candidates.weight) - k) * left)


def check_until(until: float) -> None:
    """Raise where ``until`` is not a share of a training."""
    if not 0 < until <= 1:
        raise ValueError(f"until must be a share of the training, above 0 to 1, got {until}")


@RULES.register("l1_anneal")
class L1Anneal(Rule):
    r"""Removes edges by magnitude until ``k`` are left, with :math:`\lambda \sum |w|` in the loss.

    .. math:: k_t = k + (E - k) (1 - t / t_1)^3

    after a share ``t`` of the training; ``t_1`` is ``until``. What is removed is set to 0, its
    momentum cleared, and has no gradient. Source: Table 2 of the paper, "L1 + anneal", which gives
    neither coefficient nor schedule; the schedule is that of Zhu and Gupta 2017, and short runs do
    not tell coefficients apart (docs/rules.md).

    Args:
        l1: The coefficient :math:`\lambda`.
        until: Share of the training at which ``k`` are left.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, l1: float = 1e-5, until: float = 0.75) -> None:
        if not 0 <= l1 < float("inf"):
            raise ValueError(f"l1 must be 0 or more, got {l1}")
        check_until(until)
        self.l1, self.until = l1, until

    @property
    def timed(self) -> bool:
        """See :attr:`Rule.timed`: always."""
        return True

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`; ``k`` edges from ``until`` on, in evaluation too."""
        weight, number = candidates.weight, falling_number(candidates, self.until)
        if number == len(weight):
            return torch.arange(number, device=weight.device)
        return top_k(weight, number)

    def straight_through(self, moment: Moment) -> bool:
        """See :meth:`Rule.straight_through`: never."""
        return False

    def penalty(self, weight: Tensor, moment: Moment) -> Tensor | None:
        """See :meth:`Rule.penalty`; removed edges are 0."""
        return self.l1 * weight.abs().sum() if self.l1 else None

    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Set what is no longer real to 0."""
        removed = torch.ones_like(candidates.weight, dtype=torch.bool)
        removed.index_fill_(0, self.select(candidates), False)
        candidates.weight.masked_fill_(removed, 0)
        forget(removed)
