"""Connection of rules to training: optimizer steps, penalties, and inherited weights."""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnw_graph._wrapped import check_network, unwrapped, unwrapped_names
from dnw_graph.wiring.base import RULES, Rule, check_steps
from dnw_graph.wiring.edge_selector import NamedSelector, selectors, whole


def attach(
    model: nn.Module, optimizer: Optimizer, *, total_steps: int, restart: bool | None = None
) -> "Attachment":
    """Attach the rules of all graphs in a model to an optimizer; call this before the first step.

    Rules that depend on the step, or act before or after it, require this; other rules ignore it.
    Their clocks count the optimizer's steps. A checkpoint of the model may be loaded before or
    after this call: training then continues from the step in the checkpoint.

    Args:
        model: The model.
        optimizer: The optimizer that updates the model's weights. If it wraps another one whose
            ``step`` is called instead of its own (SAM, for example), pass the inner one.
        total_steps: Number of steps of the whole training run, including those before a
            checkpoint.
        restart: Whether clocks start at 0. If None, they do so unless they were loaded from a
            checkpoint of an unfinished training run.

    Returns:
        An object that detaches the rules when its ``remove()`` is called or its ``with`` block
        ends.

    Raises:
        ValueError: If ``total_steps`` is not positive; the optimizer does not hold the edge weights
            of every graph (except frozen weights, whose edges do not change); or two graphs share
            weights whose gradient a rule changes. In a step, if a rule changes gradients that are
            still scaled for mixed precision.
        TypeError: If ``model`` is not a module, or ``optimizer`` is not an optimizer.

    Warns:
        NeverActsWarning: A rule would never act in so few steps.
        UserWarning: Clocks were reset to 0 while ``restart`` is None. During training: weights
            changed without a step of the optimizer.
    """
    check_steps(total_steps=total_steps)
    check_network(model)
    if not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"expected a torch.optim.Optimizer to attach to, got {type(optimizer).__name__}"
        )
    optimizer_ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
    entries = list(selectors(model))
    for rule in {entry.selector.rule for entry in entries}:
        rule.check_length(total_steps)
    for entry in entries:
        if entry.weight.requires_grad and id(entry.weight) not in optimizer_ids:
            raise ValueError(
                f"the optimizer does not hold the edge weights of {entry.name or 'the graph'}; "
                "pass it model.parameters() of the current model"
            )
    _check_shared([entry for entry in entries if entry.selector.rule.changes_gradients])
    return Attachment(entries, optimizer, total_steps, restart)


class Attachment:
    """Attachment of selectors to an optimizer, as :func:`attach` returns it.

    Args:
        entries: The selectors.
        optimizer: The optimizer.
        total_steps: Steps of the whole training run.
        restart: As for :func:`attach`.
    """

    def __init__(
        self,
        entries: Sequence[NamedSelector],
        optimizer: Optimizer,
        total_steps: int,
        restart: bool | None = None,
    ) -> None:
        self._entries = entries
        self._changing_entries = [
            entry for entry in entries if entry.selector.rule.changes_gradients
        ]
        old_times = [entry.selector.start(self, total_steps, restart) for entry in entries]
        if old_time := next(filter(None, old_times), None):
            warnings.warn(
                f"the clocks of rules were at {old_time} and are set to 0: pass restart=True to "
                "attach for a new training run, or restart=False and more total_steps to continue",
                stacklevel=3,
            )
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        dependent = [entry for entry in entries if entry.selector.rule.follows_training]
        self._missed_steps = _MissedSteps(self, dependent)
        self._handles += self._missed_steps.handles

    def remove(self) -> None:
        """Detach the selectors from the optimizer."""
        for handle in self._handles:
            handle.remove()
        for entry in self._entries:
            entry.selector.leave(self)

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        self._missed_steps.pause()
        if not self._changing_entries or _skips(optimizer):
            return None
        if getattr(optimizer, "grad_scale", None) is not None:
            rule = self._changing_entries[0].selector.rule
            raise ValueError(
                f"rule {RULES.name_of(rule)} changes gradients, but "
                "they are still scaled: call scaler.unscale_(optimizer) before "
                "scaler.step(optimizer)"
            )
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None:
            self._change_gradients()
            return None

        def wrapped_closure() -> Any:  # gradients exist only after the closure was called
            loss = closure()
            self._change_gradients()
            return loss

        return args[:1], {**kwargs, "closure": wrapped_closure}

    @torch.no_grad()
    def _change_gradients(self) -> None:
        for entry in self._changing_entries:
            entry.selector.before_step(self, entry.weight)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        for entry in [] if _skips(optimizer) else self._entries:
            entry.selector.after_step(self, entry.weight, optimizer)
        self._missed_steps.end()


