"""Save frozen networks to one file and load them: weights, edges, and the order of layers."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from dnw_graph._files import replacing
from dnw_graph._registry import Registry
from dnw_graph.frozen.graph import FrozenGraph
from dnw_graph.frozen.layout import TENSORS, Part
from dnw_graph.frozen.model import FrozenModel
from dnw_graph.frozen.recurrent import FrozenRecurrent
from dnw_graph.schedule import Discrete
from dnw_graph.topology import Role

FORMAT = "dnw-graph frozen 1"
MOST = 2**20  # largest absolute value of a layer's option
WORDS = ("zeros", "reflect", "replicate", "circular", "same", "valid")


class LayerKind(NamedTuple):
    """A layer that a file may hold: its class, and the attributes that are passed to rebuild it."""

    build: type[nn.Module]
    options: tuple[str, ...] = ()


LAYERS: Registry[LayerKind] = Registry("layer")
"""Layers that a file may hold, by name; loading a file runs no other code."""

for _kind in (
    LayerKind(
        nn.Conv2d,
        (
            *("in_channels", "out_channels", "kernel_size", "stride", "padding"),
            *("dilation", "groups", "bias", "padding_mode"),
        ),
    ),
    LayerKind(nn.Linear, ("in_features", "out_features", "bias")),
    LayerKind(nn.BatchNorm1d, ("num_features", "eps", "affine", "track_running_stats")),
    LayerKind(nn.BatchNorm2d, ("num_features", "eps", "affine", "track_running_stats")),
    LayerKind(nn.ReLU),
    LayerKind(nn.AdaptiveAvgPool2d, ("output_size",)),
    LayerKind(
        nn.AvgPool2d,
        (
            *("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
            "divisor_override",
        ),
    ),
    LayerKind(nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    LayerKind(nn.Flatten, ("start_dim", "end_dim")),
):
    LAYERS.register(_kind.build.__name__)(_kind)


def save_frozen(
    model: FrozenModel, path: str | os.PathLike[str], notes: Mapping[str, str] | None = None
) -> None:
    """Write a frozen network to a safetensors file, which :func:`load_frozen` reads.

    Args:
        model: The network.
        path: The file to write.
        notes: Text by name to store with it, such as the names of classes; ``model.notes`` unless
            passed.

    Raises:
        TypeError: If ``model`` is not a :class:`FrozenModel`.
        ValueError: If a file cannot hold one of the layers (the message lists those that it can),
            or ``path`` is a folder.
    """
    if not isinstance(model, FrozenModel):
        raise TypeError(
            f"expected a FrozenModel, as freeze() returns, got {type(model).__name__}; save what "
            "freeze_graphs() returns with torch.save, or export it"
        )
    layers = [_described(layer) for layer in model]
    tensors = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    text = json.dumps({"layers": layers, "notes": dict(model.notes if notes is None else notes)})
    metadata = {"format": FORMAT, "model": text, "sha256": _digest(text, tensors)}
    content = save({name: x.clone() for name, x in tensors.items()}, metadata)
    if Path(path).is_dir():
        raise ValueError(f"{os.fspath(path)} is a folder: pass the path of a file")
    with replacing(path) as partial:
        partial.write_bytes(content)


def load_frozen(path: str | os.PathLike[str]) -> FrozenModel:
    """Load a network that :func:`save_frozen` wrote; nothing in the file is executed.

    Returns:
        The network, on the CPU.

    Raises:
        ValueError: If the file is damaged, or does not hold a frozen network.
        FileNotFoundError: If the file does not exist.
    """
    content = Path(path).read_bytes()
    try:
        metadata, tensors = _metadata(content), load(content)
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, expected {FORMAT!r}")
        text = str(metadata.get("model"))
        if metadata.get("sha256") != _digest(text, tensors):
            raise ValueError("its checksum does not match its content")
        description = json.loads(text)
        model = _rebuild(description["layers"], tensors)
        model.notes = {str(key): str(value) for key, value in description["notes"].items()}
        return model
    except (
        *(SafetensorError, ValueError, TypeError, KeyError, IndexError, AttributeError),
        *(RuntimeError, OverflowError, RecursionError),
    ) as error:
        raise ValueError(
            f"{os.fspath(path)} is not a frozen network of this version, or it is damaged: {error}"
        ) from error


def _metadata(content: bytes) -> dict[str, Any]:
    """Return the metadata of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    if len(content) < 8 or length > len(content) - 8:
        raise ValueError("it ends too early")
    header = json.loads(content[8 : 8 + length])
    metadata: dict[str, Any] = dict(header["__metadata__"])
    return metadata


