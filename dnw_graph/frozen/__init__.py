"""Freeze a trained network: keep what its outputs need, run it faster on a CPU, export it."""

from dnw_graph.frozen.export import to_exported, to_onnx
from dnw_graph.frozen.file import LAYERS, LayerKind, load_frozen, save_frozen
from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.layout import Part
from dnw_graph.frozen.model import FrozenModel, freeze, freeze_graphs
from dnw_graph.frozen.recurrent import FrozenRecurrent
from dnw_graph.frozen.report import LayerReport, Report

__all__ = [
    "LAYERS",
    "FrozenGraph",
    "FrozenModel",
    "FrozenRecurrent",
    "LayerKind",
    "LayerReport",
    "Part",
    "Report",
    "freeze",
    "freeze_graphs",
    "load_frozen",
    "save_frozen",
    "to_exported",
    "to_onnx",
]
