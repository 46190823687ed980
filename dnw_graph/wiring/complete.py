"""Every candidate is real."""

import torch
from torch import Tensor

from dnw_graph.wiring.base import RULES, Rule, RuleState


@RULES.register("complete")
class Complete(Rule):
    """Every candidate is real, whatever the budget: the dense network a wiring is taken from."""

    def budget(self, num_edges: int | None, num_candidates: int) -> int:
        """Return the number of candidates; ``num_edges`` is not used."""
        return num_candidates

    def select(self, weight: Tensor, num_edges: int, state: RuleState) -> Tensor:
        """See :meth:`Rule.select`."""
        return torch.arange(weight.numel(), device=weight.device)
