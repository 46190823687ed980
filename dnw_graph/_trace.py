"""Runs a network once and tells which channels matter between its layers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from dnw_graph.neural_graph import NeuralGraph

COUNTED = (NeuralGraph, nn.modules.conv._ConvNd, nn.Linear)
AVERAGE_POOLS = (
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.PReLU)
KEEPS_CHANNELS = (
    *AVERAGE_POOLS,
    *(nn.modules.batchnorm._NormBase, nn.PReLU, nn.Identity, nn.Flatten),
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardswish),
    *(nn.Hardtanh, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus),
    *(nn.Dropout, nn.Dropout2d, nn.MaxPool2d, nn.AdaptiveMaxPool2d, nn.Upsample),
)


@runtime_checkable
class Counted(Protocol):
    """A module that says itself what it costs."""

    def counted(self, features: Sequence[int]) -> tuple[int, int]:
        """Return multiply-adds and parameters for one input, whose channels have this size."""


@dataclass(frozen=True)
class Call:
    """One call of a layer: ``out = module(x)``."""

    module: nn.Module
    x: Tensor
    out: Tensor


class _Watch(TorchFunctionMode):
    """Notes calls of layers, and the tensors that anything but a layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.read_elsewhere: dict[int, Tensor] = {}  # by id; kept so that no id is used twice
        self._inside = 0

    def enter(self, module: nn.Module, args: object) -> None:
        """Note that a layer begins."""
        self._inside += 1

    def leave(self, module: nn.Module, args: Any, kwargs: Any, out: object) -> None:
        """Note that a layer has ended."""
        self._inside -= 1
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if len(tensors) == 1 and isinstance(out, Tensor):
            self.calls.append(Call(module, tensors[0], out))
        else:
            self.read_elsewhere |= {id(x): x for x in tensors}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        if not self._inside and isinstance(result, Tensor):
            tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            self.read_elsewhere |= {id(x): x for x in tensors}
        return result


def run(model: nn.Module, example: Tensor) -> list["Call"]:
    """Run a network in evaluation mode, and return the calls of its layers in order."""
    watch = _Watch()
    layers = list(_layers(model))
    handles = [layer.register_forward_pre_hook(watch.enter) for layer in layers]
    handles += [layer.register_forward_hook(watch.leave, with_kwargs=True) for layer in layers]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), watch:
            out = model(example)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    last = {id(x): x for x in tree_leaves(out) if isinstance(x, Tensor)}
    elsewhere = watch.read_elsewhere | last
    return [
        call if id(call.out) not in elsewhere else _Fixed(call.module, call.x, call.out)
        for call in watch.calls
    ]


class _Fixed(Call):
    """A call whose output something else than a layer reads, whole."""


def live_channels(
    calls: Sequence[Call],
    reads: Callable[[NeuralGraph, Tensor], Tensor],
    feeds: Mapping[NeuralGraph, Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Return for each call which input and which output channels are live, boolean.

    Args:
        calls: From :func:`run`.
        reads: Which channels of its input a graph reads, given which of its output anything reads.
        feeds: For each graph, which channels of its output can differ from 0.
    """
    fed: dict[int, Tensor] = {}  # by id of the tensor: which channels can differ from 0
    for call in calls:
        if isinstance(call.module, NeuralGraph):
            fed[id(call.out)] = feeds[call.module]
        elif _keeps_channels(call) and id(call.x) in fed:
            fed[id(call.out)] = fed[id(call.x)]
    read: dict[int, Tensor] = {}  # which channels some layer makes use of
    for call in reversed(calls):
        everything = torch.ones(_width(call.x), dtype=torch.bool, device="cpu")
        if isinstance(call.module, NeuralGraph):
            outputs = torch.ones(_width(call.out), dtype=torch.bool, device="cpu")
            wanted = reads(call.module, read.get(id(call.out), outputs))
        elif _keeps_channels(call) and not isinstance(call, _Fixed):
            wanted = read.get(id(call.out), everything)
        else:
            wanted = everything
        read[id(call.x)] = read.get(id(call.x), ~everything) | wanted
    live = []
    for call in calls:
        inputs = fed.get(id(call.x), torch.ones(_width(call.x), dtype=torch.bool, device="cpu"))
        outputs = torch.ones(_width(call.out), dtype=torch.bool, device="cpu")
        if not isinstance(call, _Fixed):
            outputs = read.get(id(call.out), outputs)
        live.append((inputs, outputs))
    return live


def _width(x: Tensor) -> int:
    return x.shape[1] if x.dim() > 1 else 1


def _keeps_channels(call: Call) -> bool:
    return isinstance(call.module, KEEPS_CHANNELS) and _width(call.x) == _width(call.out)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what is counted as one: graphs, convolutions, modules without modules in them."""
    children = list(module.children())
    if isinstance(module, (*COUNTED, Counted)) or not children:
        yield module
    else:
        for child in children:
            yield from _layers(child)


def unknown_layers(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules with parameters of their own that are not counted.

    Multi-head attention is among them: it multiplies by its weights past the layers in it.
    """
    if isinstance(module, (*COUNTED, Counted)):
        return
    known = isinstance(module, (*NORMS, nn.Embedding))
    if not known and any(True for _ in module.parameters(recurse=False)):
        yield module
    if not isinstance(module, nn.MultiheadAttention):
        for child in module.children():
            yield from unknown_layers(child)
