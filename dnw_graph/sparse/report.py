"""How sparse a network is, layer by layer."""

import math
from dataclasses import dataclass

from torch import nn

from dnw_graph._wrapped import unwrapped
from dnw_graph.sparse.layers import layers_of, num_real_weights, stored_weight


@dataclass(frozen=True)
class LayerSparsity:
    """How sparse one layer is.

    Attributes:
        name: Of the layer.
        shape: Of its weight.
        nonzero: Number of real weights: those that a rule chose, or other than 0 without a rule.
        total: Number of weights.
    """

    name: str
    shape: tuple[int, ...]
    nonzero: int
    total: int

    @property
    def density(self) -> float:
        """Share of real weights."""
        return self.nonzero / self.total if self.total else 0.0


@dataclass(frozen=True)
class Sparsity:
    """How sparse a module is, layer by layer; printed, it is a table."""

    layers: tuple[LayerSparsity, ...]

    @property
    def nonzero(self) -> int:
        """Number of real weights."""
        return sum(layer.nonzero for layer in self.layers)

    @property
    def total(self) -> int:
        """Number of weights."""
        return sum(layer.total for layer in self.layers)

    @property
    def density(self) -> float:
        """Share of real weights."""
        return self.nonzero / self.total if self.total else 0.0

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':{width}}  {'real':>12} {'of':>12}  density"]
        for layer in (*self.layers, LayerSparsity("total", (), self.nonzero, self.total)):
            lines.append(
                f"{layer.name:{width}}  {layer.nonzero:12,} {layer.total:12,}  {layer.density:7.2%}"
            )
        return "\n".join(lines)


def sparsity(module: nn.Module) -> Sparsity:
    """Return how many weights of each convolution and linear layer are real, in evaluation.

    Sparse, baked and dense modules alike. A weight that layers share counts once, by the name of
    the first of them.
    """
    found, seen = [], set()
    for name, layer in layers_of(unwrapped(module)):
        if id(stored_weight(layer)) in seen:
            continue
        seen.add(id(stored_weight(layer)))
        shape, count = tuple(stored_weight(layer).shape), num_real_weights(layer)
        found.append(LayerSparsity(name, shape, count, math.prod(shape)))
    return Sparsity(tuple(found))
