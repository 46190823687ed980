"""Scales of the inputs and states of nodes, block by block."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.neural_graph import NeuralGraph


@dataclass(frozen=True)
class Scale:
    """Scales of the nodes of one block.

    Attributes:
        block: Index of the block in ``graph.grouping.topology``.
        role: ``"input"``, ``"hidden"`` or ``"output"``.
        nodes: Number of its nodes.
        inputs: Root mean square of their inputs ``I``.
        states: Root mean square of their states ``Z``.
        silent: Share of nodes whose states are 0 for the whole batch.
    """

    block: int
    role: str
    nodes: int
    inputs: float
    states: float
    silent: float


class Scales(list[Scale]):
    """Scales of the blocks of a graph; with a schedule in time, one entry per firing."""

    def __str__(self) -> str:
        rows = ["block    role   nodes     inputs     states  silent"]
        for s in self:
            place = f"{s.block:5} {s.role:>7} {s.nodes:7,}"
            rows.append(f"{place} {s.inputs:10.3g} {s.states:10.3g} {s.silent:7.1%}")
        return "\n".join(rows)


@torch.no_grad()
def scales(model: nn.Module, x: Tensor) -> dict[str, Scales]:
    """Return the scales of inputs and states of each block, for each graph of a network.

    If states shrink or grow by a factor from block to block, initial weights are too small or too
    large for the node function; see ``init`` of :class:`NeuralGraph`. Batch norms in training mode
    include the batch in their running statistics.

    Args:
        model: A graph, or a network that contains graphs.
        x: A batch of inputs of the network.

    Returns:
        The scales by name of the graph in the network; ``""`` is the network itself.

    Raises:
        ValueError: If the network contains no graph.
    """
    graphs = {n: m for n, m in model.named_modules() if isinstance(m, NeuralGraph)}
    if not graphs:
        raise ValueError("scales() expects a NeuralGraph or a network with one, but found none")
    scales_by_graph = {name: Scales() for name in graphs}
    with ExitStack() as stack:
        for name, graph in graphs.items():
            for block, node in zip(graph.grouping.topology.blocks, graph.nodes, strict=True):
                hook = node.register_forward_hook(_recording_hook(scales_by_graph[name], block))
                stack.callback(hook.remove)
        model(x)
    return scales_by_graph


def _recording_hook(
    entries: Scales, block: Any
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    """Return a forward hook that appends the scales of a block to a list."""

    def record(module: nn.Module, args: tuple[Any, ...], states: Tensor) -> None:
        inputs, outputs = (float(v.double().square().mean().sqrt()) for v in (args[0], states))
        silent = float((states == 0).flatten(1).all(1).double().mean())
        role = block.role.name.lower()
        entries.append(Scale(block.index, role, len(block.nodes), inputs, outputs, silent))

    return record
