"""Handwritten digits, and a small network that learns how to wire them, for all training loops."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from dnw_graph import NeuralGraph, Topology, attach, penalty

EPOCHS, BATCH = 3, 64


def digits() -> TensorDataset:
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    return TensorDataset(images[:640], torch.tensor(bunch.target[:640]))


def network(rule: str = "dnw") -> nn.Module:
    torch.manual_seed(0)
    graph = NeuralGraph(Topology.layered([8, 12, 12, 16]), rule=rule, num_edges=150)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), graph),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def trained_by_hand(rule: str) -> dict[str, Tensor]:
    """Return the weights after training in a loop as in docs/rules.md, in the order of the data."""
    model, data = network(rule), digits()
    optimizer = optimizer_of(model)
    attach(model, optimizer, total_steps=EPOCHS * len(data) // BATCH)
    for _ in range(EPOCHS):
        for start in range(0, len(data), BATCH):
            images, labels = data[start : start + BATCH]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            (loss + penalty(model)).backward()
            optimizer.step()
    return model.state_dict()


RULES = ["dnw", "l1_anneal", "rigl(every=5)", "dnw_factored"]
