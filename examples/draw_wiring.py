"""Draw the wiring that a run has learned, block by block.

    python examples/draw_wiring.py RUN [--weights last] [--edges 400] [--out wiring.png]

One panel a graph: each column is a block, each dot a node, lines are the strongest real edges (blue
positive, red negative, darker where stronger). Nodes that no real edge touches are pale. The text
under a panel counts all real edges, and those that skip a block.
"""

import argparse

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from dnw_graph import NeuralGraph
from train.run import RunFolder


def draw(graph: NeuralGraph, axes: Axes, most: int) -> None:
    """Draw one graph."""
    data = graph.to_data()
    sizes = data.block.bincount()
    place = torch.cat(
        [torch.linspace(0, 1, int(n)) if n > 1 else torch.tensor([0.5]) for n in sizes]
    )
    points = torch.stack([data.block.float(), place], dim=1)

    order = data.edge_weight.abs().argsort(descending=True)[:most].flip(0)
    ends, weight = data.edge_index[:, order], data.edge_weight[order]
    strength = (weight.abs() / weight.abs().max()).sqrt()
    colors = torch.where(
        weight[:, None] > 0, torch.tensor([0.13, 0.36, 0.65]), torch.tensor([0.75, 0.22, 0.17])
    )
    lines = torch.stack([points[ends[0]], points[ends[1]]], dim=1)
    shades = torch.cat([colors, 0.1 + 0.6 * strength[:, None]], dim=1)
    axes.add_collection(LineCollection(lines.numpy(), colors=shades.numpy(), linewidths=0.6))

    touched = torch.zeros(graph.topology.num_nodes, dtype=torch.bool)
    touched[data.edge_index.flatten()] = True
    for chosen, color in ((touched, "#222222"), (~touched, "#cccccc")):
        axes.scatter(*points[chosen].t().numpy(), s=3, color=color, zorder=2, linewidths=0)

    source, target = data.block[data.edge_index]
    skipping = float((target - source > 1).float().mean())
    axes.set_title(
        f"{graph.num_edges:,} of {graph.topology.num_candidates:,}\ncandidate edges", size=9
    )
    axes.set_xlabel(f"{skipping:.0%} of real edges skip a block", size=8)
    axes.set_xticks(range(len(sizes)), [f"{int(n)}" for n in sizes], size=7)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(sizes) - 0.8)
    for side in axes.spines.values():
        side.set_visible(False)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", help="run folder")
    parser.add_argument("--weights", default="last", choices=["initial", "last", "best"])
    parser.add_argument(
        "--edges", type=int, default=400, help="edges a panel at most (default: 400)"
    )
    parser.add_argument(
        "--out", default="wiring.png", help="picture to write (default: wiring.png)"
    )
    args = parser.parse_args()
    model = RunFolder(args.run).load_model(args.weights)
    graphs = [m for m in model.modules() if isinstance(m, NeuralGraph)]
    if not graphs:
        raise SystemExit(f"{args.run} has no graph to draw")
    widths = [len(g.topology.blocks) for g in graphs]
    figure, panels = plt.subplots(
        1, len(graphs), figsize=(0.9 * sum(widths), 4), width_ratios=widths, squeeze=False
    )
    for graph, axes in zip(graphs, panels[0], strict=True):
        draw(graph, axes, args.edges)
    figure.tight_layout()
    figure.savefig(args.out, dpi=110)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
