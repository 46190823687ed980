"""Networks with graphs in them, frozen: what no output needs is gone, and norms are folded in."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dnw_graph._wrapped import unwrapped
from dnw_graph.frozen.engine import usable
from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.layout import Part
from dnw_graph.frozen.recurrent import FrozenRecurrent
from dnw_graph.frozen.report import Report, counts, report
from dnw_graph.frozen.unroll import unroll
from dnw_graph.neural_graph import GraphState, NeuralGraph
from dnw_graph.schedule import Discrete
from dnw_graph.topology import Role
from dnw_graph.topology._order import reached


class FrozenModel(nn.Sequential):
    """Layers one after the other, among them frozen graphs; runs in evaluation only.

    Attributes:
        notes: What a file said of it, such as the names of classes.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.notes: dict[str, str] = {}

    def train(self, mode: bool = True) -> "FrozenModel":
        """Stay in evaluation.

        Raises:
            ValueError: ``mode`` is True.
        """
        if mode:
            raise ValueError("a frozen model is not trained: train the model it was made of")
        return super().train(mode)

    def forward(
        self, x: Tensor, state: GraphState | None = None, lengths: Tensor | None = None
    ) -> Any:
        """Return what the layers compute, a convolution together with the graph behind it.

        Args:
            x: What the network takes.
            state: See :meth:`NeuralGraph.forward`, of a graph in time that was frozen alone.
            lengths: See there.
        """
        if state is not None or lengths is not None:
            if len(self) != 1 or not isinstance(self[0], FrozenRecurrent):
                raise ValueError(
                    "a state and lengths are for a graph that takes or returns sequences, frozen "
                    "alone: freeze(graph)"
                )
            return self[0](x, state, lengths)
        stem: nn.Conv2d | None = None
        for layer, following in zip_longest(self, list(self)[1:]):
            if stem is not None and isinstance(layer, FrozenGraph):
                x, stem = layer.engine(x, stem), None
            elif isinstance(layer, nn.Conv2d) and _together(layer, following, x):
                stem = layer
            else:
                x = layer(x)
        return x

    def plainly(self, x: Tensor) -> Tensor:
        """Return the same as a call, by PyTorch's layers alone."""
        for layer in self:
            x = layer.plainly(x) if isinstance(layer, FrozenGraph) else layer(x)
        return x

    def report(self, image_size: int = 224, *, example: Tensor | None = None) -> Report:
        """Return what it costs for one image, counted and measured.

        Args:
            image_size: Height and width in pixels.
            example: One input ``[1, ...]`` in place of an image.
        """
        return report(self, self._zeros((image_size, image_size)) if example is None else example)

    def counted(self, features: Sequence[int]) -> tuple[int, int]:
        """Return multiply-adds and parameters for one input, whose channels have this size."""
        found = counts(self, self._zeros(features))
        return sum(count.macs for count in found), sum(count.parameters for count in found)

    def _zeros(self, features: Sequence[int]) -> Tensor:
        """Return an input of which each channel has this size."""
        layers = (layer for layer in self if isinstance(layer, nn.Conv2d | nn.Linear | FrozenGraph))
        first = next(layers, None)
        if first is None:
            raise ValueError("give an example: its size does not follow from the network")
        channels = first.least_channels if isinstance(first, FrozenGraph) else first.weight.shape[1]
        return torch.zeros((1, channels, *features), dtype=torch.float32, device="cpu")

    @property
    def graphs(self) -> list[FrozenGraph]:
        """The graphs in it."""
        return [layer for layer in self if isinstance(layer, FrozenGraph)]


def _together(layer: nn.Conv2d, following: nn.Module | None, x: Tensor) -> bool:
    """Return whether the engine of the graph that follows takes a convolution too."""
    if not isinstance(following, FrozenGraph) or not usable(x):
        return False
    fits = x.dim() == 4 and x.shape[1] == layer.in_channels  # else the layer's own error
    return fits and following.node.device == x.device and following.engine.takes(layer)


