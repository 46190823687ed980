"""Runs a network once and determines which channels between its layers are live."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dnw_graph._evaluation import evaluating
from dnw_graph.neural_graph import NeuralGraph

WEIGHTED = (NeuralGraph, nn.modules.conv._ConvNd, nn.Linear)
AVERAGE_POOLS = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)
SEQUENCE_LAYERS = (nn.MultiheadAttention, nn.RNNBase, nn.modules.rnn.RNNCellBase)
"""Layers whose inputs and outputs are several tensors, of which all channels are read."""
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
KNOWN = (*WEIGHTED, *SEQUENCE_LAYERS, nn.Embedding)
"""Layers with weights whose cost is known."""
KEEPS_CHANNELS = (
    *AVERAGE_POOLS,
    *(nn.modules.batchnorm._NormBase, nn.PReLU, nn.Identity, nn.Flatten),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus),
    *(nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Upsample),
)


@runtime_checkable
class Counted(Protocol):
    """A module that reports its own cost."""

    def counted(self, features: Sequence[int]) -> tuple[int, int]:
        """Return multiply-adds and parameters for one input with channels of size ``features``."""


@dataclass(frozen=True)
class Call:
    """One call of a layer: ``out = module(x, *others)``."""

    module: nn.Module
    x: Tensor
    out: Tensor
    others: tuple[Tensor, ...] = ()


class _Watch(TorchFunctionMode):
    """Records calls of layers, and the tensors that are read by anything other than a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        # By id; holding the tensors keeps their ids from being reused.
        self.other_reads: dict[int, Tensor] = {}
        self._depth = 0

    def enter(self, module: nn.Module, args: object) -> None:
        """Record the start of a layer."""
        self._depth += 1

    def leave(self, module: nn.Module, args: Any, kwargs: Any, out: object) -> None:
        """Record the end of a layer."""
        self._depth -= 1
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if isinstance(module, SEQUENCE_LAYERS):
            self.calls.append(_sequence_call(module, args, kwargs, out))
        elif len(tensors) == 1 and isinstance(out, Tensor):
            self.calls.append(Call(module, tensors[0], out))
            return
        self.other_reads |= {id(x): x for x in tensors}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not self._depth and isinstance(result, Tensor):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.other_reads |= {id(x): x for x in tensors}
        return result


def _sequence_call(module: nn.Module, args: Any, kwargs: Any, out: object) -> Call:
    """Return a call with its inputs in the order of the layer's signature."""
    arguments = inspect.signature(module.forward).bind(*args, **kwargs).arguments
    values = [v.data if isinstance(v, PackedSequence) else v for v in arguments.values()]
    x, *others = (a for a in tree_leaves(values) if isinstance(a, Tensor))
    result = next(a for a in tree_leaves(out) if isinstance(a, Tensor))
    return Call(module, x, result, tuple(others))


def run(model: nn.Module, example: Tensor) -> list[Call]:
    """Run a network in evaluation mode and return the calls of its layers in order."""
    watch = _Watch()
    layers = list(_layers(model))
    handles = [layer.register_forward_pre_hook(watch.enter) for layer in layers]
    handles += [layer.register_forward_hook(watch.leave, with_kwargs=True) for layer in layers]
    try:
        with evaluating(model), torch.no_grad(), watch:
            out = model(example)
    finally:
        for handle in handles:
            handle.remove()
    results = {id(x): x for x in tree_leaves(out) if isinstance(x, Tensor)}
    other_reads = watch.other_reads | results
    return [
        call if id(call.out) not in other_reads else _ReadElsewhere(**vars(call))
        for call in watch.calls
    ]


class _ReadElsewhere(Call):
    """A call whose whole output is read by something other than a layer."""


def live_channels(
    calls: Sequence[Call],
    reads: Callable[[NeuralGraph, Tensor], Tensor],
    feeds: Mapping[NeuralGraph, Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Return boolean masks of the live input and output channels of each call.

    Args:
        calls: From :func:`run`.
        reads: Returns a mask of the input channels that a graph reads, given the mask of its output
            channels that are read.
        feeds: Mask of the output channels of each graph that can differ from 0.
    """
    nonzero: dict[int, Tensor] = {}  # by id of the tensor: which channels can differ from 0
    for call in calls:
        if isinstance(call.module, NeuralGraph):
            nonzero[id(call.out)] = feeds[call.module]
        elif _keeps_channels(call) and id(call.x) in nonzero:
            nonzero[id(call.out)] = nonzero[id(call.x)]
    use: dict[int, Tensor] = {}  # by id of the tensor: which channels a layer uses
    for call in reversed(calls):
        all_channels = torch.ones(_width(call.x), dtype=torch.bool, device="cpu")
        if isinstance(call.module, NeuralGraph):
            outputs = torch.ones(_width(call.out), dtype=torch.bool, device="cpu")
            channels = reads(call.module, use.get(id(call.out), outputs))
        elif _keeps_channels(call) and not isinstance(call, _ReadElsewhere):
            channels = use.get(id(call.out), all_channels)
        else:
            channels = all_channels
        use[id(call.x)] = use.get(id(call.x), ~all_channels) | channels
    live = []
    for call in calls:
        inputs = nonzero.get(id(call.x), torch.ones(_width(call.x), dtype=torch.bool, device="cpu"))
        outputs = torch.ones(_width(call.out), dtype=torch.bool, device="cpu")
        if not isinstance(call, _ReadElsewhere):
            outputs = use.get(id(call.out), outputs)
        live.append((inputs, outputs))
    return live


def _width(x: Tensor) -> int:
    return x.shape[1] if x.dim() > 1 else 1


def _keeps_channels(call: Call) -> bool:
    return isinstance(call.module, KEEPS_CHANNELS) and _width(call.x) == _width(call.out)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that count as one layer: graphs, known layers, childless modules."""
    children = list(module.children())
    if isinstance(module, (*KNOWN, Counted)) or not children:
        yield module
    else:
        for child in children:
            yield from _layers(child)


def unknown_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with direct parameters that are not counted."""
    if isinstance(module, (*KNOWN, Counted)):
        return
    if not isinstance(module, NORMS) and any(True for _ in module.parameters(recurse=False)):
        yield module
    for child in module.children():
        yield from unknown_layers(child)
