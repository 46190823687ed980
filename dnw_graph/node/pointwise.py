"""Node functions without parameters."""

from torch import Tensor

from dnw_graph.node.base import NODES, Formula, NodeFunction


class _Pointwise(NodeFunction):
    macs_per_pixel = parameters_per_node = 0

    def __init__(self, num_nodes: int, stride: int = 1) -> None:
        if stride != 1:
            raise ValueError(
                f"{type(self).__name__} has no stride, got {stride}: use stride 1, or "
                '"norm_relu_conv" at the input nodes'
            )
        super().__init__(num_nodes, stride)


@NODES.register("identity")
class Identity(_Pointwise):
    """``Z = I``: outputs, and the inputs of equation 1. Any features."""

    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        """See :meth:`NodeFunction.forward`."""
        return x

    def formula(self, t: float = 0.0) -> Formula:
        """See :meth:`NodeFunction.formula`."""
        return Formula()


@NODES.register("relu")
class Relu(_Pointwise):
    """``Z = max(I, 0)``: a perceptron's neuron (section 2.1 of the paper). Any features."""

    def forward(self, x: Tensor, t: float = 0.0) -> Tensor:
        """See :meth:`NodeFunction.forward`."""
        return x.relu()

    def formula(self, t: float = 0.0) -> Formula:
        """See :meth:`NodeFunction.formula`."""
        return Formula(relu=True)
