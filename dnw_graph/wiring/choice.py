"""One graph's use of a rule: what the rule remembers of it, and the clock it goes by."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import Candidates, Moment, Rule
from dnw_graph.wiring.wiring import Wiring


class Choice(nn.Module):
    """Asks a rule, on behalf of one vector of candidate weights.

    Buffers hold what the rule remembers, each under its name, and for a timed rule ``clock``: steps
    done, steps in all, seed.

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

    def reset(self, weight: Tensor) -> None:
        """Begin anew with weights ``[E]``, on their device."""
        for name in list(self._buffers):
            delattr(self, name)
        if self.rule.timed:
            clock = torch.zeros(3, dtype=torch.int64, device="cpu")
            clock[2] = torch.randint(2**31, (), device="cpu")
            self.register_buffer("clock", clock.to(weight.device))
        blank = Candidates(weight.detach(), self.num_edges, self.topology, {}, Moment())
        for name, value in self.rule.init_state(blank).items():
            self.register_buffer(name, value.to(weight.device))

    def moment(self, training: bool) -> Moment:
        """Return when it is; a device is waited for only after something else wrote the clock.

        Raises:
            ValueError: A timed rule in training, of which nobody counts the steps.
        """
        if not self.rule.timed:
            return Moment(training=training)
        version = -1 if self.clock.is_inference() else self.clock._version
        if self._read is None or self._read[0] != version or version < 0:
            self._read = version, self.clock.tolist()
        step, total, seed = self._read[1]
        if training and not total:
            raise ValueError(
                f"rule {type(self.rule).__name__} has to be told of the steps of the training: "
                "call dnw_graph.attach(model, optimizer, total_steps=...) before it"
            )
        return Moment(step, total, seed, training)

    def candidates(self, weight: Tensor, training: bool) -> Candidates:
        """Return what the rule is asked about."""
        state = {name: b for name, b in self.named_buffers() if name != "clock"}
        moment = self.moment(training)
        return Candidates(weight.detach(), self.num_edges, self.topology, state, moment)

    def wiring(self, weight: Tensor, training: bool) -> Wiring:
        """Return the real edges at weights ``[E]``."""
        candidates = self.candidates(weight, training)
        edge_id = self.rule.select(candidates)
        hallucinated = self.rule.straight_through(candidates.moment)
        return Wiring.of(edge_id, weight, self.topology, hallucinated)

    def start(self, follows: object, total_steps: int) -> None:
        """Set the clock to 0 of some steps, which ``follows`` counts."""
        self._follows = follows
        if self.rule.timed:
            with torch.no_grad():
                self.clock[0], self.clock[1] = 0, total_steps

    def after_step(self, follows: object, weight: nn.Parameter, optimizer: Optimizer) -> None:
        """Count a step, and let the rule do what it does after one."""
        if follows is not self._follows:  # another optimizer was attached since, or this is a copy
            return
        if self.rule.timed:
            step, total, seed = self._tick()
            moment = Moment(step, total, seed, training=True)
        else:
            moment = Moment(training=True)
        state = {name: b for name, b in self.named_buffers() if name != "clock"}
        candidates = Candidates(weight.detach(), self.num_edges, self.topology, state, moment)
        self.rule.after_step(candidates, weight.grad, _Forget(weight, optimizer))

    def _tick(self) -> list[int]:
        """Advance the clock without waiting for its device."""
        moment = self.moment(training=True)
        self.clock[0] += 1
        now = [moment.step + 1, moment.total_steps, moment.seed]
        self._read = self.clock._version, now
        return now


class _Forget:
    """Clears the momentum of candidates, whatever the optimizer calls it."""

    def __init__(self, weight: nn.Parameter, optimizer: Optimizer) -> None:
        self._weight, self._optimizer = weight, optimizer

    def __call__(self, which: Tensor) -> None:
        for value in self._optimizer.state.get(self._weight, {}).values():
            if isinstance(value, Tensor) and value.shape == self._weight.shape:
                value[which] = 0


class Wired(nn.Module):
    """A module whose candidate weights a rule chooses from."""

    choice: Choice

    @property
    @abstractmethod
    def candidate_weight(self) -> nn.Parameter:
        """The candidate weights ``[E]``."""


def _wired(model: nn.Module) -> Iterator[tuple[str, Wired]]:
    for name, module in model.named_modules():
        if isinstance(module, Wired):
            yield name, module


def attach(model: nn.Module, optimizer: Optimizer, *, total_steps: int) -> RemovableHandle:
    """Let the rules of all graphs in a model follow a training; call it before the first step.

    Rules that change with time or do something after a step need it; for others it does nothing.
    It sets their clocks to 0; load a checkpoint of the model afterwards to go on where that was.

    Args:
        model: The model.
        optimizer: What updates its weights.
        total_steps: Steps of the whole training.

    Returns:
        A handle, whose ``remove()`` undoes it.

    Raises:
        ValueError: No steps, or an optimizer that does not hold the weights of every graph.
    """
    if total_steps < 1:
        raise ValueError(f"total_steps must be 1 or more, got {total_steps}")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = list(_wired(model))
    for name, module in found:
        if id(module.candidate_weight) not in held:
            raise ValueError(
                f"the optimizer does not hold the edge weights of {name or 'the graph'}; give it "
                "model.parameters(), of the model as it is now"
            )
    token = object()
    for _, module in found:
        module.choice.start(token, total_steps)

    def follow(used: Optimizer, args: Any, kwargs: Any) -> None:
        for _, module in found:
            module.choice.after_step(token, module.candidate_weight, used)

    handle: RemovableHandle = optimizer.register_step_post_hook(follow)
    return handle


def penalty(model: nn.Module) -> Tensor | float:
    """Return what the rules of a model add to its loss: 0.0 where none adds anything."""
    terms = []
    for _, module in _wired(model):
        choice = module.choice
        term = choice.rule.penalty(module.candidate_weight, choice.moment(module.training))
        terms += [] if term is None else [term]
    return torch.stack(terms).sum() if terms else 0.0


def inherit(
    model: nn.Module, *, initial: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> None:
    """Let a model with rule ``lottery`` or ``fine_tune`` start from a trained complete one.

    Args:
        model: The model, whose graphs keep the largest of the trained weights.
        initial: ``state_dict`` of the complete model before its training.
        trained: Likewise after it.

    Raises:
        ValueError: A rule that starts from itself, or the state of another model.
    """
    graphs = list(_wired(model))
    sources = {module.choice.rule.starts_from for _, module in graphs}
    given = {"initial": initial, "trained": trained}
    if len(sources) != 1 or not sources <= given.keys():
        raise ValueError("only models whose graphs have rule lottery or fine_tune inherit a wiring")
    own = [f"{name}.choice.".lstrip(".") for name, _ in graphs]
    taken = {k: v for k, v in given[sources.pop()].items() if not k.startswith(tuple(own))}
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(tuple(own))}
    apart = sorted(taken.keys() ^ expected.keys())
    apart += [k for k in taken.keys() & expected.keys() if taken[k].shape != expected[k].shape]
    if apart:
        raise ValueError(f"these are weights of another model: they differ at {apart[0]}")
    model.load_state_dict(taken, strict=False)
    for _, module in graphs:
        key = next(n for n, p in model.named_parameters() if p is module.candidate_weight)
        candidates = module.choice.candidates(module.candidate_weight, training=False)
        module.choice.rule.inherit(candidates, trained[key].to(candidates.weight))
