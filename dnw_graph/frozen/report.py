"""Count and measure what a frozen network costs."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dnw_graph.frozen._kernels import DENSE
from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.topology import Role


@dataclass(frozen=True)
class LayerReport:
    """Cost of one layer of a frozen network for one image.

    Attributes:
        name: Class of the layer.
        output: Shape of its output, without the batch.
        macs: Multiply-adds.
        parameters: Number of weights of edges, filters, convolutions and linear layers.
        milliseconds: Median time of a call.
        remark: For a graph, its numbers of nodes and edges, and how its sums are computed.
    """

    name: str
    output: tuple[int, ...]
    macs: int
    parameters: int
    milliseconds: float
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """Cost of a frozen network for one image; ``str`` returns a table.

    Attributes:
        layers: Cost of each layer.
        milliseconds: Median time of a call of the whole network.
        bytes: Size of its tensors.
        threads: Number of threads.
        other_milliseconds: Median time of a call of the network that it was compared with.
    """

    layers: tuple[LayerReport, ...]
    milliseconds: float
    bytes: int
    threads: int
    other_milliseconds: float | None = None

    @property
    def ratio(self) -> float | None:
        """Time of the network, divided by that of the network that it was compared with."""
        if self.other_milliseconds is None:
            return None
        return self.milliseconds / self.other_milliseconds

    @property
    def macs(self) -> int:
        """Multiply-adds; FLOPs, where each counts as two operations, are twice this."""
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Number of weights of edges, filters, convolutions and linear layers."""
        return sum(layer.parameters for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{'layer':18} {'output':>14} {'MACs':>13} {'parameters':>11} {'ms':>8}"]
        for layer in self.layers:
            size = "x".join(map(str, layer.output))
            lines.append(
                f"{layer.name:18} {size:>14} {layer.macs:13,} {layer.parameters:11,} "
                f"{layer.milliseconds:8.3f}  {layer.remark}".rstrip()
            )
        lines.append(
            f"{'whole':18} {'':14} {self.macs:13,} {self.parameters:11,} {self.milliseconds:8.3f}  "
            f"{self.bytes / 1e6:.1f} MB, {self.threads} thread" + "s" * (self.threads != 1)
        )
        if self.ratio is not None:
            faster = "this network" if self.ratio < 1 else "the other network"
            lines.append(
                f"{'other network':18} {'':14} {'':13} {'':11} {self.other_milliseconds:8.3f}  "
                f"{faster} is faster on this machine: {self.ratio:.2f} times the other's time"
            )
        return "\n".join(lines)


class Count(NamedTuple):
    """Multiply-adds and parameters of one layer, with its input and output."""

    macs: int
    parameters: int
    x: Tensor
    out: Tensor


def counts(layers: nn.Sequential, example: Tensor) -> list[Count]:
    """Count the multiply-adds and parameters of each layer of a frozen network.

    They are counted as :func:`dnw_graph.cost` does: edges count once regardless of the kernel, and
    layers behind a graph count only channels that depend on the input.

    Args:
        layers: The network.
        example: One input ``[1, ...]``.
    """
    costs, x = [], example
    live = torch.ones(x.shape[1], dtype=torch.bool, device="cpu")
    for layer in layers:
        out = layer.forward_by_torch(x) if isinstance(layer, FrozenGraph) else layer(x)
        costs.append(Count(*_counted(layer, x, out, live), x, out))
        if isinstance(layer, FrozenGraph):
            live = layer.reached[layer.outputs]
        elif out.shape[1] != len(live) or isinstance(layer, nn.Conv2d | nn.Linear):
            live = torch.ones(out.shape[1], dtype=torch.bool, device="cpu")
        x = out
    return costs


@torch.no_grad()
def report(
    layers: nn.Sequential,
    example: Tensor,
    compared_with: Callable[[Tensor], object] | None = None,
    repeats: int = 20,
) -> Report:
    """Run a frozen network on one input repeatedly, and return its cost.

    Args:
        layers: The network.
        example: The input ``[1, ...]``.
        compared_with: Another network, or a function of the input, timed in turns with this one.
        repeats: Number of timed calls.
    """
    networks: list[Callable[[Tensor], object]] = [layers]
    if compared_with is not None:
        networks.append(compared_with)
    milliseconds, *others = _milliseconds_in_turns(networks, example, repeats)
    entries = []
    for layer, count in zip(layers, counts(layers, example), strict=True):
        entries.append(
            LayerReport(
                name=type(layer).__name__,
                output=tuple(count.out.shape[1:]),
                macs=count.macs,
                parameters=count.parameters,
                milliseconds=_milliseconds_in_turns([layer], count.x, repeats)[0],
                remark=_remark(layer, count.x) if isinstance(layer, FrozenGraph) else "",
            )
        )
    size = sum(t.numel() * t.element_size() for t in layers.state_dict().values())
    other = others[0] if others else None
    return Report(tuple(entries), milliseconds, size, torch.get_num_threads(), other)


def _milliseconds_in_turns(
    networks: Sequence[Callable[[Tensor], object]], x: Tensor, repeats: int
) -> list[float]:
    """Return the median time of a call of each network, each after a call that is not timed."""
    times: list[list[float]] = [[] for _ in networks]
    for _ in range(repeats):
        for network, of_network in zip(networks, times, strict=True):
            network(x)
            start = time.perf_counter()
            network(x)
            of_network.append(time.perf_counter() - start)
    return [1e3 * statistics.median(of_network) for of_network in times]


def _counted(layer: nn.Module, x: Tensor, out: Tensor, live: Tensor) -> tuple[int, int]:
    """Return multiply-adds and parameters of a layer; ``live`` marks the channels that count."""
    if isinstance(layer, FrozenGraph):
        return layer.counted(x.shape[2:])
    weight, pixels = getattr(layer, "weight", None), out.shape[2:].numel()
    if isinstance(layer, nn.Conv2d | nn.Linear) and weight is not None:
        grouped = isinstance(layer, nn.Conv2d) and layer.groups > 1
        weights = weight.numel() if grouped else weight.numel() * int(live.sum()) // len(live)
        return weights * pixels, weights
    if isinstance(layer, nn.AdaptiveAvgPool2d | nn.AvgPool2d):
        return int(live.sum()) * x[0, 0].numel(), 0
    return 0, 0


def _remark(graph: FrozenGraph, x: Tensor) -> str:
    """Return the numbers of nodes, edges and kernels of a graph as text."""
    kinds = graph.engine.kinds(x)
    dense = kinds.count(DENSE)
    hidden = sum(len(p) for p in graph.parts if p.role == Role.HIDDEN)
    constants = int((~graph.reached).sum())
    return (
        f"{graph.num_nodes} nodes ({hidden} hidden, {constants} constant), "
        f"{graph.num_edges:,} edges; {len(kinds) - dense} sums sparse, {dense} dense"
    )
