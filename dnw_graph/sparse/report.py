"""Report of the sparsity of a network, layer by layer."""

import math
from dataclasses import dataclass

from torch import nn

from dnw_graph._wrapped import unwrapped
from dnw_graph.sparse.layers import weights_of


@dataclass(frozen=True)
class LayerSparsity:
    """Sparsity of one layer.

    Attributes:
        name: Name of the layer.
        shape: Shape of its weight.
        nonzero: Number of real weights: those that a rule selects, or without a rule, those that
            are not 0.
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
    """Sparsity of a module, layer by layer; ``str()`` returns a table."""

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
    """Return the number of real weights of each layer in evaluation mode.

    Includes convolutions, linear layers, attention and recurrent layers, and embeddings if any of
    them is sparse. The module may be sparse, baked or dense. A weight that layers share is counted
    once, under the name of the first of them.
    """
    layers, seen_ids = [], set()
    embeddings = any(
        isinstance(weight.layer, nn.Embedding) and weight.selector is not None
        for _, weight in weights_of(unwrapped(module))
    )
    for name, weight in weights_of(unwrapped(module), embeddings):
        stored = weight.stored
        if id(stored) not in seen_ids:
            seen_ids.add(id(stored))
            shape = tuple(stored.shape)
            layers.append(LayerSparsity(name, shape, weight.num_real, math.prod(shape)))
    return Sparsity(tuple(layers))
