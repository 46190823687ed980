"""Normalisation of each node separately."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from dnw_graph.node.base import NODES, Formula, NodeFunction

NormKind = Literal["batch", "instance"]


def make_norm(norm: NormKind, num_nodes: int, eps: float, steps: int | None) -> Any:
    """Return a norm with one scale and one shift per node, or a list of one such norm per step.

    Raises:
        ValueError: If the norm is unknown, ``steps`` is below 1, or ``eps`` is not above 0.
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
    """Return the norm at a time: that of the step, or of the last step if there are no more."""
    return norm[min(int(t), len(norm) - 1)] if isinstance(norm, nn.ModuleList) else norm


@torch.no_grad()
def update_running(
    norms: Sequence[Any], mean: Tensor, variance: Tensor, count: Tensor | int
) -> None:
    """Update the running statistics of batch norms in training, as PyTorch does.

    Args:
        norms: The norms, with the same momentum.
        mean: Means of the nodes of all norms ``[V]``.
        variance: Their variances ``[V]``, divided by the number of values.
        count: Number of values of each node ``[V]``, or of all.
    """
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    first, sizes = norms[0], [norm.num_features for norm in norms]
    factor = 1 / float(first.num_batches_tracked) if first.momentum is None else first.momentum
    unbiased = variance * (count / (count - 1))
    for name, values in (("running_mean", mean), ("running_var", unbiased)):
        running = [getattr(norm, name) for norm in norms]
        torch._foreach_lerp_(running, values.to(running[0].dtype).split(sizes), factor)


def normalised(norm: Any, x: Tensor) -> Tensor:
    """Return normalised node-major maps ``[V, B, H, W]``, without a copy to another layout."""
    nodes, batch, height, width = x.shape
    if isinstance(norm, nn.InstanceNorm2d):  # every map is a separate channel
        scale, shift = (p.repeat_interleave(batch) for p in (norm.weight, norm.bias))
        maps = x.reshape(1, nodes * batch, height, width)
        return F.batch_norm(maps, None, None, scale, shift, training=True, eps=norm.eps).view_as(x)
    # One image of B * H rows has the same statistics.
    out: Tensor = norm(x.reshape(1, nodes, batch * height, width)).view_as(x)
    return out


def norm_formula(norm: Any) -> Formula:
    """Return the formula of a norm in evaluation."""
    scale, shift = norm.weight.detach(), norm.bias.detach()
    if isinstance(norm, nn.InstanceNorm2d):
        return Formula(scale=scale, shift=shift, eps=norm.eps)
    factor = scale.double() / (norm.running_var.double() + norm.eps).sqrt()
    offset = shift.double() - norm.running_mean.double() * factor
    return Formula(scale=factor.to(scale), shift=offset.to(shift))


@NODES.register("norm")
class Norm(NodeFunction):
    """``Z_v = norm(I_v)``, with one scale and one shift per node.

    Args:
        num_nodes: Number of nodes.
        stride: Must be 1.
        norm: ``"batch"`` (over ``B, H, W``, with running statistics) or ``"instance"`` (over
            ``H, W``).
        eps: Added to the variance.
        steps: Number of norms, one per step ``t`` of discrete time; later steps use the last one.
            None for one norm for all steps.

    Raises:
        ValueError: If the norm is unknown, ``stride`` is not 1, ``steps`` is below 1, or ``eps`` is
            not above 0.
    """

    macs_per_pixel = parameters_per_node = 0

    def __init__(
        self,
        num_nodes: int,
        stride: int = 1,
        norm: NormKind = "batch",
        eps: float = 1e-5,
        steps: int | None = None,
    ) -> None:
        if stride != 1:
            raise ValueError(f"norm supports stride 1 only, got {stride}")
        super().__init__(num_nodes)
        self.norm = make_norm(norm, num_nodes, eps, steps)

    @override
    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        return normalised(norm_at(self.norm, t), x)

    @override
    def formula(self, t: float = 0.0) -> Formula:
        return norm_formula(norm_at(self.norm, t))
