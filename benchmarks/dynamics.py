"""Record how the edges of a network change during training, by rule.

    python -m benchmarks.dynamics --data DIR [--epochs 5] [--rules dnw dnw_factored random]

Trains mbv1_dnw x0.225 on Imagenette as benchmarks.epochs does, once for each rule. For its 14x14
graph, records the edges that change in each epoch, dead nodes, the relative change of the real
weights into each node per step, and edges by pair of blocks. Writes benchmarks/dynamics.json and
docs/images/rules.png. Runs that are in the JSON file are not trained again.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor

from benchmarks.epochs import BASE, COLORS
from dnw_graph import NeuralGraph
from train.files import atomically
from train.loop import start_training
from train.options import Options
from train.provenance import commit, folder_name, machine

HERE = Path(__file__).parent
GRAPH = 3  # of the five: 14x14 maps at 224 pixels, half of all real edges
QUANTILES = (0.1, 0.5, 0.9)


@dataclass(frozen=True)
class Arguments:
    """Record how wirings change during training."""

    data: str
    """Folder with Imagenette."""
    epochs: int = 5
    """Number of epochs of each training."""
    rules: tuple[str, ...] = ("dnw", "dnw_factored", "random")
    """Rules to train with."""
    seed: int = 0
    """Seed of each training."""
    runs: str = "runs/dynamics"
    """Folder for the run folders."""


class StepSizes:
    """Record ``|dw| / |w|`` over the real edges into each node, in every n-th step.

    Args:
        graph: The graph to observe.
        optimizer: The optimizer of its weights.
        every: Number of steps between records.
    """

    def __init__(self, graph: NeuralGraph, optimizer: torch.optim.Optimizer, every: int) -> None:
        self.graph, self.every, self.steps = graph, every, 0
        self.values: list[Tensor] = []
        optimizer.register_step_pre_hook(lambda *_: self._before())
        optimizer.register_step_post_hook(lambda *_: self._after())

    def _before(self) -> None:
        self.steps += 1
        if self.steps % self.every == 0:
            self.wiring = self.graph.wiring()
            self.weight = self._trained()

    def _after(self) -> None:
        if self.steps % self.every:
            return
        change = self._trained() - self.weight
        offsets = self.wiring.rowptr
        squares = [
            torch.segment_reduce(x**2, "sum", offsets=offsets) for x in (change, self.weight)
        ]
        has_edges = offsets.diff() > 0
        self.values.append((squares[0] / squares[1]).sqrt()[has_edges])

    def _trained(self) -> Tensor:
        return self.wiring.trained(self.graph.weight.detach())[self.wiring.position]

    def quantiles(self) -> list[float]:
        """Return quantiles over nodes and recorded steps since the last call."""
        values, self.values = torch.cat(self.values), []
        return torch.quantile(values, torch.tensor(QUANTILES)).tolist()


def dead_nodes(graph: NeuralGraph) -> int:
    """Return the number of nodes without a real edge out, excluding outputs."""
    source = graph.wiring().edge_index[0].unique()
    return graph.topology.num_nodes - graph.topology.num_outputs - len(source)


def density_by_blocks(graph: NeuralGraph) -> list[list[float | None]]:
    """Return the fraction of candidates that is real by block pair, relative to the mean."""
    topology, blocks = graph.topology, len(graph.topology.blocks)

    def counts(edge_index: Tensor) -> Tensor:
        pair = topology.block[edge_index[1]] * blocks + topology.block[edge_index[0]]
        return torch.bincount(pair, minlength=blocks**2).double()

    real, candidates = counts(graph.wiring().edge_index), counts(topology.edge_index)
    density = real / candidates / (real.sum() / candidates.sum())
    return [
        [float(x) if n else None for x, n in zip(row, number, strict=True)]
        for row, number in zip(
            density.view(blocks, blocks), candidates.view(blocks, blocks), strict=True
        )
    ]


def record(args: Arguments, rule: str) -> dict[str, Any]:
    """Train with a rule and return the records."""
    settings = {**BASE, "rule": rule, "epochs": args.epochs, "seed": args.seed, "data": args.data}
    out = str(Path(args.runs) / folder_name() / f"{rule}-e{args.epochs}-seed{args.seed}")
    options = Options.from_flat({**settings, "out": out, "overwrite": True, "report": False})
    training = start_training(options)
    graph = training.plain_model.graphs[GRAPH]
    sizes = StepSizes(graph, training.learner.optimizer, every=7)
    rows: list[dict[str, Any]] = []
    for epoch in range(args.epochs):
        before = graph.wiring().mask
        training.advance()
        rows.append(
            {
                "epoch": epoch + 1,
                "changed": int((graph.wiring().mask & ~before).sum()),
                "dead": dead_nodes(graph),
                "step_size": sizes.quantiles(),
                "top1": training.rows[-1]["top1"],
            }
        )
        print(rule, rows[-1], flush=True)
    training.finish()
    return {
        "epochs": rows,
        "pairs": density_by_blocks(graph),
        "commit": commit(),
        "machine": machine("cpu"),
    }


def draw(records: dict[str, Any], path: Path) -> None:
    """Plot edge changes, dead nodes and step sizes, and below them the edges by block pair."""
    import matplotlib.pyplot as plt

    columns = max(3, len(records))
    figure, axes = plt.subplots(2, columns, figsize=(3.4 * columns, 6), layout="constrained")
    for axis in (*axes[0, 3:], *axes[1, len(records) :]):
        axis.remove()
    for number, (rule, data) in enumerate(records.items()):
        rows, color = data["epochs"], COLORS.get(rule, f"C{4 + number}")
        epochs = [row["epoch"] for row in rows]
        if any(row["changed"] for row in rows):
            changed = [row["changed"] for row in rows]
            axes[0, 0].plot(epochs, changed, marker="o", color=color, label=rule)
        axes[0, 1].plot(epochs, [row["dead"] for row in rows], marker="o", color=color, label=rule)
        low, middle, high = zip(*(row["step_size"] for row in rows), strict=True)
        axes[0, 2].plot(epochs, middle, marker="o", color=color, label=rule)
        axes[0, 2].fill_between(epochs, low, high, color=color, alpha=0.15)
        _heatmap(axes[1, number], rule, data["pairs"])
    titles = ("edges that changed in the epoch", "dead nodes", "|Δw| / |w| of a step, by node")
    for axis, title in zip(axes[0, :3], titles, strict=True):
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0, 0].set_yscale("log")
    axes[0, 2].set_yscale("log")
    figure.savefig(path, dpi=110)


def _heatmap(axis: Any, rule: str, pairs: Sequence[Sequence[float | None]]) -> None:
    values = np.array([[np.nan if x is None else x for x in row] for row in pairs])[1:, :-1]
    axis.imshow(np.log2(values), cmap="RdBu_r", vmin=-3, vmax=3)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8)
    axis.set(
        title=f"{rule}: edges between blocks",
        xlabel="source block",
        ylabel="target block",
        xticks=range(values.shape[1]),
        yticks=range(values.shape[0]),
        yticklabels=range(1, values.shape[0] + 1),
    )


def main() -> None:
    args = tyro.cli(Arguments, prog="python -m benchmarks.dynamics", description=__doc__)
    path = HERE / "dynamics.json"
    records = json.loads(path.read_text()) if path.exists() else {}
    names = {rule: f"{rule}, {args.epochs} epochs, seed {args.seed}" for rule in args.rules}
    for rule, name in names.items():
        if name not in records:
            records[name] = record(args, rule)
            atomically(path, lambda half: half.write_text(json.dumps(records, indent=1) + "\n"))
    selected = {rule: records[name] for rule, name in names.items()}
    draw(selected, HERE.parent / "docs/images/rules.png")


if __name__ == "__main__":
    main()
