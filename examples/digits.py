"""Train a small neural graph on handwritten digits and print how its wiring changes.

    python examples/digits.py [--rule dnw] [--num-edges 600] [--epochs 20] [--seed 0]

The images are the 1,797 digits of 8x8 pixels that are included in scikit-learn. The example takes
a few seconds on two cores.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dnw_graph import NeuralGraph, Rule, Topology, attach, cost, penalty


class DigitClassifier(nn.Module):
    """A convolution and a graph of four blocks; the mean of each output node is a logit."""

    def __init__(self, rule: str | Rule, num_edges: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        topology = Topology.layered([16, 48, 48, 10])
        self.graph = NeuralGraph(topology, rule=rule, num_edges=num_edges, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, 10]`` of images ``[B, 1, 8, 8]``."""
        logits: Tensor = self.graph(self.stem(x)).mean((2, 3))
        return logits


def train(model: DigitClassifier, images: Tensor, labels: Tensor, epochs: int) -> None:
    """Train on the first 1,400 digits, test on the others, and print one row per epoch."""
    train_x, test_x = images[:1400], images[1400:]
    train_y, test_y = labels[:1400], labels[1400:]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    attach(model, optimizer, total_steps=28 * epochs)
    print("epoch   loss  test accuracy  edges changed")
    for epoch in range(1, epochs + 1):
        before = model.graph.wiring().mask
        model.train()
        total = 0.0
        for batch in torch.randperm(1400).split(50):
            loss = F.cross_entropy(model(train_x[batch]), train_y[batch]) + penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        schedule.step()
        model.eval()
        with torch.no_grad():
            accuracy = (model(test_x).argmax(1) == test_y).float().mean().item()
        changed = int((model.graph.wiring().mask & ~before).sum())
        print(f"{epoch:5} {total / 1400:6.3f} {accuracy:14.1%} {changed:14}")


def load() -> tuple[Tensor, Tensor]:
    """Return the images ``[1797, 1, 8, 8]`` and labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.3
    return images, torch.tensor(digits.target)


def main() -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rule", default="dnw", help="see docs/rules.md (default: dnw)")
    parser.add_argument("--num-edges", type=int, default=600, help="budget k (default: 600)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the data (default: 20)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of weights and data order (default: 0)"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = load()
    model = DigitClassifier(args.rule, args.num_edges)
    print(f"{model.graph.topology}, rule {args.rule!r}\n{cost(model, image_size=8)}\n")

    start = time.perf_counter()
    train(model, images, labels, args.epochs)
    print(f"\ntrained in {time.perf_counter() - start:.1f} s\n{cost(model, image_size=8)}")

    data = model.graph.to_data()
    pairs = data.block[data.edge_index]
    print("\nreal edges from block (row) to block (column)")
    print("     " + "".join(f"{j:7}" for j in range(1, 4)))
    for i in range(3):
        row = [int(((pairs[0] == i) & (pairs[1] == j)).sum()) for j in range(1, 4)]
        print(f"{i:5}" + "".join(f"{n:7}" if n else "      -" for n in row))


if __name__ == "__main__":
    main()
