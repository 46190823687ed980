"""Weights of a network that can be made sparse, and those that are."""

import difflib
import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from dnw_graph._evaluation import evaluating
from dnw_graph.wiring import EdgeSelector, SelectorOwner, whole

Layer = _ConvNd | nn.Linear


class SparseWeight(SelectorOwner):
    """Parametrization of a weight that sets hallucinated edges to 0.

    The gradient goes to every candidate or to real edges only, depending on the rule. The shape and
    the memory format of the weight do not change.

    Args:
        selector: The selector of real edges.
    """

    def __init__(self, selector: EdgeSelector) -> None:
        super().__init__()
        self.selector = selector

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros at hallucinated edges."""
        weight = whole(weight)
        selection = self.selector.select(weight, self.training)
        if selection.edge_weight is None:
            is_real = self._mask(selection.edge_id, weight)
            difference = weight.detach().masked_fill(is_real, 0)
        else:  # the weights of real edges change too
            real = self._scatter(selection.edge_weight, selection.edge_id, weight)
            difference = weight.detach() - real
        if not selection.straight_through:
            ids = selection.edge_id if selection.gradient_id is None else selection.gradient_id
            has_gradient = self._mask(ids, weight)
            weight = weight.detach() + (weight - weight.detach()) * has_gradient  # bitwise the same
        return weight - difference  # w - w is 0 exactly, and its gradient is that of w

    def _mask(self, edge_id: Tensor, weight: Tensor) -> Tensor:
        """Return a mask of edges, in the shape of the weight."""
        mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
        return self.selector.shaped(mask.index_fill_(0, edge_id, True), weight)

    def _scatter(self, values: Tensor, edge_id: Tensor, weight: Tensor) -> Tensor:
        """Return a tensor in the shape of the weight with values at their edges, 0 elsewhere."""
        row = values.new_zeros(weight.numel()).index_copy_(0, edge_id, values)
        return self.selector.shaped(row, weight)


class Weight(NamedTuple):
    """One tensor of weights in a network.

    Attributes:
        layer: The module that has the weights.
        parameter: Name of the parameter in the module.
    """

    layer: nn.Module
    parameter: str = "weight"

    @property
    def stored(self) -> Tensor:
        """The stored weights, to which no rule is applied."""
        if self.is_parametrized:
            stored: Tensor = next(self.parametrizations.parameters(recurse=False))
            return stored
        weight: Tensor = getattr(self.layer, self.parameter)
        return weight

    @property
    def is_parametrized(self) -> bool:
        """Whether the weights are computed by a parametrization."""
        return bool(parametrize.is_parametrized(self.layer, self.parameter))

    @property
    def selector(self) -> EdgeSelector | None:
        """The selector of the weights, if :func:`sparsify` made them sparse."""
        parts = self.parametrizations if self.is_parametrized else ()
        return next((part.selector for part in parts if isinstance(part, SparseWeight)), None)

    @property
    def evaluated(self) -> Tensor:
        """The weights in evaluation mode, without a gradient."""
        with evaluating(self.layer):
            weight: Tensor = getattr(self.layer, self.parameter)
        return weight.detach()

    @property
    def num_real(self) -> int:
        """Number of real weights.

        With a rule, the number of edges that it selects, which may have weight 0 just after they
        have grown; without a rule, the number of nonzero weights.
        """
        if self.selector is not None:
            return len(self.selector.select(whole(self.stored.detach()), training=False).edge_id)
        return int(torch.count_nonzero(self.evaluated))

    @property
    def parametrizations(self) -> Any:
        """PyTorch's list of parametrizations of the weights."""
        lists: Any = self.layer.parametrizations
        return lists[self.parameter]


def weights_of(module: nn.Module, embeddings: bool = True) -> Iterator[tuple[str, Weight]]:
    """Yield the weights that can be made sparse, with their names.

    The weight of a convolution or linear layer has the name of the layer; others have the name of
    the parameter, such as ``"encoder.attention.in_proj_weight"`` and ``"lstm.weight_ih_l0"``.

    Args:
        module: Any network.
        embeddings: Whether to include the weights of embeddings.

    Raises:
        ValueError: If a layer is uninitialised, so that its shape is not known yet.
    """
    for path, layer in module.named_modules():
        for parameter in parameters_of(layer, embeddings):
            weight = Weight(layer, parameter)
            name = path if parameter == "weight" else f"{path}.{parameter}".removeprefix(".")
            if isinstance(weight.stored, nn.UninitializedParameter):
                raise ValueError(
                    f"{name or 'the layer'} has no shape yet: run the module once first"
                )
            if weight.stored.numel():
                yield name, weight


def parameters_of(layer: nn.Module, embeddings: bool = True) -> list[str]:
    """Return the names of a module's weights that can be made sparse."""
    if isinstance(layer, Layer) or (embeddings and isinstance(layer, nn.Embedding)):
        return ["weight"]
    names: list[str] = []
    if isinstance(layer, nn.MultiheadAttention):
        names = ["in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"]
    elif isinstance(layer, nn.RNNBase):
        names = [name for name in layer._flat_weights_names if name.startswith("weight")]
    elif isinstance(layer, nn.modules.rnn.RNNCellBase):
        names = ["weight_ih", "weight_hh"]
    return [name for name in names if getattr(layer, name) is not None]


def sparse_weights_of(module: nn.Module) -> Iterator[tuple[str, Weight]]:
    """Yield the weights that :func:`sparsify` made sparse, with their names."""
    for name, weight in weights_of(module):
        if weight.selector is not None:
            yield name, weight


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name matches any of the names or patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_names(patterns: Sequence[str], layers: Mapping[str, Weight]) -> None:
    """Check that each name or pattern matches a layer.

    Raises:
        ValueError: If a name or pattern matches no layer; the message names the closest.
        TypeError: If ``patterns`` is not a list of strings.
    """
    listed = isinstance(patterns, Iterable) and not isinstance(patterns, str)
    if not listed or not all(isinstance(pattern, str) for pattern in patterns):
        example = patterns if isinstance(patterns, str) else next(iter(layers))
        raise TypeError(f"keep_dense must be a list of names, such as [{example!r}]")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            close = difflib.get_close_matches(pattern, layers, n=1, cutoff=0.4)
            hint = f"; the closest is {close[0]!r}" if close else ""
            raise ValueError(
                f"no layer or weight that can be made sparse matches {pattern!r}{hint} "
                f"(there are {len(layers)}: {', '.join(list(layers)[:5])}, ...)"
            )
