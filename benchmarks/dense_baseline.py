"""The yardstick: MobileNetV1-DNW as a plain dense network. Frozen; do not make it faster.

This is what one gets by writing Algorithm 1 down with dense layers: each resolution holds one full
``[targets, sources]`` matrix, entries that no block reads included; every forward pass ranks all of
them with a full sort and zeroes the rest; a block's contributions to all later blocks are one 1x1
convolution, added to what came before. The published implementation is of this kind, and a step of
it takes as long (benchmarks/training_step.md).
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.mbv1 import MobileNetV1Config
from models.mbv1_dnw import STAGES, Stage

Selection = Literal["sort", "partition"]


class _KeepLargest(torch.autograd.Function):
    """Zeroes all but the ``k`` largest magnitudes; the gradient passes to all."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, k: int, selection: Selection) -> Tensor:
        magnitude, kept = weight.flatten().abs(), weight.clone()
        flat = kept.view(-1)
        if selection == "sort":
            flat[magnitude.sort().indices[: weight.numel() - k]] = 0
        else:
            flat[magnitude < magnitude.kthvalue(weight.numel() - k + 1).values] = 0
        return kept

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad, None, None


class DenseStage(nn.Module):
    """One resolution as dense layers."""

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
        waiting: Tensor | None = None  # what blocks still to come have received
        for row, (norm, conv) in enumerate(zip(self.norms, self.convs, strict=True)):
            z = conv(F.relu(norm(x), inplace=True))
            pushed = F.conv2d(z, weight[row * width :, column : column + z.shape[1]])
            waiting = pushed if waiting is None else waiting + pushed
            x, waiting = waiting[:, :width], waiting[:, width:]
            column += z.shape[1]
        return x


class DenseBaseline(nn.Module):
    """The whole network.

    Args:
        config: Width, classes, image size, stem.
        selection: How edges are chosen: a full sort, or a partition in its place.
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
