"""Rule in which the real edges and the largest hallucinated edges have a gradient."""

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.wiring.base import RULES, Candidates, Rule
from dnw_graph.wiring.select import top_k


@RULES.register("top_kast")
class TopKAST(Rule):
    r"""Make the ``k`` largest ``|w|`` real (A), and compute gradients of a larger set (B).

    B also holds the largest ``|w|``, and the cost of a step depends on its size. Edges of B that
    are not real decay faster than real ones, by the factor :math:`1 / D` for the density
    :math:`D = k / E`:

    .. math::
        g_{uv} \leftarrow g_{uv} + \begin{cases}
            \lambda w_{uv} & (u, v) \in A \\
            \lambda w_{uv} / D & (u, v) \in B \setminus A
        \end{cases}

    Source: Jayakumar et al. 2020, sections 2.1 and 2.3, with the L2 norm as regularization and
    both sets chosen again in every step.

    Args:
        backward: Number of edges in B, as a multiple of ``k``.
        decay: The coefficient :math:`\lambda`, in addition to the optimizer's weight decay.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, backward: float = 2.0, decay: float = 1e-5) -> None:
        if not 1 <= backward < float("inf"):
            raise ValueError(
                "backward must be a multiple of the number of real edges, 1 or more, got "
                f"{backward}"
            )
        if not 0 <= decay < float("inf"):
            raise ValueError(f"decay must be 0 or more, got {decay}")
        self.backward, self.decay = backward, decay

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return top_k(candidates.weight, candidates.num_edges)

    @override
    def gradient_edges(self, candidates: Candidates, edge_id: Tensor) -> Tensor:
        """Return the ids of the edges in B."""
        number = min(round(self.backward * candidates.num_edges), len(candidates.weight))
        return top_k(candidates.weight, number)

    @override
    def before_step(self, candidates: Candidates, grad: Tensor, edge_id: Tensor) -> None:
        """Add the decay to the gradients of the edges in B."""
        ids = self.gradient_edges(candidates, edge_id)
        density = candidates.num_edges / len(grad)
        decay = torch.full_like(ids, self.decay / density, dtype=grad.dtype)
        decay[torch.searchsorted(ids, edge_id)] = self.decay
        grad[ids] += decay * candidates.weight[ids]
