"""Conversion of any network to a sparse one whose layers are graphs (section 3.4 of the paper).

Each weight of a layer is a candidate edge, from an input channel at one position of the filter to
an output channel; a rule chooses which of them are real, as in a :class:`NeuralGraph`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from dnw_graph._evaluation import evaluating
from dnw_graph._wrapped import check_network
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
    """Make the layers of a module sparse, in place.

    Applies to the weights of convolutions and linear layers, of attention (``in_proj_weight``) and
    of recurrent layers (``weight_ih_l0``, ...); biases and normalisation stay dense. With density
    ``d``, ``d E`` of the ``E`` weights of a layer are real, rounded, and at least one. A weight
    that layers share counts once, under the name of the first of them.

    Args:
        module: Any network.
        density: Share of the weights that are real, by default 0.1 unless the rule determines it.
            Or shares by name or pattern of layers (``{"layer1.*": 0.5, "*": 0.1}``), of which the
            first match is used.
        keep_dense: Names or patterns (``"layer4.*"``) of layers that stay dense.
        rule: Rule that chooses the real edges; see docs/rules.md. ``fine_tune`` keeps the largest
            of the module's current weights; ``lottery`` needs a call of :func:`inherit`.
        spread: How one density is distributed among layers: ``"uniform"``, the same for each layer,
            as in the paper; ``"erk"``, in proportion to inputs + outputs + filter size over their
            product (Mocanu et al. 2018, Evci et al. 2020); ``"global"``, by the magnitudes of the
            current weights, all layers ranked together.
        embeddings: Whether to make embeddings sparse too.

    Returns:
        The module.

    Raises:
        ValueError: If a density is outside (0, 1], a name matches no layer, the module has no
            weights or is sparse already, or the rule does not fit a layer.
        TypeError: If ``module`` is not a module, ``density`` is neither a number nor a mapping, or
            ``keep_dense`` is not a list of names.
    """
    rule = RULES.resolve(rule)
    weights = _weights_to_sparsify(module, keep_dense, embeddings)
    _check_fit(rule, weights)
    first_names = {id(weight.stored): name for name, weight in reversed(weights.items())}
    unique_weights = {
        n: weight for n, weight in weights.items() if first_names[id(weight.stored)] == n
    }
    budgets: Mapping[str, int | None] = dict.fromkeys(unique_weights)
    if density is not None or not rule.sets_budget:
        budgets = budgets_of(unique_weights, 0.1 if density is None else density, spread)
    sparse_weights = {
        id(weight.stored): _sparse_weight(weight.stored, rule, budgets[name])
        for name, weight in unique_weights.items()
    }
    for layer, parameter in weights.values():
        part = sparse_weights[id(getattr(layer, parameter))]
        # unsafe=True only skips running the parametrization during registration.
        parametrize.register_parametrization(layer, parameter, part, unsafe=True)
        if isinstance(layer, nn.RNNBase) and _refresh not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_refresh)
            layer.register_forward_hook(_release)
            _release(layer)
    return module


def _refresh(layer: nn.Module, *_: Any) -> None:
    """Update a recurrent layer's list of weights, before a forward pass."""
    assert isinstance(layer, nn.RNNBase)
    layer._flat_weights = [getattr(layer, name) for name in layer._flat_weights_names]


def _release(layer: nn.Module, *_: Any) -> None:
    """Clear the list after a forward pass, since computed tensors cannot be deep-copied."""
    assert isinstance(layer, nn.RNNBase)
    layer._flat_weights = [None for _ in layer._flat_weights_names]


def _weights_to_sparsify(
    module: nn.Module, keep_dense: Sequence[str], embeddings: bool
) -> dict[str, Weight]:
    """Return the weights to make sparse, by name."""
    check_network(module)
    layers = dict(weights_of(module, embeddings))
    if not layers:
        raise ValueError(
            "the module has nothing to make sparse: no convolution, linear, attention or recurrent "
            "layer"
        )
    check_names(keep_dense, layers)
    weights = {name: layer for name, layer in layers.items() if not matches(name, keep_dense)}
    for name, weight in weights.items():
        reason = ""
        if weight.selector is not None:
            reason = "is sparse already: call bake() first"
        elif weight.parameter not in weight.layer._parameters:
            reason = (
                "is computed (weight_norm, prune or another parametrization): remove that first"
            )
        if reason:
            raise ValueError(
                f"the weight of {name or 'the module'} {reason}, or name the layer in keep_dense"
            )
    if not weights:
        raise ValueError("keep_dense names every layer, so there is nothing to make sparse")
    return weights


def _check_fit(rule: Rule, layers: Mapping[str, Weight]) -> None:
    """Raise ValueError if a rule cannot make some layer sparse."""
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


def _sparse_weight(weight: Tensor, rule: Rule, budget: int | None) -> SparseWeight:
    """Return the parametrization of a weight; if ``budget`` is None, the rule determines it."""
    targets = weight.shape[0]
    topology = Topology.layered([weight.numel() // targets, targets])
    num_edges = rule.budget(budget, topology)
    if budget is not None and budget != num_edges:
        raise ValueError(
            f"rule {RULES.name_of(rule)} keeps {num_edges:,} of {weight.numel():,} weights, not "
            f"the {budget:,} of that density: do not pass density"
        )
    selector = EdgeSelector(rule, topology, num_edges)
    selector.reset(weight)
    if rule.starts_from == "trained":
        candidates = selector.candidates(weight, training=False)
        rule.inherit(candidates, candidates.weight)
    return SparseWeight(selector)


def _unshare(module: nn.Module) -> None:
    """Replace weights of sparse layers by copies if dense layers share them."""
    lists: list[Any] = [weight.parametrizations for _, weight in sparse_weights_of(module)]
    sparse = {id(part) for part in lists}
    dense = {
        id(weight)
        for part in module.modules()
        if id(part) not in sparse
        for weight in part.parameters(recurse=False)
    }
    copies: dict[int, nn.Parameter] = {}
    for part in lists:
        weight = part.original
        if id(weight) in dense:
            part.original = copies.setdefault(id(weight), nn.Parameter(weight.detach().clone()))


def bake(module: nn.Module) -> nn.Module:
    """Make the zeros of a sparse module permanent, in place, so that its layers are plain again.

    Outputs do not change. A weight that sparse layers share with a dense layer or an embedding is
    copied, so that it is no longer shared.

    Returns:
        The module, whose layers differ from those before :func:`sparsify` only in their values.
    """
    check_network(module)
    with evaluating(module):
        _bake(module)
    return module


def _bake(module: nn.Module) -> None:
    """Replace the parametrizations of a module in evaluation mode by their values."""
    _unshare(module)
    for _, (layer, parameter) in list(sparse_weights_of(module)):
        # Removal deletes an attribute of the layer's class, which copies of the layer share.
        old_class = type(layer)
        layer.__class__ = type(old_class.__name__, old_class.__bases__, dict(vars(old_class)))
        parametrize.remove_parametrizations(layer, parameter, leave_parametrized=True)
        if isinstance(layer, nn.RNNBase):
            for hooks in (layer._forward_pre_hooks, layer._forward_hooks):
                for key in [key for key, hook in hooks.items() if hook in (_refresh, _release)]:
                    del hooks[key]
            _refresh(layer)
