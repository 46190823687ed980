"""The node function of the paper's image networks."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnw_graph.node import fused
from dnw_graph.node.base import NODES, Formula, NodeFunction
from dnw_graph.node.norm import NormKind, make_norm, norm_at, norm_formula, normalised
from dnw_graph.node.sync_norm import SyncBatchNorm2d


@NODES.register("norm_relu_conv")
class NormReluConv(NodeFunction):
    """``Z_v = K_v * max(norm(I_v), 0)``, ``K_v`` a 3x3 filter of one channel; padding 1, no bias.

    Source: sections 2.1 and 2.4 of the paper; MobileNetV1's depthwise layer, normalised first.

    Args:
        num_nodes: How many nodes.
        stride: Of the convolution.
        norm: ``"batch"`` (over ``B, H, W``, with running statistics) or ``"instance"`` (over
            ``H, W``); each has a scale and a shift a node.
        eps: Added to the variance. A node that has lost its last real edge has variance 0, and its
            hallucinated edges gradients that are ``1 / sqrt(eps)`` times as large as others': 32
            times for MobileNetV1's own 1e-3, 316 times for PyTorch's 1e-5.
        steps: Number of norms, of which step ``t`` of discrete time has one of its own, and those
            after the last one that; one for all unless given.
        use_fused: Whether kernels of our own do it all at once where there are any; else PyTorch's
            layers do, one after the other, and define what is right.

    Raises:
        ValueError: Another norm, a stride below 1, no steps, or an eps that is not above 0.
    """

    macs_per_pixel = 9
    parameters_per_node = 9

    def __init__(
        self,
        num_nodes: int,
        stride: int = 1,
        norm: NormKind = "batch",
        eps: float = 1e-5,
        steps: int | None = None,
        use_fused: bool = True,
    ) -> None:
        if stride < 1:
            raise ValueError(f"stride must be 1 or more, got {stride}")
        super().__init__(num_nodes, stride)
        self.use_fused = use_fused
        self.norm = make_norm(norm, num_nodes, eps, steps)
        self.conv = nn.Conv2d(
            num_nodes, num_nodes, 3, stride, padding=1, groups=num_nodes, bias=False
        )

    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        """See :meth:`NodeFunction.forward`."""
        if x.dim() != 4:
            raise ValueError(
                f"norm_relu_conv needs feature maps [B, C, H, W], got {x.dim()} dimensions; "
                'use node="relu" for vectors'
            )
        norm = norm_at(self.norm, t)
        if isinstance(norm, SyncBatchNorm2d) and norm.active:
            return self._synchronized(x, norm)
        plan = self.plan(x, t)
        if plan is not None:
            z, statistics = fused.norm_relu_conv(x.to(fused.accepted(x)).contiguous(), plan)
            self.learn(*statistics, x[0].numel(), t)
            return z
        x = normalised(norm_at(self.norm, t), x).transpose(0, 1)
        return self.conv(F.relu(x)).transpose(0, 1).contiguous()

    def _synchronized(self, x: Tensor, norm: SyncBatchNorm2d) -> Tensor:
        """Return the states where statistics are those of all processes."""
        x = x.to(fused.accepted(x))
        scale, shift = norm.affine_of(x, (1, 2, 3))
        if not (self.use_fused and fused.available(x, scale)):
            x = torch.addcmul(shift[:, None, None, None], x, scale[:, None, None, None])
            return self.conv(F.relu(x).transpose(0, 1)).transpose(0, 1).contiguous()
        nothing = scale.detach().new_zeros(len(x), 1)  # statistics are within scale and shift
        plan = fused.Plan(
            scale=scale,
            shift=shift,
            filters=self.conv.weight[:, 0].contiguous(),
            stride=self.stride,
            eps=norm.eps,
            mean=nothing,
            rstd=nothing + 1,
            given=True,
        )
        return fused.norm_relu_conv(x.contiguous(), plan)[0]

    def formula(self, t: float = 0.0) -> Formula:
        """See :meth:`NodeFunction.formula`."""
        filters = self.conv.weight[:, 0].detach()
        norm = norm_formula(norm_at(self.norm, t))
        return replace(norm, relu=True, filters=filters, stride=self.stride)

    def plan(self, x: Tensor, t: float = 0.0) -> fused.Plan | None:
        """Return what one operator needs to do it all at once; None where PyTorch's layers must.

        Only type and shape of the inputs ``x [V, B, H, W]`` matter.

        Raises:
            ValueError: Statistics of a single value.
        """
        norm = norm_at(self.norm, t)
        kind = type(norm)
        batch = kind is nn.BatchNorm2d or (kind is SyncBatchNorm2d and not norm.active)
        known = batch or kind is nn.InstanceNorm2d
        if not (self.use_fused and known and fused.available(x, norm.weight)):
            return None
        learns = batch and norm.training
        if learns and x[0].numel() == 1:
            raise ValueError(
                "batch norm in training needs more than one value a node, got feature maps "
                f"{list(x.shape)}: give a larger batch or larger images"
            )
        if batch and not learns:
            mean, rstd = norm.running_mean[:, None], (norm.running_var + norm.eps).rsqrt()[:, None]
        else:
            like, groups = norm.weight.detach(), 1 if batch else x.shape[1]
            mean, rstd = like.new_empty(len(x), groups), like.new_empty(len(x), groups)
        return fused.Plan(
            scale=norm.weight,
            shift=norm.bias,
            filters=self.conv.weight[:, 0].contiguous(),
            stride=self.stride,
            eps=norm.eps,
            mean=mean,
            rstd=rstd,
            given=batch and not learns,
        )

    @torch.no_grad()
    def learn(self, mean: Tensor, rstd: Tensor, count: int, t: float = 0.0) -> None:
        """Update the running statistics of a batch norm in training, as PyTorch does.

        Args:
            mean: Means of the nodes ``[V, 1]``.
            rstd: Their ``1 / sqrt(var + eps)``.
            count: Of how many values each.
            t: The time.
        """
        norm = norm_at(self.norm, t)
        known = type(norm) in (nn.BatchNorm2d, SyncBatchNorm2d)
        if not known or not norm.training or not count:
            return
        norm.num_batches_tracked += 1
        part = 1 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        unbiased = (rstd**-2 - norm.eps).clamp_min_(0) * (count / (count - 1))
        norm.running_mean.lerp_(mean[:, 0], part)
        norm.running_var.lerp_(unbiased[:, 0], part)
