"""Compare networks with random graphs of several generators and with learned wirings.

    python examples/search_generators.py --data DIR [--images 5000] [--epochs 10] [--seeds 3]

DIR contains CIFAR-10 as folders train/CLASS and test/CLASS. Every network has the same stem,
classifier, nodes (norm, ReLU, 3x3) and number of edges. Random graphs are drawn and then fixed, as
in Xie et al. 2019. Learned wirings select their edges from denser random graphs, or from all edges
between six blocks. Each network is trained with several seeds, which also determine the random
graphs. The best of several seeds is the one that a search would select.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from dnw_graph import NeuralGraph, Topology, attach, cost
from dnw_graph.node import NormReluConv

INPUTS, OUTPUTS, NODES, EDGES = 24, 32, 160, 640


def random_graph(
    kind: str, rule: str = "random", **parameters: float
) -> Callable[[int], NeuralGraph]:
    """Return a function that builds a graph from a seed; a rule selects among random edges."""

    def build(seed: int) -> NeuralGraph:
        topology = Topology.random_dag(kind, NODES, INPUTS, OUTPUTS, seed=seed, **parameters)
        return NeuralGraph(topology, rule=rule, num_edges=EDGES, node=node)

    return build


def layered_graph(rule: str) -> Callable[[int], NeuralGraph]:
    """Return a function that builds a graph; a rule selects among all edges of six blocks."""

    def build(seed: int) -> NeuralGraph:
        width = (NODES - INPUTS - OUTPUTS) // 4
        topology = Topology.layered([INPUTS, *[width] * 4, OUTPUTS])
        return NeuralGraph(topology, rule=rule, num_edges=EDGES, node=node)

    return build


def node(number: int) -> nn.Module:
    """Return the node function of a block."""
    return NormReluConv(number, eps=1e-3)


GENERATORS = {
    "Erdős-Rényi": random_graph("erdos_renyi", p=0.045),
    "Barabási-Albert": random_graph("barabasi_albert", m=4),
    "Watts-Strogatz, p = 0.25": random_graph("watts_strogatz", k=12, p=0.25),
    "Watts-Strogatz, p = 0.75": random_graph("watts_strogatz", k=12, p=0.75),
    "Watts-Strogatz, learned": random_graph("watts_strogatz", "dnw_factored", k=40, p=0.25),
    "layered, random edges": layered_graph("random"),
    "layered, learned (dnw)": layered_graph("dnw"),
    "layered, learned (dnw_factored)": layered_graph("dnw_factored"),
}


def load(folder: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """Return images ``[N, 3, 32, 32]`` with mean 0 and deviation 1, and labels."""
    dataset = ImageFolder(folder)
    counts: dict[int, int] = {}
    images, labels = [], []
    for path, label in dataset.samples:
        counts[label] = counts.get(label, 0) + 1
        if counts[label] <= per_class:
            images.append(pil_to_tensor(dataset.loader(path)))
            labels.append(label)
    pixels = torch.stack(images).float()
    return (pixels - 120) / 63, torch.tensor(labels)


def fit(graph: NeuralGraph, train: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    """Train and return a network that contains the graph."""
    model = nn.Sequential(
        nn.Conv2d(3, INPUTS, 3, stride=2, padding=1, bias=False),
        graph,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(OUTPUTS, 10),
    )
    images, labels = train
    steps = epochs * (len(images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    attach(model, optimizer, total_steps=steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: len(images) // 64 * 64].split(64):
            x = images[batch]
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return top-1 accuracy in percent."""
    correct = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * correct / len(images)


def main() -> None:
    """Train all networks and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--images", type=int, default=5000, help="training images (default: 5000)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="networks per wiring (default: 3)")
    args = parser.parse_args()
    train = load(args.data / "train", args.images // 10)
    test = load(args.data / "test", 200)
    print("| wiring | edges | levels | M multiply-adds | top-1, %, mean ± deviation | best | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, build in GENERATORS.items():
        accuracies, start = [], time.perf_counter()
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            graph = build(seed)
            model = fit(graph, train, args.epochs)
            accuracies.append(accuracy(model, *test))
        seconds = (time.perf_counter() - start) / args.seeds
        counts = cost(model, image_size=32)
        spread = f" ± {statistics.stdev(accuracies):.1f}" if len(accuracies) > 1 else ""
        print(
            f"| {name} | {counts.real_edges:,} | {graph.topology.depth} | "
            f"{counts.macs / 1e6:.2f} | {statistics.mean(accuracies):.1f}{spread} | "
            f"{max(accuracies):.1f} | "
            f"{seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
