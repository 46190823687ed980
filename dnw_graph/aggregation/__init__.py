"""Backends, which sum messages: I = A Z, with straight-through gradients to every candidate."""

from dnw_graph._deprecated import renamed
from dnw_graph.aggregation._kernels import TYPES, by_source, push, wide
from dnw_graph.aggregation.auto import Auto
from dnw_graph.aggregation.base import BACKENDS, Backend
from dnw_graph.aggregation.dense import Dense
from dnw_graph.aggregation.reference import Reference
from dnw_graph.aggregation.sparse import Sparse
from dnw_graph.aggregation.whole import Correlation

__all__ = [
    "BACKENDS",
    "TYPES",
    "Auto",
    "Backend",
    "Correlation",
    "Dense",
    "Reference",
    "Sparse",
    "by_source",
    "push",
    "wide",
]

__getattr__ = renamed(__name__, {"Aggregation": "Backend"})
