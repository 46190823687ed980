"""How large what nodes are given and what they return is, from level to level."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dnw_graph.neural_graph import NeuralGraph


@dataclass(frozen=True)
class Scale:
    """The nodes of one block that fire together.

    Attributes:
        block: Index of the block, of ``graph.grouping.topology``.
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
    """Scales of the blocks of a graph; in time, of every firing one after the other."""

    def __str__(self) -> str:
        rows = ["block    role   nodes     inputs     states  silent"]
        for s in self:
            place = f"{s.block:5} {s.role:>7} {s.nodes:7,}"
            rows.append(f"{place} {s.inputs:10.3g} {s.states:10.3g} {s.silent:7.1%}")
        return "\n".join(rows)


@torch.no_grad()
def scales(model: nn.Module, x: Tensor) -> dict[str, Scales]:
    """Return the scales of states by block, for each graph of a network.

    States that shrink or grow by a factor from block to block say that weights begin too small or
    too large for the node function; see ``init`` of :class:`NeuralGraph`. Batch norms in training
    mode count the batch in their statistics.

    Args:
        model: A graph, or a network that has some.
        x: A batch of what the network takes.

    Returns:
        By name of the graph in the network; ``""`` is the network itself.

    Raises:
        ValueError: There is no graph in the network.
    """
    graphs = {n: m for n, m in model.named_modules() if isinstance(m, NeuralGraph)}
    if not graphs:
        raise ValueError("scales() takes a NeuralGraph, or a network with one; here there is none")
    found = {name: Scales() for name in graphs}
    with ExitStack() as stack:
        for name, graph in graphs.items():
            for block, node in zip(graph.grouping.topology.blocks, graph.nodes, strict=True):
                hook = node.register_forward_hook(_noting(found[name], block))
                stack.callback(hook.remove)
        model(x)
    return found


def _noting(to: Scales, block: Any) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def note(module: nn.Module, args: tuple[Any, ...], states: Tensor) -> None:
        inputs, outputs = (float(v.double().square().mean().sqrt()) for v in (args[0], states))
        silent = float((states == 0).flatten(1).all(1).double().mean())
        role = block.role.name.lower()
        to.append(Scale(block.index, role, len(block.nodes), inputs, outputs, silent))

    return note
