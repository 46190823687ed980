"""What rules need of a training: its steps, its loss, and for some where to start from."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnw_graph._wrapped import unwrapped, unwrapped_names
from dnw_graph.wiring.base import RULES, Rule, check_steps
from dnw_graph.wiring.edge_selector import NamedSelector, selectors, whole


def attach(
    model: nn.Module, optimizer: Optimizer, *, total_steps: int, restart: bool | None = None
) -> "Attachment":
    """Let the rules of all graphs in a model follow a training; call it before the first step.

    Rules that change with time, or do something before or after a step, need it; for others it does
    nothing. Their clocks count the optimizer's steps. A checkpoint of the model may be loaded
    before or after: the training goes on from the step in it.

    Args:
        model: The model.
        optimizer: The optimizer that updates the model's weights. If it wraps another one whose
            ``step`` is called instead of its own (SAM, for example), the inner one.
        total_steps: Number of steps of the whole training, those before a checkpoint included.
        restart: Whether clocks start at 0. If None, they do so unless they were loaded from a
            checkpoint of a training that was not finished.

    Returns:
        Something whose ``remove()`` undoes it, as leaving its ``with`` block does.

    Raises:
        ValueError: No steps; an optimizer that does not hold the weights of every graph (frozen
            ones it need not hold; their edges stay); weights that two graphs share, and a rule
            that changes their gradient. In a step: gradients that a rule is to change and that are
            still scaled for mixed precision.

    Warns:
        NeverActsWarning: A rule that would never act in so few steps.
        UserWarning: Clocks that were set to 0 while ``restart`` is None; in training, weights that
            change without a step of the optimizer.
    """
    check_steps(total_steps=total_steps)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    found = list(selectors(model))
    for rule in {entry.selector.rule for entry in found}:
        rule.check_length(total_steps)
    for entry in found:
        if entry.weight.requires_grad and id(entry.weight) not in held:
            raise ValueError(
                f"the optimizer does not hold the edge weights of {entry.name or 'the graph'}; "
                "give it model.parameters(), of the model as it is now"
            )
    _check_shared([entry for entry in found if entry.selector.rule.changes_gradients])
    return Attachment(found, optimizer, total_steps, restart)


class Attachment:
    """What :func:`attach` did to an optimizer.

    Args:
        entries: What follows it.
        optimizer: The optimizer.
        total_steps: Steps of the whole training.
        restart: As for :func:`attach`.
    """

    def __init__(
        self,
        entries: Sequence[NamedSelector],
        optimizer: Optimizer,
        total_steps: int,
        restart: bool | None = None,
    ) -> None:
        self._uses = entries
        self._changing = [entry for entry in entries if entry.selector.rule.changes_gradients]
        reset = [entry.selector.start(self, total_steps, restart) for entry in entries]
        if was := next(filter(None, reset), None):
            warnings.warn(
                f"the clocks of rules were at {was} and are set to 0: pass restart=True to attach "
                "if this is a new training, restart=False and more total_steps to go on",
                stacklevel=3,
            )
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        following = [entry for entry in entries if entry.selector.rule.follows_training]
        self._missed_steps = _MissedSteps(self, following)
        self._handles += self._missed_steps.handles

    def remove(self) -> None:
        """Undo it."""
        for handle in self._handles:
            handle.remove()
        for entry in self._uses:
            entry.selector.leave(self)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._missed_steps.pause()
        if not self._changing or _skips(optimizer):
            return None
        if getattr(optimizer, "grad_scale", None) is not None:
            raise ValueError(
                f"rule {RULES.name_of(self._changing[0].selector.rule)} changes gradients, but "
                "these are still scaled: call scaler.unscale_(optimizer) before "
                "scaler.step(optimizer)"
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._change_gradients()
            return None

        def closed() -> Any:  # gradients are there only after it was called
            loss = closure()
            self._change_gradients()
            return loss

        return args[:1], {**kwargs, "closure": closed}

    @torch.no_grad()
    def _change_gradients(self) -> None:
        for entry in self._changing:
            entry.selector.before_step(self, entry.weight)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for entry in [] if _skips(optimizer) else self._uses:
            entry.selector.after_step(self, entry.weight, optimizer)
        self._missed_steps.end()


class _MissedSteps:
    """Warns of weights that change from one backward pass to the next before the first step.

    An optimizer that calls another one's step in a method of its own is such a case.

    Args:
        attachment: What the steps are counted by.
        entries: Whose weights are checked.

    Attributes:
        handles: What removes the hooks.
    """

    TOLERATED = 3

    def __init__(self, attachment: Attachment, entries: Sequence[NamedSelector]) -> None:
        self._attachment = attachment
        self._versions: dict[int, int] = {}
        self._changes: Counter[int] = Counter()
        self._in_step = False
        self.handles = [
            entry.weight.register_post_accumulate_grad_hook(self._after_backward(entry))
            for entry in entries
            if entry.weight.requires_grad
        ]

    def pause(self) -> None:
        """Expect changes: a step has begun, which may evaluate a closure more than once."""
        self._in_step = True

    def end(self) -> None:
        """Look no further: a step is done."""
        for handle in self.handles:
            handle.remove()

    def _after_backward(self, entry: NamedSelector) -> Callable[[Tensor], None]:
        def check(weight: Tensor) -> None:
            if self._in_step or not entry.selector.is_followed_by(self._attachment):
                return
            version = weight._version
            self._changes[id(weight)] += self._versions.get(id(weight), version) != version
            self._versions[id(weight)] = version
            if self._changes[id(weight)] == self.TOLERATED:
                warnings.warn(
                    f"the edge weights of {entry.name or 'the graph'} have changed "
                    f"{self.TOLERATED} times without a step of the optimizer given to attach, "
                    "so the rule does not act: give attach the optimizer whose step is called, "
                    "such as optimizer.base_optimizer",
                    stacklevel=2,
                )

        return check


def _skips(optimizer: Optimizer) -> bool:
    """Return whether a fused optimizer leaves weights alone, as scaled gradients overflowed."""
    overflow = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(overflow)


def _check_shared(entries: Sequence[NamedSelector]) -> None:
    """Raise where a gradient would be changed once for each graph that shares the weight."""
    names: dict[int, str] = {}
    for entry in entries:
        other = names.setdefault(id(entry.weight), entry.name)
        if other != entry.name:
            raise ValueError(
                f"{other} and {entry.name} share their weights, which rule "
                f"{RULES.name_of(entry.selector.rule)} cannot train: it changes their one "
                "gradient; give each weights of its own, or take another rule"
            )


def penalty(model: nn.Module) -> Tensor | float:
    """Return what the rules of a model add to its loss: 0.0 where none adds anything."""
    terms = []
    for _, selector, weight in selectors(model):
        if type(selector.rule).penalty is not Rule.penalty:
            flat = selector.flat(whole(weight))
            term = selector.rule.penalty(flat, selector.progress(selector.training))
            terms += [] if term is None else [term]
    return torch.stack(terms).sum() if terms else 0.0


def inherit(
    model: nn.Module, *, initial: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> None:
    """Let a model with rule ``lottery`` or ``fine_tune`` start from a trained complete one.

    Args:
        model: The model, whose graphs, or layers made sparse, keep the largest trained weights.
        initial: ``state_dict`` of the complete model, or the dense one, before its training; also
            of one that was compiled, averaged or wrapped.
        trained: Likewise after it.

    Raises:
        ValueError: A rule that starts from itself, or the state of another model.
    """
    model = unwrapped(model)
    entries = list(selectors(model))
    sources = {entry.selector.rule.starts_from for entry in entries}
    if len(sources) != 1 or sources == {"itself"}:
        raise ValueError("only models with rule lottery or fine_tune inherit a wiring")
    mine = {id(entry.selector) for entry in entries}
    remembered = tuple(f"{n}.".lstrip(".") for n, m in model.named_modules() if id(m) in mine)
    initial, trained = (
        _as_stored(model, unwrapped_names(state, model.state_dict()))
        for state in (initial, trained)
    )
    given = {"initial": initial, "trained": trained}
    taken = {k: v for k, v in given[sources.pop()].items() if not k.startswith(remembered)}
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(remembered)}
    apart = sorted(taken.keys() ^ expected.keys())
    apart += [k for k in taken.keys() & expected.keys() if taken[k].shape != expected[k].shape]
    chosen_by = {next(n for n, p in model.named_parameters() if p is u.weight): u for u in entries}
    for key, entry in chosen_by.items():
        if key not in trained or trained[key].shape != entry.weight.shape:
            apart.append(key)
    if apart:
        raise ValueError(f"these are weights of another model: they differ at {apart[0]}")
    model.load_state_dict(taken, strict=False)
    for key, (_, selector, weight) in chosen_by.items():
        candidates = selector.candidates(weight, training=False)
        selector.rule.inherit(candidates, selector.flat(trained[key]).to(candidates.weight))


def _as_stored(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with the names that weights have in a model made sparse."""
    stored = re.compile(r"parametrizations\.(\w+)\.original$")
    plain = {stored.sub(r"\1", key): key for key in model.state_dict()}
    return {plain.get(name, name): value for name, value in state.items()}
