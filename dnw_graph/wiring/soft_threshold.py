"""Gradual pruning with a soft threshold, so that weights change without jumps."""

from torch import Tensor
from typing_extensions import override

from dnw_graph.wiring.base import RULES, Candidates
from dnw_graph.wiring.gradual import GradualPruning


@RULES.register("soft_threshold")
class SoftThreshold(GradualPruning):
    r"""Gradual pruning that reduces every weight by the largest hallucinated one.

    .. math::
        I_v = \sum_u \operatorname{sign}(w_{uv}) \max(|w_{uv}| - s, 0) Z_u

    where :math:`s` is the largest ``|w|`` of a hallucinated edge. The gradient goes to every weight
    unchanged, so an edge has weight 0 when it is lost or comes back.

    Source: Vanderschueren and De Vleeschouwer 2022 (ST-3), without its optional rescaling of
    weights, which has no effect if a norm follows, as in the networks here.

    Args:
        until: Share of the training run after which ``k`` edges are real.

    Raises:
        ValueError: If an argument is out of range.
    """

    @override
    def edge_weight(self, candidates: Candidates, edge_id: Tensor) -> Tensor | None:
        """Return the weights of the real edges, reduced by the threshold."""
        weight = candidates.weight
        if len(edge_id) == len(weight):
            return None
        real = weight[edge_id]
        threshold = weight.abs().index_fill_(0, edge_id, 0).amax()
        return (real.abs() - threshold).copysign(real)
