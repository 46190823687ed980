"""Interface of rules: the base class, what it is passed, and the registry."""

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
"""State of a rule for one graph, stored in buffers, so checkpoints and ``.to()`` include it."""

Forget = Callable[[Tensor], None]
"""Clears the optimizer's state (momentum) of the weights at some indices, or in a mask of all."""


@dataclass(frozen=True)
class TrainingProgress:
    """Progress of a training run when a rule is called.

    Attributes:
        step: Optimizer steps done so far.
        total_steps: Steps of the whole training run, 0 if unknown.
        seed: Seed of this graph's random draws.
        training: Whether the graph is in training mode.
    """

    step: int = 0
    total_steps: int = 0
    seed: int = 0
    training: bool = False

    @property
    def fraction(self) -> float:
        """Share of the training run that is done, 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps else 0.0

    @property
    def progress(self) -> float:
        """Deprecated name of :attr:`fraction`."""
        warn_renamed("progress.progress", "progress.fraction")
        return self.fraction

    def generator(self, device: torch.device) -> torch.Generator:
        """Return a random number generator that depends only on the graph's seed and the step."""
        # PyTorch's CPU generator uses only 32 bits of a seed, so both numbers are mixed into these.
        mixed = np.random.SeedSequence([self.seed, self.step]).generate_state(1)[0]
        return torch.Generator(device).manual_seed(int(mixed))


@dataclass(frozen=True)
class Candidates:
    """The candidates that a rule chooses from, with its state and the progress of training.

    Attributes:
        weight: Candidate weights ``[E]``, without a gradient. If the rule is
            :attr:`~Rule.compact`, only the weights of real edges ``[k]``, in any order.
        num_edges: The budget ``k``.
        topology: The candidates.
        state: The state that :meth:`Rule.init_state` returned for this graph.
        progress: Progress of the training run.
        sampled: After a step, ids ``[n]``, ascending, and gradients ``[n]`` of hallucinated edges,
            if :meth:`Rule.num_sampled` requested some.
    """

    weight: Tensor
    num_edges: int
    topology: Topology
    state: RuleState
    progress: TrainingProgress
    sampled: tuple[Tensor, Tensor] | None = None

    @property
    def moment(self) -> TrainingProgress:
        """Deprecated name of :attr:`progress`."""
        warn_renamed("candidates.moment", "candidates.progress")
        return self.progress


class NeverActsWarning(UserWarning):
    """Warning that a training run is too short for its rule ever to act."""


