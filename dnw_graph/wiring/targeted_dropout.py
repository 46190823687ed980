"""Targeted dropout: in training, small weights are real some of the time."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule, TrainingProgress
from dnw_graph.wiring.select import top_k


@RULES.register("targeted_dropout")
class TargetedDropout(Rule):
    r"""The ``k`` largest ``|w|`` are real, each other candidate with probability ``1 - rho``.

    That is so in training, drawn anew each step; in evaluation exactly the ``k`` largest are real.
    What is dropped has no gradient. Source: Gomez et al. 2019, weight dropout, with the ``E - k``
    smallest as targets.

    Args:
        rho: Probability that a target is dropped, or its first and last value, between which it
            goes linearly over the training.
        per_node: Whether the largest of each node's incoming edges are kept, ``k`` shared out in
            proportion to its candidates, rather than the largest of the graph; this sorts all
            candidates on every step.

    Raises:
        ValueError: A probability outside 0 to 1.
    """

    def __init__(self, rho: float | Sequence[float] = 0.95, per_node: bool = False) -> None:
        ends = [rho, rho] if isinstance(rho, int | float) else list(rho)
        if len(ends) != 2 or not all(0 <= end <= 1 for end in ends):
            raise ValueError(
                f"rho must be a probability, 0 to 1, or a first and a last one, got {rho!r}"
            )
        self.first, self.last, self.per_node = float(ends[0]), float(ends[1]), per_node

    @property
    def timed(self) -> bool:
        """See :attr:`Rule.timed`: always, each step draws anew."""
        return True

    def rho(self, progress: TrainingProgress) -> float:
        """Return the probability that a target is dropped."""
        return self.first + (self.last - self.first) * progress.fraction

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`."""
        weight, k = candidates.weight, candidates.num_edges
        largest = _largest_into_nodes(candidates) if self.per_node else top_k(weight, k)
        if not candidates.progress.training:
            return largest
        spared = _draw(len(weight), 1 - self.rho(candidates.progress), candidates)
        real = torch.zeros_like(weight, dtype=torch.bool)
        real.index_fill_(0, largest, True).index_fill_(0, spared, True)
        return real.nonzero().flatten()

    def straight_through(self, progress: TrainingProgress) -> bool:
        """See :meth:`Rule.straight_through`: never."""
        return False


def _draw(number: int, probability: float, candidates: Candidates) -> Tensor:
    """Return which of ``number`` things are drawn, each with a probability, independently.

    By the gaps between them, which are geometric: a random number a drawn thing, not for each.
    """
    device = candidates.weight.device
    if probability in (0, 1):
        return torch.arange(int(probability) * number, device=device)
    generator, last = candidates.progress.generator(device), -1
    expected = number * probability
    some, parts = int(expected + 6 * expected**0.5) + 8, []
    while last < number - 1:
        uniform = torch.rand(some, generator=generator, dtype=torch.float64, device=device)
        gaps = uniform.clamp_min_(1e-300).log_().div_(math.log1p(-probability)).long() + 1
        parts.append(last + gaps.cumsum_(0))
        last = int(parts[-1][-1])
    drawn = torch.cat(parts)
    return drawn[drawn < number]


def _largest_into_nodes(candidates: Candidates) -> Tensor:
    weight, topology = candidates.weight, candidates.topology
    rowptr = topology.rowptr_on(weight.device)
    target = torch.repeat_interleave(rowptr.diff(), output_size=len(weight))
    order = weight.abs().argsort(descending=True, stable=True)
    order = order[target[order].argsort(stable=True)]  # by node, then by magnitude
    rank = torch.arange(len(weight), device=weight.device) - rowptr[target]
    kept = rank < shares(topology, candidates.num_edges).to(weight.device)[target]
    return order[kept].sort().values


def shares(topology: Topology, num_edges: int) -> Tensor:
    """Share ``k`` out among nodes ``[V]``, in proportion to their candidates."""
    counts = topology.rowptr.diff()
    exact = counts.double() * num_edges / topology.num_candidates
    share = exact.floor().long()
    left = num_edges - int(share.sum())
    share[(exact - share).argsort(descending=True, stable=True)[:left]] += 1
    return share
