"""Train a recurrent graph that reads handwritten digits row by row.

    python examples/recurrent_digits.py [--epochs 15]

Eight input nodes receive one row of an image per step. The hidden nodes pass their states to each
other from step to step. Two steps after the last row, the outputs are the logits of the digit. The
example takes less than a minute on two cores.
"""

import argparse

import torch
from digits import load, train
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Topology


class RowReader(nn.Module):
    """A graph with edges between hidden nodes, whose input is a sequence of eight rows."""

    def __init__(self, hidden: int = 192, num_edges: int = 12_000) -> None:
        super().__init__()
        topology = Topology.recurrent(8, hidden, 10)
        self.graph = NeuralGraph(
            topology,
            num_edges=num_edges,
            node="relu",
            input_node="identity",
            schedule="discrete(steps=9, input='new')",
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, 10]`` of images ``[B, 1, 8, 8]``."""
        logits: Tensor = self.graph(x.squeeze(1))  # [B, T = 8 rows, 8 inputs]
        return logits


def main() -> None:
    """Train the graph."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=15, help="passes over the data (default: 15)")
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = load()
    model = RowReader()
    print(model.graph)
    train(model, images, labels, args.epochs)


if __name__ == "__main__":
    main()
