"""The contract of a rule."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from dnw_graph._deprecated import warn_renamed
from dnw_graph._registry import PartRegistry
from dnw_graph.topology import Topology
from dnw_graph.wiring.wiring import Selection

RuleState = dict[str, Tensor]
"""What a rule remembers; kept in buffers, so checkpoints and ``.to()`` carry it."""

Forget = Callable[[Tensor], None]
"""Clears what the optimizer remembers (momentum) of some weights: indices, or a mask of all."""


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training has come when a rule is asked.

    Attributes:
        step: Steps that the optimizer has done.
        total_steps: Steps of the whole training, 0 where unknown.
        seed: Of this graph's random draws.
        training: Whether the graph is in training mode.
    """

    step: int = 0
    total_steps: int = 0
    seed: int = 0
    training: bool = False

    @property
    def fraction(self) -> float:
        """Share of the training that is done, 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    @property
    def progress(self) -> float:
        """:attr:`fraction`, by an earlier name."""
        warn_renamed("progress.progress", "progress.fraction")
        return self.fraction

    def generator(self, device: torch.device) -> torch.Generator:
        """Return random numbers that depend on the graph's seed and the step alone."""
        # PyTorch's generator on CPUs reads 32 bits of a seed, so both have to be mixed into these.
        mixed = np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0]
        return torch.Generator(device).manual_seed(int(mixed))


@dataclass(frozen=True)
class Candidates:
    """What a rule chooses from.

    Attributes:
        weight: Candidate weights ``[E]``, without a gradient; those of real edges ``[k]``, in any
            order, if the rule is :attr:`~Rule.compact`.
        num_edges: The budget ``k``.
        topology: The candidates.
        state: What :meth:`Rule.init_state` returned for this graph.
        progress: How far the training has come.
        sampled: After a step, ids ``[n]``, ascending, and gradients ``[n]`` of hallucinated edges,
            if :meth:`Rule.num_sampled` asked for some.
    """

    weight: Tensor
    num_edges: int
    topology: Topology
    state: RuleState
    progress: TrainingProgress
    sampled: tuple[Tensor, Tensor] | None = None

    @property
    def moment(self) -> TrainingProgress:
        """:attr:`progress`, by an earlier name."""
        warn_renamed("candidates.moment", "candidates.progress")
        return self.progress


class NeverActsWarning(UserWarning):
    """A training is so short that its rule never does what it is called after."""


