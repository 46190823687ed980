"""A wiring drawn once, uniformly, and never changed: the paper's baseline RG."""

import torch
from torch import Tensor

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Rule, RuleState


@RULES.register("random")
class Random(Rule):
    """``k`` candidates drawn uniformly without replacement when the graph is made.

    The weights of the other candidates never have a gradient and are never read.
    """

    straight_through = False

    def init_state(self, topology: Topology, num_edges: int) -> RuleState:
        """Draw the wiring from PyTorch's generator, so that ``torch.manual_seed`` repeats it."""
        drawn = torch.randperm(topology.num_candidates, device="cpu")[:num_edges]
        return {"edge_id": drawn.sort().values}

    def select(self, weight: Tensor, num_edges: int, state: RuleState) -> Tensor:
        """See :meth:`Rule.select`."""
        return state["edge_id"]
