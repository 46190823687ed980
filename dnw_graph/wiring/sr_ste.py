"""DNW with a decay of hallucinated weights."""

from torch import Tensor
from typing_extensions import override

from dnw_graph.wiring.base import RULES, Candidates, Rule
from dnw_graph.wiring.select import top_k


@RULES.register("sr_ste")
class SRSTE(Rule):
    r"""DNW with a decay of hallucinated weights, so that fewer edges change.

    .. math::
        g_{uv} \leftarrow g_{uv} + \lambda w_{uv}

    for every hallucinated edge, before the optimizer reads the gradient.

    Source: Zhou et al. 2021, equation 9 ("sparse-refined straight-through estimator"), who use it
    for patterns of n in m weights; here the ``k`` edges of largest ``|w|`` are real, as in
    :class:`DNW`.

    Args:
        decay: The coefficient :math:`\lambda`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, decay: float = 2e-4) -> None:
        if not 0 <= decay < float("inf"):
            raise ValueError(f"decay must be 0 or more, got {decay}")
        self.decay = decay

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return top_k(candidates.weight, candidates.num_edges)

    @override
    def before_step(self, candidates: Candidates, grad: Tensor, edge_id: Tensor) -> None:
        """Add the decay to the gradients of hallucinated edges."""
        real = grad[edge_id]
        grad.add_(candidates.weight, alpha=self.decay)
        grad[edge_id] = real
