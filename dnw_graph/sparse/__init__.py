"""Networks of other people made sparse: every weight is a candidate edge."""

from dnw_graph.sparse.budgets import Spread
from dnw_graph.sparse.layers import SparseWeight, evaluation_weight, sparse_layers_of
from dnw_graph.sparse.report import LayerSparsity, Sparsity, sparsity
from dnw_graph.sparse.sparsify import bake, sparsify

__all__ = [
    "LayerSparsity",
    "SparseWeight",
    "Sparsity",
    "Spread",
    "bake",
    "evaluation_weight",
    "sparse_layers_of",
    "sparsify",
    "sparsity",
]
