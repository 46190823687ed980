"""DNW that updates hallucinated edges with gradients normalised by source and target."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph._arena import empty
from dnw_graph.wiring._factors import average_factored
from dnw_graph.wiring.base import RULES, Candidates, Rule, RuleState
from dnw_graph.wiring.select import top_k


@RULES.register("dnw_factored")
class DNWFactored(Rule):
    r"""DNW that updates hallucinated edges with a gradient divided by a factored second moment.

    The ``k`` edges of largest ``|w|`` are real, and the optimizer updates them. In each step the
    rule updates hallucinated edges by

    .. math::
        \hat g_{uv} = \frac{g_{uv}}{r_u c_v}, \qquad
        r_u^2 = \operatorname{mean}_v g_{uv}^2, \qquad
        c_v^2 = \operatorname{mean}_u (g_{uv} / r_u)^2

        m_{uv} \leftarrow \beta m_{uv} + (1 - \beta) \hat g_{uv}, \qquad
        w_{uv} \leftarrow w_{uv} - \text{rate} \cdot
            \cos\bigl(\tfrac{\pi}{2} \min(t / \text{until}, 1)\bigr) \cdot \theta \, m_{uv}

    where means are over the candidates out of ``u`` and into ``v``, :math:`\theta` is the smallest
    real ``|w|`` and :math:`t` is the share of the training run that is done. The gradient is
    :math:`g_{uv} = \langle Z_u, \partial L / \partial I_v \rangle`; :math:`\hat g_{uv}` measures
    how well state and gradient are aligned, regardless of their magnitudes. When an edge becomes
    real, its momentum in the optimizer is that of its own gradients.

    Source: this project (docs/rules.md). Adafactor (Shazeer and Stern 2018, section 3) uses a
    second moment of rank one.

    Args:
        rate: Step size along a constant gradient at the start of training, as a share of the
            threshold :math:`\theta`.
        momentum: The coefficient :math:`\beta`.
        start: Factor for hallucinated weights when the graph is built or the layer is made sparse.
        until: Share of the training run after which hallucinated weights no longer change, so that
            the last steps train a nearly fixed wiring.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, rate: float = 0.02, momentum: float = 0.9, start: float = 0.7, until: float = 1.0
    ) -> None:
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate must be above 0, got {rate}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be 0 or more and below 1, got {momentum}")
        if not 0 <= start <= 1:
            raise ValueError(f"start must be between 0 and 1, got {start}")
        if not 0 < until <= 1:
            raise ValueError(
                f"until must be a share of the training run, above 0 to 1, got {until}"
            )
        self.rate, self.momentum, self.start, self.until = rate, momentum, start, until

    @property
    @override
    def timed(self) -> bool:
        """Always True."""
        return True

    @override
    def init_state(self, candidates: Candidates) -> RuleState:
        """Multiply the weights of hallucinated edges by ``start``, and return the average ``m``."""
        weight, edge_id = candidates.weight, self.select(candidates)
        real = weight[edge_id]
        weight.mul_(self.start)
        weight[edge_id] = real
        return {"average": torch.zeros_like(weight)}

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return top_k(candidates.weight, candidates.num_edges)

    @override
    def hallucinated_weight(
        self, candidates: Candidates, grad: Tensor, edge_id: Tensor
    ) -> Tensor | None:
        weight, average = candidates.weight, candidates.state["average"]
        if len(edge_id) == len(weight):
            return None
        average_factored(average, grad, candidates.topology, 1 - self.momentum)
        fraction = min(candidates.progress.fraction / self.until, 1.0)
        rate = self.rate * math.cos(math.pi / 2 * fraction)
        step = -rate * weight[edge_id].abs().amin()
        return torch.addcmul(weight, average, step, out=empty(weight, weight.shape))
