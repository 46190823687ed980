"""Metrics of a network, and their display during training."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy
from tqdm import tqdm

from dnw_graph import NeuralGraph
from dnw_graph.analysis.history import Ids

RealEdges = Mapping[str, tuple[Ids, int]]
"""What :func:`dnw_graph.analysis.real_edges` returns."""


class Normalize(nn.Module):
    """Normalises bytes ``[B, 3, H, W]`` to floats of mean 0 and standard deviation 1.

    Args:
        mean: Mean of each channel, for pixels from 0 to 1.
        std: Standard deviation of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised images, contiguous regardless of the strides of the input."""
        return (images.contiguous() - self.mean) / self.std


def evaluate(
    model: nn.Module,
    normalize: Normalize,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
) -> dict[str, float]:
    """Return loss, top-1 and top-5 (top-n for fewer classes) of a network in evaluation mode.

    Args:
        model: Network from normalised images to logits.
        normalize: Normalisation of the images; its device is used.
        batches: Images ``[B, 3, H, W]``, uint8, and labels ``[B]``.
        num_classes: Number of classes.
    """
    device = normalize.mean.device
    loss = MeanMetric(nan_strategy="disable").to(device)
    top1, top5 = (accuracy_metric(k, num_classes).to(device) for k in (1, 5))
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for images, labels in batches:
            logits, labels = model(normalize(images.to(device))), labels.to(device)
            loss.update(F.cross_entropy(logits.float(), labels), len(labels))
            top1.update(logits, labels)
            top5.update(logits, labels)
    model.train(was_training)
    return {
        "loss": float(loss.compute()),
        "top1": float(top1.compute()),
        "top5": float(top5.compute()),
    }


def accuracy_metric(k: int, num_classes: int) -> Metric:
    """Return a metric: the share of images whose class is among the ``k`` highest logits."""
    return MulticlassAccuracy(
        num_classes, top_k=min(k, num_classes), average="micro", validate_args=False
    )


def evaluations_of(model: nn.Module) -> dict[str, int]:
    """Return the function evaluations of graphs in continuous time in the last step, by kind."""
    evaluations: Counter[str] = Counter()
    for graph in model.modules():
        if isinstance(graph, NeuralGraph):
            evaluations.update({f"evaluations_{k}": n for k, n in graph.evaluations.items()})
    return dict(evaluations)


def edges_changed(before: RealEdges, now: RealEdges) -> int:
    """Return the number of edges that are real now and were not before."""
    return sum(len(np.setdiff1d(now[name][0], before[name][0], True)) for name in now)


def as_line(row: Mapping[str, Any], epochs: int) -> str:
    """Return the metrics of an epoch as one line of text."""
    return (
        f"epoch {row['epoch']}/{epochs}: loss {row['loss']:.3f} (training "
        f"{row['train_loss']:.3f}), top-1 {row['top1']:.2%} (training {row['train_top1']:.2%}), "
        f"edges changed {row['edges_changed']:,}, "
        f"{row['images_per_second']:,.0f} images/s, {row['seconds']:,.1f} s"
    )


def progress(title: str, images: int, shown: bool = True) -> "tqdm[Any]":
    """Return a progress bar that counts images; it is shown only in a terminal."""
    disable = None if shown else True
    return tqdm(total=images, desc=title, unit=" images", leave=False, disable=disable)


def show(bar: "tqdm[Any]", loss: MeanMetric, accuracy: Metric, changed: int) -> None:
    """Show loss, accuracy and changed edges of the epoch beside its progress bar."""
    bar.set_postfix_str(
        f"training loss {float(loss.compute()):.3f}, top-1 {float(accuracy.compute()):.1%}, "
        f"edges changed {changed:,}"
    )
