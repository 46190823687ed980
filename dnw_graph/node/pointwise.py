"""Elementwise node functions."""

import math
from abc import abstractmethod
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from dnw_graph.node.base import NODES, Formula, NodeFunction


class Pointwise(NodeFunction):
    r"""``Z_v = φ(a_v I_v + b_v)`` with an activation ``φ``, for features of any shape.

    Args:
        num_nodes: Number of nodes.
        stride: Must be 1.
        scale: Whether each node has a factor ``a_v``, initially 1.
        bias: Whether each node has a bias ``b_v``, initially 0.

    Raises:
        ValueError: If ``stride`` is not 1.
    """

    #: Name of the activation, which selects it in compiled code.
    activation: ClassVar[str]
    scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self, num_nodes: int, stride: int = 1, *, scale: bool = False, bias: bool = False
    ) -> None:
        if stride != 1:
            raise ValueError(
                f"{type(self).__name__} supports stride 1 only, got {stride}: use stride 1, or "
                '"norm_relu_conv" at the input nodes'
            )
        super().__init__(num_nodes, stride)
        self.scale = nn.Parameter(torch.ones(num_nodes)) if scale else None
        self.bias = nn.Parameter(torch.zeros(num_nodes)) if bias else None
        self.macs_per_pixel = int(scale)
        self.parameters_per_node = int(scale) + int(bias)

    def reset_parameters(self) -> None:
        """Set factors to 1 and biases to 0."""
        with torch.no_grad():
            if self.scale is not None:
                self.scale.fill_(1)
            if self.bias is not None:
                self.bias.zero_()

    @override
    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        shape = [-1] + [1] * (x.dim() - 1)
        if self.scale is not None:
            x = x * self.scale.to(x.dtype).view(shape)
        if self.bias is not None:
            x = x + self.bias.to(x.dtype).view(shape)
        return self.activate(x)

    @abstractmethod
    def activate(self, u: Tensor) -> Tensor:
        """Return ``φ(u)``."""

    @override
    def formula(self, t: float = 0.0) -> Formula | None:
        if self.activation not in ("identity", "relu"):
            return None
        scale, shift = self.scale, self.bias
        if shift is not None and scale is None:
            scale = torch.ones_like(shift)
        return Formula(
            scale=None if scale is None else scale.detach(),
            shift=None if shift is None else shift.detach(),
            relu=self.activation == "relu",
        )


@NODES.register("identity")
class Identity(Pointwise):
    """``Z = I``, for outputs and the inputs of equation 1. See :class:`Pointwise` for arguments."""

    activation = "identity"

    @override
    def activate(self, u: Tensor) -> Tensor:
        return u


@NODES.register("relu")
class Relu(Pointwise):
    """``Z = max(I, 0)``: a perceptron's neuron (section 2.1 of the paper).

    See :class:`Pointwise` for arguments.
    """

    activation, gain = "relu", math.sqrt(2)

    @override
    def activate(self, u: Tensor) -> Tensor:
        return u.relu()


@NODES.register("gelu")
class Gelu(Pointwise):
    """``Z = I Φ(I)`` with the normal distribution function ``Φ`` (Hendrycks and Gimpel 2016).

    See :class:`Pointwise` for arguments.
    """

    activation, gain = "gelu", 1.5335

    @override
    def activate(self, u: Tensor) -> Tensor:
        return F.gelu(u)


@NODES.register("tanh")
class Tanh(Pointwise):
    """``Z = tanh(I)``. See :class:`Pointwise` for arguments."""

    activation, gain = "tanh", 1.5925

    @override
    def activate(self, u: Tensor) -> Tensor:
        return u.tanh()


@NODES.register("bias")
class Bias(Identity):
    """``Z_v = I_v + b_v``.

    Args:
        num_nodes: Number of nodes.
        stride: Must be 1.
    """

    def __init__(self, num_nodes: int, stride: int = 1) -> None:
        super().__init__(num_nodes, stride, bias=True)


@NODES.register("linear")
class Linear(Identity):
    """``Z_v = a_v I_v + b_v``.

    Args:
        num_nodes: Number of nodes.
        stride: Must be 1.
    """

    def __init__(self, num_nodes: int, stride: int = 1) -> None:
        super().__init__(num_nodes, stride, scale=True, bias=True)
