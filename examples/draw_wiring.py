"""Plot the learned wiring of a run, block by block.

    python examples/draw_wiring.py RUN [--weights last] [--edges 400] [--out wiring.png]

There is one panel per graph. Each column is a block, each dot a node, and lines are the strongest
real edges (blue if positive, red if negative, darker if stronger). Nodes without real edges are
pale. The text states the number of real edges and the fraction of them that skip a block.
"""

import argparse

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection

from dnw_graph import NeuralGraph
from train.run import RunFolder


def draw(graph: NeuralGraph, axes: Axes, max_edges: int) -> None:
    """Plot the strongest real edges of one graph."""
    data = graph.to_data()
    sizes = data.block.bincount()
    height = torch.cat(
        [torch.linspace(0, 1, int(n)) if n > 1 else torch.tensor([0.5]) for n in sizes]
    )
    points = torch.stack([data.block.float(), height], dim=1)

    order = data.edge_weight.abs().argsort(descending=True)[:max_edges].flip(0)
    ends, weight = data.edge_index[:, order], data.edge_weight[order]
    strength = (weight.abs() / weight.abs().max()).sqrt()
    colors = torch.where(
        weight[:, None] > 0, torch.tensor([0.13, 0.36, 0.65]), torch.tensor([0.75, 0.22, 0.17])
    )
    lines = torch.stack([points[ends[0]], points[ends[1]]], dim=1)
    shades = torch.cat([colors, 0.1 + 0.6 * strength[:, None]], dim=1)
    axes.add_collection(LineCollection(lines.numpy(), colors=shades.numpy(), linewidths=0.6))

    connected = torch.zeros(graph.topology.num_nodes, dtype=torch.bool)
    connected[data.edge_index.flatten()] = True
    for nodes, color in ((connected, "#222222"), (~connected, "#cccccc")):
        axes.scatter(*points[nodes].t().numpy(), s=3, color=color, zorder=2, linewidths=0)

    source, target = data.block[data.edge_index]
    skip_share = float((target - source > 1).float().mean())
    axes.set_title(
        f"{graph.num_edges:,} of {graph.topology.num_candidates:,}\ncandidate edges", size=9
    )
    axes.set_xlabel(f"{skip_share:.0%} of real edges skip a block", size=8)
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
        "--edges", type=int, default=400, help="maximum number of edges per panel (default: 400)"
    )
    parser.add_argument(
        "--out", default="wiring.png", help="image file to write (default: wiring.png)"
    )
    args = parser.parse_args()
    model = RunFolder(args.run).load_model(args.weights)
    graphs = [m for m in model.modules() if isinstance(m, NeuralGraph)]
    if not graphs:
        raise SystemExit(f"{args.run} contains no graph to plot")
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
