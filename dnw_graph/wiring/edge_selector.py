"""Application of a rule to one tensor of candidate weights, with its state and its clock."""

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from dnw_graph._deprecated import warn_renamed
from dnw_graph._wrapped import check_network
from dnw_graph.topology import Topology
from dnw_graph.wiring.base import RULES, Candidates, Rule, TrainingProgress
from dnw_graph.wiring.sampling import Sampler, gathered
from dnw_graph.wiring.wiring import Selection, Wiring, check_ids


def whole(weight: Tensor) -> Tensor:
    """Return the whole weight if it is sharded over processes, otherwise the weight itself.

    If it is sharded, every process must call this.
    """
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _sharded(values: Tensor, like: Tensor) -> Tensor:
    """Return whole values sharded over processes as another tensor is; reverses :func:`whole`."""
    if not isinstance(like, DTensor):
        return values
    return distribute_tensor(values, like.device_mesh, like.placements)


class EdgeSelector(nn.Module):
    """Applies a rule to one tensor of candidate weights, of any shape and memory format.

    Candidate ``i`` is the ``i``-th weight in row-major order, after moving input channels to the
    last dimension if the rule requires that. Buffers hold the state of the rule, by name, and for a
    timed rule also ``clock``: steps done, total steps, seed.

    Args:
        rule: The rule.
        topology: The candidates.
        num_edges: The budget ``k``.
    """

    clock: Tensor

    def __init__(self, rule: Rule, topology: Topology, num_edges: int) -> None:
        super().__init__()
        self.rule, self.topology, self.num_edges = rule, topology, num_edges
        self._clock_cache: tuple[int, list[int]] | None = None
        self._attachment: object = None
        self._step_state = _StepState()
        self._clock_is_loaded = False

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}clock" in state_dict:
            self._clock_is_loaded, self._clock_cache = True, None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        values = self._clock_values() if self.rule.timed and self._clock_is_cached() else None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if values is not None:
            self._cache_clock(values)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Only the original is attached to an optimizer. Its version of the clock may be that of
        # other values in a copy.
        own = {"_attachment": None, "_step_state": _StepState(), "_clock_cache": None}
        return {**self.__dict__, **own}

    @property
    def num_weights(self) -> int:
        """Number of stored weights: one per candidate, or one per real edge."""
        return self.num_edges if self.rule.compact else self.topology.num_candidates

    @torch.no_grad()
    def weights_of_candidates(self, weight: Tensor) -> Tensor:
        """Return weights ``[E]``, NaN for hallucinated edges that have no weight."""
        if not self.rule.compact:
            return self.flat(weight.detach()).clone()
        wiring = self.wiring(weight, training=False)
        weights = weight.new_full((self.topology.num_candidates,), math.nan)
        return weights.index_copy_(0, wiring.edge_id, wiring.edge_weight)

    @torch.no_grad()
    def set_weights_of_candidates(self, weight: Tensor, values: Tensor) -> None:
        """Set the stored weights from values ``[E]``, ignoring edges without a stored weight."""
        if not self.rule.compact:
            weight.copy_(self.shaped(values, weight))
        else:
            wiring = self.wiring(weight, training=False)
            weight[wiring.slot] = values[wiring.edge_id].to(weight)

    def flat(self, weight: Tensor) -> Tensor:
        """Return the weights as one row ``[E]``: a view if they are contiguous, else a copy."""
        return self._with_inputs_last(weight).reshape(-1)

    def _with_inputs_last(self, weight: Tensor) -> Tensor:
        """Return the weights with input channels in the last dimension, if the rule requires it."""
        return weight.movedim(1, -1) if self._moves_inputs_last(weight) else weight

    def shaped(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return a row of values in the shape of the weights."""
        if self._moves_inputs_last(weight):
            return values.view(weight.movedim(1, -1).shape).movedim(-1, 1)
        return values.view(weight.shape)

    def _write(self, flat: Tensor, weight: Tensor) -> None:
        """Write a row back to the weights if :meth:`flat` copied it from them."""
        if isinstance(weight, DTensor) or not self._with_inputs_last(weight).is_contiguous():
            weight.detach().copy_(_sharded(self.shaped(flat, weight), weight))

    def _moves_inputs_last(self, weight: Tensor) -> bool:
        return self.rule.inputs_last and weight.dim() > 2

    def reset(self, weight: Tensor) -> None:
        """Initialise the buffers for these weights, on their device."""
        self._step_state, self._clock_is_loaded = _StepState(), False
        for name in list(self._buffers):
            delattr(self, name)
        if self.rule.timed:
            clock = torch.zeros(3, dtype=torch.int64, device="cpu")
            clock[2] = torch.randint(2**31, (), device="cpu")
            self.register_buffer("clock", clock.to(weight.device))
            self._cache_clock(clock.tolist())
        flat = self.flat(weight.detach())
        blank = Candidates(flat, self.num_edges, self.topology, {}, TrainingProgress())
        for name, value in self._checked_state(self.rule.init_state(blank)).items():
            value = value.clone() if value is flat else value  # not the weights themselves
            self.register_buffer(name, value.to(weight.device))
        self._write(flat, weight)

    def _checked_state(self, state: Any) -> dict[str, Tensor]:
        """Return what ``init_state`` returned, or raise TypeError or ValueError."""
        tensors = isinstance(state, dict) and all(isinstance(v, Tensor) for v in state.values())
        if not tensors:
            raise TypeError(
                f"init_state of rule {RULES.name_of(self.rule)} must return a dictionary of "
                f"tensors, such as {{}}, got {repr(state)[:60]}"
            )
        for name in state:
            if not isinstance(name, str) or not name.isidentifier() or hasattr(self, name):
                raise ValueError(
                    f"init_state of rule {RULES.name_of(self.rule)} cannot name a tensor {name!r}: "
                    "use another name, of letters, digits and underscores"
                )
        return state

    def _check_in_place(self, candidates: Candidates) -> None:
        """Raise ValueError if a rule replaced a tensor of its state, which is not stored."""
        for name, value in candidates.state.items():
            if self._buffers.get(name) is not value:
                raise ValueError(
                    f"rule {RULES.name_of(self.rule)} assigned candidates.state[{name!r}], which "
                    "is not stored: change tensors of init_state in place, as with copy_"
                )

    def progress(self, training: bool) -> TrainingProgress:
        """Return the progress of the training run.

        Does not wait for the device while an optimizer is attached.

        Raises:
            ValueError: If the rule follows training, but no optimizer is attached.
        """
        is_unattached = self._attachment is None and self.rule.follows_training
        if training and is_unattached and torch.is_grad_enabled():
            raise self._not_attached()
        if not self.rule.timed:
            return TrainingProgress(training=training)
        step, total, seed = self._clock_values()
        if training and not total:
            raise self._not_attached()
        return TrainingProgress(step, total, seed, training)

    def _clock_values(self) -> list[int]:
        """Return the values of the clock, from the host if they are cached there."""
        if self._clock_cache is None or not self._clock_is_cached():
            self._cache_clock(self.clock.tolist())
            assert self._clock_cache is not None
        return self._clock_cache[1]

    def _clock_is_cached(self) -> bool:
        """Return whether the values on the host are those of the buffer.

        While an optimizer is attached, only the selector changes the clock. Others may write the
        same values: DDP, for example, broadcasts buffers before each forward pass.
        """
        if self._clock_cache is None:
            return False
        is_same = not self.clock.is_inference() and self._clock_cache[0] == self.clock._version
        return self._attachment is not None or is_same

    def _cache_clock(self, values: list[int]) -> None:
        """Keep the values of the clock on the host."""
        version = -1 if self.clock.is_inference() else self.clock._version
        self._clock_cache = version, values

    def _not_attached(self) -> ValueError:
        return ValueError(
            f"rule {RULES.name_of(self.rule)} needs to follow the steps of the training run: "
            "call dnw_graph.attach(model, optimizer, total_steps=...) before training"
        )

    def candidates(self, weight: Tensor, training: bool) -> Candidates:
        """Return the candidates that the rule chooses from."""
        return self._candidates(self.flat(weight.detach()), self.progress(training))

    def _candidates(self, weight: Tensor, progress: TrainingProgress) -> Candidates:
        state = {name: buffer for name, buffer in self.named_buffers() if name != "clock"}
        return Candidates(weight, self.num_edges, self.topology, state, progress)

    def select(self, weight: Tensor, training: bool) -> Selection:
        """Return the rule's selection for a pass with these weights."""
        candidates = self.candidates(weight, training)
        selection = self.rule.selection(candidates)
        check_ids(selection.edge_id, self.topology.num_candidates)
        if self.rule.compact and (selection.slot is None or selection.straight_through):
            raise ValueError(
                f"rule {RULES.name_of(self.rule)} has compact = True, so its selection must have "
                "slot, and straight_through=False"
            )
        if selection.gradient_id is not None:
            check_ids(selection.gradient_id, self.topology.num_candidates)
        if selection.edge_weight is not None:
            self._check_weights("edge_weight", selection.edge_weight, len(selection.edge_id))
        if training and self.rule.changes_gradients:
            self._step_state.edge_id = selection.edge_id
        return selection

    def _check_weights(self, method: str, weights: Any, number: int) -> None:
        """Raise ValueError if a method of the rule did not return this number of weights."""
        if not isinstance(weights, Tensor) or weights.shape != (number,):
            shape = list(weights.shape) if isinstance(weights, Tensor) else repr(weights)[:60]
            raise ValueError(
                f"{method} of rule {RULES.name_of(self.rule)} must return weights [{number}], got "
                f"{shape}"
            )

    def wiring(self, weight: Tensor, training: bool) -> Wiring:
        """Return the wiring for weights ``[E]``, or ``[k]`` if the rule is compact."""
        wiring = Wiring.of(self.select(weight, training), weight, self.topology)
        if training and torch.is_grad_enabled():
            number = self.rule.num_sampled(self.candidates(weight, training))
            if number:
                is_first = weight.grad is None
                return replace(wiring, sampler=self._sampler(wiring, number, is_first))
        return wiring

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # generators are not traced
    def _sampler(self, wiring: Wiring, number: int, is_first: bool) -> Sampler:
        """Return the sampler of this step, new in the first pass after gradients were cleared."""
        sampler = self._step_state.sampler
        if sampler is None or is_first:
            generator = self.progress(training=True).generator(wiring.edge_id.device)
            sampler = Sampler(self.topology, wiring.edge_id, number, generator)
            self._step_state.sampler = sampler
        return sampler

    def start(self, follows: object, total_steps: int, restart: bool | None) -> str | None:
        """Set the clock for a training run.

        Args:
            follows: The object that follows the run and calls :meth:`before_step` and
                :meth:`after_step`.
            total_steps: Steps of the whole training run.
            restart: As for :func:`dnw_graph.attach`.

        Returns:
            The old time of the clock, if it was reset to 0 although ``restart`` is not True;
            otherwise None.
        """
        self._step_state = _StepState()
        old = self._clock_values() if self.rule.timed else None
        self._attachment = follows
        if old is None:
            return None
        step, total, seed = old
        is_unfinished = self._clock_is_loaded and step < (total or total_steps)
        resume = not restart and (restart is False or is_unfinished) and step < total_steps
        self._clock_is_loaded = False
        with torch.no_grad():
            self.clock[0], self.clock[1] = step if resume else 0, total_steps
        self._cache_clock([step if resume else 0, total_steps, seed])
        return f"step {step:,} of {total:,}" if step and not resume and not restart else None

    def is_followed_by(self, follows: object) -> bool:
        """Return whether ``follows`` was the last object passed to :meth:`start`."""
        return self._attachment is follows

    def leave(self, follows: object) -> None:
        """Stop following the training run, if ``follows`` is the object that follows it."""
        if self.is_followed_by(follows):
            self._attachment, self._step_state = None, _StepState()

    def before_step(self, follows: object, weight: nn.Parameter) -> None:
        """Let the rule change the gradient before an optimizer step."""
        if follows is not self._attachment:
            return
        if weight.grad is None or not self.rule.changes_gradients:
            return
        candidates = self.candidates(whole(weight.detach()), training=True)
        edge_id, self._step_state.edge_id = self._step_state.edge_id, None  # valid for one step
        if edge_id is None:
            edge_id = self.rule.select(candidates)
        grad = self.flat(whole(weight.grad))
        self.rule.before_step(candidates, grad, edge_id)
        values = self.rule.hallucinated_weight(candidates, grad, edge_id)
        if values is not None:
            self._check_weights("hallucinated_weight", values, self.topology.num_candidates)
        self._check_in_place(candidates)
        self._step_state.hallucinated = None if values is None else (values, edge_id)
        self._write(grad, weight.grad)

    def after_step(self, follows: object, weight: nn.Parameter, optimizer: Optimizer) -> None:
        """Count an optimizer step, and let the rule act after it."""
        if follows is not self._attachment:  # this is a copy, or another optimizer was attached
            return
        if self.rule.timed:
            step, total, seed = self._tick()
            progress = TrainingProgress(step, total, seed, training=True)
        else:
            progress = TrainingProgress(training=True)
        step_state, self._step_state = self._step_state, _StepState()
        self._clock_is_loaded = False
        if step_state.hallucinated is not None:
            self._set_hallucinated(weight, *step_state.hallucinated)
        if not weight.requires_grad or not self.rule.acts(progress):
            return
        flat = self.flat(whole(weight.detach()))
        grad = None if weight.grad is None else self.flat(whole(weight.grad))
        forget = _Forget(self, weight, optimizer)
        candidates = self._candidates(flat, progress)
        before = replace(candidates, progress=replace(progress, step=max(0, progress.step - 1)))
        if self.rule.num_sampled(before):
            no_ids = torch.empty(0, dtype=torch.int64, device=flat.device)
            sampler = step_state.sampler
            sample = (no_ids, no_ids.to(flat)) if sampler is None else sampler.result()
            candidates = replace(candidates, sampled=gathered(sample))
        self.rule.after_step(candidates, grad, forget)
        self._check_in_place(candidates)
        self._write(flat, weight)

    @torch.no_grad()
    def _set_hallucinated(self, weight: nn.Parameter, values: Tensor, edge_id: Tensor) -> None:
        """Set the weights of hallucinated edges from values ``[E]``, which may be overwritten."""
        values[edge_id] = self.flat(whole(weight.detach()))[edge_id]
        weight.detach().copy_(_sharded(self.shaped(values, weight), weight))

    def _tick(self) -> list[int]:
        """Advance the clock without waiting for its device, and return its values."""
        progress = self.progress(training=True)
        self.clock[0] += 1
        values = [progress.step + 1, progress.total_steps, progress.seed]
        self._cache_clock(values)
        return values


@dataclass
class _StepState:
    """State from a forward pass to the end of its optimizer step.

    Attributes:
        edge_id: Ids of the real edges of the last pass, for rules that change gradients.
        sampler: The sampler of gradients, if the rule uses one.
        hallucinated: Weights after the step ``[E]``, to be set for hallucinated edges, and ids of
            the real edges ``[k]``.
    """

    edge_id: Tensor | None = None
    sampler: Sampler | None = None
    hallucinated: tuple[Tensor, Tensor] | None = None


class _Forget:
    """Clears the momentum of candidates, regardless of its name in the optimizer's state."""

    def __init__(self, selector: EdgeSelector, weight: nn.Parameter, optimizer: Optimizer) -> None:
        self._selector, self._weight, self._optimizer = selector, weight, optimizer

    def __call__(self, indices: Tensor) -> None:
        for value in self._optimizer.state.get(self._weight, {}).values():
            if isinstance(value, Tensor) and value.shape == self._weight.shape:
                mask = torch.ones(value.numel(), dtype=value.dtype, device=value.device)
                mask[indices] = 0
                value.mul_(_sharded(self._selector.shaped(mask, value), value))


class SelectorOwner(nn.Module):
    """A module that has an :class:`EdgeSelector`."""

    selector: EdgeSelector

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        old = f"{prefix}choice."  # its earlier name
        for key in [key for key in state_dict if key.startswith(old)]:
            state_dict[f"{prefix}selector.{key.removeprefix(old)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def choice(self) -> EdgeSelector:
        """Deprecated name of :attr:`selector`."""
        warn_renamed("choice", "selector")
        return self.selector


class CandidateModule(SelectorOwner):
    """A module whose candidate weights a rule chooses from."""

    @property
    @abstractmethod
    def candidate_weight(self) -> nn.Parameter:
        """Candidate weights ``[E]``, or weights of real edges ``[k]`` if the rule is compact."""


class NamedSelector(NamedTuple):
    """A selector in a model, with the name of its module and the weights it selects from."""

    name: str
    selector: EdgeSelector
    weight: nn.Parameter


def selectors(model: nn.Module) -> Iterator[NamedSelector]:
    """Yield every selector of a model once: those of graphs and those of sparse weights."""
    check_network(model)
    seen = set()
    for name, module in model.named_modules():
        pairs = []
        if isinstance(module, CandidateModule):
            pairs = [(module.selector, module.candidate_weight)]
        elif isinstance(module, ParametrizationList):
            weight: Any = module.original
            parts = [getattr(part, "selector", None) for part in module]
            pairs = [(selector, weight) for selector in parts if isinstance(selector, EdgeSelector)]
        for selector, weight in pairs:
            if id(selector) not in seen:
                seen.add(id(selector))
                yield NamedSelector(name, selector, weight)
