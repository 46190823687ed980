"""DNW with hallucinated gradients that neither loud sources nor steep targets make larger."""

import torch
from torch import Tensor

from dnw_graph.wiring._factors import divide_by_factors
from dnw_graph.wiring.base import RULES, Candidates, Rule, RuleState
from dnw_graph.wiring.select import top_k
from dnw_graph.wiring.wiring import Selection


@RULES.register("dnw_factored")
class DNWFactored(Rule):
    r"""DNW whose hallucinated gradients are divided by a factored second moment.

    The ``k`` edges of largest ``|w|`` are real and trained as in :class:`DNW`. The gradient of each
    hallucinated edge, before the optimizer reads it, is replaced by

    .. math::
        \hat g_{uv} = \text{rate} \cdot t \, \frac{g_{uv}}{r_u c_v}, \qquad
        r_u^2 = \operatorname{mean}_v g_{uv}^2, \qquad
        c_v^2 = \operatorname{mean}_u (g_{uv} / r_u)^2

    over the candidates out of ``u`` and into ``v``, where :math:`t` is the smallest real ``|w|``.
    What is left of :math:`g_{uv} = \langle Z_u, \partial L / \partial I_v \rangle` is how well
    state and gradient are aligned, whatever their size. With SGD at learning rate :math:`\alpha`
    and momentum :math:`\mu`, an edge whose gradient keeps its sign moves by about
    :math:`\alpha \cdot \text{rate} / (1 - \mu)` of the threshold a step.

    Source: this project (docs/rules.md); a second moment of rank one is that of Adafactor (Shazeer
    and Stern 2018, section 3).

    Args:
        rate: Size of hallucinated gradients, relative to the threshold ``t``.
        start: What hallucinated weights are multiplied by when the graph is made, or a layer made
            sparse.
        soft: Whether real weights are made smaller by the largest hallucinated ``|w|``, so that an
            edge becomes real, or ceases to be, at weight 0 (:class:`SoftThreshold`).

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, rate: float = 0.04, start: float = 0.3, soft: bool = True) -> None:
        if not isinstance(soft, bool):
            raise ValueError(f"soft must be True or False, got {soft!r}")
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate must be above 0, got {rate}")
        if not 0 <= start <= 1:
            raise ValueError(f"start must lie between 0 and 1, got {start}")
        self.rate, self.start, self.soft = rate, start, soft

    def init_state(self, candidates: Candidates) -> RuleState:
        """Multiply the weights of hallucinated edges by ``start``; nothing is remembered."""
        weight, edge_id = candidates.weight, self.select(candidates)
        real = weight[edge_id]
        weight.mul_(self.start)
        weight[edge_id] = real
        return {}

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`."""
        return top_k(candidates.weight, candidates.num_edges)

    def selection(self, candidates: Candidates) -> Selection:
        """See :meth:`Rule.selection`; the largest hallucinated edge is the one after the real."""
        weight, k = candidates.weight, candidates.num_edges
        if not self.soft or k == len(weight):
            return super().selection(candidates)
        ids = top_k(weight, k + 1)
        size = weight[ids].abs()
        next_largest = k - size.flip(0).argmin()  # among equals the last, as in select
        place = torch.arange(k, device=ids.device)
        edge_id = ids[place + (place >= next_largest)]
        real = weight[edge_id]
        edge_weight = (real.abs() - size[next_largest]).copysign(real)
        return Selection(edge_id, straight_through=True, edge_weight=edge_weight)

    def before_step(self, candidates: Candidates, grad: Tensor, edge_id: Tensor) -> None:
        """Replace the gradients of hallucinated edges."""
        if len(edge_id) == len(grad):
            return
        real, threshold = grad[edge_id], candidates.weight[edge_id].abs().amin()
        divide_by_factors(grad, candidates.topology, self.rate * threshold)
        grad[edge_id] = real
