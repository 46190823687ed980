"""Gradual pruning with an L1 penalty; removed edges never become real again."""

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.wiring.base import RULES, Candidates, Forget, TrainingProgress
from dnw_graph.wiring.gradual import GradualPruning


@RULES.register("l1_anneal")
class L1Anneal(GradualPruning):
    r"""Gradual pruning, with :math:`\lambda \sum |w|` in the loss; removed edges never come back.

    The weight and the momentum of a removed edge are set to 0, and it has no gradient. Source:
    Table 2 of the paper, "L1 + anneal", which states neither coefficient nor schedule; in short
    runs, the coefficient makes no clear difference (docs/rules.md).

    Args:
        l1: The coefficient :math:`\lambda`.
        until: Share of the training run after which ``k`` edges are real.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, l1: float = 1e-5, until: float = 0.75) -> None:
        super().__init__(until)
        if not 0 <= l1 < float("inf"):
            raise ValueError(f"l1 must be 0 or more, got {l1}")
        self.l1 = l1

    @override
    def straight_through(self, progress: TrainingProgress) -> bool:
        """Return False: only real edges have a gradient."""
        return False

    @override
    def penalty(self, weight: Tensor, progress: TrainingProgress) -> Tensor | None:
        """Return ``l1`` times the sum of ``|w|``, to which removed edges contribute 0."""
        return self.l1 * weight.abs().sum() if self.l1 else None

    @override
    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Set the weights and the momentum of all edges that are not real to 0."""
        hallucinated = torch.ones_like(candidates.weight, dtype=torch.bool)
        hallucinated.index_fill_(0, self.select(candidates), False)
        candidates.weight.masked_fill_(hallucinated, 0)
        forget(hallucinated)
