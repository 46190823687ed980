"""One graph's use of a rule: what the rule remembers of it, and the clock it goes by."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from dnw_graph.topology import Topology
from dnw_graph.wiring.base import Candidates, Moment, Rule
from dnw_graph.wiring.wiring import Wiring


class Choice(nn.Module):
    """Asks a rule, on behalf of one tensor of candidate weights, of any shape and memory format.

    Candidate ``i`` is the ``i``-th weight by rows, the last index fastest, unless the rule wants
    input channels last. Buffers hold what the
    rule remembers, each under its name, and for a timed rule ``clock``: steps done, steps in all,
    seed.

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

    def flat(self, weight: Tensor) -> Tensor:
        """Return weights as ``[E]``: a view of contiguous ones, a copy of others."""
        moved = weight.movedim(1, -1) if self._moves(weight) else weight
        return moved.reshape(-1)

    def shaped(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return ``[E]`` in the shape of the weights."""
        if self._moves(weight):
            return values.view(weight.movedim(1, -1).shape).movedim(-1, 1)
        return values.view(weight.shape)

    def _moves(self, weight: Tensor) -> bool:
        return self.rule.inputs_last and weight.dim() > 2

    def reset(self, weight: Tensor) -> None:
        """Begin anew with these weights, on their device."""
        for name in list(self._buffers):
            delattr(self, name)
        if self.rule.timed:
            clock = torch.zeros(3, dtype=torch.int64, device="cpu")
            clock[2] = torch.randint(2**31, (), device="cpu")
            self.register_buffer("clock", clock.to(weight.device))
        weight = self.flat(weight.detach())
        blank = Candidates(weight, self.num_edges, self.topology, {}, Moment())
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
        return self._candidates(self.flat(weight.detach()), self.moment(training))

    def _candidates(self, weight: Tensor, moment: Moment) -> Candidates:
        state = {name: b for name, b in self.named_buffers() if name != "clock"}
        return Candidates(weight, self.num_edges, self.topology, state, moment)

    def select(self, weight: Tensor, training: bool) -> tuple[Tensor, bool]:
        """Return the ids of the real edges, and whether hallucinated ones have a gradient."""
        candidates = self.candidates(weight, training)
        edge_id = self.rule.select(candidates)
        return edge_id, self.rule.straight_through(candidates.moment)

    def wiring(self, weight: Tensor, training: bool) -> Wiring:
        """Return the real edges at weights ``[E]``."""
        edge_id, straight_through = self.select(weight, training)
        return Wiring.of(edge_id, weight, self.topology, straight_through)

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
        own = weight.detach()
        flat = self.flat(own)
        grad = None if weight.grad is None else self.flat(weight.grad)
        forget = _Forget(self, weight, optimizer)
        self.rule.after_step(self._candidates(flat, moment), grad, forget)
        if flat.data_ptr() != own.data_ptr():  # a copy, since the weights are not contiguous
            own.copy_(self.shaped(flat, own))

    def _tick(self) -> list[int]:
        """Advance the clock without waiting for its device."""
        moment = self.moment(training=True)
        self.clock[0] += 1
        now = [moment.step + 1, moment.total_steps, moment.seed]
        self._read = self.clock._version, now
        return now


class _Forget:
    """Clears the momentum of candidates, whatever the optimizer calls it."""

    def __init__(self, choice: Choice, weight: nn.Parameter, optimizer: Optimizer) -> None:
        self._choice, self._weight, self._optimizer = choice, weight, optimizer

    def __call__(self, which: Tensor) -> None:
        for value in self._optimizer.state.get(self._weight, {}).values():
            if isinstance(value, Tensor) and value.shape == self._weight.shape:
                mask = torch.zeros(value.numel(), dtype=torch.bool, device=value.device)
                mask[which] = True
                value.masked_fill_(self._choice.shaped(mask, value), 0)


class Wired(nn.Module):
    """A module whose candidate weights a rule chooses from."""

    choice: Choice

    @property
    @abstractmethod
    def candidate_weight(self) -> nn.Parameter:
        """The candidate weights ``[E]``."""


class Use(NamedTuple):
    """A choice somewhere in a model: the name of what has it, and the weights it is about."""

    name: str
    choice: Choice
    weight: nn.Parameter


def choices(model: nn.Module) -> Iterator[Use]:
    """Yield every choice in a model once: of graphs, and of weights made sparse."""
    seen = set()
    for name, module in model.named_modules():
        found = []
        if isinstance(module, Wired):
            found = [(module.choice, module.candidate_weight)]
        elif isinstance(module, ParametrizationList):
            weight: Any = module.original
            parts = [getattr(part, "choice", None) for part in module]
            found = [(choice, weight) for choice in parts if isinstance(choice, Choice)]
        for choice, weight in found:
            if id(choice) not in seen:
                seen.add(id(choice))
                yield Use(name, choice, weight)


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
    found = list(choices(model))
    for use in found:
        if id(use.weight) not in held:
            raise ValueError(
                f"the optimizer does not hold the edge weights of {use.name or 'the graph'}; give "
                "it model.parameters(), of the model as it is now"
            )
    token = object()
    for use in found:
        use.choice.start(token, total_steps)

    def follow(used: Optimizer, args: Any, kwargs: Any) -> None:
        for use in found:
            use.choice.after_step(token, use.weight, used)

    handle: RemovableHandle = optimizer.register_step_post_hook(follow)
    return handle


def penalty(model: nn.Module) -> Tensor | float:
    """Return what the rules of a model add to its loss: 0.0 where none adds anything."""
    terms = []
    for _, choice, weight in choices(model):
        term = choice.rule.penalty(choice.flat(weight), choice.moment(choice.training))
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
    own = {id(m.choice) for m in model.modules() if isinstance(m, Wired)}  # those of graphs
    graphs = [use for use in choices(model) if id(use.choice) in own]
    sources = {choice.rule.starts_from for _, choice, _ in graphs}
    given = {"initial": initial, "trained": trained}
    if len(sources) != 1 or not sources <= given.keys():
        raise ValueError("only models whose graphs have rule lottery or fine_tune inherit a wiring")
    remembered = tuple(f"{use.name}.choice.".lstrip(".") for use in graphs)
    taken = {k: v for k, v in given[sources.pop()].items() if not k.startswith(remembered)}
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(remembered)}
    apart = sorted(taken.keys() ^ expected.keys())
    apart += [k for k in taken.keys() & expected.keys() if taken[k].shape != expected[k].shape]
    if apart:
        raise ValueError(f"these are weights of another model: they differ at {apart[0]}")
    model.load_state_dict(taken, strict=False)
    for _, choice, weight in graphs:
        key = next(n for n, p in model.named_parameters() if p is weight)
        candidates = choice.candidates(weight, training=False)
        choice.rule.inherit(candidates, trained[key].to(candidates.weight))
