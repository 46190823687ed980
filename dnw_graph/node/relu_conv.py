"""ReLU, followed by one 3x3 filter per node."""

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from dnw_graph.node import fused
from dnw_graph.node.base import NODES, Formula, NodeFunction, depthwise_conv
from dnw_graph.precision import accepted_dtype


@NODES.register("relu_conv")
class ReluConv(NodeFunction):
    """``Z_v = K_v * max(I_v, 0)``, ``K_v`` a 3x3 filter of one channel; padding 1, no bias.

    Args:
        num_nodes: Number of nodes.
        stride: Stride of the convolution.
        use_fused: Whether to use this library's fused kernels if available.

    Raises:
        ValueError: If ``stride`` is below 1.
    """

    macs_per_pixel = 9
    parameters_per_node = 9

    def __init__(self, num_nodes: int, stride: int = 1, use_fused: bool = True) -> None:
        super().__init__(num_nodes, stride)
        self.use_fused = use_fused
        self.conv = depthwise_conv(num_nodes, stride)

    @override
    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        weight = self.conv.weight
        if not (self.use_fused and fused.available(x, weight)):
            return self.conv(F.relu(x).transpose(0, 1)).transpose(0, 1).contiguous()
        ones, zeros = weight.new_ones(len(x)), weight.new_zeros(len(x))
        plan = fused.plan_without_norm(ones, zeros, weight[:, 0].contiguous(), self.stride)
        z, _ = fused.norm_relu_conv(x.to(accepted_dtype(x)).contiguous(), plan)
        return z

    @override
    def formula(self, t: float = 0.0) -> Formula:
        return Formula(relu=True, filters=self.conv.weight[:, 0].detach(), stride=self.stride)
