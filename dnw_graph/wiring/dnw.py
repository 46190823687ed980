"""Discovering neural wirings: the k candidates of largest magnitude (Algorithm 1)."""

from dataclasses import replace

from torch import Tensor

from dnw_graph.wiring.base import (
    RULES,
    Candidates,
    Forget,
    Rule,
    RuleState,
    TrainingProgress,
    check_steps,
)
from dnw_graph.wiring.select import top_k


@RULES.register("dnw")
class DNW(Rule):
    """The ``k`` edges of largest ``|w|`` are real; hallucinated ones are updated like them.

    Source: Wortsman, Farhadi and Rastegari 2019, Algorithm 1. The arguments depart from it.

    Args:
        hallucinate_every: Hallucinated edges have a gradient every so many steps only.
        move_from: Share of the training before which edges stay as they were drawn.
        freeze_at: Share of the training from which they stay as they are then.

    Raises:
        ValueError: An argument out of range.
    """

    def __init__(
        self, hallucinate_every: int = 1, move_from: float = 0.0, freeze_at: float = 1.0
    ) -> None:
        check_steps(hallucinate_every=hallucinate_every)
        if not 0 <= move_from < freeze_at <= 1:
            raise ValueError(
                "move_from and freeze_at must be shares of the training, 0 <= move_from < "
                f"freeze_at <= 1, got {move_from} and {freeze_at}"
            )
        self.hallucinate_every = hallucinate_every
        self.move_from, self.freeze_at = move_from, freeze_at

    @property
    def timed(self) -> bool:
        """See :attr:`Rule.timed`: where something depends on the step."""
        return self.hallucinate_every > 1 or self._rests

    @property
    def _rests(self) -> bool:
        """Whether there is a time in which edges do not move."""
        return self.move_from > 0 or self.freeze_at < 1

    def init_state(self, candidates: Candidates) -> RuleState:
        """Remember the first wiring, where it will be needed."""
        return {"edge_id": self._largest(candidates)} if self._rests else {}

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`."""
        if self._moving(candidates.progress):
            return self._largest(candidates)
        return candidates.state["edge_id"].clone()

    def straight_through(self, progress: TrainingProgress) -> bool:
        """See :meth:`Rule.straight_through`."""
        due = self.hallucinate_every == 1 or progress.step % self.hallucinate_every == 0
        return due and self._moving(progress)

    def acts(self, progress: TrainingProgress) -> bool:
        """See :meth:`Rule.acts`: when edges stop moving."""
        return self._moving(replace(progress, step=progress.step - 1)) and not self._moving(
            progress
        )

    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Remember the wiring."""
        candidates.state["edge_id"].copy_(self._largest(candidates))

    def _moving(self, progress: TrainingProgress) -> bool:
        if not self._rests:
            return True
        return self.move_from <= progress.fraction and (
            self.freeze_at == 1 or progress.fraction < self.freeze_at
        )

    @staticmethod
    def _largest(candidates: Candidates) -> Tensor:
        return top_k(candidates.weight, candidates.num_edges)


@RULES.register("no_update")
class NoUpdate(Rule):
    """The ``k`` edges of largest ``|w|`` are real, and hallucinated ones have no gradient.

    Weight decay and momentum act on every candidate as always, so a real edge that shrinks below a
    hallucinated one gives its place up. Source: Table 2 of the paper, "no update rule".
    """

    def select(self, candidates: Candidates) -> Tensor:
        """See :meth:`Rule.select`."""
        return top_k(candidates.weight, candidates.num_edges)

    def straight_through(self, progress: TrainingProgress) -> bool:
        """See :meth:`Rule.straight_through`: never."""
        return False
