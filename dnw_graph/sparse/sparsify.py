"""Any network made sparse: every layer with weights is a graph (section 3.4 of the paper).

Each weight of such a layer is a candidate edge, from an input at one place of the filter to an
output channel; a rule chooses which of them are real, as in a :class:`NeuralGraph`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from dnw_graph.sparse.budgets import Spread, budgets_of
from dnw_graph.sparse.layers import (
    SparseWeight,
    Weight,
    check_names,
    matches,
    sparse_weights_of,
    weights_of,
)
from dnw_graph.topology import Topology
from dnw_graph.wiring import RULES, EdgeSelector, Rule


def sparsify(
    module: nn.Module,
    density: float | Mapping[str, float] | None = None,
    *,
    keep_dense: Sequence[str] = (),
    rule: str | Rule | type[Rule] = "dnw",
    spread: Spread = "uniform",
    embeddings: bool = False,
) -> nn.Module:
    """Give every weight of a module's layers its own ``k`` real edges, in place.

    Those of convolutions and linear layers, of attention (``in_proj_weight``) and of recurrent
    layers (``weight_ih_l0``, ...); biases and normalisation stay dense. Of a layer with ``E``
    weights and density ``d``, ``d E`` are real, rounded, and at least one. A weight that layers
    share counts once, by the name of the first of them.

    Args:
        module: Any network.
        density: Share of weights that are real, 0.1 unless given or the rule says; or of each
            layer, by name or pattern (``{"layer1.*": 0.5, "*": 0.1}``, the first that matches
            counts).
        keep_dense: Names or patterns (``"layer4.*"``) of layers that stay as they are.
        rule: How edges are chosen; see docs/rules.md. ``fine_tune`` keeps the largest of the
            weights that the module has now; ``lottery`` waits for :func:`inherit`.
        spread: How one density is shared out: ``"uniform"``, the same in each layer, as in the
            paper; ``"erk"``, in proportion to inputs + outputs + filter size over their product
            (Mocanu et al. 2018, Evci et al. 2020); ``"global"``, by the magnitudes that weights
            have now, all layers ranked together.

    Returns:
        The module.

    Raises:
        ValueError: A density outside (0, 1], a name that matches no layer, a module without
            weights, one that is sparse already, or layers that a rule does not fit.
        TypeError: A density that is neither a number nor a mapping.
    """
    rule = RULES.resolve(rule)
    chosen = _chosen(module, keep_dense, embeddings)
    _check_fit(rule, chosen)
    first = {id(weight.stored): name for name, weight in reversed(chosen.items())}
    own = {name: weight for name, weight in chosen.items() if first[id(weight.stored)] == name}
    budgets: Mapping[str, int | None] = dict.fromkeys(own)
    if density is not None or not rule.sets_budget:
        budgets = budgets_of(own, 0.1 if density is None else density, spread)
    made = {id(w.stored): _sparse(w.stored, rule, budgets[n]) for n, w in own.items()}
    for layer, parameter in chosen.values():
        part = made[id(getattr(layer, parameter))]
        # Unsafe is what it calls not running the parametrization at once.
        parametrize.register_parametrization(layer, parameter, part, unsafe=True)
        if isinstance(layer, nn.RNNBase) and _refresh not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_refresh)
            layer.register_forward_hook(_release)
            _release(layer)
    return module


def _refresh(layer: nn.Module, *_: Any) -> None:
    """Let a recurrent layer read its weights anew, of which it keeps a list."""
    assert isinstance(layer, nn.RNNBase)
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


def _release(layer: nn.Module, *_: Any) -> None:
    """Empty the list again: what is computed from weights cannot be copied."""
    assert isinstance(layer, nn.RNNBase)
    layer._flat_weights = [None for _ in layer._flat_weights_names]


def _chosen(module: nn.Module, keep_dense: Sequence[str], embeddings: bool) -> dict[str, Weight]:
    """Return the weights to be made sparse, by name."""
    layers = dict(weights_of(module, embeddings))
    if not layers:
        raise ValueError(
            "there is nothing to make sparse: the module has no convolution, linear, attention or "
            "recurrent layer"
        )
    check_names(keep_dense, layers)
    chosen = {name: layer for name, layer in layers.items() if not matches(name, keep_dense)}
    for name, weight in chosen.items():
        why = ""
        if weight.selector is not None:
            why = "is sparse already: a module is made sparse once; bake() it first"
        elif weight.parameter not in weight.layer._parameters:
            why = "is computed (weight_norm, prune or another parametrization): remove that first"
        if why:
            raise ValueError(
                f"the weight of {name or 'the module'} {why}, or name the layer in keep_dense"
            )
    if not chosen:
        raise ValueError("keep_dense names every layer, so there is nothing left to make sparse")
    return chosen


def _check_fit(rule: Rule, layers: Mapping[str, Weight]) -> None:
    reasons = {
        name or "the layer": rule.unfit(layer.stored.shape) for name, layer in layers.items()
    }
    unfit = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if unfit:
        more = f", and {len(unfit) - 5} more" if len(unfit) > 5 else ""
        raise ValueError(
            f"rule {RULES.name_of(rule)} does not fit {', '.join(unfit[:5])}{more}: keep "
            f"{'them' if len(unfit) > 1 else 'it'} dense"
        )


def _sparse(weight: Tensor, rule: Rule, budget: int | None) -> SparseWeight:
    targets = weight.shape[0]
    topology = Topology.layered([weight.numel() // targets, targets])
    own = rule.budget(budget, topology)
    if budget is not None and budget != own:
        raise ValueError(
            f"rule {RULES.name_of(rule)} keeps {own:,} of {weight.numel():,} weights, not the "
            f"{budget:,} of that density: leave density out"
        )
    selector = EdgeSelector(rule, topology, own)
    selector.reset(weight)
    if rule.starts_from == "trained":
        candidates = selector.candidates(weight, training=False)
        rule.inherit(candidates, candidates.weight)
    return SparseWeight(selector)


def _unshare(module: nn.Module) -> None:
    """Give sparse layers weights of their own, where what is dense reads the same ones."""
    lists: list[Any] = [weight.list for _, weight in sparse_weights_of(module)]
    sparse = {id(part) for part in lists}
    dense = {
        id(weight)
        for part in module.modules()
        if id(part) not in sparse
        for weight in part.parameters(recurse=False)
    }
    own: dict[int, nn.Parameter] = {}
    for part in lists:
        weight = part.original
        if id(weight) in dense:
            copy = own.setdefault(id(weight), nn.Parameter(weight.detach().clone()))
            part.original = copy


def bake(module: nn.Module) -> nn.Module:
    """Make the zeros of a sparse module permanent, in place: plain layers, the same outputs.

    A weight that a layer left dense, or an embedding, shares with sparse ones is shared no longer.

    Returns:
        The module, whose layers are as they were before :func:`sparsify` but for their values.
    """
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    _unshare(module)
    for _, (layer, parameter) in list(sparse_weights_of(module)):
        # Removing takes the weight from the layer's class too, which copies of it share.
        shared = type(layer)
        layer.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
        parametrize.remove_parametrizations(layer, parameter, leave_parametrized=True)
        if isinstance(layer, nn.RNNBase):
            for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook in (_refresh, _release)]:
                    del hooks[key]
            _refresh(layer)
    for part, mode in modes:
        part.training = mode
    return module
