"""Cost of a network: edges, parameters and multiply-adds of its live part."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph import _trace
from dnw_graph._deprecated import warn_renamed
from dnw_graph._wrapped import unwrapped
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.node import WithoutTime
from dnw_graph.sparse import Layer, Weight, parameters_of, weights_of
from dnw_graph.topology import Role
from dnw_graph.topology.order import distances


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a network for one image.

    Attributes:
        macs: Multiply-adds; FLOPs, as reported in other work, are twice as many.
        parameters: Real edges, parameters of the node functions of live nodes, and weights of other
            layers; normalisation and biases are not counted.
        real_edges: Real edges of all graphs.
        candidate_edges: Candidate edges of all graphs.
        dead_nodes: Nodes without a real edge out, other than outputs, as the paper counts them.
        unreachable_nodes: Nodes without a path of real edges to an output that is read: dead nodes,
            nodes that feed only such nodes, and outputs that are not read.
            :func:`freeze` removes them.
    """

    macs: int = 0
    parameters: int = 0
    real_edges: int = 0
    candidate_edges: int = 0
    dead_nodes: int = 0
    unreachable_nodes: int = 0

    @property
    def unneeded_nodes(self) -> int:
        """Deprecated name of ``unreachable_nodes``."""
        warn_renamed("Cost.unneeded_nodes", "unreachable_nodes")
        return self.unreachable_nodes

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: getattr(other, name) + n for name, n in vars(self).items()})

    def _repr_html_(self) -> str:
        rows = {
            "multiply-adds per image": self.macs,
            "parameters": self.parameters,
            "real edges": self.real_edges,
            "candidate edges": self.candidate_edges,
            "dead nodes": self.dead_nodes,
            "unreachable nodes": self.unreachable_nodes,
        }
        cells = (f"<tr><td>{name}</td><td>{value:,}</td></tr>" for name, value in rows.items())
        return f"<table>{''.join(cells)}</table>"

    def __str__(self) -> str:
        share = f" ({self.real_edges / self.candidate_edges:.2%})" if self.candidate_edges else ""
        return (
            f"{self.macs:,} MACs per image ({2 * self.macs:,} FLOPs), "
            f"{self.parameters:,} parameters, {self.real_edges:,} real of "
            f"{self.candidate_edges:,} candidate edges{share}, {self.dead_nodes:,} dead nodes, "
            f"{self.unreachable_nodes:,} unreachable nodes"
        )


def cost(model: nn.Module, image_size: int | None = None, *, example: Tensor | None = None) -> Cost:
    """Return the cost of a network for one image, counted as in the paper.

    Runs the network once in evaluation mode. Per pixel, each real edge counts once, the node
    function of each live node 9 times (3x3), and average pooling once; in time, at each step, or
    each evaluation that the image took. If a layer feeds only graphs, its channels without a real
    edge out do not count; if a graph feeds a layer, channels without a real edge in do not count.
    Channels are followed through modules that keep them separate (norms, activations, pooling,
    dropout); any other module reads every channel. For sparse layers, real weights count; for other
    layers, weights that are not 0. The weights of recurrent layers count once per position;
    attention includes its two products of queries, keys and values. Functions called without a
    module, such as ``scaled_dot_product_attention``, do not count.

    Args:
        model: A network, or a single :class:`NeuralGraph`.
        image_size: Height and width in pixels of an image with as many channels as the first layer
            reads. If None, 224 if that layer is a convolution; a network whose first layer is a
            graph or linear reads one vector of features.
        example: One input ``[1, ...]`` to use in place of an image. The count is for the whole
            example, so a batch of several inputs costs as many times as much.

    Returns:
        The cost; its string includes units.

    Raises:
        ValueError: If the network cannot be run on such an input, or ``image_size`` is below 1.
        TypeError: If ``model`` is not a module, ``image_size`` is not a whole number, or
            ``example`` is not a tensor.

    Warns:
        UserWarning: If the multiply-adds of layers or node functions are unknown, and left out.
    """
    model = unwrapped(model)
    _check_input(image_size, example)
    if example is None:
        example = _example(model, image_size)
    try:
        calls = _trace.run(model, example)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the network cannot be run on an input {list(example.shape)} to count its cost "
            f"({error}); pass image_size, or as example an input that it takes"
        ) from error
    wirings = {
        call.module: call.module.wiring().edge_index.cpu()
        for call in calls
        if isinstance(call.module, NeuralGraph)
    }
    live, unreachable = _liveness(calls, wirings)
    total = Cost(unreachable_nodes=unreachable)
    counted = set()
    for call, (inputs, outputs) in zip(calls, live, strict=True):
        module = call.module
        if isinstance(module, NeuralGraph):
            entry = _graph(module, wirings[module], call)
        else:
            entry = _layer(module, call, inputs, outputs)
        # Parameters and edges count once, multiply-adds at every call.
        has_one = isinstance(module, Layer | nn.Embedding)
        owner = Weight(module).stored if has_one else module
        total += Cost(macs=entry.macs) if id(owner) in counted else entry
        counted.add(id(owner))
    unknown = list({id(m): m for m in _trace.unknown_layers(model)}.values())
    own = (p for module in unknown for p in module.parameters(recurse=False))
    total += Cost(parameters=sum(p.numel() for p in own if p.dim() > 1))
    _warn_of_unknown([*unknown, *(m for graph in wirings for m in _uncounted_functions(graph))])
    return total


