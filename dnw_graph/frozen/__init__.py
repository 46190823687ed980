"""A learned graph, frozen: small, and as fast as its multiply-adds say."""

from dnw_graph.frozen.file import LAYERS, LayerKind, load_frozen, save_frozen
from dnw_graph.frozen.graph import FrozenGraph, Part
from dnw_graph.frozen.model import FrozenModel, freeze

__all__ = [
    "LAYERS",
    "FrozenGraph",
    "FrozenModel",
    "LayerKind",
    "Part",
    "freeze",
    "load_frozen",
    "save_frozen",
]
