"""Sparse versions of any network: every weight is a candidate edge."""

from dnw_graph.sparse.budgets import Spread
from dnw_graph.sparse.layers import (
    Layer,
    SparseWeight,
    Weight,
    parameters_of,
    sparse_weights_of,
    weights_of,
)
from dnw_graph.sparse.report import LayerSparsity, Sparsity, sparsity
from dnw_graph.sparse.sparsify import bake, sparsify

__all__ = [
    "Layer",
    "LayerSparsity",
    "SparseWeight",
    "Sparsity",
    "Spread",
    "Weight",
    "bake",
    "parameters_of",
    "sparse_weights_of",
    "sparsify",
    "sparsity",
    "weights_of",
]
