"""Dynamic sparse training: replace the smallest edges by others at regular intervals."""

import math
import warnings
from abc import abstractmethod
from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

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
    r"""Base class of rules that start from ``k`` random edges and regularly replace the smallest.

    A new edge was not real before, starts with weight 0, and has no momentum.

    Args:
        every: Steps between changes, :math:`\Delta T`.
        fraction: Share of the real edges that the first change replaces.
        until: Share of the training run after which edges no longer change.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, every: int = 100, fraction: float = 0.3, until: float = 0.75) -> None:
        check_steps(every=every)
        if not 0 < fraction <= 1:
            raise ValueError(
                f"fraction must be a share of the edges, above 0 and up to 1, got {fraction}"
            )
        check_until(until)
        self.every, self.fraction, self.until = every, fraction, until

    @property
    @override
    def timed(self) -> bool:
        """Always True."""
        return True

    @override
    def init_state(self, candidates: Candidates) -> RuleState:
        """Draw the first real edges at random."""
        return Random().init_state(candidates)

    def share(self, progress: TrainingProgress) -> float:
        """Return the share of the real edges that a change at this step replaces."""
        return self.fraction

    @override
    def check_length(self, total_steps: int) -> None:
        """Warn if edges never change in so few steps."""
        if not self.acts(TrainingProgress(self.every, total_steps)):
            warnings.warn(
                f"rule {RULES.name_of(self)} changes edges every {self.every} steps of the first "
                f"{self.until:.0%}, so never within {total_steps}; pass it a smaller every",
                NeverActsWarning,
                stacklevel=3,
            )

    @override
    def acts(self, progress: TrainingProgress) -> bool:
        """Return whether edges change after this step."""
        step = progress.step
        return step % self.every == 0 and step < self.until * progress.total_steps

    @abstractmethod
    def _score(self, candidates: Candidates, grad: Tensor | None) -> Tensor:
        """Return a score of every candidate ``[E]``; those of largest magnitude become real."""

    @override
    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Drop the smallest edges, and grow as many others."""
        progress, real = candidates.progress, candidates.state["edge_id"]
        number = min(int(self.share(progress) * len(real)), len(candidates.weight) - len(real))
        if not number:
            return
        hallucinated = torch.ones_like(candidates.weight, dtype=torch.bool)
        # nonzero would make the host wait for a GPU to tell the number of ids.
        size = len(hallucinated) - len(real)
        ids = hallucinated.index_fill_(0, real, False).nonzero_static(size=size).flatten()
        new_ids = ids[top_k(self._score(candidates, grad)[ids], number)]
        magnitude = candidates.weight[real].abs()
        old_ids = real[top_k(magnitude, len(real) - number)] if number < len(real) else real[:0]
        candidates.weight.index_fill_(0, new_ids, 0)
        forget(new_ids)
        real.copy_(torch.cat([old_ids, new_ids]).sort().values)


@RULES.register("set")
class SET(Rewire):
    """Grow random edges. Source: Mocanu et al. 2018, sparse evolutionary training."""

    @override
    def _score(self, candidates: Candidates, grad: Tensor | None) -> Tensor:
        device = candidates.weight.device
        generator = candidates.progress.generator(device)
        return torch.rand(candidates.weight.shape, generator=generator, device=device)


@RULES.register("rigl")
class RigL(Rewire):
    """Grow the edges of largest gradient; the share replaced decreases with a cosine.

    Source: Evci et al. 2020, equation 1 and Algorithm 1, with two differences: the optimizer also
    makes its step when edges change, and dropped edges are not grown again at once.
    """

    @override
    def share(self, progress: TrainingProgress) -> float:
        """Return ``fraction / 2 (1 + cos(pi t / until))``."""
        return self.fraction / 2 * (1 + math.cos(math.pi * progress.fraction / self.until))

    @override
    def straight_through(self, progress: TrainingProgress) -> bool:
        """Return whether edges change after this step, so that all gradients are needed."""
        return progress.training and self.acts(replace(progress, step=progress.step + 1))

    @override
    def _score(self, candidates: Candidates, grad: Tensor | None) -> Tensor:
        return torch.zeros_like(candidates.weight) if grad is None else grad
