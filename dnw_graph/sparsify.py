"""Any network made sparse: every convolution and linear layer is a graph (section 3.4).

Each weight of such a layer is a candidate edge, from an input at one place of the filter to an
output channel; a rule chooses which of them are real, as in a :class:`NeuralGraph`.
"""

import difflib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from dnw_graph.topology import Topology
from dnw_graph.wiring import RULES, Choice, NOfM, Rule, top_k

Layer = _ConvNd | nn.Linear

Spread = Literal["uniform", "erk", "global"]
"""How a budget is shared out among layers; see :func:`sparsify`."""


class SparseWeight(nn.Module):
    """Parametrization of a weight: real edges as they are, hallucinated ones 0.

    The gradient passes to every candidate, or to real edges only, as the rule says. Memory format
    and shape of the weight stay as they are.

    Args:
        choice: What chooses.
    """

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice = choice

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros at hallucinated edges."""
        edge_id, straight_through = self.choice.select(weight, self.training)
        real = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        real = self.choice.shaped(real.index_fill_(0, edge_id, True), weight)
        if straight_through:  # w - w is 0 exactly, and its gradient is that of w
            return weight - weight.detach().masked_fill(real, 0)
        return weight * real


def sparsify(
    module: nn.Module,
    density: float | Mapping[str, float] | None = None,
    *,
    keep_dense: Sequence[str] = (),
    rule: str | Rule | type[Rule] = "dnw",
    spread: Spread = "uniform",
    initial: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Give every convolution and linear weight of a module its own ``k`` real edges, in place.

    Biases and normalisation stay dense. Of a layer with ``E`` weights and density ``d``, ``d E``
    are real, rounded, and at least one.

    Args:
        module: Any network.
        density: Share of weights that are real, 0.1 unless given; or of each layer, by name or
            pattern (``{"layer1.*": 0.5, "*": 0.1}``, the first that matches counts).
        keep_dense: Names or patterns (``"layer4.*"``) of layers that stay as they are.
        rule: How edges are chosen; see docs/rules.md. ``fine_tune`` keeps the largest of the
            weights that the module has now, and ``lottery`` starts from ``initial`` with them.
        spread: How one density is shared out: ``"uniform"``, the same in each layer, as in the
            paper; ``"erk"``, in proportion to inputs + outputs + filter size over their product
            (Mocanu et al. 2018, Evci et al. 2020); ``"global"``, by the magnitudes that weights
            have now, all layers ranked together.
        initial: ``state_dict`` of the module before its training, for the rule ``lottery``.

    Returns:
        The module.

    Raises:
        ValueError: A density outside (0, 1], a name that matches no layer, a module without
            weights, or one that is sparse already.
    """
    rule = RULES.resolve(rule)
    layers = dict(_layers(module))
    if not layers:
        raise ValueError(
            "there is nothing to make sparse: the module has no convolution or linear layer"
        )
    _check_names(keep_dense, layers)
    chosen = {name: layer for name, layer in layers.items() if not _matches(name, keep_dense)}
    for name, layer in chosen.items():
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(
                f"the weight of {name or 'the module'} is parametrized already: a module is made "
                "sparse once; bake() it first, or name the layer in keep_dense"
            )
    if not chosen:
        raise ValueError("keep_dense names every layer, so there is nothing left to make sparse")
    if isinstance(rule, NOfM):
        budgets = _patterned(chosen, rule, density)
    else:
        budgets = _budgets(chosen, 0.1 if density is None else density, spread)
    trained = {name: layer.weight.detach().clone() for name, layer in chosen.items()}
    if (rule.starts_from == "initial") != (initial is not None):
        raise ValueError(
            "rule lottery needs initial=, the state_dict of the module before its training"
            if initial is None
            else f"initial is for the rule lottery, not for {type(rule).__name__}"
        )
    if initial is not None:
        module.load_state_dict(initial)
    made: dict[int, SparseWeight] = {}  # by id of the parameter: layers may share one
    for name, layer in chosen.items():
        weight = layer.weight
        if id(weight) not in made:
            made[id(weight)] = _sparse_weight(weight, rule, budgets[name], trained[name])
        # Unsafe is what it calls not running the parametrization at once.
        parametrize.register_parametrization(layer, "weight", made[id(weight)], unsafe=True)
    return module


