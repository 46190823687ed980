"""Sparse training with weights, gradients and time proportional to the number of real edges."""

import math

import torch
from torch import Tensor
from typing_extensions import override

from dnw_graph.wiring.base import RULES, Candidates, Forget, RuleState
from dnw_graph.wiring.rewire import RigL
from dnw_graph.wiring.select import top_k
from dnw_graph.wiring.wiring import Selection


@RULES.register("gse")
class GSE(RigL):
    r"""Like :class:`RigL`, but grow the edges of largest gradient *from a random sample*.

    Only the ``k`` real edges have weights. In the last step before edges change, :math:`\gamma k`
    other candidates are drawn in proportion to a bound of their gradient (:class:`Sampler`), and
    their gradients are computed. With backend ``sparse`` and complete blocks, nothing is stored or
    computed for every candidate.

    Source: Heddes et al. 2024, guided stochastic exploration, with its bound GraBo. Differs from it
    as :class:`RigL` does from its source; also, edges may move from one block to another.

    Args:
        every: Steps between changes, :math:`\Delta T`.
        fraction: Share of the real edges that the first change drops.
        until: Share of the training run after which edges no longer change.
        samples: Number of candidates drawn, as a multiple of the real edges, :math:`\gamma`.

    Raises:
        ValueError: If an argument is out of range.
    """

    compact = True

    def __init__(
        self, every: int = 100, fraction: float = 0.2, until: float = 0.75, samples: float = 1.0
    ) -> None:
        super().__init__(every, fraction, until)
        if not 0 < samples < float("inf"):
            raise ValueError(
                f"samples must be a multiple of the number of edges, above 0, got {samples}"
            )
        self.samples = samples

    @override
    def unfit(self, shape: object) -> str | None:
        """Return the reason, for every layer: it stores the weights of all candidates."""
        return "the rule stores weights of real edges only, but a layer stores all; use rigl"

    @override
    def init_state(self, candidates: Candidates) -> RuleState:
        """Draw the first real edges without listing all candidates."""
        number, k = candidates.topology.num_candidates, candidates.num_edges
        if 2 * k > number:
            state = super().init_state(candidates)
        else:
            ids = torch.empty(0, dtype=torch.int64, device="cpu")
            while len(ids) < k:
                more = torch.randint(number, (k + k // 4,), device="cpu")
                ids = torch.cat([ids, more]).unique()
            subset = torch.randperm(len(ids), device="cpu")[:k]
            state = {"edge_id": ids[subset].sort().values}
        return {**state, "slot": torch.arange(k, device="cpu")}

    @override
    def selection(self, candidates: Candidates) -> Selection:
        return Selection(
            self.select(candidates), straight_through=False, slot=candidates.state["slot"].clone()
        )

    @override
    def straight_through(self, progress: object) -> bool:
        """Return False: only real edges have a gradient."""
        return False

    @override
    def num_sampled(self, candidates: Candidates) -> int:
        """Return the number of candidates to draw, 0 unless edges change after this step."""
        is_last = super().straight_through(candidates.progress)  # the last step before a change
        return math.ceil(self.samples * candidates.num_edges) if is_last else 0

    @override
    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Drop the smallest edges, and store the weights of new edges in their slots."""
        if candidates.sampled is None:
            return
        real, slot = candidates.state["edge_id"], candidates.state["slot"]
        ids, gradients = candidates.sampled
        is_new = ~torch.isin(ids, real)  # a state may have been loaded since the pass
        ids, gradients = ids[is_new], gradients[is_new]
        number = min(int(self.share(candidates.progress) * len(real)), len(ids))
        if not number:
            return
        new_ids = ids[top_k(gradients, number)]
        size = candidates.weight[slot].abs()
        drop = torch.ones_like(real, dtype=torch.bool)
        if number < len(real):
            drop[top_k(size, len(real) - number)] = False
        candidates.weight[slot[drop]] = 0
        forget(slot[drop])
        after = real.masked_scatter(drop, new_ids)
        order = after.argsort()
        real.copy_(after[order])
        slot.copy_(slot[order])
