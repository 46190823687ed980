"""Train a small-world wiring on handwritten digits under three schedules.

    python examples/small_world.py [--epochs 3]

The candidates are the edges of a Watts-Strogatz graph of 48 nodes. Under each schedule, the network
learns which half of them is real. Only the schedule differs between the three networks. The example
takes less than a minute on two cores.
"""

import argparse
from functools import partial

import torch
from digits import load, train
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology
from dnw_graph.node import NormReluConv

SCHEDULES = {
    "static": "static",
    "discrete": "discrete(steps=5, input='held')",
    "continuous": "continuous(rtol=0.01, atol=0.01, t1=3.0)",
}


class SmallWorld(nn.Module):
    """A convolution with stride 2 and a small-world graph; each output node is averaged."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 12, 3, stride=2, padding=1, bias=False)
        topology = Topology.random_dag("watts_strogatz", 48, 12, 10, seed=0, k=20, p=0.5)
        self.graph = NeuralGraph(
            topology,
            num_edges=topology.num_candidates // 2,
            node=partial(NormReluConv, norm="instance", eps=1e-3),
            schedule=schedule,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, 10]`` of images ``[B, 1, 8, 8]``."""
        logits: Tensor = 4 * self.graph(self.stem(x)).mean((2, 3))
        return logits


def main() -> None:
    """Train under each schedule."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=3, help="epochs per schedule (default: 3)")
    args = parser.parse_args()
    images, labels = load()
    for name, schedule in SCHEDULES.items():
        torch.manual_seed(0)
        model = SmallWorld(schedule)
        print(f"\n{name}: {model.graph.topology}")
        train(model, images, labels, args.epochs)
        if model.graph.evaluations:
            print(f"evaluations of the last pass: {model.graph.evaluations['forward']}")


if __name__ == "__main__":
    main()
