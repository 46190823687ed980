"""The n largest of every m neighbours: patterns that GPUs have kernels for."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule, RuleState


@RULES.register("n_of_m")
class NOfM(Rule):
    """Of each ``m`` consecutive candidates into a node, the ``n`` of largest ``|w|`` are real.

    Hallucinated edges are updated like real ones, as by ``dnw``. In a layer made sparse, candidates
    are consecutive that belong to consecutive input channels at one place of the filter, which is
    what semi-structured kernels want. Source: Mishra et al. 2021 for 2 of 4.

    Args:
        n: Real edges of each group.
        m: Candidates of each group.

    Raises:
        ValueError: Not ``1 <= n <= m <= 255``; for a graph, a node whose candidates do not divide
            by ``m``.
    """

    inputs_last = True
    sets_budget = True
    ranking = "node"

    def __init__(self, n: int = 2, m: int = 4) -> None:
        if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m <= 255):
            raise ValueError(f"n and m must be whole numbers, 1 <= n <= m <= 255, got {n} of {m}")
        self.n, self.m = n, m

    def budget(self, num_edges: int | None, topology: Topology) -> int:
        """Return ``n / m`` of the candidates; ``num_edges``, if given, must be that."""
        num_candidates = topology.num_candidates
        own = num_candidates * self.n // self.m
        if num_edges is not None and num_edges != own:
            raise ValueError(
                f"{self.n} of {self.m} edges are {own:,} of {num_candidates:,}, not {num_edges:,}: "
                "leave the number or the density out"
            )
        return own

    def unfit(self, shape: Sequence[int]) -> str | None:
        """See :meth:`Rule.unfit`: input channels that do not divide by ``m``."""
        return f"its input channels do not divide by {self.m}" if shape[1] % self.m else None

    def init_state(self, candidates: Candidates) -> RuleState:
        """Check that groups do not reach from one node to the next."""
        counts = candidates.topology.rowptr.diff()
        uneven = (counts % self.m).nonzero().flatten()
        if len(uneven):
            node = candidates.topology.describe([int(uneven[0])])
            raise ValueError(
                f"rule n_of_m needs candidates that divide into groups of {self.m} at each node, "
                f"but node {node} has {int(counts[uneven[0]])}; constant_fan_in takes any number"
            )
        return {}

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`; among equals, the first."""
        size = candidates.weight.abs().view(-1, self.m)
        place = torch.arange(self.m, device=size.device)
        rank = torch.zeros_like(size, dtype=torch.uint8)
        for j in range(self.m):
            other = size[:, j : j + 1]
            rank += (other > size) | ((other == size) & (j < place))
        return (rank < self.n).flatten().nonzero().flatten()
