"""Dynamic sparse training: every so often the smallest edges go, and as many others come."""

import math
import warnings
from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor

from dnw_graph.wiring.base import (
    RULES,
    Candidates,
    Forget,
    NeverActsWarning,
    RuleState,
    TrainingProgress,
    check_steps,
)
from dnw_graph.wiring.fixed import Fixed, Random
from dnw_graph.wiring.gradual import check_until
from dnw_graph.wiring.select import top_k


class Rewire(Fixed):
    """Starts from ``k`` random edges; every so many steps, drops the smallest and grows as many.

    A grown edge was not real before, starts at weight 0, and has no momentum.

    Args:
        every: Steps between changes, :math:`\\Delta T`.
        fraction: Share of the real edges that is dropped, at first.
        until: Share of the training after which edges stay.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(self, every: int = 100, fraction: float = 0.3, until: float = 0.75) -> None:
        check_steps(every=every)
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be a share of the edges, above 0 to 1, got {fraction}")
        check_until(until)
        self.every, self.fraction, self.until = every, fraction, until

    @property
    def timed(self) -> bool:
        """See :attr:`Rule.timed`: always."""
        return True

    def init_state(self, candidates: Candidates) -> RuleState:
        """Draw the first wiring."""
        return Random().init_state(candidates)

    def share(self, progress: TrainingProgress) -> float:
        """Return the share of the real edges that a change drops at this point of the training."""
        return self.fraction

    def check_length(self, total_steps: int) -> None:
        """Warn where edges never change."""
        if not self.acts(TrainingProgress(self.every, total_steps)):
            warnings.warn(
                f"rule {RULES.name_of(self)} changes edges every {self.every} steps of the first "
                f"{self.until:.0%}, so never within {total_steps}; give it a smaller every",
                NeverActsWarning,
                stacklevel=3,
            )

    def acts(self, progress: TrainingProgress) -> bool:
        """See :meth:`Rule.acts`: every so many steps."""
        step = progress.step
        return step % self.every == 0 and step < self.until * progress.total_steps

    @abstractmethod
    def _score(self, candidates: Candidates, grad: Tensor | None) -> Tensor:
        """Return by what new edges are chosen ``[E]``: the largest magnitudes."""

    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Drop and grow."""
        progress, real = candidates.progress, candidates.state["edge_id"]
        number = min(int(self.share(progress) * len(real)), len(candidates.weight) - len(real))
        if not number:
            return
        others = torch.ones_like(candidates.weight, dtype=torch.bool).index_fill_(0, real, False)
        ids = others.nonzero().flatten()
        grown = ids[top_k(self._score(candidates, grad)[ids], number)]
        size = candidates.weight[real].abs()
        kept = real[top_k(size, len(real) - number)] if number < len(real) else real[:0]
        candidates.weight.index_fill_(0, grown, 0)
        forget(grown)
        real.copy_(torch.cat([kept, grown]).sort().values)


@RULES.register("set")
class SET(Rewire):
    """Grows at random. Source: Mocanu et al. 2018, sparse evolutionary training."""

    def _score(self, candidates: Candidates, grad: Tensor | None) -> Tensor:
        device = candidates.weight.device
        generator = candidates.progress.generator(device)
        return torch.rand(candidates.weight.shape, generator=generator, device=device)


@RULES.register("rigl")
class RigL(Rewire):
    """Grows where the gradient is largest; a cosine makes the share smaller.

    Source: Evci et al. 2020, equation 1 and Algorithm 1, of which it departs in that the optimizer
    takes its step also when edges change, and what is dropped does not come back at once.
    """

    def share(self, progress: TrainingProgress) -> float:
        """See :meth:`Rewire.share`: ``fraction / 2 (1 + cos(pi t / until))``."""
        return self.fraction / 2 * (1 + math.cos(math.pi * progress.fraction / self.until))

    def straight_through(self, progress: TrainingProgress) -> bool:
        """See :meth:`Rule.straight_through`: in the step that a change follows."""
        return progress.training and self.acts(replace(progress, step=progress.step + 1))

    def _score(self, candidates: Candidates, grad: Tensor | None) -> Tensor:
        return torch.zeros_like(candidates.weight) if grad is None else grad