class Rule(ABC):
    """Decides which candidate edges are real.

    A rule itself holds settings only, so that one object may serve many graphs; what it remembers
    of a graph is made by :meth:`init_state`, handed back to it with every question, and changed
    with a step only, in :meth:`hallucinated_weight` and :meth:`after_step`.
    """

    #: Weights that a run with this rule starts from: its own, or the first or last of another
    #: run, whose largest it keeps (see :meth:`inherit`).
    starts_from: Literal["itself", "initial", "trained"] = "itself"

    #: Whether candidates of a layer made sparse are numbered with input channels last, after the
    #: place in the filter, rather than as they are stored.
    inputs_last: bool = False

    #: Whether the rule itself says how many candidates are real, rather than the user.
    sets_budget: bool = False

    #: Among which candidates the first real edges are those of largest ``|w|``: all of them, those
    #: into the same node, or none, since real edges are drawn at random or all are real.
    ranking: Literal["all", "node", "none"] = "all"

    #: Whether only real edges have weights ``[k]``. The :meth:`selection` then says which is whose.
    compact: bool = False

    @property
    def timed(self) -> bool:
        """Whether the rule has to be told of the steps of a training, by ``attach``."""
        return False

    @property
    def changes_gradients(self) -> bool:
        """Whether :meth:`before_step` or :meth:`hallucinated_weight` does anything."""
        moves = type(self).hallucinated_weight is not Rule.hallucinated_weight
        return moves or type(self).before_step is not Rule.before_step

    @property
    def follows_training(self) -> bool:
        """Whether training without ``attach`` is an error."""
        changes_weights = type(self).after_step is not Rule.after_step
        return (
            self.timed
            or self.changes_gradients
            or (changes_weights and self.acts(TrainingProgress()))
        )

    def budget(self, num_edges: int | None, topology: Topology) -> int:
        """Return the number of real edges ``k``, and raise where the budget cannot be met.

        Args:
            num_edges: What the user asked for.
            topology: The candidates.

        Raises:
            ValueError: No budget, one below 1, or one above the number of candidates.
            TypeError: Not a whole number.
        """
        num_candidates = topology.num_candidates
        if num_edges is None:
            raise ValueError(
                f"num_edges, the number of real edges, is missing: give 1 to {num_candidates:,}, "
                'or rule="complete" to keep every candidate'
            )
        if isinstance(num_edges, bool) or not isinstance(num_edges, int):
            raise TypeError(f"num_edges must be a whole number, got {num_edges!r}")
        if not 1 <= num_edges <= num_candidates:
            raise ValueError(
                f"num_edges must lie between 1 and the {num_candidates:,} candidate edges of the "
                f"topology, got {num_edges:,}"
            )
        return num_edges

    def start_fan_in(self, topology: Topology, num_edges: int) -> Tensor:
        """Return how many real edges into each node to expect when a training begins ``[V]``.

        It is asked unless the :attr:`ranking` is among all.

        Args:
            topology: The candidates.
            num_edges: The budget ``k``.
        """
        return topology.rowptr.diff() * (num_edges / topology.num_candidates)

    def unfit(self, shape: Sequence[int]) -> str | None:
        """Return why a layer's weight of this shape cannot be made sparse, None if it can."""
        return None

    def init_state(self, candidates: Candidates) -> RuleState:
        """Return what the rule remembers of a new graph; random draws use PyTorch's generator.

        It may also change the weights, in place.
        """
        return {}

    @abstractmethod
    def select(self, candidates: Candidates) -> Tensor:
        """Return the ids of the real edges, ascending, int64; changes nothing.

        There are ``k`` of them at the end of a training, and in evaluation unless a rule says
        otherwise. It is asked anew whenever a graph is run, in recomputation and evaluation too.
        """

    def straight_through(self, progress: TrainingProgress) -> bool:
        """Return whether hallucinated edges have a gradient; if not, only real edges do."""
        return True

    def gradient_edges(self, candidates: Candidates, edge_id: Tensor) -> Tensor | None:
        """Return the ids of the edges that have a gradient, ascending, the real ones included.

        Args:
            candidates: What was chosen from.
            edge_id: What :meth:`select` returned.

        Returns:
            Ids, or None for what :meth:`straight_through` says: all candidates, or real edges.
        """
        return None

    def edge_weight(self, candidates: Candidates, edge_id: Tensor) -> Tensor | None:
        """Return the real edges' weights in this pass ``[k]``, None for the candidates' own.

        Their gradient goes to the candidates' own weights unchanged. Arguments are those of
        :meth:`gradient_edges`.
        """
        return None

    def selection(self, candidates: Candidates) -> Selection:
        """Return the answers to the questions above at once; changes nothing.

        A rule may do so itself where one comes out with another.
        """
        edge_id = self.select(candidates)
        gradient_id = self.gradient_edges(candidates, edge_id)
        return Selection(
            edge_id,
            gradient_id is None and self.straight_through(candidates.progress),
            gradient_id,
            self.edge_weight(candidates, edge_id),
        )

    def num_sampled(self, candidates: Candidates) -> int:
        """Return the number of hallucinated edges to sample the gradients of in this pass.

        Only a :attr:`timed` rule may ask for any; with several processes, all have to train.
        """
        return 0

    def penalty(self, weight: Tensor, progress: TrainingProgress) -> Tensor | None:
        """Return what is to be added to the loss, with a gradient to ``weight``."""
        return None

    def check_length(self, total_steps: int) -> None:  # noqa: B027
        """Raise or warn where a training is too short for the rule."""

    def before_step(  # noqa: B027  (most rules leave gradients as they are)
        self, candidates: Candidates, grad: Tensor, edge_id: Tensor
    ) -> None:
        """Change the gradient, in place, before the optimizer reads it.

        Args:
            candidates: As they are before the step.
            grad: Gradient of the step, one number a weight, reduced over all processes, and
                clipped if it is.
            edge_id: Real edges of the forward pass ``[k]``, ascending.
        """

    def hallucinated_weight(
        self, candidates: Candidates, grad: Tensor, edge_id: Tensor
    ) -> Tensor | None:
        """Return what hallucinated edges weigh after the step ``[E]``, or None.

        None leaves them to the optimizer, as real edges always are; what is returned for these is
        not read. It is called once a step, after :meth:`before_step` and with its arguments, and
        may change state.
        """
        return None

    def acts(self, progress: TrainingProgress) -> bool:
        """Return whether :meth:`after_step` is to be called now: always, if there is one.

        Where weights are sharded or not contiguous, a call takes copying them.
        """
        return type(self).after_step is not Rule.after_step

    def after_step(  # noqa: B027  (most rules do nothing here)
        self, candidates: Candidates, grad: Tensor | None, forget: Forget
    ) -> None:
        """Change state or weights, in place, after a step of the optimizer, where it :meth:`acts`.

        Args:
            candidates: As they are after the step; ``progress.step`` counts it.
            grad: Gradient of the step, one number a weight, reduced over all processes.
            forget: Clears the optimizer's momentum of candidates.
        """

    def inherit(self, candidates: Candidates, trained: Tensor) -> None:
        """Take up a wiring, in place, from the trained weights ``[E]`` of a complete graph."""
        raise ValueError(f"rule {RULES.name_of(self)} starts from itself, not from another run")


RULES = PartRegistry("rule", Rule)


def check_steps(**steps: int) -> None:
    """Raise where a number of steps, given by its name, is not a whole one above 0."""
    for name, number in steps.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(
                f"{name} must be a number of steps, whole and 1 or more, got {number!r}"
            )
