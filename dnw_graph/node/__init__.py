"""Node functions: what a node computes from its input, Z = f(I, t)."""

from dnw_graph.node.base import NODES, Formula, NodeFunction, WithoutTime, make_node
from dnw_graph.node.norm import Norm
from dnw_graph.node.norm_relu_conv import NormReluConv
from dnw_graph.node.pointwise import Bias, Gelu, Identity, Linear, Pointwise, Relu, Tanh
from dnw_graph.node.relu_conv import ReluConv
from dnw_graph.node.sync_norm import SyncBatchNorm2d, synchronize_norms

__all__ = [
    "NODES",
    "Bias",
    "Formula",
    "Gelu",
    "Identity",
    "Linear",
    "NodeFunction",
    "Norm",
    "NormReluConv",
    "Pointwise",
    "Relu",
    "ReluConv",
    "SyncBatchNorm2d",
    "Tanh",
    "WithoutTime",
    "make_node",
    "synchronize_norms",
]