class Rule(ABC):
    """Base class of rules, which decide which candidate edges are real.

    A rule object holds settings only, so it may be used by several graphs. The state for one graph
    is created by :meth:`init_state`, passed to every method in :class:`Candidates`, and changed
    only during a step, in :meth:`hallucinated_weight` and :meth:`after_step`.
    """

    #: Weights that a run with this rule starts from: its own, or the initial or trained weights of
    #: another run, whose largest trained edges it keeps (see :meth:`inherit`).
    starts_from: Literal["itself", "initial", "trained"] = "itself"

    #: Whether the candidates of a sparse layer are numbered with the input channel as the last
    #: index, after the position in the filter, rather than in storage order.
    inputs_last: bool = False

    #: Whether the rule, rather than the user, determines the number of real edges.
    sets_budget: bool = False

    #: The candidates among which the first real edges have the largest ``|w|``: all of them, or
    #: those into the same node; "none" if real edges are drawn at random or all are real.
    ranking: Literal["all", "node", "none"] = "all"

    #: Whether only real edges have weights ``[k]``; ``slot`` of the :meth:`selection` then says
    #: which weight belongs to which edge.
    compact: bool = False

    @property
    def timed(self) -> bool:
        """Whether the rule depends on the training step, which ``attach`` provides."""
        return False

    @property
    def changes_gradients(self) -> bool:
        """Whether the rule overrides :meth:`before_step` or :meth:`hallucinated_weight`."""
        overrides_weight = type(self).hallucinated_weight is not Rule.hallucinated_weight
        return overrides_weight or type(self).before_step is not Rule.before_step

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
        """Return the number of real edges ``k``; raise if the requested number is not possible.

        Args:
            num_edges: The number that the user requested.
            topology: The candidates.

        Raises:
            ValueError: If ``num_edges`` is None, below 1, or above the number of candidates.
            TypeError: If ``num_edges`` is not a whole number.
        """
        num_candidates = topology.num_candidates
        if num_edges is None:
            raise ValueError(
                "num_edges, the number of real edges, is missing: pass a number from 1 to "
                f'{num_candidates:,}, or rule="complete" to keep every candidate'
            )
        if isinstance(num_edges, bool) or not isinstance(num_edges, int):
            raise TypeError(f"num_edges must be a whole number, got {num_edges!r}")
        if not 1 <= num_edges <= num_candidates:
            raise ValueError(
                "num_edges must be between 1 and the number of candidate edges of the topology, "
                f"{num_candidates:,}, got {num_edges:,}"
            )
        return num_edges

    def start_fan_in(self, topology: Topology, num_edges: int) -> Tensor:
        """Return the expected number of real edges into each node when training starts ``[V]``.

        Not called if :attr:`ranking` is "all".

        Args:
            topology: The candidates.
            num_edges: The budget ``k``.
        """
        return topology.rowptr.diff() * (num_edges / topology.num_candidates)

    def unfit(self, shape: Sequence[int]) -> str | None:
        """Return the reason why a layer's weight of this shape cannot be sparse, None if it can."""
        return None

    def init_state(self, candidates: Candidates) -> RuleState:
        """Return the rule's state for a new graph.

        It may also change the weights, in place. Random draws use PyTorch's global generator.
        """
        return {}

    @abstractmethod
    def select(self, candidates: Candidates) -> Tensor:
        """Return the ids of the real edges, int64, ascending; must not change anything.

        There are ``k`` ids at the end of a training run, and in evaluation unless a rule documents
        otherwise. Called whenever a graph is run, including recomputation and evaluation.
        """

    def straight_through(self, progress: TrainingProgress) -> bool:
        """Return whether hallucinated edges have a gradient; if not, only real edges do."""
        return True

    def gradient_edges(self, candidates: Candidates, edge_id: Tensor) -> Tensor | None:
        """Return the ids of the edges that have a gradient, ascending, including the real ones.

        Args:
            candidates: The candidates, as passed to :meth:`select`.
            edge_id: Ids of the real edges, as :meth:`select` returned them.

        Returns:
            The ids, or None if :meth:`straight_through` decides: all candidates, or the real edges.
        """
        return None

    def edge_weight(self, candidates: Candidates, edge_id: Tensor) -> Tensor | None:
        """Return the weights of the real edges in this pass ``[k]``, or None for the stored ones.

        Their gradient goes to the stored weights unchanged. The arguments are those of
        :meth:`gradient_edges`.
        """
        return None

    def selection(self, candidates: Candidates) -> Selection:
        """Return the results of the four methods above; must not change anything.

        A rule may override this if it computes several of them together.
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
        """Return the number of hallucinated edges whose gradients are sampled in this pass.

        Only a :attr:`timed` rule may return more than 0. With several processes, all of them must
        train.
        """
        return 0

    def penalty(self, weight: Tensor, progress: TrainingProgress) -> Tensor | None:
        """Return a term to add to the loss, differentiable in ``weight``, or None."""
        return None

    def check_length(self, total_steps: int) -> None:  # noqa: B027
        """Raise or warn if a training run is too short for the rule."""

    def before_step(  # noqa: B027  (most rules do not change gradients)
        self, candidates: Candidates, grad: Tensor, edge_id: Tensor
    ) -> None:
        """Change the gradient, in place, before the optimizer reads it.

        Args:
            candidates: The candidates before the step.
            grad: Gradient of the step, one number per weight, reduced over all processes, and
                after clipping if there is any.
            edge_id: Ids of the real edges of the forward pass ``[k]``, ascending.
        """

    def hallucinated_weight(
        self, candidates: Candidates, grad: Tensor, edge_id: Tensor
    ) -> Tensor | None:
        """Return the weights of hallucinated edges after the step ``[E]``, or None.

        If None, the optimizer updates them. It always updates real edges: the values returned for
        them are not read. Called once per step, after :meth:`before_step` and with the same
        arguments; may change the state.
        """
        return None

    def acts(self, progress: TrainingProgress) -> bool:
        """Return whether to call :meth:`after_step` after this step; by default, if overridden.

        If weights are sharded or not contiguous, each call copies them.
        """
        return type(self).after_step is not Rule.after_step

    def after_step(  # noqa: B027  (most rules do nothing here)
        self, candidates: Candidates, grad: Tensor | None, forget: Forget
    ) -> None:
        """Change state or weights, in place, after an optimizer step, if :meth:`acts` is True.

        Args:
            candidates: The candidates after the step; ``progress.step`` includes it.
            grad: Gradient of the step, one number per weight, reduced over all processes.
            forget: Clears the optimizer's momentum of candidates.
        """

    def inherit(self, candidates: Candidates, trained: Tensor) -> None:
        """Set the wiring, in place, from the trained weights ``[E]`` of a complete graph.

        Raises:
            ValueError: If the rule does not start from another run (:attr:`starts_from`).
        """
        raise ValueError(
            f"rule {RULES.name_of(self)} does not start from the weights of another run"
        )


RULES = PartRegistry("rule", Rule)


def check_steps(**steps: int) -> None:
    """Raise ValueError if a number of steps, passed by name, is not a whole number above 0."""
    for name, number in steps.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name} must be a whole number of steps, 1 or more, got {number!r}")
