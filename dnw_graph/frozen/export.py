"""Export frozen networks to ONNX and to PyTorch's exported programs."""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dnw_graph._files import replacing
from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.model import FrozenModel
from dnw_graph.neural_graph import NeuralGraph

TOLERANCE = 1e-4  # largest difference from the frozen network, relative to its largest output


def to_exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    """Return a frozen network as a program of ordinary operators, for any number of images.

    Args:
        model: The result of :func:`freeze` or :func:`freeze_graphs`.
        example: An input ``[B, ...]``; the program takes inputs of this shape for any ``B``.

    Raises:
        ValueError: If the network has graphs that are not frozen, or the program's outputs differ
            from those of the network.
    """
    if any(isinstance(module, NeuralGraph) for module in model.modules()):
        raise ValueError(
            "the network has graphs that are not frozen: pass freeze(model), or "
            "freeze_graphs(model)"
        )
    example = torch.cat([example[:1]] * 2)  # a batch of one would become a constant
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FrozenGraph):
                module.make_matrices()
        if isinstance(model, FrozenModel):
            whole: nn.Module = model
            batch: Any = torch.export.Dim("batch")
        else:  # no submodule "graph" is allowed at the top; AUTO allows bounded batches
            whole, batch = nn.Sequential(model), torch.export.Dim.AUTO
        program = torch.export.export(whole, (example,), dynamic_shapes=({0: batch},))
        module = program.module()
        _check_outputs(model, lambda x: module(x), example, "torch.export")
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
        path: The file to write.
        notes: Metadata properties for the file.

    Raises:
        ValueError: If ONNX Runtime's outputs differ from those of the network, in which case no
            file is written; or as for :func:`to_exported`.
        ModuleNotFoundError: If onnx, onnxscript or onnxruntime is missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f'{name} is missing: pip install "dnw-graph[export]"')
    import onnxruntime

    content = _onnx_content(to_exported(model, example), example, notes or {})
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])

    _check_outputs(model, run, example, "ONNX Runtime")
    with replacing(path) as partial:
        partial.write_bytes(content)


def _onnx_content(
    program: torch.export.ExportedProgram, example: Tensor, notes: Mapping[str, str]
) -> bytes:
    """Return a program as the content of an ONNX file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own code
        onnx_program = torch.onnx.export(
            program,
            (torch.cat([example[:1]] * 2),),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            verbose=False,
        )
    assert onnx_program is not None
    proto = onnx_program.model_proto
    _name_batch(proto)
    for key, value in notes.items():
        proto.metadata_props.add(key=key, value=value)
    content: bytes = proto.SerializeToString()
    return content


def _name_batch(proto: Any) -> None:
    """Rename the axis of images to "batch" throughout a model; the exporter generates a name."""
    graph = proto.graph
    generated = graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*graph.input, *graph.output, *graph.value_info):
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param == generated:
                size.dim_param = "batch"


def _check_outputs(model: nn.Module, exported: object, example: Tensor, name: str) -> None:
    """Raise ValueError if an exported network's outputs differ from those of the network.

    Args:
        model: The network.
        exported: The exported network, a function of inputs.
        example: An input; random ones of its shape are compared, for batches of 1 and 3.
        name: Name of what runs the exported network, for the message.
    """
    assert callable(exported)
    generator = np.random.default_rng(0)
    for images in (1, 3):
        shape = (images, *example.shape[1:])
        x = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        with torch.no_grad():
            expected, got = model(x), exported(x)
        error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        if not error <= TOLERANCE:
            raise ValueError(
                f"outputs of the exported network in {name} differ from those of the network by "
                f"{error:.1e} of the largest output, more than {TOLERANCE}"
            )