def _check_input(image_size: Any, example: Any) -> None:
    """Raise an error unless these are a whole number and a tensor, or None."""
    whole = isinstance(image_size, Integral) and not isinstance(image_size, bool)
    if image_size is not None and not whole:
        got = "a tensor" if isinstance(image_size, Tensor) else repr(image_size)
        raise TypeError(
            f"image_size must be a number of pixels, such as 32 for images of 32x32, got {got}; "
            "for another input, pass example=torch.zeros(1, 3, 32, 32)"
        )
    if whole and image_size < 1:
        raise ValueError(f"image_size must be 1 pixel or more, got {image_size}")
    if example is not None and not isinstance(example, Tensor):
        raise TypeError(
            "example must be a tensor that the network takes, such as torch.zeros(1, 3, 32, 32), "
            f"got {type(example).__name__}"
        )


def _liveness(
    calls: Sequence[_trace.Call], wirings: Mapping[NeuralGraph, Tensor]
) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Return the live channels of each call, and the number of unreachable nodes of all graphs.

    Args:
        calls: Calls of layers, in order.
        wirings: ``edge_index`` of the real edges of each graph.
    """
    feeds = {graph: _ends(graph, e[1], Role.OUTPUT) for graph, e in wirings.items()}
    live = _trace.live_channels(
        calls, lambda graph, _: _ends(graph, wirings[graph][0], Role.INPUT), feeds
    )
    reachable = {
        graph: torch.zeros(graph.topology.num_nodes, dtype=torch.bool, device="cpu")
        for graph in wirings
    }

    def reads(graph: NeuralGraph, outputs: Tensor) -> Tensor:
        """Return a mask of the inputs with a path to one of the outputs in the mask ``outputs``."""
        nodes = graph.topology.outputs
        if len(outputs) == len(nodes):
            nodes = nodes[outputs]
        distance = distances(wirings[graph].flip(0), graph.topology.num_nodes, nodes)
        reachable[graph] |= distance >= 0
        return distance[graph.topology.inputs] >= 0

    _trace.live_channels(calls, reads, feeds)
    return live, sum(int((~mask).sum()) for mask in reachable.values())


def _example(model: nn.Module, image_size: int | None) -> Tensor:
    """Return zeros in the shape that the first layer of a network reads."""
    layers = [m for m in model.modules() if isinstance(m, _FIRST_LAYERS)]
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


_FIRST_LAYERS = NeuralGraph, nn.Conv2d, nn.Linear


def _uncounted_functions(graph: NeuralGraph) -> list[nn.Module]:
    """Return the node functions that have parameters, but no known number of multiply-adds."""
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
            f"cost() does not know how many multiply-adds {', '.join(names)} takes and leaves them "
            "out; a node function can state the number in an attribute macs_per_pixel",
            stacklevel=3,
        )


def _ends(graph: NeuralGraph, nodes: Tensor, role: Role) -> Tensor:
    """Return a mask of the input or output channels of a graph that are among ``nodes``."""
    channels = graph.topology.inputs if role == Role.INPUT else graph.topology.outputs
    return torch.isin(channels, nodes)


def _graph(graph: NeuralGraph, edge_index: Tensor, call: _trace.Call) -> Cost:
    """Return the cost of a graph; its maps have the size of its outputs or, in time, its states."""
    topology, edges, schedule = graph.topology, edge_index.shape[1], graph.schedule
    groups = graph.grouping.topology.blocks
    firings = schedule.firings(graph.evaluations)
    like = call.x if schedule.keeps_size else call.out
    pixels = firings * len(like) * like.shape[2 + schedule.takes_sequence :].numel()
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
        nodes = graph.grouping.original(block.nodes)
        for module, alive in ((node, fires), (message, has_out)):
            live_nodes = int(alive[nodes].sum())
            macs = live_nodes * (getattr(module, "macs_per_pixel", None) or 0) * pixels
            parameters = _function_parameters(module, live_nodes, len(block.nodes))
            total += Cost(macs=macs, parameters=parameters)
    return total


def _function_parameters(function: nn.Module, live_nodes: int, nodes: int) -> int:
    """Return the number of parameters of a node function: those of live nodes, and shared ones."""
    per_node = getattr(function, "parameters_per_node", None)
    if per_node is not None:
        return live_nodes * int(per_node)
    total = 0
    for parameter in function.parameters():
        by_node = parameter.dim() > 0 and len(parameter) == nodes
        total += parameter.numel() * live_nodes // nodes if by_node else parameter.numel()
    return total


def _edges(weight: Weight) -> Cost:
    """Return the number of real weights of a layer, and of edges if :func:`sparsify` added them."""
    total, real = weight.stored.numel(), weight.num_real
    if weight.selector is not None:
        return Cost(parameters=real, real_edges=real, candidate_edges=total)
    return Cost(parameters=real or total)


def _layer(module: nn.Module, call: _trace.Call, inputs: Tensor, outputs: Tensor) -> Cost:
    """Return the cost of a layer, given masks of its live input and output channels."""
    x, out = call.x, call.out
    if isinstance(module, nn.modules.conv._ConvNd):
        edges = _edges(Weight(module))
        if module.groups == 1:
            live = int(inputs.sum()) * int(outputs.sum())
            weights = edges.parameters * live // (len(inputs) * len(outputs))
        else:
            weights = edges.parameters * int(outputs.sum()) // len(outputs)
        grid = x if module.transposed else out
        return replace(edges, macs=weights * (grid.numel() // grid.shape[1]), parameters=weights)
    if isinstance(module, nn.Linear):
        edges = _edges(Weight(module))
        weights = edges.parameters * int(inputs.sum()) // len(inputs)
        macs = weights * (out.numel() // module.out_features)
        return replace(edges, macs=macs, parameters=weights)
    if isinstance(module, _trace.AVERAGE_POOLS):
        return Cost(macs=int(inputs.sum()) * (x.numel() // x.shape[1]))
    if isinstance(module, _trace.Counted):
        macs, parameters = module.counted(x.shape[2:])
        return Cost(macs=len(x) * macs, parameters=parameters)
    if isinstance(module, _trace.SEQUENCE_LAYERS):
        return _sequence_layer(module, call)
    return _edges(Weight(module)) if isinstance(module, nn.Embedding) else Cost()


def _sequence_layer(module: nn.Module, call: _trace.Call) -> Cost:
    """Return the cost of attention or of a recurrent layer for one sequence.

    Recurrent layers use each real weight at every position. Attention over ``S`` keys projects its
    ``L`` queries, the keys, and the values, and takes ``2 L S E`` multiply-adds to weigh values of
    ``E`` features.
    """
    total = sum((_edges(weight) for _, weight in weights_of(module)), Cost())
    if not isinstance(module, nn.MultiheadAttention):
        return replace(total, macs=total.parameters * _length(module, call.x))
    queries, keys, values = (_length(module, x) for x in (call.x, *call.others[:2]))
    own = [Weight(module, name).evaluated for name in parameters_of(module)]
    projections = own[0].chunk(3) if len(own) == 1 else own
    weights = (*projections, Weight(module.out_proj).evaluated)
    lengths = (queries, keys, values, queries)
    macs = sum(int(w.count_nonzero()) * n for w, n in zip(weights, lengths, strict=True))
    extra_keys = int(module.bias_k is not None) + int(module.add_zero_attn)
    return replace(total, macs=macs + 2 * queries * (keys + extra_keys) * module.embed_dim)


def _length(module: nn.Module, x: Tensor) -> int:
    """Return the number of positions of one sequence in a layer's input."""
    if isinstance(module, nn.modules.rnn.RNNCellBase):
        return 1
    return x.shape[1 if x.dim() > 2 and module.batch_first else 0]
