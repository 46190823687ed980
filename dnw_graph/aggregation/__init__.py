"""How messages are summed: I = A Z, with straight-through gradients to every candidate."""

from dnw_graph.aggregation.auto import Auto
from dnw_graph.aggregation.base import BACKENDS, Aggregation
from dnw_graph.aggregation.dense import Dense
from dnw_graph.aggregation.reference import Reference
from dnw_graph.aggregation.sparse import Sparse
from dnw_graph.aggregation.whole import Correlation

__all__ = [
    "BACKENDS",
    "Aggregation",
    "Auto",
    "Correlation",
    "Dense",
    "Reference",
    "Sparse",
]
