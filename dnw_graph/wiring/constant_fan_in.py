"""As many real edges into each node."""

import torch
from torch import Tensor

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule


@RULES.register("constant_fan_in")
class ConstantFanIn(Rule):
    """The ``m`` candidates of largest ``|w|`` into each node are real; all where there are fewer.

    Gradients are those of ``dnw``. A constant fan-in is what Lasby et al. 2023 ask for, since it
    makes sparse products fast.

    Args:
        m: Number of real edges into a node.

    Raises:
        ValueError: Not a whole number above 0; a budget that is not that of a topology.
    """

    sets_budget = True
    ranking = "node"

    def __init__(self, m: int = 8) -> None:
        if isinstance(m, bool) or not isinstance(m, int) or m < 1:
            raise ValueError(f"m must be a number of edges, whole and 1 or more, got {m!r}")
        self.m = m

    def start_fan_in(self, topology: Topology, num_edges: int) -> Tensor:
        """See :meth:`Rule.start_fan_in`."""
        return topology.rowptr.diff().clamp_max(self.m)

    def budget(self, num_edges: int | None, topology: Topology) -> int:
        """Return the sum over nodes of ``m`` or fewer; ``num_edges``, if given, must be that."""
        own = int(self.start_fan_in(topology, 0).sum())
        if num_edges is not None and num_edges != own:
            raise ValueError(
                f"{self.m} edges into each node are {own:,} in this topology, not {num_edges:,}: "
                "leave num_edges or the density out"
            )
        return own

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`; among equals, the first."""
        weight, rowptr = candidates.weight, candidates.topology.rowptr_on(candidates.weight.device)
        every = torch.arange(len(weight), device=weight.device)
        target = torch.searchsorted(rowptr, every, right=True) - 1
        by_size = weight.abs().sort(descending=True, stable=True).indices
        order = by_size[target[by_size].sort(stable=True).indices]  # by target, then by size
        return order[every - rowptr[target] < self.m].sort().values
