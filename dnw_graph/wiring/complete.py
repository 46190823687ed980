"""Rule that makes every candidate real."""

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule


@RULES.register("complete")
class Complete(Rule):
    """Make every candidate real regardless of the budget, as in a dense network."""

    sets_budget = True
    ranking = "none"

    @override
    def budget(self, num_edges: int | None, topology: Topology) -> int:
        """Return the number of candidates; ``num_edges`` is ignored."""
        return topology.num_candidates

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return torch.arange(candidates.weight.numel(), device=candidates.weight.device)
