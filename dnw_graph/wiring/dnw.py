"""Rule of Discovering Neural Wirings: the k candidates of largest magnitude (Algorithm 1)."""

from dataclasses import replace

from torch import Tensor
from typing_extensions import override

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
    """Make the ``k`` edges of largest ``|w|`` real; update hallucinated edges like real ones.

    Source: Wortsman, Farhadi and Rastegari 2019, Algorithm 1, with the default arguments.

    Args:
        hallucinate_every: Interval, in steps, at which hallucinated edges have a gradient.
        move_from: Share of the training run before which real edges do not change.
        freeze_at: Share of the training run from which real edges no longer change.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self, hallucinate_every: int = 1, move_from: float = 0.0, freeze_at: float = 1.0
    ) -> None:
        check_steps(hallucinate_every=hallucinate_every)
        if not 0 <= move_from < freeze_at <= 1:
            raise ValueError(
                "move_from and freeze_at must be shares of the training run, 0 <= move_from < "
                f"freeze_at <= 1, got {move_from} and {freeze_at}"
            )
        self.hallucinate_every = hallucinate_every
        self.move_from, self.freeze_at = move_from, freeze_at

    @property
    @override
    def timed(self) -> bool:
        """Whether any argument depends on the training step."""
        return self.hallucinate_every > 1 or self._has_pauses

    @property
    def _has_pauses(self) -> bool:
        """Whether real edges do not change during a part of the training run."""
        return self.move_from > 0 or self.freeze_at < 1

    @override
    def init_state(self, candidates: Candidates) -> RuleState:
        """Return the ids of the first real edges, if edges do not change all the time."""
        return {"edge_id": self._largest(candidates)} if self._has_pauses else {}

    @override
    def select(self, candidates: Candidates) -> Tensor:
        if self._edges_can_change(candidates.progress):
            return self._largest(candidates)
        return candidates.state["edge_id"].clone()

    @override
    def straight_through(self, progress: TrainingProgress) -> bool:
        is_due = self.hallucinate_every == 1 or progress.step % self.hallucinate_every == 0
        return is_due and self._edges_can_change(progress)

    @override
    def acts(self, progress: TrainingProgress) -> bool:
        """Return whether the real edges stop changing with this step."""
        before = replace(progress, step=progress.step - 1)
        return self._edges_can_change(before) and not self._edges_can_change(progress)

    @override
    def after_step(self, candidates: Candidates, grad: Tensor | None, forget: Forget) -> None:
        """Store the ids of the real edges, which no longer change."""
        candidates.state["edge_id"].copy_(self._largest(candidates))

    def _edges_can_change(self, progress: TrainingProgress) -> bool:
        if not self._has_pauses:
            return True
        return self.move_from <= progress.fraction and (
            self.freeze_at == 1 or progress.fraction < self.freeze_at
        )

    @staticmethod
    def _largest(candidates: Candidates) -> Tensor:
        return top_k(candidates.weight, candidates.num_edges)


@RULES.register("no_update")
class NoUpdate(Rule):
    """Make the ``k`` edges of largest ``|w|`` real; hallucinated edges have no gradient.

    Weight decay and momentum still act on every candidate, so a real edge whose weight shrinks
    below that of a hallucinated edge is replaced by it. Source: Table 2 of the paper, "no update
    rule".
    """

    @override
    def select(self, candidates: Candidates) -> Tensor:
        return top_k(candidates.weight, candidates.num_edges)

    @override
    def straight_through(self, progress: TrainingProgress) -> bool:
        """Return False: only real edges have a gradient."""
        return False
