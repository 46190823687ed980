"""Which layers of a network have weights to be made sparse, and which are."""

import difflib
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from dnw_graph.wiring import EdgeSelector, SelectorOwner, whole

Layer = _ConvNd | nn.Linear


class SparseWeight(SelectorOwner):
    """Parametrization of a weight: real edges as they are, hallucinated ones 0.

    The gradient passes to every candidate, or to real edges only, as the rule says. Memory format
    and shape of the weight stay as they are.

    Args:
        selector: What chooses.
    """

    def __init__(self, selector: EdgeSelector) -> None:
        super().__init__()
        self.selector = selector

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with zeros at hallucinated edges."""
        weight = whole(weight)
        chosen = self.selector.select(weight, self.training)
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
        return self.selector.shaped(mask.index_fill_(0, edge_id, True), weight)

    def _spread(self, values: Tensor, edge_id: Tensor, weight: Tensor) -> Tensor:
        """Return values at their edges, 0 elsewhere, in the shape of the weight."""
        spread = values.new_zeros(weight.numel()).index_copy_(0, edge_id, values)
        return self.selector.shaped(spread, weight)


class Weight(NamedTuple):
    """One tensor of weights in a network.

    Attributes:
        layer: The module that has it.
        parameter: Its name there.
    """

    layer: nn.Module
    parameter: str = "weight"

    @property
    def stored(self) -> Tensor:
        """The weights as they are stored, without asking a rule."""
        if self.is_parametrized:
            stored: Tensor = next(self.list.parameters(recurse=False))
            return stored
        weight: Tensor = getattr(self.layer, self.parameter)
        return weight

    @property
    def is_parametrized(self) -> bool:
        """Whether they are computed from others."""
        return bool(parametrize.is_parametrized(self.layer, self.parameter))

    @property
    def selector(self) -> EdgeSelector | None:
        """What chooses among them, if :func:`sparsify` made them sparse."""
        parts = self.list if self.is_parametrized else ()
        return next((part.selector for part in parts if isinstance(part, SparseWeight)), None)

    @property
    def evaluated(self) -> Tensor:
        """The weights as they are in evaluation, without a gradient."""
        modes = [(module, module.training) for module in self.layer.modules()]
        self.layer.eval()
        weight: Tensor = getattr(self.layer, self.parameter).detach()
        for module, mode in modes:
            module.training = mode
        return weight

    @property
    def num_real(self) -> int:
        """How many are real.

        Those that a rule chooses, which may weigh 0 just after they have grown; without a rule,
        those other than 0.
        """
        if self.selector is not None:
            return len(self.selector.select(whole(self.stored.detach()), training=False).edge_id)
        return int(torch.count_nonzero(self.evaluated))

    @property
    def list(self) -> Any:
        """What computes them: PyTorch's list of parametrizations."""
        lists: Any = self.layer.parametrizations
        return lists[self.parameter]


def weights_of(module: nn.Module, embeddings: bool = True) -> Iterator[tuple[str, Weight]]:
    """Yield the weights that can be made sparse, by name.

    Those of convolutions and linear layers go by the name of the layer; others by their own, such
    as ``"encoder.attention.in_proj_weight"`` and ``"lstm.weight_ih_l0"``.

    Args:
        module: Any network.
        embeddings: Whether those of embeddings are among them.

    Raises:
        ValueError: A layer that does not know its shape yet.
    """
    for path, layer in module.named_modules():
        for parameter in _parameters_of(layer, embeddings):
            weight = Weight(layer, parameter)
            name = path if parameter == "weight" else f"{path}.{parameter}".removeprefix(".")
            if isinstance(weight.stored, nn.UninitializedParameter):
                raise ValueError(
                    f"{name or 'the layer'} does not know its shape yet: run the module once first"
                )
            if weight.stored.numel():
                yield name, weight


def _parameters_of(layer: nn.Module, embeddings: bool) -> list[str]:
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
    """Yield those that :func:`sparsify` made sparse."""
    for name, weight in weights_of(module):
        if weight.selector is not None:
            yield name, weight


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a name is one of these, or fits a pattern."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_names(patterns: Sequence[str], layers: Mapping[str, Weight]) -> None:
    """Raise where a name or pattern fits no layer; the message shows the nearest."""
    if isinstance(patterns, str):
        raise TypeError(f"keep_dense is a list of names: [{patterns!r}]")
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            close = difflib.get_close_matches(pattern, layers, n=1, cutoff=0.4)
            hint = f"; the nearest is {close[0]!r}" if close else ""
            raise ValueError(
                f"no layer or weight that can be sparse is named {pattern!r}{hint} "
                f"(there are {len(layers)}: {', '.join(list(layers)[:5])}, ...)"
            )
