"""Sparse training whose weights, gradients and time are all of the order of the real edges."""

import math

import torch
from torch import Tensor

from dnw_graph.wiring.base import RULES, Candidates, Forget, RuleState
from dnw_graph.wiring.rewire import RigL
from dnw_graph.wiring.select import top_k
from dnw_graph.wiring.wiring import Selection


@RULES.register("gse")
class GSE(RigL):
    r"""As :class:`RigL`, but edges grow where the gradient is largest *among some that are drawn*.

    Only the ``k`` real edges have weights. In the last step before edges change, :math:`\gamma k`
    other candidates are drawn in proportion to a bound of their gradient (:class:`Sampler`), and
    their gradients are computed. With backend ``sparse`` and complete blocks, no number is ever
    kept or computed for every candidate.

    Source: Heddes et al. 2024, guided stochastic exploration, with its bound GraBo. Departs from it
    as :class:`RigL` does from its source, and in that edges move between the blocks of a graph.

    Args:
        every: Steps between changes, :math:`\Delta T`.
        fraction: Share of the real edges that is dropped, at first.
        until: Share of the training after which edges stay.
        samples: How many candidates are drawn, as a multiple of the real edges, :math:`\gamma`.

    Raises:
        ValueError: An argument out of range.
    """

    compact = True

    def __init__(
        self, every: int = 100, fraction: float = 0.2, until: float = 0.75, samples: float = 1.0
    ) -> None:
        super().__init__(every, fraction, until)
        if not 0 < samples < float("inf"):
            raise ValueError(f"samples must be a multiple of the edges, above 0, got {samples}")
        self.samples = samples

    def unfit(self, shape: object) -> str | None:
        """See :meth:`Rule.unfit`: every layer stores weights of all its candidates."""
        return "only real edges have weights with it, but a layer has all; take rigl"

    def init_state(self, candidates: Candidates) -> RuleState:
        """Draw the first wiring without listing candidates."""
        number, k = candidates.topology.num_candidates, candidates.num_edges
        if 2 * k > number:
            state = super().init_state(candidates)
        else:
            drawn = torch.empty(0, dtype=torch.int64, device="cpu")
            while len(drawn) < k:
                more = torch.randint(number, (k + k // 4,), device="cpu")
                drawn = torch.cat([drawn, more]).unique()
            kept = torch.randperm(len(drawn), device="cpu")[:k]
            state = {"edge_id": drawn[kept].sort().values}
        return {**state, "slot": torch.arange(k, device="cpu")}

    def selection(self, candidates: Candidates) -> Selection:
        """See :meth:`Rule.selection`."""
        return Selection(
            self.select(candidates), straight_through=False, slot=candidates.state["slot"].clone()
        )

    def straight_through(self, progress: object) -> bool:
        """See :meth:`Rule.straight_through`: never."""
        return False

    def num_sampled(self, candidates: Candidates) -> int:
        """See :meth:`Rule.num_sampled`: some in the last step before edges change."""
        follows = super().straight_through(candidates.progress)
        return math.ceil(self.samples * candidates.num_edges) if follows else 0

    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Drop the smallest, and let edges that grow have their places among the weights."""
        if candidates.sampled is None:
            return
        real, slot = candidates.state["edge_id"], candidates.state["slot"]
        ids, gradients = candidates.sampled
        new = ~torch.isin(ids, real)  # as weights may have been loaded since the pass
        ids, gradients = ids[new], gradients[new]
        number = min(int(self.share(candidates.progress) * len(real)), len(ids))
        if not number:
            return
        grown = ids[top_k(gradients, number)]
        size = candidates.weight[slot].abs()
        dropped = torch.ones_like(real, dtype=torch.bool)
        if number < len(real):
            dropped[top_k(size, len(real) - number)] = False
        candidates.weight[slot[dropped]] = 0
        forget(slot[dropped])
        after = real.masked_scatter(dropped, grown)
        order = after.argsort()
        real.copy_(after[order])
        slot.copy_(slot[order])
