"""Freeze networks: remove nodes that no output needs, fold norms, and join graphs."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from dnw_graph._deprecated import warn_renamed
from dnw_graph._wrapped import unwrapped
from dnw_graph.frozen.engine import usable
from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.layout import Part
from dnw_graph.frozen.recurrent import FrozenRecurrent, freeze_recurrent
from dnw_graph.frozen.report import Report, counts, report
from dnw_graph.frozen.unroll import unroll
from dnw_graph.neural_graph import GraphState, NeuralGraph
from dnw_graph.schedule import Discrete
from dnw_graph.topology import Role
from dnw_graph.topology.order import reached


class FrozenModel(nn.Sequential):
    """A sequence of layers with frozen graphs among them, for evaluation only.

    Attributes:
        notes: Text by name that is stored in a file with it, such as the names of classes.
    """

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.notes: dict[str, str] = {}

    def train(self, mode: bool = True) -> "FrozenModel":
        """Do nothing for ``mode=False``, since a frozen model is always in evaluation.

        Raises:
            ValueError: If ``mode`` is True.
        """
        if mode:
            raise ValueError(
                "a frozen model cannot be trained: train the model that it was frozen from"
            )
        return super().train(mode)

    def forward(
        self, x: Tensor, state: GraphState | None = None, lengths: Tensor | None = None
    ) -> Any:
        """Return the output of the last layer.

        A convolution before a graph is computed by the graph's engine where possible.

        Args:
            x: Input of the network.
            state: State of the nodes, as for :meth:`NeuralGraph.forward`; only for a single graph
                that takes or returns sequences.
            lengths: Lengths of the sequences, as for :meth:`NeuralGraph.forward`; likewise.

        Raises:
            ValueError: If a state or lengths were passed, but the network does not take them.
        """
        if state is not None or lengths is not None:
            if len(self) != 1 or not isinstance(self[0], FrozenRecurrent):
                raise ValueError(
                    "a state and lengths are for a graph that takes or returns sequences and was "
                    "frozen alone: freeze(graph)"
                )
            return self[0](x, state, lengths)
        stem: nn.Conv2d | None = None
        for layer, following in zip_longest(self, list(self)[1:]):
            if stem is not None and isinstance(layer, FrozenGraph):
                x, stem = layer.engine(x, stem), None
            elif isinstance(layer, nn.Conv2d) and _is_stem(layer, following, x):
                stem = layer
            else:
                x = layer(x)
        return x

    def forward_by_torch(self, x: Tensor) -> Tensor:
        """Return the same as a call, computed by PyTorch's operations alone."""
        for layer in self:
            x = layer.forward_by_torch(x) if isinstance(layer, FrozenGraph) else layer(x)
        return x

    def plainly(self, x: Tensor) -> Tensor:
        """Deprecated name of :meth:`forward_by_torch`."""
        warn_renamed("FrozenModel.plainly", "forward_by_torch")
        return self.forward_by_torch(x)

    def report(
        self,
        image_size: int = 224,
        *,
        example: Tensor | None = None,
        compared_with: Callable[[Tensor], object] | None = None,
    ) -> Report:
        """Count and measure the cost of the network for one image.

        Args:
            image_size: Height and width in pixels.
            example: One input ``[1, ...]`` in place of an image.
            compared_with: Another network, or a function of the input, timed in turns with this
                one; the report says which of them is faster on this machine.
        """
        x = self._zeros((image_size, image_size)) if example is None else example
        return report(self, x, compared_with)

    def counted(self, features: Sequence[int]) -> tuple[int, int]:
        """Return multiply-adds and parameters for one input.

        Args:
            features: Size of an input's channels.
        """
        costs = counts(self, self._zeros(features))
        return sum(count.macs for count in costs), sum(count.parameters for count in costs)

    def _zeros(self, features: Sequence[int]) -> Tensor:
        """Return an input ``[1, C, *features]`` of zeros."""
        layers = (layer for layer in self if isinstance(layer, nn.Conv2d | nn.Linear | FrozenGraph))
        first = next(layers, None)
        if first is None:
            raise ValueError(
                "pass an example: the number of input channels does not follow from the network"
            )
        channels = first.least_channels if isinstance(first, FrozenGraph) else first.weight.shape[1]
        return torch.zeros((1, channels, *features), dtype=torch.float32, device="cpu")

    @property
    def graphs(self) -> list[FrozenGraph]:
        """The frozen graphs among the layers."""
        return [layer for layer in self if isinstance(layer, FrozenGraph)]


