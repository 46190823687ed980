"""MobileNetV1-DNW as a plain dense network: the baseline of the benchmarks. Do not optimise it.

This is a direct implementation of Algorithm 1 with dense layers. Each resolution has one full
``[targets, sources]`` matrix, including entries that no block reads. Every forward pass ranks all
entries with a full sort and sets all but the largest to zero. The contributions of a block to all
later blocks are computed by one 1x1 convolution and accumulated. The published implementation works
in the same way, and its training step takes as long (benchmarks/training_step.md).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mbv1 import MobileNetV1Config
from models.mbv1_dnw import STAGES, Stage

Selection = Literal["sort", "partition"]


class _KeepLargest(torch.autograd.Function):
    """Set all but the ``k`` largest magnitudes to zero; pass the gradient to all entries."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, k: int, selection: Selection) -> Tensor:
        magnitude, masked = weight.flatten().abs(), weight.clone()
        flat = masked.view(-1)
        if selection == "sort":
            flat[magnitude.sort().indices[: weight.numel() - k]] = 0
        else:
            flat[magnitude < magnitude.kthvalue(weight.numel() - k + 1).values] = 0
        return masked

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class DenseStage(nn.Module):
    """The part of the network at one resolution, as dense layers."""

    def __init__(self, stage: Stage, k: int, selection: Selection, eps: float) -> None:
        super().__init__()
        self.stage, self.k, self.selection = stage, k, selection
        hidden = stage.width * (stage.blocks - 1)
        self.weight = nn.Parameter(
            torch.empty(stage.width * stage.blocks, stage.inputs + hidden, 1, 1)
        )
        bound = (stage.inputs + hidden) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        widths = [stage.inputs, *[stage.width] * (stage.blocks - 1)]
        strides = [stage.stride, *[1] * (stage.blocks - 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(w, eps=eps) for w in widths)
        self.convs = nn.ModuleList(
            nn.Conv2d(w, w, 3, s, padding=1, groups=w, bias=False)
            for w, s in zip(widths, strides, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs ``[B, width, H / stride, W / stride]``."""
        weight = _KeepLargest.apply(self.weight, self.k, self.selection)
        width, column = self.stage.width, 0
        sums: Tensor | None = None  # contributions so far to the blocks that are not computed yet
        for row, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            z = conv(F.relu(norm(x), inplace=True))
            contribution = F.conv2d(z, weight[row * width :, column : column + z.shape[1]])
            sums = contribution if sums is None else sums + contribution
            x, sums = sums[:, :width], sums[:, width:]
            column += z.shape[1]
        return x


class DenseBaseline(nn.Module):
    """MobileNetV1-DNW with dense layers.

    Args:
        config: Width, classes, image size, stem.
        selection: How the largest weights are found: by a full sort or by a partition.
    """

    def __init__(self, config: MobileNetV1Config, selection: Selection = "sort") -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, STAGES[0].inputs, 3, config.stride, padding=1, bias=False)
        self.stages = nn.Sequential(
            *(
                DenseStage(stage, stage.num_edges(config.exact_width), selection, config.norm_eps)
                for stage in STAGES
            )
        )
        self.norm = nn.BatchNorm2d(STAGES[-1].width, eps=config.norm_eps)
        self.classifier = nn.Linear(STAGES[-1].width, config.num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``[B, num_classes]`` of images ``[B, 3, H, W]``."""
        x = F.relu(self.norm(self.stages(self.stem(x))), inplace=True)
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits
