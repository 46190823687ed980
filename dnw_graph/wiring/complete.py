"""Every candidate is real."""

import torch
from torch import Tensor

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule


@RULES.register("complete")
class Complete(Rule):
    """Every candidate is real, whatever the budget: the dense network a wiring is taken from."""

    sets_budget = True
    ranking = "none"

    def budget(self, num_edges: int | None, topology: Topology) -> int:
        """Return the number of candidates; ``num_edges`` is not used."""
        return topology.num_candidates

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`."""
        return torch.arange(candidates.weight.numel(), device=candidates.weight.device)