def _is_stem(layer: nn.Conv2d, following: nn.Module | None, x: Tensor) -> bool:
    """Return whether the engine of a graph can compute the convolution before it, for ``x``."""
    if not isinstance(following, FrozenGraph) or not usable(x):
        return False
    fits = x.dim() == 4 and x.shape[1] == layer.in_channels  # else the layer itself raises
    return fits and following.node.device == x.device and following.engine.takes(layer)


@torch.no_grad()
def freeze(model: nn.Module, state_dtype: torch.dtype = torch.float32) -> FrozenModel:
    """Return a copy of a network for evaluation that computes only what its outputs need.

    Nodes from which no path of real edges leads to an output are removed. Constant nodes are
    computed once for each size of input. Normalisation is folded into the layer before it. On a
    CPU, kernels compute the graphs, along real edges where that is faster. Weights must not be
    changed in place after the first call.

    Args:
        model: A :class:`NeuralGraph`, or a network of modules that follow one another, with graphs
            among them; it is not changed. It may be compiled, averaged or wrapped for training by
            several processes.
        state_dtype: Type in which kernels store the states of nodes, ``torch.float32`` or
            ``torch.bfloat16``. Inputs, weights, sums and outputs are float32 in both cases.
            bfloat16 halves the memory that is read for each edge, and rounds each state to 8
            significant bits.

    Returns:
        The frozen network, on the CPU, in float32. Its outputs equal those of ``model.eval()`` to
        rounding.

    Raises:
        ValueError: If the modules do not follow one another, there is no graph among them, a
            schedule or node function cannot be frozen, or ``state_dtype`` is another type.
    """
    layers = [layer for layer in _chain(model) if not isinstance(layer, nn.Dropout | nn.Identity)]
    if not any(isinstance(layer, NeuralGraph) for layer in layers):
        raise ValueError(
            "freeze() found no NeuralGraph in the network; bake() makes the zeros of sparse layers "
            "permanent"
        )
    frozen: list[nn.Module] = []
    for layer in _freeze_layers(_fuse_norms([_copy(layer) for layer in layers])):
        joined = None
        if isinstance(layer, FrozenGraph) and frozen and isinstance(frozen[-1], FrozenGraph):
            joined = _join(frozen[-1], layer)
        frozen = [*frozen, layer] if joined is None else [*frozen[:-1], joined]
    _update_reached(frozen)
    network = FrozenModel(*frozen).eval()
    _store_states_in(state_dtype, network)
    return network


def _store_states_in(dtype: torch.dtype, network: nn.Module) -> None:
    """Set the type in which the kernels of all frozen graphs of a network store states."""
    for module in network.modules():
        if isinstance(module, FrozenGraph):
            module.state_dtype = dtype


