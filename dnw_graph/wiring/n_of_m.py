"""Rule with n real edges of every m consecutive candidates, as in n:m sparsity on GPUs."""

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule, RuleState


@RULES.register("n_of_m")
class NOfM(Rule):
    """Make the ``n`` of largest ``|w|`` real of every ``m`` consecutive candidates into a node.

    Hallucinated edges are updated like real ones, as with ``dnw``. In a sparse layer, consecutive
    candidates belong to consecutive input channels at the same position of the filter, as
    semi-structured kernels require. Source: Mishra et al. 2021 for 2 of 4.

    Args:
        n: Real edges of each group.
        m: Candidates of each group.

    Raises:
        ValueError: If not ``1 <= n <= m <= 255``, or the number of candidates into a node of a
            graph is not divisible by ``m``.
    """

    inputs_last = True
    sets_budget = True
    ranking = "node"

    def __init__(self, n: int = 2, m: int = 4) -> None:
        if not (isinstance(n, int) and isinstance(m, int) and 1 <= n <= m <= 255):
            raise ValueError(f"n and m must be whole numbers, 1 <= n <= m <= 255, got {n} of {m}")
        self.n, self.m = n, m

    @override
    def budget(self, num_edges: int | None, topology: Topology) -> int:
        """Return ``n / m`` of the candidates; ``num_edges`` must be None or equal to it."""
        num_candidates = topology.num_candidates
        expected = num_candidates * self.n // self.m
        if num_edges is not None and num_edges != expected:
            raise ValueError(
                f"{self.n} of {self.m} edges are {expected:,} of {num_candidates:,}, not "
                f"{num_edges:,}: do not pass num_edges or a density"
            )
        return expected

    @override
    def unfit(self, shape: Sequence[int]) -> str | None:
        """Return the reason if the number of input channels is not divisible by ``m``."""
        if shape[1] % self.m:
            return f"its number of input channels is not divisible by {self.m}"
        return None

    @override
    def init_state(self, candidates: Candidates) -> RuleState:
        """Raise ValueError if the candidates into some node do not divide into groups of ``m``."""
        counts = candidates.topology.rowptr.diff()
        uneven = (counts % self.m).nonzero().flatten()
        if len(uneven):
            node = candidates.topology.describe([int(uneven[0])])
            raise ValueError(
                f"rule n_of_m needs candidates that divide into groups of {self.m} at each node, "
                f"but node {node} has {int(counts[uneven[0]])}; use constant_fan_in, which accepts "
                "any number"
            )
        return {}

    @override
    def select(self, candidates: Candidates) -> Tensor:
        """Return the ids of the real edges; of equal weights, the first are real."""
        size = candidates.weight.abs().view(-1, self.m)
        place = torch.arange(self.m, device=size.device)
        rank = torch.zeros_like(size, dtype=torch.uint8)
        for j in range(self.m):
            other = size[:, j : j + 1]
            rank += (other > size) | ((other == size) & (j < place))
        return (rank < self.n).flatten().nonzero().flatten()
