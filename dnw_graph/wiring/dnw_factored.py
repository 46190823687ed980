"""DNW whose hallucinated edges move by gradients free of the size of sources and targets."""

import math

import torch
from torch import Tensor

from dnw_graph._arena import empty
from dnw_graph.wiring._factors import average_factored
from dnw_graph.wiring.base import RULES, Candidates, Rule, RuleState
from dnw_graph.wiring.select import top_k


@RULES.register("dnw_factored")
class DNWFactored(Rule):
    r"""DNW whose hallucinated edges move by a gradient divided by a factored second moment.

    The ``k`` edges of largest ``|w|`` are real, and the optimizer trains them. Hallucinated edges
    it leaves alone; in each step they move by

    .. math::
        \hat g_{uv} = \frac{g_{uv}}{r_u c_v}, \qquad
        r_u^2 = \operatorname{mean}_v g_{uv}^2, \qquad
        c_v^2 = \operatorname{mean}_u (g_{uv} / r_u)^2

        m_{uv} \leftarrow \beta m_{uv} + (1 - \beta) \hat g_{uv}, \qquad
        w_{uv} \leftarrow w_{uv} - \text{rate} \cdot \cos(\tfrac{\pi}{2} t) \cdot \theta \, m_{uv}

    where means are over the candidates out of ``u`` and into ``v``, :math:`\theta` is the smallest
    real ``|w|`` and :math:`t` the share of the training that is done. What is left of
    :math:`g_{uv} = \langle Z_u, \partial L / \partial I_v \rangle` in :math:`\hat g_{uv}` is how
    well state and gradient are aligned, whatever their size. An edge that becomes real has the
    optimizer's momentum of its own gradients.

    Source: this project (docs/rules.md); a second moment of rank one is that of Adafactor (Shazeer
    and Stern 2018, section 3).

    Args:
        rate: Length of a step along a gradient that stays, as a share of the threshold
            :math:`\theta`, at the start of a training.
        momentum: The coefficient :math:`\beta`.
        start: What hallucinated weights are multiplied by when the graph is made, or a layer made
            sparse.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, rate: float = 0.02, momentum: float = 0.9, start: float = 0.7) -> None:
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate must be above 0, got {rate}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be 0 or more and below 1, got {momentum}")
        if not 0 <= start <= 1:
            raise ValueError(f"start must lie between 0 and 1, got {start}")
        self.rate, self.momentum, self.start = rate, momentum, start

    @property
    def timed(self) -> bool:
        """See :attr:`Rule.timed`: always."""
        return True

    def init_state(self, candidates: Candidates) -> RuleState:
        """Multiply the weights of hallucinated edges by ``start``; remember the average ``m``."""
        weight, edge_id = candidates.weight, self.select(candidates)
        real = weight[edge_id]
        weight.mul_(self.start)
        weight[edge_id] = real
        return {"average": torch.zeros_like(weight)}

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`."""
        return top_k(candidates.weight, candidates.num_edges)

    def hallucinated_weight(
        self, candidates: Candidates, grad: Tensor, edge_id: Tensor
    ) -> Tensor | None:
        """See :meth:`Rule.hallucinated_weight`."""
        weight, average = candidates.weight, candidates.state["average"]
        if len(edge_id) == len(weight):
            return None
        average_factored(average, grad, candidates.topology, 1 - self.momentum)
        rate = self.rate * math.cos(math.pi / 2 * candidates.progress.fraction)
        step = -rate * weight[edge_id].abs().amin()
        return torch.addcmul(weight, average, step, out=empty(weight, weight.shape))
