"""What a node computes from its input: Z = f(I, t)."""

from dnw_graph.node.base import NODES, NodeFunction, make_node
from dnw_graph.node.norm_relu_conv import NormReluConv
from dnw_graph.node.pointwise import Identity, Relu

__all__ = ["NODES", "Identity", "NodeFunction", "NormReluConv", "Relu", "make_node"]
