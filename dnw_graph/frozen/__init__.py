"""A learned graph, frozen: small, and as fast as its multiply-adds say."""

from dnw_graph.frozen.graph import FrozenGraph, Part
from dnw_graph.frozen.model import FrozenModel, freeze

__all__ = ["FrozenGraph", "FrozenModel", "Part", "freeze"]