@torch.no_grad()
def freeze_graphs(model: nn.Module, state_dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of a network in which each graph is replaced by a frozen one.

    This is for networks whose modules do not follow one another, such as residual networks and
    transformers. Unlike :func:`freeze`, it does not join graphs or fold norms across layers.

    Args:
        model: Any network with graphs; it is not changed.
        state_dtype: As for :func:`freeze`.

    Returns:
        The copy in evaluation, on the CPU, in float32, with a :class:`FrozenModel` for each graph.

    Raises:
        ValueError: If there is no graph in the network, or a graph cannot be frozen; the message
            names it.
    """
    inner = unwrapped(model)
    if isinstance(inner, NeuralGraph):
        return freeze(inner, state_dtype)
    network = copy.deepcopy(inner).cpu().float().eval().requires_grad_(False)
    frozen: dict[int, nn.Module] = {}
    for name, module in list(network.named_modules(remove_duplicate=False)):
        for child_name, child in list(module._modules.items()):
            if child is None:
                continue
            graph = unwrapped(child)
            if isinstance(graph, NeuralGraph) and id(graph) not in frozen:
                try:
                    frozen[id(graph)] = freeze(graph, state_dtype)
                except ValueError as error:
                    path = f"{name}.{child_name}".removeprefix(".")
                    raise ValueError(f"graph {path}: {error}") from error
            if isinstance(graph, NeuralGraph) or graph is not child:
                setattr(module, child_name, frozen.get(id(graph), graph))
    if not frozen:
        raise ValueError(
            "freeze_graphs() found no NeuralGraph in the network; bake() makes the zeros of sparse "
            "layers permanent"
        )
    return network


class _Tracer(fx.Tracer):
    """A tracer that does not trace into graphs and wrappers."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if isinstance(module, NeuralGraph) or not list(module.children()):
            return True
        return unwrapped(module) is not module


def _chain(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a network in the order in which they are called.

    Raises:
        ValueError: If the modules do not follow one another, or the network is frozen already.
    """
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
            "in its place"
        ) from error
    modules, last = [], None
    for node in graph.nodes:
        allowed = node.op in ("placeholder", "call_module", "output")
        follows = last is None or (list(node.all_input_nodes) == [last] and not node.kwargs)
        if not allowed or not follows or (node.op == "placeholder" and last is not None):
            raise ValueError(
                "freeze() takes networks whose modules follow one another, such as nn.Sequential; "
                f"in this one, {node.name} ({node.op.replace('_', ' ')}) breaks the sequence. "
                "freeze_graphs() freezes each graph in its place"
            )
        if node.op == "call_module":
            modules += _chain(model.get_submodule(str(node.target)))
        last = node
    return modules


def _copy(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer in evaluation, on the CPU, in float32; graphs are not copied."""
    if isinstance(layer, NeuralGraph):
        return layer
    return copy.deepcopy(layer).cpu().float().eval().requires_grad_(False)


def _fuse_norms(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Return layers with batch norms folded into the convolution or linear layer before them."""
    fused: list[nn.Module] = []
    for layer in layers:
        previous = fused[-1] if fused else None
        tracked = getattr(layer, "running_mean", None) is not None
        if isinstance(layer, nn.BatchNorm2d) and type(previous) is nn.Conv2d and tracked:
            fused[-1] = fuse_conv_bn_eval(previous, layer)
        elif isinstance(layer, nn.BatchNorm1d) and type(previous) is nn.Linear and tracked:
            fused[-1] = fuse_linear_bn_eval(previous, layer)
        else:
            fused.append(layer)
    return fused


def _freeze_layers(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """Freeze graphs, from the last to the first, since each needs the channels that the next reads.

    Outputs of graphs and convolutions that the next graph does not read are removed.
    """
    frozen: list[nn.Module] = []
    for layer in reversed(layers):
        following = frozen[0] if frozen else None
        if isinstance(layer, NeuralGraph) and _takes_or_returns_sequences(layer):
            frozen.insert(0, freeze_recurrent(layer))
            continue
        if isinstance(layer, NeuralGraph):
            read = _read(following, layer.topology.num_outputs)
            graph = unroll(layer, read)
            while len(frozen) and (folded := _fold(graph, frozen[0])) is not None:
                graph = folded
                del frozen[0]
            frozen.insert(0, graph)
        elif type(layer) is nn.Conv2d and layer.groups == 1 and isinstance(following, FrozenGraph):
            read = _pad_to_vectors(_read(following, layer.out_channels))
            frozen.insert(0, _select_channels(layer, read))
        else:
            frozen.insert(0, layer)
            continue
        if isinstance(following, FrozenGraph):  # renumber the channels that it reads
            frozen[1] = _replace(following, inputs=(read.cumsum(0) - 1)[following.inputs])
    return frozen


def _takes_or_returns_sequences(graph: NeuralGraph) -> bool:
    """Return whether a graph takes or returns sequences, in discrete time."""
    schedule = graph.schedule
    sequences = schedule.takes_sequence or schedule.gives_sequence
    return isinstance(schedule, Discrete) and sequences


def _read(following: nn.Module | None, number: int) -> Tensor:
    """Return which of ``number`` channels the next layer reads, boolean."""
    if not isinstance(following, FrozenGraph):
        return torch.ones(number, dtype=torch.bool, device="cpu")
    return torch.isin(torch.arange(number, device="cpu"), following.inputs)


def _pad_to_vectors(read: Tensor) -> Tensor:
    """Select further channels, so that their number is a multiple of 16.

    PyTorch's convolutions take longer for 30 output channels than for 32.
    """
    missing = -int(read.sum()) % 16 if read.any() else 16  # a convolution needs an output channel
    return read | (~read & ((~read).cumsum(0) <= missing))


def _replace(graph: FrozenGraph, parts: Sequence[Part] = (), **tensors: Tensor) -> FrozenGraph:
    """Return a graph with other parts, if passed, or other tensors."""
    return FrozenGraph(parts or graph.parts, graph.strides, **{**graph.tensors(), **tensors})


def _select_channels(conv: nn.Conv2d, channels: Tensor) -> nn.Conv2d:
    """Remove all output channels of a convolution but some (a mask), in place."""
    conv.out_channels = int(channels.sum())
    conv.weight = nn.Parameter(conv.weight[channels], requires_grad=False)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias[channels], requires_grad=False)
    return conv


def _fold(graph: FrozenGraph, layer: nn.Module) -> FrozenGraph | None:
    """Fold the norm or ReLU after a graph into its outputs; return None if that is impossible."""
    output_parts = [part for part in graph.parts if part.role == Role.OUTPUT]
    source = graph.edge_index[0]
    for part in output_parts:
        sends = bool(((source >= part.first) & (source < part.past)).any())
        if sends or part.filters or part.relu or part.eps is not None:
            return None
    if len(graph.outputs) != sum(map(len, output_parts)):
        return None
    changes: dict[str, Any] = {}
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layer.track_running_stats:
        assert layer.running_var is not None
        assert layer.running_mean is not None
        scale = (layer.running_var.double() + layer.eps).rsqrt()
        shift = -layer.running_mean.double() * scale
        if layer.affine:
            scale, shift = scale * layer.weight, shift * layer.weight + layer.bias
        nodes = graph.outputs
        graph.shift[nodes] = (scale * graph.shift[nodes] + shift).float()
        graph.scale[nodes] = (scale * graph.scale[nodes]).float()
        changes = {"norm": True}
    elif isinstance(layer, nn.ReLU):
        changes = {"relu": True}
    else:
        return None
    parts = [replace(p, **changes) if p.role == Role.OUTPUT else p for p in graph.parts]
    return _replace(graph, parts)


def _join(first: FrozenGraph, second: FrozenGraph) -> FrozenGraph | None:
    """Return one graph for two in a row: an output and the input that reads it become one node.

    Return None if an output of the first graph does more than sum, sends to other nodes, or is not
    read by exactly one input of the second.
    """
    sums = [p for p in first.parts if p.role == Role.OUTPUT and p == _without_formula(p)]
    ends = _numbers(first, sums)
    read = first.outputs[second.inputs]
    one_to_one = torch.equal(read.sort().values, ends) and len(first.outputs) == len(ends)
    if not one_to_one or bool(torch.isin(first.edge_index[0], ends).any()):
        return None
    remaining = [p for p in first.parts if p not in sums]
    nodes = _numbers(first, remaining)
    number = torch.full((first.num_nodes,), -1, device="cpu")
    number[nodes] = torch.arange(len(nodes), device="cpu")
    number[read] = len(nodes) + torch.arange(len(read), device="cpu")
    edge_index = torch.cat([number[first.edge_index], second.edge_index + len(nodes)], 1)
    by_target = (edge_index[1] * (len(nodes) + second.num_nodes) + edge_index[0]).argsort()
    tensors = {
        name: torch.cat([getattr(first, name)[nodes], x])
        for name, x in second.tensors().items()
        if name in ("node", "scale", "shift", "filters", "reached")
    }
    return FrozenGraph(
        _join_parts(remaining, second.parts, len(first.strides)),
        (*first.strides, *second.strides),
        edge_index=edge_index[:, by_target],
        edge_weight=torch.cat([first.edge_weight, second.edge_weight])[by_target],
        inputs=first.inputs,
        outputs=second.outputs + len(nodes),
        **tensors,
    )


def _join_parts(first: Sequence[Part], second: Sequence[Part], levels: int) -> list[Part]:
    """Return the parts of two graphs in a row, the first of which has ``levels`` strides."""
    parts: list[Part] = []
    for part in first:
        parts.append(_move(part, parts, 0))
    for part in second:
        role = Role.HIDDEN if part.role == Role.INPUT else part.role
        parts.append(replace(_move(part, parts, levels), role=role))
    return parts


def _numbers(graph: FrozenGraph, parts: Sequence[Part]) -> Tensor:
    """Return the numbers of the nodes of some parts of a graph."""
    numbers = [torch.arange(part.first, part.past, device="cpu") for part in parts]
    return torch.cat(numbers or [graph.node[:0]])


def _without_formula(part: Part) -> Part:
    """Return a part of the same nodes that only sums."""
    return replace(part, norm=False, eps=None, relu=False, filters=False, level=part.reads)


def _move(part: Part, previous: Sequence[Part], levels: int) -> Part:
    """Return a part numbered after the previous ones, with its levels raised by ``levels``."""
    first = previous[-1].past if previous else 0
    past, reads = first + len(part), part.reads + levels
    return replace(part, first=first, past=past, reads=reads, level=part.level + levels)


def _update_reached(layers: Sequence[nn.Module]) -> None:
    """Set ``reached`` of each graph, given the constant outputs of the graph before it."""
    constant: Tensor | None = None
    for layer in layers:
        if not isinstance(layer, FrozenGraph):
            constant = None
            continue
        sources = torch.arange(len(layer.inputs), device="cpu")
        if constant is not None:
            sources = sources[~constant[layer.inputs]]
        layer.reached.copy_(reached(layer.edge_index, layer.num_nodes, sources))
        constant = ~layer.reached[layer.outputs]
