"""Neural graphs that learn their own wiring, built on PyTorch Geometric."""

import warnings

with warnings.catch_warnings():  # importing PyTorch Geometric uses deprecated PyTorch features
    warnings.simplefilter("ignore", FutureWarning)
    import torch_geometric.nn  # noqa: F401

from dnw_graph.accounting import Cost, cost
from dnw_graph.edit import edited
from dnw_graph.frozen import freeze, freeze_graphs, load_frozen, save_frozen
from dnw_graph.neural_graph import GraphState, NeuralGraph
from dnw_graph.sparse import bake, sparsify, sparsity
from dnw_graph.topology import Role, Topology, read_graph, write_graph
from dnw_graph.wiring import Rule, Wiring, attach, inherit, penalty

__version__ = "0.1.0"

__all__ = [
    "Cost",
    "GraphState",
    "NeuralGraph",
    "Role",
    "Rule",
    "Topology",
    "Wiring",
    "__version__",
    "attach",
    "bake",
    "cost",
    "edited",
    "freeze",
    "freeze_graphs",
    "inherit",
    "load_frozen",
    "penalty",
    "read_graph",
    "save_frozen",
    "sparsify",
    "sparsity",
    "write_graph",
]
