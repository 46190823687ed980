"""Frozen networks for others to run: ONNX, and PyTorch's exported programs."""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.model import FrozenModel
from dnw_graph.neural_graph import NeuralGraph

TOLERANCE = 1e-4  # largest difference from the network itself, relative to its largest output


def to_exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Return a frozen network as a program of ordinary operators, for any number of images.

    Args:
        model: What :func:`freeze` or :func:`freeze_graphs` returned.
        example: An input ``[B, ...]``; all but the number of images will be as here.

    Raises:
        ValueError: The program computes something else.
    """
    if any(isinstance(module, NeuralGraph) for module in model.modules()):
        raise ValueError(
            "the network has graphs that are not frozen: give freeze(model), or "
            "freeze_graphs(model)"
        )
    example = torch.cat([example[:1]] * 2)  # of one image, its number would not be free
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenGraph):
                module.make_matrices()
        if isinstance(model, FrozenModel):
            whole: nn.Module = model
            batch: Any = torch.export.Dim("batch")
        else:  # a submodule called "graph" must not be at the top, and shapes may be bounded
            whole, batch = nn.Sequential(model), torch.export.Dim.AUTO
        program = torch.export.export(whole, (example,), dynamic_shapes=({0: batch},))
        module = program.module()
        _check(model, lambda x: module(x), example, "torch.export")
    return program


def to_onnx(
    model: nn.Module,
    example: Tensor,
    path: str | os.PathLike[str],
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write a frozen network to an ONNX file of ordinary operators, for any number of images.

    Args:
        model: As for :func:`to_exported`.
        example: As for :func:`to_exported`.
        path: The file.
        notes: Kept in it as properties.

    Raises:
        ValueError: ONNX Runtime computes something else with it; nothing is written then.
        ModuleNotFoundError: onnx, onnxscript or onnxruntime are missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f'{name} is missing: pip install "dnw-graph[export]"')
    import onnxruntime

    program = to_exported(model, example)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what the exporter itself uses
        made = torch.onnx.export(
            program,
            (torch.cat([example[:1]] * 2),),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    assert made is not None
    proto = made.model_proto
    _name_batch(proto)
    for key, value in (notes or {}).items():
        proto.metadata_props.add(key=key, value=value)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    _check(model, run, example, "ONNX Runtime")
    temporary = Path(f"{os.fspath(path)}.part")
    temporary.write_bytes(content)
    temporary.replace(path)


def _name_batch(proto: Any) -> None:
    """Call the axis of images "batch" throughout a model; the exporter makes up a name."""
    graph = proto.graph
    made_up = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == made_up:
                size.dim_param = "batch"


def _check(model: nn.Module, other: object, example: Tensor, name: str) -> None:
    """Raise where something else computes something else, for other numbers of images."""
    assert callable(other)
    generator = np.random.default_rng(0)
    for images in (1, 3):
        shape = (images, *example.shape[1:])
        x = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        with torch.no_grad():
            expected, got = model(x), other(x)
        apart = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not apart <= TOLERANCE:
            raise ValueError(
                f"what was exported computes something else by {name}: it differs by {apart:.1e} "
                f"of the largest output, more than {TOLERANCE}"
            )
