"""An exponential moving average of a network's weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Return a copy that follows a network: ``w' <- decay w' + (1 - decay) w`` at each update.

    Statistics of normalisation follow likewise; what rules remember (edges, steps) is copied.

    Args:
        model: The network.
        decay: Share that stays.
    """

    def follow(theirs: Sequence[Tensor], ours: Sequence[Tensor], _: object) -> None:
        if theirs[0].is_floating_point():
            torch._foreach_lerp_(list(theirs), list(ours), 1 - decay)
        else:
            torch._foreach_copy_(list(theirs), list(ours))

    return AveragedModel(model, multi_avg_fn=follow, use_buffers=True)
