"""How sparse a network is, layer by layer."""

import math
from dataclasses import dataclass

from torch import nn

from dnw_graph._wrapped import unwrapped
from dnw_graph.sparse.layers import weights_of


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
    """Return how many weights of each layer are real, in evaluation.

    Of convolutions, linear layers, attention and recurrent layers, and of embeddings if some are
    sparse; sparse, baked and dense modules alike. A weight that layers share counts once, by the
    name of the first of them.
    """
    found, seen = [], set()
    embeddings = any(
        isinstance(weight.layer, nn.Embedding) and weight.selector is not None
        for _, weight in weights_of(unwrapped(module))
    )
    for name, weight in weights_of(unwrapped(module), embeddings):
        stored = weight.stored
        if id(stored) not in seen:
            seen.add(id(stored))
            shape = tuple(stored.shape)
            found.append(LayerSparsity(name, shape, weight.num_real, math.prod(shape)))
    return Sparsity(tuple(found))
