"""Networks of other people made sparse: every weight is a candidate edge."""

from dnw_graph.sparse.budgets import Spread
from dnw_graph.sparse.layers import (
    Layer,
    SparseWeight,
    evaluation_weight,
    num_real_weights,
    sparse_layers_of,
    stored_weight,
)
from dnw_graph.sparse.report import LayerSparsity, Sparsity, sparsity
from dnw_graph.sparse.sparsify import bake, sparsify

__all__ = [
    "Layer",
    "LayerSparsity",
    "SparseWeight",
    "Sparsity",
    "Spread",
    "bake",
    "evaluation_weight",
    "num_real_weights",
    "sparse_layers_of",
    "sparsify",
    "sparsity",
    "stored_weight",
]
