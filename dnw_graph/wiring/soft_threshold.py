"""Weights that come and go smoothly: thresholded softly, with gradients straight through."""

import torch
from torch import Tensor

from dnw_graph.wiring.base import RULES, Candidates, Moment, Rule
from dnw_graph.wiring.l1_anneal import check_until, falling_number
from dnw_graph.wiring.select import top_k


@RULES.register("soft_threshold")
class SoftThreshold(Rule):
    r"""Starts complete; the smallest ``|w|`` fall silent, and all others are made smaller by them.

    .. math::
        I_v = \sum_u \operatorname{sign}(w_{uv}) \max(|w_{uv}| - t, 0) Z_u

    where :math:`t` is the largest ``|w|`` of the candidates that are not among the :math:`k_t`
    largest, :math:`k_t = k + (E - k)(1 - s / s_1)^3` after a share ``s`` of the training; ``s_1``
    is ``until``. The gradient goes to every weight as it is without the threshold, so that an
    edge that falls silent or comes back does so at weight 0.

    Source: Vanderschueren and De Vleeschouwer 2022 (ST-3), without its optional rescaling: a norm
    follows in the networks here.

    Args:
        until: Share of the training at which ``k`` edges are left.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, until: float = 0.75) -> None:
        check_until(until)
        self.until = until

    @property
    def timed(self) -> bool:
        """See :attr:`Rule.timed`: always."""
        return True

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`; ``k`` edges from ``until`` on, in evaluation too."""
        weight, number = candidates.weight, falling_number(candidates, self.until)
        if number == len(weight):
            return torch.arange(number, device=weight.device)
        return top_k(weight, number)

    def straight_through(self, moment: Moment) -> bool:
        """See :meth:`Rule.straight_through`: always."""
        return True

    def edge_weight(self, candidates: Candidates, edge_id: Tensor) -> Tensor | None:
        """Return the weights made smaller by the threshold."""
        weight = candidates.weight
        if len(edge_id) == len(weight):
            return None
        size = weight.abs()
        threshold = size.index_fill(0, edge_id, 0).amax()
        return size.sub_(threshold).clamp_min_(0).copysign_(weight)