def _digest(text: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 checksum of a description and tensors."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        x = tensors[name]
        digest.update(f"{name} {x.dtype} {list(x.shape)}".encode())
        digest.update(x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _described(layer: nn.Module) -> dict[str, Any]:
    """Return a layer's name and options, or a graph's parts and strides, for a file."""
    if isinstance(layer, FrozenGraph):
        parts = [dataclasses.asdict(part) for part in layer.parts]
        described = {"layer": "FrozenGraph", "parts": parts, "strides": layer.strides}
        if layer.state_dtype != torch.float32:
            described["state_dtype"] = str(layer.state_dtype).removeprefix("torch.")
        return described
    if isinstance(layer, FrozenRecurrent):
        schedule = {name: getattr(layer.schedule, name) for name in ("steps", "input", "read")}
        return {
            "layer": "FrozenRecurrent",
            "step": _described(layer.step),
            "start": _described(layer.start),
            "schedule": schedule,
            "num_nodes": layer.num_nodes,
            "num_inputs": layer.num_inputs,
        }
    name = type(layer).__name__
    if name not in LAYERS or LAYERS[name].build is not type(layer):
        raise ValueError(
            f"a file cannot hold the layer {name} (known: {', '.join(LAYERS)}); see "
            "dnw_graph.frozen.LAYERS"
        )
    options = {option: getattr(layer, option) for option in LAYERS[name].options}
    if "bias" in options:
        options["bias"] = options["bias"] is not None
    return {"layer": name, "options": options}


def _rebuild(descriptions: list[dict[str, Any]], tensors: dict[str, Tensor]) -> FrozenModel:
    """Return a network of layers as :func:`_described` returns them, with tensors by name."""
    layers = []
    for at, description in enumerate(descriptions):
        layers.append(_rebuild_layer(description, _below(f"{at}.", tensors)))
    unknown = tensors.keys() - FrozenModel(*layers).state_dict().keys()
    if unknown:
        raise ValueError(f"it has tensors that belong to no layer: {', '.join(sorted(unknown))}")
    return FrozenModel(*layers).eval().requires_grad_(False)


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with a prefix, named without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def _rebuild_layer(description: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """Return one layer with its tensors.

    Raises:
        ValueError: If an option or tensor does not fit the layer.
    """
    name = description["layer"]
    if name == "FrozenGraph":
        parts = [Part(**{**part, "role": Role(part["role"])}) for part in description["parts"]]
        if tensors.keys() != set(TENSORS):
            raise ValueError(
                f"a graph has the tensors {', '.join(TENSORS)}, got {', '.join(sorted(tensors))}"
            )
        graph = FrozenGraph(parts, tuple(description["strides"]), **tensors)
        graph.state_dtype = getattr(torch, description.get("state_dtype", "float32"))
        return graph
    if name == "FrozenRecurrent":
        step, start = (
            _rebuild_layer(description[part], _below(f"{part}.", tensors))
            for part in ("step", "start")
        )
        if not (isinstance(step, FrozenGraph) and isinstance(start, FrozenGraph)):
            raise ValueError("the steps of a recurrent graph must be graphs")
        schedule = Discrete(**description["schedule"])
        if schedule.steps > MOST:
            raise ValueError(f"a graph of {schedule.steps:,} steps: expected {MOST:,} or fewer")
        return FrozenRecurrent(
            step,
            start,
            schedule,
            int(description["num_nodes"]),
            int(description["num_inputs"]),
            {key: x for key, x in tensors.items() if "." not in key},
        )
    options = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in description["options"].items()
    }
    for key, value in options.items():
        for number in value if isinstance(value, tuple) else (value,):
            is_small = isinstance(number, int | float | None) and abs(number or 0) <= MOST
            if not is_small and number not in WORDS:
                raise ValueError(
                    f"{key} of a layer {name} is {value!r}: expected numbers up to {MOST}, or one "
                    f"of {', '.join(WORDS)}"
                )
    with torch.device("meta"):  # no memory for sizes that do not fit the tensors
        layer = LAYERS[name].build(**options)
    layer.load_state_dict(tensors, assign=True)
    if any(x.is_floating_point() and x.dtype != torch.float32 for x in tensors.values()):
        raise ValueError(f"weights of a layer {name} must be float32")
    return layer
