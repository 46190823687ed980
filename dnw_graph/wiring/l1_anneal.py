"""Starts complete; a penalty makes weights small, and the smallest are removed for good."""

import torch
from torch import Tensor

from dnw_graph.wiring.base import RULES, Candidates, Forget, TrainingProgress
from dnw_graph.wiring.gradual import GradualPruning


@RULES.register("l1_anneal")
class L1Anneal(GradualPruning):
    r"""Gradual pruning, with :math:`\lambda \sum |w|` in the loss; what goes never comes back.

    What is removed is set to 0, its momentum cleared, and has no gradient. Source: Table 2 of the
    paper, "L1 + anneal", which gives neither coefficient nor schedule; short runs do not tell
    coefficients apart (docs/rules.md).

    Args:
        l1: The coefficient :math:`\lambda`.
        until: Share of the training at which ``k`` edges are left.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, l1: float = 1e-5, until: float = 0.75) -> None:
        super().__init__(until)
        if not 0 <= l1 < float("inf"):
            raise ValueError(f"l1 must be 0 or more, got {l1}")
        self.l1 = l1

    def straight_through(self, progress: TrainingProgress) -> bool:
        """See :meth:`Rule.straight_through`: never."""
        return False

    def penalty(self, weight: Tensor, progress: TrainingProgress) -> Tensor | None:
        """See :meth:`Rule.penalty`; removed edges are 0."""
        return self.l1 * weight.abs().sum() if self.l1 else None

    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Set what is no longer real to 0."""
        removed = torch.ones_like(candidates.weight, dtype=torch.bool)
        removed.index_fill_(0, self.select(candidates), False)
        candidates.weight.masked_fill_(removed, 0)
        forget(removed)