@torch.no_grad()
def freeze(model: nn.Module) -> FrozenModel:
    """Return what a network computes in evaluation, with what no output needs left out.

    Nodes from which no path of real edges leads to an output are removed; those to which none leads
    from an input are constants, which an image does not change; normalisation is folded into what
    comes before it. On a CPU graphs run by kernels that go through real edges only. What it is
    made of is fixed; weights changed in place after a first call are not seen.

    Args:
        model: A :class:`NeuralGraph`, or a network of modules that follow one another, with graphs
            among them; it stays as it is. It may be compiled, averaged or wrapped for training by
            several processes.

    Returns:
        The frozen network, on the CPU, in float32. Its outputs equal those of ``model.eval()`` to
        rounding.

    Raises:
        ValueError: A network in which one module does not follow the other, or without a graph; a
            schedule or node function that cannot be frozen.
    """
    layers = [layer for layer in _chain(model) if not isinstance(layer, nn.Dropout | nn.Identity)]
    if not any(isinstance(layer, NeuralGraph) for layer in layers):
        raise ValueError(
            "freeze() found no NeuralGraph in the network; bake() makes the zeros of sparse layers "
            "permanent"
        )
    frozen: list[nn.Module] = []
    for layer in _frozen(_fused([_copied(layer) for layer in layers])):
        joined = None
        if isinstance(layer, FrozenGraph) and frozen and isinstance(frozen[-1], FrozenGraph):
            joined = _joined(frozen[-1], layer)
        frozen = [*frozen, layer] if joined is None else [*frozen[:-1], joined]
    _reach(frozen)
    return FrozenModel(*frozen).eval()


@torch.no_grad()
def freeze_graphs(model: nn.Module) -> nn.Module:
    """Return a copy of a network with each graph frozen where it stands.

    For networks whose modules do not follow one another, such as residual networks and
    transformers. What :func:`freeze` gains between layers (a graph joined to the next, norms folded
    into the layer before) is not gained here.

    Args:
        model: Any network with graphs; it stays as it is.

    Returns:
        The copy in evaluation, on the CPU, in float32, whose graphs are :class:`FrozenModel`.

    Raises:
        ValueError: A network without a graph, or a graph that cannot be frozen; its name is in the
            message.
    """
    inner = unwrapped(model)
    if isinstance(inner, NeuralGraph):
        return freeze(inner)
    whole = copy.deepcopy(inner).cpu().float().eval().requires_grad_(False)
    found: dict[int, nn.Module] = {}
    for name, module in list(whole.named_modules(remove_duplicate=False)):
        for child_name, child in list(module._modules.items()):
            if child is None:
                continue
            graph = unwrapped(child)
            if isinstance(graph, NeuralGraph) and id(graph) not in found:
                try:
                    found[id(graph)] = freeze(graph)
                except ValueError as error:
                    path = f"{name}.{child_name}".removeprefix(".")
                    raise ValueError(f"graph {path}: {error}") from error
            if isinstance(graph, NeuralGraph) or graph is not child:
                setattr(module, child_name, found.get(id(graph), graph))
    if not found:
        raise ValueError(
            "freeze_graphs() found no NeuralGraph in the network; bake() makes the zeros of sparse "
            "layers permanent"
        )
    return whole


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, NeuralGraph) or not list(module.children()):
            return True
        return unwrapped(module) is not module