def _sparse_weight(weight: Tensor, rule: Rule, budget: int, trained: Tensor) -> SparseWeight:
    targets = weight.shape[0]
    topology = Topology.layered([weight.numel() // targets, targets])
    choice = Choice(rule, topology, rule.budget(budget, weight.numel()))
    choice.reset(weight)
    if rule.starts_from != "itself":
        rule.inherit(choice.candidates(weight, training=False), choice.flat(trained))
    return SparseWeight(choice)


def bake(module: nn.Module) -> nn.Module:
    """Make the zeros of a sparse module permanent, in place: plain layers, the same outputs.

    Returns:
        The module, whose layers are as they were before :func:`sparsify` but for their values.
    """
    training = module.training
    module.eval()
    for _, layer in _sparse_layers(module):
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
    return module.train(training)


@dataclass(frozen=True)
class LayerSparsity:
    """How sparse one layer is.

    Attributes:
        name: Of the layer.
        shape: Of its weight.
        nonzero: Number of weights other than 0.
        total: Number of weights.
    """

    name: str
    shape: tuple[int, ...]
    nonzero: int
    total: int

    @property
    def density(self) -> float:
        """Share of weights other than 0."""
        return self.nonzero / self.total if self.total else 0.0


@dataclass(frozen=True)
class Sparsity:
    """How sparse a module is, layer by layer; printed, it is a table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def nonzero(self) -> int:
        """Number of weights other than 0."""
        return sum(layer.nonzero for layer in self.layers)

    @property
    def total(self) -> int:
        """Number of weights."""
        return sum(layer.total for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of weights other than 0."""
        return self.nonzero / self.total if self.total else 0.0

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'real':>12} {'of':>12}  density"]
        for layer in (*self.layers, LayerSparsity("total", (), self.nonzero, self.total)):
            lines.append(
                f"{layer.name:{width}}  {layer.nonzero:12,} {layer.total:12,}  {layer.density:7.2%}"
            )
        return "\n".join(lines)


@torch.no_grad()
def sparsity(module: nn.Module) -> Sparsity:
    """Return how many weights of each convolution and linear layer are not 0, in evaluation.

    Sparse, baked and dense modules alike.
    """
    training = {m: m.training for m in module.modules()}
    module.eval()
    found = []
    for name, layer in _layers(module):
        weight = layer.weight
        count = int(torch.count_nonzero(weight))
        found.append(LayerSparsity(name, tuple(weight.shape), count, weight.numel()))
    for m, mode in training.items():
        m.training = mode
    return Sparsity(tuple(found))


def _layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield convolutions and linear layers that have weights."""
    for name, layer in module.named_modules():
        if isinstance(layer, Layer):
            if isinstance(layer.weight, nn.UninitializedParameter):
                raise ValueError(
                    f"{name or 'the layer'} does not know its shape yet: run the module once first"
                )
            if layer.weight.numel():
                yield name, layer


def _sparse_layers(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    for name, layer in _layers(module):
        if parametrize.is_parametrized(layer, "weight"):
            parts: Any = layer.parametrizations
            if any(isinstance(part, SparseWeight) for part in parts.weight):
                yield name, layer


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_names(patterns: Sequence[str], layers: Mapping[str, Layer]) -> None:
    if isinstance(patterns, str):
        raise TypeError(f"keep_dense is a list of names: [{patterns!r}]")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            close = difflib.get_close_matches(pattern, layers, n=1, cutoff=0.4)
            hint = f"; the nearest is {close[0]!r}" if close else ""
            raise ValueError(
                f"no convolution or linear layer is named {pattern!r}{hint} "
                f"(there are {len(layers)}: {', '.join(list(layers)[:5])}, ...)"
            )


def _budgets(
    layers: Mapping[str, Layer], density: float | Mapping[str, float], spread: Spread
) -> dict[str, int]:
    """Return the number of real edges of each layer."""
    sizes = {name: layer.weight.numel() for name, layer in layers.items()}
    if isinstance(density, Mapping):
        if spread != "uniform":
            raise ValueError("densities by layer are not spread: give one density, or no spread")
        _check_names(list(density), layers)
        each = {name: _density_of(name, density) for name in layers}
        return {name: max(1, round(each[name] * size)) for name, size in sizes.items()}
    _check_density(density)
    if spread == "uniform":
        return {name: max(1, round(density * size)) for name, size in sizes.items()}
    total = round(density * sum(sizes.values()))
    if total < len(sizes):
        raise ValueError(
            f"density {density} leaves {total} real weights for {len(sizes)} layers; give more"
        )
    if spread == "erk":
        raw = {name: _erk(layer) for name, layer in layers.items()}
        return _shared_out(total, sizes, raw)
    if spread == "global":
        everything = torch.cat([layer.weight.detach().flatten() for layer in layers.values()])
        starts = torch.tensor([0, *sizes.values()], device=everything.device).cumsum(0)
        counts = torch.searchsorted(top_k(everything, total), starts).diff().tolist()
        return _at_least_one(dict(zip(sizes, counts, strict=True)))
    raise ValueError(f"unknown spread {spread!r} (known: uniform, erk, global)")


def _patterned(
    layers: Mapping[str, Layer], rule: NOfM, density: float | Mapping[str, float] | None
) -> dict[str, int]:
    """Return the number of real edges of each layer under a pattern, and check that it fits."""
    if density is not None and density != rule.n / rule.m:
        raise ValueError(
            f"{rule.n} of {rule.m} real weights are a density of {rule.n / rule.m:g}, not "
            f"{density}: leave the density out"
        )
    uneven = [name for name, layer in layers.items() if layer.weight.shape[1] % rule.m]
    if uneven:
        raise ValueError(
            f"input channels must divide into groups of {rule.m}, but those of "
            f"{', '.join(uneven[:5])} do not: name these layers in keep_dense"
        )
    return {name: rule.budget(None, layer.weight.numel()) for name, layer in layers.items()}


def _at_least_one(budgets: dict[str, int]) -> dict[str, int]:
    """Give each layer an edge, taken from the largest budget."""
    for name in [name for name, budget in budgets.items() if not budget]:
        budgets[max(budgets, key=lambda other: budgets[other])] -= 1
        budgets[name] = 1
    return budgets


def _check_density(density: float) -> None:
    if isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"density must be a share of the weights, above 0 to 1, got {density!r}")


def _density_of(name: str, densities: Mapping[str, float]) -> float:
    for pattern, density in densities.items():
        if fnmatch.fnmatchcase(name, pattern):
            _check_density(density)
            return density
    raise ValueError(
        f'no density is given for layer {name}; add it, or "*" for all others, or name it in '
        "keep_dense"
    )


def _erk(layer: Layer) -> float:
    """Return a layer's density before scaling: the sum of its sizes over their product."""
    shape = layer.weight.shape
    return sum(shape) / math.prod(shape)


def _shared_out(total: int, sizes: Mapping[str, int], raw: Mapping[str, float]) -> dict[str, int]:
    """Share a budget out in proportion to ``raw`` densities, none above 1, exactly ``total``."""
    full: set[str] = set()
    while True:
        left = total - sum(sizes[name] for name in full)
        weight = sum(raw[name] * sizes[name] for name in sizes if name not in full)
        scale = left / weight if weight else 0.0
        over = {name for name in sizes if name not in full and scale * raw[name] >= 1}
        if not over:
            break
        full |= over
    exact = {n: sizes[n] if n in full else scale * raw[n] * sizes[n] for n in sizes}
    budgets = {name: math.floor(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda name: exact[name] - budgets[name], reverse=True):
        if sum(budgets.values()) < total and budgets[name] < sizes[name]:
            budgets[name] += 1
    return _at_least_one(budgets)
