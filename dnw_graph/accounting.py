"""One accounting of a network: edges, parameters and multiply-adds of the live graph."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.neural_graph import NeuralGraph
from dnw_graph.topology import Role


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one image costs.

    Attributes:
        macs: Multiply-adds; what other work calls FLOPs is twice this.
        parameters: Real edges, node functions of live nodes, other convolutions and linear layers;
            normalisation and biases are not counted.
        real_edges: Real edges of all graphs.
        candidate_edges: Candidate edges of all graphs.
        dead_nodes: Nodes other than outputs without a real edge out.
    """

    macs: int = 0
    parameters: int = 0
    real_edges: int = 0
    candidate_edges: int = 0
    dead_nodes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(**{name: getattr(other, name) + n for name, n in vars(self).items()})

    def __str__(self) -> str:
        share = f" ({self.real_edges / self.candidate_edges:.2%})" if self.candidate_edges else ""
        return (
            f"{self.macs:,} MACs an image ({2 * self.macs:,} FLOPs), "
            f"{self.parameters:,} parameters, {self.real_edges:,} real of "
            f"{self.candidate_edges:,} candidate edges{share}, {self.dead_nodes:,} dead nodes"
        )


def cost(model: nn.Module, image_size: int = 224) -> Cost:
    """Count what a network costs for one image, as the paper does.

    Runs the network once on an empty image, in evaluation mode. Real edges count once a pixel, the
    node function of each live node 9 times (3x3), pooling once a pixel. Where a layer feeds a
    graph, only channels with a real edge out count; where a graph feeds a layer, only channels with
    a real edge in. That is followed through layers which keep channels apart (norms, activations,
    pooling), as long as they are modules.

    Args:
        model: A network for images with as many channels as its first convolution reads, or a
            :class:`NeuralGraph` on its own.
        image_size: Height and width in pixels.

    Returns:
        The cost; printed, it names units.

    Raises:
        ValueError: The network cannot be run on such an image.
    """
    parameter = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, _channels(model), image_size, image_size).to(parameter)
    ledger = _Ledger()
    with ledger.watching(model), torch.no_grad():
        model(image)
    return sum(ledger.entries.values(), Cost())


class _Ledger:
    """Enters each layer's cost as it runs, and follows which channels are live between layers."""

    def __init__(self) -> None:
        self.entries: dict[int, Cost] = {}
        self._seen: set[nn.Module] = set()
        self._maker: dict[int, tuple[Tensor, nn.Module]] = {}  # by id of the layer's output
        self._live: dict[int, tuple[Tensor, Tensor]] = {}  # live channels of a tensor, by its id

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Enter what runs in here."""
        handles = [m.register_forward_hook(self._enter) for m in self._leaves(model)]
        training = {m: m.training for m in model.modules()}
        model.eval()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in training.items():
                module.training = mode

    def _leaves(self, module: nn.Module) -> Iterator[nn.Module]:
        """Yield graphs and layers without children, but not the layers inside a graph."""
        children = list(module.children())
        if isinstance(module, NeuralGraph) or not children:
            yield module
        else:
            for child in children:
                yield from self._leaves(child)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        if not isinstance(out, Tensor) or not args or not isinstance(args[0], Tensor):
            return
        x = args[0]
        _, live = self._live.get(id(x), (x, None))
        rule = next((rule for kind, rule in _RULES if isinstance(module, kind)), None)
        entry = rule(module, x, out, live) if rule else Cost()
        if module in self._seen:  # what is there counts once, what is done counts every time
            entry = Cost(macs=entry.macs)
        self._seen.add(module)
        self.entries[id(out)] = self.entries.get(id(out), Cost()) + entry
        if isinstance(module, NeuralGraph):
            self._live[id(out)] = out, _live_outputs(module)
            self._correct_maker(module, x)
        elif live is not None and not isinstance(module, (nn.Conv2d, nn.Linear)):
            keeps_channels = out.dim() > 1 and out.shape[1] == len(live)
            if keeps_channels:
                self._live[id(out)] = out, live
        self._maker[id(out)] = out, module

    def _correct_maker(self, graph: NeuralGraph, x: Tensor) -> None:
        """Count the convolution before a graph for the channels that the graph reads."""
        _, maker = self._maker.get(id(x), (x, None))
        if isinstance(maker, nn.Conv2d):
            read = _has_edge_out(graph)[graph.topology.inputs.to(x.device)]
            share = int(read.sum()), len(read)
            whole = self.entries[id(x)]
            self.entries[id(x)] = Cost(
                macs=whole.macs * share[0] // share[1],
                parameters=whole.parameters * share[0] // share[1],
            )


def _channels(model: nn.Module) -> int:
    """Return how many channels the first layer of a network reads."""
    for module in model.modules():
        if isinstance(module, NeuralGraph):
            return module.topology.num_inputs
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    return 3


Live = Tensor | None


def _graph(graph: NeuralGraph, x: Tensor, out: Tensor, live: Live) -> Cost:
    pixels = out[0, 0].numel()
    has_out, has_in = _has_edge_out(graph), _has_edge_in(graph)
    total = Cost(
        macs=graph.num_edges * pixels,
        parameters=graph.num_edges,
        real_edges=graph.num_edges,
        candidate_edges=graph.topology.num_candidates,
        dead_nodes=int((~has_out & (graph.topology.role != Role.OUTPUT).to(x.device)).sum()),
    )
    for block, node in zip(graph.topology.blocks, graph.nodes, strict=True):
        alive = has_in if block.role == Role.OUTPUT else has_out
        number = int(alive[block.nodes.start : block.nodes.stop].sum())
        total += Cost(
            macs=number * int(getattr(node, "macs_per_pixel", 0)) * pixels,
            parameters=number * int(getattr(node, "parameters_per_node", 0)),
        )
    return total


def _conv(conv: nn.Conv2d, x: Tensor, out: Tensor, live: Live) -> Cost:
    weights = conv.weight.numel()
    if live is not None and conv.groups == 1:
        weights = weights * int(live.sum()) // len(live)
    return Cost(macs=weights * out[0, 0].numel(), parameters=weights)


def _linear(linear: nn.Linear, x: Tensor, out: Tensor, live: Live) -> Cost:
    inputs = linear.in_features if live is None else int(live.sum())
    weights = inputs * linear.out_features
    return Cost(macs=weights * (out[0].numel() // linear.out_features), parameters=weights)


def _pool(pool: nn.Module, x: Tensor, out: Tensor, live: Live) -> Cost:
    return Cost(macs=(x.shape[1] if live is None else int(live.sum())) * x[0, 0].numel())


_RULES: list[tuple[type[nn.Module], Callable[..., Cost]]] = [
    (NeuralGraph, _graph),
    (nn.Conv2d, _conv),
    (nn.Linear, _linear),
    (nn.AdaptiveAvgPool2d, _pool),
    (nn.AvgPool2d, _pool),
]


def _has_edge_out(graph: NeuralGraph) -> Tensor:
    return _touched(graph, 0)


def _has_edge_in(graph: NeuralGraph) -> Tensor:
    return _touched(graph, 1)


def _live_outputs(graph: NeuralGraph) -> Tensor:
    return _has_edge_in(graph)[graph.topology.outputs.to(graph.weight.device)]


def _touched(graph: NeuralGraph, end: int) -> Tensor:
    edge_index = graph.wiring().edge_index
    touched = torch.zeros(graph.topology.num_nodes, dtype=torch.bool, device=edge_index.device)
    return touched.index_fill_(0, edge_index[end], True)
