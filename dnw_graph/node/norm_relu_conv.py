"""The node function of the paper's image networks."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dnw_graph.node.base import NODES, NodeFunction


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

    Raises:
        ValueError: Another norm, a stride below 1, or an eps that is not above 0.
    """

    macs_per_pixel = 9
    parameters_per_node = 9

    def __init__(
        self,
        num_nodes: int,
        stride: int = 1,
        norm: Literal["batch", "instance"] = "batch",
        eps: float = 1e-5,
    ) -> None:
        if stride < 1:
            raise ValueError(f"stride must be 1 or more, got {stride}")
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        super().__init__(num_nodes, stride)
        if norm == "batch":
            self.norm: nn.Module = nn.BatchNorm2d(num_nodes, eps=eps)
        elif norm == "instance":
            self.norm = nn.InstanceNorm2d(num_nodes, eps=eps, affine=True)
        else:
            raise ValueError(f"unknown norm {norm!r} (known: batch, instance)")
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
        nodes, batch, height, width = x.shape
        if isinstance(self.norm, nn.InstanceNorm2d):
            x = self.norm(x.transpose(0, 1))
        else:  # node-major maps are one image of B * H rows: no copy, and the same statistics
            x = self.norm(x.reshape(1, nodes, batch * height, width)).view_as(x).transpose(0, 1)
        return self.conv(F.relu(x)).transpose(0, 1).contiguous()
