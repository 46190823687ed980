"""One graph's use of a rule: what the rule remembers of it, and the clock it goes by."""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from dnw_graph._deprecated import warn_renamed
from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule, TrainingProgress
from dnw_graph.wiring.sampling import Sampler, gathered
from dnw_graph.wiring.wiring import Selection, Wiring, check_ids


def whole(weight: Tensor) -> Tensor:
    """Return the whole of a weight of which this process may hold a shard only.

    Of a shard, every process has to call it.
    """
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _sharded(values: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`whole`: return values shared out among processes as another tensor is."""
    if not isinstance(like, DTensor):
        return values
    return distribute_tensor(values, like.device_mesh, like.placements)


class EdgeSelector(nn.Module):
    """Asks a rule, on behalf of one tensor of candidate weights, of any shape and memory format.

    Candidate ``i`` is the ``i``-th weight by rows, the last index fastest, unless the rule wants
    input channels last. Buffers hold what the rule remembers, each under its name, and for a timed
    rule ``clock``: steps done, steps in all, seed.

    Args:
        rule: The rule.
        topology: The candidates.
        num_edges: The budget ``k``.
    """

    clock: Tensor

    def __init__(self, rule: Rule, topology: Topology, num_edges: int) -> None:
        super().__init__()
        self.rule, self.topology, self.num_edges = rule, topology, num_edges
        self._read: tuple[int, list[int]] | None = None
        self._follows: object = None
        self._passing = _Passing()
        self._clock_is_loaded = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._clock_is_loaded |= f"{prefix}clock" in state_dict

    def __getstate__(self) -> dict[str, Any]:
        # An optimizer follows the original only.
        return {**self.__dict__, "_follows": None, "_passing": _Passing()}

    @property
    def num_weights(self) -> int:
        """How many weights are trained: one a candidate, or one a real edge."""
        return self.num_edges if self.rule.compact else self.topology.num_candidates

    @torch.no_grad()
    def weights_of_candidates(self, weight: Tensor) -> Tensor:
        """Return weights ``[E]``, NaN where hallucinated edges have none."""
        if not self.rule.compact:
            return self.flat(weight.detach()).clone()
        wiring = self.wiring(weight, training=False)
        every = weight.new_full((self.topology.num_candidates,), math.nan)
        return every.index_copy_(0, wiring.edge_id, wiring.edge_weight)

    @torch.no_grad()
    def set_weights_of_candidates(self, weight: Tensor, values: Tensor) -> None:
        """Set weights to those of ``[E]``, as far as edges have one."""
        if not self.rule.compact:
            weight.copy_(self.shaped(values, weight))
        else:
            wiring = self.wiring(weight, training=False)
            weight[wiring.slot] = values[wiring.edge_id].to(weight)

    def flat(self, weight: Tensor) -> Tensor:
        """Return weights as one row: a view of contiguous ones, a copy of others."""
        moved = weight.movedim(1, -1) if self._moves(weight) else weight
        return moved.reshape(-1)

    def shaped(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return a row in the shape of the weights."""
        if self._moves(weight):
            return values.view(weight.movedim(1, -1).shape).movedim(-1, 1)
        return values.view(weight.shape)

    def _write(self, flat: Tensor, weight: Tensor) -> None:
        """Write a row back to where :meth:`flat` had it from, if that was copied."""
        if flat.data_ptr() != weight.data_ptr():  # sharded, or not contiguous
            weight.detach().copy_(_sharded(self.shaped(flat, weight), weight))

    def _moves(self, weight: Tensor) -> bool:
        return self.rule.inputs_last and weight.dim() > 2

    def reset(self, weight: Tensor) -> None:
        """Begin anew with these weights, on their device."""
        self._passing, self._clock_is_loaded = _Passing(), False
        for name in list(self._buffers):
            delattr(self, name)
        if self.rule.timed:
            clock = torch.zeros(3, dtype=torch.int64, device="cpu")
            clock[2] = torch.randint(2**31, (), device="cpu")
            self.register_buffer("clock", clock.to(weight.device))
        flat = self.flat(weight.detach())
        blank = Candidates(flat, self.num_edges, self.topology, {}, TrainingProgress())
        for name, value in self.rule.init_state(blank).items():
            self.register_buffer(name, value.to(weight.device))
        self._write(flat, weight)

    def progress(self, training: bool) -> TrainingProgress:
        """Return when it is; a device is waited for only after something else wrote the clock.

        Raises:
            ValueError: Training with a rule that follows it, and no optimizer to be followed.
        """
        blind = self._follows is None and self.rule.follows_training
        if training and blind and torch.is_grad_enabled():
            raise self._not_attached()
        if not self.rule.timed:
            return TrainingProgress(training=training)
        version = -1 if self.clock.is_inference() else self.clock._version
        if self._read is None or self._read[0] != version or version < 0:
            self._read = version, self.clock.tolist()
        step, total, seed = self._read[1]
        if training and not total:
            raise self._not_attached()
        return TrainingProgress(step, total, seed, training)

    def _not_attached(self) -> ValueError:
        return ValueError(
            f"rule {RULES.name_of(self.rule)} has to be told of the steps of the training: "
            "call dnw_graph.attach(model, optimizer, total_steps=...) before it"
        )

    def candidates(self, weight: Tensor, training: bool) -> Candidates:
        """Return what the rule is asked about."""
        return self._candidates(self.flat(weight.detach()), self.progress(training))

    def _candidates(self, weight: Tensor, progress: TrainingProgress) -> Candidates:
        state = {name: b for name, b in self.named_buffers() if name != "clock"}
        return Candidates(weight, self.num_edges, self.topology, state, progress)

    def select(self, weight: Tensor, training: bool) -> Selection:
        """Return what the rule decides for a pass with these weights."""
        candidates = self.candidates(weight, training)
        selection = self.rule.selection(candidates)
        check_ids(selection.edge_id, self.topology.num_candidates)
        if self.rule.compact and (selection.slot is None or selection.straight_through):
            raise ValueError(
                f"rule {RULES.name_of(self.rule)} says compact = True, so its selection must have "
                "slot, and straight_through=False"
            )
        if selection.gradient_id is not None:
            check_ids(selection.gradient_id, self.topology.num_candidates)
        if training and self.rule.changes_gradients:
            self._passing.edge_id = selection.edge_id
        return selection

    def wiring(self, weight: Tensor, training: bool) -> Wiring:
        """Return the real edges at weights ``[E]``, or ``[k]`` with a compact rule."""
        wiring = Wiring.of(self.select(weight, training), weight, self.topology)
        if training and torch.is_grad_enabled():
            number = self.rule.num_sampled(self.candidates(weight, training))
            if number:
                first = weight.grad is None
                return replace(wiring, sampler=self._sampling(wiring, number, first))
        return wiring

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # generators are not traced
    def _sampling(self, wiring: Wiring, number: int, first: bool) -> Sampler:
        """Return what samples from the first pass after gradients were cleared up to the step."""
        sampler = self._passing.sampler
        if sampler is None or first:
            generator = self.progress(training=True).generator(wiring.edge_id.device)
            sampler = Sampler(self.topology, wiring.edge_id, number, generator)
            self._passing.sampler = sampler
        return sampler

    def start(self, follows: object, total_steps: int, restart: bool | None) -> str | None:
        """Set the clock for a training of some steps, which ``follows`` counts.

        Args:
            follows: What calls :meth:`before_step` and :meth:`after_step`.
            total_steps: Steps of the whole training.
            restart: As for :func:`dnw_graph.attach`.

        Returns:
            The time at which the clock was, if it was set to 0 without being asked to.
        """
        self._follows, self._passing = follows, _Passing()
        if not self.rule.timed:
            return None
        step, total, _ = self.clock.tolist()
        unfinished = self._clock_is_loaded and step < (total or total_steps)
        keeps = not restart and (restart is False or unfinished) and step < total_steps
        self._clock_is_loaded = False
        with torch.no_grad():
            self.clock[0], self.clock[1] = step if keeps else 0, total_steps
        return f"step {step:,} of {total:,}" if step and not keeps and not restart else None

    def is_followed_by(self, follows: object) -> bool:
        """Return whether this was the last to :meth:`start` the selector."""
        return self._follows is follows

    def leave(self, follows: object) -> None:
        """Follow no training any more, if it was this one."""
        if self.is_followed_by(follows):
            self._follows, self._passing = None, _Passing()

    def before_step(self, follows: object, weight: nn.Parameter) -> None:
        """Let the rule change the gradient before a step."""
        if follows is not self._follows or weight.grad is None or not self.rule.changes_gradients:
            return
        candidates = self.candidates(whole(weight.detach()), training=True)
        passed, self._passing.edge_id = self._passing.edge_id, None  # of this step's pass only
        edge_id = self.rule.select(candidates) if passed is None else passed
        grad = self.flat(whole(weight.grad))
        self.rule.before_step(candidates, grad, edge_id)
        moved = self.rule.hallucinated_weight(candidates, grad, edge_id)
        self._passing.moved = None if moved is None else (moved, edge_id)
        self._write(grad, weight.grad)

    def after_step(self, follows: object, weight: nn.Parameter, optimizer: Optimizer) -> None:
        """Count a step, and let the rule do what it does after one."""
        if follows is not self._follows:  # another optimizer was attached since, or this is a copy
            return
        if self.rule.timed:
            step, total, seed = self._tick()
            progress = TrainingProgress(step, total, seed, training=True)
        else:
            progress = TrainingProgress(training=True)
        passing, self._passing = self._passing, _Passing()
        self._clock_is_loaded = False
        if passing.moved is not None:
            self._move(weight, *passing.moved)
        if not weight.requires_grad or not self.rule.acts(progress):
            return
        flat = self.flat(whole(weight.detach()))
        grad = None if weight.grad is None else self.flat(whole(weight.grad))
        forget = _Forget(self, weight, optimizer)
        candidates = self._candidates(flat, progress)
        before = replace(candidates, progress=replace(progress, step=max(0, progress.step - 1)))
        if self.rule.num_sampled(before):
            none = torch.empty(0, dtype=torch.int64, device=flat.device)
            sampler = passing.sampler
            sample = (none, none.to(flat)) if sampler is None else sampler.result()
            candidates = replace(candidates, sampled=gathered(sample))
        self.rule.after_step(candidates, grad, forget)
        self._write(flat, weight)

    @torch.no_grad()
    def _move(self, weight: nn.Parameter, moved: Tensor, edge_id: Tensor) -> None:
        """Give hallucinated edges the weights that the rule wants them to have after a step."""
        moved[edge_id] = self.flat(whole(weight.detach()))[edge_id]
        weight.detach().copy_(_sharded(self.shaped(moved, weight), weight))

    def _tick(self) -> list[int]:
        """Advance the clock without waiting for its device."""
        progress = self.progress(training=True)
        self.clock[0] += 1
        now = [progress.step + 1, progress.total_steps, progress.seed]
        self._read = self.clock._version, now
        return now


@dataclass
class _Passing:
    """What is kept from a pass to the end of its step.

    Attributes:
        edge_id: The real edges of the last pass, for rules that change gradients.
        sampler: What samples gradients.
        moved: What hallucinated edges weigh after the step, and ids of the real ones.
    """

    edge_id: Tensor | None = None
    sampler: Sampler | None = None
    moved: tuple[Tensor, Tensor] | None = None


class _Forget:
    """Clears the momentum of candidates, whatever the optimizer calls it."""

    def __init__(self, selector: EdgeSelector, weight: nn.Parameter, optimizer: Optimizer) -> None:
        self._choice, self._weight, self._optimizer = selector, weight, optimizer

    def __call__(self, which: Tensor) -> None:
        for value in self._optimizer.state.get(self._weight, {}).values():
            if isinstance(value, Tensor) and value.shape == self._weight.shape:
                kept = torch.ones(value.numel(), dtype=value.dtype, device=value.device)
                kept[which] = 0
                value.mul_(_sharded(self._choice.shaped(kept, value), value))


class SelectorOwner(nn.Module):
    """A module with a selector of its own."""

    selector: EdgeSelector

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        old = f"{prefix}choice."  # until version 0.1
        for key in [key for key in state_dict if key.startswith(old)]:
            state_dict[f"{prefix}selector.{key.removeprefix(old)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def choice(self) -> EdgeSelector:
        """:attr:`selector`, by an earlier name."""
        warn_renamed("choice", "selector")
        return self.selector


class CandidateModule(SelectorOwner):
    """A module whose candidate weights a rule chooses from."""

    @property
    @abstractmethod
    def candidate_weight(self) -> nn.Parameter:
        """The candidate weights ``[E]``, or those of real edges ``[k]`` if the rule is compact."""


class NamedSelector(NamedTuple):
    """A selector somewhere in a model: the name of what has it, and the weights it is about."""

    name: str
    selector: EdgeSelector
    weight: nn.Parameter


def selectors(model: nn.Module) -> Iterator[NamedSelector]:
    """Yield every selector in a model once: of graphs, and of weights made sparse."""
    seen = set()
    for name, module in model.named_modules():
        found = []
        if isinstance(module, CandidateModule):
            found = [(module.selector, module.candidate_weight)]
        elif isinstance(module, ParametrizationList):
            weight: Any = module.original
            parts = [getattr(part, "selector", None) for part in module]
            found = [(selector, weight) for selector in parts if isinstance(selector, EdgeSelector)]
        for selector, weight in found:
            if id(selector) not in seen:
                seen.add(id(selector))
                yield NamedSelector(name, selector, weight)
