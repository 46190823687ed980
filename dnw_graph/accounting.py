"""One accounting of a network: edges, parameters and multiply-adds of the live graph."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dnw_graph import _trace
from dnw_graph._wrapped import unwrapped
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.node import WithoutTime
from dnw_graph.sparse import Layer, Weight
from dnw_graph.topology import Role
from dnw_graph.topology._order import distances


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one image costs.

    Attributes:
        macs: Multiply-adds; what other work calls FLOPs is twice this.
        parameters: Real edges, node functions of live nodes, weights of other layers;
            normalisation and biases are not counted.
        real_edges: Real edges of all graphs.
        candidate_edges: Candidate edges of all graphs.
        dead_nodes: Nodes other than outputs without a real edge out, as the paper counts them.
        unneeded_nodes: Nodes without a path of real edges to an output that anything reads: dead
            ones, those that feed only such, and outputs that nothing reads. :func:`freeze` removes
            them.
    """

    macs: int = 0
    parameters: int = 0
    real_edges: int = 0
    candidate_edges: int = 0
    dead_nodes: int = 0
    unneeded_nodes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: getattr(other, name) + n for name, n in vars(self).items()})

    def __str__(self) -> str:
        share = f" ({self.real_edges / self.candidate_edges:.2%})" if self.candidate_edges else ""
        return (
            f"{self.macs:,} MACs an image ({2 * self.macs:,} FLOPs), "
            f"{self.parameters:,} parameters, {self.real_edges:,} real of "
            f"{self.candidate_edges:,} candidate edges{share}, {self.dead_nodes:,} dead nodes, "
            f"{self.unneeded_nodes:,} without a path to an output"
        )


def cost(model: nn.Module, image_size: int | None = None, *, example: Tensor | None = None) -> Cost:
    """Count what a network costs for one image, as the paper does.

    Runs the network once in evaluation mode. Real edges count once a pixel, the node function of
    each live node 9 times (3x3), average pooling once a pixel; in time, that at each step, or each
    evaluation that the image took. Where a layer feeds graphs only, its
    channels without a real edge out do not count; where a graph feeds a layer, channels without a
    real edge in do not. That is followed through modules that keep channels apart (norms,
    activations, pooling, dropout); anything else reads every channel. Of a sparse layer the real
    weights count, of other layers those that are not 0.

    Args:
        model: A network, or a :class:`NeuralGraph` on its own.
        image_size: Height and width in pixels of an image with as many channels as the first layer
            reads. If None, 224 where that is a convolution; a network whose first layer is a graph
            or linear is given one vector of features.
        example: One input ``[1, ...]`` in place of an image, for a network that takes another kind.

    Returns:
        The cost; printed, it names units.

    Raises:
        ValueError: A network that cannot be run on such an image.

    Warns:
        UserWarning: Layers or node functions whose multiply-adds are unknown, and left out.
    """
    model = unwrapped(model)
    if example is None:
        example = _example(model, image_size)
    try:
        calls = _trace.run(model, example)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the network cannot be run on an input {list(example.shape)} to be counted: give "
            f"image_size, or as example an input that it takes ({error})"
        ) from error
    wirings = {
        call.module: call.module.wiring().edge_index.cpu()
        for call in calls
        if isinstance(call.module, NeuralGraph)
    }
    feeds = {graph: _ends(graph, e[1], Role.OUTPUT) for graph, e in wirings.items()}
    live = _trace.live_channels(
        calls, lambda graph, _: _ends(graph, wirings[graph][0], Role.INPUT), feeds
    )
    needed = {
        graph: torch.zeros(graph.topology.num_nodes, dtype=torch.bool, device="cpu")
        for graph in wirings
    }

    def reads(graph: NeuralGraph, outputs: Tensor) -> Tensor:
        """Return which inputs have a path to these outputs."""
        ends = graph.topology.outputs
        if len(outputs) == len(ends):
            ends = ends[outputs]
        away = distances(wirings[graph].flip(0), graph.topology.num_nodes, ends)
        needed[graph] |= away >= 0
        return away[graph.topology.inputs] >= 0

    _trace.live_channels(calls, reads, feeds)
    total, seen = Cost(unneeded_nodes=sum(int((~nodes).sum()) for nodes in needed.values())), set()
    for call, (inputs, outputs) in zip(calls, live, strict=True):
        module = call.module
        if isinstance(module, NeuralGraph):
            entry = _graph(module, wirings[module], call)
        else:
            entry = _layer(module, call, inputs, outputs)
        # What is there counts once, what is done counts every time.
        own = Weight(module).stored if isinstance(module, Layer) else module
        total += Cost(macs=entry.macs) if id(own) in seen else entry
        seen.add(id(own))
    unknown = list({id(m): m for m in _trace.unknown_layers(model)}.values())
    total += Cost(parameters=sum(map(_num_weights, unknown)))
    _warn_of_unknown([*unknown, *(m for graph in wirings for m in _uncounted_functions(graph))])
    return total


def _example(model: nn.Module, image_size: int | None) -> Tensor:
    """Return zeros of the size that the first layer of a network reads."""
    layers = [m for m in model.modules() if isinstance(m, _FIRST)]
    if image_size is not None or any(isinstance(m, nn.Conv2d) for m in layers):
        layers = [m for m in layers if not isinstance(m, nn.Linear)]
    first: nn.Module | None = next(iter(layers), None)
    if isinstance(first, NeuralGraph):
        channels = first.topology.num_inputs
    elif isinstance(first, nn.Linear):
        channels = first.in_features
    else:
        channels = first.in_channels if isinstance(first, nn.Conv2d) else 3
        image_size = image_size or 224
    shape = (1, channels) if image_size is None else (1, channels, image_size, image_size)
    like = next(model.parameters(), torch.empty(0, dtype=torch.float32, device="cpu"))
    return like.new_zeros(shape)


