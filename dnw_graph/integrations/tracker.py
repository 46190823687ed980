"""What the callbacks of all training loops do besides attaching rules."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dnw_graph.analysis.history import HistoryWriter, load_history, real_edges
from dnw_graph.analysis.measures import dead_nodes
from dnw_graph.analysis.structure import structures_of
from dnw_graph.wiring import penalty, selectors


def add_penalty_gradients(model: nn.Module, optimizer: Optimizer) -> None:
    """Add the gradients of the rules' penalties to those of the parameters of an optimizer.

    Args:
        model: The network, after its backward pass.
        optimizer: The optimizer that will do the step; gradients must not be scaled.
    """
    value = penalty(model)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = [p for p in parameters if p.requires_grad]
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            gradient = gradient.to(parameter.dtype)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


def optimizer_of_edges(model: nn.Module, optimizers: list[Optimizer]) -> Optimizer:
    """Return the optimizer that holds edge weights of a network, or the first if none does.

    Raises:
        ValueError: If the network has no graph and no sparse layer.
    """
    weights = {id(entry.weight) for entry in selectors(model)}
    if not weights:
        raise ValueError(
            "the network has no wiring: expected a NeuralGraph in it, or layers changed by "
            "dnw_graph.sparsify"
        )
    for optimizer in optimizers:
        if any(id(p) in weights for group in optimizer.param_groups for p in group["params"]):
            return optimizer
    return optimizers[0]


class WiringTracker:
    """Follows the wirings of a network during training.

    Args:
        model: The network.
        folder: Folder for the history and the pictures; None to write nothing.
        steps_per_epoch: Optimizer steps per epoch.
    """

    def __init__(self, model: nn.Module, folder: Path | None, steps_per_epoch: int) -> None:
        self._model, self._folder = model, folder
        self._history = None if folder is None else HistoryWriter(folder, model, steps_per_epoch)
        self._edges = real_edges(model)

    def record(self, step: int) -> dict[str, float]:
        """Write the real edges to the history, and return measurements.

        Args:
            step: Number of optimizer steps done.

        Returns:
            ``wiring/edges_changed``, the number of edges that have become real since the last call,
            and ``wiring/dead_nodes``, the number of nodes without a real edge out that are not
            outputs.
        """
        edges, before = real_edges(self._model), self._edges
        changed = sum(len(np.setdiff1d(edges[name][0], before[name][0])) for name in edges)
        dead = sum(len(dead_nodes(s).no_edge_out) for s in structures_of(self._model).values())
        self._edges = edges
        if self._history is not None:
            self._history.record(step)
        return {"wiring/edges_changed": float(changed), "wiring/dead_nodes": float(dead)}

    def draw(self) -> None:
        """Draw the wirings, and how they changed, if matplotlib is installed."""
        if self._folder is None:
            return
        try:
            from dnw_graph.analysis.pictures import draw_blocks, draw_history
        except ModuleNotFoundError:
            return
        structures = structures_of(self._model)
        if len(structures) <= 12:
            draw_blocks(structures).savefig(self._folder / "blocks.png", dpi=120)
        for name, history in load_history(self._folder).items():
            draw_history(history).savefig(self._folder / f"history-{name}.png", dpi=120)
