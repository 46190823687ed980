"""Weights that come and go smoothly: thresholded softly, with gradients straight through."""

from torch import Tensor

from dnw_graph.wiring.base import RULES, Candidates
from dnw_graph.wiring.gradual import GradualPruning


@RULES.register("soft_threshold")
class SoftThreshold(GradualPruning):
    r"""Gradual pruning that makes every weight smaller by the largest hallucinated one.

    .. math::
        I_v = \sum_u \operatorname{sign}(w_{uv}) \max(|w_{uv}| - s, 0) Z_u

    where :math:`s` is the largest ``|w|`` of a hallucinated edge. The gradient goes to every weight
    unchanged, so that an edge is lost, or comes back, at weight 0.

    Source: Vanderschueren and De Vleeschouwer 2022 (ST-3), without its optional rescaling of
    weights: where a norm follows, as in the networks here, it has no effect.

    Args:
        until: Share of the training at which ``k`` edges are left.

    Raises:
        ValueError: An argument out of range.
    """

    def edge_weight(self, candidates: Candidates, edge_id: Tensor) -> Tensor | None:
        """Return the weights made smaller by the threshold."""
        weight = candidates.weight
        if len(edge_id) == len(weight):
            return None
        real = weight[edge_id]
        threshold = weight.abs().index_fill_(0, edge_id, 0).amax()
        return (real.abs() - threshold).copysign(real)