_FIRST = NeuralGraph, nn.Conv2d, nn.Linear


def _num_weights(module: nn.Module) -> int:
    """Return how many parameters a module has itself, biases and other vectors not counted."""
    parameters = module.parameters(recurse=isinstance(module, nn.MultiheadAttention))
    return sum(p.numel() for p in parameters if p.dim() > 1)


def _uncounted_functions(graph: NeuralGraph) -> list[nn.Module]:
    """Return the node functions with parameters that do not say how many multiply-adds they do."""
    functions = [*graph.nodes, *graph.messages]
    return [
        function
        for function in functions
        if getattr(function, "macs_per_pixel", None) is None
        and any(True for _ in function.parameters())
    ]


def _warn_of_unknown(modules: Sequence[nn.Module]) -> None:
    inner = (m.function if isinstance(m, WithoutTime) else m for m in modules)
    names = sorted({type(module).__name__ for module in inner})
    if names:
        warnings.warn(
            f"cost() does not know how many multiply-adds {', '.join(names)} takes, and leaves "
            "them out; a node function says so by an attribute macs_per_pixel",
            stacklevel=3,
        )


def _ends(graph: NeuralGraph, nodes: Tensor, role: Role) -> Tensor:
    """Return which channels of a graph's input or output are among some nodes."""
    channels = graph.topology.inputs if role == Role.INPUT else graph.topology.outputs
    return torch.isin(channels, nodes)


def _graph(graph: NeuralGraph, edge_index: Tensor, call: _trace.Call) -> Cost:
    """Count a graph: its maps are those of its outputs, in time those of its states."""
    topology, edges, schedule = graph.topology, edge_index.shape[1], graph.schedule
    groups = graph.grouping.topology.blocks
    firings = schedule.firings(graph.evaluations)
    like = call.x if schedule.keeps_size else call.out
    pixels = firings * like.shape[2 + schedule.takes_sequence :].numel()
    nodes = torch.arange(topology.num_nodes, device="cpu")
    has_out, has_in = torch.isin(nodes, edge_index[0]), torch.isin(nodes, edge_index[1])
    total = Cost(
        macs=edges * pixels,
        parameters=edges,
        real_edges=edges,
        candidate_edges=topology.num_candidates,
        dead_nodes=int((~has_out & (topology.role != Role.OUTPUT)).sum()),
    )
    for block, node, message in zip(groups, graph.nodes, graph.messages, strict=True):
        fires = has_in if block.role == Role.OUTPUT else has_out
        own = torch.arange(block.nodes.start, block.nodes.stop, device="cpu")
        for module, alive in ((node, fires), (message, has_out)):
            number = int(alive[graph.grouping.original(own)].sum())
            macs = number * (getattr(module, "macs_per_pixel", None) or 0) * pixels
            parameters = _function_parameters(module, number, len(block.nodes))
            total += Cost(macs=macs, parameters=parameters)
    return total


def _function_parameters(function: nn.Module, live_nodes: int, nodes: int) -> int:
    """Return the parameters of a node function: of the live nodes, and what all nodes share."""
    per_node = getattr(function, "parameters_per_node", None)
    if per_node is not None:
        return live_nodes * int(per_node)
    total = 0
    for parameter in function.parameters():
        by_node = parameter.dim() > 0 and len(parameter) == nodes
        total += parameter.numel() * live_nodes // nodes if by_node else parameter.numel()
    return total


def _edges(layer: nn.modules.conv._ConvNd | nn.Linear) -> Cost:
    """Return a layer's real weights, and its edges if :func:`sparsify` made it sparse."""
    weight = Weight(layer)
    total, real = weight.stored.numel(), weight.num_real
    if weight.selector is not None:
        return Cost(parameters=real, real_edges=real, candidate_edges=total)
    return Cost(parameters=real or total)


def _layer(module: nn.Module, call: _trace.Call, inputs: Tensor, outputs: Tensor) -> Cost:
    """Count a layer of which some input and output channels are live."""
    x, out = call.x, call.out
    if isinstance(module, nn.modules.conv._ConvNd):
        edges = _edges(module)
        if module.groups == 1:
            live = int(inputs.sum()) * int(outputs.sum())
            weights = edges.parameters * live // (len(inputs) * len(outputs))
        else:
            weights = edges.parameters * int(outputs.sum()) // len(outputs)
        grid = x if module.transposed else out
        return replace(edges, macs=weights * grid[0, 0].numel(), parameters=weights)
    if isinstance(module, nn.Linear):
        edges = _edges(module)
        weights = edges.parameters * int(inputs.sum()) // len(inputs)
        macs = weights * (out[0].numel() // module.out_features)
        return replace(edges, macs=macs, parameters=weights)
    if isinstance(module, _trace.AVERAGE_POOLS):
        return Cost(macs=int(inputs.sum()) * x[0, 0].numel())
    if isinstance(module, _trace.Counted):
        macs, parameters = module.counted(x.shape[2:])
        return Cost(macs=macs, parameters=parameters)
    return Cost(parameters=_num_weights(module) if isinstance(module, nn.Embedding) else 0)
