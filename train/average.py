"""An exponential moving average of a network's weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return a moving average of a network: ``w' <- decay w' + (1 - decay) w`` at each update.

    Normalisation statistics are averaged too; the state of rules (edges, steps) is copied.

    Args:
        model: The network.
        decay: Share of the average that is kept at each update.
    """

    def update(averages: Sequence[Tensor], values: Sequence[Tensor], _: object) -> None:
        if averages[0].is_floating_point():
            torch._foreach_lerp_(list(averages), list(values), 1 - decay)
        else:
            torch._foreach_copy_(list(averages), list(values))

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
