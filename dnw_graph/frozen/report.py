"""What a frozen network costs, counted and measured."""

import math
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.topology import Role


@dataclass(frozen=True)
class LayerReport:
    """What one layer of a frozen network costs for one image.

    Attributes:
        name: What it is.
        output: Shape of what it gives.
        macs: Multiply-adds.
        parameters: Weights of edges, filters, convolutions and linear layers.
        milliseconds: Median of what it took.
        remark: Of a graph, what is left of it and how its sums are formed.
    """

    name: str
    output: tuple[int, ...]
    macs: int
    parameters: int
    milliseconds: float
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """What a frozen network costs for one image; printed, it is a table.

    Attributes:
        layers: Its layers.
        milliseconds: Median of what the whole took.
        bytes: Size of its tensors.
        threads: Number of threads that it took.
    """

    layers: tuple[LayerReport, ...]
    milliseconds: float
    bytes: int
    threads: int

    @property
    def macs(self) -> int:
        """Multiply-adds; what other work calls FLOPs is twice this."""
        return sum(layer.macs for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Weights of edges, filters, convolutions and linear layers."""
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
        return "\n".join(lines)


def report(layers: nn.Sequential, example: Tensor, repeats: int = 20) -> Report:
    """Run a frozen network on one input ``[1, ...]``, and say what it costs."""
    whole, x, found = _milliseconds(layers, example, repeats), example, []
    for layer in layers:
        out = layer(x)
        macs, parameters, remark = _counted(layer, x, out)
        took = _milliseconds(layer, x, repeats)
        name = type(layer).__name__
        found.append(LayerReport(name, tuple(out.shape[1:]), macs, parameters, took, remark))
        x = out
    size = sum(t.numel() * t.element_size() for t in layers.state_dict().values())
    return Report(tuple(found), whole, size, torch.get_num_threads())


def _milliseconds(layer: nn.Module, x: Tensor, repeats: int) -> float:
    times = []
    with torch.no_grad():
        layer(x)
        for _ in range(repeats):
            start = time.perf_counter()
            layer(x)
            times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _counted(layer: nn.Module, x: Tensor, out: Tensor) -> tuple[int, int, str]:
    """Return multiply-adds, parameters and a remark."""
    if isinstance(layer, FrozenGraph):
        choices = layer.engine.choices(x)
        dense = [c for c in choices if c.is_dense]
        sizes = [math.prod(size) for size in layer.sizes(x.shape[2:])]
        filtered = [part for part in layer.engine.parts if part.filters]
        parameters = layer.num_edges + 9 * sum(len(part) for part in filtered)
        macs = 9 * sum(len(part) * sizes[part.level] for part in filtered)
        for choice in choices:
            done = choice.candidates if choice.is_dense else choice.edges
            macs += done * sizes[choice.part.reads]
        hidden = sum(len(p) for p in layer.parts if p.role == Role.HIDDEN)
        constants = int((~layer.reached).sum())
        remark = f"{layer.num_nodes} nodes ({hidden} hidden, {constants} constant), "
        remark += f"{layer.num_edges:,} edges; "
        remark += f"{len(choices) - len(dense)} sums sparse, {len(dense)} dense"
        return macs, parameters, remark
    weight, pixels = getattr(layer, "weight", None), out.shape[2:].numel()
    if isinstance(layer, nn.Conv2d | nn.Linear) and weight is not None:
        return weight.numel() * pixels, weight.numel(), ""
    if isinstance(layer, nn.AdaptiveAvgPool2d | nn.AvgPool2d):
        return x[0].numel(), 0, ""
    return 0, 0, ""
