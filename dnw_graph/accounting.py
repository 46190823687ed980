"""One accounting of a network: edges, parameters and multiply-adds of the live graph."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dnw_graph import _trace
from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.sparse import Layer, evaluation_weight, sparse_layers_of, stored_weight
from dnw_graph.topology import Role
from dnw_graph.topology._order import distances


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one image costs.

    Attributes:
        macs: Multiply-adds; what other work calls FLOPs is twice this.
        parameters: Real edges, node functions of live nodes, other convolutions and linear layers;
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


def cost(model: nn.Module, image_size: int = 224, *, example: Tensor | None = None) -> Cost:
    """Count what a network costs for one image, as the paper does.

    Runs the network once in evaluation mode. Real edges count once a pixel, the node function of
    each live node 9 times (3x3), average pooling once a pixel; in time, that at each step, or each
    evaluation that the image took. Where a layer feeds graphs only, its
    channels without a real edge out do not count; where a graph feeds a layer, channels without a
    real edge in do not. That is followed through modules that keep channels apart (norms,
    activations, pooling, dropout); anything else reads every channel. Of a layer with zeros among
    its weights, as :func:`sparsify` and :func:`bake` leave them, only the others count.

    Args:
        model: A network for images with as many channels as its first convolution reads, or a
            :class:`NeuralGraph` on its own.
        image_size: Height and width in pixels.
        example: One input ``[1, ...]`` in place of an image, for a network that takes another kind.

    Returns:
        The cost; printed, it names units.

    Raises:
        ValueError: A network that cannot be run on such an image.

    Warns:
        UserWarning: The network has layers with weights that this does not know how to count.
    """
    if example is None:
        like = next(model.parameters(), torch.empty(0))
        example = torch.zeros(1, _channels(model), image_size, image_size).to(like)
    try:
        calls = _trace.run(model, example)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the network cannot be run on {list(example.shape)} to be counted: give image_size, "
            f"or an input that it takes as example ({error})"
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
    needed = {graph: torch.zeros(graph.topology.num_nodes).bool() for graph in wirings}

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
        own = stored_weight(module) if isinstance(module, Layer) else module
        total += Cost(macs=entry.macs) if id(own) in seen else entry
        seen.add(id(own))
    return total


def _channels(model: nn.Module) -> int:
    """Return how many channels the first layer of a network reads."""
    for module in model.modules():
        if isinstance(module, NeuralGraph):
            return module.topology.num_inputs
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


def _ends(graph: NeuralGraph, nodes: Tensor, role: Role) -> Tensor:
    """Return which channels of a graph's input or output are among some nodes."""
    channels = graph.topology.inputs if role == Role.INPUT else graph.topology.outputs
    return torch.isin(channels, nodes)


def _graph(graph: NeuralGraph, edge_index: Tensor, call: _trace.Call) -> Cost:
    """Count a graph: its maps are those of its outputs, in time those of its states."""
    topology, edges, schedule = graph.topology, edge_index.shape[1], graph.schedule
    firings = schedule.firings(graph.evaluations)
    like = call.x if schedule.keeps_size else call.out
    pixels = firings * like.shape[2 + schedule.takes_sequence :].numel()
    nodes = torch.arange(topology.num_nodes)
    has_out, has_in = torch.isin(nodes, edge_index[0]), torch.isin(nodes, edge_index[1])
    total = Cost(
        macs=edges * pixels,
        parameters=edges,
        real_edges=edges,
        candidate_edges=topology.num_candidates,
        dead_nodes=int((~has_out & (topology.role != Role.OUTPUT)).sum()),
    )
    for block, node, message in zip(topology.blocks, graph.nodes, graph.messages, strict=True):
        fires = has_in if block.role == Role.OUTPUT else has_out
        for module, alive in ((node, fires), (message, has_out)):
            number = int(alive[block.nodes.start : block.nodes.stop].sum())
            total += Cost(
                macs=number * int(getattr(module, "macs_per_pixel", 0)) * pixels,
                parameters=number * int(getattr(module, "parameters_per_node", 0)),
            )
    return total


def _edges(layer: nn.modules.conv._ConvNd | nn.Linear) -> Cost:
    """Return a layer's weights other than 0, and its edges if :func:`sparsify` made it sparse."""
    weight = evaluation_weight(layer)
    total, nonzero = weight.numel(), int(torch.count_nonzero(weight))
    if any(found is layer for _, found in sparse_layers_of(layer)):
        return Cost(parameters=nonzero, real_edges=nonzero, candidate_edges=total)
    return Cost(parameters=nonzero or total)


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
    return Cost()
