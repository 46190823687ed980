"""Batch norm with the statistics of all processes."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dnw_graph.node.norm import update_running


class _Sum(torch.autograd.Function):
    """Sums a tensor over processes, and its gradient as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on any device.

    This applies in training with more than one process; otherwise it equals
    :class:`torch.nn.BatchNorm2d`. PyTorch's ``SyncBatchNorm`` computes the same on GPUs.
    """

    @property
    def active(self) -> bool:
        """Whether statistics are currently computed over several processes."""
        return self.training and dist.is_initialized() and dist.get_world_size() > 1

    def affine_of(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return ``a, b [V]`` such that ``a x + b`` is normalised; update running statistics.

        Process ``p`` has ``n_p`` values with mean ``m_p`` and variance ``v_p``. Over all processes,
        their number ``N`` is the sum of ``n_p``, their mean ``m`` that of ``n_p m_p / N``, and
        their variance ``v`` that of ``n_p (v_p + (m_p - m)^2) / N``. For a norm with scale ``s``,
        ``a = s / sqrt(v + eps)`` and ``b = shift - a m``.

        Args:
            x: The values of this process.
            dims: Dimensions over which statistics are computed.
        """
        x = x.to(self.weight.dtype) if self.affine else x
        var, mean = torch.var_mean(x, dims, correction=0)
        size = float(math.prod(x.shape[dim] for dim in dims))
        local = torch.stack([mean, var, torch.full_like(mean, size)])
        stacked = local.new_zeros(dist.get_world_size(), *local.shape)
        rank = dist.get_rank()
        stacked = torch.cat([stacked[:rank], local[None], stacked[rank + 1 :]])
        means, variances, sizes = _Sum.apply(stacked).unbind(1)
        count = sizes.sum(0)
        mean = means[0] + (sizes * (means - means[0])).sum(0) / count  # exact if all are equal
        var = (sizes * (variances + (means - mean) ** 2)).sum(0) / count
        if self.running_mean is not None:
            update_running([self], mean, var, count)
        scale = (var + self.eps).rsqrt()
        if not self.affine:
            return scale, -mean * scale
        scale = self.weight * scale
        return scale, self.bias - mean * scale

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised ``input [B, V, H, W]``."""
        if not self.active:
            return super().forward(input)
        scale, shift = self.affine_of(input, (0, 2, 3))
        return torch.addcmul(shift[:, None, None], input, scale[:, None, None]).to(input.dtype)


def synchronize_norms(model: nn.Module) -> nn.Module:
    """Replace every batch norm of a model by one over the images of all processes.

    Parameters and buffers are reused.

    Args:
        model: The model, changed in place.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, _synchronized(child))
    return _synchronized(model) if type(model) is nn.BatchNorm2d else model


def _synchronized(norm: nn.BatchNorm2d) -> SyncBatchNorm2d:
    new = SyncBatchNorm2d(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    )
    new.weight, new.bias = norm.weight, norm.bias
    for name, buffer in norm.named_buffers():
        setattr(new, name, buffer)
    new.training = norm.training
    return new