class _MissedSteps:
    """Warns of weights that change between backward passes before the first step.

    This happens if the optimizer is a wrapper that calls the step of another optimizer.

    Args:
        attachment: The attachment that counts the steps.
        entries: The selectors whose weights are checked.

    Attributes:
        handles: Handles that remove the hooks.
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
        """Pause the check during a step, which may evaluate a closure more than once."""
        self._in_step = True

    def end(self) -> None:
        """End the check after a step."""
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
                    f"{self.TOLERATED} times without a step of the optimizer passed to attach, "
                    "so the rule does not act: pass attach the optimizer whose step is called, "
                    "such as optimizer.base_optimizer",
                    stacklevel=2,
                )

        return check


def _skips(optimizer: Optimizer) -> bool:
    """Return whether a fused optimizer skips the step because scaled gradients overflowed."""
    overflow = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(overflow)


def _check_shared(entries: Sequence[NamedSelector]) -> None:
    """Raise ValueError if graphs share a weight, whose gradient would be changed several times."""
    names: dict[int, str] = {}
    for entry in entries:
        other_name = names.setdefault(id(entry.weight), entry.name)
        if other_name != entry.name:
            raise ValueError(
                f"{other_name} and {entry.name} share their weights, which rule "
                f"{RULES.name_of(entry.selector.rule)} cannot train: it would change their "
                "gradient twice; use separate weights or another rule"
            )


def penalty(model: nn.Module) -> Tensor | float:
    """Return the sum of the rules' penalties, to add to the loss of a model; 0.0 without any."""
    terms = []
    for _, selector, weight in selectors(model):
        if type(selector.rule).penalty is not Rule.penalty:
            flat = selector.flat(whole(weight))
            term = selector.rule.penalty(flat, selector.progress(selector.training))
            if term is None:
                continue
            if not isinstance(term, Tensor) or term.dim():
                shape = list(term.shape) if isinstance(term, Tensor) else repr(term)
                raise ValueError(
                    f"penalty of rule {RULES.name_of(selector.rule)} must return one number, as a "
                    f"tensor of shape [], or None, got {shape}"
                )
            terms.append(term)
    return torch.stack(terms).sum() if terms else 0.0


def inherit(
    model: nn.Module, *, initial: Mapping[str, Tensor], trained: Mapping[str, Tensor]
) -> None:
    """Load a trained complete model into one with rule ``lottery`` or ``fine_tune``.

    Args:
        model: The model, whose graphs or sparse layers keep the edges of largest trained weights.
        initial: ``state_dict`` of the complete or dense model before training. The model may have
            been compiled, averaged or wrapped.
        trained: The same after training.

    Raises:
        ValueError: If the rule does not start from another model, or a state is of another model.
        TypeError: If ``model`` is not a module, or a state is not a ``state_dict``.
    """
    model = unwrapped(model)
    for state in (initial, trained):
        if not isinstance(state, Mapping):
            raise TypeError(
                f"initial and trained must be a state_dict, such as net.state_dict(), got a "
                f"{type(state).__name__}"
            )
    entries = list(selectors(model))
    sources = {entry.selector.rule.starts_from for entry in entries}
    if len(sources) != 1 or sources == {"itself"}:
        raise ValueError("only models with rule lottery or fine_tune inherit a wiring")
    ids = {id(entry.selector) for entry in entries}
    prefixes = tuple(f"{n}.".lstrip(".") for n, m in model.named_modules() if id(m) in ids)
    initial, trained = (
        _as_stored(model, unwrapped_names(state, model.state_dict()))
        for state in (initial, trained)
    )
    source = {"initial": initial, "trained": trained}[sources.pop()]
    state = {k: v for k, v in source.items() if not k.startswith(prefixes)}
    expected = {k: v for k, v in model.state_dict().items() if not k.startswith(prefixes)}
    differences = sorted(state.keys() ^ expected.keys())
    differences += [
        k for k in state.keys() & expected.keys() if state[k].shape != expected[k].shape
    ]
    entry_of = {next(n for n, p in model.named_parameters() if p is e.weight): e for e in entries}
    for key, entry in entry_of.items():
        if key not in trained or trained[key].shape != entry.weight.shape:
            differences.append(key)
    if differences:
        raise ValueError(f"these are weights of another model: they differ at {differences[0]}")
    model.load_state_dict(state, strict=False)
    for key, (_, selector, weight) in entry_of.items():
        candidates = selector.candidates(weight, training=False)
        selector.rule.inherit(candidates, selector.flat(trained[key]).to(candidates.weight))


def _as_stored(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state with its weights renamed as in a sparse model."""
    pattern = re.compile(r"parametrizations\.(\w+)\.original$")
    sparse_names = {pattern.sub(r"\1", key): key for key in model.state_dict()}
    return {sparse_names.get(name, name): value for name, value in state.items()}
