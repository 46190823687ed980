"""Which random graphs make good networks: generators compared with wirings that are learned.

    python examples/search_generators.py --data DIR [--images 5000] [--epochs 10] [--seeds 3]

DIR holds CIFAR-10 as folders train/CLASS and test/CLASS. Every network has the same stem,
classifier and nodes (norm, ReLU, 3x3), and as many edges. Random graphs are drawn and then fixed,
as in Xie et al. 2019; learned wirings choose from denser ones, or from all edges between six
blocks. Each is trained from several seeds, which also draw the random graphs; the best one of
several is what a search would keep.
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


def drawn(kind: str, rule: str = "random", **parameters: float) -> Callable[[int], NeuralGraph]:
    """Return what builds a graph of a generator, of whose edges a rule keeps as many as of all."""

    def build(seed: int) -> NeuralGraph:
        topology = Topology.random_dag(kind, NODES, INPUTS, OUTPUTS, seed=seed, **parameters)
        return NeuralGraph(topology, rule=rule, num_edges=EDGES, node=node)

    return build


def chosen(rule: str) -> Callable[[int], NeuralGraph]:
    """Return what builds a graph whose edges a rule chooses, from all between six blocks."""

    def build(seed: int) -> NeuralGraph:
        width = (NODES - INPUTS - OUTPUTS) // 4
        topology = Topology.layered([INPUTS, *[width] * 4, OUTPUTS])
        return NeuralGraph(topology, rule=rule, num_edges=EDGES, node=node)

    return build


def node(number: int) -> nn.Module:
    """Return the node function of a block."""
    return NormReluConv(number, eps=1e-3)


GENERATORS = {
    "Erdős-Rényi": drawn("erdos_renyi", p=0.045),
    "Barabási-Albert": drawn("barabasi_albert", m=4),
    "Watts-Strogatz, p = 0.25": drawn("watts_strogatz", k=12, p=0.25),
    "Watts-Strogatz, p = 0.75": drawn("watts_strogatz", k=12, p=0.75),
    "Watts-Strogatz, learned": drawn("watts_strogatz", "dnw_factored", k=40, p=0.25),
    "layered, random edges": chosen("random"),
    "layered, learned (dnw)": chosen("dnw"),
    "layered, learned (dnw_factored)": chosen("dnw_factored"),
}


def load(folder: Path, per_class: int) -> tuple[Tensor, Tensor]:
    """Return images ``[N, 3, 32, 32]``, of mean 0 and deviation 1, and labels."""
    dataset = ImageFolder(folder)
    kept: dict[int, int] = {}
    images, labels = [], []
    for path, label in dataset.samples:
        kept[label] = kept.get(label, 0) + 1
        if kept[label] <= per_class:
            images.append(pil_to_tensor(dataset.loader(path)))
            labels.append(label)
    pixels = torch.stack(images).float()
    return (pixels - 120) / 63, torch.tensor(labels)


def fit(graph: NeuralGraph, train: tuple[Tensor, Tensor], epochs: int) -> nn.Module:
    """Train a network around a graph."""
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
    """Return top-1 in %."""
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.split(250), labels.split(250), strict=True)
    )
    return 100 * right / len(images)


def main() -> None:
    """Compare all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with CIFAR-10")
    parser.add_argument("--images", type=int, default=5000, help="training images (default: 5000)")
    parser.add_argument("--epochs", type=int, default=10, help="epochs (default: 10)")
    parser.add_argument("--seeds", type=int, default=3, help="networks of each (default: 3)")
    args = parser.parse_args()
    train = load(args.data / "train", args.images // 10)
    test = load(args.data / "test", 200)
    print("| wiring | edges | levels | M multiply-adds | top-1, %, mean ± deviation | best | s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, build in GENERATORS.items():
        found, start = [], time.perf_counter()
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            graph = build(seed)
            model = fit(graph, train, args.epochs)
            found.append(accuracy(model, *test))
        seconds = (time.perf_counter() - start) / args.seeds
        counted = cost(model, image_size=32)
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        print(
            f"| {name} | {counted.real_edges:,} | {graph.topology.depth} | "
            f"{counted.macs / 1e6:.2f} | {statistics.mean(found):.1f}{spread} | {max(found):.1f} | "
            f"{seconds:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
