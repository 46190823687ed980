"""The node function of the paper's image networks."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from dnw_graph.node import fused
from dnw_graph.node.base import NODES, Formula, NodeFunction, depthwise_conv
from dnw_graph.node.norm import (
    NormKind,
    make_norm,
    norm_at,
    norm_formula,
    normalised,
    update_running,
)
from dnw_graph.node.sync_norm import SyncBatchNorm2d
from dnw_graph.precision import accepted_dtype


@NODES.register("norm_relu_conv")
class NormReluConv(NodeFunction):
    """``Z_v = K_v * max(norm(I_v), 0)``, ``K_v`` a 3x3 filter of one channel; padding 1, no bias.

    Source: sections 2.1 and 2.4 of the paper; MobileNetV1's depthwise layer, normalised first.

    Args:
        num_nodes: Number of nodes.
        stride: Stride of the convolution.
        norm: ``"batch"`` (over ``B, H, W``, with running statistics) or ``"instance"`` (over
            ``H, W``); both have one scale and one shift per node.
        eps: Added to the variance. A node that has lost its last real edge has variance 0, so the
            gradients of its hallucinated edges are ``1 / sqrt(eps)`` times as large as others: 32
            times for MobileNetV1's 1e-3, 316 times for PyTorch's 1e-5.
        steps: Number of norms, one per step ``t`` of discrete time; later steps use the last one.
            None for one norm for all steps.
        use_fused: Whether to use this library's fused kernels if available. Otherwise PyTorch's
            layers run one after the other; they define the correct result.

    Raises:
        ValueError: If the norm is unknown, ``stride`` or ``steps`` is below 1, or ``eps`` is not
            above 0.
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
        super().__init__(num_nodes, stride)
        self.use_fused = use_fused
        self.norm = make_norm(norm, num_nodes, eps, steps)
        self.conv = depthwise_conv(num_nodes, stride)

    @override
    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
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
            z, statistics = fused.norm_relu_conv(x.to(accepted_dtype(x)).contiguous(), plan)
            self.update_statistics(*statistics, x[0].numel(), t)
            return z
        x = normalised(norm, x).transpose(0, 1)
        return self.conv(F.relu(x)).transpose(0, 1).contiguous()

    def _synchronized(self, x: Tensor, norm: SyncBatchNorm2d) -> Tensor:
        """Return the states, normalised with the statistics of all processes."""
        x = x.to(accepted_dtype(x))
        scale, shift = norm.affine_of(x, (1, 2, 3))
        if not (self.use_fused and fused.available(x, scale)):
            x = torch.addcmul(shift[:, None, None, None], x, scale[:, None, None, None])
            return self.conv(F.relu(x).transpose(0, 1)).transpose(0, 1).contiguous()
        filters = self.conv.weight[:, 0].contiguous()
        plan = fused.plan_without_norm(scale, shift, filters, self.stride)
        return fused.norm_relu_conv(x.contiguous(), plan)[0]

    @override
    def formula(self, t: float = 0.0) -> Formula:
        filters = self.conv.weight[:, 0].detach()
        norm = norm_formula(norm_at(self.norm, t))
        return replace(norm, relu=True, filters=filters, stride=self.stride)

    def plan(self, x: Tensor, t: float = 0.0) -> fused.Plan | None:
        """Return the arguments of the fused operator; None if it is not available or not enabled.

        Only the type, device and shape of the inputs ``x [V, B, H, W]`` matter.

        Raises:
            ValueError: If batch norm would compute statistics of a single value.
        """
        norm = norm_at(self.norm, t)
        kind = type(norm)
        batch = kind is nn.BatchNorm2d or (kind is SyncBatchNorm2d and not norm.active)
        supported = batch or kind is nn.InstanceNorm2d
        if not (self.use_fused and supported and fused.available(x, norm.weight)):
            return None
        training = batch and norm.training
        if training and x[0].numel() == 1:
            raise ValueError(
                "batch norm in training needs more than one value per node, got feature maps "
                f"{list(x.shape)}: pass a larger batch or larger images"
            )
        if batch and not training:
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
            given=batch and not training,
        )

    @torch.no_grad()
    def update_statistics(self, mean: Tensor, rstd: Tensor, count: int, t: float = 0.0) -> None:
        """Update the running statistics of a batch norm in training, as PyTorch does.

        Args:
            mean: Means of the nodes ``[V, 1]``.
            rstd: Their ``1 / sqrt(var + eps)``.
            count: Number of values per node.
            t: The time.
        """
        norm = norm_at(self.norm, t)
        is_batch_norm = type(norm) in (nn.BatchNorm2d, SyncBatchNorm2d)
        if not is_batch_norm or not norm.training or not count:
            return
        variance = (rstd[:, 0] ** -2 - norm.eps).clamp_min_(0)
        update_running([norm], mean[:, 0], variance, count)
