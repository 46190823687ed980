"""Targeted dropout: small weights are real at random during training."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule, TrainingProgress
from dnw_graph.wiring.select import top_k


@RULES.register("targeted_dropout")
class TargetedDropout(Rule):
    r"""Make the ``k`` largest ``|w|`` real, and each other candidate with probability ``1 - rho``.

    The other candidates are drawn again in every training step; in evaluation, exactly the ``k``
    largest are real. Dropped edges have no gradient. Source: Gomez et al. 2019, weight dropout,
    with the ``E - k`` smallest as targets.

    Args:
        rho: Probability that a target is dropped, or a first and a last probability, with linear
            interpolation over the training run.
        per_node: Whether the largest edges into each node are real, rather than the largest of the
            graph. Each node's number is proportional to its candidates, ``k`` in all. This sorts
            all candidates in every step.

    Raises:
        ValueError: If a probability is outside 0 to 1.
    """

    def __init__(self, rho: float | Sequence[float] = 0.95, per_node: bool = False) -> None:
        ends = [rho, rho] if isinstance(rho, int | float) else list(rho)
        if len(ends) != 2 or not all(0 <= end <= 1 for end in ends):
            raise ValueError(
                f"rho must be a probability, 0 to 1, or a pair of first and last, got {rho!r}"
            )
        self.first, self.last, self.per_node = float(ends[0]), float(ends[1]), per_node

    @property
    @override
    def timed(self) -> bool:
        """Always True, since each step draws other edges."""
        return True

    def rho(self, progress: TrainingProgress) -> float:
        """Return the probability that a target is dropped."""
        return self.first + (self.last - self.first) * progress.fraction

    @override
    @torch.compiler.disable  # type: ignore[untyped-decorator]  # generators are not traced
    def select(self, candidates: Candidates) -> Tensor:
        weight, k = candidates.weight, candidates.num_edges
        largest = _largest_into_nodes(candidates) if self.per_node else top_k(weight, k)
        if not candidates.progress.training:
            return largest
        extra = _draw(len(weight), 1 - self.rho(candidates.progress), candidates)
        real = torch.zeros_like(weight, dtype=torch.bool)
        real.index_fill_(0, largest, True).index_fill_(0, extra, True)
        return real.nonzero().flatten()

    @override
    def straight_through(self, progress: TrainingProgress) -> bool:
        """Return False: only real edges have a gradient."""
        return False


def _draw(number: int, probability: float, candidates: Candidates) -> Tensor:
    """Return indices below ``number``, ascending, each drawn independently with ``probability``.

    Draws the gaps between them, which have a geometric distribution, so it needs one random number
    per index returned rather than ``number`` of them.
    """
    device = candidates.weight.device
    if probability in (0, 1):
        return torch.arange(int(probability) * number, device=device)
    generator, last = candidates.progress.generator(device), -1
    expected = number * probability
    size, parts = int(expected + 6 * expected**0.5) + 8, []
    while last < number - 1:
        uniform = torch.rand(size, generator=generator, dtype=torch.float64, device=device)
        gaps = uniform.clamp_min_(1e-300).log_().div_(math.log1p(-probability)).long() + 1
        parts.append(last + gaps.cumsum_(0))
        last = int(parts[-1][-1])
    ids = torch.cat(parts)
    return ids[ids < number]


def _largest_into_nodes(candidates: Candidates) -> Tensor:
    """Return the ids of the largest edges into each node, ``k`` in all."""
    weight, topology = candidates.weight, candidates.topology
    rowptr = topology.rowptr_on(weight.device)
    target = torch.repeat_interleave(rowptr.diff(), output_size=len(weight))
    order = weight.abs().argsort(descending=True, stable=True)
    order = order[target[order].argsort(stable=True)]  # by node, then by magnitude
    rank = torch.arange(len(weight), device=weight.device) - rowptr[target]
    is_largest = rank < shares(topology, candidates.num_edges).to(weight.device)[target]
    return order[is_largest].sort().values


def shares(topology: Topology, num_edges: int) -> Tensor:
    """Return each node's share of ``num_edges`` ``[V]``, in proportion to its candidates."""
    counts = topology.rowptr.diff()
    exact = counts.double() * num_edges / topology.num_candidates
    share = exact.floor().long()
    remainder = num_edges - int(share.sum())
    share[(exact - share).argsort(descending=True, stable=True)[:remainder]] += 1
    return share
