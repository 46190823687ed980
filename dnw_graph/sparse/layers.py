"""Which layers of a network have weights to be made sparse, and which are."""

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from dnw_graph.wiring import Choice, whole

Layer = _ConvNd | nn.Linear


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
        weight = whole(weight)
        chosen = self.choice.select(weight, self.training)
        if chosen.edge_weight is None:
            real = self._mask(chosen.edge_id, weight)
            silent = weight.detach().masked_fill(real, 0)
        else:  # something is taken away from real edges too
            silent = weight.detach() - self._spread(chosen.edge_weight, chosen.edge_id, weight)
        if not chosen.straight_through:
            gradient_id = chosen.edge_id if chosen.gradient_id is None else chosen.gradient_id
            passes = self._mask(gradient_id, weight)
            weight = weight.detach() + (weight - weight.detach()) * passes  # as it is, to the bit
        return weight - silent  # w - w is 0 exactly, and its gradient is that of w

    def _mask(self, edge_id: Tensor, weight: Tensor) -> Tensor:
        """Return where edges are, in the shape of the weight."""
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        return self.choice.shaped(mask.index_fill_(0, edge_id, True), weight)

    def _spread(self, values: Tensor, edge_id: Tensor, weight: Tensor) -> Tensor:
        """Return values at their edges, 0 elsewhere, in the shape of the weight."""
        spread = values.new_zeros(weight.numel()).index_copy_(0, edge_id, values)
        return self.choice.shaped(spread, weight)


def layers_of(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield convolutions and linear layers that have weights."""
    for name, layer in module.named_modules():
        if isinstance(layer, Layer):
            stored = stored_weight(layer)
            if isinstance(stored, nn.UninitializedParameter):
                raise ValueError(
                    f"{name or 'the layer'} does not know its shape yet: run the module once first"
                )
            if stored.numel():
                yield name, layer


def stored_weight(layer: Layer) -> Tensor:
    """Return a layer's weight as it is stored, without asking a rule."""
    if parametrize.is_parametrized(layer, "weight"):
        parts: Any = layer.parametrizations
        stored: Tensor = next(parts.weight.parameters(recurse=False))
        return stored
    return layer.weight


def sparse_layers_of(module: nn.Module) -> Iterator[tuple[str, Layer]]:
    """Yield those whose weights :func:`sparsify` made sparse."""
    for name, layer in layers_of(module):
        if parametrize.is_parametrized(layer, "weight"):
            parts: Any = layer.parametrizations
            if any(isinstance(part, SparseWeight) for part in parts.weight):
                yield name, layer


def evaluation_weight(layer: Layer) -> Tensor:
    """Return a layer's weight as it is in evaluation, without a gradient."""
    modes = [(module, module.training) for module in layer.modules()]
    layer.eval()
    weight = layer.weight.detach()
    for module, mode in modes:
        module.training = mode
    return weight


def num_real_weights(layer: Layer) -> int:
    """Return how many weights of a layer are real.

    Those that its rule chooses, which may weigh 0 just after they have grown; of a layer without a
    rule, those other than 0.
    """
    if parametrize.is_parametrized(layer, "weight"):
        parts: Any = layer.parametrizations
        for part in parts.weight:
            if isinstance(part, SparseWeight):
                stored = whole(stored_weight(layer).detach())
                return len(part.choice.select(stored, training=False).edge_id)
    return int(torch.count_nonzero(evaluation_weight(layer)))


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name is one of these, or fits a pattern."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_names(patterns: Sequence[str], layers: Mapping[str, Layer]) -> None:
    """Raise where a name or pattern fits no layer; the message shows the nearest."""
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
