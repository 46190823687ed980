"""Normalisation of each node apart."""

import math
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from dnw_graph.node.base import NODES, Formula, NodeFunction

NormKind = Literal["batch", "instance"]


class _Sum(torch.autograd.Function):
    """Sums over processes, gradients too."""

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

    In training, with more than one process; else it is :class:`torch.nn.BatchNorm2d`. PyTorch's own
    ``SyncBatchNorm`` computes the same on GPUs.
    """

    @property
    def active(self) -> bool:
        """Whether statistics are taken over processes now."""
        return self.training and dist.is_initialized() and dist.get_world_size() > 1

    def affine_of(self, x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return ``a, b [V]`` of which ``a x + b`` is normalised; learn running statistics.

        With ``N``, ``m`` and ``v`` the sums over processes ``p`` of ``n_p``, ``n_p m_p / N`` and
        ``n_p (v_p + (m_p - m)^2) / N``: ``a = s / sqrt(v + eps)``, ``b = shift - a m``.

        Args:
            x: This process' values.
            dims: Dimensions of which statistics are taken.
        """
        var, mean = torch.var_mean(x.to(self.weight.dtype), dims, correction=0)
        number = float(math.prod(x.shape[dim] for dim in dims))
        own = torch.stack([mean, var, torch.full_like(mean, number)])
        every = own.new_zeros(dist.get_world_size(), *own.shape)
        rank = dist.get_rank()
        every = torch.cat([every[:rank], own[None], every[rank + 1 :]])
        means, variances, numbers = _Sum.apply(every).unbind(1)
        count = numbers.sum(0)
        mean = means[0] + (numbers * (means - means[0])).sum(0) / count  # of equal ones, the same
        var = (numbers * (variances + (means - mean) ** 2)).sum(0) / count
        self._learn(mean.detach(), var.detach(), count.detach())
        scale = self.weight * (var + self.eps).rsqrt()
        return scale, self.bias - mean * scale

    @torch.no_grad()
    def _learn(self, mean: Tensor, var: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        part = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, part)
        self.running_var.lerp_(var * count / (count - 1), part)

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input [B, V, H, W]``, normalised."""
        if not self.active:
            return super().forward(input)
        scale, shift = self.affine_of(input, (0, 2, 3))
        return torch.addcmul(shift[:, None, None], input, scale[:, None, None]).to(input.dtype)


def synchronize_norms(model: nn.Module) -> nn.Module:
    """Let every batch norm of a model take its statistics over the images of all processes.

    Parameters and buffers stay what they are; layers are replaced.

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


def make_norm(norm: NormKind, num_nodes: int, eps: float, steps: int | None) -> Any:
    """Return a norm with a scale and a shift a node, or one for each of some steps.

    Raises:
        ValueError: Another norm, no steps, or an eps that is not above 0.
    """
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps}")
    if steps is not None:
        if steps < 1:
            raise ValueError(f"steps must be 1 or more, got {steps}")
        return nn.ModuleList(make_norm(norm, num_nodes, eps, None) for _ in range(steps))
    if norm == "batch":
        return nn.BatchNorm2d(num_nodes, eps=eps)
    if norm == "instance":
        return nn.InstanceNorm2d(num_nodes, eps=eps, affine=True)
    raise ValueError(f"unknown norm {norm!r} (known: batch, instance)")


def norm_at(norm: Any, t: float) -> Any:
    """Return the norm at a time: of those of steps, the last from there on."""
    return norm[min(int(t), len(norm) - 1)] if isinstance(norm, nn.ModuleList) else norm


def normalised(norm: Any, x: Tensor) -> Tensor:
    """Return node-major maps ``[V, B, H, W]`` normalised, without a copy for another layout."""
    nodes, batch, height, width = x.shape
    if isinstance(norm, nn.InstanceNorm2d):  # every map is a channel of its own
        scale, shift = (p.repeat_interleave(batch) for p in (norm.weight, norm.bias))
        maps = x.reshape(1, nodes * batch, height, width)
        return F.batch_norm(maps, None, None, scale, shift, training=True, eps=norm.eps).view_as(x)
    # One image of B * H rows has the same statistics.
    out: Tensor = norm(x.reshape(1, nodes, batch * height, width)).view_as(x)
    return out


def norm_formula(norm: Any) -> Formula:
    """Return what a norm computes in evaluation."""
    scale, shift = norm.weight.detach(), norm.bias.detach()
    if isinstance(norm, nn.InstanceNorm2d):
        return Formula(scale=scale, shift=shift, eps=norm.eps)
    folded = scale.double() / (norm.running_var.double() + norm.eps).sqrt()
    shifted = shift.double() - norm.running_mean.double() * folded
    return Formula(scale=folded.to(scale), shift=shifted.to(shift))


@NODES.register("norm")
class Norm(NodeFunction):
    """``Z_v = norm(I_v)``, with a scale and a shift a node.

    Args:
        num_nodes: How many nodes.
        stride: 1.
        norm: ``"batch"`` (over ``B, H, W``, with running statistics) or ``"instance"`` (over
            ``H, W``).
        eps: Added to the variance.
        steps: Number of norms, of which step ``t`` of discrete time has one of its own, and those
            after the last one that; one for all unless given.

    Raises:
        ValueError: Another norm, a stride, no steps, or an eps that is not above 0.
    """

    def __init__(
        self,
        num_nodes: int,
        stride: int = 1,
        norm: NormKind = "batch",
        eps: float = 1e-5,
        steps: int | None = None,
    ) -> None:
        if stride != 1:
            raise ValueError(f"norm has no stride, got {stride}")
        super().__init__(num_nodes)
        self.norm = make_norm(norm, num_nodes, eps, steps)

    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        """See :meth:`NodeFunction.forward`."""
        return normalised(norm_at(self.norm, t), x)

    def formula(self, t: float = 0.0) -> Formula:
        """See :meth:`NodeFunction.formula`."""
        return norm_formula(norm_at(self.norm, t))
