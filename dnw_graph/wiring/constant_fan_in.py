"""Rule with the same number of real edges into each node."""

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule


@RULES.register("constant_fan_in")
class ConstantFanIn(Rule):
    """Make the ``m`` candidates of largest ``|w|`` into each node real; all if there are fewer.

    Gradients are those of ``dnw``. Lasby et al. 2023 propose a constant fan-in because it makes
    sparse products fast.

    Args:
        m: Number of real edges into a node.

    Raises:
        ValueError: If ``m`` is not a whole number above 0, or ``num_edges`` is not the number of
            edges that follows from ``m``.
    """

    sets_budget = True
    ranking = "node"

    def __init__(self, m: int = 8) -> None:
        if isinstance(m, bool) or not isinstance(m, int) or m < 1:
            raise ValueError(f"m must be a whole number of edges, 1 or more, got {m!r}")
        self.m = m

    @override
    def start_fan_in(self, topology: Topology, num_edges: int) -> Tensor:
        return topology.rowptr.diff().clamp_max(self.m)

    @override
    def budget(self, num_edges: int | None, topology: Topology) -> int:
        """Return the sum of all fan-ins; ``num_edges`` must be None or equal to it."""
        total = int(self.start_fan_in(topology, 0).sum())
        if num_edges is not None and num_edges != total:
            raise ValueError(
                f"{self.m} edges into each node are {total:,} in this topology, not {num_edges:,}: "
                "do not pass num_edges or a density"
            )
        return total

    @override
    def select(self, candidates: Candidates) -> Tensor:
        """Return the ids of the real edges; of equal weights, the first are real."""
        weight, rowptr = candidates.weight, candidates.topology.rowptr_on(candidates.weight.device)
        ids = torch.arange(len(weight), device=weight.device)
        target = torch.searchsorted(rowptr, ids, right=True) - 1
        size_order = weight.abs().sort(descending=True, stable=True).indices
        order = size_order[target[size_order].sort(stable=True).indices]  # by target, then by size
        return order[ids - rowptr[target] < self.m].sort().values