def _chain(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a network in the order in which they are called."""
    model = unwrapped(model)
    if isinstance(model, FrozenModel):
        raise ValueError("expected a network with graphs to freeze, got one that is frozen already")
    if isinstance(model, NeuralGraph) or not list(model.children()):
        return [model]
    try:
        graph = _Tracer().trace(model)
    except Exception as error:
        raise ValueError(
            "freeze() takes networks whose modules follow one another, such as nn.Sequential, and "
            f"could not trace {type(model).__name__}: {error}. freeze_graphs() freezes each graph "
            "where it stands"
        ) from error
    found, last = [], None
    for node in graph.nodes:
        known = node.op in ("placeholder", "call_module", "output")
        follows = last is None or (list(node.all_input_nodes) == [last] and not node.kwargs)
        if not known or not follows or (node.op == "placeholder" and last is not None):
            raise ValueError(
                "freeze() takes networks whose modules follow one another, such as nn.Sequential; "
                f"here {node.name} ({node.op.replace('_', ' ')}) does something else. "
                "freeze_graphs() freezes each graph where it stands"
            )
        if node.op == "call_module":
            found += _chain(model.get_submodule(str(node.target)))
        last = node
    return found


def _copied(layer: nn.Module) -> nn.Module:
    """Return a layer in evaluation, on the CPU, in float32; graphs as they are."""
    if isinstance(layer, NeuralGraph):
        return layer
    return copy.deepcopy(layer).cpu().float().eval().requires_grad_(False)


def _fused(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Fold batch norms into the convolution or linear layer before."""
    done: list[nn.Module] = []
    for layer in layers:
        before = done[-1] if done else None
        tracked = getattr(layer, "running_mean", None) is not None
        if isinstance(layer, nn.BatchNorm2d) and type(before) is nn.Conv2d and tracked:
            done[-1] = fuse_conv_bn_eval(before, layer)
        elif isinstance(layer, nn.BatchNorm1d) and type(before) is nn.Linear and tracked:
            done[-1] = fuse_linear_bn_eval(before, layer)
        else:
            done.append(layer)
    return done


def _frozen(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Freeze graphs from the last to the first, so that each knows what is read of it."""
    done: list[nn.Module] = []
    for layer in reversed(layers):
        following = done[0] if done else None
        if isinstance(layer, NeuralGraph) and _of_sequences(layer):
            done.insert(0, FrozenRecurrent(layer))
            continue
        if isinstance(layer, NeuralGraph):
            read = _read(following, layer.topology.num_outputs)
            graph = unroll(layer, read)
            while len(done) and (folded := _folded(graph, done[0])) is not None:
                graph = folded
                del done[0]
            done.insert(0, graph)
        elif type(layer) is nn.Conv2d and layer.groups == 1 and isinstance(following, FrozenGraph):
            read = _whole_vectors(_read(following, layer.out_channels))
            done.insert(0, _narrowed(layer, read))
        else:
            done.insert(0, layer)
            continue
        if isinstance(following, FrozenGraph):  # what it does not read is gone
            done[1] = _with(following, inputs=(read.cumsum(0) - 1)[following.inputs])
    return done


def _of_sequences(graph: NeuralGraph) -> bool:
    """Return whether a graph takes or returns sequences, in discrete time."""
    schedule = graph.schedule
    sequences = schedule.takes_sequence or schedule.gives_sequence
    return isinstance(schedule, Discrete) and sequences


def _read(following: nn.Module | None, number: int) -> Tensor:
    """Return which of some channels a layer reads, boolean."""
    if not isinstance(following, FrozenGraph):
        return torch.ones(number, dtype=torch.bool, device="cpu")
    return torch.isin(torch.arange(number, device="cpu"), following.inputs)


def _whole_vectors(read: Tensor) -> Tensor:
    """Return these channels and as many others as make a multiple of 16.

    PyTorch's convolutions take longer for 30 output channels than for 32.
    """
    missing = -int(read.sum()) % 16 or 16 * (not read.any())  # none at all is no convolution
    return read | (~read & ((~read).cumsum(0) <= missing))


def _with(graph: FrozenGraph, parts: Sequence[Part] = (), **tensors: Tensor) -> FrozenGraph:
    """Return a graph that is another one but for some of its parts or tensors."""
    return FrozenGraph(parts or graph.parts, graph.strides, **{**graph.tensors(), **tensors})


def _narrowed(conv: nn.Conv2d, wanted: Tensor) -> nn.Conv2d:
    """Return a convolution with some of its output channels."""
    conv.out_channels = int(wanted.sum())
    conv.weight = nn.Parameter(conv.weight[wanted], requires_grad=False)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias[wanted], requires_grad=False)
    return conv


def _folded(graph: FrozenGraph, layer: nn.Module) -> FrozenGraph | None:
    """Return a graph whose outputs do what the layer after it did; None if they cannot."""
    ends = [part for part in graph.parts if part.role == Role.OUTPUT]
    source = graph.edge_index[0]
    for part in ends:
        feeds = bool(((source >= part.first) & (source < part.past)).any())
        if feeds or part.filters or part.relu or part.eps is not None:
            return None
    if len(graph.outputs) != sum(map(len, ends)):
        return None
    change: dict[str, Any] = {}
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats:
        assert layer.running_var is not None
        assert layer.running_mean is not None
        scale = (layer.running_var.double() + layer.eps).rsqrt()
        shift = -layer.running_mean.double() * scale
        if layer.affine:
            scale, shift = scale * layer.weight, shift * layer.weight + layer.bias
        at = graph.outputs
        graph.shift[at] = (scale * graph.shift[at] + shift).float()
        graph.scale[at] = (scale * graph.scale[at]).float()
        change = {"norm": True}
    elif isinstance(layer, nn.ReLU):
        change = {"relu": True}
    else:
        return None
    parts = [replace(p, **change) if p.role == Role.OUTPUT else p for p in graph.parts]
    return _with(graph, parts)


def _joined(first: FrozenGraph, second: FrozenGraph) -> FrozenGraph | None:
    """Return one graph for two in a row: an output and the input that reads it are one node.

    None where outputs do more than to sum, or feed other nodes; or where one is read twice.
    """
    sums = [p for p in first.parts if p.role == Role.OUTPUT and p == _plain(p)]
    ends = torch.cat(
        [torch.arange(p.first, p.past, device="cpu") for p in sums] or [first.node[:0]]
    )
    read = first.outputs[second.inputs]
    once = torch.equal(read.sort().values, ends) and len(first.outputs) == len(ends)
    if not once or bool(torch.isin(first.edge_index[0], ends).any()):
        return None
    kept = [p for p in first.parts if p not in sums]
    level, order = len(first.strides), []
    parts: list[Part] = []
    for part in kept:
        parts.append(_moved(part, parts, 0))
        order.append(torch.arange(part.first, part.past, device="cpu"))
    before = sum(map(len, kept))
    number = torch.full((first.num_nodes,), -1, device="cpu")
    number[torch.cat([*order, first.node[:0]])] = torch.arange(before, device="cpu")
    number[read] = before + torch.arange(len(read), device="cpu")
    for part in second.parts:
        role = Role.HIDDEN if part.role == Role.INPUT else part.role
        parts.append(replace(_moved(part, parts, level), role=role))
    edge_index = torch.cat([number[first.edge_index], second.edge_index + before], 1)
    by_target = (edge_index[1] * (before + second.num_nodes) + edge_index[0]).argsort()
    tensors = {
        name: torch.cat([getattr(first, name)[torch.cat([*order, number[:0]])], x])
        for name, x in second.tensors().items()
        if name in ("node", "scale", "shift", "filters", "reached")
    }
    return FrozenGraph(
        parts,
        (*first.strides, *second.strides),
        edge_index=edge_index[:, by_target],
        edge_weight=torch.cat([first.edge_weight, second.edge_weight])[by_target],
        inputs=first.inputs,
        outputs=second.outputs + before,
        **tensors,
    )


def _plain(part: Part) -> Part:
    """Return a part that does nothing but sum."""
    return replace(part, norm=False, eps=None, relu=False, filters=False, level=part.reads)


def _moved(part: Part, before: Sequence[Part], level: int) -> Part:
    """Return a part behind others, its levels raised."""
    first = before[-1].past if before else 0
    past, reads = first + len(part), part.reads + level
    return replace(part, first=first, past=past, reads=reads, level=part.level + level)


def _reach(layers: Sequence[nn.Module]) -> None:
    """Tell graphs what images reach, given what they reach of the graph before."""
    constant: Tensor | None = None
    for layer in layers:
        if not isinstance(layer, FrozenGraph):
            constant = None
            continue
        moving = torch.arange(len(layer.inputs), device="cpu")
        if constant is not None:
            moving = moving[~constant[layer.inputs]]
        layer.reached.copy_(reached(layer.edge_index, layer.num_nodes, moving))
        constant = ~layer.reached[layer.outputs]
